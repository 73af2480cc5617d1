"""Metrics of classes: hits, counts, and how good probabilities are."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np

from hvdloss._util.checks import check_int
from hvdloss.errors import ConfigError
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.metrics.base import Array, Elements, Metric, State, check_choice, elements
from hvdloss.metrics.regression import _MeanOf, total_of

__all__ = [
    "F1",
    "Accuracy",
    "BrierScore",
    "CalibrationError",
    "ConfusionMatrix",
    "FBeta",
    "LogLoss",
    "Precision",
    "Recall",
    "probabilities",
]

_AVERAGES = ("auto", "binary", "micro", "macro", "weighted", None)


class Classes(Metric):
    """A metric of binary labels (`classes` None), or of `classes` classes."""

    classes: int | None

    def __post_init__(self) -> None:
        if self.classes is not None:
            check_int("classes", self.classes, 2)

    def read(self, prediction: Any, target: Any, weight: Any) -> Elements:
        """Return the elements."""
        task = "binary" if self.classes is None else "multiclass"
        return elements(prediction, target, weight, task=task, classes=self.classes)


def probabilities(found: Elements, from_logits: bool, what: str) -> Array:
    """Return probabilities, float64.

    Raises:
        ConfigError: labels were predicted, or numbers outside 0 to 1.
    """
    p = found.prediction
    if found.labels:
        raise ConfigError(f"{what} needs probabilities, but class indices were predicted")
    p = p.astype(np.float64)
    if from_logits:
        ops = NumpyOps()
        return np.asarray(ops.sigmoid(p) if p.ndim == 1 else ops.softmax(p))
    if ((p < 0) | (p > 1)).any():
        bad = p[(p < 0) | (p > 1)].flat[0]
        raise ConfigError(f"prediction {bad:g} is no probability; pass from_logits=True for logits")
    return p


def predicted(found: Elements, threshold: float, from_logits: bool) -> Array:
    """Return class indices: those predicted, or of the largest score (the first of equal ones)."""
    if found.prediction.ndim == 2:
        return np.asarray(found.prediction.argmax(1))
    if found.labels:
        return found.prediction
    p = NumpyOps().sigmoid(found.prediction.astype(np.float64)) if from_logits else found.prediction
    return np.asarray(p > threshold).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Accuracy(Classes):
    """The share of samples whose class was predicted.

    Args:
        classes: number of classes; None for targets 0 and 1 with one score each.
        top_k: a sample is right if its class is among the `top_k` largest scores; of equal scores, the first
            classes are larger.
        threshold: scores above it are class 1, without `classes`.
        from_logits: scores are logits, for `threshold`.

    Raises:
        ConfigError: an argument that cannot be used.

    >>> Accuracy(3, top_k=2)([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]], [1, 2])
    0.5
    """

    classes: int | None = None
    _: dataclasses.KW_ONLY
    top_k: int = 1
    threshold: float = 0.5
    from_logits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("top_k", self.top_k, 1)
        if self.top_k > (self.classes or 1):
            raise ConfigError(f"top_k={self.top_k} is more than there are classes; pass classes=")

    def measure(self, found: Elements) -> State:
        """Return the weight of hits, and of all."""
        p, t = found.prediction, found.target
        if self.top_k == 1:
            hit = predicted(found, self.threshold, self.from_logits) == t
        elif found.labels:
            raise ConfigError(f"top_k={self.top_k} needs scores, but class indices were predicted")
        else:
            own = np.take_along_axis(p, t[:, None], 1)
            before = np.arange(p.shape[1]) < t[:, None]
            hit = ((p > own) | ((p == own) & before)).sum(1) < self.top_k
        return total_of(hit, found.weight)

    def finish(self, state: State) -> float:
        """Return the share."""
        return float(state[0][0] / state[0][1])


@dataclasses.dataclass(frozen=True)
class ConfusionMatrix(Classes):
    """The weight of samples by true class (rows) and predicted class (columns), float64.

    Args:
        classes, threshold, from_logits: see :class:`Accuracy`.
        normalize: None, or divide by the weight of the true class (``"true"``), of the predicted one
            (``"pred"``), or of ``"all"``, as in scikit-learn; classes that do not occur are 0.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    classes: int | None = None
    _: dataclasses.KW_ONLY
    normalize: str | None = None
    threshold: float = 0.5
    from_logits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("normalize", self.normalize, (None, "true", "pred", "all"))

    def key(self) -> Hashable:
        """Return what matrices share."""
        return ("confusion", self.classes, self.threshold, self.from_logits)

    def measure(self, found: Elements) -> State:
        """Return the matrix."""
        n = self.classes or 2
        cell = found.target * n + predicted(found, self.threshold, self.from_logits)
        return (np.bincount(cell, weights=found.weight, minlength=n * n).reshape(n, n),)

    def finish(self, state: State) -> Array:
        """Return the matrix, normalised."""
        matrix = state[0]
        if self.normalize is None:
            return matrix.copy()
        axis = {"true": 1, "pred": 0, "all": None}[self.normalize]
        below = matrix.sum(axis=axis, keepdims=True)
        return np.asarray(np.divide(matrix, below, out=np.zeros_like(matrix), where=below > 0))


@dataclasses.dataclass(frozen=True)
class _Rate(Classes):
    """A rate of hits among what was predicted or is there; see Precision for the arguments."""

    classes: int | None = None
    _: dataclasses.KW_ONLY
    average: str | None = "auto"
    zero_division: float = 0.0
    threshold: float = 0.5
    from_logits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("average", self.average, _AVERAGES)
        if self.average == "binary" and self.classes not in (None, 2):
            raise ConfigError(f'average="binary" is for two classes, not classes={self.classes}')

    def key(self) -> Hashable:
        """Return what precision, recall and F share."""
        return ("counts", self.classes, self.threshold, self.from_logits)

    def measure(self, found: Elements) -> State:
        """Return the weight of hits, of predictions and of targets, per class: shape (3, classes)."""
        t, w = found.target, found.weight
        p = predicted(found, self.threshold, self.from_logits)
        columns = (t, np.where(p == t, w, 0.0)), (p, w), (t, w)
        n = self.classes or 2
        return (np.stack([np.bincount(label, weights=v, minlength=n) for label, v in columns]),)

    def rate(self, hit: Array, guessed: Array, true: Array) -> tuple[Array, Array]:
        """Return numerator and denominator."""
        raise NotImplementedError

    def finish(self, state: State) -> Any:
        """Return the rate."""
        average = self.average
        if average == "auto":
            average = "binary" if self.classes is None else "macro"
        counts = state[0].sum(1, keepdims=True) if average == "micro" else state[0]
        above, below = self.rate(*counts)
        rates = np.divide(above, below, out=np.full(above.shape, float(self.zero_division)), where=below > 0)
        if average is None:
            return rates
        if average in ("micro", "binary"):
            return float(rates[-1])
        _, guessed, true = counts
        if average == "weighted":
            return float((rates * true).sum() / true.sum())
        return float(rates[guessed + true > 0].mean())


class Precision(_Rate):
    """Of what was predicted to be a class, the share that is.

    Args:
        classes: number of classes; None for targets 0 and 1 with one score each.
        average: ``"binary"`` (of class 1; the default without `classes`), ``"micro"`` (counts of all classes
            together), ``"macro"`` (mean over the classes that occur in targets or predictions; the default
            with `classes`), ``"weighted"`` (the same, weighted by true class), or None for an array with an
            entry per class. As in scikit-learn.
        zero_division: the rate of a class of which there is nothing to divide by.
        threshold, from_logits: see :class:`Accuracy`.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def rate(self, hit: Array, guessed: Array, true: Array) -> tuple[Array, Array]:
        """Return hits and predictions."""
        return hit, guessed


class Recall(_Rate):
    """Of what is a class, the share that was predicted to be; arguments of :class:`Precision`."""

    def rate(self, hit: Array, guessed: Array, true: Array) -> tuple[Array, Array]:
        """Return hits and targets."""
        return hit, true


@dataclasses.dataclass(frozen=True)
class FBeta(_Rate):
    """(1 + b^2) precision * recall / (b^2 precision + recall): recall counts b times as much.

    Source: van Rijsbergen 1979.

    Args:
        classes, average, zero_division, threshold, from_logits: see :class:`Precision`.
        beta: b, above 0.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    _: dataclasses.KW_ONLY
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (np.isfinite(self.beta) and self.beta > 0):
            raise ConfigError(f"beta={self.beta!r} must be a number above 0")

    def rate(self, hit: Array, guessed: Array, true: Array) -> tuple[Array, Array]:
        """Return both sides."""
        square = self.beta**2
        return (1 + square) * hit, square * true + guessed


class F1(FBeta):
    """The harmonic mean of precision and recall; arguments of :class:`Precision`.

    >>> F1()([1, 1, 0, 1], [1, 0, 0, 1])
    0.8
    """


@dataclasses.dataclass(frozen=True)
class LogLoss(_MeanOf, Classes):
    """Mean of -log of the probability that was given to the true class, in nats.

    Args:
        classes: number of classes; None for targets 0 and 1 with the probability of 1.
        from_logits: predictions are logits, whose loss is finite however sure they are. Probabilities are
            kept away from 0 and 1 by the rounding unit of their dtype, as in scikit-learn.
    """

    classes: int | None = None
    _: dataclasses.KW_ONLY
    from_logits: bool = False

    def measure(self, found: Elements) -> State:
        """Return the sums."""
        p, t = found.prediction, found.target
        if self.from_logits and not found.labels:
            ops, y = NumpyOps(), p.astype(np.float64)
            if y.ndim == 1:
                loss = ops.softplus(np.where(t == 1, -y, y))
            else:
                loss = ops.logsumexp(y) - np.take_along_axis(y, t[:, None], 1)[:, 0]
            return total_of(loss, found.weight)
        y = probabilities(found, self.from_logits, "LogLoss")
        unit = np.finfo(p.dtype if p.dtype.kind == "f" else np.float64).eps
        y = np.clip(y, unit, 1 - unit)
        own = np.where(t == 1, y, 1 - y) if y.ndim == 1 else np.take_along_axis(y, t[:, None], 1)[:, 0]
        return total_of(-np.log(own), found.weight)


@dataclasses.dataclass(frozen=True)
class BrierScore(_MeanOf, Classes):
    """Mean squared distance of probabilities from what happened (Brier 1950); lower is better.

    Without `classes` (p - t)^2, between 0 and 1; with them summed over classes, between 0 and 2.

    Args:
        classes, from_logits: see :class:`LogLoss`.
    """

    classes: int | None = None
    _: dataclasses.KW_ONLY
    from_logits: bool = False

    def measure(self, found: Elements) -> State:
        """Return the sums."""
        p = probabilities(found, self.from_logits, "BrierScore")
        if self.classes is None:
            return total_of((p - found.target) ** 2, found.weight)
        happened = found.target[:, None] == np.arange(self.classes)
        return total_of(((p - happened) ** 2).sum(1), found.weight)


@dataclasses.dataclass(frozen=True)
class CalibrationError(Classes):
    """How far probabilities are from how often they come true, in equal bins of probability.

    Expected calibration error, sum over bins of |sum of w (confidence - hit)| / sum w (Naeini, Cooper and
    Hauskrecht 2015; Guo, Pleiss, Sun and Weinberger 2017). Confidence is the probability of 1, hit the
    target; with `classes` the largest probability, and whether its class is the true one.

    Args:
        classes, from_logits: see :class:`LogLoss`.
        bins: number of bins.
        norm: ``"l1"`` (expected), ``"l2"`` (root of the mean square) or ``"max"`` (of the worst bin).

    Raises:
        ConfigError: an argument that cannot be used.
    """

    classes: int | None = None
    _: dataclasses.KW_ONLY
    bins: int = 15
    norm: str = "l1"
    from_logits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("bins", self.bins, 1)
        check_choice("norm", self.norm, ("l1", "l2", "max"))

    def key(self) -> Hashable:
        """Return what the norms share."""
        return ("calibration", self.classes, self.bins, self.from_logits)

    def measure(self, found: Elements) -> State:
        """Return per bin the weight, and the weighted confidences and hits: shape (3, bins)."""
        p = probabilities(found, self.from_logits, "CalibrationError")
        hit = found.target
        if self.classes is not None:
            best = p.argmax(1)
            p, hit = np.take_along_axis(p, best[:, None], 1)[:, 0], best == hit
        # The edges are those of hvdloss.losses.CalibrationError.
        edges = [i / self.bins for i in range(1, self.bins)]
        place = np.searchsorted(np.array(edges), p, side="right")
        sums = found.weight, found.weight * p, found.weight * hit
        return (np.stack([np.bincount(place, weights=s, minlength=self.bins) for s in sums]),)

    def finish(self, state: State) -> float:
        """Return the error."""
        weight, confidence, hit = state[0]
        gap = np.abs(confidence - hit)
        if self.norm == "l1":
            return float(gap.sum() / weight.sum())
        each = np.divide(gap, weight, out=np.zeros_like(gap), where=weight > 0)
        if self.norm == "max":
            return float(each.max())
        return float(np.sqrt((weight * each**2).sum() / weight.sum()))
