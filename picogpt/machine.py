"""What the machine has: cores, memory, and the BLAS that multiplies NumPy's matrices, with its threads."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

# OpenBLAS reads the first two; then Intel's, Apple's, and the last XLA, on which JAX runs.
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NPROC")

_limiting = Lock()


def cores() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> tuple[int, int]:
    """Bytes of memory: in all, and not in use by other programs; both no more than a container may use."""
    import psutil

    total, available = psutil.virtual_memory()[:2]
    return min([total, *_container_limits()]), min([available, *_container_limits()])


def _container_limits() -> list[int]:
    """The limits of memory that Linux has set for this process's control group, if any."""
    limits = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):  # of the second version of control groups, and of the first
                file = "memory{}/memory.limit_in_bytes" if controllers else "{}/memory.max"
                for place in (group, ""):  # a container sees its own group at the root
                    with suppress(OSError, ValueError):  # no such file; "max"
                        limits.append(
                            int(Path("/sys/fs/cgroup", file.format(place).lstrip("/")).read_text("utf-8"))
                        )
    return limits


@functools.cache
def blas() -> Any:
    """The BLAS libraries that NumPy has loaded, as threadpoolctl's controller."""
    import numpy  # noqa: F401  (it loads them)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def blas_threads() -> int:
    """How many threads the BLAS uses at present; 1 for one that threadpoolctl does not know."""
    return min((library["num_threads"] for library in blas().info()), default=1)


def set_threads(n: int) -> None:
    """Compute with `n` threads from now on, in libraries that are loaded and in those that will be."""
    os.environ.update(dict.fromkeys(THREADS, str(n)))
    blas().limit(limits=n)


def decode_threads() -> int:
    """How many BLAS threads compute a token: one fewer than cores, so that a busy neighbour finds a core.

    A BLAS with as many threads as cores waits, in every product, for the thread that a neighbour has put off.
    Who has chosen a number, in the environment variables that OpenBLAS reads, gets that number.
    """
    n = blas_threads()
    chosen = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    return n - 1 if n > 1 and n >= cores() and not chosen else n


@contextmanager
def limited_to(n: int) -> Iterator[bool]:
    """Let the BLAS use `n` threads, and say whether it does: not while somebody else has it limited.

    The number is the whole process's. Nobody waits here: who holds the lock may be us, or a thread that a fork
    has left behind.
    """
    if not _limiting.acquire(blocking=False):
        yield False
        return
    try:
        with blas().limit(limits=n):
            yield True
    finally:
        # threadpoolctl 3.8 obeys only the thread that set a limit first, unless that thread gives up the right.
        for library in blas().lib_controllers:
            getattr(library, "clear_controlling_thread", lambda: None)()
        _limiting.release()
