"""Models for the tests: random weights in the article's tree, the same weights in transformers, and noise.

What the tests expect does not come from picogpt: it would share its mistakes.
"""

import base64
import json

import numpy as np
import pytest

from picogpt.model import gpt2, with_taps
from picogpt.trace import tree_map

SMALL = {"n_vocab": 23, "n_ctx": 19, "n_embd": 12, "n_head": 3, "n_layer": 2}
LONG = {"n_vocab": 31, "n_ctx": 300, "n_embd": 26, "n_head": 2, "n_layer": 2}


def random_params(n_vocab, n_ctx, n_embd, n_layer, *, dtype=np.float64, lm_head=False, seed=0, **_):
    """Weights large enough that every part of the network matters, all read-only: `gpt2` changes nothing."""
    rng = np.random.default_rng(seed)

    def normal(*shape, std=1.0, mean=0.0):
        array = (mean + std * rng.standard_normal(shape)).astype(dtype)
        array.flags.writeable = False
        return array

    def norm():
        return {"g": normal(n_embd, std=0.2, mean=1.0), "b": normal(n_embd, std=0.2)}

    def conv1d(n_in, n_out, gain=1.0):
        return {"w": normal(n_in, n_out, std=gain * n_in**-0.5), "b": normal(n_out, std=0.2)}

    def block():
        return {
            "ln_1": norm(),
            "attn": {"c_attn": conv1d(n_embd, 3 * n_embd, 1.5), "c_proj": conv1d(n_embd, n_embd)},
            "ln_2": norm(),
            "mlp": {"c_fc": conv1d(n_embd, 4 * n_embd, 1.5), "c_proj": conv1d(4 * n_embd, n_embd)},
        }

    blocks = [block() for _ in range(n_layer)]
    params = {"wte": normal(n_vocab, n_embd, std=0.3), "wpe": normal(n_ctx, n_embd, std=0.3)}
    params |= {"blocks": blocks, "ln_f": norm()}
    return params | ({"lm_head": normal(n_vocab, n_embd, std=0.3)} if lm_head else {})


def random_ids(n_seq, n_vocab, seed=0):
    return np.random.default_rng(seed).integers(n_vocab, size=n_seq).tolist()


def astype(params, dtype):
    def cast(array):
        array = array.astype(dtype)
        array.flags.writeable = False
        return array

    return tree_map(cast, params)


def transformers_names(params):
    """Every leaf under the name that transformers' GPT2LMHeadModel gives it; a tied head only as `wte`."""
    leaf_names = {"w": "weight", "g": "weight", "b": "bias"}

    def leaves(branch, path):
        for key, child in branch.items():
            if isinstance(child, dict):
                yield from leaves(child, f"{path}{key}.")
            else:
                yield f"{path}{leaf_names[key]}", child

    named = {f"transformer.{key}.weight": params[key] for key in ("wte", "wpe")}
    named |= {"lm_head.weight": params["lm_head"]} if "lm_head" in params else {}
    for i, block in enumerate(params["blocks"]):
        named |= dict(leaves(block, f"transformer.h.{i}."))
    return named | dict(leaves(params["ln_f"], "transformer.ln_f."))


def transformers_model(params, n_head):
    """The oracle: transformers' GPT-2 with these weights, in their dtype."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    (n_vocab, n_embd), (n_ctx, _) = params["wte"].shape, params["wpe"].shape
    config = transformers.GPT2Config(
        vocab_size=n_vocab,
        n_positions=n_ctx,
        n_embd=n_embd,
        n_layer=len(params["blocks"]),
        n_head=n_head,
        tie_word_embeddings="lm_head" not in params,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).to(getattr(torch, params["wte"].dtype.name)).eval()
    state = {name: torch.tensor(array) for name, array in transformers_names(params).items()}
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    model.load_state_dict(state)
    return model


def rounding_noise(forward, params):
    """How far float32 moves the result of `forward(params)`: its largest distance from float64's.

    Two right programs in float32 differ by about as much; tests allow four times it, not a number of taste."""
    exact, rounded = forward(astype(params, np.float64)), forward(astype(params, np.float32))
    return float(np.abs(rounded - exact).max())


def jax_x64():
    """A context in which JAX has float64."""
    jax = pytest.importorskip("jax")
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


def jax_params(params):
    jnp = pytest.importorskip("jax.numpy")
    return tree_map(jnp.asarray, params)


def intermediates(params, ids, n_head):
    """Every intermediate by its name, in the order in which they came, copied as the tap's contract asks."""
    seen = {}

    def tap(name, x):
        assert name not in seen
        seen[name] = x.copy()
        return x

    gpt2(ids, **with_taps(params, tap), n_head=n_head)
    return seen


def close(found, expected, tolerance, name=""):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=name)


def nano_sort_params(assets):
    """minGPT's nano model, which sorts six digits (bbycroft/llm-viz): the article's tree of its weights."""
    arrays = np.load(assets / "small-models" / "nano-sort" / "gpt2_layout.npz")

    def leaves(path, weight):
        return {weight: arrays[f"{path}.weight"], "b": arrays[f"{path}.bias"]}

    def block(path):
        return {
            "ln_1": leaves(f"{path}.ln_1", "g"),
            "attn": {name: leaves(f"{path}.attn.{name}", "w") for name in ("c_attn", "c_proj")},
            "ln_2": leaves(f"{path}.ln_2", "g"),
            "mlp": {name: leaves(f"{path}.mlp.{name}", "w") for name in ("c_fc", "c_proj")},
        }

    tables = {name: arrays[f"{name}.weight"] for name in ("wte", "wpe", "lm_head")}
    return {**tables, "blocks": [block(f"h.{i}") for i in range(3)], "ln_f": leaves("ln_f", "g")}


def nano_sort_recorded(assets):
    """Its configuration, and what PyTorch computed on three inputs: name -> float32 array."""
    file = assets / "small-models" / "nano-sort" / "gpt-nano-sort-t0-partials.json"
    entries = json.loads(file.read_text())
    config = entries.pop("config")
    return config, {
        name: np.frombuffer(base64.b64decode(entry["data"]), "<f4").reshape(entry["shape"])
        for name, entry in entries.items()
    }
