"""What the cases prove, on how many ranks and over what: ``python -m tests.ranks.table``.

    python -m tests.ranks.table                     # modules by launch, as Markdown
    python -m tests.ranks.table --cases             # cases by launch
    python -m tests.ranks.table --json before.json  # to compare with later:
    python -m tests.ranks.table --against before.json

It is made from pytest's own collection, so that it holds what really runs. Exit status 1 if something of
`--against` is missing.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from .cases import Case

# What a module's name begins with is its adapter; of the laws' drivers what it ends with.
ADAPTERS = {
    "torch": "PyTorch",
    "tf": "TensorFlow",
    "tape": "TensorFlow",
    "function": "TensorFlow",
    "keras": "Keras",
    "fit": "Keras",
    "lightning": "Lightning",
    "transformers": "Transformers",
}
ON_A_GPU = ("gpu", "deferred")  # groups: the same cases with tensors elsewhere

Row = tuple[str, str, str]  # module, case, launch


class _Collector:
    """Keeps the cases that pytest collects."""

    def __init__(self) -> None:
        self.rows: set[Row] = set()

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
            if isinstance(case, Case):
                where = f"{case.controller}-{case.np}"
                if case.group in ON_A_GPU:
                    where += f" {case.group}"
                self.rows.add((case.module, case.name, where))


def collect(*, more: bool = True) -> set[Row]:
    """Return all cases and their launches; without `more` those of `make test`."""
    collector = _Collector()
    marks = ["-m", "more or not more or gpu"] if more else []
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main(["--collect-only", "-qq", *marks], plugins=[collector])
    if status:
        raise SystemExit(f"pytest could not collect the tests: status {status}\n{said.getvalue()}")
    return collector.rows


def table(rows: Iterable[Row], quick: set[Row], *, cases: bool) -> list[str]:
    """Return a table in Markdown: per module (or case) and launch, how many cases; of them in `make test`."""
    counts: dict[tuple[str, ...], dict[str, list[int]]] = collections.defaultdict(dict)
    for row in rows:
        module, name, launch = row
        adapter = ADAPTERS[module.removeprefix("laws_").partition("_")[0]]
        key = (adapter, module, name) if cases else (adapter, module)
        cell = counts[key].setdefault(launch, [0, 0])
        cell[0] += 1
        cell[1] += row in quick
    launches = sorted({launch for cells in counts.values() for launch in cells})
    names = ["adapter", "module", *(["case"] if cases else [])]
    out = [f"| {' | '.join([*names, *launches])} |", f"|{' --- |' * (len(names) + len(launches))}"]
    for key in sorted(counts):
        shown = [f"{cell[0]} ({cell[1]})" if (cell := counts[key].get(launch)) else "" for launch in launches]
        out.append(f"| {' | '.join([*key, *shown])} |")
    return out


def main() -> None:
    """Print the table, or what has changed since another one."""
    parser = argparse.ArgumentParser(prog="python -m tests.ranks.table", description="What the cases prove.")
    parser.add_argument("--cases", action="store_true", help="a line for each case")
    parser.add_argument("--json", type=Path, help="write all of it here, to compare with later")
    parser.add_argument("--against", type=Path, help="what of that file is missing now, and what is new")
    args = parser.parse_args()
    rows = collect()
    if args.json:
        args.json.write_text(json.dumps(sorted(rows)))
    if args.against:
        before = {tuple(row) for row in json.loads(args.against.read_text())}
        for word, found in (("missing", before - rows), ("new", rows - before)):
            for row in sorted(found):
                print(word, *row)
        print(f"{len(before)} then, {len(rows)} now")
        sys.exit(bool(before - rows))
    print("\n".join(table(rows, collect(more=False), cases=args.cases)))


if __name__ == "__main__":
    main()
