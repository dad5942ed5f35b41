"""Figures of the chapter on embeddings."""

import numpy as np
from figures.common import BLUE, ORANGE, model, subplots


def positions():
    """How much alike the vectors of any two positions are."""
    wpe = model()[2]["wpe"]
    unit = wpe / np.linalg.norm(wpe, axis=1, keepdims=True)
    figure, (whole, one) = subplots(3.1, 1, 2, width_ratios=(1.15, 1))
    image = whole.imshow(unit @ unit.T, cmap="cividis", vmin=-1, vmax=1)
    figure.colorbar(image, ax=whole, label="cosine", shrink=0.85)
    whole.set(title="every pair", xlabel="position", ylabel="position")
    for position, colour, style in ((20, BLUE, "-"), (128, ORANGE, "--")):
        one.plot(unit @ unit[position], color=colour, linestyle=style, label=f"with position {position}")
    one.axhline(0, color="0.6", linewidth=0.8)
    one.set(title="two rows of it", xlabel="position", ylabel="cosine", ylim=(-1, 1.05))
    one.legend(loc="lower left", fontsize=9, frameon=False)
    return figure
