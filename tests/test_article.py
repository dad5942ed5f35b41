"""The article "GPT in 60 Lines of NumPy": its examples and definitions, with nothing changed but the import.

Blocks that are pseudocode or wrong as printed, and what is tested in their stead:

softmax's example       prints [[0.00034, 0.99966], [0.26894, 0.73106]] for [[2, 100], [-5, 0]]: these are the
                        values for entries that differ by 8 and by 1; the entries here differ by 98 and by 5
gelu, attention         np.sqrt(2 / np.pi) is a float64 scalar: in NumPy 2 it turns float32 into float64
output = gpt(inputs)    holds probabilities at first; gpt2 returns logits, and softmax makes them probabilities
np.random.choice        vocab_size is undefined; "hats" and "pants" are not in the vocabulary
WhitespaceTokenizer     is undefined, as are train's compute_gradients... and gradient_descent_...: pseudocode
lm_loss, first          takes the log of what should have gone through softmax
lm_loss, JAX            log_softmax(logits)[y] picks whole rows; one entry of each row is meant
generate                appends to its caller's list; ours leaves it alone
generate with eos_id    has no parameters to run; it returns eos_id too, ours does not return its stop_ids
main                    `assert ... < hparams["n_ctx"]` refuses a text that just fits
shape_tree              forgets `raise`, and prints None for what is no array
tf...load_variable      .squeeze() would eat any axis of length 1 (see test_checkpoint.py)
the two causal tables   set weights to 0 after softmax, so that rows no longer add up to 1
mha, in pieces          the heads split to [3, n_head, ...], not [n_head, 3, ...]; attention lacks its mask
import jax.numpy as np  JAX takes no lists or ranges as indices; ours needs no other import, only JAX arrays
jax.vmap(gpt2, ...)     the result needs all six arguments, not the batch alone
gpt2 with cls_head      ours is gpt2(..., lm_head=cls_head.T, logits_to_keep=-1)
singe_example_loss_fn   forgets n_head
"""

import re
from pathlib import Path

import numpy as np
import pytest

from models import jax_params, random_ids, random_params, tree_map
from picogpt import generate, get_encoder
from picogpt.checkpoint import shape_tree
from picogpt.model import attention, ffn, gelu, gpt2, layer_norm, linear, mha, softmax, transformer_block

HPARAMS = {"n_vocab": 29, "n_ctx": 24, "n_embd": 12, "n_head": 3, "n_layer": 2}
PARAMS, N_HEAD = random_params(**HPARAMS), HPARAMS["n_head"]
IDS = random_ids(9, HPARAMS["n_vocab"])
X = np.random.default_rng(0).normal(size=(9, HPARAMS["n_embd"]))


def close(found, expected, tolerance=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


# The article's definitions, to compare with.


def plain_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def plain_softmax(x):
    exp_x = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return exp_x / np.sum(exp_x, axis=-1, keepdims=True)


def plain_layer_norm(x, g, b, eps=1e-5):
    mean, variance = np.mean(x, axis=-1, keepdims=True), np.var(x, axis=-1, keepdims=True)
    return g * ((x - mean) / np.sqrt(variance + eps)) + b


def plain_linear(x, w, b):
    return x @ w + b


def plain_ffn(x, c_fc, c_proj):
    return plain_linear(plain_gelu(plain_linear(x, **c_fc)), **c_proj)


def plain_attention(q, k, v, mask):
    return plain_softmax(q @ k.T / np.sqrt(q.shape[-1]) + mask) @ v


def plain_mha(x, c_attn, c_proj, n_head):
    qkv = np.split(plain_linear(x, **c_attn), 3, axis=-1)
    qkv_heads = [np.split(part, n_head, axis=-1) for part in qkv]
    causal_mask = (1 - np.tri(x.shape[0], dtype=x.dtype)) * -1e10
    out_heads = [plain_attention(q, k, v, causal_mask) for q, k, v in zip(*qkv_heads, strict=True)]
    return plain_linear(np.hstack(out_heads), **c_proj)


def plain_block(x, mlp, attn, ln_1, ln_2, n_head):
    x = x + plain_mha(plain_layer_norm(x, **ln_1), **attn, n_head=n_head)
    return x + plain_ffn(plain_layer_norm(x, **ln_2), **mlp)


def plain_gpt2(inputs, wte, wpe, blocks, ln_f, n_head):
    x = wte[inputs] + wpe[range(len(inputs))]
    for block in blocks:
        x = plain_block(x, **block, n_head=n_head)
    return plain_layer_norm(x, **ln_f) @ wte.T


class TestExamples:
    def test_gelu(self):
        close(gelu(np.array([[1, 2], [-2, 0.5]])), [[0.84119, 1.9546], [-0.0454, 0.34571]], 5e-6)

    def test_softmax(self):
        x = softmax(np.array([[2, 100], [-5, 0]]))
        close(x, [[0, 1], [0.00669, 0.99331]], 5e-6)
        close(x.sum(axis=-1), [1, 1])
        close(softmax(np.array([[2, 10], [-1, 0]])), [[0.00034, 0.99966], [0.26894, 0.73106]], 5e-6)

    def test_layer_norm(self):
        x = np.array([[2, 2, 3], [-5, 0, 1]])
        x = layer_norm(x, g=np.ones(x.shape[-1]), b=np.zeros(x.shape[-1]))
        close(x, [[-0.70709, -0.70709, 1.41418], [-1.397, 0.508, 0.889]], 6e-4)
        close(x[0], [-0.70709, -0.70709, 1.41418], 6e-6)
        close(x.var(axis=-1), [0.99996, 1], 6e-6)
        close(x.mean(axis=-1), [0, 0])

    def test_linear(self):
        x, w, b = (np.random.default_rng(0).normal(size=shape) for shape in ((64, 784), (784, 10), (10,)))
        assert x.shape == (64, 784)
        assert linear(x, w, b).shape == (64, 10)

    def test_the_encoder(self):
        encoder = get_encoder()
        ids = encoder.encode("Not all heroes wear capes.")
        assert ids == [3673, 477, 10281, 5806, 1451, 274, 13]
        assert [encoder.decoder[i] for i in ids] == ["Not", "Ġall", "Ġheroes", "Ġwear", "Ġcap", "es", "."]
        assert [encoder.decoder[i] for i in encoder.encode("zjqfl")] == ["z", "j", "q", "fl"]
        assert [encoder.encoder[token] for token in ("Not", "Ġall")] == ids[:2]

    def test_the_prompt_and_its_eight_new_tokens(self):
        encoder = get_encoder()
        ids = [36235, 39141, 18765, 1143, 326, 9061, 561, 530, 1110, 1716]
        assert encoder.encode("Alan Turing theorized that computers would one day become") == ids
        new = [262, 749, 3665, 8217, 319, 262, 5440, 13]
        assert encoder.decode(new) == " the most powerful machines on the planet."

    def test_shape_tree_of_124M(self):
        hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
        tables = [(50257, 768), (1024, 768)]
        small = random_params(**{**hparams, "n_vocab": 1, "n_ctx": 1, "n_embd": 4})
        scale = {1: 1, 4: 768, 12: 2304, 16: 3072}
        params = tree_map(lambda x: np.broadcast_to(np.float32(0), [scale[n] for n in x.shape]), small)
        params |= {
            key: np.broadcast_to(np.float32(0), shape)
            for key, shape in zip(("wte", "wpe"), tables, strict=True)
        }
        block = {
            "attn": {"c_attn": {"b": [2304], "w": [768, 2304]}, "c_proj": {"b": [768], "w": [768, 768]}},
            "ln_1": {"b": [768], "g": [768]},
            "ln_2": {"b": [768], "g": [768]},
            "mlp": {"c_fc": {"b": [3072], "w": [768, 3072]}, "c_proj": {"b": [768], "w": [3072, 768]}},
        }
        assert shape_tree(params) == {
            "wpe": [1024, 768],
            "wte": [50257, 768],
            "ln_f": {"b": [768], "g": [768]},
            "blocks": [block] * 12,
        }
        with pytest.raises((AttributeError, TypeError, ValueError)):
            shape_tree("uh oh")

    def test_the_causal_tables(self):
        """Masked before softmax, a row still adds up to 1: the first has one entry, the last is as it was."""
        weights = np.array(
            [
                [0.116, 0.159, 0.055, 0.226, 0.443],
                [0.180, 0.397, 0.142, 0.106, 0.175],
                [0.156, 0.453, 0.028, 0.129, 0.234],
                [0.499, 0.055, 0.133, 0.017, 0.295],
                [0.089, 0.290, 0.240, 0.228, 0.153],
            ]
        )
        mask = (1 - np.tri(5)) * -1e10
        masked = attention(np.log(weights) * 5**0.5, np.eye(5), np.eye(5), mask)
        visible = np.tril(weights)
        close(masked, visible / visible.sum(axis=-1, keepdims=True))
        close(masked[0], [1, 0, 0, 0, 0])


class TestDefinitions:
    """Ours against the article's own, in float64."""

    def test_rows(self):
        block = PARAMS["blocks"][0]
        close(gelu(3 * X), plain_gelu(3 * X))
        close(softmax(9 * X), plain_softmax(9 * X))
        close(layer_norm(X, **block["ln_1"]), plain_layer_norm(X, **block["ln_1"]))
        close(linear(X, **block["mlp"]["c_fc"]), plain_linear(X, **block["mlp"]["c_fc"]))
        close(ffn(X, **block["mlp"]), plain_ffn(X, **block["mlp"]))

    def test_attention(self):
        q, k, v = np.random.default_rng(1).normal(size=(3, 7, 4))
        v, mask = v[:, :3], (1 - np.tri(7)) * -1e10  # d_v need not be d_k
        close(attention(q, k, v), plain_attention(q, k, v, 0))
        close(attention(q, k, v, mask), plain_attention(q, k, v, mask))
        close(attention(q[:2], k, v), plain_attention(q[:2], k, v, 0))

    def test_self_attention(self):
        def self_attention(x):
            return attention(q=x, k=x, v=x)

        close(self_attention(X), plain_attention(X, X, X, 0))

    def test_causal_self_attention(self):
        def causal_self_attention(x, c_attn, c_proj):
            x = linear(x, **c_attn)
            q, k, v = np.split(x, 3, axis=-1)
            causal_mask = (1 - np.tri(x.shape[0], dtype=x.dtype)) * -1e10
            x = attention(q, k, v, causal_mask)
            return linear(x, **c_proj)

        attn = PARAMS["blocks"][0]["attn"]
        close(causal_self_attention(X, **attn), plain_mha(X, **attn, n_head=1))
        close(causal_self_attention(X, **attn), mha(X, **attn, n_head=1))

    def test_mha_block_and_gpt2(self):
        block = PARAMS["blocks"][0]
        close(mha(X, **block["attn"], n_head=N_HEAD), plain_mha(X, **block["attn"], n_head=N_HEAD))
        close(transformer_block(X, **block, n_head=N_HEAD), plain_block(X, **block, n_head=N_HEAD))
        close(gpt2(IDS, **PARAMS, n_head=N_HEAD), plain_gpt2(IDS, **PARAMS, n_head=N_HEAD))
        close(gpt2(IDS, *PARAMS.values(), N_HEAD), plain_gpt2(IDS, *PARAMS.values(), N_HEAD))


class TestGenerate:
    def test_greedy(self):
        inputs, n = IDS.copy(), 8
        for _ in range(n):
            inputs.append(int(np.argmax(plain_gpt2(inputs, **PARAMS, n_head=N_HEAD)[-1])))
        untouched = IDS.copy()
        assert generate(untouched, PARAMS, N_HEAD, n) == inputs[len(inputs) - n :]
        assert untouched == IDS

    def test_until_eos(self):
        inputs, max_seq_len = IDS.copy(), 20
        eos_id = generate(IDS, PARAMS, N_HEAD, 5)[-1]
        while inputs[-1] != eos_id and len(inputs) < max_seq_len:
            inputs.append(int(np.argmax(plain_gpt2(inputs, **PARAMS, n_head=N_HEAD)[-1])))
        ids = generate(IDS, PARAMS, N_HEAD, max_seq_len - len(IDS), stop_ids=[eos_id])
        assert [*ids, eos_id] == inputs[len(IDS) :]

    def test_as_many_as_there_are_positions(self):
        assert len(generate(IDS, PARAMS, N_HEAD, HPARAMS["n_ctx"] - len(IDS))) == HPARAMS["n_ctx"] - len(IDS)


class TestFineTuning:
    def test_a_classifier(self):
        cls_head = np.random.default_rng(2).normal(size=(HPARAMS["n_embd"], 4))
        x = PARAMS["wte"][IDS] + PARAMS["wpe"][range(len(IDS))]
        for block in PARAMS["blocks"]:
            x = plain_block(x, **block, n_head=N_HEAD)
        expected = plain_layer_norm(x, **PARAMS["ln_f"])[-1] @ cls_head
        logits = gpt2(IDS, **PARAMS, n_head=N_HEAD, lm_head=cls_head.T, logits_to_keep=-1)
        assert logits.shape == (4,)
        close(logits, expected)
        close(-np.log(softmax(logits)[2]), -np.log(plain_softmax(expected)[2]))


class TestJAX:
    def test_lm_loss_and_its_gradient(self):
        """Against the article's first lm_loss on its own gpt2, and its slope along one random direction."""
        jax = pytest.importorskip("jax")
        params = jax_params(PARAMS)

        def lm_loss(params, inputs, n_head):
            x, y = inputs[:-1], inputs[1:]
            logits = gpt2(x, **params, n_head=n_head)
            return -jax.nn.log_softmax(logits)[np.arange(len(y)), np.array(y)].mean()

        def plain_lm_loss(params):
            output = plain_softmax(plain_gpt2(IDS[:-1], **params, n_head=N_HEAD))
            return np.mean(-np.log(output[np.arange(len(output)), IDS[1:]]))

        assert abs(jax.jit(lambda params: lm_loss(params, IDS, N_HEAD))(params) - plain_lm_loss(PARAMS)) < 1e-5
        grads = jax.jit(lambda params: jax.grad(lm_loss)(params, IDS, N_HEAD))(params)  # jit: for speed alone
        assert shape_tree(grads) == shape_tree(PARAMS)
        rng = np.random.default_rng(3)
        direction = jax.tree.map(lambda x: 1e-5 * rng.normal(size=x.shape), PARAMS)
        there, back = (plain_lm_loss(jax.tree.map(step, PARAMS, direction)) for step in (np.add, np.subtract))
        slope = sum(
            jax.tree.leaves(jax.tree.map(lambda g, d: float((np.asarray(g) * d).sum()), grads, direction))
        )
        assert slope == pytest.approx((there - back) / 2, rel=1e-4)

    def test_vmap(self):
        jax = pytest.importorskip("jax")
        params, batched_inputs = jax_params(PARAMS), np.array([IDS, IDS[::-1], [0] * 9])
        gpt2_batched = jax.vmap(gpt2, in_axes=[0, None, None, None, None, None])
        wte, wpe, blocks, ln_f = params.values()
        logits = jax.jit(lambda batch: gpt2_batched(batch, wte, wpe, blocks, ln_f, N_HEAD))(batched_inputs)
        assert logits.shape == (3, 9, HPARAMS["n_vocab"])
        for row, inputs in zip(logits, batched_inputs, strict=True):
            close(np.asarray(row), plain_gpt2(inputs, **PARAMS, n_head=N_HEAD), 1e-4)


def test_docs_article_quotes_our_lines_as_they_stand():
    checkout = Path(__file__).parents[1]
    page = (checkout / "docs" / "article.md").read_text(encoding="utf-8")
    rooms = [path.read_text(encoding="utf-8") for path in checkout.glob("picogpt/*.py")]
    ours = [line.strip() for room in rooms for line in room.splitlines()]
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    quoted = [line.strip() for block in blocks for line in block.splitlines()]
    assert len(quoted) > 20
    assert [line for line in quoted if not any(line == whole[: len(line)] for whole in ours)] == []
