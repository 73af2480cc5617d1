"""Writes the table of docs/reliability.md from docs/reliability.json, which `inflict.py` measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from faults import FAULTS, LOOPS

DOCS = Path(__file__).resolve().parents[2] / "docs"
JSON_PATH, PAGE = DOCS / "reliability.json", DOCS / "reliability.md"
BEGIN = "<!-- begin of what `make reliability` wrote -->"
END = "<!-- end of what `make reliability` wrote -->"


def _cell(row: dict[str, Any] | None, planned: bool) -> str:
    """Return times inflicted, and seconds until every rank knew: median and worst."""
    if row is None:
        return "not run" if planned else "—"
    text = f"{row['inflicted']} ×"
    if row["median"] is not None:
        text += f" {row['median']:.2f} ({row['worst']:.2f}) s"
    if row["failed"]:
        text += f", **{row['failed']} failed**"
    return text


def table(result: dict[str, Any]) -> str:
    """Return the part of the page between the marks."""
    rows = {(row["fault"], row["loop"]): row for row in result["rows"]}
    settings = result["settings"]
    total = sum(row["inflicted"] for row in rows.values())
    failed = sum(row["failed"] for row in rows.values())
    kinds = len({fault for fault, _ in rows})
    through = result["horovodrun"]
    minutes = f" in {settings['minutes']} minutes" if settings["minutes"] else ""
    lines = [
        f"{kinds} kinds of fault, {total} inflictions, of which {failed} did not go as they should; and "
        f"{through['launches']} launches under `horovodrun`, of which {through['failed']} did not end with a "
        f"status other than 0. Measured{minutes} on {settings['cores']} cores with "
        f"{settings['ranks']['torch']} ranks (PyTorch) and {settings['ranks']['tape']} (TensorFlow, Keras); "
        f"Python {settings['python']}, PyTorch {settings['torch']}, TensorFlow {settings['tensorflow']}, "
        f"Keras {settings['keras']}, Horovod {settings['horovod']}.",
        "",
    ]
    group = ""
    for fault in FAULTS:
        if not any((fault.name, loop) in rows for loop in LOOPS):
            continue
        if fault.group != group:
            group = fault.group
            lines += [
                "",
                f"### {group[0].upper()}{group[1:]}",
                "",
                f"| fault | {' | '.join(LOOPS.values())} | allowed | every rank raised | lost |",
                f"| --- {'| --- ' * len(LOOPS)}| --- | --- | --- |",
            ]
        ours = [rows[fault.name, loop] for loop in LOOPS if (fault.name, loop) in rows]
        cells = [_cell(rows.get((fault.name, loop)), loop in fault.loops) for loop in LOOPS]
        errors = ", ".join(f"`{e}`" for e in sorted({e for row in ours for e in row["errors"]})) or "nothing"
        lost = "nothing" if not any(row["failed"] for row in ours) else "see below"
        lines.append(f"| {fault.what} | {' | '.join(cells)} | {fault.seconds:.0f} s | {errors} | {lost} |")
    bad = [row for row in result["rows"] if row["failed"]]
    if bad:
        lines += ["", "### What did not go as it should", ""]
        for row in bad:
            told = "; ".join(f"{_plain(problem)} ({count} ×)" for problem, count in row["problems"].items())
            what = next(fault.what for fault in FAULTS if fault.name == row["fault"])
            lines.append(f"- {what}, {LOOPS[row['loop']]}: {told}.")
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def _plain(text: str) -> str:
    """Return an error's text so that it cannot be taken for Markdown or HTML."""
    text = " ".join(text.split())
    for mark in "\\`*_{}[]<>|":
        text = text.replace(mark, f"\\{mark}" if mark not in "<>" else ("&lt;" if mark == "<" else "&gt;"))
    return text.rstrip(".")


def page(text: str, result: dict[str, Any]) -> str:
    """Return the page with a new table."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table(result)}\n\n{END}{after}"


def write_page() -> None:
    """Write the table of the page from its JSON."""
    PAGE.write_text(page(PAGE.read_text(), json.loads(JSON_PATH.read_text())))
