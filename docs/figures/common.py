"""What the figures share: the embedded model and a line that it has read, colours, the form of a figure."""

import functools

from matplotlib import rc_context
from matplotlib.figure import Figure

from picogpt import load_encoder_hparams_and_params
from picogpt.trace import run_with_trace

BLUE, ORANGE, GREY = "#0b5fa5", "#c4500a", "#b8b8b8"
LINE = "O Romeo, Romeo! wherefore art thou Romeo?"
STYLE = {"font.size": 9.5, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False}
styled = rc_context(STYLE)  # as a decorator: it must hold while the axes are made


@functools.cache
def model():
    """The embedded model: encoder, hparams, params."""
    return load_encoder_hparams_and_params("shakespeare")


@functools.cache
def traced():
    """The ids of LINE, the logits after each of them, and the trace of the forward pass."""
    encoder, hparams, params = model()
    ids = encoder.encode(LINE)
    return ids, *run_with_trace(ids, params, hparams["n_head"])


def named(ids):
    """Tokens as labels, as Python writes them."""
    return [repr(model()[0].decode([i])) for i in ids]


def dotted(ids):
    """Tokens as labels without quotes, a dot for each blank."""
    return [model()[0].decode([i]).replace("\n", "\\n").replace(" ", "·") for i in ids]


def subplots(height, *shape, **options):
    """A figure as wide as the page, `height` inches high, and its axes."""
    figure = Figure(figsize=(7, height), layout="constrained")
    return figure, figure.subplots(*shape, **options)
