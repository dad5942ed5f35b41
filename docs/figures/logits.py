"""Figures of the chapter on logits."""

import numpy as np
from figures.common import BLUE, ORANGE, dotted, subplots, traced

from picogpt.model import softmax


def largest():
    """The twelve largest logits after the line, and their probabilities."""
    logits = traced()[1][-1]
    p = softmax(logits)
    ids = np.argsort(-logits)[:12]
    figure, (left, right) = subplots(3.4, 1, 2, sharey=True)
    for axis, values, colour, title, form in (
        (left, logits[ids], BLUE, "logits", "%.1f"),
        (right, p[ids], ORANGE, "their softmax", "%.3f"),
    ):
        axis.bar_label(axis.barh(range(12), values, color=colour), fmt=form, fontsize=9, padding=2)
        axis.set_title(title)
        axis.set_xlim(0, values[0] * 1.2)
    left.set_yticks(range(12), dotted(ids))
    left.invert_yaxis()
    return figure


def surprise():
    """What each token of the line costs in nats, beside what it would cost at random."""
    ids, logits, _ = traced()
    p = softmax(logits[:-1])
    nats = -np.log(p[np.arange(len(ids) - 1), ids[1:]])
    figure, axis = subplots(3)
    axis.bar_label(axis.bar(range(len(nats)), nats, color=BLUE), fmt="%.2f", fontsize=9)
    at_random = np.log(logits.shape[-1])
    axis.axhline(at_random, color="0.4", linewidth=0.8)
    where = {"x": len(nats) - 0.5, "ha": "right", "va": "bottom", "fontsize": 9}
    axis.text(y=at_random, s="all equally likely", color="0.3", **where)
    axis.axhline(nats.mean(), color=ORANGE, linestyle="--")
    axis.text(y=nats.mean(), s="mean", color=ORANGE, **where)
    axis.set_xticks(range(len(nats)), dotted(ids[1:]))
    axis.set_ylabel("nats")
    axis.margins(y=0.12)  # room for the numbers
    return figure
