"""Which known mistake would explain what somebody else's GPT-2 has recorded.

The model is cut where they recorded the residual stream. Each stretch runs by itself, from their own values:
what it should have given, what it would have given with a mistake of the catalogue, and how far float32 strays
from either. A tensor *strays* if it is more than TENFOLD its noise band away from what is right; a mistake
*fits* if what they recorded lies NEAR what it gives, and no other tensor comes to stray by it.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from picogpt.mistakes import CATALOGUE, NORMS, QKV, STREAM, At, Mistake
from picogpt.model import gpt2, with_taps
from picogpt.names import HEADS, SCORES, names
from picogpt.noise import Serial, headroom, rounded
from picogpt.trace import Trace, tree_map

TENFOLD = 10.0
NEAR = TENFOLD**0.5  # half-way between the band and tenfold, in orders of magnitude
MASKED = -9e3  # the masks of others: -1e4 in half precision, -1e10 in OpenAI's program, -3.4e38 in transformers
CENTRED = ("hook_embed", "hook_pos_embed", "hook_attn_out", "hook_mlp_out", "logits", *STREAM.split())
READS = {  # what each operation of a block is made of; before: of the block before
    "hook_resid_pre": ("before",),
    "ln1.hook_scale": ("hook_resid_pre",),
    "ln1.hook_normalized": ("hook_resid_pre", "ln1.hook_scale"),
    "ln1.hook_out": ("ln1.hook_normalized",),
    **dict.fromkeys(QKV.split(), ("ln1.hook_out",)),
    "attn.hook_attn_scores": ("attn.hook_q", "attn.hook_k"),
    "attn.hook_pattern": ("attn.hook_attn_scores",),
    "attn.hook_z": ("attn.hook_pattern", "attn.hook_v"),
    "hook_attn_out": ("attn.hook_z",),
    "hook_resid_mid": ("hook_resid_pre", "hook_attn_out"),
    "ln2.hook_scale": ("hook_resid_mid",),
    "ln2.hook_normalized": ("hook_resid_mid", "ln2.hook_scale"),
    "ln2.hook_out": ("ln2.hook_normalized",),
    "mlp.hook_pre": ("ln2.hook_out",),
    "mlp.hook_post": ("mlp.hook_pre",),
    "hook_mlp_out": ("mlp.hook_post",),
    "hook_resid_post": ("hook_resid_mid", "hook_mlp_out"),
    "ln_final.hook_scale": ("before",),
    "ln_final.hook_normalized": ("before", "ln_final.hook_scale"),
    "ln_final.hook_out": ("ln_final.hook_normalized",),
    "logits": ("ln_final.hook_out",),
}
# Mistakes made together are made in the catalogue's order; what has been computed is rounded last.
ORDER = {entry: i for i, entry in enumerate(sorted(CATALOGUE.values(), key=lambda entry: entry.rounds != ""))}


class Guess(NamedTuple):
    """A mistake made in some places: layers, -1 for the embeddings, n_layer for what follows the blocks.

    row is the first position that is wrong without it."""

    mistake: Mistake
    places: tuple[int, ...]
    row: int


Guesses = tuple[Guess, ...]


@dataclass
class Finding:
    """What is wrong with a tensor, and why.

    tensor    its name, with * for the layer where there are several
    layers    those that have it; none if it has nothing to do with layers
    every     whether no other layer speaks against it
    mistakes  one, or two made together, or none if none is known that fits
    also      others that fit as well, the closest first
    error     how far off, as a multiple of the noise band, where it is worst
    after     what was recorded before it, and is right
    """

    tensor: str
    layers: tuple[int, ...]
    every: bool
    mistakes: tuple[Mistake, ...]
    also: tuple[tuple[Mistake, ...], ...]
    error: float
    after: str

    def say(self) -> str:
        """Return it in one or two plain sentences."""
        numbers = f"layer{'s' * (len(self.layers) > 1)} {', '.join(map(str, self.layers))}"
        where = f", in {'every layer' if self.every else numbers + ' only'}" if self.layers else ""
        if not self.mistakes:
            return f"no known mistake fits your {self.tensor}{where}: look at what happens after {self.after}"
        right = "; ".join(f"GPT-2: {mistake.right}; yours: {mistake.wrong}" for mistake in self.mistakes)
        also = "; ".join(f"your {self._says(mistakes)}" for mistakes in self.also)
        return f"your {self._says(self.mistakes)}{where} ({right})" + f". Also possible: {also}" * bool(also)

    def _says(self, mistakes: Iterable[Mistake]) -> str:
        """A mistake that was made before the tensor is said of the tensor where it was made."""
        block = self.tensor.removesuffix(_hook(self.tensor)) or "blocks.*." * self.every
        sites = {m: _hook(self.tensor) if _hook(self.tensor) in m.sites else m.sites[0] for m in mistakes}
        return " and your ".join(
            f"{block * _in_block(site)}{site} {mistake.says}" for mistake, site in sites.items()
        )


def diagnose(
    theirs: Mapping[str, Any], ids: Sequence[int], params: Any, n_head: int, *, seconds: float = 60.0
) -> list[Finding]:
    """Return what is wrong in a recorded run, in order of computation; nothing if every operation is right.

    theirs   name -> array, names and shapes of names.py; any of the tensors may be missing
    ids      token ids [n_seq]
    params   the tree of parameters, float32
    seconds  about how long to look for pairs of mistakes, and for mistakes in one of several layers that
             were recorded as one

    Values without the bias of v, where it was added to the output's, as TransformerLens does, and a residual
    stream or logits without their row means are right.
    """
    model = _Model(theirs, ids, params, n_head, time.monotonic() + seconds)
    stretches = list(model.stretches())
    known: list[Mistake] = []
    for stretch in stretches:
        for result in stretch.examine(known):
            known += [guess.mistake for guess in (result.fits or [()])[0] if guess.mistake not in known]
    return list(_findings(stretches, model))


@dataclass
class _Result:
    """A tensor that strays, and everything that fits it, the closest first."""

    tensor: str
    place: int
    fits: list[Guesses]
    error: float
    after: str


class _Model:
    """What they recorded, of which model, and how it is compared."""

    def __init__(
        self, theirs: Mapping[str, Any], ids: Sequence[int], params: Any, n_head: int, deadline: float
    ):
        self.ids, self.params, self.n_head, self.deadline = list(ids), params, n_head, deadline
        self.n_layer = len(params["blocks"])
        self.theirs = dict(self._usable(theirs))
        self.centred = {
            name
            for name, x in self.theirs.items()
            if _hook(name) in CENTRED and abs(x.mean(axis=-1, dtype=np.float64)).max() < 1e-6 * abs(x).max()
        }

    def _usable(self, theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        n_seq, n_embd = len(self.ids), self.params["wte"].shape[1]
        sizes = {"n_seq": n_seq, "n_embd": n_embd, "4*n_embd": 4 * n_embd, "1": 1, "n_head": self.n_head}
        sizes |= {"d": n_embd // self.n_head, "n_vocab": len(self.params.get("lm_head", self.params["wte"]))}
        for name in names(self.n_layer):
            if name.hook not in theirs:
                continue
            x = np.asarray(theirs[name.hook])
            x = x if x.dtype == np.float32 else x.astype(np.float64)
            shape = tuple(sizes[axis] for axis in name.shape.split(", "))
            if name.shape == HEADS and x.shape != shape and x.size == n_seq * n_embd:  # other heads than ours
                x = x.transpose(1, 0, 2).reshape(n_seq, *shape[::2]).transpose(1, 0, 2)
            if name.shape == SCORES and name.hook.endswith("scores"):
                x = np.where(x < MASKED, -np.inf, x)
            if x.shape == shape or (name.shape == SCORES and x.shape[1:] == shape[1:]):
                yield name.hook, x

    def stretches(self) -> Iterator["_Stretch"]:
        """Yield the parts of the model, from one recorded value of the residual stream to the next."""
        start, first = None, -1
        for layer in range(self.n_layer):
            after = self.theirs.get(f"blocks.{layer}.hook_resid_post")
            after = self.theirs.get(f"blocks.{layer + 1}.hook_resid_pre") if after is None else after
            if after is not None:
                yield _Stretch(self, start, tuple(range(first, layer + 1)))
                start, first = after, layer + 1
        yield _Stretch(self, start, tuple(range(first, self.n_layer + 1)))

    def place(self, name: str) -> int:
        if name.startswith("blocks."):
            return int(name.split(".")[1])
        return -1 if name in ("hook_embed", "hook_pos_embed") else self.n_layer

    def tree(self, place: int) -> Any:
        """The parameters of a place, in float64; of wte the rows that are read."""
        if place == -1:
            tree = {"wte": self.params["wte"][self.ids], "wpe": self.params["wpe"]}
        elif place < self.n_layer:
            tree = self.params["blocks"][place]
        else:
            tree = {"ln_f": self.params["ln_f"], "lm_head": self.params.get("lm_head", self.params["wte"])}
        return tree_map(lambda w: np.asarray(w, np.float64), tree)

    def difference(self, name: str, x, y):
        """How far x is from y, each element; inf where one of them alone is masked, or shapes differ."""
        if x.shape != y.shape:
            return np.full((1, 1), np.inf)
        with np.errstate(invalid="ignore"):
            away = np.where(x == y, 0.0, x - y)
        if name in self.centred:
            away = away - away.mean(axis=-1, keepdims=True)
        if name.endswith("scores"):  # what they have where y is masked is their own affair
            i = np.arange(x.shape[-1])
            away = np.where(np.isneginf(y) & (i > i[:, None]), 0.0, away)
        return np.where(np.isnan(away), np.inf, np.abs(away))

    def largest(self, name: str, x, y) -> float:
        return float(self.difference(name, x, y).max(initial=0.0))


class _Stretch:
    """Some places of the model that follow one another, as a small model of its own."""

    def __init__(self, model: _Model, start: Any, places: tuple[int, ...]):
        self.model, self.start, self.places = model, start, places
        self.theirs = {name: x for name, x in model.theirs.items() if model.place(name) in places}
        self.trees: dict[int, Any] = {}
        self.results: list[_Result] = []
        self.state: _State

    def run(self, guesses: Guesses, single: bool = False) -> Trace:
        """Every tensor, each computed from their values of those before it, with these mistakes made.

        In float64, or, `single`, in float32 with sums taken one term after another.
        """
        return _Run(self, sorted(guesses, key=lambda guess: ORDER[guess.mistake]), single).foreseen

    def bands(self, guesses: Guesses, exact: Trace) -> dict[str, float]:
        """How far a right float32 program would stray from `exact`, in which these mistakes are made."""
        loop, difference = self.run(guesses, single=True), self.model.largest
        plain = [guess for guess in guesses if not guess.mistake.rounds]
        dtype = next((guess.mistake.rounds for guess in guesses if guess.mistake.rounds), "")
        unrounded = self.run(tuple(plain)) if dtype else {}
        bands = {}
        for name in self.theirs.keys() & exact.keys():
            x = exact[name]
            bands[name] = difference(name, loop[name], x) * headroom(x.size)
            # Whatever they computed, they wrote float32: half a unit in the last place of the largest number.
            bands[name] = max(bands[name], 2.0**-24 * np.abs(x[np.isfinite(x)]).max(initial=0.0))
            if name in unrounded and (dtype == "tf32" or _is_rounded(self.theirs[name], dtype)):
                bands[name] = max(bands[name], difference(name, unrounded[name], x))
        return bands

    def examine(self, known: Sequence[Mistake]) -> list[_Result]:
        """Find what is wrong, tensor by tensor; `known` mistakes, of other stretches, are tried first."""
        self.trees = {place: self.model.tree(place) for place in self.places}
        self.state = state = self._unfolded(_State(self, (), ()))
        hopeless: tuple[str, ...] = ()
        while first := state.first:
            fits = state.fits(known)
            error = state.away[first] / state.band[first]
            self.results.append(_Result(first, self.model.place(first), fits, error, self._before(first)))
            hopeless += (first,)
            self.state = state = _State(self, state.guesses + (fits[0] if fits else ()), hopeless)
        self.trees, state.exact = {}, {}  # a long text's are large
        return self.results

    def _before(self, name: str) -> str:
        recorded = list(self.theirs)
        before = recorded[: recorded.index(name)]
        return before[-1] if before else f"block {self.places[0] - 1}" if self.start is not None else "the ids"

    def _unfolded(self, state: "_State") -> "_State":
        """Give values, and their averages, back the bias of v if another has it: more than v then is right."""
        for place in self.places:
            v, z = (f"blocks.{place}.attn.hook_{x}" for x in "vz")
            if v in state.strays:
                folded = self.theirs
                bias = np.split(self.trees[place]["attn"]["c_attn"]["b"], 3)[2].reshape(
                    self.model.n_head, 1, -1
                )
                self.theirs = {name: x + bias if name in (v, z) else x for name, x in folded.items()}
                unfolded = _State(self, (), ())
                if set(unfolded.strays) < set(state.strays) - {v}:
                    state = unfolded
                else:
                    self.theirs = folded
        return state

    def silent(self, mistake: Mistake) -> bool:
        """Whether nothing that was recorded here would show the mistake."""
        self.trees = {place: self.model.tree(place) for place in self.places}
        guesses, band = self.state.guesses, self.state.band
        without, run = self.run(guesses), self.run((*guesses, Guess(mistake, self.places, 0)))
        self.trees = {}
        shared = band.keys() & run.keys()
        return all(
            self.model.largest(name, run[name], without[name]) <= TENFOLD * band[name] for name in shared
        )


class _State:
    """A stretch as it looks when some mistakes are allowed for."""

    def __init__(self, stretch: _Stretch, guesses: Guesses, hopeless: tuple[str, ...]):
        self.stretch, self.model, self.guesses = stretch, stretch.model, guesses
        self.exact = stretch.run(guesses)
        self.away = self._away(self.exact)
        self.band = stretch.bands(guesses, self.exact)
        self.wrong = {name for name, away in self.away.items() if away > TENFOLD * self.band.get(name, np.inf)}
        self.strays = [name for name in self.away if name in self.wrong and name not in hopeless]
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

    def fits(self, known: Sequence[Mistake]) -> list[Guesses]:
        """Everything that explains the first tensor that strays: single mistakes, or else pairs."""
        row = self.row(self.exact)
        familiar = self._judged((Guess(mistake, self.stretch.places, row),) for mistake in known)
        if familiar and familiar[0][0] == 0:
            return [familiar[0][2]]
        tried: dict[Guess, Trace] = {}
        found = self._judged(((guess,) for guess in self._candidates(row)), tried)
        if not found:
            pairs = list(self._pairs(tried))
            judged = (self._judged([pair]) for pair in pairs if time.monotonic() < self.model.deadline)
            found = next(filter(None, judged), [])
            # What else may be the case shares one of the two, as a rule.
            either = {guess.mistake for _, _, pair in found for guess in pair}
            found = self._judged(pair for pair in pairs if either & {guess.mistake for guess in pair})
        best = [guesses for left, _, guesses in found if left == found[0][0]]
        return list({frozenset(_key(guesses)): guesses for guesses in reversed(best)}.values())[::-1]

    def _candidates(self, row: int) -> Iterator[Guess]:
        """Every mistake that can be at work: made everywhere, then in one place."""
        made_of, places = self._made_of(self.first), self.stretch.places
        elsewhere = not self.away.keys() <= self.exact.keys()  # a mistake that has moved operations is at work
        for where in [places, *((place,) for place in places if len(places) > 1)]:
            if where != places and time.monotonic() > self.model.deadline:
                return
            for mistake in CATALOGUE.values():
                sites = {*mistake.sites, *mistake.value}
                if elsewhere or any((place, site) in made_of for place in where for site in sites):
                    yield Guess(mistake, where, row)

    def _made_of(self, name: str) -> set[tuple[int, str]]:
        """The operations, place and hook, between what they recorded and this tensor, its own included."""
        found: set[tuple[int, str]] = set()
        todo = [(self.model.place(name), _hook(name))]
        while todo:
            place, hook = todo.pop()
            found.add((place, hook))
            for read in READS.get(hook, ()):
                above = [(place, read)]
                if read == "before":
                    above = [(-1, "hook_embed"), (-1, "hook_pos_embed")]
                    above = [(place - 1, "hook_resid_post")] if place else above
                for place_, hook_ in above:
                    full = f"blocks.{place_}.{hook_}" if 0 <= place_ < self.model.n_layer else hook_
                    hidden = full not in self.stretch.theirs or hook_.endswith("hook_scale")
                    if place_ in self.stretch.places and hidden:
                        todo.append((place_, hook_))
        return found

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
        first = next((name for name in close if away[name] <= NEAR * band[name] < np.inf), None)
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
            return _is_rounded(theirs, dtype)
        runs = run, self.stretch.run(self.guesses + unrounded)
        left, whole = (np.square(self.model.difference(name, theirs, x[name])).mean() for x in runs)
        return bool(left * TENFOLD < whole)


def _is_rounded(x, dtype: str) -> bool:
    return bool((rounded(x, dtype) == x)[np.isfinite(x)].all())


class _Run:
    """One forward pass through a stretch, with mistakes made, and with their values put in place of ours."""

    def __init__(self, stretch: _Stretch, guesses: Sequence[Guess], single: bool):
        self.stretch, self.guesses, self.single = stretch, guesses, single
        self.foreseen: Trace = {}
        self.at: dict[int, At] = {}
        self.norms: dict[tuple[int, str], Any] = {}
        model, places = stretch.model, stretch.places
        self.stream = start = self._cast(stretch.start)
        trees = {place: self._tree(place) for place in places}
        before = trees[-1] if start is None else {"wte": start, "wpe": 0.0 * start}
        nothing = {
            "ln_f": {"g": 1.0, "b": 0.0},
            "lm_head": self._cast(np.zeros((1, model.params["wte"].shape[1]))),
        }
        tree = {**before, "blocks": [trees[p] for p in places if 0 <= p < model.n_layer]}
        tree |= trees.get(model.n_layer, nothing)
        rows = slice(None) if model.n_layer in places else slice(0, 0)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            gpt2(range(len(model.ids)), **with_taps(tree, self._tap), n_head=model.n_head, logits_to_keep=rows)

    def _cast(self, x):
        return x.astype(np.float32).view(Serial) if self.single and isinstance(x, np.ndarray) else x

    def _tree(self, place: int) -> Any:
        """The parameters of a place with the mistakes in them; gains and biases of layer norms stand aside."""
        model, tree = self.stretch.model, self.stretch.trees[place]
        self.at[place] = at = At(model.n_head, place, 0, model.n_layer, model.tree, tree)
        for guess in sorted(
            self.guesses, key=lambda guess: guess.mistake.rounds == ""
        ):  # weights are rounded first
            at.row = guess.row
            if place in guess.places and guess.mistake.tree:
                tree = guess.mistake.tree(tree, at)
        at.branch = tree = tree_map(self._cast, tree)
        for norm in tree.keys() & set(NORMS.values()):
            self.norms[place, norm] = tree[norm]
            tree = {**tree, norm: {**tree[norm], "g": 1.0, "b": 0.0}}
        return tree

    def _tap(self, name: str, x):
        stretch = self.stretch
        if name.startswith("blocks."):
            _, i, hook = name.split(".", 2)
            place = int(i) + max(stretch.places[0], 0)
            prefix = f"blocks.{place}."
        else:
            place, prefix, hook = stretch.model.place(name), "", name
        if place not in stretch.places:
            return x
        x = self._step(place, prefix, hook, x)
        norm, _, last = hook.rpartition(".")
        if last == "hook_normalized":
            y = x * self.norms[place, NORMS[norm]]["g"]
            y += self.norms[place, NORMS[norm]]["b"]
            x = self._step(place, prefix, f"{norm}.hook_out", y)
        return x

    def _step(self, place: int, prefix: str, hook: str, x):
        """Note what comes out under a name, and return what the next operation reads."""
        at, like, foreseen = self.at[place], x, True
        at.stream = self.stream
        made = [guess for guess in self.guesses if place in guess.places]
        for guess in made:
            if change := guess.mistake.value.get(hook):
                at.row = guess.row
                value = change(x, at)
                foreseen = foreseen and value is not None
                x = x if value is None else value
        if foreseen:
            self.foreseen[prefix + hook] = np.array(x)
        theirs = self.stretch.theirs.get(prefix + hook)
        # A layer norm is one operation: the scale it shows is not always the very number it divides by.
        if theirs is not None and theirs.shape == x.shape and not hook.endswith("hook_scale"):
            x = np.where(np.isneginf(x), x, theirs) if hook.endswith("scores") else theirs
        for guess in made:
            if change := guess.mistake.read.get(hook):
                x = change(x, at)
        at.seen[hook] = x = np.asarray(x, like.dtype).view(type(like))
        self.stream = x if hook in STREAM.split() else self.stream
        return x


def _in_block(hook: str) -> bool:
    return hook in READS and not hook.startswith(("ln_final", "logits"))


def _hook(name: str) -> str:
    """A name without its layer; `*` stands for any."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def _findings(stretches: Sequence[_Stretch], model: _Model) -> Iterator[Finding]:
    """Merge what is found in several layers; of what fits, what fits in most of them comes first."""
    results = [result for stretch in stretches for result in stretch.results]
    count = Counter(_key(fit) for result in results for fit in result.fits)
    groups: dict[Any, list[_Result]] = {}
    for result in results:
        result.fits.sort(key=lambda fit: -count[_key(fit)])
        best = result.fits[0] if result.fits else ()
        parts = [(guess,) for guess in best] if len(result.fits) == 1 else [best]
        for fit in parts:
            one = (
                result
                if len(parts) == 1
                else _Result(result.tensor, result.place, [fit], result.error, result.after)
            )
            groups.setdefault(_key(fit) or _hook(result.tensor), []).append(one)
    for group in groups.values():
        fits = {_key(fit): fit for result in group for fit in result.fits}
        best, *also = fits.values() if fits else [()]
        places = {place for r in group for place in (r.fits[0][0].places if r.fits else (r.place,))}
        sites = [site for guess in best for site in guess.mistake.sites] or [_hook(group[0].tensor)]
        layers = {place for place in places if any(map(_in_block, sites)) and 0 <= place < model.n_layer}
        others = [s for s in stretches if {*s.places} - layers - {-1, model.n_layer} and best]
        every = bool(layers) and all(s.silent(guess.mistake) for s in others for guess in best)
        hooks = {_hook(result.tensor) for result in group}
        several = len(hooks) == 1 and len({result.tensor for result in group}) > 1
        yield Finding(
            f"blocks.*.{hooks.pop()}" if several else group[0].tensor,
            tuple(sorted(layers)),
            (every and bool(best)) or len(layers) == model.n_layer > 1,
            tuple(guess.mistake for guess in best),
            tuple(tuple(guess.mistake for guess in fit) for fit in also),
            max(result.error for result in group),
            group[0].after,
        )


def _key(fit: Guesses) -> tuple[str, ...]:
    return tuple(guess.mistake.name for guess in fit)
