"""Time and memory of OpenAI's four sizes, each loaded and run by the real command line in a fresh process.

    python benchmarks/sizes.py [--sizes 124M 355M 774M 1558M] [--folder FOLDER] [--n_prompt 16]

A checkpoint of each size's shapes is written, with random weights, one size after another (6.2 GB for 1558M,
kept if FOLDER is given), and read back from the page cache, as it is right after a download. The peak is the
kernel's (ru_maxrss), mapped weights included; of it "private" is what no file holds (the most that RssAnon in
/proc/PID/status, looked at every 5 ms, has been). The bound is what the weights take, mapped, a cache of
2 * n_layer * n_embd float32 for every position, prompt and new tokens, and 150 MB. Linux.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from subprocess import DEVNULL, PIPE
from threading import Thread
from time import perf_counter, sleep

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from picogpt.model_dirs import OPENAI_SIZES  # noqa: E402

PROMPT = "Alan Turing theorized that computers would one day become the most powerful machines on Earth"
NEW, BESIDE = 16, 150_000_000
# What fits the processor is OpenBLAS's own choice, and the number of threads picogpt's.
CHOICES = re.compile(r"OPENBLAS_.*|.*_NUM_THREADS|VECLIB_MAXIMUM_THREADS|NPROC|PYTHONDONTWRITEBYTECODE")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not CHOICES.fullmatch(name)}
ENVIRONMENT["PYTHONPATH"] = str(ROOT)
LITTLE_MEMORY = """
import sys, picogpt.machine
picogpt.machine.memory = lambda: (8_000_000_000, 5_000_000_000)
from picogpt.__main__ import main
sys.exit(main())
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=OPENAI_SIZES, default=[*OPENAI_SIZES], help="all")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints, and to keep them")
    parser.add_argument("--n_prompt", type=int, default=16, help="tokens of prompt (16), a multiple of 16")
    parser.add_argument("--write", metavar="SIZE", choices=OPENAI_SIZES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_checkpoint(options.folder / options.write, OPENAI_SIZES[options.write])
        return 0
    columns = "size, data (bytes), to first token (s), tokens/s, peak (MB), private (MB), bound (MB), kept"
    print(f"| {columns.replace(', ', ' | ')} |\n{'|---' * 8}|")
    kept = True
    for size in options.sizes:
        with ExitStack() as stack:
            folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="picogpt-sizes-"))
            kept &= measure(size, checkpoint(Path(folder), size), options.n_prompt)
            if size == "1558M":
                show_warning(Path(folder) / size)
    return 0 if kept else 1


def checkpoint(folder: Path, size: str) -> Path:
    """The directory of a checkpoint that is written if it is not there; in a process of its own, because a
    child's peak memory counts from its parent's."""
    if not (folder / size / "checkpoint").exists():
        (folder / size).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--write", size, "--folder", str(folder)]
        subprocess.run(command, env=ENVIRONMENT, check=True)
    return folder / size


def write_checkpoint(directory: Path, hparams: dict[str, int]) -> None:
    """Write random weights in OpenAI's layout. All tensors are views of one pool of numbers, little larger than
    the largest of them: so the memory needed is that of the embedding table."""
    import math

    import numpy as np

    from picogpt.checkpoint import parameter_shapes
    from picogpt.tensor_bundle import write_bundle

    shapes = parameter_shapes(hparams)
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(math.prod(shapes["model/wte"]) + (1 << 20), dtype=np.float32)
    pool *= 0.06  # not GPT-2's 0.02, with which a random model repeats itself whatever its mathematics
    tensors = {}
    for name, shape in shapes.items():
        numbers = np.ones(shape, np.float32) if name.endswith("/g") else pool[rng.integers(1 << 20) :]
        tensors[name] = numbers[: math.prod(shape)].reshape((1, *shape) if name.endswith("/w") else shape)
    write_bundle(directory / "model.ckpt", tensors)
    (directory / "hparams.json").write_text(json.dumps(hparams))
    (directory / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')


def measure(size: str, directory: Path, n_prompt: int) -> bool:
    """Run the command line, print a row, and say whether its memory kept within the bound."""
    prompt = " ".join([PROMPT] * (n_prompt // 16))
    options = ["--model_size", str(directory), "--n_tokens_to_generate", str(NEW)]
    start = perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "picogpt", prompt, *options]
        child = subprocess.Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=errors, bufsize=0, env=ENVIRONMENT)
        assert child.stdout is not None
        private = [0]
        watcher = Thread(target=watch, args=(child.pid, private))
        watcher.start()
        child.stdout.read(1)
        seconds = perf_counter() - start
        child.stdout.read()
        watcher.join()
        _, status, usage = os.wait4(child.pid, 0)
        errors.seek(0)
        said = errors.read()
    child.returncode = os.waitstatus_to_exitcode(status)
    speed = re.search(rf": {NEW} tokens, .* then (\S+) tokens per second", said)
    if child.returncode or not speed:
        raise SystemExit(f"{size}: {said}")
    hparams = OPENAI_SIZES[size]
    n_bytes = (directory / "model.ckpt.data-00000-of-00001").stat().st_size
    cache = 2 * hparams["n_layer"] * hparams["n_embd"] * 4 * (n_prompt + NEW)
    peak, bound = usage.ru_maxrss * 1024, n_bytes + cache + BESIDE
    figures = [f"{number / 1e6:.0f}" for number in (peak, private[0], bound)]
    cells = [size, f"{n_bytes:,}", f"{seconds:.2f}", speed[1], *figures, "yes" if peak <= bound else "NO"]
    print(f"| {' | '.join(cells)} |", flush=True)
    return peak <= bound


def watch(pid: int, most: list[int]) -> None:
    """Keep in `most` the largest RssAnon of a process, until it has ended."""
    while match := re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
        most[0] = max(most[0], int(match[1]) * 1024)
        sleep(0.005)


def show_warning(directory: Path) -> None:
    """Print what is said where there seems to be too little memory."""
    options = ["the", "--model_size", str(directory), "--n_tokens_to_generate", "1"]
    command = [sys.executable, "-c", LITTLE_MEMORY, *options]
    run = subprocess.run(command, stdin=DEVNULL, capture_output=True, text=True, env=ENVIRONMENT)
    print("\nWith `picogpt.machine.memory` replaced by one that answers 8 GB, 5 GB of them free:\n")
    print("    " + run.stderr.replace(f"{directory.parent}/", "").strip().replace("\n", "\n    "))


if __name__ == "__main__":
    sys.exit(main())
