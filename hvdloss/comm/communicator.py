"""Collectives of small arrays: in one process, on simulated ranks, or over an engine through a framework.

The core needs two collectives off the hot path: an all-reduce of float64 arrays, and an all-gather of bytes.
An adapter implements them over its engine; :class:`OneProcess` and :class:`SimulatedRank` are here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from hvdloss.errors import ConfigError, HvdlossError

__all__ = [
    "Communicator",
    "OneProcess",
    "SimulatedRank",
    "communicator_for",
    "equal_on_all_ranks",
    "group_ranks",
    "included",
    "preserve_process_sets",
    "rank_and_size",
    "simulate",
]

Result = TypeVar("Result")
Array = npt.NDArray[np.float64]


class Communicator(Protocol):
    """A group of ranks with two collectives. Both block until all ranks have called."""

    @property
    def rank(self) -> int:
        """This process's rank in the group, from 0."""

    @property
    def size(self) -> int:
        """Number of ranks in the group."""

    def all_reduce(self, array: Array, name: str) -> Array:
        """Return the elementwise sum over ranks; same shape on all. One all-reduce."""

    def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        """Return every rank's bytes, in rank order; lengths may differ. Two all-gathers at most."""


class OneProcess:
    """The group of this process alone; nothing is sent."""

    rank = 0
    size = 1

    def all_reduce(self, array: Array, name: str) -> Array:
        """Return a copy of `array`."""
        return np.array(array, dtype=np.float64)

    def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        """Return ``[data]``."""
        return [data]


def equal_on_all_ranks(communicator: Communicator, texts: Sequence[bytes], name: str) -> list[bool]:
    """Return for each text whether it is equal on all ranks.

    Compares 128-bit hashes: 16-bit pieces are equal on all ranks if and only if their variance is zero.

    Args:
        communicator: the ranks.
        texts: of this rank; the same number on all ranks.
        name: of the exchange.

    Collectives: one sum of 16 numbers per text, whatever the number of ranks.
    """
    hashes = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    pieces = np.frombuffer(hashes, dtype="<u2").astype(np.float64)
    sums = communicator.all_reduce(np.concatenate([pieces, pieces**2]), name)
    pairs = zip(*(map(int, half) for half in np.split(sums, 2)), strict=True)
    equal = [communicator.size * squares == one * one for one, squares in pairs]  # exact: integers
    return [all(equal[i : i + 8]) for i in range(0, len(equal), 8)]


def rank_and_size(hvd: Any, process_set: Any = None) -> tuple[int, int]:
    """Return this process's rank in a process set, and the size of the set.

    (0, 1) before Horovod is initialised, and for a process that is not in the set.

    Args:
        hvd: a Horovod module, or its one-process stand-in.
        process_set: None for all ranks.
    """
    if not hvd.is_initialized():
        return 0, 1
    group = process_set or hvd.global_process_set
    return (group.rank(), group.size()) if included(hvd, group) else (0, 1)


@contextmanager
def preserve_process_sets() -> Iterator[None]:
    """Keep process sets bound to the initialised framework while Horovod is imported for the other one.

    Horovod's process sets ask the framework that was imported last. If that is not the one that trains, they
    report in the middle of a job that Horovod is not initialised. ``init`` binds them again.
    """
    theirs = sys.modules.get("horovod.common.process_sets")
    before = getattr(theirs, "_basics", None)
    yield
    if theirs is not None and before is not None and before.is_initialized():
        theirs._setup(before)


def included(hvd: Any, process_set: Any) -> bool:
    """Return whether this process is in a process set; it always is in the global one.

    Horovod answers no for the global one where its other framework's module was imported as well.
    """
    return process_set is hvd.global_process_set or bool(process_set.included())


def group_ranks(hvd: Any, process_set: Any) -> tuple[int, ...]:
    """Return the global ranks of a process set; empty for the global set, or for None."""
    if process_set is None or process_set is hvd.global_process_set:
        return ()
    return tuple(process_set.ranks or ())


def ranks_of_process_set_id(hvd: Any, number: int) -> tuple[int, ...]:
    """Return the ranks of the process set with an id, ascending; empty for the global set, 0."""
    if not number:
        return ()
    with contextlib.suppress(RuntimeError, ValueError):  # it is being changed
        ranks: dict[int, list[int]] = hvd.mpi_ops._basics._get_process_set_ids_and_ranks()
        return tuple(sorted(ranks.get(number, ())))
    return ()


def communicator_for(hvd: Any, of: Callable[[Any], Communicator], process_set: Any = None) -> Communicator:
    """Return the communicator of a process set; :class:`OneProcess` before Horovod is initialised.

    Args:
        hvd: a Horovod module, or its one-process stand-in.
        of: the adapter's ``communicator_of``.
        process_set: None for all ranks.

    Raises:
        ConfigError: this process is not in the process set.
    """
    if not hvd.is_initialized():
        return OneProcess()
    group = process_set or hvd.global_process_set
    if not included(hvd, group):
        raise ConfigError(f"process_set={process_set!r} does not have this process (rank {hvd.rank()})")
    return of(group)


class _Rendezvous:
    """Where simulated ranks meet: a barrier and a table of each rank's value."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.brought: list[tuple[str, Any] | None] = [None] * size

    def exchange(self, rank: int, what: str, value: Any) -> list[Any]:
        """Deposit `value`, wait for all ranks, and return all values, in rank order."""
        self.brought[rank] = (what, value)
        self.barrier.wait()
        calls = [one for one in self.brought if one is not None]
        self.barrier.wait()  # no rank overwrites before all have read
        if len({call for call, _ in calls}) > 1:
            raise HvdlossError(f"ranks called different collectives: {[call for call, _ in calls]}")
        return [value for _, value in calls]


class SimulatedRank:
    """One of several ranks that run as threads of this process (see :func:`simulate`)."""

    def __init__(self, room: _Rendezvous, rank: int) -> None:
        self._room = room
        self.rank = rank
        self.size = room.size

    def all_reduce(self, array: Array, name: str) -> Array:
        """Return the sum over ranks, added in rank order, so bitwise equal on all."""
        parts = self._room.exchange(self.rank, f"sum {name}", np.array(array, dtype=np.float64))
        return np.asarray(functools.reduce(np.add, parts))

    def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        """Return every rank's bytes."""
        return self._room.exchange(self.rank, f"gather {name}", bytes(data))


def simulate(size: int, work: Callable[[SimulatedRank], Result]) -> list[Result]:
    """Run ``work(communicator)`` on `size` simulated ranks, concurrently, and return their results.

    Real threads that really wait for each other; for tests and simulations.
    If a rank raises, the others are released and that rank's exception is raised here.

    >>> simulate(3, lambda c: c.all_reduce(np.array([c.rank + 1.0]), "n")[0].item())
    [6.0, 6.0, 6.0]

    Raises:
        ConfigError: `size` below 1.
    """
    if size < 1:
        raise ConfigError(f"size={size!r} must be at least 1")
    room = _Rendezvous(size)
    results: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(SimulatedRank(room, rank))
            room.exchange(rank, "end", None)  # a rank that leaves early is an error, not a deadlock
        except BaseException as error:  # raised in the caller below
            errors.append((rank, error))
            room.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        # A rank released from a broken barrier only shows that another one failed.
        causes = [e for e in errors if not isinstance(e[1], threading.BrokenBarrierError)]
        rank, error = min(causes or errors, key=lambda one: one[0])
        if hasattr(error, "add_note"):
            error.add_note(f"raised on simulated rank {rank} of {size}")
        raise error
    return results
