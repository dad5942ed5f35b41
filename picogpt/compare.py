"""Where another GPT-2 first goes wrong: `python -m picogpt.compare REFERENCE MINE`.

REFERENCE is a directory that picogpt.trace has written; MINE is whatever tensor_files.py reads, under names
that matching.py understands. A tensor's error, its largest difference from the truth, is given in multiples of
its band: how far right float32 programs were seen to stray (noise.py). What is within its band is equal.

The table walks in order of computation and stops at the first divergence, since what follows may only inherit
it; --isolate tells, by recomputing each operation from what MINE itself recorded of its inputs.

Other layouts, centred values, folded biases and heads in another order are equal, and said. Half precision is
not, unless --dtype says that it was meant: the band of bfloat16 is wide enough to hide a wrong GELU.

Two files of token ids, greedy continuations of one prompt, are compared as well: the first step where they part
is computed again, and called a tie within noise or a real difference.

Exit status: 0 equal, 1 different, 2 for what cannot be compared.
"""

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from picogpt import PicogptError
from picogpt.command import exit_status, write
from picogpt.diagnose import TENFOLD, diagnose
from picogpt.greedy import IDS, check_ids_of, check_manifest, lacking, other_ids, report_ids
from picogpt.hugging_face import read_json
from picogpt.judging import Reference, Row, judge_all, measured, measured_parameter
from picogpt.matching import Matcher, ShapeError, counted, parameter
from picogpt.noise import HALVES, isolated
from picogpt.recording import Recording, find_params
from picogpt.replay import NORMS
from picogpt.tensor_files import MANIFEST, read_tensors_file
from picogpt.trace import with_outs

WIDTH = 100  # columns
MAP = '{"their name": "blocks.0.hook_resid_post"}; names are in docs/implementing-gpt2.md, section 3'


SMALL = (
    f"no operation that MINE recorded strays more than {TENFOLD:g} bands: a mistake too small to be named, or "
    "an order of summation that none of our runs has"
)


class CompareError(PicogptError):
    """Two things that cannot be compared."""


@dataclass
class Comparison:
    """All that was found, in order of computation."""

    rows: list[Row]
    n_missing: int  # tensors of the reference that MINE has not
    unknown: list[str]  # names of MINE that mean nothing here
    notes: list[str] = field(default_factory=list)
    isolated: list[Row] | None = None  # None if nobody asked
    n_whole: int = 0  # tensors with all rows, from which operations can be recomputed
    half: str = ""  # the half precision that would explain all that differs
    diagnosis: list[str] = field(default_factory=list)

    @property
    def first(self) -> Row | None:
        """The first divergence."""
        return next((row for row in [*self.rows, *(self.isolated or [])] if not row.equal), None)


def compare(
    recording: Recording,
    theirs: Mapping[str, Any],
    *,
    mapping: Mapping[str, str] | None = None,
    dtype: str = "float32",
    params: Mapping[str, Any] | None = None,
) -> Comparison:
    """Compare the arrays of others, under their own names, with a recording.

    mapping  of their names to ours, where matching.py would not find out
    dtype    "bfloat16" or "float16", if they compute in that
    params   the weights, float32: to compare theirs, if they are among the arrays

    Raises PicogptError for what cannot be compared: no name that is known, impossible shapes, NaN, other ids,
    another model, exchanged names.
    """
    reference, manifest = Reference(recording, dtype), recording.manifest
    check_ids_of(theirs, manifest["ids"])
    matcher = Matcher(manifest["model"]["hparams"], mapping)
    shapes = {name: says["shape"] for name, says in manifest["tensors"].items()}
    arrays = {name: array for name, array in theirs.items() if name not in IDS}
    positions = reference.positions or range(reference.n_seq)
    try:
        matches, parameters, unknown = matcher.match(arrays, shapes, positions, reference.distance)
    except ShapeError as error:
        raise CompareError(f"{error}; the recording is of {_of(manifest)}") from None
    rows, notes = judge_all(reference, matches)
    weights = []
    if params is not None:
        weights = [
            measured_parameter(name, *pair, parameter(params, name)) for name, pair in parameters.items()
        ]
    elif parameters:
        notes.append(f"{counted(parameters, 'parameter')} left out for want of the weights: give --model_size")
    if not rows and not weights:
        some = f"{', '.join(map(ascii, list(theirs)[:3])):.80}"
        if parameters:
            cure = "record what is computed with them, or compare them with --model_size"
            raise CompareError(f"these are weights, not intermediates ({some}): {cure}")
        raise CompareError(f"no name in MINE is known ({some}): give --map a JSON file, {MAP}")
    found = Comparison([*weights, *rows], len(shapes) - len({row.name for row in rows}), unknown, notes)
    if reference.tensors:
        found.n_whole = sum(len(row.rows) == reference.n_seq for row in rows)
    found.half = reference.half(rows)
    return found


def _of(manifest: Mapping[str, Any]) -> str:
    """Of what a recording is, in words."""
    ids, name = manifest["ids"], manifest["model"].get("name")
    return f"{manifest.get('text', ids)!r:.60} ({counted(ids, 'token')})" + f" by {name}" * bool(name)


def isolate(found: Comparison, recording: Recording, params: Mapping[str, Any]) -> None:
    """Recompute each operation from their own inputs, and add how far their own outputs are from that.

    Where they have not recorded an input, it is computed from what they have: then several operations in a row
    are one. The band of one operation is that of the serial loop alone, and others add in other orders: what
    exceeds it tenfold is wrong, as for diagnose.py.
    """
    manifest, reference = recording.manifest, Reference(recording)
    shapes = {name: tuple(says["shape"]) for name, says in manifest["tensors"].items()}
    whole = {row.name: row for row in found.rows if np.shape(row.array) == shapes.get(row.name, ())}
    values = {name: row.array for name, row in whole.items()}
    found.isolated = []
    if not values:
        return
    inputs = {**values, **_normalized(values, params)}
    exact, bands = isolated(inputs, manifest["ids"], params, manifest["model"]["hparams"]["n_head"])
    tapped = {name: values.get(name, x) for name, x in exact.items() if not name.endswith("hook_out")}
    exact |= {name: x for name, x in with_outs(tapped, params).items() if name not in tapped}
    for name, row in whole.items():
        band = max(bands[name], reference.band(name, "isolated"))
        if name.endswith("hook_normalized"):
            # Most programs divide by a scale that they keep to themselves, and record another rounding of it.
            scale = name.replace("normalized", "scale")
            band += float(np.abs(exact[name] / exact[scale]).max()) * bands[scale]
        found.isolated.append(measured(name, row.theirs, row.array, exact[name], band, []))
        found.isolated[-1].allowed = TENFOLD


def _normalized(values: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return of each layer norm's output what it was before gain and bias, where a tap can put it in place."""
    found = {}
    for name, value in values.items():
        *layer, norm, last = ["", *name.split(".")]
        if last == "hook_out":
            branch = (params["blocks"][int(layer[-1])] if layer[1:] else params)[NORMS[norm]]
            if np.all(branch["g"] != 0.0):
                found[f"{name.removesuffix('out')}normalized"] = (value - branch["b"]) / branch["g"]
    return found


def diagnosed(found: Comparison, recording: Recording, params: Mapping[str, Any]) -> list[str]:
    """Return what diagnose.py says of the differences."""
    ids, n_head = recording.manifest["ids"], recording.manifest["model"]["hparams"]["n_head"]
    arrays = {row.name: row.array for row in found.rows if row.array is not None and len(row.rows) == len(ids)}
    findings = diagnose(arrays, ids, params, n_head) if arrays else []
    if {mistake.rounds for finding in findings for mistake in finding.mistakes} - {found.half}:
        found.half = ""  # it is the mistake that explains it
    if arrays and not findings and not lacking(found.rows, len(ids)):
        return [SMALL]
    return [finding.say() for finding in findings]


def table(found: Comparison, explain: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Yield the lines of the report, up to the first divergence; `explain` looks for its cause, which takes a
    while, when they have been read."""
    width = max([len(row.name) for row in found.rows] + [20])
    yield f"   {'tensor':<{width}} {'shape':<12} {'in bands':>8}  {'worst at':<11} remarks"
    for n, row in enumerate(found.rows, 1):
        yield from row.lines(width, WIDTH)
        if not row.equal:
            yield from _rest(found, found.rows[n:])
            break
    yield f"{counted(found.rows, 'tensor')} compared; {found.n_missing} of the reference are not in MINE"
    if found.unknown:
        some = ", ".join(map(ascii, found.unknown))
        mean = "means" if len(found.unknown) == 1 else "mean"
        yield f"{counted(found.unknown, 'name')} in MINE {mean} nothing here: {some:.50}"
    if found.isolated:
        wrong = [row for row in found.isolated if not row.equal]
        worst = max(found.isolated, key=lambda row: row.multiple)
        which = f"{len(wrong)} {'is' if len(wrong) == 1 else 'are'} wrong"
        which = which if wrong else f"none is wrong (worst: {worst.name}, {worst.times})"
        said = f"{counted(found.isolated, 'operation')} recomputed from their own inputs: {which}"
        yield from textwrap.wrap(said, WIDTH, subsequent_indent="  ")
        for row in wrong:
            yield from row.lines(width, WIDTH, "right")
    explain()
    for said in [*found.notes, *found.diagnosis]:
        yield from textwrap.wrap(said, WIDTH, subsequent_indent="  ")
    first = found.first
    yield "EQUAL" if first is None else f"DIFFERENT, first in {first.name}: {first.times} bands"


def _rest(found: Comparison, rows: Sequence[Row]) -> Iterator[str]:
    """One line on what follows the first divergence."""
    n_wrong = sum(not row.equal for row in rows)
    if rows:
        said = f"   {len(rows)} follow{'s' * (len(rows) == 1)}; {n_wrong} differ{'s' * (n_wrong == 1)}"
        tells = ": --isolate tells" * (found.isolated is None and found.n_whole > 0)
        yield said + f", perhaps in consequence{tells}" * (n_wrong > 0)


def as_json(found: Comparison) -> str:
    """Return all that was found, what follows the first divergence included, for machines."""

    def number(x: float) -> float | None:
        return x if np.isfinite(x) else None

    def plain(row: Row) -> dict[str, Any]:
        says = {key: getattr(row, key) for key in ("name", "theirs", "shape", "equal", "where", "said")}
        says |= {key: number(getattr(row, key)) for key in ("error", "band", "multiple")}
        return says | {key: [number(x) for x in getattr(row, key)] for key in ("mine", "reference", "there")}

    first = found.first
    says: dict[str, Any] = {"equal": first is None, "first_divergence": first and first.name}
    says |= {
        "tensors": [plain(row) for row in found.rows],
        "isolated": [plain(row) for row in found.isolated or []],
    }
    says |= {key: getattr(found, key) for key in ("n_missing", "unknown", "notes", "diagnosis")}
    return json.dumps(says, indent=1)


def _no_recording(reference: Path, mine: Path) -> str:
    """Say how the first argument becomes a recording."""
    if reference.exists() and (mine / MANIFEST).exists():
        return f"the recording comes first: compare {quote(str(mine))} {quote(str(reference))}"
    made = "truth" if reference.is_file() else quote(str(reference))
    return f"{reference} is no recording: `python -m picogpt.trace TEXT -o {made}` makes one"


def report(args: argparse.Namespace) -> int:
    """Compare, write what was found, and return the exit status."""
    if says := report_ids(args.reference, args.mine, args.model_size, args.models_dir):
        write(json.dumps(says) + "\n" if args.json else f"{says['said']}\n")
        return int(not says["equal"])
    if args.isolate and args.dtype != "float32":
        raise CompareError("--isolate knows the bands of float32 only: leave out --dtype")
    if not (args.reference / MANIFEST).exists():
        raise CompareError(_no_recording(args.reference, args.mine))
    recording = Recording.load(args.reference)
    ids = recording.manifest["ids"]
    if args.isolate and not recording.tensors:
        cure = "leave out --isolate, or record with --size full"
        raise CompareError(f"a smoke recording cannot be recomputed: {cure}")
    theirs = read_tensors_file(args.mine)
    if (args.mine / MANIFEST).exists():
        check_manifest(Recording.load(args.mine).manifest, recording.manifest)
    mapping = read_json(args.map) if args.map else {}
    if not all(isinstance(name, str) for name in mapping.values()):
        raise CompareError(f"{args.map} is no map of names: {MAP}")
    params = None
    if args.isolate or args.model_size:
        params = find_params(recording, args.model_size, args.models_dir)
    found = compare(recording, theirs, mapping=mapping, dtype=args.dtype, params=params)
    if args.isolate and params is not None:
        isolate(found, recording, params)
    if found.first and params is None:
        try:
            params = find_params(recording, None, args.models_dir)
        except PicogptError as error:
            found.notes.append(f"no diagnosis: {error}")

    if found.first and params is not None and (others := other_ids(found.rows, ids, params["wte"])):
        raise CompareError(f"MINE is of other ids: {others!s:.40}, not {ids!s:.40}")

    def explain() -> None:
        if found.first and params is not None:
            found.diagnosis = diagnosed(found, recording, params)
        if (found.first or args.isolate) and not found.diagnosis:
            found.notes += filter(None, [lacking(found.rows, len(ids))])
        if found.half:
            said = f"what differs is no further off than {found.half} would be"
            found.notes.append(f"{said}; if that is meant: --dtype {found.half}")

    if args.json:
        explain()
        write(as_json(found) + "\n")
    else:
        for line in table(found, explain):
            write(_coloured(line) + "\n")
    return int(found.first is not None)


def _coloured(line: str) -> str:
    """The line, in red if it is marked and someone reads it at a terminal."""
    colour = line.startswith((">>", "DIFFERENT")) and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[1;31m{line}\033[0m" if colour else line


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m picogpt.compare REFERENCE MINE`: exit status 0 if they are equal, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m picogpt.compare",
        description="Show where another GPT-2 first goes wrong: see docs/implementing-gpt2.md, section 7.",
    )
    ids = "; or token ids, with --model_size"
    parser.add_argument("reference", type=Path, help="a directory that picogpt.trace has written" + ids)
    mine = ".safetensors, .npz, a folder of .npy or, with a tensors.json, of raw float32"
    parser.add_argument("mine", type=Path, help=mine + ids)
    parser.add_argument("--isolate", action="store_true", help="recompute each operation from its own input")
    parser.add_argument("--json", action="store_true", help="write JSON, for machines")
    parser.add_argument("--map", type=Path, help=f"a JSON file: {MAP}")
    parser.add_argument(
        "--dtype", choices=("float32", *HALVES), default="float32", help="what MINE computes in"
    )
    parser.add_argument("--model_size", help="the model, if it is elsewhere than when it was recorded")
    parser.add_argument("--models_dir", help="where models are looked for by name")
    args = parser.parse_args(argv)
    return exit_status(lambda: report(args), unread=2)


if __name__ == "__main__":
    sys.exit(main())
