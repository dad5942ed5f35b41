"""Time and memory of recording a reference, by the real command line in a fresh process.

    python benchmarks/trace.py [--size_of_model 124M] [--n_tokens 64] [--folder FOLDER]

Random weights of one of OpenAI's shapes (kept if FOLDER is given); a row for each size of recording. Memory
is the kernel's peak (ru_maxrss), mapped weights included. Unix.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from sizes import ENVIRONMENT, OPENAI_SIZES, checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size_of_model", default="124M", choices=OPENAI_SIZES)
    parser.add_argument("--n_tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint, and to keep it")
    options = parser.parse_args()
    ids = ",".join(str(701 * i % 50257) for i in range(options.n_tokens))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="picogpt-trace-")))
        model = checkpoint(options.folder or scratch, options.size_of_model)
        print("| recorded | seconds | peak (MB) | on disk (MB) |\n|---|---|---|---|")
        for size in ("full", "tiny", "smoke"):
            arguments = ["--ids", ids, "--model_size", str(model), "--size", size, "-o", str(scratch / size)]
            start = perf_counter()
            child = subprocess.Popen([sys.executable, "-m", "picogpt.trace", *arguments], env=ENVIRONMENT)
            _, status, usage = os.wait4(child.pid, 0)
            seconds = perf_counter() - start
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                return child.returncode
            on_disk = sum(path.stat().st_size for path in (scratch / size).iterdir())
            print(
                f"| {size} | {seconds:.1f} | {usage.ru_maxrss * 1024 / 1e6:.0f} | {on_disk / 1e6:.3f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
