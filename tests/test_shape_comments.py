"""Every shape comment of model.py, `# [n_seq, n_embd] -> [n_seq, n_vocab]`, is compared with a real run.

On or under a `def` it states the shapes of the parameters, in their order, and of the result. At the end of a
statement it states the shape of something that the statement reads, and of what it assigns or returns.
"""

import ast
import io
import re
import sys
import tokenize
from math import prod
from pathlib import Path

import numpy as np
import pytest

from models import random_ids, random_params
from picogpt import model

SOURCE = Path(model.__file__).read_text(encoding="utf-8")
FILE = "model.py under test"
SHAPE = r"\[[^]]*\]"

# No two sizes are equal: nothing is right by chance. n_seq, n_q, in, out and so on take theirs in each call.
SIZES = {"n_vocab": 23, "n_ctx": 19, "n_embd": 10, "n_head": 2, "d": 5}
RESULT = -1


def comments_with_arrows(source):
    """The comments by line: the shapes before the arrow, numbered from 0, and the RESULT behind it."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and "->" in token.string:
            assert re.fullmatch(f"# ({SHAPE}(, {SHAPE})* )?-> {SHAPE}", token.string), token.line
            *read, result = [shape[1:-1] for shape in re.findall(SHAPE, token.string)]
            comments[token.start[0]] = {**dict(enumerate(read)), RESULT: result}
    return comments


def bind(stated, shape, sizes):
    """`sizes` and the symbols that `stated`, such as `..., n_q, d`, adds; None if `shape` is not as stated."""
    axes, sizes = stated.split(", "), sizes.copy()
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


def check(source):
    """Run `source`, compare, and return the shapes seen, (line, which); AssertionError if one is wrong."""
    comments, functions, statements, checked = comments_with_arrows(source), {}, {}, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            for line in comments.keys() & set(range(node.lineno, node.body[0].lineno)):
                functions[node.lineno] = line
        elif isinstance(node, ast.Assign | ast.Return) and node.lineno in comments:
            statements[node.lineno] = node

    def compare(line, which, values, sizes):
        stated, shapes = comments[line][which], [np.shape(value) for value in values]
        for bound in (bind(stated, shape, sizes) for shape in shapes):
            if bound is not None:
                checked.add((line, which))
                return sizes.update(bound)
        raise AssertionError(f"line {line}: [{stated}] is not among {shapes}")

    def watch(frame, event, _):
        if frame.f_code.co_filename != FILE:
            return None
        sizes, running = SIZES.copy(), None
        function = functions.get(frame.f_code.co_firstlineno)
        for which in range(len(comments.get(function, ())) - 1):
            value = frame.f_locals[frame.f_code.co_varnames[which]]
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
        run(source)
    finally:
        sys.settrace(before)
    return checked


def run(source):
    """A forward pass, and attention with fewer queries than keys, as a cache calls it."""
    namespace = {"__name__": FILE}
    exec(compile(source, FILE, "exec"), namespace)
    params = random_params(**SIZES, n_layer=1)
    namespace["gpt2"](random_ids(7, SIZES["n_vocab"]), **params, n_head=SIZES["n_head"])
    q, k, v = (np.ones((SIZES["n_head"], n, SIZES["d"])) for n in (4, 11, 11))
    namespace["causal_attention"](q, k, v)


def test_every_shape_comment_is_true():
    stated = {(line, which) for line, shapes in comments_with_arrows(SOURCE).items() for which in shapes}
    assert check(SOURCE) == stated
    assert len(comments_with_arrows(SOURCE)) >= 20 and len(stated) >= 45


def mutants():
    """The source with one shape made wrong: its last axes swapped or, if it has no two, one more."""
    lines = SOURCE.splitlines(keepends=True)
    for number in comments_with_arrows(SOURCE):
        code, comment = lines[number - 1].split("  # ")
        for match in re.finditer(SHAPE, comment):
            axes = match[0][1:-1].split(", ")
            swapped = [*axes[:-2], axes[-1], axes[-2]] if len(axes) > 1 and axes[-2] != "..." else [*axes, "1"]
            wrong = f"{comment[: match.start()]}[{', '.join(swapped)}]{comment[match.end() :]}"
            yield pytest.param(number, f"{code}  # {wrong}", id=f"{number}: {wrong.strip()}")


@pytest.mark.parametrize(("number", "line"), list(mutants()))
def test_a_wrong_shape_comment_is_found(number, line):
    lines = SOURCE.splitlines(keepends=True)
    lines[number - 1] = line
    with pytest.raises(AssertionError, match=r"line \d+: \["):
        check("".join(lines))
