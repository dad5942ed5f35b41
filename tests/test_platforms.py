"""What other platforms would stumble over, as far as it can be seen from this one."""

import ast
import errno
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from bad_server import serving

from models import random_params
from picogpt import PicogptError, save_checkpoint
from picogpt.checkpoint import load_hparams_and_params
from picogpt.command import write
from picogpt.download import download
from picogpt.model_dirs import OPENAI_SIZES

CHECKOUT = Path(__file__).parents[1]
SMALL = {"n_vocab": 11, "n_ctx": 8, "n_embd": 4, "n_head": 2, "n_layer": 2}
DATA = "model.ckpt.data-00000-of-00001"
# What Python on Windows does not have.
MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios"}
NAMES = {
    "os": "O_CLOEXEC O_DIRECTORY O_NOFOLLOW chown fork geteuid getloadavg getpgid getuid killpg mkfifo nice "
    "posix_fallocate pread pwrite sched_getaffinity sched_setaffinity setsid statvfs sync sysconf uname",
    "signal": "SIGALRM SIGHUP SIGKILL SIGPIPE SIGQUIT SIGUSR1 SIGWINCH alarm pause setitimer",
}
TEXTS = [
    path
    for folder in ("models/shakespeare", "picogpt/vocabulary", "data")
    for path in CHECKOUT.joinpath(folder).iterdir()
    if ".ckpt." not in path.name
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_git_has_left_the_ends_of_lines_alone(path):
    """On Windows it makes them CR LF in what looks like text, unless .gitattributes forbids. Then the embedded
    model's `checkpoint` names no file, and vocabulary and training text are not those that were published."""
    assert b"\r" not in path.read_bytes()


@pytest.mark.parametrize("path", sorted(CHECKOUT.glob("picogpt/*.py")), ids=lambda path: path.name)
def test_what_windows_does_not_have_is_asked_for_first(path):
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
            assert not names & MODULES
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = node.value.id, node.attr
            if name in NAMES.get(module, "").split():
                assert f'hasattr({module}, "{name}")' in source, f"{module}.{name}"


@pytest.mark.parametrize(
    "number, expected",
    [(errno.EINVAL, BrokenPipeError), (errno.EPIPE, BrokenPipeError), (errno.EIO, PicogptError)],
)
def test_a_reader_who_has_enough_is_einval_on_windows(monkeypatch, tmp_path, number, expected):
    class Pipe(io.StringIO):
        def flush(self):
            raise OSError(number, os.strerror(number))

        def fileno(self):
            return file.fileno()

    with (tmp_path / "pipe").open("wb") as file:
        monkeypatch.setattr(sys, "stdout", Pipe())
        with pytest.raises(expected):
            write("text")


# Windows does not delete, rename or replace a file that is open or mapped, and does not cut one that is mapped


def in_use(path: Path, *, mapped_only: bool = False) -> bool:
    """Whether this process has the file mapped, or open: Linux knows."""
    stat = path.stat()
    maps = (line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())
    if any(row[4] == str(stat.st_ino) and int(row[4]) for row in maps):
        return True
    links = [] if mapped_only else Path("/proc/self/fd").iterdir()
    return any(link.exists() and link.samefile(path) for link in links)


@pytest.fixture
def windows_files(monkeypatch):
    """Path's methods as picky as on Windows."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("/proc/self/maps is Linux's")

    def guard(name):
        real = getattr(Path, name)

        def operation(self, *args, **kwargs):
            for path in (self, *args[: name in ("rename", "replace")]):
                # The lock is filelock's to delete, which it does once it is closed.
                if path.is_file() and path.name != ".lock" and in_use(path, mapped_only=name == "write_bytes"):
                    raise PermissionError(errno.EACCES, "in use", str(path))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, operation)

    for name in ("replace", "rename", "unlink", "write_bytes"):
        guard(name)


def test_the_fixture_refuses_what_windows_does(windows_files, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    array = np.memmap(path, mode="r")
    new = tmp_path / "new"
    new.write_bytes(b"")
    for change in (
        path.unlink,
        lambda: path.write_bytes(b""),
        lambda: path.rename("x"),
        lambda: new.replace(path),
    ):
        with pytest.raises(PermissionError):
            change()
    assert array.tobytes() == b"1234"
    del array
    with path.open("rb"), pytest.raises(PermissionError):
        path.unlink()
    new.replace(path)
    path.unlink()


def test_saving_over_a_loaded_model_is_refused_in_a_line_and_does_no_harm(windows_files, tmp_path):
    old, new = (random_params(**SMALL, seed=seed, dtype=np.float32) for seed in (1, 2))
    save_checkpoint(tmp_path, SMALL, old)
    loaded = load_hparams_and_params(tmp_path)[1]
    with pytest.raises(PicogptError, match=f"cannot write .*{DATA}") as error:
        save_checkpoint(tmp_path, SMALL, new)
    assert "\n" not in str(error.value)
    assert np.array_equal(loaded["wte"], old["wte"])
    assert np.array_equal(load_hparams_and_params(tmp_path, verify=True)[1]["wte"], old["wte"])
    del loaded
    save_checkpoint(tmp_path, SMALL, new)
    assert np.array_equal(load_hparams_and_params(tmp_path, verify=True)[1]["wte"], new["wte"])
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_model_is_fetched_again(windows_files, tmp_path, monkeypatch):
    """What was mapped to be verified is let go before it is replaced, also when it was found wrong."""
    hparams = {**SMALL, "n_vocab": 50257}
    monkeypatch.setitem(OPENAI_SIZES, "124M", hparams)
    served = tmp_path / "served" / "124M"
    save_checkpoint(served, hparams, random_params(**hparams, dtype=np.float32))
    (served / "model.ckpt.meta").write_bytes(b"\x0a\x08\x2a\x062.21.0")  # a graph of nothing
    whole = (served / DATA).read_bytes()
    with serving(served.parent) as (url, _):
        for damaged in (b"", whole[:-4], whole[:1000] + b"?" + whole[1001:]):
            directory = download("124M", tmp_path / "models", base_url=url)
            assert (directory / DATA).read_bytes() == whole
            (directory / DATA).write_bytes(damaged)
        download("124M", tmp_path / "models", base_url=url)
    assert (directory / DATA).read_bytes() == whole
