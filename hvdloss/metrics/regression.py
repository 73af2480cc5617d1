"""Metrics of real values."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np

from hvdloss.metrics.base import Elements, Metric, State

__all__ = ["MAE", "MSE", "R2", "RMSE", "Mean"]


def total_of(values: Any, weight: Any) -> State:
    """Return the two sums of a weighted mean."""
    return (np.array([(weight * values).sum(), weight.sum()]),)


class _MeanOf(Metric):
    """A weighted mean of something per element."""

    def finish(self, state: State) -> Any:
        """Return the mean."""
        return float(state[0][0] / state[0][1])


@dataclasses.dataclass(frozen=True)
class Mean(_MeanOf):
    """The weighted mean of numbers: per-sample losses, say. There is no target.

    >>> Mean()([1.0, 4.0], weight=[2.0, 1.0])
    2.0
    """

    def measure(self, found: Elements) -> State:
        """Return the sums."""
        return total_of(found.prediction, found.weight)


@dataclasses.dataclass(frozen=True)
class MAE(_MeanOf):
    """Mean absolute error, in the target's unit."""

    def measure(self, found: Elements) -> State:
        """Return the sums."""
        return total_of(np.abs(found.prediction - found.target), found.weight)


@dataclasses.dataclass(frozen=True)
class MSE(_MeanOf):
    """Mean squared error, in the target's unit squared."""

    def key(self) -> Hashable:
        """Return what MSE and RMSE share."""
        return "squared error"

    def measure(self, found: Elements) -> State:
        """Return the sums."""
        return total_of((found.prediction - found.target) ** 2, found.weight)


@dataclasses.dataclass(frozen=True)
class RMSE(MSE):
    """Root of the mean squared error, in the target's unit."""

    def finish(self, state: State) -> float:
        """Return the root."""
        return float(np.sqrt(super().finish(state)))


@dataclasses.dataclass(frozen=True)
class R2(Metric):
    """Coefficient of determination, 1 - squared errors / squared deviations of the targets from their mean.

    NaN where all targets are equal. Of targets with several columns, all entries are elements of one
    population.

    The deviations are merged as means and their squares (Chan, Golub and LeVeque 1979), so targets far from
    0 do not cancel.
    """

    def measure(self, found: Elements) -> State:
        """Return weight, mean and squared deviations of targets, and squared errors."""
        t, w = found.target, found.weight
        total = w.sum()
        # From a pivot, so that equal targets have no deviation at all.
        mean = t[0] + (w * (t - t[0])).sum() / total
        return (
            np.array([total, mean, (w * (t - mean) ** 2).sum(), (w * (found.prediction - t) ** 2).sum()]),
        )

    def merge(self, a: State, b: State) -> State:
        """Return the statistic of both parts."""
        if not a or not b:
            return a or b
        (w, mean, square, error), (v, other, more, errors) = a[0], b[0]
        both, apart = w + v, other - mean
        return (
            np.array(
                [both, mean + apart * v / both, square + more + apart**2 * w * v / both, error + errors]
            ),
        )

    def finish(self, state: State) -> float:
        """Return the coefficient."""
        _, _, square, error = state[0]
        return float(1 - error / square) if square > 0 else float("nan")
