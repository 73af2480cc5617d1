"""What is printed at the end of a test run: the numbers that cases returned, and where the time went."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cases import Case
    from .launch import Outcome

SLOWEST = int(os.environ.get("HVDLOSS_SLOWEST", "25"))  # cases that are named


class Summary:
    """Collects what launches cost and what their cases returned; a plugin of pytest."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], dict[str, list[float]]] = {}
        self.launches: list[str] = []
        self.cases: list[tuple[float, float, str]] = []

    def launched(
        self,
        launch: tuple[str, str, int],
        cases: int,
        costs: Sequence[dict[str, Any]],
        outcomes: dict[str, Outcome],
    ) -> None:
        """Keep what a launch, and each of its cases, took."""
        group, controller, np = launch
        seconds, processor, start, imports = (
            sum(cost[key] for cost in costs) for key in ("seconds", "processor", "start", "imports")
        )
        inside = 0.0
        for spec, outcome in outcomes.items():
            took = max((r.get("seconds", 0.0) for r in outcome.ranks.values()), default=0.0)
            used = sum(r.get("processor", 0.0) for r in outcome.ranks.values())
            inside += took
            self.cases.append((used, took, f"{controller}-{np} {spec}"))
        again = f"; started {len(costs)} times" if len(costs) > 1 else ""
        self.launches.append(
            f"{group:20} {controller + '-' + str(np):8}{seconds:7.1f} s ({processor:.1f} s of processor): "
            f"start {start:.1f}, imports {imports:.1f}, {cases} cases {inside:.1f}{again}"
        )

    def add(self, case: Case, numbers: dict[str, float]) -> None:
        """Keep the numbers that a case returned."""
        row = self.rows.setdefault((case.module, f"{case.controller}-{case.np}"), {})
        for key, value in numbers.items():
            row.setdefault(key, []).append(value)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.launches:
            terminalreporter.section("launches, and their slowest cases")
            for line in self.launches:
                terminalreporter.write_line(line)
            for used, took, name in sorted(self.cases, reverse=True)[:SLOWEST]:
                terminalreporter.write_line(f"{took:7.1f} s ({used:.1f} s of processor)  {name}")
        if not any(self.rows.values()):
            return
        terminalreporter.section("numbers from the ranks (smallest .. largest over cases)")
        for (module, launch), row in self.rows.items():
            for key, values in row.items():
                span = f"{min(values):.3g} .. {max(values):.3g}"
                terminalreporter.write_line(f"{module:24} {launch:8} {key:32} {span}  ({len(values)} cases)")


def summary(config: Any) -> Summary:
    """Return the session's summary, registered with pytest on first use."""
    plugin = config.pluginmanager.get_plugin("hvdloss-ranks")
    if plugin is None:
        plugin = Summary()
        config.pluginmanager.register(plugin, "hvdloss-ranks")
    return plugin


def numbers_of(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the largest value of each number over ranks."""
    out: dict[str, float] = {}
    for record in records:
        for key, value in (record.get("numbers") or {}).items():
            if isinstance(value, int | float):
                out[key] = max(out.get(key, -math.inf), value)
    return out
