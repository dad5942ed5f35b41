"""A forward pass as a page to look at: `python -m picogpt.explain "text" -o page.html`.

The page is one file that needs no network: explain.html, with the numbers of one run in it as JSON. They are
the model's own: `run_with_trace` gives the intermediates, and the logit lens is `gpt2` with fewer blocks.

A page has at most 2 MB. Text, norms, lens and logits are always whole; patterns and residual stream get what is
left, and where that is not enough for all, some of the layers, heads and columns: see `sample`.
"""

import argparse
import base64
import inspect
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from picogpt import PicogptError, __version__
from picogpt.checkpoint import (
    NoVocabularyError,
    load_encoder,
    load_encoder_hparams_and_params,
    load_hparams_and_params,
)
from picogpt.command import UsageError, count, exit_status, say
from picogpt.encoder import END_OF_TEXT, Encoder
from picogpt.generation import check_ids
from picogpt.model import attention, gpt2, softmax, transformer_block
from picogpt.model_dirs import find_model_dir
from picogpt.sampling import probabilities
from picogpt.show import likeliest
from picogpt.tensor_bundle import new_file
from picogpt.trace import Trace, add_input, input_ids, read_input, run_with_trace

FORMAT = "picogpt explain 1"
TEMPLATE = Path(__file__).with_name("explain.html")
SLOT = '<script type="application/json" id="data">{}</script>'  # the template's line for the numbers
MOST_TOKENS = 128  # of more, a picture of who looks at whom shows nothing
MOST_BYTES = 1_950_000  # of a page, but for the names of its arrays: 2 MB in all
LONGEST_PIECE = 64  # bytes; the rows of a piece's merges grow with the square of them
LENS, LOGITS = 5, 300  # how many tokens are named: in a cell of the lens, and of the last logits
LEAST_LAYERS, LEAST_COLUMNS = 4, 16

EMBEDDINGS = ("hook_embed", "hook_pos_embed")
STREAM = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")

# What a panel shows of the source: a function, the first and the last line ("" is the function's own), and the
# lines that are meant. A line is quoted by a part of it that stands in no other line of the function.
PANELS: dict[str, tuple[Any, str, str, tuple[str, ...]]] = {
    "tokens": (Encoder._merge, "", "", ("rank, i = heappop(heap)", "merges.append(", '= left + right, "", i')),
    "embeddings": (gpt2, 'tap("hook_embed"', 'tap("hook_pos_embed"', ("wte[inputs]", "wpe[xp.asarray")),
    "residual": (transformer_block, "", "", ('tap("hook_attn_out"', 'tap("hook_mlp_out"')),
    "attention": (attention, "", "", ("scores = ", "pattern = softmax(", 'tap("hook_pattern"')),
    "lens": (gpt2, "for block in blocks:", 'tap("logits"', ("for block in", "x = layer_norm(", "logits = ")),
    "sampling": (probabilities, "", "", ("/ temperature", "np.partition(", "p = softmax(", "< top_p")),
}


class ExplainError(PicogptError):
    """More tokens than a page shows, or a model whose weights are damaged."""


def explain(
    ids: Sequence[int],
    params: Mapping[str, Any],
    hparams: Mapping[str, int],
    *,
    encoder: Encoder | None = None,
    text: str | None = None,
    name: str = "",
) -> dict[str, Any]:
    """Run the model over 1 to MOST_TOKENS ids, `n_layer + 1` times, and return what a page holds, for `page`.

    encoder  names the tokens; without one they are their numbers, "#464"
    text     what the encoder made the ids of, if it is to be shown cut into pieces and merged
    name     of the model

    Patterns and residual stream become float16 (float32 where that overflows), the last logits float32; norms
    have 5 significant digits, probabilities 4. Raises ExplainError, or GenerationError for what are no ids.
    """
    ids, n_head = check_ids(ids, hparams["n_vocab"]), hparams["n_head"]
    if len(ids) > MOST_TOKENS:
        raise ExplainError(f"{len(ids)} tokens are too many to look at: give at most {MOST_TOKENS}")
    with np.errstate(all="ignore"):  # of damaged weights; what comes of them is found right after
        logits, trace = run_with_trace(ids, params, n_head)
        lens = logit_lens(ids, params, n_head, logits)
    # A variance that overflows makes a row of zeros, which no later number betrays.
    scales = [scale for hook, scale in trace.items() if hook.endswith("hook_scale")]
    if not all(np.isfinite(numbers).all() for numbers in (logits, lens["probabilities"], *scales)):
        raise ExplainError("the model computed NaN or infinity: its weights are damaged; fetch them again")
    names = stream_of(range(hparams["n_layer"]))
    named = {*ids, *likeliest(logits[-1], LOGITS), *np.unique(lens["ids"]).tolist()}
    data: dict[str, Any] = {"format": FORMAT, "picogpt": __version__, "model": name, "hparams": {**hparams}}
    data |= {"text": text, "ids": ids}
    data |= {
        "tokens": [token_text(i, encoder) for i in ids],
        "pieces": None if text is None or encoder is None else cut(text, encoder),
        "norms": {hook: rounded(np.linalg.norm(trace[hook].astype(np.float64), axis=-1), 5) for hook in names},
        "lens": lens,
        "logits": packed(logits[-1], np.float32),
        "vocab": {str(i): token_text(i, encoder) for i in sorted(named)},
        "source": {panel: excerpt(*quoted) for panel, quoted in PANELS.items()},
    }
    data |= sample(trace, hparams, MOST_BYTES - TEMPLATE.stat().st_size - len(as_json(data)))
    if any(len(piece["text"].encode()) > LONGEST_PIECE for piece in data["pieces"] or ()):
        said = f"{data['sampling']} Pieces of more than {LONGEST_PIECE} bytes are shown without their merges."
        data["sampling"] = said.lstrip()
    return data


def stream_of(layers: Iterable[int]) -> list[str]:
    """The names of the embeddings, and of the residual stream and what is added to it in these layers."""
    return [*EMBEDDINGS, *(f"blocks.{i}.{hook}" for i in layers for hook in STREAM)]


def token_text(i: int, encoder: Encoder | None) -> str:
    r"""What a token stands for: its text, parts of a character as "\xe2\x80"; "#464" if no encoder knows it."""
    if encoder is None or i >= encoder.n_vocab:  # vocabularies may be shorter than the model's table
        return f"#{i}"
    return encoder.decode_bytes([i]).decode("utf-8", errors="backslashreplace")


def cut(text: str, encoder: Encoder) -> list[dict[str, Any]]:
    """The pieces of a text: symbols before and after every merge, its rank, and where the new symbol stands.

    Of a piece of more than LONGEST_PIECE bytes only the last row is there. `<|endoftext|>` is never merged.
    """
    parts = text.split(END_OF_TEXT) if encoder.end_of_text is not None else [text]
    pieces: list[dict[str, Any]] = []
    for n, part in enumerate(parts):
        if n:
            end = [encoder.end_of_text]
            pieces.append({"text": END_OF_TEXT, "rows": [[END_OF_TEXT]], "ranks": [], "at": [], "ids": end})
        for piece in encoder.explain(part):
            row = dict(enumerate(piece.symbols))  # first byte -> symbol, in order
            rows, merges, at = [[*row.values()]], piece.merges, []
            if len(row) > LONGEST_PIECE:
                rows, merges = [piece.tokens], []
            for _, start, left, right in merges:
                del row[start + len(left)]
                row[start] = left + right
                rows.append([*row.values()])
                at.append([*row].index(start))
            ranks = [merge.rank for merge in merges]
            pieces.append({"text": piece.text, "rows": rows, "ranks": ranks, "at": at, "ids": piece.ids})
    return pieces


def logit_lens(ids: list[int], params: Mapping[str, Any], n_head: int, logits) -> dict[str, Any]:
    """What the model would say if it ended after 0, 1, ... n_layer blocks: the LENS likeliest tokens after each
    of the ids, and the probability of the one that comes.

    logits  of the whole model, which has run already  # [n_seq, n_vocab]
    """
    from tqdm import trange

    lens: dict[str, Any] = {"ids": [], "probabilities": [], "next": []}
    n_layer = len(params["blocks"])
    no_bar = None if sys.stderr else True  # None: where standard error is a terminal; without one it would fail
    for depth in trange(n_layer + 1, desc="logit lens", unit=" runs", leave=False, disable=no_bar, delay=1):
        fewer = {**params, "blocks": params["blocks"][:depth]}
        x = gpt2(ids, **fewer, n_head=n_head) if depth < n_layer else logits
        p = softmax(x.astype(np.float64))
        top = [likeliest(row, LENS) for row in x]
        lens["ids"].append(top)
        lens["probabilities"].append([rounded(row[best], 4) for row, best in zip(p, top, strict=True)])
        lens["next"].append([*rounded([row[i] for row, i in zip(p, ids[1:], strict=False)], 4), None])
    return lens


def rounded(x: Iterable[float], digits: int) -> list[float]:
    """The numbers with so many significant digits."""
    return [float(f"{number:.{digits}g}") for number in x]


def packed(x, dtype: Any) -> dict[str, Any]:
    """An array for JSON: its shape, its dtype, and its bytes in base64."""
    x = np.asarray(x, dtype=np.dtype(dtype).newbyteorder("<"), order="C")
    data = base64.b64encode(x.tobytes()).decode()
    return {"shape": list(x.shape), "dtype": x.dtype.name, "data": data}


def sample(trace: Trace, hparams: Mapping[str, int], room: int) -> dict[str, Any]:
    """Patterns and residual stream, as much of them as `room` bytes of base64 hold, and a sentence on the rest.

    Patterns may have half of the room, or what the stream leaves: all heads of as many layers as fit, or, where
    that is less than LEAST_LAYERS, fewer heads. The residual stream of these layers, and the embeddings, have
    as many columns as then fit. What is shown of layers, heads and columns is evenly spaced.
    """
    n_seq = len(trace["hook_embed"])
    whole = stream_of(range(hparams["n_layer"]))
    largest = max(np.abs(trace[hook]).max() for hook in whole)
    dtype = np.dtype(np.float16 if largest <= np.finfo(np.float16).max else np.float32)
    numbers = room * 3 // 4 // dtype.itemsize  # base64 takes 4 characters for 3 bytes
    n_layer, n_head, n_embd = (hparams[key] for key in ("n_layer", "n_head", "n_embd"))
    patterns = max(numbers // 2, numbers - len(whole) * n_seq * n_embd) // n_seq**2
    n_heads = min(n_head, max(1, patterns // min(n_layer, LEAST_LAYERS)))
    layers = spread(n_layer, max(LEAST_LAYERS, patterns // n_heads))
    heads = spread(n_head, n_heads)
    names = stream_of(layers)
    left = numbers - len(layers) * len(heads) * n_seq**2
    columns = spread(n_embd, max(LEAST_COLUMNS, left // (len(names) * n_seq)))
    arrays = {hook: trace[hook][heads] for hook in (f"blocks.{i}.attn.hook_pattern" for i in layers)}
    arrays |= {hook: trace[hook][:, columns] for hook in names}
    shown = {"layers": (layers, n_layer), "heads": (heads, n_head), "columns": (columns, n_embd)}
    less = [f"{len(some)} of {n} {what}" for what, (some, n) in shown.items() if len(some) < n]
    said = f"To keep the page small it shows {', '.join(less)}, evenly spaced; norms and logit lens are of all."
    return {
        "layers": layers,
        "heads": heads,
        "columns": columns,
        "sampling": said if less else "",
        "arrays": {hook: packed(x, dtype) for hook, x in arrays.items()},
    }


def spread(n: int, most: int) -> list[int]:
    """At most so many of the indices 0 to n - 1, evenly spaced, with the first and, of several, the last."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()


def excerpt(function: Any, first: str, last: str, marks: Iterable[str]) -> dict[str, Any]:
    """Lines of a function's source, with their file and number: see PANELS."""
    lines, start = inspect.getsourcelines(function)

    def line_of(quoted: str) -> int:
        (at,) = (i for i, line in enumerate(lines) if quoted in line)
        return at

    begin, end = line_of(first) if first else 0, line_of(last) + 1 if last else len(lines)
    return {
        "file": f"picogpt/{Path(inspect.getfile(function)).name}",
        "first": start + begin,
        "lines": [line.rstrip("\n") for line in lines[begin:end]],
        "mark": [start + line_of(mark) for mark in marks],
    }


def as_json(data: Mapping[str, Any]) -> str:
    """JSON in ASCII that may stand in a page: whatever text it holds, it ends no element and no line."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def page(data: Mapping[str, Any]) -> str:
    """The page that shows what `explain` has returned."""
    return TEMPLATE.read_text(encoding="utf-8").replace(SLOT, SLOT.replace("{}", as_json(data)))


def load(args: argparse.Namespace) -> tuple[Encoder | None, dict[str, int], dict[str, Any]]:
    """The model of a command line; without an encoder if ids are given and the directory has no vocabulary."""
    directory = find_model_dir(args.model_size, args.models_dir)
    if not (args.ids and directory):
        return load_encoder_hparams_and_params(args.model_size, args.models_dir)
    hparams, params = load_hparams_and_params(directory)
    try:
        return load_encoder(directory, hparams), hparams, params
    except NoVocabularyError:
        return None, hparams, params


def report(args: argparse.Namespace) -> None:
    """Write the page that the command line asks for, and say where it is."""
    output = args.output.resolve()  # what a link leads to is written, and the link stays
    if args.output.name in ("", "-") or (output.exists() and not output.is_file()):
        raise UsageError(f"-o {args.output} is no file to write to: give one, such as page.html")
    if not output.parent.is_dir():
        raise UsageError(f"-o {args.output}: there is no directory {output.parent}: make it first")
    given = read_input(args)
    encoder, hparams, params = load(args)
    ids = input_ids(given, encoder, hparams)
    name = Path(args.model_size).resolve().name
    text = given if isinstance(given, str) else None
    data = explain(ids, params, hparams, encoder=encoder, text=text, name=name)
    html = page(data).encode()
    with new_file(output) as file:
        file.write(html)
    said = f"{args.output}: {count(len(ids), 'token')} through {name}, {len(html) / 1e6:.2f} MB"
    say(". ".join(filter(None, (said, data["sampling"]))))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m picogpt.explain "text" --model_size NAME -o page.html`."""
    parser = argparse.ArgumentParser(
        prog="python -m picogpt.explain",
        description=f"Show what a model does with up to {MOST_TOKENS} tokens, on a page for any browser: "
        "merges, residual stream, attention, logit lens, logits, each beside its lines of source.",
        epilog="A model directory without a vocabulary can be given --ids; its tokens are shown as #1, #2.",
    )
    add_input(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the page to write, such as page.html")
    args = parser.parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
