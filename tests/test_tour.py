"""The notebook: what it shows is what its cells print, in Jupyter and without, with matplotlib and without."""

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "docs" / "tour.ipynb"


def code_cells(notebook) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def stored() -> list[dict]:
    return code_cells(json.loads(TOUR.read_text(encoding="utf-8")))


def text_of(cell, *, printed_only=False) -> str:
    """What a cell says in text; a figure is left out, and so is what Jupyter says of it in words."""
    texts = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            assert output["name"] == "stdout"
            texts.append("".join(output["text"]))
        elif "image/png" not in output["data"] and not printed_only:
            texts.append("".join(output["data"]["text/plain"]))
    return "".join(texts)


def test_ten_cells_are_stored_with_what_they_show():
    cells = stored()
    assert [cell["execution_count"] for cell in cells] == [*range(1, 11)]
    assert all(cell["outputs"] for cell in cells)
    plots = [cell for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert [cell["id"] for cell in plots] == ["plot"]
    assert plots[0]["metadata"]["mystnb"]["image"]["alt"]


def test_every_cell_shows_in_jupyter_what_is_stored(monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(TOUR, as_version=4)
    for cell in code_cells(notebook):
        cell["outputs"] = []
    nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    for cell, expected in zip(code_cells(notebook), stored(), strict=True):
        assert text_of(cell) == text_of(expected), cell["source"]
        assert ["image/png" in output.get("data", {}) for output in cell["outputs"]].count(True) == (
            cell["id"] == "plot"
        )


def test_every_cell_prints_it_in_plain_python_and_the_plot_falls_back_to_figures(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    namespace: dict = {}
    for cell in stored():
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec("".join(cell["source"]), namespace)
        expected = text_of(cell, printed_only=True)
        if cell["id"] == "plot":
            expected += f"{np.round(namespace['pattern'][3], 1)}\n"
            assert expected.rstrip().endswith("[0.  1.  0.  0.  0.  0.  0.  0.  0.  0. ]]")
        assert out.getvalue() == expected, cell["id"]
