"""What a loss is that only all ranks together know, and what a framework lends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.losses.reduction import ArrayOps

__all__ = ["GlobalLoss", "Group", "Measured", "OneRank"]


class Group(Protocol):
    """The ranks of a process set, and collectives over them that carry gradients.

    What follows a collective either differs between ranks, and the loss is the sum of what they make of
    it (the default); or it is `replicated`: every rank computes the same from the same, and it counts
    once, so that the backward pass needs nothing from the others.
    """

    @property
    def rank(self) -> int:
        """This process's number in the group, from 0."""

    @property
    def size(self) -> int:
        """How many ranks the group has."""

    def all_reduce(self, x: Any, name: str, *, replicated: bool = False) -> Any:
        """Return the sum of `x` over ranks; backward: the same of the gradient, or the gradient itself."""

    def all_gather(self, x: Any, name: str, *, replicated: bool = False) -> Any:
        """Return all ranks' rows, whose numbers may differ; backward: a reduce-scatter, or a slice."""

    def shift(self, x: Any, name: str, by: int = 1) -> Any:
        """Return the rows of the rank `by` before this one in the ring; backward: the other way round."""


class OneRank:
    """The group of this process alone."""

    rank = 0
    size = 1

    def all_reduce(self, x: Any, name: str, *, replicated: bool = False) -> Any:
        """Return `x`."""
        return x

    def all_gather(self, x: Any, name: str, *, replicated: bool = False) -> Any:
        """Return `x`."""
        return x

    def shift(self, x: Any, name: str, by: int = 1) -> Any:
        """Return `x`."""
        return x


@dataclass(frozen=True)
class Measured:
    """A global loss of one call.

    Attributes:
        value: scalar; its gradient is this rank's part.
        fault: float64 scalar, above 0 if it is this rank's doing that the value is not finite; None if
            that cannot be told.
    """

    value: Any
    fault: Any = None


class GlobalLoss:
    """A loss of the elements of all ranks that is no mean over them.

    Its value is the same on all ranks. Its gradient on a rank is that rank's part; the gradient of the
    value is the sum of the parts. An ``Objective`` of it does the same with weights, penalties,
    accumulation and terms as of a mean.

    Attributes:
        name: for messages and for the collectives' names.
        classes: whether the prediction has a class axis that the elements lack, and integer targets are
            classes, of which -100 marks absent elements.
    """

    name: str = "global loss"
    classes: bool = False

    def measure(self, ops: ArrayOps, group: Group, prediction: Any, target: Any, weight: Any) -> Measured:
        """Return the loss over all ranks' elements, and whether this rank is why it is not finite.

        The value is a scalar whose gradient is this rank's part, not multiplied by the number of ranks: who
        calls does that.

        Args:
            ops: the framework's operations.
            group: the ranks.
            prediction, target: what the loss takes; any structure.
            weight: None, or per element, without gradient; an element of weight zero is absent.

        Raises:
            ShapeError: what does not fit.
        """
        raise NotImplementedError

    def value(self, ops: ArrayOps, group: Group, prediction: Any, target: Any, weight: Any) -> Any:
        """Return what :meth:`measure` gives, without who is to blame for it."""
        return self.measure(ops, group, prediction, target, weight).value

    def of(self, prediction: Any, target: Any = None, weight: Any = None) -> Any:
        """Return the loss of NumPy arrays in this process, float64."""
        return self.value(NumpyOps(), OneRank(), prediction, target, weight)

    def elements(self, ops: ArrayOps, prediction: Any, target: Any) -> Any:
        """Return ones, one for each element that a weight may weigh, in a dtype fit for sums."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks, JSON-able: the numbers and words it was made with."""
        plain = (bool, int, float, str, type(None))
        return {k: v for k, v in vars(self).items() if isinstance(v, plain)}

    def __repr__(self) -> str:
        """Return the name and the settings."""
        hidden = ("name", "classes", "columns")
        inside = ", ".join(f"{k}={v!r}" for k, v in self.settings().items() if k not in hidden)
        return f"{type(self).__name__}({inside})"
