"""What several test files share: one BLAS thread, and the data that lies beside the checkout."""

import os
import sys

# With as many threads as cores OpenBLAS collapses as soon as a neighbour holds a core.
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# No test reaches the network: nobody listens there.
os.environ["PICOGPT_BASE_URL"] = "http://127.0.0.1:1"

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

ASSETS = Path(__file__).parents[2] / "shared" / "assets"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real data that is not part of the project (OpenAI's files, texts, recorded runs)."""
    if not ASSETS.is_dir():
        pytest.skip("needs ../shared/assets, which lies beside the checkout on the project's own machines")
    return ASSETS


def pytest_configure(config):
    if sys.platform == "darwin":  # before 2.4 NumPy reports overflow in Accelerate's products of small numbers
        config.addinivalue_line("filterwarnings", "ignore:.* encountered in matmul:RuntimeWarning")


def pytest_addoption(parser):
    parser.addoption("--skipped", action="store_true", help="run only what the last run skipped; skip nothing")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--skipped"):
        skipped = tuple(config.cache.get("picogpt/skipped", []))
        items[:] = [item for item in items if item.nodeid.startswith(skipped)]


def pytest_sessionfinish(session):
    reports = session.config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    if session.config.getoption("--skipped"):
        nothing_to_do = session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
        session.exitstatus = int(bool(reports)) if nothing_to_do else session.exitstatus or int(bool(reports))
    elif hasattr(session.config, "cache"):
        session.config.cache.set("picogpt/skipped", sorted({report.nodeid for report in reports}))
