"""picogpt/check.py: each published fact can be found right, and can be found wrong.

The real weights are not at hand: a random model takes their place, and transformers that of the publishers.
"""

from pathlib import Path

import numpy as np
import pytest
from test_encoder import VOCABULARY, tiktoken_from

from models import random_params, transformers_model
from picogpt import check, get_encoder, save_checkpoint
from picogpt.check import OUTPUTS_OF_124M, TOKENIZER, Model
from picogpt.model_dirs import OPENAI_SIZES

HPARAMS = {"n_vocab": 50257, "n_ctx": 64, "n_embd": 24, "n_head": 12, "n_layer": 2}  # head 8 must be there
DATA = "model.ckpt.data-00000-of-00001"


@pytest.fixture(scope="module")
def params():
    return random_params(**HPARAMS, dtype=np.float32)


@pytest.fixture(scope="module")
def published(params):
    """What transformers and tiktoken give for every fact of OUTPUTS_OF_124M, in their order."""
    torch = pytest.importorskip("torch")
    theirs, tokenizer = transformers_model(params, HPARAMS["n_head"]), tiktoken_from(VOCABULARY)
    encode = tokenizer.encode_ordinary

    def continued(ids, n):
        return theirs.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False, pad_token_id=0)[
            0
        ].tolist()

    def text(prompt, n):
        ids = encode(prompt)
        return tokenizer.decode(continued(ids, n)[len(ids) :])

    def loss(ids):
        return float(theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss)

    def without_head(module, inputs, output, head=8, d=2):
        output[..., 48 + head * d : 48 + (head + 1) * d] = 0

    sections = check.SHAKESPEARE.split("\n\n")
    batch = [i for section in sections for i in [50256, *encode(section + "\n\n")]]
    with torch.no_grad():
        theirs.generation_config.eos_token_id = None
        eiffel = theirs(torch.tensor([encode(check.EIFFEL)])).logits[0].numpy()
        values = [
            text(check.TURING, 40),
            continued([464, 3290], 18),
            text("Hello, my dog is a little", 13),
            text("Today, I", 13),
            [eiffel[row, column] for row in (0, 1, 2, 7, 8, 9) for column in (0, 1, 2, 50254, 50255, 50256)],
            eiffel.argmax(axis=-1).tolist(),
            theirs.transformer(torch.tensor([[1169, 2068, 7586, 21831, 13]]))
            .last_hidden_state[0, 0, :5]
            .tolist(),
            [float(np.mean([loss_of_row(theirs, batch, row) for row in range(4)]))],
            [loss([50256, *encode("Hello world!")])],
            [loss([50256, *encode(check.NATURAL)])],
        ]
        theirs.transformer.h[0].attn.c_attn.register_forward_hook(without_head)
        return [*values, [loss([50256, *encode(check.NATURAL)])]]


def loss_of_row(theirs, batch, row):
    import torch

    inputs, targets = batch[row * 64 : row * 64 + 64], batch[row * 64 + 1 : row * 64 + 65]
    return float(
        torch.nn.functional.cross_entropy(theirs(torch.tensor([inputs])).logits[0], torch.tensor(targets))
    )


@pytest.fixture
def facts(published):
    return [fact._replace(expected=value) for fact, value in zip(OUTPUTS_OF_124M, published, strict=True)]


@pytest.fixture
def directory(tmp_path, params, monkeypatch):
    """A model directory that passes for the 124M's."""
    save_checkpoint(tmp_path / "124M", HPARAMS, params)
    get_encoder().save(tmp_path / "124M")
    monkeypatch.setitem(OPENAI_SIZES, "124M", HPARAMS)
    return tmp_path / "124M"


def report(capsys, *arguments):
    status = check.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("number", range(len(OUTPUTS_OF_124M)), ids=[fact.title for fact in OUTPUTS_OF_124M])
def test_each_fact_is_right_when_transformers_says_so_and_wrong_when_it_is_not(facts, params, number):
    fact, model = facts[number], Model(get_encoder(), params, HPARAMS["n_head"])
    right, said = check.check(fact._replace(tolerance=min(fact.tolerance, 2e-5)), model)
    assert right and said.startswith(f"{fact.title} ({fact.source}): expected"), said
    for sign in (1, -1):
        if fact.tolerance:
            other = [*fact.expected[:-1], fact.expected[-1] + 1.2 * sign * fact.tolerance]
            within = [*fact.expected[:-1], fact.expected[-1] + 0.8 * sign * fact.tolerance]
            assert check.check(fact._replace(expected=within), model)[0]
        else:
            other = fact.expected[:-1] + ("#" if isinstance(fact.expected, str) else [7])
        right, said = check.check(fact._replace(expected=other), model)
        assert not right and "expected" in said and "found" in said
    assert not check.check(OUTPUTS_OF_124M[number], model)[0]  # what is published is of other weights


def test_what_is_published_has_the_shape_of_what_is_measured(facts):
    for fact, published in zip(OUTPUTS_OF_124M, facts, strict=True):
        assert type(fact.expected) is type(published.expected)
        if not isinstance(fact.expected, str):
            assert len(fact.expected) == len(published.expected), fact.title


def test_published_texts_and_ids_are_of_the_recorded_lengths():
    """Texts are compared whole: they must be as many tokens as are generated."""
    encode = tiktoken_from(VOCABULARY).encode_ordinary
    assert len(encode(check.TURING)) == 10 and len(encode(check.TURING_GOES_ON)) == 40
    assert encode(check.TURING_GOES_ON)[:8] == [262, 749, 3665, 8217, 319, 262, 5440, 13]
    assert len(encode(OUTPUTS_OF_124M[2].expected)) == len(encode(OUTPUTS_OF_124M[3].expected)) == 13
    assert len(OUTPUTS_OF_124M[1].expected) == 20
    assert encode(check.EIFFEL) == [464, 412, 733, 417, 8765, 318, 287, 262, 1748, 286]


def test_the_batch_is_llm_cs(assets):
    recorded = np.load(assets / "reference" / "llmc_batches.npz")["val_first257"].ravel().tolist()
    model = Model(get_encoder(), {}, 1)
    ids = [i for section in check.SHAKESPEARE.split("\n\n") for i in check._with_start(model, section + "\n\n")]
    assert ids[:257] == recorded
    text = (Path(__file__).parents[1] / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    assert text.startswith(check.SHAKESPEARE)


def test_published_numbers_are_those_of_the_collection(assets):
    """Every number, id and text stands in the collection with its source."""
    collection = (assets / "reference" / "REFERENCE_OUTPUTS.md").read_text(encoding="utf-8")
    for number in check.EIFFEL_LOGITS:
        assert f"{number:.4f}" in collection
    for fact in OUTPUTS_OF_124M:
        for number in fact.expected if fact.tolerance and fact.expected is not check.EIFFEL_LOGITS else ():
            assert repr(number) in collection, fact.title
    for ids in (OUTPUTS_OF_124M[1].expected, OUTPUTS_OF_124M[5].expected):
        assert str(ids).replace(" ", "") in collection
    assert repr(check.TURING_GOES_ON)[1:-1] in collection and check.NATURAL in collection
    assert all(str(ids).replace(" ", "") in collection for ids in check.ZEROS)


def test_tokenizer_facts(params):
    model = Model(get_encoder(), params, 12)
    assert len(TOKENIZER) == 19
    for fact in TOKENIZER:
        assert check.check(fact, model)[0], fact
        right, said = check.check(fact._replace(expected=[*fact.expected, 1]), model)
        assert not right and said.endswith(f"found {fact.expected}")


def test_a_right_model(directory, facts, monkeypatch, capsys):
    monkeypatch.setattr(check, "OUTPUTS_OF_124M", facts)
    status, out, _ = report(capsys, "--model_size", "124M", "--models_dir", directory.parent)
    lines = out.splitlines()
    assert status == 0 and lines[-1] == "All is right.", out
    assert all(line.startswith("right  ") for line in lines[:-1])
    assert len(lines) == 3 + len(TOKENIZER) + len(facts) + 1 and "every CRC is right" in out
    assert report(capsys, "--model_size", directory)[0] == 0


def test_a_model_of_other_weights(directory, capsys):
    """Whole files, but not OpenAI's numbers: every published output is wrong, and said so."""
    status, out, _ = report(capsys, "--model_size", directory)
    assert status == 1 and out.count("WRONG") == len(OUTPUTS_OF_124M)
    assert out.endswith(f"{len(OUTPUTS_OF_124M)} of them wrong.\n")
    wrong = [line for line in out.splitlines() if line.startswith("WRONG")]
    assert all(fact.source in line for fact, line in zip(OUTPUTS_OF_124M, wrong, strict=True))
    assert "expected 5.27000713 within 2e-05, found " in out


def test_a_damaged_file(directory, capsys):
    data = bytearray((directory / DATA).read_bytes())
    data[-1] ^= 1
    (directory / DATA).write_bytes(data)
    status, out, _ = report(capsys, "--model_size", directory)
    assert status == 1 and "WRONG  weights: the CRC32C of model/wte is wrong" in out
    assert "The files are wrong" in out and "greedy" not in out


def test_other_sizes_are_not_run(directory, monkeypatch, capsys):
    monkeypatch.setitem(OPENAI_SIZES, "124M", {**HPARAMS, "n_layer": 3})
    directory = directory.rename(directory.with_name("other"))
    status, out, _ = report(capsys, "--model_size", directory)
    assert status == 0 and "this model was not run" in out and "hello world" in out and "greedy" not in out
    status, out, _ = report(capsys, "--model_size", "shakespeare")
    assert status == 0 and "this model was not run" in out and "hello world" not in out


def test_no_model(tmp_path, capsys):
    status, out, err = report(capsys, "--models_dir", tmp_path)
    assert (status, out, err.count("\n")) == (2, "", 1) and "picogpt.download 124M" in err
    status, out, err = report(capsys, "--model_size", "no such", "--models_dir", tmp_path)
    assert (status, out, err.count("\n")) == (2, "", 1) and "no such" in err


def test_where_texts_and_ids_part():
    assert check._parted("abc", "abc") == "expected 'abc', found 'abc'"
    assert check._parted("a" * 40 + "b", "a" * 40 + "c").startswith(
        "expected from character 32 on 'aaaaaaaab', "
    )
    assert check._parted([1] * 30, [1] * 29) == f"expected from id 21 on {[1] * 9}, found {[1] * 8}"
    numbers = check.Fact("x", "y", lambda model: [1.0, float("nan")], [1.0, 2.0], 0.1)
    right, said = check.check(numbers, None)
    assert not right and said == "x (y): expected 2 within 0.1, found nan (the worst of 2)"
