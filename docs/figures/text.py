"""The figure of the chapter on text."""

import regex
from figures.common import BLUE, ORANGE
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from picogpt.encoder import PATTERN

TEXT = """'Tis Juliet's: "Good night, good night!"
I'll say it 1000 times...
    (parting is sweet)"""
KINDS = {  # how an alternative of the pattern begins: its name, the colours of box and writing
    r" ?\p{L}": ("letters", "#cfe2f3", "black"),
    r" ?\p{N}": ("numbers", BLUE, "white"),
    " ?[^": ("the rest", "#f7d38b", "black"),
    "'": ("an ending", ORANGE, "white"),
    r"\s": ("white space", "#c8c8c8", "black"),
}


def cuts():
    """A text in boxes, one for each piece; the colour tells which alternative of the pattern took it."""
    figure = Figure(figsize=(7, 1.75))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 42), ylim=(4.6, -0.1))
    axes.axis("off")
    column = line = 0
    for piece, kind in pieces(TEXT):
        for part in regex.findall(r"\n|[^\n]+", piece):  # a newline is drawn where it stands, then obeyed
            _box(axes, column, line, part, kind)
            column, line = (0, line + 1) if part == "\n" else (column + len(part), line)
    for i, (name, *colours) in enumerate(KINDS.values()):
        _box(axes, 8.4 * i, 3.7, " ", ("", *colours))
        axes.text(8.4 * i + 1.2, 4.12, name, va="center_baseline")
    return figure


def pieces(text):
    """Each piece of a text, with the entry of KINDS for the alternative that took it."""
    alternatives = PATTERN.pattern.split("|")
    for match in regex.finditer("|".join(f"({part})" for part in alternatives), text):
        taken = alternatives[match.lastindex - 1]
        yield match[0], next(kind for begin, kind in KINDS.items() if taken.startswith(begin))


def _box(axes, column, line, text, kind):
    """Write a text in a box of its kind's colours, a character a column, what is white made visible."""
    _, colour, writing = kind
    how = {"color": writing, "family": "monospace", "ha": "center", "va": "center_baseline"}
    axes.add_patch(Rectangle((column + 0.05, line), len(text) - 0.1, 0.82, color=colour, linewidth=0))
    for i, character in enumerate(text.replace(" ", "·").replace("\n", "↵")):
        axes.text(column + i + 0.5, line + 0.42, character, **how)
