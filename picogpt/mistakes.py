"""The mistakes that programs which compute GPT-2 make: each wrong operation beside the right one.

An entry says where it shows, what is right, what is wrong, who makes it, and holds the wrong operation, so that
diagnose.py can try it on recorded intermediates:

    value   (x, at) -> what comes out under a name instead of the right x; None if that cannot be foreseen
    read    (x, at) -> what the next operation reads instead of the x that is recorded under a name
    tree    (branch, at) -> the parameters in force: of a block, {"wte", "wpe"}, or {"ln_f", "lm_head"}

Names are those of names.py without the layer; LN stands for ln1, ln2 and ln_final.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from picogpt.model import attention, causal_attention, keep, layer_norm, softmax
from picogpt.noise import rounded
from picogpt.replay import NORMS, QKV, STREAM, Change, Mistake
from picogpt.trace import tree_map

PRODUCTS = f"{QKV} hook_attn_out mlp.hook_pre hook_mlp_out logits"
OF_BLOCK = f"ln1.hook_out {QKV} hook_attn_out ln2.hook_out mlp.hook_pre hook_mlp_out"  # what weights show in
SCORES, PATTERN = "attn.hook_attn_scores", "attn.hook_pattern"
ALL = f"""hook_embed hook_pos_embed {STREAM} LN.hook_scale LN.hook_normalized LN.hook_out
    {PRODUCTS} {SCORES} {PATTERN} attn.hook_z mlp.hook_post"""
Changes = Change | dict[str, Change] | None
LINEAR = (("c_attn", "attn.c_attn", QKV), ("c_proj", "attn.c_proj", "hook_attn_out"),
          ("c_fc", "mlp.c_fc", "mlp.hook_pre"), ("mlp_c_proj", "mlp.c_proj", "hook_mlp_out"))  # fmt: skip
GELU = "0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))"
ROOT = 0.7978845608028654  # sqrt(2/pi)
CATALOGUE: dict[str, Mistake] = {}


def make(
    name: str, sites: str, says: str, right: str, wrong: str, seen: str = "", *,
    value: Changes = None, read: Changes = None, tree: Change | None = None, rounds: str = "",
) -> Mistake:  # fmt: skip
    """Return a mistake. `value` and `read` are functions for all of its sites, or sites -> function."""

    def placed(changes: Changes) -> dict[str, Change]:
        changes = {sites: changes} if callable(changes) else changes or {}
        return {site: change for where, change in changes.items() for site in each(where)}

    where = tuple(each(sites))
    return Mistake(name, where, says, right, wrong, seen, placed(value), placed(read), tree, rounds)


def mistake(name: str, *says: str, **does: Any) -> None:
    """Enter a mistake."""
    CATALOGUE[name] = make(name, *says, **does)


def each(sites: str) -> list[str]:
    """The sites, parted by blanks; for LN those of the three layer norms."""
    split = sites.split()
    return [s.replace("LN", norm) for s in split for norm in (NORMS if s.startswith("LN.") else [""])]


def changed(branch, path: str, change: Change):
    """A copy of a tree in which the leaf at `path`, "attn.c_attn.w", is changed, if it has one."""
    key, _, rest = path.partition(".")
    if key not in branch:
        return branch
    return {**branch, key: changed(branch[key], rest, change) if rest else change(branch[key])}


def found(branch, path: str):
    """What is at a path of a tree."""
    key, _, rest = path.partition(".")
    return found(branch[key], rest) if rest else branch[key]


def leaf(path: str, change: Change) -> Change:
    """The mistake of changing one leaf."""
    return lambda branch, at: changed(branch, path, change)


def norms(change: Change) -> Change:
    """The mistake of changing gains, biases, or the eps of all layer norms."""
    return lambda branch, at: {
        key: change(leaves) if key in NORMS.values() else leaves for key, leaves in branch.items()
    }


def columns(order: Change) -> Change:
    """The mistake of taking the columns of c_attn in another order, into which `order` puts their numbers."""

    def reorder(leaves, at):
        return {key: w[..., order(np.arange(w.shape[-1]), at)] for key, w in leaves.items()}

    return lambda branch, at: changed(branch, "attn.c_attn", lambda leaves: reorder(leaves, at))


def attends(change: Callable[..., Any]) -> Change:
    """The mistake of attending otherwise: `change(attend, row, q, k, v, tap)`, attend being what it was."""

    def wrong(attn, row):
        return {**attn, "attend": partial(change, attn.get("attend", causal_attention), row)}

    return lambda branch, at: changed(branch, "attn", lambda attn: wrong(attn, at.row))


def sees(visible: Change) -> Change:
    """The mistake of a wrong mask: whether the query at position i sees the key at position j."""

    def change(_, row, q, k, v, tap=keep):
        i = np.arange(q.shape[-2])
        mask = np.where(visible(i[:, None], i, row), 0.0, -np.inf).astype(q.dtype)
        return attention(q, k, v, mask, tap)

    return attends(change)


def split_into(n_head: int) -> Change:
    """The mistake of a wrong number of heads."""

    def change(attend, row, q, k, v, tap=keep):  # 3 x [heads, n_seq, d] -> [heads, n_seq, d]
        heads, n_seq, d = q.shape
        if heads * d % n_head:
            return attend(q, k, v, tap=tap)
        split = [x.transpose(1, 0, 2).reshape(n_seq, n_head, -1).transpose(1, 0, 2) for x in (q, k, v)]
        return attend(*split, tap=tap).transpose(1, 0, 2).reshape(n_seq, heads, d).transpose(1, 0, 2)

    return attends(change)


def matrices(branch, change: Change, but=("g", "b")):
    """A copy of a tree with all matrices changed, but for leaves of these names."""
    if not isinstance(branch, dict):
        return change(branch)
    return {key: w if key in but else matrices(w, change, but) for key, w in branch.items()}


def tf32(x):
    """x with ten bits of mantissa, as NVIDIA's tensor cores read float32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(x.dtype)


def deviation(x):  # [n_seq, n_embd] -> [n_seq, 1]
    """What a layer norm divides by, without eps."""
    shown: dict[str, Any] = {}
    layer_norm(x, 1.0, 0.0, 0.0, tap=lambda name, x: shown.setdefault(name, x))
    return shown["hook_scale"]


def root_mean_square(x):  # [n_seq, n_embd] -> [n_seq, 1]
    return ((x * x).sum(axis=-1, keepdims=True) / x.shape[-1] + 1e-5) ** 0.5


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def erf(x):
    y: Any = np.frompyfunc(math.erf, 1, 1)(np.asarray(x, np.float64))
    # A library's float32 erf is right to a unit in the last place, not to half a unit.
    return np.nextafter(y.astype(np.float32), np.float32(2)) if x.dtype == np.float32 else y.astype(x.dtype)


def gelu_with(root: float, cubic: float) -> Change:
    def change(_, at):
        x = at["mlp.hook_pre"]
        return 0.5 * x * (1.0 + np.tanh(root * (x + cubic * x * x * x)))

    return change


class Constant(NamedTuple):
    """A number that may be another: what it is in GPT-2, and the mistake of having another there."""

    right: float
    mistake: Callable[[float], Mistake]


# fmt: off
# Mistakes made together are made in this order: first whose weights, then their precision, then what is done.

mistake("layers_in_text_order", OF_BLOCK, "has another block's weights",
        "blocks in the order of their numbers", "blocks in the order of the alphabet: 0, 1, 10, 11, 2, ...",
        "names sorted as text",
        tree=lambda t, at: at.block(sorted(range(at.n_layer), key=str)[at.layer]) if "attn" in t else t)
mistake("block_0_weights", OF_BLOCK, "has the weights of block 0",
        "block i computes with h.i", "every block computes with h.0", "a pointer to the layer that never moves",
        tree=lambda t, at: at.block(0) if "attn" in t else t)
for dtype in ("bfloat16", "float16"):
    mistake(f"{dtype}_weights", f"hook_embed hook_pos_embed LN.hook_out {PRODUCTS}", f"has weights in {dtype}",
            "the checkpoint's float32", f"{dtype}(w)",
            "converted checkpoints; compare with a recording of the rounded weights",
            tree=lambda branch, at, dtype=dtype: tree_map(lambda w: rounded(w, dtype), branch))
    mistake(f"{dtype}_matrices", f"hook_embed hook_pos_embed {PRODUCTS}", f"has matrices in {dtype}",
            "the checkpoint's float32", f"{dtype}(w), gains and biases left as they are", "mixed precision",
            tree=lambda branch, at, dtype=dtype: matrices(branch, lambda w: rounded(w, dtype)))
    mistake(f"{dtype}_activations", ALL, f"is rounded to {dtype}",
            "float32 between the operations", f"{dtype}(x)",
            "half precision throughout: three or two digits are left, whatever else is right",
            value=lambda x, at, dtype=dtype: rounded(x, dtype), rounds=dtype)
mistake("tf32_products", f"{PRODUCTS} {SCORES} attn.hook_z", "is a product in TF32",
        "x w in float32", "tf32(x) tf32(w), with ten bits of mantissa",
        "GPUs from Ampere on where allowed: `torch.backends.cuda.matmul.allow_tf32`, JAX's default precision",
        tree=lambda branch, at: matrices(branch, tf32, ("g", "b", "wte", "wpe")), rounds="tf32",
        read={f"LN.hook_out {QKV} {PATTERN} attn.hook_z mlp.hook_post": lambda x, at: tf32(x)})

# Embeddings
mistake("positions_from_1", "hook_pos_embed", "counts positions from 1",
        "wpe[0], wpe[1], wpe[2], ...", "wpe[1], wpe[2], wpe[3], ...",
        "fairseq and Hugging Face's OPT and RoBERTa start later than 0; so do one-based languages",
        value=lambda x, at: at.branch["wpe"][np.minimum(np.arange(len(x)) + 1, len(at.branch["wpe"]) - 1)])
mistake("positions_0_with_cache", "hook_pos_embed", "has position 0 for every token after the prompt",
        "wpe[number of tokens in the cache]", "wpe[0] in every step of decoding",
        "a step sees one token and numbers it from 0: text falls apart after the prompt",
        value=lambda x, at: at.branch["wpe"][np.arange(len(x)) * (np.arange(len(x)) < max(at.row, 1))])
for where, by in (("behind", -1), ("ahead", 1)):
    mistake(f"positions_one_{where}", "hook_pos_embed", f"is one position {where} after the prompt",
            "wpe[number of tokens in the cache]",
            f"wpe[number of tokens in the cache {'+-'[by < 0]} 1]",
            "the new token is counted too late or twice; text stays fluent",
            value=lambda x, at, by=by: at.branch["wpe"][np.clip(
                np.arange(len(x)) + by * (np.arange(len(x)) >= max(at.row, 1)), 0, len(at.branch["wpe"]) - 1)])
mistake("scaled_embedding", "hook_embed", "is multiplied by sqrt(n_embd)", "wte[id]", "wte[id] sqrt(n_embd)",
        "Vaswani et al. 2017, section 3.4; GPT-2 does not", value=lambda x, at: x * x.shape[-1] ** 0.5)
for which, site, left in (("token", "hook_embed", "wpe[i]"), ("position", "hook_pos_embed", "wte[id]")):
    mistake(f"no_{which}_embedding", "hook_resid_pre", f"lacks the {which} embedding", "wte[id] + wpe[i]", left,
            "one overwrites the other instead of being added", read={site: lambda x, at: 0.0 * x})

# Layer norms
for eps, digits, who in ((0.0, "", "hand-written; harmless until a row is nearly constant"),
                         (1e-6, "1e-6", "Flax's default, T5"), (1e-12, "1e-12", "BERT's"),
                         (1e-3, "0.001", "Keras's default")):
    mistake(f"eps_{digits or 'missing'}", "LN.hook_scale", f"has {'eps' if eps else 'no'} {digits or 'eps'}",
            "sqrt(variance + 1e-5)", f"sqrt(variance + {digits})" if eps else "sqrt(variance)", who,
            tree=norms(lambda leaves, eps=eps: {**leaves, "eps": eps}))
mistake("eps_outside_root", "LN.hook_scale", "has eps outside the root",
        "sqrt(variance + 1e-5)", "sqrt(variance) + 1e-5",
        "`(x - x.mean()) / (x.std() + eps)`, as the Annotated Transformer writes it",
        value=lambda x, at: deviation(at.stream) + 1e-5)
mistake("variance_n-1", "LN.hook_scale", "has a variance divided by n - 1",
        "variance = sum((x - mean)^2) / n", "sum((x - mean)^2) / (n - 1)",
        "torch.var, torch.std, R, MATLAB, Julia and pandas divide by n - 1 unless told otherwise",
        value=lambda x, at: (x * x + (x * x - 1e-5) / (at.stream.shape[-1] - 1)) ** 0.5)
mistake("rms_norm", "LN.hook_scale LN.hook_normalized", "is RMSNorm",
        "(x - mean) / sqrt(variance + 1e-5)", "x / sqrt(mean(x^2) + 1e-5)",
        "Llama and its kin do not subtract the mean",
        value={"LN.hook_scale": lambda x, at: root_mean_square(at.stream),
                "LN.hook_normalized": lambda x, at: at.stream / root_mean_square(at.stream)})
mistake("norm_over_positions", "LN.hook_scale LN.hook_normalized", "is taken over the positions",
        "mean and variance of each row", "mean and variance of each column",
        "axis 0 for axis -1; the future leaks into the past",
        value={"LN.hook_scale": lambda x, at: None,
                "LN.hook_normalized": lambda x, at: layer_norm(at.stream.T, 1.0, 0.0).T})
mistake("no_gain", "LN.hook_out", "lacks its gain", "g normalized + b", "normalized + b",
        "weights that were never loaded", tree=norms(lambda leaves: {**leaves, "g": np.ones_like(leaves["g"])}))
mistake("swapped_layer_norms", "LN.hook_out", "has gain and bias of the block's other layer norm",
        "ln_1 before attention, ln_2 before the MLP", "ln_2 before attention, ln_1 before the MLP",
        tree=lambda tree, at: {**tree, "ln_1": tree["ln_2"], "ln_2": tree["ln_1"]} if "ln_1" in tree else tree)
mistake("ln_1_for_ln_2", "ln2.hook_out", "has gain and bias of ln_1",
        "ln_1 before attention, ln_2 before the MLP", "ln_1 before both", "copy and paste",
        tree=lambda tree, at: {**tree, "ln_2": tree["ln_1"]} if "ln_1" in tree else tree)
for norm, name, site, reader, who in (
        ("ln1", "no_ln_1", QKV, "attention", ""), ("ln2", "no_ln_2", "mlp.hook_pre", "the MLP", ""),
        ("ln_final", "no_final_layer_norm", "logits", "the head", "GPT-1 had no final layer norm")):
    mistake(name, site, f"comes from the residual stream as it is, not from {norm}",
            f"{reader} reads {NORMS[norm]}(x)", f"{reader} reads x", who,
            read={f"{norm}.hook_out": lambda x, at: at.stream})

# Weights read wrongly
for name, path, site in LINEAR:
    mistake(f"transposed_{name}", site, f"has the matrix of {path} transposed",
            f"w of {path} is stored [in, out]: y = x w + b", "the same memory read as [out, in]: y = x w^T + b",
            "OpenAI's Conv1D is a transposed nn.Linear; a square w gives no shape error",
            tree=leaf(f"{path}.w", lambda w: w.reshape(w.shape[::-1]).T))
for order in ("qvk", "kqv", "kvq", "vqk", "vkq"):
    mistake(f"order_{order}", QKV, f"comes from c_attn's columns in the order {', '.join(order)}",
            "q, k, v = split(x w + b, 3)", f"{', '.join(order)} = split(x w + b, 3)",
            tree=columns(lambda n, at, order=order: n.reshape(3, -1)[[order.index(x) for x in "qkv"]].ravel()))
mistake("qkv_interleaved", QKV, "comes from c_attn's columns head by head",
        "columns [3, n_head, d]: q of all heads, then k, then v",
        "columns [n_head, 3, d]: q, k, v of head 0, then of head 1",
        "GPT-NeoX, BLOOM and Megatron store them so",
        tree=columns(lambda n, at: n.reshape(at.n_head, 3, -1).transpose(1, 0, 2).ravel()))
mistake("heads_split_by_column", QKV, "has every n_head-th column in a head",
        "head h has columns h d to (h + 1) d", "head h has columns h, h + n_head, ...",
        "reshape to [n_seq, d, n_head] for [n_seq, n_head, d]",
        tree=columns(lambda n, at: n.reshape(3, -1, at.n_head).transpose(0, 2, 1).ravel()))
mistake("heads_split_wrong", QKV, "is split into heads without transposing",
        "[n_seq, n_head, d] transposed to [n_head, n_seq, d]", "[n_seq, n_embd] reshaped to [n_head, n_seq, d]",
        "the shape is right, so nothing complains; tokens get mixed",
        value=lambda x, at: x.transpose(1, 0, 2).reshape(x.shape))
for name, path, site in (*LINEAR, *((path, path, f"{norm}.hook_out") for norm, path in NORMS.items())):
    wrong = "g normalized" if path.startswith("ln") else "x w"
    mistake(f"no_bias_{name}", site, f"lacks the bias of {path}", f"{wrong} + b", wrong,
            "bias=False in nanoGPT; GPT-2 has a bias everywhere but in the head",
            tree=leaf(f"{path}.b", np.zeros_like))
for i, letter in enumerate("qkv"):
    mistake(f"no_bias_{letter}", f"attn.hook_{letter}", "lacks its third of c_attn's bias", "x w + b", "x w",
            "Whisper's keys have none" if letter == "k" else "",
            tree=leaf("attn.c_attn.b", lambda b, i=i: b * (np.arange(len(b)) * 3 // len(b) != i)))
mistake("last_block_missing", "ln_final.hook_scale logits", "comes from the stream without the last block",
        "n_layer blocks", "n_layer - 1 blocks", "a loop that ends too early; `hidden_states[-2]`",
        value={"hook_resid_post": lambda x, at: at["hook_resid_pre"] if at.layer == at.n_layer - 1 else x})

# Attention
for name, says, wrong, seen, visible in (
        ("no_mask", "sees the future", "every j", "bidirectional as in BERT", lambda i, j, row: j >= 0 * i),
        ("mask_sees_next", "sees one key too many", "j <= i + 1", "tril(1), or > for >=",
         lambda i, j, row: j <= i + 1),
        ("mask_hides_self", "hides each token from itself", "j < i, but token 0 sees itself", "tril(-1)",
         lambda i, j, row: (j < i) | (j == 0)),
        ("mask_upside_down", "sees the future and not the past", "j >= i", "triu for tril",
         lambda i, j, row: j >= i),
        ("cache_one_step_late", "lacks each new token's own key after the prompt", "j < i after the prompt",
         "the cache is read before it is appended to",
         lambda i, j, row: (j < i) | (j == i) & (i < max(row, 1)))):
    mistake(name, f"{SCORES} {PATTERN}", says, "j <= i: a query at position i sees the keys up to its own",
            wrong, seen, tree=sees(visible))
mistake("mask_multiplied", SCORES, "has masked scores of 0",
        "-inf where j > i, then softmax", "scores * tril(1), then softmax",
        "exp(0) is 1, not 0: the future gets its share",
        read={SCORES: lambda x, at: np.where(np.tri(x.shape[-1], dtype=bool), x, 0.0)})
mistake("mask_after_softmax", PATTERN, "is masked after the softmax",
        "softmax(scores + mask)", "softmax(scores) * tril(1)",
        "rows do not add up to 1, and every row has looked into the future",
        value=lambda x, at: np.tril(x), tree=sees(lambda i, j, row: j >= 0 * i))
mistake("softmax_over_queries", PATTERN, "is a softmax over the queries",
        "each row adds up to 1", "each column adds up to 1", "axis -2 for axis -1",
        value=lambda x, at: softmax(at[SCORES].mT).mT)
for name, says, wrong, seen, power in (
        ("no_scale", "is not scaled", "q k^T", "patterns become nearly one-hot", lambda d, n: d**0.5),
        ("double_scale", "is scaled twice", "q k^T / d", "once in q, once in the scores", lambda d, n: d**-0.5),
        ("scale_n_embd", "is scaled by the whole width", "q k^T / sqrt(n_embd)",
         "the slip in the lecture Let's build GPT, where C is n_embd; the same as right with one head",
         lambda d, n: (d / n) ** 0.5)):
    mistake(name, SCORES, says, "q k^T / sqrt(d)", wrong, seen,
            tree=attends(lambda attend, row, q, k, v, tap=keep, power=power:
                         attend(q * power(q.shape[-1], q.shape[0] * q.shape[-1]), k, v, tap=tap)))
for name, what, take in (
        ("head_0_keys", "keys", lambda k, v: (k[:1] + 0.0 * k, v)),
        ("head_0_values", "values", lambda k, v: (k, v[:1] + 0.0 * v)),
        ("head_0_keys_and_values", "keys and values", lambda k, v: (k[:1] + 0.0 * k, v[:1] + 0.0 * v))):
    mistake(name, f"{SCORES} attn.hook_z", f"has the {what} of head 0 in all heads",
            "q of head h meets k and v of head h", f"{what} of head 0 for every q",
            "the head's offset is forgotten; or multi-query attention, as in PaLM and Falcon",
            tree=attends(lambda attend, row, q, k, v, tap=keep, take=take: attend(q, *take(k, v), tap=tap)))
for n_head in (1, 2, 3, 4, 5, 6, 8, 10, 12, 13, 16, 20, 24, 25, 32, 48, 50, 64, 100):
    mistake(f"wrong_n_head_{n_head}", f"{SCORES} {PATTERN} attn.hook_z",
            f"comes from {n_head} head{'s' * (n_head > 1)}",
            "n_head of hparams.json: 12, 16, 20, 25 in OpenAI's sizes", f"n_head = {n_head}",
            "fits whenever it divides n_embd; a default of 12", tree=split_into(n_head))
mistake("heads_merged_wrong", "hook_attn_out", "has its heads merged without transposing",
        "[n_head, n_seq, d] transposed to [n_seq, n_head, d], then [n_seq, n_embd]",
        "[n_head, n_seq, d] reshaped to [n_seq, n_embd]",
        "the shape is right, so nothing complains; tokens get mixed",
        read={"attn.hook_z": lambda z, at: z.reshape(z.shape[1], z.shape[0], -1).transpose(1, 0, 2)})
mistake("heads_merged_by_column", "hook_attn_out", "has the columns of its heads in turns",
        "column h d + c is column c of head h", "column c n_head + h is column c of head h",
        "stacked along the last axis",
        read={"attn.hook_z": lambda z, at:
              z.transpose(1, 2, 0).reshape(z.shape[1], z.shape[0], -1).transpose(1, 0, 2)})

# MLP
for name, says, wrong, seen, function in (
        ("erf_gelu", "is erf GELU", "0.5 x (1 + erf(x / sqrt(2)))",
         "torch.nn.GELU(), so nanoGPT since June 2023; the text still looks right",
         lambda x: 0.5 * x * (1.0 + erf(x * 0.5**0.5))),
        ("quick_gelu", "is quick-GELU", "x sigmoid(1.702 x)", "CLIP", lambda x: x * sigmoid(1.702 * x)),
        ("relu", "is ReLU", "max(x, 0)", "Vaswani et al. 2017", lambda x: np.maximum(x, 0.0)),
        ("silu", "is SiLU", "x sigmoid(x)", "Llama", lambda x: x * sigmoid(x)),
        ("gelu_without_cube", "is GELU without the cubic term", "0.5 x (1 + tanh(sqrt(2/pi) x))", "",
         lambda x: 0.5 * x * (1.0 + np.tanh(ROOT * x))),
        ("no_activation", "is the same as mlp.hook_pre", "x", "the call is forgotten", lambda x: x)):
    mistake(name, "mlp.hook_post", says, GELU, wrong, seen,
            value=lambda x, at, function=function: function(at["mlp.hook_pre"]))

# Residual stream
mistake("parallel_block", "ln2.hook_scale ln2.hook_normalized",
        "reads what the block found, not what attention left",
        "x + attn(ln_1(x)), then x + mlp(ln_2(x))", "x + attn(ln_1(x)) + mlp(ln_2(x))",
        "GPT-J, GPT-NeoX and PaLM run the two in parallel",
        read={"hook_resid_mid": lambda x, at: at["hook_resid_pre"]},
        value={"hook_resid_post": lambda x, at: x + at["hook_attn_out"]})
mistake("residual_from_normalized", "hook_resid_mid hook_resid_post", "adds to the normalized stream",
        "x + f(ln(x))", "ln(x) + f(ln(x))", "x = ln(x) overwrites what is to be added to",
        value={"hook_resid_mid": lambda x, at: at["ln1.hook_out"] + at["hook_attn_out"],
                "hook_resid_post": lambda x, at: at["ln2.hook_out"] + at["hook_mlp_out"]})
for part, end in (("attn", "mid"), ("mlp", "post")):
    mistake(f"no_residual_{part}", f"hook_resid_{end}",
            f"lacks what the block had before: the residual connection around {part}",
            f"x + {part}(...)", f"{part}(...)", value=lambda x, at, part=part: at[f"hook_{part}_out"])
mistake("post_norm", "hook_resid_mid hook_resid_post", "is normalized after the addition",
        "x + attn(ln_1(x)), then x + mlp(ln_2(x))", "ln_1(x + attn(x)), then ln_2(x + mlp(x))",
        "post-norm: Vaswani et al. 2017, GPT-1, BERT; GPT-2 moved the layer norms (Radford et al. 2019, 2.3)",
        # What is recorded under the layer norms' names was made of something that is computed later.
        value={"ln1.hook_scale ln1.hook_normalized ln1.hook_out": lambda x, at: None,
                "ln2.hook_scale ln2.hook_normalized ln2.hook_out": lambda x, at: None,
                "hook_resid_mid": lambda x, at: layer_norm(x, **at.branch["ln_1"]),
                "hook_resid_post": lambda x, at: layer_norm(x, **at.branch["ln_2"])},
        read={"ln1.hook_out ln2.hook_out": lambda x, at: at.stream})

# What is no entry because there is no end of it: diagnose.py fits the numbers, and tries the places.
CONSTANTS = (
    Constant(1e-5, lambda eps: make(
        f"eps_{eps:g}", "LN.hook_scale", f"has eps {eps:g}",
        "sqrt(variance + 1e-5)", f"sqrt(variance + {eps:g})",
        tree=norms(lambda leaves: {**leaves, "eps": eps}))),
    Constant(0.044715, lambda c: make(
        f"cubic_{c:g}", "mlp.hook_post", f"is GELU with {c:g} for 0.044715",
        GELU, GELU.replace("0.044715", f"{c:g}"), value=gelu_with(ROOT, c))),
    Constant(ROOT, lambda c: make(
        f"root_{c:g}", "mlp.hook_post", f"is GELU with {c:g} for sqrt(2/pi)",
        GELU, GELU.replace("sqrt(2/pi)", f"{c:g}"), value=gelu_with(c, 0.044715))),
    Constant(64**-0.5, lambda c: make(
        f"scale_{c:g}", SCORES, f"is scaled by {c:g}", "q k^T / sqrt(d)", f"{c:g} q k^T",
        tree=attends(lambda attend, row, q, k, v, tap=keep:
                     attend(q * (c * q.shape[-1] ** 0.5), k, v, tap=tap)))),
)


def misplaced(n_layer: int) -> Iterator[Mistake]:
    """The mistakes of using the weights of one block in others, or those of one of its parts."""
    parts = [(path, path, site) for _, path, site in LINEAR]
    parts += [(path, other, f"{norm}.hook_out") for norm, path in NORMS.items() for other in ("ln_1", "ln_2")]
    for i in range(n_layer):
        yield make(f"weights_of_h.{i}", OF_BLOCK, f"has the weights of h.{i}",
                   "block i computes with h.i", f"with h.{i}",
                   tree=lambda t, at, i=i: at.block(i) if "attn" in t else t)
        for path, other, site in parts:
            right = path if path == "ln_f" else f"h.i.{path}"
            yield make(f"weights_of_h.{i}.{other}", site, f"has the weights of h.{i}.{other}",
                       right, f"h.{i}.{other}", tree=lambda t, at, i=i, path=path, other=other:
                       changed(t, path, lambda _: found(at.block(i), other)))
