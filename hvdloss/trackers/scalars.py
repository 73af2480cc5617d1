"""A step's report as numbers with names: what every tracker logs."""

from __future__ import annotations

import math
from collections.abc import Callable

from hvdloss.report.steps import RankReport, StepReport

__all__ = ["scalars"]

#: What is told of a rank.
_OF_A_RANK: dict[str, Callable[[RankReport, StepReport], float | None]] = {
    "loss": lambda one, _: one.loss,
    "weight": lambda one, _: one.weight,
    "elements": lambda one, _: float(one.elements),
    "share": lambda one, whole: one.weight / whole.weight if whole.weight > 0 else 0.0,
    "communication": lambda one, _: one.communication,
    "computation": lambda one, _: one.computation,
    "skew": lambda one, _: one.skew,
}


def scalars(report: StepReport, *, per_rank: int = 64) -> dict[str, float]:
    """Return a step's numbers by name.

    ``loss``, ``objective_value``, ``weight``, ``elements`` of all ranks; ``skipped`` (steps so far),
    ``dropped`` (a rank's contributions so far, of all ranks) and ``nonfinite`` (ranks with a NaN or infinity
    in this step); ``terms/NAME/total`` in the term's unit and ``terms/NAME/priced`` in the loss's; and
    ``ranks/K/...`` of each rank: ``loss``, ``weight``, ``elements``, ``share`` (its weight's part of all),
    ``communication`` and ``computation`` (seconds, of the step before), and ``skew`` where it is measured.

    Args:
        report: of the step.
        per_rank: with more ranks than this, ``ranks/min/...``, ``ranks/mean/...`` and ``ranks/max/...``
            instead; a rank's loss counts there if it had elements.
    """
    out = {
        "loss": report.loss,
        "objective_value": report.objective_value,
        "weight": report.weight,
        "elements": float(report.elements),
        "skipped": float(report.skipped),
        "dropped": float(sum(one.dropped for one in report.ranks)),
        "nonfinite": float(sum(bool(one.nonfinite) for one in report.ranks)),
    }
    for name, term in report.terms.items():
        out[f"terms/{name}/total"] = term.total
        out[f"terms/{name}/priced"] = term.priced
    for what, tell in _OF_A_RANK.items():
        told = {one.rank: value for one in report.ranks if (value := tell(one, report)) is not None}
        if len(report.ranks) <= per_rank:
            out.update({f"ranks/{rank}/{what}": value for rank, value in told.items()})
        elif known := [value for value in told.values() if not math.isnan(value)]:
            out[f"ranks/min/{what}"] = min(known)
            out[f"ranks/mean/{what}"] = math.fsum(known) / len(known)
            out[f"ranks/max/{what}"] = max(known)
    return out
