"""A model directory to `encoder, hparams, params`, and back.

OpenAI's layout is a TensorFlow checkpoint beside `hparams.json` (tensor_bundle.py), Hugging Face's is
safetensors files beside `config.json` (hugging_face.py). Both become the article's tree of float32 arrays, with
names, shapes and dtypes checked against the hyper-parameters. The numbers stay in the mapped files until used.
"""

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from picogpt.encoder import Encoder, get_encoder
from picogpt.hugging_face import hugging_face_name, read_config, read_json, read_safetensors_index
from picogpt.model_dirs import OPENAI_SIZES, find_model_dir
from picogpt.tensor_bundle import (
    CheckpointError,
    Entry,
    new_file,
    read_index,
    read_small_file,
    read_tensors,
    reading,
    write_bundle,
)

VOCABULARY_FILES = ("encoder.json", "vocab.bpe", "vocab.json", "merges.txt", "tokenizer.json")

# Far above every GPT-2, and low enough that a damaged number cannot keep us busy.
_LARGEST = {"n_vocab": 1 << 24, "n_ctx": 1 << 24, "n_embd": 1 << 20, "n_head": 1 << 20, "n_layer": 1 << 12}
_PREFIX = "model.ckpt"
_PREVIOUS = "model.ckpt.previous"  # `save_checkpoint` keeps the old weights here until the new ones are whole


class NoVocabularyError(CheckpointError):
    """A model directory without a vocabulary, for more or fewer tokens than GPT-2's own has."""


def load_encoder_hparams_and_params(
    model_size: str = "124M", models_dir: str | Path | None = None, *, verify: bool = False
) -> tuple[Encoder, dict[str, int], dict[str, Any]]:
    """Load the model that `model_size` names: see `find_model_dir`. One of OPENAI_SIZES is fetched if it is
    not there: see `download`.

    Returns the encoder; hparams, the ints n_vocab, n_ctx, n_embd, n_head, n_layer; and params, the nested dict
    for `gpt2(inputs, **params, n_head=hparams["n_head"])`, float32, read-only, mapped (see `read_tensors`).
    `verify` compares every tensor of a TensorFlow checkpoint with its CRC; safetensors files have none.
    Raises PicogptError for what is missing, damaged, or not GPT-2.
    """
    directory = find_model_dir(model_size, models_dir)
    if directory is None:
        from picogpt.download import download  # requests takes 90 ms to import

        directory = download(model_size, models_dir)
    hparams, params = load_hparams_and_params(directory, verify=verify)
    return load_encoder(directory, hparams), hparams, params


def load_encoder(directory: Path, hparams: Mapping[str, int]) -> Encoder:
    """Return the directory's encoder, or GPT-2's own if it has none and n_vocab is GPT-2's."""
    if any((directory / name).exists() for name in VOCABULARY_FILES):
        encoder = get_encoder(directory)
    elif hparams["n_vocab"] == 50257:
        encoder = get_encoder()
    else:
        raise NoVocabularyError(f"{directory} has no vocabulary: put encoder.json and vocab.bpe there")
    if encoder.n_vocab > hparams["n_vocab"]:  # fewer is well: vocabularies are padded to round numbers
        raise CheckpointError(
            f"{directory}: the vocabulary has {encoder.n_vocab} tokens, the model only {hparams['n_vocab']}: "
            "they do not belong together"
        )
    return encoder


def load_hparams_and_params(
    directory: str | Path, *, verify: bool = False
) -> tuple[dict[str, int], dict[str, Any]]:
    """Load a model directory without its vocabulary: see `load_encoder_hparams_and_params`."""
    directory = Path(directory)
    with reading(directory):
        hparams, entries = read_entries(directory)
    return hparams, params_tree(read_tensors(entries, verify=verify), hparams["n_layer"])


def params_tree(tensors: Mapping[str, Any], n_layer: int) -> dict[str, Any]:
    """Return the article's nested dict of tensors with OpenAI's names, such as model/h0/attn/c_attn/w."""
    params: dict[str, Any] = {"blocks": [{} for _ in range(n_layer)]}
    for name, tensor in tensors.items():
        _, *branches, leaf = name.split("/")
        node = params
        for key in branches:
            node = params["blocks"][int(key[1:])] if re.fullmatch(r"h\d+", key) else node.setdefault(key, {})
        node[leaf] = tensor
    return params


def parameter_shapes(hparams: Mapping[str, int], *, lm_head: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by OpenAI's name; `lm_head` is there if it is not `wte` itself.

    The only statement of what a GPT-2 consists of: reading, checking and saving all ask here.
    """
    n_vocab, n_ctx, n_embd = hparams["n_vocab"], hparams["n_ctx"], hparams["n_embd"]
    block = {
        "ln_1/g": (n_embd,),
        "ln_1/b": (n_embd,),
        "attn/c_attn/w": (n_embd, 3 * n_embd),
        "attn/c_attn/b": (3 * n_embd,),
        "attn/c_proj/w": (n_embd, n_embd),
        "attn/c_proj/b": (n_embd,),
        "ln_2/g": (n_embd,),
        "ln_2/b": (n_embd,),
        "mlp/c_fc/w": (n_embd, 4 * n_embd),
        "mlp/c_fc/b": (4 * n_embd,),
        "mlp/c_proj/w": (4 * n_embd, n_embd),
        "mlp/c_proj/b": (n_embd,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model/wte": (n_vocab, n_embd), "model/wpe": (n_ctx, n_embd)}
    for i in range(hparams["n_layer"]):
        shapes |= {f"model/h{i}/{name}": shape for name, shape in block.items()}
    shapes |= {"model/ln_f/g": (n_embd,), "model/ln_f/b": (n_embd,)}
    return shapes | ({"model/lm_head": (n_vocab, n_embd)} if lm_head else {})


def shape_tree(tree: Any) -> Any:
    """Return the tree with each array replaced by its shape as a list, as the article prints it."""
    if isinstance(tree, Mapping):
        return {key: shape_tree(branch) for key, branch in tree.items()}
    if isinstance(tree, list | tuple):
        return [shape_tree(branch) for branch in tree]
    return list(tree.shape)


def save_checkpoint(directory: str | Path, hparams: Mapping[str, int], params: Mapping[str, Any]) -> None:
    """Write `checkpoint`, `hparams.json` and `model.ckpt.{index,data-00000-of-00001}` as OpenAI's are.

    params holds NumPy or JAX arrays of float32, or of float16 or bfloat16, which float32 holds exactly: what is
    saved is what is loaded, bit for bit. float64 is refused (`.astype(np.float32)` is the caller's to decide).
    An `lm_head` of its own becomes `model/lm_head`. There is no `model.ckpt.meta`: that is TensorFlow's graph,
    which reading weights does not need. The vocabulary is the caller's to write.

    Nothing is written unless every name, shape and dtype is right. Whenever it is interrupted, the directory
    holds the old checkpoint or the new one, or none if there was none: the file `checkpoint` is replaced last,
    and until then points to the old weights, which wait under another prefix. (If the hyper-parameters change,
    it is removed just before `hparams.json` is replaced: there may be no checkpoint, but never a mixed one.)
    """
    directory = Path(directory)
    hparams = _check_hparams("hparams", hparams)
    tensors = _tensors_to_save(hparams, params)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / "checkpoint").exists() and _current_prefix(directory) == _PREFIX:
            _set_aside(directory)
        write_bundle(directory / _PREFIX, tensors)
        text = json.dumps(hparams, indent=2).encode() + b"\n"
        path = directory / "hparams.json"
        # Left in reverse order: `checkpoint` is replaced last.
        with new_file(directory / "checkpoint") as pointer, new_file(path) as file:
            file.write(text)
            pointer.write(pointer_to(_PREFIX))
            if not path.exists() or path.read_bytes() != text:  # they must not meet the old weights
                (directory / "checkpoint").unlink(missing_ok=True)
        for second_name in directory.glob(f"{_PREVIOUS}.*"):
            second_name.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot save to {directory}: {error.strerror or error}") from error


def _tensors_to_save(hparams: Mapping[str, int], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the checked leaves of params as float32 by OpenAI's names, kernels as [1, in, out]."""
    leaves: dict[str, Any] = {}

    def visit(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for key, child in node.items():
                visit(child, f"{path}/{key}")
        elif isinstance(node, list | tuple):
            for i, child in enumerate(node):
                visit(child, f"{path.removesuffix('/blocks')}/h{i}")
        else:
            leaves[path] = node

    visit(params, "model")
    found = {name: tuple(getattr(leaf, "shape", ())) for name, leaf in leaves.items()}
    _check_shapes("params", found, parameter_shapes(hparams, lm_head="model/lm_head" in leaves))
    for name, leaf in leaves.items():
        if str(getattr(leaf, "dtype", type(leaf))) not in ("float32", "float16", "bfloat16"):
            raise CheckpointError(f"params: {name} is {getattr(leaf, 'dtype', type(leaf))}: make it float32")
    arrays = {name: np.asarray(leaf).astype(np.float32, copy=False) for name, leaf in leaves.items()}
    return {name: array.reshape(_stored(name, array.shape)) for name, array in arrays.items()}


def _check_hparams(where: str | Path, hparams: Mapping[str, Any]) -> dict[str, int]:
    """Return the five hyper-parameters; others, such as a rate of dropout, do not touch the forward pass."""
    checked = {}
    for name, most in _LARGEST.items():
        value = hparams.get(name)
        if type(value) is not int or not 0 < value <= most:
            raise CheckpointError(f"{where}: {name} is {value!r:.40}, not a whole number from 1 to {most}")
        checked[name] = value
    if checked["n_embd"] % checked["n_head"]:
        raise CheckpointError(
            f"{where}: n_embd {checked['n_embd']} cannot be shared out to n_head {checked['n_head']}"
        )
    return checked


def read_entries(directory: Path) -> tuple[dict[str, int], dict[str, Entry]]:
    """Return the hyper-parameters and, by OpenAI's names, where each tensor lies, all checked."""
    if (directory / "hparams.json").exists():
        hparams = _check_hparams(directory / "hparams.json", read_json(directory / "hparams.json"))
        return hparams, _openai_entries(directory, hparams)
    if (directory / "config.json").exists():
        config, tied = read_config(directory / "config.json")
        hparams = _check_hparams(directory / "config.json", config)
        return hparams, _hugging_face_entries(directory, hparams, tied)
    raise CheckpointError(f"{directory} has neither hparams.json nor config.json: {_cure(directory)}")


def _openai_entries(directory: Path, hparams: Mapping[str, int]) -> dict[str, Entry]:
    """Return the checked entries of a TensorFlow checkpoint."""
    if not (directory / "checkpoint").exists():
        raise CheckpointError(
            f"{directory} has no file 'checkpoint', which names the others: {_cure(directory)}"
        )
    return openai_entries(directory, read_index(directory / _current_prefix(directory)), hparams)


def openai_entries(
    where: str | Path, entries: Mapping[str, Entry], hparams: Mapping[str, int]
) -> dict[str, Entry]:
    """Return the entries of an index in the order of `parameter_shapes`, [1, in, out] kernels as [in, out].

    Raises CheckpointError, which begins with `where`, if they are not those of the hyper-parameters.
    """
    shapes = parameter_shapes(hparams, lm_head="model/lm_head" in entries)
    stored = {name: _stored(name, shape) for name, shape in shapes.items()}
    _check_shapes(where, {name: entry.shape for name, entry in entries.items()}, stored)
    return {name: entries[name]._replace(shape=shape) for name, shape in shapes.items()}


def _hugging_face_entries(directory: Path, hparams: Mapping[str, int], tied: bool) -> dict[str, Entry]:
    """Return the checked entries of safetensors files by OpenAI's names."""
    entries = read_safetensors_index(directory)
    shapes = parameter_shapes(hparams, lm_head="lm_head.weight" in entries or not tied)
    theirs = {name: hugging_face_name(name) for name in shapes}
    found = {name: entry.shape for name, entry in entries.items()}
    _check_shapes(directory, found, {theirs[name]: shape for name, shape in shapes.items()})
    ours = {name: entries[theirs[name]] for name in shapes}
    # transformers, too, ties the two only if they are equal.
    if tied and "model/lm_head" in ours and _equal(ours["model/wte"], ours["model/lm_head"]):
        del ours["model/lm_head"]
    return ours


def _equal(a: Entry, b: Entry) -> bool:
    tensors = read_tensors({"a": a, "b": b})
    blocks = range(0, len(tensors["a"]), 1024)  # no memory, and an early end when they differ
    return all(np.array_equal(tensors["a"][at : at + 1024], tensors["b"][at : at + 1024]) for at in blocks)


def _stored(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that OpenAI's file has: kernels are those of a convolution of width 1."""
    return (1, *shape) if name.endswith("/w") else shape


def _check_shapes(
    where: str | Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError with the names of all tensors that are missing, unexpected or of a wrong shape."""
    wrong = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    faults = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "wrong shape": wrong,
    }
    if said := "; ".join(f"{fault}: {_listed(names)}" for fault, names in faults.items() if names):
        raise CheckpointError(f"{where}: the tensors are not those of its hyper-parameters; {said}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def download_command(directory: Path) -> str:
    """Return what to type to complete one of OpenAI's models."""
    place = shlex.quote(str(directory.parent))
    return f"python -m picogpt.download {directory.resolve().name} --models_dir {place}"


def _cure(directory: Path) -> str:
    """Return what to do about a model that is not whole."""
    if directory.name in OPENAI_SIZES:
        return f"`{download_command(directory)}` completes it"
    return f"put a model into {directory}, in OpenAI's layout or Hugging Face's"


def _current_prefix(directory: Path) -> str:
    """Return the prefix of the checkpoint's files, as the file `checkpoint` has it, without any directory."""
    path = directory / "checkpoint"
    with reading(path):
        text = read_small_file(path).decode()
        paths = re.findall(r'^model_checkpoint_path: *"([^"]*)" *\r?$', text, re.MULTILINE)
        name = re.split(r"[/\\:]", paths[0])[-1] if len(paths) == 1 else ""
        if not name.isprintable() or not 0 < len(name) <= 200 or set(name) == {"."}:
            raise ValueError("not one model_checkpoint_path in it: not TensorFlow's file of that name")
    return name


def pointer_to(prefix: str) -> bytes:
    """Return the file `checkpoint`, which names the others, as TensorFlow writes it."""
    return f'model_checkpoint_path: "{prefix}"\nall_model_checkpoint_paths: "{prefix}"\n'.encode()


def _set_aside(directory: Path) -> None:
    """Give the checkpoint's files second names, and make `checkpoint` point to those."""
    for path in [*directory.glob(f"{_PREFIX}.index"), *directory.glob(f"{_PREFIX}.data-?????-of-?????")]:
        link = directory / (_PREVIOUS + path.name.removeprefix(_PREFIX))
        link.unlink(missing_ok=True)
        try:
            link.hardlink_to(path)
        except OSError:  # a file system without links
            shutil.copyfile(path, link)
    with new_file(directory / "checkpoint") as pointer:
        pointer.write(pointer_to(_PREVIOUS))
