"""Named arrays in a file, whoever wrote it: what a port emits to be compared, and the traces of our own.

    x.safetensors   F64 F32 F16 BF16, integers; read by its header (hugging_face.py), and written here
    x.npz           np.savez: a zip of .npy files;  or one x.npy, whose name is the array's
    folder/         of .npy files, in folders of folders if need be: a/b.npy is "a/b"
    folder/         of raw little-endian float32 in C order, as fwrite leaves it, with a `tensors.json`:
                    {"logits": {"file": "logits.bin", "shape": [5, 50257]}, ...}
    folder/         with `manifest.json` and `trace.safetensors`, as `python -m picogpt.trace` writes it

The content decides, not the extension of a name. NaN and infinities are numbers here.
"""

import json
import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from picogpt import PicogptError
from picogpt.command import count
from picogpt.hugging_face import read_safetensors_header
from picogpt.tensor_bundle import CheckpointError, Entry, file_size, new_file, read_small_file, reading

MANIFEST, TRACE, TENSORS = "manifest.json", "trace.safetensors", "tensors.json"
_DTYPES = {  # three of them hugging_face.py has already given their full names
    **{"F64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "BOOL": "|b1"},
    **{
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "|i1",
        "U64": "<u8",
        "U32": "<u4",
        "U16": "<u2",
        "U8": "|u1",
    },
}
RAW = '{"file": "logits.bin", "shape": [5, 50257]}'  # how tensors.json describes an array
_WRITTEN = {"float64": "F64", "float32": "F32"}
_DAMAGE: tuple[type[Exception], ...] = (  # what np.load lets through
    *(ValueError, EOFError, KeyError, MemoryError, NotImplementedError, RuntimeError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


class TensorFileError(PicogptError):
    """A file or folder out of which no named arrays can be read."""


def read_tensors_file(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays in a file or a folder by their names, in the order in which they are stored.

    Each keeps its dtype (float, integer or bool) and shape; bfloat16 becomes float32. Those of safetensors are
    mapped, not read. Raises TensorFileError for what is missing, cut short, contradicts itself, holds objects
    or text, names an array twice, or holds none.
    """
    path = Path(path)
    try:
        tensors = _read_folder(path) if path.is_dir() else _read_file(path)
    except FileNotFoundError as error:
        raise TensorFileError(f"{error.filename or path} is missing: write it first") from None
    except CheckpointError as error:  # whose cure is for downloads
        raise TensorFileError(str(error).replace("fetch it", "write it")) from None
    except OSError as error:
        raise TensorFileError(f"cannot read {path}: {error.strerror or error}") from None
    if not tensors:
        raise TensorFileError(f"{path} holds no arrays: name and write at least one")
    for name, tensor in tensors.items():
        if tensor.dtype.kind not in "fiub":
            raise TensorFileError(f"{path}: {name} is {tensor.dtype}: only real numbers can be compared")
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write float64 and float32 arrays as one safetensors file, in the order given.

    `metadata` are strings that the format keeps beside the tensors. The file is written under a temporary name
    and takes its place when it is whole. Raises TensorFileError for another dtype or an impossible name.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        if not name or not name.isprintable() or name == "__metadata__":
            raise TensorFileError(f"{path}: {name[:80]!r} cannot be the name of a tensor")
        if tensor.dtype.name not in _WRITTEN:
            raise TensorFileError(f"{path}: {name} is {tensor.dtype}; only float64 and float32 are written")
        span = [at, at := at + tensor.nbytes]
        header[name] = {
            "dtype": _WRITTEN[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8, so that they can be mapped
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            little = np.asarray(tensor, dtype=tensor.dtype.newbyteorder("<"))
            file.write(little.reshape(-1).view(np.uint8).data)


def _read_file(path: Path) -> dict[str, np.ndarray]:
    file_size(path)  # a pipe would keep us waiting
    with path.open("rb") as file:
        magic = file.read(6)
    if magic[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _read_npz(path)
    if magic == b"\x93NUMPY":
        return {path.stem: _read_npy(path)}
    if magic[:2] in (b"\x80\x02", b"\x80\x04"):
        raise TensorFileError(f"{path} is a pickle, which can run any program: save the arrays as .safetensors")
    return _read_safetensors(path)


def _read_folder(path: Path) -> dict[str, np.ndarray]:
    if (path / MANIFEST).exists():
        if not (path / TRACE).exists():
            raise TensorFileError(f"{path} has a {MANIFEST} but no {TRACE}: a smoke reference has no arrays")
        return _read_safetensors(path / TRACE)
    if (path / TENSORS).exists():
        return _read_raw(path)
    files = sorted(path.rglob("*.npy"))
    if not files:
        wanted = f'{{"logits": {RAW}}}'
        raise TensorFileError(f"{path} holds neither .npy files nor, for raw float32, a {TENSORS}: {wanted}")
    return {file.relative_to(path).with_suffix("").as_posix(): _read_npy(file) for file in files}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    entries = read_safetensors_header(path)
    content = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    return {name: _array(name, entry, content) for name, entry in entries.items()}


def _array(name: str, entry: Entry, content: np.ndarray) -> np.ndarray:
    """View one tensor's bytes as what they are."""
    if entry.dtype not in _DTYPES:
        raise TensorFileError(f"{entry.shard}: {name} is {entry.dtype}, which is not read: save it as F32")
    dtype = np.dtype(_DTYPES[entry.dtype])
    if math.prod(entry.shape) * dtype.itemsize != entry.size:
        wrong = f"{name} of shape {list(entry.shape)} cannot have {entry.size} bytes"
        raise TensorFileError(f"{entry.shard}: {wrong}: write it again")
    array = content[entry.offset :][: entry.size].view(dtype).reshape(entry.shape)
    if entry.dtype == "bfloat16":  # the upper half of a float32
        return (array.astype("<u4") << 16).view("<f4")
    return array


def _read_npy(path: Path) -> np.ndarray:
    file_size(path)
    try:
        return np.load(path, allow_pickle=False)
    except _DAMAGE as error:
        raise TensorFileError(f"{path}: {_said(error)}") from None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as file:
            members = file.namelist()
        if any(member.endswith("data.pkl") for member in members):
            cure = "save the tensors with safetensors.torch.save_file"
            raise TensorFileError(f"{path} is torch.save's pickle, which can run any program: {cure}")
        stored = [member.removesuffix(".npy") for member in members]
        if twice := sorted({name for name in stored if stored.count(name) > 1}):
            raise TensorFileError(f"{path} has {twice[0]!r:.80} twice: give each array its own name")
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: arrays[name] for name in stored}
    except _DAMAGE as error:
        raise TensorFileError(f"{path}: {_said(error)}") from None
    for name, tensor in tensors.items():
        if not isinstance(tensor, np.ndarray):  # the bytes of a member that is no .npy
            raise TensorFileError(f"{path}: {name!r:.80} in it is no array: write it with np.savez")
    return tensors


def _said(error: Exception) -> str:
    if "allow_pickle" in str(error):
        return "an array in it holds objects, not numbers: convert it with .astype(float32)"
    if isinstance(error, MemoryError):
        return "an array in it is said to be larger than the memory: write it again"
    return f"damaged or cut short ({str(error) or type(error).__name__:.150}): write it again"


def _read_raw(path: Path) -> dict[str, np.ndarray]:
    with reading(path / TENSORS):
        try:
            described = json.loads(read_small_file(path / TENSORS), object_pairs_hook=_once)
        except RecursionError:  # nested without end
            raise ValueError("not JSON that describes arrays: write it again") from None
    tensors = {}
    entries: dict[str, Any] = described if isinstance(described, dict) else {TENSORS: None}
    for name, info in entries.items():
        if not _is_described(info):
            raise TensorFileError(f"{path / TENSORS}: {name!r:.80} must be described as {RAW}")
        file, shape = path / info["file"], info["shape"]
        expected, found = 4 * math.prod(shape), file_size(file)
        if found != expected:
            said = (
                f"float32 of shape {shape} is {expected} bytes, but the file has {found}{_rows(shape, found)}"
            )
            raise TensorFileError(f"{file}: {said}: write it again")
        tensors[name] = np.fromfile(file, dtype="<f4").reshape(shape)
    return tensors


def _rows(shape: list[int], n_bytes: int) -> str:
    """Say how many rows so many bytes are: most files of a wrong size lack some, or have too many."""
    if n_bytes == 8 * math.prod(shape):
        return ", as float64 would"
    *counts, width = shape or [0]
    if not counts or not width or n_bytes % (4 * width):
        return ""
    rows = n_bytes // (4 * width)
    return f" ({count(rows, 'row')} of {width}, not {math.prod(counts)})"


def _is_described(info: Any) -> bool:
    if not isinstance(info, dict) or not isinstance(info.get("file"), str) or not info["file"].isprintable():
        return False
    shape: Any = info.get("shape")
    proper = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    return proper and len(shape) <= 32


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, unless it has a name twice: json would keep the last without a word."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r:.80} twice: give each array its own name")
    return dict(pairs)
