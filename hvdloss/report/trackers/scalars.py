"""A step's report as numbers with names: what every tracker logs."""

from __future__ import annotations

import math

import numpy as np

from hvdloss.step.report import StepReport

__all__ = ["scalars"]


def scalars(report: StepReport, *, per_rank: int = 64) -> dict[str, float]:
    """Return a step's numbers by name.

    ``loss``, ``objective_value``, ``weight``, ``elements`` of all ranks; ``averaged_loss`` (what plain
    averaging would have reported) and ``averaging_error`` (how far that is off, relative to the loss);
    ``skipped`` (steps so far), ``dropped`` (a rank's contributions so far, of all ranks) and ``nonfinite``
    (ranks with a NaN or infinity in this step); ``terms/NAME/total`` in the term's unit and
    ``terms/NAME/priced`` in the loss's; of several objectives ``losses/NAME/value`` and
    ``losses/NAME/weight``; and ``ranks/K/...`` of each rank: ``loss``, ``weight``, ``elements``, ``share``
    (its weight's part of all), ``communication`` and ``computation`` (seconds, of the step before), and
    ``skew`` where it is measured.

    Args:
        report: of the step.
        per_rank: with more ranks than this, ``ranks/min/...``, ``ranks/mean/...`` and ``ranks/max/...``
            instead; a rank's loss counts there if it had elements.

    Without ``ranks/...`` and the two of plain averaging where what single ranks did was not gathered
    (:class:`hvdloss.report.RankReports`), and without these for the reduction ``"sum"``.
    """
    columns = report.ranks.read()
    out = {
        "loss": report.loss,
        "objective_value": report.objective_value,
        "weight": report.weight,
        "elements": float(report.elements),
        "skipped": float(report.skipped),
        "dropped": float(report.ranks.dropped),
        # Where any rank has one, all of them are gathered.
        "nonfinite": float(sum(map(bool, columns["nonfinite"]))) if columns else 0.0,
    }
    for name, term in report.terms.items():
        out[f"terms/{name}/total"] = term.total
        out[f"terms/{name}/priced"] = term.priced
    for name, one in report.losses.items():
        out[f"losses/{name}/value"] = one.value
        out[f"losses/{name}/weight"] = one.weight
    if columns is None:
        return out
    averaged, error = report.averaged_loss, report.averaging_error
    if averaged is not None and error is not None:
        out |= {"averaged_loss": averaged, "averaging_error": error}
    weight = np.array(columns["weight"])
    share = weight / report.weight if report.weight > 0 else np.zeros(len(weight))
    shown = {name: columns[name] for name in ("loss", "weight", "elements", "communication", "computation")}
    if columns["skew"][0] is not None:
        shown["skew"] = columns["skew"]
    for what, values in {**shown, "share": share}.items():
        numbers = np.array(values, dtype=np.float64)
        if len(numbers) <= per_rank:
            out.update({f"ranks/{rank}/{what}": value for rank, value in enumerate(numbers.tolist())})
        elif len(known := numbers[~np.isnan(numbers)]):
            out[f"ranks/min/{what}"] = float(known.min())
            out[f"ranks/mean/{what}"] = math.fsum(known) / len(known)
            out[f"ranks/max/{what}"] = float(known.max())
    return out
