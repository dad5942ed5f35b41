"""TensorFlow's checkpoint format, against TensorFlow and against the index of OpenAI's own 124M."""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from picogpt.leveldb_table import encode_table, masked_crc32c
from picogpt.tensor_bundle import CheckpointError, read_bundle, read_index, read_tensors, write_bundle

HEADER = bytes.fromhex("08011a020801")


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The prefix of a small bundle of ours."""
    rng = np.random.default_rng(0)
    shapes = {
        "model/a": (3, 5),
        "model/b": (7,),
        "model/c": (1, 2, 3),
        "model/scalar": (),
        "model/none": (0, 4),
    }
    write_bundle(tmp_path / "model.ckpt", {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()})
    return tmp_path / "model.ckpt"


def data_of(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.data-00000-of-00001")


def index_of(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.index")


def save_v2(tf, prefix: Path, tensors: dict, slices: dict | None = None) -> Path:
    """Write one shard with TensorFlow's own operation, the one behind every Saver."""
    names = list(tensors)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=names,
        shape_and_slices=[(slices or {}).get(name, "") for name in names],
        tensors=[tf.constant(tensor) for tensor in tensors.values()],
    )
    return prefix


def root_of(array: np.ndarray) -> object:
    """Whose memory an array shows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_index_of_openai_124m(assets):
    meta = assets / "openai-124M-meta"
    expected = json.loads((meta / "tensor_index.json").read_text())
    entries = read_index(meta / "model.ckpt")
    assert len(entries) == 148 == len(expected)
    assert sum(entry.size for entry in entries.values()) == 497_759_232
    for name, entry in entries.items():
        said = expected[name]
        assert (entry.dtype, list(entry.shape), entry.offset, entry.size) == (
            "float32",
            said["shape"],
            said["offset"],
            said["size"],
        ), name
        assert entry.crc32c == said["crc32c_masked"], name
        assert entry.shard == meta / "model.ckpt.data-00000-of-00001"


def test_first_tensor_of_openai_124m(assets):
    """The 3 MiB that are there hold one tensor wholly, h0/attn/c_attn/b, and the beginning of the next."""
    meta = assets / "openai-124M-meta"
    part = meta / "model.ckpt.data-00000-of-00001.first3MiB"
    entries = {name: entry._replace(shard=part) for name, entry in read_index(meta / "model.ckpt").items()}
    whole = {name: entry for name, entry in entries.items() if entry.offset + entry.size <= part.stat().st_size}
    assert list(whole) == ["model/h0/attn/c_attn/b"]
    tensor = read_tensors(whole, verify=True)["model/h0/attn/c_attn/b"]
    assert tensor.shape == (2304,) and tensor.tobytes() == part.read_bytes()[:9216]
    with pytest.raises(
        CheckpointError, match=r"should end at byte \d+, but the file has 3145728: it is cut short"
    ):
        read_tensors(entries)


def test_written_index_is_openai_s_byte_for_byte(assets):
    """What TensorFlow wrote in 2019 is what we write for the same entries, to the last byte."""
    from picogpt.tensor_bundle import _HEADER, _encode_entry

    prefix = assets / "openai-124M-meta" / "model.ckpt"
    entries = read_index(prefix)
    pairs = [(b"", _HEADER), *((name.encode(), _encode_entry(entry)) for name, entry in entries.items())]
    assert encode_table(pairs) == index_of(prefix).read_bytes()


def test_dtypes_and_shapes_from_tensorflow(tf, tmp_path):
    rng = np.random.default_rng(1)
    numbers = {
        n: rng.standard_normal(s, np.float32) for n, s in {"m": (3, 5), "s": (), "e": (0, 2), "v": (9,)}.items()
    }
    # 2**-130 is subnormal in bfloat16 and 1e-7 in float16: both must survive the widening.
    special = np.array([0.0, -0.0, np.inf, -np.inf, 2.0**-130, 1e-7, 65504.0, -1.5], np.float32)
    tensors = {f"32/{name}": tf.constant(array) for name, array in numbers.items()}
    for label, dtype in (("16", tf.float16), ("b16", tf.bfloat16)):
        tensors |= {f"{label}/{n}": tf.cast(a, dtype) for n, a in (*numbers.items(), ("special", special))}
    prefix = save_v2(tf, tmp_path / "x", tensors)
    got = read_bundle(prefix, verify=True)
    assert set(got) == set(tensors)
    for name, tensor in tensors.items():
        expected = tf.cast(tensor, tf.float32).numpy()
        assert got[name].dtype == np.float32 and got[name].shape == expected.shape
        assert got[name].tobytes() == expected.tobytes(), name
        assert got[name].flags.aligned and not got[name].flags.writeable


def test_misaligned_tensor_is_copied(tf, tmp_path):
    """One bfloat16 before it, and a float32 tensor begins at byte 2."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    prefix = save_v2(tf, tmp_path / "x", {"a": tf.constant(1.5, tf.bfloat16), "b": values, "c": values})
    assert read_index(prefix)["b"].offset == 2
    tensors = read_bundle(prefix, verify=True)
    assert np.array_equal(tensors["b"], values) and tensors["b"].flags.aligned
    assert not isinstance(root_of(tensors["b"]), np.memmap)


def test_many_tensors_from_tensorflow(tf, tmp_path):
    """10,000 names fill more than one block of TensorFlow's 256 KiB."""
    tensors = {f"layer{i:05d}/some/rather/long/name": np.float32(i) for i in range(10_000)}
    prefix = save_v2(tf, tmp_path / "x", tensors)
    assert index_of(prefix).stat().st_size > 262_144
    assert read_bundle(prefix) == tensors


def test_merged_shards_from_tensorflow(tf, tmp_path):
    parts = [
        save_v2(tf, tmp_path / f"part{i}", {f"t{i}": np.arange(i + 3.0, dtype=np.float32)}) for i in range(3)
    ]
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(part) for part in parts], destination_prefix=str(tmp_path / "all")
    )
    tensors = read_bundle(tmp_path / "all", verify=True)
    assert {name: len(tensor) for name, tensor in tensors.items()} == {"t0": 3, "t1": 4, "t2": 5}
    assert all(isinstance(root_of(tensor), np.memmap) for tensor in tensors.values())
    del tensors  # Windows does not delete a file that is mapped
    (tmp_path / "all.data-00001-of-00003").unlink()
    with pytest.raises(CheckpointError, match=r"all\.data-00001-of-00003 is missing"):
        read_bundle(tmp_path / "all")


def test_tensorflow_reads_what_is_written(tf, bundle):
    reader = tf.train.load_checkpoint(str(bundle))
    ours = read_bundle(bundle, verify=True)
    assert dict(reader.get_variable_to_shape_map()) == {
        name: list(tensor.shape) for name, tensor in ours.items()
    }
    for name, tensor in ours.items():
        theirs = reader.get_tensor(name)
        assert theirs.dtype == np.float32 and np.asarray(theirs).tobytes() == tensor.tobytes()


def test_written_files_are_tensorflow_s(tf, tmp_path):
    rng = np.random.default_rng(2)
    tensors = {f"model/h{i}/x/{j}": rng.standard_normal((i, j), np.float32) for i in range(6) for j in range(9)}
    tensors["strided"] = np.arange(20, dtype=np.float32)[::2]
    write_bundle(
        tmp_path / "ours",
        {name: tensor if tensor.ndim == 1 else np.asfortranarray(tensor) for name, tensor in tensors.items()},
    )
    save_v2(tf, tmp_path / "theirs", dict(sorted(tensors.items())))
    for name in ("index", "data-00000-of-00001"):
        assert (tmp_path / f"ours.{name}").read_bytes() == (tmp_path / f"theirs.{name}").read_bytes()


def test_refused_by_name(tf, tmp_path):
    prefix = save_v2(tf, tmp_path / "slices", {"part": np.zeros((2, 2), np.float32)}, {"part": "4 2 0,2:0,2"})
    with pytest.raises(CheckpointError, match=r"part.* is stored in slices"):
        read_index(prefix)
    for dtype in ("float64", "int32", "int64", "bool", "string"):
        prefix = save_v2(tf, tmp_path / dtype, {"model/t": tf.zeros(3, dtype)})
        assert read_index(prefix)["model/t"].dtype == dtype
        with pytest.raises(
            CheckpointError, match=f"model/t is {dtype}; only float32, float16, bfloat16 are read"
        ):
            read_bundle(prefix)


def reseal(index: bytes, kind: int = 0) -> bytes:
    """The table with its first block's type byte set, and the CRC made right again."""
    size = len(read_first_block(index))
    sealed = index[:size] + bytes([kind])
    return sealed + struct.pack("<I", masked_crc32c(sealed)) + index[size + 5 :]


def read_first_block(index: bytes) -> bytes:
    """The one data block, which is all that stands before the empty metaindex block and its known bytes."""
    return index[: index.index(bytes.fromhex("0000000001000000 00c0f2a1b0")) - 5]


def entry(dtype=1, shape=(2,), shard=0, offset=0, size=8, extra=b"") -> bytes:
    """A BundleEntryProto by hand, with numbers below 128."""
    axes = b"".join(b"\x12\x02\x08" + bytes([n]) for n in shape)
    return bytes([8, dtype, 0x12, len(axes)]) + axes + bytes([0x18, shard, 0x20, offset, 0x28, size]) + extra


NINES = b"\xff" * 8 + b"\x7f"  # the largest number of nine bytes
DAMAGED = {
    "big-endian": ([(b"", HEADER + b"\x10\x01")], "big-endian"),
    "version": ([(b"", b"\x08\x01\x1a\x02\x10\x02")], "newer than version 1"),
    "no header": ([(b"a", entry())], "no header"),
    "no shards": ([(b"", b"")], "no header"),
    "shard": ([(b"", HEADER), (b"a", entry(shard=1))], "'a' is in shard 1 of 1"),
    "size": ([(b"", HEADER), (b"a", entry(size=12))], r"a of shape \[2\] cannot have 12 bytes"),
    "overlap": ([(b"", HEADER), (b"a", entry()), (b"b", entry(offset=4))], "a and b overlap"),
    "inside": ([(b"", HEADER), (b"a", entry(shape=(9,), size=36)), (b"b", entry(offset=4))], "a and b overlap"),
    "behind an empty one": (
        [
            (b"", HEADER),
            (b"a", entry(shape=(9,), size=36)),
            (b"b", entry(shape=(0,), offset=4, size=0)),
            (b"c", entry(offset=4)),
        ],
        "a and c overlap",
    ),
    "order": ([(b"", HEADER), (b"b", entry()), (b"a", entry(offset=8))], "b'a' comes after b'b'"),
    "twice": ([(b"", HEADER), (b"b", entry()), (b"b", entry(offset=8))], "b'b' comes after b'b'"),
    "line": ([(b"", HEADER), (b"a\nb", entry())], r"'a\\nb' of dtype"),
    "utf-8": ([(b"", HEADER), (b"\xc3(", entry())], "can't decode"),
    "long name": ([(b"", HEADER), (b"a" * 513, entry())], "does not fit"),
    "axes": (
        [(b"", HEADER), (b"a", entry(shape=(1,) * 31) + b"\x12\x08" + b"\x12\x02\x08\x01" * 2)],
        "33 axes",
    ),
    "huge": (
        [(b"", HEADER), (b"a", entry(shape=(0,), size=0) + b"\x12\x0c\x12\x0a\x08" + NINES)],
        "impossible shape",
    ),
    "negative": ([(b"", HEADER), (b"a", b"\x28" + b"\xff" * 9 + b"\x01")], "cut short, negative or too large"),
    "endless": ([(b"", HEADER), (b"a", b"\xff" * 100)], "cut short, negative or too large"),
    "cut": ([(b"", HEADER), (b"a", b"\x20\xff")], "cut short, negative or too large"),
    "long field": ([(b"", HEADER), (b"a", b"\x12" + NINES)], "does not parse"),
    "wire": ([(b"", HEADER), (b"a", b"\x0b")], "does not parse"),
    "fixed": ([(b"", HEADER), (b"a", b"\x35\x00")], "does not parse"),
    "field 0": ([(b"", HEADER), (b"a", b"\x00\x00")], "does not parse"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_nonsense_with_a_right_crc(tmp_path, case):
    pairs, message = DAMAGED[case]
    (tmp_path / "x.index").write_bytes(encode_table(pairs))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_index(tmp_path / "x")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def seal(block: bytes) -> bytes:
    return block + b"\0" + struct.pack("<I", masked_crc32c(block + b"\0"))


ONE_RESTART = struct.pack("<2I", 0, 1)
BROKEN_BLOCKS = {
    "shares too much": (b"\x05\x01\x00a" + ONE_RESTART, 1, "the entry after the key b'' does not fit"),
    "key too long": (b"\x00\x7f\x00a" + ONE_RESTART, 1, "the entry after the key b'' does not fit"),
    "value too long": (b"\x00\x01\x7fa" + ONE_RESTART, 1, "the entry after the key b'' does not fit"),
    "too many restarts": (
        struct.pack("<2I", 0, 1 << 31),
        1,
        "a block of 8 bytes claims 2147483648 restart points",
    ),
    "no restarts": (b"\0", 1, "a block of 1 bytes claims 0 restart points"),
    "again and again": (ONE_RESTART, 2, "its blocks overlap"),
}


@pytest.mark.parametrize("case", BROKEN_BLOCKS)
def test_broken_blocks_with_a_right_crc(tmp_path, case):
    block, times, message = BROKEN_BLOCKS[case]
    data, metaindex = seal(block), seal(ONE_RESTART)
    index = seal((b"\x00\x00\x02\x00" + bytes([len(block)])) * times + ONE_RESTART)
    footer = bytes([len(data), 8, len(data) + len(metaindex), len(index) - 5]).ljust(40, b"\0")
    (tmp_path / "x.index").write_bytes(data + metaindex + index + footer + bytes.fromhex("57fb808b247547db"))
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path / "x")


def test_compressed_blocks_are_refused(bundle):
    index = index_of(bundle).read_bytes()
    assert reseal(index) == index
    index_of(bundle).write_bytes(reseal(index, kind=1))
    with pytest.raises(CheckpointError, match="Snappy"):
        read_index(bundle)


def test_every_flipped_bit_of_the_index(bundle):
    """A CRC guards all but the footer: nothing flipped there may change an answer."""
    index, right = index_of(bundle).read_bytes(), read_index(bundle)
    refused = 0
    for bit in range(8 * len(index)):
        flipped = bytearray(index)
        flipped[bit // 8] ^= 1 << bit % 8
        index_of(bundle).write_bytes(flipped)
        try:
            assert read_index(bundle) == right
        except CheckpointError:
            refused += 1
    assert refused >= 8 * (len(index) - 40)  # the padding of the footer, at most 40 bytes, is nobody's


def test_every_truncated_index(bundle):
    index = index_of(bundle).read_bytes()
    for size in range(len(index)):
        index_of(bundle).write_bytes(index[:size])
        with pytest.raises(CheckpointError, match="cut short"):
            read_index(bundle)


def test_flipped_bit_of_the_data(bundle):
    data = bytearray(data_of(bundle).read_bytes())
    second = read_index(bundle)["model/b"]
    data[second.offset + 5] ^= 0x10
    data_of(bundle).write_bytes(data)
    assert "model/b" in read_bundle(bundle)
    with pytest.raises(CheckpointError, match="the CRC32C of model/b is wrong"):
        read_bundle(bundle, verify=True)


def test_missing_and_truncated_files(bundle, tmp_path):
    size = data_of(bundle).stat().st_size
    data = data_of(bundle).read_bytes()
    for cut in (size - 1, 1, 0):
        data_of(bundle).write_bytes(data[:cut])
        with pytest.raises(
            CheckpointError, match=f"should end at byte .* but the file has {cut}: it is cut short"
        ):
            read_bundle(bundle)
    data_of(bundle).unlink()
    with pytest.raises(CheckpointError, match=r"model\.ckpt\.data-00000-of-00001 is missing"):
        read_bundle(bundle)
    with pytest.raises(CheckpointError, match=r"nowhere\.index is missing"):
        read_bundle(tmp_path / "nowhere")
    (tmp_path / "folder.index").mkdir()
    with pytest.raises(CheckpointError, match="cannot read"):
        read_bundle(tmp_path / "folder")


def test_a_large_wrong_file_is_not_read(tmp_path):
    with (tmp_path / "x.index").open("wb") as file:
        file.truncate(1 << 40)  # a hole: no disk is used
    with pytest.raises(CheckpointError, match="cannot be what its name says"):
        read_index(tmp_path / "x")


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    pairs=st.lists(st.tuples(st.binary(max_size=6), st.binary(max_size=24)), max_size=8), header=st.booleans()
)
def test_any_table_of_any_values(tmp_path, pairs, header):
    """Keys and values from the blue, in a sound table: an answer, or our error."""
    table = sorted((key, value) for key, value in dict(pairs).items() if key[:1] not in (b"", b"\xff"))
    table = [(b"", HEADER if header else b""), *table]
    (tmp_path / "x.index").write_bytes(encode_table(table))
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(64))
    try:
        tensors = read_bundle(tmp_path / "x", verify=True)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert len(tensors) < len(table)


@FUZZ
@given(st.data())
def test_any_change_to_a_sealed_block(bundle, data):
    """Changed bytes of the data block under a CRC made right: only the parser stands between them and us."""
    index = index_of(bundle).read_bytes()
    block = bytearray(read_first_block(index))
    for _ in range(data.draw(st.integers(1, 3))):
        block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
    changed = index_of(bundle).with_name("changed.index")
    changed.write_bytes(reseal(bytes(block) + index[len(block) :]))
    shutil.copyfile(data_of(bundle), changed.with_name("changed.data-00000-of-00001"))
    try:
        tensors = read_bundle(changed.with_name("changed"))
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert all(tensor.dtype == np.float32 for tensor in tensors.values())


def test_what_cannot_be_written(tmp_path):
    good = np.zeros(2, np.float32)
    for name, tensor, message in (
        ("x", np.zeros(2), "x is float64; only float32 is written"),
        ("", good, "cannot be the name"),
        ("a\nb", good, "cannot be the name"),
        ("\udc80", good, "cannot be the name"),
        ("a" * 513, good, "cannot be the name"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_bundle(tmp_path / "x", {"good": good, name: tensor})
    with pytest.raises(CheckpointError, match="cannot write"):
        write_bundle(tmp_path / "nowhere" / "x", {"good": good})
    assert list(tmp_path.iterdir()) == []


def test_the_index_takes_its_place_last(tmp_path, monkeypatch):
    """And each file only once the disk has it."""
    done, replace, fsync = [], Path.replace, os.fsync
    monkeypatch.setattr(Path, "replace", lambda self, target: done.append(target.name) or replace(self, target))
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("fsync") or fsync(descriptor))
    write_bundle(tmp_path / "x", {"a": np.zeros(2, np.float32)})
    assert done == ["fsync", "x.data-00000-of-00001", "fsync", "x.index"]


def test_a_failed_write_leaves_the_old_bundle(bundle, monkeypatch):
    before = {path.name: path.read_bytes() for path in bundle.parent.iterdir()}

    def full(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("picogpt.tensor_bundle.encode_table", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_bundle(bundle, {"other": np.zeros(3, np.float32)})
    assert {path.name: path.read_bytes() for path in bundle.parent.iterdir()} == before
