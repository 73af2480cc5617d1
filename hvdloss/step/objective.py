"""The framework-neutral half of an objective: its arguments, its reduction, and its listeners.

An adapter's ``Objective`` adds the tensors: it computes per-element losses, reduces them with
:func:`hvdloss.losses.reduction.reduce_losses`, returns the local mean, and notifies listeners of each
backward pass.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from hvdloss.errors import ConfigError
from hvdloss.losses import NAMED, GlobalLoss, Group, SumsLoss
from hvdloss.losses.elements import IGNORED, ClassOptions, check_object, per_element_error, reduction_of
from hvdloss.losses.ledger import check_nonfinite_mode
from hvdloss.losses.passes import no_optimizer_warning
from hvdloss.losses.reduction import (
    ArrayOps,
    Contribution,
    broadcast_weights,
    check_reduction,
    weight_statistics,
)
from hvdloss.losses.segments import Layout, LinkedSegments, Segments
from hvdloss.terms.controller import Controller
from hvdloss.terms.term import Term

__all__ = ["CLASS_LOSSES", "IGNORED", "LOSSES", "Listener", "ObjectiveBase", "expand_mask_axes", "loss_named"]

# Every named loss, with its formula for one element: prediction y, target t. The adapters map each name to
# their framework's function; a test checks that they know all of them and agree.
LOSSES: dict[str, str] = {
    "mse": "(y - t)^2",
    "mae": "|y - t|",
    "huber": "d^2 / 2 if |d| <= 1 else |d| - 1/2, with d = y - t",
    "log_cosh": "log(cosh(y - t))",
    "cross_entropy": "-log softmax(y)[t]; y are logits, t class indices or probabilities",
    "nll": "-y[t]; y are log-probabilities, t class indices",
    "binary_cross_entropy": "-t log y - (1 - t) log(1 - y); y are probabilities",
    "binary_cross_entropy_with_logits": "the same of sigmoid(y); y are logits",
    "poisson_nll": "exp(y) - t y; y is the log of the rate",
    "hinge": "max(0, 1 - t y), with t = -1 or 1",
    "kl_div": "t (log t - y); y are log-probabilities, t probabilities",
}
_ALIASES = {
    "l2": "mse",
    "mean_squared_error": "mse",
    "l1": "mae",
    "mean_absolute_error": "mae",
    "bce": "binary_cross_entropy",
    "bce_with_logits": "binary_cross_entropy_with_logits",
}
CLASS_LOSSES = ("cross_entropy", "nll")  # predictions have a class axis that the losses lack


def loss_named(name: str) -> str:
    """Return the canonical name of a loss.

    Raises:
        ConfigError: not in :data:`LOSSES`.
    """
    canonical = _ALIASES.get(name, name)
    if canonical not in LOSSES:
        raise ConfigError(
            f"loss={name!r} is not known; choose one of {', '.join([*LOSSES, *NAMED])}, or pass a function "
            f"(prediction, target) -> per-element losses, or one of hvdloss.losses"
        )
    return canonical


def expand_mask_axes(
    element_shape: tuple[int | None, ...],
    prediction_shape: tuple[int | None, ...],
    class_axis: int | None = None,
) -> tuple[int, ...] | None:
    """Return where to insert axes so that a per-element mask broadcasts to the predictions.

    Per-element losses often lack the predictions' class axis. Returns the axes to insert, in
    ascending order (empty if the shapes are equal), or None if the two shapes do not match, or match in more
    than one way: a mask on the wrong axis would drop elements that count.

    Args:
        element_shape: of the losses.
        prediction_shape: of the predictions.
        class_axis: the predictions' axis that the losses lack, where that is known.

    >>> expand_mask_axes((8,), (8, 10)), expand_mask_axes((8, 5), (8, 10, 5))
    ((1,), (1,))
    >>> expand_mask_axes((8, 5), (8, 5, 5)), expand_mask_axes((8, 5), (8, 5, 5), class_axis=1)
    (None, (1,))
    """

    def same(a: tuple[int | None, ...], b: tuple[int | None, ...]) -> bool:
        return len(a) == len(b) and all(m == n or m is None or n is None for m, n in zip(a, b, strict=True))

    e, p = element_shape, prediction_shape
    if same(e, p):
        return ()
    if class_axis is not None:
        axis = class_axis % len(p) if p else 0
        return (axis,) if same(e, p[:axis] + p[axis + 1 :]) else None
    places = []
    if len(p) > len(e) and same(e, p[: len(e)]):
        places.append(tuple(range(len(e), len(p))))
    if len(p) == len(e) + 1 and len(p) > 2 and same(e, p[:1] + p[2:]):
        places.append((1,))
    return places[0] if len(places) == 1 else None


Row = TypeVar("Row", contravariant=True)


class Listener(Protocol[Row]):
    """An optimizer that needs the weight of each backward pass."""

    def on_backward_begin(self, row: Row, gradient: Any, graph: Any) -> None:
        """Called when a backward pass goes through a call of the objective with this ledger row.

        `gradient`: with respect to the loss: 1, unless the loss was scaled, as by a GradScaler. `graph`: of
        the loss, in the adapter's form.
        """

    def on_foreign_backward(self, name: str, graph: Any) -> None:
        """Called when a backward pass goes through a call of an objective it is not attached to.

        `name`: of that objective. `graph`: of its loss, in the adapter's form.
        """


_all_listeners: weakref.WeakSet[Any] = weakref.WeakSet()  # of any objective


class ObjectiveBase(Generic[Row]):
    """Arguments and listeners of an objective, for any framework.

    Args:
        loss: a name from :data:`LOSSES`, or a callable ``(prediction, target) -> per-element losses``;
            or a loss of all ranks' elements (:class:`hvdloss.losses.GlobalLoss`, or its name).
        reduction: see :mod:`hvdloss.losses.reduction`; None for the loss's own, or "mean". A loss of all
            ranks' elements has none.
        ignore_index, label_smoothing, class_weight: of "cross_entropy"; see
            :class:`hvdloss.losses.elements.ClassOptions`.
        terms: what is measured and priced, and drives policies (:class:`hvdloss.terms.term.Term`).
        process_set: the process set whose ranks share the step; None for all.
        nonfinite: what to do with a step in which a loss or gradient of some rank is NaN or infinite: one of
            :data:`hvdloss.losses.ledger.NONFINITE_MODES`.

    Raises:
        ConfigError: any argument that cannot be used; "drop" with a loss of all ranks' elements, and "skip"
            with local steps.
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
    ) -> None:
        self.reduction = check_reduction("mean" if reduction is None else reduction)
        self.nonfinite = check_nonfinite_mode(nonfinite)
        self.name: str
        self._function: Callable[..., Any]
        self.controller = Controller(terms)
        if isinstance(loss, str) and loss in NAMED:
            loss = NAMED[loss]()
        self.global_loss = loss if isinstance(loss, GlobalLoss) else None
        if isinstance(loss, GlobalLoss):
            self.name = loss.name
            self._check_global_loss()
        elif isinstance(loss, str):
            self.name = loss_named(loss)
            self._function = self._named_losses()[self.name]
        elif callable(loss):
            called = loss.func if isinstance(loss, functools.partial) else loss
            self.name = getattr(called, "__qualname__", type(called).__name__)
            self._function, own = self._read(loss)
            self.reduction = reduction_of(reduction, own, self.name)
        else:
            raise ConfigError(f"loss={loss!r} is neither the name of a loss nor a function")
        self.named = isinstance(loss, str) and self.global_loss is None  # a function may be called the same
        self.classes = self.named and self.name in CLASS_LOSSES
        self.options = ClassOptions.make(
            self.name if isinstance(loss, str) else f"loss={self.name}",
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
        )
        if self.options != ClassOptions():
            self._function = functools.partial(self._function, options=self.options)
        if nonfinite == "skip" and any(policy.takes_local_steps for _, policy in self.controller.policies):
            raise ConfigError(
                'nonfinite="skip" with SyncPeriod: between exchanges each rank steps on its own, so no step '
                'can be skipped on all of them; choose "drop", which leaves out that rank\'s step, or "raise"'
            )
        self.terms = self.controller.terms
        self.process_set = process_set
        self._listeners: list[weakref.ref[Any]] = []
        self._warned = False  # that there are none
        self.passes = 1  # backward passes per step, as declared by the attached optimizer

    def _check_global_loss(self) -> None:
        """Check that all arguments go with a loss of all ranks' elements.

        Raises:
            ConfigError: a reduction, or local steps.
        """
        if self.reduction != "mean":
            raise ConfigError(
                f"reduction={self.reduction!r}: {self.name} is a function of all elements, and has no "
                f"reduction of its own; leave reduction out"
            )
        if any(policy.takes_local_steps for _, policy in self.controller.policies):
            raise ConfigError(
                f"SyncPeriod: {self.name} needs all ranks in every forward pass, so no rank can step on its "
                f"own; leave SyncPeriod out of the terms' policies"
            )
        if self.nonfinite == "drop":
            raise ConfigError(
                f'nonfinite="drop": {self.name} is one value of all ranks\' elements, of which each rank has '
                f"seen all: no rank's part can be taken out of the others' gradients once it is known to be "
                f'NaN; choose "skip" or "raise"'
            )
        self.reduction = "sum"  # each call adds its share of the loss

    def _named_losses(self) -> Mapping[str, Callable[..., Any]]:
        """Return the framework's functions for :data:`LOSSES`."""
        raise NotImplementedError

    def _read(self, loss: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
        """Return the per-element function of a callable loss, and its own reduction.

        Raises:
            ConfigError: its per-element losses cannot be determined.
        """
        check_object(loss, self.name)
        return loss, None

    def _check_elements(self, ops: ArrayOps, losses: Any, prediction: Any, target: Any, rank: int) -> None:
        """Raise ShapeError if what the loss returned cannot be one number per element."""
        shapes = ops.shapes(prediction), ops.shapes(target)
        error = per_element_error(ops.shape(losses), *shapes, self.name, rank)
        if error is not None:
            raise error

    def _class_weights(self, ops: ArrayOps, prediction: Any, target: Any, like: Any) -> Any:
        """Return the class weight of each target, in the dtype of `like`; None if all are 1.

        Raises:
            ShapeError: not one weight per class.
        """
        weights = self.options.class_weight
        if weights is None:
            return None
        self.options.check_classes(ops.shape(prediction)[ops.class_axis(prediction)])
        table = ops.vector64(list(weights), like)
        return ops.cast_like(ops.take(table, ops.to_int64(target), len(weights)), like)

    def attach(self, listener: Listener[Row], passes: int = 1) -> None:
        """Notify `listener` of each backward pass; holds it weakly."""
        self._listeners = [ref for ref in self._listeners if ref() is not None]
        if all(ref() is not listener for ref in self._listeners):
            self._listeners.append(weakref.ref(listener))
        _all_listeners.add(listener)
        self.passes = passes

    def detach(self, listener: Listener[Row]) -> None:
        """Stop notifying `listener`."""
        self._listeners = [ref for ref in self._listeners if ref() is not listener]
        _all_listeners.discard(listener)

    def listeners(self) -> list[Listener[Row]]:
        """Return the attached optimizers."""
        return [one for ref in self._listeners if (one := ref()) is not None]

    def notify_backward(self, row: Row, gradient: Any = 1.0, graph: Any = None) -> None:
        """Notify the listeners of a backward pass with this ledger row, and all others of a foreign one."""
        ours = self.listeners()
        for listener in ours:
            listener.on_backward_begin(row, gradient, graph)
        for other in list(_all_listeners):
            if all(other is not listener for listener in ours):
                other.on_foreign_backward(self.name, graph)

    def warn_without_optimizer(self, size: int) -> None:
        """Warn once, with several ranks, that no optimizer reduces the gradients of this objective."""
        if size > 1 and not self._warned:
            self._warned = True
            warnings.warn(no_optimizer_warning(self.name), stacklevel=2)

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks, for the consistency check of the first step."""
        own = {} if self.global_loss is None else self.global_loss.settings()
        return {
            "objective": self.name,
            "reduction": self.reduction,
            "nonfinite": self.nonfinite,
            **self.options.settings(),
            **{f"loss.{key}": value for key, value in own.items()},
            **self.controller.settings(),
        }

    def apply_terms(
        self,
        ops: ArrayOps,
        *,
        prediction: Any,
        target: Any,
        losses: Any,
        weight: Any,
        keys: Any,
        state: Any,
        class_axis: int | None,
        rank: int,
        size: int,
    ) -> tuple[Any, Any, list[Any]]:
        """Apply the terms to a batch; return its weights, a penalty or None, and the terms' sums.

        Args:
            ops: the framework's operations.
            prediction, target, losses, weight, keys: of the batch; `weight` may be None.
            state: the controller's :attr:`~hvdloss.terms.controller.Controller.state`, as a tensor.
            class_axis: of the prediction, where the losses lack it.
            rank, size: this process's.

        Raises:
            ShapeError: `weight` does not broadcast to `losses`.
        """
        controller = self.controller
        controller.reset(rank, size)
        losses = ops.losses(losses)
        given = ops.ones_like(losses) if weight is None else broadcast_weights(ops, weight, losses, rank)
        batches = controller.batches(
            state,
            ops=ops,
            prediction=prediction,
            target=target,
            losses=losses,
            weight=given,
            keys=keys,
            class_axis=class_axis,
            rank=rank,
        )
        factor = controller.weight_factors(batches)
        if factor is not None:
            weight = given * factor
        return weight, controller.penalty(batches), controller.observe(batches)

    def _mask_absent(self, ops: ArrayOps, ones: Any, target: Any, weight: Any, rank: int) -> Any:
        """Return the weights, 0 where the target is not a class; None without weights."""
        if (
            self.global_loss is None
            or not self.global_loss.classes
            or len(ops.shape(target)) != len(ops.shape(ones))
        ):
            return weight
        present = ops.cast_like(ops.to_int64(target) != IGNORED, ones)
        return present if weight is None else present * broadcast_weights(ops, weight, ones, rank)

    def lay_out(
        self, ops: ArrayOps, losses: Any, weight: Any, segments: Any, rank: int
    ) -> tuple[Layout | None, Any]:
        """Return which elements are a sequence, and the weights, 0 at padding; as they are without segments.

        Args:
            ops: the framework's operations.
            losses: per-element losses.
            weight: of them; may be None.
            segments: ids, or :class:`~hvdloss.losses.segments.Segments`, linked or not; may be None.
            rank: this process's.

        Raises:
            ConfigError: segments that this objective cannot take.
            ShapeError: what does not fit the losses.
            WeightError: weights that are not those of linked segments.
        """
        if segments is None:
            return None, weight
        segments = Segments.of(segments)
        per_token = self.reduction != "sequence_mean"
        given = segments
        if isinstance(segments, LinkedSegments):
            given = segments.segments
            self._check_linked(segments)
        if per_token and given.groups is not None:
            raise ConfigError(
                f'segments: groups are for reduction="sequence_mean", and {self.name} has reduction='
                f"{self.reduction!r}; for the mean over groups of their token means give the groups as ids"
            )
        losses = ops.losses(losses)
        layout = segments.lay_out(ops, losses, rank)
        return layout, layout.masked(ops, losses, weight, per_token=per_token, rank=rank)

    def _check_linked(self, segments: LinkedSegments) -> None:
        """Raise ConfigError for what cannot be combined with sequences that are cut."""
        if self.controller.has_weights:
            raise ConfigError(
                "terms that weigh elements with linked segments: the sums of cut sequences were taken before "
                "those weights are known; leave one of them out"
            )
        if segments.ranks and self.nonfinite == "drop":
            raise ConfigError(
                'nonfinite="drop" with sequences that may have pieces on several ranks: without one of them '
                'the others would count as a part; choose "skip" or "raise"'
            )
        if segments.ranks and any(policy.takes_local_steps for _, policy in self.controller.policies):
            raise ConfigError(
                "SyncPeriod with sequences that may have pieces on several ranks: a local step has only a "
                "part of them; leave SyncPeriod out of the policies, or link without over="
            )

    def check_no_segments(self, segments: Any) -> None:
        """Raise ConfigError if a loss of all ranks' elements is given segments."""
        if segments is not None:
            raise ConfigError(f"segments= is for losses of elements; {self.name} is one of all of them")

    def check_per_element(self) -> None:
        """Raise ConfigError if the loss has no per-element losses."""
        if self.global_loss is not None:
            raise ConfigError(
                f"{self.name} is a loss of all elements together and has no per-element losses; pass a loss "
                f"that has, as {', '.join(list(LOSSES)[:4])}, or a function"
            )

    def local_statistics(self, ops: ArrayOps, prediction: Any, target: Any, weight: Any, rank: int) -> Any:
        """Return the local sums of a batch, for a loss that is a function of sums; float64.

        Raises:
            ConfigError: the loss is not a function of sums.
            ShapeError: shapes do not match.
        """
        loss = self.global_loss
        if not isinstance(loss, SumsLoss):
            raise ConfigError(f"{self.name} is no function of sums; call the objective itself")
        weight = self._mask_absent(ops, loss.elements(ops, prediction, target), target, weight, rank)
        return loss.sums(ops, prediction, target, weight, rank=rank)

    def contribute_global(
        self,
        ops: ArrayOps,
        group: Group,
        part: Callable[[Any, float], Any],
        *,
        prediction: Any,
        target: Any,
        weight: Any,
        keys: Any,
        state: Callable[[], Any],
        total: Any = None,
    ) -> tuple[Contribution, Any, list[Any], Any]:
        """Return the contribution of a batch to a step's global loss.

        Args:
            ops, group: the framework's.
            part: ``(value, factor) -> value`` with its gradient multiplied by `factor`.
            prediction, target, weight, keys: of the batch; `weight` may be None.
            state: returns the controller's state as a tensor, if there are terms.
            total: the sums of all the step's elements, where they are known (functions of sums only).

        Returns:
            the contribution, a penalty or None, the terms' sums, and the weights; None if none were given.

        Raises:
            ConfigError: `total` with a loss that is not a function of sums.
            ShapeError: shapes do not match.

        Collectives: those of the loss, in the forward pass.
        """
        loss = self.global_loss
        assert loss is not None
        if total is not None and not isinstance(loss, SumsLoss):
            raise ConfigError(f"total= is for functions of sums, which {self.name} is not; leave it out")
        ones = loss.elements(ops, prediction, target)
        weight = self._mask_absent(ops, ones, target, weight, group.rank)
        penalty: Any = None
        term_sums: list[Any] = []
        if self.controller.terms:
            weight, penalty, term_sums = self.apply_terms(
                ops,
                prediction=prediction,
                target=target,
                losses=ones,
                weight=weight,
                keys=keys,
                state=state(),
                class_axis=ops.class_axis(prediction) if loss.classes else None,
                rank=group.rank,
                size=group.size,
            )
        if weight is not None:  # which the terms may have changed
            weight = broadcast_weights(ops, weight, ones, group.rank)
        if isinstance(loss, SumsLoss):
            measured = loss.measure(ops, group, prediction, target, weight, total)
        else:
            measured = loss.measure(ops, group, prediction, target, weight)
        # The share of one call, of one rank: the weights with which an optimizer adds up their gradients.
        share = 1.0 / (group.size * self.passes)
        factor = group.size * (1 if total is None else self.passes)
        value = part(ops.cast_like(measured.value, ones), float(factor))
        sums = weight_statistics(ops, ones if weight is None else weight, weight is not None)
        contribution = Contribution(value * share, ops.scalar64(share, ones), *sums, fault=measured.fault)
        return contribution, penalty, term_sums, weight

    def __repr__(self) -> str:
        """Return the call that constructs it, roughly."""
        return f"{type(self).__name__}({self.name!r}, reduction={self.reduction!r})"
