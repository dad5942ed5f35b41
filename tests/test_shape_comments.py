"""Every shape comment of model.py, cache.py and sampling.py is compared with a real run.

They read `# [n_seq, n_embd] -> [n_seq, n_vocab]`. On or under a `def`, or after its docstring's first line, one
states the shapes of the parameters, in their order, and of the result: `3 x [n_head, n_q, d]` for three that
are alike, `id` for an int below n_vocab. At the end of a statement one states the shape of something that the
statement reads, and of what it assigns or returns.
"""

import ast
import inspect
import io
import re
import sys
import tokenize
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from models import jax_params, random_ids, random_params
from picogpt import cache, model, sampling

HAS_JAX = find_spec("jax") is not None
FILE = "source under test"
SHAPE = r"\[[^]]*\]"
PARAMETERS = rf"(?:(\d) x )?({SHAPE})"

# No two sizes are equal: nothing is right by chance. n_seq, n_q, in, out and so on take theirs in each call.
LENGTHS = 3, 8
SIZES = {"n_vocab": 23, "n_ctx": 19, "n_embd": 10, "n_head": 2, "d": 5, "sum(lengths)": sum(LENGTHS)}
RESULT = -1


def source_of(module):
    return Path(module.__file__).read_text(encoding="utf-8")


def comments_with_arrows(source):
    """The comments by line: the shapes before the arrow, numbered from 0, and the RESULT behind it."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.STRING):
            continue
        for number, line in enumerate(token.string.splitlines(), token.start[0]):
            _, _, comment = line.partition("#")
            if "->" in comment:
                assert re.fullmatch(f" ({PARAMETERS}(, {PARAMETERS})* )?-> ({SHAPE}|id)", comment), line
                before, result = comment.split("-> ")
                read = [shape for n, shape in re.findall(PARAMETERS, before) for _ in range(int(n or 1))]
                comments[number] = {**dict(enumerate(read)), RESULT: result}
    return comments


def bind(stated, value, sizes):
    """`sizes` and the symbols that `stated`, such as `[..., n_q, d]`, adds; None if `value` is not so."""
    if stated == "id":
        return sizes if type(value) is int and 0 <= value < sizes["n_vocab"] else None
    axes, shape, sizes = stated[1:-1].split(", "), np.shape(value), sizes.copy()
    if axes[0] == "...":
        leading = len(shape) - len(axes) + 1
        if leading < 0 or sizes.setdefault("...", shape[:leading]) != shape[:leading]:
            return None
        axes, shape = axes[1:], shape[leading:]
    if len(axes) != len(shape):
        return None
    for axis, size in zip(axes, shape, strict=True):
        if axis.isidentifier():
            sizes.setdefault(axis, size)
        if prod(int(factor) if factor.isdigit() else sizes[factor] for factor in axis.split("*")) != size:
            return None
    return sizes


def check(source, run):
    """`run` the source, compare, and return the shapes seen, (line, which); AssertionError if one is wrong."""
    comments, functions, statements, checked = comments_with_arrows(source), {}, {}, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            end = node.body[0].lineno + bool(ast.get_docstring(node))
            for line in comments.keys() & set(range(node.lineno, end)):
                functions[node.lineno] = line
        elif isinstance(node, ast.Assign | ast.Return) and node.lineno in comments:
            statements[node.lineno] = node

    def compare(line, which, values, sizes):
        stated = comments[line][which]
        for bound in (bind(stated, value, sizes) for value in values):
            if bound is not None:
                checked.add((line, which))
                return sizes.update(bound)
        raise AssertionError(
            f"line {line}: {stated} is not among {[np.shape(value) or value for value in values]}"
        )

    def watch(frame, event, _):
        if frame.f_code.co_filename != FILE:
            return None
        sizes, running = SIZES.copy(), None
        function = functions.get(frame.f_code.co_firstlineno)
        names = [name for name in frame.f_code.co_varnames if name != "self"]
        for which in range(len(comments.get(function, ())) - 1):
            value = frame.f_locals[names[which]]
            if value is not None:
                compare(function, which, [value], sizes)

        def step(frame, event, value):
            nonlocal running
            if running:  # the statement of the event before this one has ended
                compare(running.lineno, RESULT, [frame.f_locals[running.targets[0].id]], sizes)
            running, node = None, statements.get(frame.f_lineno)
            if event == "line" and node:
                names = (name.id for name in ast.walk(node.value) if isinstance(name, ast.Name))
                arrays = [x for x in map(frame.f_locals.get, names) if isinstance(x, np.ndarray)]
                for which in range(len(comments[node.lineno]) - 1):
                    compare(node.lineno, which, arrays, sizes)
                running = node if isinstance(node, ast.Assign) else None
            elif event == "return":
                for line in filter(None, (node and node.lineno, function)):
                    compare(line, RESULT, [value], sizes)
            return step

        return step

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        namespace = {"__name__": FILE}
        exec(compile(source, FILE, "exec"), namespace)
        run(SimpleNamespace(**namespace))
    finally:
        sys.settrace(before)
    return checked


def run_model(here):
    """A forward pass, and attention with fewer queries than keys, as a cache calls it."""
    params = random_params(**SIZES, n_layer=1)
    here.gpt2(random_ids(7, SIZES["n_vocab"]), **params, n_head=SIZES["n_head"])
    q, k, v = (np.ones((SIZES["n_head"], n, SIZES["d"])) for n in (4, 11, 11))
    here.causal_attention(q, k, v)


def run_cache(here):
    """A prompt and a step, a prompt in two parts, a packed batch, and JAX's cache where there is JAX."""
    params = random_params(**SIZES, n_layer=1)

    def read(attend, start, stop, params=params):
        ids, positions = random_ids(stop - start, SIZES["n_vocab"]), np.arange(start, stop)
        params = here.with_attend(params, [attend])
        model.gpt2(ids, **params, n_head=SIZES["n_head"], position_ids=positions)

    remembers, shared = here.KVCache(), here.KVCache()
    read(remembers, 0, 7)
    read(remembers, 7, 8)
    shared.reserve(7, np.empty((SIZES["n_head"], 0, SIZES["d"])))
    read(shared.part(0, 4), 0, 4)
    read(shared.part(4, 7), 4, 7)
    read(here.packed([remembers, model.causal_attention], LENGTHS), 0, sum(LENGTHS))
    if HAS_JAX:
        params = jax_params(params)
        keys = values = params["wte"].__array_namespace__().zeros((SIZES["n_head"], 12, SIZES["d"]))
        read(here.JAXCache(keys, values, 0), 0, 7, params)
        read(here.JAXCache(keys, values, 7), 7, 8, params)


def run_sampling(here):
    """The likeliest, and draws from all, from the likeliest few and from a nucleus."""
    logits = np.random.default_rng(0).standard_normal(SIZES["n_vocab"])
    for options in ({"temperature": 0}, {"temperature": 1}, {"top_k": 4}, {"top_p": 0.7}):
        here.make_sampler(**options, seed=0)(logits)


RUNS = {model: run_model, cache: run_cache, sampling: run_sampling}


def needs_jax(module, line):
    lines, start = inspect.getsourcelines(cache.JAXCache)
    return module is cache and line in range(start, start + len(lines))


@pytest.mark.parametrize(
    ("module", "n_comments", "n_shapes"), [(model, 20, 45), (cache, 4, 16), (sampling, 3, 6)]
)
def test_every_shape_comment_is_true(module, n_comments, n_shapes):
    comments = comments_with_arrows(source_of(module))
    stated = {(line, which) for line, shapes in comments.items() for which in shapes}
    assert len(comments) >= n_comments and len(stated) >= n_shapes
    can_run = {(line, which) for line, which in stated if HAS_JAX or not needs_jax(module, line)}
    assert check(source_of(module), RUNS[module]) == can_run


def mutants():
    """The sources with one shape made wrong: its last axes swapped or, if it has no two, one more."""

    def wrong(shape):
        *leading, last = shape.strip("[]").split(", ")
        if not leading or leading[-1] == "...":
            return f"[{', '.join([*leading, last, '1'])}]"
        return f"[{', '.join([*leading[:-1], last, leading[-1]])}]"

    for module in RUNS:
        lines = source_of(module).splitlines(keepends=True)
        for number in comments_with_arrows(source_of(module)):
            code, comment = lines[number - 1].split("  # ")
            for match in re.finditer(rf"{SHAPE}|\bid\b", comment):
                wrong_comment = comment[: match.start()] + wrong(match[0]) + comment[match.end() :]
                name = module.__name__.rpartition(".")[2]
                name = f"{name} {number}: {wrong_comment.strip()}"
                yield pytest.param(module, number, f"{code}  # {wrong_comment}", id=name)


@pytest.mark.parametrize(("module", "number", "line"), list(mutants()))
def test_a_wrong_shape_comment_is_found(module, number, line):
    if needs_jax(module, number):
        pytest.importorskip("jax")
    lines = source_of(module).splitlines(keepends=True)
    lines[number - 1] = line
    with pytest.raises(AssertionError, match=rf"line {number}: \["):
        check("".join(lines), RUNS[module])


def test_an_id_is_an_int_of_the_vocabulary():
    assert bind("id", 22, SIZES) == SIZES
    for wrong in (23, -1, True, 1.0, np.int64(1), np.ones(23)):
        assert bind("id", wrong, SIZES) is None
