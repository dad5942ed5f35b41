"""docs/: the book is built without a warning, and anything in it that does not match the code is one."""

import re
import subprocess
import sys
from pathlib import Path

import browser
import pytest
from browser import grave_findings, overflow

pytest.importorskip("sphinx", reason='needs the book\'s tools: pip install -e ".[docs]"')
pytest.importorskip("myst_nb", reason='needs the book\'s tools: pip install -e ".[docs]"')

chromium, visit = browser.chromium, browser.visit  # the fixtures
DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(
    str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md") if "_build" not in path.parts
)


def text_of(page):
    return (DOCS / f"{page}.md").read_text("utf-8")


def sphinx(source, output):
    """Build `source` as `make docs` does."""
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-c", DOCS]
    command += ["-d", output / "doctrees", source, output / "html"]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=DOCS.parent)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    built = sphinx(DOCS, folder)
    assert built.returncode == 0, built.stderr
    return folder / "html"


class TestBook:
    def test_asks_no_network_for_anything(self, book):
        for page in book.rglob("*.html"):
            wanted = re.findall(
                r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="([^"]*)"', page.read_text("utf-8")
            )
            assert wanted
            assert not [address for address in wanted if "//" in address], page
        for style in book.rglob("*.css"):
            assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text("utf-8")), style

    def test_every_image_is_there_and_described(self, book):
        images = set()
        for page in book.rglob("*.html"):
            for tag in re.findall(r"<img\b[^>]*>", page.read_text("utf-8")):
                source = page.parent / re.search(r'src="([^"]*)"', tag)[1]
                assert source.is_file(), tag
                assert re.search(r'alt="[^"]{20,}"', tag), tag
                images.add(source.stem)
        named = {name for page in PAGES for name in re.findall(r"\{computed-figure\} (\S+)", text_of(page))}
        assert named and named <= images

    def test_every_section_of_source_says_what_goes_wrong_and_where_it_is_from_and_asks(self):
        for chapter in (name for name in PAGES if name.startswith("book")):
            sections = re.split(r"^## ", text_of(chapter), flags=re.MULTILINE)[1:]
            of_source = [part for part in sections if "```{annotated}" in part]
            assert of_source, chapter
            for part in ("goes wrong if you change", "**Source", "{exercise}"):
                assert [section.splitlines()[0] for section in of_source if part not in section] == [], chapter

    def test_formulas_are_mathml(self, book):
        page = (book / "book" / "layer_norm.html").read_text("utf-8")
        assert "<math" in page
        assert "\\frac" not in page


@pytest.mark.browser
class TestInABrowser:
    @pytest.mark.parametrize("name", [*PAGES, "tour"])
    def test_every_page_fits(self, book, visit, name):
        page = visit(book / f"{name}.html", root=book)
        assert overflow(page) == 0
        page.set_viewport_size({"width": 390, "height": 844})
        assert overflow(page) == 0

    @pytest.mark.parametrize("dark", [False, True])
    @pytest.mark.parametrize("name", ["index", "book/layer_norm", "conform", "tour"])
    def test_everybody_can_use_it(self, book, visit, name, dark):
        assert grave_findings(visit(book / f"{name}.html", dark=dark, root=book)) == []

    def test_source_and_note_stand_side_by_side_or_on_a_phone_below_each_other(self, book, visit):
        page = visit(book / "book" / "layer_norm.html", root=book)
        row = page.locator(".annotated-row", has_text="variance =").first
        source, note = row.locator("pre"), row.locator(".annotated-note")
        left, right = source.bounding_box(), note.bounding_box()
        assert right["x"] >= left["x"] + left["width"]
        assert abs(right["y"] - left["y"]) < 10
        page.set_viewport_size({"width": 390, "height": 844})
        above, below = source.bounding_box(), note.bounding_box()
        assert below["y"] >= above["y"] + above["height"]

    def test_an_answer_is_folded_until_asked_for(self, book, visit):
        page = visit(book / "book" / "attention.html", root=book)
        answer = page.locator(".exercise details").first
        content = answer.locator("p").first
        assert not content.is_visible()
        answer.locator("summary").press("Enter")
        assert content.is_visible()

    def test_search_needs_no_server(self, book, visit):
        page = visit(book / "search.html", root=book)
        page.goto(f"{page.url}?q=softmax")
        page.locator("#search-results li a", has_text="Attention").first.wait_for()


EXERCISE = "````{{exercise}}\nQ\n---\n```pycon\n>>> {}\n```\n````"
FAULTS = {  # page: its text, and what the build is to say of it
    "stale": ("```{annotated} picogpt.model.keep\n@ return y\n```", "'return y' in 0 of the lines left"),
    "ambiguous": ("```{annotated} picogpt.model.gelu\n@ y += 1.0\n```", "'y += 1.0' in 2 of the lines left"),
    "gone": ("```{annotated} picogpt.model.geglu\n```", "defines geglu 0 times"),
    "elsewhere": ("```{annotated} picogpt.train.main\n```", "picogpt.train: give one of picogpt.encoder,"),
    "rooms": (
        "```{annotated} picogpt.model.keep picogpt.cache.packed\n```",
        "picogpt.cache, picogpt.model: give one of picogpt.encoder,",
    ),
    "lost": (
        "```{annotated} picogpt.model.keep\nLost.\n\n@ def keep\nHere.\n```",
        "before the first line: Lost.",
    ),
    "example": ("```pycon\n>>> 1 + 1\n3\n```", "Expected:\n    3\nGot:\n    2"),
    "raises": ("```pycon\n>>> import picogpt.nothing\n```", "ModuleNotFoundError"),
    "unordered": ("```pycon\n>>> x + 1\n2\n>>> x = 1\n```", "NameError"),
    "skipped": (f"{EXERCISE.format('only_here = 1')}\n\n```pycon\n>>> only_here\n1\n```", "name 'only_here'"),
    "alone": (f"{EXERCISE.format('of_one = 1')}\n\n{EXERCISE.format('_ = of_one')}", "name 'of_one'"),
    "value": ("It is {value}`0.67 <2 / 3>`, {value}`0.66 <2 / 3>`", "2 / 3 is 0.666"),
    "text": ("It is {value}`yes <'no'>`", "is 'no', not yes"),
    "nothing": ("It is {value}`1 <None>`", "the value None cannot be computed: TypeError"),
    "commas": ("It is {value}`1,2 <12>`", "12 is 12, not 1,2"),
    "unknown": ("It is {value}`1 <one>`", "the value one cannot be computed: NameError"),
    "mistake": ("{mistake}`erf_gelu` {mistake}`erf_gulu`", "'mistake-erf-gulu'"),
    "figure": ("```{computed-figure} nothing.here\n:alt: nothing\n```", "the figure nothing.here"),
    "blind": ("```{computed-figure} attention.pattern\n```", "the figure attention.pattern has no :alt:"),
    "link": ("[there](nowhere.md)", "nowhere.md"),
    "heading": ("[there](#nowhere)", "'nowhere'"),
    "maths": (r"$\nosuch{1}$ and $x$", "mathematics: "),
    "exercise": ("```{exercise}\nWhy?\n```", "a question, a line of ---, an answer"),
    "unanswered": ("```{exercise}\nWhy?\n---\n```", "a question, a line of ---, an answer"),
    "twice": ("```{annotated} picogpt.model.softmax\n```\n" * 2, "of model.py 2 times, not once"),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the build says of pages with a fault each."""
    folder = tmp_path_factory.mktemp("faults")
    source = folder / "docs"
    source.mkdir()
    pages = "\n".join([*FAULTS, "right", "implementing-gpt2"])
    (source / "index.md").write_text(f"# Faults\n\n```{{toctree}}\n{pages}\n```\n")
    for name, (text, _) in FAULTS.items():
        (source / f"{name}.md").write_text(f"# Page\n\n{text}\n")
    right = (
        "# Page\n\n```pycon\n>>> n = 1234\n```\n\n{value}`1,234 <n>` {value}`1.2e3 <n>` {mistake}`erf_gelu`\n"
    )
    (source / "right.md").write_text(right)
    catalogue = (DOCS / "implementing-gpt2.md").read_text("utf-8").partition("## 8.")[2]
    (source / "implementing-gpt2.md").write_text(
        f"# Catalogue\n\n##{catalogue}".partition("## Sources")[0], "utf-8"
    )
    built = sphinx(source, folder)
    assert built.returncode == 1
    return built.stderr


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_the_build(said, name):
    assert FAULTS[name][1] in said


def test_what_is_right_is_not_complained_of(said):
    assert "right.md" not in said
    assert "mistake-erf-gelu'" not in said
    assert said.count("2 / 3 is") == 1  # 0.67 agrees


def test_a_line_that_the_book_leaves_out_fails_the_build(said):
    assert re.search(r"the book shows lines 1 to \d+ of generation.py 0 times", said)
