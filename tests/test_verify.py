"""picogpt/verify.py: what is wrong with a model directory is found, and said where it is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models import SMALL, random_params
from picogpt import get_encoder, save_checkpoint, verify
from picogpt.model_dirs import OPENAI_SIZES

DATA = "model.ckpt.data-00000-of-00001"
GPT2 = {**SMALL, "n_vocab": 50257}


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "mine"
    save_checkpoint(directory, GPT2, random_params(**GPT2, dtype=np.float32))
    get_encoder().save(directory)
    return directory


def report(capsys, *arguments):
    status = verify.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def wrong(directory):
    return {finding.part: finding.said for finding in verify.verify(directory) if not finding.right}


def test_a_right_model(model, capsys):
    assert wrong(model) == {}
    status, out, _ = report(capsys, model)
    assert status == 0 and out.endswith("The model is right.\n")
    assert "every CRC is right" in out and "OpenAI's to the byte" in out
    n_bytes = (model / DATA).stat().st_size
    assert f"{n_bytes:,} bytes" in out and f"{n_bytes // 4:,} parameters" in out


def test_every_damaged_tensor_is_named(model, capsys):
    data = bytearray((model / DATA).read_bytes())
    data[0] ^= 1  # model/h0/attn/c_attn/b, the first by name
    data[-1] ^= 1  # model/wte
    (model / DATA).write_bytes(data)
    assert wrong(model) == {"weights": "the CRC32C of model/wte, model/h0/attn/c_attn/b is wrong"}
    status, out, _ = report(capsys, model)
    assert status == 1 and "WRONG  weights" in out and "The model is right" not in out


def test_a_shard_cut_short_and_one_that_is_missing(model):
    with (model / DATA).open("r+b") as file:
        file.truncate(1000)
    assert "the file has 1000" in wrong(model)["weights"]
    (model / DATA).unlink()
    assert "is missing" in wrong(model)["weights"]


@pytest.mark.parametrize("name", ["checkpoint", "hparams.json", "model.ckpt.index"])
def test_a_missing_file_is_named(model, name):
    (model / name).unlink()
    assert [*wrong(model)] == ["names and shapes"]
    assert name in wrong(model)["names and shapes"]


def test_hyper_parameters_against_shapes(model):
    (model / "hparams.json").write_text(json.dumps({**GPT2, "n_layer": 3}))
    assert "missing: model/h2/" in wrong(model)["names and shapes"]


def test_a_size_that_is_not_the_one_of_the_directorys_name(model, capsys):
    model = model.rename(model.with_name("355M"))
    assert "none of OpenAI's sizes, in 355M" in wrong(model)["names and shapes"]
    status, out, _ = report(capsys, model)
    assert status == 1 and "1,419,292,672 bytes" in out


def test_gpt2s_vocabulary_is_compared_with_its_digest(model, monkeypatch):
    monkeypatch.setitem(OPENAI_SIZES, "mine", GPT2)
    path = model / "vocab.bpe"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # the same merges, other bytes
    assert wrong(model)["vocabulary"].endswith("not OpenAI's: another sha256 of vocab.bpe")
    monkeypatch.delitem(OPENAI_SIZES, "mine")
    assert wrong(model) == {}  # somebody's own vocabulary is no fault of somebody's own model
    path.write_bytes(path.read_bytes()[:1000])
    assert "is not two symbols" in wrong(model)["vocabulary"]
    path.unlink()
    assert "vocab.bpe" in wrong(model)["vocabulary"]
    (model / "encoder.json").unlink()
    assert wrong(model) == {}  # the package's is taken


def test_what_is_not_read_is_checked_too(model):
    with (model / DATA).open("ab") as file:
        file.write(b"more")
    assert "4 bytes after them" in wrong(model)["weights"]
    (model / "model.ckpt.meta").write_bytes(b"<html></html>")
    assert "none of TensorFlow's" in wrong(model)["graph"]
    (model / "model.ckpt.meta").write_bytes(b"\x0a\x00\x12\x00")
    assert "graph" not in wrong(model)


def test_the_directory_one_is_in(model, monkeypatch):
    model = model.rename(model.with_name("355M"))
    monkeypatch.chdir(model)
    assert "in 355M" in wrong(".")["names and shapes"]


def test_the_embedded_model_by_name(capsys):
    status, out, err = report(capsys, "shakespeare")
    assert status == 0 and "1,024 tokens" in out and err == ""


def test_a_model_that_is_not_there_is_told_what_files_it_needs(tmp_path, capsys, assets):
    for size in OPENAI_SIZES:
        status, out, _ = report(capsys, size, "--models_dir", tmp_path)
        assert status == 1 and str(tmp_path / size) in out
        assert all(f"  {name} " in out for name in verify.files_of(size))
    real = [assets / "openai-124M-meta" / n for n in ("checkpoint", "hparams.json", "model.ckpt.index")]
    real += [assets / "tokenizer" / n for n in ("encoder.json", "vocab.bpe")]
    sizes = {path.name: f"{path.stat().st_size:,} bytes" for path in real} | {DATA: "497,759,232 bytes"}
    files = verify.files_of("124M")
    assert all(files[name].partition(";")[0] == size for name, size in sizes.items())
    status, out, err = report(capsys, "no such", "--models_dir", tmp_path)
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_safetensors_have_no_crc_and_it_says_so(tmp_path):
    numpy_file = pytest.importorskip("safetensors.numpy")
    from models import transformers_names

    params = random_params(**SMALL, dtype=np.float32)
    directory = tmp_path / "hf"
    directory.mkdir()
    numpy_file.save_file(transformers_names(params), directory / "model.safetensors")
    sizes = {"vocab_size": SMALL["n_vocab"], "n_positions": SMALL["n_ctx"]}
    (directory / "config.json").write_text(json.dumps({**SMALL, **sizes, "model_type": "gpt2"}))
    weights = next(finding for finding in verify.verify(directory) if finding.part == "weights")
    assert weights.right and "no CRC" in weights.said
    assert "no vocabulary" in wrong(directory)["vocabulary"]


def test_info_shows_models_and_warns_of_a_kernel_that_is_not_the_processors(tmp_path):
    (tmp_path / "half").mkdir()
    shutil.copytree(Path(__file__).parents[1] / "models" / "shakespeare", tmp_path / "whole")

    def info(*arguments, **settings):

        environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
        environment |= {"PICOGPT_MODELS_DIR": str(tmp_path), **settings}
        command = [sys.executable, "-m", "picogpt.info", *arguments]
        cwd = Path(__file__).parents[1]
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)

    plain = info()
    assert plain.returncode == 0 and plain.stderr == ""
    assert f"{tmp_path}: half (not whole), whole\n" in plain.stdout
    assert f"numpy {np.__version__}" in plain.stdout and "PICOGPT_MODELS_DIR" in plain.stdout
    assert "WARNING" not in plain.stdout
    if "openblas" in plain.stdout and "kernel Prescott" not in plain.stdout and "x86_64" in plain.stdout:
        forced = info(OPENBLAS_CORETYPE="Prescott").stdout
        assert "WARNING: OPENBLAS_CORETYPE=Prescott" in forced and "unset OPENBLAS_CORETYPE" in forced
    assert (info("x").returncode, info("x").stdout) == (2, "")
