"""Token ids: whether both sides have read the same, and where two greedy continuations of a prompt part.

Greedy decoding takes the largest logit. Where two are equal but for rounding, right programs choose either, and
from there on write different texts. So only the first step where they part says anything.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from picogpt import PicogptError
from picogpt.checkpoint import load_hparams_and_params
from picogpt.command import UsageError
from picogpt.generation import check_ids
from picogpt.judging import Row
from picogpt.matching import counted
from picogpt.model_dirs import find_model_dir
from picogpt.noise import noise_bands
from picogpt.trace import astype, parse_ids, run_with_trace

IDS = ("ids", "input_ids", "inputs", "tokens", "idx")  # names under which arrays of ids come
MAX_IDS_BYTES = 1 << 20  # what is larger are no ids of one text


class GreedyError(PicogptError):
    """Ids that cannot be compared, or of which two recordings are not."""


def read_ids(path: Path) -> list[int]:
    """Return the token ids in a text file, a JSON list or numbers with blanks or commas; [] for other files."""
    if not path.is_file() or path.stat().st_size > MAX_IDS_BYTES:
        return []
    try:
        return parse_ids(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, UsageError):
        return []


def report_ids(a: Path, b: Path, model_size: str | None, models_dir: str | None) -> dict[str, Any]:
    """Compare two files of ids, if they are that: {} if neither is. The model is not fetched."""
    lists = [read_ids(a), read_ids(b)]
    if not any(lists):
        return {}
    if not all(lists):
        raise GreedyError("one of the two files holds token ids, the other none: give two lists, or none")
    if model_size is None:
        raise GreedyError("to compare token ids, say whose they are: --model_size NAME")
    directory = find_model_dir(model_size, models_dir)
    if directory is None:
        raise GreedyError(f"{model_size} is not here: give --models_dir, or --model_size and a path")
    hparams, params = load_hparams_and_params(directory)
    equal, said = compare_ids(lists[0], lists[1], params, hparams["n_head"])
    return {"equal": equal, "said": said}


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
    logits, _ = run_with_trace(prefix, astype(params, np.float64), n_head)
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


def check_ids_of(theirs: Mapping[str, Any], ids: Sequence[int]) -> None:
    """Raise GreedyError if among their arrays are ids, and they are others."""
    for name in IDS:
        if name in theirs and np.ravel(theirs[name]).tolist() != ids:
            raise GreedyError(f"{name} in MINE are other ids than the reference's {ids!s:.60}")


def check_manifest(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise GreedyError if two recordings are of other ids or of another model."""
    if theirs["ids"] != ours["ids"]:
        raise GreedyError(f"MINE is a trace of other ids, {theirs['ids']!s:.40}: record it of the same text")
    if theirs["model"] != ours["model"] and theirs["model"].get("sha256") != ours["model"].get("sha256"):
        name = theirs["model"].get("name") or "without a name"
        raise GreedyError(f"MINE is a trace of another model, {name}: its weights are others")


def other_ids(found: Sequence[Row], ids: Sequence[int], wte) -> list[int]:
    """Return the ids whose embeddings theirs are, if they are rows of wte, but not those of `ids`."""
    row = next((row for row in found if row.name == "hook_embed" and not row.equal), None)
    if row is None or np.shape(row.array) != (len(ids), wte.shape[1]):
        return []
    off = [np.abs(wte - x).max(axis=-1) for x in row.array]
    closest = [int(one.argmin()) for one in off]
    return closest if max(one.min() for one in off) <= row.band else []


def lacking(found: Sequence[Row], n_seq: int) -> str:
    """Say which rows MINE has, if not all, and what cannot be told for that."""
    compared = [row for row in found if row.rows]  # parameters have none
    partial = [row for row in compared if len(row.rows) < n_seq]
    if not partial:
        return ""
    rows = partial[0].rows
    which = f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows))}"
    which = f"the last row ({which})" if rows == [n_seq - 1] else which
    which += f" of {counted(partial, 'tensor')}" * (len(partial) < len(compared))
    cure = "record all rows, and the mistake can be named"
    return f"MINE holds only {which}: operations cannot be recomputed from it; {cure}"
