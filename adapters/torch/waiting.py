"""Waiting for other ranks: not for one that will not come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hvdloss import watch
from hvdloss.communicator import ranks_of
from hvdloss.torch._backend import hvd

__all__ = ["explaining", "wait"]

_FIRST_LOOK, _LAST_LOOK = 5e-5, 1e-3  # seconds


@contextmanager
def explaining() -> Iterator[None]:
    """Raise, for what Horovod says of a collective that failed, what the ranks know to be wrong.

    Raises:
        RankError, LostRankError, StallError: ranks cannot go on together (:mod:`hvdloss.watch`).
    """
    watch.check()
    try:
        yield
    except hvd.HorovodInternalError as error:
        raise watch.explained(error) from error


def wait(handle: int, name: str = "", process_set: Any = None) -> Any:
    """Return the result of an asynchronous call of Horovod.

    Looks soon at first, where Horovod looks once a millisecond; then less and less often, since ranks
    that share cores need them more than this one.

    Args:
        handle: of the call.
        name: of the exchange, for the watch; empty if what it belongs to is named already.
        process_set: whose exchange it is; None for all ranks'.

    Raises:
        RankError, LostRankError, StallError: ranks cannot go on together (:mod:`hvdloss.watch`).
    """
    if name:
        with watch.waiting(name, ranks_of(hvd, process_set)):
            return wait(handle)
    delay = _FIRST_LOOK
    while not hvd.poll(handle):
        watch.check()
        time.sleep(delay)
        delay = min(2 * delay, _LAST_LOOK)
    with explaining():
        return hvd.synchronize(handle)
