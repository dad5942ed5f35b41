"""Downloading from a server that behaves as badly as real ones do (bad_server.py).

The files served are those of a small model, written by TensorFlow; what is expected is that they arrive, byte
for byte, and that whatever happens on the way leaves a state from which the next run arrives there.
"""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from bad_server import AZURE_ERROR, HOTEL, serving, unused_port

from models import random_params, transformers_names
from picogpt import PicogptError, load_encoder_hparams_and_params, save_checkpoint
from picogpt import transfer as room
from picogpt.download import DownloadError, _index_entries, download
from picogpt.model_dirs import OPENAI_SIZES
from picogpt.tensor_bundle import read_bundle, read_index, write_bundle

HPARAMS = {"n_vocab": 50257, "n_ctx": 20000, "n_embd": 8, "n_head": 2, "n_layer": 2}
DATA, INDEX, META = "model.ckpt.data-00000-of-00001", "model.ckpt.index", "model.ckpt.meta"
FETCHED = [INDEX, "hparams.json", META, "checkpoint", DATA]
VOCABULARY = ["encoder.json", "vocab.bpe"]
CHECKOUT = Path(__file__).parents[1]

RESET = ("ends", "reset", 0.5)
XML = ("status", 200, AZURE_ERROR, {"Content-Type": "application/xml"})
HTML = ("status", 200, HOTEL, {"Content-Type": "text/html"})
BUSY = ("status", 503, b"", {"Retry-After": "1"})
ALWAYS = 99  # requests

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with a model called 124M, 2.3 MB: most of it in the last two tensors, wpe and wte."""
    root = tmp_path_factory.mktemp("served")
    directory = root / "124M"
    save_checkpoint(directory, HPARAMS, random_params(**HPARAMS, dtype=np.float32))
    directory.joinpath(META).write_bytes(
        b"\x0a\x08\x2a\x062.21.0"
    )  # the version of TensorFlow, in a graph of nothing
    try:
        import tensorflow as tf
    except ImportError:  # then it is picogpt's own writing that is served
        return root
    v1 = tf.compat.v1
    with v1.Graph().as_default(), v1.Session() as session:
        for name, array in read_bundle(
            directory / "model.ckpt"
        ).items():  # fed, to keep numbers out of the graph
            v1.Variable(tf.zeros(array.shape), name=name, use_resource=False).load(array, session)
        v1.train.Saver(save_relative_paths=True).save(session, str(directory / "model.ckpt"))
    return root


@pytest.fixture(autouse=True)
def small_and_hasty(monkeypatch):
    """The small model is what 124M means here; nobody waits for a bad server, nor for the disk or a proxy."""
    monkeypatch.setitem(OPENAI_SIZES, "124M", HPARAMS)
    slept: list[float] = []
    monkeypatch.setattr(room, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(room, "sleep", slept.append)
    monkeypatch.setattr(room, "TIMEOUTS", (2, 0.3))
    monkeypatch.setattr(room, "CHUNK", 1 << 14)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for name in ("PICOGPT_BASE_URL", "PICOGPT_MODELS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    return slept


def original(served: Path, name: str) -> bytes:
    folder = CHECKOUT / "picogpt" / "vocabulary" if name in VOCABULARY else served / "124M"
    return (folder / name).read_bytes()


def final_names(models: Path) -> set[str]:
    """The files that have the names under which they are used."""
    return {path.name for path in models.glob("124M/*")} & {*FETCHED, *VOCABULARY}


def check_arrived(served: Path, models: Path) -> None:
    assert {path.name for path in models.glob("124M/*")} == {*FETCHED, *VOCABULARY}  # and nothing besides
    check_sound(served, models)


def check_sound(served: Path, models: Path) -> None:
    """What has its final name is right and whole, and `checkpoint` is not there without all others."""
    names = final_names(models)
    for name in names:
        assert (models / "124M" / name).read_bytes() == original(served, name), name
    assert "checkpoint" not in names or len(names) == 7


def check_next_run(served: Path, models: Path) -> list:
    """The next run arrives; returns its requests for the weights."""
    with serving(served) as (url, log):
        download("124M", models, base_url=url)
    check_arrived(served, models)
    return requests_for(DATA, log)


def requests_for(name: str, log: list) -> list:
    return [request for request in log if request.path == f"/124M/{name}"]


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and message.isprintable()
    return message


def part_size(models: Path) -> int:
    part = models / "124M" / f"{DATA}.part"
    return part.stat().st_size if part.exists() else 0


def wait_until(condition, seconds=20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def start(module: str, *arguments: str, url: str = "", before: str = "", **options) -> subprocess.Popen:
    """A real process, for which 124M means the small model, too."""
    code = f"from picogpt.model_dirs import OPENAI_SIZES; OPENAI_SIZES['124M'] = {HPARAMS}\n"
    code += f"import sys; {before}\nfrom picogpt.{module} import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=CHECKOUT,
        env={**os.environ, "PICOGPT_BASE_URL": url},
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


# A server that is well


def test_what_is_fetched(served, tmp_path, capfd):
    with serving(served) as (url, log):
        directory = download("124M", tmp_path / "models", base_url=f"{url}/")
        assert directory == tmp_path / "models" / "124M"
        check_arrived(served, tmp_path / "models")
        assert sorted(request.path for request in log) == sorted(f"/124M/{name}" for name in FETCHED)
        assert (log[0].path, log[-1].path) == (f"/124M/{INDEX}", f"/124M/{DATA}")  # and no vocabulary
        assert not any(request.range for request in log)
        out, err = capfd.readouterr()
        assert out == "" and url in err and str(directory) in err and len(err.splitlines()) == 1
        assert download("124M", tmp_path / "models", base_url=url) == directory
        assert len(log) == 5  # what is whole is not fetched again


def test_the_loader_fetches_and_fetches_once(served, tmp_path, monkeypatch):
    with serving(served) as (url, log):
        monkeypatch.setenv("PICOGPT_BASE_URL", url)
        monkeypatch.setenv("PICOGPT_MODELS_DIR", str(tmp_path / "models"))
        for _ in range(2):
            encoder, hparams, params = load_encoder_hparams_and_params("124M")
            assert len(log) == 5
    assert hparams == HPARAMS and encoder.decode(encoder.encode("Hello")) == "Hello"
    assert np.array_equal(params["wte"], random_params(**HPARAMS, dtype=np.float32)["wte"])
    assert len(params["blocks"]) == 2


def test_the_command_line_fetches(served, tmp_path):
    flags = ["--model_size", "124M", "--n_tokens_to_generate", "2", "--models_dir", tmp_path]
    with serving(served) as (url, log):
        process = start("__main__", "Hello", *flags, url=url)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.endswith("\n") and "2 tokens" in err
    assert "Traceback" not in err and len(log) == 5
    check_arrived(served, tmp_path)


def test_the_tool_prints_the_directory(served, tmp_path):
    with serving(served) as (url, _):
        process = start("download", "124M", "--models_dir", tmp_path, "--base_url", url)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == f"{tmp_path / '124M'}\n" and "Traceback" not in err
    check_arrived(served, tmp_path)


def test_errors_of_the_command_lines(served, tmp_path):
    for module, arguments in (
        ("__main__", ["Hello", "--model_size", "124M", "--models_dir", tmp_path]),
        ("download", ["124M", "--models_dir", tmp_path]),
    ):
        with serving(served, {INDEX: [("status", 404)]}) as (url, _):
            process = start(module, *arguments, url=url)
            out, err = process.communicate(timeout=60)
        last = err.splitlines()[-1]
        assert process.returncode == 2 and out == "" and "Traceback" not in err
        assert last.startswith("picogpt: ") and "404" in last and f"{url}/124M/{INDEX}" in last
        assert "PICOGPT_BASE_URL" in last
    check_sound(served, tmp_path)


@pytest.mark.parametrize("name", ["125M", "", "gpt2", "../124M", "124m"])
def test_unknown_sizes(name, tmp_path):
    with pytest.raises(PicogptError) as error:
        download(name, tmp_path / "models", base_url=f"http://127.0.0.1:{unused_port()}")
    assert repr(name) in one_line(error) and "124M" in str(error.value)
    assert not (tmp_path / "models").exists()


def test_nothing_unfinished_has_a_final_name(served, tmp_path):
    """Looked at all the time, while 2.3 MB come in a second, with a reset and a flipped byte among them."""
    faults = {INDEX: [RESET], META: [("shortened", 0.5)], DATA: [RESET, ("flipped", 2_000_000)]}
    seen = []
    with serving(served, faults, speed=6e6) as (url, _):
        thread = threading.Thread(target=download, args=("124M", tmp_path), kwargs={"base_url": url})
        thread.start()
        while thread.is_alive():
            check_sound(served, tmp_path)
            seen.append((len(final_names(tmp_path)), part_size(tmp_path)))
    check_arrived(served, tmp_path)
    assert len({size for _, size in seen}) > 5 and {n for n, _ in seen} >= {5}


# Faults that the same run mends

RECOVERED: dict[str, dict[str, list]] = {
    **{f"reset at {share} %": {DATA: [("ends", "reset", share / 100)]} for share in (0, 1, 50, 99)},
    **{f"truncation at {share} %": {DATA: [("ends", "close", share / 100)]} for share in (0, 1, 50, 99)},
    "reset again and again, but further each time": {DATA: [("ends", "reset", 0.3)] * 8},
    "stall at the beginning": {DATA: [("ends", "stall", 0.0)]},
    "stall at 50 %": {DATA: [("ends", "stall", 0.5)]},
    "truncation, and a Content-Length that agrees": {DATA: [("shortened", 0.5)]},
    "500": {DATA: [("status", 500)]},
    "503 with Retry-After": {DATA: [BUSY]},
    "Content-Length too large": {DATA: [("content_length", 100)]},
    "Content-Length too small": {DATA: [("content_length", -100)]},
    "Range ignored": {DATA: [RESET, ("range_ignored",)]},
    "Range ignored, always": {DATA: [RESET, *[("range_ignored",)] * ALWAYS]},
    "Range ignored, and that cut off, too": {DATA: [RESET, ("range_ignored",), RESET]},
    "Range wrong, earlier": {DATA: [RESET, ("range_shifted", 5000)]},
    "Range wrong, later": {DATA: [RESET, ("range_shifted", -5000)]},
    "Range wrong, and not admitted": {DATA: [RESET, ("range_shifted", 5000, False)]},
    "Range of a file of another size": {DATA: [RESET, ("other_total", 4)]},
    "416": {DATA: [RESET, ("range_refused",)]},
    "416 for every part": {DATA: [RESET, *[("range_refused",)] * ALWAYS]},
    "flipped byte": {DATA: [("flipped", 1000)]},
    "flipped byte in another tensor, after a reset": {DATA: [RESET, ("flipped", 2_000_000)]},
    "flipped byte, and then another": {DATA: [("flipped", 1000), ("flipped", 2_000_000)]},
    "flipped byte in the index": {INDEX: [("flipped", 100)]},
    "chunked": {name: [("chunked",)] for name in FETCHED},
    "chunked, and ended early": {DATA: [("chunked", 0.5), ("chunked", 0.0), ("chunked", 0.5)]},
    "gzip": {name: [("gzipped",)] for name in FETCHED},
    "empty": {name: [("status", 200, b"")] for name in FETCHED},
    "redirect": {name: [("redirect",)] for name in FETCHED},
    **{
        f"each file: {fault[:3]}": {name: [fault] for name in FETCHED}
        for fault in (RESET, BUSY, ("status", 500))
    },
    **{
        f"each file cut {fault}": {name: [(*fault, 0.5)] for name in FETCHED}
        for fault in (("shortened",), ("ends", "close"))
    },
}


@pytest.mark.parametrize("name", RECOVERED)
def test_recovered(served, tmp_path, name):
    with serving(served, {file: list(faults) for file, faults in RECOVERED[name].items()}) as (url, log):
        download("124M", tmp_path, base_url=url)
    check_arrived(served, tmp_path)
    assert len(log) > 5 or name == "chunked"  # the fault was met
    download("124M", tmp_path, base_url="http://127.0.0.1:9")  # nothing more is asked for


@pytest.mark.parametrize(("wish", "pause"), [("7", 7), ("0", 0), ("99999", 60), ("tomorrow", 0), ("-1", 0)])
def test_a_busy_server_may_ask_for_a_pause(served, tmp_path, small_and_hasty, wish, pause):
    with serving(served, {DATA: [("status", 503, b"", {"Retry-After": wish})]}) as (url, _):
        download("124M", tmp_path, base_url=url)
    assert small_and_hasty == [pause]


def test_pauses_grow_and_begin_anew_after_progress(served, tmp_path, small_and_hasty, monkeypatch):
    monkeypatch.setattr(room, "PAUSES", (1, 2, 4))
    nothing, something = ("ends", "close", 0.0), ("ends", "close", 0.3)
    with serving(served, {DATA: [nothing, nothing, nothing, something, nothing, something]}) as (url, _):
        download("124M", tmp_path, base_url=url)
    assert small_and_hasty == [1, 2, 4, 1, 2, 1]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("then", ["reset", "close", "stall"])
def test_only_the_rest_is_asked_for(served, tmp_path, then, share):
    with serving(served, {DATA: [("ends", then, share)]}) as (url, log):
        download("124M", tmp_path, base_url=url)
    first, second = requests_for(DATA, log)
    size = len(original(served, DATA))
    start = int(re.fullmatch(r"bytes=(\d+)-", second.range or "bytes=0-")[1])
    assert max(first.sent - room.CHUNK, 0) <= start <= first.sent == int(share * size)  # a piece may be lost
    assert second.sent == size - start


# Faults that end it

REFUSED: dict[str, tuple[dict[str, list], str]] = {
    "404": ({DATA: [("status", 404, AZURE_ERROR)]}, "404"),
    "403": ({DATA: [("status", 403)]}, "403"),
    "410 for the index": ({INDEX: [("status", 410)]}, "410"),
    "500, always": ({DATA: [("status", 500)] * ALWAYS}, "500"),
    "503, always": ({META: [BUSY] * ALWAYS}, "503"),
    "reset, always": ({DATA: [("ends", "reset", 0.0)] * ALWAYS}, "reset|forcibly closed"),
    "truncation, always": (
        {DATA: [("ends", "close", 0.0)] * ALWAYS},
        "incomplete|ended|closed|nothing|0 bytes",
    ),
    "206 although the whole was asked for": ({DATA: [("range_shifted", 0)] * ALWAYS}, "206"),
    "stall, always": ({INDEX: [("ends", "stall", 0.5)] * ALWAYS}, "timed out"),
    "XML with 200": ({DATA: [XML] * ALWAYS}, "xml"),
    "XML with 200 for the index": ({INDEX: [XML] * ALWAYS}, "xml"),
    "XML with 200 that claims to be data": ({DATA: [("status", 200, AZURE_ERROR)] * ALWAYS}, "bytes|damaged"),
    "XML with 200 that claims to be an index": ({INDEX: [("status", 200, AZURE_ERROR)] * ALWAYS}, INDEX),
    "HTML for everything": ({name: [HTML] * ALWAYS for name in FETCHED}, "html"),
    "HTML for the weights, after half of them": ({DATA: [RESET] + [HTML] * ALWAYS}, "html"),
    "HTML as hparams.json": ({"hparams.json": [("status", 200, HOTEL)] * ALWAYS}, "hparams.json"),
    "HTML as checkpoint": ({"checkpoint": [("status", 200, HOTEL)] * ALWAYS}, "checkpoint"),
    "HTML as model.ckpt.meta": ({META: [("status", 200, HOTEL)] * ALWAYS}, "model.ckpt.meta"),
    "JSON that is no object": ({"hparams.json": [("status", 200, b"[1]")] * ALWAYS}, "hparams.json"),
    "JSON too deep": ({"hparams.json": [("status", 200, b"[" * 100_000)] * ALWAYS}, "hparams.json"),
    "hparams.json of another model": ({"hparams.json": [("flipped", 67)] * ALWAYS}, "hparams.json"),
    "an endless index": ({INDEX: [("status", 200, bytes(9 << 20))] * ALWAYS}, "large"),
    "shortened, always": ({DATA: [("shortened", 0.5)] * ALWAYS}, "bytes"),
    "Content-Length too large, always": ({DATA: [("content_length", 100)] * ALWAYS}, "bytes"),
    "Range wrong, always": ({DATA: [RESET, *[("range_shifted", 5000)] * ALWAYS]}, "part"),
    "flipped, always": ({DATA: [("flipped", 2_000_000)] * ALWAYS}, "damaged"),
    "flipped in the index, always": ({INDEX: [("flipped", 100)] * ALWAYS}, "CRC"),
    "an empty index": ({INDEX: [("status", 200, b"")] * ALWAYS}, INDEX),
    "redirect loop": ({DATA: [("redirect",)] * ALWAYS}, "redirect"),
    "redirect to nowhere": ({DATA: [("redirect", "http://127.0.0.1:9/")] * ALWAYS}, "refused|timed out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(served, tmp_path, name):
    faults, said = REFUSED[name]
    faults = {file: list(each) for file, each in faults.items()}
    with serving(served, faults) as (url, log), pytest.raises(DownloadError) as error:
        download("124M", tmp_path, base_url=url)
    message = one_line(error)
    assert re.search(said, message, re.IGNORECASE), message
    assert "PICOGPT_BASE_URL" in message and len(message) < 400  # the cure
    assert not {"checkpoint", DATA} & final_names(tmp_path)
    check_sound(served, tmp_path)
    assert len(log) < 50
    assert not re.match(r"40[34]", name) or len(requests_for(DATA, log)) == 1  # asking again would not help
    check_next_run(served, tmp_path)


@pytest.mark.parametrize("url", ["nowhere", "ftp://127.0.0.1", "http://[", "http://", "http://127.0.0.1:99999"])
def test_addresses_that_are_none(tmp_path, url):
    with pytest.raises(DownloadError) as error:
        download("124M", tmp_path, base_url=url)
    assert "PICOGPT_BASE_URL" in one_line(error) and not final_names(tmp_path)


def test_nobody_listens(served, tmp_path):
    with pytest.raises(DownloadError) as error:
        download("124M", tmp_path, base_url=f"http://127.0.0.1:{unused_port()}")
    assert "refused" in one_line(error) and not final_names(tmp_path)
    check_next_run(served, tmp_path)


# What an earlier run, or a person, has left


def test_from_run_to_run(served, tmp_path, monkeypatch):
    """Seven runs, each of which the server cuts off, bring the file in eight pieces."""
    monkeypatch.setattr(room, "PAUSES", ())
    size, sent = len(original(served, DATA)), 0
    for i in range(7):
        there = part_size(tmp_path)
        faults = {DATA: [("ends", "close", 1 / (8 - i))]}
        with serving(served, faults) as (url, log), pytest.raises(DownloadError):
            download("124M", tmp_path, base_url=url)
        (request,) = requests_for(DATA, log)
        assert request.range == (f"bytes={there}-" if there else None)
        assert part_size(tmp_path) > there
        sent += request.sent
    (last,) = check_next_run(served, tmp_path)
    assert last.sent < size / 3 and sent + last.sent <= size + 7 * room.CHUNK


@pytest.mark.parametrize("at", range(14))
def test_stopped_at_a_renaming(served, tmp_path, monkeypatch, at):
    """Just before each file takes its place, and just after."""
    replace, calls = Path.replace, []

    def stopping_replace(path, target):
        calls.append(target)
        if len(calls) * 2 - 1 == at + 1:
            raise KeyboardInterrupt
        replace(path, target)
        if len(calls) * 2 == at + 1:
            raise KeyboardInterrupt

    with serving(served) as (url, log), monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopping_replace)
        with pytest.raises(KeyboardInterrupt):
            download("124M", tmp_path, base_url=url)
    check_sound(served, tmp_path)
    assert len(final_names(tmp_path)) == (at + 1) // 2
    again = check_next_run(served, tmp_path)
    assert sum(request.sent for request in again) == 0 or not requests_for(DATA, log)


def mended(served: Path, models: Path, spoil) -> list:
    """Download, spoil something in the directory, download again: the requests for weights of the latter."""
    check_next_run(served, models)
    spoil(models / "124M")
    return check_next_run(served, models)


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def test_damage_on_the_disk_is_mended_from_that_tensor_on(served, tmp_path):
    wpe = read_index(served / "124M" / "model.ckpt")["model/wpe"]
    (request,) = mended(served, tmp_path, lambda path: overwrite(path / DATA, wpe.offset + 9, b"\x07\x07"))
    assert request.range == f"bytes={wpe.offset}-"
    (request,) = mended(served, tmp_path, lambda path: os.truncate(path / DATA, wpe.offset + 9))
    assert request.range == f"bytes={wpe.offset + 9}-"


def test_mending_that_is_stopped(served, tmp_path):
    """What turned out to be damaged is not taken for whole in the meantime."""
    check_next_run(served, tmp_path)
    overwrite(tmp_path / "124M" / DATA, 2_000_000, b"\x07\x07")
    with serving(served, {DATA: [("status", 404)]}) as (url, _), pytest.raises(DownloadError):
        download("124M", tmp_path, base_url=url)
    assert "checkpoint" not in final_names(tmp_path)
    (request,) = check_next_run(served, tmp_path)
    assert request.range


@pytest.mark.parametrize("name", [INDEX, "checkpoint"])
def test_small_files_are_mended_without_fetching_the_weights(served, tmp_path, name):
    assert mended(served, tmp_path, lambda path: (path / name).unlink()) == []
    if name == INDEX:
        assert mended(served, tmp_path, lambda path: overwrite(path / name, 40, b"?")) == []


def test_missing_weights_are_fetched(served, tmp_path):
    (request,) = mended(served, tmp_path, lambda path: (path / DATA).unlink())
    assert request.range is None


@pytest.mark.parametrize("what", ["whole", "longer", "empty", "other", "half other", "damaged at its end"])
def test_what_a_part_may_hold(served, tmp_path, what):
    right = original(served, DATA)
    wte = read_index(served / "124M" / "model.ckpt")["model/wte"]
    part, start = {
        "whole": (right, None),
        "longer": (right + b"more", None),
        "empty": (b"", 0),
        "other": (bytes(len(right)), 0),
        "half other": (right[: wte.offset] + bytes(wte.size), wte.offset),
        "damaged at its end": (right[:-1] + bytes([right[-1] ^ 1]), wte.offset),
    }[what]
    (tmp_path / "124M").mkdir()
    (tmp_path / "124M" / f"{DATA}.part").write_bytes(part)
    requests = check_next_run(served, tmp_path)
    assert [request.sent for request in requests] == ([] if start is None else [len(right) - start])


def test_half_a_tensor_that_is_wrong(served, tmp_path):
    """It shows only when the other half has come; then the tensor is fetched again, and nothing else."""
    right, wte = original(served, DATA), read_index(served / "124M" / "model.ckpt")["model/wte"]
    (tmp_path / "124M").mkdir()
    (tmp_path / "124M" / f"{DATA}.part").write_bytes(right[: wte.offset] + bytes(wte.size // 2))
    requests = check_next_run(served, tmp_path)
    starts = [f"bytes={wte.offset + wte.size // 2}-", f"bytes={wte.offset}-"]
    assert [request.range for request in requests] == starts


# A directory in which somebody else's model is


OTHER = {**HPARAMS, "n_layer": HPARAMS["n_layer"] + 1}


def own_model(directory, kind):
    """A model that is not OpenAI's, in a directory named 124M."""
    params = random_params(**HPARAMS, dtype=np.float32, seed=7)
    if kind == "another size":
        save_checkpoint(directory, OTHER, random_params(**OTHER, dtype=np.float32, seed=7))
    elif kind == "Hugging Face":
        numpy_file = pytest.importorskip("safetensors.numpy")
        directory.mkdir(parents=True)
        numpy_file.save_file(transformers_names(params), directory / "model.safetensors")
        sizes = {"vocab_size": HPARAMS["n_vocab"], "n_positions": HPARAMS["n_ctx"], "model_type": "gpt2"}
        (directory / "config.json").write_text(json.dumps({**HPARAMS, **sizes}))
    else:
        save_checkpoint(directory, HPARAMS, params)
    if kind == "another prefix":
        (directory / "model.ckpt.index").rename(directory / "model-1000.index")
        (directory / DATA).rename(directory / DATA.replace("model.ckpt", "model-1000"))
        (directory / "checkpoint").write_text('model_checkpoint_path: "model-1000"\n')


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("kind", ["fine-tuned", "another prefix", "another size", "Hugging Face"])
def test_a_model_of_ones_own_that_is_right_is_left_alone(served, tmp_path, kind):
    directory = tmp_path / "124M"
    own_model(directory, kind)
    before = contents(directory)
    with serving(served) as (url, log):
        assert download("124M", tmp_path, base_url=url) == directory
    assert contents(directory) == before and not log


@pytest.mark.parametrize(
    "kind, wrong",
    [
        *[
            (kind, wrong)
            for kind in ("fine-tuned", "another size")
            for wrong in ("checkpoint", "hparams.json", "data")
        ],
        # (Without `checkpoint` nothing says that weights of another prefix are a model: OpenAI's come beside.)
        *[("another prefix", wrong) for wrong in ("hparams.json", "data")],
    ],
)
def test_a_model_of_ones_own_that_is_wrong_is_not_replaced(served, tmp_path, kind, wrong):
    directory = tmp_path / "124M"
    own_model(directory, kind)
    if wrong == "data":
        (path,) = directory.glob("*.data-*")
        overwrite(path, 100, b"?")
    else:
        (directory / wrong).unlink()
    before = contents(directory)
    for faults in {INDEX: [("status", 404)]}, {}:  # not even when nothing comes
        with serving(served, faults) as (url, log), pytest.raises(DownloadError) as error:
            download("124M", tmp_path, base_url=url)
        assert contents(directory) == before and requests_for(DATA, log) == []
    assert "files of another model" in one_line(error) and "model" in str(error.value)


def test_who_has_the_weights_mapped_keeps_them(served, tmp_path):
    check_next_run(served, tmp_path)
    path = tmp_path / "124M" / DATA
    overwrite(path, 2_000_000, b"\x07\x07")
    mapped = np.memmap(path, np.uint8, "r")
    second_name = path.with_name("second name")
    second_name.hardlink_to(path)
    before = path.read_bytes()
    with serving(served) as (url, _):
        download("124M", tmp_path, base_url=url)
    assert bytes(mapped) == second_name.read_bytes() == before != path.read_bytes()


def test_a_whole_model_needs_no_permission_to_write(served, tmp_path, monkeypatch):
    check_next_run(served, tmp_path)

    def forbidden(*_, **__):
        raise PermissionError

    monkeypatch.setattr(Path, "mkdir", forbidden)
    assert download("124M", tmp_path, base_url="http://nowhere") == tmp_path / "124M"


def test_a_model_is_completed_where_it_is(served, tmp_path, monkeypatch):
    """Though the working directory has got a folder `models` in the meantime."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: tmp_path / "cache")
    with serving(served, {DATA: [("ends", "reset", 0.5)] * ALWAYS}) as (url, _), pytest.raises(DownloadError):
        download("124M", base_url=url)
    Path("models").mkdir()
    with serving(served) as (url, log):
        assert download("124M", base_url=url) == tmp_path / "cache" / "models" / "124M"
        assert requests_for(DATA, log)[0].range
        assert download("124M", base_url=url) == tmp_path / "cache" / "models" / "124M"
        assert len(log) == 5
    assert not any(Path("models").iterdir())


# What a hostile server may send


def test_an_index_of_another_model_or_of_what_does_not_fill_a_file(served, tmp_path):
    entries = read_index(served / "124M" / "model.ckpt")
    arrays = {name: np.zeros(entry.shape, np.float32) for name, entry in entries.items()}
    more = {**arrays, "model/more": np.zeros(3, np.float32)}
    less = {name: array for name, array in arrays.items() if "h1" not in name}
    for number, tensors in enumerate((more, less)):
        write_bundle(tmp_path / str(number), tensors)
        body = (tmp_path / f"{number}.index").read_bytes()
        with serving(served, {INDEX: [("status", 200, body)] * ALWAYS}) as (url, log):
            with pytest.raises(DownloadError) as error:
                download("124M", tmp_path, base_url=url)
            assert requests_for(DATA, log) == []
        assert re.search("unexpected: model/more|missing: model/h1", one_line(error))


@pytest.mark.parametrize("field", ["offset", "dtype", "shard"])
def test_an_index_that_does_not_fill_one_file(served, field):
    entries = read_index(served / "124M" / "model.ckpt")
    name, entry = next(iter(entries.items()))
    wrong = {"offset": entry.offset + 4, "dtype": "float16", "shard": Path("elsewhere")}[field]
    entries[name] = entry._replace(**{field: wrong})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("picogpt.download.parse_index", lambda *_: entries)
        with pytest.raises(ValueError, match="do not fill"):
            _index_entries(b"")


def test_an_endless_body(served, tmp_path):
    with serving(served, {DATA: [("endless",)]}) as (url, log):
        download("124M", tmp_path, base_url=url)
        assert len(requests_for(DATA, log)) == 1
    check_arrived(served, tmp_path)


def test_a_proxy_that_always_ends_early_and_ignores_ranges(served, tmp_path, small_and_hasty):
    with serving(served, {DATA: [("without_range", 0.4)] * ALWAYS}) as (url, log):
        with pytest.raises(DownloadError, match="ends early"):
            download("124M", tmp_path, base_url=url)
        assert len(requests_for(DATA, log)) == len(room.PAUSES) + 1 == len(small_and_hasty) + 1


@pytest.mark.parametrize(
    "headers",
    [
        {"Location": "http://["},
        {"Location": "/\xe9"},
        {"Location": "http://a..b/"},
        {"Location": f"http://{'a' * 70}.b/"},
        {"Retry-After": "9" * 5000},
        {"Retry-After": "soon"},
    ],
    ids=lambda headers: repr(headers)[:40],
)
def test_headers_that_make_no_sense(served, tmp_path, headers):
    code = 302 if "Location" in headers else 503
    faults = {INDEX: [("status", code, b"", headers)] * ALWAYS}
    with serving(served, faults) as (url, log), pytest.raises(DownloadError) as error:
        download("124M", tmp_path, base_url=url)
    assert len(one_line(error)) < 1000 and len(log) < 50


def test_what_is_secret_in_an_address_is_not_shown_and_what_follows_a_question_mark_is_kept(
    served, tmp_path, capfd
):
    with serving(served, {DATA: [RESET]}) as (url, log):
        download("124M", tmp_path, base_url=url.replace("//", "//joe:hunter2@") + "/?key=hidden")
    assert [request.path.partition("?")[2] for request in log] == ["key=hidden"] * len(log)
    err = capfd.readouterr().err
    assert url in err and "hunter2" not in err and "hidden" not in err


# Processes that are stopped, and two at once


@posix
def test_killed_twice(served, tmp_path):
    size, there = len(original(served, DATA)), 0
    for share in (0.4, 0.5):  # of what is left
        with serving(served, {DATA: [("ends", "stall", share)]}) as (url, log):
            process = start("download", "124M", "--models_dir", tmp_path, url=url)
            wait_until(lambda: part_size(tmp_path) > there + size // 5)  # noqa: B023
            process.kill()
            process.communicate()
        assert requests_for(DATA, log)[0].range == (f"bytes={there}-" if there else None)
        check_sound(served, tmp_path)
        assert final_names(tmp_path) == {*FETCHED, *VOCABULARY} - {"checkpoint", DATA}
        there = part_size(tmp_path)
    (request,) = check_next_run(served, tmp_path)
    assert request.range == f"bytes={there}-" and request.sent == size - there < size * 0.6


@posix
@pytest.mark.parametrize("module", ["download", "__main__"])
def test_ctrl_c(served, tmp_path, module):
    model = ["124M"] if module == "download" else ["Hello", "--model_size", "124M"]
    with serving(served, {DATA: [("ends", "stall", 0.5)]}) as (url, _):
        # A shell makes what it starts with & ignore Ctrl-C, and that is inherited.
        heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        process = start(module, *model, "--models_dir", tmp_path, url=url, before=heed)
        wait_until(lambda: part_size(tmp_path) > 300_000)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and out.strip() == "" and "Traceback" not in err
    check_sound(served, tmp_path)
    there = part_size(tmp_path)
    (request,) = check_next_run(served, tmp_path)
    assert there and request.range == f"bytes={there}-"


def two_at_once(served: Path, models: Path, url: str) -> list[subprocess.Popen]:
    """Two processes: one that has begun, and one that has said that it waits."""
    first = start("download", "124M", "--models_dir", models, url=url)
    wait_until(lambda: part_size(models) > 300_000)
    second = start("download", "124M", "--models_dir", models, url=url)
    said = second.stderr.readline()
    assert said.startswith("picogpt: another process") and str(models / "124M") in said
    return [first, second]


def test_two_processes(served, tmp_path):
    """One waits, and says so; what is fetched is fetched once; and both have the model in the end."""
    go_on = threading.Event()
    with serving(served, {DATA: [("ends", go_on, 0.5)]}) as (url, log):
        processes = two_at_once(served, tmp_path, url)
        go_on.set()
        results = [process.communicate(timeout=30) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [out for out, _ in results] == [f"{tmp_path / '124M'}\n"] * 2
    assert "another process" not in results[0][1]
    assert sorted(request.path for request in log) == sorted(f"/124M/{name}" for name in FETCHED)
    check_arrived(served, tmp_path)


@posix
def test_the_second_goes_on_where_a_killed_first_stopped(served, tmp_path):
    with serving(served, {DATA: [("ends", "stall", 0.5)]}) as (url, log):
        first, second = two_at_once(served, tmp_path, url)
        first.kill()
        first.communicate()
        second.communicate(timeout=30)
    assert second.returncode == 0
    check_arrived(served, tmp_path)
    _, request = requests_for(DATA, log)
    assert int(request.range[len("bytes=") : -1]) > 300_000


# Disks


def test_too_little_room_is_said_before_anything_is_fetched(served, tmp_path, monkeypatch):
    size, usage = len(original(served, DATA)), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with serving(served) as (url, log), pytest.raises(DownloadError) as error:
        download("124M", tmp_path, base_url=url)
    assert "2 MB" in one_line(error) and "1 MB" in str(error.value) and "--models_dir" in str(error.value)
    assert requests_for(DATA, log) == [] and str(tmp_path) in str(error.value)
    check_sound(served, tmp_path)
    (tmp_path / "124M" / f"{DATA}.part").write_bytes(original(served, DATA)[: size - 900_000])
    (request,) = check_next_run(served, tmp_path)  # there is room for the rest
    assert request.sent == 900_000


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_001, resource.RLIM_INFINITY)); "


@posix
def test_the_disk_fills_up(served, tmp_path):
    with serving(served) as (url, _):
        process = start("download", "124M", "--models_dir", tmp_path, url=url, before=LIMIT)
        _, err = process.communicate(timeout=30)
    last = err.splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in err
    assert last.startswith("picogpt: cannot write") and "too large" in last and "--models_dir" in last
    check_sound(served, tmp_path)
    there = part_size(tmp_path)
    (request,) = check_next_run(served, tmp_path)
    assert there > 1_300_000 and request.range == f"bytes={there}-"


@posix
def test_a_write_that_writes_less_than_it_should(served, tmp_path):
    """A disk that is full for a moment: the system writes what fits, reports no error, and then has room."""
    part = tmp_path / "124M" / f"{DATA}.part"
    lifted = "\n".join(
        (
            LIMIT,
            "import google_crc32c, os; extend = google_crc32c.extend",
            "def lift(crc, data):",
            f"    if os.path.exists({str(part)!r}) and os.path.getsize({str(part)!r}) == 1_500_001:",
            "        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)",
            "        print('there is room again', file=sys.stderr)",
            "    return extend(crc, data)",
            "google_crc32c.extend = lift",
        )
    )
    with serving(served) as (url, _):
        process = start("download", "124M", "--models_dir", tmp_path, url=url, before=lifted)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "there is room again" in err
    check_arrived(served, tmp_path)


def test_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for models in (tmp_path / "file", tmp_path / "file" / "models"):
        with pytest.raises(DownloadError) as error:
            download("124M", models, base_url=f"http://127.0.0.1:{unused_port()}")
        assert str(models) in one_line(error) and "--models_dir" in str(error.value)
    assert (tmp_path / "file").read_bytes() == b""


@posix
def test_a_directory_of_somebody_else(served, tmp_path):
    """It may not be written to by whoever runs this or, if that is root, by nobody."""
    tmp_path.chmod(0o555)
    nobody = "import os, picogpt.download; os.geteuid() or os.seteuid(65534)"
    with serving(served) as (url, log):
        process = start("download", "124M", "--models_dir", tmp_path, url=url, before=nobody)
        _, err = process.communicate(timeout=30)
    tmp_path.chmod(0o755)
    assert process.returncode == 2 and log == [] and list(tmp_path.iterdir()) == []
    assert err.startswith("picogpt: cannot write to") and "denied" in err and len(err.splitlines()) == 1
    assert "--models_dir" in err


# What is seen


@posix
def test_one_bar_over_all_the_files(served, tmp_path):
    """On a terminal: share, bytes of bytes, time, time left, rate."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    master, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    with serving(served, speed=4e6) as (url, _):
        process = start("download", "124M", "--models_dir", tmp_path, url=url, stderr=terminal)
        os.close(terminal)
        shown = b""
        with (
            suppress(OSError),
            os.fdopen(master, "rb", buffering=0) as screen,
        ):  # which is how it ends
            while text := screen.read(1 << 16):
                shown += text
        process.communicate(timeout=30)
    bar = rb"\r124M: +(\d+)%\|[^\r]*\| *[\d.]+[kM]?/([\d.]+)M \[\d+:\d+<\d+:\d+, +[\d.]+.?B/s\]"
    seen = [(int(percent), float(total)) for percent, total in re.findall(bar, shown)]
    size = sum(len(original(served, name)) for name in FETCHED) / 1e6
    assert len(seen) > 2 and sorted(seen) == seen and {total for _, total in seen} == {round(size, 2)}, shown
    assert process.returncode == 0 and b"Traceback" not in shown
