"""`--show probabilities`: the numbers are those of other programs, and the colours only where they are wanted.

The models' tokens are the 256 bytes and <|endoftext|>, so that most tokens are no whole characters.
"""

import ast
import math
import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from models import random_params, transformers_model
from picogpt import show
from picogpt.__main__ import main
from picogpt.checkpoint import load_encoder_hparams_and_params, load_hparams_and_params, save_checkpoint
from picogpt.encoder import END_OF_TEXT, SYMBOL_OF_BYTE, Encoder, get_encoder
from picogpt.model import gpt2
from picogpt.show import PAINTS, coloured_text, number, paint, token

HPARAMS = {"n_vocab": 257, "n_ctx": 48, "n_embd": 24, "n_head": 3, "n_layer": 2}
PROMPT = "é?"
CELL = re.compile(r"(\S{5}) (b?'(?:[^'\\]|\\.)*'|b?\"(?:[^\"\\]|\\.)*\")\s*")
ESCAPE = re.compile(r"\x1b\[([\d;]*)m")
POSIX = pytest.mark.skipif(os.name == "nt", reason="Ctrl-C can be sent to a single process on POSIX only")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A model directory with random weights: every step has another token that is likeliest."""
    directory = tmp_path_factory.mktemp("models") / "random"
    Encoder({symbol: byte for byte, symbol in SYMBOL_OF_BYTE.items()} | {END_OF_TEXT: 256}, []).save(directory)
    save_checkpoint(directory, HPARAMS, random_params(**HPARAMS, dtype=np.float32, seed=1))
    return str(directory)


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    """`main` takes Ctrl-C and the BLAS's threads over: give them back."""
    previous = signal.getsignal(signal.SIGINT)
    for name in "NO_COLOR", "COLORTERM":
        monkeypatch.delenv(name, raising=False)
    with threadpool_limits():
        yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def picogpt(model, capsys):
    def call(*flags, show=True):
        argv = [PROMPT, "--model_size", model, *["--show", "probabilities"][: 2 * show], *flags]
        return main(argv), *capsys.readouterr()

    return call


@pytest.fixture
def terminal(monkeypatch):
    def pretend(term):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("TERM", term)

    return pretend


def read_row(line: str) -> list[tuple[float, int]]:
    """The probabilities and ids of a row; it holds nothing else."""
    assert CELL.sub("", line) == ""
    cells = [(float(p), ast.literal_eval(text)) for p, text in CELL.findall(line)]
    data = [(p, text.encode() if isinstance(text, str) else text) for p, text in cells]
    return [(p, 256 if text == END_OF_TEXT.encode() else text[0]) for p, text in data]


def ids_of(out: str) -> list[int]:
    return [read_row(line)[0][1] for line in out.splitlines()]


def rounding(p: float) -> float:
    """What writing a probability may take off it or add to it."""
    return 0.0005 if p >= 0.0005 else 0.06 * p


def agree(rows, expected) -> None:
    """Each row shows the chosen id, and the largest others in order, with the probabilities expected."""
    for row, p in zip(rows, expected, strict=True):
        for shown, i in row:
            assert abs(shown - p[i]) <= rounding(p[i]) + 1e-5
        others = [i for _, i in row[1:]]
        likeliest = sorted((i for i in range(len(p)) if i != row[0][1] and p[i] > 0), key=lambda i: -p[i])
        assert others == likeliest[:3]


def transformers_logits(model, ids):
    import torch

    _, hparams, params = load_encoder_hparams_and_params(model)
    oracle = transformers_model(params, hparams["n_head"])
    with torch.no_grad():
        return (
            oracle(torch.tensor([[*PROMPT.encode(), *ids]])).logits[0, len(PROMPT.encode()) - 1 : -1].double()
        )


# The numbers


def test_greedy_they_are_the_models_own_as_transformers_computes_them(picogpt, model):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    status, out, err = picogpt("--n_tokens_to_generate=30")
    rows = [*map(read_row, out.splitlines())]
    assert (status, len(rows)) == (0, 30)
    assert err.splitlines()[0].endswith("the probabilities are the model's own") and err.count("\n") == 2
    agree(rows, torch.softmax(transformers_logits(model, ids_of(out)), dim=-1).tolist())
    assert all(row[0][0] >= row[1][0] for row in rows)


@pytest.mark.parametrize("how", [{"temperature": 0.7, "top_k": 9, "top_p": 0.8}, {"top_k": 2}, {"top_p": 0.9}])
def test_drawn_they_are_what_transformers_would_draw_from(picogpt, model, how):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    flags = [f"--{name}={value}" for name, value in how.items()]
    _, out, err = picogpt("--n_tokens_to_generate=30", "--seed=5", *flags)
    settings = ", ".join(f"{name} {value}" for name, value in ({"temperature": 1.0} | how).items())
    assert f"those of the draw, after {settings}\n" in err
    warpers = {
        "temperature": "TemperatureLogitsWarper",
        "top_k": "TopKLogitsWarper",
        "top_p": "TopPLogitsWarper",
    }
    scores = transformers_logits(model, ids_of(out))
    for name, value in how.items():
        scores = getattr(transformers, warpers[name])(value)(None, scores)
    agree([*map(read_row, out.splitlines())], torch.softmax(scores, dim=-1).tolist())


def test_past_the_window_they_are_those_of_the_last_n_ctx_tokens(picogpt, model):
    out = picogpt("--n_tokens_to_generate=60", "--context=slide")[1]
    _, hparams, params = load_encoder_hparams_and_params(model)
    ids, expected = [*PROMPT.encode()], []
    for i in ids_of(out):
        logits = gpt2(ids[-hparams["n_ctx"] :], **params, n_head=hparams["n_head"])[-1].tolist()
        total = math.fsum(math.exp(x - max(logits)) for x in logits)
        expected.append([math.exp(x - max(logits)) / total for x in logits])
        ids.append(i)
    agree([*map(read_row, out.splitlines())], expected)


def test_jax_shows_the_same(picogpt):
    pytest.importorskip("jax")
    flags = "--n_tokens_to_generate=6", "--top_k=5", "--seed=2", "--num_samples=2"
    mine, its = picogpt(*flags)[1], picogpt(*flags, "--backend=jax")[1]
    assert mine.count("\n") == its.count("\n") == 13
    for one, other in zip(mine.splitlines(), its.splitlines(), strict=True):
        if one == other == "---":
            continue
        one, other = read_row(one), read_row(other)
        assert [i for _, i in one] == [i for _, i in other]
        assert np.allclose([p for p, _ in one], [p for p, _ in other], rtol=0, atol=0.00101)


# The rows and the text


@pytest.mark.parametrize(
    "flags",
    [
        ["--n_tokens_to_generate=20"],
        ["--n_tokens_to_generate=20", "--temperature=1", "--seed=3"],
        ["--n_tokens_to_generate=0"],
    ],
)
def test_showing_changes_no_token(picogpt, flags):
    plain, shown = picogpt(*flags, show=False)[1], picogpt(*flags)[1]
    lines = shown.removesuffix("\n").split("\n") if shown != "\n" else []
    assert bytes(read_row(line)[0][1] for line in lines).decode("utf-8", "replace") + "\n" == plain


def test_every_sample_starts_from_the_prompt(picogpt):
    flags = "--n_tokens_to_generate=8", "--temperature=2", "--top_k=40"
    one, two, three = (picogpt(*flags, f"--seed={seed}")[1] for seed in (7, 8, 9))
    assert len({one, two, three}) == 3
    assert picogpt(*flags, "--seed=7", "--num_samples=3")[1] == f"{one}---\n{two}---\n{three}"


def test_a_stop_is_shown_to_its_end(picogpt):
    flags = "--temperature=1", "--top_k=60", "--seed=1", "--n_tokens_to_generate=20"
    ids = ids_of(picogpt(*flags)[1])
    at = next(n for n in range(2, 19) if ids[n] < 128 and ids[n + 1] < 128 and ids.index(ids[n]) == n)
    stop = bytes(ids[at : at + 2]).decode()
    assert ids_of(picogpt(*flags, "--stop", stop)[1]) == ids[: at + 2]


def test_others_that_cannot_come_are_left_out(picogpt):
    rows = picogpt("--n_tokens_to_generate=9", "--top_k=1")[1].splitlines()
    assert len(rows) == 9 and all(CELL.fullmatch(row)[1] == "1.000" for row in rows)


def test_what_cannot_be_continued_is_said_in_one_line(picogpt):
    status, out, err = picogpt("--n_tokens_to_generate=99")
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_a_long_token_moves_the_others_to_the_right():
    encoder, p = get_encoder(), np.zeros(50257)
    long, the = encoder.encode(" disproportionately")[0], encoder.encode(" the")[0]
    p[long], p[the] = 0.75, 0.25
    assert show.row(long, p, encoder, 0) == "0.750 ' disproportionately' 0.250 ' the'"
    assert show.row(the, p, encoder, 0) == "0.250 ' the'        0.750 ' disproportionately'"


@pytest.mark.parametrize(
    "p, shown",
    [
        (1.0, "1.000"),
        (0.99996, "1.000"),
        (0.0005, "0.001"),
        (0.00049, "5e-04"),
        (3e-12, "3e-12"),
        (0.5, "0.500"),
    ],
)
def test_a_probability_takes_five_characters(p, shown):
    assert number(p) == shown


@pytest.mark.parametrize(
    "data, shown",
    [
        (b" the", "' the'"),
        ("😀".encode(), "'😀'"),
        ("😀".encode()[:2], r"b'\xf0\x9f'"),
        (b"\n", r"'\n'"),
        (b"\x1b[2J", r"'\x1b[2J'"),
        (b"'s", '"\'s"'),
    ],
)
def test_a_token_is_written_so_that_it_is_seen(data, shown):
    assert token(0, SimpleNamespace(n_vocab=1, decode_bytes=lambda ids: data)) == shown


# Colours


def test_a_pipe_gets_none_and_no_terminal_that_wants_none(picogpt, terminal, monkeypatch):
    flags = "--n_tokens_to_generate=12", "--top_k=5", "--seed=1"
    monkeypatch.setenv("TERM", "xterm-256color")
    piped = picogpt(*flags)[1]
    assert piped.count("\n") == 12 and "\x1b" not in piped
    terminal("dumb")
    assert picogpt(*flags)[1] == piped
    terminal("xterm-256color")
    assert picogpt(*flags)[1] != piped
    terminal("xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    assert picogpt(*flags)[1] == piped


@pytest.mark.parametrize("term, colours", [("xterm-256color", 256), ("xterm", 16), ("linux", 16)])
def test_a_terminal_gets_the_same_rows_in_colour_then_the_text(picogpt, terminal, term, colours):
    colours = 256 if os.name == "nt" else colours  # a Windows console has them, whatever TERM says
    flags = "--n_tokens_to_generate=25", "--temperature=0.7", "--seed=4"
    piped, text = picogpt(*flags)[1], picogpt(*flags, show=False)[1]
    terminal(term)
    out = picogpt(*flags)[1]
    rows, out = out.split("\n\n", 1)
    coloured, legend = out.rsplit("\n\n", 1)
    assert ESCAPE.sub("", rows) + "\n" == piped
    assert ESCAPE.sub("", coloured) + "\n" == text
    assert ESCAPE.sub("", legend) == " 0 to 0.1   0.1 to 0.3   0.3 to 0.7   0.7 to 1 \n"
    assert ESCAPE.findall(legend)[::2] == list(PAINTS[colours])
    steps = set()
    for row in rows.splitlines():
        code, cell = re.match(r"\x1b\[([\d;]+)m([^\x1b]+)\x1b\[0m", row).groups()
        p = float(cell.split()[0])
        assert "\x1b" not in row.split("\x1b[0m")[1]
        assert code == PAINTS[colours][0 if p < 0.1 else 1 if p < 0.3 else 2 if p < 0.7 else 3]
        steps.add(code)
    assert len(steps) > 2
    assert set(ESCAPE.findall(coloured)) - {"0"} <= steps


def test_the_text_ends_where_it_was_stopped_and_a_character_has_the_colour_of_its_last_token():
    encoder = get_encoder()
    chosen = [*zip(encoder.encode(" dog is 😀 here"), (0.9, 0.2, 0.9, 0.01, 0.5), strict=True)]
    zero, one, *_, three = PAINTS[16]
    beginning = f"\x1b[{three}m dog\x1b[0m"
    assert coloured_text(chosen, " dog i", encoder, 16) == f"{beginning}\x1b[{one}m i\x1b[0m"
    emoji = f"\x1b[{one}m is\x1b[0m\x1b[{three}m \x1b[0m\x1b[{zero}m😀\x1b[0m"
    assert coloured_text(chosen[:4], " dog is 😀", encoder, 16) == beginning + emoji
    assert coloured_text(chosen[2:3], " \ufffd", encoder, 16).endswith("\ufffd")  # its last token never came


def test_no_colour_reaches_over_the_end_of_a_line():
    code = PAINTS[256][3]
    assert paint("a\n\nb", 1.0, 256) == f"\x1b[{code}ma\x1b[0m\n\n\x1b[{code}mb\x1b[0m"
    assert paint("a\n", 1.0, 0) == "a\n"


def test_the_colours_can_be_read_and_told_apart_by_brightness():
    """Contrast as WCAG 2.1 defines it, on xterm's palette of 256."""

    def luminance(n):
        rgb = {231: (255, 255, 255), 16: (0, 0, 0)}.get(n)
        levels = 0, 95, 135, 175, 215, 255
        rgb = rgb or [levels[(n - 16) // 36], levels[(n - 16) // 6 % 6], levels[(n - 16) % 6]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    backgrounds = []
    for code in PAINTS[256]:
        front, back = (luminance(int(n)) for n in re.fullmatch(r"38;5;(\d+);48;5;(\d+)", code).groups())
        assert (max(front, back) + 0.05) / (min(front, back) + 0.05) >= 4.5
        backgrounds.append(back)
    assert all(later > 1.8 * earlier for earlier, later in pairwise(backgrounds))


# The process


def start(model):
    command = [sys.executable, "-m", "picogpt", "a", "--model_size", model, "--show=probabilities"]
    command += ["--n_tokens_to_generate=1000000", "--context=slide"]
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], bufsize=0, **pipes)


def test_a_reader_who_has_enough_is_no_error(model):
    running = start(model)
    assert 0 < len(running.stdout.read(8192)) < 2000  # as it comes, not when a buffer is full
    running.stdout.close()
    err = running.stderr.read().decode()
    assert running.wait() == 0
    assert err.count("\n") == 2 and "Traceback" not in err


@POSIX
def test_ctrl_c_ends_with_a_whole_row_and_the_summary(model):
    running = start(model)
    begun = running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate()
    assert running.returncode == 130
    rows = (begun + out).decode().splitlines()
    counted = int(re.search(rb": (\d+) tokens?, ", err)[1])
    assert counted - len(rows) in (0, 1) and all(map(read_row, rows))
    assert err.count(b"\n") == 2 and (begun + out).endswith(b"\n")


def test_of_equal_scores_the_smaller_id_comes_first():
    assert show.likeliest(np.array([1.0, 3.0, 2.0, 3.0, 2.0, 2.0]), 4) == [1, 3, 2, 4]
    assert show.likeliest(np.tile([1.0, 3.0, 2.0], 40), 60) == [*range(1, 120, 3), *range(2, 62, 3)]
    assert show.likeliest(np.array([1.0, 3.0]), 5) == [1, 0]


def test_ids_past_the_vocabulary_are_shown_as_numbers(model, capsys, tmp_path):
    """Tables of embeddings are padded to round lengths."""
    hparams, params = load_hparams_and_params(Path(model))
    wte = np.concatenate([params["wte"], 9 * params["wte"][-2:-1]])  # as likely as any that has a name
    save_checkpoint(tmp_path / "padded", {**hparams, "n_vocab": 258}, {**params, "wte": wte})
    get_encoder(model).save(tmp_path / "padded")
    flags = ["--n_tokens_to_generate", "4", "--seed", "1", "--temperature", "9", "--show", "probabilities"]
    assert main([PROMPT, "--model_size", str(tmp_path / "padded"), *flags]) == 0
    assert " #257" in capsys.readouterr().out
