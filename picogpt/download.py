"""OpenAI's files into a model directory: `python -m picogpt.download 124M`.

Whatever goes wrong on the way, the directory stays usable and the next run goes on where this one stopped:

- the weights grow in `<name>.part`, unbuffered; a run that finds one asks the server for the rest of it;
- the index, which is fetched first, knows each tensor's place and CRC32C. A tensor is checked as soon as its
  last byte has come, and cut off again if it is wrong: nothing unchecked is ever given its final name;
- `checkpoint`, the file that names the others, takes its place last: a directory that has it is whole;
- the vocabulary comes from the package, which has OpenAI's.
"""

import argparse
import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import requests
from tqdm import tqdm

from picogpt.command import exit_status, leave, write
from picogpt.hugging_face import parse_object, read_json
from picogpt.leveldb_table import mask
from picogpt.model_dirs import OPENAI_SIZES, OPENAI_URL, is_whole, model_dirs
from picogpt.tensor_bundle import (
    MAX_INDEX_BYTES,
    CheckpointError,
    Entry,
    message_fields,
    new_file,
    parse_index,
    read_index,
    read_tensors,
)
from picogpt.transfer import CHUNK, Again, DownloadError, get, persistently, say

_PREFIX = "model.ckpt"
_DATA = "model.ckpt.data-00000-of-00001"
_VOCABULARY = "encoder.json", "vocab.bpe"
_ELSEWHERE = "choose another place with --models_dir or PICOGPT_MODELS_DIR"
_ROOM = f"make room, or {_ELSEWHERE}; what has come is kept"


def download(model_size: str, models_dir: str | Path | None = None, *, base_url: str | None = None) -> Path:
    """Fetch one of OPENAI_SIZES into the first of `model_dirs(models_dir)`; return its directory, whole and
    every tensor's CRC checked. What is there already, and right, is not fetched again.

    `base_url`, else the environment's PICOGPT_BASE_URL, is a mirror of OPENAI_URL. Waits for another process
    that fetches the same. Progress goes to standard error. Raises PicogptError when it cannot fetch or save.
    """
    if model_size not in OPENAI_SIZES:
        raise DownloadError(f"{model_size!r} cannot be downloaded: {', '.join(OPENAI_SIZES)} can")
    directory = model_dirs(models_dir)[0] / model_size
    url = f"{(base_url or os.environ.get('PICOGPT_BASE_URL') or OPENAI_URL).rstrip('/')}/{model_size}"
    with _writing(directory), _alone(directory):
        if not is_whole(directory) or not _is_right(directory):
            bar = tqdm(desc=model_size, unit="B", unit_scale=True, dynamic_ncols=True, disable=None)
            with requests.Session() as session, bar:
                _fetch_all(session, url, directory, bar)
    return directory


def _fetch_all(session: requests.Session, url: str, directory: Path, bar: tqdm) -> None:
    (directory / "checkpoint").unlink(missing_ok=True)  # until all is right again
    for left_behind in directory.glob("*.*.tmp"):  # by a process that was killed; nobody else writes here now
        left_behind.unlink()
    small = {}
    for name, check in _checks(directory.name).items():
        small[name] = _fetch_small(session, f"{url}/{name}", check)
        bar.update(len(small[name]))
    pointer = small.pop("checkpoint")
    small |= {name: Path(__file__).with_name("vocabulary").joinpath(name).read_bytes() for name in _VOCABULARY}
    for name, content in small.items():
        with new_file(directory / name) as file:
            file.write(content)
    _fetch_data(session, f"{url}/{_DATA}", directory / _DATA, _index_entries(small[f"{_PREFIX}.index"]), bar)
    with new_file(directory / "checkpoint") as file:
        file.write(pointer)


def _fetch_small(session: requests.Session, url: str, check: Callable[[bytes], Any]) -> bytes:
    """Return a file of at most MAX_INDEX_BYTES in which `check` finds nothing wrong."""

    def attempt() -> bytes:
        content = b""
        with get(session, url) as response:
            for chunk in response.iter_content(CHUNK):
                content += chunk
                if len(content) > MAX_INDEX_BYTES:
                    raise Again(f"what {url} sends is far too large to be that file")
        try:
            check(content)
        except ValueError as error:
            raise Again(f"what {url} sends is not that file ({error})") from error
        return content

    return persistently(attempt, lambda: 0)


def _fetch_data(session: requests.Session, url: str, path: Path, entries: list[Entry], bar: tqdm) -> None:
    """Fetch what is not there yet of the data file, and give it its name once all of it is right."""
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        path.replace(part)  # not whole, or not right: what is right in it stays
    bar.total = bar.n + entries[-1].offset + entries[-1].size
    with part.open("a+b", buffering=0) as file:  # unbuffered: what a killed process had is there
        growing = _GrowingFile(file, entries, bar)
        growing.check_what_is_there()
        missing = growing.size - growing.at
        _check_space(path.parent, missing)
        say(f"{missing / 1e6:.0f} MB from {url} to {part}; if interrupted, the next run goes on from there")

        def attempt() -> None:
            while growing.at < growing.size:  # after the first, the server ended early without an error
                _append(session, url, growing)

        persistently(attempt, lambda: growing.at)
        os.fsync(file.fileno())  # else a power cut may keep the new name and lose what it names
    part.replace(path)


def _append(session: requests.Session, url: str, growing: "_GrowingFile") -> None:
    """Append to the file what one answer of the server brings."""
    with get(session, url, growing.at) as response:
        if response.status_code == 416:
            growing.cut(0)
            raise Again(f"{url}: the server has no more bytes than were fetched")
        if response.status_code == 206:
            said = response.headers.get("Content-Range", "")
            if said != f"bytes {growing.at}-{growing.size - 1}/{growing.size}":
                growing.cut(0)  # the next attempt asks for everything
                raise Again(f"{url} sends another part than was asked for ({said or 'it does not say which'})")
        elif growing.at:
            growing.cut(0)
            say("the server sends the file only from its beginning")
        length = response.headers.get("Content-Length", str(growing.size - growing.at))
        if length != str(growing.size - growing.at):
            raise Again(f"{url} announces {length} bytes instead of {growing.size - growing.at}")
        start = growing.at
        for chunk in response.iter_content(CHUNK):
            growing.append(chunk[: growing.size - growing.at])
        if growing.at == start:
            raise Again(f"{url} sends nothing")


class _GrowingFile:
    """The data file while it grows, `at` bytes of `size`: right tensors, and a part of the next."""

    def __init__(self, file: BinaryIO, entries: list[Entry], bar: tqdm) -> None:
        self.file, self.entries, self.bar = file, entries, bar
        self.at, self.size = 0, entries[-1].offset + entries[-1].size
        self.n_whole = 0  # tensors
        self.crc = 0  # of what is there of the next

    def check_what_is_there(self) -> None:
        """Advance over what an earlier run has left, up to the first tensor that is wrong."""
        self.file.seek(0)
        with suppress(Again):
            while chunk := self.file.read(min(CHUNK, self.size - self.at)):
                self._advance(chunk)
        self.file.truncate(self.at)

    def append(self, chunk: bytes) -> None:
        while chunk:
            n = self.file.write(chunk)  # fewer than asked for, when the disk is full
            self._advance(chunk[:n])
            chunk = chunk[n:]

    def cut(self, n_tensors: int) -> None:
        """Forget all but the first tensors."""
        at = self.entries[n_tensors].offset
        self.file.truncate(at)
        self.bar.update(at - self.at)
        self.at, self.n_whole, self.crc = at, n_tensors, 0

    def _advance(self, chunk: bytes) -> None:
        while chunk:
            entry = self.entries[self.n_whole]
            head, chunk = (
                chunk[: entry.offset + entry.size - self.at],
                chunk[entry.offset + entry.size - self.at :],
            )
            self.crc = google_crc32c.extend(self.crc, head)
            self.at += len(head)
            self.bar.update(len(head))
            if self.at == entry.offset + entry.size:
                if mask(self.crc) != entry.crc32c:
                    self.cut(self.n_whole)
                    raise Again(f"the bytes from {entry.offset} to {entry.offset + entry.size} came damaged")
                self.n_whole, self.crc = self.n_whole + 1, 0


def _index_entries(content: bytes) -> list[Entry]:
    """The tensors in order of place. Raises ValueError unless they fill one file, each with a CRC."""
    entries = sorted(parse_index(content, _PREFIX).values(), key=lambda entry: entry.offset)
    end = 0
    for entry in entries:
        if entry.shard.name != _DATA or entry.offset != end or not entry.size or entry.crc32c is None:
            raise ValueError(f"the tensors do not fill {_DATA} without a gap")
        end += entry.size
    if not entries:
        raise ValueError("there is no tensor in it")
    return entries


def _check_graph(content: bytes) -> None:
    if not {1, 2} & {
        field for field, _ in message_fields(content)
    }:  # MetaGraphDef's meta_info_def and graph_def
        raise ValueError("there is no graph in it")


def _check_pointer(content: bytes) -> None:
    names = "".join(f'{key}model_checkpoint_path{s}: "{_PREFIX}" ' for key, s in (("", ""), ("all_", "s")))
    if content.decode().split() != names.split():
        raise ValueError(f"it does not name {_PREFIX}")


def _checks(model_size: str) -> dict[str, Callable[[bytes], Any]]:
    """What finds the fault, as a ValueError, in each of the small files."""

    def check_hparams(content: bytes) -> None:
        if parse_object(content) != OPENAI_SIZES[model_size]:
            raise ValueError(f"these are not the hyper-parameters of {model_size}")

    return {
        f"{_PREFIX}.index": _index_entries,
        "hparams.json": check_hparams,
        f"{_PREFIX}.meta": _check_graph,
        "checkpoint": _check_pointer,
    }


def _is_right(directory: Path) -> bool:
    """Whether the directory has what the loader needs, and its weights are those of its index."""
    try:
        read_json(directory / "hparams.json")
        read_tensors(read_index(directory / _PREFIX), verify=True)
    except CheckpointError as error:
        say(str(error))
        return False
    return True


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


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Wait until no other process writes to the directory, and keep others waiting."""
    from filelock import FileLock, Timeout

    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say(f"another process is downloading to {directory}: waiting for it")
        lock.acquire()
    with lock:  # counted: held until both are released
        lock.release()
        yield
        with suppress(OSError):  # there is nothing left to wait for
            Path(lock.lock_file).unlink()


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
        help="where it goes; otherwise $PICOGPT_MODELS_DIR, ./models if there is "
        "one, or the user's cache directory",
    )
    parser.add_argument("--base_url", help=f"a mirror; otherwise $PICOGPT_BASE_URL, or {OPENAI_URL}")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, leave)  # nothing is lost: what has come is in the file
    return exit_status(lambda: write(f"{download(args.model_size, args.models_dir, base_url=args.base_url)}\n"))


if __name__ == "__main__":
    sys.exit(main())
