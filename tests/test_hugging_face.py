"""Hugging Face's directories, as transformers writes them today and wrote them before."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from picogpt.checkpoint import load_encoder_hparams_and_params, load_hparams_and_params
from picogpt.hugging_face import read_safetensors_header
from picogpt.tensor_bundle import CheckpointError, read_tensors

TINY = {"vocab_size": 50257, "n_positions": 8, "n_embd": 4, "n_head": 2, "n_layer": 2}
SMALL = {**TINY, "vocab_size": 11}
VOCABULARY = Path(__file__).parents[1] / "picogpt" / "vocabulary"


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def safetensors():
    pytest.importorskip("safetensors")
    from safetensors import numpy

    return numpy


def write_model(safetensors, directory: Path, *, prefix: str = "", config: dict | None = None, **extra) -> dict:
    """Write a model as older versions did, and return its tensors by their short names."""
    rng = np.random.default_rng(0)
    e = SMALL["n_embd"]
    shapes = {"wte.weight": (11, e), "wpe.weight": (8, e), "ln_f.weight": (e,), "ln_f.bias": (e,)}
    for i in range(2):
        for name, shape in (
            ("ln_1", (e,)),
            ("attn.c_attn", (e, 3 * e)),
            ("attn.c_proj", (e, e)),
            ("ln_2", (e,)),
            ("mlp.c_fc", (e, 4 * e)),
            ("mlp.c_proj", (4 * e, e)),
        ):
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2", **SMALL, **(config or {})}))
    safetensors.save_file(
        {prefix + n: a for n, a in (tensors | extra).items()}, directory / "model.safetensors"
    )
    return tensors


def by_their_names(params: dict) -> dict[str, np.ndarray]:
    """Our tree under Hugging Face's short names."""
    flat = {f"{name}.weight": params[name] for name in ("wte", "wpe", "lm_head") if name in params}
    parts = {"ln_f": params["ln_f"]}
    for i, block in enumerate(params["blocks"]):
        parts |= {f"h.{i}.{ln}": block[ln] for ln in ("ln_1", "ln_2")}
        parts |= {f"h.{i}.{part}.{name}": block[part][name] for part in ("attn", "mlp") for name in block[part]}
    for name, part in parts.items():
        assert len(part) == 2
        flat |= {f"{name}.weight": part.get("w", part.get("g")), f"{name}.bias": part["b"]}
    return flat


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == np.float32 and ours[name].shape == theirs[name].shape
        and ours[name].tobytes() == theirs[name].tobytes()
        for name in ours
    )  # fmt: skip


def root_of(array: np.ndarray) -> object:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard_size", [None, "1KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_save_pretrained_of_today(transformers, tmp_path, dtype, shard_size, tied):
    import torch
    from safetensors.torch import load_file

    config = transformers.GPT2Config(**SMALL, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():  # biases begin as zeros, and would not show a mistake
        torch.nn.init.normal_(parameter)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, **({"max_shard_size": shard_size} if shard_size else {}))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == bool(shard_size)
    hparams, params = load_hparams_and_params(tmp_path, verify=True)
    assert hparams == {"n_vocab": 11, "n_ctx": 8, "n_embd": 4, "n_head": 2, "n_layer": 2}
    assert ("lm_head" in params) == (not tied)
    theirs = {name: tensor.float().numpy() for file in files for name, tensor in load_file(file).items()}
    ours = by_their_names(params)
    assert same(ours, {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()})
    mapped = [isinstance(root_of(tensor), np.memmap) for tensor in ours.values()]
    assert all(mapped) if dtype == "float32" else not any(mapped)
    assert all(tensor.flags.aligned and not tensor.flags.writeable for tensor in ours.values())


def test_tokenizer_of_today(transformers, tmp_path):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY))
    model.save_pretrained(tmp_path)
    for ours, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (tmp_path / theirs).write_bytes((VOCABULARY / ours).read_bytes())
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "vocab.json").exists()
    encoder, hparams, params = load_encoder_hparams_and_params(str(tmp_path))
    text = "It's 3.14 naïve  cafés,\n\nあ 😀<|endoftext|>"
    assert encoder.encode(text, allowed_special="all") == tokenizer.encode(text)
    assert hparams["n_vocab"] == len(params["wte"]) == 50257


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_older_layout(safetensors, tmp_path, prefix):
    """Short names, the mask as a buffer, n_ctx beside n_positions, vocab.json and merges.txt."""
    mask = np.tril(np.ones((1, 1, 8, 8), np.float32))
    buffers = {
        "h.0.attn.bias": mask,
        "h.1.attn.bias": mask.astype(bool),
        "h.0.attn.masked_bias": np.array(-1e4, np.float32),
    }
    tensors = write_model(safetensors, tmp_path, prefix=prefix, config={"n_ctx": 8}, **buffers)
    for ours, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (tmp_path / theirs).write_bytes((VOCABULARY / ours).read_bytes())
    with pytest.raises(CheckpointError, match="vocabulary has 50257 tokens, the model only 11"):
        load_encoder_hparams_and_params(str(tmp_path))
    assert same(by_their_names(load_hparams_and_params(tmp_path)[1]), tensors)


def test_the_head(safetensors, tmp_path):
    """Written beside wte, it counts if it differs or if config.json says it is not tied, as in transformers."""
    tensors = write_model(safetensors, tmp_path)
    wte, other = tensors["wte.weight"], tensors["wte.weight"].copy()
    other[-1, -1] += 1
    for tied, head, expected in (
        (True, wte, None),
        (True, other, other),
        (False, wte, wte),
        (False, other, other),
    ):
        config = {"tie_word_embeddings": tied}
        write_model(safetensors, tmp_path, prefix="", config=config, **{"lm_head.weight": head})
        params = load_hparams_and_params(tmp_path)[1]
        assert ("lm_head" in params) == (expected is not None)
        assert expected is None or np.array_equal(params["lm_head"], expected)
    write_model(safetensors, tmp_path, config={"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight$"):
        load_hparams_and_params(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gpt_neo"),
        ("activation_function", "gelu"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("quantization_config", {"bits": 4}),
        ("pruned_heads", {"0": [1]}),
        ("n_inner", 17),
    ],
)
def test_other_mathematics_is_refused_by_name(safetensors, tmp_path, key, value):
    write_model(safetensors, tmp_path, config={key: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is .*, GPT-2's is ") as error:
        load_hparams_and_params(tmp_path)
    assert "\n" not in str(error.value)


def test_the_same_mathematics_is_accepted(safetensors, tmp_path):
    for config in (
        {"activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": 0.00001, "n_inner": 16},
        {"reorder_and_upcast_attn": True, "attn_pdrop": 0.5, "n_inner": None, "something": "new"},
    ):
        tensors = write_model(safetensors, tmp_path, config=config)
        assert same(by_their_names(load_hparams_and_params(tmp_path)[1]), tensors)


def test_wrong_tensors_are_named_as_the_file_has_them(safetensors, tmp_path):
    write_model(safetensors, tmp_path, config={"n_embd": 4, "vocab_size": 12, "n_layer": 1})
    with pytest.raises(CheckpointError) as error:
        load_hparams_and_params(tmp_path)
    said = str(error.value)
    assert "unexpected: h.1.attn.c_attn.bias, " in said and " and 6 more;" in said
    assert said.endswith("wrong shape: wte.weight [11, 4] instead of [12, 4]")
    write_model(safetensors, tmp_path, config={"n_layer": 3, "vocab_size": 11})
    with pytest.raises(CheckpointError, match=r"missing: h\.2\.ln_1\.weight, .* and 6 more$"):
        load_hparams_and_params(tmp_path)
    write_model(safetensors, tmp_path, **{"transformer.wte.weight": np.zeros((11, 4), np.float32)})
    with pytest.raises(CheckpointError, match=r"has wte\.weight twice"):
        load_hparams_and_params(tmp_path)
    write_model(safetensors, tmp_path, **{"wpe.weight": np.zeros((8, 4))})
    with pytest.raises(CheckpointError, match=r"model/wpe is F64; only float32, float16, bfloat16 are read"):
        load_hparams_and_params(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4}))
    with pytest.raises(CheckpointError, match=r"config\.json: model_type is 'llama', GPT-2's is 'gpt2'"):
        load_hparams_and_params(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "n_head": None}))
    with pytest.raises(CheckpointError, match="does not say the n_head of a GPT-2"):
        load_hparams_and_params(tmp_path)


def test_pickles_are_never_loaded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors: fetch it"):
        load_hparams_and_params(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"a pickle.*save_pretrained") as error:
        load_hparams_and_params(tmp_path)
    assert "\n" not in str(error.value)


def test_shards_that_are_missing_or_elsewhere(transformers, tmp_path):
    config = transformers.GPT2Config(**SMALL, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path, max_shard_size="1KB")
    index = tmp_path / "model.safetensors.index.json"
    right = json.loads(index.read_text())
    name, shard = next(iter(right["weight_map"].items()))
    for place in ("/etc/passwd", "../x", "a/b", "a\0b", "a\nb", 7, None):
        index.write_text(json.dumps({"weight_map": {**right["weight_map"], name: place}}))
        with pytest.raises(CheckpointError, match="is not the name of a file beside it"):
            load_hparams_and_params(tmp_path)
    for place in ("", "."):
        index.write_text(json.dumps({"weight_map": {**right["weight_map"], name: place}}))
        with pytest.raises(CheckpointError):
            load_hparams_and_params(tmp_path)
    for wrong in ({}, {"weight_map": []}, [], 1):
        index.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=r"index\.json: damaged"):
            load_hparams_and_params(tmp_path)
    other = next(file for file in right["weight_map"].values() if file != shard)
    index.write_text(json.dumps({"weight_map": {**right["weight_map"], name: other}}))
    with pytest.raises(CheckpointError, match=f"missing: {name.removeprefix('transformer.')}$"):
        load_hparams_and_params(tmp_path)
    index.write_text(json.dumps(right))
    load_hparams_and_params(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=f"{shard} is missing"):
        load_hparams_and_params(tmp_path)


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(first: int, end: int, shape: object = None, dtype: object = "F32") -> dict:
    return {
        "dtype": dtype,
        "shape": [(end - first) // 4] if shape is None else shape,
        "data_offsets": [first, end],
    }


DAMAGED = {
    "no object": ([], 0, "not a JSON object"),
    "no JSON": (b"{,}", 0, "Expecting property name"),
    "deep": (b"[" * 100_000, 0, "recursion|JSON"),
    "no tensor": ({"a": 1}, 0, "'a' has no proper"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4, "no proper dtype"),
    "dtype": ({"a": tensor(0, 4, dtype="F\n32")}, 4, r"of dtype 'F\\n32'"),
    "float": ({"a": tensor(0, 4, shape=[1.0])}, 4, "no proper shape"),
    "negative": ({"a": tensor(0, 4, shape=[-1])}, 4, "no proper shape"),
    "true": ({"a": tensor(0, 4, shape=[True])}, 4, "no proper shape"),
    "huge": ({"a": tensor(0, 4, shape=[1 << 70])}, 4, "no proper shape"),
    "product": ({"a": tensor(0, 4, shape=[1 << 40, 1 << 40])}, 4, "impossible shape"),
    "zero": ({"a": tensor(0, 0, shape=[0, 1 << 40, 1 << 40])}, 0, "impossible shape"),
    "axes": ({"a": tensor(0, 4, shape=[1] * 33)}, 4, "33 axes"),
    "size": ({"a": tensor(0, 8, shape=[1])}, 8, "cannot have 8 bytes"),
    "backwards": ({"a": tensor(4, 0, shape=[1])}, 4, "no proper dtype and data_offsets"),
    "three": ({"a": {**tensor(0, 4), "data_offsets": [0, 4, 8]}}, 8, "no proper dtype and data_offsets"),
    "overlap": ({"a": tensor(0, 8), "b": tensor(4, 12)}, 12, "a and b overlap"),
    "gap": ({"a": tensor(0, 4), "b": tensor(8, 12)}, 12, "describes a file of .* fetch it again"),
    "cut short": ({"a": tensor(0, 8)}, 7, "describes a file of .* fetch it again"),
    "too long": ({"a": tensor(0, 8)}, 9, "describes a file of .* fetch it again"),
    "name": ({"a\nb": tensor(0, 4)}, 4, r"'a\\nb' of dtype"),
    "surrogate": (b'{"\\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', 4, "of dtype"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_headers(tmp_path, case):
    header, size, message = DAMAGED[case]
    path = raw_file(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=message) as error:
        read_safetensors_header(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("length", [3, 1 << 20, 1 << 63, (1 << 64) - 1])
def test_impossible_header_lengths(tmp_path, length):
    path = raw_file(tmp_path / "x.safetensors", b"{}", length=length)
    with pytest.raises(CheckpointError, match=f"a header of {length} bytes does not fit"):
        read_safetensors_header(path)
    path.write_bytes(b"version")  # shorter than the length itself
    with pytest.raises(CheckpointError, match="does not fit"):
        read_safetensors_header(path)
    with path.open("wb") as file:
        file.write((1 << 39).to_bytes(8, "little"))
        file.truncate(1 << 40)  # a hole: no disk, and no memory, is used
    with pytest.raises(CheckpointError, match="does not fit"):
        read_safetensors_header(path)


def test_a_header_of_odd_length(safetensors, tmp_path):
    """Older writers did not pad the header: the numbers begin anywhere, and are copied for speed."""
    values = np.arange(6, dtype=np.float32)
    for spaces in range(8):
        header = json.dumps({"a": tensor(0, 24, [2, 3])}).encode() + b" " * spaces
        path = raw_file(tmp_path / "x.safetensors", header, values.tobytes())
        ours = read_tensors(read_safetensors_header(path))["a"]
        assert np.array_equal(ours, safetensors.load_file(path)["a"]) and ours.flags.aligned
        assert isinstance(root_of(ours), np.memmap) == (len(header) % 4 == 0)
        del ours  # Windows does not write over a file that is mapped


FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.data())
def test_any_change_to_a_file(safetensors, tmp_path, data):
    """Either refused, or read as the library reads it."""
    path = tmp_path / "x.safetensors"
    original = {
        "a.b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "c": np.ones(2, np.float16),
        "d": np.array(3, np.float32),
    }
    safetensors.save_file(original, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    try:
        ours = read_tensors(read_safetensors_header(path))
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        theirs = safetensors.load_file(path)
        assert same(ours, {name: np.asarray(array, np.float32) for name, array in theirs.items()})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["F32", "BF16"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@FUZZ
@given(
    header=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), json_values, max_size=4),
    size=st.integers(0, 12),
)
def test_any_header(tmp_path, header, size):
    path = raw_file(tmp_path / "x.safetensors", header, bytes(size))
    try:
        tensors = read_tensors(read_safetensors_header(path))
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert sum(array.size for array in tensors.values()) <= size


@FUZZ
@given(config=st.dictionaries(st.sampled_from([*SMALL, "n_inner", "model_type", "pruned_heads"]), json_values))
def test_any_config(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **config}))
    with pytest.raises(CheckpointError) as error:
        load_hparams_and_params(tmp_path)
    assert "\n" not in str(error.value)
