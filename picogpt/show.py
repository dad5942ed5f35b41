"""What `--show probabilities` writes: a row for each token as it comes, with what might have come instead.

    0.471 ' the'        0.203 ' thy'        0.094 ' a'          0.052 ' my'

The token that was chosen stands first, then the likeliest others. Tokens are written as Python writes them:
'\\n' is the end of a line, and b'\\xf0\\x9f' are bytes that make no whole character.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from picogpt.command import say, write
from picogpt.generation import stream_text
from picogpt.sampling import probabilities

N_OTHERS = 3
WIDTH = 20  # columns of a token with its probability: four fit into 80
STEPS = (0.1, 0.3, 0.7)  # probabilities at which the next colour begins
# Foreground and background. As in viridis each background is lighter than the one before it: who sees no
# hues, or reads it in print, can tell them apart.
PAINTS = {
    16: ("97;44", "97;45", "30;46", "30;47"),
    256: ("38;5;231;48;5;54", "38;5;231;48;5;25", "38;5;16;48;5;73", "38;5;16;48;5;228"),
}


def watched(params, seen: list[Any]) -> dict[str, Any]:
    """A shallow copy of the tree that fills the list `seen` with its logits, `[n_vocab]`: `seen[0]` are the
    first, which follow the prompt and start every sample, and `seen[-1]` the latest."""

    def tap(name, x):
        if name == "logits":
            seen[1:] = [np.array(x[-1])]
        return x

    return {**params, "tap": tap}


def printer(
    seen: list[Any], encoder: Any, stop: Sequence[str], how: dict[str, Any], colours: int
) -> Callable[[Iterable[int]], None]:
    """A function that writes a sample's ids as they come: their rows, and in colour the text, too.

    seen     where the `watched` tree notes the logits that the ids are chosen from
    how      the settings that `sampling.probabilities` takes; none when the choice is greedy
    colours  how many the terminal has: 0, 16 or 256

    Says, once, whose probabilities they are.
    """
    settings = ", ".join(f"{name} {value}" for name, value in how.items() if value is not None)
    whose = f"those of the draw, after {settings}" if how else "the model's own"
    say(f"a row is the chosen token and the likeliest others; the probabilities are {whose}")

    def show(ids: Iterable[int]) -> None:
        chosen: list[tuple[int, float]] = []

        def rows() -> Iterator[int]:
            for next_id in ids:
                p = probabilities(seen[-1 if chosen else 0], **how)
                p /= p.sum()
                write("\n" * bool(chosen) + row(next_id, p, encoder, colours))
                chosen.append((next_id, p[next_id]))
                yield next_id

        text = "".join(stream_text(rows(), encoder, stop))
        if colours and chosen:
            write(f"\n\n{coloured_text(chosen, text, encoder, colours)}\n\n{legend(colours)}")

    return show


def row(chosen: int, p, encoder: Any, colours: int) -> str:  # id, [n_vocab] -> text
    """The chosen token and the likeliest others that are possible at all, each with its probability."""
    others = [i for i in likeliest(p, N_OTHERS + 1) if p[i] > 0 and i != chosen][:N_OTHERS]
    first, *rest = (f"{number(p[i])} {token(i, encoder)}" for i in (chosen, *others))
    gap = " " * max(1, WIDTH - len(first))
    return (paint(first, p[chosen], colours) + gap + "".join(f"{cell:<{WIDTH - 1}} " for cell in rest)).rstrip()


def likeliest(scores, k: int) -> list[int]:  # [n_vocab] -> k ids, or all
    """The ids of the largest scores, the largest first; of equal ones the smaller id."""
    k = min(k, len(scores))
    best = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    return best[np.argsort(-scores[best], kind="stable")][:k].tolist()


def number(p: float) -> str:
    """A probability: 0.471, or 4e-07."""
    return f"{p:.3f}" if p >= 0.0005 else f"{p:.0e}"


def token(i: int, encoder: Any) -> str:
    """A token as Python writes its text, or its bytes where they are none; #1030 if no vocabulary names it."""
    if i >= encoder.n_vocab:  # vocabularies may be shorter than the model's table
        return f"#{i}"
    data = encoder.decode_bytes([i])
    try:
        return repr(data.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(data)


def coloured_text(chosen: Iterable[tuple[int, float]], text: str, encoder: Any, colours: int) -> str:
    """The text in the colours of its tokens; a character of several tokens has that of its last."""
    decoder, done = encoder.stream_decoder(), []
    for next_id, p in chosen:
        n = len(decoder.feed(next_id))
        done += [paint(text[:n], p, colours)]
        text = text[n:]
    return "".join(done) + text


def legend(colours: int) -> str:
    """Which colour is which probability."""
    return " ".join(paint(f" {low} to {high} ", low, colours) for low, high in pairwise((0, *STEPS, 1)))


def paint(text: str, p: float, colours: int) -> str:
    """The text in the colour of a probability; the end of a line has none, or it would fill the line."""
    if not colours:
        return text
    code = PAINTS[colours][sum(p >= step for step in STEPS)]
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in text.split("\n"))
