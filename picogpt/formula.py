"""A GPT-2 whose every weight is a formula, to check with and not to download: `python -m picogpt.formula DIR`.

2 layers, n_embd 8, 2 heads, 512 tokens, 64 positions. Any language with 32-bit integers recomputes the weights
to the bit. In C, element i (its flat index, from 0) of tensor number t is

    uint32_t h = t << 16 | i;
    h ^= h >> 16;  h *= 0x7feb352d;      // a hash: neighbours share nothing, rows are not collinear
    h ^= h >> 15;  h *= 0x846ca68b;      // (multiplications modulo 2^32; JavaScript has Math.imul)
    h ^= h >> 16;
    float u = ((int)(h >> 12) - 524288) / 524288.0f;      // 20 of its bits: in [-1, 1), nothing rounded
    float weight = base + scale * u;                      // of WEIGHTS; 24 bits hold it: nothing rounded

Tensors are numbered in the order of a checkpoint's parameters: 0 wte, 1 wpe, 2 to 13 the twelve of block 0,
14 to 25 those of block 1, 26 ln_f/g, 27 ln_f/b. Shapes are GPT-2's: kernels are [in, out], flat in C order.

The vocabulary is GPT-2's, cut: the 256 bytes, the first 255 merges, and `<|endoftext|>`, which has the id 511.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from picogpt.checkpoint import parameter_shapes, params_tree
from picogpt.command import UsageError, exit_status, write
from picogpt.encoder import END_OF_TEXT, Encoder, get_encoder
from picogpt.hugging_face import hugging_face_name
from picogpt.tensor_bundle import CheckpointError, new_file
from picogpt.tensor_files import write_safetensors

HPARAMS = {"n_vocab": 512, "n_ctx": 64, "n_embd": 8, "n_head": 2, "n_layer": 2}
# base and scale of each kind, in the order of their numbers. What is added to the residual stream is small, so
# that eps matters; heads look neither everywhere nor at one place; hook_pre reaches 5, so that the two forms of
# GELU differ; biases are about as large as what they are added to; the logits' standard deviation is 2.
WEIGHTS = {
    "wte": (0, 1 / 16),
    "wpe": (0, 1 / 16),
    "ln_1/g": (1, 1 / 2),
    "ln_1/b": (0, 1 / 2),
    "attn/c_attn/w": (0, 3 / 4),
    "attn/c_attn/b": (0, 1 / 2),
    "attn/c_proj/w": (0, 1 / 16),
    "attn/c_proj/b": (0, 1 / 32),
    "ln_2/g": (1, 1 / 2),
    "ln_2/b": (0, 1 / 2),
    "mlp/c_fc/w": (0, 1),
    "mlp/c_fc/b": (0, 1),
    "mlp/c_proj/w": (0, 3 / 32),
    "mlp/c_proj/b": (0, 1 / 32),
    "ln_f/g": (16, 8),
    "ln_f/b": (0, 8),
}


def formula(number: int, shape: Sequence[int], base: float, scale: float):
    """Tensor `number` of the formula's, float32 of `shape`: the C above, on a whole array."""
    h = np.arange(math.prod(shape), dtype=np.uint32) | np.uint32(number << 16)
    h ^= h >> 16
    h *= np.uint32(0x7FEB352D)
    h ^= h >> 15
    h *= np.uint32(0x846CA68B)
    h ^= h >> 16
    u = ((h >> 12).astype(np.float32) - 524288) / 524288
    return (base + scale * u).reshape(shape)


def formula_tensors() -> dict[str, Any]:
    """The 28 tensors, float32, by OpenAI's names and in the order of their numbers."""
    tensors = {}
    for number, (name, shape) in enumerate(parameter_shapes(HPARAMS).items()):
        kind = name.removeprefix("model/").removeprefix("h0/").removeprefix("h1/")
        tensors[name] = formula(number, shape, *WEIGHTS[kind])
    return tensors


def formula_params() -> tuple[dict[str, int], dict[str, Any]]:
    """hparams and params, the article's tree of float32 arrays: what loading the written model gives."""
    return dict(HPARAMS), params_tree(formula_tensors(), HPARAMS["n_layer"])


def formula_encoder() -> Encoder:
    """GPT-2's encoder, cut to the 512 tokens of this model; ids below 511 are GPT-2's own."""
    whole = get_encoder()
    vocabulary = {whole.decoder[i]: i for i in range(511)} | {END_OF_TEXT: 511}
    return Encoder(vocabulary, [*whole.bpe_ranks][:255])


def write_model(directory: str | Path) -> None:
    """Write the model in Hugging Face's layout: config.json, model.safetensors, vocab.json, merges.txt.

    Raises CheckpointError if the directory cannot be made or written.
    """
    directory = Path(directory)
    encoder = formula_encoder()
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "vocab_size": HPARAMS["n_vocab"],
        "n_positions": HPARAMS["n_ctx"],
        **{name: HPARAMS[name] for name in ("n_ctx", "n_embd", "n_head", "n_layer")},
        "bos_token_id": encoder.end_of_text,
        "eos_token_id": encoder.end_of_text,
    }
    merges = "".join(f"{left} {right}\n" for left, right in encoder.bpe_ranks)
    texts = {
        "vocab.json": json.dumps(encoder.encoder),
        "merges.txt": "#version: 0.2\n" + merges,
        "config.json": json.dumps(config, indent=2) + "\n",  # last: a directory with it is taken for whole
    }
    tensors = {hugging_face_name(name): tensor for name, tensor in formula_tensors().items()}
    others = [name for name in (*texts, "model.safetensors") if (directory / name).exists()]
    if others and not _is_ours(directory, texts):
        raise CheckpointError(f"{directory / others[0]} is another model's: choose another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make {directory}: {error.strerror or error}") from error
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    for name, text in texts.items():
        with new_file(directory / name) as file:
            file.write(text.encode("utf-8"))


def _is_ours(directory: Path, texts: Mapping[str, str]) -> bool:
    """Whether nothing there is lost when the formula model is written."""
    with suppress(OSError, UnicodeDecodeError):
        return (directory / "config.json").read_text("utf-8") == texts["config.json"]
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m picogpt.formula DIR`: exit status 0, or 2 if the model cannot be written there."""
    parser = argparse.ArgumentParser(
        prog="python -m picogpt.formula",
        description="Write a tiny GPT-2 whose weights follow a formula, to check an implementation with.",
    )
    parser.add_argument(
        "directory", help="where to write config.json, model.safetensors, vocab.json, merges.txt"
    )
    args = parser.parse_args(argv)

    def command() -> None:
        if not args.directory:
            raise UsageError("the directory is empty text: give one to write to")
        write_model(args.directory)
        write(f"{args.directory}: {sum(t.size for t in formula_tensors().values()):,} parameters\n")

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
