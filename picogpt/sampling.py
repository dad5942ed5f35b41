"""From logits to the next id: greedy, or a draw after temperature, top-k and top-p, in this order.

The recipe, so that another language can repeat it to the id. All arithmetic is float64.

    1. logits = (logits - largest) / temperature
    2. top_k: the k-th largest logit is the bar; what is below it goes, ties with it stay
    3. p = softmax(logits)
    4. top_p: in order of falling p (equal ones by rising id) a token stays while the sum of those before it
       is below top_p; so the token that crosses top_p stays, as in Hugging Face's TopPLogitsWarper
    5. u = next double of `numpy.random.Generator(PCG64(seed))`, one a token: 53 random bits / 2^53, in [0, 1)
    6. c = running sum of the p that are left, in order of id; the answer is the first id with c > u * c[-1];
       or, if u * c[-1] is rounded up to c[-1] and there is none, the last id with p > 0
"""

from collections.abc import Callable
from contextlib import suppress
from numbers import Integral, Real

import numpy as np

from picogpt import PicogptError
from picogpt.model import softmax


class SamplingError(PicogptError):
    """A temperature, top_k, top_p or seed outside its range."""


def greedy(logits) -> int:  # [n_vocab] -> id
    """The likeliest id; the smallest of them at a tie."""
    return int(logits.argmax())


def probabilities(logits, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None):
    """What the next id is drawn from: steps 1 to 4 of the recipe.  # [n_vocab] -> [n_vocab]

    logits is any real array; the result is NumPy float64, zero for what was cut off. After top_p it adds up
    to less than 1: step 6 divides.
    """
    logits = np.asarray(logits, dtype=np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to -inf, as it should
        logits = (logits - logits.max()) / temperature
    if top_k is not None and top_k < len(logits):
        logits = np.where(logits < np.partition(logits, -top_k)[-top_k], -np.inf, logits)
    p = softmax(logits)
    if top_p is None or top_p == 1:
        return p
    # Tokens below this share hold less than 1 - top_p between them: they go, and need not be sorted.
    falling = np.flatnonzero(p > (1 - top_p) / (2 * len(p)))
    falling = falling[np.argsort(-p[falling], kind="stable")]
    before = np.cumsum(p[falling][:-1])
    kept = np.append(falling[:1], falling[1:][before < top_p])
    nucleus = np.zeros_like(p)
    nucleus[kept] = p[kept]
    return nucleus


def draw(p, uniform: float) -> int:  # [n_vocab] -> id
    """Step 6: the id at which the running sum passes `uniform`, a number in [0, 1)."""
    running = np.cumsum(p)
    last = np.flatnonzero(p)[-1]
    return int(min(np.searchsorted(running, uniform * running[-1], side="right"), last))


def make_sampler(
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Callable[..., int]:
    """A function from logits `[n_vocab]` to the next id, with its own stream of random numbers.

    temperature  0 is greedy. Not given: 1 if top_k or top_p is, else 0
    top_k        how many of the likeliest tokens may be drawn, 1 or more
    top_p        how much probability they hold between them, above 0 and up to 1
    seed         of PCG64, 0 or more. Not given: unpredictable

    Raises SamplingError for a value that is not a number or outside its range.
    """
    if temperature is None:
        temperature = 0.0 if top_k is None and top_p is None else 1.0
    _check(
        "temperature",
        temperature,
        Real,
        lambda t: 0 <= float(t) < float("inf"),
        "0 (greedy) or more, such as 0.8",
    )
    _check("top_k", top_k, Integral, lambda k: k >= 1, "a whole number from 1, or leave it out")
    _check("top_p", top_p, Real, lambda p: 0 < p <= 1, "a number above 0 and up to 1, or leave it out")
    _check("seed", seed, Integral, lambda s: s >= 0, "a whole number from 0, or leave it out")
    random = np.random.Generator(np.random.PCG64(seed))

    def choose(logits) -> int:
        if not np.isfinite(logits.max()):
            raise SamplingError("the model computed NaN or infinity: its weights are damaged; fetch them again")
        if temperature == 0:
            return greedy(logits)
        return draw(probabilities(logits, float(temperature), top_k, top_p), random.random())

    return choose


def _check(name: str, value, kind: type, good: Callable[..., bool], wanted: str) -> None:
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    with suppress(OverflowError):  # an int that no float can hold
        if value is None or (is_number and good(value)):
            return
    raise SamplingError(f"{name} is {value!r:.40}: give {wanted}")
