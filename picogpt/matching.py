"""Other people's arrays in our terms: which intermediate a name means, and which layout its array has.

Names are those of names.py in any spelling: only letters and digits count (`blocks/0/ln1/hook_scale` is
`BLOCKS_0_LN1_SCALE`), and neither `hook` nor what frameworks put before (`transformer.`) or behind (`.output`).
An array may hold all layers, as llm.c's do, heads in TransformerLens's order, or fewer rows: see `layouts`.
Where two would do, the one closer to the reference is meant: most mistakes are smaller than a wrong layout.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np

from picogpt import PicogptError
from picogpt.checkpoint import parameter_shapes
from picogpt.hugging_face import hugging_face_name
from picogpt.names import HEADS, ONE, SCORES, names

BEFORE = {"transformer", "model", "module", "orig", "mod", "gpt2", "activations", "acts", "trace", "cache"}
BEHIND = {"output", "outputs", "out", "value"}
OTHERS = {  # names of TransformerLens's bridge, of nanoGPT, of llm.c, and of hooks on the input of a module
    "blocks.{i}.hook_in h.{i}.input": "blocks.{i}.hook_resid_pre",
    "blocks.{i}.hook_out": "blocks.{i}.hook_resid_post",
    "h.{i}.mlp.gelu h.{i}.mlp.c_proj.input": "blocks.{i}.mlp.hook_post",
    "h.{i}.attn.c_proj.input": "blocks.{i}.attn.hook_z",
    "h.{i}.ln_2.input": "blocks.{i}.hook_resid_mid",
    "h.{i}.attn.attn_dropout": "blocks.{i}.attn.hook_pattern",
    "encoded drop": "blocks.0.hook_resid_pre",
    "unembed.hook_out": "logits",
}

Key = tuple[str, ...]


class MatchError(PicogptError):
    """Names that mean nothing here or the same thing twice, or an array that cannot be what it is called."""


class ShapeError(MatchError):
    """An array that has not the shape that its name has in this text and this model."""


class Meaning(NamedTuple):
    """What a name means: an intermediate or a parameter, perhaps one over it (llm.c keeps 1/scale)."""

    name: str
    reciprocal: bool = False


class Layout(NamedTuple):
    """An array as ours would be, and in words what was done to it."""

    array: Any
    said: str = ""


class Match(NamedTuple):
    """One of their arrays, float64, in our layout, holding some rows of the text."""

    name: str
    theirs: str
    array: Any
    rows: list[int]
    said: tuple[str, ...] = ()


class Matcher:
    """Finds what the names of others mean, for a model with these hyper-parameters."""

    def __init__(self, hparams: Mapping[str, int], mapping: Mapping[str, str] | None = None) -> None:
        """`mapping` says of some of their names which of ours is meant. Raises MatchError if it is none."""
        self.names = {name.hook: name for name in names(hparams["n_layer"])}
        self.shapes = parameter_shapes(hparams, lm_head=True)
        self.table: dict[Key, list[Meaning]] = {}
        self.parameters: dict[Key, str] = {}
        for name in self.names.values():
            for alias in (name.hook, *name.hugging_face.split(), *name.llm_c.split()):
                self._add(alias.removeprefix("1/"), Meaning(name.hook, reciprocal=alias.startswith("1/")))
        for aliases, hook in OTHERS.items():
            for i in range(hparams["n_layer"] if "{i}" in hook else 1):
                for alias in aliases.replace("{i}", str(i)).split():
                    self._add(alias, Meaning(hook.replace("{i}", str(i))))
        for parameter in self.shapes:
            for alias in (parameter, parameter.removeprefix("model/"), hugging_face_name(parameter)):
                self.parameters[key(alias)] = parameter
        self.mapping = dict(mapping or {})
        for ours in self.mapping.values():
            if not self.lookup(ours) and not self.lookup(f"{ours}.0") and key(ours) not in self.parameters:
                near = "".join(
                    f": {name}?" for name in get_close_matches(ours, [*self.names, *self.shapes], n=1)
                )
                raise MatchError(f"--map says {ours!r:.80}, no name known here{near}")

    def _add(self, alias: str, meaning: Meaning) -> None:
        meanings = self.table.setdefault(key(alias), [])
        if meaning not in meanings:
            meanings.append(meaning)

    def lookup(self, name: str) -> list[Meaning]:
        """Return what a name means: nothing, one intermediate, or those that a fused array holds: q, k, v."""
        return next((self.table[parts] for parts in spellings(key(name)) if parts in self.table), [])

    def parameter(self, name: str, shape: tuple[int, ...], n_seq: int) -> str | None:
        """Return OpenAI's name of the parameter that is meant; `wte` may be the table, or what it gave."""
        found = next((self.parameters[p] for p in spellings(key(name)) if p in self.parameters), None)
        if found is None:
            return None
        expected = self.shapes[found]
        turned = shape in (expected, expected[::-1])
        if self.lookup(name):
            return found if turned and expected[0] != n_seq else None
        padded = len(shape) == len(expected) == 2 and shape[1] == expected[1] and shape[0] > expected[0]
        if not turned and not padded:
            raise ShapeError(f"{name} is {shown(shape)}, but {found} of this model is {shown(expected)}")
        return found

    def _layers(self, name: str) -> Iterator[list[Meaning]]:
        """What a name means with the number of each layer behind it."""
        i = 0
        while found := self.lookup(f"{name}.{i}"):
            yield found
            i += 1

    def _unstacked(self, theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, list[Meaning]]]:
        """Yield every array with its name and meanings; what holds all layers comes layer by layer."""
        for name, array in theirs.items():
            meanings = self.lookup(self.mapping.get(name, name))
            layers = [] if meanings else list(self._layers(self.mapping.get(name, name)))
            if layers and array.shape[:1] != (len(layers),):
                should = f"should hold {len(layers)} layers along its first axis"
                raise ShapeError(f"{name} is {shown(array.shape)}, and {should}")
            for i, meaning in enumerate(layers):
                yield f"{name}[{i}]", array[i], meaning
            if not layers:
                yield name, array, meanings

    def match(
        self,
        theirs: Mapping[str, Any],
        shapes: Mapping[str, Sequence[int]],
        positions: Sequence[int],
        distance: Callable[[str, Any, list[int]], float],
    ) -> tuple[list[Match], dict[str, tuple[str, Any]], list[str]]:
        """Return the intermediates in order of computation, the parameters (ours -> theirs, array), and the
        names that mean nothing here.

        shapes     of the reference's tensors, all rows of the text
        positions  the rows that the reference holds
        distance   `distance(name, array, rows)` from the reference, to choose between layouts that would do

        Raises MatchError for shapes that cannot be, and two arrays of one meaning that differ.
        """
        for name in self.mapping:
            if name not in theirs:
                raise MatchError(f"--map speaks of {name!r:.80}, but there is no array of this name")
        parameters: dict[str, tuple[str, Any]] = {}
        intermediates = {}
        n_seq = next(iter(shapes.values()))[-2]
        for name, array in theirs.items():
            parameter = self.parameter(self.mapping.get(name, name), array.shape, n_seq)
            if parameter is None:
                intermediates[name] = array
            elif parameter in parameters:
                raise MatchError(f"{parameters[parameter][0]} and {name} both mean {parameter}: leave one out")
            else:
                parameters[parameter] = name, array
        matches: dict[str, Match] = {}
        unknown = []
        for name, array, meanings in self._unstacked(intermediates):
            if not meanings:
                unknown.append(name)
            for third, meaning in zip(thirds(name, array, meanings), meanings, strict=True):
                if meaning.name in shapes:
                    match = self._fit(name, third, meaning, shapes[meaning.name], positions, distance)
                    matches[match.name] = _one_of(matches.get(match.name, match), match)
        return [matches[name] for name in self.names if name in matches], parameters, unknown

    def _fit(self, theirs, array, meaning, shape, positions, distance) -> Match:
        """Find the rows and the layout that an array has."""
        hook = self.names[meaning.name]
        n_seq = shape[-2]
        for rows in (list(range(n_seq)), list(positions), [n_seq - 1]):
            expected = (*shape[:-2], len(rows), shape[-1])
            found = list(layouts(array, expected, hook.shape))
            if found:
                break
        else:
            rows = list(range(n_seq))
            found = list(_other_heads(array, shape, hook.shape))
        if not found:
            raise ShapeError(
                f"{theirs} is {shown(array.shape)}, but {hook.hook} of this text and model is {shown(shape)} "
                f"[{hook.shape}]: another text, another model, or a layout that is not understood"
            )
        fits = []
        for layout in found:
            values = np.array(layout.array, np.float64)
            if meaning.reciprocal:
                with np.errstate(divide="ignore"):
                    values = 1 / values
            off = distance(hook.hook, values, rows) if len(found) > 1 else 0.0
            fits.append((off, values, layout.said))
        _, values, said = min(fits, key=lambda fit: fit[0])
        words = [said] * bool(said) + ["1/scale"] * meaning.reciprocal
        if len(rows) < n_seq:
            words.append("last row" if rows == [n_seq - 1] else f"{len(rows)} rows")
        return Match(hook.hook, theirs, values, rows, tuple(words))


def placed(matches: Sequence[Match], distance: Callable[[str, Any, list[int]], float]) -> Sequence[Match]:
    """Call `hook_normalized` what it is: in TransformerLens 2 it comes after gain and bias, if not folded."""

    def out(name: str) -> str:
        return name.replace("hook_normalized", "hook_out")

    norms = [match for match in matches if match.name.endswith("hook_normalized")]
    if not norms or any(match.name.endswith(".hook_out") for match in matches):
        return matches
    name, _, array, rows, _ = norms[0]  # later ones may be far from both
    if distance(name, array, rows) <= distance(out(name), array, rows):
        return matches
    said = "after gain and bias: hook_out"
    return [
        match._replace(name=out(match.name), said=(*match.said, said))
        if match.name.endswith("normalized")
        else match
        for match in matches
    ]


def key(name: str) -> Key:
    """Return the letters and digits of a name, in parts: what counts of it."""
    return tuple(part for part in re.split("[^a-z0-9]+", name.lower()) if part not in ("", "hook"))


def spellings(parts: Key) -> Iterator[Key]:
    """Yield the parts of a name, then without those that frameworks put before and behind it."""
    start = 0
    while True:
        stop = len(parts)
        yield parts[start:]
        if parts[-2:] in (("output", "0"), ("outputs", "0")):
            stop -= 1
        while stop > start and parts[stop - 1] in BEHIND:
            stop -= 1
            yield parts[start:stop]
        if start == len(parts) or parts[start] not in BEFORE:
            return
        start += 1


def thirds(name: str, array, meanings: Sequence[Meaning]) -> list[Any]:
    """Return the array, or of a fused one each third of its columns."""
    if len(meanings) < 2:
        return [array] * len(meanings)
    if array.ndim == 0 or array.shape[-1] % len(meanings):
        raise MatchError(f"{name} of shape {shown(array.shape)} cannot hold q, k and v side by side")
    return np.split(array, len(meanings), axis=-1)


def layouts(array, shape: Sequence[int], kind: str) -> Iterator[Layout]:
    """Yield every way in which an array can be one of our `shape`, the likeliest first.

    `kind` is the shape as names.py has it, in words. Leading axes of length 1 (a batch of one) do not count.
    """
    seen = []
    while True:
        seen.append(array)
        if shape[-2] == 1 and array.ndim:  # one row, which may lack its axis
            seen.append(np.expand_dims(array, -2))
        if array.ndim == 0 or array.shape[0] != 1:
            break
        array = array[0]
    for x in seen:
        if x.shape == tuple(shape):
            yield Layout(x)
    for x in seen:
        yield from _other_layouts(x, tuple(shape), kind)


def _other_layouts(x, shape: tuple[int, ...], kind: str) -> Iterator[Layout]:
    n_seq, width = shape[-2:]
    if kind == HEADS:
        n_head = shape[0]
        if x.shape == (n_seq, n_head, width):
            yield Layout(x.transpose(1, 0, 2), "[n_seq, n_head, d]")
        if x.shape == (n_seq, n_head * width):
            yield Layout(x.reshape(n_seq, n_head, width).transpose(1, 0, 2), "heads merged")
    elif kind == ONE:
        if x.shape == (n_seq,):
            yield Layout(x[:, None])
    elif kind != SCORES:
        if x.shape == shape[::-1]:
            yield Layout(x.T, "transposed")
        if kind.endswith("n_vocab") and x.ndim == 2 and x.shape[0] == n_seq and x.shape[1] > width:
            yield Layout(x[:, :width], f"padded to {x.shape[1]}")


def _other_heads(x, shape: Sequence[int], kind: str) -> Iterator[Layout]:
    """Yield the layout of a per-head array of a program that splits n_embd into another number of heads."""
    if kind not in (HEADS, SCORES):
        return
    n_head, n_seq, width = shape
    while x.ndim > 3 and x.shape[0] == 1:
        x = x[0]
    if kind == HEADS and x.ndim == 3 and x.shape[0] == n_seq:
        x = x.transpose(1, 0, 2)
    whole = (n_seq, n_seq) if kind == SCORES else (n_seq, n_head * width // max(len(x), 1))
    if x.ndim == 3 and x.shape[1:] == whole:
        yield Layout(x, f"{len(x)} heads, the model has {n_head}")


def _one_of(a: Match, b: Match) -> Match:
    """Return which of two matches counts. Our own name goes first; others may share a meaning if they agree."""
    if b.theirs == b.name or a.theirs == a.name:
        return b if b.theirs == b.name else a
    if a.rows != b.rows or not np.array_equal(a.array, b.array, equal_nan=True):
        cure = "leave one out, or say with --map what it is"
        raise MatchError(f"{a.theirs} and {b.theirs} both mean {a.name}, and differ: {cure}")
    return a


def parameter(params: Mapping[str, Any], name: str):
    """Return a parameter by OpenAI's name, such as model/h0/attn/c_attn/w; lm_head may be wte."""
    _, *path = name.split("/")
    node: Any = params
    for part in path:
        if part[0] == "h" and part[1:].isdecimal():
            node = params["blocks"][int(part[1:])]
        else:
            node = node["wte" if part == "lm_head" and part not in params else part]
    return node


def counted(things: Sized, what: str) -> str:
    """How many, in words."""
    return f"{len(things)} {what}" + "s" * (len(things) != 1)


def shown(shape: Sequence[int]) -> str:
    """A shape as a list."""
    return str(list(map(int, shape)))
