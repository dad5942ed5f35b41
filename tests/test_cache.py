"""Caches and packed batches against the plain forward pass, which test_model.py compares with transformers."""

from itertools import chain

import numpy as np
import pytest

from models import astype, jax_params, random_ids, random_params, rounding_noise
from picogpt.cache import JAXCache, KVCache, packed, with_attend
from picogpt.model import BLOCK, causal_attention, gpt2

HPARAMS = {"n_vocab": 31, "n_ctx": 300, "n_embd": 24, "n_head": 3, "n_layer": 2}
N_HEAD = HPARAMS["n_head"]
PARAMS = random_params(**HPARAMS)
IDS = random_ids(287, HPARAMS["n_vocab"])
DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])


def plain(params, ids=IDS):
    return gpt2(ids, **params, n_head=N_HEAD)


@pytest.fixture(scope="module")
def expected():
    return plain(PARAMS)


@pytest.fixture(scope="module")
def allowed():
    """How far logits may be from `expected`, by dtype: float64 has 29 bits more than float32."""
    noise = 4 * rounding_noise(plain, PARAMS)
    return {"float32": noise, "float64": noise / 2**29}


def new_caches(capacity=256):
    return [KVCache(capacity) for _ in PARAMS["blocks"]]


def read(params, attends, ids, position_ids):
    return gpt2(ids, **with_attend(params, attends), n_head=N_HEAD, position_ids=position_ids)


def read_in_chunks(params, caches, lengths):
    chunks, start = [], 0
    for length in lengths:
        positions = np.arange(start, start + length)
        chunks.append(read(params, caches, IDS[start : start + length], positions))
        start += length
    return np.concatenate(chunks)


@DTYPES
class TestKVCache:
    @pytest.mark.parametrize("capacity", [1, 287, 512])
    @pytest.mark.parametrize(
        "lengths",
        [[287], [1] * 287, [5, 1, 7, 128, 1, 145], [BLOCK + 1, 1, BLOCK + 1], [2, BLOCK, 1, 1, BLOCK]],
        ids=["at once", "one by one", "chunks", "a block and one", "blocks"],
    )
    def test_equals_plain(self, dtype, lengths, capacity, expected, allowed):
        logits = read_in_chunks(astype(PARAMS, dtype), new_caches(capacity), lengths)
        assert logits.dtype == dtype
        assert np.abs(logits - expected[: sum(lengths)]).max() <= allowed[dtype]

    def test_forks_go_their_own_ways(self, dtype, allowed):
        params, prompt, caches = astype(PARAMS, dtype), IDS[:20], new_caches(24)
        read(params, caches, prompt, np.arange(20))
        trunk_and_twins = caches, [c.fork() for c in caches], [c.fork() for c in caches]
        tails = [1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]
        for own, tail in zip(trunk_and_twins, tails, strict=True):
            logits = read(params, own, tail, np.arange(20, 20 + len(tail)))
            assert own[0].length == 20 + len(tail)
            assert np.abs(logits - plain(PARAMS, prompt + tail)[20:]).max() <= allowed[dtype]
        again = read(params, caches, [12], [23])
        assert np.abs(again - plain(PARAMS, [*prompt, 1, 2, 3, 12])[23:]).max() <= allowed[dtype]


class TestStore:
    def test_it_keeps_what_it_holds_when_it_doubles(self):
        cache, rng, sizes = KVCache(capacity=2), np.random.default_rng(0), []
        k, v = rng.standard_normal((2, 3, 33, 4)).astype(np.float32)
        for i in range(33):
            row = slice(i, i + 1)
            cache(k[:, row], k[:, row], v[:, row])
            sizes.append(cache.store.shape[2])
            np.testing.assert_array_equal(cache.store[:, :, : i + 1], [k[:, : i + 1], v[:, : i + 1]])
        assert cache.length == 33 and cache.store.dtype == np.float32
        assert sorted(set(sizes)) == [2, 4, 8, 16, 32, 64]

    def test_with_room_for_all_it_is_never_allocated_again(self):
        caches = new_caches(capacity=40)
        read(PARAMS, caches, IDS[:10], np.arange(10))
        stores = [cache.store for cache in caches]
        for i in range(10, 40):
            read(PARAMS, caches, IDS[i : i + 1], [i])
        assert all(cache.store is store for cache, store in zip(caches, stores, strict=True))

    def test_a_fork_of_nothing(self):
        fork = KVCache(8).fork()
        assert fork.length == 0
        x = np.ones((1, 3, 2))
        np.testing.assert_array_equal(fork(x, x, x), x)


@DTYPES
class TestPacked:
    LENGTHS = (1, BLOCK + 12, 7, 2)

    def prompts(self):
        return [random_ids(n, HPARAMS["n_vocab"], seed=n) for n in self.LENGTHS]

    def test_sequences_side_by_side_equal_each_alone(self, dtype, allowed):
        prompts = self.prompts()
        attend = packed([causal_attention] * len(prompts), list(self.LENGTHS))
        positions = np.concatenate([np.arange(n) for n in self.LENGTHS])
        logits = read(astype(PARAMS, dtype), [attend] * 2, [*chain(*prompts)], positions)
        alone = np.concatenate([plain(PARAMS, ids) for ids in prompts])
        assert logits.dtype == dtype
        assert np.abs(logits - alone).max() <= allowed[dtype]

    def test_each_with_its_own_cache(self, dtype, allowed):
        """A prompt each, then one token each, then a chunk for the one and a token for the others."""
        params, prompts = astype(PARAMS, dtype), self.prompts()
        caches = [new_caches(4) for _ in prompts]
        so_far = [[] for _ in prompts]
        for new in (prompts, [[1], [2], [3], [4]], [[5], [6], [7, 8, 9, 10], [11]]):
            lengths = [len(ids) for ids in new]
            positions = np.concatenate(
                [np.arange(len(ids)) + len(old) for old, ids in zip(so_far, new, strict=True)]
            )
            attends = [packed(of_block, lengths) for of_block in zip(*caches, strict=True)]
            logits = read(params, attends, [*chain(*new)], positions)
            so_far = [old + ids for old, ids in zip(so_far, new, strict=True)]
            alone = [plain(PARAMS, ids)[-n:] for ids, n in zip(so_far, lengths, strict=True)]
            assert np.abs(logits - np.concatenate(alone)).max() <= allowed[dtype]

    def test_a_length_for_each(self, dtype):
        attend = packed([causal_attention] * 2, [3])
        x = np.ones((1, 3, 2), dtype)
        with pytest.raises(ValueError):
            attend(x, x, x)


def test_jax_cache_under_jit_equals_plain(expected, allowed):
    """One program a length of input, whatever has been read before."""
    jax = pytest.importorskip("jax")
    params, n_compiled = jax_params(astype(PARAMS, "float32")), []

    @jax.jit
    def step(params, state, start, ids):
        n_compiled.append(len(ids))
        caches = [JAXCache(*keys_and_values, start) for keys_and_values in state]
        logits = read(params, caches, ids, start + jax.numpy.arange(len(ids)))
        return logits, [cache.state for cache in caches]

    shape = N_HEAD, 32, HPARAMS["n_embd"] // N_HEAD
    state, rows, start = [(jax.numpy.zeros(shape),) * 2 for _ in PARAMS["blocks"]], [], 0
    for length in (5, 1, 1, 7, 1, 1, 7, 1):
        logits, state = step(params, state, start, np.array(IDS[start : start + length]))
        rows.append(np.asarray(logits))
        start += length
    assert n_compiled == [5, 1, 7]
    assert rows[0].dtype == np.float32 and state[0][0].shape == shape
    assert np.abs(np.concatenate(rows) - expected[:start]).max() <= allowed["float32"]


def test_jax_cache_leaves_what_it_was_given_alone():
    jnp = pytest.importorskip("jax.numpy")
    keys = values = jnp.zeros((2, 6, 3))
    cache, x = JAXCache(keys, values, 4), jnp.ones((2, 2, 3))
    cache(x, x, x)
    assert not keys.any() and cache.length == 4
    np.testing.assert_array_equal(np.asarray(cache.state[0][:, :, 0]), [[0, 0, 0, 0, 1, 1]] * 2)


class TestWithAttend:
    def test_the_tree_that_was_given_stays_as_it_is(self):
        attends = new_caches()
        tree = with_attend(PARAMS, attends)
        assert [block["attn"]["attend"] for block in tree["blocks"]] == attends
        assert all(block["attn"].keys() == {"c_attn", "c_proj"} for block in PARAMS["blocks"])
        assert tree["blocks"][0]["mlp"] is PARAMS["blocks"][0]["mlp"] and tree["wte"] is PARAMS["wte"]

    def test_one_for_each_block(self):
        with pytest.raises(ValueError):
            with_attend(PARAMS, [causal_attention])

    def test_what_it_returns_is_used(self):
        def blind(q, k, v, tap):
            return 0 * v

        params = with_attend(PARAMS, [blind] * 2)
        same_position = gpt2(IDS[:9], **params, n_head=N_HEAD, position_ids=np.zeros(9, int))
        alone = [gpt2([i], **params, n_head=N_HEAD, position_ids=[0])[0] for i in IDS[:9]]
        np.testing.assert_allclose(same_position, alone, rtol=0, atol=1e-12)
