"""Check a GPT-2 in any language, over standard input and output: `python -m picogpt.conform -- PROGRAM`.

The protocol and the levels are described on one page, docs/conform.md. What is expected is computed while the
program runs, by the one forward pass in float64, and the tolerance is measured beside it (noise.py).
"""

import argparse
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from picogpt.checkpoint import load_encoder_hparams_and_params
from picogpt.command import UsageError, exit_status, say, write
from picogpt.diagnose import diagnose
from picogpt.formula import formula_encoder, formula_params
from picogpt.questions import LEVELS, Case, ConformError, Difference, Hang, Reference, Result, WrongLogits

MOST_BYTES = 1 << 25  # of one answer
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
LAST_WORDS = 5  # seconds that a program has to end after the end of its input
FLOATS = ("logits", "all_logits", "start", "step")  # are answered by logits; other words by whole numbers
SECONDS = 2.0  # for mistakes in one of several layers: enough for the formula model's
PAGE = "docs/conform.md"


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
            raise Hang(f"{said} (--timeout gives it longer)") from None
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
            if hasattr(os, "killpg") and hasattr(signal, "SIGKILL"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()

    def _interrupted(self, number: int, _: Any) -> None:
        self._kill()
        os.waitpid(self.process.pid, 0)
        os._exit(128 + number)


def _within(seconds: float, job: Callable[[], bytes]) -> bytes:
    """What a job returns, which may block for ever. Raises queue.Empty after some seconds."""
    done: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=lambda: done.put(job()), daemon=True).start()
    return done.get(timeout=seconds)


def _excerpt(line: bytes) -> str:
    said = repr(line[:60].decode("utf-8", "backslashreplace").rstrip("\n"))
    return said if len(line) <= 60 else f"{said}..."


def run_level(program: Program, cases: Iterator[Case], right: set[tuple[int, ...]]) -> Result:
    """Ask until an answer differs. A word that is not known is not asked again, nor `step` without `start`.

    The ids whose logits are right are added to `right`.
    """
    n_answers, worst, unknown = 0, 0.0, []
    known: set[str] = set()  # words, and what was answered rightly
    for case in cases:
        if case.word in unknown or (case.word == "step" and "start" in unknown):
            continue
        try:
            answer = program.ask(case.request())
            if answer is None and case.word not in known:
                unknown.append(case.word)
                continue
            if answer is None:
                raise Difference(f"found    ?, though `{case.word}` had been answered before")
            known.add(case.word)
            n_answers += 1
            worst = max(worst, case.judge(answer))
        except (ConformError, Difference) as error:
            if case.word == "start" and case.request() in known and isinstance(error, WrongLogits):
                remark = "the same request was answered rightly before: does start empty the cache?"
                error = WrongLogits(str(error), remark)
            return Result(n_answers, worst, unknown, error, case)
        known.add(case.request())
        right |= {(*case.ids,)} - {()}
    return Result(n_answers, worst, unknown)


def explain(program: Program, reference: Reference, level: int) -> Iterator[str]:
    """What the catalogue of mistakes says of wrong logits: of all positions, or of the steps of a cache."""
    ids = reference.long[:-1]  # one less than there is room for: some mistakes reach beyond the context
    truth, half = reference.truth(ids), len(ids) // 2
    requests: list[tuple[str, Sequence[float]]] = [("all_logits", ids)]
    if level == 4:
        requests = [("start", ids[:half]), *(("step", [i]) for i in ids[half:])]
    answers = [program.ask(Case(*request).request()) for request in requests]
    if None in answers:
        yield "answer all_logits, too, and known mistakes can be looked for"
        return
    right = truth[: half - 1] if level == 4 else truth[:0]  # not asked
    theirs = np.concatenate([right.ravel(), *(answer or [] for answer in answers)])
    if theirs.size == truth.size:
        traced = {"logits": theirs.reshape(truth.shape)}
        findings = diagnose(traced, ids, reference.params, reference.hparams["n_head"], seconds=SECONDS)
        mistakes = [mistake for finding in findings for mistake in finding.mistakes]
        if len(mistakes) == 1:  # of two made together, logits by themselves say too little
            yield f"likely: {findings[0].say()}"


class Report:
    """Writes a line a level, and of one that failed why. The program under test is closed with the stack."""

    def __init__(self, reference: Reference, command: Sequence[str], timeout: float, stack: ExitStack):
        self.reference, self.command, self.timeout, self.stack = reference, command, timeout, stack
        self.results: dict[int, Result] = {}
        self.right: set[tuple[int, ...]] = set()  # ids whose logits are
        self.program: Program | None = None
        self._start()

    def _start(self) -> Program:
        """The program; a fresh one if it has been given up."""
        self.program = self.program or self.stack.enter_context(Program(self.command, self.timeout))
        return self.program

    def _give_up(self) -> None:
        self.stack.close()
        self.program = None

    def run(self, n: int, model: str) -> bool:
        """Check a level; return whether another one makes sense. `model` are the options that name it."""
        name, cases = LEVELS[n]
        try:
            result = run_level(self._start(), cases(self.reference), self.right)
        except ConformError as error:  # it cannot be started again
            result = Result(0, 0.0, [], error)
        said = f"{result.n_answers:,} answers"
        said += f", at most {result.worst:.2g} noise bands off" if result.worst else ""
        said += f"; not answered: {', '.join(result.unknown)}" if result.unknown else ""
        verdict = "FAILED" if result.error else "passed" if result.n_answers else "not answered"
        write(f"{n} {name:<17}{verdict:<8}{said if result.n_answers else ''}".rstrip() + "\n")
        if result.error:
            write("".join(f"    {line}\n" for line in self._why(n, result, model)))
        self.results[n] = result
        n_hung = sum(isinstance(result.error, Hang) for result in self.results.values())
        if n_hung == 2:
            write("It has hung twice: no more is asked.\n")
        return n_hung < 2 and not result.of_another_model(self.right)

    def _why(self, n: int, result: Result, model: str) -> Iterator[str]:
        """Yield the lines that say why a level failed."""
        error, case = result.error, result.case
        if isinstance(error, ConformError):
            self._give_up()
        for m, other in self.results.items():
            if result.same_as(other, self.right):
                yield f"as level {m}"
                return
        if not isinstance(error, ConformError):
            yield from [f"`{case.request():.300}`", case.about][: 1 + (case.about != "")]
        if result.of_another_model(self.right):
            its = model or "the formula model, unless --model_size gives another"
            yield f"{error}: does your program run the same model ({its})?"
            return
        yield from str(error).split("\n")
        if isinstance(error, WrongLogits) and not error.remark:
            try:
                said = [*explain(self._start(), self.reference, n)]
            except ConformError as trouble:
                self._give_up()
                said = [str(trouble)]
            yield from said or next_step(case.ids, model)
        yield f"see {PAGE}, level {n}"

    def finish(self) -> int:
        """End the program; return 0 if all that was answered is right, 1 if not.

        Raises ConformError if nothing was answered.
        """
        trouble = [result.error for result in self.results.values() if isinstance(result.error, ConformError)]
        try:
            if self.program:
                self.program.finish()
        except ConformError as error:
            write(f"{error}\n")
            trouble.append(error)
        if not any(result.n_answers for result in self.results.values()):
            unknown = ConformError(f"every request was answered by ?: {PAGE} has the words")
            raise [*trouble, unknown][0]
        failed = [n for n, result in self.results.items() if result.error]
        if failed:
            write(f"Level {failed[0]} is the first that differs: begin there.\n")
        elif not trouble:
            write("All that was answered is right.\n")
        return 1 if failed or trouble else 0


def next_step(ids: Sequence[int], model: str) -> Iterator[str]:
    """What to do about logits that no known mistake gives."""
    yield "no known mistake gives these logits: record the intermediates of these ids and compare them:"
    if not model:
        yield "    python -m picogpt.formula formula"
    some = ",".join(map(str, ids))
    yield f"    python -m picogpt.trace --ids {some} {model or '--model_size formula'} -o truth"
    yield "    python -m picogpt.compare truth MINE --isolate"
    yield "docs/implementing-gpt2.md, section 7"


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
        description="Check a GPT-2 in any language over standard input and output.",
        epilog=f"What PROGRAM is asked, and what it has to answer: {PAGE}.",
    )
    about = "what PROGRAM runs (the formula model, which `python -m picogpt.formula DIR` writes)"
    parser.add_argument("--model_size", metavar="DIR_OR_NAME", help=about)
    parser.add_argument("--models_dir", help="where models are looked for by name")
    parser.add_argument("--levels", type=_levels, default=[*LEVELS], help="such as 1,2,3; all if left out")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for an answer (60)")
    parser.add_argument("program", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    def command() -> int:
        if not 0 < args.timeout < threading.TIMEOUT_MAX:
            raise UsageError(f"--timeout is {args.timeout}: give seconds, more than 0")
        model: list[str] = []
        if args.model_size is None:
            reference = Reference(formula_encoder(), *formula_params())
        else:
            reference = Reference(*load_encoder_hparams_and_params(args.model_size, args.models_dir))
            model = ["--model_size", args.model_size]
            model += ["--models_dir", args.models_dir] if args.models_dir else []
        with ExitStack() as stack:
            report = Report(reference, args.program, args.timeout, stack)
            # Up to the first after which no other makes sense.
            all(report.run(n, shlex.join(model)) for n in args.levels)
            return report.finish()

    return exit_status(command, unread=2)


if __name__ == "__main__":
    sys.exit(main())
