"""Makes docs/tutorial.ipynb out of docs/tutorial.md, and executes it: `make notebook`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parents[1]
PAGE, NOTEBOOK = DOCS / "tutorial.md", DOCS / "tutorial.ipynb"
_OUTPUT = re.compile(r"^```text\n(.*?)^```\n*", re.MULTILINE | re.DOTALL)


def shown(page: str) -> list[str]:
    """Return the outputs that the page shows, in order."""
    return [found[1] for found in _OUTPUT.finditer(page)]


def notebook(page: str) -> Any:
    """Return the page as a notebook to be executed; the outputs that it shows are left out."""
    made = jupytext.reads(_OUTPUT.sub("", page), fmt="md")
    made.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return made


def printed(made: Any) -> list[str]:
    """Return what each cell that printed something printed."""
    texts = (
        "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
        for cell in made.cells
        if cell.cell_type == "code"
    )
    return [text for text in texts if text]


def execute(made: Any, timeout: int = 600) -> Any:
    """Run all cells, in order, and return the notebook with what they printed."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    NotebookClient(
        made,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(DOCS)}},
    ).execute()
    for cell in made.cells:
        cell.metadata = {}
        if cell.cell_type == "code":  # what ranks log is not of the page
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
    return made


if __name__ == "__main__":
    nbformat.write(execute(notebook(PAGE.read_text())), NOTEBOOK)
