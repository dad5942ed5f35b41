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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from picogpt import PicogptError
from picogpt.checkpoint import load_hparams_and_params
from picogpt.command import exit_status, write
from picogpt.diagnose import TENFOLD, diagnose
from picogpt.greedy import compare_ids, read_ids
from picogpt.hugging_face import read_json
from picogpt.judging import Reference, Row, judge_all, measured, measured_parameter, other_ids, parameter
from picogpt.matching import Matcher
from picogpt.model_dirs import find_model_dir
from picogpt.noise import HALVES, isolated
from picogpt.recording import Recording, weights_digest
from picogpt.tensor_files import MANIFEST, read_tensors_file
from picogpt.trace import with_outs

IDS = ("ids", "input_ids", "inputs", "tokens", "idx")
WIDTH = 100  # columns
NORMS = {"ln1": "ln_1", "ln2": "ln_2", "ln_final": "ln_f"}


class CompareError(PicogptError):
    """Two things that cannot be compared."""


@dataclass
class Comparison:
    """All that was found, in order of computation."""

    rows: list[Row]
    n_missing: int  # tensors of the reference that MINE has not
    unknown: list[str]  # names of MINE that mean nothing here
    notes: list[str] = field(default_factory=list)
    isolated: list[Row] = field(default_factory=list)
    diagnosis: list[str] = field(default_factory=list)

    @property
    def first(self) -> Row | None:
        """The first divergence."""
        return next((row for row in [*self.rows, *self.isolated] if not row.equal), None)


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
    for name in IDS:
        if name in theirs and np.ravel(theirs[name]).tolist() != manifest["ids"]:
            raise CompareError(f"{name} in MINE are other ids than the reference's {manifest['ids']!s:.60}")
    matcher = Matcher(manifest["model"]["hparams"], mapping)
    shapes = {name: says["shape"] for name, says in manifest["tensors"].items()}
    arrays = {name: array for name, array in theirs.items() if name not in IDS}
    positions = reference.positions or range(reference.n_seq)
    matches, parameters, unknown = matcher.match(arrays, shapes, positions, reference.distance)
    rows, notes = judge_all(reference, matches)
    weights = []
    if params is not None:
        weights = [
            measured_parameter(name, *pair, parameter(params, name)) for name, pair in parameters.items()
        ]
    elif parameters:
        notes.append(f"{len(parameters)} parameters are not compared without the weights: give --model_size")
    if not rows and not weights:
        some = ", ".join(map(ascii, list(theirs)[:3]))
        raise CompareError(f"no name in MINE is known ({some:.80}): say with --map which of ours they are")
    return Comparison([*weights, *rows], len(shapes) - len({row.name for row in rows}), unknown, notes)


def find_params(recording: Recording, model_size: str | None, models_dir: str | None) -> dict[str, Any]:
    """Return the weights with which a reference was recorded; they are not fetched.

    Raises PicogptError if they are not here, or are others.
    """
    model = recording.manifest["model"]
    name = model_size or model.get("name")
    if not name:
        raise CompareError("the reference does not say which model it is of: give --model_size")
    directory = find_model_dir(name, models_dir)
    if directory is None:
        raise CompareError(f"the weights of {name} are not here: give --models_dir, or --model_size and a path")
    params = load_hparams_and_params(directory)[1]
    if weights_digest(params) != model.get("sha256"):
        raise CompareError(f"{directory} has other weights than the reference was recorded with (sha256)")
    return params


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
    """Return what diagnose.py says of the differences. Raises CompareError if they have embedded other ids."""
    ids, n_head = recording.manifest["ids"], recording.manifest["model"]["hparams"]["n_head"]
    if others := other_ids(found.rows, ids, params["wte"]):
        raise CompareError(f"MINE is of other ids: {others!s:.40}, not {ids!s:.40}")
    arrays = {row.name: row.array for row in found.rows if row.array is not None and len(row.rows) == len(ids)}
    findings = diagnose(arrays, ids, params, n_head)
    return [finding.say() for finding in findings] or [
        "no operation that MINE recorded is wrong by more than noise"
    ]


def table(found: Comparison) -> Iterator[str]:
    """Yield the lines of the report, up to the first divergence."""
    width = max([len(row.name) for row in found.rows] + [20])
    yield f"   {'tensor':<{width}} {'shape':<12} {'in bands':>8}  {'worst at':<11} remarks"
    for n, row in enumerate(found.rows, 1):
        yield from _lines(row, width)
        if not row.equal:
            n_wrong = sum(not other.equal for other in found.rows[n:])
            yield f"   {len(found.rows) - n} follow; {n_wrong} differ, perhaps in consequence: --isolate tells"
            break
    yield f"{len(found.rows)} tensors compared; {found.n_missing} of the reference are not in MINE"
    if found.unknown:
        some = ", ".join(map(ascii, found.unknown))
        yield f"{len(found.unknown)} names in MINE mean nothing here: {some:.50}"
    for said in found.notes:
        yield from textwrap.wrap(said, WIDTH, subsequent_indent="  ")
    if found.isolated:
        wrong = [row for row in found.isolated if not row.equal]
        worst = max(found.isolated, key=lambda row: row.multiple)
        which = f"{len(wrong)} are wrong" if wrong else f"none is wrong (worst: {worst.name}, {_times(worst)})"
        said = f"{len(found.isolated)} operations recomputed from their own inputs: {which}"
        yield from textwrap.wrap(said, WIDTH, subsequent_indent="  ")
        for row in wrong:
            yield from _lines(row, width)
    for said in found.diagnosis:
        yield from textwrap.wrap(said, WIDTH, subsequent_indent="  ")
    first = found.first
    yield "EQUAL" if first is None else f"DIFFERENT, first in {first.name}: {_times(first)} bands"


def _lines(row: Row, width: int) -> Iterator[str]:
    """One line on a tensor, and if it differs numbers side by side."""
    shape, where, said = "x".join(map(str, row.shape)), ",".join(map(str, row.where)), "; ".join(row.said)
    mark = "  " if row.equal else ">>"
    line = f"{mark} {row.name:<{width}} {shape:<12} {_times(row):>8}  {where:<11} "
    if len(line) + len(said) <= WIDTH:
        yield (line + said).rstrip()
    else:
        yield line.rstrip()
        yield from textwrap.wrap(said, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if not row.equal and row.mine:
        worst = [f"  worst {x:.6g}" for x in row.there] or ["", ""]
        for whose, numbers, there in (("mine", row.mine, worst[0]), ("reference", row.reference, worst[1])):
            yield f"      {whose:<10}" + "".join(f"{x:>12.5g}" for x in numbers) + there


def _times(row: Row) -> str:
    if not row.mine:
        return "shape"
    return f"{row.multiple:.2f}" if row.multiple < 1000 else f"{row.multiple:.1e}"


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
    says |= {"tensors": [plain(row) for row in found.rows], "isolated": [plain(row) for row in found.isolated]}
    says |= {key: getattr(found, key) for key in ("n_missing", "unknown", "notes", "diagnosis")}
    return json.dumps(says, indent=1)


def _report_ids(args: argparse.Namespace, a: list[int], b: list[int]) -> int:
    if args.model_size is None:
        raise CompareError("to compare token ids, say whose they are: --model_size NAME")
    directory = find_model_dir(args.model_size, args.models_dir)
    if directory is None:
        raise CompareError(f"{args.model_size} is not here: give --models_dir, or --model_size and a path")
    hparams, params = load_hparams_and_params(directory)
    equal, said = compare_ids(a, b, params, hparams["n_head"])
    write(json.dumps({"equal": equal, "said": said}) + "\n" if args.json else said + "\n")
    return int(not equal)


def report(args: argparse.Namespace) -> int:
    """Compare, write what was found, and return the exit status."""
    lists = [read_ids(args.reference), read_ids(args.mine)]
    if all(lists):
        return _report_ids(args, *lists)
    if any(lists):
        raise CompareError("one of the two files holds token ids, the other none: give two lists, or none")
    if args.isolate and args.dtype != "float32":
        raise CompareError("--isolate knows the bands of float32 only: leave out --dtype")
    recording = Recording.load(args.reference)
    theirs = read_tensors_file(args.mine)
    if (args.mine / MANIFEST).exists():
        _check_manifest(Recording.load(args.mine).manifest, recording.manifest)
    mapping = read_json(args.map) if args.map else {}
    if not all(isinstance(name, str) for name in mapping.values()):
        raise CompareError(f'{args.map} is no map of names: {{"theirs": "ours"}}')
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
    if found.first and params is not None:
        found.diagnosis = diagnosed(found, recording, params)
    write(as_json(found) + "\n" if args.json else "".join(_coloured(line) + "\n" for line in table(found)))
    return int(found.first is not None)


def _check_manifest(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if theirs["ids"] != ours["ids"]:
        raise CompareError(f"MINE is a trace of other ids, {theirs['ids']!s:.40}: record it of the same text")
    if theirs["model"] != ours["model"] and theirs["model"].get("sha256") != ours["model"].get("sha256"):
        name = theirs["model"].get("name")
        raise CompareError(
            f"MINE is a trace of another model, {name or 'without a name'}: its weights are others"
        )


def _coloured(line: str) -> str:
    """The line, in red if it is marked and someone reads it at a terminal."""
    colour = line.startswith((">>", "DIFFERENT")) and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[1;31m{line}\033[0m" if colour else line


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m picogpt.compare REFERENCE MINE`: exit status 0 if they are equal, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m picogpt.compare", description="Show where another GPT-2 first goes wrong."
    )
    parser.add_argument("reference", type=Path, help="a directory that picogpt.trace has written, or token ids")
    parser.add_argument("mine", type=Path, help=".safetensors, .npz, a folder of arrays, or token ids")
    parser.add_argument("--isolate", action="store_true", help="recompute each operation from its own input")
    parser.add_argument("--json", action="store_true", help="write JSON, for machines")
    parser.add_argument("--map", type=Path, help='a JSON file with {"your name": "our name"}')
    parser.add_argument(
        "--dtype", choices=("float32", *HALVES), default="float32", help="what MINE computes in"
    )
    parser.add_argument("--model_size", help="the model, if it is elsewhere than when it was recorded")
    parser.add_argument("--models_dir", help="where models are looked for by name")
    args = parser.parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
