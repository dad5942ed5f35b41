"""Figures of docs/book/generating.md: how sure the model was of each token; threads that share a prompt."""

import numpy as np
from figures.common import BLUE, GREY, ORANGE, model, named, styled, subplots

from picogpt import generate, gpt2
from picogpt.cache import KVCache
from picogpt.generation import Decoder
from picogpt.sampling import probabilities


@styled
def certainty():
    """How likely each token of two generated texts was, beside the likeliest in its place."""
    encoder, hparams, params = model()
    prompt = encoder.encode("ROMEO:\nO, she doth")
    settings = {"greedy": {}, "temperature 1, top_p 0.9, seed 1": {"top_p": 0.9, "seed": 1}}
    figure, axes = subplots(5.6, 2)
    for axis, (title, setting) in zip(axes, settings.items(), strict=True):
        new = generate(prompt, params, hparams["n_head"], 38, **setting)
        rows = gpt2(prompt + new, **params, n_head=hparams["n_head"])[len(prompt) - 1 : -1]
        p = np.array([probabilities(row) for row in rows])
        axis.bar(range(len(new)), p.max(axis=1), width=0.9, color=GREY, label="the likeliest token")
        axis.bar(range(len(new)), p[range(len(new)), new], width=0.9, color=BLUE, label="the one chosen")
        axis.set_xticks(range(len(new)), named(new), rotation=90, fontsize=9)
        axis.set_title(title, loc="left")
        axis.set(ylabel="probability", ylim=(0, 1), xlim=(-0.6, len(new) - 0.4))
    axes[1].legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.97))
    return figure


class Watched(KVCache):
    """A cache that notes which rows each thread writes."""

    def part(self, start, stop, *wait):
        self.parts = [*getattr(self, "parts", []), (start, stop)]
        return super().part(start, stop, *wait)


@styled
def shares():
    """The rows of a prompt that each of four threads reads, and what work they are."""
    _, hparams, params = model()
    n_rows, n_embd = hparams["n_ctx"], hparams["n_embd"]
    decoder = Decoder(params, hparams["n_head"], n_rows)
    decoder.caches = [Watched(n_rows) for _ in params["blocks"]]
    decoder._read_in_threads(range(n_rows), 0, 4)
    figure, axis = subplots(2.6)
    for i, (start, stop) in enumerate(sorted(decoder.caches[0].parts)):
        row = np.arange(start, stop + 1)
        cost = 1 + row / (3 * n_embd)
        axis.fill_between(row, cost, color=(BLUE, ORANGE)[i % 2])
        area = (cost[:-1] + cost[1:]).sum() / 2
        label = f"thread {i}\n{stop - start} rows\nwork {area:.1f}"
        axis.text((start + stop) / 2, 0.5, label, color="white", ha="center", va="center")
    axis.set(xlim=(0, n_rows), ylim=(0, None), xlabel="row of the prompt", ylabel="work of the row")
    return figure
