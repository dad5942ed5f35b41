"""Check a GPT-2 in any language, over standard input and output: `python -m picogpt.conform -- PROGRAM`.

The protocol and the levels are described on one page, docs/conform.md. What is expected is computed while the
program runs, by the one forward pass in float64, and the tolerance is measured beside it (noise.py).
"""

import argparse
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from picogpt import PicogptError
from picogpt.checkpoint import load_encoder_hparams_and_params
from picogpt.command import UsageError, exit_status, say, write
from picogpt.diagnose import diagnose
from picogpt.formula import formula_encoder, formula_params
from picogpt.questions import LEVELS, Case, Difference, Reference

MOST_BYTES = 1 << 25  # of one answer
STOPS = (signal.SIGINT, signal.SIGTERM)
LAST_WORDS = 5  # seconds that a program has to end after the end of its input
FLOATS = (
    "logits",
    "all_logits",
    "start",
    "step",
)  # words that are answered by logits; the others by whole numbers
PAGE = "docs/conform.md"


class ConformError(PicogptError):
    """A program that cannot be checked: it is missing, dies, hangs, or does not speak the protocol."""


class Program:
    """The program under test. Stopped and gone after the `with`, whatever happened."""

    def __init__(self, command: Sequence[str], timeout: float):
        self.timeout = timeout
        try:
            # In a session of its own, so that what it starts ends with it.
            self.process: Any = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or error
            here = Path(command[0]).name == command[0]
            cure = f"write ./{command[0]}" if here else "give a program that can be run"
            raise ConformError(f"cannot start {command[0]!r}: {said}: {cure}") from None

    def __enter__(self) -> "Program":
        self.handlers = {number: signal.signal(number, self._interrupted) for number in STOPS}
        return self

    def __exit__(self, *_: Any) -> None:
        self._kill()
        self.process.wait()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def ask(self, request: str) -> list[Any] | None:
        """Return the numbers of the answer; None for `?`. Raises ConformError for what is no answer."""
        shown = request if len(request) <= 60 else f"{request[:60]}..."
        if rest := self._waiting():
            raise ConformError(f"it wrote more than one line for an answer: {_excerpt(rest)} came as well")
        try:
            line = _within(self.timeout, lambda: self._exchange(request))
        except queue.Empty:
            said = f"no answer to `{shown}` within {self.timeout:g} s: did it flush standard output?"
            raise ConformError(f"{said} (--timeout gives it longer)") from None
        if not line.endswith(b"\n"):
            if len(line) == MOST_BYTES:
                raise ConformError(f"the answer to `{shown}` has {MOST_BYTES:,} bytes and no end")
            raise ConformError(f"the program {self._end()} when it was asked `{shown}`")
        if line.strip() == b"?":
            return None
        kind = float if request.partition(" ")[0] in FLOATS else int
        try:
            return [kind(word) for word in line.split()]
        except ValueError:
            wanted = "a line of numbers" if kind is float else "a line of whole numbers"
            said = f"`{shown}` was answered {_excerpt(line)}, not by {wanted}"
            raise ConformError(f"{said}: standard output is for answers, notes go to standard error") from None

    def finish(self) -> None:
        """End its input and let it go. Raises ConformError if it has said more than it was asked for."""
        try:
            rest = _within(LAST_WORDS, self._last_words)
        except queue.Empty:
            say(f"the program did not end within {LAST_WORDS} s after the end of its input: killed")
            return
        if rest:
            raise ConformError(f"it wrote more than an answer a request: {_excerpt(rest)} was left at the end")
        if self.process.wait():
            say(f"after the end of its input the program {self._end()}")

    def _exchange(self, request: str) -> bytes:
        line = memoryview(request.encode() + b"\n")
        with suppress(OSError):  # it does not listen any more; what it has said may tell why
            while line:
                line = line[os.write(self.process.stdin.fileno(), line) :]
        return self.process.stdout.readline(MOST_BYTES)

    def _waiting(self) -> bytes:
        """What has come already, though nothing has been asked."""
        pipe = self.process.stdout
        if not hasattr(os, "set_blocking") or os.name == "nt":  # `finish` will see it
            return b""
        os.set_blocking(pipe.fileno(), False)
        try:
            return pipe.peek(1)
        finally:
            os.set_blocking(pipe.fileno(), True)

    def _last_words(self) -> bytes:
        with suppress(OSError):
            self.process.stdin.close()
        rest = self.process.stdout.read(80)
        if not rest:
            self.process.wait()
        return rest

    def _end(self) -> str:
        try:
            status = self.process.wait(1)
        except subprocess.TimeoutExpired:
            return "closed its standard output"
        if status >= 0:
            return f"ended with exit status {status}"
        return f"was stopped by signal {-status} ({signal.strsignal(-status)})"

    def _kill(self) -> None:
        with suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()

    def _interrupted(self, number: int, _: Any) -> None:
        self._kill()
        os._exit(128 + number)


def _within(seconds: float, job: Callable[[], bytes]) -> bytes:
    """What a job returns, which may block for ever. Raises queue.Empty after some seconds."""
    done: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=lambda: done.put(job()), daemon=True).start()
    return done.get(timeout=seconds)


def _excerpt(line: bytes) -> str:
    said = repr(line[:60].decode("utf-8", "backslashreplace").rstrip("\n"))
    return said if len(line) <= 60 else f"{said}..."


class Result(NamedTuple):
    """What came of a level."""

    n_answers: int
    worst: float  # error in noise bands
    unknown: list[str]  # words answered by `?`
    failure: str = ""


def run_level(program: Program, cases: Iterator[Case]) -> Result:
    """Ask until an answer differs. A word that is not known is not asked again, nor `step` without `start`."""
    n_answers, worst, known, unknown = 0, 0.0, set(), []
    for case in cases:
        if case.word in unknown or (case.word == "step" and "start" in unknown):
            continue
        answer = program.ask(case.request())
        try:
            if answer is None and case.word not in known:
                unknown.append(case.word)
                continue
            if answer is None:
                raise Difference(f"found    ?, though `{case.word}` had been answered before")
            known.add(case.word)
            n_answers += 1
            worst = max(worst, case.judge(answer))
        except Difference as error:
            lines = [f"`{case.request():.300}`", *([case.about] if case.about else []), *str(error).split("\n")]
            return Result(n_answers, worst, unknown, "\n".join(lines))
    return Result(n_answers, worst, unknown)


def explain(program: Program, reference: Reference, level: int) -> Iterator[str]:
    """What the catalogue of mistakes says of wrong logits: of all positions, or of the steps of a cache."""
    ids = reference.long[:-1]  # one less than there is room for: some mistakes reach beyond the context
    truth, half = reference.truth(ids), len(ids) // 2
    requests: list[tuple[str, Sequence[float]]] = [("all_logits", ids)]
    if level == 4:
        requests = [("start", ids[:half]), *(("step", [i]) for i in ids[half:])]
    answers = [program.ask(Case(*request).request()) or [] for request in requests]
    right = truth[: half - 1] if level == 4 else truth[:0]  # not asked
    theirs = np.concatenate([right.ravel(), *answers])
    if theirs.size == truth.size:
        traced = {"logits": theirs.reshape(truth.shape)}
        # In every layer and one at a time: logits by themselves say too little of pairs.
        for finding in diagnose(traced, ids, reference.params, reference.hparams["n_head"], seconds=0):
            if finding.mistakes:
                yield finding.say()


def report(reference: Reference, command: Sequence[str], levels: Sequence[int], timeout: float) -> int:
    """Write a line a level; return 0 if all that was answered is right, 1 if not."""
    failed: list[int] = []
    answered: list[int] = []
    with Program(command, timeout) as program:
        for n in levels:
            name, cases = LEVELS[n]
            try:
                result = run_level(program, cases(reference))
            except ConformError:
                write(f"{n} {name:<17}stopped\n")
                raise
            said = f"{result.n_answers:,} answers"
            said += f", at most {result.worst:.2g} noise bands off" if result.worst else ""
            said += f"; not answered: {', '.join(result.unknown)}" if result.unknown else ""
            verdict = "FAILED" if result.failure else "passed" if result.n_answers else "not answered"
            write(f"{n} {name:<17}{verdict:<8}{said if result.n_answers else ''}".rstrip() + "\n")
            answered += [n] * (result.n_answers > 0)
            if result.failure:
                write("".join(f"    {line}\n" for line in result.failure.split("\n")))
                if 2 <= n <= 4 and not {2, 3} & {*failed}:  # else it has been explained
                    write("".join(f"    likely: {said}\n" for said in explain(program, reference, n)))
                write(f"    see {PAGE}, level {n}\n")
                failed.append(n)
        program.finish()
    if not answered:
        raise ConformError(f"every request was answered by ?: {PAGE} has the words")
    if failed:
        write(f"Level {failed[0]} is the first that differs: begin there.\n")
        return 1
    write("All that was answered is right.\n")
    return 0


def _levels(text: str) -> list[int]:
    levels = text.split(",")
    if not {*levels} <= {*map(str, LEVELS)}:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of levels such as 1,2,3")
    return sorted({*map(int, levels)})


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m picogpt.conform -- PROGRAM ARGS`: exit status 0 if it is right, 1 if not, 2 if unusable."""
    parser = argparse.ArgumentParser(
        prog="python -m picogpt.conform",
        usage="%(prog)s [options] -- PROGRAM [ARG ...]",
        description=f"Check a GPT-2 in any language over standard input and output: see {PAGE}.",
    )
    parser.add_argument("--model_size", help="the model that PROGRAM runs; without it, the formula model")
    parser.add_argument("--models_dir", help="where models are looked for by name")
    parser.add_argument("--levels", type=_levels, default=[*LEVELS], help="such as 1,2,3; all if left out")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for an answer (60)")
    parser.add_argument("program", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    def command() -> int:
        if not 0 < args.timeout < threading.TIMEOUT_MAX:
            raise UsageError(f"--timeout is {args.timeout}: give seconds, more than 0")
        if args.model_size is None:
            reference = Reference(formula_encoder(), *formula_params())
        else:
            reference = Reference(*load_encoder_hparams_and_params(args.model_size, args.models_dir))
        return report(reference, args.program, args.levels, args.timeout)

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
