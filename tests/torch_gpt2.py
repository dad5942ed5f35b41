"""Oracles for traces: transformers' GPT-2 with hooks on it, and a GPT-2 of torch functions, right or wrong.

The second is written without a look at picogpt's arithmetic; FAULTS lists what can be planted in it. Both
return dicts from the names of picogpt.names to NumPy arrays without batch axis, per-head arrays
[n_head, n_seq, d], masked scores -inf.
"""

from unittest import mock

import numpy as np
import pytest

from models import transformers_model

torch = pytest.importorskip("torch")
F = torch.nn.functional


def record_transformers(params, n_head, ids, attn="eager", *, threads=1, activation="gelu_new"):
    """What transformers' GPT2LMHeadModel computes, by hooks on its modules, in the dtype of the parameters.

    With attn="sdpa" scores and patterns are absent: no module ever sees them. `activation` is the option
    `activation_function` of GPT-2's config.json: "gelu" is the erf form, "gelu_new" the right one.
    """
    model = transformers_model(params, n_head)
    from transformers.activations import ACT2FN

    for block in model.transformer.h:
        block.mlp.act = ACT2FN[activation]
    model.set_attn_implementation(attn)
    torch.set_num_threads(threads)
    try:
        return record_model(model, ids)
    finally:
        torch.set_num_threads(1)


def record_model(model, ids):
    """The same for a GPT2LMHeadModel that the caller has made."""
    body, seen, softmaxes, handles = model.transformer, {}, [], []
    heads = (len(ids), model.config.n_head, -1)

    def note(name, x):
        seen[name] = x.detach().clone().numpy()

    def output(name, module):
        handles.append(
            module.register_forward_hook(lambda _m, _x, y: note(name, (y[0] if isinstance(y, tuple) else y)[0]))
        )

    def before(module, function):
        handles.append(module.register_forward_pre_hook(lambda _m, x: function(x[0][0])))

    def watch_norm(at, module):
        def inside(x):  # nn.LayerNorm shows neither of these: torch's own functions give them
            note(f"{at}.hook_scale", (x.var(-1, correction=0, keepdim=True) + module.eps).sqrt())
            note(f"{at}.hook_normalized", F.layer_norm(x, module.normalized_shape, eps=module.eps))

        before(module, inside)
        output(f"{at}.hook_out", module)

    def watch_block(at, block):
        def split_qkv(_module, _x, y):
            for part, x in zip("qkv", y[0].chunk(3, dim=-1), strict=True):
                note(f"{at}.attn.hook_{part}", x.view(heads).transpose(0, 1))

        before(block, lambda x: note(f"{at}.hook_resid_pre", x))
        watch_norm(f"{at}.ln1", block.ln_1)
        handles.append(block.attn.c_attn.register_forward_hook(split_qkv))
        before(block.attn.c_proj, lambda x: note(f"{at}.attn.hook_z", x.view(heads).transpose(0, 1)))
        output(f"{at}.hook_attn_out", block.attn)
        before(block.ln_2, lambda x: note(f"{at}.hook_resid_mid", x))
        watch_norm(f"{at}.ln2", block.ln_2)
        output(f"{at}.mlp.hook_pre", block.mlp.c_fc)
        before(block.mlp.c_proj, lambda x: note(f"{at}.mlp.hook_post", x))
        output(f"{at}.hook_mlp_out", block.mlp)
        output(f"{at}.hook_resid_post", block)

    def softmax(x, *args, **options):
        y = torch.softmax(x, options["dim"])
        softmaxes.append((x[0].masked_fill(x[0] <= torch.finfo(x.dtype).min / 2, -torch.inf), y[0]))
        return y

    output("hook_embed", body.wte)
    output("hook_pos_embed", body.wpe)
    for i, block in enumerate(body.h):
        watch_block(f"blocks.{i}", block)
    watch_norm("ln_final", body.ln_f)
    output("logits", model.lm_head)
    with torch.no_grad(), mock.patch.object(F, "softmax", softmax):
        model(torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    for i, (scores, pattern) in enumerate(softmaxes):  # one per block in the eager attention
        note(f"blocks.{i}.attn.hook_attn_scores", scores)
        note(f"blocks.{i}.attn.hook_pattern", pattern)
    return seen


ORDERS = ("qvk", "kqv", "kvq", "vqk", "vkq")
EPS = {"eps_missing": 0.0, "eps_1e-6": 1e-6, "eps_1e-12": 1e-12}
ACTIVATIONS = {
    "erf_gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}
BIASES = ("ln_1", "c_attn", "c_proj", "ln_2", "c_fc", "mlp_c_proj", "ln_f")
FAULTS = {
    "erf_gelu": "the exact GELU, torch.nn.GELU(), for the tanh form",
    "quick_gelu": "x * sigmoid(1.702 x) for GELU",
    "relu": "ReLU for GELU",
    "silu": "x * sigmoid(x) for GELU",
    "eps_missing": "layer norm divides by sqrt(variance)",
    "eps_1e-6": "layer norm with eps 1e-6",
    "eps_1e-12": "layer norm with eps 1e-12",
    "eps_outside_root": "layer norm divides by sqrt(variance) + eps",
    "variance_n-1": "variance divided by n-1",
    "rms_norm": "layer norm without subtracting the mean (root mean square)",
    "no_gain": "layer norms without their gain",
    "no_ln_1": "attention reads the residual stream as it is",
    "no_ln_2": "the MLP reads the residual stream as it is",
    "swapped_layer_norms": "gain and bias of ln_1 and ln_2 exchanged",
    "no_final_layer_norm": "the head reads the residual stream as it is",
    "post_norm": "normalized after each addition, as in Vaswani et al. 2017",
    "parallel_block": "the MLP reads the block's input, as in GPT-J",
    "transposed_c_attn": "memory of c_attn's [in, out] read as [out, in]",
    "transposed_c_proj": "memory of attention's c_proj [in, out] read as [out, in]",
    "transposed_c_fc": "memory of c_fc's [in, out] read as [out, in]",
    "transposed_mlp_c_proj": "memory of the MLP's c_proj [in, out] read as [out, in]",
    **{f"order_{order}": f"c_attn's thirds taken for {', '.join(order)}" for order in ORDERS},
    "qkv_interleaved": "c_attn's columns taken head by head: q, k, v of head 0, then of head 1",
    "no_scale": "scores not divided",
    "double_scale": "scores divided by d",
    "scale_n_embd": "scores divided by sqrt(n_embd); the same as right with one head",
    "no_mask": "every query sees every key",
    "mask_sees_next": "every query sees one key too many",
    "mask_hides_self": "no query sees its own key; the first sees itself",
    "mask_after_softmax": "masked cells set to 0 after a softmax over all cells",
    "softmax_over_queries": "softmax along the wrong axis of the scores",
    "positions_from_1": "the first position is 1",
    "positions_0_with_cache": "position 0 for every token after the prompt",
    "cache_one_step_late": "after the prompt no query sees its own key",
    "heads_merged_wrong": "[n_head, n_seq, d] reshaped to [n_seq, n_embd] without transposing",
    "heads_merged_by_column": "heads interleaved: [n_seq, d, n_head] reshaped",
    "wrong_n_head": "another divisor of n_embd for n_head; per-head arrays have its shape",
    **{f"no_bias_{name}": f"bias of {name} forgotten" for name in BIASES},
    "no_residual_attn": "attention's output takes the place of the stream",
    "no_residual_mlp": "the MLP's output takes the place of the stream",
    "no_token_embedding": "only the positions' embeddings enter the stream",
    "no_position_embedding": "only the tokens' embeddings enter the stream",
    "scaled_embedding": "the token's embedding times sqrt(n_embd), as in Vaswani et al. 2017",
    "random_lm_head": "the output matrix is not the token embeddings but never-loaded noise",
    "layers_in_text_order": "blocks sorted as text: 0, 1, 10, 11, 2; the same as right up to ten layers",
    "bfloat16_weights": "weights rounded to bfloat16",
    "float16_weights": "weights rounded to float16",
    "bfloat16_activations": "every named tensor rounded to bfloat16",
    "float16_activations": "every named tensor rounded to float16",
    "tf32_products": "both factors of every matrix product rounded to 10 bits of mantissa",
    "block_0_weights": "every block computes with the weights of block 0",
    "ln_1_for_ln_2": "gain and bias of ln_1 used by ln_2, too",
    "residual_from_normalized": "the normalized row, not the stream, is added to",
    "head_0_keys": "every head meets the keys of head 0",
    "head_0_keys_and_values": "every head has the keys and values of head 0",
    "positions_one_behind": "positions of tokens after the prompt one too small",
    "positions_one_ahead": "positions of tokens after the prompt one too large; needs fewer ids than n_ctx",
    "last_block_missing": "n_layer - 1 blocks are computed",
}


def torch_trace(params, n_head, ids, faults=None, dtype=torch.float32, prompt=None):
    """Every tensor of picogpt.names, by a GPT-2 of torch functions.

    `faults` maps names in FAULTS to "all" or to the set of layers that have them; n_layer stands for the
    final layer norm and the head. The faults of caches take the first `prompt` tokens (by default half of them)
    as read at once, the rest as read one by one. positions_from_1 needs fewer ids than n_ctx.
    """
    return TorchGPT2(params, n_head, faults or {}, dtype, prompt or max(1, len(ids) // 2))(list(ids))


def tf32(x):
    """x with 10 bits of mantissa, rounded to nearest, in its own dtype."""
    bits = x.to(torch.float32).contiguous().view(torch.int32)
    return ((bits + 0x1000) & -0x2000).view(torch.float32).to(x.dtype)


def other_divisor(n_embd, n_head):
    """The divisor of n_embd nearest to n_head that is not n_head."""
    others = [n for n in range(1, n_embd + 1) if n_embd % n == 0 and n != n_head]
    return min(others, key=lambda n: abs(np.log(n / n_head)))


class TorchGPT2:
    """A forward pass that can be wrong in many ways; `layer` is where it stands: -1, 0 ... n_layer."""

    def __init__(self, params, n_head, faults, dtype, prompt):
        if unknown := faults.keys() - FAULTS.keys():
            raise ValueError(f"no such fault: {sorted(unknown)}")
        self.params, self.n_head, self.faults, self.dtype, self.prompt = params, n_head, faults, dtype, prompt
        self.seen, self.layer = {}, -1

    def has(self, fault):
        where = self.faults.get(fault, ())
        return where == "all" or self.layer in where

    def note(self, name, x):
        for kind in (torch.bfloat16, torch.float16):
            if self.has(f"{str(kind)[6:]}_activations"):
                x = x.to(kind).to(self.dtype)
        self.seen[name] = x.detach().clone().numpy()
        return x

    def weight(self, array):
        w = torch.tensor(np.array(array)).to(self.dtype)
        for kind in (torch.bfloat16, torch.float16):
            if self.has(f"{str(kind)[6:]}_weights"):
                w = w.to(kind).to(self.dtype)
        return w

    def factor(self, x):
        return tf32(x) if self.has("tf32_products") else x

    def linear(self, x, branch, name):
        w, b = self.weight(branch["w"]), self.weight(branch["b"])
        if self.has(f"transposed_{name}"):
            w = w.reshape(w.shape[::-1]).T
        if self.has(f"no_bias_{name}"):
            b = torch.zeros_like(b)
        return F.linear(self.factor(x), self.factor(w).T, b)

    def layer_norm(self, x, branch, at, name):
        g, b = self.weight(branch["g"]), self.weight(branch["b"])
        eps = next((value for fault, value in EPS.items() if self.has(fault)), 1e-5)
        variance = x.var(-1, correction=int(self.has("variance_n-1")), keepdim=True)
        if self.has("rms_norm"):
            variance = x.square().mean(-1, keepdim=True)
        outside = self.has("eps_outside_root")
        scale = self.note(f"{at}.hook_scale", variance.sqrt() + eps if outside else (variance + eps).sqrt())
        normalized = F.layer_norm(x, x.shape[-1:], eps=eps)
        if outside or self.has("variance_n-1"):
            normalized = (x - x.mean(-1, keepdim=True)) / scale
        elif self.has("rms_norm"):
            normalized = x / scale
        normalized = self.note(f"{at}.hook_normalized", normalized)
        y = normalized if self.has("no_gain") else normalized * g
        return self.note(f"{at}.hook_out", y if self.has(f"no_bias_{name}") else y + b)

    def visible(self, n_seq):
        """Which key [column] each query [row] may see."""
        q, k = torch.arange(n_seq)[:, None], torch.arange(n_seq)
        if self.has("no_mask") or self.has("mask_after_softmax"):
            return torch.ones(n_seq, n_seq, dtype=torch.bool)
        seen = k <= q + self.has("mask_sees_next")
        if self.has("mask_hides_self"):
            seen &= (k != q) | (q == 0)
        if self.has("cache_one_step_late"):
            seen &= (k != q) | (q < self.prompt)
        return seen

    def attention(self, x, branch, at):
        n_seq, n_embd = x.shape
        n_head = other_divisor(n_embd, self.n_head) if self.has("wrong_n_head") else self.n_head
        d = n_embd // n_head
        qkv = self.linear(x, branch["c_attn"], "c_attn")
        if self.has("qkv_interleaved"):
            parts = qkv.view(n_seq, n_head, 3, d).permute(2, 1, 0, 3)
        else:
            parts = qkv.view(n_seq, 3, n_head, d).permute(1, 2, 0, 3)
        order = next((order for order in ORDERS if self.has(f"order_{order}")), "qkv")
        parts = dict(zip(order, parts, strict=True))
        q, k, v = (self.note(f"{at}.hook_{part}", parts[part]) for part in "qkv")
        divisors = {"no_scale": 1.0, "double_scale": d, "scale_n_embd": n_embd**0.5}
        divisor = next((value for fault, value in divisors.items() if self.has(fault)), d**0.5)
        if self.has("head_0_keys") or self.has("head_0_keys_and_values"):
            k = k[:1].expand_as(k)
        if self.has("head_0_keys_and_values"):
            v = v[:1].expand_as(v)
        scores = self.factor(q) @ self.factor(k).mT / divisor
        scores = self.note(f"{at}.hook_attn_scores", scores.masked_fill(~self.visible(n_seq), -torch.inf))
        pattern = torch.softmax(scores, -2 if self.has("softmax_over_queries") else -1)
        if self.has("mask_after_softmax"):
            pattern = pattern.tril()
        pattern = self.note(f"{at}.hook_pattern", pattern)
        z = self.note(f"{at}.hook_z", self.factor(pattern) @ self.factor(v))
        if self.has("heads_merged_by_column"):
            z = z.permute(1, 2, 0)
        elif not self.has("heads_merged_wrong"):
            z = z.transpose(0, 1)
        return self.linear(z.reshape(n_seq, n_embd), branch["c_proj"], "c_proj")

    def mlp(self, x, branch, at):
        x = self.note(f"{at}.hook_pre", self.linear(x, branch["c_fc"], "c_fc"))
        bent = next((function for fault, function in ACTIVATIONS.items() if self.has(fault)), None)
        x = self.note(f"{at}.hook_post", bent(x) if bent else F.gelu(x, approximate="tanh"))
        return self.linear(x, branch["c_proj"], "mlp_c_proj")

    def block(self, x, branch, at):
        ln_1, ln_2 = (
            branch[name] for name in (("ln_2", "ln_1") if self.has("swapped_layer_norms") else ("ln_1", "ln_2"))
        )
        if self.has("ln_1_for_ln_2"):
            ln_2 = ln_1
        post, normalized = self.has("post_norm"), self.has("residual_from_normalized")
        start = x = self.note(f"{at}.hook_resid_pre", x)
        a = x if post or self.has("no_ln_1") else self.layer_norm(x, ln_1, f"{at}.ln1", "ln_1")
        x = a if normalized else x
        a = self.note(f"{at}.hook_attn_out", self.attention(a, branch["attn"], f"{at}.attn"))
        x = a if self.has("no_residual_attn") else x + a
        x = self.note(f"{at}.hook_resid_mid", self.layer_norm(x, ln_1, f"{at}.ln1", "ln_1") if post else x)
        m = start if self.has("parallel_block") else x
        m = m if post or self.has("no_ln_2") else self.layer_norm(m, ln_2, f"{at}.ln2", "ln_2")
        x = m if normalized else x
        m = self.note(f"{at}.hook_mlp_out", self.mlp(m, branch["mlp"], f"{at}.mlp"))
        x = m if self.has("no_residual_mlp") else x + m
        return self.note(f"{at}.hook_resid_post", self.layer_norm(x, ln_2, f"{at}.ln2", "ln_2") if post else x)

    def embed(self, ids):
        positions = torch.arange(len(ids)) + self.has("positions_from_1")
        if self.has("positions_0_with_cache"):
            positions[self.prompt :] = 0
        positions[self.prompt :] += self.has("positions_one_ahead") - self.has("positions_one_behind")
        wte, wpe = self.weight(self.params["wte"]), self.weight(self.params["wpe"])
        tokens = F.embedding(torch.tensor(ids), wte) * (
            wte.shape[1] ** 0.5 if self.has("scaled_embedding") else 1.0
        )
        tokens = self.note("hook_embed", tokens)
        places = self.note("hook_pos_embed", F.embedding(positions, wpe))
        if self.has("no_token_embedding"):
            return places
        return tokens if self.has("no_position_embedding") else tokens + places

    def __call__(self, ids):
        x, blocks = self.embed(ids), self.params["blocks"]
        order = (
            sorted(range(len(blocks)), key=str)
            if self.faults.get("layers_in_text_order")
            else range(len(blocks))
        )
        for self.layer, place in enumerate(order):
            if self.has("last_block_missing") and self.layer == len(blocks) - 1:
                continue
            place = 0 if self.has("block_0_weights") else place
            x = self.block(x, blocks[place], f"blocks.{self.layer}")
        self.layer = len(blocks)
        if not self.has("no_final_layer_norm"):
            x = self.layer_norm(x, self.params["ln_f"], "ln_final", "ln_f")
        head = self.weight(self.params.get("lm_head", self.params["wte"]))
        if self.has("random_lm_head"):
            head = 0.02 * torch.randn(head.shape, dtype=self.dtype, generator=torch.Generator().manual_seed(0))
        self.note("logits", F.linear(self.factor(x), self.factor(head)))
        return self.seen
