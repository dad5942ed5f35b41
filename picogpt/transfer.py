"""A file over HTTP, however the network behaves: time-outs, repeated attempts, what is there already kept.

The weights grow in a file of their own, unbuffered, so that whatever ends the process leaves what had come. The
index says where each tensor lies, and its CRC32C: a tensor is checked as soon as its last byte has come, and
cut off again if it is wrong. So at any time the file holds right tensors, and a part of one more.
"""

import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import sleep
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit, urlunsplit

import google_crc32c
import requests
import urllib3
from tqdm import tqdm

from picogpt import PicogptError
from picogpt.command import say
from picogpt.leveldb_table import mask
from picogpt.tensor_bundle import MAX_INDEX_BYTES, Entry

TIMEOUTS = 10, 30  # seconds to connect, and to wait for the next bytes
PAUSES = 1, 2, 4, 8, 16  # seconds before another attempt, as long as no attempt brings anything new
LONGEST_PAUSE = 60  # seconds, when the server asks for one
CHUNK = 1 << 18  # bytes at a time: more would be faster, and a broken connection would lose more
MIRROR = (
    "name a mirror in PICOGPT_BASE_URL, or place the files by hand (`python -m picogpt.verify 124M` lists them)"
)
CURE = f"check the network, {MIRROR}"

T = TypeVar("T")


class DownloadError(PicogptError):
    """A model that could not be fetched."""


class Again(Exception):
    """Something that another attempt may mend, after a pause of `seconds` at least."""

    def __init__(self, said: str, seconds: int = 0) -> None:
        super().__init__(said)
        self.seconds = seconds


def fetch_small(session: requests.Session, url: str, check: Callable[[bytes], object]) -> bytes:
    """Return a file of at most MAX_INDEX_BYTES in which `check` finds nothing wrong: it raises ValueError."""

    def attempt() -> bytes:
        content = b""
        with get(session, url) as response:
            for chunk in response.iter_content(CHUNK):
                content += chunk
                if len(content) > MAX_INDEX_BYTES:
                    raise Again(f"what {shown(url)} sends is far too large to be that file")
        try:
            check(content)
        except ValueError as error:
            raise Again(f"what {shown(url)} sends is not that file ({error})") from error
        return content

    return persistently(attempt, lambda: 0)


class GrowingFile:
    """The weights while they come, `at` bytes of `size`: right tensors, and a part of the next."""

    def __init__(self, file: BinaryIO, entries: list[Entry], bar: tqdm) -> None:
        """`file` is open for reading and appending, unbuffered. `entries` fill it without a gap, in order."""
        self.file, self.entries, self.bar = file, entries, bar
        self.at, self.size = 0, entries[-1].offset + entries[-1].size
        self.n_whole = 0  # tensors
        self.crc = 0  # of what is there of the next
        self.file.seek(0)
        with suppress(Again):  # what an earlier run has left, up to the first tensor that is wrong
            while chunk := self.file.read(min(CHUNK, self.size - self.at)):
                self._advance(chunk)
        self.file.truncate(self.at)

    def fetch(self, session: requests.Session, url: str) -> None:
        """Fetch all that is missing."""
        persistently(lambda: self._fetch_some(session, url), lambda: self.at)

    def copy(self, source: BinaryIO) -> None:
        """Append what follows in another file, as far as its tensors are right."""
        source.seek(self.at)
        with suppress(Again):
            while chunk := source.read(min(CHUNK, self.size - self.at)):
                self.append(chunk)

    def append(self, chunk: bytes) -> None:
        """Write a chunk. Raises Again when a tensor turns out to be wrong, which is then not there any more."""
        while chunk:
            n = self.file.write(chunk)  # fewer than asked for, when the disk is full
            self._advance(chunk[:n])
            chunk = chunk[n:]

    def _fetch_some(self, session: requests.Session, url: str) -> None:
        """Append what one answer of the server brings. Raises Again unless that is all."""
        if self.at == self.size:
            return
        with get(session, url, self.at) as response:
            said = response.headers.get("Content-Range", "")
            if response.status_code == 416 or (response.status_code == 206 and said != self._range()):
                self._cut(0)  # the next attempt asks for everything
                raise Again(f"{shown(url)} sends another part than was asked for ({said or 'none'})")
            if response.status_code == 200 and self.at:
                self._cut(0)
                say("the server sends the file only from its beginning")
            missing = str(self.size - self.at)
            length = response.headers.get("Content-Length", missing)
            if length != missing:
                raise Again(f"{shown(url)} announces {length:.20} bytes instead of {missing}")
            for chunk in response.iter_content(CHUNK):
                self.append(chunk[: self.size - self.at])
                if self.at == self.size:
                    return
        raise Again(f"{shown(url)} ends early")

    def _range(self) -> str:
        return f"bytes {self.at}-{self.size - 1}/{self.size}"

    def _cut(self, n_tensors: int) -> None:
        """Forget all but the first tensors."""
        at = self.entries[n_tensors].offset
        self.file.truncate(at)
        self.bar.update(at - self.at)
        self.at, self.n_whole, self.crc = at, n_tensors, 0

    def _advance(self, chunk: bytes) -> None:
        while chunk:
            entry = self.entries[self.n_whole]
            end = entry.offset + entry.size
            head, chunk = chunk[: end - self.at], chunk[end - self.at :]
            self.crc = google_crc32c.extend(self.crc, head)
            self.at += len(head)
            self.bar.update(len(head))
            if self.at == end:
                if mask(self.crc) != entry.crc32c:
                    self._cut(self.n_whole)
                    raise Again(f"the bytes from {entry.offset} to {end} came damaged")
                self.n_whole, self.crc = self.n_whole + 1, 0


def persistently(attempt: Callable[[], T], progress: Callable[[], int]) -> T:
    """Return what `attempt` returns, the first time that it does not raise Again.

    Between attempts are PAUSES, which begin anew whenever `progress` has reached further than ever.
    """
    furthest, pauses = progress(), iter(PAUSES)
    while True:
        try:
            return attempt()
        except Again as problem:
            if progress() > furthest:
                furthest, pauses = progress(), iter(PAUSES)
            pause = next(pauses, None)
            if pause is None:
                raise DownloadError(f"{problem}; {len(PAUSES)} more attempts did not help: {CURE}") from problem
            pause = max(pause, problem.seconds)
            say(f"{problem}; trying again in {pause} s")
            sleep(pause)


@contextmanager
def get(session: requests.Session, url: str, start: int = 0) -> Iterator[requests.Response]:
    """Ask for a file from byte `start` on. Its body is the caller's to read.

    Raises Again when this fails, or reading the body does, and DownloadError where another attempt is no use.
    """
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    response = None
    try:
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUTS) as response:
            _check_status(response, url, start)
            yield response
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        if isinstance(cause(error), ssl.SSLCertVerificationError):
            trust = "if this network has a certificate of its own, name its file in REQUESTS_CA_BUNDLE"
            raise DownloadError(f"{shown(url)}: {_reason(error)}: {trust}") from error
        raise Again(f"{shown(url)}: {_reason(error)}") from error
    except (requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema) as error:
        raise DownloadError(f"{shown(url)}: an address begins with http:// or https://: {MIRROR}") from error
    except requests.RequestException as error:
        raise DownloadError(f"{shown(url)}: {_reason(error)}: {CURE}") from error
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
        if response is not None:  # then it is the caller's, a full disk for example
            raise
        raise DownloadError(f"{shown(url)}: {_reason(error)}: {CURE}") from error


def shown(url: str) -> str:
    """Return a URL without the name and password, or the key, that may be in it."""
    return re.sub(r"//[^/]*@", "//", url.partition("?")[0])


def below(url: str, *names: str) -> str:
    """Return the URL of what lies below another, whose query is kept."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path="/".join([parts.path.rstrip("/"), *names])))


def _check_status(response: requests.Response, url: str, start: int) -> None:
    status, kind = response.status_code, response.headers.get("Content-Type", "")
    if status in (408, 429) or status >= 500:
        wait = response.headers.get("Retry-After", "")
        seconds = min(int(wait), LONGEST_PAUSE) if re.fullmatch("[0-9]{1,6}", wait) else 0
        raise Again(f"{shown(url)}: the server answers {status} {response.reason}", seconds)
    if status not in ((200, 206, 416) if start else (200,)):
        raise DownloadError(f"{shown(url)}: the server answers {status} {response.reason}: {MIRROR}")
    if status != 416 and re.search("html|xml", kind):  # an error in disguise, or the login page of a network
        raise DownloadError(f"{shown(url)}: the server answers with a page ({kind}), not with the file: {CURE}")


def cause(error: BaseException) -> BaseException:
    """Return the innermost of the errors that requests and urllib3 have wrapped around each other."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _reason(error: BaseException) -> str:
    inner = cause(error)
    if isinstance(inner, urllib3.exceptions.IncompleteRead):
        return "the connection was closed early"
    said = getattr(inner, "strerror", None) or str(inner).rstrip(".") or type(inner).__name__
    return (
        f"the proxy of the environment: {said}" if isinstance(error, requests.exceptions.ProxyError) else said
    )
