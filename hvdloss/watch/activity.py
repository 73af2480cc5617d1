"""What this process is doing, as far as hvdloss knows. Cheap to note: it is looked at only now and then."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from hvdloss.watch.verdict import STACK, RankState, Wait

__all__ = ["Activity", "stack_of_main"]


class Activity:
    """The waits, steps and last deed of this process.

    Written by the thread that trains, read by the one that watches; every field is replaced whole.
    """

    def __init__(self) -> None:
        self._waits: tuple[tuple[str, int | None, tuple[int, ...], int, float], ...] = ()
        self._serial = 0
        self._steps: dict[str, int] = {}
        self._counters: dict[str, Callable[[], int]] = {}
        self._did: tuple[str, float] = ("", time.monotonic())

    @contextmanager
    def waiting(self, what: str, step: int | None = None, members: tuple[int, ...] = ()) -> Iterator[None]:
        """Say that this process waits for others in `what` (of a step) until the block ends."""
        before = self._waits
        self._serial += 1
        self._waits = (*before, (what, step, members, self._serial, time.monotonic()))
        try:
            yield
        finally:
            self._waits = before

    def stepped(self, name: str, count: int) -> None:
        """Say that so many steps of an optimizer are finished."""
        self._steps[name] = count
        self._did = ("finished a step", time.monotonic())

    def count_by(self, name: str, counter: Callable[[], int]) -> None:
        """Have `counter` tell how many steps of an optimizer are finished, where steps run in a graph."""
        self._counters[name] = counter

    def did(self, what: str) -> None:
        """Say what was just done: "begun epoch 3", "read a batch"."""
        self._did = (what, time.monotonic())

    def state(self, rank: int) -> RankState:
        """Return it as a rank's state."""
        now = time.monotonic()
        steps = dict(self._steps)
        for name, counter in list(self._counters.items()):
            try:
                steps[name] = int(counter())
            except Exception:  # not readable at the moment; the last known count stays
                continue
        self._steps.update(steps)
        wait = None
        if self._waits:
            what, step, members, serial, began = self._waits[-1]
            wait = Wait(what, step, members, serial, now - began)
        what, when = self._did
        return RankState(rank, steps=steps, wait=wait, did=what, ago=now - when, stack=stack_of_main())


def stack_of_main() -> tuple[str, ...]:
    """Return the innermost frames of the main thread, outermost first: "train.py:31 in main"."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    found: list[str] = []
    while frame is not None and len(found) < STACK:
        code = frame.f_code
        folder, name = os.path.split(code.co_filename)
        found.append(f"{os.path.basename(folder)}/{name}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back
    return tuple(reversed(found))
