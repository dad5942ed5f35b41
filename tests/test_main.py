"""The command line, as a careless user meets it. The model is made by hand, so that its text is known."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import fire
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from models import random_params, tree_map
from picogpt import __version__
from picogpt.__main__ import FLAGS, HELP, main, quote, run
from picogpt.checkpoint import load_encoder_hparams_and_params, save_checkpoint
from picogpt.encoder import END_OF_TEXT, SYMBOL_OF_BYTE, Encoder
from picogpt.machine import THREADS
from picogpt.model_dirs import EMBEDDED

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
ENDLESS = ("--n_tokens_to_generate", "1000000", "--context", "slide")
POSIX = pytest.mark.skipif(os.name == "nt", reason="signals, descriptors and /dev are POSIX's")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A model directory. Its tokens are the bytes, each with one successor: a b c ... z a; 0 1 2 ... 9 and then
    <|endoftext|>; ! 😀 ! by turns; a after <|endoftext|> and after any other byte."""
    directory = tmp_path_factory.mktemp("models") / "alphabet"
    Encoder({symbol: byte for byte, symbol in SYMBOL_OF_BYTE.items()} | {END_OF_TEXT: 256}, []).save(directory)
    hparams = {"n_vocab": 257, "n_ctx": 64, "n_embd": 64, "n_head": 2, "n_layer": 1}
    # Blocks of zeros add nothing: a token's vector passes through, and the head finds the successor's in it.
    params = tree_map(np.zeros_like, random_params(**hparams, dtype=np.float32, lm_head=True))
    params["ln_f"]["g"] += 1
    vectors = np.random.default_rng(0).normal(size=(257, 64))
    params["wte"][:] = vectors[ord(" ")]
    params["lm_head"][ord("a")] = vectors[ord(" ")]
    for chain in (ALPHABET.encode() + b"a", "!😀!".encode(), [*b"0123456789", 256], [256, ord("a")]):
        for token, successor in pairwise(chain):
            params["wte"][token] = vectors[token]
            params["lm_head"][successor] += vectors[token]
    save_checkpoint(directory, hparams, params)
    return str(directory)


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    """`main` takes the process over: give it back. Standard input is a terminal, or what a test makes it."""
    previous = signal.getsignal(signal.SIGINT)
    for name in list(os.environ):
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # it would hide that text waits to be flushed
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with threadpool_limits():  # --threads is for the whole process, which here is that of all tests
        yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def picogpt(model, capsys):
    """Run the command line in this process. Returns status, standard output, standard error."""

    def call(*argv, use_model=True):
        status = main(["--model_size", model, *argv] if use_model else argv)
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def process(model):
    """Start it as a process of its own."""

    def start(*argv, python=(), **options):
        command = [sys.executable, *python, "-m", "picogpt", "--model_size", model, *argv]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(command, cwd=Path(__file__).parents[1], bufsize=0, **pipes | options)

    return start


def standard_input(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="ascii")


# What reaches the program


def as_fire_reads(argv) -> dict:
    seen: dict = {}
    fire.Fire(lambda **flags: seen.update(flags), quote(argv), name="picogpt")
    return seen


LOOKALIKES = [
    "42",
    "1e3",
    "-1",
    "None",
    "True",
    "[1, 2]",
    "{'a': 1}",
    "1,2",
    "-",
    "-x",
    "---",
    "--help me",
    "a=b",
]
STRANGE = ["--a b=c", "--é", "😀", '"quoted"', "it's", '"""', "a # b", "\\n", "a\nb", "\0", " ", "", "\udcff"]


@pytest.mark.parametrize("prompt", LOOKALIKES + STRANGE)
def test_a_prompt_is_text_whatever_it_looks_like(prompt):
    assert as_fire_reads([prompt]) == {"prompt": prompt}


@given(st.text(st.characters(exclude_categories=())))
@example("--help")
@example("--")
@example("--seed=1")
@settings(deadline=None, max_examples=200)
def test_any_text_is_a_prompt_or_a_value(text):
    assert as_fire_reads(["--", text]) == {"prompt": text}
    argv = [f"--stop={text}", "--seed=1", f"--stop={text}x", f"--model_size={text}"]
    assert as_fire_reads(argv) == {"stop": [text, f"{text}x"], "seed": 1, "model_size": text}


def test_numbers_are_numbers_and_flags_may_have_hyphens_or_an_equals_sign():
    argv = ["--temperature", "0.8", "--top-k=40", "--seed", "-5", "--stop", "---", "1"]
    assert as_fire_reads(argv) == {"temperature": 0.8, "top_k": 40, "seed": -5, "stop": ["---"], "prompt": "1"}


# What comes out


def test_only_the_continuation_is_on_standard_output_and_a_summary_on_standard_error(picogpt, model):
    status, out, err = picogpt("xyz", "--n_tokens_to_generate", "5")
    assert (status, out) == (0, "abcde\n")
    speed = r"5 tokens, the first after \d+\.\d\d s, then \d+\.\d tokens per second"
    blas = r"\w+ .+, \d+ threads?|a BLAS that threadpoolctl does not know"
    assert re.fullmatch(rf"picogpt: {re.escape(model)}: {speed}, ({blas})\n", err)


@pytest.mark.parametrize(
    "n, expected, counted", [("0", "\n", "0 tokens, "), ("1", "b\n", "1 token, the first")]
)
def test_so_few_tokens_have_no_rate(picogpt, n, expected, counted):
    status, out, err = picogpt("a", "--n_tokens_to_generate", n)
    assert (status, out) == (0, expected)
    assert counted in err and "per second" not in err


def test_end_of_text_ends_the_text(picogpt):
    assert picogpt("1e3")[:2] == (0, "456789\n")


def test_stop_strings_may_be_several_and_are_not_printed(picogpt):
    assert picogpt("a", "--stop", "xyz", "--stop=gh")[:2] == (0, "bcdef\n")
    assert picogpt("1", "--stop", "3")[:2] == (0, "2\n")


def test_an_empty_prompt_and_none_start_from_end_of_text(picogpt, monkeypatch):
    assert picogpt("", "--n_tokens_to_generate=3")[:2] == (0, "abc\n")
    assert picogpt("--n_tokens_to_generate=3")[:2] == (0, "abc\n")
    monkeypatch.setattr(sys, "stdin", None)
    assert picogpt("--n_tokens_to_generate=3")[:2] == (0, "abc\n")


def test_end_of_text_in_the_prompt_is_text_and_said_so_once(picogpt):
    status, out, err = picogpt(f"{END_OF_TEXT}{END_OF_TEXT}", "--n_tokens_to_generate=3")
    assert (status, out) == (0, "abc\n")  # after > as after <|endoftext|>; the encoder's tests tell them apart
    assert err.count("ordinary text") == 1
    assert "ordinary text" not in picogpt("<|end", "--n_tokens_to_generate=3")[2]


@pytest.mark.parametrize("data", [b"xy", b"xy\n", b"xy\r\n", b"\xef\xbb\xbfxy\n", "é😀xy\n".encode()])
def test_a_pipe_is_the_prompt(picogpt, monkeypatch, data):
    for argv in ["-"], []:
        monkeypatch.setattr(sys, "stdin", standard_input(data))
        assert picogpt(*argv, "--n_tokens_to_generate=3")[:2] == (0, "zab\n")


def test_only_one_newline_is_dropped_and_a_given_prompt_comes_before_a_pipe(picogpt, monkeypatch):
    seen = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *args: seen.append(args[1]) or encode(*args))
    monkeypatch.setattr(sys, "stdin", standard_input(b"\xef\xbb\xbf x\r\n\n\n"))
    assert picogpt("-")[0] == picogpt("y")[0] == 0
    assert seen == [" x\r\n\n", "y"]


def test_samples_are_separated_and_the_i_th_is_that_of_seed_plus_i(picogpt):
    flags = "--temperature=500", "--n_tokens_to_generate=8", "--stop=-"
    one, two, three = (picogpt("a", *flags, f"--seed={seed}")[1] for seed in (7, 8, 9))
    assert len({one, two, three}) == 3
    status, out, err = picogpt("a", *flags, "--seed=7", "--num_samples=3")
    assert (status, out) == (0, f"{one}---\n{two}---\n{three}")
    assert "greedy" not in err


def test_samples_that_must_be_equal_are_remarked_upon(picogpt):
    for flags in (), ("--temperature=0", "--top_k=5"):
        status, out, err = picogpt("7", "--num_samples=2", *flags)
        assert (status, out) == (0, "89\n---\n89\n")
        assert err.count("greedy samples are all the same") == 1
    assert "greedy" not in picogpt("7", "--num_samples=2", "--top_k=5")[2] + picogpt("7")[2]


def test_without_a_model_size_the_embedded_model_answers_and_says_how_to_get_another(
    picogpt, monkeypatch, model
):
    def load(model_size, models_dir):
        assert model_size == EMBEDDED
        return load_encoder_hparams_and_params(model, models_dir)

    monkeypatch.setattr("picogpt.checkpoint.load_encoder_hparams_and_params", load)
    status, out, err = picogpt("7", use_model=False)
    assert (status, out) == (0, "89\n")
    assert f"{EMBEDDED} (the embedded model" in err and "--model_size 124M" in err and err.count("\n") == 1


def test_help_is_plain_text_with_every_flag_and_its_default(picogpt):
    for argv in ["--help"], ["-h"], ["x", "--seed", "1", "--help"]:
        assert picogpt(*argv, use_model=False) == (0, HELP, "")
    shown = dict(re.findall(r"^ {4}--(\w+) +(\S+)", HELP, re.MULTILINE))
    assert shown.keys() == set(FLAGS) - {"prompt"}
    for name, default in run.__kwdefaults__.items():
        assert default in (None, ()) or shown[name] == str(default)


# What goes wrong


@pytest.mark.parametrize(
    "argv, parts",
    [
        ("one two three", ["3 arguments", "'one'", "quotes"]),
        ("x -- --seed", ["2 arguments", "'--seed'", "quotes"]),
        ("x --prompt y", ["2 arguments", "quotes"]),
        ("x --tempr 1", ["--tempr", "--temperature", "--help"]),
        ("x --tokens=1", ["--tokens", "--n_tokens_to_generate"]),
        ("x --zzz", ["--zzz", "--help lists them all"]),
        ("x --temperature", ["--temperature has no value"]),
        ("x --temperature --seed 1", ["--temperature has no value", "--temperature=--seed"]),
        ("x --stop -- x", ["--stop has no value"]),
        ("x --seed 1 --seed 2", ["--seed is given 2 times (1, 2)"]),
        ("x --stop=", ["--stop is empty"]),
        ("x --temperature abc", ["temperature is 'abc'"]),
        ("x --temperature 0,8", ["temperature is (0, 8)"]),
        ("x --top_k 2.5", ["top_k is 2.5", "whole number"]),
        ("x --top_p 2", ["top_p is 2"]),
        ("x --n_tokens_to_generate -1", ["n_tokens_to_generate is -1"]),
        ("x --n_tokens_to_generate 1e1", ["n_tokens_to_generate is 10.0", "whole number"]),
        ("x --n_tokens_to_generate 99", ["99", "36 more", "64 positions"]),
        ("x --num_samples 0", ["num_samples is 0"]),
        ("x --seed x", ["seed is 'x'"]),
        ("x --seed -5", ["seed is -5"]),
        ("x --threads 0", ["threads is 0", "whole number"]),
        ("x --threads 1.0", ["threads is 1.0"]),
        ("x --threads True", ["threads is True"]),
        ("x --context wide", ["context is 'wide'", "slide"]),
        ("x --show", ["--show has no value"]),
        ("x --show=", ["show is ''", "probabilities"]),
        ("x --show logits", ["show is 'logits'", "probabilities"]),
        ("x --backend torch", ["backend is 'torch'", "numpy", "jax"]),
        ("\udcff", ["\\udcff", "surrogate"]),
    ],
)
def test_each_mistake_is_one_line_and_status_2(picogpt, argv, parts):
    status, out, err = picogpt(*argv.split())
    assert (status, out) == (2, "")
    assert err.startswith("picogpt: ") and err.endswith("\n") and err.count("\n") == 1
    for part in parts:
        assert part in err


def test_a_mistake_with_a_newline_in_it_is_one_line_too(picogpt):
    assert (
        picogpt("--seed", "a\nb", "--seed=c")[2] == "picogpt: --seed is given 2 times (a b, c): give it once\n"
    )


@pytest.mark.parametrize("name, part", [("no\nsuch", "no\\nsuch"), ("", "no model ''")])
def test_a_missing_model_is_one_line(picogpt, name, part):
    status, out, err = picogpt("x", f"--model_size={name}", "--models_dir", "nowhere", use_model=False)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert part in err.replace("\\", "/") or part in err


def test_damaged_weights_are_said(picogpt, model, tmp_path):
    shutil.copytree(model, tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.ckpt.data-00000-of-00001"
    weights = np.fromfile(path, np.float32)
    weights[weights == 0] = 1e30
    weights.tofile(path)
    status, out, err = picogpt("7", f"--model_size={tmp_path / 'damaged'}", use_model=False)
    assert (status, out.strip()) == (2, "")
    assert "weights damaged? `python -m picogpt.verify" in err and "Warning" not in err


@pytest.mark.parametrize(
    "words, said",
    [
        (["Hi", "-n", "10"], "there is no flag -n"),
        (["download", "124M"], "python -m picogpt.download 124M"),
        (["one", "two"], "put one pair of quotes"),
    ],
)
def test_what_people_try_first(picogpt, words, said):
    status, out, err = picogpt(*words)
    assert (status, out) == (2, "") and said in err


def test_version(picogpt):
    assert picogpt("--version", use_model=False) == (0, f"picogpt {__version__}\n", "")
    assert "there is no flag --version" in picogpt("--version", "--seed=1", use_model=False)[2]


def test_too_little_memory_is_said_beforehand(picogpt, monkeypatch):
    monkeypatch.setattr("picogpt.__main__.memory", lambda: (8 << 30, 200 << 20))
    assert "memory" not in picogpt("7")[2]  # a few kilobytes fit
    monkeypatch.setattr("picogpt.__main__.BESIDE_WEIGHTS_AND_CACHE", 4 << 30)
    status, out, err = picogpt("7")
    assert (status, out) == (0, "89\n")
    assert "needs 4.3 GB of memory, but 0.2 of this machine's 8.6 GB are free" in err


def test_bytes_that_are_no_text_and_a_closed_input_are_one_line(picogpt, monkeypatch):
    monkeypatch.setattr(sys, "stdin", standard_input(b"ab\xff"))
    assert picogpt("-") == (
        2,
        "",
        "picogpt: standard input is not UTF-8 (0xff is byte 2): convert it, with iconv say\n",
    )
    monkeypatch.setattr(sys, "stdin", None)
    assert picogpt("-")[2] == "picogpt: standard input is closed: give the text as an argument\n"


@pytest.mark.parametrize(
    "error, expected",
    [
        (
            MemoryError("Unable to allocate 9 GiB"),
            "out of memory (Unable to allocate 9 GiB): take a smaller model",
        ),
        (PermissionError(13, "Permission denied", "weights"), "weights: Permission denied"),
        (OSError("strange"), "strange"),
    ],
)
def test_what_the_machine_refuses_is_one_line(picogpt, monkeypatch, error, expected):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("picogpt.generation.streams", refuse)
    status, out, err = picogpt("x")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert expected in err


def test_the_jax_backend_writes_the_same_text(picogpt):
    pytest.importorskip("jax")
    status, out, err = picogpt("xy", "--backend", "jax", "--n_tokens_to_generate=5")
    assert (status, out) == (0, "zabcd\n")
    assert "JAX on " in err


def test_a_module_that_is_not_installed_is_one_line(picogpt, monkeypatch):
    monkeypatch.setitem(sys.modules, "fire", None)
    assert picogpt("x") == (
        2,
        "",
        "picogpt: the Python module fire is not installed: `pip install .` in the checkout brings them all\n",
    )


def test_without_jax_the_error_says_what_to_install(picogpt, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    status, out, err = picogpt("x", "--backend=jax")
    assert (status, out) == (2, "")
    assert err == "picogpt: --backend jax needs JAX: pip install jax\n"


# The process and its edges


def test_text_is_utf8_whatever_the_locale_and_comes_before_what_is_slow_to_import(process, monkeypatch):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    options = {"env": os.environ | locale, "stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    flags = "--n_tokens_to_generate=10", "--threads=1"
    running = process(os.fsdecode("é😀!".encode()), *flags, python=["-X", "importtime"], **options)
    out = running.communicate()[0].replace(b"\r\n", b"\n")  # Windows, on standard error
    before, text, after = out.partition("😀!😀!".encode())
    assert running.returncode == 0 and text
    assert b" numpy\n" in before
    for heavy in b"jax", b"tensorflow", b"requests", b"tqdm", b"psutil":
        assert not re.search(rb"\| +" + heavy, before)
    assert b"10 tokens" in after and (b", 1 thread\n" in after or b"a BLAS" in after)


def test_threads_are_set_before_numpy_is_there_and_help_needs_nothing(picogpt):
    picogpt("x", "--threads=3", "--n_tokens_to_generate=1")
    assert os.environ["OPENBLAS_NUM_THREADS"] == os.environ["NPROC"] == "3"
    code = "import sys, picogpt.__main__ as m; m.main(['--help']); sys.exit('numpy' in sys.modules)"
    cwd = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=cwd, stdout=subprocess.DEVNULL).returncode == 0


def test_a_reader_who_has_enough_is_no_error(process):
    running = process("a", *ENDLESS)
    assert 0 < len(running.stdout.read(8192)) < 1000  # as it comes: Python's buffer would make it 8192 at once
    running.stdout.close()
    err = running.stderr.read().decode()
    assert running.wait() == 0
    assert err.count("\n") == 1 and "tokens per second" in err


@POSIX
def test_ctrl_c_ends_the_text_with_a_summary_however_often_it_is_pressed(process):
    running = process("a", *ENDLESS)
    start = running.stdout.read(1)
    for _ in range(3):
        running.send_signal(signal.SIGINT)
    out, err = running.communicate()
    assert running.returncode == 130
    text = start + out
    assert text == (ALPHABET * len(text)).encode()[1 : len(text)] + b"\n"
    assert err.count(b"\n") == 1
    counted = int(re.search(rb": (\d+) tokens?, ", err)[1])
    assert counted - (len(text) - 1) in (0, 1)  # one that was not yet written


@POSIX
def test_ctrl_c_before_the_text_is_silent(process):
    running = process("-")
    os.write(
        running.stdin.fileno(), b"x" * 200_000
    )  # more than a pipe holds: it returns when the program reads
    running.send_signal(signal.SIGINT)
    assert running.communicate() == (b"", b"")
    assert running.returncode == 130


@POSIX
@pytest.mark.parametrize(
    "redirection, status, out, err",
    [
        ("<&-", 0, "ab\n", "picogpt: .*: 2 tokens, .*\n"),
        ("2>&-", 0, "ab\n", ""),
        (">&-", 2, "", "picogpt: standard output is closed: .*\n"),
        (
            "> /dev/full",
            2,
            "",
            "picogpt: .*\npicogpt: cannot write to standard output: No space left on device\n",
        ),
    ],
)
def test_closed_and_full_files(model, redirection, status, out, err):
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("/dev/full is Linux's")
    command = f'exec "$0" -m picogpt --model_size "$1" --n_tokens_to_generate 2 < /dev/null {redirection}'
    cwd = Path(__file__).parents[1]
    done = subprocess.run(["sh", "-c", command, sys.executable, model], cwd=cwd, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, out)
    assert re.fullmatch(err, done.stderr)
