"""The directive `annotated`: the source of a function at the left, notes on it at the right.

    ```{annotated} picogpt.model.layer_norm
    A note on the first lines.

    @ variance =
    A note on the lines from the one that holds this text.
    ```

The source is read from the package while the book is built. A quotation that is in no line, or in more than
one, fails the build, and so does a line of the modules in BOOK that the book shows twice or not at all.
"""

import ast
import functools
import html
from collections import Counter
from importlib.util import find_spec
from itertools import groupby, pairwise
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

BOOK = [f"picogpt.{room}" for room in ("encoder", "model", "sampling", "generation", "cache", "tensor_bundle")]
DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
logger = logging.getLogger(__name__)


class Module:
    """A module's lines, numbered from 1, and where in them its parts stand."""

    def __init__(self, name):
        self.path = Path(find_spec(name).origin)
        text = self.path.read_text(encoding="utf-8")
        self.lines = ["", *text.splitlines()]
        self.tree = ast.parse(text)
        formatter = HtmlFormatter(nowrap=True)
        self.coloured = ["", *highlight(text, PythonLexer(stripnl=False), formatter).splitlines()]

    def span(self, names):
        """The lines of what `names` lead to, such as ["Encoder", "encode"], with the comments above it."""
        if not names:
            return range(1, len(self.lines))
        if names == ["__doc__"]:
            return range(1, self.tree.body[0].end_lineno + 1)
        node = self.tree
        for name in names:
            found = [child for child in node.body if name in _names(child)]
            if len(found) != 1:
                raise LookupError(f"{self.path.name} defines {'.'.join(names)} {len(found)} times")
            node = found[0]
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        while self.lines[first - 1].lstrip().startswith("#"):
            first -= 1
        return range(first, node.end_lineno + 1)

    def line_with(self, text, lines):
        """The one among `lines` that holds `text`."""
        found = [i for i in lines if text in self.lines[i]]
        if len(found) != 1:
            raise LookupError(f"{self.path.name} has {text!r} in {len(found)} of the lines left to choose from")
        return found[0]

    def substance(self):
        """The lines that the book has to show: all but blank ones, imports and `if __name__ ...`."""
        rest = {i for i, line in enumerate(self.lines) if line.strip()}
        for node in self.tree.body:
            program = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
            if program or isinstance(node, ast.Import | ast.ImportFrom):
                rest -= set(range(node.lineno, node.end_lineno + 1))
        return rest


def _names(node):
    if isinstance(node, DEFINITIONS):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)]


module = functools.cache(Module)


class Annotated(SphinxDirective):
    required_arguments = 1
    final_argument_whitespace = True
    has_content = True
    option_spec = {"from": directives.unchanged, "until": directives.unchanged}  # noqa: RUF012

    def run(self):
        try:
            source, rows = self.rows()
        except (LookupError, AttributeError) as error:
            logger.warning("annotated %s: %s", self.arguments[0], error, location=self.get_location())
            return []
        self.env.note_dependency(str(source.path))
        table = nodes.container(classes=["annotated"])
        for lines, note in rows:
            shown = self.env.annotated_lines.setdefault(self.env.docname, [])
            shown += [(source.path.stem, i) for i in lines]
            row = nodes.container(classes=["annotated-row"])
            row += nodes.raw("", _code(source, lines), format="html")
            row += nodes.container("", *note, classes=["annotated-note"])
            table += row
        title = f"{source.path.name}, from line {rows[0][0][0]}"
        return [nodes.paragraph("", title, classes=["annotated-file"]), table]

    def rows(self):
        """The module, and pairs of some of its lines and the nodes of the note on them."""
        parts = [argument.split(".") for argument in self.arguments[0].split()]
        rooms = {".".join(names[:2]) for names in parts}
        if len(rooms) > 1 or not rooms <= {*BOOK}:
            raise LookupError(f"{', '.join(sorted(rooms))}: give one of {', '.join(BOOK)}")
        source = module(*rooms)
        lines = [i for names in parts for i in source.span(names[2:])]
        if "from" in self.options:
            lines = lines[lines.index(source.line_with(self.options["from"], lines)) :]
        if "until" in self.options:
            lines = lines[: lines.index(source.line_with(self.options["until"], lines[1:]))]
        starts, notes = [0], [[]]
        for number, line in enumerate(self.content):
            if line.startswith("@ "):
                after = lines[starts[-1] + (len(starts) > 1) :]
                starts.append(lines.index(source.line_with(line[2:].strip(), after)))
                notes.append([])
            else:
                notes[-1].append((line, number))
        pieces = [lines[start:stop] for start, stop in pairwise([*starts, len(lines)])]
        rows = [(some, self.parse_note(note)) for some, note in zip(pieces, notes, strict=True)]
        if lost := [note for some, note in rows if note and not some]:
            raise LookupError(f"a note stands before the first line: {lost[0][0].astext():.40}")
        return source, [(some, note) for some, note in rows if some]

    def parse_note(self, note):
        text = "\n".join(line for line, _ in note)
        offset = self.content_offset + (note[0][1] if note else 0)
        return self.parse_text_to_nodes(text, offset=offset) if text.strip() else []


def _code(source, lines):
    """The lines as HTML, each with its number, the blank ones at both ends left out."""
    while lines and not source.lines[lines[0]].strip():
        lines = lines[1:]
    while lines and not source.lines[lines[-1]].strip():
        lines = lines[:-1]
    rows = "".join(map(functools.partial(_line, source), lines))
    label = html.escape(f"{source.path.name}, lines {lines[0]} to {lines[-1]}")
    return f'<div class="highlight"><pre aria-label="{label}">{rows}</pre></div>'


def _line(source, i):
    """A line of its own, whose indent the style needs to wrap what is too long for the page."""
    indent = len(source.lines[i]) - len(source.lines[i].lstrip())
    number = f'<span class="linenos">{i:>3}</span>'
    text = source.coloured[i].replace("-&gt;", '<span class="arrow">-&gt;</span>')
    return f'<span class="line" style="--indent: {indent}ch">{number}{text}\n</span>'


def begin(app):
    if not hasattr(app.env, "annotated_lines"):
        app.env.annotated_lines = {}


def forget(app, env, docname):
    env.annotated_lines.pop(docname, None)


def check_whole(app, env):
    """Warn of every line that is not shown once."""
    shown = Counter(line for lines in env.annotated_lines.values() for line in lines)
    for name in BOOK:
        source, stem = module(name), name.rpartition(".")[2]
        for times, lines in groupby(sorted(source.substance()), key=lambda i, stem=stem: shown[stem, i]):
            first, *_, last = [*lines] * 2
            if times != 1:
                text = source.lines[first].strip()
                message = "the book shows lines %s to %s of %s %s times, not once: %s"
                logger.warning(message, first, last, source.path.name, times, text)


def setup(app):
    app.add_directive("annotated", Annotated)
    app.connect("builder-inited", begin)
    app.connect("env-purge-doc", forget)
    app.connect("env-check-consistency", check_whole)
    return {"parallel_read_safe": False}
