"""What conform.py asks of a program, level by level, and what judges its answers.

Expectations come from the one forward pass in float64, the encoder and the sampler; tolerances from noise.py.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from picogpt import PicogptError
from picogpt.command import count
from picogpt.encoder import Encoder
from picogpt.model import gpt2
from picogpt.noise import noise_bands
from picogpt.sampling import draw, greedy, probabilities
from picogpt.trace import astype

MOST_LOGITS = 1_000_000  # in one answer: with 50257 tokens that is a prompt of 19
LONGEST = 64  # prompt, however long the context: the formula model's whole context

TEXTS = (
    "",
    "Hello world",
    "The cat's on the mat; they'll say it's Bob's, we've I'd you're isn't I'm",
    "IT'S DON'T 's't'd 'S 'll' ''s",  # contractions are in lower case only, and cut anywhere
    "x'd've x'there x'There x'Sing x'Me x'Resist 'lling rock 'n' roll \u2019s don\u2019t",
    "0 12 345 6789 3.14159 1,000,000 2nd x86 v2.0",
    "one  two   three    four",  # of a run of blanks the last one belongs to the word
    "   leading, trailing   ",
    " ",
    "  ",
    "\n",
    "line\nline\n\nline\n \nend\n\n",
    "CRLF\r\nand\r\n\r\nmore\rbare",
    "\ttab\t\ttabs \t mixed \t",
    "def f(x):\n    if x:\n        return x**2  # square\n",
    "caf\u00e9 cafe\u0301 na\u00efve \u00dcber stra\u00dfe",  # composed, and with a mark of its own
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",  # marks are no letters
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002 \ud55c\uad6d\uc5b4 \u4e2d\u6587",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u05e2\u05d1\u05e8\u05d9\u05ea \u0639\u0631\u0628\u064a",
    "\u0661\u0662\u0663 \u00bd \u00b2 \u2163 \u2460",  # numbers that are no digits of ours
    "\U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1eb",
    # With the merges of a small vocabulary only this tells the classes apart: after the rest, ' goes with it.
    "\u00e9's\u044f's\u540d's\U0001d518's\U00020000's",
    "\u00bd's\u2167's\u0663's",
    "\t's\n's\r's\u3000's\u00a0's\u0085's\x1c's\u0301's\u200b's",
    "a\u00a0b\u2003c\u3000d\u2028e\u0085f\u200bg\ufeffh",  # white space in Unicode, and what looks like it
    "\x00\x01\x7f\x1b[0m",
    'http://example.org/?q=1&r=%20#x <b>bold</b> {"a": [1, 2]} ... !!! --- ___ $5 50% @me',
    "<|endoftext|>",
    "before<|endoftext|>after",
    "ab" * 200 + "a" * 200,
    "Donaudampfschifffahrtsgesellschaftskapit\u00e4n supercalifragilisticexpialidocious",
)


SMALL = [1.5, 0.25, -1.0, 3.0, 2.75]
TIED = [2.0, 1.0, 2.0, 0.5, 1.0, 2.0]
LARGE = [(37 * i * i + 11 * i + 3) % 509 / 64 - 4 for i in range(512)]
# logits, temperature, top_k (0: all), how many tokens top_p is to keep (0: all), and which of those that are
# left, by falling probability, is to be drawn (-1: the first by id, with u = 0)
DRAWS = (
    *((logits, 0.0, 0, 0, 0) for logits in (SMALL, TIED, LARGE)),
    *((SMALL, 1.0, 0, 0, rank) for rank in (-1, 0, 1, 2, 3, 4)),
    *((SMALL, temperature, 0, 0, rank) for temperature in (0.5, 2.0) for rank in (0, 2)),
    *((LARGE, temperature, 0, 0, rank) for temperature in (0.7, 1.0, 1.3) for rank in (0, 9, 100)),
    *((SMALL, 1.0, top_k, 0, rank) for top_k in (1, 2, 3, 100) for rank in (-1, 0, min(top_k, 5) - 1)),
    *((TIED, 1.0, 2, 0, rank) for rank in (0, 1, 2)),  # three share the second place: all stay
    *((SMALL, 0.8, 0, n, rank) for n in (1, 2, 3) for rank in (-1, 0, n - 1)),  # n - 1: the token that crosses
    *((TIED, 1.0, 0, n, n - 1) for n in (2, 4)),  # of equal ones the lower ids stay
    *((LARGE, temperature, 0, 40, rank) for temperature in (0.7, 1.5) for rank in (-1, 0, 20, 39)),
    *((LARGE, temperature, 30, 9, rank) for temperature in (0.7, 1.5) for rank in (-1, 0, 4, 8)),
)
OPENAIS = "this is OpenAI's rule (src/sample.py): the token that crosses top_p is dropped; here it stays"


class Difference(Exception):
    """An answer that is not what it should be; the message says how, in lines."""


class WrongLogits(Difference):
    """Logits outside the noise band; an operation is wrong, unless a remark tells how they came about."""

    def __init__(self, message: str, remark: str = ""):
        super().__init__(f"{message}\n{remark}" if remark else message)
        self.remark = remark


class WrongCount(Difference):
    """More or fewer logits than the model has tokens."""


class Case(NamedTuple):
    """A request, and what judges its answer: it returns the error in noise bands, or raises Difference."""

    word: str
    numbers: Sequence[float]
    judge: Callable[[list[Any]], float] = lambda answer: 0.0
    about: str = ""
    ids: Sequence[int] = ()  # of logits: all that the model has read, with what is in its cache

    def request(self) -> str:
        """The line that is sent. No number has an exponent."""
        numbers = (str(x) if isinstance(x, int) else f"{x:.6f}".rstrip("0").rstrip(".") for x in self.numbers)
        return " ".join([self.word, str(len(self.numbers)), *numbers])


class ConformError(PicogptError):
    """A program that cannot be checked: it is missing, dies, hangs, or does not speak the protocol."""


class Hang(ConformError):
    """No answer for a long time."""


class Result(NamedTuple):
    """What came of a level; error is what ended it early, and case what was asked then."""

    n_answers: int
    worst: float  # error in noise bands
    unknown: list[str]  # words answered by `?`
    error: Exception | None = None
    case: Case = Case("", ())

    def same_as(self, other: "Result", right: set[tuple[int, ...]]) -> bool:
        """Whether this is but the other's failure again, and nothing that had been right is wrong now."""
        if isinstance(self.error, WrongLogits) and isinstance(other.error, WrongLogits):
            return self.error.remark == other.error.remark and (*self.case.ids,) not in right
        reasons = [re.sub("`.*?`", "", str(error)) for error in (self.error, other.error)]
        return isinstance(self.error, ConformError) and reasons[0] == reasons[1]

    def of_another_model(self, right: set[tuple[int, ...]]) -> bool:
        return isinstance(self.error, WrongCount) and not right


class Reference:
    """What is right: the model in float64, and how far float32 strays from it."""

    def __init__(self, encoder: Encoder, hparams: dict[str, int], params: Any):
        self.encoder, self.hparams, self.params = encoder, hparams, params
        self.exact = astype(params, np.float64)
        self.truths: dict[tuple[int, ...], Any] = {}
        self.bands: dict[tuple[int, ...], float] = {}
        # Answers of all positions are one line; their size bounds the prompts.
        longest = min(hparams["n_ctx"], LONGEST, max(MOST_LOGITS // hparams["n_vocab"], 2))
        n = encoder.n_vocab
        self.long = [(37 * i * i + 11 * i + 3) % n for i in range(longest)]
        text = encoder.encode("The cat's on the mat")[:longest]
        self.prompts = [[0], [n - 1], self.long[:2], self.long[:3], [n // 2] * min(5, longest), text, self.long]

    def truth(self, ids: Sequence[int]) -> Any:  # [n_seq] -> [n_seq, n_vocab]
        """The logits, float64."""
        key = tuple(ids)
        if key not in self.truths:
            self.truths[key] = gpt2(ids, **self.exact, n_head=self.hparams["n_head"])
        return self.truths[key]

    def band(self, ids: Sequence[int]) -> float:
        """How far a right program's logits may be from the truth."""
        key = tuple(ids)
        if key not in self.bands:
            truth = {"logits": self.truth(ids)}
            self.bands[key] = noise_bands(ids, self.params, self.hparams["n_head"], truth)["float32"]["logits"]
        return self.bands[key]

    def near(self, ids: Sequence[int], rows: slice) -> Callable[[list[float]], float]:
        """A judge for the logits of some positions of a prompt."""

        def judge(answer: list[float]) -> float:
            truth = self.truth(ids)
            wanted = truth[rows]
            if len(answer) != wanted.size:
                if len(wanted) == 1:
                    raise WrongCount(f"answers {len(answer):,} logits, the model has {wanted.size:,}")
                shape = "n_vocab times the number of ids"
                raise Difference(f"expected {wanted.size:,} numbers, {shape}\nfound    {len(answer):,}")
            found = np.array(answer).reshape(wanted.shape)
            errors = _errors(found, wanted) / self.band(ids)
            if errors.max() > 1:
                row = int((errors > 1).any(axis=1).argmax())
                position = range(len(ids))[rows][row]
                raise self._how(ids, position, found, row)
            return float(errors.max())

        return judge

    def _how(self, ids: Sequence[int], position: int, rows: Any, row: int) -> WrongLogits:
        """Say how a row of logits differs."""
        truth, band = self.truth(ids), self.band(ids)
        wanted, found = truth[position], rows[row]
        errors = _errors(found, wanted)
        others = [i for i, row in enumerate(truth) if _errors(found, row).max() <= band]
        with np.errstate(invalid="ignore"):
            offset = found - wanted - (found - wanted).mean()
        worst = int(errors.argmax())
        lines = [
            f"after position {position} (id {ids[position]}), the logit of id {worst}:"
            f" expected {wanted[worst]:.9g}, found {found[worst]:.9g},"
            f" {errors[worst] / band:,.3g} times the noise band of {band:.2g}",
            "expected " + " ".join(f"{x:.9g}" for x in wanted[:5]) + " ...",
            "found    " + " ".join(f"{x:.9g}" for x in found[:5]) + " ...",
        ]
        remark = ""
        if others:
            remark = f"these are the logits after position {others[0]}"
        elif np.abs(offset).max() <= 2 * band:
            remark = "the whole row is off by one constant: are these log-probabilities?"
        elif digits := _few_digits(rows, band):
            remark = f"your numbers have {digits}: print %.9g"
        return WrongLogits("\n".join(lines), remark)

    def continues(self, prompt: Sequence[int], n: int) -> Callable[[list[int]], float]:
        """A judge for `n` greedy ids: each is scored after those that the program itself chose before it."""

        def judge(found: list[int]) -> float:
            n_vocab = self.hparams["n_vocab"]
            if len(found) != n or not all(0 <= i < n_vocab for i in found):
                raise Difference(f"expected {n} ids from 0 to {n_vocab - 1}\nfound    {_some(found)}")
            ids = [*prompt, *found]
            for step, row in enumerate(self.truth(ids[:-1])[len(prompt) - 1 :]):
                best, chosen = greedy(row), found[step]
                # Nearer than this, noise in the two logits can exchange them: a tie.
                if best != chosen and row[best] - row[chosen] > 2 * self.band(ids[: len(prompt) + step]):
                    raise Difference(
                        f"new id {step}: expected {best} (logit {row[best]:.6g}), "
                        f"found {chosen} (logit {row[chosen]:.6g})\nfound    {_some(found)}"
                    )
            return 0.0

        return judge


def _errors(found: Any, wanted: Any) -> Any:
    errors = np.abs(found - wanted)
    return np.where(np.isnan(errors), np.inf, errors)


def _few_digits(x: Any, band: float) -> str:
    """Say how many digits all numbers have, if so few that printing them has cost more than noise does."""
    largest = np.abs(x).max(initial=0.0)
    if 0 < largest < np.inf:
        leading = 10.0 ** np.floor(np.log10(largest))
        for n in range(7):  # a unit in the last place that is less than the band does no harm
            if 10.0**-n > band and all(float(f"{v:.{n}f}") == v for v in x.flat):
                return count(n, "decimal")
            if 10.0**-n * leading > band and all(float(f"{v:.{n}e}") == v for v in x.flat):
                return count(n + 1, "digit")
    return ""


def same(expected: list[int], otherwise: int | None = None, rule: str = "") -> Callable[[list[int]], float]:
    """A judge for whole numbers that must be equal; `rule` is what gives the one number `otherwise`."""

    def judge(found: list[int]) -> float:
        if found != expected:
            pairs = zip(expected, found, strict=False)
            first = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(expected), len(found)))
            said = f"\n{rule}" if found == [otherwise] else ""
            raise Difference(f"expected {_some(expected, first)}\nfound    {_some(found, first)}{said}")
        return 0.0

    return judge


def _some(numbers: list[int], first: int = 0) -> str:
    start = max(first - 5, 0)
    shown = " ".join(map(str, numbers[start : start + 12])) or "nothing"
    return "... " * (start > 0) + shown + " ..." * (len(numbers) > start + 12)


def tokenizer(reference: Reference) -> Iterator[Case]:
    """Texts that trap, every token decoded, and the text of every token encoded: that uses every merge."""
    encoder = reference.encoder
    tokens = [encoder.decode_bytes([i]) for i in range(encoder.n_vocab)]
    whole = [token.decode() for token in tokens if token.decode(errors="ignore").encode() == token]
    for text in (*TEXTS, *whole):
        yield Case("encode", [*text.encode()], same(encoder.encode(text)), f"the text {text!a:.80}")
    ids = encoder.encode("".join(TEXTS))
    for some in ([], ids, *([i] for i in range(encoder.n_vocab))):
        expected = encoder.decode_bytes(some)
        yield Case("decode", some, same([*expected]), f"the bytes {expected[:60]!r}")


def last_position(reference: Reference) -> Iterator[Case]:
    """One id, which needs no attention; then more."""
    for ids in reference.prompts:
        yield Case("logits", ids, reference.near(ids, slice(-1, None)), ids=ids)


def all_positions(reference: Reference) -> Iterator[Case]:
    """The same prompts, whole."""
    for ids in reference.prompts:
        yield Case("all_logits", ids, reference.near(ids, slice(None)), ids=ids)


def cached(reference: Reference) -> Iterator[Case]:
    """Every way to begin: with one id, with a few, with all but one; each time the cache begins anew."""
    for ids in reference.prompts:
        for n in sorted({1, 2, 5, len(ids) - 1} & {*range(1, len(ids))}):
            yield Case("start", ids[:n], reference.near(ids, slice(n - 1, n)), ids=ids[:n])
            for i in range(n, len(ids)):
                about = (
                    f"step {i - n + 1} after `start` with the ids {_some(ids[:n])}; so it is at position {i}"
                )
                yield Case("step", [ids[i]], reference.near(ids, slice(i, i + 1)), about, ids[: i + 1])


def greedy_text(reference: Reference) -> Iterator[Case]:
    """From short and long prompts, up to the end of the context."""
    longest = len(reference.long)
    for ids in reference.prompts:
        for n in sorted({1, 20, longest - len(ids)} & {*range(1, longest - len(ids) + 1)}):
            yield Case("greedy", [n, *ids], reference.continues(ids, n))


def sampling(_: Reference) -> Iterator[Case]:
    """The recipe of sampling.py, away from its borders: float32 and float64 must agree."""
    decided = False
    for logits, temperature, top_k, n_kept, rank in DRAWS:
        top_p, u, openais = 1.0, 0.5, None
        if temperature:
            p = probabilities(logits, temperature, top_k or None)
            falling = np.sort(p)[::-1]
            fewer = np.where(p >= falling[max(n_kept - 2, 0)], p, 0.0)  # by one, but equals stay
            if n_kept:  # between the sums of n_kept - 1 and of n_kept tokens
                sums = np.cumsum([0.0, *falling])
                top_p = round(float(sums[n_kept - 1] + sums[n_kept]) / 2, 6)
            p = probabilities(logits, temperature, top_k or None, top_p)
            chosen = int(np.argsort(-p, kind="stable")[rank])
            # In the middle of that token's share; rank -1 is the border that every program has exactly.
            u = round(float((p[:chosen].sum() + p[chosen] / 2) / p.sum()), 6) if rank >= 0 else 0.0
            openais = draw(fewer, u) if n_kept else None
        wanted = draw(p, u) if temperature else greedy(np.array(logits))
        about = f"temperature {temperature:g}, top_k {top_k}, top_p {top_p:g}, u {u:g}"
        judge = same([wanted], None if decided else openais, OPENAIS)
        yield Case("sample", [temperature, top_k, top_p, u, *logits], judge, about)
        decided |= openais not in (None, wanted)  # whoever answers the first such case rightly has our rule


LEVELS = {
    1: ("tokenizer", tokenizer),
    2: ("logits", last_position),
    3: ("all positions", all_positions),
    4: ("cached decoding", cached),
    5: ("greedy text", greedy_text),
    6: ("sampling", sampling),
}
