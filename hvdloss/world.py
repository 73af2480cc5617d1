"""The ranks there are, which in an elastic job change while it runs: who wants to know, and how many times.

What is made once and used in many steps (plans, traced functions, names of messages) is good for the ranks
that there were when it was made. Ranks that stay must forget it when the others change, or they would talk
past those that have just come and made theirs.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = [
    "Renewed",
    "following",
    "launched_as",
    "next_number",
    "number",
    "numbers_again",
    "numbers_from",
    "release",
    "renew",
    "why",
]

_RANKS = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "RANK")


class Renewed(Protocol):
    """What is told of other ranks."""

    def renew(self) -> None:
        """Forget what was of the ranks there were; no collective, as not all may be here yet."""


# In the order of their making: what rests on another one is told after it.
_following: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
_number = 0
_why: BaseException | None = None
_counts: dict[Any, int] = {}
_first = 0


def launched_as() -> str | None:
    """Return the rank that a launcher started this process as; None if none did."""
    return next((os.environ[name] for name in _RANKS if name in os.environ), None)


def number() -> int:
    """Return how many times the ranks have changed."""
    return _number


def why() -> BaseException | None:
    """Return, while :func:`renew` tells it, the error of those that are left; None if all had agreed."""
    return _why


def following(one: Renewed) -> None:
    """Have `one` told when the ranks have changed, as long as it lives, after those that follow already.

    One with a method ``release()`` is told before as well: see :func:`release`.
    """
    _following[one] = None


def release() -> None:
    """Tell all that follow: the ranks will be others.

    What only one rank may hold, such as a file that it writes, is let go of now: when the others are here
    it may be another rank's. No collective, as some may be gone.
    """
    for one in list(_following):
        if hasattr(one, "release"):
            one.release()


def renew(*first: Callable[[], None], because: BaseException | None = None) -> None:
    """Tell all that follow: the ranks are others now, `because` of an error if it was one."""
    global _number, _why
    _number += 1
    _why = because
    for call in first:
        call()
    try:
        for one in list(_following):
            one.renew()
    finally:
        _why = None  # or its traceback would keep what training held


def next_number(kind: Any) -> int:
    """Return 0, 1, 2, ...: things of a kind are told apart on the wire by the order of their making."""
    count = _counts.get(kind, _first)
    _counts[kind] = count + 1
    return count


def numbers_from(first: int) -> None:
    """Have all numbers begin here, on every rank: for who wants names that nobody had before."""
    global _first
    _first = first
    _counts.clear()


@contextmanager
def numbers_again() -> Iterator[Callable[[], None]]:
    """Give a function that has numbers begin again where they are now.

    What is made anew for other ranks has then the numbers it has on ranks that have just come.
    """
    before = dict(_counts)

    def again() -> None:
        _counts.clear()
        _counts.update(before)

    yield again
