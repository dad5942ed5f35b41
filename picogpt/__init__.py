"""GPT-2 in pure NumPy: small enough to read, exact enough to check against, fast enough to use."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_ROOM_OF = {
    "gpt2": "model",
    "generate": "generation",
    "stream": "generation",
    "load_encoder_hparams_and_params": "checkpoint",
    "save_checkpoint": "checkpoint",
    "Encoder": "encoder",
    "get_encoder": "encoder",
}

__all__ = [*_ROOM_OF, "PicogptError"]  # noqa: PLE0604


class PicogptError(Exception):
    """What a user can get wrong. The message is one line: the cause, then the cure."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import a public name's room only when the name is asked for (PEP 562)."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'picogpt' has no attribute {name!r}")
    return getattr(import_module(f"picogpt.{_ROOM_OF[name]}"), name)
