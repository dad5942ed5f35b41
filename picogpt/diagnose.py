"""Which known mistake would explain what somebody else's GPT-2 has recorded.

Each stretch of the model, from one recorded value of the residual stream to the next, runs by itself from their
own values (replay.py): what it should have given, what it would have given with a mistake of the catalogue, and
how far float32 strays from either. A tensor *strays* if it is more than TENFOLD its noise band away from what
is right; a mistake *fits* if what they recorded lies NEAR what it gives, and no other tensor comes to stray by
it. Where none fits, constants are fitted, and the weights of other places tried; then mistakes in pairs.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from picogpt.finding import Finding
from picogpt.mistakes import CATALOGUE, CONSTANTS, Constant, misplaced
from picogpt.replay import Guess, Guesses, Mistake, Model, Stretch, hook_of, in_block, is_rounded
from picogpt.trace import Trace

TENFOLD = 10.0
NEAR = TENFOLD**0.5  # half-way between the band and tenfold, in orders of magnitude
STEPS = 6  # of Newton's at most


def diagnose(
    theirs: Mapping[str, Any], ids: Sequence[int], params: Any, n_head: int, *, seconds: float = 60.0
) -> list[Finding]:
    """Return what is wrong in a recorded run, in order of computation; nothing if every operation is right.

    theirs   name -> array, names and shapes of names.py; any of the tensors may be missing
    ids      token ids [n_seq]
    params   the tree of parameters, float32
    seconds  about how long to look for pairs of mistakes, and, where several layers were recorded as one, for
             mistakes in one of them and for other constants

    What follows from a tensor that no mistake fits is not reported. Values without the bias of v, where it was
    added to the output's, as TransformerLens does, and a residual stream or logits without their row means are
    right.
    """
    # What has been computed is rounded last.
    order = sorted(CATALOGUE.values(), key=lambda entry: entry.rounds != "")
    model, deadline = Model(theirs, ids, params, n_head, order), time.monotonic() + seconds
    searches = [_Search(stretch, deadline) for stretch in model.stretches()]
    known: list[Mistake] = []
    for search in searches:
        search.examine(known)
        for result in search.results:
            known += [guess.mistake for guess in (result.fits or [()])[0] if guess.mistake not in known]
    return list(_findings(searches, model))


@dataclass
class _Result:
    """A tensor that strays, and everything that fits it, the closest first."""

    tensor: str
    place: int
    fits: list[Guesses]
    error: float
    after: str


class _Search:
    """What is wrong in a stretch, tensor by tensor."""

    def __init__(self, stretch: Stretch, deadline: float):
        self.stretch, self.model, self.deadline = stretch, stretch.model, deadline
        self.results: list[_Result] = []
        self.hopeless: list[str] = []
        self.state: _State

    def examine(self, known: Sequence[Mistake]) -> None:
        """Find it; `known` mistakes, of other stretches, are tried first."""
        self.stretch.load()
        self._unfold()
        while first := self.state.first:
            fits = self.state.fits(known, self.deadline)
            error = self.state.away[first] / self.state.band[first]
            if fits or not self.inherited(first):
                self.results.append(_Result(first, self.model.place(first), fits, error, self._before(first)))
            self.hopeless.append(first)
            self.state = _State(self, self.state.guesses + (fits[0] if fits else ()))
        self.stretch.trees, self.state.exact = {}, {}

    def inherited(self, name: str) -> bool:
        """Whether it is computed from a tensor that no mistake fits, and that is not put in place of ours."""
        unexplained = {result.tensor for result in self.results if not result.fits}
        made_of = self.stretch.made_of(name) if unexplained else set()
        return any((self.model.place(tensor), hook_of(tensor)) in made_of for tensor in unexplained)

    def _before(self, name: str) -> str:
        recorded = list(self.stretch.theirs)
        before = recorded[: recorded.index(name)]
        started = self.stretch.start is not None
        return before[-1] if before else f"block {self.stretch.places[0] - 1}" if started else "the ids"

    def _unfold(self) -> None:
        """Give values, and their averages, back the bias of v if another has it: more than v then is right."""
        self.state = _State(self, ())
        for place in self.stretch.places:
            v, z = (f"blocks.{place}.attn.hook_{x}" for x in "vz")
            if v in self.state.strays:
                folded = self.stretch.theirs
                bias = np.split(self.stretch.trees[place]["attn"]["c_attn"]["b"], 3)[2]
                bias = bias.reshape(self.model.n_head, 1, -1)
                self.stretch.theirs = {n: x + bias if n in (v, z) else x for n, x in folded.items()}
                unfolded = _State(self, ())
                if set(unfolded.strays) < set(self.state.strays) - {v}:
                    self.state = unfolded
                else:
                    self.stretch.theirs = folded

    def silent(self, mistake: Mistake) -> bool:
        """Whether nothing that was recorded here would show the mistake."""
        self.stretch.load()
        guesses, band = self.state.guesses, self.state.band
        guess = Guess(mistake, self.stretch.places, 0)
        without, run = self.stretch.run(guesses), self.stretch.run((*guesses, guess))
        self.stretch.trees = {}
        shared = band.keys() & run.keys()
        return all(
            self.model.largest(name, run[name], without[name]) <= TENFOLD * band[name] for name in shared
        )


class _State:
    """A stretch as it looks when some mistakes are allowed for."""

    def __init__(self, search: _Search, guesses: Guesses):
        self.search, self.stretch, self.model, self.guesses = search, search.stretch, search.model, guesses
        self.exact = self.stretch.run(guesses)
        self.away = self._away(self.exact)
        self.band = self.stretch.bands(guesses, self.exact)
        self.wrong = {name for name, away in self.away.items() if away > TENFOLD * self.band.get(name, np.inf)}
        self.strays = [name for name in self.away if name in self.wrong and name not in search.hopeless]
        self.first = self.strays[0] if self.strays else ""

    def _away(self, run: Trace) -> dict[str, float]:
        theirs = self.stretch.theirs
        return {
            name: self.model.largest(name, x, run[name]) if name in run else 0.0 for name, x in theirs.items()
        }

    def row(self, run: Trace) -> int:
        """The first position that is wrong in the first tensor that strays."""
        away = self.model.difference(
            self.first, self.stretch.theirs[self.first], run.get(self.first, self.exact[self.first])
        )
        rows = away.reshape(-1, *away.shape[-2:]).max(axis=(0, 2))
        return int(np.argmax(rows > self.band[self.first]))

    def fits(self, known: Sequence[Mistake], deadline: float) -> list[Guesses]:
        """Everything that explains the first tensor that strays: single mistakes, or else pairs."""
        row, places = self.row(self.exact), self.stretch.places
        guesses = [Guess(mistake, places, row) for mistake in known]
        for attempts in ([(guess,) for guess in guesses], combinations(guesses, 2)):
            familiar = self._judged(attempts)
            if familiar and familiar[0][0] == 0:
                return [familiar[0][2]]
        tried: dict[Guess, Trace] = {}
        made_of = self.stretch.made_of(self.first)
        found = self._judged(((guess,) for guess in self._candidates(row, made_of, deadline)), tried)
        if not found:
            found = self._judged((guess,) for guess in self._made_for_it(row, made_of, deadline))
        if not found and not self.search.inherited(self.first):
            pairs = list(self._pairs(tried))
            judged = (self._judged([pair]) for pair in pairs if time.monotonic() < deadline)
            found = next(filter(None, judged), [])
            # What else may be the case shares one of the two, as a rule.
            either = {guess.mistake for _, _, pair in found for guess in pair}
            found = self._judged(pair for pair in pairs if either & {guess.mistake for guess in pair})
        best = [guesses for left, _, guesses in found if left == found[0][0]]
        return list({frozenset(_key(guesses)): guesses for guesses in reversed(best)}.values())[::-1]

    def _candidates(self, row: int, made_of: set[tuple[int, str]], deadline: float) -> Iterator[Guess]:
        """Every mistake that can be at work: made everywhere, then in one place."""
        places = self.stretch.places
        elsewhere = not self.away.keys() <= self.exact.keys()  # a mistake that has moved operations is at work
        for where in [places, *((place,) for place in places if len(places) > 1)]:
            if where != places and time.monotonic() > deadline:
                return
            for mistake in CATALOGUE.values():
                sites = {*mistake.sites, *mistake.value}
                if elsewhere or any((place, site) in made_of for place in where for site in sites):
                    yield Guess(mistake, where, row)

    def _made_for_it(self, row: int, made_of: set[tuple[int, str]], deadline: float) -> Iterator[Guess]:
        """Mistakes that are no entries: other constants than GPT-2's, and the weights of another place."""
        places, hooks = self.stretch.places, {hook for _, hook in made_of}
        in_one_block = len({place for place, hook in made_of if in_block(hook)}) < 2
        for constant in CONSTANTS:
            in_time = in_one_block or time.monotonic() < deadline
            if in_time and hooks & {*constant.mistake(constant.right).sites}:
                yield from (Guess(constant.mistake(x), places, row) for x in self._fitted(constant))
        for mistake in misplaced(self.model.n_layer) if in_one_block else ():
            if hooks & {*mistake.sites}:
                yield Guess(mistake, places, row)

    def _fitted(self, constant: Constant) -> list[float]:
        """The constant that brings the tensor closest to theirs, by Gauss and Newton's method, if one does."""

        def run(x: float):
            guess = Guess(constant.mistake(x), self.stretch.places, 0)
            return self.stretch.run((*self.guesses, guess)).get(self.first, np.empty(0))

        theirs, x = self.stretch.theirs[self.first], constant.right
        if theirs.shape != self.exact.get(self.first, np.empty(0)).shape:
            return []
        seen = np.isfinite(theirs) & np.isfinite(self.exact[self.first])
        for _ in range(STEPS):
            here, step = run(x)[seen], 1e-4 * max(x, constant.right)
            slope = (run(x + step)[seen] - here) / step
            square = float(np.vdot(slope, slope))
            if not 0.0 < square < np.inf:  # NaN, too
                return []
            before, x = x, max(0.0, x + float(np.vdot(slope, theirs[seen] - here)) / square)
            if abs(x - before) <= 1e-8 * x:
                break
        # As short a number as lies as close as any.
        numbers = list(dict.fromkeys(float(f"{x:.{digits}e}") for digits in range(7)))
        off = [self.model.largest(self.first, theirs, run(number)) for number in numbers]
        return [next(number for number, away in zip(numbers, off, strict=True) if away <= 1.5 * min(off))]

    def _pairs(self, tried: Mapping[Guess, Trace]) -> Iterator[Guesses]:
        """Pairs of mistakes that each change the tensor, the most promising first."""
        first, difference = self.first, self.model.difference
        left = {}
        for guess, run in tried.items():
            if first in run and self.model.largest(first, run[first], self.exact[first]) > self.band[first]:
                away = np.minimum(difference(first, self.stretch.theirs[first], run[first]), 1e9)
                left[guess] = float(np.square(away).mean())
        for a, b in sorted(combinations(left, 2), key=lambda pair: left[pair[0]] + left[pair[1]]):
            # What is wrong without a mistake is what is wrong with the other one alone.
            yield a._replace(row=self.row(tried[b])), b._replace(row=self.row(tried[a]))

    def _judged(
        self, attempts: Iterable[Guesses], tried: dict[Guess, Trace] | None = None
    ) -> list[tuple[int, float, Guesses]]:
        """The attempts that fit, with how many tensors stray even so, and how close each is; the best first."""
        found = []
        for attempt in attempts:
            run = self.stretch.run(self.guesses + attempt)
            if tried is not None:
                tried[attempt[0]] = run
            if verdict := self._verdict(attempt, run):
                found.append((*verdict, attempt))
        return sorted(found, key=lambda found: found[:2])

    def _verdict(self, attempt: Guesses, run: Trace) -> tuple[int, float] | None:
        away = self._away(run)
        roundings = [guess.mistake.rounds for guess in attempt if guess.mistake.rounds]
        unrounded = tuple(guess for guess in attempt if not guess.mistake.rounds)
        # If a mistake does not say what is recorded here, the evidence is another tensor that strays.
        evidence = [self.first] if self.first in run else [name for name in self.strays if name in run]
        if roundings:
            close = [
                n for n in evidence if all(self._looks_rounded(n, dtype, run, unrounded) for dtype in roundings)
            ]
        else:  # others are too far off, whatever the band
            effect = {n: self.model.largest(n, run[n], self.exact[n]) for n in evidence}
            close = [n for n in evidence if away[n] * (TENFOLD - NEAR) <= effect[n] * NEAR]
        if not close:
            return None
        band = self.stretch.bands(self.guesses + attempt, run)
        if any(x == np.inf > self.band.get(name, np.inf) for name, x in band.items()):
            return None  # NaN is near everything, and nothing strays from it
        first = next((name for name in close if away[name] <= NEAR * band[name]), None)
        if first is None:
            return None
        strays = {name for name, x in away.items() if x > TENFOLD * band.get(name, np.inf)}
        return None if strays - self.wrong else (len(strays), away[first] / max(band[first], 1e-300))

    def _looks_rounded(self, name: str, dtype: str, run: Trace, unrounded: Guesses) -> bool:
        """Whether all numbers are of this dtype, or, of products, rounded factors explain most of the error.

        A band would say little of that: a number near a border is rounded this way or the other.
        """
        theirs = self.stretch.theirs[name]
        if dtype != "tf32":
            return is_rounded(theirs, dtype)
        runs = run, self.stretch.run(self.guesses + unrounded)
        left, whole = (np.square(self.model.difference(name, theirs, x[name])).mean() for x in runs)
        return bool(left * TENFOLD < whole)


def _findings(searches: Sequence[_Search], model: Model) -> Iterator[Finding]:
    """Merge what is found in several layers; of what fits, what fits in most of them comes first."""
    results = [result for search in searches for result in search.results]
    count = Counter(_key(fit) for result in results for fit in result.fits)
    groups: dict[Any, list[_Result]] = {}
    for result in results:
        result.fits.sort(key=lambda fit: -count[_key(fit)])
        best = result.fits[0] if result.fits else ()
        parts = [(guess,) for guess in best] if len(result.fits) == 1 else [best]
        for fit in parts:
            one = result if len(parts) == 1 else replace(result, fits=[fit])
            groups.setdefault(_key(fit) or hook_of(result.tensor), []).append(one)
    for group in groups.values():
        fits = {_key(fit): fit for result in group for fit in result.fits}
        best, *also = fits.values() if fits else [()]
        places = {place for r in group for place in (r.fits[0][0].places if r.fits else (r.place,))}
        sites = [site for guess in best for site in guess.mistake.sites] or [hook_of(group[0].tensor)]
        layers = {place for place in places if any(map(in_block, sites)) and 0 <= place < model.n_layer}
        others = [s for s in searches if {*s.stretch.places} - layers - {-1, model.n_layer} and best]
        silent = bool(layers) and all(s.silent(guess.mistake) for s in others for guess in best)
        every = (silent and bool(best)) or len(layers) == model.n_layer > 1
        hook = hook_of(group[0].tensor)
        several = {r.tensor for r in group if in_block(hook_of(r.tensor))}
        one_hook = len({hook_of(name) for name in several}) == 1 < len(several)
        yield Finding(
            f"blocks.*.{hook}" if in_block(hook) and (every or one_hook) else group[0].tensor,
            tuple(sorted(layers)),
            every,
            tuple(guess.mistake for guess in best),
            tuple(tuple(guess.mistake for guess in fit) for fit in also),
            max(result.error for result in group),
            group[0].after,
        )


def _key(fit: Guesses) -> tuple[str, ...]:
    return tuple(guess.mistake.name for guess in fit)
