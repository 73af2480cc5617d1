"""Whether a step is that of one process, how far it is off, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from hvdloss.check.evidence import Call, Evidence, Vector

__all__ = ["Cause", "Finding", "Verdict", "judge", "overall"]

_TOLERANCE = {"float64": 1e-9, "float32": 5e-5, "TF32": 3e-3}
_LOW_PRECISION = 3e-2  # 16 bits
_SAME = 1e-5  # relative: numbers that are meant to be equal


class Verdict(Enum):
    """What is found of a step, or of a script."""

    EXACT = "exact"
    OFF = "not exact"
    UNKNOWN = "could not tell"


@dataclass(frozen=True)
class Cause:
    """Why a step is off.

    `kind` is one of :data:`hvdloss.check.text.CAUSES`; `facts` are what its sentence has to fill in.
    """

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """A step, judged.

    Attributes:
        error: of the whole gradient, relative to the right one; None if there is no knowing.
        tolerance: what counts as rounding, relative.
        parameter, parameter_error: the first that is off, and how far, relative to its right gradient.
        loss: of all ranks' elements; `averaged_loss` is the mean of the ranks' own.
        weights: the denominator of each rank.
        causes: why it is off.
        problems: what could not be told.
        notes: what is worth knowing besides, as causes.
    """

    verdict: Verdict
    error: float | None = None
    tolerance: float = 0.0
    parameter: str | None = None
    parameter_error: float | None = None
    loss: float | None = None
    averaged_loss: float | None = None
    weights: list[float] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[Cause] = field(default_factory=list)


def overall(findings: Iterable[Finding]) -> Verdict:
    """Return the verdict of several steps: off if one is, and exact only if all are."""
    verdicts = {finding.verdict for finding in findings}
    if Verdict.OFF in verdicts:
        return Verdict.OFF
    return Verdict.EXACT if verdicts == {Verdict.EXACT} else Verdict.UNKNOWN


def _size(x: Vector) -> float:
    return float(np.linalg.norm(x))


def _even(values: Iterable[float]) -> bool:
    """Return whether all numbers are the same.

    >>> _even([2.0, 2.0]), _even([2.0, 3.0]), _even([])
    (True, False, True)
    """
    values = list(values)
    return not values or max(values) - min(values) <= _SAME * max(map(abs, values))


def _near(x: float, y: float) -> bool:
    return abs(x - y) <= 1e-3 * abs(y)


class _Loss:
    """A loss of all micro-batches of all ranks.

    Args:
        calls: by rank.
    """

    def __init__(self, calls: list[list[Call]]) -> None:
        self.by_rank = calls
        self.calls = [call for of_rank in calls for call in of_rank]
        self.problem = ""
        first = self.calls[0]
        if any((c.name, c.reduction) != (first.name, first.reduction) for c in self.calls):
            self.problem = "ranks or micro-batches compute their losses in different orders"
        #: Whether the script means the sum over all elements, not their mean.
        self.summed = first.reduction == "sum" and (
            first.ours or all(abs(c.factor - 1) <= _SAME for c in self.calls)
        )
        self.divisor = next(iter(first.denominators))
        if not self.summed:
            self._find_divisor()

    def _find_divisor(self) -> None:
        """Find what ranks divide their sums by, so that each of them would have its own mean."""
        for name in self.calls[0].denominators:
            if _even(share for call in self.calls if (share := self._share(call, name))):
                self.divisor = name
                return
        if not _even(call.factor for call in self.calls if call.present):
            self.problem = (
                f"{self.calls[0].name} is divided by neither weights, elements nor rows, nor by one number "
                f"on all ranks"
            )

    @staticmethod
    def _share(call: Call, divisor: str) -> float:
        """Return what the call's own mean is multiplied with."""
        return call.factor * call.denominators.get(divisor, 0.0)

    @property
    def shares(self) -> list[float]:
        """What each call's own mean is multiplied with, of calls that have a weight."""
        return [s for call in self.calls if (s := self._share(call, self.divisor))]

    @property
    def weights(self) -> list[float]:
        """The denominator of each rank."""
        return [sum(c.denominators.get(self.divisor, 0.0) for c in calls) for calls in self.by_rank]

    def factor(self, ranks: int, passes: float, added: bool) -> float:
        """Return what the sum over all elements is to be multiplied with.

        Args:
            ranks, passes: how many there are; micro-batches of a rank, on average.
            added: whether the losses of micro-batches are meant to be added up, or averaged.
        """
        total, shares = sum(self.weights), self.shares
        if self.summed or not total:
            return self.calls[0].factor if self.summed else 0.0
        if _even(shares):  # each has its own mean, or none
            return shares[0] * (passes if added else 1.0) / total
        return sum(shares) / ranks / (1.0 if added else passes) / total

    def unevenness(self) -> list[str]:
        """Return in what the calls differ, so that their means have different denominators."""
        counted = [c for c in self.calls if c.elements]
        found = []
        if not _even(c.elements for c in counted):
            found.append("uneven batches")
        if not _even(c.present / c.elements for c in counted):
            found.append("masked or ignored elements")
        if not _even(c.denominators[self.divisor] / c.present for c in counted if c.present):
            found.append("class or sample weights")
        if not _even(len(calls) for calls in self.by_rank):
            found.append("different numbers of micro-batches")
        return found


class _Step:
    """What a step ought to be, and what it is."""

    def __init__(self, seen: Evidence) -> None:
        self.seen, self.ranks = seen, seen.ranks
        self.tolerance = _TOLERANCE.get(seen.dtype, _LOW_PRECISION)
        self.observed = seen.observed[0]
        self.losses: dict[int, _Loss] = {}
        for place in sorted({i for of_rank in seen.passes for one in of_rank for i in range(len(one))}):
            calls = [[one[place] for one in of_rank if len(one) > place] for of_rank in seen.passes]
            self.losses[place] = _Loss(calls)
        self.passes = sum(map(len, seen.passes)) / self.ranks
        self.averaged: Vector = sum(seen.averaged) / self.ranks
        self.penalty: Vector = sum(seen.penalty) / self.ranks
        self._choose_scale()

    def _choose_scale(self) -> None:
        """Set what micro-batches are to be multiplied with: 1, or one over their number where none divides.

        Micro-batches whose means the script multiplies with numbers of its own may be meant either way: then
        the nearer one is taken for right.
        """
        shares = [share for loss in self.losses.values() if not loss.summed for share in loss.shares]
        self.undivided = bool(shares) and all(abs(share - 1) <= _SAME for share in shares)
        divided = all(abs(share * self.passes - 1) <= _SAME for share in shares)
        averaged, added = self._right(False), self._right(True)
        nearer = self.off(averaged) < self.off(added)
        self.added = divided or not (self.undivided or nearer)
        self.right = added if self.added else averaged
        self.scale = self._scale(self.added)

    def _scale(self, added: bool) -> float:
        return 1.0 if added else 1 / self.passes

    def _factor(self, loss: _Loss, added: bool) -> float:
        return loss.factor(self.ranks, self.passes, added)

    def _right(self, added: bool) -> Vector:
        """Return the gradient of one process that sees the samples of all ranks."""
        total: Vector = self._scale(added) * self.penalty
        for place, loss in self.losses.items():
            total = total + self._factor(loss, added) * sum(self.seen.sums.get(place, [0.0]))
        return total

    @property
    def loss(self) -> float:
        """That of all ranks' elements."""
        return sum(
            self._factor(loss, self.added) * sum(c.numerator for c in loss.calls)
            for loss in self.losses.values()
        )

    @property
    def averaged_loss(self) -> float:
        """The mean of the ranks' own."""
        return sum(
            (1.0 if loss.summed else self.scale) * c.factor * c.numerator / self.ranks
            for loss in self.losses.values()
            for c in loss.calls
        )

    def off(self, right: Vector, observed: Vector | None = None) -> float:
        """Return how far a gradient is off, relative to the right one."""
        observed = self.observed if observed is None else observed
        return _size(observed - right) / (_size(right) or 1.0)

    def first_off(self) -> tuple[str | None, float | None]:
        """Return the first parameter that is off, and how far."""
        ends = np.cumsum(self.seen.sizes)[:-1]
        least = _size(self.right) / 100
        parts = zip(self.seen.names, np.split(self.observed, ends), np.split(self.right, ends), strict=True)
        for name, observed, right in parts:
            distance = _size(observed - right)
            if distance > self.tolerance * max(_size(right), least):
                return name, distance / (_size(right) or 1.0)
        return None, None

    def fits(self, shape: Vector) -> float | None:
        """Return the number that makes `shape` the observed gradient; None if none does."""
        length = float(shape @ shape)
        if not length:
            return None
        factor = float(self.observed @ shape) / length
        close = _size(self.observed - factor * shape) <= self.tolerance * _size(self.observed)
        return factor if factor and close else None


def _different(seen: Evidence, tolerance: float) -> list[Cause]:
    """Return in what ranks differ that must be the same on all of them."""
    causes = []
    for name, norms in zip(seen.names, zip(*seen.norms, strict=True), strict=True) if seen.norms else ():
        if max(norms) - min(norms) > 1e-6 * max(norms):
            causes.append(Cause("parameters", {"name": name}))
            break
    first = seen.observed[0]
    if any(_size(other - first) > tolerance * max(_size(first), _size(other)) for other in seen.observed[1:]):
        causes.append(Cause("not_reduced"))
    return causes


def _repeated(seen: Evidence) -> tuple[list[Cause], list[Cause]]:
    """Return what is known of samples that several ranks have: causes, and notes."""
    causes, notes = [], []
    counts = [Counter(rows) for rows in seen.rows]
    same = [len(rows) > 1 and rows == counts[0] for rows in counts[1:]]
    on_several = sum((Counter(set(rows)) for rows in counts), Counter())
    count = sum(n > 1 for n in on_several.values())
    sampler = seen.sampler
    pads = sampler is not None and sampler["total"] > sampler["samples"]
    if seen.ranks > 1 and any(same):
        causes.append(Cause("same_data", {"rank": same.index(True) + 1}))
    elif count and pads:
        causes.append(Cause("repeated", {"count": count}))
    elif count:
        notes.append(Cause("equal_rows", {"count": count}))
    if sampler is not None and sampler["total"] != sampler["samples"]:
        kind = "sampler_repeats" if pads else "sampler_leaves_out"
        notes.append(Cause(kind, {"count": abs(sampler["total"] - sampler["samples"]), **sampler}))
    return causes, notes


def _factor(step: _Step, factor: float) -> Cause | None:
    """Return why a gradient is a multiple of what ranks' average would be; None for 1."""
    if abs(factor - 1) <= step.tolerance:
        return None
    ranks, passes = step.ranks, step.passes
    if _near(factor, ranks):
        return Cause("added_up", {"ranks": ranks})
    if _near(factor, 1 / ranks):
        return Cause("divided_by_ranks", {"ranks": ranks})
    if passes > 1 and _near(factor, 1 / passes):
        return Cause("divided_by_passes", {"passes": passes})
    return Cause("scaled", {"factor": factor})


def _of_gradient(step: _Step) -> list[Cause]:
    """Return why the gradient is off."""
    factor = step.fits(step.averaged)
    if factor is not None:
        causes = []
        summed = any(loss.summed for loss in step.losses.values())
        own = float(np.dot(step.averaged, step.right) / (np.dot(step.right, step.right) or 1.0))
        if step.off(own * step.right, step.averaged) > step.tolerance * own:
            uneven = [text for loss in step.losses.values() for text in loss.unevenness()]
            causes.append(Cause("mean_of_means", {"because": list(dict.fromkeys(uneven))}))
        elif summed and _near(own, 1 / step.ranks):
            causes.append(Cause("sum_averaged", {"ranks": step.ranks}))
        if step.undivided and step.passes > 1:
            causes.append(Cause("passes_added_up", {"passes": step.passes}))
        scaled = _factor(step, factor)
        return causes + ([scaled] if scaled else []) or [Cause("unknown")]
    factor = step.fits(step.right)
    if factor is not None:
        if step.undivided and _near(factor, step.passes):
            return [Cause("passes_added_up", {"passes": step.passes})]
        scaled = _factor(step, factor)
        return [scaled or Cause("unknown")]
    length = float(step.penalty @ step.penalty)
    if length:
        without = step.right - step.scale * step.penalty
        rest = step.observed - without
        times = float(rest @ step.penalty) / (length * step.scale)
        if _size(rest - times * step.scale * step.penalty) <= step.tolerance * _size(step.observed):
            return [Cause("penalty", {"times": times})]
    return [Cause("unknown")]


def _problems(seen: Evidence, step: _Step | None) -> list[str]:
    """Return what keeps anybody from telling what the gradient ought to be."""
    problems = list(seen.problems)
    if step is None or problems:
        return problems
    if not step.losses:
        problems.append("no call of one of PyTorch's loss functions, nor of an objective, was seen")
    problems += dict.fromkeys(loss.problem for loss in step.losses.values() if loss.problem)
    first = seen.penalty[0]
    if any(_size(one - first) > step.tolerance * max(_size(first), _size(one)) for one in seen.penalty[1:]):
        problems.append(
            "a part of the loss is computed by none of PyTorch's loss functions, and differs between ranks"
        )
    return problems


def judge(seen: Evidence) -> Finding:
    """Judge a step.

    Args:
        seen: what all ranks wrote of it.
    """
    step = _Step(seen) if seen.observed else None
    problems = _problems(seen, step)
    if step is None:
        return Finding(Verdict.UNKNOWN, problems=problems)
    certain = _different(seen, step.tolerance)
    causes, notes = _repeated(seen)
    certain += causes
    if seen.batch_norms and step.ranks > 1:
        certain.append(Cause("batch_norm", {"layers": seen.batch_norms}))
    if all(seen.random):
        notes.append(Cause("same_dropout" if len(set(seen.random)) == 1 and step.ranks > 1 else "dropout"))
    if not np.isfinite(step.observed).all():
        return Finding(Verdict.OFF, causes=[*certain, Cause("nonfinite")], problems=problems, notes=notes)
    if problems:
        verdict = Verdict.OFF if certain else Verdict.UNKNOWN
        return Finding(verdict, causes=certain, problems=problems, notes=notes)
    error = step.off(step.right)
    parameter, parameter_error = step.first_off()
    if parameter is not None and not any(cause.kind in ("parameters", "not_reduced") for cause in certain):
        certain += _of_gradient(step)
    scaled_only = [cause.kind for cause in certain] == ["scaled"]
    means = [loss for loss in step.losses.values() if not loss.summed]
    return Finding(
        Verdict.UNKNOWN if scaled_only else Verdict.OFF if certain else Verdict.EXACT,
        error=error,
        tolerance=step.tolerance,
        parameter=parameter,
        parameter_error=parameter_error,
        loss=step.loss,
        averaged_loss=step.averaged_loss,
        weights=means[0].weights if means else [],
        causes=certain,
        notes=notes,
    )
