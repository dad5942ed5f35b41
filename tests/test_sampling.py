"""Choosing the next id, against transformers' logits warpers and against the written recipe in plain Python."""

import math

import numpy as np
import pytest

from picogpt import PicogptError
from picogpt.sampling import SamplingError, draw, greedy, make_sampler, probabilities

RNG = np.random.default_rng(2019)
LOGITS = {
    "random": RNG.normal(0, 3, 499),
    "peaked": RNG.normal(0, 30, 499),
    "flat": RNG.normal(0, 1e-3, 499),
    "float32": RNG.normal(0, 3, 499).astype(np.float32),
    "with ties": RNG.integers(-3, 3, 499).astype(float),
    "all equal": np.zeros(499),
    "one": np.array([3.0]),
}
SETTINGS = [
    {"temperature": 0.8},
    {"temperature": 1.7, "top_k": 40},
    {"top_k": 1},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 1},
    {"temperature": 0.5, "top_k": 100, "top_p": 0.6},
    {"temperature": 3, "top_p": 0.999},
]


def recipe(logits, temperature=1.0, top_k=None, top_p=None):
    """Steps 1 to 4 of the module's docstring in plain Python, as another language would write them."""
    logits = [(float(x) - float(max(logits))) / temperature for x in logits]
    if top_k is not None and top_k < len(logits):
        bar = sorted(logits, reverse=True)[top_k - 1]
        logits = [x if x >= bar else -math.inf for x in logits]
    exps = [math.exp(x) for x in logits]
    p = [x / math.fsum(exps) for x in exps]
    if top_p is not None:
        before, kept = 0.0, set()
        for i in sorted(range(len(p)), key=lambda i: (-p[i], i)):
            if before < top_p:
                kept.add(i)
            before += p[i]
        p = [x if i in kept else 0.0 for i, x in enumerate(p)]
    return p


def recipe_draw(p, u):
    """Step 6."""
    total, running = sum(p), 0.0
    for i, x in enumerate(p):
        running += x
        if running > u * total:
            return i


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("logits", LOGITS)
class TestProbabilities:
    def test_transformers(self, logits, settings):
        """Where the nucleus ends within a tie, ours keeps the smallest ids: there only the shares agree."""
        torch = pytest.importorskip("torch")
        process = pytest.importorskip("transformers.generation.logits_process")
        scores = torch.tensor(np.float64(LOGITS[logits]))[None]
        if "temperature" in settings:
            scores = process.TemperatureLogitsWarper(float(settings["temperature"]))(None, scores)
        if "top_k" in settings:
            scores = process.TopKLogitsWarper(settings["top_k"])(None, scores)
        if "top_p" in settings:
            scores = process.TopPLogitsWarper(float(settings["top_p"]))(None, scores)
        expected = torch.softmax(scores, -1)[0].numpy()

        p = probabilities(LOGITS[logits], **settings)
        p = p / p.sum()
        if logits in ("with ties", "all equal"):
            p, expected = np.sort(p), np.sort(expected)
        assert p.dtype == np.float64
        np.testing.assert_array_equal(p > 0, expected > 0)
        np.testing.assert_allclose(p, expected, rtol=1e-12, atol=1e-300)

    def test_the_recipe_in_plain_python(self, logits, settings):
        p, expected = probabilities(LOGITS[logits], **settings), recipe(LOGITS[logits], **settings)
        np.testing.assert_array_equal(p > 0, np.array(expected) > 0)
        np.testing.assert_allclose(p, expected, rtol=1e-12, atol=1e-300)

    def test_the_same_ids_as_the_recipe(self, logits, settings):
        sample, random = make_sampler(**settings, seed=7), np.random.Generator(np.random.PCG64(7))
        expected = recipe(LOGITS[logits], **settings)
        for _ in range(50):
            assert sample(LOGITS[logits]) == recipe_draw(expected, random.random())


def test_the_stream_of_random_numbers():
    """The first bits of PCG64(0) and their doubles, as NumPy's ports to C++, Go, Rust and Swift test them too.
    With equal shares for a thousand ids, the id is the integer part of 1000 u."""
    bits = [0xA30FEBCFD9C2825F, 0x4510BDF882D9D721, 0x0A7D3DA94ECDE8B8, 0x043B27B61342F01D]
    doubles = [0.6369616873214543, 0.2697867137638703, 0.04097352393619469, 0.016527635528529094]
    assert np.random.PCG64(0).random_raw(4).tolist() == bits
    assert [(raw >> 11) / 2**53 for raw in bits] == doubles
    sample = make_sampler(temperature=1, seed=0)
    assert [sample(np.zeros(1000)) for _ in bits] == [636, 269, 40, 16]


def test_ties_at_the_border_stay_in_top_k_and_the_smallest_ids_stay_in_top_p():
    logits = np.array([1.0, 2, 2, 2, 0])
    np.testing.assert_array_equal(probabilities(logits, top_k=2) > 0, [False, True, True, True, False])
    np.testing.assert_array_equal(probabilities(np.zeros(4), top_p=0.5), [0.25, 0.25, 0, 0])
    np.testing.assert_array_equal(probabilities(np.zeros(4), top_p=0.51), [0.25, 0.25, 0.25, 0])


def test_the_token_that_crosses_top_p_stays():
    """OpenAI's rule keeps one token here (openai/gpt-2, src/sample.py, top_p_logits), Hugging Face's two."""
    logits = np.log([0.6, 0.3, 0.1])
    np.testing.assert_allclose(probabilities(logits, top_p=0.7), [0.6, 0.3, 0], rtol=1e-12)


def test_what_is_drawn_is_distributed_as_it_should_be():
    """Chi-square over ten ids; with 9 degrees of freedom one right program in a thousand would exceed 27.88."""
    logits, n = np.linspace(-1, 1.5, 10), 20_000
    sample = make_sampler(temperature=0.7, seed=1)
    counts = np.bincount([sample(logits) for _ in range(n)], minlength=10)
    expected = n * np.array(recipe(logits, 0.7))
    assert ((counts - expected) ** 2 / expected).sum() < 27.88


class TestGreedy:
    def test_the_likeliest_and_the_smallest_id_at_a_tie(self):
        assert greedy(np.array([1.0, 3.0, 3.0, 2.0])) == 1
        assert type(greedy(np.array([1.0, 3.0], np.float32))) is int
        assert greedy(np.array([0.0, -np.inf])) == 0

    @pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"temperature": 0, "top_k": 3, "seed": 5}])
    def test_when(self, settings):
        choose = make_sampler(**settings)
        assert [choose(LOGITS["random"]) for _ in range(20)] == [greedy(LOGITS["random"])] * 20

    def test_jax(self):
        jnp = pytest.importorskip("jax.numpy")
        assert greedy(jnp.array([1.0, 3.0, 3.0])) == 1
        assert make_sampler(top_k=1)(jnp.array([1.0, 3.0, 2.0])) == 1


class TestExtremes:
    @pytest.mark.parametrize("settings", [{}, {"temperature": 1}, {"top_p": 0.5}])
    @pytest.mark.parametrize("wrong", [np.nan, np.inf])
    def test_a_damaged_model_is_told(self, settings, wrong):
        with pytest.raises(SamplingError, match="computed NaN or infinity"):
            make_sampler(**settings)(np.array([1.0, wrong, 2.0]))

    def test_a_number_too_large_for_a_float(self):
        with pytest.raises(SamplingError, match="temperature is 1000"):
            make_sampler(temperature=10**400)

    @pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-308, 5e-324])
    def test_the_coldest_is_greedy(self, temperature):
        p = probabilities(LOGITS["random"], temperature)
        assert p[LOGITS["random"].argmax()] == 1 and p.sum() == 1
        tied = probabilities(np.array([2.0, 0, 2]), temperature)
        np.testing.assert_array_equal(tied, [0.5, 0, 0.5])

    def test_the_hottest_is_uniform(self):
        np.testing.assert_allclose(probabilities(LOGITS["peaked"], 1e300), 1 / 499, rtol=1e-12)

    def test_logits_of_any_size(self):
        np.testing.assert_array_equal(probabilities(np.array([1e308, -1e308, 1e308])), [0.5, 0, 0.5])
        np.testing.assert_allclose(probabilities(np.array([-np.inf, 1, 1])), [0, 0.5, 0.5])

    def test_a_uniform_number_close_to_1(self):
        """0.1 + 0.2 + ... rounds: u times the whole may be the whole. Never an id without a chance."""
        below_1 = np.nextafter(1, 0)
        for p in ([0.1] * 10, [1 / 3] * 3, [1e-300, 1.0], [5e-324], [0.7, 0.1, 0.1]):
            assert draw(np.array([*p, 0.0, 0.0]), below_1) == len(p) - 1

    def test_a_uniform_number_of_0(self):
        assert draw(np.array([0.0, 0.0, 0.5, 0.5]), 0.0) == 2

    def test_borders(self):
        p = np.array([0.25, 0.0, 0.25, 0.5])
        below = [np.nextafter(u, 0) for u in (0.25, 0.5)]
        assert [draw(p, u) for u in (0.0, below[0], 0.25, below[1], 0.5)] == [0, 0, 2, 2, 3]


class TestSeed:
    def test_the_same_seed_the_same_ids(self):
        a, b, c = ([sample(LOGITS["random"]) for _ in range(20)] for sample in map(seeded, (3, 3, 4)))
        assert a == b != c

    def test_without_a_seed_no_two_are_alike(self):
        a, b = ([sample(np.zeros(10_000)) for _ in range(20)] for sample in map(seeded, (None, None)))
        assert a != b

    def test_logits_stay_as_they_are(self):
        logits = np.array([1.0, 2.0, 3.0])
        logits.flags.writeable = False
        make_sampler(temperature=0.5, top_k=2, top_p=0.5, seed=0)(logits)


def seeded(seed):
    return make_sampler(temperature=1, seed=seed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: give 0 (greedy) or more, such as 0.8"),
        ({"temperature": math.nan}, "temperature is nan: give 0 (greedy) or more, such as 0.8"),
        ({"temperature": math.inf}, "temperature is inf: give 0 (greedy) or more, such as 0.8"),
        ({"temperature": "hot"}, "temperature is 'hot': give 0 (greedy) or more, such as 0.8"),
        ({"temperature": True}, "temperature is True: give 0 (greedy) or more, such as 0.8"),
        ({"top_k": 0}, "top_k is 0: give a whole number from 1, or leave it out"),
        ({"top_k": 2.0}, "top_k is 2.0: give a whole number from 1, or leave it out"),
        ({"top_p": 0}, "top_p is 0: give a number above 0 and up to 1, or leave it out"),
        ({"top_p": 1.01}, "top_p is 1.01: give a number above 0 and up to 1, or leave it out"),
        ({"top_p": math.nan}, "top_p is nan: give a number above 0 and up to 1, or leave it out"),
        ({"seed": -1}, "seed is -1: give a whole number from 0, or leave it out"),
        ({"seed": 1.5}, "seed is 1.5: give a whole number from 0, or leave it out"),
    ],
    ids=str,
)
def test_errors(settings, message):
    with pytest.raises(SamplingError) as caught:
        make_sampler(**settings)
    assert str(caught.value) == message and isinstance(caught.value, PicogptError)


def test_numpy_numbers_are_numbers():
    sample = make_sampler(np.float32(0.5), np.int64(3), np.float64(0.5), np.int64(0))
    assert sample(LOGITS["random"]) == make_sampler(0.5, 3, 0.5, 0)(LOGITS["random"])
