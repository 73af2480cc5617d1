"""The neutral half of an objective: its arguments, its reduction, and who listens to it.

An adapter's ``Objective`` adds the tensors: it computes per-element losses, hands them to
:func:`hvdloss.reduction.contribution`, returns the local mean, and announces each backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from hvdloss.controller import Controller
from hvdloss.errors import ConfigError
from hvdloss.reduction import ArrayOps, check_reduction, weights_for
from hvdloss.term import Term

__all__ = ["CLASS_LOSSES", "IGNORED", "LOSSES", "Listener", "ObjectiveBase", "expand_mask_axes", "loss_named"]

# Every loss that has a name, with its formula for one element: prediction y, target t. The adapters map
# each name to their framework's own function; a test checks that both know all of them and agree.
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
CLASS_LOSSES = ("cross_entropy", "nll")  # their predictions have a class axis that the losses lack
IGNORED = -100  # a class index that marks an element as absent, as in torch


def loss_named(name: str) -> str:
    """Return the canonical name of a loss.

    Raises:
        ConfigError: not in :data:`LOSSES`.
    """
    canonical = _ALIASES.get(name, name)
    if canonical not in LOSSES:
        raise ConfigError(
            f"loss={name!r} is not known; choose one of {', '.join(LOSSES)}, or pass a function "
            f"(prediction, target) -> per-element losses"
        )
    return canonical


def expand_mask_axes(
    element_shape: tuple[int | None, ...],
    prediction_shape: tuple[int | None, ...],
    class_axis: int | None = None,
) -> tuple[int, ...] | None:
    """Return where to insert axes so that a per-element mask broadcasts to the predictions.

    Per-element losses often lack the predictions' class axis. Returns the axes to insert, in
    ascending order (empty if the shapes are equal), or None if the two cannot be related, or in more
    than one way: a mask on the wrong axis would silence elements that count.

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
    """An optimizer that wants to know what weight each backward pass has."""

    def backward_began(self, row: Row) -> None:
        """Take note that a backward pass goes through a call of the objective with this ledger row."""


class ObjectiveBase(Generic[Row]):
    """Arguments and listeners of an objective, for any framework.

    Args:
        loss: a name from :data:`LOSSES`, or a callable ``(prediction, target) -> per-element losses``.
        reduction: see :mod:`hvdloss.reduction`.
        terms: what is measured, priced and acted on (:class:`hvdloss.term.Term`).
        process_set: the Horovod process set whose ranks share the step; None for all.

    Raises:
        ConfigError: any argument that cannot be used.
    """

    def __init__(
        self,
        loss: str | Callable[..., Any],
        *,
        reduction: str = "mean",
        terms: tuple[Term, ...] = (),
        process_set: Any = None,
    ) -> None:
        self.reduction = check_reduction(reduction)
        self.name: str
        self._function: Callable[..., Any]
        if isinstance(loss, str):
            self.name = loss_named(loss)
            self._function = self._named_losses()[self.name]
        elif callable(loss):
            self.name = getattr(loss, "__qualname__", type(loss).__name__)
            own = getattr(loss, "reduction", "none")  # torch and Keras losses have one
            if own not in ("none", None):
                raise ConfigError(
                    f"loss={self.name} reduces by itself (reduction={own!r}); "
                    f'construct it with reduction="none", so that it returns per-element losses'
                )
            self._function = loss
        else:
            raise ConfigError(f"loss={loss!r} is neither the name of a loss nor a function")
        self.controller = Controller(terms)
        self.terms = self.controller.terms
        self.process_set = process_set
        self._listeners: list[weakref.ref[Any]] = []
        self.passes = 1  # backward passes per step, as the optimizers that listen declare

    def _named_losses(self) -> Mapping[str, Callable[..., Any]]:
        """Return the framework's functions for :data:`LOSSES`."""
        raise NotImplementedError

    def attach(self, listener: Listener[Row], passes: int = 1) -> None:
        """Have `listener` told of each backward pass; holds it weakly."""
        self._listeners = [ref for ref in self._listeners if ref() is not None]
        if all(ref() is not listener for ref in self._listeners):
            self._listeners.append(weakref.ref(listener))
        self.passes = passes

    def announce(self, row: Row) -> None:
        """Tell all listeners that a backward pass begins whose ledger row is `row`."""
        for ref in self._listeners:
            listener = ref()
            if listener is not None:
                listener.backward_began(row)

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks, for the agreement of the first step."""
        return {"objective": self.name, "reduction": self.reduction, **self.controller.settings()}

    def consult(
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
        """Ask the terms about a batch; return its weights, a penalty or None, and the terms' sums.

        Args:
            ops: the framework's operations.
            prediction, target, losses, weight, keys: of the batch; `weight` may be None.
            state: the controller's :attr:`~hvdloss.controller.Controller.state`, as a tensor.
            class_axis: of the prediction, where the losses lack it.
            rank, size: this process's.

        Raises:
            ShapeError: `weight` does not broadcast to `losses`.
        """
        controller = self.controller
        controller.begin(rank, size)
        losses = ops.losses(losses)
        given = ops.ones_like(losses) if weight is None else weights_for(ops, weight, losses, rank)
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
        factor = controller.weigh(batches)
        if factor is not None:
            weight = given * factor
        return weight, controller.penalty(batches), controller.observe(batches)

    def __repr__(self) -> str:
        """Return the call that made it, nearly."""
        return f"{type(self).__name__}({self.name!r}, reduction={self.reduction!r})"
