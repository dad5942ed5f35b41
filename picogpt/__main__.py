"""The command line: `python -m picogpt "prompt"`, or `picogpt "prompt"`.

Nothing heavy is imported before it is needed, since the first token is waited for: NumPy only after --threads
has been seen (a BLAS counts its threads when it is loaded).
"""

import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from time import perf_counter
from typing import Any

from picogpt import __version__
from picogpt.command import UsageError, colours, count, exit_status, read, say, write
from picogpt.machine import blas, decode_threads, memory, set_threads

HELP = """\
picogpt continues a text with GPT-2, on NumPy alone.

    picogpt "prompt" [--flag value | --flag=value]...        (or: python -m picogpt ...; --version)

The prompt is one argument and text whatever it looks like; if it looks like a flag, put a lone -- before it.
The prompt - is standard input (UTF-8; one final newline is dropped), and so is no prompt behind a pipe.
An empty prompt, or none, starts a new text from <|endoftext|>.

    --n_tokens_to_generate 40  how many tokens at most; <|endoftext|> ends the text earlier
    --model_size NAME_OR_DIR   124M, 355M, 774M or 1558M, OpenAI's, downloaded when it is not there yet; or the
                               name of a directory in --models_dir; or any model directory;
                               without it the small model that comes with the program answers
    --models_dir DIR           where models live; otherwise $PICOGPT_MODELS_DIR, or ./models if there is one, or
                               the user's cache directory (python -m picogpt.info shows them)
    --temperature T            0 always takes the likeliest token (greedy); 0.8 surprises more; by default 0,
                               or 1 when --top_k or --top_p is given
    --top_k K                  draw among the K likeliest tokens only
    --top_p P                  draw among the likeliest tokens that hold the share P of the probability
    --seed S                   draw the same again; the i-th sample, from 0, is the one of seed S + i
    --stop TEXT                end before this text, taken as it stands (a newline is $'\\n' in bash and zsh);
                               may be given several times
    --num_samples 1            how many continuations; a line of --- stands between two of them
    --context error            when prompt and new tokens exceed the model's window: error; truncate (drop the
                               prompt's beginning); slide (read the last n_ctx tokens anew for every token)
    --show probabilities       in place of the text a row for each token: its probability, and the likeliest
                               others with theirs; those of the draw, after temperature, top_k and top_p, or,
                               greedy, the model's own; the tokens that make up a --stop are shown, too; in
                               colour on a terminal (unless NO_COLOR is set), and then the text itself
    --backend numpy            or jax
    --threads N                how many threads compute; without it all cores read the prompt, and all but one
                               write the text, so that a busy neighbour does not hold them up

Standard output is the new text and one newline; all else goes to standard error.
The exit status is 0, or 2 after an error, or 130 after Ctrl-C.

Beside it, each with --help: python -m picogpt.download 124M; python -m picogpt.verify MODEL (is it whole and
right?); python -m picogpt.info (which models, which BLAS). python -m picogpt.encoder "text" shows tokens, and
python -m picogpt.explain "text" -o page.html a whole forward pass, to look at in a browser.
To check another GPT-2 against this one: python -m picogpt.trace, .compare, .conform, .check, .formula.
"""

FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)  # so "--help me" is none: it has a space
TEXT_FLAGS = {"prompt", "model_size", "models_dir", "stop", "context", "show", "backend"}
BESIDE_WEIGHTS_AND_CACHE = 150_000_000  # bytes: Python, NumPy, the vocabulary, a token's own
EMBEDDED_NOTE = " (the embedded model; GPT-2 itself: --model_size 124M)"


def main(argv: Sequence[str] | None = None) -> int:
    """Be the program: return the exit status for these arguments, sys.argv's by default.

    Takes over Ctrl-C and the encoding of standard output. Until there is text, Ctrl-C ends the process on the
    spot: an exception would get lost, or turned into another, in one of the modules being imported.
    """
    if argv is None:  # UTF-8, also where the locale made Python read something else
        argv = [os.fsencode(word).decode("utf-8", "surrogateescape") for word in sys.argv[1:]]
    words = argv

    def command() -> None:
        if list(words) == ["--version"]:
            return write(f"picogpt {__version__}\n")
        if (flags := quote(words)) is None:
            return write(HELP)
        import fire

        return fire.Fire(run, flags, name="picogpt")

    return exit_status(command)


def quote(argv: Sequence[str]) -> list[str] | None:
    """The command as Fire is to see it, each argument `--flag=value`; None if help is wanted.

    Fire would read the prompts 1e3, None and [1, 2] as Python, takes `-` for its separator, swallows what
    follows `--`, and finds an unknown flag only after the call. So text is quoted as a Python literal, and
    what cannot be right never gets there; what is left for Fire to read are numbers.
    """
    values: dict[str, list[str]] = {"prompt": []}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            values["prompt"] += rest
            break
        flag = FLAG.fullmatch(word)
        if word == "-h" or (flag and flag[1] == "help"):
            return None
        if not flag:
            values["prompt"].append(word)
            continue
        name = flag[1].replace("-", "_")
        if name not in FLAGS:
            raise UsageError(f"there is no flag --{flag[1]}: {nearest(name)}")
        values.setdefault(name, []).append(take_value(name, rest) if flag[2] is None else flag[2])
    return [f"--{name}={literal(name, given)}" for name, given in values.items() if given]


def nearest(name: str) -> str:
    """The cure for an unknown flag."""
    from difflib import get_close_matches

    near = [flag for flag in FLAGS if name in flag] or get_close_matches(name, FLAGS, n=1)
    ask = f"did you mean --{near[0]}? " if near else ""
    return f"{ask}--help lists them all (if this is the prompt, put a lone -- before it)"


def take_value(name: str, rest: list[str]) -> str:
    """Take the next argument as the value of a flag, unless it is a flag itself."""
    if not rest:
        raise UsageError(f"--{name} has no value: write --{name} VALUE")
    if rest[0] == "--" or FLAG.fullmatch(rest[0]):
        raise UsageError(f"--{name} has no value; if {rest[0]} is meant to be it, write --{name}={rest[0]}")
    return rest.pop(0)


def literal(name: str, given: list[str]) -> str:
    """A flag's value for Fire: text in Python's quotes, a number as it stands."""
    if name == "stop":
        return repr(given)
    if len(given) > 1 and name == "prompt":
        for word in given:
            if re.match("-[A-Za-z]", word):
                raise UsageError(f"there is no flag {word}: --help lists them all")
        if find_spec(f"picogpt.{given[0]}") if given[0].isidentifier() else None:
            raise UsageError(f"{given[0]} is a program of its own: python -m picogpt.{' '.join(given)}")
        words = f"{given[0]!r}, {given[1]!r}{', ...' * (len(given) > 2)}"
        raise UsageError(
            f"the prompt is {len(given)} arguments ({words}): put one pair of quotes around all of it"
        )
    if len(given) > 1:
        raise UsageError(f"--{name} is given {len(given)} times ({', '.join(given)}): give it once")
    if name not in TEXT_FLAGS and len(given[0]) > 40:  # Python will not even write such numbers down
        raise UsageError(f"--{name} is {given[0][:40]!a}..., {len(given[0])} characters: give a number")
    return repr(given[0]) if name in TEXT_FLAGS else given[0]


def run(
    *,
    prompt: str | None = None,
    n_tokens_to_generate: int = 40,
    model_size: str | None = None,
    models_dir: str | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    num_samples: int = 1,
    context: str = "error",
    show: str | None = None,
    backend: str = "numpy",
    threads: int | None = None,
) -> None:
    """Generate and print: what Fire calls, a keyword a flag."""
    check(stop, show, backend, threads)
    if threads is not None:
        set_threads(threads)
    from picogpt.checkpoint import load_encoder_hparams_and_params
    from picogpt.generation import check_settings, streams
    from picogpt.model_dirs import EMBEDDED

    settings: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "context": context}
    settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    check_settings(n_tokens_to_generate, **settings)  # which `streams` does, too, but only after a download
    greedy = temperature == 0 or (temperature is top_k is top_p is None)
    text = read_prompt(prompt)
    model = EMBEDDED if model_size is None else model_size
    encoder, hparams, params = load_encoder_hparams_and_params(model, models_dir)
    ids = encode(text, encoder)
    params = to_jax(params) if backend == "jax" else params
    seen: list[Any] = []
    if show:
        from picogpt.show import printer, watched

        params = watched(params, seen)
    samples = streams(
        ids,
        params,
        hparams["n_head"],
        n_tokens_to_generate,
        stop_ids=() if encoder.end_of_text is None else (encoder.end_of_text,),
        **settings,
    )
    warn_of_memory(model, hparams, len(ids) + n_tokens_to_generate, num_samples)
    if num_samples > 1 and greedy:
        say("greedy samples are all the same: for different ones set --temperature, 0.8 for example")
    print_text: Callable[[Iterable[int]], None] = partial(print_plainly, encoder=encoder, stop=stop)
    if show:
        how = {"temperature": 1.0 if temperature is None else temperature, "top_k": top_k, "top_p": top_p}
        print_text = printer(seen, encoder, stop, {} if greedy else how, colours())
    warnings.simplefilter("error", RuntimeWarning)  # overflow: the arithmetic itself is sound
    if sys.platform == "darwin":  # NumPy before 2.4 reports overflow in Accelerate's products of small numbers
        warnings.filterwarnings("ignore", ".* encountered in matmul", RuntimeWarning)
    try:
        print_samples(samples, print_text, model + EMBEDDED_NOTE * (model_size is None), backend)
    except RuntimeWarning as warning:
        cure = f"are the weights damaged? `python -m picogpt.verify {model}` tells"
        raise UsageError(f"the numbers in this model grow too large ({warning}): {cure}") from None


FLAGS = tuple(run.__kwdefaults__ or ())


def check(stop: Sequence[str], show: str | None, backend: str, threads: int | None) -> None:
    """Refuse what no other room would."""
    if "" in stop:
        raise UsageError("--stop is empty: give the text to stop at, or leave it out")
    if show not in (None, "probabilities"):
        raise UsageError(f"show is {show!r}: give probabilities, or leave it out")
    if backend not in ("numpy", "jax"):
        raise UsageError(f"backend is {backend!r}: give numpy or jax")
    if backend == "jax" and find_spec("jax") is None:
        raise UsageError("--backend jax needs JAX: pip install jax")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
        raise UsageError(f"threads is {threads!r}: give a whole number from 1 to 1024, or leave it out")


def read_prompt(prompt: str | None) -> str:
    """The prompt, from standard input if it says so or if there is none and somebody may be writing to us."""
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        return ""
    return read() if prompt in (None, "-") else str(prompt)


def encode(text: str, encoder: Any) -> list[int]:
    """The ids to begin with."""
    from picogpt.encoder import END_OF_TEXT

    if END_OF_TEXT in text:
        say(f"{END_OF_TEXT} in the prompt is read as ordinary text; an empty prompt starts from the token")
    if not text and encoder.end_of_text is not None:
        return [encoder.end_of_text]
    return encoder.encode(text)


def warn_of_memory(model: str, hparams: dict[str, int], n_seq: int, num_samples: int) -> None:
    """Say beforehand when the weights will not stay in memory: then every token waits for the disk."""
    from picogpt.checkpoint import parameter_shapes

    cache = 2 * hparams["n_layer"] * min(n_seq, hparams["n_ctx"]) * hparams["n_embd"]  # of each sample
    needed = BESIDE_WEIGHTS_AND_CACHE + 4 * (
        num_samples * cache + sum(map(math.prod, parameter_shapes(hparams).values()))
    )
    if needed > 1 << 30:  # a machine with less than that is nobody's
        total, available = memory()
        if needed > available:
            has = f"{available / 1e9:.1f} of this machine's {total / 1e9:.1f} GB are free"
            say(f"{model} needs {needed / 1e9:.1f} GB of memory, but {has}: it will be slow")


def to_jax(params: dict[str, Any]) -> dict[str, Any]:
    """The same tree with JAX arrays."""
    try:
        import jax

        return jax.tree.map(jax.numpy.asarray, params)
    except (RuntimeError, AssertionError, ValueError) as error:  # no such platform, no driver, a wrong setting
        raise UsageError(f"JAX does not start: {error}") from error


def print_plainly(ids: Iterable[int], encoder: Any, stop: Sequence[str]) -> None:
    """Write the text of a continuation as it comes."""
    from picogpt.generation import stream_text

    for piece in stream_text(ids, encoder, stop):
        write(piece)


def print_samples(
    samples: Iterable[Iterable[int]], print_text: Callable[[Iterable[int]], None], model: str, backend: str
) -> None:
    """Print each continuation as it comes, then the summary, also if the reader or Ctrl-C ends it early."""
    times = [perf_counter()]
    try:
        for i, ids in enumerate(samples):
            if i:
                write("---\n")
            print_text(clocked(ids, times))
            write("\n")
    except BrokenPipeError:
        pass
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            write("\n")
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left takes milliseconds
        say(f"{model}: {pace(times)}, {engine(backend)}")


def clocked(ids: Iterable[int], times: list[float]) -> Iterator[int]:
    """Note when each id comes. Once there is one, Ctrl-C ends the text at the next.

    The handler only makes a note: an exception raised out of the blue is lost where Python calls back from C.
    """
    pressed: list[int] = []
    for next_id in ids:
        if pressed:
            raise KeyboardInterrupt
        times.append(perf_counter())
        signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
        yield next_id


def pace(times: list[float]) -> str:
    """How many tokens, how soon the first (the prompt is read before it), how fast the others."""
    n = len(times) - 1
    first = f", the first after {times[1] - times[0]:.2f} s" if n else ""
    others = f", then {(n - 1) / (times[-1] - times[1] + 1e-9):.1f} tokens per second" if n > 1 else ""
    return f"{count(n, 'token')}{first}{others}"


def engine(backend: str) -> str:
    """What did the arithmetic."""
    if backend == "jax":
        import jax

        return f"JAX on {jax.default_backend()}"
    for library in blas().info():
        kernel, n = library.get("architecture") or library["version"], decode_threads()
        return f"{library['internal_api']} {kernel}, {count(n, 'thread')}"
    return "a BLAS that threadpoolctl does not know"  # such as Apple's Accelerate


if __name__ == "__main__":
    sys.exit(main())
