"""What a model is judged by, as statistics that merge over ranks: a loss, or a metric of hvdloss.metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.errors import ConfigError, NonFiniteLossError, ShapeError, WeightError
from hvdloss.losses import NAMED, SumsLoss
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.losses.reduction import ArrayOps, broadcast_error, check_reduction, finish
from hvdloss.metrics import Accuracy, Metric
from hvdloss.metrics.base import State

__all__ = ["Elements", "MeanLoss", "OfSums", "direction", "effective", "measure_of", "name_of", "per_element"]

Array = npt.NDArray[np.float64]

#: ``(prediction, target, weight) -> (losses, weights)``: per-element losses of NumPy arrays, and the weight
#: of each, float64, of one shape.
Elements = Callable[[Any, Any, Any], tuple[Array, Array]]


def per_element(function: Callable[[Any, Any], Any]) -> Elements:
    """Return a function ``(prediction, target) -> per-element losses`` in the form that measures take."""

    def elements(prediction: Any, target: Any, weight: Any) -> tuple[Array, Array]:
        losses = np.asarray(function(prediction, target), dtype=np.float64)
        return losses, weights_like(weight, losses)

    return elements


def weights_like(weight: Any, losses: Array) -> Array:
    """Return weights of the losses' shape, float64; ones for None. A weight per sample leads.

    Raises:
        ShapeError: they do not fit.
    """
    if weight is None:
        return np.ones(losses.shape)
    w = np.asarray(weight, dtype=np.float64)
    if w.ndim == 1 < losses.ndim and w.shape[:1] == losses.shape[:1]:
        w = w.reshape(w.shape + (1,) * (losses.ndim - 1))
    if broadcast_error(w.shape, losses.shape, 0):
        raise ShapeError(
            f"weight of shape {w.shape} fits neither the per-element losses of shape {losses.shape} nor "
            f"their first axis"
        )
    return np.broadcast_to(w, losses.shape)


def effective(losses: Array, weight: Array, reduction: str) -> tuple[Array, Array]:
    """Return weighted losses and weights such that the loss is the ratio of their sums.

    The weights are as given for ``"mean"`` and ``"sum"``, 1 for each element that counts for
    ``"batch_mean"``, and for ``"sequence_mean"`` each element's part of its sequence. An element of weight
    zero is absent, whatever its loss.

    Raises:
        WeightError: a weight that is negative, NaN or infinite.
        NonFiniteLossError: a loss that is NaN or infinite, of an element that counts.
        ShapeError: losses without a token axis for ``"sequence_mean"``.
    """
    bad = ~(np.isfinite(weight) & (weight >= 0))
    if bad.any():
        at = first(bad)
        raise WeightError(f"the weight of element {at} is {weight[at]}; weights are finite and at least 0")
    bad = ~np.isfinite(losses) & (weight > 0)
    if bad.any():
        at = first(bad)
        raise NonFiniteLossError(f"the loss of element {at} is {losses[at]}")
    weighted = np.where(weight > 0, np.where(weight > 0, losses, 0.0) * weight, 0.0)
    if reduction == "batch_mean":
        return weighted, (weight > 0).astype(np.float64)
    if reduction == "sequence_mean":
        if losses.ndim < 2:
            raise ShapeError(
                f'reduction="sequence_mean" needs per-element losses of shape (sequences, tokens), got '
                f"{losses.shape}"
            )
        rows = weight.sum(axis=tuple(range(1, weight.ndim)), keepdims=True)
        safe = np.where(rows > 0, rows, 1.0)
        return weighted / safe, weight / safe
    return weighted, np.array(weight)


def first(where: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    """Return the first index at which an array is true."""
    return tuple(int(axis[0]) for axis in np.nonzero(where))


class MeanLoss(Metric):
    """The loss of an objective: weighted per-element losses, reduced.

    Args:
        elements: gives per-element losses and weights.
        reduction: see :mod:`hvdloss.losses.reduction`.
        name: for tables.
    """

    def __init__(self, elements: Elements, reduction: str = "mean", name: str = "loss") -> None:
        self.elements, self.reduction, self.name = elements, check_reduction(reduction), name

    def of(self, prediction: Any, target: Any = None, weight: Any = None) -> State:
        """Return the sums of weighted losses and of weights."""
        weighted, weights = effective(*self.elements(prediction, target, weight), self.reduction)
        return (np.array([weighted.sum(), weights.sum()]),)

    def finish(self, state: State) -> float:
        """Return their ratio, or the sum; NaN without weight."""
        return finish(self.reduction, *state[0].tolist())


class OfSums(Metric):
    """A loss that is a function of sums (:class:`hvdloss.losses.SumsLoss`).

    Args:
        loss: which one.
        ops: the operations it is computed in; None for NumPy's.
        tensor: ``array -> array or tensor`` of these operations.
    """

    def __init__(
        self, loss: SumsLoss, ops: ArrayOps | None = None, tensor: Callable[[Any], Any] = np.asarray
    ) -> None:
        self.loss, self.name = loss, loss.name
        self._ops: ArrayOps = ops or NumpyOps()
        self._tensor = tensor

    def of(self, prediction: Any, target: Any = None, weight: Any = None) -> State:
        """Return the loss's own sums, and how many each statistic has (-1: a scalar)."""
        w = None if weight is None else self._tensor(weight)
        total, widths = self.loss._sums(self._ops, self._tensor(prediction), self._tensor(target), w, 0)
        return np.asarray(total, dtype=np.float64), np.array([-1 if one is None else one for one in widths])

    def merge(self, a: State, b: State) -> State:
        """Return the sums of both."""
        return (a[0] + b[0], a[1]) if a and b else a or b

    def finish(self, state: State) -> float:
        """Return the loss of the sums."""
        widths = [None if one < 0 else one for one in state[1].tolist()]
        return float(self.loss.loss_of(self._ops, self._tensor(state[0]), widths))


class _Accuracy(Metric):
    """Accuracy, of as many classes as predictions have on a last axis of their own."""

    name = "accuracy"

    def of(self, prediction: Any, target: Any = None, weight: Any = None) -> State:
        """Return the weight of hits, and of all."""
        y, t = np.asarray(prediction), np.asarray(target)
        several = y.ndim == t.ndim + 1 and y.shape[-1] > 1
        return Accuracy(y.shape[-1] if several else None).of(y, t, weight)

    def finish(self, state: State) -> float:
        """Return the share."""
        return Accuracy().finish(state)


#: Metrics of hvdloss.metrics that are to be large.
_GREATER = ("AUC", "Accuracy", "AveragePrecision", "F1", "FBeta", "Precision", "R2", "Recall", "_Accuracy")


def direction(measure: Metric, greater_is_better: bool | None) -> bool:
    """Return whether a measure is better if it is greater."""
    if greater_is_better is not None:
        return bool(greater_is_better)
    return type(measure).__name__ in _GREATER


def name_of(measure: Metric) -> str:
    """Return a name for tables."""
    return str(getattr(measure, "name", type(measure).__name__))


def measure_of(loss: Any) -> Metric:
    """Return what a model is judged by.

    Args:
        loss: a metric of :mod:`hvdloss.metrics`; a function ``(prediction, target) -> per-element losses`` of
            NumPy arrays; a :class:`hvdloss.losses.SumsLoss` or its name; or ``"accuracy"``.

    Raises:
        ConfigError: none of these.
    """
    if isinstance(loss, str) and loss == "accuracy":
        return _Accuracy()
    if isinstance(loss, str) and loss in NAMED:
        loss = NAMED[loss]()
    if isinstance(loss, SumsLoss):
        return OfSums(loss)
    if isinstance(loss, Metric):
        return loss
    if callable(loss):
        return MeanLoss(per_element(loss), name=getattr(loss, "__name__", "loss"))
    raise ConfigError(
        f"loss={loss!r} is no measure; pass a function (prediction, target) -> per-element losses, a metric "
        f'of hvdloss.metrics, a function of sums of hvdloss.losses, or "accuracy"; the names of losses are '
        f"known to hvdloss.torch, hvdloss.tensorflow and hvdloss.keras"
    )
