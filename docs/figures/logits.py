"""Figures of the chapter on logits."""

import matplotlib.pyplot as plt
import numpy as np

from picogpt import gpt2, load_encoder_hparams_and_params
from picogpt.model import softmax

LINE = "O Romeo, Romeo! wherefore art thou Romeo?"


def _printable(encoder, id):
    """A token as a label."""
    return encoder.decode([int(id)]).replace("\n", "\\n").replace(" ", "·")


def largest():
    """The twelve largest logits after the line, and their probabilities."""
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare")
    logits = gpt2(encoder.encode(LINE), **params, n_head=hparams["n_head"])[-1]
    p = softmax(logits)
    ids = np.argsort(-logits)[:12]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.4), layout="constrained", sharey=True)
    for axis, values, colour, title, form in (
        (left, logits[ids], "#0b5fa5", "logits", "%.1f"),
        (right, p[ids], "#c4500a", "their softmax", "%.3f"),
    ):
        axis.bar_label(axis.barh(range(12), values, color=colour), fmt=form, fontsize=9, padding=2)
        axis.set_title(title)
        axis.set_xlim(0, values[0] * 1.2)
    left.set_yticks(range(12), [_printable(encoder, id) for id in ids])
    left.invert_yaxis()
    return figure


def surprise():
    """What each token of the line costs in nats, beside what it would cost at random."""
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare")
    ids = encoder.encode(LINE)
    p = softmax(gpt2(ids[:-1], **params, n_head=hparams["n_head"]))
    nats = -np.log(p[np.arange(len(ids) - 1), ids[1:]])
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    axis.bar_label(axis.bar(range(len(nats)), nats, color="#0b5fa5"), fmt="%.2f", fontsize=9)
    at_random = np.log(len(params["wte"]))
    axis.axhline(at_random, color="0.4", linewidth=0.8)
    axis.text(
        len(nats) - 0.5, at_random, "all equally likely", fontsize=9, ha="right", va="bottom", color="0.3"
    )
    axis.axhline(nats.mean(), color="#c4500a", linestyle="--")
    axis.text(len(nats) - 0.5, nats.mean(), "mean", fontsize=9, ha="right", va="bottom", color="#c4500a")
    axis.set_xticks(range(len(nats)), [_printable(encoder, id) for id in ids[1:]])
    axis.set(ylabel="nats", ylim=(0, 7.8))
    return figure
