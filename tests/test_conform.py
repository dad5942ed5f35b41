"""picogpt/conform.py: a right program passes, a mistake is found where it is, and bad manners end in one line.

The program is port.py, which shares nothing with the package and makes one mistake on request.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from models import random_params, transformers_model, transformers_names
from picogpt import compare, conform, formula, get_encoder, load_encoder_hparams_and_params, trace
from picogpt.sampling import draw, greedy, probabilities

PORT = str(Path(__file__).with_name("port.py"))
PAGE = Path(__file__).parents[1] / "docs" / "conform.md"
ONLY_POSIX = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
GPT2 = {"n_vocab": 50257, "n_ctx": 8, "n_embd": 2, "n_head": 1, "n_layer": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("formula")
    formula.write_model(directory)
    return str(directory)


@pytest.fixture(scope="module")
def gpt2_vocabulary(tmp_path_factory):
    """A model with all of GPT-2's tokens, and next to nothing else."""
    safetensors = pytest.importorskip("safetensors.numpy")
    directory = tmp_path_factory.mktemp("gpt2")
    named = transformers_names(random_params(**GPT2, dtype=np.float32))
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in named.items()}
    safetensors.save_file(tensors, directory / "model.safetensors")
    config = {"vocab_size": 50257, "n_positions": 8, **GPT2}
    (directory / "config.json").write_text(json.dumps(config))
    get_encoder().save(directory)
    (directory / "encoder.json").rename(directory / "vocab.json")
    (directory / "vocab.bpe").rename(directory / "merges.txt")
    return str(directory)


@pytest.fixture(scope="module")
def reference():
    """What is right stays right: one for all the tests, because it remembers what it has computed."""
    return conform.Reference(formula.formula_encoder(), *formula.formula_params())


@pytest.fixture
def check(model, reference, monkeypatch, capfd):
    """Run the command on port.py with a fault; returns the exit status, and what was said."""
    monkeypatch.setattr(conform, "Reference", lambda *_: reference)

    def run(fault="", levels="1,2,3,4,5,6", *options):
        arguments = ["--levels", levels, *options, "--", sys.executable, PORT, model, fault]
        status = conform.main(arguments)
        return status, *capfd.readouterr()

    return run


def verdicts(out):
    return dict(re.findall(r"^(\d) .*?(passed|FAILED|not answered)", out, re.MULTILINE))


def test_a_right_program_passes_every_level(check):
    status, out, err = check()
    assert verdicts(out) == dict.fromkeys("123456", "passed") and err == ""
    assert status == 0 and out.endswith("All that was answered is right.\n")


FAULTS = {
    "capital_contractions": 1,
    "greedy_blanks": 1,
    "special_tokens": 1,
    "leftmost_merge": 1,
    "decode_symbols": 1,
    "variance_n_minus_1": 2,
    "eps_1e-6": 2,
    "erf_gelu": 2,
    "mask_off_by_one": 2,
    "no_scale": 2,
    "positions_from_1": 2,
    "log_probabilities": 2,
    "four_digits": 2,
    "four_decimals": 2,
    "gelu_starts_at_1": 2,
    "another_model": 2,
    "rows_shifted": 3,
    "cache_kept": 4,
    "cache_position_0": 4,
    "position_late": 4,
    "row_before_last": 5,
    "fed_late": 5,
    "last_of_ties": 6,
    "temperature_upside_down": 6,
    "top_k_cuts_ties": 6,
    "top_p_of_openai": 6,
    "not_normalized": 6,
    "by_probability": 6,
    "border": 6,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_caught_at_the_level_where_it_belongs(fault, check, monkeypatch):
    monkeypatch.setattr(conform, "explain", lambda *_: ())  # takes a while, and has a test of its own
    level = FAULTS[fault]
    before = {str(level - 1): "passed"} if level > 2 else {}
    status, out, _ = check(fault, ",".join([*before, str(level)]))
    assert verdicts(out) == before | {str(level): "FAILED"}
    assert status == 1 and f"Level {level} is the first that differs: begin there.\n" in out
    assert fault == "another_model" or f"    see docs/conform.md, level {level}\n" in out
    # The report names the request and both numbers.
    assert re.search(r"^    `[a-z_]+ \d+ .*`?$", out, re.MULTILINE)
    assert fault == "another_model" or re.search(r"expected .*\d.*\n    found .*\d", out)
    assert ("this is OpenAI's rule" in out) == (fault == "top_p_of_openai")
    assert ("does start empty the cache?" in out) == (fault == "cache_kept")
    assert re.findall(r"your numbers have (.*): print %.9g", out) == (
        [fault.replace("_", " ").replace("four", "4")] if fault.startswith("four") else []
    )


def test_a_report_can_be_read(check, monkeypatch):
    monkeypatch.setattr(conform, "explain", lambda *_: ())
    _, out, _ = check("erf_gelu", "2")
    line = re.search(
        r"after position 0 \(id 0\), the logit of id \d+: expected (.*), found (.*), ([\d.]+) times", out
    )
    expected, found, times = map(float, line.groups())
    assert 1e-4 < abs(expected - found) < 1e-2 and times > 50
    assert "these are the logits after position 1\n" in check("rows_shifted", "3")[1]
    assert "log-probabilities" in check("log_probabilities", "2")[1]
    assert "at position 1\n" in check("cache_position_0", "4")[1]


@pytest.mark.parametrize(
    ("fault", "level", "said"),
    [
        ("erf_gelu", 2, "hook_post is erf GELU"),
        ("eps_1e-6", 3, "ln1.hook_scale has eps 1e-6"),
        ("erf_gelu_1", 2, "your blocks.1.mlp.hook_post is erf GELU, in layer 1 only"),
        ("cache_position_0", 4, "hook_pos_embed has position 0 for every token after the prompt"),
        ("rows_shifted", 3, ""),
        ("log_probabilities", 2, ""),
    ],
)
def test_a_mistake_that_is_known_is_named_and_no_other(fault, level, said, check):
    _, out, _ = check(fault, str(level))
    assert ("likely: your" in out) == bool(said) and said in out


def test_a_vocabulary_of_gpt2s(gpt2_vocabulary, capfd):
    options = ["--model_size", gpt2_vocabulary, "--levels", "1", "--", sys.executable, PORT, gpt2_vocabulary]
    # The 255 merges of the formula model cannot show this one.
    assert conform.main([*options, "ascii_letters"]) == 1
    assert "the text 'caf" in capfd.readouterr().out
    reference = conform.Reference(*load_encoder_hparams_and_params(gpt2_vocabulary))
    cases = [*conform.LEVELS[1][1](reference)]
    assert sum(case.word == "decode" for case in cases) > 50257  # all but those that are parts of characters:
    assert sum(case.word == "encode" for case in cases) > 49000
    with conform.Program([sys.executable, PORT, gpt2_vocabulary], 60) as program:
        some = [*cases[:40], *cases[40::397]]  # all take half a minute
        result = conform.run_level(program, iter(some), set())
        assert (result.n_answers, result.error) == (len(some), None)


def test_a_program_need_not_know_every_word(check):
    status, out, _ = check("unknown:encode,start,sample", "1,3,4,6")
    assert status == 0 and verdicts(out) == {
        "1": "passed",
        "3": "passed",
        "4": "not answered",
        "6": "not answered",
    }
    assert "514 answers; not answered: encode\n" in out
    status, out, err = check("unknown", "1,2")
    assert status == 2 and verdicts(out) == dict.fromkeys("12", "not answered")
    assert "every request was answered by ?" in err
    status, out, _ = check("unknown_late", "1")
    assert status == 1 and "found    ?" in out


@pytest.mark.parametrize(
    ("fault", "said"),
    {
        "dies": "ended with exit status 1 when it was asked `encode 72 84",
        "hangs": "116 1...` within 1 s: did it flush standard output?",
        "no_end": "within 1 s",
        "not_utf8": r"was answered '\\xff\\xfe', not by a line of whole numbers",
        "chatter": "was answered 'loading the model, please wait', not by a line of whole numbers",
        "floats_for_ids": "was answered '1.5 2.5', not by a line of whole numbers",
        "extra_line": "more than one line for an answer",
    }.items(),
)
def test_a_program_that_breaks_the_protocol(fault, said, check, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    status, out, err = check(fault, "1", "--timeout", "1")
    assert status == 1 and re.match(r"1 tokenizer        FAILED  [23] answers\n    ", out)
    assert said in out.splitlines()[1]
    assert err == ("port.py: out of luck\n" if fault == "dies" else "")  # its own last words are shown
    status, out, err = check("no_flush", "1", "--timeout", "1")
    assert status == 2 and "no answer to `encode 0` within 1 s: did it flush standard output?" in err


def test_a_program_that_breaks_off_is_started_again(check, monkeypatch):
    monkeypatch.setattr(conform, "explain", lambda *_: ())
    status, out, _ = check("dies_at_encode", "1,2,6")
    assert status == 1 and verdicts(out) == {"1": "FAILED", "2": "passed", "6": "passed"}
    status, out, _ = check("dies", "1,2,6")
    assert status == 1 and verdicts(out) == dict.fromkeys("126", "FAILED")
    assert out.count("ended with exit status 1") == 1 and out.count("\n    as level 1\n") == 2
    begin = time.monotonic()
    status, out, _ = check("hangs", "1,2,3,4,5,6", "--timeout", "1")
    assert status == 1 and [*verdicts(out)] == ["1", "2"] and time.monotonic() - begin < 30
    assert "It has hung twice: no more is asked.\n" in out


def test_a_program_that_breaks_off_while_its_mistake_is_looked_for(check):
    status, out, _ = check("erf_gelu+dies_at_all_logits", "2,6")
    assert status == 1 and verdicts(out) == {"2": "FAILED", "6": "passed"}
    assert "exit status 1 when it was asked `all_logits" in out


@ONLY_POSIX
def test_programs_that_broke_off_are_gone(tmp_path, capfd):
    script = f"echo $$ >> {tmp_path}/pids; read -r line; echo 1; sleep 60 >&- & echo $! >> {tmp_path}/pids"
    assert conform.main(["--levels", "1,5,6", "--", "sh", "-c", script]) == 1
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 4 and all(gone(pid) for pid in pids) and "Z" not in states(pids[::2])
    capfd.readouterr()


def test_a_failure_is_told_once(check, monkeypatch):
    monkeypatch.setattr(conform, "explain", lambda *_: ["likely: x"])
    for fault in ("erf_gelu", "log_probabilities", "four_decimals"):
        _, out, _ = check(fault, "2,3,4")
        assert verdicts(out) == dict.fromkeys("234", "FAILED")
        for name in ("3 all positions  ", "4 cached decoding"):
            assert re.search(rf"^{name}  FAILED  1 answers\n    as level 2\n(?!  )", out, re.MULTILINE)
    # A cache that is wrong where the logits had been right is another failure.
    _, out, _ = check("late+cache_position_0", "2,3,4")
    assert out.count("as level 2") == 1 and "`step 1 51`" in out and "see docs/conform.md, level 4" in out


def test_a_program_that_runs_another_model_is_asked_no_more(check):
    status, out, _ = check("another_model", "2,3,4,5,6")
    assert status == 1 and [*verdicts(out)] == ["2"]
    assert (
        "answers 256 logits, the model has 512: does your program run the same model (the formula model" in out
    )


def test_the_next_step_is_said_and_can_be_typed(check, model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conform, "SECONDS", 0)
    directory = shlex.quote(model)
    monkeypatch.setattr(conform, "load_encoder_hparams_and_params", lambda *_: (None, None, None))
    for fault, options in (("late", ()), ("gelu_starts_at_1", ("--model_size", model))):
        out = check(fault, "2", *options)[1]
        said = out[out.index("no known mistake gives these logits") :].splitlines()
        commands = [shlex.split(line) for line in said if line.startswith("        python -m ")]
        assert [words[2] for words in commands] == [
            *["picogpt.formula"] * (not options), "picogpt.trace", "picogpt.compare",
        ]  # fmt: skip
        assert f"--model_size {directory if options else 'formula'} -o truth" in out
        assert "    docs/implementing-gpt2.md, section 7\n" in out
        mains = {"formula": formula.main, "trace": trace.main, "compare": compare.main}
        for words in commands:
            argv = ["truth" if word == "MINE" else word for word in words[3:]]
            assert mains[words[2].partition(".")[2]](argv) == 0
        assert f" of {'1 token' if options else '64 tokens'} through" in capfd.readouterr().err


def test_all_logits_are_asked_for_where_mistakes_are_looked_for(check):
    out = check("erf_gelu+unknown:all_logits", "2")[1]
    assert "    answer all_logits, too, and known mistakes can be looked for\n" in out and "trace" not in out


def test_digits_are_counted(reference):
    truth = reference.truth([0])
    judge = reference.near([0], slice(None))
    forms = {
        ".2f": "2 decimals",
        ".1f": "1 decimal:",
        ".0f": "0 decimals",
        ".3g": "3 digits",
        ".2e": "3 digits",
    }
    for form, said in forms.items():
        with pytest.raises(conform.WrongLogits, match=f"your numbers have {said}"):
            judge([float(format(x, form)) for x in truth.ravel()])
    assert judge([float(f"{x:f}") for x in truth.ravel()]) < 1  # six decimals will do
    for wrong in (truth * 1.01, truth * 0, np.full_like(truth, np.nan), np.full_like(truth, np.inf)):
        with pytest.raises(conform.WrongLogits) as error:
            judge(wrong.ravel().tolist())
        assert error.value.remark == ""


def test_help_says_where_the_protocol_is_and_which_model_is_meant(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        conform.main(["--help"])
    out = capfd.readouterr().out
    assert (
        "docs/conform.md" in out and "(the formula model, which `python -m picogpt.formula DIR` writes)" in out
    )


def test_the_reports_on_the_page_are_what_is_printed(check, monkeypatch):
    """But for the digits of what is measured."""
    monkeypatch.setattr(conform, "SECONDS", 0)
    shown = re.findall(r"((?:^    .*\n)+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    reports = [re.sub("^    ", "", block, flags=re.MULTILINE) for block in shown if "FAILED" in block]
    blank = re.compile(r"-?\d+\.\d[\de+-]*")
    for report, fault, levels in zip(reports, ("erf_gelu", "gelu_starts_at_1"), ("1,2,3", "2"), strict=True):
        assert blank.sub("#", check(fault, levels)[1]) == blank.sub("#", report)


def test_an_answer_without_end(check, monkeypatch):
    monkeypatch.setattr(conform, "MOST_BYTES", 1 << 16)
    status, out, _ = check("endless", "1")
    assert status == 1 and "has 65,536 bytes and no end" in out


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("nan", "found nan, inf times"),
        ("one_less", "answers 511 logits, the model has 512\n"),
        ("one_more", "answers 513 logits"),
    ],
)
def test_logits_that_are_none(fault, said, check):
    status, out, _ = check(fault, "2")
    assert status == 1 and said in out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["nowhere"], "cannot start 'nowhere': "),
        (["./nowhere"], "cannot start './nowhere': "),
        ([str(PAGE)], "cannot start "),
        (["a\0b"], "cannot start "),
        ([sys.executable, "-c", ""], "the program ended with exit status 0 when it was asked `encode 0`"),
        ([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], "was stopped by signal 9 (Killed)"),
    ],
)
def test_a_program_that_does_not_run(command, said, capfd):
    if os.name == "nt" and "signal" in said:
        pytest.skip("Windows has no signals to be stopped by")
    assert conform.main(["--levels", "1,2", "--", *command]) == 2
    out, err = capfd.readouterr()
    assert said in err and err.count("\n") == 1
    reason = err.removeprefix("picogpt: ") + "    see docs/conform.md, level 1\n"
    failed = f"1 tokenizer        FAILED\n    {reason}2 logits           FAILED\n    as level 1\n"
    assert out == ("" if "cannot start" in said else failed)


def test_a_command_line_that_cannot_be_used(capfd):
    for options in (
        [],
        ["--levels", "7", "--", "x"],
        ["--levels", "", "--", "x"],
        ["--timeout", "x", "--", "x"],
    ):
        with pytest.raises(SystemExit) as stop:
            conform.main(options)
        assert stop.value.code == 2
    assert conform.main(["--timeout", "nan", "--", "x"]) == 2
    assert "--timeout is nan" in capfd.readouterr().err


@ONLY_POSIX
def test_at_the_end_nothing_is_left_and_a_bad_end_is_said(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(conform, "LAST_WORDS", 0.5)
    answers = "while read -r line; do echo '?'; done"
    for script, said in (
        (
            f"{answers}; echo $$ > {tmp_path}/pid; sleep 60",
            "did not end within 0.5 s after the end of its input",
        ),
        (
            f"{answers}; echo $$ > {tmp_path}/pid; exit 3",
            "after the end of its input the program ended with exit status 3",
        ),
        (
            f"{answers}; echo $$ > {tmp_path}/pid; echo bye",
            "it wrote more than an answer a request: 'bye' was left",
        ),
        (f"sleep 60 & echo $! > {tmp_path}/pid; wait", "no answer to `encode 0` within 1 s"),
        (
            f"echo $$ > {tmp_path}/pid; exec sleep 60 >&-",
            "closed its standard output when it was asked `encode 0`",
        ),
    ):
        assert conform.main(["--levels", "1", "--timeout", "1", "--", "sh", "-c", script]) == 2
        assert said in capfd.readouterr().err
        assert gone(int((tmp_path / "pid").read_text()))


def states(pids):
    """What ps says of processes: Z is one that nobody has waited for."""
    numbers = ",".join(map(str, pids))
    return subprocess.run(["ps", "-o", "stat=", "-p", numbers], capture_output=True, text=True).stdout


def gone(pid):
    """Whether a process ends within a second; one that only waits to be collected by its parent has ended."""
    for _ in range(100):
        state = states([pid])
        if not state or state.startswith("Z"):
            return True
        time.sleep(0.01)
    return False


@ONLY_POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_ctrl_c_takes_the_program_along(number, tmp_path):
    script = f"trap '' INT; echo $$ > {tmp_path}/unfinished; mv {tmp_path}/unfinished {tmp_path}/pid; sleep 60"
    command = [sys.executable, "-m", "picogpt.conform", "--", "sh", "-c", script]
    with (tmp_path / "said").open("wb") as said, subprocess.Popen(command, stderr=said) as driver:
        while not (tmp_path / "pid").exists() and driver.poll() is None:
            time.sleep(0.02)
        driver.send_signal(number)
        assert driver.wait(10) == 128 + number
    assert (tmp_path / "said").read_text() == "" and gone(int((tmp_path / "pid").read_text()))


def test_requests_keep_what_the_page_promises(reference):
    words = re.findall(r"^\| `(\w+) N?", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    seen, in_cache = set(), 0
    for _, cases in conform.LEVELS.values():
        for case in cases(reference):
            assert re.fullmatch(r"[a-z_]+ \d+( -?\d+(\.\d+)?)*", case.request())
            word, n, *numbers = case.request().split()
            assert int(n) == len(numbers) <= 4096
            seen.add(word)
            if word in ("logits", "all_logits"):
                assert 1 <= len(numbers) <= 64
            if word in ("start", "step"):
                in_cache = len(numbers) if word == "start" else in_cache + 1
                assert 1 <= in_cache <= 64
            if word == "greedy":
                assert len(numbers) >= 2 and int(numbers[0]) + len(numbers) - 1 <= 64
            if word not in ("encode", "sample"):
                assert all(0 <= int(i) < 512 for i in numbers[word == "greedy" :])
    assert seen == {*words}


def test_sampling_stays_away_from_the_borders(reference):
    """A program in float32, or one that sums otherwise, must not come to another id."""
    for case in conform.LEVELS[6][1](reference):
        temperature, top_k, top_p, u, *logits = (float(x) for x in case.request().split()[2:])
        if temperature == 0:
            continue
        ids = set()
        for nudge in (-1e-5, 0, 1e-5):
            p = probabilities(
                np.array(logits), temperature * (1 + nudge), int(top_k) or None, min(top_p + nudge, 1)
            )
            ids |= {draw(p, max(u + again, 0)) for again in (-1e-5, 0, 1e-5)} if u else {draw(p, 0)}
        assert len(ids) == 1 and case.judge([*ids]) == 0


def test_what_transformers_computes_in_float32_is_right(reference):
    """Another program, in the precision of most: it must pass, at every position and id."""
    torch = pytest.importorskip("torch")
    net = transformers_model(reference.params, reference.hparams["n_head"])
    with torch.no_grad():
        for ids in reference.prompts:
            logits = net(torch.tensor([ids])).logits[0].numpy()
            error = reference.near(ids, slice(None))(logits.ravel().tolist())
            assert 0 < error <= 1
            more = net.generate(torch.tensor([ids[:4]]), max_new_tokens=30, do_sample=False, pad_token_id=0)
            n = len(more[0]) - len(ids[:4])  # it stops at <|endoftext|>
            assert reference.continues(ids[:4], n)(more[0, len(ids[:4]) :].tolist()) == 0


def test_a_tie_may_go_either_way():
    hparams, params = formula.formula_params()
    prompt = [464, 269, 265, 338]
    best = greedy(conform.Reference(formula.formula_encoder(), hparams, params).truth(prompt)[-1])
    params["wte"][best + 1] = params["wte"][best] * np.float32(1 + 1e-7)  # two tokens that are all but one
    reference = conform.Reference(formula.formula_encoder(), hparams, params)
    row = reference.truth(prompt)[-1]
    assert greedy(row) in (best, best + 1) and 0 < abs(row[best] - row[best + 1]) < reference.band(prompt)
    judge = reference.continues(prompt, 1)
    assert judge([best]) == judge([best + 1]) == 0
    for wrong in ([best - 1], [-1], [512], [], [best, best]):
        with pytest.raises(conform.Difference):
            judge(wrong)


def test_the_session_on_the_page(model):
    """The port answers the page's questions as the page says, digit for digit where digits are shown."""
    session = re.findall(r"^    > (.*)\n    <(.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(session) >= 10
    questions = "".join(question + "\n" for question, _ in session)
    port = subprocess.run(
        [sys.executable, PORT, model], input=questions, capture_output=True, text=True, check=True
    )
    for (question, shown), answer in zip(session, port.stdout.splitlines(), strict=True):
        beginning, *end = shown.strip().split(" ... ")
        assert answer == beginning if not end else answer.startswith(beginning) and answer.endswith(end[0]), (
            question
        )


def test_the_program_on_the_page(tmp_path, capfd):
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    (tmp_path / "port.c").write_text(
        re.search(r"```c\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    )
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-o"]
    subprocess.run([compiler, *flags, tmp_path / "port", tmp_path / "port.c"], check=True)
    assert conform.main(["--", str(tmp_path / "port")]) == 2
    out, err = capfd.readouterr()
    assert verdicts(out) == dict.fromkeys("123456", "not answered") and "answered by ?" in err
