"""Other people's runs against recordings. The oracles are transformers, torch and TransformerLens: what they
compute is right, and the faults planted in a forward pass of torch's are where they were planted."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models import random_ids, random_params, transformers_model
from picogpt import PicogptError
from picogpt.checkpoint import save_checkpoint
from picogpt.compare import WIDTH, compare, diagnosed, isolate, main, table
from picogpt.greedy import compare_ids, lacking
from picogpt.recording import Recording, record
from picogpt.tensor_files import write_safetensors

HPARAMS = {"n_vocab": 61, "n_ctx": 40, "n_embd": 48, "n_head": 4, "n_layer": 3}
N_SEQ = 17
IDS = random_ids(N_SEQ, HPARAMS["n_vocab"])
PARAMS = random_params(**HPARAMS, dtype=np.float32)
CENTRED = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "logits")


@functools.cache
def recording(size="full"):
    return record(IDS, PARAMS, HPARAMS["n_head"], size=size)


@functools.cache
def torch_run(*faults):
    """What a forward pass of torch's gives, with faults in block 1 or after the blocks."""
    torch_gpt2 = pytest.importorskip("torch_gpt2")
    return torch_gpt2.torch_trace(PARAMS, HPARAMS["n_head"], IDS, {fault: {1, 3} for fault in faults})


@pytest.fixture
def folder(tmp_path):
    """A directory with the recording in each size; none of them says where the model is."""
    for size in ("full", "tiny", "smoke"):
        recording(size).save(tmp_path / size)
    return tmp_path


def save(path, arrays):
    np.savez(path, **arrays)
    return path


def run(capsys, *argv):
    """The exit status, standard output and standard error of a command line."""
    status = main([str(word) for word in argv])
    return status, *capsys.readouterr()


def refused(capsys, *argv):
    """The one line with which a command line is refused."""
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "") and err.count("\n") == 1, (status, out, err)
    return err


def changed(name, change, arrays=None):
    arrays = dict(arrays or torch_run())
    arrays[name] = change(arrays[name].copy())
    return arrays


def rows(found):
    return {row.name: row for row in found.rows}


class TestRightRuns:
    @pytest.mark.parametrize("size", ["full", "tiny", "smoke"])
    def test_every_tensor_is_equal(self, size):
        found = compare(recording(size), torch_run())
        assert found.first is None and found.n_missing == 0 and not found.notes
        assert rows(found).keys() == recording(size).manifest["tensors"].keys()
        assert max(row.multiple for row in found.rows) > 0.01  # it is no copy

    def test_each_operation_is_right_by_itself(self):
        found = compare(recording(), torch_run())
        isolate(found, recording(), PARAMS)
        assert len(found.isolated) == len(found.rows) and found.first is None
        assert max(row.multiple for row in found.isolated) < 2  # of ten that are allowed

    def test_what_llm_c_and_transformers_do_not_record_is_computed(self):
        """Without `hook_normalized` the next operation is computed from `hook_out`, and needs it."""
        seen = {name: x for name, x in torch_run().items() if "normalized" not in name and "scale" not in name}
        for wrong, to_blame in (({}, []), ({"no_bias_ln_1"}, ["blocks.1.ln1.hook_out"])):
            arrays = {name: torch_run(*wrong)[name] for name in seen}
            found = compare(recording(), arrays)
            isolate(found, recording(), PARAMS)
            assert [row.name for row in found.isolated if not row.equal] == to_blame

    def test_files_in_every_format(self, folder, capsys):
        arrays = torch_run()
        save(folder / "mine.npz", arrays)
        write_safetensors(folder / "mine.safetensors", arrays, {})
        (folder / "npy").mkdir()
        (folder / "raw").mkdir()
        described = {}
        for i, (name, x) in enumerate(arrays.items()):
            np.save(folder / "npy" / f"{name}.npy", x)
            (folder / "raw" / f"{i}.f32").write_bytes(x.astype("<f4").tobytes())
            described[name] = {"file": f"{i}.f32", "shape": list(x.shape)}
        (folder / "raw" / "tensors.json").write_text(json.dumps(described))
        for mine in ("mine.npz", "mine.safetensors", "npy", "raw", "full"):
            status, out, err = run(capsys, folder / "full", folder / mine)
            assert (status, err) == (0, "") and out.endswith("\nEQUAL\n")

    @pytest.mark.parametrize("size", ["full", "tiny"])
    def test_the_last_row_is_enough(self, size):
        found = compare(recording(size), {name: x[..., -1:, :] for name, x in torch_run().items()})
        assert found.first is None and all(row.said[-1] == "last row" for row in found.rows)
        assert {row.where[-2] for row in found.rows} == {N_SEQ - 1}

    @pytest.mark.parametrize("fill", [np.nan, -1e10, 0.0, np.inf])
    def test_masked_cells_may_hold_anything(self, fill):
        def change(x):
            x[:, ~np.tri(N_SEQ, dtype=bool)] = fill
            return x

        assert compare(recording(), changed("blocks.1.attn.hook_attn_scores", change)).first is None

    def test_parameters_and_their_orientation(self):
        block = PARAMS["blocks"][1]
        theirs = {"h.1.attn.c_proj.weight": block["attn"]["c_proj"]["w"].T, "h.1.ln_1.bias": block["ln_1"]["b"]}
        theirs |= {"lm_head.weight": np.pad(PARAMS["wte"], [(0, 3), (0, 0)]), "logits": torch_run()["logits"]}
        found = compare(recording(), theirs, params=PARAMS)
        said = [row.said for row in found.rows]
        assert found.first is None and said == [["transposed, [out, in]"], [], ["padded to 64"], []]
        assert "3 parameters" in compare(recording(), theirs).notes[0]
        theirs["h.1.ln_1.bias"] = theirs["h.1.ln_1.bias"].astype(np.float16)
        row = compare(recording(), theirs, params=PARAMS).first
        assert row.name == "model/h1/ln_1/b" and row.said == ["rounded to float16"]


class TestOtherSenses:
    """Arrays that differ and mean the same."""

    @staticmethod
    def lens(**processing):
        """Everything that TransformerLens records."""
        sources = pytest.importorskip("transformer_lens.model_bridge.sources")
        torch = pytest.importorskip("torch")
        model = transformers_model(PARAMS, HPARAMS["n_head"])
        config = {"hf_config": model.config, "dtype": torch.float32}
        bridge = sources.build_bridge_from_module(model, "GPT2LMHeadModel", **config)
        bridge.enable_compatibility_mode(disable_warnings=True, **processing)
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(torch.tensor([IDS]))
        return {name: x.numpy() for name, x in cache.items()} | {"logits": logits.numpy()}

    def test_transformer_lens_processes_weights(self):
        found = compare(recording(), self.lens())
        assert found.first is None and found.n_missing == 0
        for name, row in rows(found).items():
            said = "; ".join(row.said)
            assert ("per position: centred" in said) == name.endswith(CENTRED), name
            assert ("folded bias" in said) == name.endswith(("hook_v", "hook_z")), name
            assert ("before gain and bias" in said) == name.endswith("hook_out"), name
        isolate(found, recording(), PARAMS)  # from what is equal in the reference's sense
        assert found.first is None and len(found.isolated) > 40

    def test_transformer_lens_leaves_weights_alone(self):
        found = compare(recording(), self.lens(no_processing=True))
        assert found.first is None and found.n_missing == 0
        assert {word for row in found.rows for word in row.said} == {"[n_seq, n_head, d]"}

    def test_hook_normalized_after_gain_and_bias(self):
        """As the LayerNorm of TransformerLens 2 has it, which has no hook_out."""
        arrays = {
            name: x for name, x in torch_run().items() if not name.endswith(("ln1.hook_out", "ln2.hook_out"))
        }
        del arrays["ln_final.hook_out"]
        for name in arrays:
            if name.endswith("hook_normalized"):
                arrays[name] = torch_run()[name.replace("normalized", "out")]
        found = compare(recording(), arrays)
        assert found.first is None and found.n_missing == 7
        assert rows(found)["ln_final.hook_out"].said == ["after gain and bias: hook_out"]

    def test_heads_in_another_order(self):
        order = [2, 0, 3, 1]
        found = compare(recording(), {n: x[order] if x.ndim == 3 else x for n, x in torch_run().items()})
        assert found.first is None
        assert rows(found)["blocks.2.attn.hook_pattern"].said == [
            "equal up to the order of heads: ours are your [1, 3, 0, 2]"
        ]
        isolate(found, recording(), PARAMS)
        assert found.first is None

    def test_a_constant_per_position_is_no_excuse_where_it_matters(self):
        for name in ("blocks.1.mlp.hook_pre", "blocks.1.ln1.hook_out", "blocks.1.attn.hook_q"):
            assert compare(recording(), changed(name, lambda x: x + 1)).first.name == name
        assert compare(recording(), changed("logits", lambda x: x + 1)).first is None

    def test_a_folded_bias_must_arrive(self):
        """v and z without their bias are right only if attn_out, which has it from c_proj then, is."""
        constant = np.arange(12, dtype=np.float32)
        arrays = changed("blocks.1.attn.hook_z", lambda x: x + constant)
        assert compare(recording(), arrays).first is None
        arrays["blocks.1.hook_attn_out"] = arrays["blocks.1.hook_attn_out"] + 0.5 * np.eye(1, 48, 3)
        assert compare(recording(), arrays).first.name == "blocks.1.attn.hook_z"
        del arrays["blocks.1.hook_attn_out"]
        assert compare(recording(), arrays).first.name == "blocks.1.attn.hook_z"

    @pytest.mark.parametrize(
        "dtype, faults",
        [
            ("bfloat16", ("bfloat16_weights", "bfloat16_activations")),
            ("bfloat16", ("bfloat16_weights",)),
            ("float16", ("float16_weights", "float16_activations")),
            ("float16", ("float16_weights",)),
        ],
    )
    def test_half_precision_is_said_and_equal_only_if_meant(self, dtype, faults):
        half = torch_run_everywhere(*faults)
        found = compare(recording(), half)
        assert found.first.name == "hook_embed" and found.half == dtype
        assert compare(recording(), half, dtype=dtype).first is None
        assert compare(recording(), torch_run(), dtype=dtype).first is None

    def test_a_wrong_gelu_does_not_hide_in_the_band_of_half_precision(self):
        """It lies within float16's; but the products before it would be off as well."""
        found = compare(recording(), torch_run("erf_gelu"))
        assert found.first.name == "blocks.1.mlp.hook_post" and not found.first.said and not found.half
        band = recording().manifest["tensors"][found.first.name]["band"]
        assert band["float32"] < found.first.error < band["float16"]

    def test_half_precision_must_explain_all_that_differs(self):
        half = torch_run_everywhere("float16_weights", "float16_activations")
        assert not compare(recording(), changed("logits", lambda x: x + np.eye(*x.shape), half)).half
        assert not compare(recording(), torch_run()).half
        embeddings = {name: x for name, x in torch_run().items() if name in ("hook_embed", "hook_pos_embed")}
        assert compare(recording(), half | embeddings).half == "float16"  # products only, as under autocast


@functools.cache
def torch_run_everywhere(*faults):
    torch_gpt2 = pytest.importorskip("torch_gpt2")
    return torch_gpt2.torch_trace(PARAMS, HPARAMS["n_head"], IDS, dict.fromkeys(faults, "all"))


class TestFirstDivergence:
    @pytest.mark.parametrize(
        "fault, name",
        [
            ("erf_gelu", "mlp.hook_post"),
            ("variance_n-1", "ln1.hook_scale ln2.hook_scale"),
            ("rms_norm", "ln1.hook_scale ln1.hook_normalized ln2.hook_scale ln2.hook_normalized"),
            ("no_gain", "ln1.hook_out ln2.hook_out"),
            ("no_ln_2", "mlp.hook_pre"),
            ("transposed_c_attn", "attn.hook_q attn.hook_k attn.hook_v"),
            ("transposed_c_proj", "hook_attn_out"),
            ("no_scale", "attn.hook_attn_scores"),
            ("mask_sees_next", "attn.hook_pattern"),
            ("mask_hides_self", "attn.hook_attn_scores"),
            ("softmax_over_queries", "attn.hook_pattern"),
            ("heads_merged_wrong", "hook_attn_out"),
            ("no_bias_c_fc", "mlp.hook_pre"),
            ("no_residual_attn", "hook_resid_mid"),
        ],
    )
    def test_is_where_the_fault_was_planted_and_isolation_blames_nothing_else(self, fault, name):
        found = compare(recording(), torch_run(fault))
        isolate(found, recording(), PARAMS)
        wrong = [row.name for row in found.isolated if not row.equal and row.name.startswith("blocks")]
        assert wrong == [f"blocks.1.{hook}" for hook in name.split()]
        assert found.first.name == wrong[0]
        assert len(wrong) < sum(not row.equal for row in found.rows)  # the rest has only inherited it

    @pytest.mark.parametrize("size", ["full", "tiny"])
    def test_another_row_than_the_last(self, size):
        first = {name: x[..., :1, :] for name, x in torch_run("erf_gelu").items()}
        found = compare(recording(size), first)
        assert found.notes == [f"your row is row 0 of the reference, not the last, row {N_SEQ - 1}"]
        assert "MINE holds only row 0: " in lacking(found.rows, N_SEQ)
        wrong = {name: x[..., -1:, :] for name, x in torch_run("erf_gelu").items()}
        assert not compare(recording(size), wrong).notes
        wrong["hook_embed"] = first["hook_embed"]  # another token at the right place
        assert not compare(recording(size), wrong).notes

    def test_one_is_no_plural(self):
        lines = list(table(compare(recording(), {"logits": 2 * torch_run()["logits"], "a": np.ones(1)})))
        assert not any("follow" in line for line in lines) and lines[4].startswith("1 tensor compared;")
        assert lines[5] == "1 name in MINE means nothing here: 'a'"
        wrong = {"logits": 2 * torch_run()["logits"], "ln_final.hook_out": torch_run()["logits"][:, :48]}
        assert "   1 follows; 1 differs, perhaps in consequence: --isolate tells" in table(
            compare(recording(), wrong)
        )
        right = changed("ln_final.hook_out", lambda x: x + np.eye(*x.shape))
        assert "   1 follows; 0 differ" in table(compare(recording(), right))

    def test_where_the_worst_element_is(self):
        def change(x):
            x[2, 5, 3] += 1
            return x

        row = compare(recording(), changed("blocks.2.attn.hook_k", change)).first
        assert row.name == "blocks.2.attn.hook_k" and row.where == [2, 5, 3]
        assert row.error == pytest.approx(1, abs=1e-5)
        row = compare(
            recording(), changed("blocks.2.attn.hook_k", lambda x: change(x)[:, 5:6].repeat(17, 1))
        ).first
        assert row.mine[:5] != row.reference[:5] and len(row.mine) == 5
        assert abs(row.there[0] - row.there[1]) == row.error

    def test_another_number_of_heads(self):
        row = compare(recording(), torch_run("wrong_n_head")).first
        assert row.name == "blocks.1.attn.hook_q" and row.said == ["3 heads, the model has 4"]

    def test_an_array_under_the_name_of_another(self):
        found = compare(recording(), torch_run("no_residual_attn"))
        assert found.notes == ["blocks.1.hook_resid_mid holds what is blocks.1.hook_attn_out in the reference"]

    def test_a_smoke_reference_finds_it_in_sums_projections_or_first_values(self):
        row = compare(recording("smoke"), torch_run("erf_gelu")).first
        assert row.name == "blocks.1.mlp.hook_post" and row.where[0] in ("sum", "projection", "number 0")
        swapped = changed("blocks.1.attn.hook_q", lambda x: x[:, [0, 1, 2, 4, 3, *range(5, N_SEQ)]])
        assert compare(recording("smoke"), swapped).first.where == ["projection"]


class TestReport:
    def test_table(self, folder, capsys):
        status, out, err = run(capsys, folder / "full", save(folder / "x.npz", torch_run("erf_gelu")))
        assert (status, err) == (1, "")
        lines = out.splitlines()
        assert max(map(len, lines)) <= WIDTH and "\033" not in out
        marked = [line for line in lines if line.startswith(">>")]
        assert len(marked) == 1 and marked[0].split()[1:3] == ["blocks.1.mlp.hook_post", "17x192"]
        at = lines.index(marked[0])
        assert at == 1 + 2 + 19 + 16  # header, embeddings, block 0, and what precedes it in block 1
        x = torch_run("erf_gelu")["blocks.1.mlp.hook_post"].astype(np.float64)
        numbers = [f"{y:.5g}" for y in x.ravel()[:5]]
        worst = tuple(map(int, marked[0].split()[4].split(",")))
        assert lines[at + 1].split() == ["mine", *numbers, "worst", f"{x[worst]:.6g}"]
        assert lines[at + 3].split()[0] == "25"
        assert lines[-2].startswith("no diagnosis: the reference does not say which model")
        assert lines[-1].startswith("DIFFERENT, first in blocks.1.mlp.hook_post")

    def test_colour_only_at_a_terminal(self, folder, capsys, monkeypatch):
        mine = save(folder / "x.npz", torch_run("erf_gelu"))
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert run(capsys, folder / "full", mine)[1].count("\033[1;31m>>") == 1
        monkeypatch.setenv("NO_COLOR", "1")
        assert "\033" not in run(capsys, folder / "full", mine)[1]

    def test_every_line_of_every_kind_fits(self):
        for fault in ("erf_gelu", "bfloat16_activations", "wrong_n_head", "mask_hides_self", "no_residual_mlp"):
            found = compare(recording(), torch_run(fault))
            isolate(found, recording(), PARAMS)
            assert max(map(len, table(found))) <= WIDTH

    def test_json(self, folder, capsys):
        def strict(constant):
            raise AssertionError(f"{constant} is not JSON")

        mine = save(folder / "x.npz", torch_run("mask_hides_self") | {"probs": np.zeros(3)})
        status, out, _ = run(capsys, folder / "full", mine, "--json")
        says = json.loads(out, parse_constant=strict)
        assert status == 1 and not says["equal"] and says["unknown"] == ["probs"]
        assert says["first_divergence"] == "blocks.1.attn.hook_attn_scores"
        tensors = {tensor["name"]: tensor for tensor in says["tensors"]}
        assert list(tensors) == list(recording().tensors)
        wrong = tensors["blocks.1.attn.hook_attn_scores"]
        assert wrong["multiple"] is None and wrong["mine"][2] is None and not wrong["equal"]
        centred = {
            name: x - x.mean(axis=-1, keepdims=True) for name, x in torch_run().items() if name == "logits"
        }
        out = run(capsys, folder / "full", save(folder / "y.npz", centred), "--json")[1]
        assert json.loads(out)["tensors"][0]["said"] == ["equal up to a constant per position: centred"]
        right = tensors["blocks.0.mlp.hook_pre"]
        assert right["equal"] and right["multiple"] == right["error"] / right["band"] < 1

    def test_a_map(self, folder, capsys):
        mine = save(folder / "x.npz", {"what_comes_out": torch_run()["logits"]})
        assert "--map" in refused(capsys, folder / "full", mine)
        (folder / "map.json").write_text('{"what_comes_out": "lm_head"}')
        assert run(capsys, folder / "full", mine, "--map", folder / "map.json")[0] == 0
        for content in ('{"what_comes_out": 3}', "[]", "{", '{"else": "logits"}', '{"what_comes_out": "x"}'):
            (folder / "map.json").write_text(content)
            assert "map" in refused(capsys, folder / "full", mine, "--map", folder / "map.json")


class TestWithWeights:
    @pytest.fixture
    def model(self, folder):
        save_checkpoint(folder / "models" / "mine", HPARAMS, PARAMS)
        return folder / "models" / "mine"

    def test_isolate_and_diagnosis(self, folder, model, capsys):
        arrays = {name: x for name, x in torch_run("erf_gelu").items() if "blocks.2" not in name}
        mine = save(folder / "x.npz", arrays)
        argv = (folder / "full", mine, "--isolate", "--model_size", "mine", "--models_dir", model.parent)
        status, out, err = run(capsys, *argv)
        assert (status, err) == (1, "")
        assert "operations recomputed from their own inputs: 1 is wrong" in out
        assert "erf GELU" in out and "layer 1" in out
        assert "differ, perhaps in consequence\n" in out and "--isolate" not in out
        lines = [line.split() for line in out.splitlines() if line.startswith("      ")]
        assert [line[0] for line in lines] == ["mine", "reference", "mine", "right"]
        assert lines[1] != lines[3]
        assert json.loads(run(capsys, *argv, "--json")[1])["diagnosis"]

    def test_the_last_row_cannot_be_recomputed_and_is_not_called_right(self, folder, model, capsys):
        named = ("--model_size", model)
        rest = "operations cannot be recomputed from it; record all rows, and the mistake can be named"
        arrays = {name: x[..., -1:, :] for name, x in torch_run("erf_gelu").items()}
        mine = save(folder / "x.npz", arrays)
        for option in ((), ("--isolate",)):
            says = json.loads(run(capsys, folder / "full", mine, *named, "--json", *option)[1])
            assert says["notes"] == [f"MINE holds only the last row (row {N_SEQ - 1}): {rest}"]
            assert not says["diagnosis"] and says["first_divergence"] == "blocks.1.mlp.hook_post"
            out = run(capsys, folder / "full", mine, *named, *option)[1]
            assert "MINE holds only the last row" in out and "--isolate tells" not in out
        whole = {name: arrays[name] for name in arrays if name >= "blocks.1.m"}
        mine = save(folder / "x.npz", {**torch_run(), **whole})
        out = run(capsys, folder / "full", mine, *named)[1]
        assert f"(row {N_SEQ - 1}) of {len(whole)} tensors: operations" in out and "no operation" not in out
        mine = save(folder / "x.npz", {name: x[..., -1:, :] for name, x in torch_run().items()})
        assert run(capsys, folder / "full", mine, *named)[1].endswith("not in MINE\nEQUAL\n")
        assert "cannot be recomputed" in run(capsys, folder / "full", mine, *named, "--isolate")[1]
        rows = recording("tiny").manifest["positions"]
        mine = save(folder / "x.npz", {name: x[..., rows, :] for name, x in torch_run("erf_gelu").items()})
        assert "MINE holds only rows 0, 5, 10, 16: " in run(capsys, folder / "tiny", mine, *named)[1]

    def test_what_is_wrong_by_little_is_still_said_to_be_noise(self, folder, model, capsys):
        """Outside the band, but not tenfold: then, and only then, no operation is wrong."""
        name = "blocks.0.attn.hook_q"
        band = recording().manifest["tensors"][name]["band"]["float32"]
        mine = save(folder / "x.npz", changed(name, lambda x: x + 2 * band * np.eye(*x.shape[1:])))
        out = run(capsys, folder / "full", mine, "--model_size", model)[1]
        assert "no operation that MINE recorded strays more than 10 bands" in out
        mine = save(folder / "x.npz", {"ln_f.bias": PARAMS["ln_f"]["b"] + 1})
        out = run(capsys, folder / "full", mine, "--model_size", model)[1]
        assert "DIFFERENT, first in model/ln_f/b" in out and "no operation" not in out

    def test_half_precision_is_proposed_unless_a_mistake_explains_it(self, folder, model, capsys):
        said = "what differs is no further off than float16 would be; if that is meant: --dtype float16"
        half = torch_run_everywhere("float16_weights", "float16_activations")
        out = run(capsys, folder / "full", save(folder / "x.npz", half), "--model_size", model)[1]
        assert said in out and "rounded to float16" in out
        wrong = {name: x for name, x in torch_run("erf_gelu").items() if name >= "blocks.1.mlp"}
        del wrong["blocks.1.mlp.hook_pre"]
        mine = save(folder / "y.npz", wrong)
        assert said in run(capsys, folder / "full", mine)[1]  # nobody knows better without the weights
        out = run(capsys, folder / "full", mine, "--model_size", model)[1]
        assert "erf GELU" in out and said not in out

    def test_a_model_that_is_found_from_elsewhere_only(self, folder, model, capsys):
        manifest = {
            **recording().manifest,
            "model": {**recording().manifest["model"], "name": "models/elsewhere"},
        }
        Recording(manifest, recording().tensors).save(folder / "named")
        mine = save(folder / "x.npz", torch_run("erf_gelu"))
        said = "the recording is of models/elsewhere, which is not found here: give --model_size PATH"
        assert said in run(capsys, folder / "named", mine)[1]
        assert said in refused(capsys, folder / "named", mine, "--isolate")
        assert "erf GELU" in run(capsys, folder / "named", mine, "--model_size", model)[1]

    def test_the_model_is_found_by_its_name_and_never_fetched(self, folder, model, capsys, monkeypatch):
        mine = save(folder / "x.npz", changed("logits", lambda x: 2 * x))
        manifest = {**recording().manifest, "model": {**recording().manifest["model"], "name": str(model)}}
        Recording(manifest, recording().tensors).save(folder / "named")
        assert "no diagnosis" not in run(capsys, folder / "named", mine)[1]
        monkeypatch.setattr("picogpt.download.download", None)
        err = refused(
            capsys, folder / "full", mine, "--isolate", "--model_size", "124M", "--models_dir", folder
        )
        assert "124M are not here" in err

    def test_other_weights_are_refused(self, folder, model, capsys):
        save_checkpoint(folder / "other", HPARAMS, {**PARAMS, "wpe": PARAMS["wpe"] + 1})
        mine = save(folder / "x.npz", torch_run())
        err = refused(capsys, folder / "full", mine, "--isolate", "--model_size", folder / "other")
        assert "other weights" in err

    def test_other_ids_are_said(self, folder, model, capsys):
        torch_gpt2 = pytest.importorskip("torch_gpt2")
        others = [1, *IDS[1:]] if IDS[0] != 1 else [2, *IDS[1:]]
        mine = save(folder / "x.npz", torch_gpt2.torch_trace(PARAMS, 4, others))
        err = refused(capsys, folder / "full", mine, "--model_size", model)
        assert f"other ids: [{others[0]}, " in err


class TestUnusable:
    """One line, exit status 2."""

    def test_exchanged_names(self, folder, capsys):
        arrays, q, k = dict(torch_run()), "blocks.1.attn.hook_q", "blocks.1.attn.hook_k"
        arrays[q], arrays[k] = arrays[k], arrays[q]
        err = refused(capsys, folder / "full", save(folder / "x.npz", arrays))
        assert f"{q} holds what is {k}" in err and f"{k} holds what is {q}" in err

    def test_projections_alone_may_be_in_another_order(self):
        """Without what is computed from them, exchanged q and k are c_attn read in another order as well."""
        arrays = torch_run("order_kqv")
        found = compare(
            recording(),
            {name: arrays[name] for name in arrays if name.endswith(("1.attn.hook_q", "1.attn.hook_k"))},
        )
        assert found.first.name == "blocks.1.attn.hook_q"
        assert "holds what is" in found.notes[0]

    def test_a_constant_that_swallows_everything_is_not_equal(self):
        for filled in (-3.4e38, 3e38, 1e12):
            logits = np.full_like(torch_run()["logits"], filled)
            assert compare(recording(), {"logits": logits}).first.name == "logits"

    @pytest.mark.parametrize(
        "fault, says",
        [
            ("no_mask", "sees the future"),
            ("mask_sees_next", "sees one key too many"),
            ("mask_after_softmax", "is masked after the softmax"),
        ],
    )
    def test_a_wrong_mask_is_named_when_scores_are_recorded(self, fault, says):
        found = compare(recording(), torch_run(fault))
        (said,) = diagnosed(found, recording(), PARAMS)
        assert says in said and "no known mistake" not in said

    def test_the_status_is_no_verdict_if_nobody_reads_it(self, folder):
        mine = save(folder / "x.npz", torch_run("erf_gelu"))
        command = [sys.executable, "-m", "picogpt.compare", str(folder / "full"), str(mine)]
        reader, writer = os.pipe()
        os.close(reader)
        ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert (ran.returncode, ran.stderr) == (2, b"")

    def test_exchanged_projections_are_a_mistake(self):
        """As long as something else differs, it is not the names that are wrong."""
        found = compare(recording(), torch_run("order_kqv"))
        assert found.first.name == "blocks.1.attn.hook_q"
        assert found.notes[0] == "blocks.1.attn.hook_q holds what is blocks.1.attn.hook_k in the reference"

    @pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
    def test_what_is_no_number(self, folder, capsys, wrong):
        def change(x):
            x[3, 5] = wrong
            return x

        err = refused(capsys, folder / "full", save(folder / "x.npz", changed("blocks.1.mlp.hook_pre", change)))
        assert f"blocks.1.mlp.hook_pre holds {wrong} at [3, 5]" in err

    def test_nan_in_a_cell_that_is_not_masked(self, folder, capsys):
        def change(x):
            x[1, 3, 3] = np.nan
            return x

        mine = save(folder / "x.npz", changed("blocks.0.attn.hook_attn_scores", change))
        assert "nan at [1, 3, 3]" in refused(capsys, folder / "full", mine)

    def test_other_ids_and_other_lengths(self, folder, capsys):
        mine = save(folder / "x.npz", {"input_ids": np.array([[*IDS[:-1], IDS[-1] ^ 1]]), **torch_run()})
        assert "input_ids" in refused(capsys, folder / "full", mine)
        mine = save(folder / "x.npz", {"input_ids": np.array([IDS]), **torch_run()})
        assert run(capsys, folder / "full", mine)[0] == 0
        shorter = save(folder / "y.npz", {"logits": torch_run()["logits"][:-1]})
        assert "logits is [16, 61]" in refused(capsys, folder / "full", shorter)

    def test_a_trace_of_another_model_or_text(self, folder, capsys):
        others = random_params(**HPARAMS, dtype=np.float32, seed=1)
        record(IDS, others, 4).save(folder / "other")
        assert "another model" in refused(capsys, folder / "full", folder / "other")
        mine = save(folder / "x.npz", Recording.load(folder / "other").tensors)
        assert "another model" in refused(capsys, folder / "full", mine)
        record(IDS[::-1], PARAMS, 4).save(folder / "backwards")
        assert "other ids" in refused(capsys, folder / "full", folder / "backwards")

    def test_files_that_are_none(self, folder, capsys):
        mine = save(folder / "x.npz", torch_run())
        content = mine.read_bytes()
        mine.write_bytes(content[: len(content) // 2])
        assert "x.npz" in refused(capsys, folder / "full", mine)
        assert "missing" in refused(capsys, folder / "full", folder / "nothing.npz")
        for none in ("nowhere", "empty"):
            err = refused(capsys, folder / none, mine)
            assert f"{none} is no recording: `python -m picogpt.trace TEXT -o {folder / none}` makes one" in err
            (folder / "empty").mkdir(exist_ok=True)
        assert "nowhere is no recording" in refused(capsys, folder / "nowhere", folder / "full")
        assert "TEXT -o truth`" in refused(capsys, mine, mine)
        err = refused(capsys, mine, folder / "full")
        assert f"the recording comes first: compare {folder / 'full'} {mine}" in err
        err = refused(capsys, folder / "full", folder / "empty")
        assert '{"logits": {"file": "logits.bin", "shape": [5, 50257]}}' in err
        assert "smoke" in refused(capsys, folder / "full", folder / "smoke")
        assert "no name in MINE is known" in refused(
            capsys, folder / "full", save(folder / "y.npz", {"a": np.ones(2)})
        )

    def test_names_that_are_not_known_and_where_they_are(self, folder, capsys):
        err = refused(capsys, folder / "full", save(folder / "y.npz", {"a": np.ones(2)}))
        assert '{"their name": "blocks.0.hook_resid_post"}' in err and "implementing-gpt2.md, section 3" in err
        page = Path(__file__).parent.parent / "docs" / "implementing-gpt2.md"
        section = re.search(r"^## 3\..*?^## 4", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)[0]
        assert "hook_resid_post" in section

    def test_weights_are_no_intermediates(self, folder, capsys):
        weights = save(folder / "x.npz", {"transformer.wte.weight": PARAMS["wte"], "wpe": PARAMS["wpe"]})
        err = refused(capsys, folder / "full", weights)
        assert "these are weights, not intermediates ('transformer.wte.weight', 'wpe')" in err

    def test_of_what_the_recording_is(self, folder, capsys):
        manifest = {**recording().manifest, "text": "To be", "model": {**recording().manifest["model"]}}
        manifest["model"]["name"] = "mine"
        Recording(manifest, recording().tensors).save(folder / "named")
        for wrong in ({"hook_embed": np.ones((4, 48))}, {"h.0.ln_1.weight": np.ones(5)}, {"fch": np.ones(9)}):
            err = refused(capsys, folder / "named", save(folder / "x.npz", wrong))
            assert err.endswith("; the recording is of 'To be' (17 tokens) by mine\n")
        err = refused(capsys, folder / "full", save(folder / "x.npz", wrong))
        assert f"; the recording is of [{IDS[0]}, " in err and err.endswith(" (17 tokens)\n")

    def test_what_a_smoke_reference_cannot_tell(self, folder, capsys):
        last = save(folder / "x.npz", {"logits": torch_run()["logits"][-1]})
        assert "1 of 17 rows" in refused(capsys, folder / "smoke", last)
        centred = save(folder / "y.npz", changed("logits", lambda x: x - x.mean(axis=-1, keepdims=True)))
        assert "centred" in refused(capsys, folder / "smoke", centred)

    def test_isolate_in_half_precision(self, folder, capsys):
        mine = save(folder / "x.npz", torch_run())
        assert "--dtype" in refused(capsys, folder / "full", mine, "--isolate", "--dtype", "float16")

    def test_isolate_with_a_smoke_reference(self, folder, capsys):
        mine = save(folder / "x.npz", torch_run("erf_gelu"))
        err = refused(capsys, folder / "smoke", mine, "--isolate")
        assert "leave out --isolate, or record with --size full" in err and "--dtype" not in err
        assert "--isolate" not in run(capsys, folder / "smoke", mine)[1]

    def test_help(self, capsys):
        with pytest.raises(SystemExit):
            main(["--help"])
        said = " ".join(capsys.readouterr().out.split())
        for word in ("tensors.json", "token ids, with --model_size", "docs/implementing-gpt2.md"):
            assert word in said


class TestIds:
    def test_a_tie_and_a_real_difference(self):
        """Two tokens with almost one embedding have almost one logit; the oracle says which token is best."""
        torch = pytest.importorskip("torch")
        prompt = [t for t in IDS if t not in (5, 9)]
        params = {**PARAMS, "wte": PARAMS["wte"].copy()}
        with torch.no_grad():
            model = transformers_model(random_params(**HPARAMS, dtype=np.float64), HPARAMS["n_head"])
            model.load_state_dict(
                {n: x.double() for n, x in transformers_model(PARAMS, 4).state_dict().items()}
            )
            logits = model(torch.tensor([prompt])).logits[0, -1].numpy()
        best = int(logits.argmax())
        twin = next(t for t in range(61) if t not in (*prompt, best))
        params["wte"][twin] = np.nextafter(params["wte"][best], np.float32(0))
        equal, said = compare_ids([*prompt, best, 1], [*prompt, twin, 2], params, 4)
        assert equal and said.startswith("TIE WITHIN NOISE") and f"id {len(prompt)} is {best}" in said
        assert "behind" in said  # it is no exact tie
        second = int(logits.argsort()[-2])
        for a, b in ((best, second), (second, best)):
            equal, said = compare_ids([*prompt, a], [*prompt, b], PARAMS, 4)
            margin = f"{second} is {logits[best] - logits[second]:.3g} behind"
            assert (
                not equal and said.startswith("REAL DIFFERENCE") and margin in said and f"takes {best}" in said
            )
        # Of two that are equally bad neither is greedy's choice.
        params["wte"][twin] = params["wte"][second]
        assert not compare_ids([*prompt, second], [*prompt, twin], params, 4)[0]

    def test_files_of_ids(self, tmp_path, capsys):
        model = "shakespeare"
        (tmp_path / "a").write_text("[396, 304, 11, 529]")
        (tmp_path / "b").write_text("396 304,11\n529\n")
        (tmp_path / "c").write_text("396, 304, 11, 529, 321")
        (tmp_path / "d").write_text("396 304 11 1")
        (tmp_path / "e").write_text("7 304 11 1")
        (tmp_path / "f").write_text("396 304 11 1024")
        a, b, c, d, e, f = (tmp_path / name for name in "abcdef")
        assert run(capsys, a, b, "--model_size", model) == (0, "EQUAL: 4 ids\n", "")
        assert run(capsys, a, c, "--model_size", model)[:2] == (0, "EQUAL: 4 ids; one list has 1 more\n")
        status, out, _ = run(capsys, a, d, "--model_size", model)
        assert status == 1 and out.startswith("REAL DIFFERENCE: id 3 is 529 in one list, 1 in the other")
        says = json.loads(run(capsys, a, d, "--model_size", model, "--json")[1])
        assert says == {"equal": False, "said": out[:-1]}
        assert "prompt" in refused(capsys, a, e, "--model_size", model)
        assert "1024" in refused(capsys, a, f, "--model_size", model)
        assert "--model_size" in refused(capsys, a, b)
        np.save(tmp_path / "x.npy", np.ones(3))
        assert "token ids" in refused(capsys, a, tmp_path / "x.npy", "--model_size", model)

    def test_more_ids_than_positions(self):
        n = HPARAMS["n_ctx"]
        assert not compare_ids([1] * n + [2], [1] * n + [3], PARAMS, 4)[1].startswith("EQUAL")
        with pytest.raises(PicogptError, match=f"1 to {n}"):
            compare_ids([1] * (n + 1) + [2], [1] * (n + 1) + [3], PARAMS, 4)
