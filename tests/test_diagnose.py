"""Mistakes planted in somebody else's GPT-2 are named; right programs are left in peace.

`python tests/test_diagnose.py` plants every fault in both models, everywhere and in one layer, and prints what
was not named; `--pairs N` plants N pairs instead (all of them without N), `--few` records little.
"""

import argparse
import itertools
import random
import sys
import time

import numpy as np
import pytest

from models import LONG, SMALL, jax_params, random_ids, random_params
from picogpt.cache import KVCache, with_attend
from picogpt.checkpoint import load_encoder_hparams_and_params
from picogpt.diagnose import diagnose
from picogpt.mistakes import CATALOGUE
from picogpt.model_dirs import EMBEDDED
from picogpt.noise import float32_runs, isolated
from picogpt.trace import run_with_trace

torch = pytest.importorskip("torch")
torch_gpt2 = pytest.importorskip("torch_gpt2")

# A program makes one of each: they are faults of the same operation, or one hides the other.
RIVALS = (
    ("erf_gelu", "quick_gelu", "relu", "silu"),
    ("eps_missing", "eps_1e-6", "eps_1e-12", "eps_outside_root", "variance_n-1", "rms_norm"),
    ("no_scale", "double_scale", "scale_n_embd"),
    ("no_mask", "mask_sees_next", "mask_hides_self", "mask_after_softmax", "cache_one_step_late"),
    ("heads_merged_wrong", "heads_merged_by_column"),
    (
        "positions_from_1",
        "positions_0_with_cache",
        "positions_one_behind",
        "positions_one_ahead",
        "no_position_embedding",
        "no_token_embedding",
    ),
    ("swapped_layer_norms", "ln_1_for_ln_2"),
    ("head_0_keys", "head_0_keys_and_values"),
    ("residual_from_normalized", "post_norm", "no_residual_attn", "no_residual_mlp", "no_ln_1", "no_ln_2"),
    ("no_token_embedding", "scaled_embedding"),
    ("qkv_interleaved", *(f"order_{order}" for order in torch_gpt2.ORDERS)),
    ("bfloat16_weights", "float16_weights", "bfloat16_activations", "float16_activations", "tf32_products"),
    *(("post_norm", other) for other in ("no_ln_1", "no_ln_2", "parallel_block")),
)
# Noise of the head's own making fits nothing; the order of the alphabet is that of numbers up to ten layers.
UNNAMED = ("random_lm_head", "layers_in_text_order")
FAULTS = [fault for fault in torch_gpt2.FAULTS if fault not in UNNAMED]
UNITS = {"bfloat16_activations": 2.0**-8, "float16_activations": 2.0**-11}  # of numbers near 1
NOT_IN_LAYERS = ("positions", "no_token", "no_position", "scaled", "no_final", "random", "last")
TEXTS = ("Now is the winter of our discontent made", "What, ho! Apothecary! Come hither, man.")


def load(model, seed=0):
    """Float32 parameters, the number of heads and ids: of random weights, or of the embedded model."""
    if model == "random":
        return random_params(**SMALL, dtype=np.float32, seed=seed), SMALL["n_head"], random_ids(17, 23, seed)
    encoder, hparams, params = load_encoder_hparams_and_params(EMBEDDED)
    return params, hparams["n_head"], encoder.encode(TEXTS[seed % 2])


@pytest.fixture(scope="module", params=["random", "shakespeare"])
def model(request):
    return load(request.param)


def few(trace):
    """What a sparing port records."""
    return {name: x for name, x in trace.items() if name.endswith("resid_post") or name == "logits"}


def everything(trace):
    return trace


class Planted:
    """Faults in a run of torch's, and what is said of them."""

    def __init__(self, model, faults, record=everything, seconds=20.0):
        self.model, self.faults, self.record = model, faults, record
        self.theirs = record(self.trace(faults))
        self.visible = {fault for fault in faults if self.shows(fault)}
        params, n_head, ids = model
        self.findings = diagnose(self.theirs, ids, params, n_head, seconds=seconds)
        first = [{mistake.name for mistake in finding.mistakes} for finding in self.findings]
        also = [{m.name for other in finding.also for m in other} for finding in self.findings]
        said = [a | b for a, b in zip(first, also, strict=True)]
        self.named = {fault for fault in self.visible if any(self.name(fault) in names for names in said)}
        self.named_first = {
            fault for fault in self.visible if any(self.name(fault) in names for names in first)
        }
        planted = {self.name(fault) for fault in faults}
        self.wrong = [names for names in said if names and not names & planted]
        self.unexplained = [f.tensor for f in self.findings if not f.mistakes]
        self.right = self.named == self.visible and not self.wrong and not self.unexplained

    def trace(self, faults):
        params, n_head, ids = self.model
        return torch_gpt2.torch_trace(params, n_head, ids, faults)

    def name(self, fault):
        """What the catalogue calls it."""
        params, n_head, _ = self.model
        n = torch_gpt2.other_divisor(params["wte"].shape[1], n_head)
        return f"wrong_n_head_{n}" if fault == "wrong_n_head" else fault

    def shows(self, fault):
        """Whether its effect exceeds the band tenfold in the tensor where it shows first."""
        params, n_head, ids = self.model
        others = {other: where for other, where in self.faults.items() if other != fault}
        without, right = self.record(self.trace(others)), self.trace({})
        for name, x in self.theirs.items():
            y = without.get(name)
            if y is None or x.shape != y.shape or (np.isfinite(x) != np.isfinite(y)).any():
                return True
            if not np.array_equal(x, y):
                fitting = {n: z for n, z in without.items() if z.shape == right[n].shape}
                band = isolated(fitting, ids, params, n_head)[1][name]
                seen = np.isfinite(x)
                for rounding in others.keys() & UNITS.keys():  # half a unit in the last place is lost
                    band = max(band, UNITS[rounding] / 2 * np.abs(y[seen]).max())
                return bool(np.abs(x[seen] - y[seen]).max() > 10 * band)
        return False

    def __str__(self):
        said = [f"  {[m.name for m in f.mistakes]}, {len(f.also)} more: {f.say()}" for f in self.findings]
        return "\n".join([f"{self.faults}, of which shows {self.visible}", *said])


def places(fault, n_layer):
    """A fault everywhere, and in the last layer that can have it."""
    yield {fault: "all"}
    if not fault.startswith(NOT_IN_LAYERS):
        yield {fault: {n_layer if fault == "no_bias_ln_f" else n_layer - 1}}


def singles(n_layer):
    return [case for fault in FAULTS for case in places(fault, n_layer)]


def pairs(n_layer):
    def apart(a, b):
        return a != b and not any(a in rivals and b in rivals for rivals in RIVALS)

    return [a | b for a, b in itertools.combinations(singles(n_layer), 2) if apart(*a, *b)]


class TestPlanted:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_each_is_named(self, fault):
        planted = Planted(load("random"), {fault: "all"})
        assert planted.visible, fault
        assert planted.right, planted

    @pytest.mark.parametrize("record", [everything, few])
    def test_another_model_another_text_one_layer(self, record):
        """Every ninth fault, everywhere or in one layer, in the embedded model."""
        found = [Planted(load("shakespeare", 1), case, record) for case in singles(3)[::9]]
        assert sum(len(planted.visible) for planted in found) >= 10
        assert [str(planted) for planted in found if not planted.right] == []

    @pytest.mark.parametrize("record", [everything, few])
    def test_pairs(self, record):
        n_pairs = 24 if record is everything else 6
        cases = random.Random(0).sample(pairs(SMALL["n_layer"]), n_pairs)
        found = [Planted(load("random", 1), case, record) for case in cases]
        n_visible = sum(len(planted.visible) for planted in found)
        assert n_visible > 1.5 * n_pairs
        assert sum(len(planted.named) for planted in found) >= 0.95 * n_visible, [
            str(p) for p in found if not p.right
        ]
        assert [planted.wrong for planted in found if planted.wrong] == []

    @pytest.mark.parametrize(
        "faults",
        [
            {"scale_n_embd": "all", "cache_one_step_late": {1}},
            {"post_norm": "all", "no_bias_ln_1": {1}},
            {"post_norm": "all", "order_vkq": "all"},
            {"eps_outside_root": "all", "parallel_block": "all"},
            {"silu": {1}, "bfloat16_activations": {1}},
        ],
        ids=str,
    )
    def test_pairs_at_one_place(self, faults):
        planted = Planted(load("random"), faults)
        assert planted.right, planted

    def test_a_pair_that_looks_like_lost_precision(self):
        planted = Planted(load("random"), {"eps_missing": "all", "order_qvk": "all"}, few)
        assert not any("tf32_products" in str(finding) for finding in planted.findings), planted
        assert planted.named == planted.visible

    def test_a_mistake_that_would_show_elsewhere_too(self):
        """Embeddings in bfloat16 alone: neither weights nor activations are, for the rest is right."""
        params, n_head, ids = load("random")
        theirs = torch_gpt2.torch_trace(params, n_head, ids)
        theirs["hook_embed"] = torch.tensor(theirs["hook_embed"]).bfloat16().float().numpy()
        theirs["blocks.0.hook_resid_pre"] = theirs["hook_embed"] + theirs["hook_pos_embed"]
        some = {name: theirs[name] for name in ("hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre")}
        (finding,) = diagnose(some, ids, params, n_head)
        assert (finding.tensor, finding.mistakes) == ("hook_embed", ())

    def test_layers_where_it_cannot_be_told(self):
        """In the embedded model the stream soon grows so large that eps no longer matters."""
        planted = Planted(load("shakespeare"), {"eps_1e-12": "all"})
        (finding,) = planted.findings
        assert planted.right and finding.every and len(finding.layers) < 3

    def test_a_scale_that_is_only_shown(self):
        """Who divides by the right number and records another has one tensor wrong, not two."""
        params, n_head, ids = load("random")
        theirs = torch_gpt2.torch_trace(params, n_head, ids)
        theirs["blocks.0.ln1.hook_scale"] = theirs["blocks.0.ln1.hook_scale"] * 2
        assert [f.tensor for f in diagnose(theirs, ids, params, n_head, seconds=0)] == [
            "blocks.0.ln1.hook_scale"
        ]

    def test_a_finite_mask_where_it_should_not_be(self):
        params, n_head, ids = load("random")
        theirs = torch_gpt2.torch_trace(params, n_head, ids, {"mask_hides_self": "all"})
        theirs |= {n: np.where(np.isinf(x), -1e4, x) for n, x in theirs.items() if n.endswith("scores")}
        (finding,) = diagnose(theirs, ids, params, n_head)
        assert finding.mistakes[0].name == "mask_hides_self"

    def test_layers_are_told(self):
        everywhere, one = (Planted(load("random"), {"erf_gelu": where}).findings for where in ("all", {1}))
        assert [(f.tensor, f.layers, f.every) for f in everywhere] == [("blocks.*.mlp.hook_post", (0, 1), True)]
        assert [(f.tensor, f.layers, f.every) for f in one] == [("blocks.1.mlp.hook_post", (1,), False)]
        assert everywhere[0].say() == (
            "your blocks.*.mlp.hook_post is erf GELU, in every layer "
            "(GPT-2: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); yours: 0.5 x (1 + erf(x / sqrt(2))))"
        )
        assert "blocks.1.mlp.hook_post is erf GELU, in layer 1 only (" in one[0].say()

    def test_logits_alone(self):
        planted = Planted(
            load("random"), {"erf_gelu": "all"}, lambda trace: {"logits": trace["logits"]}, seconds=0
        )
        assert [f.say()[:44] for f in planted.findings] == ["your blocks.*.mlp.hook_post is erf GELU, in "]
        assert planted.right

    def test_one_layer_from_logits_alone(self):
        planted = Planted(load("random"), {"no_scale": {1}}, lambda trace: {"logits": trace["logits"]})
        assert [f.layers for f in planted.findings] == [(1,)]
        assert planted.right

    def test_two_that_cannot_be_told_apart(self):
        """A mask that hides the token itself, and a cache that is late from the first token on."""
        (finding,) = Planted(load("random"), {"mask_hides_self": "all"}).findings
        assert finding.mistakes[0].name == "mask_hides_self"
        assert [[m.name for m in other] for other in finding.also] == [["cache_one_step_late"]]
        assert (
            ". Also possible: your blocks.*.attn.hook_attn_scores lacks each new token's own" in finding.say()
        )

    def test_layers_in_the_order_of_the_alphabet(self):
        model = random_params(**{**SMALL, "n_layer": 11}, dtype=np.float32), 3, random_ids(9, 23)
        planted = Planted(model, {"layers_in_text_order": "all"}, few)
        assert planted.right, planted
        assert [finding.layers for finding in planted.findings] == [tuple(range(2, 11))]

    def test_what_no_mistake_explains(self):
        """Neither a wrong name nor silence."""
        params, n_head, ids = load("random")
        theirs = torch_gpt2.torch_trace(params, n_head, ids)
        theirs = {**theirs, "blocks.0.mlp.hook_post": np.tanh(theirs["blocks.0.mlp.hook_pre"])}
        some = few(theirs) | {"blocks.0.mlp.hook_post": theirs["blocks.0.mlp.hook_post"]}
        finding = diagnose(some, ids, params, n_head, seconds=1)[0]
        assert finding.mistakes == ()
        assert finding.say() == (
            "no known mistake fits your blocks.0.mlp.hook_post, in layer 0 only: "
            "look at what happens after the ids"
        )
        head = Planted(load("random"), {"random_lm_head": "all"})
        assert head.unexplained == ["logits"] and len(head.findings) == 1

    def test_what_follows_from_it_is_not_reported(self):
        """A layer norm that divides by the mean deviation: what comes after is right for that scale."""
        params, n_head, ids = load("random")
        findings = diagnose(MeanDeviation(params, n_head, {}, torch.float32, 5)(ids), ids, params, n_head)
        assert [(f.tensor, f.mistakes) for f in findings] == [
            ("blocks.*.ln1.hook_scale", ()),
            ("blocks.*.ln2.hook_scale", ()),
            ("ln_final.hook_scale", ()),
        ]

    @pytest.mark.parametrize("masked", ["mask_hides_self", "mask_upside_down"])
    def test_nan_fits_nothing(self, masked, monkeypatch):
        """A column without a key has no softmax: what two mistakes make together can be NaN everywhere."""
        params, n_head, ids = load("random")
        entries = {name: CATALOGUE[name] for name in (masked, "softmax_over_queries", "no_bias_ln_f")}
        monkeypatch.setattr("picogpt.diagnose.CATALOGUE", entries)
        right = torch_gpt2.torch_trace(params, n_head, ids)
        for name in ("logits", "blocks.0.attn.hook_z", "blocks.1.hook_resid_mid"):
            findings = diagnose(right | {name: np.roll(right[name], 1, axis=-2)}, ids, params, n_head)
            findings += diagnose({name: np.roll(right[name], 1, axis=-2)}, ids, params, n_head)
            assert len(findings) > 1 and not any(finding.mistakes for finding in findings)

    @pytest.mark.parametrize(
        "changed",
        [
            lambda x: np.roll(x, 1, axis=0),
            lambda x: np.round(x, 4),
            lambda x: x - torch.logsumexp(torch.tensor(x), -1, keepdim=True).numpy(),
        ],
        ids=["rows shifted", "four decimals", "log-probabilities"],
    )
    def test_logits_that_fit_nothing(self, changed):
        params, n_head, ids = load("random")
        theirs = {"logits": changed(torch_gpt2.torch_trace(params, n_head, ids)["logits"])}
        (finding,) = diagnose(theirs, ids, params, n_head, seconds=0.5)
        assert (finding.tensor, finding.mistakes) == ("logits", ())

    def test_nan_is_not_right(self):
        params, n_head, ids = load("random")
        theirs = torch_gpt2.torch_trace(params, n_head, ids)
        theirs["blocks.1.mlp.hook_post"][3, 4] = np.nan
        assert "blocks.1.mlp.hook_post" in {f.tensor for f in diagnose(theirs, ids, params, n_head, seconds=1)}


class MeanDeviation(torch_gpt2.TorchGPT2):
    """A GPT-2 with layer norms that nobody has."""

    def layer_norm(self, x, branch, at, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = self.note(f"{at}.hook_scale", centred.abs().mean(-1, keepdim=True))
        normalized = self.note(f"{at}.hook_normalized", centred / scale)
        return self.note(f"{at}.hook_out", normalized * self.weight(branch["g"]) + self.weight(branch["b"]))


def said(findings):
    return [finding.say().partition(" (GPT-2")[0] for finding in findings]


class TestNoEntries:
    """Numbers that are fitted, and weights that are found elsewhere."""

    def with_cubic_term(self, c):
        return lambda x: 0.5 * x * (1 + torch.tanh(np.sqrt(2 / np.pi) * (x + c * x**3)))

    @pytest.mark.parametrize("eps", [1e-4, 3e-6, 0.02])
    @pytest.mark.parametrize("record", [everything, few, lambda trace: {"logits": trace["logits"]}])
    def test_eps(self, record, eps, monkeypatch):
        params, n_head, ids = load("random")
        monkeypatch.setitem(torch_gpt2.EPS, "eps_1e-6", eps)
        theirs = torch_gpt2.torch_trace(params, n_head, ids, {"eps_1e-6": "all"})
        assert said(diagnose(record(theirs), ids, params, n_head)) == [
            f"your blocks.*.ln1.hook_scale has eps {eps:g}, in every layer, and in ln2 and ln_final"
        ]

    @pytest.mark.parametrize("record", [everything, few])
    def test_the_cubic_term(self, model, record, monkeypatch):
        params, n_head, ids = model
        monkeypatch.setitem(torch_gpt2.ACTIVATIONS, "relu", self.with_cubic_term(0.044175))
        theirs = torch_gpt2.torch_trace(params, n_head, ids, {"relu": "all"})
        assert said(diagnose(record(theirs), ids, params, n_head)) == [
            "your blocks.*.mlp.hook_post is GELU with 0.044175 for 0.044715, in every layer"
        ]

    def test_the_root_in_gelu(self, model, monkeypatch):
        params, n_head, ids = model
        monkeypatch.setitem(
            torch_gpt2.ACTIVATIONS, "relu", lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3)))
        )
        theirs = torch_gpt2.torch_trace(params, n_head, ids, {"relu": {1}})
        assert said(diagnose(theirs, ids, params, n_head)) == [
            "your blocks.1.mlp.hook_post is GELU with 0.8 for sqrt(2/pi), in layer 1 only"
        ]

    def test_the_scale_of_the_scores(self, model):
        """q times 0.3 sqrt(d), and not recorded: scores are 0.3 q k^T."""
        params, n_head, ids = model
        n_embd, blocks = len(params["wte"][0]), []
        for block in params["blocks"]:
            times = np.where(np.arange(3 * n_embd) < n_embd, np.float32(0.3 * (n_embd // n_head) ** 0.5), 1)
            c_attn = {key: leaf * times.astype(np.float32) for key, leaf in block["attn"]["c_attn"].items()}
            blocks.append({**block, "attn": {**block["attn"], "c_attn": c_attn}})
        theirs = torch_gpt2.torch_trace({**params, "blocks": blocks}, n_head, ids)
        theirs = {name: x for name, x in theirs.items() if not name.endswith("hook_q")}
        assert said(diagnose(theirs, ids, params, n_head)) == [
            "your blocks.*.attn.hook_attn_scores is scaled by 0.3, in every layer"
        ]

    @pytest.mark.parametrize("record", [everything, few])
    def test_weights_of_another_place(self, record):
        params, n_head, ids = load("shakespeare")
        first, second, third = params["blocks"]
        wrong_fc = {**third, "mlp": {**third["mlp"], "c_fc": first["mlp"]["c_fc"]}}
        for other, expected in (
            (
                {"blocks": [first, second, wrong_fc]},
                ["your blocks.2.mlp.hook_pre has the weights of h.0.mlp.c_fc, in layer 2 only"],
            ),
            (
                {"blocks": [first, third, second]},
                [
                    "your blocks.1.ln1.hook_out has the weights of h.2, in layer 1 only",
                    "your blocks.2.ln1.hook_out has the weights of h.1, in layer 2 only",
                ],
            ),
            ({"ln_f": third["ln_2"]}, ["your ln_final.hook_out has the weights of h.2.ln_2"]),
        ):
            theirs = torch_gpt2.torch_trace({**params, **other}, n_head, ids)
            assert said(diagnose(record(theirs), ids, params, n_head)) == expected


class TestWords:
    @pytest.mark.parametrize(
        ("fault", "record", "words"),
        [
            ("float16_activations", everything, "hook_embed is rounded to float16, as everywhere else"),
            ("float16_activations", few, "blocks.*.hook_resid_post is rounded to float16, in every layer"),
            ("no_gain", few, "blocks.*.ln1.hook_out lacks its gain, in every layer, and in ln2 and ln_final"),
            (
                "order_qvk",
                everything,
                "blocks.*.attn.hook_k comes from c_attn's columns in the order q, v, k, in every layer",
            ),
        ],
    )
    def test_where(self, fault, record, words):
        (finding,) = Planted(load("random"), {fault: "all"}, record).findings
        assert said([finding]) == [f"your {words}"]
        assert (". If that is meant: compare --dtype float16" in finding.say()) == ("float16" in fault)

    def test_one_layer_of_several_recorded_as_one(self):
        (finding,) = Planted(
            load("random"), {"ln_1_for_ln_2": {1}}, lambda trace: {"logits": trace["logits"]}
        ).findings
        assert said([finding]) == ["your blocks.1.ln2.hook_out has gain and bias of ln_1, in layer 1 only"]


class TestRight:
    def right(self, theirs, model):
        params, n_head, ids = model
        return [finding.say() for finding in diagnose(theirs, ids, params, n_head)] == []

    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("name", ["random", "shakespeare"])
    def test_float32_runs(self, name, seed):
        """Threads, a cache, a batch, sums from the other end and one after another: 20 runs and more."""
        model = params, n_head, ids = load(name, seed)
        if name == "random":
            model = params, n_head, ids = (
                random_params(**LONG, dtype=np.float32, seed=seed),
                2,
                random_ids(40, 31, seed),
            )
        runs = list(float32_runs(ids, params, n_head))
        assert len(runs) >= 5
        assert all(self.right(run, model) for run in runs)

    @pytest.mark.parametrize("attn", ["eager", "sdpa"])
    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("record", [everything, few])
    def test_transformers(self, model, attn, threads, record):
        params, n_head, ids = model
        pytest.importorskip("transformers")
        theirs = torch_gpt2.record_transformers(params, n_head, ids, attn, threads=threads)
        assert self.right(record(theirs), model)

    @pytest.mark.parametrize("record", [everything, few, lambda trace: {"logits": trace["logits"]}])
    def test_torch_and_float64(self, model, record):
        params, n_head, ids = model
        assert self.right(record(torch_gpt2.torch_trace(params, n_head, ids)), model)
        assert self.right(record(torch_gpt2.torch_trace(params, n_head, ids, dtype=torch.float64)), model)

    def test_jax_and_a_cache_in_pieces(self, model):
        params, n_head, ids = model
        _, theirs = run_with_trace(ids, jax_params(params), n_head)
        assert self.right({name: np.asarray(x) for name, x in theirs.items()}, model)
        caches = with_attend(params, [KVCache() for _ in params["blocks"]])
        parts = [
            run_with_trace(ids[i : i + 5], caches, n_head, position_ids=np.arange(i, min(i + 5, len(ids))))[1]
            for i in range(0, len(ids), 5)
        ]
        rows = [name for name in parts[0] if not name.endswith(("scores", "pattern"))]
        assert self.right(
            {name: np.concatenate([part[name] for part in parts], axis=-2) for name in rows}, model
        )

    @pytest.mark.parametrize("masked", [-1e4, -1e10, float(np.finfo(np.float32).min), -np.inf, 0.0])
    def test_masked_scores_are_their_own_affair(self, model, masked):
        params, n_head, ids = model
        theirs = torch_gpt2.torch_trace(params, n_head, ids)
        theirs |= {n: np.where(np.isinf(x), masked, x) for n, x in theirs.items() if n.endswith("scores")}
        assert self.right(theirs, model)


def folded(trace, params, n_head):
    """Values without their bias, as TransformerLens's default processing leaves them."""
    trace = dict(trace)
    for i, block in enumerate(params["blocks"]):
        bias = np.split(block["attn"]["c_attn"]["b"], 3)[2].reshape(n_head, 1, -1)
        for name in (f"blocks.{i}.attn.hook_v", f"blocks.{i}.attn.hook_z"):
            trace[name] = trace[name] - bias
    return trace


def centred(trace):
    """What is written into the residual stream without its row means, and centred logits."""
    ends = ("embed", "_out", "resid_pre", "resid_mid", "resid_post", "logits")

    def centre(name, x):
        return x - x.mean(axis=-1, keepdims=True) if name.endswith(ends) and "ln" not in name else x

    return {name: centre(name, x) for name, x in trace.items()}


class TestConventions:
    def test_folded_and_centred(self, model):
        params, n_head, ids = model
        theirs = torch_gpt2.torch_trace(params, n_head, ids)
        for other in (folded(theirs, params, n_head), centred(theirs), centred(folded(theirs, params, n_head))):
            assert [f.say() for f in diagnose(other, ids, params, n_head)] == []

    def test_a_mistake_beside_them(self, model):
        params, n_head, ids = model
        theirs = torch_gpt2.torch_trace(params, n_head, ids, {"erf_gelu": "all"})
        findings = diagnose(centred(folded(theirs, params, n_head)), ids, params, n_head)
        assert [m.name for f in findings for m in f.mistakes] == ["erf_gelu"]

    def test_a_forgotten_bias_of_v_is_one(self, model):
        params, n_head, ids = model
        blocks = []
        for block in params["blocks"]:
            bias = block["attn"]["c_attn"]["b"] * (
                np.arange(3 * len(params["wte"][0])) < 2 * len(params["wte"][0])
            )
            attn = {**block["attn"], "c_attn": {**block["attn"]["c_attn"], "b": bias}}
            blocks.append({**block, "attn": attn})
        theirs = torch_gpt2.torch_trace({**params, "blocks": blocks}, n_head, ids)
        assert [m.name for f in diagnose(theirs, ids, params, n_head) for m in f.mistakes] == ["no_bias_v"]


class TestOthersWithErfGelu:
    def test_transformers_when_asked_for_it(self, model):
        params, n_head, ids = model
        pytest.importorskip("transformers")
        for record in (everything, few):
            theirs = torch_gpt2.record_transformers(params, n_head, ids, activation="gelu")
            (finding,) = diagnose(record(theirs), ids, params, n_head)
            assert finding.say().startswith("your blocks.*.mlp.hook_post is erf GELU, in every layer (")

    def test_a_model_in_the_style_of_nanogpt(self):
        model = params, n_head, ids = load("random", 2)
        (finding,) = diagnose(NanoStyle(*model)(), ids, params, n_head)
        assert [mistake.name for mistake in finding.mistakes] == ["erf_gelu"]
        assert (finding.every, finding.also) == (True, ())


class NanoStyle:
    """nanoGPT's blocks from nn modules, with its GELU; what blocks return is recorded."""

    def __init__(self, params, n_head, ids):
        self.params, self.n_head, self.ids = params, n_head, ids

    def linear(self, leaves):
        layer = torch.nn.Linear(*leaves["w"].shape)
        layer.weight.data, layer.bias.data = (torch.tensor(np.array(leaves[x]).T) for x in "wb")
        return layer

    def norm(self, leaves):
        layer = torch.nn.LayerNorm(len(leaves["g"]))
        layer.weight.data, layer.bias.data = (torch.tensor(np.array(leaves[x])) for x in "gb")
        return layer

    def attention(self, x, attn):
        heads = [
            y.view(len(x), self.n_head, -1).transpose(0, 1) for y in self.linear(attn["c_attn"])(x).chunk(3, -1)
        ]
        y = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.linear(attn["c_proj"])(y.transpose(0, 1).reshape(x.shape))

    @torch.no_grad()
    def __call__(self):
        wte, wpe = (torch.tensor(np.array(self.params[name])) for name in ("wte", "wpe"))
        x, seen = wte[self.ids] + wpe[: len(self.ids)], {}
        for i, block in enumerate(self.params["blocks"]):
            x = x + self.attention(self.norm(block["ln_1"])(x), block["attn"])
            mlp = (self.norm(block["ln_2"]), self.linear(block["mlp"]["c_fc"]), torch.nn.GELU())
            x = x + torch.nn.Sequential(*mlp, self.linear(block["mlp"]["c_proj"]))(x)
            seen[f"blocks.{i}.hook_resid_post"] = x.numpy()
        return seen | {"logits": (self.norm(self.params["ln_f"])(x) @ wte.T).numpy()}


class TestCatalogue:
    def test_every_entry_says_what_it_should(self):
        from picogpt.names import names

        known = {name.hook.removeprefix("blocks.0.") for name in names(1)}
        for entry in CATALOGUE.values():
            assert entry.says and entry.right and entry.wrong and entry.right != entry.wrong, entry.name
            assert {*entry.sites, *entry.value, *entry.read} <= known, entry.name
            assert entry.value or entry.read or entry.tree, entry.name

    def test_it_has_what_the_planted_faults_are_called(self):
        assert {fault for fault in FAULTS if fault != "wrong_n_head"} <= CATALOGUE.keys()


def main():
    parser = argparse.ArgumentParser(description="Plant faults; print what was not named, and the counts.")
    parser.add_argument(
        "--pairs", type=int, nargs="?", const=10**9, default=0, help="how many pairs (default: all)"
    )
    parser.add_argument(
        "--few", action="store_true", help="record the residual stream after each block, and logits"
    )
    parser.add_argument(
        "--model", choices=("random", "shakespeare"), nargs="*", default=("random", "shakespeare")
    )
    args = parser.parse_args()
    counted = ("cases", "faults", "named", "first", "wrong", "unexplained")
    started, totals = time.time(), dict.fromkeys(counted, 0)
    for kind in args.model:
        model = load(kind)
        n_layer = len(model[0]["blocks"])
        cases = singles(n_layer)
        if args.pairs:
            cases = pairs(n_layer)
            cases = random.Random(1).sample(cases, min(args.pairs, len(cases)))
        for case in cases:
            found = Planted(model, case, few if args.few else everything)
            parts = [case], found.visible, found.named, found.named_first, found.wrong, found.unexplained
            totals = {key: n + len(part) for (key, n), part in zip(totals.items(), parts, strict=True)}
            if not found.right:
                print(kind, found, flush=True)
    print(totals, f"in {time.time() - started:.0f} s")
    return totals["named"] < 0.95 * totals["faults"] or totals["wrong"] > 0


if __name__ == "__main__":
    sys.exit(main())
