"""The embedded model: small, in OpenAI's layout, as good as the README says, and not a copy of its text."""

from pathlib import Path

import numpy as np
import pytest

from picogpt.checkpoint import load_encoder_hparams_and_params
from picogpt.generation import streams
from picogpt.model import gpt2
from picogpt.model_dirs import EMBEDDED, find_model_dir

TEXT = Path(__file__).parents[1] / "data" / "tinyshakespeare.txt"


@pytest.fixture(scope="module")
def model():
    return load_encoder_hparams_and_params(EMBEDDED, verify=True)


@pytest.fixture(scope="module")
def texts():
    text = TEXT.read_text(encoding="utf-8")
    border = len(text) * 9 // 10
    return text[:border], text[border:]


def nats_per_character(model, text):
    """Total nats over characters: whole windows of n_ctx without overlap, the first one after <|endoftext|>."""
    encoder, hparams, params = model
    n_ctx, ids = hparams["n_ctx"], encoder.encode(text)
    whole = len(ids) // n_ctx * n_ctx
    sequence, nats = [encoder.end_of_text, *ids], 0.0
    for start in range(0, whole, n_ctx):
        window = sequence[start : start + n_ctx + 1]
        logits = gpt2(window[:-1], **params, n_head=hparams["n_head"]).astype(np.float64)
        log_sums = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nats += (log_sums - logits[np.arange(n_ctx), window[1:]]).sum()
    return nats / len(encoder.decode(ids[:whole]))


def test_it_is_a_gpt2_of_modest_size(model):
    encoder, hparams, params = model
    directory = find_model_dir(EMBEDDED)
    assert sum(file.stat().st_size for file in directory.iterdir()) < 12_000_000
    assert hparams["n_ctx"] >= 256
    assert encoder.n_vocab == hparams["n_vocab"]
    assert "lm_head" not in params


def test_validation_loss_is_below_the_aim(model, texts):
    assert 1.2 < nats_per_character(model, texts[1]) < 1.6


def test_samples_are_not_learnt_by_heart(model, texts):
    encoder, hparams, params = model
    ids = encoder.encode(texts[0])
    seen = {tuple(ids[i : i + 20]) for i in range(len(ids) - 19)}
    samples = streams(
        [encoder.end_of_text], params, hparams["n_head"], 200, num_samples=50, temperature=0.8, seed=100
    )
    for sample in map(list, samples):
        assert len(sample) == 200
        assert not any(tuple(sample[i : i + 20]) in seen for i in range(181)), encoder.decode(sample)
