"""Blocking on other ranks, in a way that the watch sees and can interrupt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hvdloss import watch

__all__ = ["block_until", "raise_root_cause"]

_FIRST_LOOK, _LAST_LOOK = 5e-5, 1e-3  # seconds


@contextmanager
def raise_root_cause(gone: type[Exception]) -> Iterator[None]:
    """Replace the engine's error of a failed collective by its root cause, if the ranks know it.

    Args:
        gone: the engine's exception if another rank is gone.

    Raises:
        RankError, LostRankError, StallError: ranks cannot go on together (:mod:`hvdloss.watch`).
    """
    watch.check()
    try:
        yield
    except gone as error:
        cause = watch.root_cause(error)
        if cause is error:
            raise
        raise cause from error


@watch.blocking
def block_until(done: Callable[[], bool]) -> None:
    """Return once ``done()`` is true.

    Polls often at first, then less often, since ranks that share its cores need them more than this one.
    """
    delay = _FIRST_LOOK
    while not done():
        watch.check()
        time.sleep(delay)
        delay = min(2 * delay, _LAST_LOOK)
