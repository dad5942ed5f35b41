"""Figure of the chapter on layer norm."""

import matplotlib.pyplot as plt

from picogpt import load_encoder_hparams_and_params
from picogpt.trace import run_with_trace

LINE = "O Romeo, Romeo! wherefore art thou Romeo?"


def before_and_after():
    """The vector of the last token as it enters each block, and what the block's layer norm makes of it."""
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare")
    _, trace = run_with_trace(encoder.encode(LINE), params, hparams["n_head"])
    n_layer = len(params["blocks"])
    figure, axes = plt.subplots(n_layer, 2, figsize=(7, 4.2), layout="constrained", sharex=True, sharey="col")
    for i, (before, after) in enumerate(axes):
        before.vlines(range(hparams["n_embd"]), 0, trace[f"blocks.{i}.hook_resid_pre"][-1], color="#0b5fa5")
        after.vlines(range(hparams["n_embd"]), 0, trace[f"blocks.{i}.ln1.hook_normalized"][-1], color="#c4500a")
        before.set_ylabel(f"block {i}")
    axes[0, 0].set_title("as the block finds it")
    axes[0, 1].set_title("mean 0, variance 1")
    for axis in axes[-1]:
        axis.set_xlabel("column")
    return figure
