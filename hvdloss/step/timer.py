"""How long a rank computes, and how long communication holds it up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["CommTimer"]


class CommTimer:
    """Measures a rank's time between and in exchanges.

    Args:
        clock: seconds, monotonic.

    Attributes:
        comm_s: seconds that the last exchange held this rank up.
        compute_s: seconds between the end of the exchange before and the beginning of the last one.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Begin anew: the time without any ranks is no computation."""
        self.comm_s = self.compute_s = 0.0
        self._ended: float | None = None

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Measure the block as an exchange, unless it raises."""
        began = self._clock()
        compute = 0.0 if self._ended is None else began - self._ended
        yield
        self._ended = self._clock()
        self.comm_s, self.compute_s = self._ended - began, compute
