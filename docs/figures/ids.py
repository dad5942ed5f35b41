"""Figures of the chapter on ids."""

from pathlib import Path

import numpy as np
from figures.common import BLUE, ORANGE, model, subplots
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from picogpt import get_encoder

SHAKESPEARE = Path(__file__).parents[2] / "data" / "tinyshakespeare.txt"
PIECE = " countrymen"


def tree():
    """The merges of one piece: bytes below, tokens above, each merge at a height of its own, with its rank."""
    (piece,) = get_encoder().explain(PIECE)
    figure, axis = subplots(3.6)
    axis.axis("off")
    edge = len(piece.symbols) + 1.1
    box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": BLUE}
    nodes = {i: (i, 0) for i in range(len(piece.symbols))}  # where the symbol that begins at byte i is drawn
    for i, symbol in enumerate(piece.symbols):
        axis.text(i, -0.25, symbol, family="monospace", fontsize=13, ha="center", va="top")
    for height, (rank, start, left, right) in enumerate(piece.merges, 1):
        (x, y), (other, below) = nodes[start], nodes.pop(start + len(left))
        middle = (x + other) / 2
        axis.plot([x, x, other, other], [y, height, height, below], color="0.45", linewidth=1.2, zorder=1)
        nodes[start] = middle, height
        axis.text(
            middle, height, left + right, bbox=box, family="monospace", fontsize=10, ha="center", va="center"
        )
        axis.text(edge, height, f"{rank:,}", fontsize=10, color=ORANGE, ha="right", va="center")
    for i, token in zip(sorted(nodes), piece.ids, strict=True):
        x, y = nodes[i]
        axis.text(x, y + 0.45, f"id {token}", fontsize=10, weight="bold", color=BLUE, ha="center", va="bottom")
    axis.text(edge, len(piece.merges) + 0.7, "rank", fontsize=10, color=ORANGE, ha="right")
    axis.set(xlim=(-0.7, edge + 0.1), ylim=(-1, len(piece.merges) + 1.4))
    return figure


def growth():
    """How many bytes of Shakespeare (100,000 in all) a token stands for, as the list of merges grows."""
    text = SHAKESPEARE.read_text(encoding="utf-8")[:100_000]
    figure, axis = subplots(3)
    for name, encoder, colour, style in (
        ("GPT-2's list", get_encoder(), BLUE, "-"),
        ("the list of models/shakespeare", model()[0], ORANGE, "--"),
    ):
        # In a list that was learned, ranks only rise from merge to merge: what the first k make of a piece
        # is what all of them make of it, up to rank k. So one run tells the whole curve.
        ranks = np.sort([merge.rank for piece in encoder.explain(text) for merge in piece.merges])
        k = np.unique(np.geomspace(1, len(encoder.bpe_ranks), 200).astype(int))
        n_bytes = len(text.encode("utf-8"))
        axis.plot(k, n_bytes / (n_bytes - np.searchsorted(ranks, k)), style, color=colour, label=name)
    axis.set(
        xscale="log", ylim=(0.9, None), xlabel="merges used, from the top of the list", ylabel="bytes per token"
    )
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def numbers():
    """Into how many tokens, and where, each whole number of four digits is cut."""
    encoder = get_encoder()
    cuts = ["+".join(str(len(encoder.decode([i]))) for i in encoder.encode(str(n))) for n in range(1000, 10000)]
    kinds = {"4": "one token", "2+2": "2+2 digits", "1+3": "1+3", "3+1": "3+1", "1+2+1": "1+2+1"}
    colours = ["#000000", "#cfe2f3", BLUE, "#f2a65a", ORANGE]
    grid = np.array([list(kinds).index(cut) for cut in cuts]).reshape(90, 100)
    figure, axis = subplots(5.6)
    axis.imshow(grid, cmap=ListedColormap(colours), extent=(0, 100, 100, 10), interpolation="nearest")
    axis.set(xlabel="last two digits", ylabel="first two digits", yticks=range(10, 101, 10))
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    labels = [f"{name}: {cuts.count(cut):,}" for cut, name in kinds.items()]
    figure.legend(
        handles, labels, loc="outside upper center", ncols=5, fontsize=9, frameon=False, handlelength=1
    )
    return figure
