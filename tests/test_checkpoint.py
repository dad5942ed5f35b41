"""Model directories: loaded and saved against TensorFlow, refused for what is wrong with them."""

import json
import os
import re
import subprocess
import sys
import traceback
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from picogpt import PicogptError
from picogpt.checkpoint import (
    CheckpointError,
    load_encoder_hparams_and_params,
    load_hparams_and_params,
    parameter_shapes,
    save_checkpoint,
    shape_tree,
)
from picogpt.tensor_bundle import read_bundle, write_bundle

TINY = {"n_vocab": 50257, "n_ctx": 8, "n_embd": 4, "n_head": 2, "n_layer": 2}
SMALL = {**TINY, "n_vocab": 11}


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """A thousand saves must not wait for the disk; tests/test_tensor_bundle.py sees that one does."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def random_params(hparams: dict, seed: int = 0, lm_head: bool = False) -> dict:
    """The article's tree, written out."""
    rng = np.random.default_rng(seed)
    v, c, e = hparams["n_vocab"], hparams["n_ctx"], hparams["n_embd"]

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    def block():
        return {
            "ln_1": {"g": normal(e), "b": normal(e)},
            "attn": {
                "c_attn": {"w": normal(e, 3 * e), "b": normal(3 * e)},
                "c_proj": {"w": normal(e, e), "b": normal(e)},
            },
            "ln_2": {"g": normal(e), "b": normal(e)},
            "mlp": {
                "c_fc": {"w": normal(e, 4 * e), "b": normal(4 * e)},
                "c_proj": {"w": normal(4 * e, e), "b": normal(e)},
            },
        }

    blocks = [block() for _ in range(hparams["n_layer"])]
    params = {
        "wte": normal(v, e),
        "wpe": normal(c, e),
        "blocks": blocks,
        "ln_f": {"g": normal(e), "b": normal(e)},
    }
    return params | ({"lm_head": normal(v, e)} if lm_head else {})


def equal(a, b) -> bool:
    """Whether two trees have the same keys and the same bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a.dtype == b.dtype == np.float32 and a.shape == b.shape and a.tobytes() == b.tobytes()


def leaves(tree) -> list:
    children = tree.values() if isinstance(tree, dict) else tree
    return [
        leaf for child in children for leaf in (leaves(child) if isinstance(child, dict | list) else [child])
    ]


def root_of(array: np.ndarray) -> object:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def one_line(error) -> str:
    traceback.clear_frames(error.tb)  # they hold arrays, and Windows does not let go of files that are mapped
    assert "\n" not in str(error.value)
    return str(error.value)


# Loading


def test_parameters_are_those_of_openai_124m(assets):
    meta = assets / "openai-124M-meta"
    expected = {
        name: info["shape"] for name, info in json.loads((meta / "tensor_index.json").read_text()).items()
    }
    ours = parameter_shapes(json.loads((meta / "hparams.json").read_text()))
    assert {name: [1, *shape] if name.endswith("/w") else [*shape] for name, shape in ours.items()} == expected


def test_124m_from_tensorflow_s_saver(tf, assets, tmp_path):
    """Half a gigabyte on the disk, for seconds: 124M's shapes, random, in three shards of its Saver."""
    meta = assets / "openai-124M-meta"
    expected = json.loads((meta / "tensor_index.json").read_text())
    v1 = tf.compat.v1
    try:
        with v1.Graph().as_default(), v1.Session(config=v1.ConfigProto(device_count={"CPU": 3})) as session:
            for i, (name, info) in enumerate(sorted(expected.items())):
                with tf.device(f"/cpu:{i % 3}"):
                    v1.Variable(
                        tf.random.stateless_uniform(info["shape"], (i, 1)), name=name, use_resource=False
                    )
            session.run(v1.global_variables_initializer())
            prefix = v1.train.Saver(sharded=True).save(
                session, str(tmp_path / "model.ckpt"), write_meta_graph=False
            )
        assert len(list(tmp_path.glob("model.ckpt.data-*-of-00003"))) == 3
        (tmp_path / "hparams.json").write_bytes((meta / "hparams.json").read_bytes())
        tracemalloc.start()
        hparams, params = load_hparams_and_params(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20  # bytes: neither the tensors nor the files are in memory
        assert hparams == {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
        assert len(leaves(params)) == 148
        assert all(isinstance(root_of(leaf), np.memmap) and leaf.flags.aligned for leaf in leaves(params))
        reader = tf.train.load_checkpoint(prefix)
        for name in expected:
            node = params
            for key in name.split("/")[1:]:
                node = node["blocks"][int(key[1:])] if key[1:].isdecimal() else node[key]
            theirs = reader.get_tensor(name)
            assert np.array_equal(node, theirs[0] if name.endswith("/w") else theirs), name
        load_hparams_and_params(tmp_path, verify=True)
    finally:
        for path in tmp_path.glob("model.ckpt*"):
            path.unlink()


def test_the_article_s_call(tmp_path):
    params = random_params(TINY)
    save_checkpoint(tmp_path / "tiny", TINY, params)
    encoder, hparams, loaded = load_encoder_hparams_and_params("tiny", tmp_path)
    assert encoder.decode(encoder.encode("Hello, world")) == "Hello, world" and encoder.n_vocab == 50257
    assert hparams == TINY and list(hparams) == ["n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"]
    assert equal(loaded, params)
    assert not any(leaf.flags.writeable for leaf in leaves(loaded))
    assert equal(load_encoder_hparams_and_params(str(tmp_path / "tiny"), verify=True)[2], params)


def test_shape_tree_is_the_article_s_table():
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    shapes = {name: np.broadcast_to(np.float32(0), shape) for name, shape in parameter_shapes(hparams).items()}
    block = {
        "attn": {"c_attn": {"b": [2304], "w": [768, 2304]}, "c_proj": {"b": [768], "w": [768, 768]}},
        "ln_1": {"b": [768], "g": [768]},
        "ln_2": {"b": [768], "g": [768]},
        "mlp": {"c_fc": {"b": [3072], "w": [768, 3072]}, "c_proj": {"b": [768], "w": [3072, 768]}},
    }
    params = {
        "wte": shapes["model/wte"],
        "wpe": shapes["model/wpe"],
        "ln_f": {"b": shapes["model/ln_f/b"], "g": shapes["model/ln_f/g"]},
        "blocks": [
            {
                part: {
                    name: {leaf: shapes[f"model/h{i}/{part}/{name}/{leaf}"] for leaf in inner}
                    if isinstance(inner, dict)
                    else shapes[f"model/h{i}/{part}/{name}"]
                    for name, inner in parts.items()
                }
                for part, parts in block.items()
            }
            for i in range(12)
        ],
    }
    assert shape_tree(params) == {
        "wpe": [1024, 768],
        "wte": [50257, 768],
        "ln_f": {"b": [768], "g": [768]},
        "blocks": [block] * 12,
    }


def test_the_file_checkpoint_names_the_prefix(tf, tmp_path):
    """Fine-tuned models have other prefixes, and perhaps the absolute path of the machine they came from."""
    params = random_params(SMALL)
    save_checkpoint(tmp_path / "from", SMALL, params)
    tensors = read_bundle(tmp_path / "from" / "model.ckpt")
    directory = tmp_path / "tuned"
    directory.mkdir()
    (directory / "hparams.json").write_text(json.dumps({**SMALL, "res_dropout": 0.1}))
    with tf.compat.v1.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, tensor in tensors.items():
            tf.compat.v1.Variable(tensor, name=name)
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(save_relative_paths=True)
        saver.save(session, str(directory / "model"), global_step=1000)
    assert 'model_checkpoint_path: "model-1000"' in (directory / "checkpoint").read_text()
    for path in ("model-1000", "/home/somebody/run1/model-1000", r"C:\\Users\\somebody\\model-1000"):
        (directory / "checkpoint").write_text(
            f'model_checkpoint_path: "{path}"\nall_model_checkpoint_paths: "x"\n'
        )
        hparams, loaded = load_hparams_and_params(directory, verify=True)
        assert hparams == SMALL and equal(loaded, params)


def test_importing_is_light():
    heavy = ["tensorflow", "torch", "jax", "transformers", "safetensors", "requests", "tqdm", "google_crc32c"]
    code = f"import sys, picogpt.checkpoint; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What is wrong with a directory


@pytest.fixture
def small(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "small", SMALL, random_params(SMALL))
    return tmp_path / "small"


def test_damage_is_told_apart(small, tmp_path):
    data, index = small / "model.ckpt.data-00000-of-00001", small / "model.ckpt.index"
    whole, whole_index = data.read_bytes(), index.read_bytes()
    messages = []

    flipped = bytearray(whole)
    flipped[1000] ^= 1
    data.write_bytes(flipped)
    load_hparams_and_params(small)
    with pytest.raises(CheckpointError, match=r"CRC32C of model/.* is wrong") as error:
        load_hparams_and_params(small, verify=True)
    messages.append(one_line(error))

    data.write_bytes(whole[:-4])
    with pytest.raises(
        CheckpointError, match=r"data-00000-of-00001: model/wte should end at byte .* cut short"
    ) as error:
        load_hparams_and_params(small)
    messages.append(one_line(error))
    data.write_bytes(whole)

    flipped = bytearray(whole_index)
    flipped[100] ^= 1
    index.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"model\.ckpt\.index: damaged: the CRC of the block") as error:
        load_hparams_and_params(small)
    messages.append(one_line(error))

    other = {**SMALL, "n_embd": 6, "n_layer": 3}
    save_checkpoint(tmp_path / "other", other, random_params(other))
    index.write_bytes((tmp_path / "other" / "model.ckpt.index").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"not those of its hyper-parameters; unexpected: .*; wrong shape:"
    ) as error:
        load_hparams_and_params(small)
    messages.append(one_line(error))

    # An index of other weights in the same shapes: only the CRCs can tell.
    save_checkpoint(tmp_path / "twin", SMALL, random_params(SMALL, seed=1))
    index.write_bytes((tmp_path / "twin" / "model.ckpt.index").read_bytes())
    with pytest.raises(CheckpointError, match="belongs to another index"):
        load_hparams_and_params(small, verify=True)

    index.write_bytes(whole_index)
    tensors = {name: tensor.copy() for name, tensor in read_bundle(small / "model.ckpt").items()}
    del tensors["model/h1/ln_2/g"]
    write_bundle(small / "model.ckpt", tensors)
    with pytest.raises(CheckpointError, match=r"missing: model/h1/ln_2/g$") as error:
        load_hparams_and_params(small)
    messages.append(one_line(error))
    assert len(set(messages)) == 5


def test_all_wrong_tensors_are_named(small):
    tensors = {name: tensor.copy() for name, tensor in read_bundle(small / "model.ckpt").items()}
    tensors["model/Adam"] = tensors.pop("model/wpe")
    tensors["model/h0/attn/c_proj/w"] = tensors["model/h0/attn/c_proj/w"][
        0
    ]  # [4, 4] where OpenAI has [1, 4, 4]
    tensors["model/ln_f/b"] = tensors["model/ln_f/b"][None]
    write_bundle(small / "model.ckpt", tensors)
    with pytest.raises(CheckpointError) as error:
        load_hparams_and_params(small)
    assert one_line(error).endswith(
        "missing: model/wpe; unexpected: model/Adam; wrong shape: model/h0/attn/c_proj/w [4, 4] instead of "
        "[1, 4, 4], model/ln_f/b [1, 4] instead of [4]"
    )
    (small / "hparams.json").write_text(json.dumps({**SMALL, "n_layer": 12}))
    with pytest.raises(CheckpointError, match=r"model/h2/attn/c_proj/w and 115 more;") as error:
        load_hparams_and_params(small)
    assert len(one_line(error)) < 700


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 3}, "n_embd 4 cannot be shared out to n_head 3"),
        ({"n_head": 0}, "n_head is 0, not a whole number from 1"),
        ({"n_layer": -1}, "n_layer is -1,"),
        ({"n_layer": 10**9}, "n_layer is 1000000000,"),
        ({"n_embd": 4.0}, "n_embd is 4.0,"),
        ({"n_ctx": True}, "n_ctx is True,"),
        ({"n_vocab": "11"}, "n_vocab is '11',"),
        ({"n_vocab": None}, "n_vocab is None,"),
    ],
)
def test_impossible_hparams(small, change, message):
    (small / "hparams.json").write_text(json.dumps({**SMALL, **change}))
    with pytest.raises(CheckpointError, match=f"hparams.json: {message}"):
        load_hparams_and_params(small)
    with pytest.raises(CheckpointError, match=f"hparams: {message}"):
        save_checkpoint(small, {**SMALL, **change}, random_params(SMALL))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '"x"', "\ufeff{", "[" * 100_000, '{"n_vocab": ' + "9" * 9999 + "}"]
)
def test_hparams_that_are_not_json(small, text):
    (small / "hparams.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"hparams\.json: ") as error:
        load_hparams_and_params(small)
    assert len(one_line(error)) < 300


@pytest.mark.parametrize(
    "text", [b"", b"\xff\xfe", b"model_checkpoint_path:", b'model_checkpoint_path: ""', b"\n" * 99]
)
def test_a_damaged_file_checkpoint(small, text):
    (small / "checkpoint").write_bytes(text)
    with pytest.raises(CheckpointError, match="checkpoint: "):
        load_hparams_and_params(small)


def test_missing_files(small, tmp_path):
    (small / "model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(CheckpointError, match=r"model\.ckpt\.data-00000-of-00001 is missing"):
        load_hparams_and_params(small)
    (small / "model.ckpt.index").unlink()
    with pytest.raises(CheckpointError, match=r"model\.ckpt\.index is missing"):
        load_hparams_and_params(small)
    (small / "checkpoint").unlink()
    with pytest.raises(CheckpointError, match=r"no file 'checkpoint'.*OpenAI's layout or Hugging Face's"):
        load_hparams_and_params(small)
    openai = small.rename(tmp_path / "124M")
    for name in ("hparams.json", None):
        with pytest.raises(CheckpointError) as error:
            load_hparams_and_params(openai)
        assert f"`python -m picogpt.download 124M --models_dir {openai.parent}`" in one_line(error)
        if name:
            (openai / name).unlink()


# The encoder


def test_a_vocabulary_that_does_not_fit(small, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no vocabulary: put encoder\.json and vocab\.bpe there"):
        load_encoder_hparams_and_params(str(small))
    vocabulary = Path(sys.modules["picogpt"].__file__).parent / "vocabulary"
    (small / "vocab.bpe").write_bytes((vocabulary / "vocab.bpe").read_bytes())
    with pytest.raises(PicogptError, match=r"encoder\.json"):  # half a vocabulary is not none
        load_encoder_hparams_and_params(str(small))
    (small / "encoder.json").write_bytes((vocabulary / "encoder.json").read_bytes())
    with pytest.raises(CheckpointError, match="vocabulary has 50257 tokens, the model only 11") as error:
        load_encoder_hparams_and_params(str(small))
    one_line(error)
    padded = {**TINY, "n_vocab": 50304}
    save_checkpoint(tmp_path / "padded", padded, random_params(padded))
    for name in ("vocab.bpe", "encoder.json"):
        (small / name).rename(tmp_path / "padded" / name)
    encoder, hparams, params = load_encoder_hparams_and_params("padded", tmp_path)
    assert encoder.n_vocab == 50257 and hparams["n_vocab"] == 50304 == len(params["wte"])


# Saving


@pytest.mark.parametrize("lm_head", [False, True])
def test_tensorflow_reads_what_is_saved(tf, tmp_path, lm_head):
    params = random_params(SMALL, lm_head=lm_head)
    save_checkpoint(tmp_path, SMALL, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint",
        "hparams.json",
        "model.ckpt.data-00000-of-00001",
        "model.ckpt.index",
    ]
    latest = tf.train.latest_checkpoint(str(tmp_path))
    assert latest == str(tmp_path / "model.ckpt")
    assert json.loads((tmp_path / "hparams.json").read_text()) == SMALL
    expected = {"model/wte": params["wte"], "model/wpe": params["wpe"]}
    expected |= {f"model/ln_f/{leaf}": params["ln_f"][leaf] for leaf in "gb"}
    expected |= {"model/lm_head": params["lm_head"]} if lm_head else {}
    for i, block in enumerate(params["blocks"]):
        expected |= {f"model/h{i}/{ln}/{leaf}": block[ln][leaf] for ln in ("ln_1", "ln_2") for leaf in "gb"}
        for part, name in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            expected[f"model/h{i}/{part}/{name}/w"] = block[part][name]["w"][np.newaxis]
            expected[f"model/h{i}/{part}/{name}/b"] = block[part][name]["b"]
    reader = tf.train.load_checkpoint(latest)
    assert dict(reader.get_variable_to_shape_map()) == {name: list(a.shape) for name, a in expected.items()}
    assert all(reader.get_tensor(name).tobytes() == array.tobytes() for name, array in expected.items())
    assert equal(load_hparams_and_params(tmp_path, verify=True)[1], params)


def test_openai_s_small_files_are_written_alike(assets, tmp_path):
    """`checkpoint` to the byte, `hparams.json` but for the numbers."""
    save_checkpoint(tmp_path, SMALL, random_params(SMALL))
    for name in ("checkpoint", "hparams.json"):
        theirs = (assets / "openai-124M-meta" / name).read_bytes()
        assert re.sub(rb"\d+", b"0", (tmp_path / name).read_bytes()) == re.sub(rb"\d+", b"0", theirs)


def test_jax_and_half_precision_arrays_are_saved_exactly(tmp_path):
    jax = pytest.importorskip("jax")
    params = random_params(SMALL)
    for dtype in ("float32", "float16", "bfloat16"):
        halves = jax.tree.map(lambda leaf, dtype=dtype: jax.numpy.asarray(leaf, dtype), params)
        save_checkpoint(tmp_path, SMALL, halves)
        expected = jax.tree.map(lambda leaf: np.asarray(leaf.astype("float32")), halves)
        assert equal(load_hparams_and_params(tmp_path, verify=True)[1], expected)


def test_what_is_not_saved(tmp_path):
    def changed(change):
        params = random_params(SMALL)
        change(params)
        return params

    for change, message in (
        (lambda p: p["ln_f"].update(g=np.zeros(4)), "model/ln_f/g is float64: make it float32"),
        (lambda p: p["ln_f"].update(g=np.zeros(4, int)), "model/ln_f/g is int64"),
        (lambda p: p["ln_f"].update(g=1.0), r"wrong shape: model/ln_f/g \[\] instead of \[4\]"),
        (lambda p: p["ln_f"].update(g=[1.0] * 4), "missing: model/ln_f/g; unexpected: model/ln_f/g/h0, "),
        (lambda p: p.pop("wpe"), "missing: model/wpe$"),
        (lambda p: p["blocks"].pop(), "missing: model/h1/ln_1/g, .* and 6 more$"),
        (lambda p: p["blocks"].append({"x": np.zeros(1)}), "unexpected: model/h2/x$"),
        (lambda p: p["blocks"][0]["attn"].update(attend=print), "unexpected: model/h0/attn/attend$"),
        (lambda p: p.update(wte=p["wte"].T), r"wrong shape: model/wte \[4, 11\] instead of \[11, 4\]$"),
        (lambda p: p.update(lm_head=p["wpe"]), r"wrong shape: model/lm_head \[8, 4\] instead of \[11, 4\]$"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            save_checkpoint(tmp_path / "new", SMALL, changed(change))
        one_line(error)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(CheckpointError, match="cannot "):
            save_checkpoint(tmp_path / place, SMALL, random_params(SMALL))


class Killed(BaseException):
    """The process is gone: after it nothing that is tried has any effect."""


OPERATIONS = ("replace", "unlink", "hardlink_to", "open", "mkdir")


def kill_at(monkeypatch, operation_number: int):
    """Let file operations happen until the given one, and none from there on."""
    left = [operation_number]

    def guard(real):
        def operation(self, *args, **kwargs):
            if real.__name__ == "open" and (args or ("r",))[0] == "rb":
                return real(self, *args, **kwargs)
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(self, *args, **kwargs)

        return operation

    for name in OPERATIONS:
        monkeypatch.setattr(Path, name, guard(getattr(Path, name)))


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("before", ["nothing", "same shapes", "other shapes", "other heads"])
def test_killed_while_saving(tmp_path, monkeypatch, before, links):
    """Killed at each file operation in turn, the directory holds the old or the new model, never a mixture."""
    new = (SMALL, random_params(SMALL, seed=1))
    old_hparams = {**SMALL, **{"other shapes": {"n_layer": 1}, "other heads": {"n_head": 4}}.get(before, {})}
    old = (old_hparams, random_params(old_hparams, seed=2))
    seen = []
    for number in range(60):
        directory = tmp_path / str(number)
        if before != "nothing":
            save_checkpoint(directory, *old)
        with monkeypatch.context() as patch:
            if not links:
                patch.setattr(
                    Path, "hardlink_to", lambda self, target: (_ for _ in ()).throw(OSError("no links"))
                )
            kill_at(patch, number)
            try:
                save_checkpoint(directory, *new)
                finished = True
            except Killed:
                finished = False
        try:
            hparams, params = load_hparams_and_params(directory, verify=True)
        except CheckpointError:
            seen.append("nothing")
        else:
            which = [
                name
                for name, model in (("old", old), ("new", new))
                if hparams == model[0] and equal(params, model[1])
            ]
            assert len(which) == 1, f"killed at operation {number}: a mixture"
            seen += which
        params = None  # mapped, it would be in the way on Windows
        save_checkpoint(directory, *new)  # the next one finds nothing in its way, and clears up
        assert equal(load_hparams_and_params(directory, verify=True)[1], new[1])
        assert not list(directory.glob("*previous*"))
        if finished:
            break
    assert finished and seen[-1] == "new"
    assert seen == sorted(seen, key=["old", "nothing", "new"].index)
    assert ("nothing" in seen) == (before != "same shapes")
    assert before == "nothing" or seen.count("nothing") <= 4


@pytest.mark.skipif(os.name == "nt", reason="Windows does not replace a file that is mapped")
def test_saving_over_what_is_loaded(tmp_path):
    """The arrays that are saved are mapped from the files that are replaced."""
    params = random_params(SMALL)
    save_checkpoint(tmp_path, SMALL, params)
    for _ in range(3):
        loaded = load_hparams_and_params(tmp_path)[1]
        save_checkpoint(tmp_path, SMALL, loaded)
        assert equal(loaded, params)
    assert equal(load_hparams_and_params(tmp_path, verify=True)[1], params)
    assert len(list(tmp_path.iterdir())) == 4
