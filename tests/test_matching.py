"""Names and layouts of others. The oracle is what transformers' own modules put out."""

import re

import numpy as np
import pytest

from models import SMALL, intermediates, random_ids, random_params, transformers_model
from picogpt.matching import Matcher, MatchError, ShapeError
from picogpt.names import names
from picogpt.trace import with_outs

N_SEQ = 7  # of no other axis the length
PARAMS = random_params(**SMALL)
IDS = random_ids(N_SEQ, SMALL["n_vocab"])
TRACE = with_outs(intermediates(PARAMS, IDS, SMALL["n_head"]), PARAMS)
SHAPES = {name: x.shape for name, x in TRACE.items()}
MATCHER = Matcher(SMALL)


def distance(name, x, rows):
    return np.abs(np.nan_to_num(x - TRACE[name][..., rows, :], nan=0.0)).max()


def match(theirs, mapping=None, positions=range(N_SEQ), shapes=SHAPES, near=distance):
    matches, parameters, unknown = Matcher(SMALL, mapping).match(theirs, shapes, positions, near)
    return {match.name: match for match in matches}, parameters, unknown


def refused(theirs, *words, mapping=None):
    with pytest.raises(MatchError) as error:
        match(theirs, mapping)
    assert isinstance(error.value, ShapeError) == (" is [" in str(error.value))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_every_alias_means_one_intermediate_and_only_a_fused_array_means_three():
    meanings = {}
    for name in names(SMALL["n_layer"]):
        for alias in (name.hook, *name.hugging_face.split(), *name.llm_c.split()):
            meanings.setdefault(alias.removeprefix("1/"), {})[name.hook] = True
    for alias, hooks in meanings.items():
        assert [meaning.name for meaning in MATCHER.lookup(alias)] == list(hooks), alias
        assert len(hooks) == 1 or re.fullmatch(r"(h\.\d\.attn\.c_attn|qkv\.\d)", alias)


def test_modules_of_transformers():
    """Each module's output is what names.py says, or unknown; what it is was found by a hook on the module."""
    torch = pytest.importorskip("torch")
    model = transformers_model(PARAMS, SMALL["n_head"])
    outputs = {}

    def note(name):
        def hook(_module, _inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            outputs[f"{name}.output"] = output.detach().numpy()

        return hook

    for name, module in model.named_modules():
        if name and not name.endswith(("transformer", "dropout")):  # dropout of what is in another name already
            module.register_forward_hook(note(name))
    with torch.no_grad():
        model(torch.tensor([IDS]), use_cache=False)
    matches, _, unknown = match(outputs)
    assert set(unknown) <= {name for name in outputs if "drop" in name}
    assert len(matches) == 2 + 1 + 2 * SMALL["n_layer"] * 5 + 2  # a block: ln_1 q k v attn ln_2 c_fc act mlp h
    for name, found in matches.items():
        np.testing.assert_allclose(found.array, TRACE[name], rtol=0, atol=1e-11, err_msg=found.theirs)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("blocks/1/attn/hook_q", "blocks.1.attn.hook_q"),
        ("BLOCKS_1_ATTN_Q", "blocks.1.attn.hook_q"),
        ("model.transformer.h.1.mlp", "blocks.1.hook_mlp_out"),
        ("transformer.h.1.attn.output.0", "blocks.1.hook_attn_out"),
        ("_orig_mod.transformer.h.0.mlp.gelu", "blocks.0.mlp.hook_post"),
        ("h.0.attn.c_proj.input", "blocks.0.attn.hook_z"),
        ("model.lm_head", "logits"),
        ("unembed.hook_out", "logits"),
        ("blocks.0.hook_out", "blocks.0.hook_resid_post"),
        ("embed.hook_out", "hook_embed"),
        ("hidden_states.2", "ln_final.hook_out"),
        ("encoded", "blocks.0.hook_resid_pre"),
        ("ln1_rstd.1", "blocks.1.ln1.hook_scale"),
    ],
)
def test_spellings(theirs, ours):
    assert [meaning.name for meaning in MATCHER.lookup(theirs)] == [ours]


@pytest.mark.parametrize(
    "name", ["", "probs", "blocks.2.attn.hook_q", "h.0.attn.bias", "ln1_mean.0", "q", "blocks", "blocks.0.attn"]
)
def test_names_that_mean_nothing(name):
    assert MATCHER.lookup(name) == []


def turned(x):
    return x.transpose(1, 0, 2)


def merged(x):
    return turned(x).reshape(N_SEQ, -1)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("hook_embed", lambda x: x, ()),
        ("hook_embed", lambda x: x[None, None], ()),
        ("hook_embed", lambda x: x.T, ("transposed",)),
        ("blocks.0.attn.hook_k", turned, ("[n_seq, n_head, d]",)),
        ("blocks.0.attn.hook_k", lambda x: turned(x)[None], ("[n_seq, n_head, d]",)),
        ("blocks.1.attn.hook_z", merged, ("heads merged",)),
        ("blocks.1.attn.hook_z", lambda x: merged(x)[None], ("heads merged",)),
        ("blocks.1.attn.hook_pattern", lambda x: x[None], ()),
        ("ln_final.hook_scale", lambda x: x[:, 0], ()),
        ("ln_final.hook_scale", lambda x: x[None, :, 0], ()),
        ("logits", lambda x: np.pad(x, [(0, 0), (0, 9)])[None], ("padded to 32",)),
        ("logits", lambda x: x.astype(np.float32).astype(np.float64), ()),
    ],
)
def test_layouts(name, change, said):
    theirs = change(TRACE[name])
    found = match({name: theirs})[0][name]
    assert found.said == said and found.rows == list(range(N_SEQ))
    np.testing.assert_allclose(found.array, TRACE[name], rtol=1e-6)


@pytest.mark.parametrize(
    "name, change",
    [
        ("logits", lambda x: x[-1]),
        ("logits", lambda x: x[None, -1:]),
        ("logits", lambda x: np.pad(x[-1], (0, 9))),
        ("blocks.0.attn.hook_q", lambda x: x[:, -1]),
        ("blocks.0.attn.hook_q", lambda x: x[None, :, -1:]),
        ("blocks.0.attn.hook_q", lambda x: merged(x)[-1]),
        ("blocks.0.attn.hook_attn_scores", lambda x: x[:, -1]),
        ("blocks.0.ln1.hook_scale", lambda x: x[-1]),
    ],
)
def test_the_last_row_alone(name, change):
    found = match({name: change(TRACE[name])})[0][name]
    assert found.rows == [N_SEQ - 1]
    np.testing.assert_array_equal(found.array, TRACE[name][..., -1:, :])


def test_the_rows_of_a_tiny_reference():
    theirs = {name: x[..., [0, 2, 6], :] for name, x in TRACE.items()}
    matches, _, _ = match(theirs, positions=[0, 2, 6])
    assert matches.keys() == TRACE.keys()
    assert all(found.rows == [0, 2, 6] for found in matches.values())


def test_of_two_layouts_the_closer_one():
    x = np.random.default_rng(0).standard_normal((3, 3, 4))  # as many heads as tokens
    shapes = {"blocks.0.attn.hook_q": x.shape}
    for theirs, said in ((x, ()), (turned(x), ("[n_seq, n_head, d]",))):
        noisy = theirs + 0.1
        found, _, _ = match(
            {"blocks.0.attn.hook_q": noisy}, None, range(3), shapes, lambda _name, y, _rows: np.abs(y - x).max()
        )
        assert found["blocks.0.attn.hook_q"].said == said


def test_fields_of_llm_c():
    """[L, B, T, C], as ActivationTensors of train_gpt2.c has them; rstd is 1/scale; encoded is wte + wpe."""

    def stacked(hook, change=lambda x: x):
        return np.stack([change(TRACE[f"blocks.{i}.{hook}"]) for i in range(SMALL["n_layer"])])[:, None]

    qkv = np.concatenate([stacked(f"attn.hook_{part}", merged) for part in "qkv"], axis=-1)
    fields = {"qkv": qkv, "atty": stacked("attn.hook_z", merged), "att": stacked("attn.hook_pattern")}
    fields |= {"ln1_rstd": 1 / stacked("ln1.hook_scale")[..., 0], "ln2": stacked("ln2.hook_out")}
    fields |= {"fch_gelu": stacked("mlp.hook_post"), "residual3": stacked("hook_resid_post")}
    fields |= {
        "encoded": TRACE["blocks.0.hook_resid_pre"][None],
        "lnf_rstd": 1 / TRACE["ln_final.hook_scale"].T,
    }
    matches, _, unknown = match(fields | {"losses": np.zeros((1, N_SEQ))})
    assert unknown == ["losses"]
    assert len(matches) == 2 * (3 + 6) + 2
    for name, found in matches.items():
        np.testing.assert_allclose(found.array, TRACE[name], rtol=1e-14, err_msg=found.theirs)
    one_a_layer = {f"fch_gelu.{i}": x for i, x in enumerate(fields["fch_gelu"])}
    assert match(one_a_layer)[0].keys() == {f"blocks.{i}.mlp.hook_post" for i in range(2)}


def test_parameters_under_the_names_of_openai_and_transformers():
    w = PARAMS["blocks"][1]["attn"]["c_attn"]["w"]
    theirs = {"model/h1/attn/c_attn/w": w, "transformer.wte.weight": PARAMS["wte"], "wpe": PARAMS["wpe"]}
    theirs |= {"transformer.h.1.mlp.c_fc.weight": PARAMS["blocks"][1]["mlp"]["c_fc"]["w"].T}
    theirs |= {"lm_head.weight": np.pad(PARAMS["wte"], [(0, 9), (0, 0)]), "wte": TRACE["hook_embed"]}
    matches, parameters, unknown = match(theirs)
    assert matches.keys() == {"hook_embed"} and not unknown
    expected = "model/h1/attn/c_attn/w model/wte model/wpe model/h1/mlp/c_fc/w model/lm_head"
    assert " ".join(parameters) == expected
    refused({"h.0.ln_1.weight": np.ones(5)}, "model/h0/ln_1/g", "[12]", "[5]")
    refused({"model/wte": PARAMS["wte"], "wte.weight": PARAMS["wte"]}, "both mean model/wte")


def test_a_map_of_names():
    mapping = {"after_first_mlp": "blocks.0.hook_resid_post", "T": "h.0.attn.c_attn", "stack": "fch"}
    qkv = np.concatenate([merged(TRACE[f"blocks.0.attn.hook_{part}"]) for part in "qkv"], axis=-1)
    stack = np.stack([TRACE[f"blocks.{i}.mlp.hook_pre"] for i in range(2)])
    theirs = {"after_first_mlp": TRACE["blocks.0.hook_resid_post"], "T": qkv, "stack": stack}
    matches, _, _ = match(theirs, mapping)
    assert len(matches) == 1 + 3 + 2
    refused(theirs, "'nobody'", mapping={"nobody": "logits"})
    refused(theirs, "hook_resid_past", "blocks.0.hook_resid_post?", mapping={"T": "blocks.0.hook_resid_past"})


def test_our_own_name_goes_first_and_others_must_agree():
    x, y = TRACE["blocks.0.hook_mlp_out"], TRACE["blocks.0.hook_attn_out"]
    matches, _, _ = match({"h.0.mlp": y, "blocks.0.hook_mlp_out": x, "h.0.mlp.c_proj": y})
    np.testing.assert_array_equal(matches["blocks.0.hook_mlp_out"].array, x)
    assert len(match({"h.0.mlp": x, "h.0.mlp.c_proj": x})[0]) == 1
    refused({"h.0.mlp": x, "h.0.mlp.c_proj": y}, "h.0.mlp.c_proj", "--map")


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("logits", (6, 23), ("logits is [6, 23]", "[7, 23]", "n_seq, n_vocab")),
        ("logits", (7, 22), ("[7, 22]",)),
        ("logits", (2, 7, 23), ("[2, 7, 23]",)),
        ("logits", (), ("[]",)),
        ("h.0.attn.c_attn", (7, 35), ("q, k and v",)),
        ("h.0.attn.c_attn", (7, 39), ("blocks.0.attn.hook_q",)),
        ("fch", (3, 7, 48), ("2 layers",)),
        ("blocks.0.attn.hook_pattern", (3, 7, 6), ("n_head, n_seq, n_seq",)),
        ("blocks.0.attn.hook_q", (3, 7, 5), ("n_head, n_seq, d",)),
    ],
)
def test_shapes_that_cannot_be(name, shape, words):
    refused({name: np.zeros(shape)}, name, *words)


def test_another_number_of_heads_is_no_wrong_shape_but_a_mistake():
    theirs = {"blocks.0.attn.hook_q": np.zeros((2, 7, 6)), "blocks.0.attn.hook_pattern": np.zeros((1, 2, 7, 7))}
    matches, _, _ = match(theirs)
    assert {found.said for found in matches.values()} == {("2 heads, the model has 3",)}
