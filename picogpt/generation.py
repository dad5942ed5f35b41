"""The decode loop: read the prompt, then one token at a time, each step fed with what the last one chose."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import copy
from itertools import chain, pairwise
from numbers import Integral
from threading import Barrier
from typing import Any

import numpy as np

from picogpt import PicogptError
from picogpt.cache import JAXCache, KVCache, with_attend
from picogpt.machine import blas_threads, decode_threads, limited_to
from picogpt.model import gpt2
from picogpt.sampling import make_sampler

# An allocation this large, freed at once and never touched, makes glibc keep smaller freed blocks instead of
# handing them back to the system (mallopt(3), M_MMAP_THRESHOLD, the dynamic threshold). Without it every
# temporary of a long prompt is paid for again in page faults: a third of the prefill.
np.empty((32 << 20) - 8192, dtype=np.uint8)

ROWS_PER_THREAD = 32  # with fewer a thread costs more than it saves: it reads all the weights, too


class GenerationError(PicogptError):
    """A prompt that cannot be continued: empty, too long, or with ids that the model does not have."""


class Decoder:
    """A model that remembers: `decoder(ids)` reads more ids, `[n_seq]`, and returns the logits of the token
    that follows them, `[n_vocab]`. `capacity` is how many it will be given in all."""

    def __init__(self, params, n_head: int, capacity: int):
        self.params, self.n_head, self.position = params, n_head, 0
        self.caches = [KVCache(capacity) for _ in params["blocks"]]

    def __call__(self, ids):
        start, self.position = self.position, self.position + len(ids)
        # Somebody who watches is shown whole arrays, in order.
        most = 1 if "tap" in self.params else len(ids) // ROWS_PER_THREAD
        n_threads = min(most, blas_threads()) if most > 1 else 1
        with limited_to(decode_threads() if n_threads == 1 else 1) as alone:
            if n_threads > 1 and alone:
                return self._read_in_threads(ids, start, n_threads)[0]
            return self._read(ids, start, self.caches, slice(-1, None))[0]

    def _read(self, ids, start, attends, rows):
        params = with_attend(self.params, attends)
        position_ids = np.arange(start, start + len(ids))
        return gpt2(ids, **params, n_head=self.n_head, position_ids=position_ids, logits_to_keep=rows)

    def _read_in_threads(self, ids, start, n_threads):
        """Share the rows of a long prompt among threads, each with a BLAS of one thread. The BLAS by itself
        would share out its products only, and leave one thread with all of softmax, gelu and layer norm."""
        wte = self.params["wte"]
        for cache in self.caches:
            cache.reserve(len(ids), np.empty((self.n_head, 0, wte.shape[1] // self.n_head), wte.dtype))
        barrier = Barrier(n_threads)
        # Equal shares of the work: row s has s keys, and 3 n_embd keys cost about what its products do.
        c = 6 * wte.shape[1]
        shares = [i / n_threads * (len(ids) + len(ids) ** 2 / c) for i in range(n_threads + 1)]
        borders = [round(c / 2 * ((1 + 4 * share / c) ** 0.5 - 1)) for share in shares]

        def read(begin, end):
            attends = [cache.part(start + begin, start + end, barrier.wait) for cache in self.caches]
            return self._read(
                ids[begin:end], start + begin, attends, slice(-1, None) if end == len(ids) else slice(0)
            )

        with ThreadPoolExecutor(n_threads) as pool:
            try:
                parts = [pool.submit(read, begin, end) for begin, end in pairwise(borders)]
                for part in as_completed(parts):
                    part.result()
            except BaseException:
                barrier.abort()  # the others would wait for ever for the one that failed, or hold up a Ctrl-C
                raise
        return parts[-1].result()

    def fork(self) -> "Decoder":
        """A second decoder that has read the same ids."""
        twin = copy(self)
        twin.caches = [cache.fork() for cache in self.caches]
        return twin


class JAXDecoder:
    """The same for JAX arrays. Each step is one compiled function of arrays, so that a fork is free."""

    def __init__(self, params, n_head: int, capacity: int):
        self.params, self.n_head, self.position = params, n_head, 0
        xp = params["wte"].__array_namespace__()
        shape = n_head, capacity, params["wte"].shape[1] // n_head
        self.state = [(xp.zeros(shape, params["wte"].dtype),) * 2 for _ in params["blocks"]]

    def __call__(self, ids):
        start, self.position = self.position, self.position + len(ids)
        # Whoever watches is shown numbers: the functions in a tapped tree are no arguments for `jit`.
        step = _jax_step if "tap" in self.params else _jitted_jax_step()
        logits, self.state = step(np.array(ids), self.params, self.state, start, n_head=self.n_head)
        return logits

    def fork(self) -> "JAXDecoder":
        return copy(self)


def _jax_step(ids, params, state, start, n_head):
    caches = [JAXCache(keys, values, start) for keys, values in state]
    params = with_attend(params, caches)
    position_ids = start + params["wte"].__array_namespace__().arange(len(ids))
    logits = gpt2(ids, **params, n_head=n_head, position_ids=position_ids, logits_to_keep=slice(-1, None))
    return logits[0], [cache.state for cache in caches]


@functools.cache
def _jitted_jax_step():
    import jax

    return jax.jit(_jax_step, static_argnames="n_head")


def generate(
    inputs: Sequence[int], params: dict[str, Any], n_head: int, n_tokens_to_generate: int, **options: Any
) -> list[int]:
    """The article's `generate`: exactly `n_tokens_to_generate` new ids, or fewer if one of `stop_ids` comes
    first. Greedy unless the options, those of `stream`, say otherwise. `inputs` stays as it is."""
    return list(stream(inputs, params, n_head, n_tokens_to_generate, **options))


def stream(
    inputs: Sequence[int], params: dict[str, Any], n_head: int, n_tokens_to_generate: int, **options: Any
) -> Iterator[int]:
    """Yield the new ids one by one, each as soon as it is chosen. Options:

    temperature, top_k, top_p, seed  how to choose: see `sampling.make_sampler`; greedy by default
    stop_ids                         ids that end the text; they are not yielded
    context                          when prompt and new tokens exceed the model's n_ctx positions: "error"
                                     says by how many, "truncate" keeps the prompt's end, "slide" reads the
                                     last n_ctx tokens anew at every step that is past the window

    Raises, at the call, GenerationError for a prompt that cannot be continued and SamplingError.
    """
    return streams(inputs, params, n_head, n_tokens_to_generate, num_samples=1, **options)[0]


def streams(
    inputs: Sequence[int],
    params: dict[str, Any],
    n_head: int,
    n_tokens_to_generate: int,
    *,
    num_samples: int,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    context: str = "error",
) -> list[Iterator[int]]:
    """Several continuations of one prompt, which is read once. The i-th draws with seed + i."""
    how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    check_settings(n_tokens_to_generate, num_samples, seed=seed, context=context, **how)
    n, n_vocab, n_ctx = int(n_tokens_to_generate), len(params["wte"]), len(params["wpe"])
    samplers = [make_sampler(**how, seed=None if seed is None else seed + i) for i in range(num_samples)]
    stops = frozenset(stop_ids)
    ids = _fit(check_ids(inputs, n_vocab), n, n_ctx, context)
    make_decoder = Decoder if params["wte"].__array_namespace__() is np else JAXDecoder
    capacity = min(len(ids) + n, n_ctx)

    def read(ids: list[int]) -> tuple[Any, Any]:
        decoder = make_decoder(params, n_head, capacity)
        return decoder, decoder(ids[-n_ctx:])

    prefill = functools.cache(lambda: read(ids))

    def continuation(choose: Callable[..., int]) -> Iterator[int]:
        if n == 0:
            return
        decoder, logits = prefill()
        if num_samples > 1:
            decoder = decoder.fork()
        so_far = list(ids)
        for remaining in reversed(range(n)):
            next_id = choose(logits)
            if next_id in stops:
                return
            yield next_id
            so_far.append(next_id)
            if not remaining:
                return
            # Past the window every token moves one position down, so that nothing remembered is of use.
            if len(so_far) > n_ctx:
                _, logits = read(so_far)
            else:
                logits = decoder([next_id])

    return [continuation(choose) for choose in samplers]


def check_settings(n_tokens_to_generate: int, num_samples: int, *, context: str, **how_to_choose: Any) -> None:
    """Raise GenerationError or SamplingError for settings of `streams` that are wrong for every model."""
    for name, value, least in (
        ("n_tokens_to_generate", n_tokens_to_generate, 0),
        ("num_samples", num_samples, 1),
    ):
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise GenerationError(f"{name} is {value!r}: give a whole number from {least}")
    if context not in ("error", "truncate", "slide"):
        raise GenerationError(f'context is {context!r}: give "error", "truncate" or "slide"')
    make_sampler(**how_to_choose)


def check_ids(inputs: Sequence[int], n_vocab: int) -> list[int]:
    try:
        ids = np.asarray(inputs)
    except ValueError:
        raise GenerationError("the prompt is a list of unequal lists: give a list of token ids") from None
    if ids.size == 0:
        raise GenerationError("the prompt is empty: give at least one token, such as <|endoftext|>")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise GenerationError(
            f"the prompt is an array of {ids.dtype}, shape {ids.shape}: give a list of token ids"
        )
    for wrong in ids[(ids < 0) | (ids >= n_vocab)]:
        raise GenerationError(
            f"token id {wrong} is not in the model's vocabulary: ids go from 0 to {n_vocab - 1}"
        )
    return ids.tolist()


def _fit(ids: list[int], n: int, n_ctx: int, context: str) -> list[int]:
    excess = len(ids) + n - n_ctx
    if excess <= 0 or context == "slide":
        return ids
    total = f"{len(ids)} tokens of prompt and {n} new ones are {excess} more than the model's {n_ctx} positions"
    if context == "error":
        raise GenerationError(
            f'{total}: shorten the prompt, ask for fewer, or set context to "truncate" or "slide"'
        )
    if excess >= len(ids):
        raise GenerationError(
            f'{total}, and truncating leaves no prompt: ask for fewer, or set context to "slide"'
        )
    return ids[excess:]


def stream_text(ids: Iterable[int], encoder: Any, stop: str | Sequence[str] = ()) -> Iterator[str]:
    """Text as its ids come, in whole characters, up to the stop string that is complete first, and without it.

    What may be the beginning of a stop string is held back until the next ids decide.
    """
    stop = (stop,) if isinstance(stop, str) else stop
    decoder, held = encoder.stream_decoder(), ""
    for piece in chain(map(decoder.feed, ids), (decoder.flush() for _ in range(1))):
        held += piece
        found = [(held.index(s) + len(s), held.index(s)) for s in stop if s in held]
        if found:
            _, start = min(found)
            yield held[:start]
            return
        n_held = max((k for s in stop for k in range(1, len(s)) if held.endswith(s[:k])), default=0)
        free, held = held[: len(held) - n_held], held[len(held) - n_held :]
        if free:
            yield free
    yield held
