"""Writes the tables of docs/explanation/reliability.md: what `inflict.py` and others measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from faults import FAULTS, LOOPS
from healthy import LOOPS as HEALTHY_LOOPS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "explanation"
JSON_PATH, PAGE = DOCS / "reliability.json", DOCS / "reliability.md"


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


def healthy_table(result: dict[str, Any]) -> str:
    """Return the table of jobs that are healthy but slow."""
    lines = [
        f"| what is slow | {' | '.join(HEALTHY_LOOPS.values())} | ended |",
        "| --- " * (len(HEALTHY_LOOPS) + 2) + "|",
    ]
    rows = {(row["what"], row["loop"]): row for row in result["rows"]}
    for what in dict.fromkeys(row["what"] for row in result["rows"]):
        ours = [rows[what, loop] for loop in HEALTHY_LOOPS if (what, loop) in rows]
        cells = []
        for loop in HEALTHY_LOOPS:
            row = rows.get((what, loop))
            lasting = f" of {row['seconds']:g} s" if row and row["seconds"] else ""
            cells.append("—" if row is None else f"{row['rounds']} ×{lasting}")
        ended = sum(bool(row["problems"]) for row in ours)
        lines.append(f"| {what} | {' | '.join(cells)} | {f'**{ended}**' if ended else 'none'} |")
    if soak := result.get("soak"):
        lines += [
            "",
            f"{soak['minutes']:g} minutes of such jobs, chosen at random, one after the other: "
            f"{soak['jobs']} jobs, {len(soak['alarms'])} alarms.",
        ]
    return "\n".join(lines)


def cost_table(result: dict[str, Any]) -> str:
    """Return the table of what the watch costs."""
    lines = [
        "| ranks | hosts | situation | busiest agent | a rank | messages a second and host "
        "| bytes a second and host | a killed rank is known after |",
        "| --- " * 8 + "|",
    ]
    for row in result["rows"]:
        for situation in ("running", "all but one waiting"):
            one = row[situation]
            agent = max(share for what, share in one.items() if what.startswith("agent"))
            known = f"{row['seconds until a killed one is known']:.2f} s" if situation == "running" else ""
            lines.append(
                f"| {row['ranks']:,} | {row['hosts']:,} | {situation} | {100 * agent:.2f} % of a core "
                f"| {100 * one['a rank']:.2f} % | {one['messages a second and host']:.2f} "
                f"| {one['bytes a second and host']:.0f} | {known} |"
            )
    return "\n".join(lines)


PARTS = {
    "make reliability": (JSON_PATH, table),
    "tests/reliability/healthy.py": (DOCS / "healthy.json", healthy_table),
    "hvdloss.benchmarks.watch_scale": (DOCS / "watch_scale.json", cost_table),
}


def page(text: str, results: dict[str, dict[str, Any]]) -> str:
    """Return the page with new tables, by who measured them."""
    for who, result in results.items():
        begin, end = (f"<!-- {mark} of what `{who}` wrote -->" for mark in ("begin", "end"))
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n\n{PARTS[who][1](result)}\n\n{end}{after}"
    return text


def measured() -> dict[str, dict[str, Any]]:
    """Return what was measured last."""
    return {who: json.loads(path.read_text()) for who, (path, _) in PARTS.items()}


def write_page() -> None:
    """Write the tables of the page from their JSON."""
    PAGE.write_text(page(PAGE.read_text(), measured()))
