"""Figures of docs/book/choosing.md: the shares of one next token, and what each setting makes of them."""

import functools

import numpy as np
from figures.common import BLUE, GREY, ORANGE, model, named, styled, subplots

from picogpt import gpt2
from picogpt.sampling import draw, probabilities

SURE, UNSURE = "KING HENRY:\nMy", "Friends, Romans,"


@functools.cache
def next_logits(text):
    """The logits of the token after a text."""
    encoder, hparams, params = model()
    ids = encoder.encode(text)
    return gpt2(ids, **params, n_head=hparams["n_head"], logits_to_keep=slice(-1, None))[0]


@styled
def temperatures():
    """The ten likeliest next tokens at three temperatures."""
    logits = next_logits(SURE)
    likeliest = np.argsort(-logits)[:10]
    figure, axes = subplots(3, 1, 3, sharex=True, sharey=True)
    for axis, temperature in zip(axes, (0.5, 1.0, 2.0), strict=True):
        p = probabilities(logits, temperature)
        axis.barh(range(10), p[likeliest], color=BLUE)
        for y, share in enumerate(p[likeliest]):
            axis.annotate(f"{share:.3f}", (share, y), (3, 0), textcoords="offset points", va="center")
        rest = 1 - p[likeliest].sum()
        axis.set_title(f"temperature {temperature:g}\nthe other {len(p) - 10:,}: {rest:.3f}")
        axis.set_xticks([0, 0.5, 1])
        axis.set_xlim(0, 1)
    axes[0].set_yticks(range(10), named(likeliest))
    axes[0].invert_yaxis()
    figure.supxlabel("probability", fontsize=9.5)
    return figure


@styled
def cuts():
    """Which tokens top_k and top_p keep where the model is sure, and where it is not."""
    figure, axes = subplots(4.4, 2, 2, sharex=True, sharey="row")
    settings = ({"top_k": 10}, {"top_p": 0.7})
    for row, text in zip(axes, (SURE, UNSURE), strict=True):
        p = probabilities(next_logits(text))
        falling = np.argsort(-p, kind="stable")
        for axis, setting in zip(row, settings, strict=True):
            kept = probabilities(next_logits(text), **setting) > 0
            shown = falling[:80]
            axis.bar(range(80), p[shown], width=0.9, color=np.where(kept[shown], BLUE, GREY))
            label = f"{kept.sum()} of {len(p):,} tokens stay,\nwhich hold {p[kept].sum():.3f}"
            axis.text(0.97, 0.93, label, transform=axis.transAxes, ha="right", va="top")
        row[0].set_ylabel(f"after {text!r}")
    for axis, setting in zip(axes[0], settings, strict=True):
        axis.set_title(", ".join(f"{name} = {value}" for name, value in setting.items()))
    figure.supxlabel("tokens in order of falling probability (the first 80)", fontsize=9.5)
    return figure


@styled
def running_sum():
    """How a number between 0 and 1 becomes an id: where the running sum of the probabilities passes it."""
    p = probabilities(next_logits(SURE), top_p=0.9)
    u = 0.5
    chosen, running = draw(p, u), np.cumsum(p)
    figure, axis = subplots(3)
    axis.step(range(len(p)), running, where="post", color=BLUE)
    axis.hlines(u * running[-1], 0, chosen, color=ORANGE, linestyle="--")
    axis.vlines(chosen, 0, u * running[-1], color=ORANGE, linestyle="--")
    axis.annotate(f"u c[-1] = {u * running[-1]:.3f}", (0, u * running[-1]), (4, 4), textcoords="offset points")
    axis.annotate(f"id {chosen}, {named([chosen])[0]}", (chosen, 0.03), (6, 0), textcoords="offset points")
    for i in np.argsort(-p)[:3]:
        if i != chosen:
            axis.annotate(
                named([i])[0], (i, running[i] - p[i] / 2), (5, 0), textcoords="offset points", va="center"
            )
    axis.set(xlim=(0, len(p)), ylim=(0, 1), xlabel="id", ylabel="running sum c")
    return figure
