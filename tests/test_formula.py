"""picogpt/formula.py: the weights are what the formula says, to the bit; others load them; mistakes show."""

import json
import math
import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest

from models import astype, close, intermediates, rounding_noise, transformers_model, tree_map
from picogpt import formula, generate, get_encoder
from picogpt.checkpoint import load_encoder_hparams_and_params
from picogpt.model import gpt2

IDS = [39, 68, 297, 78, 262, 260, 11, 287, 262, 220, 437, 511, 0, 300]
TEXTS = ["Hello there, in the end", "naïve 東京 👍🏽", "a  b\r\n\tc", "it's 1234'", "", "<|endoftext|> is text"]


@pytest.fixture(scope="module")
def params():
    return formula.formula_params()[1]


@pytest.fixture
def directory(tmp_path):
    formula.write_model(tmp_path / "model")
    return tmp_path / "model"


def logits(params):
    return gpt2(IDS, **params, n_head=2)


def exact(number, i, base, scale):
    """The formula in integers of Python's, which never wrap, and fractions, which never round."""
    h = number * 65536 + i
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        h = (h ^ (h >> shift)) * factor % 2**32
    return Fraction(base) + Fraction(scale) * Fraction((h >> 12) - 2**19, 2**19)


def test_every_weight_is_the_formulas_exactly():
    tensors = formula.formula_tensors()
    shapes = [(512, 8), (64, 8)]
    shapes += [(8,), (8,), (8, 24), (24,), (8, 8), (8,), (8,), (8,), (8, 32), (32,), (32, 8), (8,)] * 2 + [
        (8,),
        (8,),
    ]
    assert [tensor.shape for tensor in tensors.values()] == shapes
    kinds = [*formula.WEIGHTS.values()]
    kinds = kinds[:2] + kinds[2:14] * 2 + kinds[14:]
    for number, (tensor, kind) in enumerate(zip(tensors.values(), kinds, strict=True)):
        assert tensor.dtype == np.float32 and tensor.flags.c_contiguous
        for i, weight in enumerate(tensor.ravel().tolist()):
            assert Fraction(weight) == exact(number, i, *kind), (number, i)


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler, cc")
def test_the_c_of_the_docstring_gives_the_same_bits(tmp_path):
    lines = [line for line in formula.__doc__.splitlines() if line.startswith("    ")]
    numbers = 'uint32_t t, n; double base, scale; while (scanf("%u %u %lf %lf", &t, &n, &base, &scale) == 4)'
    loop = "for (uint32_t i = 0; i < n; i++) {" + "\n".join(lines) + "\nfwrite(&weight, 4, 1, stdout);}"
    source = f"#include <stdio.h>\n#include <stdint.h>\nint main() {{{numbers} {loop} return 0;}}"
    (tmp_path / "f.c").write_text(source)
    subprocess.run(["cc", "-Wall", "-Werror", "-o", tmp_path / "f", tmp_path / "f.c"], check=True)
    tensors = formula.formula_tensors()
    asked = ""
    for number, (name, tensor) in enumerate(tensors.items()):
        base, scale = next(kind for end, kind in formula.WEIGHTS.items() if name.endswith(end))
        asked += f"{number} {tensor.size} {base} {scale}\n"
    made = subprocess.run([tmp_path / "f"], input=asked.encode(), capture_output=True, check=True).stdout
    assert made == b"".join(tensor.astype("<f4").tobytes() for tensor in tensors.values())


def test_what_is_written_is_what_is_loaded(directory, params):
    encoder, hparams, loaded = load_encoder_hparams_and_params(str(directory))
    assert hparams == formula.formula_params()[0] == formula.HPARAMS
    leaves = []
    tree_map(leaves.append, loaded)
    expected = []
    tree_map(expected.append, params)
    assert len(leaves) == len(expected) == 28
    assert all(np.array_equal(a, b) for a, b in zip(leaves, expected, strict=True))
    assert [encoder.encode(text) for text in TEXTS] == [
        formula.formula_encoder().encode(text) for text in TEXTS
    ]


def test_its_ids_below_511_are_gpt2s():
    ours, gpt2s = formula.formula_encoder(), get_encoder()
    assert [ours.decoder[i] for i in range(511)] == [gpt2s.decoder[i] for i in range(511)]
    assert ours.n_vocab == 512 and ours.end_of_text == 511


def test_transformers_and_tokenizers_load_it_and_agree(directory, params):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = model(torch.tensor([IDS])).logits[0].numpy()
    close(logits(params), theirs, 4 * rounding_noise(logits, params))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    library = tokenizers.ByteLevelBPETokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
    encoder = formula.formula_encoder()
    for text in TEXTS[:-1]:
        assert tokenizer.encode(text) == library.encode(text).ids == encoder.encode(text)
        assert tokenizer.decode(encoder.encode(text)) == text
    assert tokenizer.encode("end<|endoftext|>") == encoder.encode("end<|endoftext|>", "all")
    assert len(tokenizer) == 512
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.config.bos_token_id == 511


def test_float64_agrees_with_torchs(params):
    torch = pytest.importorskip("torch")
    theirs = transformers_model(astype(params, np.float64), 2)
    with torch.no_grad():
        close(logits(astype(params, np.float64)), theirs(torch.tensor([IDS])).logits[0].numpy(), 1e-13 * 8)


def test_its_numbers_are_such_that_mistakes_show(params):
    seen = intermediates(astype(params, np.float64), IDS, 2)
    for i in range(2):
        pre = seen[f"blocks.{i}.mlp.hook_pre"]
        assert 1.5 < pre.std() < 3 and pre.min() < -3 and pre.max() > 3
        pattern = seen[f"blocks.{i}.attn.hook_pattern"][:, -1]  # of the last token, who sees them all
        assert (pattern.max(axis=-1) > 1.5 / len(IDS)).all() and pattern.max() < 0.6  # neither flat nor one-hot
        assert np.abs(pattern[0] - pattern[1]).max() > 0.05
        assert seen[f"blocks.{i}.ln1.hook_scale"].max() < 1
    assert seen["logits"].std() > 1.5
    two = np.sort(seen["logits"], axis=-1)[:, -2:]
    assert (two[:, 1] - two[:, 0]).min() > 1e-3
    assert len(set(seen["logits"].argmax(axis=-1).tolist())) > len(IDS) / 3


def test_a_small_slip_exceeds_float32s_noise_tenfold(params):
    """Another eps, the erf GELU, a bias forgotten: at the logits, where a black box is compared."""
    torch = pytest.importorskip("torch")
    exact = logits(astype(params, np.float64))
    noise = rounding_noise(logits, params)

    def strays(change):
        model = transformers_model(astype(params, np.float64), 2)
        change(model.transformer)
        with torch.no_grad():
            return float(np.abs(model(torch.tensor([IDS])).logits[0].numpy() - exact).max())

    def erf(transformer):
        for block in transformer.h:
            block.mlp.act = torch.nn.GELU()

    assert strays(erf) > 10 * noise
    for i in range(2):
        for norm in ("ln_1", "ln_2"):
            assert strays(lambda t, i=i, norm=norm: setattr(getattr(t.h[i], norm), "eps", 1e-6)) > 10 * noise
    for name, _ in transformers_model(params, 2).transformer.named_parameters():
        if name.endswith("bias"):
            assert strays(lambda t, name=name: t.get_parameter(name).data.zero_()) > 10 * noise, name


def test_greedy_text_goes_on(params):
    """It neither repeats an id at once nor depends on the positions alone."""
    texts = [generate(prompt, params, 2, 40) for prompt in ([511], [39], [262], [0], [32], [198], [300])]
    for new in texts:
        assert len(set(new)) >= 12 and max(map(new.count, new)) <= 10
    assert len(set(map(tuple, texts))) == 7


def test_the_command(tmp_path, capsys):
    assert formula.main([str(tmp_path / "new" / "model")]) == 0
    out, err = capsys.readouterr()
    n = sum(math.prod(tensor.shape) for tensor in formula.formula_tensors().values())
    assert f"{n:,} parameters" in out and err == ""
    names = ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert sorted(path.name for path in (tmp_path / "new" / "model").iterdir()) == names
    assert (
        json.loads((tmp_path / "new" / "model" / "config.json").read_text())["activation_function"]
        == "gelu_new"
    )
    (tmp_path / "file").write_text("")
    assert formula.main([str(tmp_path / "file")]) == 2
    assert formula.main([str(tmp_path / "file" / "under")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 2 and str(tmp_path / "file") in err


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json"])
def test_somebody_elses_model_is_not_replaced(name, tmp_path, capsys):
    (tmp_path / name).write_text("precious")
    assert formula.main([str(tmp_path)]) == 2
    assert "is another model's: choose another directory" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]


def test_it_is_written_again_where_it_is(tmp_path):
    assert formula.main([str(tmp_path)]) == formula.main([str(tmp_path)]) == 0


def test_no_directory_is_not_this_one(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert formula.main([""]) == 2
    assert "give one to write to" in capsys.readouterr().err and not list(tmp_path.iterdir())
