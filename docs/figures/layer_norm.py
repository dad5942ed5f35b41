"""Figure of the chapter on layer norm."""

from figures.common import BLUE, ORANGE, model, subplots, traced


def before_and_after():
    """The vector of the last token as it enters each block, and what the block's layer norm makes of it."""
    _, hparams, _ = model()
    _, _, trace = traced()
    figure, axes = subplots(4.2, hparams["n_layer"], 2, sharex=True, sharey="col")
    for i, (before, after) in enumerate(axes):
        before.vlines(range(hparams["n_embd"]), 0, trace[f"blocks.{i}.hook_resid_pre"][-1], color=BLUE)
        after.vlines(range(hparams["n_embd"]), 0, trace[f"blocks.{i}.ln1.hook_normalized"][-1], color=ORANGE)
        before.set_ylabel(f"block {i}")
    axes[0, 0].set_title("as the block finds it")
    axes[0, 1].set_title("mean 0, variance 1")
    for axis in axes[-1]:
        axis.set_xlabel("column")
    return figure
