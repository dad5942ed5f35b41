"""One tensor of another program against the reference: how far off, in bands, and whether it matters.

A few differences do not: a layout (matching.py), centred values, folded biases, heads in another order. They
are tried only where an array differs, and said where they explain it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np

from picogpt import PicogptError
from picogpt.matching import Match, placed, shown
from picogpt.names import CENTRED
from picogpt.noise import HALVES, last_place, projection, rounded, total
from picogpt.recording import Recording

SHOWN = 5  # numbers side by side
# What is computed from the output of a layer norm.
READERS = {"ln1.hook_out": "attn.hook_q", "ln2.hook_out": "mlp.hook_pre", "ln_final.hook_out": "logits"}


class JudgingError(PicogptError):
    """An array that cannot be measured."""


class Excuse(NamedTuple):
    """Another sense in which an array is equal to the reference's."""

    error: float  # in this sense
    band: float
    said: str
    array: Any = None  # brought to the reference's
    reader: str = ""  # it is one only if this tensor, which is computed from it, is equal


@dataclass
class Row:
    """What was found of one tensor."""

    name: str
    theirs: str
    shape: list[int]
    error: float  # the largest difference; infinite for another shape
    band: float
    where: list[Any]  # the worst element, in our layout
    mine: list[float]  # the first numbers that are not masked
    reference: list[float]
    said: list[str]
    array: Any = field(default=None, repr=False)  # theirs, in our layout; None if it cannot be brought to it
    rows: list[int] = field(default_factory=list)  # the positions that it holds
    excuse: Excuse | None = field(default=None, repr=False)
    allowed: float = 1.0  # bands
    there: list[float] = field(default_factory=list)  # the worst element itself: theirs, the reference's

    @property
    def times(self) -> str:
        """The error in bands, in words."""
        short = f"{self.multiple:.2f}" if self.multiple < 1000 else f"{self.multiple:.1e}"
        return short if self.mine else "shape"

    @property
    def multiple(self) -> float:
        """The error in bands."""
        return self.error / self.band

    @property
    def equal(self) -> bool:
        """Whether the error is within the bands that are allowed."""
        return self.error <= self.allowed * self.band

    def lines(self, width: int, columns: int, truth: str = "reference") -> Iterator[str]:
        """Yield a line, names `width` wide, and if it differs numbers side by side: theirs, and of `truth`."""
        shape, where = "x".join(map(str, self.shape)), ",".join(map(str, self.where))
        said, indent = "; ".join(self.said), " " * 6
        line = f"{'  ' if self.equal else '>>'} {self.name:<{width}} {shape:<12} {self.times:>8}  {where:<11} "
        if len(line) + len(said) <= columns:
            yield (line + said).rstrip()
        else:
            yield line.rstrip()
            yield from wrap(said, columns, initial_indent=indent, subsequent_indent=indent)
        if not self.equal and self.mine:
            worst = [f"  worst {x:.6g}" for x in self.there] or ["", ""]
            for whose, numbers, there in zip(("mine", truth), (self.mine, self.reference), worst, strict=True):
                yield f"{indent}{whose:<10}" + "".join(f"{x:>12.5g}" for x in numbers) + there

    def accept(self) -> None:
        """Take the excuse for good."""
        if self.excuse:
            error, band, said, self.array, _ = self.excuse
            self.error, self.band = float(error), float(band)
            self.said, self.excuse = [*self.said, said], None


class Reference:
    """A recording as the measure of other people's arrays."""

    def __init__(self, recording: Recording, dtype: str = "float32") -> None:
        self.manifest, self.tensors, self.dtype = recording.manifest, recording.tensors, dtype
        self.n_seq, self.positions = len(self.manifest["ids"]), self.manifest["positions"]

    def band(self, name: str, kind: str = "") -> float:
        """The band of a tensor; at least what its largest number loses when it is written in float32."""
        says = self.manifest["tensors"][name]
        band = says["band"].get(kind or self.dtype)
        if band is None:
            raise JudgingError(
                f"the reference has no band of {kind or self.dtype} for {name}: leave out --dtype"
            )
        return max(band, last_place(np.array(says.get("largest", 0.0))) / 2)

    def both(self, name: str, x, rows: list[int]) -> tuple[Any, Any, list[int]]:
        """Return those rows of an array and of the truth that both have, and their positions in the text."""
        common = [row for row in rows if row in self.positions]
        truth = self.tensors[name][..., [self.positions.index(row) for row in common], :]
        return x[..., [rows.index(row) for row in common], :], truth, common

    def distance(self, name: str, x, rows: list[int]) -> float:
        """How far an array is from the truth."""
        if not self.tensors:
            return abs(projection(x) - self.manifest["tensors"][name]["projection"])
        return float(np.abs(difference(*self.both(name, x, rows)[:2])).max(initial=0.0))

    def judge(self, match: Match) -> Row:
        """Return what is to be said of one tensor. Raises JudgingError for NaN and infinities."""
        name, x, said = match.name, _finite(match), list(match.said)
        if not self.tensors:
            return self._judge_smoke(match, x)
        mine, truth, common = self.both(name, x, match.rows)
        if mine.shape != truth.shape:  # another number of heads
            return Row(name, match.theirs, list(x.shape), np.inf, 1.0, [], [], [], said, x, match.rows)
        row = measured(name, match.theirs, mine, truth, self.band(name), said)
        row.where[-2] = common[row.where[-2]]
        # What they have where the truth is masked tells of their mask.
        row.array, row.rows = (match.array if name.endswith("attn_scores") else x), match.rows
        if not row.equal:
            row.excuse = next(self._excuses(name, mine, truth, common), None)
            if row.excuse and len(common) < len(match.rows):
                row.excuse = row.excuse._replace(array=None)
        return row

    def _excuses(self, name: str, mine, truth, rows: list[int]) -> Iterator[Excuse]:
        yield from excuses(name, mine, truth, self.band(name))
        for out, reader in READERS.items():
            if name.endswith(out):
                twin = name.replace("hook_out", "hook_normalized")
                off = self.distance(twin, mine, rows)
                if off <= self.band(twin):
                    said = "before gain and bias, which the next weights contain"
                    yield Excuse(off, self.band(twin), said, reader=name.replace(out, reader))

    def half(self, rows: Sequence[Row]) -> str:
        """Return the half precision that could explain every difference, the finer one; "" if none does.

        It would show from the first product of matrices on, if not in the embeddings.
        """
        right = takewhile(lambda row: row.equal, rows)
        if not all(row.name.startswith(("hook_", "blocks.0.hook_resid_pre", "blocks.0.ln1")) for row in right):
            return ""
        wrong = [(row.error, self.manifest["tensors"][row.name]["band"]) for row in rows if not row.equal]
        fits = [half for half in HALVES if all(error <= (band.get(half) or 0.0) for error, band in wrong)]
        return fits[-1] if wrong and fits else ""

    def _judge_smoke(self, match: Match, x) -> Row:
        """Compare what stands for a tensor: its sum, its projection and its first numbers."""
        if len(match.rows) < self.n_seq:
            raise JudgingError(
                f"{match.theirs} has {len(match.rows)} of {self.n_seq} rows: give a tiny reference"
            )
        says = self.manifest["tensors"][match.name]
        first = {f"number {i}": value for i, value in enumerate(says["first"])}
        truth = {"sum": says["sum"], "projection": says["projection"], **first}
        mine = [total(x), projection(x), *map(float, x.ravel()[: len(first)])]
        # The manifest of a smoke reference has 8 digits of each number.
        band = self.band(match.name)
        bands = [max(says["band"].get(kind, band), 5e-8 * abs(x)) for kind, x in truth.items()]
        errors = [abs(a - b) for a, b in zip(mine, truth.values(), strict=True)]
        worst = int(np.argmax(np.divide(errors, bands)))
        row = Row(
            match.name, match.theirs, list(x.shape), errors[worst], bands[worst], [], mine, [], [*match.said]
        )
        row.where = [list(truth)[worst]]
        if not row.equal and match.name.endswith(CENTRED) and _is_centred(x):
            raise JudgingError(
                f"{match.theirs} is centred: only a tiny or full reference can tell if it is right"
            )
        row.reference, row.array, row.rows = list(truth.values()), x, match.rows
        return row


def judge_all(reference: Reference, matches: Sequence[Match]) -> tuple[list[Row], list[str]]:
    """Judge each tensor, then all of them together. Returns the rows, and what else is to be said.

    Raises JudgingError for another model's trace, and if all that differs would be right under exchanged names.
    """
    rows = [reference.judge(match) for match in placed(matches, reference.distance)]
    by_name = {row.name: row for row in rows}
    excused = [(row, row.excuse.reader) for row in rows if row.excuse]
    for row, reader in sorted(excused, key=lambda pair: bool(pair[1])):  # the readers themselves first
        if not reader or (reader in by_name and by_name[reader].equal):
            row.accept()
    if not reference.tensors:
        return rows, []
    if said := _another_row(rows, reference):
        return rows, said
    _check_embeddings(rows, reference)
    return rows, _exchanged(rows, reference)


def _another_row(rows: Sequence[Row], reference: Reference) -> list[str]:
    """Say of which row of the text MINE is, if it holds one alone, which is not the last as was thought."""

    def fits(row: Row, i: int) -> bool:
        off = difference(row.array, reference.tensors[row.name][..., [i], :])
        return np.abs(off).max(initial=0.0) <= reference.band(row.name)

    alone = [row for row in rows if len(row.rows) == 1 and row.array is not None and row.mine]
    first = next((row for row in alone if not row.equal), None)
    for i, position in enumerate(reference.positions):
        if first and fits(first, i) and sum(fits(row, i) for row in alone) > sum(row.equal for row in alone):
            for row in alone:
                row.rows = [position]
            return [f"your row is row {position} of the reference, not the last, row {reference.n_seq - 1}"]
    return []


def _check_embeddings(rows: Sequence[Row], reference: Reference) -> None:
    """Raise JudgingError if neither embedding has anything to do with the reference's."""
    embeddings = [row for row in rows if row.name in ("hook_embed", "hook_pos_embed") and row.array is not None]
    pairs = [reference.both(row.name, row.array, row.rows)[:2] for row in embeddings]
    cosines = [np.vdot(x, y) / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-300) for x, y in pairs]
    if len(pairs) == 2 and np.max(np.abs(cosines)) < 0.5:
        raise JudgingError(
            "both embeddings have nothing in common with the reference's: MINE is of another model, or its "
            "arrays are misnamed"
        )


def _exchanged(rows: Sequence[Row], reference: Reference) -> list[str]:
    """Say which arrays are equal to the reference's under another name."""
    wrong = {row.name: row for row in rows if not row.equal and row.mine}
    holds: dict[str, str] = {}
    for row in wrong.values():
        for name in [*wrong, *reference.tensors]:
            if name != row.name and row.name not in holds and _fits(row, name, reference):
                holds[row.name] = name
    said = [f"{name} holds what is {other} in the reference" for name, other in holds.items()]
    # q, k and v under one another's names may as well be c_attn read in another order, unless what is computed
    # from them is right (with one token it would be right in any case).
    thirds = all(name.endswith(("hook_q", "hook_k", "hook_v")) for name in holds)
    after = tuple(f"{name.rpartition('hook')[0]}hook_attn_scores" for name in holds)
    used = reference.n_seq > 1 and any(row.equal and row.name in after for row in rows)
    if holds and set(holds.values()) == set(wrong) and (used or not thirds):
        raise JudgingError(f"exchanged names: {', '.join(said[:3])}; nothing else differs: rename them")
    return said[:3]


def _fits(row: Row, name: str, reference: Reference) -> bool:
    """Whether an array is equal to this tensor of the reference."""
    x, truth, band = row.array, reference.tensors[name], reference.band(name)
    if x is None or x.shape[:-2] != truth.shape[:-2] or x.shape[-1] != truth.shape[-1]:
        return False
    # Most are not, and their first column tells already.
    few, column, _ = reference.both(name, x, row.rows)
    if np.abs(difference(few[..., :1], column[..., :1])).max() > band:
        return False
    return reference.distance(name, x, row.rows) <= band


def measured(name: str, theirs: str, mine, truth, band: float, said: list[str]) -> Row:
    """Return the row of two arrays of one shape."""
    off = np.abs(difference(mine, truth))
    at = np.unravel_index(off.argmax(), off.shape)
    seen = np.isfinite(truth)
    first, others = (x[seen][:SHOWN].tolist() for x in (mine, truth))
    row = Row(name, theirs, list(mine.shape), float(off.max()), band, list(map(int, at)), first, others, said)
    row.there = [float(mine[at]), float(truth[at])]
    return row


def measured_parameter(name: str, theirs: str, array, expected) -> Row:
    """Return the row of a parameter, [in, out] or [out, in]; more tokens than the model's are left out."""
    expected, array = np.asarray(expected, np.float64), np.asarray(array, np.float64)
    if not np.isfinite(array).all():
        raise JudgingError(f"{theirs} holds NaN or infinity at {shown(np.argwhere(~np.isfinite(array))[0])}")
    layouts = {"": array, "transposed, [out, in]": array.T, f"padded to {len(array)}": array[: len(expected)]}
    rows = [
        measured(name, theirs, x, expected, last_place(expected) / 2, [said] * bool(said))
        for said, x in layouts.items()
        if x.shape == expected.shape
    ]
    row = min(rows, key=lambda row: row.error)
    if not row.equal:
        x = array if not row.said else layouts[row.said[0]]
        row.said += [f"rounded to {half}" for half in HALVES if np.array_equal(rounded(expected, half), x)]
    return row


def excuses(name: str, mine, truth, band: float) -> Iterator[Excuse]:
    """Yield in which other senses an array is equal to the truth, within the band.

    TransformerLens centres the logits and what writes to the residual stream, and moves the bias of v, which
    each row of z has in full because its weights add up to 1, to c_proj's. Weights so processed are rounded to
    float32 once more, and most values are sums of two.
    """
    off, hook = difference(mine, truth), name.rpartition(".")[2]
    processed = band + last_place(truth)
    if hook in CENTRED and mine.shape[-1] > 1:
        constant = off.mean(axis=-1, keepdims=True)
        error = np.abs(off - constant).max()
        # A constant so large that float32 loses the rest beside it makes everything equal.
        if error <= processed and last_place(mine) <= 4 * processed:
            said = "equal up to a constant per position" + ": centred" * _is_centred(mine)
            yield Excuse(error, processed, said, mine - constant)
    if hook in ("hook_v", "hook_z") and mine.shape[-2] > 1:
        constant = off.mean(axis=-2, keepdims=True)
        error = np.abs(off - constant).max()
        if error <= processed:
            reader = name.replace(f"attn.{hook}", "hook_attn_out")
            said = "equal up to a constant per column: a folded bias"
            yield Excuse(error, processed, said, mine - constant, reader)
    if mine.ndim == 3:
        errors = np.array([[np.abs(difference(a, b)).max() for a in mine] for b in truth])
        order = errors.argmin(axis=1).tolist()
        if sorted(order) == list(range(len(mine))) and errors.min(axis=1).max() <= band:
            said = f"equal up to the order of heads: ours are your {order}"
            yield Excuse(errors.min(axis=1).max(), band, said, mine[order])


def difference(x, truth):
    """x - truth, and 0 in masked cells: those that are -inf in the truth."""
    seen = np.isfinite(truth)
    return np.where(seen, x, 0.0) - np.where(seen, truth, 0.0)


def _is_centred(x) -> bool:
    """Whether each row has mean 0, but for rounding."""
    return bool(np.abs(x.mean(axis=-1)).max() <= 2.0**-20 * np.abs(x).max())


def _finite(match: Match):
    """Return an array with -inf in the masked cells of scores, whatever they held, and no NaN."""
    x = match.array
    masked, refused = np.zeros(x.shape, bool), ~np.isfinite(x)
    if match.name.endswith("attn_scores"):
        masked |= np.arange(x.shape[-1]) > np.array(match.rows)[:, None]
        refused &= ~masked & ~np.isneginf(x)  # a mask may be wrong
    wrong = np.argwhere(refused)
    if len(wrong):
        found = f"{match.theirs} holds {x[tuple(wrong[0])]} at {shown(wrong[0])}"
        raise JudgingError(f"{found}: only numbers can be compared; look how it was computed")
    return np.where(masked, -np.inf, x)
