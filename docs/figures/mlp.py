"""Figures of the chapter on the MLP and the block."""

from math import erf, sqrt

import matplotlib.pyplot as plt
import numpy as np

from picogpt import load_encoder_hparams_and_params
from picogpt.model import gelu as tanh_gelu
from picogpt.trace import run_with_trace

LINE = "O Romeo, Romeo! wherefore art thou Romeo?"


def gelu():
    """GELU beside ReLU, and what the tanh form has more than the erf form."""
    x = np.linspace(-5, 5, 1001)
    erf_gelu = np.array([t * (1 + erf(t / sqrt(2))) / 2 for t in x])
    figure, (curve, difference) = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
    near = abs(x) <= 3
    curve.plot(x[near], np.maximum(x, 0)[near], "--", color="#c4500a", label="max(x, 0)")
    curve.plot(x[near], tanh_gelu(x)[near], color="#0b5fa5", label="gelu(x)")
    curve.set(title="GELU and ReLU", xlabel="x")
    curve.legend(fontsize=9, frameon=False)
    difference.plot(x, (tanh_gelu(x) - erf_gelu) * 1e4, color="#0b5fa5")
    difference.axhline(0, color="0.6", linewidth=0.8)
    difference.set(title="tanh form minus erf form", xlabel="x", ylabel="ten-thousandths")
    return figure


def stream():
    """The norm of the residual stream before every half block, and of what the half block adds."""
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare")
    _, trace = run_with_trace(encoder.encode(LINE), params, hparams["n_head"])
    halves = [
        (f"{half} {i}", f"blocks.{i}.hook_resid_{found}", f"blocks.{i}.hook_{half}_out")
        for i in range(len(params["blocks"]))
        for half, found in (("attn", "pre"), ("mlp", "mid"))
    ]
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for shift, colour, hatch, label, names in (
        (-0.2, "#0b5fa5", "", "the stream, as found", [found for _, found, _ in halves]),
        (0.2, "#c4500a", "//", "what is added to it", [added for _, _, added in halves]),
    ):
        norms = [np.linalg.norm(trace[name], axis=-1).mean() for name in names]
        bars = axis.bar(
            np.arange(len(halves)) + shift,
            norms,
            0.4,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=label,
        )
        axis.bar_label(bars, fmt="%.1f", fontsize=9)
    axis.set_xticks(range(len(halves)), [name for name, _, _ in halves])
    axis.set(ylabel="norm, mean of 14 tokens", ylim=(0, 45))
    axis.legend(fontsize=9, frameon=False)
    return figure
