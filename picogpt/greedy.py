"""Two greedy continuations of one prompt: where they part, and whether that is noise or a mistake.

Greedy decoding takes the largest logit. Where two are equal but for rounding, right programs choose either, and
from there on write different texts. So only the first step where they part says anything.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from picogpt import PicogptError
from picogpt.command import UsageError
from picogpt.generation import check_ids
from picogpt.noise import noise_bands
from picogpt.trace import parse_ids, run_with_trace, tree_map

MAX_IDS_BYTES = 1 << 20  # what is larger are no ids of one text


class GreedyError(PicogptError):
    """Two lists of ids that cannot be compared."""


def read_ids(path: Path) -> list[int]:
    """Return the token ids in a text file, a JSON list or numbers with blanks or commas; [] for other files."""
    if not path.is_file() or path.stat().st_size > MAX_IDS_BYTES:
        return []
    try:
        return parse_ids(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, UsageError):
        return []


def compare_ids(a: Sequence[int], b: Sequence[int], params: Mapping[str, Any], n_head: int) -> tuple[bool, str]:
    """Return whether two greedy continuations of one prompt are equal but for noise, and a line that says why.

    Where they first part, the logits are computed in float64. Each logit may stray by its band, so that choices
    are a tie if all of them are within two bands of the largest. Raises PicogptError if the first ids differ:
    then there is nothing to compute from.
    """
    n_vocab, n_ctx = len(params["wte"]), len(params["wpe"])
    a, b = check_ids(a, n_vocab), check_ids(b, n_vocab)
    step = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if step is None:
        more = abs(len(a) - len(b))
        return True, f"EQUAL: {min(len(a), len(b))} ids" + f"; one list has {more} more" * bool(more)
    if not 0 < step <= n_ctx:
        raise GreedyError(
            f"the lists part after {step} ids: 1 to {n_ctx} are needed, those of the prompt first"
        )
    prefix = a[:step]
    logits, _ = run_with_trace(prefix, tree_map(lambda w: np.asarray(w, np.float64), params), n_head)
    band = noise_bands(prefix, params, n_head, {"logits": logits})["float32"]["logits"]
    best, x, y = (int(logits[-1].argmax()), a[step], b[step])
    behind = {chosen: float(logits[-1, best] - logits[-1, chosen]) for chosen in (x, y)}
    tie = max(behind.values()) <= 2 * band
    said = f"id {step} is {x} in one list, {y} in the other; GPT-2 takes {best}, in float64"
    said += "".join(f"; {chosen} is {margin:.3g} behind" for chosen, margin in behind.items() if chosen != best)
    times = f"{max(behind.values()) / band:.3g} times the noise band of {band:.2g}"
    verdict = "TIE WITHIN NOISE" if tie else "REAL DIFFERENCE"
    rest = "; what follows has other prefixes and is not compared" * tie
    return tie, f"{verdict}: {said} ({times}){rest}"
