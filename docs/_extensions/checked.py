"""What the book shows is what the program says: examples are run, and values in the prose are computed.

A block of ```pycon is run by doctest; the blocks of a page share one namespace, and each exercise adds its own.
{value}`1,024 <len(wte)>` shows 1,024, if that is what the expression comes to with the names of the page.
"""

import doctest
import re
from collections import defaultdict

import numpy as np
from docutils import nodes
from sphinx.util import logging

NUMBER = re.compile(r"-?(\d+|\d{1,3}(,\d{3})+)(?P<decimals>\.\d+)?(?P<exponent>e[-+]?\d+)?")
logger = logging.getLogger(__name__)


class value(nodes.inline):
    """A value in the prose, with its expression."""


def value_role(name, rawtext, text, lineno, inliner, options=None, content=()):
    shown, _, expression = text.removesuffix(">").partition(" <")
    node = value(text, shown, expression=expression)
    node.source, node.line = inliner.document.get("source"), lineno
    return [node], []


def check_page(app, doctree):
    """Run a page's examples in order, then compare its values."""
    with np.printoptions():  # a page may set them, and is read by itself
        made = run_examples(doctree, app.env.docname)
        of_page = {name: found for names in made.values() for name, found in names.items()}
        for node in list(doctree.findall(value)):
            try:
                found = eval(node["expression"], of_page | made[exercise(node)])
                if not agrees(node.astext(), found):
                    logger.warning("%s is %r, not %s", node["expression"], found, node.astext(), location=node)
            except Exception as error:
                logger.warning("the value %s cannot be computed: %r", node["expression"], error, location=node)
            node.replace_self(nodes.Text(node.astext()))


def run_examples(doctree, page):
    """Run the blocks; return the names that each exercise makes, and under None those of the text between them.

    An exercise may use what the text before it has made, but nothing of another exercise, which may be skipped.
    """
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    made = defaultdict(dict)
    for block in doctree.findall(nodes.FixedTextElement):
        if isinstance(block, nodes.doctest_block) or block.get("language") == "pycon":
            names = {"__name__": "__main__"} | made[None] | made[exercise(block)]
            examples = doctest.DocTestParser().get_doctest(block.astext(), names, page, page, 0)
            said = []
            runner.run(examples, out=said.append, clear_globs=False)
            made[exercise(block)] |= examples.globs
            if said:
                logger.warning("an example is wrong:\n%s", "".join(said), location=block)
    return made


def exercise(node):
    """The exercise that a node is part of, or None."""
    while node is not None and "exercise" not in getattr(node, "attributes", {}).get("classes", ()):
        node = node.parent
    return node


def agrees(shown, found):
    """Whether a text says this value: the same text, or the same number at the decimals that it has."""
    if isinstance(found, str):
        return shown == found
    number = NUMBER.fullmatch(shown.replace("\N{MINUS SIGN}", "-"))
    if not number:
        return shown == str(found)
    decimals = len(number["decimals"] or ".") - 1
    text = f"{found:.{decimals}{'e' if number['exponent'] else 'f'}}"
    return float(text) == float(number[0].replace(",", ""))


def setup(app):
    app.add_node(value)
    app.add_role("value", value_role)
    app.connect("doctree-read", check_page)
    return {"parallel_read_safe": False}
