"""The forward pass against transformers + torch, and against activations that PyTorch recorded."""

from pathlib import Path

import numpy as np
import pytest

from models import (
    LONG,
    SMALL,
    close,
    intermediates,
    nano_sort_params,
    nano_sort_recorded,
    random_ids,
    random_params,
    rounding_noise,
    transformers_model,
)
from picogpt import model
from picogpt.model import gelu, gpt2, layer_norm, softmax, with_taps

CONFIGS = {  # hyper-parameters, and how many tokens to read
    "25 heads, as in 1558M": ({"n_vocab": 61, "n_ctx": 40, "n_embd": 200, "n_head": 25, "n_layer": 2}, 40),
    "heads of 64, as in all": ({"n_vocab": 211, "n_ctx": 64, "n_embd": 192, "n_head": 3, "n_layer": 2}, 50),
    "odd sizes": ({"n_vocab": 53, "n_ctx": 37, "n_embd": 63, "n_head": 7, "n_layer": 3}, 29),
    "heads of 1": ({"n_vocab": 7, "n_ctx": 5, "n_embd": 5, "n_head": 5, "n_layer": 1}, 5),
    "one head": ({"n_vocab": 19, "n_ctx": 11, "n_embd": 14, "n_head": 1, "n_layer": 2}, 10),
    "twelve layers": ({"n_vocab": 97, "n_ctx": 32, "n_embd": 48, "n_head": 12, "n_layer": 12}, 31),
    "one token": (SMALL, 1),
    "a block of queries and one": (LONG, model.BLOCK + 1),
    "three blocks of queries": (LONG, 287),
}


@pytest.fixture
def small():
    """params (float64), ids and n_head of a model that is read in no time."""
    return random_params(**SMALL), random_ids(17, SMALL["n_vocab"]), SMALL["n_head"]


def test_model_py_has_at_most_200_lines():
    assert len(Path(model.__file__).read_text(encoding="utf-8").splitlines()) <= 200


class TestTransformers:
    @pytest.mark.parametrize("lm_head", [False, True], ids=["tied", "lm_head"])
    @pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 2e-5)])
    @pytest.mark.parametrize("config", CONFIGS)
    def test_logits(self, config, dtype, tolerance, lm_head):
        torch = pytest.importorskip("torch")
        hparams, n_seq = CONFIGS[config]
        params, ids = (
            random_params(**hparams, dtype=dtype, lm_head=lm_head),
            random_ids(n_seq, hparams["n_vocab"]),
        )
        with torch.no_grad():
            expected = transformers_model(params, hparams["n_head"])(torch.tensor([ids])).logits[0].numpy()
        logits = gpt2(ids, **params, n_head=hparams["n_head"])
        assert logits.dtype == dtype and logits.shape == (n_seq, hparams["n_vocab"])
        close(logits, expected, tolerance * np.abs(expected).max())

    def test_residual_stream_and_patterns(self, small):
        torch = pytest.importorskip("torch")
        params, ids, n_head = small
        oracle = transformers_model(params, n_head)
        with torch.no_grad():
            expected = oracle(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
        seen = intermediates(params, ids, n_head)
        for i in range(SMALL["n_layer"]):
            close(seen[f"blocks.{i}.hook_resid_pre"], expected.hidden_states[i][0].numpy(), 1e-10)
            close(seen[f"blocks.{i}.attn.hook_pattern"], expected.attentions[i][0].numpy(), 1e-10)


def test_every_recorded_activation_of_the_sorting_model(assets):
    """minGPT's nano model, which sorts six digits, as PyTorch ran it on three inputs (bbycroft/llm-viz)."""
    params = nano_sort_params(assets)
    config, recorded = nano_sort_recorded(assets)
    assert config["n_layer"] == 3
    for row, ids in enumerate(recorded["idx"].astype(int)):
        seen = intermediates(params, ids, n_head=3)

        def first(name, seen=seen):
            return seen[f"blocks.0.{name}"]

        q, k, v = (first(f"attn.hook_{name}") for name in "qkv")
        ln_1, ln_2, ln_f = params["blocks"][0]["ln_1"], params["blocks"][0]["ln_2"], params["ln_f"]
        found = {
            "idx": ids,
            "tok_emb": seen["hook_embed"],
            "x": first("hook_resid_pre"),
            "ln1": first("ln1.hook_normalized") * ln_1["g"] + ln_1["b"],
            "q": q,
            "k": k,
            "v": v,
            "qkv": np.hstack([*q, *k, *v]),
            "att": first("attn.hook_attn_scores"),
            "attSm": first("attn.hook_pattern"),
            "y": np.hstack(first("attn.hook_z")),
            "yProj": first("hook_attn_out"),
            "attnResid": first("hook_resid_mid"),
            "ln2": first("ln2.hook_normalized") * ln_2["g"] + ln_2["b"],
            "fc": first("mlp.hook_pre"),
            "gelu": first("mlp.hook_post"),
            "mlp": first("hook_mlp_out"),
            "mlpResid": first("hook_resid_post"),
            "block0": seen["blocks.0.hook_resid_post"],
            "block1": seen["blocks.1.hook_resid_post"],
            "block2": seen["blocks.2.hook_resid_post"],
            "ln_f": seen["ln_final.hook_normalized"] * ln_f["g"] + ln_f["b"],
            "lm_head": seen["logits"],
            "probs": softmax(seen["logits"]),
        }
        close(seen["hook_pos_embed"], recorded["pos_emb"][0], 1e-5)
        assert found.keys() | {"pos_emb"} == recorded.keys()
        for name, array in found.items():
            close(array, recorded[name][row], 1e-5, name)


class TestTaps:
    def test_names_are_those_of_transformer_lens_in_its_order(self, small):
        of_a_block = [
            "hook_resid_pre",
            "ln1.hook_scale",
            "ln1.hook_normalized",
            "attn.hook_q",
            "attn.hook_k",
            "attn.hook_v",
            "attn.hook_attn_scores",
            "attn.hook_pattern",
            "attn.hook_z",
            "hook_attn_out",
            "hook_resid_mid",
            "ln2.hook_scale",
            "ln2.hook_normalized",
            "mlp.hook_pre",
            "mlp.hook_post",
            "hook_mlp_out",
            "hook_resid_post",
        ]
        assert list(intermediates(*small)) == [
            "hook_embed",
            "hook_pos_embed",
            *(f"blocks.{i}.{name}" for i in (0, 1) for name in of_a_block),
            "ln_final.hook_scale",
            "ln_final.hook_normalized",
            "logits",
        ]

    @pytest.mark.parametrize("n_seq", [1, 17, 287])
    def test_watching_changes_nothing_beyond_noise(self, n_seq):
        params, ids = random_params(**LONG, dtype=np.float32), random_ids(n_seq, LONG["n_vocab"])

        def plain(params):
            return gpt2(ids, **params, n_head=LONG["n_head"])

        watched = intermediates(params, ids, LONG["n_head"])["logits"]
        close(watched, plain(params), 4 * rounding_noise(plain, params))

    def test_the_tree_that_was_given_stays_as_it_is(self, small):
        params, _, _ = small
        tapped = with_taps(params, lambda name, x: x)
        assert list(params) == ["wte", "wpe", "blocks", "ln_f"] and "tap" not in params["blocks"][0]["attn"]
        assert tapped["wte"] is params["wte"]
        assert tapped["blocks"][1]["mlp"]["c_fc"]["w"] is params["blocks"][1]["mlp"]["c_fc"]["w"]

    def test_ablating_a_head_is_zeroing_its_rows_of_c_proj(self, small):
        params, ids, n_head = small
        d = SMALL["n_embd"] // n_head

        def without_head_2(name, x):
            return x * np.array([1, 1, 0])[:, None, None] if name == "blocks.1.attn.hook_z" else x

        c_proj = params["blocks"][1]["attn"]["c_proj"]
        w = c_proj["w"].copy()
        w[2 * d : 3 * d] = 0
        attn = {**params["blocks"][1]["attn"], "c_proj": {**c_proj, "w": w}}
        edited = {**params, "blocks": [params["blocks"][0], {**params["blocks"][1], "attn": attn}]}

        ablated = gpt2(ids, **with_taps(params, without_head_2), n_head=n_head)
        close(ablated, gpt2(ids, **edited, n_head=n_head), 1e-12)
        assert np.abs(ablated - gpt2(ids, **params, n_head=n_head)).max() > 0.1

    def test_every_answer_is_used(self, small):
        params, ids, n_head = small
        untouched = intermediates(params, ids, n_head)
        for i, name in enumerate(untouched):
            seen = {}

            def tap(here, x, name=name, seen=seen):
                other = x * (1 + np.arange(x.size) % 5).reshape(x.shape)
                seen[here] = np.array(other if here == name else x)
                return seen[here]

            gpt2(ids, **with_taps(params, tap), n_head=n_head)
            for earlier in list(untouched)[:i]:
                close(seen[earlier], untouched[earlier], 0, earlier)
            assert np.abs(seen["logits"] - untouched["logits"]).max() > 1e-3, name

    def test_patching_the_residual_stream_replaces_everything_before_it(self, small):
        params, ids, n_head = small
        other = intermediates(params, ids[::-1], n_head)

        def patch(name, x):
            return other[name] if name == "blocks.0.hook_resid_post" else x

        close(gpt2(ids, **with_taps(params, patch), n_head=n_head), other["logits"], 1e-12)


class TestArguments:
    def test_later_tokens_do_not_change_earlier_logits(self, small):
        params, ids, n_head = small
        before = gpt2(ids, **params, n_head=n_head)
        for i in range(len(ids)):
            changed = [*ids[:i], (ids[i] + 1) % SMALL["n_vocab"], *ids[i + 1 :]]
            after = gpt2(changed, **params, n_head=n_head)
            close(after[:i], before[:i], 1e-12)
            assert (np.abs(after[i:] - before[i:]).max(axis=-1) > 1e-6).all()

    @pytest.mark.parametrize("rows", [slice(-1, None), slice(3, 9), -1, [0, 4, -2], slice(0, 0)], ids=str)
    def test_logits_to_keep(self, small, rows):
        params, ids, n_head = small
        kept = gpt2(ids, **params, n_head=n_head, logits_to_keep=rows)
        expected = gpt2(ids, **params, n_head=n_head)[rows]
        assert kept.shape == expected.shape
        np.testing.assert_allclose(kept, expected, rtol=0, atol=1e-12)

    def test_position_ids(self, small):
        params, ids, n_head = small
        moved = {**params, "wpe": params["wpe"][2:]}
        expected = gpt2(ids, **moved, n_head=n_head)
        close(gpt2(ids, **params, n_head=n_head, position_ids=np.arange(2, 19)), expected, 0)
        close(gpt2(ids, **params, n_head=n_head, position_ids=range(2, 19)), expected, 0)

    @pytest.mark.parametrize("inputs", [list, tuple, np.array, lambda ids: np.array(ids, np.uint16)])
    def test_inputs_of_any_kind(self, small, inputs):
        params, ids, n_head = small
        given = inputs(ids)
        close(gpt2(given, **params, n_head=n_head), gpt2(ids, **params, n_head=n_head), 0)
        assert list(given) == ids

    def test_as_many_tokens_as_positions(self, small):
        params, _, n_head = small
        n_ctx = SMALL["n_ctx"]
        assert gpt2([0] * n_ctx, **params, n_head=n_head).shape == (n_ctx, SMALL["n_vocab"])

    def test_one_token_more(self, small):
        params, _, n_head = small
        with pytest.raises(ValueError, match="20 tokens do not fit into the model's 19 positions"):
            gpt2([0] * 20, **params, n_head=n_head)

    def test_integers_as_in_the_article(self):
        close(gelu(np.array([1, -2])), gelu(np.array([1.0, -2.0])), 0)
        close(softmax(np.array([[2, 100]])), softmax(np.array([[2.0, 100.0]])), 0)
        ones, zeros = np.ones(3, int), np.zeros(3, int)
        close(
            layer_norm(np.array([[2, 2, 3]]), ones, zeros), layer_norm(np.array([[2.0, 2, 3]]), ones, zeros), 0
        )

    def test_extreme_numbers_stay_finite(self):
        x = np.array([-1e4, -30, 0, 30, 1e4], np.float32)
        np.testing.assert_array_equal(gelu(x), np.maximum(x, 0))
        np.testing.assert_array_equal(softmax(x), [0, 0, 0, 0, 1])
        constant = np.full((2, 5), 7, np.float32)
        np.testing.assert_array_equal(layer_norm(constant, np.ones(5), np.zeros(5)), np.zeros((2, 5)))
