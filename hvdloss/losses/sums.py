"""Functions of sums: losses f(S) of the sums S of statistics over the elements of all ranks.

A mean is f(S) = S1 / S2. Dice, Tversky and F-beta are other ratios, a correlation needs six sums. The
average of such a loss over ranks or micro-batches is not the loss of all elements; the sums are. With

    L = f(S),   S = sum_k S_k,   dL = sum_k f'(S) dS_k

rank k needs S for its part of the gradient, f'(S) dS_k: one small all-reduce in the forward pass, and
none in the backward pass, since all ranks compute the same f'(S).

Sums and f are computed in float64, whatever the predictions' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from hvdloss.errors import ConfigError, ShapeError
from hvdloss.losses.base import GlobalLoss, Group, Measured
from hvdloss.losses.reduction import ArrayOps, broadcast_weights

__all__ = [
    "R2",
    "CalibrationError",
    "CalibrationRatio",
    "Concordance",
    "Correlation",
    "DonskerVaradhan",
    "FBeta",
    "Jaccard",
    "SoftDice",
    "SumsLoss",
    "Tilted",
    "Tversky",
]


class SumsLoss(GlobalLoss):
    """A loss that is a function of sums over the elements of all ranks, exact in value and gradient.

    Args:
        statistics: ``(prediction, target) -> (s1, s2, ...)``: per-element statistics, in the framework's
            own operations; each a number (the same for all elements), a tensor of the elements' shape
            or, with `columns`, of that shape and one more axis, over which is not summed.
        finish: ``(S1, S2, ...) -> loss``: a scalar of the weighted sums, which are float64 scalars, or
            vectors for statistics with columns. Must be differentiable where the sums lie.
        columns: number of trailing axes of a statistic that are kept, 0 or 1.
        name: for messages, and the name of its all-reduce; equal on all ranks.

    The elements' shape is the target's (the prediction's without a target), without the columns.

    >>> import numpy as np
    >>> dice = SumsLoss(lambda y, t: (y * t, y + t), lambda both, sizes: 1 - 2 * both / sizes)
    >>> round(float(dice.of(np.array([0.9, 0.2, 0.4]), np.array([1.0, 0.0, 1.0]))), 4)
    0.2571

    Collectives: one all-reduce of the sums (8 bytes each) in the forward pass, none in the backward.
    """

    def __init__(
        self,
        statistics: Callable[[Any, Any], Sequence[Any]],
        finish: Callable[..., Any],
        *,
        columns: int = 0,
        name: str | None = None,
    ) -> None:
        if not callable(statistics) or not callable(finish):
            raise ConfigError(
                f"statistics={statistics!r} and finish={finish!r} must both be functions: "
                f"(prediction, target) -> statistics, and sums -> loss"
            )
        if columns not in (0, 1):
            raise ConfigError(f"columns={columns!r} must be 0 or 1")
        self.columns = columns
        self._given = statistics
        self._finish = finish
        self.name = name or getattr(finish, "__name__", "sums").replace("<lambda>", "sums")

    def statistics(self, ops: ArrayOps, prediction: Any, target: Any) -> Sequence[Any]:
        """Return the statistics of each element."""
        return self._given(prediction, target)

    def finish(self, ops: ArrayOps, *sums: Any) -> Any:
        """Return the loss of the sums."""
        return self._finish(*sums)

    def elements(self, ops: ArrayOps, prediction: Any, target: Any) -> Any:
        """Return ones of the elements' shape."""
        like = prediction if target is None else target
        axes = len(ops.shape(prediction)) - self.columns
        while len(ops.shape(like)) > axes >= 0:
            like = ops.index_last(like, 0)
        return ops.cast_like(ops.ones_like(ops.losses(like)), ops.losses(prediction))

    def sums(self, ops: ArrayOps, prediction: Any, target: Any, weight: Any = None, *, rank: int = 0) -> Any:
        """Return this rank's weighted sums, one float64 vector that carries the gradient.

        They add up: over micro-batches, ranks and time. Collectives: none.

        Raises:
            ShapeError: a statistic has not the elements' shape, or `weight` does not broadcast to it.
        """
        return self._sums(ops, prediction, target, weight, rank)[0]

    def _sums(
        self, ops: ArrayOps, prediction: Any, target: Any, weight: Any, rank: int
    ) -> tuple[Any, list[int | None]]:
        """Return the sums as one vector, and how many each statistic has (None: a scalar)."""
        ones = self.elements(ops, prediction, target)
        w = ones if weight is None else broadcast_weights(ops, weight, ones, rank)
        axes = len(ops.shape(ones))
        sums, widths = [], []
        for number, statistic in enumerate(self.statistics(ops, prediction, target)):
            given = ops.shape(statistic)
            kept = len(given) - axes
            if given and (
                kept not in (0, self.columns)
                or any(
                    m != n and m is not None and n is not None
                    for m, n in zip(given, ops.shape(ones), strict=False)
                )
            ):
                raise ShapeError(
                    f"statistic {number + 1} of {self.name} has shape {given}, but the elements have "
                    f"{ops.shape(ones)} (rank {rank}); return one value per element"
                    + (", or one per element and column" if self.columns else "")
                )
            if not given:
                statistic, kept = statistic * ops.as64(ones), 0
            total = _weighted(ops, statistic, ops.expand_trailing(w, statistic) if kept else w, kept)
            sums.append(ops.reshape(total, (-1,)))
            width = given[-1] if kept else None
            if kept and width is None:
                raise ShapeError(
                    f"statistic {number + 1} of {self.name} has an unknown number of columns (rank {rank}); "
                    f"give the prediction a static last axis"
                )
            widths.append(width)
        if not sums:
            raise ShapeError(f"{self.name} has no statistics (rank {rank}); return at least one")
        return ops.concat(sums, 0), widths

    def loss_of(self, ops: ArrayOps, total: Any, widths: Sequence[int | None]) -> Any:
        """Return the loss of all ranks' sums."""
        parts, at = [], 0
        for width in widths:
            part = total[at : at + (width or 1)]
            parts.append(part if width else part[0])
            at += width or 1
        return self.finish(ops, *parts)

    def measure(
        self,
        ops: ArrayOps,
        group: Group,
        prediction: Any,
        target: Any,
        weight: Any,
        total: Any = None,
    ) -> Measured:
        """Return the loss, and whether this rank is why it is not finite.

        Args:
            ops, group, prediction, target, weight: see :meth:`hvdloss.losses.GlobalLoss.measure`.
            total: the sums of all elements of the step, where they are known already; the gradient is
                then that of these elements' part, and nothing is sent.
        """
        local, widths = self._sums(ops, prediction, target, weight, group.rank)
        if total is None:
            found = group.all_reduce(local, f"hvdloss.{self.name}", replicated=True)
        else:
            found = ops.with_value(local, total)
        value = self.loss_of(ops, found, widths)
        # Without its own fault a rank is as much to blame as all others for a value that f makes of sums.
        fine = ops.count(~ops.isfinite(found)) == 0
        own = ops.count(~ops.isfinite(local))
        return Measured(value, own + ops.where(fine, ops.count(~ops.isfinite(value)), own))


def _weighted(ops: ArrayOps, statistic: Any, weight: Any, keep: int) -> Any:
    """Return the weighted sum over all axes but the last `keep`, float64; what has weight 0 may be NaN."""
    w = ops.as64(weight)
    return ops.sum_leading(ops.where(w != 0, ops.as64(statistic) * w, ops.zeros_like(w)), keep)


def _per_target(ops: ArrayOps, prediction: Any, target: Any, classes: bool) -> Any:
    """Return ones: one per target, which of `classes` may be probabilities, with their axis."""
    if classes and len(ops.shape(target)) == len(ops.shape(prediction)):
        target = ops.index_last(ops.move_axis_last(target, ops.class_axis(prediction)), 0)
    return ops.cast_like(ops.ones_like(ops.losses(target)), ops.losses(prediction))


# -- overlap of what was predicted with what is -------------------------------------------------------

_TASKS = ("binary", "multilabel", "multiclass")


def _above_zero(**numbers: float) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name}={value!r} must be a finite number, at least 0")


class _Overlap(SumsLoss):
    """1 - index of soft true positives, false positives and false negatives."""

    def __init__(
        self, task: str = "binary", *, average: str = "macro", from_logits: bool = True, smooth: float = 0.0
    ) -> None:
        if task not in _TASKS:
            raise ConfigError(f"task={task!r} is not known; choose one of {', '.join(map(repr, _TASKS))}")
        if average not in ("macro", "micro"):
            raise ConfigError(f"average={average!r} is not known; choose 'macro' or 'micro'")
        _above_zero(smooth=smooth)
        self.task, self.average, self.from_logits, self.smooth = task, average, from_logits, smooth
        self.classes = task == "multiclass"
        self.columns = 0 if task == "binary" else 1
        self.name = type(self).__name__

    def elements(self, ops: ArrayOps, prediction: Any, target: Any) -> Any:
        """Return ones: one per target, which for multiclass are classes or their probabilities."""
        return _per_target(ops, prediction, target, self.classes)

    def _sums(
        self, ops: ArrayOps, prediction: Any, target: Any, weight: Any, rank: int
    ) -> tuple[Any, list[int | None]]:
        """Return the sums per class, or over all classes.

        The class axis goes to the end first, for labels in the weights too: there a weight is one
        label's, and labels are elements.
        """
        if self.task == "binary":
            return super()._sums(ops, prediction, target, weight, rank)
        ones = self.elements(ops, prediction, target)
        w = ones if weight is None else broadcast_weights(ops, weight, ones, rank)
        axis = ops.class_axis(prediction)
        shapes = ops.shape(prediction), ops.shape(target)
        prediction = ops.move_axis_last(prediction, axis)
        if len(shapes[0]) == len(shapes[1]):
            target = ops.move_axis_last(target, axis)
        elif self.task == "multilabel":
            raise ShapeError(
                f"{self.name} of labels needs a target per label: prediction {shapes[0]}, target {shapes[1]} "
                f"(rank {rank})"
            )
        classes = ops.shape(prediction)[-1]
        if classes is None:
            raise ShapeError(
                f"{self.name} needs to know the number of classes: prediction {shapes[0]} (rank {rank})"
            )
        w = ops.move_axis_last(w, axis) if self.task == "multilabel" else ops.expand_trailing(w, prediction)
        sums = []
        for statistic in self.statistics(ops, prediction, target):
            total = _weighted(ops, statistic, w, 1)
            sums.append(ops.reshape(ops.sum(total) if self.average == "micro" else total, (-1,)))
        return ops.concat(sums, 0), [None if self.average == "micro" else classes] * 3

    def statistics(self, ops: ArrayOps, prediction: Any, target: Any) -> Sequence[Any]:
        """Return soft true positives, false positives and false negatives; classes are the last axis."""
        p = ops.losses(prediction)
        if self.from_logits:
            p = ops.softmax(p) if self.classes else ops.sigmoid(p)
        indices = len(ops.shape(target)) < len(ops.shape(p))
        t = ops.one_hot(target, p) if indices else ops.cast_like(target, p)
        return p * t, p * (1 - t), (1 - p) * t

    def index(self, tp: Any, fp: Any, fn: Any) -> tuple[Any, Any]:
        """Return numerator and denominator of the index."""
        raise NotImplementedError

    def finish(self, ops: ArrayOps, *sums: Any) -> Any:
        """Return 1 - the index, for macro its mean over the classes that occur."""
        above, below = self.index(*sums)
        above, below = above + self.smooth, below + self.smooth
        there = below > 0
        one = ops.as64(ops.ones_like(below))
        ratio = ops.where(there, above, one * 0) / ops.where(there, below, one)
        return 1 - ops.sum(ratio) / ops.sum(ops.where(there, one, one * 0))


class SoftDice(_Overlap):
    """1 - soft Dice coefficient, 2 TP / (2 TP + FP + FN), over all elements of all ranks.

    TP = sum w p t, FP = sum w p (1 - t), FN = sum w (1 - p) t, with probabilities p and targets t.
    Source: Milletari, Navab and Ahmadi 2016 (V-Net), with p instead of its squares; Dice 1945.

    Args:
        task: ``"binary"``: prediction and target of one shape. ``"multilabel"``: the same with a class
            axis (PyTorch: axis 1; TensorFlow: the last); weights broadcast against all of it.
            ``"multiclass"``: targets are class indices without that axis (-100 marks absent elements),
            or probabilities with it; weights broadcast against elements without it.
        average: ``"macro"`` (mean over the classes that occur in targets or predictions) or ``"micro"``
            (sums over classes too); of no effect for ``"binary"``.
        from_logits: predictions are logits; False: probabilities.
        smooth: added above and below the line; 0 is the coefficient itself.

    Raises:
        ConfigError: an argument that is not known.

    Collectives: one all-reduce of 3 sums (3 per class for macro) forward, none backward.
    """

    def index(self, tp: Any, fp: Any, fn: Any) -> tuple[Any, Any]:
        """Return the two sides of Dice's coefficient."""
        return 2 * tp, 2 * tp + fp + fn


class Jaccard(_Overlap):
    """1 - soft Jaccard index (intersection over union), TP / (TP + FP + FN), over all elements.

    Source: Jaccard 1901; Rahman and Wang 2016 for the soft form. Arguments and collectives: those of
    :class:`SoftDice`.
    """

    def index(self, tp: Any, fp: Any, fn: Any) -> tuple[Any, Any]:
        """Return the two sides of Jaccard's index."""
        return tp, tp + fp + fn


class Tversky(_Overlap):
    """1 - soft Tversky index, TP / (TP + alpha FP + beta FN), over all elements of all ranks.

    Source: Tversky 1977; Salehi, Erdogmus and Gholipour 2017. With both 0.5 it is Dice, with both 1
    Jaccard.

    Args:
        alpha: price of false positives, at least 0.
        beta: of false negatives, at least 0.
        task, options: those of :class:`SoftDice`, and its collectives.
    """

    def __init__(self, alpha: float = 0.3, beta: float = 0.7, task: str = "binary", **options: Any) -> None:
        super().__init__(task, **options)
        _above_zero(alpha=alpha, beta=beta)
        self.alpha, self.beta = alpha, beta

    def index(self, tp: Any, fp: Any, fn: Any) -> tuple[Any, Any]:
        """Return the two sides of Tversky's index."""
        return tp, tp + self.alpha * fp + self.beta * fn


class FBeta(_Overlap):
    """1 - soft F-beta score, (1 + b^2) TP / ((1 + b^2) TP + b^2 FN + FP), over all elements.

    Source: van Rijsbergen 1979.

    Args:
        beta: how much more recall counts than precision; above 1 favours recall.
        task, options: those of :class:`SoftDice`, and its collectives.
    """

    def __init__(self, beta: float = 1.0, task: str = "binary", **options: Any) -> None:
        super().__init__(task, **options)
        _above_zero(beta=beta)
        self.beta = beta

    def index(self, tp: Any, fp: Any, fn: Any) -> tuple[Any, Any]:
        """Return the two sides of the F-beta score."""
        square = self.beta**2
        return (1 + square) * tp, (1 + square) * tp + square * fn + fp


# -- agreement of real values -------------------------------------------------------------------------


class _Moments(SumsLoss):
    """A function of the first and second moments of prediction and target."""

    def __init__(self) -> None:
        self.columns = 0
        self.name = type(self).__name__

    def statistics(self, ops: ArrayOps, prediction: Any, target: Any) -> Sequence[Any]:
        """Return 1, y, t, y^2, t^2, y t, in float64, since differences of their sums count."""
        y, t = ops.as64(prediction), ops.as64(target)
        return 1.0, y, t, y * y, t * t, y * t

    @staticmethod
    def moments(*sums: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Return means, variances and covariance."""
        w, y, t, yy, tt, yt = sums
        mean_y, mean_t = y / w, t / w
        return mean_y, mean_t, yy / w - mean_y**2, tt / w - mean_t**2, yt / w - mean_y * mean_t


class Correlation(_Moments):
    """1 - r, Pearson's correlation of predictions and targets over all elements of all ranks.

    The correlation with a constant is 0. Source: Pearson 1895.

    Collectives: one all-reduce of 6 sums forward, none backward.
    """

    def finish(self, ops: ArrayOps, *sums: Any) -> Any:
        """Return 1 - covariance / (both deviations)."""
        _, _, vy, vt, cov = self.moments(*sums)
        product = vy * vt
        safe = ops.where(product > 0, product, ops.ones_like(product))
        return 1 - cov / ops.sqrt(safe)


class Concordance(_Moments):
    """1 - Lin's concordance correlation coefficient of predictions and targets over all elements.

    2 cov(y, t) / (var y + var t + (mean y - mean t)^2): correlation that also wants scale and offset
    right. Source: Lin 1989.

    Collectives: one all-reduce of 6 sums forward, none backward.
    """

    def finish(self, ops: ArrayOps, *sums: Any) -> Any:
        """Return 1 - the coefficient."""
        my, mt, vy, vt, cov = self.moments(*sums)
        below = vy + vt + (my - mt) ** 2
        return 1 - 2 * cov / ops.where(below > 0, below, ops.ones_like(below))


class R2(_Moments):
    """1 - R^2: the squared errors of all elements over the squared deviations of all targets.

    Of batches with (nearly) equal targets it is infinite, which the optimizer reports as an error:
    weight the whole step, not small micro-batches, with it.

    Collectives: one all-reduce of 6 sums forward, none backward.
    """

    def statistics(self, ops: ArrayOps, prediction: Any, target: Any) -> Sequence[Any]:
        """Return 1, t, t^2 and the squared error."""
        y, t = ops.as64(prediction), ops.as64(target)
        return 1.0, t, t * t, (y - t) ** 2

    def finish(self, ops: ArrayOps, *sums: Any) -> Any:
        """Return the share of the variance that is left."""
        w, t, tt, error = sums
        return error / (tt - t * t / w)


# -- partition functions and log-ratios ---------------------------------------------------------------


class Tilted(SumsLoss):
    """Tilted empirical risk, log(sum w exp(tilt l) / sum w) / tilt, over all elements of all ranks.

    Between the mean (tilt 0) and the largest loss (tilt large): what is hard counts more; a negative
    tilt makes outliers count less. Source: Li, Beirami, Sanjabi and Smith 2021.

    Args:
        loss: a name from ``hvdloss.step.objective.LOSSES``, or a callable
            ``(prediction, target) -> per-element losses``.
        tilt: any number but 0. ``tilt * loss`` must stay below 700, for the sums are kept in float64.

    Raises:
        ConfigError: a tilt of 0, or not finite.

    Collectives: one all-reduce of 2 sums forward, none backward.
    """

    def __init__(self, loss: str | Callable[[Any, Any], Any], tilt: float) -> None:
        if not math.isfinite(tilt) or tilt == 0:
            raise ConfigError(f"tilt={tilt!r} must be a finite number other than 0, which is the mean itself")
        self.columns = 0
        self.tilt = tilt
        self.loss = loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__name__)
        self.name = "Tilted"
        self.classes = loss in ("cross_entropy", "nll")
        self._loss = loss

    def elements(self, ops: ArrayOps, prediction: Any, target: Any) -> Any:
        """Return ones of the target's shape, without probabilities' class axis."""
        return _per_target(ops, prediction, target, self.classes)

    def statistics(self, ops: ArrayOps, prediction: Any, target: Any) -> Sequence[Any]:
        """Return 1 and exp(tilt l)."""
        function = ops.named_loss(self._loss) if isinstance(self._loss, str) else self._loss
        return 1.0, ops.exp(self.tilt * ops.as64(function(prediction, target)))

    def finish(self, ops: ArrayOps, *sums: Any) -> Any:
        """Return the logarithm of the mean."""
        weight, tilted = sums
        return ops.log(tilted / weight) / self.tilt


class DonskerVaradhan(SumsLoss):
    """Minus the Donsker-Varadhan bound of mutual information, over all elements of all ranks.

    -(mean of y where t = 1, minus log of the mean of exp(y) where t = 0), y the critic's scores, t = 1
    for pairs that belong together and 0 for shuffled ones. The logarithm of a mean over all ranks: what
    an average of ranks' bounds gets wrong, and with it the gradient. Scores must stay below 700.
    Source: Donsker and Varadhan 1983; Belghazi et al. 2018 (MINE).

    Collectives: one all-reduce of 4 sums forward, none backward.
    """

    def __init__(self) -> None:
        self.columns = 0
        self.name = type(self).__name__

    def statistics(self, ops: ArrayOps, prediction: Any, target: Any) -> Sequence[Any]:
        """Return number and score of joint pairs, number and exponential of shuffled ones."""
        y, t = ops.as64(prediction), ops.as64(target)
        shuffled = ops.where(t < 1, y, ops.zeros_like(y))  # no exponential of joint scores, which are large
        return t, t * y, 1 - t, (1 - t) * ops.exp(shuffled)

    def finish(self, ops: ArrayOps, *sums: Any) -> Any:
        """Return minus the bound."""
        joint, score, shuffled, partition = sums
        return ops.log(partition / shuffled) - score / joint


# -- calibration --------------------------------------------------------------------------------------


class CalibrationRatio(SumsLoss):
    """log(sum w p / sum w t)^2: how far the expected number of events is from the observed one.

    0 where a model is calibrated in the large. Add it to a loss as a penalty, or use it alone to fit an
    intercept. Without any event it is infinite.

    Args:
        from_logits: predictions are logits; False: probabilities (or rates, for counts).

    Collectives: one all-reduce of 2 sums forward, none backward.
    """

    def __init__(self, *, from_logits: bool = True) -> None:
        self.columns = 0
        self.from_logits = from_logits
        self.name = type(self).__name__

    def statistics(self, ops: ArrayOps, prediction: Any, target: Any) -> Sequence[Any]:
        """Return expected and observed."""
        p = ops.as64(prediction)
        return (ops.sigmoid(p) if self.from_logits else p), ops.as64(target)

    def finish(self, ops: ArrayOps, *sums: Any) -> Any:
        """Return the squared logarithm of the ratio."""
        expected, observed = sums
        return ops.log(expected / observed) ** 2


class CalibrationError(SumsLoss):
    """Expected calibration error of probabilities over all elements of all ranks, a penalty.

    sum over bins of |sum of w (p - t) in it| / sum w, in `bins` equal bins of p. Differentiable within
    bins; which bin a probability is in has no gradient. Source: Naeini, Cooper and Hauskrecht 2015.

    Args:
        bins: number of bins, at least 1.
        from_logits: predictions are logits; False: probabilities.

    Raises:
        ConfigError: fewer than one bin.

    Collectives: one all-reduce of bins + 1 sums forward, none backward.
    """

    def __init__(self, bins: int = 15, *, from_logits: bool = True) -> None:
        if bins < 1:
            raise ConfigError(f"bins={bins!r} must be at least 1")
        self.bins, self.from_logits = bins, from_logits
        self.columns = 1
        self.name = type(self).__name__

    def elements(self, ops: ArrayOps, prediction: Any, target: Any) -> Any:
        """Return ones of the target's shape."""
        return _per_target(ops, prediction, target, False)

    def statistics(self, ops: ArrayOps, prediction: Any, target: Any) -> Sequence[Any]:
        """Return 1, and probability minus target in its bin's column."""
        p = ops.as64(prediction)
        p = ops.sigmoid(p) if self.from_logits else p
        edges = [i / self.bins for i in range(1, self.bins)]
        column = ops.one_hot(ops.bucketize(p, ops.vector64(edges, p)), ops.zeros64(self.bins, p))
        return 1.0, ops.unsqueeze(p - ops.as64(target)) * column

    def finish(self, ops: ArrayOps, *sums: Any) -> Any:
        """Return the mean of the bins' gaps."""
        weight, gaps = sums
        return ops.sum(abs(gaps)) / weight
