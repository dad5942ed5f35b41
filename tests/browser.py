"""A real browser for the tests: Debian's chromium, driven by playwright.

A test file takes the fixtures by `chromium, visit = browser.chromium, browser.visit`, and is marked as
`browser`. Every page is watched: it may log no error, throw nothing, and ask the network for nothing.
$PICOGPT_SCREENSHOTS names a directory that gets a picture of what each test saw last.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
GRAVE = ("serious", "critical")


@pytest.fixture(scope="module")
def chromium():
    """The running browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("needs a browser: chromium, chromium-browser or google-chrome")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def visit(chromium, request):
    """`visit(path, width=1300, dark=False, root=None)` opens a file, which may ask for others below `root`, if
    that is given, and for nothing else. What it does wrong fails the test at its end."""
    contexts, wrong = [], []

    def visit(path: Path, width: int = 1300, dark: bool = False, root: Path | None = None):
        scheme = "dark" if dark else "light"
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5_000)
        url = path.absolute().as_uri()
        own = (url, "data:") if root is None else (f"{root.absolute().as_uri()}/", "data:")
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(own) else None)
        page.goto(url)
        return page

    yield visit
    for n, context in enumerate(contexts):
        if directory := os.environ.get("PICOGPT_SCREENSHOTS"):
            name = re.sub(r"[^\w.-]+", "-", f"{request.node.name}-{n}.png")
            context.pages[0].screenshot(path=Path(directory) / name, full_page=True)
        context.close()
    assert not wrong, wrong


def grave_findings(page) -> list[str]:
    """What axe-core finds that keeps people from using the page: its rules, and where they are broken."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe: pip install -e '.[dev]'"
    )
    found = axe.Axe().run(page, options={"preload": False}).response  # preloading would fetch styles anew
    assert len(found["passes"]) > 10  # it has looked
    grave = [finding for finding in found["violations"] if finding["impact"] in GRAVE]
    return [f"{finding['id']}: {node['html']}" for finding in grave for node in finding["nodes"]]


def overflow(page) -> int:
    """By how many pixels the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
