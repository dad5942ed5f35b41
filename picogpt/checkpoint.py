"""A model directory to `encoder, hparams, params`, and back.

Two layouts are read. OpenAI's is a TensorFlow checkpoint with `hparams.json`; Hugging Face's is `config.json` with
safetensors files, which are the same thing in a simpler coat: 8 bytes with the length of a JSON header, the header
(name -> dtype, shape, first and last byte), raw numbers. Both become the article's tree of float32 arrays, every
name, shape and dtype checked against the hyper-parameters; float32 stays in the mapped file, nothing is copied.
"""

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from picogpt.encoder import Encoder, get_encoder
from picogpt.tensor_bundle import (
    MAX_INDEX_BYTES,
    CheckpointError,
    Entry,
    check_entries,
    new_file,
    read_index,
    read_small_file,
    read_tensors,
    reading,
    write_bundle,
)

EMBEDDED = "shakespeare"  # the model that comes with the package
OPENAI_SIZES = ("124M", "355M", "774M", "1558M")
OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
OPENAI_FILES = (
    "checkpoint",
    "encoder.json",
    "hparams.json",
    "model.ckpt.data-00000-of-00001",
    "model.ckpt.index",
    "model.ckpt.meta",
    "vocab.bpe",
)

_GPT2_VOCAB = 50257
_PREFIX = "model.ckpt"
_PREVIOUS = "model.ckpt.previous"  # where `save_checkpoint` keeps the old weights until the new ones are whole
_CONFIG_NAMES = {  # ours -> config.json's
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
# What config.json may say: GPT-2's own first, which is also transformers' default.
_CONFIG_OF_GPT2: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Hparams = dict[str, int]
Params = dict[str, Any]


def load_encoder_hparams_and_params(
    model_size: str = "124M", models_dir: str | Path = "models", *, verify: bool = False
) -> tuple[Encoder, Hparams, Params]:
    """Load the model `model_size`: a directory in `models_dir`, or any directory, or "shakespeare".

    Returns the encoder; hparams, the ints n_vocab n_ctx n_embd n_head n_layer; and params, the nested dict that
    `gpt2(inputs, **params, n_head=hparams["n_head"])` takes: float32, read-only, mapped (see `read_tensors`).
    `verify` compares every tensor of a TensorFlow checkpoint with its CRC; safetensors files carry none.
    Raises PicogptError for what is missing, damaged, or no GPT-2.
    """
    directory = find_model_dir(model_size, models_dir)
    hparams, params = load_hparams_and_params(directory, verify=verify)
    return load_encoder(directory, hparams), hparams, params


def find_model_dir(model_size: str, models_dir: str | Path = "models") -> Path:
    """Return the directory that `model_size` names; the error for an unknown one says what to do."""
    if model_size:
        package = Path(__file__).parent
        installed = (package / "models", package.parent / "models") if model_size == EMBEDDED else ()
        for directory in (Path(models_dir, model_size), Path(model_size), *(d / EMBEDDED for d in installed)):
            with suppress(OSError, ValueError):  # names too long, or with a zero byte, are unknown names
                if directory.is_dir():
                    return directory
    if model_size in OPENAI_SIZES:
        raise CheckpointError(f"no model {model_size} yet: {_source(Path(models_dir, model_size))}")
    with suppress(OSError):
        found = sorted(path.name for path in Path(models_dir).iterdir() if path.is_dir())
    known = ", ".join(dict.fromkeys([*found, EMBEDDED, *OPENAI_SIZES]))
    raise CheckpointError(f"no model {model_size!r}: it is neither a directory nor in {models_dir}; there are {known}")
