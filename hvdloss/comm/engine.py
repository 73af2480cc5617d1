"""The seam to an engine: who moves tensors between ranks.

An adapter's ``engines`` folder holds the engines; whatever else exchanges tensors does so through a
:class:`Group`. Small arrays of NumPy travel through a :class:`hvdloss.comm.communicator.Communicator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

__all__ = ["Group", "Work"]

Tensor = TypeVar("Tensor", contravariant=True)


class Work(Protocol):
    """An exchange that is under way."""

    def done(self) -> bool:
        """Return whether it is over."""

    def wait(self) -> Any:
        """Return its result when it is over.

        Raises:
            RankError, LostRankError, StallError: ranks cannot go on together (:mod:`hvdloss.watch`).
        """


class Group(Protocol[Tensor]):
    """Ranks that exchange tensors.

    All of them make the same calls in the same order, since some engines match exchanges by order, and with
    the same names, since others match by name. Tensors are contiguous, and carry no gradients.
    """

    @property
    def rank(self) -> int:
        """This process's number in the group, from 0."""

    @property
    def size(self) -> int:
        """How many ranks it has."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Their numbers among all; empty for all of them."""

    def all_reduce(self, tensor: Tensor, name: str, *, in_place: bool = False) -> Work:
        """Start summing a tensor over ranks."""

    def all_gather(self, tensor: Tensor, name: str) -> Work:
        """Start gathering along the first axis, in which ranks may have different lengths."""

    def all_to_all(self, tensor: Tensor, name: str, splits: Sequence[int] | None = None) -> Work:
        """Start sending ``splits[k]`` rows to rank k (None: as many to each).

        Its result is the rows received and, with `splits`, how many came from each rank.
        """

    def reduce_scatter(self, tensor: Tensor, name: str) -> Work:
        """Start summing over ranks; its result is this rank's part of as many rows."""

    def broadcast(self, tensor: Tensor, root: int, name: str, *, in_place: bool = False) -> Work:
        """Start giving all ranks the tensor of one, counted among all ranks."""
