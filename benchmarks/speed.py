"""How fast picogpt is beside transformers + torch, in one interleaved run: `make bench`.

Both load one Hugging Face directory, random weights in GPT-2 124M's shapes, float32, and must choose the
same ids. Each entrant is a process that stays alive and is told over a pipe what to time, so that they take
turns: what the machine's clock and memory do from minute to minute happens to both. A ratio is taken within
a round; the table has medians, and the ratios' extremes. Every process starts without OPENBLAS_CORETYPE and
OPENBLAS_L2_SIZE, which slow NumPy down where they do not fit the processor, and says which kernel it uses.

picogpt does what a user's program does: `picogpt.stream` and `python -m picogpt`. torch runs in two ways,
`model.generate` and a bare loop over `model(...)`, both with sdpa and KV cache: the faster one counts.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median
from subprocess import DEVNULL, PIPE
from time import perf_counter, sleep
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SETTLE = 0.3  # seconds in which the threads of the last entrant cease to spin in wait of more work
# An installed program has its bytecode: without it, the time to start would measure Python's compiler.
REMOVED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE")

Timed = tuple[list[int], list[float]]  # new ids, and when each of them came
Measured = dict[tuple[str, int], dict[str, list[float]]]  # what, threads -> way -> a number for each round
WAYS = {"picogpt": ["stream"], "torch": ["loop", "generate"]}
CASES = {  # tokens of prompt, new tokens: timed is up to the first if it is alone, else from first to last
    "prefill of 128 tokens, tokens/s": (128, 1),
    "prefill of 512 tokens, tokens/s": (512, 1),
    "prefill of 1000 tokens, tokens/s": (1000, 1),
    "decode after 16 tokens, tokens/s": (16, 33),
    "decode after 880 tokens, tokens/s": (880, 33),
}
START, PEAK = "process start to first token, s", "its peak memory, MB"
PREFILL_GOALS, DECODE_GOALS = ["", "1.5 x", "1.5 x"], {1: ["1.5 x"] * 2, 2: ["2.3 x"] * 2}  # by threads

# 16 tokens
PROMPT = "Alan Turing theorized that computers would one day become the most powerful machines on Earth"
TORCH_START = """
import sys, torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer
directory, prompt, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
tokenizer = GPT2Tokenizer.from_pretrained(directory)
model = GPT2LMHeadModel.from_pretrained(directory, attn_implementation="sdpa")
with torch.inference_mode():
    logits = model(**tokenizer(prompt, return_tensors="pt"), logits_to_keep=1).logits
print(tokenizer.decode(logits[0, -1].argmax().item()), flush=True)
"""
WRITE = """
import sys, torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
directory, quick = sys.argv[1:]
torch.manual_seed(0)
# Wider than GPT-2's 0.02, with which a random model repeats itself whatever its mathematics.
shapes = dict(initializer_range=0.06)
if quick == "True":
    shapes = dict(n_embd=64, n_layer=2, n_head=4, initializer_range=0.2)
GPT2LMHeadModel(GPT2Config(**shapes)).save_pretrained(directory)
GPT2Tokenizer.from_pretrained(directory).save_pretrained(directory)
"""
IMPORT = """
from time import perf_counter as now
import numpy, regex
start = now()
import picogpt
package = now()
picogpt.generate
generate = now()
[getattr(picogpt, name) for name in picogpt.__all__]
print(package - start, generate - start, now() - start)
"""
N_IMPORTS = 21


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is measured (7)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds: does it work?")
    parser.add_argument("--model_dir", type=Path, help="a GPT-2 in Hugging Face's layout, not random weights")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.model_dir, options.threads)
        return 0
    missing = [
        name for name in ("torch", "transformers", "threadpoolctl") if not importlib.util.find_spec(name)
    ]
    if missing:
        print(f"the benchmark needs more: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    if options.model_dir and not (options.model_dir / "config.json").exists():
        print(
            f"{options.model_dir} has no config.json: give a directory in Hugging Face's layout",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the half gigabyte goes then, too
    with tempfile.TemporaryDirectory(prefix="picogpt-speed-") as temporary:
        if not options.model_dir:
            write_model(Path(temporary), options.quick)
        model_dir = (options.model_dir or Path(temporary)).resolve()
        return compare(model_dir, 2 if options.quick else options.rounds)


def write_model(directory: Path, quick: bool) -> None:
    """Write a GPT-2 with random weights as transformers' `save_pretrained` does, with GPT-2's vocabulary.

    In a process of its own: a child's peak memory counts from its parent's, so this one must stay small."""
    for ours, theirs in {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}.items():
        shutil.copy(ROOT / "picogpt" / "vocabulary" / ours, directory / theirs)
    subprocess.run([sys.executable, "-c", WRITE, directory, str(quick)], env=environment(1), check=True)


def environment(threads: int) -> dict[str, str]:
    """What every entrant's process finds: its threads, this checkout, and no network to wait for."""
    kept = {name: value for name, value in os.environ.items() if name not in REMOVED}
    libraries = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    counts = dict.fromkeys(libraries, str(threads))
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return kept | counts | quiet | {"PYTHONPATH": str(ROOT)}


def work(entrant: str, model_dir: Path, threads: int) -> None:
    """An entrant's process: say which kernel multiplies, then time what each line of standard input asks."""
    pipe, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    load = {"picogpt": load_picogpt, "torch": load_torch}[entrant]
    ways, kernel = load(model_dir, threads)
    print(json.dumps(kernel), file=pipe, flush=True)
    for line in sys.stdin:
        way, prompt, count = json.loads(line)
        start = perf_counter()
        ids, times = ways[way](prompt, count)
        print(json.dumps([ids, [time - start for time in times]]), file=pipe, flush=True)


def load_picogpt(model_dir: Path, threads: int) -> tuple[dict[str, Callable[..., Timed]], str]:
    """`threads` is said by the environment."""
    from threadpoolctl import threadpool_info

    import picogpt

    _, hparams, params = picogpt.load_encoder_hparams_and_params(str(model_dir))

    def stream(prompt: list[int], count: int) -> Timed:
        ids, times = [], []
        for i in picogpt.stream(prompt, params, hparams["n_head"], count):
            ids.append(int(i))
            times.append(perf_counter())
        return ids, times

    blas: dict[str, Any] = next((info for info in threadpool_info() if info["user_api"] == "blas"), {})
    facts = [blas.get(key) for key in ("internal_api", "version", "architecture", "num_threads")]
    return {"stream": stream}, "{} {}, kernel {}, {} thread(s)".format(*facts)


def load_torch(model_dir: Path, threads: int) -> tuple[dict[str, Callable[..., Timed]], str]:
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(threads)
    model: Any = GPT2LMHeadModel.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None  # nobody stops early

    @torch.inference_mode()
    def loop(prompt: list[int], count: int) -> Timed:
        ids, times, cache, inputs = [], [], None, torch.tensor([prompt])
        for _ in range(count):
            output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, inputs = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            ids.append(int(inputs))
            times.append(perf_counter())
        return ids, times

    @torch.inference_mode()
    def generate(prompt: list[int], count: int) -> Timed:
        watch, inputs = Stopwatch(), torch.tensor([prompt])
        mask = torch.ones_like(inputs)
        model.generate(inputs, attention_mask=mask, max_new_tokens=count, do_sample=False, streamer=watch)
        return watch.ids[1:], watch.times[1:]

    blas = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    kernel = f"{blas}, kernel {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    return {"loop": loop, "generate": generate}, kernel


class Stopwatch:
    """A streamer for transformers, which gives it the prompt, then each id as it is chosen."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []

    def put(self, ids: Any) -> None:
        self.ids.append(int(ids.flatten()[-1]))
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


class Worker:
    """A handle on an entrant's process."""

    def __init__(self, stack: ExitStack, entrant: str, model_dir: Path, threads: int):
        options = ["--worker", entrant, "--threads", str(threads), "--model_dir", str(model_dir)]
        command, env = [sys.executable, __file__, *options], environment(threads)
        process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=env)
        self.process = stack.enter_context(process)
        self.kernel = self._answer()

    def run(self, way: str, prompt: list[int], count: int) -> Any:
        sleep(SETTLE)
        print(json.dumps([way, prompt, count]), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit("an entrant's process has ended: see its last words above")
        return json.loads(line)


def first_token(entrant: str, model_dir: Path, threads: int) -> tuple[float, float, str]:
    """Let a new process continue PROMPT by one token: what `run` returns."""
    ours = ["-m", "picogpt", PROMPT, "--model_size", str(model_dir), "--n_tokens_to_generate", "1"]
    theirs = ["-c", TORCH_START, str(model_dir), PROMPT, str(threads)]
    return run([sys.executable, *{"picogpt": ours, "torch": theirs}[entrant]], environment(threads))


def run(command: list[str], env: dict[str, str]) -> tuple[float, float, str]:
    """Run a new process: seconds to its first byte, peak memory in MB, what it wrote."""
    sleep(SETTLE)
    with tempfile.TemporaryFile() as errors:
        start = perf_counter()
        child = subprocess.Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=errors, bufsize=0, env=env)
        assert child.stdout is not None
        text = child.stdout.read(1)
        seconds = perf_counter() - start
        text += child.stdout.read()
        child.stdout.close()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode or not text:
            errors.seek(0)
            raise SystemExit(f"{command[0]} has failed: {errors.read().decode()}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return seconds, peak / 1e6, text.decode(errors="replace").strip()


def compare(model_dir: Path, rounds: int) -> int:
    """Measure, print, and return 0 if all have chosen the same ids."""
    load = os.getloadavg()[0]
    thread_counts = [n for n in DECODE_GOALS if n <= (os.cpu_count() or 1)]
    with ExitStack() as stack:
        workers = {(e, n): Worker(stack, e, model_dir, n) for n in thread_counts for e in WAYS}
        measured, answers = measure(workers, model_dir, rounds)
    weights = sum(path.stat().st_size for path in model_dir.glob("*.safetensors")) / 1e6
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "torch", "transformers"))
    print(f"\n{processor()}, {os.cpu_count()} cores, load {load:.1f} at the start.")
    print(f"Python {platform.python_version()}, {versions}. Weights {weights:.1f} MB; {rounds} rounds.\n")
    for (entrant, threads), worker in workers.items():
        print(f"- {entrant} at {threads}: {worker.kernel}")
    print("\n| | threads | picogpt | transformers + torch | ratio, least to most | goal for 124M |")
    print("|---|---|---|---|---|---|")
    for threads in thread_counts:
        goals = [*PREFILL_GOALS, *DECODE_GOALS[threads], "< 0.4", f"<= {weights + 150:.0f}"]
        for name, goal in zip([*CASES, START, PEAK], goals, strict=True):
            print(f"| {name} | {threads} | {cells(measured[name, threads], name in CASES)} | {goal} |")
    print_import_times()
    differing = [name for name, given in answers.items() if len(given) > 1]
    print(f"Greedy ids: {'DIFFERENT: ' + '; '.join(differing) if differing else 'the same in every run'}.")
    return 1 if differing else 0


def measure(
    workers: dict[tuple[str, int], Worker], model_dir: Path, rounds: int
) -> tuple[Measured, dict[str, set[Any]]]:
    """Round by round, each case by each way in turn: the numbers, and the different answers to each case."""
    n_vocab = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    prompts = {n: random.Random(n).choices(range(n_vocab), k=n) for n, _ in CASES.values()}
    measured: Measured = defaultdict(lambda: defaultdict(list))
    answers: dict[str, set[Any]] = defaultdict(set)
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}" if number else "warm-up", file=sys.stderr)
        if number == 1:
            measured.clear()
        for name, (n_prompt, count) in CASES.items():
            for (entrant, threads), worker in workers.items():
                for way in WAYS[entrant]:
                    ids, times = worker.run(way, prompts[n_prompt], count)
                    speed = n_prompt / times[0] if count == 1 else (count - 1) / (times[-1] - times[0])
                    measured[name, threads][way].append(speed)
                    answers[name].add(tuple(ids))
        for entrant, threads in workers:
            seconds, peak, text = first_token(entrant, model_dir, threads)
            measured[START, threads][WAYS[entrant][0]].append(seconds)
            measured[PEAK, threads][WAYS[entrant][0]].append(peak)
            answers[START].add(text)
    return measured, answers


def cells(values: dict[str, list[float]], more_is_better: bool) -> str:
    """A row's figures: ours, theirs by the faster way, and how many times better we are."""
    ours, theirs = values["stream"], {way: times for way, times in values.items() if way != "stream"}
    best = (max if more_is_better else min)(theirs, key=lambda way: median(theirs[way]))
    pairs = zip(ours, theirs[best], strict=True)
    ratios = [us / them if more_is_better else them / us for us, them in pairs]
    by = f" ({best})" if len(theirs) > 1 else ""
    spread = f"{median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
    return f"{median(ours):.4g} | {median(theirs[best]):.4g}{by} | {spread}"


def print_import_times() -> None:
    command, env = [sys.executable, "-c", IMPORT], environment(1)
    outputs = [subprocess.check_output(command, env=env, text=True) for _ in range(N_IMPORTS + 1)]
    columns = zip(*([1000 * float(t) for t in output.split()] for output in outputs[1:]), strict=True)
    costs = [f"{median(column):.1f} ({min(column):.1f} to {max(column):.1f})" for column in columns]
    print(f"\nAfter NumPy and regex, `import picogpt` takes {costs[0]} ms, with `picogpt.generate` {costs[1]},")
    print(f"with every public name {costs[2]}: medians of {N_IMPORTS} new processes; goal <= 30.\n")


def processor() -> str:
    """The processor's name, which `platform` does not know on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
