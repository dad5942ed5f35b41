"""The model run in stretches, from somebody else's values, with mistakes in it.

A model is cut where they recorded the residual stream. A stretch is run as a small model of its own, by gpt2's
one forward pass: a tap puts their values in place of ours, so that every operation is computed from their own
inputs, and makes the mistakes that are asked for (those of mistakes.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from picogpt.model import gpt2, with_taps
from picogpt.names import CENTRED, HEADS, SCORES, names
from picogpt.noise import Serial, headroom, rounded
from picogpt.trace import Trace, astype, tree_map

MASKED = -9e3  # the masks of others: -1e4 in half precision, -1e10 in OpenAI's program, -3.4e38 in transformers
NORMS = {"ln1": "ln_1", "ln2": "ln_2", "ln_final": "ln_f"}
QKV = "attn.hook_q attn.hook_k attn.hook_v"
STREAM = "hook_resid_pre hook_resid_mid hook_resid_post"
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
Change = Callable[..., Any]  # (x or branch, at) -> the same, changed


@dataclass
class At:
    """What an operation can see.

    seen    intermediates of this layer so far, by their names without the layer: `at["mlp.hook_pre"]`
    stream  the residual stream as it is now, [n_seq, n_embd]
    branch  the parameters in force
    layer   number of the layer; `block(i)` is the i-th block as it was loaded, i < n_layer
    row     the first position that is wrong: the length of the prompt, when a cache is to blame
    """

    n_head: int
    layer: int
    row: int
    n_layer: int
    block: Callable[[int], Any]
    branch: Any
    stream: Any = None
    seen: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, hook: str) -> Any:
        return self.seen[hook]


@dataclass(eq=False)
class Mistake:
    """One entry: `says` continues "your SITE ..."; `seen` is who makes it, or what comes of it.

    rounds is the dtype to which intermediates are rounded, if it is that.
    """

    name: str
    sites: tuple[str, ...]
    says: str
    right: str
    wrong: str
    seen: str
    value: dict[str, Change]
    read: dict[str, Change]
    tree: Change | None
    rounds: str


class Guess(NamedTuple):
    """A mistake made in some places: layers, -1 for the embeddings, n_layer for what follows the blocks.

    row is the first position that is wrong without it."""

    mistake: Mistake
    places: tuple[int, ...]
    row: int


Guesses = tuple[Guess, ...]


class Model:
    """What they recorded, of which model, and how it is compared.

    Mistakes made together are made in `order`; those that have none come first.
    """

    def __init__(
        self,
        theirs: Mapping[str, Any],
        ids: Sequence[int],
        params: Any,
        n_head: int,
        order: Sequence[Mistake] = (),
    ):
        self.ids, self.params, self.n_head = list(ids), params, n_head
        self.order = {mistake: i for i, mistake in enumerate(order)}
        self.n_layer = len(params["blocks"])
        self.theirs = dict(self._usable(theirs))
        self.centred = {
            name
            for name, x in self.theirs.items()
            if hook_of(name) in CENTRED and abs(x.mean(axis=-1, dtype=np.float64)).max() < 1e-6 * abs(x).max()
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

    def stretches(self) -> Iterator["Stretch"]:
        """Yield the parts of the model, from one recorded value of the residual stream to the next."""
        start, first = None, -1
        for layer in range(self.n_layer):
            after = self.theirs.get(f"blocks.{layer}.hook_resid_post")
            after = self.theirs.get(f"blocks.{layer + 1}.hook_resid_pre") if after is None else after
            if after is not None:
                yield Stretch(self, start, tuple(range(first, layer + 1)))
                start, first = after, layer + 1
        yield Stretch(self, start, tuple(range(first, self.n_layer + 1)))

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
        return astype(tree, np.float64)

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


class Stretch:
    """Some places of the model that follow one another, as a small model of its own."""

    def __init__(self, model: Model, start: Any, places: tuple[int, ...]):
        self.model, self.start, self.places = model, start, places
        self.theirs = {name: x for name, x in model.theirs.items() if model.place(name) in places}
        self.trees: dict[int, Any] = {}  # while something is tried: a long text's are large

    def load(self) -> None:
        """Get the parameters of its places in float64."""
        self.trees = {place: self.model.tree(place) for place in self.places}

    def run(self, guesses: Guesses, single: bool = False) -> Trace:
        """Every tensor, each computed from their values of those before it, with these mistakes made.

        In float64, or, `single`, in float32 with sums taken one term after another.
        """
        return Run(
            self, sorted(guesses, key=lambda guess: self.model.order.get(guess.mistake, -1)), single
        ).foreseen

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
            if name in unrounded and (dtype == "tf32" or is_rounded(self.theirs[name], dtype)):
                bands[name] = max(bands[name], difference(name, unrounded[name], x))
        return bands

    def made_of(self, name: str) -> set[tuple[int, str]]:
        """The operations, place and hook, between what they recorded and this tensor, its own included."""
        found: set[tuple[int, str]] = set()
        todo = [(self.model.place(name), hook_of(name))]
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
                    hidden = full not in self.theirs or hook_.endswith("hook_scale")
                    if place_ in self.places and hidden:
                        todo.append((place_, hook_))
        return found


class Run:
    """One forward pass through a stretch, with mistakes made, and with their values put in place of ours."""

    def __init__(self, stretch: Stretch, guesses: Sequence[Guess], single: bool):
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


def is_rounded(x, dtype: str) -> bool:
    return bool((rounded(x, dtype) == x)[np.isfinite(x)].all())


def in_block(hook: str) -> bool:
    return hook in READS and not hook.startswith(("ln_final", "logits"))


def hook_of(name: str) -> str:
    """A name without its layer; `*` stands for any."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name
