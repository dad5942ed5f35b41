"""Bad input, made and counted: `python tests/fuzz.py [--seconds N] [--seed S] [--target NAME]...`.

Runs the targets of bad_input.py, each in a process of its own, and prints a table. Findings are an exception
that is no PicogptError, an answer that is not the oracle's, a case of more than CASE_SECONDS or of more than
MOST_MEMORY. The exit status is then 1, and the input is kept. (The limits of time and memory are Linux's.)
"""

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["PICOGPT_BASE_URL"] = "nowhere"  # nothing reaches the network
sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # from wherever it is started

import bad_input  # noqa: E402
from bad_input import TARGETS, Finding, judge  # noqa: E402

CASE_SECONDS = 10
MOST_MEMORY = 1 << 30  # bytes, beyond what the process had before
MOST_FINDINGS = 5  # of one target
MB = 1 << 20


def memory(field: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none."""
    with suppress(OSError):
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    return 0


def work(name: str, seconds: float, seed: int, folder: Path, pipe: Connection) -> None:
    """Try one target until the time is over; send the tally, the slowest case, the peak and the findings."""
    bad_input.HUGE = 0.0005
    counts, findings, slowest, peak = Counter(), [], 0.0, 0
    log = os.open(folder.parent / f"{name}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)  # the oracles talk much
    for warm_up in range(30):  # what the oracles import does not count
        one_case(name, Random(f"warm {warm_up}"), folder, 0)
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + MOST_MEMORY,) * 2)
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(findings) < MOST_FINDINGS:
        verdict, took, grew = one_case(name, Random(f"{seed} {sum(counts.values())}"), folder)
        kind = verdict.partition(":")[0]
        counts[kind] += 1
        slowest, peak = max(slowest, took), max(peak, grew)
        if kind == "finding":
            findings.append(f"{verdict} ({keep(folder)})")
    pipe.send((counts, slowest, peak, findings))


def one_case(name: str, rng: Random, folder: Path, limit: int = CASE_SECONDS) -> tuple[str, float, int]:
    """Return the verdict, the seconds it took picogpt and the oracle, and the bytes it took at its peak."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    TARGETS[name].write(rng, folder)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, start = memory("VmRSS"), time.perf_counter()
    signal.alarm(limit)  # nobody listens: it ends the process
    try:
        verdict = judge(TARGETS[name], folder)
    except Finding as error:
        verdict = f"finding: {error}"
    except BaseException:
        verdict = "finding: " + " | ".join(traceback.format_exc(limit=-3).splitlines()[1:])[-900:]
    signal.alarm(0)
    return verdict, time.perf_counter() - start, memory("VmHWM") - before


def keep(folder: Path) -> Path:
    kept = Path(tempfile.mkdtemp(prefix="finding-", dir=folder.parent), folder.name)
    return folder.rename(kept)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="in all, shared out to the targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=[*TARGETS], help="only this one; may be repeated")
    arguments = parser.parse_args()
    names, folder = arguments.target or [*TARGETS], Path(tempfile.mkdtemp(prefix="picogpt-fuzz-"))
    print("| input | cases | refused | as the oracle | oracle refuses | slowest | memory | findings |")
    print("|---|---|---|---|---|---|---|---|")
    found = []
    for name in names:
        ours, theirs = multiprocessing.Pipe()
        where = folder / name
        options = (name, arguments.seconds / len(names), arguments.seed, where, theirs)
        process = multiprocessing.get_context("spawn").Process(target=work, args=options)
        process.start()
        theirs.close()
        try:
            counts, slowest, peak, findings = ours.recv()
        except EOFError:  # it died of the alarm, or of the oracle
            process.join()
            counts, slowest, peak, findings = (
                Counter(),
                CASE_SECONDS,
                0,
                [f"exit status {process.exitcode} ({keep(where)})"],
            )
        process.join()
        found += [f"{name}: {finding}" for finding in findings]
        row = [
            f"{n:,}" for n in (sum(counts.values()), *(counts[kind] for kind in ("refused", "equal", "alone")))
        ]
        row += [f"{1000 * slowest:.0f} ms", f"{peak / MB:.0f} MB", str(len(findings))]
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    print(*found, sep="\n", file=sys.stderr)
    if not found:
        shutil.rmtree(folder)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
