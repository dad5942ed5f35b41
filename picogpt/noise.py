"""How far right float32 programs stray from the truth: the measure of every comparison.

Two programs that compute the same in float32 add in different orders, and differ in the last digits. How much
depends on the model, the text and the tensor, so it is measured, never chosen: the model runs in float32 in
every arrangement that we know, and each tensor's *band* is the largest difference from the float64 run, the
truth, continued to what only one run in a million would exceed.
"""

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from picogpt.cache import KVCache, packed, with_attend
from picogpt.machine import cores, limited_to
from picogpt.model import causal_attention, gpt2, with_taps
from picogpt.names import ROWS, WIDE, names
from picogpt.trace import Trace, astype, layer_norms, run_with_trace, tree_map, with_outs

HALVES = ("bfloat16", "float16")
FALSE_ALARMS = 1e-6  # how often noise may be taken for an error


class Serial(np.ndarray):
    """A float32 array whose sums are taken one term after another, as the plain loops of a C program take them.

    A BLAS keeps several partial sums and strays less: by a factor of 4 or 5 in GPT-2.
    """

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        plain = [x.view(np.ndarray) if isinstance(x, Serial) else x for x in inputs]
        if ufunc is np.matmul:
            return _serial_matmul(*plain).view(Serial)
        if ufunc is np.vecdot:
            return np.add.accumulate(np.multiply(*plain), axis=-1)[..., -1].view(Serial)
        if ufunc is np.add and method == "reduce":
            total = np.add.accumulate(*plain, axis=options["axis"]).take([-1], axis=options["axis"])
            return (total if options.get("keepdims") else total[..., 0]).view(Serial)
        if out is not None:
            options["out"] = tuple(x.view(np.ndarray) for x in out)
        result = getattr(ufunc, method)(*plain, **options)
        return result.view(Serial) if isinstance(result, np.ndarray) else result


def _serial_matmul(x, w):  # [..., m, k], [..., k, n] -> [..., m, n]
    if w.shape[-1] == 1:  # einsum would sum this one as a dot product, in several parts
        return _serial_matmul(x, np.repeat(w, 2, axis=-1))[..., :1]
    return np.einsum("...mk,...kn->...mn", x, np.ascontiguousarray(w), optimize=False)


def rounded(x, dtype: str):
    """Return float32 or float64 numbers rounded to the nearest bfloat16 or float16, in their own dtype."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(x.dtype)
    bits = np.asarray(x, np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)).view(np.float32).astype(x.dtype)


def float32_runs(ids, params, n_head: int) -> Iterator[Trace]:
    """Yield the trace of each arrangement in which the model runs in float32."""
    params = astype(params, np.float32)
    for n_threads in {1, cores()}:
        with limited_to(n_threads):
            yield _run(ids, params, n_head)
    yield _token_by_token(ids, params, n_head)
    yield _in_a_batch(ids, params, n_head)
    yield _from_the_other_end(ids, params, n_head)
    yield _run(ids, tree_map(lambda w: w.view(Serial), params), n_head)


def _run(ids, params, n_head: int, **options: Any) -> Trace:
    return with_outs(run_with_trace(ids, params, n_head, **options)[1], params)


def half_run(ids, params, n_head: int, dtype: str) -> Trace:
    """Return the trace of a run whose weights and intermediates are rounded to bfloat16 or float16."""
    params = tree_map(lambda w: rounded(np.asarray(w, np.float32), dtype), params)
    norms, trace = layer_norms(params), {}

    def tap(name, x):
        trace[name] = x = rounded(x, dtype)
        prefix = name.removesuffix("hook_normalized")
        if prefix in norms:
            trace[f"{prefix}hook_out"] = x = rounded(x * norms[prefix]["g"] + norms[prefix]["b"], dtype)
        return x

    # Gains and biases stand aside: no tap sees what a layer norm returns, so that it could be rounded.
    idle = {"g": 1.0, "b": 0.0}
    blocks = [{**block, "ln_1": idle, "ln_2": idle} for block in params["blocks"]]
    with np.errstate(invalid="ignore", over="ignore"):  # float16 ends at 65504
        gpt2(ids, **with_taps({**params, "blocks": blocks, "ln_f": idle}, tap), n_head=n_head)
    return trace


def isolated(values: Trace, ids, params, n_head: int) -> tuple[Trace, dict[str, float]]:
    """Recompute every operation from its own inputs in `values`, which may lack some.

    Returns what each should have given, in float64, and the band of each: how far the serial float32 loop
    strays from it. One ordinary forward pass shows all of them: each intermediate, once it has been noted, is
    replaced by the recorded one, so that no error reaches the next operation.
    """
    double = astype(params, np.float64)
    serial = tree_map(lambda w: np.asarray(w, np.float32).view(Serial), params)
    bands: dict[str, float] = {}
    # Inside a layer norm few programs compute on with the very numbers that they record.
    for inside in ("hook_scale",), ("hook_scale", "hook_normalized"):
        given = {name: np.asarray(x, np.float32) for name, x in values.items() if not name.endswith(inside)}
        right = _isolated_run(given, ids, double, n_head)
        band = _band([_isolated_run(given, ids, serial, n_head)], right)
        bands = {name: max(bands.get(name, 0.0), band[name]) for name in band}
    return _isolated_run(values, ids, double, n_head), bands


def _isolated_run(values: Trace, ids, params, n_head: int) -> Trace:
    computed: Trace = {}

    def tap(name, x):
        computed[name] = np.array(x)
        value = values.get(name)
        if value is None:
            return x
        value = value.astype(x.dtype).view(type(x))
        # Where scores are masked others have what they like.
        return np.where(np.isneginf(x), x, value).view(type(x)) if name.endswith("scores") else value

    gpt2(ids, **with_taps(params, tap), n_head=n_head)
    return with_outs(computed, params)


def deviation(x, truth) -> float:
    """Return the largest difference between two arrays; masked cells, -inf in the truth, are left out."""
    seen = np.isfinite(truth)
    with np.errstate(invalid="ignore"):
        return float(np.abs(x[seen] - truth[seen]).max(initial=0.0))


def headroom(n_numbers: int) -> float:
    """By what factor the largest of n numbers has to grow to be exceeded once in 1/FALSE_ALARMS times as many.

    The largest of n normally distributed numbers is near sigma sqrt(2 ln n) (Cramer 1946, section 28.6).
    """
    n = max(n_numbers, 2)
    return math.sqrt(math.log(n / FALSE_ALARMS) / math.log(n))


def last_place(x) -> float:
    """Return the unit in float32's last place of the largest number: by so much may any program be off."""
    return float(np.spacing(np.float32(np.abs(x[np.isfinite(x)]).max(initial=0.0))))


def total(x) -> float:
    """Return the sum of an array without its masked cells: one of two numbers that stand for a tensor."""
    return float(x[np.isfinite(x)].sum(dtype=np.float64))


def projection(x) -> float:
    """Return the sum of an array's numbers, each with a sign that its place decides; masked cells are left out.

    The number at flat index i (C order) is subtracted where the bit 16 of i * 2654435761 mod 2^32, xor the same
    shifted right by 15, is set: a swap of rows, columns or heads leaves the sum as it is, but not this one.
    """
    h = np.arange(x.size, dtype=np.uint64) * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)
    signs = 1.0 - 2.0 * ((h ^ h >> np.uint64(15)) >> np.uint64(16) & np.uint64(1))
    return total(x * signs.reshape(x.shape))


def noise_bands(ids, params, n_head: int, truth: Trace) -> dict[str, dict[str, float]]:
    """Return the bands of every tensor in `truth`, the float64 trace: kind -> name -> largest difference.

    "float32"     over all runs of `float32_runs`
    "sum", "projection"    the same for the two numbers that stand for a tensor
    "isolated"    of one operation by itself, from true inputs
    "bfloat16", "float16"  with weights and intermediates rounded to these
    """
    no_bar = None if sys.stderr else True
    all_runs = float32_runs(ids, params, n_head)
    runs = list(tqdm(all_runs, "measuring noise", unit=" runs", leave=False, disable=no_bar, delay=1))
    bands = {"float32": _band(runs, truth)}
    for kind, number in (("sum", total), ("projection", projection)):
        bands[kind] = {name: _largest_of(number, [run[name] for run in runs], x) for name, x in truth.items()}
    single = {name: value.astype(np.float32) for name, value in truth.items()}
    bands["isolated"] = isolated(single, ids, params, n_head)[1]
    for dtype in HALVES:
        bands[dtype] = _band([half_run(ids, params, n_head, dtype)], truth)
    return bands


def _band(runs: list[Trace], truth: Trace) -> dict[str, float]:
    """Return the largest difference of each tensor over the runs, with headroom."""
    return {name: _largest(name, [run[name] for run in runs], value) for name, value in truth.items()}


def _largest(name: str, runs: list[Any], truth) -> float:
    """One early rounding can reach every number of a row, or of a tensor: rows or runs, whichever are fewer,
    count as draws of the noise; of a single run, its rows. What is only copied has no noise, but a softmax
    that is exactly 1 here may be off by a last place elsewhere, as all that few numbers hit by chance.
    """
    off = max(deviation(x, truth) for x in runs)
    if off or name.endswith("pattern"):
        off = max(off, last_place(truth))
    rows = truth.shape[-2]
    return off * headroom(min(rows, len(runs)) if len(runs) > 1 else rows)


def _largest_of(number: Callable[[Any], float], runs: list[Any], truth) -> float:
    """The same for a number that stands for a tensor: a sum, where differences may by chance have cancelled.

    With random signs it would be near the root of the sum of their squares. One number is one draw.
    """
    seen, right = np.isfinite(truth), number(truth)
    chance = (float(np.linalg.norm(x[seen] - truth[seen])) for x in runs)
    return max(last_place(truth), *chance, *(abs(number(x) - right) for x in runs)) * headroom(1)


def _token_by_token(ids, params, n_head: int) -> Trace:
    caches = [KVCache(len(ids)) for _ in params["blocks"]]
    params = with_attend(params, caches)
    steps = [_run([token], params, n_head, position_ids=np.array([i])) for i, token in enumerate(ids)]
    trace = {name: [step[name] for step in steps] for name in steps[0]}
    return {name: _stacked(name, parts) for name, parts in trace.items()}


def _stacked(name: str, parts):
    """Put rows that came one by one into one array; a step sees no key after its own."""
    if name.endswith(("attn_scores", "pattern")):
        fill = -np.inf if name.endswith("scores") else 0.0
        width = parts[-1].shape[-1]
        parts = [np.pad(x, [(0, 0), (0, 0), (0, width - x.shape[-1])], constant_values=fill) for x in parts]
    return np.concatenate(parts, axis=-2)


def _in_a_batch(ids, params, n_head: int) -> Trace:
    """The second of two equal texts; attention shows each text's scores by itself, the second last."""
    n = len(ids)
    params = with_attend(params, [packed([causal_attention] * 2, [n, n])] * len(params["blocks"]))
    positions = np.tile(np.arange(n), 2)
    trace = _run([*ids, *ids], params, n_head, position_ids=positions)
    return {name: value[..., -n:, :] for name, value in trace.items()}


def _from_the_other_end(ids, params, n_head: int) -> Trace:
    """Number the columns of the residual stream backwards: the same network adds in the opposite order."""

    def norm(branch):
        return {leaf: array[::-1] for leaf, array in branch.items()}

    def block(branch):
        attn, mlp = branch["attn"], branch["mlp"]
        rows = {"w": attn["c_attn"]["w"][::-1], "b": attn["c_attn"]["b"]}
        fc = {"w": mlp["c_fc"]["w"][::-1, ::-1], "b": mlp["c_fc"]["b"][::-1]}
        proj = {"w": mlp["c_proj"]["w"][::-1, ::-1], "b": mlp["c_proj"]["b"][::-1]}
        out = {"w": attn["c_proj"]["w"][:, ::-1], "b": attn["c_proj"]["b"][::-1]}
        return {
            "ln_1": norm(branch["ln_1"]),
            "attn": {"c_attn": rows, "c_proj": out},
            "ln_2": norm(branch["ln_2"]),
            "mlp": {"c_fc": fc, "c_proj": proj},
        }

    turned: dict[str, Any] = {key: params[key][:, ::-1] for key in ("wte", "wpe", "lm_head") if key in params}
    turned |= {"blocks": [block(branch) for branch in params["blocks"]], "ln_f": norm(params["ln_f"])}
    trace = _run(ids, turned, n_head)
    backwards = {name.hook for name in names(len(params["blocks"])) if name.shape in (ROWS, WIDE)}
    return {name: value[..., ::-1] if name in backwards else value for name, value in trace.items()}
