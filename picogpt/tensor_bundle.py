"""TensorFlow's V2 checkpoint format (a "tensor bundle"), read memory-mapped and written, without TensorFlow.

The bundle with the prefix `model.ckpt` is two files or more:

    model.ckpt.index                 a LevelDB table: name -> dtype, shape, shard, offset, size, CRC32C
    model.ckpt.data-00000-of-00001   the numbers of all tensors, raw, one tensor after another; or more shards

The values of the table are protocol buffers (tensorflow/core/protobuf/tensor_bundle.proto): under the empty key
a BundleHeaderProto, under each tensor's name a BundleEntryProto. A field that is zero is left out.

Another format that says where raw tensors lie (safetensors) gives its own `Entry`s to the same `read_tensors`.
"""

import math
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from picogpt import PicogptError
from picogpt.leveldb_table import (
    MAX_KEY_BYTES,
    encode_table,
    encode_varint,
    masked_crc32c,
    read_table,
    varint,
)

MAX_INDEX_BYTES = 4 << 20  # what is larger is no index, and must not fill the memory
MAX_TENSORS = 100_000  # nor must names that share all but a byte with the one before

_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_DTYPES = {  # tensorflow/core/framework/types.proto
    1: "float32",
    2: "float64",
    3: "int32",
    7: "string",
    9: "int64",
    10: "bool",
    14: "bfloat16",
    19: "float16",
}
_HEADER = bytes.fromhex("0801 1a020801")  # one shard, format version 1; "little-endian" is 0 and not written

_VARINT, _BYTES, _FIXED32 = 0, 2, 5  # wire types: how a protocol buffer writes a field's value
_Fields = dict[tuple[int, int], list[Any]]  # by number and wire type: with another type it is another field


class CheckpointError(PicogptError):
    """Weights that cannot be read, or written, as they are."""


class Entry(NamedTuple):
    """What one tensor is, and where it lies."""

    dtype: str
    shape: tuple[int, ...]
    shard: Path
    offset: int  # in bytes from the beginning of the shard
    size: int  # in bytes
    crc32c: int | None = None  # masked, as stored; None where the format has none


def read_bundle(prefix: str | Path, *, verify: bool = False) -> dict[str, np.ndarray]:
    """Return every tensor of the bundle as float32: `read_index`, then `read_tensors`."""
    return read_tensors(read_index(prefix), verify=verify)


def read_index(prefix: str | Path) -> dict[str, Entry]:
    """Return the entry of every tensor in `<prefix>.index`, in order of name; no data file is opened.

    The CRC of every block is checked. Raises CheckpointError for an index that is missing, damaged,
    contradicts itself, or uses what GPT-2's checkpoints never do: Snappy, slices, big-endian numbers.
    """
    path = Path(f"{prefix}.index")
    with reading(path):
        return parse_index(read_small_file(path), prefix)


def parse_index(content: bytes, prefix: str | Path) -> dict[str, Entry]:
    """Return what `read_index` does, of an index in memory. Raises ValueError."""
    pairs = read_table(content)
    num_shards = _num_shards(*next(pairs, (b"", b"")))
    entries = dict(_entry(key, value, prefix, num_shards) for key, value in islice(pairs, MAX_TENSORS))
    if next(pairs, None):
        raise ValueError(f"damaged: it has more than {MAX_TENSORS} tensors")
    check_entries(entries)
    return entries


def read_tensors(entries: Mapping[str, Entry], *, verify: bool = False) -> dict[str, np.ndarray]:
    """Return the tensors that `entries` describe, as read-only float32 arrays.

    A float32 tensor is a view into the memory-mapped shard: nothing is read before it is used, and nothing
    is copied (but a tensor that begins at an odd address, where a matrix product is 5 times slower).
    float16 and bfloat16 are widened. `verify` compares each tensor with its CRC, if it has one: the
    shards are read once, behind a progress bar. Raises CheckpointError for another dtype, and for a shard
    that is missing, cut short or damaged.
    """
    raw = _raw(entries)
    for name in _damaged(entries, raw) if verify else ():
        raise CheckpointError(
            f"{entries[name].shard}: the CRC32C of {name} is wrong: the file is damaged, or belongs to another "
            "index; fetch it again"
        )
    return {name: _as_float32(raw[name], entry) for name, entry in entries.items()}


def damaged_tensors(entries: Mapping[str, Entry]) -> list[str]:
    """Return the names of the tensors whose CRC32C is wrong. Raises as `read_tensors` does."""
    return list(_damaged(entries, _raw(entries)))


def write_bundle(prefix: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write float32 arrays as a bundle of one shard, which TensorFlow reads.

    Both files are written under temporary names; then the data file takes its place, and the index last.
    Raises CheckpointError for another dtype, for a name that cannot be a key, and when writing fails.
    """
    shard = Path(f"{prefix}.data-00000-of-00001")
    for name, tensor in tensors.items():
        if not _is_name(name):
            raise CheckpointError(f"{shard}: {name[:80]!r} cannot be the name of a tensor")
        if tensor.dtype != np.float32:
            raise CheckpointError(f"{shard}: {name} is {tensor.dtype}; only float32 is written")
    pairs = [(b"", _HEADER)]
    offset = 0
    # Left in reverse order: the data is in its place before the index that describes it.
    with new_file(Path(f"{prefix}.index")) as index_file, new_file(shard) as data_file:
        for name in sorted(tensors, key=str.encode):
            tensor = np.asarray(tensors[name], dtype="<f4", order="C")
            raw = tensor.reshape(-1).view(np.uint8)
            data_file.write(raw.data)
            entry = Entry("float32", tensor.shape, shard, offset, tensor.nbytes, masked_crc32c(raw))
            pairs.append((name.encode(), _encode_entry(entry)))
            offset += tensor.nbytes
        index_file.write(encode_table(pairs))


def check_entries(entries: Mapping[str, Entry]) -> None:
    """Raise ValueError for a tensor whose size is not its shape's, and for two that claim the same bytes."""
    ends: dict[Path, tuple[int, str]] = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if not _is_name(name) or not _is_name(entry.dtype):
            raise ValueError(f"damaged: {name!r:.80} of dtype {entry.dtype!r:.80} is no proper tensor")
        # An axis of length 0 makes the size 0, but NumPy still multiplies the others; it allows 64 axes.
        if len(entry.shape) > 32 or math.prod(max(n, 1) for n in entry.shape) >= 1 << 60:
            raise ValueError(f"damaged: {name} has an impossible shape of {len(entry.shape)} axes")
        itemsize = _ITEMSIZE.get(entry.dtype)
        if itemsize and math.prod(entry.shape) * itemsize != entry.size:
            raise ValueError(f"damaged: {name} of shape {list(entry.shape)} cannot have {entry.size} bytes")
        end, other = ends.get(entry.shard, (0, ""))
        if entry.size and entry.offset < end:
            raise ValueError(f"damaged: {other} and {name} overlap")
        ends[entry.shard] = max((end, other), (entry.offset + entry.size, name))


def file_size(path: Path) -> int:
    """Return the size of a regular file: a pipe would keep us waiting, and a device has no end."""
    if not path.is_file() and path.exists():
        raise OSError("not a regular file")
    return path.stat().st_size


def read_small_file(path: Path) -> bytes:
    """Return a file's bytes, unless it is far too large for an index; to be used within `reading`."""
    if (size := file_size(path)) > MAX_INDEX_BYTES:
        raise ValueError(f"a file of {size} bytes cannot be what its name says")
    return path.read_bytes()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is read, and the ValueErrors of damage, into CheckpointError."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: fetch it, or save the model again") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path` when all has gone well, and vanishes otherwise."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose what it names
        temporary.replace(path)
    except OSError as error:
        mapped = " (it is in use: save to another directory)" * (os.name == "nt" and path.exists())
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}{mapped}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _is_name(name: str) -> bool:
    """Whether a line of text can hold it, and a table's key."""
    return name.isprintable() and 0 < len(name.encode()) <= MAX_KEY_BYTES


def _map(path: Path) -> np.ndarray:
    """Return the file's bytes, mapped read-only: as a plain array, because slices of np.memmap are slow."""
    with reading(path):
        if file_size(path) == 0:  # nothing cannot be mapped
            return np.empty(0, np.uint8)
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


def _raw(entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
    """Return every tensor's bytes, once it is seen that they are there and of a known kind."""
    shards = {path: _map(path) for path in sorted({entry.shard for entry in entries.values()})}
    for name, entry in entries.items():
        length, end = len(shards[entry.shard]), entry.offset + entry.size
        if entry.dtype not in _ITEMSIZE:
            raise CheckpointError(
                f"{entry.shard}: {name} is {entry.dtype}; only {', '.join(_ITEMSIZE)} are read"
            )
        if end > length:
            raise CheckpointError(
                f"{entry.shard}: {name} should end at byte {end}, but the file has {length}: "
                "it is cut short, or belongs to another index; fetch it again"
            )
    return {name: shards[entry.shard][entry.offset :][: entry.size] for name, entry in entries.items()}


def _damaged(entries: Mapping[str, Entry], raw: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Yield the names of the tensors whose CRC is wrong; those that have none cannot be told."""
    from tqdm import tqdm  # 40 ms, and only who verifies needs it

    total, no_bar = sum(entry.size for entry in entries.values()), None if sys.stderr else True
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=no_bar, leave=False) as bar:
        for name, entry in entries.items():
            if entry.crc32c is not None and masked_crc32c(raw[name]) != entry.crc32c:
                yield name
            bar.update(entry.size)


def _as_float32(raw: np.ndarray, entry: Entry) -> np.ndarray:
    if entry.dtype == "bfloat16":  # the upper half of a float32
        bits = raw.view("<u2").astype("<u4")
        bits <<= 16
        array = bits.view("<f4")
    elif entry.dtype == "float16":
        array = raw.view("<f2").astype("<f4")
    else:
        array = raw.view("<f4")
        array = array if array.flags.aligned else array.copy()
    array.flags.writeable = False
    return array.reshape(entry.shape)


def _num_shards(key: bytes, value: bytes) -> int:
    """Check the BundleHeaderProto, and return the number of shards."""
    header = message_fields(value)
    if key != b"" or _number(header, 1) == 0:
        raise ValueError("it has no header: not the index of a TensorFlow V2 checkpoint")
    if _number(header, 2) != 0:
        raise ValueError("the tensors are big-endian: not read; save them again on a little-endian machine")
    if any(_number(version, 2) > 1 for version in _messages(header, 3)):
        raise ValueError("it asks for a reader newer than version 1 of the format")
    return _number(header, 1)


def _entry(key: bytes, value: bytes, prefix: str | Path, num_shards: int) -> tuple[str, Entry]:
    """Return a tensor's name and what its BundleEntryProto says."""
    fields = message_fields(value)
    if key.startswith(b"\0") or (7, _BYTES) in fields:
        raise ValueError(f"{key!r:.80} is stored in slices (a partitioned variable): not read; save it whole")
    name = key.decode()
    number, shard = _number(fields, 1), _number(fields, 3)
    if shard >= num_shards:
        raise ValueError(f"damaged: {name!r} is in shard {shard} of {num_shards}")
    return name, Entry(
        dtype=_DTYPES.get(number, f"TensorFlow's type {number}"),
        shape=tuple(_number(axis, 1) for shape in _messages(fields, 2) for axis in _messages(shape, 2)),
        shard=Path(f"{prefix}.data-{shard:05d}-of-{num_shards:05d}"),
        offset=_number(fields, 4),
        size=_number(fields, 5),
        crc32c=int.from_bytes(fields.get((6, _FIXED32), [b""])[-1], "little"),
    )


def _encode_entry(entry: Entry) -> bytes:
    """Return the BundleEntryProto of a float32 tensor in shard 0."""
    shape = b""
    for n in entry.shape:
        axis = b"\x08" + encode_varint(n) if n else b""
        shape += b"\x12" + encode_varint(len(axis)) + axis
    message = b"\x08\x01\x12" + encode_varint(len(shape)) + shape
    for tag, number in ((b"\x20", entry.offset), (b"\x28", entry.size)):
        message += tag + encode_varint(number) if number else b""
    return message + b"\x35" + struct.pack("<I", entry.crc32c)


def message_fields(message: bytes) -> _Fields:
    """Return the fields of a protocol buffer: ints (varints), bytes, 4 or 8 bytes; unknown ones do no harm."""
    fields: _Fields = {}
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        value: int | bytes
        wire = tag & 7
        if wire == _VARINT:
            value, at = varint(message, at)
        elif wire in (1, _BYTES, _FIXED32):
            size, at = varint(message, at) if wire == _BYTES else ({1: 8, _FIXED32: 4}[wire], at)
            value, at = message[at : at + size], at + size
        if wire not in (_VARINT, 1, _BYTES, _FIXED32) or at > len(message) or tag < 8:  # no field is number 0
            raise ValueError("damaged: a protocol buffer in it does not parse")
        fields.setdefault((tag >> 3, wire), []).append(value)
    return fields


def _number(fields: _Fields, field: int) -> int:
    return fields.get((field, _VARINT), [0])[-1]


def _messages(fields: _Fields, field: int) -> list[_Fields]:
    return [message_fields(value) for value in fields.get((field, _BYTES), [])]
