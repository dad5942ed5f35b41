"""examples/gpt2.c, written from docs/ alone: it conforms, and no fault planted in it gets past `conform`."""

import shutil
import subprocess
from pathlib import Path

import pytest

from picogpt import conform
from picogpt.conform import main
from picogpt.formula import formula_encoder, formula_params, write_model

SOURCE = Path(__file__).parents[1] / "examples" / "gpt2.c"
# A name, old and new text, the first level that fails, and what is said of it
FAULTS = [
    ("merges from left to right", "if (id < lowest) l",
     "if (id < n_vocab && lowest == n_vocab) l", 1, "expected"),
    ("rightmost of equal pairs", "if (id < lowest)", "if (id <= lowest)", 1, "expected"),
    ("no contractions", "n < 7", "n < 0", 1, "the text"),
    ("a run keeps its last space", "last > i ? last", "last < i ? last", 1, "expected"),
    ("a tab goes with the word", "text[i] == ' ' &&", "kinds[i] == 's' && text[i] < 128 &&", 1, "\\t's"),
    ("bytes for characters", "while ((*++*at & 0xC0) == 0x80) c", "for (++*at; 0;) c", 1, "the text"),
    ("letters are ASCII", "return CLASSES[i].kind;", "return c > 127 ? 'r' : CLASSES[i].kind;", 1, "the text"),
    ("erf GELU", "(1 + tanhf(0.7978845608f * (a + 0.044715f * a * a * a)))",
     "(1 + erff(a / sqrtf(2)))", 2, "is erf GELU"),
    ("no eps", "sqrtf(variance + 1e-5f)", "sqrtf(variance)", 2, "has no eps"),
    ("n - 1", "* (in[j] - mean) / n_embd", "* (in[j] - mean) / (n_embd - 1)", 2, "divided by n - 1"),
    ("no mask", "s <= last", "s < n_past + n", 2, "see docs/conform.md, level 2"),
    ("no scale", "score / sqrtf(d)", "score", 2, "is not scaled"),
    ("scale with n_embd", "score / sqrtf(d)", "score / sqrtf(n_embd)", 2, "sqrt(n_embd)"),
    ("k and v swapped", "*k = qkv + n_embd, *v = qkv + 2 * n_embd",
     "*k = qkv + 2 * n_embd, *v = qkv + n_embd", 2, "hook_"),
    ("no bias", "memcpy(out + t * n_out, bias,", "memset(out + t * n_out, 0 * (int)*bias,", 2, "expected"),
    ("no final norm", "layer_norm(y, x + t * n_embd, 1, \"ln_f\", 0)",
     "memcpy(y, x + t * n_embd, n_embd * sizeof *y)", 2, "not from ln_final"),
    ("position 0 in every step", "wpe[(n_past + t)",
     "wpe[t", 4, "has position 0 for every token after the prompt"),
    ("a step does not see itself", "s <= last", "s < last + (n_past == 0)", 4, "`step 1"),
    ("one id too few", "i < ids[0]; i++", "i < ids[0] - 1; i++", 5, "expected"),
    ("largest id at a tie", "if (l[i] > l[id])", "if (l[i] >= l[id])", 6, "temperature 0"),
    ("top-p drops what crosses", "before < top_p ?", "i == id || before + p[i] / total <= top_p ?", 6, "top_p"),
    ("top-k breaks ties", "l[j] > l[i];", "l[j] > l[i] || (l[j] == l[i] && j < i);", 6, "top_k"),
    ("u of the whole", "so_far <= u * last", "so_far <= u * total", 6, "top_p"),
]  # fmt: skip


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function from C to a program."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("examples") / "examples"
    shutil.copytree(SOURCE.parents[1] / "reference", folder.parent / "reference")
    folder.mkdir()

    def compiled(source, *flags):
        (folder / "port.c").write_text(source, "utf-8")
        command = [compiler, "-std=c99", "-O0", *flags, "-o", folder / "port", folder / "port.c", "-lm"]
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        return folder / "port", made.stderr

    return compiled


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formula")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def reference():
    return conform.Reference(formula_encoder(), *formula_params())


@pytest.fixture(autouse=True)
def what_is_right_is_computed_once(reference, monkeypatch):
    monkeypatch.setattr(conform, "Reference", lambda *_: reference)
    monkeypatch.setattr(conform, "SECONDS", 0)  # all faults here are in every layer


class TestPortInC:
    def test_conforms_and_compiles_without_a_warning(self, build, model, capfd):
        port, warnings = build(SOURCE.read_text("utf-8"), "-Wall", "-Wextra", "-Wpedantic")
        assert warnings == ""
        assert main(["--", str(port), str(model)]) == 0
        out, err = capfd.readouterr()
        assert out.count("passed") == 6 and err == ""

    @pytest.mark.parametrize(
        ("old", "new", "level", "said"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
    )
    def test_no_fault_gets_past(self, build, model, capfd, old, new, level, said):
        source = SOURCE.read_text("utf-8")
        assert old in source
        port, _ = build(source.replace(old, new))
        levels = [n for n in (1, 2, 3, 4, 5, 6) if n <= level]
        assert main(["--levels", ",".join(map(str, levels)), "--", str(port), str(model)]) == 1
        out = capfd.readouterr().out
        failed = [line[0] for line in out.splitlines() if " FAILED " in line and not line.startswith(" ")]
        assert failed[0] == str(level) and said in out, out

    @pytest.mark.parametrize("missing", ["config.json", "merges.txt", "model.safetensors"])
    def test_what_it_cannot_read_it_names(self, build, model, tmp_path, missing):
        port, _ = build(SOURCE.read_text("utf-8"))
        shutil.copytree(model, tmp_path, dirs_exist_ok=True)
        (tmp_path / missing).unlink()
        ran = subprocess.run([port, tmp_path], capture_output=True, text=True, input="")
        assert ran.returncode == 2 and missing in ran.stderr and ran.stderr.count("\n") == 1
