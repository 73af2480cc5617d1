"""The set of ranks, which an elastic job changes while it runs: who is notified, and the names of messages.

Buckets, traced functions and message names are made once and used in many steps, for one set of ranks. Ranks
that stay must drop them when the set changes, or they would not match those of the ranks that join.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = [
    "Resettable",
    "before_reset",
    "generation",
    "launcher_rank",
    "next_name_index",
    "register_for_reset",
    "replay_names",
    "reset",
    "reset_cause",
    "set_name_base",
]

_RANKS = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "RANK")


class Resettable(Protocol):
    """An object with state tied to the set of ranks."""

    def reset(self) -> None:
        """Drop state tied to the old ranks; no collectives, as not all ranks may be here yet."""


# In the order of registration: an object is reset after those it depends on.
_registered: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
_generation = 0
_cause: BaseException | None = None
_name_indices: dict[Any, int] = {}
_name_base = 0


def launcher_rank() -> str | None:
    """Return the rank that a launcher gave this process; None without a launcher."""
    return next((os.environ[name] for name in _RANKS if name in os.environ), None)


def generation() -> int:
    """Return how many times the set of ranks has changed."""
    return _generation


def reset_cause() -> BaseException | None:
    """Return the error that caused the current :func:`reset`; None outside of one, and if there was none."""
    return _cause


def register_for_reset(one: Resettable) -> None:
    """Call ``one.reset()`` when the ranks change, as long as `one` lives, in order of registration.

    Its method ``before_reset()``, if it has one, is called before: see :func:`before_reset`.
    """
    _registered[one] = None


def before_reset() -> None:
    """Notify all registered objects that the ranks are about to change.

    They release what only one rank may hold, such as an open file: afterwards it may be another rank's. No
    collectives, as some ranks may be gone.
    """
    for one in list(_registered):
        if hasattr(one, "before_reset"):
            one.before_reset()


def reset(*first: Callable[[], None], because: BaseException | None = None) -> None:
    """Call `first`, then reset all registered objects; `because` is the error behind it, if any."""
    global _generation, _cause
    _generation += 1
    _cause = because
    for call in first:
        call()
    try:
        for one in list(_registered):
            one.reset()
    finally:
        _cause = None  # its traceback would keep objects of the training alive


def next_name_index(kind: Any) -> int:
    """Return 0, 1, 2, ...: objects of a kind are named in their messages by their order of creation."""
    count = _name_indices.get(kind, _name_base)
    _name_indices[kind] = count + 1
    return count


def set_name_base(first: int) -> None:
    """Let all indices start at `first`, on every rank, to get names that were not used before."""
    global _name_base
    _name_base = first
    _name_indices.clear()


@contextmanager
def replay_names() -> Iterator[Callable[[], None]]:
    """Yield a function that sets the indices back to their current values.

    Objects recreated after a reset then have the same names as on ranks that have just joined.
    """
    before = dict(_name_indices)

    def rewind() -> None:
        _name_indices.clear()
        _name_indices.update(before)

    yield rewind
