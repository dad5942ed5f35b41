"""Every intermediate of a forward pass by name, to read or to replace; recorded for others to check against.

`run_with_trace` is for Python; `python -m picogpt.trace "text" -o DIR` records a reference: see recording.py.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from picogpt import PicogptError
from picogpt.command import UsageError, count, exit_status, read, say
from picogpt.model import gpt2, with_taps
from picogpt.model_dirs import EMBEDDED
from picogpt.names import tapped

Trace = dict[str, Any]  # name of an intermediate -> array


class TraceError(PicogptError):
    """A hook on something that is not computed, or one that returns what cannot take its place."""


class HookPoint(NamedTuple):
    """Where a hook function is called, as TransformerLens tells it: `hook.name`."""

    name: str


def run_with_trace(
    inputs, params, n_head: int, *, fwd_hooks: Iterable[tuple[str, Callable[..., Any]]] = (), **options: Any
) -> tuple[Any, Trace]:  # [n_seq] -> [n_seq, n_vocab], the trace
    """Run `gpt2`, and return the logits and a copy of every intermediate, in order of computation.

    fwd_hooks  pairs of a name and a function, called as `function(value, hook=hook)` when the value of
               `hook.name` has been computed; what it returns, unless None, takes the value's place
    options    what else `gpt2` takes

    Names and shapes are those of names.py (but for `hook_out`, which no tap sees); dtypes are the parameters'.
    A replaced value is what the trace holds. Raises TraceError for a name that is not computed, or an answer of
    another shape.
    """
    known = tapped(len(params["blocks"]))
    functions: dict[str, list[Callable[..., Any]]] = {}
    for name, function in fwd_hooks:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise TraceError(f"nothing is computed under the name {name!r}: {near or known[:5]} is")
        functions.setdefault(name, []).append(function)
    xp = params["wte"].__array_namespace__()
    trace: Trace = {}

    def tap(name, x):
        for function in functions.get(name, ()):
            answer = function(x, hook=HookPoint(name))
            if answer is not None:
                answer = xp.asarray(answer, dtype=x.dtype)
                if answer.shape != x.shape:
                    raise TraceError(f"the hook on {name} returned {answer.shape}: return the shape {x.shape}")
                x = answer
        trace[name] = xp.asarray(x, copy=True)
        return x

    return gpt2(inputs, **with_taps(params, tap), n_head=n_head, **options), trace


def layer_norms(params) -> dict[str, Any]:
    """Return the parameters of every layer norm, by the prefix of its names."""
    norms: dict[str, Any] = {}
    for i, block in enumerate(params["blocks"]):
        norms |= {f"blocks.{i}.ln1.": block["ln_1"], f"blocks.{i}.ln2.": block["ln_2"]}
    return norms | {"ln_final.": params["ln_f"]}


def with_outs(trace: Trace, params) -> Trace:
    """Add what each layer norm returns, `hook_out`: its normalized rows times gain plus bias."""
    norms, whole = layer_norms(params), {}
    for name, value in trace.items():
        whole[name] = value
        prefix = name.removesuffix("hook_normalized")
        if prefix in norms:
            whole[f"{prefix}hook_out"] = value * norms[prefix]["g"] + norms[prefix]["b"]
    return whole


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with `function` done to every array."""
    if isinstance(tree, dict):
        return {key: tree_map(function, branch) for key, branch in tree.items()}
    if isinstance(tree, list):
        return [tree_map(function, branch) for branch in tree]
    return function(tree)


def astype(tree: Any, dtype: Any) -> Any:
    """The same tree in another dtype; arrays that have it are not copied."""
    return tree_map(lambda array: np.asarray(array, dtype), tree)


def report(args: argparse.Namespace) -> None:
    """Record what the command line asks for, and say where it is."""
    from picogpt.checkpoint import load_encoder_hparams_and_params
    from picogpt.recording import record

    if not args.output.name:
        raise UsageError("-o is empty: give a directory to write to")
    given = read_input(args)
    encoder, hparams, params = load_encoder_hparams_and_params(args.model_size, args.models_dir)
    ids = input_ids(given, encoder, hparams)
    about = {"text": encoder.decode(ids), "token_bytes": [encoder.decode_bytes([i]).hex() for i in ids]}
    recording = record(ids, params, hparams["n_head"], size=args.size, name=args.model_size, about=about)
    recording.save(args.output)
    n = len(recording.manifest["tensors"])
    say(f"{args.output}: {n} tensors of {count(len(ids), 'token')} through {args.model_size} ({args.size})")


def add_input(parser: argparse.ArgumentParser) -> None:
    """What a command that runs one text through a model is given; `read_input` reads it."""
    parser.add_argument("text", nargs="?", help="what the model reads; - or nothing: standard input")
    parser.add_argument("--ids", nargs="+", help="token ids in place of the text: 464 3290")
    about = "a directory, or a name: OpenAI's are downloaded if missing (the embedded shakespeare)"
    parser.add_argument("--model_size", default=EMBEDDED, help=about)
    parser.add_argument("--models_dir", help="where models are looked for by name")


def read_input(args: argparse.Namespace) -> str | list[int]:
    """Return the text, or the ids, that the command line gives: before a model is loaded, or downloaded."""
    if args.ids and args.text is not None:
        raise UsageError("a text and --ids were given: give one of them")
    if args.ids:
        return parse_ids(" ".join(args.ids))
    if args.text is None and sys.stdin is not None and sys.stdin.isatty():
        raise UsageError("there is no text: give it as an argument, or - to type it")
    return read() if args.text in (None, "-") else args.text


def input_ids(given: str | list[int], encoder: Any, hparams: Mapping[str, int]) -> list[int]:
    """Return the ids of what `read_input` returned, which fit the model. `<|endoftext|>` is a token."""
    from picogpt.encoder import END_OF_TEXT
    from picogpt.generation import check_ids

    ids = given
    if isinstance(ids, str):
        ids = encoder.encode(ids, allowed_special=encoder.special_tokens.keys() & {END_OF_TEXT})
    check_ids(ids, hparams["n_vocab"])
    if len(ids) > (n_ctx := hparams["n_ctx"]):
        raise UsageError(f"{len(ids)} tokens do not fit into the model's {n_ctx} positions: shorten the text")
    return ids


def parse_ids(text: str) -> list[int]:
    """Return token ids from "1, 2 3" or "[1, 2, 3]"."""
    try:
        ids = [int(word) for word in text.strip("[] \n").replace(",", " ").split()]
        return np.array(ids, dtype=np.int64).tolist()
    except (ValueError, OverflowError):
        raise UsageError(f"{text!r:.60} are not token ids: give numbers, such as 464,3290") from None


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m picogpt.trace "text" --model_size NAME -o DIR`."""
    parser = argparse.ArgumentParser(
        prog="python -m picogpt.trace",
        description="Record every intermediate, to check others against: see docs/implementing-gpt2.md.",
    )
    add_input(parser)
    parser.add_argument(
        "--size",
        choices=("full", "tiny", "smoke"),
        default="full",
        help="all rows (full), four of them, or sums only",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the directory to write to")
    args = parser.parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
