"""The house: which room may import which, and that the core knows no framework and no engine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvdloss

ROOT = Path(hvdloss.__file__).parent
#: From the top down: a room imports those below it. See docs/explanation/architecture.md.
ROOMS = [
    "cli",
    "check",
    "report",
    "simulation",
    "explain",
    "metrics",
    "data",
    "train",
    "step",
    "terms",
    "losses",
    "split",
    "watch",
    "comm",
    "_util",
    "errors",
    "_version",
]
FRAMEWORKS = {"torch", "tensorflow", "keras", "horovod"}
ASKS_FRAMEWORKS = {"cli/scripts", "cli/install", "cli/doctor.py", "cli/bench.py", "cli/explain.py"}


def imports(path: Path) -> Iterator[str]:
    """Give the names of all modules that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def files() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_file_has_its_room():
    assert {room(path) for path in files()} == set(ROOMS)
    for name in ROOMS[:-2]:
        text = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text()))
        assert text, f"{name}/__init__.py does not say what it is for"


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    here = ROOMS.index(room(path))
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "hvdloss" or len(parts) < 2 or parts[1] not in ROOMS:
            continue
        assert ROOMS.index(parts[1]) >= here, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_core_knows_no_framework(path):
    inside = path.relative_to(ROOT).as_posix()
    if any(inside.startswith(one) for one in ASKS_FRAMEWORKS):  # in processes of their own, or when asked
        return
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in FRAMEWORKS, f"{inside} imports {name}"
        assert parts[:1] != ["hvdloss"] or parts[1] not in FRAMEWORKS, f"{inside} imports {name}"
