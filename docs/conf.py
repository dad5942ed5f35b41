"""How Sphinx builds the book: `make docs`. The pages work from a file, and ask no network for anything."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS), str(DOCS / "_extensions")]

# With as many threads as cores OpenBLAS collapses as soon as a neighbour holds a core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The notebook is run by a process of its own, which reads the same picogpt.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(DOCS.parent), os.environ.get("PYTHONPATH"))))

from picogpt import __version__  # noqa: E402

project = "picogpt"
version = release = __version__
copyright = "the picogpt authors"

extensions = ["myst_nb", "annotated", "checked", "parts"]
exclude_patterns = ["_build", "_extensions", "figures"]
nitpicky = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

html_theme = "furo"
html_title = "picogpt"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # it would be fetched, which pages from a file may not do
html_show_copyright = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
