"""What the package as a whole promises: its public names, what it imports, and one copy of the arithmetic."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import picogpt

PACKAGE = Path(picogpt.__file__).parent
CATALOGUE = "mistakes.py"  # of known mistakes: it holds wrong copies of the arithmetic beside the right ones
NAMES = "gpt2 generate stream load_encoder_hparams_and_params save_checkpoint Encoder get_encoder PicogptError"


def loaded_by(statement):
    """What a fresh Python loads for a statement from outside the standard library (Cython, which
    leaves a mark of its own in what it compiled, does not count)."""
    program = f"""
import sys
before = set(sys.modules)
{statement}
top = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*(name for name in top - sys.stdlib_module_names if "cython" not in name))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


class TestImport:
    def test_the_package_loads_numpy_and_regex_at_most(self):
        assert loaded_by("import picogpt") <= {"picogpt", "numpy", "regex"}

    @pytest.mark.parametrize("name", NAMES.split())
    def test_no_public_name_needs_a_framework(self, name):
        loaded = loaded_by(f"from picogpt import {name}")
        assert "picogpt" in loaded
        assert not loaded & {
            "tensorflow",
            "jax",
            "torch",
            "transformers",
            "requests",
            "safetensors",
            "tokenizers",
        }

    def test_generating_needs_numpy_alone(self):
        """No framework, whatever is installed; threadpoolctl is asked for the BLAS's threads."""
        loaded = loaded_by(
            "import numpy as np, picogpt\n"
            "def norm(): return {'g': np.ones(2), 'b': np.zeros(2)}\n"
            "params = {'wte': np.eye(2), 'wpe': np.zeros((300, 2)), 'blocks': [], 'ln_f': norm()}\n"
            "assert picogpt.generate([0] * 200, params, 1, 3, temperature=1, seed=0)"
        )
        assert loaded <= {"picogpt", "numpy", "regex", "threadpoolctl"}


class TestNames:
    def test_are_those_of_the_design(self):
        assert sorted(picogpt.__all__) == sorted(NAMES.split())
        for name in NAMES.split():
            assert getattr(picogpt, name).__module__.startswith("picogpt")

    def test_an_unknown_name(self):
        with pytest.raises(AttributeError, match="module 'picogpt' has no attribute 'gpt3'"):
            picogpt.gpt3  # noqa: B018


def places(found):
    """Where in the package's syntax trees `found` holds: ["model.py", ...], a file for each node."""
    files = sorted(path for path in PACKAGE.glob("*.py") if path.name != CATALOGUE)
    trees = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    return [name for name, tree in trees.items() for node in ast.walk(tree) if found(node)]


def names(node, *wanted):
    """Whether a node is one of these names, alone or behind a dot."""
    return getattr(node, "attr", getattr(node, "id", None)) in wanted


def calls_with(node, operator, *functions):
    """Whether a node calls one of these functions with a sum, or a difference, in the argument."""
    return (
        isinstance(node, ast.Call)
        and names(node.func, *functions)
        and any(isinstance(part, operator) for part in ast.walk(node))
    )


class TestOneForwardPass:
    """No second copy of the arithmetic (the catalogue of known mistakes is left out)."""

    @pytest.mark.parametrize(
        "found",
        [
            pytest.param(lambda node: names(node, "tanh"), id="tanh"),
            pytest.param(lambda node: getattr(node, "value", None) == 0.044715, id="0.044715"),
            pytest.param(lambda node: calls_with(node, ast.Sub, "exp", "exp2"), id="softmax"),
            pytest.param(lambda node: calls_with(node, ast.Add, "sqrt", "rsqrt"), id="layer norm"),
        ],
    )
    def test_stands_once(self, found):
        assert places(found) == ["model.py"]

    @pytest.mark.parametrize("name", ["gelu", "softmax", "layer_norm", "linear", "attention", "mha", "gpt2"])
    def test_is_defined_once(self, name):
        assert places(lambda node: isinstance(node, ast.FunctionDef) and node.name == name) == ["model.py"]

    def test_nothing_else_is_used_for_it(self):
        others = "erf", "var", "gelu", "layer_norm", "standardize", "nan_to_num"
        assert places(lambda node: isinstance(node, ast.Attribute) and node.attr in others) == []


def test_no_assert_stands_in_for_an_error():
    assert places(lambda node: isinstance(node, ast.Assert)) == []
