"""run_with_trace and its command: names, order, copies, hooks. Values are compared in test_trace_oracles.py."""

import json
import subprocess
import sys

import numpy as np
import pytest

from models import SMALL, astype, jax_params, random_ids, random_params
from picogpt.model import gpt2
from picogpt.names import names, tapped
from picogpt.trace import TraceError, main, run_with_trace, tree_map, with_outs

PARAMS = random_params(**SMALL)
IDS = random_ids(7, SMALL["n_vocab"])
LENGTHS = {**SMALL, "n_seq": len(IDS), "d": SMALL["n_embd"] // SMALL["n_head"], "1": 1}
LENGTHS["4*n_embd"] = 4 * SMALL["n_embd"]


def traced(**options):
    return run_with_trace(IDS, PARAMS, SMALL["n_head"], **options)


class TestTrace:
    def test_names_and_shapes_are_those_of_the_table_in_order(self):
        logits, trace = traced()
        whole = with_outs(trace, PARAMS)
        assert list(trace) == tapped(2)
        assert list(whole) == [name.hook for name in names(2)]
        for name in names(2):
            assert whole[name.hook].shape == tuple(LENGTHS[axis] for axis in name.shape.split(", ")), name
        assert np.array_equal(logits, gpt2(IDS, **PARAMS, n_head=3))
        assert np.array_equal(trace["logits"], logits)

    def test_holds_copies(self):
        """What the network computes in place afterwards must not reach what has been noted."""
        seen = {}
        hooks = [(name, lambda value, hook: seen.update({hook.name: value.copy()})) for name in tapped(2)]
        _, trace = traced(fwd_hooks=hooks)
        assert list(seen) == list(trace)
        for name, value in seen.items():
            assert np.array_equal(trace[name], value), name

    def test_options_reach_gpt2(self):
        logits, trace = traced(position_ids=np.arange(3, 10), logits_to_keep=slice(-1, None))
        assert logits.shape == (1, 23)
        assert np.array_equal(trace["hook_pos_embed"], PARAMS["wpe"][3:10])

    def test_float32_stays_and_jax_runs(self):
        single = astype(PARAMS, np.float32)
        _, expected = run_with_trace(IDS, single, 3)
        assert {value.dtype for value in expected.values()} == {np.dtype("float32")}
        pytest.importorskip("jax")
        _, found = run_with_trace(IDS, jax_params(single), 3)
        assert list(found) == list(expected)
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)


class TestHooks:
    def test_what_is_returned_takes_the_place(self):
        """A head whose values are zero adds to the residual stream what its rows of c_proj make of nothing."""

        def ablate(z, hook):
            assert hook.name == "blocks.1.attn.hook_z"
            return np.where(np.arange(3)[:, None, None] == 2, 0.0, z)

        _, trace = traced(fwd_hooks=[("blocks.1.attn.hook_z", ablate)])
        assert not trace["blocks.1.attn.hook_z"][2].any()
        block = tree_map(lambda w: w, PARAMS["blocks"][1])
        w = block["attn"]["c_proj"]["w"].copy()
        w[8:] = 0.0  # the rows of the third head
        block["attn"]["c_proj"]["w"] = w
        expected = gpt2(IDS, **{**PARAMS, "blocks": [PARAMS["blocks"][0], block]}, n_head=3)
        np.testing.assert_allclose(trace["logits"], expected, rtol=1e-12)

    def test_changes_in_place_count_and_none_leaves_the_value(self):
        def ablate(value, hook):
            value[:] = 0.0

        logits, trace = traced(fwd_hooks=[("blocks.0.hook_mlp_out", ablate)])
        assert np.array_equal(trace["blocks.0.hook_resid_post"], trace["blocks.0.hook_resid_mid"])
        assert not np.array_equal(logits, traced()[0])
        assert np.array_equal(PARAMS["wte"], random_params(**SMALL)["wte"])

    def test_patching_the_residual_stream_carries_the_whole_run_over(self):
        _, other = run_with_trace(IDS[::-1], PARAMS, 3)
        name = "blocks.1.hook_resid_pre"
        patched, _ = traced(fwd_hooks=[(name, lambda value, hook: other[name])])
        assert np.array_equal(patched, other["logits"])

    def test_several_hooks_on_one_name_follow_one_another(self):
        hooks = [("hook_embed", lambda value, hook: value + 1), ("hook_embed", lambda value, hook: value * 2)]
        _, trace = traced(fwd_hooks=hooks)
        assert np.array_equal(trace["hook_embed"], (PARAMS["wte"][IDS] + 1) * 2)

    def test_the_dtype_stays(self):
        single = astype(PARAMS, np.float32)
        hooks = [("hook_embed", lambda value, hook: value * np.float64(1.0))]
        logits, _ = run_with_trace(IDS, single, 3, fwd_hooks=hooks)
        assert logits.dtype == np.float32

    def test_a_name_that_is_not_computed(self):
        with pytest.raises(TraceError, match=r"'blocks.0.hook_z': .*blocks.0.attn.hook_z.* is"):
            traced(fwd_hooks=[("blocks.0.hook_z", print)])

    def test_an_answer_of_another_shape(self):
        with pytest.raises(TraceError, match=r"hook_embed returned \(3,\): return the shape \(7, 12\)"):
            traced(fwd_hooks=[("hook_embed", lambda value, hook: np.zeros(3))])


class TestCommand:
    def run(self, *args, **options):
        command = [sys.executable, "-m", "picogpt.trace", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, **options)

    def test_records_a_text(self, tmp_path):
        ran = self.run("Speak, speak.", "-o", tmp_path / "new" / "reference")
        assert (ran.returncode, ran.stdout) == (0, "")
        assert "63 tensors" in ran.stderr
        manifest = json.loads((tmp_path / "new" / "reference" / "manifest.json").read_text("utf-8"))
        assert manifest["text"] == "Speak, speak."
        assert b"".join(map(bytes.fromhex, manifest["token_bytes"])) == b"Speak, speak."

    def test_reads_standard_input_and_ids(self, tmp_path):
        for args, given, ids in ((), "O\n", None), (("--ids", "[5, 6]"), "", [5, 6]):
            assert self.run(*args, "--size", "smoke", "-o", tmp_path, input=given).returncode == 0
            manifest = json.loads((tmp_path / "manifest.json").read_text("utf-8"))
            assert manifest["ids"] == ids if ids else manifest["text"] == "O"

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("",), "the prompt is empty"),
            (("--ids", "1,x"), "'1,x' are not token ids"),
            (("--ids", "5,1024"), "token id 1024 is not in the model's vocabulary"),
            (("--ids", "5,-1"), "token id -1 is not in the model's vocabulary"),
            (("a " * 300,), "do not fit into the model's 256 positions"),
            (("O", "--model_size", "nowhere"), "nowhere"),
            (("O", "--ids", "5"), "a text and --ids were given"),
            (("O", "-o", ""), "-o is empty"),
        ],
    )
    def test_what_a_careless_user_gives(self, capfd, tmp_path, args, message):
        assert main(["-o", str(tmp_path / "reference"), *args]) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
        assert not (tmp_path / "reference").exists()

    def test_a_place_that_cannot_be_written(self, capfd, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        assert main(["O", "-o", str(tmp_path / "file" / "reference")]) == 2
        assert "give -o another directory" in capfd.readouterr().err
