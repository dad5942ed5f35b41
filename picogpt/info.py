"""What is here: models, versions, the BLAS under NumPy: `python -m picogpt.info`."""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from picogpt import __version__
from picogpt.command import exit_status, write
from picogpt.machine import THREADS, blas, cores, memory
from picogpt.model_dirs import EMBEDDED, find_model_dir, is_whole, model_dirs

SETTINGS = ("PICOGPT_MODELS_DIR", "PICOGPT_BASE_URL", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", *THREADS)
KERNEL = "from picogpt.info import kernel; print(kernel())"


def report() -> None:
    """Write it all to standard output, a line a fact; what should be changed comes last."""
    write(f"picogpt {__version__}, Python {platform.python_version()}, {platform.platform()}\n")
    write(", ".join(f"{name} {_version(name)}" for name in ("numpy", "regex", "jax")) + "\n")
    total, available = memory()
    write(f"{cores()} cores, {total / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB available\n")
    for library in blas().info():
        kernel_of = f"kernel {library.get('architecture', 'unknown')}, {library['num_threads']} threads"
        write(f"BLAS: {library['internal_api']} {library['version']}, {kernel_of}\n")
    if not blas().info():
        write("BLAS: one that threadpoolctl does not know, such as Apple's Accelerate\n")
    for name in SETTINGS:
        if name in os.environ:
            write(f"{name}={os.environ[name]}\n")
    write("models, in the order in which they are looked for:\n")
    for directory in model_dirs():
        try:
            found = sorted(path for path in directory.iterdir() if path.is_dir())
        except OSError:  # not there, or not ours to read
            found = []
        names = ", ".join(path.name + ("" if is_whole(path) else " (not whole)") for path in found)
        write(f"  {directory}: {names or 'none'}\n")
    write(f"  {EMBEDDED} is in {find_model_dir(EMBEDDED)}\n")
    write(advice())


def kernel() -> str:
    """Return the name of the processor for which NumPy's BLAS multiplies; "" if it is not known."""
    return next((library.get("architecture") or "" for library in blas().info()), "")


def advice() -> str:
    """Return a line on a kernel that OPENBLAS_CORETYPE has set in place of the processor's own, or nothing."""
    forced = os.environ.get("OPENBLAS_CORETYPE")
    if not forced:
        return ""
    others = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    own = subprocess.run(
        [sys.executable, "-c", KERNEL], env=others, capture_output=True, text=True
    ).stdout.strip()
    if own in ("", kernel()):
        return ""
    effect = f"makes NumPy use the kernel {kernel()}, but the processor's own is {own}"
    return f"WARNING: OPENBLAS_CORETYPE={forced} {effect}: unset OPENBLAS_CORETYPE\n"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m picogpt.info` takes no arguments."""
    about = "Show which models are here, versions, and the BLAS under NumPy with its kernel and threads."
    argparse.ArgumentParser(prog="python -m picogpt.info", description=about).parse_args(argv)
    return exit_status(report)


if __name__ == "__main__":
    sys.exit(main())
