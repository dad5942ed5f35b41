"""LevelDB's table: sorted keys to values in one file, each block with a CRC (LevelDB, doc/table_format.md).

TensorFlow keeps the index of a checkpoint in one. It is read from its end:

    footer  48 bytes: handles of the metaindex block and of the index block, zeros, a magic number of 8 bytes
    handle  two varints: where a block begins, and its size
    block   entries, restart points (uint32 each), their count (uint32); behind it a type byte and a CRC
    entry   three varints: bytes shared with the previous key, bytes not shared, size of the value;
            then the key's bytes not shared, and the value

The values of the index block are the handles of the data blocks; those hold the table's keys and values. At a
restart point a key is stored whole, for binary search; the reader here goes from first to last and needs none.
The CRCs are CRC32C, rotated and shifted ("masked") so that the CRC of data with CRCs in it is still a good one.

Damage raises ValueError. Every loop consumes bytes of the file, and keys are short: no file can make it hang.
"""

import struct
from collections.abc import Iterator
from os.path import commonprefix

import numpy as np

MAX_KEY_BYTES = 512

_MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5  # of a block: one type byte, four of CRC
_RESTART_INTERVAL = 16  # LevelDB's own


def read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table in order, the CRC of every block checked."""
    if len(data) < _FOOTER_BYTES or not data.endswith(_MAGIC):
        raise ValueError("its last 8 bytes are not a TensorFlow index's: it is cut short, or another file")
    blocks, footer = data[:-_FOOTER_BYTES], data[-_FOOTER_BYTES:]
    metaindex, at = _handle(footer, 0)
    index, _ = _handle(footer, at)
    _block(blocks, metaindex)  # says nothing that is needed, but a wrong CRC is damage wherever it is
    end, last = 0, None
    for _, handle_bytes in _entries(_block(blocks, index)):
        handle, _ = _handle(handle_bytes, 0)
        if handle[0] < end:
            raise ValueError("damaged: its blocks overlap")
        end = sum(handle) + _TRAILER_BYTES
        for key, value in _entries(_block(blocks, handle)):
            if last is not None and key <= last:
                raise ValueError(f"damaged: the key {key!r} comes after {last!r}")
            last = key
            yield key, value


def encode_table(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """Return a table of one data block: for the same pairs, sorted by key, the bytes that TensorFlow writes."""
    data, metaindex = _encode_block(pairs), _encode_block([])
    # In the index block a key only has to be no smaller than the data block's last: LevelDB takes the shortest.
    last = pairs[-1][0]
    successor = bytes([last[0] + 1]) if last else b""
    index = _encode_block([(successor, _encode_handle(0, data))])
    footer = _encode_handle(len(data), metaindex) + _encode_handle(len(data) + len(metaindex), index)
    return data + metaindex + index + footer.ljust(_FOOTER_BYTES - len(_MAGIC), b"\0") + _MAGIC


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at `at` (7 bits a byte, lowest first; top bit: more follow) and its end."""
    value = 0
    for shift in range(0, 63, 7):  # ten bytes would be a negative number, and nothing here may be one
        if at >= len(data):
            break
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("damaged: a number in it is cut short, negative or too large")


def encode_varint(number: int) -> bytes:
    """Return a number from 0 up as `varint` reads it."""
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def masked_crc32c(data: bytes | np.ndarray) -> int:
    """Return the masked CRC32C of bytes, or of a uint8 array."""
    import google_crc32c  # 7 ms, and only TensorFlow's files need it

    crc = 0
    for at in range(0, len(data), 1 << 20):
        crc = google_crc32c.extend(crc, bytes(data[at : at + (1 << 20)]))
    return mask(crc)


def mask(crc: int) -> int:
    """Return a CRC32C as the table stores it."""
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    start, at = varint(data, at)
    size, at = varint(data, at)
    return (start, size), at


def _encode_handle(start: int, block: bytes) -> bytes:
    return encode_varint(start) + encode_varint(len(block) - _TRAILER_BYTES)


def _block(blocks: bytes, handle: tuple[int, int]) -> bytes:
    start, size = handle
    trailer = blocks[start + size : start + size + _TRAILER_BYTES]
    if len(trailer) < _TRAILER_BYTES:
        raise ValueError(f"damaged: a block should end at byte {start + size + _TRAILER_BYTES}")
    kind, crc = struct.unpack("<BI", trailer)
    if masked_crc32c(blocks[start : start + size + 1]) != crc:
        raise ValueError(f"damaged: the CRC of the block at byte {start} is wrong; fetch it again")
    if kind != 0:
        raise ValueError(
            f"the block at byte {start} is compressed ({'Snappy' if kind == 1 else kind}): not read"
        )
    return blocks[start : start + size]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    num_restarts = int.from_bytes(block[-4:], "little")
    limit = len(block) - 4 - 4 * num_restarts
    if limit < 0:
        raise ValueError(f"damaged: a block of {len(block)} bytes claims {num_restarts} restart points")
    key, at = b"", 0
    while at < limit:
        shared, at = varint(block, at)
        unshared, at = varint(block, at)
        size, at = varint(block, at)
        middle, end = at + unshared, at + unshared + size
        if shared > len(key) or shared + unshared > MAX_KEY_BYTES or end > limit:
            raise ValueError(f"damaged: the entry after the key {key!r} does not fit")
        key = key[:shared] + block[at:middle]
        yield key, block[middle:end]
        at = end


def _encode_block(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """Return a block with its trailer."""
    block, restarts, last = bytearray(), [], b""
    for i, (key, value) in enumerate(pairs):
        if i % _RESTART_INTERVAL == 0:
            restarts.append(len(block))
            last = b""
        shared = len(commonprefix([last, key]))  # noqa: RUF071 (bytes in common are what is meant)
        block += encode_varint(shared) + encode_varint(len(key) - shared) + encode_varint(len(value))
        block += key[shared:] + value
        last = key
    restarts = restarts or [0]
    block += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts)) + b"\0"  # type 0: not compressed
    return bytes(block) + struct.pack("<I", masked_crc32c(bytes(block)))
