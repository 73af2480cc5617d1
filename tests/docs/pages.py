"""The pages of the documentation, and what is in their code blocks.

Every fenced block has a language, and the language says what becomes of it:

- ``python`` and ``pycon`` run, page by page, in the order in which they stand; a page is a program.
- ``sh`` and ``console`` are commands, which are looked at: that what they call exists and takes such options.
- the others (``text``, ``diff``, ``ini``, ``yaml``, ...) are not code of ours.

What a page takes as given stands in the page too, where a reader does not see it::

    <!-- invisible-code-block: python
    import torch
    -->

A block that cannot run says why (``test_pages.SKIPPED`` lists them all)::

    <!-- skip: next "needs a GPU" -->

and a page that says ``<!-- ranks: 2 -->`` runs under as many real ranks as well
(``tests/parallel/*_pages.py``). The reading is sybil's.
"""

from __future__ import annotations

import re
import sys
import unittest
from collections.abc import Iterable
from dataclasses import dataclass, field
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from pathlib import Path
from typing import Any

from sybil import Document, Region, Sybil
from sybil.evaluators.doctest import DocTestEvaluator
from sybil.parsers.abstract.doctest import DocTestStringParser
from sybil.parsers.markdown import (
    ClearNamespaceParser,
    CodeBlockParser,
    PythonCodeBlockParser,
    SkipParser,
)

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RUN = {"python", "pycon"}
COMMANDS = {"sh", "console"}
OTHER = {"text", "diff", "ini", "json", "yaml", "toml", "dockerfile", "html"}

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*(\S*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL)
_RANKS = re.compile(r"^<!-- ranks: (\d+) -->$", re.MULTILINE)


class _Pycon:
    """Reads ``pycon`` blocks as doctests; ``...`` in their output stands for anything."""

    def __init__(self) -> None:
        self._blocks = CodeBlockParser("pycon", lambda example: None)
        self._doctests = DocTestStringParser(DocTestEvaluator(ELLIPSIS | NORMALIZE_WHITESPACE))

    def __call__(self, document: Document) -> Iterable[Region]:
        for block in self._blocks(document):
            for region in self._doctests(block.parsed, document.path):
                region.adjust(block, block.parsed)
                yield region


@dataclass
class Ran:
    """What running a page left."""

    names: dict[str, Any]
    examples: int = 0
    skipped: list[str] = field(default_factory=list)  # reasons


def every_page() -> list[str]:
    """Return all pages, relative to the repository."""
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    return sorted(str(page.relative_to(ROOT)) for page in pages)


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the language and the text of each fenced block that a reader sees."""
    return [(found[2], found[3]) for found in _FENCE.finditer((ROOT / page).read_text())]


def ranks_of(page: str) -> int:
    """Return under how many ranks a page says that it runs; 1 where it says nothing."""
    found = _RANKS.search((ROOT / page).read_text())
    return int(found[1]) if found else 1


def run(page: str) -> Ran:
    """Run a page's blocks one after the other, and return the names that they left."""
    here = str(Path(__file__).parent)
    if here not in sys.path:  # hidden blocks import `given`
        sys.path.insert(0, here)
    sybil = Sybil(
        parsers=[PythonCodeBlockParser(), _Pycon(), SkipParser(), ClearNamespaceParser()], path=str(ROOT)
    )
    document = sybil.parse(ROOT / page)
    document.namespace["__name__"] = "page"  # classes and functions look for their module's name
    ran = Ran(document.namespace)
    for example in document.examples():
        try:
            example.evaluate()
        except unittest.SkipTest as reason:
            ran.skipped.append(str(reason))
        ran.examples += 1
    return ran


def patched(script: str, diff: str) -> str:
    """Return a script with a page's diff applied; the diff's lines may be indented less than the script's.

    Raises:
        ValueError: a line that stays or goes is not in the script, behind those before it.
    """
    lines, place, indent = script.splitlines(), 0, ""
    for line in diff.splitlines():
        kind, text = line[:1], line[1:].strip()
        if not text:
            continue
        if kind == "+":
            lines.insert(place, indent + text)
            place += 1
            continue
        place = next((i for i in range(place, len(lines)) if lines[i].strip() == text), -1)
        if place < 0:
            raise ValueError(f"not in the script: {text}")
        indent = lines[place].removesuffix(lines[place].lstrip())
        if kind == "-":
            del lines[place]
        else:
            place += 1
    return "\n".join(lines) + "\n"
