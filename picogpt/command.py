"""What the commands have in common: an exit status, one line for an error, standard input and output."""

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from picogpt import PicogptError

INTERRUPTED = 130  # as shells have it: 128 + SIGINT


class UsageError(PicogptError):
    """A command line, an input or an output that cannot be used."""


def exit_status(command: Callable[[], int | None], unread: int = 0) -> int:
    """Run a command: return 0, or what it returns, or 2 after one line on what stopped it, or 130 after Ctrl-C.

    `unread` is returned if whoever reads the output stops: not 0 where the status is a verdict.

    Takes over Ctrl-C, and makes standard output UTF-8, whatever the platform prefers.
    """
    signal.signal(signal.SIGINT, leave)
    try:
        if sys.stdout is None:
            raise UsageError("standard output is closed: there is nowhere to write to")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")
        return command() or 0
    except BrokenPipeError:
        return unread
    except KeyboardInterrupt:
        return INTERRUPTED
    except PicogptError as error:
        say(str(error))
    except ModuleNotFoundError as error:
        say(f"the Python module {error.name} is not installed: `pip install .` in the checkout brings them all")
    except MemoryError as error:
        say(f"out of memory ({str(error) or 'no details'}): take a smaller model or a shorter prompt")
    except OSError as error:
        say(f"{error.filename or 'input or output'}: {error.strerror or error}")
    return 2


def leave(*_: Any) -> None:
    """End the process, and the line of a progress bar: a signal handler for Ctrl-C.

    For where Python's own, an exception, would get lost in what is being imported, or in a library's clean-up.
    """
    if os.isatty(2):
        os.write(2, b"\n")
    os._exit(INTERRUPTED)


def count(n: int, what: str) -> str:
    """So many of them: 1 token, 2 tokens."""
    return f"{n} {what}{'s' * (n != 1)}"


def colours() -> int:
    """How many colours standard output shows: 256, 16, or 0 where it is no terminal, or one that wants none
    (NO_COLOR is set: no-color.org)."""
    term = os.environ.get("TERM", "")
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or term == "dumb":
        return 0
    if os.name == "nt":
        os.system("")  # the shell, on its way, makes an old console understand escape sequences
    return 256 if "256" in term or os.environ.get("COLORTERM") or os.name == "nt" else 16


def read() -> str:
    """Return what comes on standard input, as UTF-8 and without a final newline."""
    if sys.stdin is None:
        raise UsageError("standard input is closed: give the text as an argument")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")  # without the mark that Windows puts before UTF-8
    except UnicodeDecodeError as error:
        wrong = f"{error.object[error.start]:#04x} is byte {error.start}"
        raise UsageError(f"standard input is not UTF-8 ({wrong}): convert it, with iconv say") from None
    return re.sub(r"\r?\n\Z", "", text)


def write(text: str) -> None:
    """Write to standard output, now. Raises BrokenPipeError if nobody reads it any more."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Python would try, and complain, once more at exit: let that attempt succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno in (errno.EPIPE, errno.EINVAL):  # EINVAL is how Windows says it
            raise BrokenPipeError from None
        raise UsageError(f"cannot write to standard output: {error.strerror}") from error


def say(message: str) -> None:
    """Write one line to standard error, if that is open, and above a progress bar, if there is one."""
    # What would move the cursor is escaped: it may come from a file, or from a server.
    line = "".join(c if c.isprintable() else " " if c == "\n" else repr(c)[1:-1] for c in message)
    if sys.stderr is not None:
        with suppress(OSError):
            if "tqdm" in sys.modules:  # 40 ms to import, for a bar that is not there
                sys.modules["tqdm"].tqdm.write(f"picogpt: {line}", file=sys.stderr)
            else:
                print("picogpt:", line, file=sys.stderr, flush=True)
