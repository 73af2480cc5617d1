"""The tutorial: one source for the page and the notebook, executed with real ranks."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.docs.pages import DOCS

nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[docs]'")


@pytest.fixture(scope="module")
def made() -> Any:
    pytest.importorskip("jupytext", reason="pip install -e '.[docs]'")
    found = importlib.util.spec_from_file_location("notebook", DOCS / "_site" / "notebook.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _cells(book: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source.strip()) for cell in book.cells]


def test_notebook_is_the_page(made):
    """`make notebook` makes it so."""
    page = made.PAGE.read_text()
    book = nbformat.read(made.NOTEBOOK, as_version=4)
    assert _cells(book) == _cells(made.notebook(page))
    assert made.printed(book) == made.shown(page)
    assert sum(kind == "code" for kind, _ in _cells(book)) == page.count("```python\n") >= 5


@pytest.mark.more
@pytest.mark.timeout(1200)
def test_tutorial_runs_and_prints_what_it_shows(made):
    page = made.PAGE.read_text()
    assert made.printed(made.execute(made.notebook(page), timeout=1000)) == made.shown(page)
