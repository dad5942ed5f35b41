"""What every intermediate of the forward pass is called, how it is shaped, and what it means.

The names are TransformerLens's, in the order in which they are computed; beside them stand those of Hugging
Face (modules, whose output is meant) and of llm.c (fields of ActivationTensors in train_gpt2.c). `{i}` is the
layer; the axes are those of model.py.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Name(NamedTuple):
    """One intermediate: its name and shape, its meaning, and what others call it (names parted by blanks)."""

    hook: str
    shape: str
    meaning: str
    hugging_face: str = ""
    llm_c: str = ""

    def of_layer(self, i: int) -> "Name":
        """The same with the number of a layer in every name."""
        return Name(*(part.replace("{i}", str(i)) for part in self))


ROWS = "n_seq, n_embd"
HEADS = "n_head, n_seq, d"
SCORES = "n_head, n_seq, n_seq"
ONE = "n_seq, 1"
WIDE = "n_seq, 4*n_embd"
QKV = "h.{i}.attn.c_attn", "qkv.{i}"  # one array [n_seq, 3*n_embd] with all three

BEFORE = (
    Name("hook_embed", ROWS, "the rows of wte that belong to the ids", "wte"),
    Name("hook_pos_embed", ROWS, "the rows of wpe that belong to the positions", "wpe"),
)
BLOCK = (
    Name("hook_resid_pre", ROWS, "the residual stream as the block finds it", "hidden_states.{i}"),
    Name("ln1.hook_scale", ONE, "sqrt(variance + eps) of each row", llm_c="1/ln1_rstd.{i}"),
    Name("ln1.hook_normalized", ROWS, "the row with mean 0 and variance 1, before gain and bias"),
    Name("ln1.hook_out", ROWS, "normalized * g + b", "h.{i}.ln_1", "ln1.{i}"),
    Name("attn.hook_q", HEADS, "what each token looks for, a third of c_attn's output", *QKV),
    Name("attn.hook_k", HEADS, "what each token can be found by", *QKV),
    Name("attn.hook_v", HEADS, "what each token has to say", *QKV),
    Name(
        "attn.hook_attn_scores",
        SCORES,
        "q k^T / sqrt(d); -inf where the key comes after the query",
        "",
        "preatt.{i}",
    ),
    Name("attn.hook_pattern", SCORES, "softmax of each row of scores", "attentions.{i}", "att.{i}"),
    Name("attn.hook_z", HEADS, "the average of the values, weighted by the pattern", "", "atty.{i}"),
    Name(
        "hook_attn_out",
        ROWS,
        "heads side by side, through c_proj",
        "h.{i}.attn h.{i}.attn.c_proj",
        "attproj.{i}",
    ),
    Name("hook_resid_mid", ROWS, "resid_pre + attn_out", "", "residual2.{i}"),
    Name("ln2.hook_scale", ONE, "sqrt(variance + eps) of each row", llm_c="1/ln2_rstd.{i}"),
    Name("ln2.hook_normalized", ROWS, "the row with mean 0 and variance 1, before gain and bias"),
    Name("ln2.hook_out", ROWS, "normalized * g + b", "h.{i}.ln_2", "ln2.{i}"),
    Name("mlp.hook_pre", WIDE, "through c_fc", "h.{i}.mlp.c_fc", "fch.{i}"),
    Name("mlp.hook_post", WIDE, "gelu of it, the tanh form", "h.{i}.mlp.act", "fch_gelu.{i}"),
    Name("hook_mlp_out", ROWS, "through c_proj", "h.{i}.mlp h.{i}.mlp.c_proj", "fcproj.{i}"),
    Name("hook_resid_post", ROWS, "resid_mid + mlp_out: what the next block finds", "h.{i}", "residual3.{i}"),
)
AFTER = (
    Name("ln_final.hook_scale", ONE, "sqrt(variance + eps) of each row", llm_c="1/lnf_rstd"),
    Name("ln_final.hook_normalized", ROWS, "the row with mean 0 and variance 1, before gain and bias"),
    Name("ln_final.hook_out", ROWS, "normalized * g + b", "ln_f hidden_states.{n_layer}", "lnf"),
    Name("logits", "n_seq, n_vocab", "out wte^T: how likely each token comes next", "lm_head", "logits"),
)

# A constant added to a row of these is seen by no layer norm and no softmax: some programs centre them.
CENTRED = (
    "hook_embed",
    "hook_pos_embed",
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
    "logits",
)


def names(n_layer: int) -> Iterator[Name]:
    """Every intermediate of a model of `n_layer` layers, in order of computation."""
    yield from BEFORE
    for i in range(n_layer):
        for name in BLOCK:
            yield name._replace(hook=f"blocks.{{i}}.{name.hook}").of_layer(i)
    for name in AFTER:
        yield name._replace(hugging_face=name.hugging_face.replace("{n_layer}", str(n_layer)))


def tapped(n_layer: int) -> list[str]:
    """The names that a tap sees; a layer norm's `hook_out`, which none does, follows from `hook_normalized`."""
    return [name.hook for name in names(n_layer) if not name.hook.endswith(".hook_out")]
