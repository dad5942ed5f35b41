"""The bands: that the runs are what they claim to be, and that a band tells noise from a mistake."""

import numpy as np
import pytest

from models import LONG, SMALL, astype, random_ids, random_params
from picogpt import noise
from picogpt.model import layer_norm, softmax
from picogpt.names import names, tapped
from picogpt.noise import Serial, deviation, headroom, isolated, noise_bands, projection, rounded, total
from picogpt.trace import run_with_trace, tree_map, with_outs

PARAMS = astype(random_params(**SMALL), np.float32)
IDS = random_ids(9, SMALL["n_vocab"])
LONG_PARAMS = astype(random_params(**LONG), np.float32)
LONG_IDS = random_ids(60, LONG["n_vocab"])


def truth(ids, params, n_head):
    exact = astype(params, np.float64)
    return with_outs(run_with_trace(ids, exact, n_head)[1], exact)


class TestSerial:
    """Against loops that a C programmer would write, over NumPy's float32 scalars."""

    @pytest.mark.parametrize("shape", [(3, 50, 4), (1, 50, 4), (3, 50, 1), (1, 50, 1), (2, 1, 3)])
    def test_matmul(self, shape):
        m, k, n = shape
        rng = np.random.default_rng(0)
        x, w = rng.standard_normal((m, k), dtype="f"), rng.standard_normal((k, n), dtype="f")
        expected = np.zeros((m, n), dtype="f")
        for i in range(k):
            expected += x[:, i : i + 1] * w[i]
        for product in x.view(Serial) @ w.view(Serial), x @ w.view(Serial), x.view(Serial) @ w.T.copy().T:
            assert isinstance(product, Serial)
            assert np.array_equal(product, expected)

    def test_sums(self):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((4, 300), dtype="f")
        expected = np.zeros(4, dtype="f")
        squares = np.zeros(4, dtype="f")
        for i in range(300):
            expected += x[:, i]
            squares += x[:, i] * x[:, i]
        assert not np.array_equal(x.sum(axis=-1), expected)  # NumPy sums in pairs
        assert np.array_equal(x.view(Serial).sum(axis=-1), expected)
        assert np.array_equal(x.view(Serial).sum(axis=-1, keepdims=True), expected[:, None])
        assert np.array_equal(np.vecdot(x.view(Serial), x.view(Serial)), squares)

    def test_stays_through_the_network(self):
        x = np.ones((2, 5), dtype="f").view(Serial)
        assert isinstance(softmax(x), Serial)
        assert isinstance(layer_norm(x, np.ones(5, "f"), np.ones(5, "f")), Serial)
        assert softmax(x).dtype == np.float32


class TestRuns:
    @pytest.mark.parametrize(("params", "ids", "n_head"), [(PARAMS, IDS, 3), (LONG_PARAMS, LONG_IDS, 2)])
    def test_each_is_the_same_network_in_another_order(self, params, ids, n_head):
        expected = truth(ids, params, n_head)
        runs = list(noise.float32_runs(ids, params, n_head))
        different = {run["logits"].tobytes() for run in runs}
        assert len(runs) >= 5
        assert len(different) >= 4
        for run in runs:
            assert list(run) == list(expected)
            for name, value in run.items():
                assert value.dtype == np.float32
                assert np.array_equal(np.isfinite(value), np.isfinite(expected[name])), name
                scale = np.abs(expected[name][np.isfinite(expected[name])]).max()
                assert deviation(value, expected[name]) < 1e-5 * scale, name

    def test_a_half_run_is_rounded_everywhere(self):
        for dtype in noise.HALVES:
            run = noise.half_run(IDS, PARAMS, 3, dtype)
            assert list(run) == [name.hook for name in names(2)]
            for name in run:
                assert np.array_equal(rounded(run[name], dtype), run[name]), name


class TestRounded:
    def test_as_other_programs_round(self):
        torch = pytest.importorskip("torch")
        rng = np.random.default_rng(0)
        x = (rng.standard_normal(100_000) * 10.0 ** rng.integers(-6, 6, 100_000)).astype("f")
        x[:3] = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)]  # halfway: to the even neighbour
        for dtype in noise.HALVES:
            expected = torch.from_numpy(x).to(getattr(torch, dtype)).float().numpy()
            assert np.array_equal(rounded(x, dtype), expected)
            assert rounded(x.astype("d"), dtype).dtype == np.float64


class TestBands:
    def test_hold_other_right_runs_and_no_mistake(self):
        """A serial loop from the other end is not among the runs, but inside; an eps of 1e-6 is not."""
        for ids, params, n_head in (IDS, PARAMS, 3), (LONG_IDS, LONG_PARAMS, 2):
            expected = truth(ids, params, n_head)
            bands = noise_bands(ids, params, n_head, expected)
            assert {len(band) for band in bands.values()} == {len(list(names(2)))}
            other = noise._from_the_other_end(ids, tree_map(lambda w: w.view(Serial), params), n_head)
            for name, value in other.items():
                assert deviation(value, expected[name]) <= bands["float32"][name], name
            wrong = layer_norm(expected["blocks.0.hook_resid_pre"], 1.0, 0.0, eps=1e-6)
            name = "blocks.0.ln1.hook_normalized"
            assert deviation(wrong, expected[name]) > 10 * bands["float32"][name]

    def test_widen_with_precision(self):
        bands = noise_bands(IDS, PARAMS, 3, truth(IDS, PARAMS, 3))
        for name in tapped(2):
            assert bands["float32"][name] < bands["float16"][name] < bands["bfloat16"][name], name

    def test_nothing_is_allowed_where_nothing_is_computed(self):
        bands = noise_bands(IDS, PARAMS, 3, truth(IDS, PARAMS, 3))
        assert bands["float32"]["hook_embed"] == bands["float32"]["hook_pos_embed"] == 0.0
        assert bands["isolated"]["blocks.1.hook_resid_pre"] == 0.0

    def test_headroom_is_that_of_a_normal_distribution(self):
        """The largest of 100 times as many numbers, by drawing them."""
        rng = np.random.default_rng(0)
        few = np.abs(rng.standard_normal((2000, 1000))).max(axis=1).mean()
        many = np.abs(rng.standard_normal((20, 100_000))).max(axis=1).mean()
        assert many / few == pytest.approx(np.sqrt(np.log(1e5) / np.log(1e3)), rel=0.06)
        assert headroom(1000) == pytest.approx(np.sqrt(np.log(1e9) / np.log(1e3)))
        assert headroom(1) == headroom(2)


class TestIsolated:
    def test_blames_the_one_operation_that_is_wrong(self):
        double = [("blocks.0.attn.hook_attn_scores", lambda value, hook: value * 2)]
        _, theirs = run_with_trace(IDS, PARAMS, 3, fwd_hooks=double)
        expected = truth(IDS, PARAMS, 3)
        wrong_after = [name for name in tapped(2) if deviation(theirs[name], expected[name]) > 1e-4]
        assert len(wrong_after) > 15
        exact, bands = isolated(theirs, IDS, PARAMS, 3)
        wrong = [name for name in theirs if deviation(theirs[name], exact[name]) > bands[name]]
        assert wrong == ["blocks.0.attn.hook_attn_scores"]

    def test_spans_what_was_not_recorded(self):
        _, theirs = run_with_trace(IDS, PARAMS, 3)
        few = {name: theirs[name] for name in ("blocks.0.hook_resid_post", "logits")}
        exact, bands = isolated(few, IDS, PARAMS, 3)
        assert deviation(theirs["logits"], exact["logits"]) <= bands["logits"]
        again = run_with_trace(IDS, astype(PARAMS, np.float64), 3)[1]
        assert not np.array_equal(again["logits"], exact["logits"])  # it began from their float32 numbers


class TestNumbers:
    def test_masked_cells_do_not_count(self):
        x = np.array([[1.0, -np.inf], [2.0, 4.0]])
        assert total(x) == 7.0
        assert deviation(np.array([[1.0, 99.0], [2.0, 4.5]]), x) == 0.5

    def test_the_signs_are_those_of_the_documented_formula(self):
        signs = []
        for i in range(1000):
            h = i * 2654435761 % 2**32
            signs.append(-1 if (h ^ (h >> 15)) >> 16 & 1 else 1)
        assert 400 < signs.count(1) < 600
        x = np.random.default_rng(0).standard_normal((10, 100))
        assert projection(x) == pytest.approx(np.dot(signs, x.ravel()))
        assert projection(x) != pytest.approx(projection(x[::-1]))
