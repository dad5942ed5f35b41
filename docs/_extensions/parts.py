"""The smaller parts of the book: exercises, figures that are computed, links to the mistakes, mathematics."""

import html
import importlib
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from pygments.lexers import TextLexer
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from picogpt.mistakes import CATALOGUE

CATALOGUE_PAGE = "implementing-gpt2"
logger = logging.getLogger(__name__)


class Exercise(SphinxDirective):
    """A question, a line of ---, and the answer, which is folded away."""

    has_content = True

    def run(self):
        question, _, answer = "\n".join(self.content).partition("\n---\n")
        if not (question.strip() and answer.strip()):
            logger.warning("an exercise is a question, a line of ---, an answer", location=self.get_location())
        below = self.content_offset + question.count("\n") + 2
        question = self.parse_text_to_nodes(question, offset=self.content_offset)
        answer = self.parse_text_to_nodes(answer, offset=below)
        box = nodes.container("", nodes.paragraph("", "Exercise", classes=["exercise-title"]), *question)
        box["classes"] = ["exercise"]
        box += nodes.raw("", "<details><summary>Answer</summary>", format="html")
        box += answer
        box += nodes.raw("", "</details>", format="html")
        return [box]


class ComputedFigure(SphinxDirective):
    """What a function of docs/figures draws, `attention.pattern` say: a matplotlib Figure."""

    required_arguments = 1
    has_content = True
    option_spec = {"alt": directives.unchanged_required}  # noqa: RUF012

    def run(self):
        import matplotlib

        matplotlib.set_loglevel("error")  # it tells of fonts that it finds
        name = self.arguments[0]
        room, _, function = name.partition(".")
        try:
            drawn = getattr(importlib.import_module(f"figures.{room}"), function)()
        except Exception as error:
            logger.warning("the figure %s: %r", name, error, location=self.get_location())
            return []
        if "alt" not in self.options:
            logger.warning("the figure %s has no :alt:", name, location=self.get_location())
        self.env.note_reread()  # what is drawn stands beside the pages, not in Sphinx's memory of them
        images = Path(self.env.app.outdir) / "_images"
        images.mkdir(parents=True, exist_ok=True)
        drawn.savefig(images / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        up = "../" * self.env.docname.count("/")
        alt = html.escape(nodes.unescape(self.options.get("alt", "")))
        picture = f"{up}_images/{name}.svg"
        figure = nodes.figure()
        figure += nodes.raw("", f'<a href="{picture}"><img src="{picture}" alt="{alt}"></a>', format="html")
        if self.content:
            (paragraph,) = self.parse_content_to_nodes()
            figure += nodes.caption("", "", *paragraph.children)
        return [figure]


def mistake_role(name, rawtext, text, lineno, inliner, options=None, content=()):
    """A link to a row of the catalogue. -n makes a name that is not there fail the build."""
    link = addnodes.pending_xref(
        "", refdomain="std", reftype="ref", reftarget=label(text), refexplicit=True, refwarn=True
    )
    link["refdoc"] = inliner.document.settings.env.docname
    link += nodes.literal("", text)
    return [link], []


def label(mistake):
    return nodes.make_id(f"mistake-{mistake}")


def label_mistakes(app, doctree):
    """Give every row of the catalogue an id, and its name to those who refer to it."""
    if app.env.docname != CATALOGUE_PAGE:
        return
    domain = app.env.get_domain("std")
    for row in doctree.findall(nodes.row):
        for literal in row.findall(nodes.literal):
            if (name := literal.astext()) in CATALOGUE:
                row["ids"].append(label(name))
                domain.anonlabels[label(name)] = CATALOGUE_PAGE, label(name)
                domain.labels[label(name)] = CATALOGUE_PAGE, label(name), name


def visit_math(self, node):
    block = isinstance(node, nodes.math_block)
    try:
        self.body.append(tex2mathml(node.astext(), as_block=block))
    except MathError as error:
        logger.warning("mathematics: %s", error, location=node)
    raise nodes.SkipNode


def accessible(app, pagename, templatename, context, doctree):
    """What furo leaves out: without a mouse one scrolls what has the focus; a heading by role has a level."""
    if "body" in context:
        body = context["body"].replace("<pre><span></span>", '<pre tabindex="0"><span></span>')
        context["body"] = body.replace('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper')
    for name in ("toctree", "furo_navigation_tree"):
        if isinstance(context.get(name), str):
            context[name] = context[name].replace('role="heading">', 'role="heading" aria-level="2">')


def setup(app):
    app.add_directive("exercise", Exercise)
    app.add_directive("computed-figure", ComputedFigure)
    app.add_role("mistake", mistake_role)
    app.add_lexer("numbers", TextLexer)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("doctree-read", label_mistakes)
    app.connect("html-page-context", accessible, priority=900)  # after furo
    return {"parallel_read_safe": False}
