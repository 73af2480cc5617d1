"""What a record comes to: the numbers that the page, the picture and the terminal show. Pure functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.report.reading import Record

__all__ = ["Hardest", "RankRow", "Summary", "bins", "class_table", "hardest", "is_number", "summarize"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RankRow:
    """One rank over all recorded steps.

    Attributes:
        rank: its number.
        elements, weight: sums over the recorded steps.
        elements_share, weight_share: of all ranks'; 0 where there is nothing.
        loss: of its last recorded step with elements; None without any.
        computing, waiting, moving: mean seconds a step: not held up by communication; held up beyond the rank
            that was held up the least (so by slower ranks); what that one was held up (so by moving bytes).
        held_up: share of the time in which it was held up.
        skew: D(k) of the last step; None where nothing measures it.
        nonfinite: recorded steps in which something of it was NaN or infinite.
    """

    rank: int
    elements: float
    weight: float
    elements_share: float
    weight_share: float
    loss: float | None
    computing: float
    waiting: float
    moving: float
    held_up: float
    skew: float | None
    nonfinite: int


@dataclass(frozen=True)
class Hardest:
    """The hardest classes by some measure, the hardest first: `items` are (label, value) pairs."""

    measure: str
    what: str
    lowest: bool
    items: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """What a run came to; None where it is not known.

    Attributes:
        name, status: of the run.
        ranks: their number at the end.
        steps: number of the last step; `recorded`: how many of them the record holds.
        samples: elements of all steps.
        seconds: from the beginning to the last line.
        first_loss, loss, best_loss: of the first, the last and the best recorded step, the `best_step`-th.
        objective_value: of the last step.
        averaging_error: how far the mean of ranks' own means was off, relative to the loss: the median of the
            recorded steps, without its sign; `worst_averaging_error` in the worst of them.
        rate: elements a second between the first and the last recorded step.
        held_up: share of all ranks' time in which communication held them up.
        skipped: steps without an update.
        decisions, faults: how many there were.
        epochs: number of finished ones.
        metrics: single numbers of the last epoch.
        rows: one per rank, of as many as there were at most.
    """

    name: str
    status: str
    ranks: int
    steps: int
    recorded: int
    samples: float
    seconds: float
    first_loss: float | None
    loss: float | None
    best_loss: float | None
    best_step: int | None
    objective_value: float | None
    averaging_error: float | None
    worst_averaging_error: float | None
    rate: float | None
    held_up: float | None
    skipped: int
    decisions: int
    faults: int
    epochs: int
    metrics: Mapping[str, float]
    rows: Sequence[RankRow]


def summarize(record: Record) -> Summary:
    """Return what a record comes to."""
    steps = record.steps
    losses = record.column("loss")
    finite = np.flatnonzero(np.isfinite(losses))
    best = int(finite[np.argmin(losses[finite])]) if len(finite) else None
    began = float(record.runs[0]["time"])
    lines = (record.steps, record.epochs, record.faults, record.ends)
    last = max([began, *(float(some[-1]["time"]) for some in lines if some)])
    rows = _rows(record)
    busy = sum(row.computing + row.waiting + row.moving for row in rows)
    rate = None
    if len(steps) > 1 and steps[-1]["time"] > steps[0]["time"]:
        seen = steps[-1]["samples"] - steps[0]["samples"]
        rate = _known(seen / (steps[-1]["time"] - steps[0]["time"]))
    metrics = record.epochs[-1]["metrics"] if record.epochs else {}
    off = averaging_errors(record)
    off = off[np.isfinite(off)]
    return Summary(
        name=record.name,
        status=record.status,
        ranks=record.size,
        steps=int(steps[-1]["step"]) if steps else 0,
        recorded=len(steps),
        samples=float(steps[-1]["samples"]) if steps else 0.0,
        seconds=max(0.0, last - began),
        first_loss=float(losses[finite[0]]) if len(finite) else None,
        loss=float(losses[finite[-1]]) if len(finite) else None,
        best_loss=None if best is None else float(losses[best]),
        best_step=None if best is None else int(steps[best]["step"]),
        objective_value=_known(steps[-1]["objective_value"]) if steps else None,
        averaging_error=float(np.median(off)) if len(off) else None,
        worst_averaging_error=float(off.max()) if len(off) else None,
        rate=rate,
        held_up=_known(sum(row.waiting + row.moving for row in rows) / busy) if busy > 0 else None,
        skipped=int(steps[-1].get("skipped", 0)) if steps else 0,
        decisions=len(record.decisions),
        faults=len(record.faults),
        epochs=len(record.epochs),
        metrics={k: float(v) for k, v in metrics.items() if is_number(v)},
        rows=rows,
    )


def averaging_errors(record: Record) -> Array:
    """Return how far the mean of ranks' own means was off in every step, relative to the loss.

    Without its sign; 0 where it is rounding, NaN where it is not known.
    """
    loss, averaged = record.column("loss"), record.column("averaged_loss")
    off = np.abs(averaged - loss)
    with np.errstate(all="ignore"):
        return np.where(off <= 1e-12 * np.abs(loss), 0.0, off / np.abs(loss))


def is_number(value: Any) -> bool:
    """Return whether a plain value is a number that a float can hold."""
    # Not math.isfinite, which raises for integers that no float holds.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e308 < value < 1e308


def _known(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _mean(values: Array) -> float:
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else 0.0


def parts_of_time(record: Record) -> tuple[Array, Array, Array]:
    """Return seconds of computing, waiting and moving, each ``(steps, ranks)``; NaN where there was no rank.

    Those that a step tells are of the step before it; all ranks move the bytes for as long as the rank that
    was held up the least (see :class:`hvdloss.CommunicationCost`).
    """
    held, computing = record.by_rank("communication"), record.by_rank("computation")
    if not held.size:
        return computing, held, held
    with np.errstate(all="ignore"):
        least = np.where(np.isnan(held), np.inf, held).min(axis=1, keepdims=True)
        moving = np.where(np.isnan(held), np.nan, np.maximum(0.0, least))
        return computing, np.maximum(0.0, held - moving), moving


def _rows(record: Record) -> list[RankRow]:
    if not record.steps:
        return []
    elements, weight = record.by_rank("elements"), record.by_rank("weight")
    losses, skew = record.by_rank("loss"), record.by_rank("skew")
    # Those that were lost on the way, too.
    times = [[_mean(part[:, rank]) for part in parts_of_time(record)] for rank in range(losses.shape[1])]
    all_elements, all_weight = _total(elements), _total(weight)
    rows = []
    for rank, (computing, waiting, moving) in enumerate(times):
        seen = losses[np.isfinite(losses[:, rank]), rank]
        busy = computing + waiting + moving
        bad = sum(
            1
            for step in record.steps
            if rank < len(step["ranks"].get("nonfinite", ())) and step["ranks"]["nonfinite"][rank]
        )
        own_elements, own_weight = _total(elements[:, rank]), _total(weight[:, rank])
        rows.append(
            RankRow(
                rank=rank,
                elements=own_elements,
                weight=own_weight,
                elements_share=own_elements / all_elements if all_elements > 0 else 0.0,
                weight_share=own_weight / all_weight if all_weight > 0 else 0.0,
                loss=float(seen[-1]) if len(seen) else None,
                computing=computing,
                waiting=waiting,
                moving=moving,
                held_up=(waiting + moving) / busy if busy > 0 else 0.0,
                skew=_known(float(skew[-1, rank])),
                nonfinite=bad,
            )
        )
    return rows


def _total(values: Array) -> float:
    total = float(np.nansum(values))
    return total if math.isfinite(total) else 0.0


def bins(count: int, most: int) -> list[slice]:
    """Return at most `most` slices that cover `count` things evenly, in order."""
    parts = min(count, most)
    edges = [round(i * count / parts) for i in range(parts + 1)] if parts > 0 else []
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def class_table(record: Record) -> tuple[Array, list[str], dict[str, Any]] | None:
    """Return the last counts of classes by rank, ``(ranks, classes)``, the classes' names, and their line."""
    found = [line for line in record.classes if line["counts"] and line["counts"][0]]
    if not found:
        return None
    line = found[-1]
    counts = np.nan_to_num(np.array(line["counts"], dtype=np.float64))
    names, edges, width = line.get("names"), line.get("edges"), counts.shape[1]
    if names is None and isinstance(edges, list) and len(edges) == width - 1:
        shown = [_short(edge) for edge in edges]
        pairs = zip(["", *shown], [*shown, ""], strict=True)
        names = [
            f"< {high}" if not low else f"≥ {low}" if not high else f"{low} to {high}" for low, high in pairs
        ]
    return counts, [str(n) for n in names] if names is not None else [str(i) for i in range(width)], line


def _short(value: Any) -> str:
    return "?" if value is None else f"{value:.3g}"


#: Metrics of which a low number is a bad one, by a word in their names.
_HIGH_IS_GOOD = ("recall", "precision", "f1", "fbeta", "accuracy", "auc", "iou", "dice", "confusion")


def hardest(record: Record, most: int = 12) -> list[Hardest]:
    """Return the hardest classes that the record knows: what was recorded as such, and metrics by class."""
    out = []
    seen = set()
    for line in reversed(record.hardest):
        key = (line["what"], line["measure"])
        if key in seen:
            continue
        seen.add(key)
        items = [
            (str(item.get("label")), float(item["value"]))
            for item in line["items"]
            if is_number(item.get("value"))
        ]
        out.append(_ordered(line["measure"], line["what"], bool(line.get("lowest")), items, most))
    table = class_table(record)
    names = [] if table is None else table[1]
    for name, value in (record.epochs[-1]["metrics"] if record.epochs else {}).items():
        rates, measure = _by_class(name, value)
        if rates is None:
            continue
        labels = names if len(names) == len(rates) else [str(i) for i in range(len(rates))]
        items = [(label, float(rate)) for label, rate in zip(labels, rates, strict=True) if is_number(rate)]
        lowest = any(word in name.lower() for word in _HIGH_IS_GOOD)
        out.append(_ordered(measure, "class", lowest, items, most))
    return [one for one in out if one.items]


def _ordered(measure: str, what: str, lowest: bool, items: list[tuple[str, float]], most: int) -> Hardest:
    items = sorted(items, key=lambda item: item[1] if lowest else -item[1])
    return Hardest(measure, what, lowest, items[:most])


def _by_class(name: str, value: Any) -> tuple[list[Any] | None, str]:
    """Return one number per class of a metric, and what they are; None for metrics that have none."""
    if not isinstance(value, list) or len(value) < 2:
        return None, name
    if all(one is None or is_number(one) for one in value):
        return value, name
    square = all(
        isinstance(row, list) and len(row) == len(value) and all(is_number(x) and x >= 0 for x in row)
        for row in value
    )
    if not square:
        return None, name
    totals = [sum(row) for row in value]
    return [row[i] / t if t > 0 else None for i, (row, t) in enumerate(zip(value, totals, strict=True))], (
        f"recall, from {name}"
    )
