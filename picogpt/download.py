"""OpenAI's files into a model directory: `python -m picogpt.download 124M`.

The small files are fetched and checked first; until then nothing in the directory is touched. The weights come
into `<name>.part` (see transfer.py), which a later run goes on with, and get their name when every tensor is
right. `checkpoint`, the file that names the others, takes its place last. The vocabulary comes from the
package, which has OpenAI's. A directory with somebody else's model in it is left as it is.
"""

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import requests
from tqdm import tqdm

from picogpt import PicogptError
from picogpt.checkpoint import openai_entries, pointer_to, read_entries
from picogpt.command import exit_status, say, write
from picogpt.hugging_face import parse_object
from picogpt.model_dirs import OPENAI_SIZES, OPENAI_URL, find_model_dir, model_dirs
from picogpt.tensor_bundle import (
    CheckpointError,
    Entry,
    damaged_tensors,
    message_fields,
    new_file,
    parse_index,
)
from picogpt.transfer import DownloadError, GrowingFile, below, fetch_small, shown

_PREFIX = "model.ckpt"
_DATA = "model.ckpt.data-00000-of-00001"
_PART = f"{_DATA}.part"
_INDEX = "model.ckpt.index"
_VOCABULARY = "encoder.json", "vocab.bpe"
_ELSEWHERE = "choose another place with --models_dir or PICOGPT_MODELS_DIR"
_ROOM = f"make room, or {_ELSEWHERE}; what has come is kept"


def download(model_size: str, models_dir: str | Path | None = None, *, base_url: str | None = None) -> Path:
    """Return the directory of one of OPENAI_SIZES, whole, every tensor's CRC checked; fetch what is missing.

    It is where `find_model_dir` finds it, else in the first of `model_dirs`. `base_url`, else the environment's
    PICOGPT_BASE_URL, is a mirror of OPENAI_URL. Waits for another process that fetches the same. Progress goes
    to standard error. Raises PicogptError when it cannot fetch or save, and for a directory that holds another
    model with something wrong in it.
    """
    directory = find_model_dir(model_size, models_dir)  # raises for a name that means nothing
    if model_size not in OPENAI_SIZES:
        raise DownloadError(f"{model_size!r} cannot be downloaded: {', '.join(OPENAI_SIZES)} can")
    if directory is not None and _is_right(directory):
        return directory
    place, url = directory or _place(model_size, models_dir), address(base_url, model_size)
    with _writing(place), _alone(place):
        if directory is None and (place / "checkpoint").exists() and _is_right(place):
            return place  # somebody else has fetched it in the meantime
        missing = [name for name in (*_checks(model_size), _DATA) if not (place / name).exists()]
        if missing and any(place.iterdir()) and not (place / _PART).exists():
            say(f"{place} is not whole, {', '.join(missing)} missing: completing it")
        no_bar = None if sys.stderr else True
        bar = tqdm(desc=model_size, unit="B", unit_scale=True, dynamic_ncols=True, disable=no_bar)
        with requests.Session() as session, bar:
            _fetch_all(session, url, place, model_size, bar)
    return place


def _place(model_size: str, models_dir: str | Path | None) -> Path:
    """Where the model goes: where an earlier run has begun, else into the first of `model_dirs`."""
    places = [parent / model_size for parent in model_dirs(models_dir)]
    return next((place for place in places if os.path.exists(place / _PART)), places[0])  # noqa: PTH110


def address(base_url: str | None, model_size: str) -> str:
    """Return the URL below which a model's files are: see `download`."""
    base_url = base_url or os.environ.get("PICOGPT_BASE_URL") or OPENAI_URL
    try:
        return below(base_url, model_size)
    except ValueError as error:
        raise DownloadError(f"{shown(base_url)} in PICOGPT_BASE_URL is no address: {error}") from error


def _fetch_all(session: requests.Session, url: str, directory: Path, model_size: str, bar: tqdm) -> None:
    small = {}
    for name, check in _checks(model_size).items():
        small[name] = fetch_small(session, below(url, name), check)
        bar.update(len(small[name]))
    small |= {name: Path(__file__).with_name("vocabulary").joinpath(name).read_bytes() for name in _VOCABULARY}
    entries = [entry._replace(shard=directory / _DATA) for entry in _index_entries(small[_INDEX])]
    _check_that_it_is_ours(directory, small, entries)
    pointer = small.pop("checkpoint")
    (directory / "checkpoint").unlink(missing_ok=True)  # until all is right again
    for name, content in small.items():
        with new_file(directory / name) as file:
            file.write(content)
    _complete(directory, entries, session, below(url, _DATA), bar)
    with new_file(directory / "checkpoint") as file:
        file.write(pointer)


def _check_that_it_is_ours(directory: Path, small: dict[str, bytes], entries: list[Entry]) -> None:
    """Refuse to write where another model is: files that differ, and no weights that show whose they are."""
    data, index = directory / _DATA, directory / _INDEX
    if (directory / _PART).exists() or (index.exists() and index.read_bytes() == small[_INDEX]):
        return
    if data.exists() and not _damaged(entries[:1]):
        return
    there = [name for name in small if (directory / name).exists()]
    others = [name for name in there if (directory / name).read_bytes() != small[name]]
    others += [path.name for path in (data, directory / "config.json") if path.exists()]
    if others:
        raise DownloadError(
            f"{directory} has files of another model ({', '.join(others)}): move them away, or {_ELSEWHERE}"
        )


def _complete(directory: Path, entries: list[Entry], session: requests.Session, url: str, bar: tqdm) -> None:
    """Fetch what is not there yet of the weights, and give them their name once all are right."""
    path, part = directory / _DATA, directory / _PART
    if path.exists() and not _damaged(entries):
        return
    bar.total = bar.n + entries[-1].offset + entries[-1].size
    with part.open("a+b", buffering=0) as file:
        growing = GrowingFile(file, entries, bar)
        _check_space(directory, growing.size - growing.at)
        if path.exists():
            with path.open("rb") as source:  # who has it mapped keeps the file as it was
                growing.copy(source)
        missing = f"{(growing.size - growing.at) / 1e6:.0f} MB"
        say(f"{missing} from {shown(url)} to {part}; if interrupted, the next run goes on from there")
        growing.fetch(session, url)
        os.fsync(file.fileno())  # else a power cut may keep the new name and lose what it names
    part.replace(path)


def _damaged(entries: list[Entry]) -> bool:
    try:
        return bool(damaged_tensors({str(entry.offset): entry for entry in entries}))
    except CheckpointError:  # cut short
        return True


def _index_entries(content: bytes) -> list[Entry]:
    """The tensors in order of place. Raises ValueError unless they fill one file, each with a CRC."""
    entries = sorted(parse_index(content, _PREFIX).values(), key=lambda entry: entry.offset)
    end = 0
    for entry in entries:
        if entry.shard.name != _DATA or entry.offset != end or entry.dtype != "float32":
            raise ValueError(f"the tensors do not fill {_DATA} with float32, without a gap")
        end += entry.size
    return entries


def _checks(model_size: str) -> dict[str, Callable[[bytes], object]]:
    """What finds the fault, as a ValueError, in each of the small files."""
    hparams = OPENAI_SIZES[model_size]

    def check_index(content: bytes) -> None:
        try:
            openai_entries("index", parse_index(content, _PREFIX), hparams)
        except CheckpointError as error:
            raise ValueError(str(error)) from error
        _index_entries(content)

    def check_hparams(content: bytes) -> None:
        if parse_object(content) != hparams:
            raise ValueError(f"these are not the hyper-parameters of {model_size}")

    return {
        _INDEX: check_index,
        "hparams.json": check_hparams,
        f"{_PREFIX}.meta": check_graph,
        "checkpoint": _check_pointer,
    }


def check_graph(content: bytes) -> None:
    """Raise ValueError unless it looks like a MetaGraphDef, which nothing here reads."""
    fields = {field for field, _ in message_fields(content)}
    if not {1, 2} & fields:  # meta_info_def and graph_def
        raise ValueError("there is no graph in it")


def _check_pointer(content: bytes) -> None:
    if content.split() != pointer_to(_PREFIX).split():
        raise ValueError(f"it does not name {_PREFIX}")


def _is_right(directory: Path) -> bool:
    """Whether the loader would take what is there, and every tensor is that of its CRC."""
    try:
        _, entries = read_entries(directory)
        damaged = damaged_tensors(entries)
    except PicogptError as error:
        say(str(error))
        return False
    if damaged:
        say(f"{directory}: the CRC32C of {', '.join(damaged[:6])} is wrong")
    return not damaged


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Make the directory; say what to do when nothing can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, CheckpointError) as error:
        said = error if isinstance(error, CheckpointError) else f"cannot write to {directory}: {error.strerror}"
        full = getattr(error.__cause__ or error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise DownloadError(f"{said}: {_ROOM if full else _ELSEWHERE}") from error
    finally:
        with suppress(OSError):
            directory.rmdir()  # if nothing has come


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Wait until no other process writes to the directory, and keep others waiting."""
    from filelock import FileLock, Timeout

    lock = FileLock(directory.with_name(f".{directory.name}.lock"))  # stays: deleting it would let two in
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say(f"another process is downloading to {directory}: waiting for it")
        lock.acquire()
    try:
        for name in (_INDEX, f"{_PREFIX}.meta", "hparams.json", "checkpoint", *_VOCABULARY):
            for left_behind in directory.glob(f"{name}.[0-9]*.tmp"):  # by a download that was killed
                with suppress(OSError):
                    left_behind.unlink()
        yield
    finally:
        lock.release()


def _check_space(directory: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < n_bytes:
        needs = f"{directory} needs {n_bytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        raise DownloadError(f"{needs}: {_ROOM}")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m picogpt.download SIZE`: fetch a model; print its directory."""
    parser = argparse.ArgumentParser(prog="python -m picogpt.download", description="Fetch OpenAI's GPT-2.")
    parser.add_argument("model_size", help=f"one of {', '.join(OPENAI_SIZES)}")
    parser.add_argument(
        "--models_dir",
        help="where it goes; else $PICOGPT_MODELS_DIR, else ./models if there is one, else the user's cache",
    )
    parser.add_argument("--base_url", help=f"a mirror; otherwise $PICOGPT_BASE_URL, or {OPENAI_URL}")
    args = parser.parse_args(argv)
    return exit_status(lambda: write(f"{download(args.model_size, args.models_dir, base_url=args.base_url)}\n"))


if __name__ == "__main__":
    sys.exit(main())
