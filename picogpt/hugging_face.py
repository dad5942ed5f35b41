"""Hugging Face's layout: `config.json` to hyper-parameters, safetensors files to where each tensor lies.

A safetensors file is 8 bytes with the length of a JSON header, the header (name -> dtype, shape, first and last
byte, counted from the header's end), and the raw little-endian numbers without a gap. When a model has several,
`model.safetensors.index.json` says which tensor is in which.
"""

import json
from pathlib import Path
from typing import Any

from picogpt.tensor_bundle import (
    MAX_INDEX_BYTES,
    CheckpointError,
    Entry,
    check_entries,
    file_size,
    read_small_file,
    reading,
)

_SIZES = {"n_vocab": "vocab_size", "n_ctx": "n_positions"} | {n: n for n in ("n_embd", "n_head", "n_layer")}
_GPT2: dict[
    str, tuple[Any, ...]
] = {  # what config.json may say; first what transformers assumes if it is silent
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
    "tie_word_embeddings": (True, False),
    "quantization_config": (None,),
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_config(path: Path) -> tuple[dict[str, Any], bool]:
    """Return the hyper-parameters in config.json by OpenAI's names, and whether the head is tied to wte.

    Raises CheckpointError for a file that asks for other mathematics than GPT-2's. (`reorder_and_upcast_attn`
    asks for the same in another order of operations, and dropout is for training: neither is looked at.)
    """
    config = read_json(path)
    n_embd = config.get("n_embd")
    inner = 4 * n_embd if isinstance(n_embd, int) else None
    # transformers takes num_attention_heads for n_head; of the other sizes the shapes would tell.
    n_head = config.get("n_head", config.get("num_attention_heads"))
    for key, accepted in {**_GPT2, "n_inner": (inner, None), "num_attention_heads": (n_head,)}.items():
        value = config.get(key, accepted[0])
        if value not in accepted:
            raise CheckpointError(
                f"{path}: {key} is {value!r:.60}, GPT-2's is {accepted[0]!r:.60}: this model computes "
                "something else and would run wrongly; choose one with GPT-2's mathematics"
            )
    if missing := [name for name in _SIZES.values() if not isinstance(config.get(name), int)]:
        raise CheckpointError(f"{path} does not say the {', '.join(missing)} of a GPT-2")
    hparams = {ours: config[theirs] for ours, theirs in _SIZES.items()}
    return hparams, bool(config.get("tie_word_embeddings", True))


def hugging_face_name(name: str) -> str:
    """Return Hugging Face's name for a parameter: model/h0/attn/c_attn/w -> h.0.attn.c_attn.weight."""
    _, first, *rest = name.split("/")
    if not rest:  # wte, wpe, lm_head
        return f"{first}.weight"
    *branches, leaf = rest
    block = ["h", first[1:]] if first[1:].isdecimal() else [first]
    return ".".join([*block, *branches, "bias" if leaf == "b" else "weight"])


def read_safetensors_index(directory: Path) -> dict[str, Entry]:
    """Return the entries of the directory's safetensors files, whether one or many, without `transformer.`.

    The buffers that older files hold beside the parameters (the causal mask) are left out.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        found = read_safetensors_header(single)
    elif index.exists():
        found = _read_shards(index)
    elif any(directory.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{directory} has its weights in pytorch_model.bin, a pickle, and loading one can run any program: "
            "if you trust it, load it with transformers; save_pretrained(directory) makes a model.safetensors"
        )
    else:
        raise CheckpointError(f"{directory} has a config.json but no model.safetensors: fetch it into there")
    entries: dict[str, Entry] = {}
    for name, entry in found.items():
        short = name.removeprefix("transformer.")
        if short in entries:
            raise CheckpointError(f"{directory} has {short} twice, with and without 'transformer.'")
        if not short.endswith((".attn.bias", ".attn.masked_bias")):
            entries[short] = entry
    return entries


def read_safetensors_header(path: Path) -> dict[str, Entry]:
    """Return the entry of every tensor in a safetensors file; its numbers are not read.

    Raises CheckpointError unless dtypes, shapes and offsets agree with each other and with the file's size.
    """
    with reading(path):
        size = file_size(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_INDEX_BYTES):
                raise ValueError(f"not a safetensors file: a header of {length} bytes does not fit")
            header = parse_object(file.read(length).decode())  # json would also take UTF-16
        header.pop("__metadata__", None)
        entries = {name: _entry(name, info, path, 8 + length) for name, info in header.items()}
        check_entries(entries)
        expected = 8 + length + sum(entry.size for entry in entries.values())
        if size != expected:
            raise ValueError(
                f"its header describes a file of {expected} bytes, but it has {size}: fetch it again"
            )
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file."""
    with reading(path):
        return parse_object(read_small_file(path))


def parse_object(data: bytes | str) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # nested without end
        raise ValueError(f"not JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError("damaged: not a JSON object")
    return value


def _entry(name: str, info: Any, path: Path, start: int) -> Entry:
    """Return what the header says of one tensor; `start` is where the numbers begin."""
    info = info if isinstance(info, dict) else {}
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 60 for n in numbers):
            raise ValueError(f"damaged: {name!r:.80} has no proper shape and data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1] or not isinstance(dtype, str):
        raise ValueError(f"damaged: {name!r:.80} has no proper dtype and data_offsets")
    first, end = offsets
    return Entry(_DTYPES.get(dtype, dtype), tuple(shape), path, start + first, end - first)


def _read_shards(index: Path) -> dict[str, Entry]:
    """Return the entries of all files named in `model.safetensors.index.json`, each from the file it says."""
    with reading(index):
        shard_of = parse_object(read_small_file(index)).get("weight_map")
        if not isinstance(shard_of, dict):
            raise ValueError("damaged: it has no weight_map")
        for shard in shard_of.values():
            if not isinstance(shard, str) or Path(shard).name != shard[:200] or not shard.isprintable():
                raise ValueError(f"damaged: {shard!r:.80} is not the name of a file beside it")
    found: dict[str, Entry] = {}
    for shard in sorted(set(shard_of.values())):
        for name, entry in read_safetensors_header(index.parent / shard).items():
            if shard_of.get(name, shard) == shard:
                if name in found:
                    raise CheckpointError(f"{index}: damaged: it does not say which file's {name} is meant")
                found[name] = entry
    return found
