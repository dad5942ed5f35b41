"""docs/implementing-gpt2.md: what it shows is what the program computes, and its Python runs.

Tables and numbers of the page are rendered here. `python tests/test_docs.py` writes them anew into the page.
"""

import functools
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from picogpt import get_encoder
from picogpt.checkpoint import parameter_shapes
from picogpt.encoder import PATTERN, bytes_to_unicode
from picogpt.formula import HPARAMS, WEIGHTS, formula_encoder, formula_params
from picogpt.generation import generate
from picogpt.hugging_face import hugging_face_name
from picogpt.mistakes import CATALOGUE
from picogpt.names import AFTER, BEFORE, BLOCK
from picogpt.noise import noise_bands
from picogpt.sampling import draw, probabilities
from picogpt.trace import run_with_trace, tree_map, with_outs

CHECKOUT = Path(__file__).parents[1]
DOCS = CHECKOUT / "docs"
PATH = DOCS / "implementing-gpt2.md"
PAGE = PATH.read_text(encoding="utf-8")

TEXT = "To be or not to be"
PIECES = ("Hello  world's", "it's 'tis", "2nd½ of the3", "a\n b\t\tc \n\n d  ", "don't DON'T !?'s")
MERGED = "Hello  world's tést"
MEANING = {  # of the parameters that are not vectors, what they do
    "wte": "embedding of each token, and the output matrix",
    "wpe": "embedding of each position",
    "ln_1/g": "gain before attention",
    "ln_1/b": "bias before attention",
    "attn/c_attn/w": "x to q, k, v, side by side",
    "attn/c_attn/b": "",
    "attn/c_proj/w": "merged heads to what is added to the stream",
    "attn/c_proj/b": "",
    "ln_2/g": "gain before the MLP",
    "ln_2/b": "bias before the MLP",
    "mlp/c_fc/w": "fourfold width",
    "mlp/c_fc/b": "",
    "mlp/c_proj/w": "and back",
    "mlp/c_proj/b": "",
    "ln_f/g": "gain after the last block",
    "ln_f/b": "bias after the last block",
}


@functools.cache
def truth():
    """The ids of the page's example and its float64 trace."""
    params = tree_map(lambda w: w.astype(np.float64), formula_params()[1])
    ids = formula_encoder().encode(TEXT)
    trace = run_with_trace(ids, params, HPARAMS["n_head"])[1]
    return ids, with_outs(trace, params)


def table(*rows):
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


def weights():
    def row(number, name):
        kind = name.removeprefix("model/").removeprefix("h0/")
        shape = ", ".join(map(str, parameter_shapes(HPARAMS)[name]))
        base, scale = (str(Fraction(x)) for x in WEIGHTS[kind])
        return str(number), f"`{hugging_face_name(name)}`", f"[{shape}]", base, scale

    rows = [row(number, name) for number, name in enumerate(parameter_shapes(HPARAMS)) if "/h1/" not in name]
    first = ", ".join(str(float(x)) for x in formula_params()[1]["wte"][0, :3])
    return table(("t", "tensor", "shape", "base", "scale"), *rows) + f"\n\n`wte` begins with {first}."


def parameters():
    sizes = {"n_vocab": 10007, "n_ctx": 1009, "n_embd": 101, "n_head": 1, "n_layer": 1}  # told apart
    letters = {10007: "n_vocab", 1009: "n_ctx", 101: "n_embd", 303: "3*n_embd", 404: "4*n_embd"}
    rows = []
    for name, shape in parameter_shapes(sizes).items():
        kind = name.removeprefix("model/").removeprefix("h0/")
        ours = hugging_face_name(name).replace("h.0.", "h.{i}.")
        theirs = name.replace("/h0/", "/h{i}/")
        rows.append((f"`{ours}`", f"`{theirs}`", f"[{', '.join(letters[n] for n in shape)}]", MEANING[kind]))
    return table(("safetensors", "OpenAI's checkpoint", "shape", "what it does"), *rows)


def pieces():
    def shown(text):
        return "`" + repr(text)[1:-1].replace(r"\'", "'").replace(" ", "·") + "`"

    return table(
        ("text", "pieces"),
        *((shown(text), " ".join(map(shown, PATTERN.findall(text)))) for text in PIECES),
    )


def merges():
    blocks = []
    for piece in get_encoder().explain(MERGED):
        row = dict(enumerate(piece.symbols))
        lines = [f"{piece.text!r:<12} {' '.join(piece.symbols)}"]
        for rank, start, left, right in piece.merges:
            del row[start + len(left)]
            row[start] = left + right
            lines.append(f"  rank {rank:<6} {' '.join(row[i] for i in sorted(row))}")
        lines.append(f"  ids         {' '.join(map(str, piece.ids))}")
        blocks.append("\n".join(lines))
    return "```\n" + "\n".join(blocks) + "\n```"


def likeliest():
    ids, trace = truth()
    logits = trace["logits"][-1]
    best = np.argsort(-logits)[:3]
    params = formula_params()[1]
    new = generate(ids, params, HPARAMS["n_head"], 8)
    said = ", ".join(f"{i} ({logits[i]:.6f})" for i in best)
    greedy = " ".join(map(str, new))
    return f"The largest logits of the last row are those of {said}. The first greedy ids are {greedy}."


def names():
    def code(words):
        return " ".join(f"`{word}`" for word in words.split())

    def row(name, prefix=""):
        theirs = code(name.hugging_face), code(name.llm_c)
        return f"`{prefix}{name.hook}`", f"[{name.shape}]", name.meaning, *theirs

    rows = [*map(row, BEFORE), *(row(name, "blocks.{i}.") for name in BLOCK), *map(row, AFTER)]
    return table(("name", "shape", "meaning", "Hugging Face", "llm.c"), *rows)


def pitfalls():
    """The catalogue of mistakes, what shows in many places last. A cell like the one above it stays empty."""

    def where(entry):
        norms = {site.split(".")[0] for site in entry.sites} >= {"ln1", "ln2", "ln_final"}
        sites = dict.fromkeys(re.sub(r"^ln\w*\.", "LN.", site) if norms else site for site in entry.sites)
        return " ".join(f"`{site}`" for site in sites) if len(sites) < 7 else "in many places"

    entries = sorted(CATALOGUE.values(), key=lambda entry: where(entry) == "in many places")
    numbers_of_heads = [entry for entry in entries if entry.name.startswith("wrong_n_head_")]
    rows = [("where it shows", "right", "wrong", "name", "who makes it, what comes of it")]
    above = "", ""
    for entry in entries:
        wrong, name = entry.wrong, entry.name
        if entry in numbers_of_heads:
            if entry is not numbers_of_heads[0]:
                continue
            wrong, name = "another number", "wrong_n_head_..."
        same = where(entry), entry.right
        shown = same[0] if same != above else "", f"`{same[1]}`" if same[1] != above[1] else ""
        rows.append((*shown, f"`{wrong}`", f"`{name}`", entry.seen))
        above = same
    return table(*rows)


RENDERED = {f.__name__: f for f in (weights, parameters, pieces, merges, likeliest, names, pitfalls)}


def index_of(line):
    """What stands before the numbers: `hook_q[:, 6]` is ("hook_q", (slice(None), 6))."""
    name, index = re.match(r"([\w.]+)\[([\d:, ]+)\]", line).groups()
    parts = index.replace(" ", "").split(",")
    return name, tuple(
        slice(*(int(n) if n else None for n in part.split(":"))) if ":" in part else int(part) for part in parts
    )


def numbers(line):
    """A line such as `blocks.0.attn.hook_q[:, 6]` with the numbers of that part of the trace behind it."""
    name, place = index_of(line)
    found = np.atleast_2d(truth()[1][name][place])
    label = line[: line.index("]") + 1]
    lines = [" ".join(f"{x:9.6f}" if np.isfinite(x) else "     -inf" for x in row) for row in found]
    return "\n".join(f"{head:<38} {row}" for head, row in zip([label] + [""] * len(lines), lines, strict=False))


def rendered(page):
    """The page with every table and number computed anew."""
    for name, function in RENDERED.items():
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, f=function: m[1] + f() + "\n" + m[2],
            page,
            flags=re.DOTALL,
        )

    def block(match):
        lines = [line for line in match[1].splitlines() if not line.startswith(" ")]
        return "```numbers\n" + "\n".join(map(numbers, lines)) + "\n```"

    return re.sub(r"```numbers\n(.*?)\n```", block, page, flags=re.DOTALL)


def python_of_page():
    """What the Python on the page defines."""
    shown = {"math": math, "itertools": itertools, "kind": kind}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, shown)
    return shown


def kind(c):
    for name, pattern in (("letter", r"\p{L}"), ("number", r"\p{N}"), ("space", r"\s")):
        if regex.match(pattern, c):
            return name
    return "rest"


def test_tables_and_numbers_are_the_programs():
    page = rendered(PAGE)
    wrong = [new for old, new in zip(PAGE.splitlines(), page.splitlines(), strict=False) if old != new][:3]
    assert page == PAGE, ("not up to date: run `python tests/test_docs.py`", wrong)
    assert len(re.findall(r"```numbers", PAGE)) >= 7


def test_the_worked_example_is_what_transformers_computes():
    torch_gpt2 = pytest.importorskip("torch_gpt2")
    ids, trace = truth()
    params = formula_params()[1]
    theirs = torch_gpt2.record_transformers(params, HPARAMS["n_head"], ids)
    bands = noise_bands(ids, params, HPARAMS["n_head"], trace)["float32"]
    checked = 0
    for block in re.findall(r"```numbers\n(.*?)\n```", PAGE, re.DOTALL):
        for entry in re.split(r"\n(?! )", block):
            name, place = index_of(entry)
            said = np.array([float(x) for x in entry[entry.index("]") + 1 :].split()])
            found, seen = theirs[name][place].ravel(), np.isfinite(said)
            assert (np.isfinite(found) == seen).all()
            error = np.abs(found[seen] - said[seen]).max()
            assert error < bands[name] + 1e-6, (entry, found)  # six decimals are shown
            checked += 1
    assert checked > 30


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.sampled_from(list("abS12 '\n\t\r.,-é²½\u00a0\u2003\u2019\u0301\x1c\x85tdmslrve")), max_size=30)
)
@example("it's 'S \u2019s 's''ll'LL  'd\n\n x")
def test_pieces_cut_by_hand_are_those_of_the_pattern(text):
    end_of_piece = python_of_page()["end_of_piece"]
    cuts = [0]
    while cuts[-1] < len(text):
        cuts.append(end_of_piece(text, cuts[-1]))
    assert [text[i:j] for i, j in itertools.pairwise(cuts)] == PATTERN.findall(text)


def test_ids_follow_from_the_merges_alone():
    encoder, shown = get_encoder(), python_of_page()
    assert shown["symbol_of_byte"] == {byte: ord(symbol) for byte, symbol in bytes_to_unicode().items()}
    of_bytes = {bytes([byte]): i for i, byte in enumerate(shown["byte_of_id"])}
    assert all(encoder.decode_bytes([i]) == byte for byte, i in of_bytes.items())
    byte_of = {symbol: bytes([byte]) for byte, symbol in bytes_to_unicode().items()}
    id_of = shown["id_of"] = dict(of_bytes)
    for k, pair in enumerate(encoder.bpe_ranks):
        left, right = (b"".join(map(byte_of.__getitem__, half)) for half in pair)
        assert left in id_of and right in id_of, "each half is a byte or what an earlier merge made"
        id_of[left + right] = 256 + k
    assert {encoder.decode_bytes([i]): i for i in range(50256)} == id_of
    assert len(id_of) == encoder.end_of_text == 50256 and max(map(len, id_of)) == 128
    assert list(encoder.bpe_ranks)[1979] == ("#", "#")
    for text in (
        MERGED,
        "<|endoftext|>",
        "🙂",
        "aaaaaaa  hahahaha",
        (DOCS / "reliability.md").read_text("utf-8"),
    ):
        ids = [i for piece in PATTERN.findall(text) for i in shown["tokens"](piece.encode())]
        assert ids == encoder.encode(text)
    assert "`27 91 437 1659 5239 91 29`" in PAGE and encoder.encode("<|endoftext|>") == [
        27,
        91,
        437,
        1659,
        5239,
        91,
        29,
    ]
    assert "8582 and 25081" in PAGE and encoder.encode("🙂") == [8582, 25081]
    assert len(formula_encoder().encode("🙂")) == 4


def test_the_recipe_of_sampling_draws_the_same_ids():
    sample, random = python_of_page()["sample"], np.random.default_rng(1)
    for _ in range(400):
        logits = random.normal(size=random.integers(1, 40)).round(random.integers(0, 4))  # with ties
        temperature, u = random.uniform(0.1, 3), random.random()
        top_k = int(random.choice([0, 1, 3, 50]))
        top_p = float(random.choice([0.01, 0.5, 0.9, 1.0]))
        expected = draw(probabilities(logits, temperature, top_k or None, top_p), u)
        assert sample(list(logits), u, temperature, top_k, top_p) == expected
    crossing = [math.log(p) for p in (0.5, 0.3, 0.2)]
    assert {sample(crossing, u, 1.0, 0, 0.6) for u in (0.0, 0.5, 0.62, 0.63, 0.999)} == {0, 1}


def test_bands_are_about_those_that_are_measured():
    ids, trace = truth()
    bands = noise_bands(ids, formula_params()[1], HPARAMS["n_head"], trace)
    rows = re.findall(r"^\| `([\w.]+)` \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", PAGE, re.MULTILINE)
    assert len(rows) >= 5
    for name, largest, *said in rows:
        assert float(largest) == pytest.approx(np.abs(trace[name]).max(), abs=0.005)
        for kind, band in zip(("float32", "float16", "bfloat16"), said, strict=True):
            assert 1 / 3 < float(band) / bands[kind][name] < 3, (name, kind)


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_every_link_and_anchor_is_there(path):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", path.read_text("utf-8")):
        linked = DOCS / (target or path.name)
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], anchor


def test_every_command_has_its_module_and_its_options():
    options = {}
    for module, arguments in re.findall(r"python -m (picogpt[\w.]*)([^`\n#]*)", PAGE):
        found = re.findall(r" (--?\w[\w-]*)", arguments.split(" -- ")[0])
        options.setdefault(module, set()).update(found)
    options["picogpt.compare"] |= set(re.findall(r"`(--\w+)", PAGE)) - {"--size"}
    assert len(options) > 6
    for module, flags in options.items():
        if not flags:
            assert importlib.util.find_spec(module), module
            continue
        command = [sys.executable, "-m", module, "--help"]
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT).stdout
        assert all(re.search(rf"{flag}\b", out) for flag in flags), (module, flags)


def test_the_continuation_of_the_turing_prompt_is_the_published_one():
    encoder, code = get_encoder(), re.sub(r"\s+", " ", PAGE)
    prompt, ids, more, text = re.search(
        r"continuation of `(.*?)`, ids `([\d ]*)`, begins `([\d ]*)`: \"(.*?)\"", code
    ).groups()
    assert encoder.encode(prompt) == [int(i) for i in ids.split()]
    assert encoder.encode(text) == [int(i) for i in more.split()]


def with_erf_gelu():
    """What a float32 program with the other GELU computes of the example."""
    seen = {}

    def pre(value, hook):
        seen["pre"] = value.copy()

    def post(value, hook):
        return [[0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in map(float, row)] for row in seen["pre"]]

    at = [f"blocks.{i}.mlp.hook" for i in range(HPARAMS["n_layer"])]
    hooks = [(f"{name}_pre", pre) for name in at] + [(f"{name}_post", post) for name in at]
    params = formula_params()[1]
    return with_outs(run_with_trace(truth()[0], params, HPARAMS["n_head"], fwd_hooks=hooks)[1], params)


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """A function that runs a command of the page where ./gpt2, with erf GELU, and its traces lie."""
    here = tmp_path_factory.mktemp("docs")
    shutil.copytree(CHECKOUT / "reference", here / "reference")
    (here / "mine").mkdir()
    shapes = {}
    for name, value in with_erf_gelu().items():
        (here / "mine" / f"{name}.bin").write_bytes(np.asarray(value, "<f4").tobytes())
        shapes[name] = {"file": f"{name}.bin", "shape": list(value.shape)}
    (here / "mine" / "tensors.json").write_text(json.dumps(shapes))
    ids = truth()[0] + generate(truth()[0], formula_params()[1], HPARAMS["n_head"], 8)
    (here / "ours.txt").write_text(" ".join(map(str, ids)))
    (here / "mine.txt").write_text(" ".join(map(str, [*ids[:-3], 13, *ids[-2:]])))

    def run(command):
        port = [sys.executable, str(CHECKOUT / "tests" / "port.py")]
        words = shlex.split(
            command.replace("./gpt2 reference/model", shlex.join(port) + " reference/model erf_gelu")
        )
        words[0] = sys.executable
        path = os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
        out = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True, encoding="utf-8")
        assert out.returncode in (0, 1), (command, out.stderr)
        return out.stdout

    return run


def test_what_commands_are_shown_to_print_they_print(shell):
    """But for the digits of measured numbers. A line `...` stands for lines left out."""

    def blank(text):
        return [re.sub(r"\s+", " ", re.sub(r"-?\d[\d.e+-]*", "#", line)) for line in text.splitlines()]

    sessions = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    assert len(sessions) >= 3
    for session in sessions:
        for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", session, re.MULTILINE):
            printed = iter(blank(shell(command)))
            parts = [blank(part) for part in re.split(r"^\.\.\.$", shown, flags=re.MULTILINE)]
            for part in parts:
                lines = [line for line in part if line]
                while lines:
                    line = next(printed, None)
                    assert line is not None, (command, lines[0])
                    if line == lines[0]:
                        lines.pop(0)
                    else:
                        assert part is not parts[0], (command, line, lines[0])


if __name__ == "__main__":
    PATH.write_text(rendered(PAGE), encoding="utf-8")
    sys.exit()
