"""Whether a model directory is what it should be, file by file: `python -m picogpt.verify DIRECTORY`.

Of a TensorFlow checkpoint every byte of the weights is compared with its CRC. safetensors files have none:
there only names, shapes and sizes can be checked.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from picogpt import PicogptError
from picogpt.checkpoint import VOCABULARY_FILES, download_command, load_encoder, parameter_shapes, read_entries
from picogpt.command import exit_status, write
from picogpt.download import address, check_graph
from picogpt.model_dirs import OPENAI_SIZES, find_model_dir, model_dirs
from picogpt.tensor_bundle import Entry, damaged_tensors
from picogpt.transfer import shown

DIGESTS = {  # of OpenAI's vocabulary; tiktoken has them, too
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
INDEX_OF_124M = "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687"  # sha256
INDEX_BYTES = {"124M": 5_215, "355M": 10_399, "774M": 15_535, "1558M": 20_724}


class Finding(NamedTuple):
    """What was found of one part of a model."""

    part: str
    right: bool
    said: str


def verify(directory: str | Path) -> Iterator[Finding]:
    """Yield what is found of the hyper-parameters with names and shapes, of the weights, and of the vocabulary.

    What cannot be checked because something before it is wrong is left out.
    """
    directory = Path(directory).resolve()  # "." has no name
    hparams = {"n_vocab": 50257}
    try:
        hparams, entries = read_entries(directory)
        yield _shapes(directory, hparams, entries)
    except PicogptError as error:
        yield Finding("names and shapes", False, str(error))
    else:
        try:
            yield _weights(entries)
        except PicogptError as error:
            yield Finding("weights", False, str(error))
    if (directory / "model.ckpt.meta").exists():
        yield _graph(directory / "model.ckpt.meta")
    yield _vocabulary(directory, hparams)


def _shapes(directory: Path, hparams: dict[str, int], entries: dict[str, Entry]) -> Finding:
    size = next((name for name, known in OPENAI_SIZES.items() if known == hparams), "none of OpenAI's sizes")
    n = sum(math.prod(entry.shape) for entry in entries.values())
    said = f"{len(entries)} tensors, {n:,} parameters, as the hyper-parameters ask: {size}"
    misnamed = directory.name in OPENAI_SIZES and directory.name != size
    return Finding("names and shapes", not misnamed, said + f", in {directory.name}" * misnamed)


def _graph(path: Path) -> Finding:
    try:
        check_graph(path.read_bytes())
    except (OSError, ValueError) as error:
        return Finding("graph", False, f"{path.name} is none of TensorFlow's ({error}); it is not needed")
    return Finding("graph", True, f"{path.name} looks like TensorFlow's; it is not needed")


def _weights(entries: dict[str, Entry]) -> Finding:
    if damaged := damaged_tensors(entries):
        return Finding("weights", False, f"the CRC32C of {', '.join(damaged)} is wrong")
    if any(entry.crc32c is None for entry in entries.values()):
        return Finding("weights", True, "all there; safetensors files have no CRC to compare with")
    for shard in {entry.shard for entry in entries.values()}:
        beyond = shard.stat().st_size - max(e.offset + e.size for e in entries.values() if e.shard == shard)
        if beyond:
            return Finding(
                "weights", False, f"every CRC is right, but {shard.name} has {beyond} bytes after them"
            )
    said = "every CRC is right"
    index = next(iter(entries.values())).shard.with_name("model.ckpt.index")
    if index.exists() and sha256(index.read_bytes()).hexdigest() == INDEX_OF_124M:
        said += ", and the index that has them is OpenAI's (sha256)"
    return Finding("weights", True, said)


def _vocabulary(directory: Path, hparams: dict[str, int]) -> Finding:
    try:
        encoder = load_encoder(directory, hparams)
    except PicogptError as error:
        return Finding("vocabulary", False, str(error))
    files = [name for name in VOCABULARY_FILES if (directory / name).exists()]
    if not files:
        return Finding("vocabulary", True, "none there: GPT-2's own, from the package, is taken")
    said = f"{encoder.n_vocab:,} tokens in {' + '.join(files)}"
    if not DIGESTS.keys() <= set(files):  # what the encoder was read from
        return Finding("vocabulary", True, f"{said}; OpenAI's digests do not apply")
    other = [n for n, digest in DIGESTS.items() if sha256((directory / n).read_bytes()).hexdigest() != digest]
    if not other:
        return Finding("vocabulary", True, f"{said}, OpenAI's to the byte (sha256)")
    said = f"{said}; not OpenAI's: another sha256 of {' and '.join(other)}"
    return Finding("vocabulary", hparams not in OPENAI_SIZES.values(), said)


def files_of(size: str) -> dict[str, str]:
    """Return OpenAI's files of one of OPENAI_SIZES, each with its size, and whether it may be left out."""
    hparams = OPENAI_SIZES[size]
    data = 4 * sum(map(math.prod, parameter_shapes(hparams).values()))
    return {
        "checkpoint": "77 bytes",
        "encoder.json": "1,042,301 bytes; may be left out: the package has it",
        "hparams.json": f"{len(json.dumps(hparams, indent=2)) + 1} bytes",
        "model.ckpt.data-00000-of-00001": f"{data:,} bytes",
        "model.ckpt.index": f"{INDEX_BYTES[size]:,} bytes",
        "model.ckpt.meta": "0.5 to 2 MB; may be left out: it is not read",
        "vocab.bpe": "456,318 bytes; may be left out: the package has it",
    }


def report(model: str, models_dir: str | None = None) -> int:
    """Write what is found of a directory, or of a model's name; return 0 if all is right, else 1."""
    directory = find_model_dir(model, models_dir)
    if directory is None:
        directory = model_dirs(models_dir)[0] / model
    there = sorted(path for path in directory.iterdir() if path.is_file()) if directory.is_dir() else []
    write(f"{directory}{'' if there else ': nothing is there yet'}\n")
    for path in there:
        write(f"  {path.name:<32}{path.stat().st_size:>15,} bytes\n")
    right = bool(there)
    for finding in verify(directory) if there else ():
        write(f"{'right' if finding.right else 'WRONG'}  {finding.part}: {finding.said}\n")
        right = right and finding.right
    if right:
        write("The model is right.\n")
        return 0
    size = directory.resolve().name
    if size in OPENAI_SIZES:
        url = shown(address(None, size))
        write(f"These files belong there, from {url}/ (`{download_command(directory)}` gets them):\n")
        for name, n_bytes in files_of(size).items():
            write(f"  {name:<32}{n_bytes}{'' if (directory / name).exists() else ' (missing)'}\n")
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m picogpt.verify DIRECTORY`: exit status 0 if the model is right, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m picogpt.verify", description="Check a model, file by file."
    )
    parser.add_argument("model", help="a model directory, or the name of a model")
    parser.add_argument("--models_dir", help="where models are looked for by name")
    args = parser.parse_args(argv)
    return exit_status(lambda: report(args.model, args.models_dir), unread=2)


if __name__ == "__main__":
    sys.exit(main())
