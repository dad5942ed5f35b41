"""A file over HTTP, however the network behaves: time-outs, repeated attempts, causes told in a few words."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import sleep
from typing import TypeVar

import requests
import urllib3
from tqdm import tqdm

from picogpt import PicogptError

TIMEOUTS = 10, 30  # seconds to connect, and to wait for the next bytes
PAUSES = 1, 2, 4, 8, 16  # seconds before another attempt, as long as no attempt brings anything new
LONGEST_PAUSE = 60  # seconds, when the server asks for one
CHUNK = 1 << 18  # bytes at a time: more would be faster, and a broken connection would lose more
MIRROR = "name a mirror in PICOGPT_BASE_URL, or place the files by hand (`python -m picogpt.verify` lists them)"
CURE = f"check the network, {MIRROR}"

T = TypeVar("T")


class DownloadError(PicogptError):
    """A model that could not be fetched."""


class Again(Exception):
    """Something that another attempt may mend, after a pause of `seconds` at least."""

    def __init__(self, said: str, seconds: int = 0) -> None:
        super().__init__(said)
        self.seconds = seconds


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
    try:
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUTS) as response:
            _check_status(response, url, start)
            yield response
    except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
        raise DownloadError(f"{url}: {_reason(error)}: {CURE}") from error
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise Again(f"{url}: {_reason(error)}") from error
    except requests.RequestException as error:
        raise DownloadError(f"{url}: {_reason(error)}: {CURE}") from error


def _check_status(response: requests.Response, url: str, start: int) -> None:
    status, kind = response.status_code, response.headers.get("Content-Type", "")
    if status in (408, 429) or status >= 500:
        wait = response.headers.get("Retry-After", "")
        seconds = min(int(wait), LONGEST_PAUSE) if wait.isdecimal() else 0
        raise Again(f"{url}: the server answers {status} {response.reason}", seconds)
    if status not in ((200, 206, 416) if start else (200,)):
        raise DownloadError(f"{url}: the server answers {status} {response.reason}: {MIRROR}")
    if status != 416 and re.search("html|xml", kind):  # an error in disguise, or the login page of a network
        raise DownloadError(f"{url}: the server answers with a page ({kind}), not with the file: {CURE}")


def _reason(error: BaseException) -> str:
    """What the innermost error says, of those that requests and urllib3 have wrapped around each other."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, urllib3.exceptions.IncompleteRead):
        return "the connection was closed early"
    return getattr(error, "strerror", None) or str(error).rstrip(".")


def say(text: str) -> None:
    """Write a line to standard error, if that is open, and above a progress bar, if there is one."""
    if sys.stderr is not None:
        tqdm.write(f"picogpt: {text}", file=sys.stderr)
