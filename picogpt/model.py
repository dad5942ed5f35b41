"""GPT-2, the forward pass: token ids in, logits out.

The functions are those of the article "GPT in 60 Lines of NumPy", the mathematics is OpenAI's
(openai/gpt-2, src/model.py; Radford et al. 2019, section 2.3), and the parameters arrive as nested dicts
with OpenAI's names, so that the tree of the checkpoint is the tree of calls: `mha(x, **attn, ...)`.

The axes of the shape comments, and their lengths in the smallest GPT-2 (124M):
    n_seq    tokens in the input           n_vocab  tokens in the vocabulary (50257)
    n_embd   width of the network (768)    n_ctx    positions the model knows (1024)
    n_head   attention heads (12)          d        width of a head, n_embd / n_head (64)
    n_q, n_k queries and keys: the same tokens, unless a cache remembers earlier keys

The arrays decide everything else. NumPy or JAX: the module is asked of the array (`__array_namespace__`).
float32 or float64: constants are Python floats, because a NumPy float64 scalar would promote every float32
it meets. Nothing here changes its arguments: `+=` works only on arrays that the same function has made.

Two functions can ride in the parameter tree: `attend`, the one place where tokens exchange information (caches
and batches replace it, see cache.py), and `tap`, which is shown the intermediates under TransformerLens's names
for them and whose answers are used in their stead; by default it changes nothing.
"""

BLOCK = 128  # rows of queries that attend together: enough for the BLAS, few enough for the processor's cache


def keep(name, x):
    """The default tap: keep x as it is."""
    return x


def gelu(x):  # [...] -> [...]
    """x times the probability that a standard normal variable is below x; GPT-2 has the tanh form of it
    (Hendrycks & Gimpel 2016, section 2), which differs from the erf form in the fourth decimal."""
    xp = x.__array_namespace__()
    # 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), in place; x**3 would cost a power per element.
    y = 0.044715 * x
    y *= x
    y += 1.0
    y *= x
    y *= 0.7978845608028654  # sqrt(2 / pi)
    y = xp.tanh(y)
    y += 1.0
    y *= x
    y *= 0.5
    return y


def softmax(x):  # [..., n] -> [..., n]
    """Turn each row of scores into probabilities that add up to 1."""
    xp = x.__array_namespace__()
    # The largest score becomes 0: exp then cannot overflow, and the quotient stays the same.
    y = xp.exp(x - x.max(axis=-1, keepdims=True))
    y /= y.sum(axis=-1, keepdims=True)
    return y


def layer_norm(x, g, b, eps=1e-5, tap=keep):  # [..., n_embd], [n_embd], [n_embd] -> [..., n_embd]
    """Give each row mean 0 and variance 1, then a learned gain and bias (Ba, Kiros & Hinton 2016)."""
    xp = x.__array_namespace__()
    n_embd = x.shape[-1]
    centred = x - x.sum(axis=-1, keepdims=True) / n_embd  # on one row, mean() and var() take twice the time
    variance = xp.vecdot(centred, centred)[..., None] / n_embd          # [..., n_embd] -> [..., 1]
    scale = tap("hook_scale", xp.sqrt(variance + eps))                  # eps keeps a constant row finite
    y = tap("hook_normalized", centred / scale) * g
    y += b
    return y


def linear(x, w, b):  # [..., in], [in, out], [out] -> [..., out]
    """Mix the columns of x; w is stored [in, out], as OpenAI wrote it (a transposed nn.Linear)."""
    y = x @ w
    y += b
    return y


def ffn(x, c_fc, c_proj, tap=keep):  # [n_seq, n_embd] -> [n_seq, n_embd]
    """Each row by itself: widen fourfold, bend, narrow again."""
    a = tap("hook_pre", linear(x, **c_fc))                              # [n_seq, n_embd] -> [n_seq, 4*n_embd]
    a = tap("hook_post", gelu(a))                                       # [n_seq, 4*n_embd] -> [n_seq, 4*n_embd]
    return linear(a, **c_proj)                                          # [n_seq, 4*n_embd] -> [n_seq, n_embd]


def attention(q, k, v, mask=None, tap=keep):
    # [..., n_q, d], [..., n_k, d], [..., n_k, d], [n_q, n_k] -> [..., n_q, d]
    """Each query takes an average of the values, weighted by how well their keys match it; the mask is added
    to the scores, -inf where a query may not look (Vaswani et al. 2017, section 3.2.1)."""
    # If the entries of q and k have variance 1, a product of d terms has variance d; dividing by sqrt(d) keeps
    # the scores' variance at 1, however wide the heads. There are fewer queries to divide than scores.
    scores = (q * q.shape[-1] ** -0.5) @ k.mT                           # [..., n_q, d] -> [..., n_q, n_k]
    if mask is not None:
        scores += mask
    pattern = softmax(tap("hook_attn_scores", scores))
    return tap("hook_pattern", pattern) @ v                             # [..., n_q, n_k] -> [..., n_q, d]


def causal_mask(positions, n_k, dtype):  # [n_q] -> [n_q, n_k]
    """What to add to the scores so that the query at each position sees no key that comes after it."""
    xp = positions.__array_namespace__()
    return xp.where(xp.arange(n_k) > positions[:, None], -xp.inf, 0.0).astype(dtype)


def causal_attention(q, k, v, tap=keep):
    # [n_head, n_q, d], [n_head, n_k, d], [n_head, n_k, d] -> [n_head, n_q, d]
    """Attention in which nobody sees the future; the queries belong to the last n_q >= 1 of the n_k keys."""
    xp = q.__array_namespace__()
    n_q, n_k = q.shape[-2], k.shape[-2]
    # In a prompt half of the scores are masked, so work in blocks of rows that stop at the diagonal, unless
    # someone is watching: a tap is shown the whole pattern at once.
    rows = BLOCK if tap is keep else n_q
    blocks = []
    for start in range(0, n_q, rows):
        stop = min(start + rows, n_q)
        seen = n_k - n_q + stop  # keys that the block's last row may see
        mask = causal_mask(xp.arange(seen + start - stop, seen), seen, q.dtype)
        blocks.append(attention(q[:, start:stop], k[:, :seen], v[:, :seen], mask, tap))
    return xp.concatenate(blocks, axis=1)


def mha(x, c_attn, c_proj, n_head, attend=causal_attention, tap=keep):  # [n_seq, n_embd] -> [n_seq, n_embd]
    """Several attentions side by side, each in its own 1/n_head of the columns (Vaswani et al., 3.2.2)."""
    n_seq, n_embd = x.shape
    qkv = linear(x, **c_attn)                                           # [n_seq, n_embd] -> [n_seq, 3*n_embd]
    heads = qkv.reshape(n_seq, 3, n_head, n_embd // n_head).transpose(1, 2, 0, 3)  # -> [3, n_head, n_seq, d]
    q, k, v = tap("hook_q", heads[0]), tap("hook_k", heads[1]), tap("hook_v", heads[2])
    z = tap("hook_z", attend(q, k, v, tap=tap))                         # -> [n_head, n_seq, d]
    merged = z.transpose(1, 0, 2).reshape(n_seq, n_embd)                # [n_head, n_seq, d] -> [n_seq, n_embd]
    return linear(merged, **c_proj)                                     # [n_seq, n_embd] -> [n_seq, n_embd]


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, tap=keep):  # [n_seq, n_embd] -> [n_seq, n_embd]
    """Let the tokens talk, then let each think for itself. Both times the block reads a normalized copy and
    adds what it found to x, the residual stream, which no layer ever overwrites (pre-norm: Radford, 2.3)."""
    x = tap("hook_resid_pre", x)
    x = x + tap("hook_attn_out", mha(layer_norm(x, **ln_1), **attn, n_head=n_head))
    x = tap("hook_resid_mid", x)
    x = x + tap("hook_mlp_out", ffn(layer_norm(x, **ln_2), **mlp))
    return tap("hook_resid_post", x)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, *, lm_head=None, position_ids=None,
         logits_to_keep=slice(None), tap=keep):  # [n_seq] -> [n_seq, n_vocab]
    """Logits of the token that follows each of the inputs: `gpt2(inputs, **params, n_head=hparams["n_head"])`.

    inputs           token ids: a list or an integer array, [n_seq]
    wte, wpe         embeddings of tokens [n_vocab, n_embd] and positions [n_ctx, n_embd]
    blocks, ln_f     one dict per layer, and the final layer norm
    lm_head          the output matrix [n_vocab, n_embd] where it is not wte itself (GPT-2 ties the two)
    position_ids     positions of the inputs [n_seq], when they continue a cache or several sequences are packed
    logits_to_keep   index of the rows wanted; generating wants the last: slice(-1, None)

    Returns logits in the dtype of the parameters. Raises ValueError for more tokens than there are positions:
    NumPy would stop with an index error, but JAX silently repeats the last row of wpe. The values of inputs and
    position_ids are not checked; `generate` does.
    """
    xp = wte.__array_namespace__()
    inputs = xp.asarray(inputs)
    if position_ids is None:
        if len(inputs) > len(wpe):
            raise ValueError(f"{len(inputs)} tokens do not fit into the model's {len(wpe)} positions")
        position_ids = xp.arange(len(inputs))
    x = tap("hook_embed", wte[inputs])                                  # [n_seq] -> [n_seq, n_embd]
    x = x + tap("hook_pos_embed", wpe[xp.asarray(position_ids)])        # [n_seq] -> [n_seq, n_embd]
    for block in blocks:
        x = transformer_block(x, **block, n_head=n_head)                # [n_seq, n_embd] -> [n_seq, n_embd]
    x = layer_norm(x[logits_to_keep], **ln_f)
    # GPT-2 uses the embedding table as output matrix: how well does the result match each token's own vector?
    # For a single row vecdot reads the table straight through: twice as fast as matmul on one thread.
    head = wte if lm_head is None else lm_head
    logits = xp.vecdot(head, x)[None] if len(x) == 1 else x @ head.T    # [n_seq, n_embd] -> [n_seq, n_vocab]
    return tap("logits", logits)


def with_taps(params, tap):
    """A shallow copy of the tree in which every function shows `tap(name, x) -> x` what it computes.

    Names are TransformerLens's: `hook_embed`, `blocks.3.attn.hook_pattern`, `ln_final.hook_scale`, `logits`.
    Per-head arrays are [n_head, n_seq, d] (TransformerLens: [n_seq, n_head, d]); `hook_normalized` comes before
    gain and bias. What the tap returns is used, so it can patch, ablate, drop out; what it stores it must copy.
    A second `with_taps` replaces the first.
    """
    def bind(prefix, branch):
        return {**branch, "tap": lambda name, x: tap(prefix + name, x)}

    hook_names = {"ln_1": "ln1", "attn": "attn", "ln_2": "ln2", "mlp": "mlp"}
    blocks = []
    for i, block in enumerate(params["blocks"]):
        parts = {name: bind(f"blocks.{i}.{hook}.", block[name]) for name, hook in hook_names.items()}
        blocks.append(bind(f"blocks.{i}.", {**block, **parts}))
    return bind("", {**params, "blocks": blocks, "ln_f": bind("ln_final.", params["ln_f"])})
