"""Build what lies beside this file, and see whether a value has moved since: `make reference`.

Numbers are computed anew and compared with the stored ones. Whatever differs by more than 1e-12 of the largest
number beside it is named, and the exit status is 1. (Another BLAS, another kernel move the last bits, 1e-16.)
The files are written only if there are none, or if theirs is another VERSION: a new value needs a new VERSION.
Noise bands, and what was used to compute, differ from machine to machine: they are stored, not compared.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from vectors import VERSION, build

from picogpt.command import exit_status, say, write
from picogpt.hugging_face import read_json
from picogpt.recording import Recording
from picogpt.tensor_bundle import new_file

HERE = Path(__file__).parent
TOLERANCE = 1e-12  # of the largest number beside it


def moved(old: Any, new: Any, where: str = "", largest: float = 0.0) -> Iterator[str]:
    """Name what differs: numbers by more than TOLERANCE of the largest beside them, all else at all."""
    numbers = (int, float)
    if isinstance(old, Recording):
        yield from moved_recording(old, new, where)
    elif isinstance(old, dict) and isinstance(new, dict) and [*old] == [*new]:
        for key in old:
            yield from moved(old[key], new[key], f"{where}/{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        largest = max((abs(x) for x in old if type(x) in numbers), default=0.0)
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from moved(a, b, f"{where}[{i}]", largest)
    elif type(old) is float and type(new) is float:
        if not abs(old - new) <= TOLERANCE * max(largest, abs(old)):
            yield f"{where}: {old!r} has become {new!r}"
    elif type(old) is not type(new) or old != new:
        yield f"{where}: {shown(old)} has become {shown(new)}"


def moved_recording(old: Recording, new: Recording, where: str) -> Iterator[str]:
    """The same of a trace: its tensors, and of the manifest what does not depend on the machine."""
    settled = ("format", "size", "text", "token_bytes", "ids", "model", "dtype", "positions")
    for key in settled:
        yield from moved(old.manifest.get(key), new.manifest.get(key), f"{where}/{key}")
    if [*old.tensors] != [*new.tensors]:
        yield f"{where}: the names {shown([*old.tensors])} have become {shown([*new.tensors])}"
        return
    for name, tensor in new.tensors.items():
        yield from moved_array(old.tensors[name], tensor, f"{where}/{name}")
        says, now = old.manifest["tensors"][name], new.manifest["tensors"][name]
        for key in ("sum", "projection"):  # the last bits of all numbers add up
            if not abs(says[key] - now[key]) <= TOLERANCE * says["largest"] * tensor.size:
                yield f"{where}/{name}/{key}: {says[key]!r} has become {now[key]!r}"


def moved_array(old, new, where: str) -> Iterator[str]:
    """The first number of an array that has moved; masked cells, -inf, stay where they are."""
    if old.shape != new.shape:
        yield f"{where}: the shape {old.shape} has become {new.shape}"
        return
    with np.errstate(invalid="ignore"):
        near = np.abs(new - old) <= TOLERANCE * np.abs(old[np.isfinite(old)]).max(initial=0.0)
    for at in np.argwhere(~near & (new != old))[:1].tolist():
        yield f"{where}{at}: {float(old[tuple(at)])!r} has become {float(new[tuple(at)])!r}"


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def newer_unicode(old: bytes, new: bytes) -> bool:
    """Whether the classes differ only in that characters have been added, as each version of Unicode does."""
    before, after = (parse_classes(classes.decode()) for classes in (old, new))
    return all(before[letter] < after[letter] or before[letter] == after[letter] for letter in "LNs")


def parse_classes(text: str) -> dict[str, set[int]]:
    """The code points of each class."""
    classes: dict[str, set[int]] = {"L": set(), "N": set(), "s": set()}
    for line in text.splitlines():
        if line.startswith("{"):
            letter, first, last = line.strip("{},").split(", ")
            classes[letter.strip("'")].update(range(int(first, 16), int(last, 16) + 1))
    return classes


def load(path: Path) -> Any:
    """What `store` has written."""
    if path.is_dir():
        return Recording.load(path)
    return read_json(path) if path.name == "vectors.json" else path.read_bytes()


def store(path: Path, content: Any) -> None:
    if isinstance(content, Recording):
        content.save(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write(content if isinstance(content, bytes) else as_json(content).encode())


def as_json(content: dict[str, Any]) -> str:
    """JSON with one vector a line."""
    rows = []
    for key, value in content.items():
        lines = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else ""
        rows.append(f" {json.dumps(key)}: " + (f"[\n  {lines}\n ]" if lines else json.dumps(value)))
    return "{\n" + ",\n".join(rows) + "\n}\n"


def compare(directory: Path, built: dict[str, Any]) -> list[str]:
    """Return what has moved since the files in a directory were written."""
    faults: list[str] = []
    for name, content in built.items():
        old = load(directory / name)
        if name == "unicode_classes.txt" and newer_unicode(old, content):
            continue
        faults += moved(old, content, name)
    return faults


def main(directory: Path = HERE) -> int:
    """Exit status 0 if nothing has moved or the files are new, 1 if something has, 2 if they cannot be read."""
    path = directory / "vectors.json"

    def command() -> int:
        built = build()
        if path.exists() and load(path)["version"] == VERSION:
            faults = compare(directory, built)
            for fault in faults:
                say(fault)
            if faults:
                say("if this is meant: change VERSION in reference/vectors.py, and tell what is new")
                return 1
            write(f"version {VERSION}: nothing has moved\n")
            return 0
        for name, content in built.items():  # vectors.json, which holds the version, last
            if name != "vectors.json":
                store(directory / name, content)
        store(path, built["vectors.json"])
        write(f"version {VERSION} is written\n")
        return 0

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
