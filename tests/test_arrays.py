"""The arrays decide: model.py keeps their dtype and runs on JAX as on NumPy, whose logits are like torch's."""

import numpy as np
import pytest

from models import (
    LONG,
    SMALL,
    astype,
    close,
    intermediates,
    jax_params,
    jax_x64,
    random_ids,
    random_params,
    rounding_noise,
    transformers_model,
    transformers_names,
    tree_map,
)
from picogpt.model import (
    attention,
    causal_attention,
    ffn,
    gelu,
    gpt2,
    layer_norm,
    linear,
    mha,
    softmax,
    transformer_block,
)

PARAMS, IDS, N_HEAD = random_params(**SMALL), random_ids(17, SMALL["n_vocab"]), SMALL["n_head"]


@pytest.fixture
def jax():
    """JAX, with float64."""
    with jax_x64():
        import jax

        yield jax


def every_function(dtype, array):
    """Calls of all that is in model.py, with arguments that, in NumPy, cannot be written to."""

    def random(*shape):
        x = np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)
        x.flags.writeable = False
        return array(x)

    params = tree_map(array, random_params(**SMALL, dtype=dtype))
    block, ids = params["blocks"][0], [3, 1, 4, 1, 5]
    x, (q, k, v), mask = random(5, 12), [random(3, n, 4) for n in (2, 5, 5)], random(2, 5)
    return {
        "gelu": lambda: gelu(x),
        "softmax": lambda: softmax(x),
        "layer_norm": lambda: layer_norm(x, **block["ln_1"]),
        "linear": lambda: linear(x, **block["mlp"]["c_fc"]),
        "ffn": lambda: ffn(x, **block["mlp"]),
        "attention": lambda: attention(q, k, v),
        "attention with a mask": lambda: attention(q, k, v, mask),
        "causal_attention": lambda: causal_attention(q, k, v),
        "mha": lambda: mha(x, **block["attn"], n_head=3),
        "transformer_block": lambda: transformer_block(x, **block, n_head=3),
        "gpt2": lambda: gpt2(ids, **params, n_head=3),
        "gpt2 with lm_head": lambda: gpt2(ids, **params, n_head=3, lm_head=params["wte"]),
        "gpt2, one row": lambda: gpt2(ids, **params, n_head=3, logits_to_keep=slice(-1, None)),
    }


def run(params):
    return intermediates(params, IDS, N_HEAD)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
class TestDtype:
    """JAX tells the dtype of a result without computing it."""

    def test_every_function_keeps_it_and_leaves_its_arguments_alone(self, dtype):
        for name, function in every_function(dtype, np.asarray).items():
            assert function().dtype == dtype, name

    def test_every_function_keeps_it_on_jax(self, dtype, jax):
        for name, function in every_function(dtype, jax.numpy.asarray).items():
            assert jax.eval_shape(function).dtype == dtype, name

    def test_every_intermediate_has_it(self, dtype):
        assert {x.dtype.name for x in run(astype(PARAMS, dtype)).values()} == {dtype}

    def test_every_intermediate_has_it_on_jax(self, dtype, jax):
        assert {x.dtype.name for x in jax.eval_shape(run, astype(PARAMS, dtype)).values()} == {dtype}


class TestJAX:
    def test_plain_and_jit(self, jax):
        expected, params = gpt2(IDS, **PARAMS, n_head=N_HEAD), jax_params(PARAMS)
        logits = gpt2(IDS, **params, n_head=N_HEAD)
        assert type(logits) is type(params["wte"])
        close(np.asarray(logits), expected, 1e-12)
        compiled = jax.jit(gpt2, static_argnames="n_head")
        close(np.asarray(compiled(np.array(IDS), **params, n_head=N_HEAD)), expected, 1e-12)

    def test_too_many_tokens(self, jax):
        """Which JAX by itself would not notice."""
        params = jax_params(PARAMS)
        for function in (gpt2, jax.jit(gpt2, static_argnames="n_head")):
            with pytest.raises(ValueError, match="20 tokens do not fit into the model's 19 positions"):
                function(np.zeros(20, int), **params, n_head=N_HEAD)

    def test_past_a_block_of_queries(self, jax):
        params, ids = random_params(**LONG), random_ids(287, LONG["n_vocab"])
        logits = jax.jit(gpt2, static_argnames="n_head")(np.array(ids), **params, n_head=LONG["n_head"])
        close(np.asarray(logits), gpt2(ids, **params, n_head=LONG["n_head"]), 1e-11)

    def test_vmap_as_in_the_article(self, jax):
        batched = jax.vmap(gpt2, in_axes=[0, None, None, None, None, None])
        batch, leaves = np.array([IDS, IDS[::-1]]), list(jax_params(PARAMS).values())
        logits = jax.jit(lambda batch: batched(batch, *leaves, N_HEAD))(batch)
        for row, inputs in zip(logits, batch, strict=True):
            close(np.asarray(row), gpt2(inputs, **PARAMS, n_head=N_HEAD), 1e-12)

    def test_taps_under_jit(self, jax):
        found, expected = jax.jit(run)(PARAMS), run(PARAMS)
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            close(np.asarray(found[name]), x, 1e-12, name)

    def test_gradients_of_the_loss_against_torch(self, jax):
        torch = pytest.importorskip("torch")
        oracle = transformers_model(PARAMS, N_HEAD)
        logits = oracle(torch.tensor([IDS])).logits[0]  # transformers' own loss would go down to float32
        torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(IDS[1:])).backward()
        expected = {name: weight.grad.numpy() for name, weight in oracle.named_parameters()}

        def lm_loss(params):
            log_p = jax.nn.log_softmax(gpt2(IDS[:-1], **params, n_head=N_HEAD))
            return -log_p[np.arange(len(IDS) - 1), np.array(IDS[1:])].mean()

        gradients = transformers_names(jax.jit(jax.grad(lm_loss))(PARAMS))
        assert gradients.keys() == expected.keys()
        largest = max(np.abs(gradient).max() for gradient in expected.values())
        for name, gradient in gradients.items():
            close(np.asarray(gradient), expected[name], 1e-10 * largest, name)

    def test_float32(self):
        jax = pytest.importorskip("jax")
        params, ids = random_params(**LONG, dtype=np.float32), random_ids(200, LONG["n_vocab"])

        def plain(params):
            return gpt2(ids, **params, n_head=LONG["n_head"])

        logits = jax.jit(plain)(params)
        assert logits.dtype == np.float32
        close(np.asarray(logits), plain(astype(params, np.float64)), 4 * rounding_noise(plain, params))
