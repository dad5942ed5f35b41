"""The recorded truth against others' programs: transformers, torch, minGPT's recorded run, TransformerLens."""

import functools

import numpy as np
import pytest
from torch_gpt2 import FAULTS, record_transformers, torch, torch_trace

from models import (
    SMALL,
    astype,
    nano_sort_params,
    nano_sort_recorded,
    random_ids,
    random_params,
    transformers_model,
)
from picogpt.checkpoint import load_encoder_hparams_and_params
from picogpt.compare import compare
from picogpt.model_dirs import EMBEDDED
from picogpt.names import names
from picogpt.noise import deviation
from picogpt.recording import record

RANDOM = {  # hyper-parameters, and how many tokens to read
    "heads of 64": ({"n_vocab": 211, "n_ctx": 64, "n_embd": 192, "n_head": 3, "n_layer": 2}, 50),
    "odd sizes": ({"n_vocab": 53, "n_ctx": 37, "n_embd": 63, "n_head": 7, "n_layer": 3}, 29),
    "twelve layers": ({"n_vocab": 97, "n_ctx": 32, "n_embd": 48, "n_head": 12, "n_layer": 12}, 31),
}
MODELS = [*RANDOM, "shakespeare"]
NANO_SORT_HOOKS = {  # names in the recorded run of the sorting model
    "tok_emb": "hook_embed",
    "x": "blocks.0.hook_resid_pre",
    "ln1": "blocks.0.ln1.hook_out",
    "q": "blocks.0.attn.hook_q",
    "k": "blocks.0.attn.hook_k",
    "v": "blocks.0.attn.hook_v",
    "att": "blocks.0.attn.hook_attn_scores",
    "attSm": "blocks.0.attn.hook_pattern",
    "yProj": "blocks.0.hook_attn_out",
    "attnResid": "blocks.0.hook_resid_mid",
    "ln2": "blocks.0.ln2.hook_out",
    "fc": "blocks.0.mlp.hook_pre",
    "gelu": "blocks.0.mlp.hook_post",
    "mlp": "blocks.0.hook_mlp_out",
    "mlpResid": "blocks.0.hook_resid_post",
    "block0": "blocks.0.hook_resid_post",
    "block1": "blocks.1.hook_resid_post",
    "block2": "blocks.2.hook_resid_post",
    "ln_f": "ln_final.hook_out",
    "lm_head": "logits",
}
NOT_SEEN_BY_SDPA = ("hook_attn_scores", "hook_pattern")


@functools.cache
def model(name):
    """params (float32), n_head and ids."""
    if name == "shakespeare":
        encoder, hparams, params = load_encoder_hparams_and_params(EMBEDDED)
        text = "But soft, what light through yonder window breaks?\nIt is the east, and Juliet is the sun."
        return params, hparams["n_head"], encoder.encode(text)
    hparams, n_seq = RANDOM[name]
    params = random_params(**hparams, dtype=np.float32)
    return params, hparams["n_head"], random_ids(n_seq, hparams["n_vocab"])


@functools.cache
def recording(name):
    params, n_head, ids = model(name)
    return record(ids, params, n_head)


def bands(recorded):
    return {name: says["band"]["float32"] for name, says in recorded.manifest["tensors"].items()}


def assert_within(run, truth, bounds):
    """Every tensor of a run has the truth's shape, is masked in the same cells, and is nowhere further off."""
    assert run
    for name, x in run.items():
        assert x.shape == truth[name].shape, name
        assert np.array_equal(np.isneginf(x), np.isneginf(truth[name])), name
        assert deviation(x, truth[name]) <= bounds[name], name


def outside(run, recorded, times=1):
    """The tensors that are further off than so many bands; of other shapes than they should be, none."""
    return [
        hook
        for hook, band in bands(recorded).items()
        if hook in run
        and run[hook].shape == recorded.tensors[hook].shape
        and deviation(run[hook], recorded.tensors[hook]) > times * band
    ]


def relative(truth, part):
    """Bounds for `assert_within`: a part of each tensor's largest magnitude."""
    return {name: part * largest(x) for name, x in truth.items()}


def largest(x):
    return np.abs(x[np.isfinite(x)]).max()


class TestTransformers:
    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("attn", ["eager", "sdpa"])
    @pytest.mark.parametrize("name", MODELS)
    def test_every_tensor_of_a_float32_run_is_within_its_band(self, name, attn, threads):
        recorded = recording(name)
        run = record_transformers(*model(name), attn, threads=threads)
        assert run["logits"].dtype == np.float32
        absent = {hook for hook in recorded.tensors if hook.endswith(NOT_SEEN_BY_SDPA)}
        assert recorded.tensors.keys() - run.keys() == (absent if attn == "sdpa" else set())
        assert_within(run, recorded.tensors, bands(recorded))
        found = compare(recorded, run)
        assert found.first is None
        assert found.n_missing == len(absent) * (attn == "sdpa")

    @pytest.mark.parametrize("attn", ["eager", "sdpa"])
    @pytest.mark.parametrize("name", MODELS)
    def test_a_float64_run_is_the_truth(self, name, attn):
        params, n_head, ids = model(name)
        truth = recording(name).tensors
        run = record_transformers(astype(params, np.float64), n_head, ids, attn)
        assert run["logits"].dtype == np.float64
        assert_within(run, truth, relative(truth, 1e-12))

    def test_another_activation_is_found_where_it_is(self):
        params, n_head, ids = model("odd sizes")
        recorded = recording("odd sizes")
        run = record_transformers(params, n_head, ids, activation="gelu")
        assert outside(run, recorded)[0] == "blocks.0.mlp.hook_post"
        assert len(outside(run, recorded)) > 30


class TestTorch:
    """The forward pass of torch functions in which tests plant faults is right as long as there are none."""

    @pytest.mark.parametrize("name", MODELS)
    def test_without_faults(self, name):
        params, n_head, ids = model(name)
        recorded = recording(name)
        n_layer = len(params["blocks"])
        run = torch_trace(params, n_head, ids)
        assert list(run) == [hook.hook for hook in names(n_layer)]
        assert_within(run, recorded.tensors, bands(recorded))
        exact = torch_trace(params, n_head, ids, dtype=torch.float64)
        assert_within(exact, recorded.tensors, relative(recorded.tensors, 1e-12))

    @pytest.mark.parametrize("fault", sorted(FAULTS))
    def test_every_fault_is_one(self, fault):
        params, n_head, ids = model("twelve layers")
        assert outside(torch_trace(params, n_head, ids, {fault: "all"}), recording("twelve layers"), times=10)

    @pytest.mark.parametrize("n_seq", [1, 2, 17])
    def test_right_runs_of_many_models_are_within(self, n_seq):
        for seed in range(20):
            params, ids = (
                random_params(**SMALL, dtype=np.float32, seed=seed),
                random_ids(n_seq, SMALL["n_vocab"], seed),
            )
            recorded = record(ids, params, SMALL["n_head"])
            assert not outside(torch_trace(params, SMALL["n_head"], ids), recorded), seed

    def test_a_fault_in_one_layer_leaves_those_before_it(self):
        params, n_head, ids = model("twelve layers")
        wrong = torch_trace(params, n_head, ids, {"erf_gelu": {5}})
        assert outside(wrong, recording("twelve layers"))[0] == "blocks.5.mlp.hook_post"


class TestRecordedActivations:
    """minGPT's nano model, which sorts six digits, as PyTorch ran it on three inputs (bbycroft/llm-viz)."""

    def test_each_is_within_its_band(self, assets):
        config, seen = nano_sort_recorded(assets)
        assert config["n_head"] == 3
        params = nano_sort_params(assets)
        for row, ids in enumerate(seen["idx"].astype(int).tolist()):
            recorded = record(ids, params, n_head=3)
            run = {hook: seen[name][row] for name, hook in NANO_SORT_HOOKS.items()}
            n_seq, n_embd = run["hook_embed"].shape
            run["hook_pos_embed"] = seen["pos_emb"][0]
            run["blocks.0.attn.hook_z"] = seen["y"][row].reshape(n_seq, 3, n_embd // 3).transpose(1, 0, 2)
            assert_within(run, recorded.tensors, bands(recorded))


class TestTransformerLens:
    """TransformerLens 4 wraps transformers' model; in compatibility mode it processes the weights as the
    HookedTransformer of earlier versions did, so that its names hold other values."""

    CENTRED = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "logits")

    @staticmethod
    def lens(params, n_head, ids, **processing):
        """What TransformerLens records, [n_seq, n_head, d] moved to [n_head, n_seq, d]."""
        sources = pytest.importorskip("transformer_lens.model_bridge.sources")
        inside = transformers_model(params, n_head)
        dtype = getattr(torch, params["wte"].dtype.name)
        bridge = sources.build_bridge_from_module(
            inside, "GPT2LMHeadModel", hf_config=inside.config, dtype=dtype
        )
        bridge.enable_compatibility_mode(disable_warnings=True, **processing)
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(torch.tensor([ids]))
        run = {"logits": logits[0].numpy()}
        for name in names(len(params["blocks"])):
            if name.hook != "logits":
                x = cache[name.hook][0].numpy()
                run[name.hook] = x.transpose(1, 0, 2) if name.shape == "n_head, n_seq, d" else x
        return run

    @pytest.mark.parametrize("name", MODELS)
    def test_without_processing_every_value_is_equal_under_its_name(self, name):
        params, n_head, ids = model(name)
        truth = recording(name).tensors
        run = self.lens(astype(params, np.float64), n_head, ids, no_processing=True)
        assert run.keys() == truth.keys()
        assert_within(run, truth, relative(truth, 1e-12))
        recorded = recording(name)
        run = self.lens(*model(name), no_processing=True)
        assert_within(run, recorded.tensors, bands(recorded))

    @pytest.mark.parametrize("name", MODELS)
    def test_with_its_default_processing_exactly_these_differ(self, name):
        params, n_head, ids = model(name)
        recorded = recording(name)
        run = self.lens(params, n_head, ids)
        expected = dict(recorded.tensors)
        for hook, x in recorded.tensors.items():
            if hook.endswith(self.CENTRED):  # center_writing_weights, center_unembed
                expected[hook] = x - x.mean(axis=-1, keepdims=True)
            elif hook.endswith("hook_out"):  # fold_ln: gain and bias are in the weights that come next
                expected[hook] = recorded.tensors[hook.replace("hook_out", "hook_normalized")]
            elif hook.endswith(("hook_v", "hook_z")):  # fold_ln, then fold_value_biases
                expected[hook] = x - self.value_bias(params["blocks"][int(hook.split(".")[1])], n_head)
        # The weights it has processed are float32 again: that is one rounding more.
        bounds = {
            hook: max(band, np.spacing(np.float32(largest(expected[hook]))))
            for hook, band in bands(recorded).items()
        }
        assert_within(run, expected, bounds)
        for hook, x in recorded.tensors.items():  # and those that differ do so by more than noise
            same = np.array_equal(expected[hook], x)
            assert same or deviation(run[hook], x) > 10 * bounds[hook], hook

    @staticmethod
    def value_bias(block, n_head):  # -> [n_head, 1, d]
        """What every value has of c_attn's bias, and through c_attn of ln_1's: c_proj's bias has it now."""
        c_attn = astype(block["attn"]["c_attn"], np.float64)
        n_embd = len(c_attn["w"])
        bias = c_attn["b"] + block["ln_1"]["b"] @ c_attn["w"]
        return bias[2 * n_embd :].reshape(n_head, 1, -1)
