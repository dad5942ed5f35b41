"""What bad servers, full disks and kills do to `picogpt --model_size 124M`, and its time beside curl's.

    python benchmarks/faults.py [--folder FOLDER] [--only WORD] [--rounds 5]

A checkpoint of 124M's shapes with random weights, written by TensorFlow (once, 498 MB, kept if FOLDER is given)
is served on loopback by tests/bad_server.py. Every row of the table is the real command line, started in an
empty models directory, with the real time-outs; then the next run, with a server that behaves. A fault that is
marked "always" meets every request, the others only the first. Linux; a small tmpfs needs root.
"""

import argparse
import filecmp
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bad_server import AZURE_ERROR, HOTEL, Request, serving, unused_port  # noqa: E402

from picogpt.checkpoint import parameter_shapes  # noqa: E402
from picogpt.model_dirs import OPENAI_SIZES  # noqa: E402

PROMPT = "Alan Turing theorized that computers would one day become"
DATA, INDEX = "model.ckpt.data-00000-of-00001", "model.ckpt.index"
FILES = ("checkpoint", "encoder.json", "hparams.json", DATA, INDEX, "model.ckpt.meta", "vocab.bpe")
XML = ("status", 200, AZURE_ERROR, {"Content-Type": "application/xml"})
HTML = ("status", 200, HOTEL, {"Content-Type": "text/html"})
FAULTS: dict[str, dict[str, list[tuple]]] = {
    "none": {},
    **{f"reset at {share} %": {DATA: [("ends", "reset", share / 100)]} for share in (0, 1, 50, 99)},
    "reset at 0 %, always": {DATA: [("ends", "reset", 0.0)] * 99},
    "stall at 50 %": {DATA: [("ends", "stall", 0.5)]},
    "truncation at 50 %, Content-Length true": {DATA: [("ends", "close", 0.5)]},
    "truncation at 50 %, Content-Length agrees": {DATA: [("shortened", 0.5)]},
    "404, always": {DATA: [("status", 404, AZURE_ERROR)] * 99},
    "403, always": {DATA: [("status", 403)] * 99},
    "500, then well": {DATA: [("status", 500)]},
    "503, Retry-After: 3": {DATA: [("status", 503, b"", {"Retry-After": "3"})]},
    "500, always": {DATA: [("status", 500)] * 99},
    "XML body with 200 for the weights": {DATA: [XML]},
    "XML body with 200, always": {DATA: [XML] * 99},
    "XML body with 200 for the index, always": {INDEX: [XML] * 99},
    "a hotel's log-in page for everything, always": {name: [HTML] * 99 for name in FILES},
    "Content-Length 1,000 too large": {DATA: [("content_length", 1000)]},
    "Content-Length 1,000 too small": {DATA: [("content_length", -1000)]},
    "Range ignored, after a reset at 50 %": {DATA: [("ends", "reset", 0.5), ("range_ignored",)]},
    "Range wrong: earlier bytes, admitted": {DATA: [("ends", "reset", 0.5), ("range_shifted", 4096)]},
    "Range wrong: earlier bytes, not admitted": {
        DATA: [("ends", "reset", 0.5), ("range_shifted", 4096, False)]
    },
    "Range wrong: a file of another size": {DATA: [("ends", "reset", 0.5), ("other_total", 4)]},
    "416, after a reset at 50 %": {DATA: [("ends", "reset", 0.5), ("range_refused",)]},
    "flipped byte in the data": {DATA: [("flipped", 250_000_000)]},
    "flipped byte in the data, always": {DATA: [("flipped", 250_000_000)] * 99},
    "flipped byte in the index": {INDEX: [("flipped", 2000)]},
    "flipped byte in the index, always": {INDEX: [("flipped", 2000)] * 99},
    "chunked, without Content-Length": {DATA: [("chunked",)]},
    "redirect loop": {DATA: [("redirect",)] * 99},
}


def write_model(directory: Path) -> None:
    """Write the seven files of 124M's shapes: TensorFlow its own, the rest as OpenAI has it."""
    hparams = OPENAI_SIZES["124M"]
    directory.mkdir(parents=True, exist_ok=True)
    import tensorflow as tf

    v1 = tf.compat.v1
    with v1.Graph().as_default(), v1.Session() as session:
        for i, (name, shape) in enumerate(parameter_shapes(hparams).items()):
            stored = (1, *shape) if name.endswith("/w") else shape  # as OpenAI's kernels are
            value = 0.05 * tf.random.stateless_normal(stored, (i, 1))
            v1.Variable(value + 1 if name.endswith("/g") else value, name=name, use_resource=False)
        session.run(v1.global_variables_initializer())
        v1.train.Saver(save_relative_paths=True).save(session, str(directory / "model.ckpt"))
    directory.joinpath("hparams.json").write_text(json.dumps(hparams))
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(ROOT / "picogpt" / "vocabulary" / name, directory)


def start(url: str, models: Path, *before: str, module: str = "picogpt") -> subprocess.Popen:
    """Start the command line, or `picogpt.download` alone."""
    command = [PROMPT, "--model_size", "124M", "--n_tokens_to_generate", "4"]
    command = ["124M"] if module == "picogpt.download" else command
    return subprocess.Popen(
        [*before, sys.executable, "-m", module, *command, "--models_dir", str(models)],
        cwd=ROOT,
        env={**os.environ, "PICOGPT_BASE_URL": url, "NO_PROXY": "*"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, int]:
    """What the user saw on standard error, shortened, and the exit status."""
    lines = process.communicate()[1].splitlines()
    usual = r"picogpt: [\d.]+ .?B from http|.* tokens per second"  # how it begins, and ends, if all is well
    lines = [line.removeprefix("picogpt: ") for line in lines if line and not re.match(usual, line)]
    if len(lines) > 3:
        lines[1:-1] = [f"... ({len(lines) - 2} more lines)"]
    text = "<br>".join(lines).replace("|", "\\|").replace(DATA, "*data*")
    text = re.sub(r"http://[\w.:-]+(/124M)?", "URL", text)
    return re.sub(r"/\S*/124M\b", "DIR", text), process.returncode


def on_disk(models: Path) -> str:
    """The model directory's files with their sizes."""
    sizes = {path.name: path.stat().st_size for path in sorted(models.glob("124M/*"))}
    if set(sizes) == set(FILES):
        return "the seven files"
    return ", ".join(f"{name.replace('model.ckpt', '*')} {size(n)}" for name, n in sizes.items()) or "nothing"


def size(n: float) -> str:
    return f"{n / 1e6:.0f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB" if n >= 1e3 else f"{n:.0f} B"


def fetched(log: list[Request]) -> str:
    return size(sum(request.sent for request in log))


def row(root: Path, fault: str, seen: tuple[str, int], log: list[Request], models: Path) -> None:
    """Print a line of the table, after the next run, which must leave all files byte for byte equal."""
    disk, before = on_disk(models), fetched(log)
    with serving(root) as (url, next_log):
        saw, status = finish(start(url, models))
    pairs = [(models / "124M" / name, root / "124M" / name) for name in FILES]
    if status:
        ended = f"**{saw} ({status})**"
    else:
        equal = all(filecmp.cmp(*pair, shallow=False) for pair in pairs)
        ended = "completed, files equal" if equal else "**completed, but the files differ**"
    ranges = [request.range for request in next_log if request.range]
    ended += f"; fetched {fetched(next_log)}{' from ' + ranges[0] if ranges else ''}"
    print(f"| {fault} | {seen[0]} | {seen[1]} | {before} | {disk} | {ended} |", flush=True)


def wait_for(log: list[Request], n: int) -> None:
    """Wait until n bytes of the weights have been sent."""
    while sum(request.sent for request in log if request.path.endswith(DATA)) < n:
        time.sleep(0.01)


def bad_server(fault: str, root: Path, models: Path) -> None:
    with serving(root, {name: list(faults) for name, faults in FAULTS[fault].items()}) as (url, log):
        seen = finish(start(url, models))
    row(root, fault, seen, log, models)


def interrupted(number: signal.Signals, times: int, root: Path, models: Path) -> None:
    """Send the signal after a third of the weights, and again after the next third."""
    log: list[Request] = []
    for _ in range(times):
        with serving(root, speed=150e6) as (url, new_log):
            process = start(url, models)
            wait_for(new_log, 166_000_000)
            process.send_signal(number)
            seen = finish(process)
            log += new_log
    row(root, f"{number.name} after a third{', twice' * (times > 1)}", seen, log, models)


def two_processes(root: Path, models: Path) -> None:
    with serving(root, speed=250e6) as (url, log):
        processes = [start(url, models), start(url, models)]
        seen = [finish(process) for process in processes]
    saw = "<br>".join(f"{name}: {text}" for name, (text, _) in zip(("first", "second"), seen, strict=True))
    row(root, "two processes", (saw, max(status for _, status in seen)), log, models)


def no_server(root: Path, models: Path) -> None:
    row(root, "nobody listens", finish(start(f"http://127.0.0.1:{unused_port()}", models)), [], models)
    models = models.with_name("unknown")
    row(root, "unknown host", finish(start("http://no-such-host.invalid", models)), [], models)


def read_only(root: Path, models: Path) -> None:
    """A models directory of root's, and a user who is not root; then the directory is given to that user."""
    if os.getuid():
        return print("| read-only directory | skipped: needs root, to be somebody else | | | | |")
    models.mkdir()
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    with serving(root) as (url, log):
        seen = finish(start(url, models, *nobody))
    row(root, "read-only directory", seen, log, models)


@contextmanager
def tmpfs(directory: Path, megabytes: int) -> Iterator[None]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def disk_full(root: Path, models: Path) -> None:
    """A disk that is too small from the start, and one that another program fills; then there is room."""
    try:
        with tmpfs(models, 300):
            with serving(root) as (url, log):
                seen = finish(start(url, models))
            subprocess.run(["mount", "-o", "remount,size=700m", models], check=True)
            row(root, "disk too small (tmpfs of 300 MB)", seen, log, models)
        with tmpfs(models.with_name("filling"), 600):
            models = models.with_name("filling")
            with serving(root, speed=150e6) as (url, log):
                process = start(url, models)
                wait_for(log, 100_000_000)
                with suppress(OSError):
                    models.joinpath("other").write_bytes(bytes(600 << 20))
                seen = finish(process)
            models.joinpath("other").unlink()
            row(root, "disk filled by another on the way", seen, log, models)
    except subprocess.CalledProcessError:
        print("| disk full | skipped: a tmpfs cannot be mounted here (needs root) | | | | |")


def timings(root: Path, folder: Path, rounds: int, speed: float) -> None:
    """The whole flow beside curl, interleaved: medians of the seconds, and their ratio to curl's."""
    with serving(root, speed=speed) as (url, _):
        urls = " ".join(f"{url}/124M/{name}" for name in FILES)
        curl = f"curl -s --create-dirs --remote-name-all --output-dir TO {urls}"
        ways: dict[str, Callable[[Path], subprocess.Popen]] = {
            "curl": lambda to: subprocess.Popen(curl.replace("TO", str(to)), shell=True),
            "curl, then sync": lambda to: subprocess.Popen(
                (curl + " && sync TO/*").replace("TO", str(to)), shell=True
            ),
            "picogpt.download": lambda to: start(url, to, module="picogpt.download"),
            "picogpt, until it has written 4 tokens": lambda to: start(url, to),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, begin in ways.items():
                os.sync()
                with tempfile.TemporaryDirectory(dir=folder) as to:
                    begun = time.perf_counter()
                    process = begin(Path(to))
                    process.communicate()
                    seconds[way].append(time.perf_counter() - begun)
                    assert process.returncode == 0, way
    print(f"\n{f'at most {speed / 1e6:.0f} MB/s' if speed else 'unthrottled'}, {rounds} rounds, interleaved\n")
    print("| | median, s | each | beside curl |\n|---|---|---|---|")
    for way, values in seconds.items():
        each, median = " ".join(f"{value:.2f}" for value in values), statistics.median(values)
        print(
            f"| {way} | {median:.2f} | {each} | {median / statistics.median(seconds['curl']):.2f} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the model to be served is, or will be kept")
    parser.add_argument("--only", default="", help="only the rows with this word; `timing` is one")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        scratch.chmod(0o755)  # so that another user gets as far as the read-only directory
        root = given.folder or scratch / "served"
        if not (root / "124M" / "vocab.bpe").exists():  # which is written last
            write_model(root / "124M")
        print("| fault | what the user saw | exit | fetched | then on disk | the next run |")
        print("|---|---|---|---|---|---|", flush=True)
        shows: dict[str, Callable[[Path, Path], None]] = {
            **{fault: partial(bad_server, fault) for fault in FAULTS},
            "two processes": two_processes,
            "SIGINT": partial(interrupted, signal.SIGINT, 1),
            "SIGKILL": partial(interrupted, signal.SIGKILL, 2),
            "no server": no_server,
            "read-only": read_only,
            "disk full": disk_full,
        }
        for fault, show in shows.items():
            if given.only in fault:
                with tempfile.TemporaryDirectory(dir=scratch) as directory:
                    Path(directory).chmod(0o755)
                    show(root, Path(directory, "models"))
        if given.only in "timing":
            timings(root, scratch, given.rounds, speed=0)
            timings(root, scratch, given.rounds, speed=100e6)


if __name__ == "__main__":
    main()
