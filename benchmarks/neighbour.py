"""What a busy neighbour costs: GPT-2 124M's speed alone, and beside a program that computes without end.

    python benchmarks/neighbour.py [--rounds 5] [--model_dir DIR]

Every figure comes from a fresh process that does what `python -m picogpt` does: --threads, if any, is set
before NumPy is loaded, the model is loaded, and `picogpt.stream` continues 16 tokens (timed from the first new
one to the last), then 512 (timed to the first). Its environment says nothing of threads or of OpenBLAS. The
neighbour is one busy loop in a session of its own, as another user's program is. Alone and beside take turns,
and the ratio is taken within a round; the table has medians, and the ratios' extremes. Random weights.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

from sizes import ENVIRONMENT, checkpoint
from speed import processor

from picogpt.machine import blas, cores, set_threads

GOAL = 2.0  # times slower beside the neighbour, for whoever has set nothing
CASES = {"decode after 16 tokens": (16, 33), "prefill of 512 tokens": (512, 1)}
SETTLE = 0.5  # seconds in which a process that has ended, or begun, is forgotten


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (5)")
    parser.add_argument("--model_dir", type=Path, help="a GPT-2, 1024 positions, not random weights")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.model_dir, options.threads)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the neighbour goes then, too
    with ExitStack() as stack:
        if not options.model_dir:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="picogpt-neighbour-"))
            options.model_dir = checkpoint(Path(folder), "124M")
        return compare(options.model_dir.resolve(), options.rounds)


def work(model_dir: Path, threads: int) -> None:
    """Print tokens per second in each of CASES, in JSON, and the BLAS."""
    if threads:
        set_threads(threads)
    import picogpt

    _, hparams, params = picogpt.load_encoder_hparams_and_params(str(model_dir))
    speeds = []
    for n_prompt, n_new in CASES.values():
        times = [perf_counter()]
        prompt = [(7919 * i + n_prompt) % hparams["n_vocab"] for i in range(n_prompt)]
        for _ in picogpt.stream(prompt, params, hparams["n_head"], n_new):
            times.append(perf_counter())
        speeds.append(n_prompt / (times[1] - times[0]) if n_new == 1 else (n_new - 1) / (times[-1] - times[1]))
    facts: dict[str, Any] = next(iter(blas().info()), {})
    kernel = [str(facts.get(key)) for key in ("internal_api", "version", "architecture", "num_threads")]
    print(json.dumps([speeds, kernel]))


@contextmanager
def neighbour() -> Iterator[None]:
    """A program of somebody else's that keeps a core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        sleep(SETTLE)
        yield
    finally:
        process.kill()
        process.wait()
        sleep(SETTLE)


def compare(model_dir: Path, rounds: int) -> int:
    """Measure, print, and return 0 if the default keeps to the goal."""
    settings = {"default": 0, **{f"--threads {n}": n for n in dict.fromkeys((1, cores()))}}
    measured: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    loads, kernels = [os.getloadavg()[0]], {}
    for number in range(rounds + 1):  # the first is a warm-up
        print(f"round {number} of {rounds}" if number else "warm-up", file=sys.stderr)
        if number == 1:
            measured.clear()
        for setting, threads in settings.items():
            options = ["--worker", f"--model_dir={model_dir}", f"--threads={threads}"]
            command = [sys.executable, __file__, *options]
            speeds = []
            for company in (nullcontext(), neighbour()):
                with company:
                    answer, kernels[setting] = json.loads(subprocess.check_output(command, env=ENVIRONMENT))
                    speeds.append(answer)
            for case, alone, beside in zip(CASES, *speeds, strict=True):
                measured[case, setting].append((alone, beside))
    loads.append(os.getloadavg()[0])
    api, version, kernel, _ = kernels["default"]
    print(f"{processor()}, {cores()} cores; {api} {version}, kernel {kernel}; {rounds} rounds;")
    print(f"load {loads[0]:.1f} at the start, {loads[1]:.1f} at the end.\n")
    print("| 124M, tokens/s | setting | alone | beside | alone : beside, least to most | goal |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for (case, setting), pairs in measured.items():
        alone, beside = (median(column) for column in zip(*pairs, strict=True))
        ratios = [a / b for a, b in pairs]
        spread = f"{median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
        goal = f"<= {GOAL:g}" if setting == "default" else ""
        print(f"| {case} | {setting} | {alone:.1f} | {beside:.1f} | {spread} | {goal} |")
        worst = max(worst, median(ratios)) if goal else worst
    return 0 if worst <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
