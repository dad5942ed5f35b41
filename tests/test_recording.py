"""A recording on disk: what stands in it, its three sizes, and damage."""

import hashlib
import json

import numpy as np
import pytest

from models import SMALL, astype, random_ids, random_params
from picogpt.names import names
from picogpt.recording import SMOKE, Recording, RecordingError, record, weights_digest
from picogpt.trace import run_with_trace, with_outs

PARAMS = astype(random_params(**SMALL), np.float32)
EXACT = astype(PARAMS, np.float64)
IDS = random_ids(9, SMALL["n_vocab"])
TRUTH = with_outs(run_with_trace(IDS, EXACT, 3)[1], EXACT)


@pytest.fixture(scope="module")
def recordings():
    return {size: record(IDS, PARAMS, 3, size=size, name="small") for size in ("full", "tiny", "smoke")}


class TestRecord:
    def test_the_model_is_described(self, recordings):
        manifest = recordings["full"].manifest
        assert manifest["ids"] == IDS
        assert manifest["model"]["hparams"] == SMALL
        assert manifest["model"]["name"] == "small"
        assert manifest["dtype"] == "float64"
        assert manifest["made_by"]["numpy"] == np.__version__
        assert manifest["made_by"]["blas"][0]["threads"] >= 1

    def test_full_holds_the_float64_run(self, recordings):
        tensors = recordings["full"].tensors
        assert list(tensors) == [name.hook for name in names(2)]
        for name, value in tensors.items():
            assert value.dtype == np.float64
            assert np.array_equal(value, TRUTH[name])

    def test_tiny_holds_some_rows_and_the_last(self, recordings):
        positions = recordings["tiny"].manifest["positions"]
        assert positions == [0, 2, 5, 8]
        for name, value in recordings["tiny"].tensors.items():
            assert np.array_equal(value, TRUTH[name][..., positions, :])

    def test_smoke_holds_numbers_only(self, recordings):
        assert recordings["smoke"].tensors == {}
        says = recordings["smoke"].manifest["tensors"]
        assert list(says) == [name for name in TRUTH if name.endswith(SMOKE)]
        assert len(json.dumps(says)) < 250 * len(says)
        full = recordings["full"].manifest["tensors"]
        for name in says:
            assert says[name]["sum"] == pytest.approx(full[name]["sum"], rel=1e-7)

    def test_statistics_leave_masked_cells_out(self, recordings):
        for size in "full", "tiny":
            for name, says in recordings[size].manifest["tensors"].items():
                value = TRUTH[name]
                if value.shape == (3, 9, 9):
                    value = np.concatenate([head[np.tril_indices(9)] for head in value])
                assert says["shape"] == list(TRUTH[name].shape)
                assert says["mean"] == pytest.approx(value.mean())
                assert says["std"] == pytest.approx(value.std())
                assert says["largest"] == np.abs(value).max()
                assert says["sum"] == pytest.approx(value.sum())
                assert says["first"] == pytest.approx(value.ravel()[:3].tolist(), rel=1e-7)

    def test_the_weights_have_one_digest_whatever_their_dtype(self):
        assert weights_digest(PARAMS) == weights_digest(EXACT)
        other = {**PARAMS, "wte": PARAMS["wte"] + np.float32(1e-3)}
        assert weights_digest(other) != weights_digest(PARAMS)

    def test_one_token(self):
        recording = record([3], PARAMS, 3, size="tiny")
        assert recording.manifest["positions"] == [0]
        assert recording.tensors["logits"].shape == (1, 23)


class TestFiles:
    @pytest.mark.parametrize("size", ["full", "tiny", "smoke"])
    def test_come_back_as_they_were(self, recordings, size, tmp_path):
        recordings["full"].save(tmp_path)  # what is there is replaced
        recordings[size].save(tmp_path)
        back = Recording.load(tmp_path)
        assert back.manifest == recordings[size].manifest
        assert list(back.tensors) == list(recordings[size].tensors)
        for name, value in back.tensors.items():
            assert np.array_equal(value, recordings[size].tensors[name])
        assert (tmp_path / "trace.safetensors").exists() == (size != "smoke")

    def test_the_safetensors_library_reads_them(self, recordings, tmp_path):
        load_file = pytest.importorskip("safetensors.numpy").load_file
        recordings["full"].save(tmp_path)
        found = load_file(tmp_path / "trace.safetensors")
        says = recordings["full"].manifest["tensors"]
        assert found.keys() == says.keys()
        for name, value in found.items():
            assert np.array_equal(value, TRUTH[name])
            assert hashlib.sha256(value.tobytes()).hexdigest() == says[name]["sha256"]

    def test_an_infinite_band_is_null(self, recordings, tmp_path):
        large = {**PARAMS, "wte": PARAMS["wte"] * np.float32(1e6)}
        record(IDS, large, 3, size="tiny").save(tmp_path)
        manifest = json.loads((tmp_path / "manifest.json").read_text("utf-8"), parse_constant=pytest.fail)
        assert manifest["tensors"]["hook_embed"]["band"]["float16"] is None


class TestOthers:
    """What is somebody else's is not replaced."""

    @pytest.mark.parametrize("name", ["manifest.json", "trace.safetensors"])
    def test_files(self, recordings, tmp_path, name):
        (tmp_path / name).write_text('{"name": "my app"}')
        with pytest.raises(RecordingError, match=f"{name} is no recording of ours: give -o another directory"):
            recordings["smoke"].save(tmp_path)
        assert (tmp_path / name).read_text() == '{"name": "my app"}'
        assert len(list(tmp_path.iterdir())) == 1


class TestDamage:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
            (lambda d: (d / "manifest.json").write_text("{"), "not JSON"),
            (lambda d: (d / "manifest.json").write_text("{}"), "its \"format\" is not 'picogpt trace 1'"),
            (lambda d: edit(d, ids=None), "its ids are not tokens of the model"),
            (lambda d: edit(d, ids=[1, "2"]), "its ids are not tokens of the model"),
            (lambda d: edit(d, ids=[1]), "its positions are not those of its size"),
            (lambda d: edit(d, positions=[]), "its positions are not those of its size"),
            (lambda d: edit(d, size="huge"), "its positions are not those of its size"),
            (lambda d: edit(d, model={}), "it does not say the n_vocab"),
            (lambda d: edit(d, model={"hparams": {**SMALL, "n_head": 0}}), "it does not say the n_vocab"),
            (lambda d: edit(d, model={"hparams": {**SMALL, "n_layer": 10**7}}), "its tensors are not those"),
            (lambda d: edit(d, model={"hparams": SMALL, "name": 5}), "the model's name is no text"),
            (lambda d: edit(d, tensors={}), "its tensors are not those of the model"),
            (lambda d: edit(d, tensors={"logits": 1}), "its tensors are not those of the model"),
            (lambda d: edit_logits(d, band=1), "logits has no band"),
            (lambda d: edit_logits(d, band={"float32": 1.0}), "logits has no band"),
            (lambda d: edit_logits(d, largest=None), "what it says of logits are no numbers"),
            (lambda d: edit_logits(d, shape="ab"), "logits is not [9, 23]"),
            (lambda d: (d / "trace.safetensors").unlink(), "trace.safetensors"),
            (lambda d: shorten(d / "trace.safetensors"), "trace.safetensors"),
            (lambda d: flip(d / "trace.safetensors"), "logits is not what the manifest says"),
        ],
    )
    def test_is_one_line(self, recordings, tmp_path, damage, message):
        recordings["tiny"].save(tmp_path)
        damage(tmp_path)
        with pytest.raises(RecordingError) as caught:
            Recording.load(tmp_path)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def edit(directory, **changes):
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def edit_logits(directory, **changes):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["tensors"]["logits"] |= changes
    path.write_text(json.dumps(manifest), "utf-8")


def shorten(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
