"""Measure the house: sizes, attributes, and who calls the engines. A compass for the work, not a gate.

.venv/bin/python scripts/house.py [FOLDER]
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

#: What an engine is called by outside its own files, and Horovod's names that are there for drop-in use.
ENGINES = re.compile(
    r"\bhvd\.(\w*(?:allreduce|allgather|alltoall|broadcast|reducescatter|barrier|join)\w*|synchronize|poll)\("
)
FACES = ("_single.py", "_backend.py", "engines/", "functions.py", "_compat.py", "_elastic.py")


def lines(path: Path) -> int:
    """Return how many lines a file has."""
    return len(path.read_text().splitlines())


def classes(path: Path) -> list[tuple[int, int, int, str]]:
    """Return of each class its lines, attributes, those that begin as True or False, and its name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ClassDef):
            continue
        attributes, states = set(), set()
        for part in ast.walk(node):
            targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
            for target in targets:
                for one in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if not isinstance(one, ast.Attribute) or ast.unparse(one.value) != "self":
                        continue
                    attributes.add(one.attr)
                    value = getattr(part, "value", None)
                    if isinstance(value, ast.Constant) and isinstance(value.value, bool):
                        states.add(one.attr)
        length = (node.end_lineno or 0) - node.lineno + 1
        found.append((length, len(attributes), len(states), f"{path}:{node.name}"))
    return found


def main(root: Path) -> None:
    """Print the measures of a working tree."""
    core = sorted((root / "hvdloss").rglob("*.py"))
    adapters = sorted((root / "adapters").rglob("*.py"))
    ways_in = [path for path in adapters if "integrations" in path.parts]
    print(f"product lines: {sum(map(lines, core + adapters))}, core {sum(map(lines, core))}")
    print(f"adapters without integrations: {sum(map(lines, set(adapters) - set(ways_in)))}")
    for name in ("torch", "tensorflow", "keras"):
        own = [path for path in adapters if name in path.parts]
        calls = sum(
            len(ENGINES.findall(path.read_text()))
            for path in own
            if not any(face in path.as_posix() for face in FACES)
        )
        print(f"{name}: {sum(map(lines, own))} lines, {calls} calls of an engine outside its files")
    every = sorted((one for path in core + adapters for one in classes(path)), reverse=True)
    print("largest classes: lines, attributes, states that are True or False")
    for length, attributes, states, name in every[:8]:
        print(f"  {length:4d} {attributes:3d} {states:2d}  {Path(name).relative_to(root)}")
    print("files of more than 500 lines")
    for path in sorted((p for p in core + adapters if lines(p) > 500), key=lines, reverse=True):
        print(f"  {lines(path):4d}  {path.relative_to(root)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
