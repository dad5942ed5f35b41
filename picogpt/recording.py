"""A recorded run that others check against: the tensors, and a manifest that says what they are and how exact.

    DIR/trace.safetensors   the tensors in float64, under the names of names.py; not in size "smoke"
    DIR/manifest.json       the text, the model, how it was made; of each tensor its shape, statistics and bands

"full" holds every row of every tensor, "tiny" the last position and three before it (`positions`); "smoke" is a
manifest alone, some 20 kB for 124M, of what every port has at hand (SMOKE).
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from picogpt import PicogptError, __version__
from picogpt.checkpoint import load_hparams_and_params
from picogpt.hugging_face import parse_object
from picogpt.machine import blas, cores
from picogpt.model_dirs import ModelDirError, find_model_dir
from picogpt.names import names
from picogpt.noise import HALVES, noise_bands, projection, total
from picogpt.tensor_bundle import CheckpointError, new_file, read_small_file, reading
from picogpt.tensor_files import MANIFEST, TRACE, TensorFileError, read_tensors_file, write_safetensors
from picogpt.trace import astype, run_with_trace, with_outs

FORMAT = "picogpt trace 1"
SIZES = ("full", "tiny", "smoke")
HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
SMOKE = (
    *("embed", "blocks.0.hook_resid_pre", "ln1.hook_out", "hook_q", "hook_k", "hook_v", "hook_z", "resid_mid"),
    *("hook_post", "resid_post", "ln_final.hook_out", "logits"),
)


class RecordingError(PicogptError):
    """A directory that holds no recording, or a damaged one."""


@dataclass
class Recording:
    """A manifest and its tensors, name -> float64 array with the rows `manifest["positions"]`."""

    manifest: dict[str, Any]
    tensors: dict[str, Any] = field(default_factory=dict)

    def save(self, directory: str | Path) -> None:
        """Write the files, the manifest last; an older recording there is replaced.

        Raises RecordingError where that is not possible, or where files of those names are somebody else's.
        """
        directory = Path(directory)
        _check_ours(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name in (MANIFEST, TRACE):
                (directory / name).unlink(missing_ok=True)
            if self.tensors:
                write_safetensors(directory / TRACE, self.tensors, {"format": FORMAT})
            with new_file(directory / MANIFEST) as file:
                file.write(_as_json(self.manifest).encode())
        except (OSError, CheckpointError) as error:
            raise RecordingError(f"cannot write {directory}: {error}: give -o another directory") from error

    @classmethod
    def load(cls, directory: str | Path) -> "Recording":
        """Read what `save` has written. Raises RecordingError for what is missing or damaged."""
        path = Path(directory) / MANIFEST
        try:
            with reading(path):
                manifest = parse_object(read_small_file(path))
                _check(manifest)
            smoke = manifest["size"] == "smoke"
            tensors = {} if smoke else read_tensors_file(Path(directory) / TRACE)
        except (CheckpointError, TensorFileError) as error:
            raise RecordingError(str(error).replace("fetch it again", "record it again")) from error
        for name, says in manifest["tensors"].items() if tensors else ():
            if name not in tensors or _digest(tensors[name]) != says.get("sha256"):
                raise RecordingError(f"{directory}: {name} is not what the manifest says: record it again")
        return cls(manifest, tensors)


def find_params(recording: Recording, model_size: str | None, models_dir: str | None) -> dict[str, Any]:
    """Return the weights with which a reference was recorded; they are not fetched.

    Raises PicogptError if they are not here, or are others.
    """
    model = recording.manifest["model"]
    name = model_size or model.get("name")
    if not name:
        raise RecordingError("the reference does not say which model it is of: give --model_size")
    try:
        directory = find_model_dir(name, models_dir)
    except ModelDirError:
        if model_size:
            raise
        raise RecordingError(
            f"the recording is of {name}, which is not found here: give --model_size PATH"
        ) from None
    if directory is None:
        raise RecordingError(f"the weights of {name} are not here: give --model_size and a path")
    params = load_hparams_and_params(directory)[1]
    if weights_digest(params) != model.get("sha256"):
        raise RecordingError(f"{directory} has other weights than the reference was recorded with (sha256)")
    return params


def record(
    ids: Sequence[int],
    params: Mapping[str, Any],
    n_head: int,
    *,
    size: str = "full",
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Recording:
    """Run the model over the ids in float64, and in float32 in every arrangement, for the bands.

    ids     token ids, at least one and at most n_ctx
    params  the tree of parameters, float32
    size    one of SIZES
    name    of the model, as `--model_size` takes it
    about   what else the manifest shall say: the text, the bytes of its tokens

    Takes memory for the parameters in float64, and for seven traces in float32 beside the one in float64.
    """
    exact = astype(params, np.float64)
    _, trace = run_with_trace(ids, exact, n_head)
    truth = with_outs(trace, exact)
    bands = noise_bands(ids, params, n_head, truth)
    positions = rows_of(size, len(ids))
    tensors = {} if size == "smoke" else {hook: value[..., positions, :] for hook, value in truth.items()}
    n_vocab, n_embd = params["wte"].shape
    hparams = {"n_vocab": n_vocab, "n_ctx": len(params["wpe"]), "n_embd": n_embd, "n_head": n_head}
    hparams["n_layer"] = len(params["blocks"])
    model = {"name": name, "hparams": hparams, "sha256": weights_digest(params)}
    manifest = {"format": FORMAT, "size": size, **(about or {}), "ids": list(map(int, ids)), "model": model}
    manifest |= {"dtype": "float64", "made_by": made_by(), "positions": positions}
    manifest["tensors"] = {
        hook: describe(hook, value, {kind: band[hook] for kind, band in bands.items()}, size, tensors.get(hook))
        for hook, value in truth.items()
        if size != "smoke" or hook.endswith(SMOKE)
    }
    return Recording(manifest, tensors)


def rows_of(size: str, n_seq: int) -> list[int]:
    """Return which rows the tensors of a size hold: all, or four of them with the last, or none."""
    if size == "tiny":
        return sorted({0, (n_seq - 1) // 3, 2 * (n_seq - 1) // 3, n_seq - 1})
    return list(range(n_seq)) if size == "full" else []


def describe(name: str, value, bands: Mapping[str, float], size: str, stored) -> dict[str, Any]:
    """Return what the manifest says of one tensor. Statistics are of the whole, without its masked cells.

    In size "smoke" numbers have the digits that float32 has, so that the file stays small. The band of a run in
    float16 that overflowed is null: JSON has no infinity.
    """
    masked = name.endswith(("attn_scores", "pattern"))
    seen = (value[:, np.tri(*value.shape[-2:]) > 0] if masked else value).ravel()
    says = {"shape": list(value.shape), "sum": total(value), "projection": projection(value)}
    says["first"] = [float(f"{x:.8g}") for x in seen[:3]]
    if size == "smoke":
        says |= {key: float(f"{says[key]:.8g}") for key in ("sum", "projection")}
    else:
        says |= {
            "mean": seen.mean(),
            "std": seen.std(),
            "largest": np.abs(seen).max(),
            "sha256": _digest(stored),
        }
    kinds = bands if size != "smoke" else ("float32", "sum", "projection")
    says["band"] = {kind: float(f"{bands[kind]:.2e}") if np.isfinite(bands[kind]) else None for kind in kinds}
    return says


def weights_digest(params: Mapping[str, Any]) -> str:
    """Return the sha256 of the weights: each name, then its float32 numbers, in the order of the names."""
    digest = hashlib.sha256()
    for name, array in sorted(_leaves(params, "")):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array, "<f4").view(np.uint8).data)
    return digest.hexdigest()


def _leaves(branch: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every array of the tree with its path, such as blocks.3.attn.c_attn.w."""
    if isinstance(branch, Mapping | list):
        for key, child in branch.items() if isinstance(branch, Mapping) else enumerate(branch):
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, branch


def _digest(array) -> str:
    """The sha256 of an array's numbers, as they lie in the file."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def made_by() -> dict[str, Any]:
    """Return with what the numbers were made: versions, and the BLAS with its kernel and threads."""
    keys = {"internal_api": "name", "version": "version", "architecture": "kernel", "num_threads": "threads"}
    libraries = [{ours: library.get(theirs) for theirs, ours in keys.items()} for library in blas().info()]
    versions = {"picogpt": __version__, "numpy": np.__version__, "python": platform.python_version()}
    return {**versions, "machine": platform.machine(), "cores": cores(), "blas": libraries}


def _as_json(manifest: dict[str, Any]) -> str:
    """JSON with a tensor a line."""
    head = {key: value for key, value in manifest.items() if key != "tensors"}
    lines = [f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items()]
    rows = [f"  {json.dumps(name)}: {json.dumps(says)}" for name, says in manifest["tensors"].items()]
    return "{\n" + "".join(lines) + ' "tensors": {\n' + ",\n".join(rows) + "\n }\n}\n"


def _check_ours(directory: Path) -> None:
    """Raise RecordingError if files would be replaced that are no recording."""
    found = [name for name in (MANIFEST, TRACE) if (directory / name).exists()]
    try:
        ours = not found or parse_object(read_small_file(directory / MANIFEST)).get("format") == FORMAT
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise RecordingError(f"{directory / found[0]} is no recording of ours: give -o another directory")


def _check(manifest: dict[str, Any]) -> None:
    """Raise ValueError unless everything is there that a comparison asks for, and fits together."""
    if manifest.get("format") != FORMAT:
        raise ValueError(f'its "format" is not {FORMAT!r}: record it with picogpt.trace')
    size, ids, tensors = manifest.get("size"), manifest.get("ids"), manifest.get("tensors")
    model = manifest["model"] if isinstance(manifest.get("model"), dict) else {}
    hparams = model.get("hparams")
    if not isinstance(hparams, dict) or not all(_is_count(hparams.get(key)) for key in HPARAMS):
        raise ValueError(f"damaged: it does not say the {', '.join(HPARAMS)} of the model; record it again")
    if not isinstance(model.get("name"), str | None):
        raise ValueError("damaged: the model's name is no text; record it again")
    if not isinstance(ids, list) or not ids or not all(_is_count(i, 0, hparams["n_vocab"]) for i in ids):
        raise ValueError("damaged: its ids are not tokens of the model; record it again")
    if size not in SIZES or manifest.get("positions") != rows_of(size, len(ids)):
        raise ValueError("damaged: its positions are not those of its size; record it again")
    shapes = dict(shapes_of(hparams, len(ids))) if hparams["n_layer"] <= len(tensors or ()) else {}
    if not isinstance(tensors, dict) or not tensors or not tensors.keys() <= shapes.keys():
        raise ValueError("damaged: its tensors are not those of the model; record it again")
    for name, says in tensors.items():
        _check_tensor(name, says, shapes[name], smoke=size == "smoke")


def _check_tensor(name: str, says: Any, shape: list[int], smoke: bool) -> None:
    kinds = ("float32", "sum", "projection") if smoke else ("float32", "sum", "projection", "isolated", *HALVES)
    numbers = ("sum", "projection") if smoke else ("sum", "projection", "mean", "std", "largest")
    if not isinstance(says, dict) or says.get("shape") != shape:
        raise ValueError(f"damaged: {name} is not {shape}; record it again")
    band, first = says.get("band"), says.get("first")
    values = [says.get(key) for key in numbers] + (first if isinstance(first, list) else [None])
    if not isinstance(band, dict) or not band.keys() >= set(kinds):
        raise ValueError(f"damaged: {name} has no band; record it again")
    values += [band[kind] for kind in kinds if kind not in HALVES or band[kind] is not None]
    if not all(isinstance(x, int | float) and abs(x) < float("inf") for x in values):
        raise ValueError(f"damaged: what it says of {name} are no numbers; record it again")


def _is_count(x: Any, least: int = 1, most: int = 1 << 24) -> bool:
    return type(x) is int and least <= x < most


def shapes_of(hparams: Mapping[str, int], n_seq: int) -> Iterator[tuple[str, list[int]]]:
    """Yield the name and shape of every intermediate of a text of `n_seq` tokens."""
    sizes = {**hparams, "n_seq": n_seq, "1": 1, "4*n_embd": 4 * hparams["n_embd"]}
    sizes["d"] = hparams["n_embd"] // hparams["n_head"]
    for name in names(hparams["n_layer"]):
        yield name.hook, [sizes[axis] for axis in name.shape.split(", ")]
