"""The objective: a loss with its reduction, exact over all elements of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

import tensorflow as tf
from hvdloss.comm.communicator import included, rank_and_size
from hvdloss.errors import ConfigError
from hvdloss.losses.base import Group, OneRank
from hvdloss.losses.elements import prediction_first
from hvdloss.losses.reduction import Contribution, broadcast_error, broadcast_weights, reduce_losses
from hvdloss.report import StepReport
from hvdloss.step.objective import ObjectiveBase, expand_mask_axes
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow._compat import as_the_caller_would
from hvdloss.tensorflow._traces import register_trace
from hvdloss.tensorflow.collectives import group_of
from hvdloss.tensorflow.ops import NAMED_LOSSES, TensorFlowOps, communicator_of, once
from hvdloss.tensorflow.step import StepState
from hvdloss.terms.term import Term

__all__ = ["CallSums", "Objective"]

_OPS = TensorFlowOps()


def _mask_gradient(prediction: tf.Tensor, holder: list[tf.Tensor]) -> tf.Tensor:
    """Return `prediction`, with a gradient that is zero at absent elements, even where it would be NaN.

    The mask is put into `holder` after the losses are known: only then is their shape.
    """

    @tf.custom_gradient
    def gate(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        def grad(upstream: tf.Tensor) -> tf.Tensor:
            return tf.where(holder[0], tf.zeros((), upstream.dtype), upstream) if holder else upstream

        return tf.identity(x), grad

    return gate(prediction)


def _scale_gradient(value: tf.Tensor, factor: float) -> tf.Tensor:
    """Return `value`, whose gradient is multiplied, and has no gradient itself."""

    @tf.custom_gradient
    def part(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        error = ConfigError(
            "tape.gradient of a gradient: that of a loss of all ranks' elements is a rank's part of the "
            "whole, whose derivative would lack the other ranks' elements; differentiate once, or build the "
            "loss on hvdloss.tensorflow.collectives, whose gradients can be differentiated"
        )
        return tf.identity(x), lambda upstream: once(upstream * tf.cast(factor, upstream.dtype), [x], error)

    return part(value)


def swapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of (prediction, target) from one of (target, prediction)."""

    def per_element(prediction: Any, target: Any) -> Any:
        return as_the_caller_would(function)(target, prediction)

    per_element.__qualname__ = getattr(function, "__qualname__", type(function).__name__)
    return per_element


def reduction_of_keras(loss: keras.losses.Loss) -> str:
    """Return the reduction that a loss of Keras leaves to the objective, as it calls it.

    Raises:
        ConfigError: one that an objective does not have, or a loss that compares elements with one another.
    """
    check_elementwise(loss)
    own = {None: "none", "none": "none", "mean_with_sample_weight": "mean", "sum": "sum"}.get(loss.reduction)
    if own is None:
        raise ConfigError(
            f"loss={loss.name} reduces by itself (reduction={loss.reduction!r}): it divides by the number of "
            f"samples, whatever their weights. Construct it with reduction=None, so that it returns "
            f'per-element losses, or "mean_with_sample_weight"; without an objective, compile and fit of '
            f"hvdloss.keras take it as it is"
        )
    return own


def check_elementwise(loss: Any) -> None:
    """Raise ConfigError for a loss of Keras that compares elements with one another."""
    if isinstance(loss, keras.losses.Circle) or loss is keras.losses.circle:
        raise ConfigError(
            "loss=Circle compares each element with the others of its rank, so it is no mean over all ranks' "
            'elements; hvdloss.losses has some that contrast all of them: Objective("supervised_contrastive")'
        )


@dataclass(frozen=True)
class CallSums:
    """What one call of an objective adds to a step.

    Attributes:
        part: the sums of its elements.
        penalty: of the terms, a scalar, or None.
        sums: of the terms, float64 vectors one after another.
    """

    part: Contribution
    penalty: tf.Tensor | None = None
    sums: tuple[tf.Tensor, ...] = ()

    def mean(self) -> tf.Tensor:
        """Return the local loss without the penalty."""
        return self.part.mean(_OPS)

    def with_penalty(self, mean: tf.Tensor) -> tf.Tensor:
        """Return `mean` with the penalty added."""
        return mean if self.penalty is None else mean + tf.cast(self.penalty, mean.dtype)

    def row(self) -> tf.Tensor:
        """Return what is entered into the step_state: the sums of the elements, and those of the terms."""
        row = self.part.row(_OPS)
        return tf.concat([row, *self.sums], 0) if self.sums else row


class Objective(ObjectiveBase[tf.Tensor]):
    """The weighted loss of all elements of a step, however they fall on ranks and micro-batches.

    Calling it gives this rank's local mean, an ordinary scalar tensor: ``tape.gradient`` does what it
    always does, eagerly and in a ``tf.function``, and a penalty may be added. Passed to
    :func:`hvdloss.tensorflow.DistributedGradientTape`, the gradient is that of

        L = sum_k sum_i w l / sum_k sum_i w        (reduction "mean")

    over ranks k and elements i, plus the penalty, once. With
    :func:`hvdloss.tensorflow.DistributedOptimizer` the sums also run over micro-batches.

    Args:
        loss: a name from ``hvdloss.step.objective.LOSSES``, or a callable
            ``(prediction, target) -> per-element losses``, in the order of its parameters' names if they are
            those of ``tf.nn`` (labels, logits) or Keras (y_true, y_pred); or a loss of Keras constructed
            with ``reduction=None`` or ``"mean_with_sample_weight"``. What they mask (``ignore_class``) is
            absent. What returns one number for several elements is refused. Or a loss that is no mean, of
            :mod:`hvdloss.losses`, or its name (``"soft_dice"``, ``"correlation"``, ...): calling the
            objective then gives that of all ranks' elements.
        reduction: ``"mean"`` (sum wl / sum w), ``"sum"``, ``"batch_mean"`` (sum wl / number of elements
            with w != 0), or ``"sequence_mean"`` (losses of shape (N, T), or packed ones with segments: the
            mean over sequences of each one's weighted token mean); None for the loss's own, or ``"mean"``.
            With ``"sum"`` a call gives size x passes x its local sum, its estimate of the global sum, so
            that a penalty added to it keeps its proportion.
        ignore_index, label_smoothing, class_weight: of ``"cross_entropy"`` (the first and last of ``"nll"``
            too): targets that are absent, -100 by default; the part of each target that is spread over all
            classes; one weight per class.
        terms: what is measured per rank, priced and acted on: :class:`hvdloss.CommunicationCost`,
            :class:`hvdloss.DataSkew`, your own subclasses of :class:`hvdloss.Term`.
        process_set: the Horovod process set whose ranks share the step; None for all.
        nonfinite: what happens to a step in which the loss or a gradient of some rank is NaN or infinite (a
            weight that is, or is negative, is always an error).

            - ``"raise"``: NonFiniteLossError or NonFiniteGradientError on every rank, before any update.
            - ``"skip"``: no rank updates anything: parameters, the optimizer's memory, moving averages of
              parameters, the number of iterations. ``last_step`` counts it, and names the ranks. What the
              forward pass changed (statistics of batch normalisation) stays. Needs a distributed optimizer
              of Keras, which makes the update.
            - ``"drop"``: that rank adds nothing to the step: no gradient, weight or element, as if it had
              had no batch. With ``"sum"`` a penalty then counts for its share of the calls only. Nothing is
              sent before a rank has computed all of its gradients.

    Raises:
        ConfigError: an argument that cannot be used.

    >>> import tensorflow as tf
    >>> from hvdloss.tensorflow import Objective
    >>> objective = Objective("mse")
    >>> y, t = tf.constant([1.0, 2.0, 5.0]), tf.constant([0.0, 0.0, 0.0])
    >>> objective(y, t, weight=tf.constant([1.0, 1.0, 0.0])).numpy().item()
    2.5
    """

    def __init__(
        self,
        loss: str | Callable[..., Any],
        *,
        reduction: str | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        class_weight: Sequence[float] | None = None,
        terms: tuple[Term, ...] = (),
        process_set: Any = None,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(
            loss,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            terms=terms,
            process_set=process_set,
            nonfinite=nonfinite,
        )
        self.step_state = StepState(self.controller, self.reduction, nonfinite)
        self.step_state.register_objective(self.name, self.reduction != "sum" or self.global_loss is not None)
        self.several: tuple[Any, int] | None = None  # those that it is one of, and which
        self.alone = False  # while a rank evaluates a loss of all ranks' elements on its own

    def _named_losses(self) -> Mapping[str, Callable[..., tf.Tensor]]:
        return NAMED_LOSSES

    @property
    def last_step(self) -> StepReport | None:
        """The report of the last reduced step, equal on all ranks; None before the first."""
        return self.step_state.report(self.reduction)

    def prepare(self) -> None:
        """Let the terms measure what they need before the first step.

        Call it eagerly on all ranks, once, before a training loop of your own, if a term asks for it: a
        :class:`hvdloss.CommunicationCost` that calibrates, as it does for policies that decide by the link.
        Keras's ``fit`` calls it by itself.

        Collectives: those of the terms' ``prepare``; for a calibration some blocking all-reduces and one
        gather; none where no term has anything to measure.
        """
        group = self.process_set or hvd.global_process_set
        if self.controller.terms and included(hvd, group):
            self.step_state.begin(*rank_and_size(hvd, group))
            self.controller.prepare(communicator_of(group))

    def __call__(
        self,
        prediction: Any,
        target: Any,
        weight: Any = None,
        *,
        segments: Any = None,
        keys: Any = None,
        total: Any = None,
    ) -> tf.Tensor:
        """Return the local loss of these elements, a scalar tensor (float32, or float64 for float64).

        Args:
            prediction: what the loss takes; ``(N, ..., C)`` logits for ``"cross_entropy"``: TensorFlow
                has the class axis last.
            target: what the loss takes. Class indices of -100 mark absent elements.
            weight: None, a number or a tensor that broadcasts (NumPy's rule) to the per-element losses.
                An element of weight zero is absent: its loss may be NaN. A negative, NaN or infinite
                weight raises WeightError on every rank when the gradients are reduced.
            segments: of packed sequences: integer ids of the losses' shape (negative: padding), or
                :class:`hvdloss.losses.segments.Segments`; or what :func:`link_segments` returned, where
                sequences are cut.
            keys: what terms may group elements by (``DataSkew(of="keys")``): integers whose leading axes
                are those of the losses.
            total: for functions of sums: those of all micro-batches of all ranks (:meth:`total`), so
                that the step's loss is that of all of them.

        Raises:
            ShapeError: `weight` or `segments` do not fit the losses, or no token axis.
            ConfigError: segments that this objective cannot take.
            WeightError: weights that are not those that segments were linked with.

        Collectives: none; those of the loss if it is of :mod:`hvdloss.losses` (one small all-reduce for
        functions of sums, none with `total`), which all ranks must call alike.
        """
        told = self.contribute(prediction, target, weight, segments=segments, keys=keys, total=total)
        if self.several is not None:
            objectives, index = self.several
            return objectives.weigh_on_backward(index, told)
        return self.step_state.record_on_backward(told.with_penalty(told.mean()), told.row())

    def sums(self, prediction: Any, target: Any, weight: Any = None) -> tf.Tensor:
        """Return this rank's sums of a micro-batch, float64, without gradient; they add up.

        For a loss that is a function of sums and gradient accumulation: add them up over the
        micro-batches, give the result to :meth:`total`, and that to each call as ``total=``.

        Raises:
            ConfigError: the loss is no function of sums.
            ShapeError: what does not fit.

        Collectives: none.
        """
        rank, _ = rank_and_size(hvd, self.process_set)
        return tf.stop_gradient(self.local_statistics(_OPS, prediction, target, weight, rank))

    def total(self, sums: tf.Tensor) -> tf.Tensor:
        """Return the sum over ranks of what :meth:`sums` gave. One small all-reduce."""
        return group_of(self.process_set).all_reduce(sums, f"hvdloss.{self.name}.total", replicated=True)

    def per_element(self, prediction: Any, target: Any, weight: Any = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the loss of each element and its weight, of one shape, without gradient.

        What calling the objective sums up, before terms weigh it; absent elements have weight 0.

        Args:
            prediction, target, weight: as in calling it.

        Raises:
            ConfigError: the loss is one of all ranks' elements, which has none of single ones.
            ShapeError: `weight` does not broadcast to the losses.

        Collectives: none.
        """
        self.check_per_element()
        rank, _ = rank_and_size(hvd, self.process_set)
        losses, w = self._elements(prediction, target, weight, rank)
        losses = _OPS.losses(tf.stop_gradient(losses))
        return losses, _OPS.ones_like(losses) if w is None else broadcast_weights(_OPS, w, losses, rank)

    def _read(self, loss: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
        own = None
        function: Callable[..., Any] = loss
        if isinstance(loss, keras.losses.Loss):
            own = reduction_of_keras(loss)
            function = loss.call
        else:
            super()._read(loss)
        return (swapped(function) if prediction_first(function) is False else function), own

    def _elements(self, prediction: Any, target: Any, weight: Any, rank: int) -> tuple[tf.Tensor, Any]:
        """Return the losses of elements, and all their weights: the call's, and the loss's own."""
        own: Any = None
        if self.classes:
            target = tf.convert_to_tensor(target)
        if self.classes and not target.dtype.is_floating:
            target = self._with_absent(target, weight)
            losses = as_the_caller_would(self._function)(prediction, target)
            like = _OPS.losses(losses)
            own = tf.cast(target != self.options.ignore_index, like.dtype)
            if (by_class := self._class_weights(_OPS, prediction, target, like)) is not None:
                own *= by_class
        else:
            losses = as_the_caller_would(self._function)(prediction, target)
            if hasattr(self._function, "absent"):  # a loss that knows by itself
                own = ~self._function.absent(target)
            else:
                own = self._mask_of(losses)
        losses = tf.convert_to_tensor(losses)
        self._check_elements(_OPS, losses, prediction, target, rank)
        weight = self._fit(weight, losses)
        if own is not None:
            own = tf.cast(own, _OPS.losses(losses).dtype)
            weight = own if weight is None else own * broadcast_weights(_OPS, weight, own, rank)
        return losses, weight

    def _mask_of(self, losses: Any) -> Any:
        """Return which elements a loss of Keras left in (``ignore_class``), where it says so."""
        return getattr(losses, "_keras_mask", None)

    def _with_absent(self, target: tf.Tensor, weight: Any) -> tf.Tensor:
        """Return class indices with those of weight 0 ignored: they may be no class at all."""
        weight = self._fit(weight, target)
        if weight is None or broadcast_error(_OPS.shape(weight), _OPS.shape(target), 0) is not None:
            return target  # a weight that does not fit is refused when it meets the losses
        w = tf.convert_to_tensor(weight)
        return tf.where(
            tf.equal(w, tf.zeros((), w.dtype)), tf.cast(self.options.ignore_index, target.dtype), target
        )

    def contribute(
        self,
        prediction: Any,
        target: Any,
        weight: Any = None,
        *,
        segments: Any = None,
        keys: Any = None,
        total: Any = None,
    ) -> CallSums:
        """Return what these elements add to a step, without telling anybody.

        For callers that combine several losses before they announce one backward pass. The arguments,
        errors and collectives are those of calling the objective.
        """
        if self.global_loss is not None:
            self.check_no_segments(segments)
            return self._contribute_whole(prediction, target, weight, keys, total)
        if total is not None:
            raise ConfigError(f"total= is for functions of sums, which {self.name} is not; leave it out")
        register_trace()
        rank, size = rank_and_size(hvd, self.process_set)
        given = prediction
        holder: list[tf.Tensor] = []
        may_mask = self.classes or not self.named or weight is not None or self.controller.has_weights
        may_mask = may_mask or segments is not None
        if may_mask and tf.is_tensor(prediction):
            prediction = _mask_gradient(prediction, holder)
        losses, weight = self._elements(prediction, target, weight, rank)
        layout, weight = self.lay_out(_OPS, losses, weight, segments, rank)
        penalty, sums = None, []
        if self.controller.terms:
            self.step_state.begin(rank, size)
            weight, penalty, sums = self.apply_terms(
                _OPS,
                prediction=prediction,
                target=target,
                losses=losses,
                weight=weight,
                keys=keys,
                state=self.step_state.state,
                class_axis=-1 if self.classes else None,
                rank=rank,
                size=size,
            )
        part = reduce_losses(
            _OPS,
            losses,
            weight,
            self.reduction,
            layout=layout,
            share=1.0 / (size * self.passes),
            rank=rank,
        )
        if weight is not None and tf.is_tensor(given):
            self._set_mask(holder, losses, given, weight)
        return CallSums(part, penalty, tuple(sums))

    def _contribute_whole(self, prediction: Any, target: Any, weight: Any, keys: Any, total: Any) -> CallSums:
        """Return what these elements add to a step's loss of all ranks' elements."""
        assert self.global_loss is not None
        register_trace()
        group: Group = OneRank() if self.alone else group_of(self.process_set)
        holder: list[tf.Tensor] = []
        given = prediction
        if tf.is_tensor(prediction):
            prediction = _mask_gradient(prediction, holder)
        if weight is not None:
            weight = self._fit(weight, self.global_loss.elements(_OPS, given, target))
        if self.controller.terms:
            self.step_state.begin(group.rank, group.size)
        part, penalty, sums, weight = self.contribute_global(
            _OPS,
            group,
            _scale_gradient,
            prediction=prediction,
            target=target,
            weight=weight,
            keys=keys,
            state=lambda: self.step_state.state,
            total=total,
        )
        if weight is not None and tf.is_tensor(given):
            self._set_mask(holder, weight, given, weight)
        return CallSums(part, penalty, tuple(sums))

    def _fit(self, weight: Any, losses: tf.Tensor) -> Any:
        """Return `weight` as this kind of objective means it; here as it is."""
        return weight

    def _set_mask(
        self, holder: list[tf.Tensor], losses: tf.Tensor, prediction: tf.Tensor, weight: Any
    ) -> None:
        """Let the gate hold back the gradient of absent elements, where the shapes tell which they are."""
        classes = self.classes if self.global_loss is None else self.global_loss.classes
        class_axis = -1 if classes else None
        axes = expand_mask_axes(tuple(losses.shape), tuple(prediction.shape), class_axis)
        if axes is None:
            return
        mask = _OPS.weights_like(weight, _OPS.losses(losses)) == 0
        for axis in axes:
            mask = tf.expand_dims(mask, axis)
        holder.append(mask)
