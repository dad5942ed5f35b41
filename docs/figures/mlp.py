"""Figures of the chapter on the MLP and the block."""

from math import erf, sqrt

import numpy as np
from figures.common import BLUE, ORANGE, model, subplots, traced

from picogpt.model import gelu as tanh_gelu


def gelu():
    """GELU beside ReLU, and what the tanh form has more than the erf form."""
    x = np.linspace(-5, 5, 1001)
    erf_gelu = np.array([t * (1 + erf(t / sqrt(2))) / 2 for t in x])
    figure, (curve, difference) = subplots(3, 1, 2)
    near = abs(x) <= 3
    curve.plot(x[near], np.maximum(x, 0)[near], "--", color=ORANGE, label="max(x, 0)")
    curve.plot(x[near], tanh_gelu(x)[near], color=BLUE, label="gelu(x)")
    curve.set(title="GELU and ReLU", xlabel="x")
    curve.legend(fontsize=9, frameon=False)
    difference.plot(x, (tanh_gelu(x) - erf_gelu) * 1e4, color=BLUE)
    difference.axhline(0, color="0.6", linewidth=0.8)
    difference.set(title="tanh form minus erf form", xlabel="x", ylabel="ten-thousandths")
    return figure


def stream():
    """The norm of the residual stream before every half block, and of what the half block adds."""
    ids, _, trace = traced()
    halves = [
        (f"{half} {i}", f"blocks.{i}.hook_resid_{found}", f"blocks.{i}.hook_{half}_out")
        for i in range(model()[1]["n_layer"])
        for half, found in (("attn", "pre"), ("mlp", "mid"))
    ]
    figure, axis = subplots(3.2)
    for shift, colour, hatch, label, names in (
        (-0.2, BLUE, "", "the stream, as found", [found for _, found, _ in halves]),
        (0.2, ORANGE, "//", "what is added to it", [added for _, _, added in halves]),
    ):
        norms = [np.linalg.norm(trace[name], axis=-1).mean() for name in names]
        x = np.arange(len(halves)) + shift
        bars = axis.bar(x, norms, 0.4, color=colour, hatch=hatch, edgecolor="white", label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=9)
    axis.set_xticks(range(len(halves)), [name for name, _, _ in halves])
    axis.set_ylabel(f"norm, mean of {len(ids)} tokens")
    axis.margins(y=0.12)  # room for the numbers
    axis.legend(fontsize=9, frameon=False)
    return figure
