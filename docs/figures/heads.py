"""Figure of the chapter on heads."""

import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm

from picogpt import load_encoder_hparams_and_params
from picogpt.trace import run_with_trace

LINE = "O Romeo, Romeo! wherefore art thou Romeo?"


def patterns():
    """Every pattern of every block; a square root makes the small weights visible."""
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare")
    ids = encoder.encode(LINE)
    _, trace = run_with_trace(ids, params, hparams["n_head"])
    n_layer, n_head = len(params["blocks"]), hparams["n_head"]
    figure, axes = plt.subplots(n_layer, n_head, figsize=(7, 5.2), layout="constrained")
    for i in range(n_layer):
        for head in range(n_head):
            image = axes[i, head].imshow(
                trace[f"blocks.{i}.attn.hook_pattern"][head], cmap="cividis", norm=PowerNorm(0.5, 0, 1)
            )
            axes[i, head].set(title=f"head {head}" if i == 0 else "", xticks=[], yticks=[])
        axes[i, 0].set_ylabel(f"block {i}", fontsize=12)
    tokens = [encoder.decode([id]) for id in ids]
    marks = [i for i, token in enumerate(tokens) if token in ("o", "!", "?")]
    for axis in axes[-1]:
        axis.set_xticks(marks, [tokens[i] for i in marks], fontsize=9)
    figure.colorbar(image, ax=axes, label="weight", shrink=0.6, ticks=(0, 0.1, 0.25, 0.5, 1))
    return figure
