"""What a loss is that only all ranks together know, and what a framework lends it."""

from __future__ import annotations

from typing import Any, Protocol

from hvdloss.reduction import ArrayOps

__all__ = ["GlobalLoss", "Group"]


class Group(Protocol):
    """The ranks of a process set, and collectives over them that carry gradients.

    What follows a collective either differs between ranks, and the loss is the sum of what they make of
    it (the default); or it is `replicated`: every rank computes the same from the same, and it counts
    once, so that the backward pass needs nothing from the others.
    """

    rank: int
    size: int

    def all_reduce(self, x: Any, name: str, *, replicated: bool = False) -> Any:
        """Return the sum of `x` over ranks; backward: the same of the gradient, or the gradient itself."""

    def all_gather(self, x: Any, name: str, *, replicated: bool = False) -> Any:
        """Return all ranks' rows, whose numbers may differ; backward: a reduce-scatter, or a slice."""


class GlobalLoss:
    """A loss of the elements of all ranks that is no mean over them.

    Its value is the same on all ranks. Its gradient on a rank is `size` times that rank's part, so that
    the average over ranks, which every data-parallel optimizer takes, is the gradient of the value. An
    ``Objective`` of it does the same with weights, penalties, accumulation and terms as of a mean.

    Attributes:
        name: for messages and for the collectives' names.
    """

    name: str = "global loss"

    def value(self, ops: ArrayOps, group: Group, prediction: Any, target: Any, weight: Any) -> Any:
        """Return the loss over all ranks' elements, a scalar whose gradient is this rank's part.

        Not multiplied by the number of ranks: who calls does that.

        Args:
            ops: the framework's operations.
            group: the ranks.
            prediction, target: what the loss takes; any structure.
            weight: None, or per element, without gradient; an element of weight zero is absent.

        Raises:
            ShapeError: what does not fit.
        """
        raise NotImplementedError

    def elements(self, ops: ArrayOps, prediction: Any, target: Any) -> Any:
        """Return ones, one for each element that a weight may weigh, in a dtype fit for sums."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks."""
        return {}
