"""Figure of the chapter on heads."""

from figures.common import model, subplots, traced
from matplotlib.colors import PowerNorm


def patterns():
    """Every pattern of every block; a square root makes the small weights visible."""
    encoder, hparams, _ = model()
    ids, _, trace = traced()
    n_layer, n_head = hparams["n_layer"], hparams["n_head"]
    figure, axes = subplots(5.2, n_layer, n_head)
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
