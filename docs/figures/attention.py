"""Figures of the chapter on attention."""

import numpy as np
from figures.common import BLUE, ORANGE, dotted, subplots, traced

from picogpt.model import softmax

N_KEYS = 16


def scale():
    """The largest of N_KEYS weights of random queries and keys, with and without the root, by width of head."""
    rng = np.random.default_rng(0)
    widths = 2 ** np.arange(9)
    largest = {"q k / √d": [], "q k": []}
    for d in widths:
        q, k = rng.standard_normal((2000, 1, d)), rng.standard_normal((2000, N_KEYS, d))
        scores = np.vecdot(q, k)  # [2000, N_KEYS]
        largest["q k"].append(softmax(scores).max(axis=-1).mean())
        largest["q k / √d"].append(softmax(scores / d**0.5).max(axis=-1).mean())
    figure, axis = subplots(3)
    axis.plot(widths, largest["q k"], "s--", color=ORANGE, label="softmax of q·k")
    axis.plot(widths, largest["q k / √d"], "o-", color=BLUE, label="softmax of q·k / √d")
    axis.axhline(1 / N_KEYS, color="0.6", linewidth=0.8)
    axis.text(widths[-1], 1 / N_KEYS, "an even average", fontsize=9, ha="right", va="bottom", color="0.3")
    axis.set_xscale("log", base=2, nonpositive="clip")
    axis.set_xticks(widths, widths)
    axis.set(xlabel="d, width of the head", ylabel="largest weight", ylim=(0, 1))
    axis.legend(fontsize=9, frameon=False, loc="upper left")
    return figure


def pattern():
    """The pattern of head 1 of block 0: who looks at whom, in what measure."""
    ids, _, trace = traced()
    pattern = trace["blocks.0.attn.hook_pattern"][1]
    figure, axis = subplots(5.6)
    image = axis.imshow(pattern, cmap="cividis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="weight", shrink=0.8)
    axis.set_xticks(range(len(ids)), dotted(ids), rotation=60)
    axis.set_yticks(range(len(ids)), dotted(ids))
    axis.set(xlabel="key: the token that is looked at", ylabel="query: the token that looks")
    for i, j in np.argwhere(pattern >= 0.2):
        colour = "black" if pattern[i, j] > 0.6 else "white"
        axis.text(j, i, f"{pattern[i, j]:.1f}", ha="center", va="center", fontsize=9, color=colour)
    return figure
