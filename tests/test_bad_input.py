"""Damaged and hostile files, careless command lines: the targets of bad_input.py, and each fault they found."""

import ast
import json
import os
import pickle
import signal
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from bad_input import (
    MERGES,
    NAMES,
    PROBES,
    TARGETS,
    TOKENS,
    judge,
    message,
    openai_model,
    pickles,
    read_directory,
    save_safetensors,
    successor_model,
    table,
    vocabulary_of_tokenizers,
    weights,
    write_model,
    write_tokenizer_json,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import picogpt
from models import SMALL, random_params
from picogpt import PicogptError, save_checkpoint, tensor_bundle
from picogpt.checkpoint import load_hparams_and_params
from picogpt.encoder import Encoder, EncoderError, get_encoder
from picogpt.hugging_face import read_safetensors_header
from picogpt.tensor_bundle import CheckpointError, read_index

POSIX = pytest.mark.skipif(os.name == "nt", reason="named pipes and devices are POSIX's")
MODULES = {"index": "tensorflow", "checkpoint": "tensorflow", "config.json": "transformers"}
MODULES |= dict.fromkeys(("vocabulary", "tokenizer.json"), "tokenizers")
MODULES |= dict.fromkeys(("safetensors", "model.safetensors.index.json"), "safetensors")


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    """The command line takes the process over: give it back. Whoever waits too long is interrupted."""
    for name in list(os.environ):
        monkeypatch.setenv(name, os.environ[name])
    previous = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "directory" or os.name != "nt"])
def test_any_mutant_is_refused_in_one_line_or_read_as_others_read_it(name, tmp_path_factory):
    if name in MODULES:
        pytest.importorskip(MODULES[name])
    verdicts = set()

    @settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 1 << 62))
    @example(0)
    def run(seed):
        directory = tmp_path_factory.mktemp("case")
        TARGETS[name].write(Random(seed), directory)
        verdicts.add(judge(TARGETS[name], directory))

    run()
    assert {"refused", "equal"} <= verdicts  # else it does not try what it says


# Each of these was found by the fuzzer, or looked for because it could have been


def test_an_index_of_very_many_tensors_does_not_fill_the_memory(tmp_path, monkeypatch):
    assert tensor_bundle.MAX_TENSORS <= 100_000
    monkeypatch.setattr(tensor_bundle, "MAX_TENSORS", 100)
    pairs = [(f"{n:05x}".encode(), b"") for n in range(101)]
    header = message(Random(0), [(1, 0, 1), (3, 2, [(1, 0, 1)])], 0)
    (tmp_path / "x.index").write_bytes(table(Random(0), [(b"", header), *pairs], 0))
    with pytest.raises(CheckpointError, match="more than 100 tensors"):
        read_index(tmp_path / "x")


@pytest.mark.parametrize("wire", [1, 5])
def test_a_number_of_another_width_is_another_field(tmp_path, wire):
    """And TensorFlow leaves it out: the second axis is then of length 0, a third is not there, the CRC is 0."""
    axes = [(2, 2, [(1, 0, 0)]), (2, 2, [(1, wire, 1)]), (2, wire, 0x0108)]
    entry = [(1, 0, 1), (2, 2, axes), (6, 0, 7)]
    header = [(1, 0, 1), (3, 2, [(1, 0, 1)])]
    pairs = [(b"", message(Random(0), header, 0)), (b"a", message(Random(0), entry, 0))]
    (tmp_path / "x.index").write_bytes(table(Random(0), pairs, 0))
    found = read_index(tmp_path / "x")["a"]
    assert (found.shape, found.crc32c) == ((0, 0), 0)


def test_a_safetensors_header_is_utf_8(tmp_path):
    text = json.dumps({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}).encode("utf-16-le")
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError):
        read_safetensors_header(tmp_path / "x")


@pytest.mark.parametrize(("name", "value"), [("num_attention_heads", 4), ("tie_word_embeddings", "false")])
def test_a_config_that_transformers_reads_otherwise_is_refused(tmp_path, name, value):
    write_model(Random(0), tmp_path, "")
    config = {
        "model_type": "gpt2",
        "vocab_size": 257,
        "n_positions": 16,
        "n_embd": 8,
        "n_head": 2,
        "n_layer": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    assert load_hparams_and_params(tmp_path)[0]["n_head"] == 2
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(CheckpointError, match=f"{name} is {value!r}, GPT-2's is"):
        load_hparams_and_params(tmp_path)


def test_two_files_with_one_tensor_and_nobody_says_which(tmp_path):
    write_model(Random(0), tmp_path, "")
    (tmp_path / "model.safetensors").unlink()
    first = next(iter(weights()))
    save_safetensors(weights(), tmp_path / "a")
    save_safetensors({first: weights()[first] + 1}, tmp_path / "b")
    weight_map = dict.fromkeys(weights(), "a")
    index = tmp_path / "model.safetensors.index.json"
    other = {"wpe.weight": "b"}  # so that both are read
    index.write_text(json.dumps({"weight_map": weight_map | other}))
    assert np.array_equal(load_hparams_and_params(tmp_path)[1]["wte"], weights()[first])
    del weight_map[first]
    index.write_text(json.dumps({"weight_map": weight_map | other}))
    with pytest.raises(CheckpointError, match=f"does not say which file's {first} is meant"):
        load_hparams_and_params(tmp_path)
    index.write_text(json.dumps({"weight_map": {first: "y" * 5000}}))
    with pytest.raises(CheckpointError, match="is not the name of a file beside it"):
        load_hparams_and_params(tmp_path)


@POSIX
@pytest.mark.parametrize(
    "name", ["hparams.json", "checkpoint", "model.ckpt.index", "encoder.json", "vocab.bpe"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "hole"])
def test_what_would_never_end_is_not_begun(tmp_path, name, kind):
    for path in successor_model().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink()
    if kind == "hole":
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
    elif kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    signal.alarm(20)  # it ends the process
    with pytest.raises(PicogptError) as error:
        read_directory(tmp_path)
    signal.alarm(0)
    assert str(tmp_path) in str(error.value) and str(error.value).isprintable()


@POSIX
def test_a_pipe_for_safetensors(tmp_path):
    os.mkfifo(tmp_path / "x")
    signal.alarm(20)
    with pytest.raises(CheckpointError, match=r"cannot read .*: not a regular file"):
        read_safetensors_header(tmp_path / "x")
    signal.alarm(0)


# Vocabularies


def test_a_word_of_the_vocabulary_is_still_made_by_its_merges(tmp_path):
    """In this order of merges `hel` never comes about alone: e l goes first. OpenAI's encoder says so too."""
    merges = ["e l", "h e", "he l", *MERGES[2:]]
    vocabulary = TOKENS | {"el": len(TOKENS)}
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary))
    (tmp_path / "vocab.bpe").write_text("\n".join(merges))
    pytest.importorskip("tokenizers")
    assert get_encoder(tmp_path).encode("hel") == [vocabulary["h"], vocabulary["el"]]
    assert vocabulary_of_tokenizers(tmp_path)[1][1:] == [
        get_encoder(tmp_path).encode(text) for text in PROBES[1:]
    ]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("model", {"ignore_merges": True}, "model.ignore_merges is True"),
        ("added_tokens", {"content": "he", "id": 256}, "'he' is an added token, but merges make it too"),
        ("added_tokens", {"content": "!", "id": 0}, "'!' is an added token, but merges make it too"),
        ("added_tokens", {"content": ""}, "no merge makes the token ''"),
        ("added_tokens", {"lstrip": True}, "single_word, lstrip or rstrip"),
        ("added_tokens", {"rstrip": True}, "single_word, lstrip or rstrip"),
        ("added_tokens", {"single_word": True}, "single_word, lstrip or rstrip"),
        ("added_tokens", {"id": "y" * 9000}, "has id 'y{100,400}$"),
    ],
)
def test_tokenizer_json_that_means_something_else(tmp_path, part, change, message):
    path, seeds, content = tmp_path / "tokenizer.json", iter(range(100)), {"added_tokens": []}
    while [token["content"] for token in content["added_tokens"]] != ["<|endoftext|>", "<pad>"]:
        write_tokenizer_json(Random(next(seeds)), tmp_path)
        if judge(TARGETS["tokenizer.json"], tmp_path) == "equal":
            content = json.loads(path.read_bytes())
    (content[part][-1] if part == "added_tokens" else content[part]).update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(PicogptError, match=message):
        get_encoder(tmp_path)


def test_a_failed_save_leaves_nothing_unfinished(tmp_path, monkeypatch):
    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        Encoder(TOKENS, [tuple(merge.split()) for merge in MERGES]).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Pickles


@pytest.mark.parametrize("name", NAMES.split())
def test_no_pickle_is_loaded_under_any_name(tmp_path, name):
    marker = tmp_path / "PWNED"
    pickle.loads(pickles(marker)[1])
    assert marker.exists()  # it does what it should not be let do
    marker.unlink()
    for source in (openai_model(), successor_model(), None):
        for content in pickles(marker):
            if source is None:
                write_model(Random(0), tmp_path, "")
            for path in source.iterdir() if source else ():
                (tmp_path / path.name).write_bytes(path.read_bytes())
            (tmp_path / name).write_bytes(content)
            try:
                read_directory(tmp_path)
            except PicogptError as error:
                assert str(error).isprintable()
        assert not marker.exists()
        for path in tmp_path.iterdir():
            path.unlink()


def test_the_package_has_nothing_that_could_load_one():
    forbidden = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "torch", "tensorflow"}
    calls = {"eval", "exec", "__import__", "compile"}
    sources = sorted(Path(picogpt.__file__).parent.glob("*.py"))
    assert len(sources) > 10
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {part for name in names for part in name.split(".")}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in calls, (path, node.lineno)
                allowed = [word.value for word in node.keywords if word.arg == "allow_pickle"]
                assert not any(ast.literal_eval(value) for value in allowed), (path, node.lineno)
    assert "pickle" not in sys.modules.get("picogpt.checkpoint").__dict__


def test_an_added_token_that_has_another_id_in_the_vocabulary(tmp_path):
    """Whose id counts is up to who reads it: tokenizers takes the vocabulary's."""
    (tmp_path / "encoder.json").write_text(json.dumps(TOKENS | {"<pad>": len(TOKENS)}))
    (tmp_path / "vocab.bpe").write_text("\n".join(MERGES))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": len(TOKENS) + 1}))
    with pytest.raises(EncoderError, match=rf"'<pad>' has the id {len(TOKENS)}, and as an added token"):
        get_encoder(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": len(TOKENS)}))
    assert get_encoder(tmp_path).special_tokens["<pad>"] == len(TOKENS)


def test_a_checkpoint_that_names_two_prefixes(tmp_path):
    save_checkpoint(tmp_path, SMALL, random_params(**SMALL, dtype=np.float32))
    line = 'model_checkpoint_path: "model.ckpt"\n'
    (tmp_path / "checkpoint").write_text(line)
    load_hparams_and_params(tmp_path)
    (tmp_path / "checkpoint").write_text(line + 'model_checkpoint_path: "second.ckpt"\n')
    with pytest.raises(PicogptError, match="not one model_checkpoint_path"):
        load_hparams_and_params(tmp_path)


def test_what_a_message_quotes_is_short_and_printable(tmp_path):
    """Two that the fuzzer found: an id that is not a number, and a value that another one contradicts."""
    (tmp_path / "encoder.json").write_text(json.dumps(TOKENS | {"<pad>": len(TOKENS)}))
    (tmp_path / "vocab.bpe").write_text("\n".join(MERGES))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": "a\0b" + "c" * 9000}))
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2, "n_head": ' + "[" * 900 + "]" * 900 + "}")
    for read in get_encoder, load_hparams_and_params:
        with pytest.raises(PicogptError) as error:
            read(tmp_path)
        assert str(error.value).isprintable() and len(str(error.value)) < 500
