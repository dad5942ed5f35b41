"""Files of named arrays. The oracles are the safetensors library, torch and NumPy, who wrote or read them."""

import json
import zipfile

import numpy as np
import pytest

from picogpt.tensor_files import TensorFileError, read_tensors_file, write_safetensors

RNG = np.random.default_rng(0)
FLOATS = {"logits": RNG.standard_normal((5, 7)), "blocks.0.hook_resid_pre": RNG.standard_normal((5, 3))}


def same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert found[name].dtype == array.dtype


def refused(path, *words):
    """The one line with which `path` is refused."""
    with pytest.raises(TensorFileError) as error:
        read_tensors_file(path)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in (path.name, *words)), message
    return message


def raw_folder(path, tensors):
    """A folder as a C program would leave it."""
    path.mkdir()
    described = {}
    for i, (name, array) in enumerate(tensors.items()):
        (path / f"{i}.bin").write_bytes(array.astype("<f4").tobytes())
        described[name] = {"file": f"{i}.bin", "shape": list(array.shape)}
    (path / "tensors.json").write_text(json.dumps(described))
    return path


def test_safetensors_library_reads_what_is_written(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    safetensors = pytest.importorskip("safetensors")
    tensors = {
        "z": FLOATS["logits"],
        "a.b": FLOATS["logits"].astype(np.float32).T,  # not in C order
        "infinite": np.array([-np.inf, np.nan, 1.0]),
        "scalar": np.array(2.0),
        "nothing": np.zeros((0, 3), np.float32),
        "big-endian": np.arange(3, dtype=">f8"),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors, {"format": "picogpt trace 1"})
    found = numpy.load_file(path)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert found[name].dtype == array.dtype.newbyteorder("=")
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "picogpt trace 1"}
    assert list(read_tensors_file(path)) == list(tensors)  # the order is kept
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("tensors", [{"a": np.arange(3)}, {"": np.zeros(1)}, {"a\n": np.zeros(1)}])
def test_nothing_is_written_that_cannot_be_read(tmp_path, tensors):
    with pytest.raises(TensorFileError):
        write_safetensors(tmp_path / "x.safetensors", tensors, {})
    assert list(tmp_path.iterdir()) == []


def test_every_dtype_of_the_safetensors_library(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    dtypes = [
        "float64",
        "float32",
        "float16",
        "bool",
        *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)),
    ]
    tensors = {dtype: np.array([[0, 1], [2, 100]]).astype(dtype) for dtype in dtypes}
    numpy.save_file(tensors, tmp_path / "x")
    found = read_tensors_file(tmp_path / "x")  # no extension is needed
    same({name: found[name] for name in dtypes}, tensors)


def test_bfloat16_as_torch_widens_it(tmp_path):
    torch, save = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    array = torch.tensor([1.1, -3e38, float("-inf"), 1e-40]).bfloat16()
    save.save_file({"x": array}, tmp_path / "x.safetensors")
    same(read_tensors_file(tmp_path / "x.safetensors"), {"x": array.float().numpy()})


def test_npz_npy_and_folders(tmp_path):
    np.savez(tmp_path / "a.npz", **FLOATS)
    np.savez_compressed(tmp_path / "b.npz", **FLOATS)
    np.save(tmp_path / "logits.npy", FLOATS["logits"])
    (tmp_path / "c" / "blocks" / "0").mkdir(parents=True)
    np.save(tmp_path / "c" / "logits.npy", FLOATS["logits"])
    np.save(tmp_path / "c" / "blocks" / "0" / "hook_resid_pre.npy", FLOATS["blocks.0.hook_resid_pre"])
    same(read_tensors_file(tmp_path / "a.npz"), FLOATS)
    same(read_tensors_file(tmp_path / "b.npz"), FLOATS)
    same(read_tensors_file(tmp_path / "logits.npy"), {"logits": FLOATS["logits"]})
    found = read_tensors_file(tmp_path / "c")
    same(found, {name.replace(".", "/"): FLOATS[name] for name in sorted(FLOATS)})


def test_raw_float32(tmp_path):
    folder = raw_folder(tmp_path / "raw", FLOATS | {"scalar": np.array(1.5)})
    expected = {name: array.astype(np.float32) for name, array in FLOATS.items()}
    same(read_tensors_file(folder), expected | {"scalar": np.array(1.5, np.float32)})


def test_trace_directory(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    refused(tmp_path, "smoke")
    write_safetensors(tmp_path / "trace.safetensors", FLOATS, {})
    same(read_tensors_file(tmp_path), FLOATS)


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "npy"])
def test_files_cut_short_anywhere(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix == "npz":
        np.savez(path, **FLOATS)
    elif suffix == "npy":
        np.save(path, FLOATS["logits"])
    else:
        write_safetensors(path, FLOATS, {})
    content = path.read_bytes()
    for length in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:length])
        assert "fetch" not in refused(path)


def test_npz_of_other_things(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.array([{}, None], dtype=object))
    refused(path, "objects")
    np.savez(path, a=np.array(["text"]))
    refused(path, "a is <U4")
    np.savez(path, a=np.array([1j]))
    refused(path, "complex")
    np.savez(path)
    refused(path, "no arrays")
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            with file.open("a.npy", "w") as member:
                np.save(member, FLOATS["logits"])
    refused(path, "'a' twice")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("notes.txt", "hello")
    refused(path, "'notes.txt'", "no array")


def test_pickles_are_not_opened(tmp_path):
    torch = pytest.importorskip("torch")
    for zipped in (True, False):
        torch.save(
            {"x": torch.zeros(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped, pickle_protocol=4
        )
        refused(tmp_path / "x.pt", "pickle", "safetensors")


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content, said",
    [
        (b"hello, this is a text", "not a safetensors file"),
        (safetensors_bytes({}), "no arrays"),
        (safetensors_bytes(b"[1]"), "JSON"),
        (safetensors_bytes({"x": {"dtype": "F64", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "8 bytes"),
        (
            safetensors_bytes({"x": {"dtype": "F8_E5M2", "shape": [2], "data_offsets": [0, 2]}}, b"ab"),
            "F8_E5M2",
        ),
        (
            safetensors_bytes(
                b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                b'"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
                bytes(8),
            ),
            "describes a file of",
        ),
    ],
)
def test_safetensors_that_are_none(tmp_path, content, said):
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", said)


@pytest.mark.parametrize(
    "described, said",
    [
        ('{"x": {"file": "x.bin", "shape": [3]}}', "12 bytes, but the file has 8: write"),
        ('{"x": {"file": "x.bin", "shape": [5, 1]}}', "the file has 8 (2 rows of 1, not 5): write"),
        (
            '{"x": {"file": "x.bin", "shape": [3, 2, 2]}}',
            "48 bytes, but the file has 8 (1 row of 2, not 6)",
        ),
        ('{"x": {"file": "x.bin", "shape": [5, 3]}}', "60 bytes, but the file has 8: write"),
        ('{"x": {"file": "x.bin", "shape": [1]}}', "4 bytes, but the file has 8, as float64 would: write"),
        ('{"x": {"file": "x.bin", "shape": []}}', "as float64 would"),
        ('{"x": {"file": "x.bin", "shape": [-2]}}', "must be described"),
        ('{"x": {"file": "x.bin"}}', "must be described"),
        ('{"x": {"file": "y.bin", "shape": [2]}}', "y.bin is missing"),
        ('{"x": {"file": ".", "shape": [2]}}', "not a regular file"),
        ('{"x": {"file": "x.bin", "shape": [2]}, "x": {"file": "x.bin", "shape": [2]}}', "twice"),
        ('["x"]', "must be described"),
        ("{", "tensors.json"),
        ("[" * 100_000, "tensors.json"),
        ("{}", "no arrays"),
    ],
)
def test_raw_folders_that_are_none(tmp_path, described, said):
    (tmp_path / "x.bin").write_bytes(bytes(8))
    (tmp_path / "tensors.json").write_text(described)
    refused(tmp_path, said)


def test_what_is_not_there(tmp_path):
    refused(tmp_path / "x.safetensors", "missing")
    (tmp_path / "tensors.json").write_text(
        refused(tmp_path, "neither").partition("tensors.json: ")[2].replace("[5, 50257]", "[1, 2]")
    )
    (tmp_path / "logits.bin").write_bytes(bytes(8))
    same(read_tensors_file(tmp_path), {"logits": np.zeros((1, 2), np.float32)})  # the example is a right one
