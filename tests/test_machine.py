"""picogpt/machine.py: threads that are lent and given back, and what the machine has."""

import os
import threading
from pathlib import Path

import psutil
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from picogpt import machine

pytestmark = pytest.mark.skipif(not machine.blas().info(), reason="threadpoolctl does not know this BLAS")


def threads():
    """What the oracle says; of SciPy's BLAS, which other tests may load later, nothing."""
    ours = {library["filepath"] for library in machine.blas().info()}
    return {library["num_threads"] for library in threadpool_info() if library["filepath"] in ours}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Four BLAS threads on four cores, and nobody's wish in the environment."""
    for name in machine.THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 4)
    with threadpool_limits(4, user_api="blas"):
        give_up_control()
        yield
        give_up_control()


def give_up_control():
    for library in machine.blas().lib_controllers:
        getattr(library, "clear_controlling_thread", lambda: None)()


def test_a_core_is_spared_while_a_token_is_computed():
    assert threads() == {4} and machine.blas_threads() == 4 and machine.decode_threads() == 3


@pytest.mark.parametrize("name", ["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"])
def test_whoever_chose_the_number_of_threads_gets_it(name, monkeypatch):
    monkeypatch.setenv(name, "4")
    assert machine.decode_threads() == 4
    monkeypatch.setenv(name, "")
    assert machine.decode_threads() == 3


@pytest.mark.parametrize("n, cores", [(3, 4), (1, 4), (1, 1)])
def test_no_core_is_spared_where_there_is_one_to_spare_or_only_one(n, cores, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: cores)
    with threadpool_limits(n, user_api="blas"):
        assert machine.decode_threads() == n


def test_threads_are_lent_to_one_caller_and_given_back():
    with machine.limited_to(1) as first:
        assert first and threads() == {1}
        with machine.limited_to(3) as second:  # a tap that generates; a thread of a process that was forked
            assert not second and threads() == {1}
        assert threads() == {1}
    assert threads() == {4}
    with pytest.raises(KeyError), machine.limited_to(2):
        raise KeyError
    assert threads() == {4}


def test_limits_work_in_any_thread_after_another_has_had_its_own():
    seen = []

    def use():
        with machine.limited_to(3):
            seen.append(threads())

    users = [threading.Thread(target=use) for _ in range(2)]
    with machine.limited_to(2):
        pass
    for user in users:
        user.start()
        user.join()
    assert seen == [{3}, {3}]


def test_set_threads_is_for_libraries_that_are_loaded_and_that_will_be(monkeypatch):
    machine.set_threads(2)
    assert threads() == {2}
    names = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"}
    assert {os.environ[name] for name in names} == {"2"} and names < set(machine.THREADS)
    assert machine.decode_threads() == 2
    for name in machine.THREADS:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "groups, path, limit",
    [
        ("0::/user/1", "/sys/fs/cgroup/user/1/memory.max", "1000000"),
        ("0::/user/1", "/sys/fs/cgroup/memory.max", "1000000"),
        ("3:cpu:/x\n4:memory:/y", "/sys/fs/cgroup/memory/y/memory.limit_in_bytes", "1000000"),
        ("4:memory:/y", "/sys/fs/cgroup/memory/memory.limit_in_bytes", "1000000"),
        ("0::/user/1", "/sys/fs/cgroup/user/1/memory.max", "max"),
        ("4:cpu:/y", "/sys/fs/cgroup/memory/memory.limit_in_bytes", "1000000"),
        ("", "", ""),
    ],
)
def test_memory_is_the_machines_or_the_containers(monkeypatch, groups, path, limit):
    files = {Path("/proc/self/cgroup"): groups, Path(path): limit}

    def read_text(path, encoding):
        if files.get(path):
            return files[path] + "\n"
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", read_text)
    total, available = machine.memory()
    if limit.isdecimal() and "cpu:/y" not in groups:
        assert total == available == 1_000_000
    else:
        assert total == psutil.virtual_memory().total
        assert abs(available - psutil.virtual_memory().available) < total / 4


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.undo()
    if hasattr(os, "sched_setaffinity"):
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(mine)})
        try:
            assert machine.cores() == 1
        finally:
            os.sched_setaffinity(0, mine)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert machine.cores() == os.cpu_count()
