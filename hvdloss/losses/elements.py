"""What a loss must be to have elements, and what it says of its own mean.

An objective divides by the weights of all ranks' elements, so it has to see the loss of each one. A function
that returns a mean, a sum over samples, or the losses of pairs has none to show, and is refused; options that
take elements out of a mean or weigh them (:class:`ClassOptions`) become the elements' weights.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdloss.errors import ConfigError, ShapeError

__all__ = ["IGNORED", "ClassOptions", "check_object", "per_element_error", "prediction_first", "reduction_of"]

IGNORED = -100  # a class index that marks an element as absent, as in torch
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class ClassOptions:
    """How a loss of classes treats its targets.

    Attributes:
        ignore_index: elements of this class index are absent.
        label_smoothing: the part of each target that is spread evenly over all classes; in 0..1.
        class_weight: by class; the weight of an element of that class. None for all 1. Targets that are
            probabilities have each class's part of their loss weighed, and weigh 1 themselves.
    """

    ignore_index: int = IGNORED
    label_smoothing: float = 0.0
    class_weight: tuple[float, ...] | None = None

    @classmethod
    def make(
        cls,
        name: str,
        *,
        ignore_index: int | None,
        label_smoothing: float,
        class_weight: Sequence[float] | None,
    ) -> ClassOptions:
        """Return the options given for the loss called `name`.

        Raises:
            ConfigError: one that cannot be used, or not with this loss.
        """
        given = {"ignore_index": ignore_index, "label_smoothing": label_smoothing or None}
        given["class_weight"] = class_weight  # type: ignore[assignment]
        allowed = {"cross_entropy": tuple(given), "nll": ("ignore_index", "class_weight")}.get(name, ())
        for option, value in given.items():
            if value is not None and option not in allowed:
                raise ConfigError(
                    f'{option}={value!r} is an option of loss="cross_entropy"'
                    f"{'' if option == 'label_smoothing' else ' and nll'}, not of {name}"
                )
        if ignore_index is not None and (not isinstance(ignore_index, int) or isinstance(ignore_index, bool)):
            raise ConfigError(f"ignore_index={ignore_index!r} must be an integer")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ConfigError(f"label_smoothing={label_smoothing!r} must be in 0..1")
        weights = None
        if class_weight is not None:
            if isinstance(class_weight, Mapping | str):
                raise ConfigError(
                    f"class_weight={class_weight!r} must have one number for each class, in their order"
                )
            weights = tuple(float(w) for w in class_weight)
            if not weights or not all(math.isfinite(w) and w >= 0 for w in weights):
                raise ConfigError(f"class_weight={list(weights)} must be finite numbers of at least 0")
        check_smoothing(label_smoothing, weights is not None and 0.0 in weights)
        return cls(IGNORED if ignore_index is None else ignore_index, float(label_smoothing), weights)

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks: the options that were given."""
        changed = {k: v for k, v in vars(self).items() if v != getattr(_DEFAULT, k)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}

    def check_classes(self, classes: int | None) -> None:
        """Raise ShapeError if there is not one weight for each class."""
        if self.class_weight is not None and classes not in (None, len(self.class_weight)):
            raise ShapeError(
                f"class_weight has {len(self.class_weight)} entries, but predictions have {classes} classes"
            )


_DEFAULT = ClassOptions()


def check_smoothing(label_smoothing: float, zero_weight: bool) -> None:
    """Raise ConfigError for classes of weight 0 together with label smoothing.

    Their elements would add to the loss, by the other classes' part of the target, but not to what it is
    divided by: no weighted mean.
    """
    if label_smoothing and zero_weight:
        raise ConfigError(
            f"label_smoothing={label_smoothing!r} with a class of weight 0: its elements would count in the "
            f"sum of losses, but not in what it is divided by. Give them the weight 0 in the call "
            f"(weight=), or ignore them (ignore_index=)"
        )


def reduction_of(asked: str | None, own: Any, name: str) -> str:
    """Return the reduction of a loss that may have one itself.

    Args:
        asked: by the objective's argument; None for nothing.
        own: what the loss says of itself: "mean", "sum", "none" or None.
        name: of the loss, for the message.

    Raises:
        ConfigError: the two differ.
    """
    if own in ("none", None):
        return "mean" if asked is None else asked
    if asked not in (None, own):
        raise ConfigError(
            f"reduction={asked!r}, but loss={name} reduces by itself (reduction={own!r}); leave one of them "
            f'out, or construct the loss with reduction="none"'
        )
    return str(own)


def check_object(loss: Callable[..., Any], name: str) -> None:
    """Check what a loss that is no plain function says of itself.

    Raises:
        ConfigError: it returns no per-element losses, or its own mean would leave some out, or weigh them.
    """
    said = {**getattr(loss, "__dict__", {})}
    said.update(getattr(loss, "_buffers", {}))  # where torch modules keep tensors
    if isinstance(loss, functools.partial):
        said.update(loss.keywords)
    own = said.get("reduction", getattr(loss, "reduction", None))
    if own not in ("none", None):
        raise ConfigError(
            f"loss={name} reduces by itself (reduction={own!r}); construct it with "
            f'reduction="none", so that it returns per-element losses'
        )
    for option in ("ignore_index", "ignore_class", "weight", "weights", "class_weight", "class_weights"):
        value = said.get(option)
        if value is None or callable(value) or ("ignore" not in option and np.ndim(value) == 0):
            continue
        raise ConfigError(
            f"loss={name} has {option}={value!r}: its own mean leaves out or weighs elements in a way that "
            f"its per-element losses do not show. Construct it without, and give these weights in the call: "
            f"objective(prediction, target, weight=...), 0 for an element that is to be ignored"
        )


_PREDICTIONS = {"y_pred", "prediction", "predictions", "pred", "preds", "logits", "log_input"}
_PREDICTIONS |= {"input", "inputs", "output", "outputs"}
_TARGETS = {"y_true", "target", "targets", "label", "labels", "onehot_labels", "multi_class_labels"}


def prediction_first(function: Callable[..., Any]) -> bool | None:
    """Return whether a function takes (prediction, target), by the names of its parameters.

    False for (target, prediction), the order of Keras and ``tf.nn``; None if the names do not show it.
    """
    try:
        names = list(inspect.signature(function).parameters)[:2]
    except (TypeError, ValueError):
        return None
    if len(names) == 2 and names[0] in _TARGETS and names[1] in _PREDICTIONS:
        return False
    return True if len(names) == 2 and names[0] in _PREDICTIONS and names[1] in _TARGETS else None


def per_element_error(
    losses: Shape, prediction: Sequence[Shape], target: Sequence[Shape], name: str, rank: int
) -> ShapeError | None:
    """Return the error for losses that cannot be one per element, or None if they may be.

    They may be if each belongs to a place of the batch: their axes are leading ones of a prediction or
    target (or without its class axis, or a part of each, as of shifted tokens), or those in one.

    Args:
        losses: their shape.
        prediction, target: the shapes of all arrays in them.
        name, rank: for the message.

    >>> per_element_error((8, 5), [(8, 10, 5)], [(8, 5)], "f", 0)
    >>> per_element_error((40,), [(8, 5, 10)], [(8, 5)], "f", 0)
    >>> str(per_element_error((), [(8, 10)], [(8,)], "f", 0))[:24]
    'loss=f returns one numbe'
    """
    inputs = [*prediction, *target]
    if not losses:
        # One element has no batch axis; a batch of one element has: what is right there must be right
        # on the rank that has two.
        if inputs and (all(s == () for s in target) if target else all(s == () for s in prediction)):
            return None
        return ShapeError(
            f"loss={name} returns one number for prediction of shape {_text(prediction)} and target of shape "
            f"{_text(target)} (rank {rank}): a mean or sum of this rank's elements, from which that of all "
            f"ranks' cannot be had. Return the loss of each element, of the batch's shape (in torch's "
            f'functions reduction="none"); a loss of all elements together is one of hvdloss.losses '
            f'("soft_dice", say)'
        )
    if not inputs or any(_fits(losses, shape) for shape in inputs):
        return None
    return ShapeError(
        f"loss={name} returns losses of shape {losses} for prediction of shape {_text(prediction)} and "
        f"target of shape {_text(target)} (rank {rank}): they are not one per element. Give prediction "
        f"and target one shape, and return losses whose first axis is the batch's"
    )


def _text(shapes: Sequence[Shape]) -> str:
    return ", ".join(map(str, shapes)) or "unknown"


def _fits(losses: Shape, shape: Shape) -> bool:
    """Return whether losses of one shape may be those of the elements of an array of the other."""
    while len(losses) > 1 and losses[-1] == 1:
        losses = losses[:-1]

    def part(shape: Shape) -> bool:
        return len(losses) <= len(shape) and all(
            a is None or b is None or (a <= b if i else a == b)
            for i, (a, b) in enumerate(zip(losses, shape, strict=False))
        )

    if part(shape) or any(part(shape[:i] + shape[i + 1 :]) for i in range(1, len(shape))):
        return True
    if len(losses) > 1 or len(shape) < 2:
        return False
    if None in shape:
        return True
    known = [n for n in shape if n is not None]
    return (
        losses[0]
        in (
            math.prod(known),
            math.prod(known[:1] + known[2:]),  # without classes
            math.prod(known[:-1]),
            known[0] * (known[1] - 1),  # each for the next token
        )
    )
