"""Blocking until other ranks have done their part, so that the watch sees it and can end it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hvdloss import watch

__all__ = ["explaining", "until"]

_FIRST_LOOK, _LAST_LOOK = 5e-5, 1e-3  # seconds


@contextmanager
def explaining(gone: type[Exception]) -> Iterator[None]:
    """Raise, for what an engine says of a collective that failed, what the ranks know to be wrong.

    Args:
        gone: what the engine raises where another rank is gone.

    Raises:
        RankError, LostRankError, StallError: ranks cannot go on together (:mod:`hvdloss.watch`).
    """
    watch.check()
    try:
        yield
    except gone as error:
        why = watch.root_cause(error)
        if why is error:
            raise
        raise why from error


@watch.blocking
def until(done: Callable[[], bool]) -> None:
    """Return once ``done()`` is true.

    Looks soon at first, then less and less often, since ranks that share cores need them more than this one.
    """
    delay = _FIRST_LOOK
    while not done():
        watch.check()
        time.sleep(delay)
        delay = min(2 * delay, _LAST_LOOK)
