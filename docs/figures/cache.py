"""Figures of docs/book/cache.md: multiplications, counted as the model runs; what a packed batch computes."""

import numpy as np
from figures.common import BLUE, GREY, ORANGE, model, named, styled, subplots

from picogpt import gpt2
from picogpt.cache import KVCache, packed, with_attend
from picogpt.machine import limited_to
from picogpt.model import causal_attention, with_taps
from picogpt.trace import tree_map

LAST = slice(-1, None)


class Counted(np.ndarray):
    """An array that counts the multiplications of the matrix products that it, or what comes of it, is in."""

    multiplications = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        plain = [np.asarray(x) if isinstance(x, np.ndarray) else x for x in inputs]
        if "out" in kwargs:
            kwargs["out"] = tuple(np.asarray(x) for x in kwargs["out"])
        result = getattr(ufunc, method)(*plain, **kwargs)
        if ufunc in (np.matmul, np.vecdot):
            Counted.multiplications += result.size * plain[0].shape[-1]
        return result.view(Counted) if isinstance(result, np.ndarray) else result


def count(params, ids, **options):
    """How many multiplications one forward pass takes."""
    _, hparams, _ = model()
    before = Counted.multiplications
    gpt2(ids, **params, n_head=hparams["n_head"], **options)
    return Counted.multiplications - before


def decode(params, lengths):
    """Multiplications of the step after texts of these lengths: all rows, the last row's logits, and cached."""
    caches = [KVCache(lengths[-1]) for _ in params["blocks"]]
    remembering, seen, counts = with_attend(params, caches), 0, []
    for n in lengths:
        ids = np.arange(n)
        if n - 1 > seen:
            count(remembering, ids[seen:-1], position_ids=ids[seen:-1], logits_to_keep=LAST)
        cached = count(remembering, ids[-1:], position_ids=ids[-1:], logits_to_keep=LAST)
        counts.append((count(params, ids), count(params, ids, logits_to_keep=LAST), cached))
        seen = n
    return np.array(counts)


@styled
def work():
    """What the next token costs, by the length of the text: with a cache, and in two ways without."""
    params = tree_map(lambda weight: weight.view(Counted), model()[2])
    lengths = np.arange(16, model()[1]["n_ctx"] + 1, 16)
    with limited_to(1):
        counts = decode(params, lengths)
    figure, axis = subplots(3.4)
    rows = ("everything anew, all logits", "everything anew, one row of logits", "with a cache")
    for label, column, colour, place in zip(
        rows, counts.T / 1e6, (GREY, ORANGE, BLUE), (6, -22, 6), strict=True
    ):
        axis.plot(lengths, column, color=colour, linewidth=2)
        where = {"ha": "right", "va": "bottom" if place > 0 else "top"}
        text = f"{label}: {column[-1]:,.1f}"
        axis.annotate(text, (lengths[-1], column[-1]), (0, place), textcoords="offset points", **where)
    axis.set_yscale("log")
    axis.set(
        xlim=(0, 260),
        ylim=(1, 2000),
        xlabel="tokens of text so far",
        ylabel="million multiplications\nfor the next token",
    )
    return figure


@styled
def batch():
    """The patterns of three texts in one packed batch: no text looks at another."""
    encoder, hparams, params = model()
    texts = [encoder.encode(text) for text in ("Good morrow, my lord.", "What news?", "O Romeo, Romeo!")]
    lengths = [len(ids) for ids in texts]
    seen = []

    def tap(name, x):
        if name == "blocks.0.attn.hook_pattern":
            seen.append(x[0].copy())
        return x

    attends = [packed([causal_attention] * len(texts), lengths) for _ in params["blocks"]]
    positions = np.concatenate([np.arange(n) for n in lengths])
    gpt2(
        np.concatenate(texts),
        **with_taps(with_attend(params, attends), tap),
        n_head=hparams["n_head"],
        position_ids=positions,
    )
    canvas, start = np.full((sum(lengths),) * 2, np.nan), 0
    for pattern in seen:
        stop = start + len(pattern)
        canvas[start:stop, start:stop] = np.where(np.tri(len(pattern)), pattern, np.nan)
        start = stop
    figure, axis = subplots(5.2)
    image = axis.imshow(canvas, cmap="cividis", vmin=0, vmax=1)
    labels = named(np.concatenate(texts))
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=9)
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    axis.set(xlabel="key", ylabel="query")
    figure.colorbar(image, label="pattern of block 0, head 0")
    return figure
