"""Losses that know what they stand for: the objective, and whatever ``compile`` was given.

A batch's loss alone does not say what it must be weighted with. Here every loss of a model tells its
numerator and denominator (:mod:`hvdloss.losses.reduction`): an :class:`Objective` by its reduction, a loss of
Keras by Keras's own rule, so that ``loss="mse"`` is exact too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

import keras
from hvdloss.errors import ConfigError
from hvdloss.keras._backend import CompileLoss, get_keras_mask, squeeze_or_expand_to_same_rank
from hvdloss.losses import GlobalLoss
from hvdloss.losses.elements import check_object, prediction_first, reduction_of
from hvdloss.report import StepReport
from hvdloss.tensorflow.objective import CallSums, check_elementwise, reduction_of_keras, swapped
from hvdloss.tensorflow.objective import Objective as TensorFlowObjective
from hvdloss.tensorflow.ops import TensorFlowOps
from hvdloss.tensorflow.reducer import GradientReducer
from hvdloss.tensorflow.step import StepState
from hvdloss.terms.term import Term

__all__ = ["ExactCompileLoss", "ExactMean", "Objective"]

_OPS = TensorFlowOps()

# The loss of Keras that says nearly the same as a named objective, for saved models.
_PLAIN: dict[str, Callable[..., keras.losses.Loss]] = {
    "mse": keras.losses.MeanSquaredError,
    "mae": keras.losses.MeanAbsoluteError,
    "huber": keras.losses.Huber,
    "log_cosh": keras.losses.LogCosh,
    "binary_cross_entropy": keras.losses.BinaryCrossentropy,
    "binary_cross_entropy_with_logits": lambda **o: keras.losses.BinaryCrossentropy(from_logits=True, **o),
    "hinge": keras.losses.Hinge,
}


class _SampleWise(TensorFlowObjective):
    """An objective whose weights follow Keras's rule: one per sample, or one per element."""

    #: entries of the per-element losses of the last call
    entries: Any = None
    #: what the loss itself masked in the last call
    mask: Any = None

    def _mask_of(self, losses: Any) -> Any:
        self.mask = super()._mask_of(losses)
        return self.mask

    def _fit(self, weight: Any, losses: tf.Tensor) -> Any:
        self.entries = tf.cast(tf.size(losses), tf.float64)
        self.losses_shape = tf.shape(losses)
        return None if weight is None else _fitted(weight, losses)


def _fitted(weight: Any, losses: tf.Tensor) -> tf.Tensor:
    """Return `weight` with axes such that it broadcasts to `losses`."""
    weight = tf.convert_to_tensor(weight)
    rank, losses_rank = len(weight.shape), len(losses.shape)
    while rank > losses_rank and weight.shape[-1] == 1:
        weight, rank = tf.squeeze(weight, -1), rank - 1
    fits = rank > 1 and all(
        w in (1, n) or w is None or n is None
        for w, n in zip(reversed(weight.shape), reversed(losses.shape), strict=False)
    )
    if 0 < rank < losses_rank and not (fits and weight.shape[0] in (None, 1) and rank == losses_rank):
        # Weights lead with the sample axis, unlike NumPy's rule.
        for _ in range(losses_rank - rank):
            weight = tf.expand_dims(weight, -1)
    return weight


def _with_mask(sample_weight: Any, prediction: Any) -> Any:
    """Return the weight of each element, from the weights given and the prediction's Keras mask."""
    mask = get_keras_mask(prediction) if tf.is_tensor(prediction) else None
    if mask is None:
        return sample_weight
    mask = tf.cast(mask, tf.float64 if keras.config.floatx() == "float64" else tf.float32)
    if sample_weight is None:
        return mask
    weight = tf.cast(sample_weight, mask.dtype)
    return _fitted(weight, mask) * mask


class Objective(keras.losses.Loss):
    """The weighted loss of all elements of a step, as a loss of Keras.

    Passed to ``compile``, or called in a loop of your own, it gives this rank's local mean. With
    :func:`hvdloss.keras.DistributedOptimizer` the step's gradient is that of all ranks' elements:
    sum w l / sum w over ranks and, with ``gradient_accumulation_steps``, over micro-batches.

    Unlike Keras's own losses, whose weighted mean divides by the number of samples, reduction "mean"
    divides by the sum of the weights.

    Args:
        loss: a name from ``hvdloss.step.objective.LOSSES``, or a callable
            ``(y_true, y_pred) -> per-element losses``, in Keras's order; a loss of Keras must have been
            constructed with ``reduction=None`` or ``"mean_with_sample_weight"``, and what it masks
            (``ignore_class``) is absent. What returns one number for several elements is refused. Or a loss
            of all ranks' elements, of :mod:`hvdloss.losses`, or its name: all ranks must then train the same
            number of steps, be it with empty batches. ``evaluate`` gives that of this rank's own batches,
            and exchanges nothing.
        reduction, ignore_index, label_smoothing, class_weight: see :class:`hvdloss.tensorflow.Objective`.
        terms: what is measured per rank, priced and acted on: :class:`hvdloss.CommunicationCost`,
            :class:`hvdloss.DataSkew`, your own subclasses of :class:`hvdloss.Term`. At most one of a
            model's losses may have terms.
        process_set: the Horovod process set whose ranks share the step; None for all.
        nonfinite: ``"raise"``, ``"skip"`` or ``"drop"`` where the loss or a gradient of some rank is NaN or
            infinite, see :class:`hvdloss.tensorflow.Objective`; with "skip" and "drop" such a batch does not
            count in the mean loss that ``fit`` shows. Losses of one model must agree; "drop" needs that
            there is one only, and no ``LossScaleOptimizer``.
        name: of the loss in Keras.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(
        self,
        loss: str | Callable[..., Any] | GlobalLoss,
        *,
        reduction: str | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        class_weight: Sequence[float] | None = None,
        terms: tuple[Term, ...] = (),
        process_set: Any = None,
        nonfinite: str = "raise",
        name: str | None = None,
    ) -> None:
        super().__init__(name=name or "objective", reduction=None)
        self._given = loss
        function: Any = loss
        if isinstance(loss, keras.losses.Loss):
            reduction = reduction_of(reduction, reduction_of_keras(loss), loss.name)
            function = swapped(loss.call)
        elif callable(loss):
            check_object(loss, getattr(loss, "__qualname__", type(loss).__name__))
            check_elementwise(loss)
            # Keras's order, but for functions whose parameters say that theirs is another.
            function = loss if prediction_first(loss) else swapped(loss)
        if hasattr(loss, "absent"):  # a loss of class numbers that knows which elements to leave out
            function.absent = loss.absent
        self._exact = _SampleWise(
            function,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            terms=terms,
            process_set=process_set,
            nonfinite=nonfinite,
        )
        self.nonfinite = nonfinite
        self.reduction = self._exact.reduction
        self.step_state = self._exact.step_state
        self.controller = self._exact.controller

    @property
    def process_set(self) -> Any:
        """The ranks that share the step; None for all."""
        return self._exact.process_set

    @property
    def last_step(self) -> StepReport | None:
        """The report of the last reduced step, equal on all ranks; None before the first."""
        return self._exact.last_step

    def prepare(self) -> None:
        """Let the terms measure what they need before the first step of a training loop of your own.

        See :meth:`hvdloss.tensorflow.Objective.prepare`; ``fit`` calls it by itself.
        """
        self._exact.prepare()

    def __call__(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        *,
        segments: Any = None,
        keys: Any = None,
    ) -> tf.Tensor:
        """Return the local loss of these elements, a scalar tensor.

        Args:
            y_true: targets; class indices of -100 mark absent elements.
            y_pred: predictions; the class axis is the last. Their Keras mask counts as a weight.
            sample_weight: None, or one weight per sample or element. An element of weight zero is
                absent: its loss may be NaN.
            segments: of packed sequences; see :class:`hvdloss.tensorflow.Objective`. ``fit`` has no place
                for them: there :func:`sequence_weights` makes them sample weights.
            keys: what terms may group elements by (``DataSkew(of="keys")``). ``fit`` has no place for
                them: there ``DataSkew(label=...)`` finds them in the targets.

        Raises:
            ShapeError: `sample_weight` or `segments` do not fit, or no token axis for ``"sequence_mean"``.

        Collectives: none; those of the loss if it is of :mod:`hvdloss.losses`.
        """
        sums = self.contribute(y_true, y_pred, sample_weight, segments=segments, keys=keys)
        return self.step_state.record_on_backward(sums.with_penalty(sums.mean()), sums.row())

    def contribute(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        *,
        segments: Any = None,
        keys: Any = None,
    ) -> CallSums:
        """Return what these elements add to a step, without telling anybody; see calling it."""
        weight = _with_mask(sample_weight, y_pred)
        whole = self._exact.global_loss
        if whole is None or (tf.is_tensor(y_pred) and y_true is not None):  # else several, or no target
            y_true, y_pred = self._fitting(y_true, y_pred)
        return self._exact.contribute(y_pred, y_true, weight, segments=segments, keys=keys)

    def per_element(self, prediction: Any, target: Any, weight: Any = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the loss of each element and its weight; in this order, as for the other frameworks.

        See :meth:`hvdloss.tensorflow.Objective.per_element`.
        """
        self._exact.check_per_element()
        weight = _with_mask(weight, prediction)
        target, prediction = self._fitting(target, prediction)
        return self._exact.per_element(prediction, target, weight)

    def _fitting(self, y_true: Any, y_pred: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Return target and prediction as tensors whose shapes and dtypes fit, as Keras makes them."""
        whole = self._exact.global_loss
        y_pred, y_true = tf.convert_to_tensor(y_pred), tf.convert_to_tensor(y_true)
        y_pred = _OPS.losses(y_pred)
        if hasattr(self._given, "absent"):
            y_true = class_numbers(y_true, y_pred)
        elif self._exact.classes if whole is None else whole.classes:
            if len(y_true.shape) == len(y_pred.shape) and y_true.shape[-1] == 1 != y_pred.shape[-1]:
                y_true = tf.squeeze(y_true, -1)
            if len(y_true.shape) < len(y_pred.shape) and y_true.dtype.is_floating:
                y_true = tf.cast(y_true, tf.int64)  # class indices that came as floats
        else:
            y_pred, y_true = squeeze_or_expand_to_same_rank(y_pred, y_true)
        return y_true, y_pred

    def plain(self, y_true_dtype: Any = None) -> Any:
        """Return a loss of Keras that says nearly the same, for saved models, or None."""
        if not isinstance(self._given, str):
            return self._given
        if self._exact.global_loss is not None:
            return None
        reduction = {"mean": "mean_with_sample_weight", "sum": "sum"}.get(self.reduction)
        if self._exact.name == "cross_entropy":
            return keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, ignore_class=-100, reduction=reduction or "sum_over_batch_size"
            )
        make = _PLAIN.get(self._exact.name)
        return None if make is None else make(reduction=reduction or "sum_over_batch_size")

    def get_config(self) -> dict[str, Any]:
        """Return what :meth:`from_config` takes."""
        return {
            "loss": self._given,
            "reduction": self.reduction,
            "nonfinite": self.nonfinite,
            "name": self.name,
        }


def class_numbers(y_true: Any, y_pred: Any) -> tf.Tensor:
    """Return class numbers as integers, one per element; they may come as floats, with an axis of 1."""
    y_true = tf.convert_to_tensor(y_true)
    if len(y_true.shape) == len(y_pred.shape) and y_true.shape[-1] == 1:
        y_true = tf.squeeze(y_true, -1)
    return tf.cast(y_true, tf.int64) if y_true.dtype.is_floating else y_true


class _Leaf:
    """One loss of a model inside :class:`ExactCompileLoss`: keeps what each call contributed."""

    def __init__(self, loss: Any, number: int, owner: ExactCompileLoss) -> None:
        self.loss, self.number, self.owner = loss, number, owner
        self.name = loss.name
        if not isinstance(loss, Objective):
            check_elementwise(loss)
            check_elementwise(getattr(loss, "fn", None))
            self._exact = _SampleWise(swapped(loss.call))
            self._exact.name = loss.name

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        if isinstance(self.loss, Objective):
            told = self.loss.contribute(y_true, y_pred, sample_weight)
        else:
            told = self._contribute(y_true, y_pred, sample_weight)
        return self.owner.collect(self.number, told)

    def _contribute(self, y_true: Any, y_pred: Any, sample_weight: Any) -> CallSums:
        """Return numerator and denominator as ``keras.losses.Loss`` would divide them."""
        loss = self.loss
        mask = get_keras_mask(y_pred) if tf.is_tensor(y_pred) else None
        weight = _with_mask(sample_weight, y_pred)
        y_pred = keras.tree.map_structure(lambda x: keras.ops.convert_to_tensor(x, dtype=loss.dtype), y_pred)
        y_true = keras.tree.map_structure(lambda x: keras.ops.convert_to_tensor(x, dtype=loss.dtype), y_true)
        part = self._exact.contribute(y_pred, y_true, weight).part
        if loss.reduction == "mean_with_sample_weight":
            return CallSums(part)
        if loss.reduction in (None, "none", "sum"):
            return CallSums(
                dataclasses.replace(part, denominator=_OPS.scalar64(1.0 / self.owner.size, y_pred))
            )
        entries = self._exact.entries
        masks = [one for one in (mask, self._exact.mask) if one is not None]
        if masks:
            counted = tf.cast(functools.reduce(_both, masks), tf.float64)
            entries *= tf.reduce_sum(counted) / tf.cast(tf.size(counted), tf.float64)
        return CallSums(dataclasses.replace(part, denominator=entries))


def _both(a: Any, b: Any) -> tf.Tensor:
    return tf.cast(a, tf.bool) & tf.cast(b, tf.bool)


class ExactCompileLoss(CompileLoss):
    """What ``compile`` makes of a model's losses, telling each batch's weight.

    With one loss its denominator is the weight of the backward pass, and rides along with the
    gradients. Several losses have several denominators; those of all ranks are summed in one small
    all-reduce, which depends on weights and masks only and so starts before the forward pass ends, and
    each loss's gradient is scaled to its share. A penalty is not scaled, and counts once.

    Args:
        like: what Keras made of the losses.
        reducer: how normalisers travel.
        acting: the loss among them that has terms, whose step_state then are the model's; or None.
        nonfinite: what they do about what is NaN or infinite.
    """

    def __init__(
        self,
        like: CompileLoss,
        reducer: GradientReducer,
        acting: Objective | None = None,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(like._user_loss, like._user_loss_weights, output_names=like.output_names)
        self.step_state = StepState(nonfinite=nonfinite) if acting is None else acting.step_state
        self.reducer = reducer
        self.denominator: Any = None  # of the last call, while it is traced
        self._parts: list[CallSums] = []

    @property
    def size(self) -> int:
        """How many ranks share a step."""
        return self.reducer.size

    @property
    def several(self) -> int:
        """The number of losses if there is more than one, else 0; known once built."""
        count = len(self._flat_losses or ())
        return count if count > 1 else 0

    def build(self, y_true: Any, y_pred: Any) -> None:
        """Resolve names of losses, as Keras does, and make each tell its denominator."""
        super().build(y_true, y_pred)
        self._flat_losses = [
            one._replace(loss=_Leaf(one.loss, number, self)) for number, one in enumerate(self._flat_losses)
        ]
        if self.several and self.step_state.nonfinite == "drop":
            raise ConfigError(
                f'nonfinite="drop" with {self.several} losses: each one\'s gradients are divided by what all '
                f'ranks hold of it before it is known whether they are finite; choose "skip" or "raise"'
            )
        if self.several:  # whose combined rows are means
            self.step_state.reduction = "mean"
        for number, metric in enumerate(self.metrics):
            self.metrics[number] = ExactMean(self, name=metric.name)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Have losses of all ranks' elements be those of this rank's: nothing is exchanged."""
        ours = [one._exact for one in keras.tree.flatten(self._user_loss) if isinstance(one, Objective)]
        for one in ours:
            one.alone = True
        try:
            yield
        finally:
            for one in ours:
                one.alone = False

    def collect(self, number: int, told: CallSums) -> tf.Tensor:
        """Take what one loss contributed; return its local value, scaled in the backward pass."""
        value = told.mean()
        self._parts.append(told)
        self.denominator = told.part.denominator
        if not self.several:
            return told.with_penalty(value)
        shares = self._shares

        @tf.custom_gradient
        def scaled(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            return tf.identity(x), lambda upstream: upstream * tf.cast(shares()[number], upstream.dtype)

        return told.with_penalty(scaled(value))

    def call(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Return the local total loss, as Keras does."""
        parts = self._parts = []
        self._shares = self._sharing(parts)
        total = super().call(y_true, y_pred, sample_weight)
        if not parts:
            return total
        if not self.several:
            return self.step_state.record_on_backward(total, parts[0].row())
        self.denominator = None
        return self.step_state.record_on_backward(total, lambda: self._combined(parts))

    def _sharing(self, parts: list[CallSums]) -> Callable[[], list[tf.Tensor]]:
        """Return a function of the backward pass that gives each loss's factor and its global inverse."""
        found: list[Any] = []

        def shares() -> list[tf.Tensor]:
            if not found:
                mine = tf.stack([*(told.part.denominator for told in parts), tf.ones((), tf.float64)])
                mine = tf.where(tf.math.is_finite(mine), mine, tf.zeros_like(mine))
                sums = self.normalisers(mine)
                inverse = tf.math.divide_no_nan(sums[-1], sums[:-1])  # active ranks / global denominator
                found.append(([mine[i] * inverse[i] for i in range(len(parts))], inverse))
            return found[0][0]

        self._inverse = lambda: (shares(), found[0][1])[1]
        return shares

    def normalisers(self, mine: tf.Tensor) -> tf.Tensor:
        """Return the sums of all ranks' denominators and activity, ``(losses + 1,)``. One all-reduce."""
        return self.reducer.total(mine, "normalisers")

    def _combined(self, parts: list[CallSums]) -> tf.Tensor:
        """Return the row of all losses together: their exact total, of denominator 1."""
        inverse = self._inverse()
        rows = [told.part.row(_OPS) for told in parts]
        weights = [1.0 if one.loss_weights is None else one.loss_weights for one in self._flat_losses]
        numerator = tf.add_n(
            [c * row[0] * inverse[i] for i, (c, row) in enumerate(zip(weights, rows, strict=True))]
        )
        one = tf.ones((), tf.float64)
        total = tf.add_n(rows)
        row = tf.stack([numerator, one, total[2], total[3], one, total[5], total[6], total[7]])
        # One objective at most has terms; where it stands for several outputs their sums add up.
        sums = [tf.concat(told.sums, 0) for told in parts if told.sums]
        return tf.concat([row, tf.add_n(sums)], 0) if sums else row


class ExactMean(keras.metrics.Mean):
    """The mean of a loss over batches, each weighted with what its loss divides by.

    Keras weights batches by their number of samples, which is wrong for weighted losses.
    """

    def __init__(self, source: ExactCompileLoss, name: str) -> None:
        super().__init__(name=name)
        self._source = [source]  # in a list, since Keras tracks attributes

    def update_state(self, values: Any, sample_weight: Any = None) -> None:
        """Add one batch."""
        denominator = self._source[0].denominator
        if denominator is not None:
            # At the end of data of unknown length a batch turns out not to exist: it must not count, be
            # its weight a constant.
            with tf.control_dependencies([tf.convert_to_tensor(values)]):
                sample_weight = tf.identity(denominator)
        if self._source[0].step_state.nonfinite != "raise":  # such a batch was none
            values = tf.convert_to_tensor(values)
            finite = tf.math.is_finite(values)
            values = tf.where(finite, values, tf.zeros_like(values))
            weight = 1.0 if sample_weight is None else sample_weight
            sample_weight = tf.cast(finite, tf.float64) * tf.cast(weight, tf.float64)
        super().update_state(values, sample_weight)
