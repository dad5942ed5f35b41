"""What one installs, reads and waits for: picogpt beside picoGPT, transformers + torch, and llama.cpp.

    python benchmarks/peers.py --environments DIR [--rounds 5]

Random weights in GPT-2 124M's shapes, float32, are written in each program's own format; all must choose the
same ids, at two threads. The programs take turns, in new processes; the table has medians, least and most.
DIR holds a virtual environment for each, with nothing else in it; one that is missing is left out, by name:

    DIR/picogpt       pip install .
    DIR/jaymody       Python 3.10; pip install -r requirements.txt of https://github.com/jaymody/picoGPT, whose
                      checkout is DIR/jaymody/source, with tensorflow-cpu instead of tensorflow
    DIR/transformers  pip install torch (its build for CPUs, without GPU libraries), then transformers
    DIR/llama.cpp     pip install llama-cpp-python
    DIR/weights       pip install . gguf safetensors; it writes the models and is not measured

llama.cpp gets a KV cache in float32, not in float16, its default. picoGPT has no cache, and its mask, float64,
makes float64 of all that follows: it is given fewer tokens to write.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

from speed import PROMPT, ROOT, TORCH_START, Timed, environment, load_picogpt, load_torch, processor, run

THREADS = 2
SIZES = ["--n_tokens_to_generate", "1", "--model_size", "124M", "--models_dir", "."]
LLAMA_START = f"""
import sys
from llama_cpp import Llama
path, prompt = sys.argv[1:]
threads = dict(n_threads={THREADS}, n_threads_batch={THREADS})
model = Llama(path, n_ctx=1024, **threads, type_k=0, type_v=0, verbose=False)
print(model(prompt, max_tokens=1, temperature=0)["choices"][0]["text"], flush=True)
"""
STARTS = {  # to see the first token: the program's own command line, or the shortest script
    "picogpt": ["-m", "picogpt", PROMPT, *SIZES],
    "jaymody": ["{home}/source/gpt2.py", PROMPT, *SIZES],
    "transformers": ["-c", TORCH_START, "hugging_face", PROMPT, str(THREADS)],
    "llama.cpp": ["-c", LLAMA_START, "model.gguf", PROMPT],
}
PACKAGES, DISK = "packages installed", "on disk, MB"
START, PEAK = "process start to first token, s", "its peak memory, MB"
CASES = {  # tokens of prompt, new tokens: timed is up to the first if it is alone, else from first to last
    "decode after 16 tokens, tokens/s": (16, 33),
    "prefill of 512 tokens, tokens/s": (512, 1),
}
SLOW = 5  # new tokens at most for picoGPT
# What pip has written, its bytecode included; not what a virtual environment is born with.
INSTALLED = """
import re
from importlib.metadata import distributions
found = {d.metadata["Name"].lower(): d for d in distributions()}
needs = [r.lower() for d in found.values() for r in d.requires or () if "extra ==" not in r]
born = {"pip", "setuptools"} - {re.match("[a-z0-9._-]+", r)[0] for r in needs}
files = {f.locate().resolve() for name in found.keys() - born for f in found[name].files or ()}
print(len(found.keys() - born), round(sum(f.stat().st_size for f in files if f.exists()) / 1e6))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--environments", type=Path, required=True, help="where the virtual environments are")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (5)")
    parser.add_argument("--worker", choices=[*STARTS, "weights"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.environments / options.worker)
    homes = [options.environments.absolute() / name for name in [*STARTS, "weights"]]
    missing = [home for home in homes if not (home / "bin" / "python").exists()]
    for home in missing:
        print(f"left out: {home.name}, for there is no {home / 'bin' / 'python'}", file=sys.stderr)
    if homes[0] in missing or homes[-1] in missing:
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the 1.5 GB go then, too
    with tempfile.TemporaryDirectory(prefix="picogpt-peers-") as models:
        os.chdir(models)
        run(worker(homes[-1]), wishes())
        return compare([home for home in homes[:-1] if home not in missing], options.rounds)


def worker(home: Path) -> list[str]:
    """What starts this file in a program's own environment."""
    options = ["--environments", str(home.parent), "--worker", home.name]
    return [str(home / "bin" / "python"), __file__, *options]


def wishes() -> dict[str, str]:
    """The environment that all have: THREADS, and no other wish of a BLAS."""
    return {n: v for n, v in environment(THREADS).items() if not re.match("OPENBLAS_(?!NUM_THREADS)", n)}


def write_models() -> int:
    """Write one model as OpenAI, transformers and llama.cpp's converter would, with GPT-2's vocabulary."""
    import gguf
    from safetensors.numpy import save_file
    from sizes import write_checkpoint

    from picogpt.hugging_face import hugging_face_name
    from picogpt.model_dirs import OPENAI_SIZES
    from picogpt.tensor_bundle import read_bundle

    openai, hugging_face, hparams = Path("124M"), Path("hugging_face"), OPENAI_SIZES["124M"]
    openai.mkdir()
    hugging_face.mkdir()
    write_checkpoint(openai, hparams)
    for ours, theirs in {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}.items():
        for copy in (openai / ours, hugging_face / theirs):
            shutil.copy(ROOT / "picogpt" / "vocabulary" / ours, copy)

    bundle = read_bundle(openai / "model.ckpt").items()
    tensors = {f"transformer.{hugging_face_name(name)}": array.squeeze() for name, array in bundle}
    save_file(tensors, hugging_face / "model.safetensors", metadata={"format": "pt"})
    (hugging_face / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')

    writer = gguf.GGUFWriter("model.gguf", "gpt2")
    writer.add_block_count(hparams["n_layer"])
    writer.add_context_length(hparams["n_ctx"])
    writer.add_embedding_length(hparams["n_embd"])
    writer.add_feed_forward_length(4 * hparams["n_embd"])
    writer.add_head_count(hparams["n_head"])
    writer.add_layer_norm_eps(1e-5)
    ids = json.loads((openai / "encoder.json").read_text(encoding="utf-8"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(ids, key=ids.__getitem__))
    writer.add_token_merges((openai / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:])
    writer.add_eos_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, hparams["n_layer"])
    for name, array in tensors.items():
        is_linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))  # stored [out, in] there
        name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, array.T.copy() if is_linear else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print("written")
    return 0


def work(home: Path) -> int:
    """A program's process: load, then print for each case and way the ids and the speed of a second run."""
    if home.name == "weights":
        return write_models()
    pipe, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    ways, about = {
        "picogpt": lambda: load_picogpt(Path("124M"), THREADS),
        "jaymody": lambda: load_jaymody(home / "source"),
        "transformers": lambda: load_torch(Path("hugging_face"), THREADS),
        "llama.cpp": load_llama,
    }[home.name]()
    answers = []
    for what, (n_prompt, count) in CASES.items():
        prompt = Random(n_prompt).choices(range(50257), k=n_prompt)
        count = min(count, SLOW) if home.name == "jaymody" else count
        for way, generate in ways.items():
            generate(prompt, min(count, SLOW))
            start = perf_counter()
            ids, times = generate(prompt, count)
            seconds = times[0] - start if count == 1 else (times[-1] - times[0]) / (count - 1)
            answers.append((what, way, ids, (n_prompt if count == 1 else 1) / seconds))
    print(json.dumps([about, answers]), file=pipe)
    return 0


def load_jaymody(source: Path) -> tuple[dict[str, Callable[..., Timed]], str]:
    sys.path.insert(0, str(source))
    import gpt2
    import numpy as np
    import utils

    _, hparams, params = utils.load_encoder_hparams_and_params("124M", ".")

    def generate(prompt: list[int], count: int) -> Timed:
        ids: list[int] = []
        times = []
        for _ in range(count):  # token by token, to have their times; its own loop remembers nothing, either
            ids.append(int(gpt2.generate([*prompt, *ids], params, hparams["n_head"], 1)[0]))
            times.append(perf_counter())
        return ids, times

    return {"generate": generate}, f"NumPy {np.__version__}"


def load_llama() -> tuple[dict[str, Callable[..., Timed]], str]:
    import llama_cpp

    threads = {"n_threads": THREADS, "n_threads_batch": THREADS}
    model = llama_cpp.Llama("model.gguf", n_ctx=1024, **threads, type_k=0, type_v=0, verbose=False)

    def generate(prompt: list[int], count: int) -> Timed:
        model.reset()  # or it would remember the last prompt
        timed = ((i, perf_counter()) for i in model.generate(prompt, temp=0))
        ids, times = zip(*(next(timed) for _ in range(count)), strict=True)
        return list(ids), list(times)

    features = re.findall(r"(\w+) = 1", llama_cpp.llama_print_system_info().decode())
    return {"generate": generate}, f"llama-cpp-python {llama_cpp.__version__}, {' '.join(features)}"


def compare(homes: list[Path], rounds: int) -> int:
    """Measure, print, and return 0 if all have chosen the same ids."""
    load, names = os.getloadavg()[0], [home.name for home in homes]
    measured: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    expected: dict[str, list[Any]] = {}
    kernels, differing = {}, set()
    for number in range(rounds):
        for name, home in zip(names, homes, strict=True):
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            start = [text.format(home=home) for text in STARTS[name]]
            seconds, peak, text = run([str(home / "bin" / "python"), *start], wishes())
            kernels[name], answers = json.loads(run(worker(home), wishes())[2])
            measured[PEAK, name][""].append(peak)
            for what, way, ids, figure in [*answers, (START, "", [text], seconds)]:
                measured[what, name][way].append(figure)
                if expected.setdefault(what, ids)[: len(ids)] != ids:
                    differing.add(f"{name}, {what}")
    print(f"\n{processor()}, {os.cpu_count()} cores, load {load:.1f} at the start; {rounds} rounds.\n")
    rows = {"": names, "---": ["---" for _ in names]}
    installs = [run([str(home / "bin" / "python"), "-c", INSTALLED], wishes())[2] for home in homes]
    rows[PACKAGES], rows[DISK] = map(list, zip(*map(str.split, installs), strict=True))
    for what in [START, PEAK, *CASES]:
        rows[what] = [cell(measured[what, name], what in CASES) for name in names]
    print("\n".join(f"| {what} | {' | '.join(row)} |" for what, row in rows.items()), end="\n\n")
    for name in names:
        print(f"- {name}: {kernels[name]}")
    unlike = f"DIFFERENT: {'; '.join(sorted(differing))}" if differing else "the same in every run"
    print(f"- greedy ids: {unlike}")
    return 1 if differing else 0


def cell(values: dict[str, list[float]], more_is_better: bool) -> str:
    """The median by the faster way, and the extremes."""
    best = (max if more_is_better else min)(values.values(), key=median)
    middle, least, most = (f"{float(f'{x:.3g}'):g}" for x in (median(best), min(best), max(best)))
    return f"{middle} ({least} to {most})"


if __name__ == "__main__":
    sys.exit(main())
