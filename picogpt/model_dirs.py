"""Where models live: the directory that a name means, and OpenAI's four sizes."""

import os
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from picogpt import PicogptError

EMBEDDED = "shakespeare"  # the model that comes with the package
OPENAI_SIZES = {
    name: {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_head": n_embd // 64, "n_layer": n_layer}
    for name, n_embd, n_layer in (
        ("124M", 768, 12),
        ("355M", 1024, 24),
        ("774M", 1280, 36),
        ("1558M", 1600, 48),
    )
}
OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
# What the same four are called elsewhere: OpenAI's first counts, and Hugging Face's names.
OTHER_NAMES = {
    **dict.fromkeys(("117M", "gpt2", "gpt2-small", "small"), "124M"),
    **dict.fromkeys(("345M", "gpt2-medium", "medium"), "355M"),
    **dict.fromkeys(("762M", "gpt2-large", "large"), "774M"),
    **dict.fromkeys(("1542M", "1.5B", "gpt2-xl", "xl"), "1558M"),
}


class ModelDirError(PicogptError):
    """A name that means no model."""


def model_dirs(models_dir: str | Path | None = None) -> list[Path]:
    """Return where models are looked for by name; a new one goes into the first.

    That is `models_dir`; else the environment's PICOGPT_MODELS_DIR; else `models` in the working directory, if
    there is one, and the platform's cache directory of the user.
    """
    given = models_dir or os.environ.get("PICOGPT_MODELS_DIR")
    if given:
        return [Path(os.path.expanduser(given))]  # noqa: PTH111 (Path's raises for nobody's ~)
    from platformdirs import user_cache_path

    places = [Path("models")] if Path("models").is_dir() else []
    with suppress(RuntimeError):  # a user without a home
        places.append(user_cache_path("picogpt", appauthor=False, opinion=False) / "models")
    return places or [Path("models")]


def find_model_dir(model_size: str, models_dir: str | Path | None = None) -> Path | None:
    """Return the directory that `model_size` names: one in `model_dirs`, any other, or the embedded model's.

    None says that it is one of OPENAI_SIZES and not here, or not whole. Raises ModelDirError for other names.
    """
    # "." and "../x" are paths, and never joined to a directory in which they would mean something else.
    is_name = (
        model_size
        and model_size == Path(model_size).name
        and model_size != ".."
        and not model_size.startswith("~")
    )
    candidates = [directory / model_size for directory in model_dirs(models_dir)] if is_name else []
    if model_size == EMBEDDED:
        package = Path(__file__).parent  # the model lies in the package when installed, beside it in a checkout
        candidates += [package / "models" / EMBEDDED, package.parent / "models" / EMBEDDED]
    if model_size:
        candidates.append(Path(os.path.expanduser(model_size)))  # noqa: PTH111
    for directory in candidates:
        with suppress(OSError, ValueError):  # too long a name, a zero byte in it
            if directory.is_dir() and (model_size not in OPENAI_SIZES or is_whole(directory)):
                return directory
    if model_size in OPENAI_SIZES:
        return None
    raise ModelDirError(f"there is no model {model_size!r}: {_cure(model_size, models_dir)}")


def is_whole(directory: Path) -> bool:
    """Whether a model is complete there: what names the weights is the last file that is written."""
    return (directory / "checkpoint").exists() or (directory / "config.json").exists()


def known_models(models_dir: str | Path | None = None) -> dict[str, Path]:
    """Return the directories that `model_dirs` hold, by the name that finds them."""
    found: dict[str, Path] = {}
    for parent in model_dirs(models_dir):
        with suppress(OSError):
            for directory in sorted(path for path in parent.iterdir() if path.is_dir()):
                found.setdefault(directory.name, directory)
    return found


def _cure(name: str, models_dir: str | Path | None) -> str:
    if name in OTHER_NAMES:
        return f"it is called {OTHER_NAMES[name]} here"
    known = list(dict.fromkeys([EMBEDDED, *OPENAI_SIZES, *known_models(models_dir)]))
    near = get_close_matches(name, [*known, *(size.lower() for size in OPENAI_SIZES)], n=1)
    ask = f"did you mean {near[0].upper() if near[0] not in known else near[0]}? " if near else ""
    places = " or ".join(repr(str(directory)) for directory in model_dirs(models_dir))
    listed = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
    return f"{ask}It is neither a directory nor one in {places}; known are {listed}"
