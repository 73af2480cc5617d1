"""What this process is doing, as far as hvdloss knows. Cheap to note: it is looked at only now and then."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hvdloss.watch.verdict import STACK, RankState, Wait

__all__ = ["Activity", "stack_of_main"]

Noted = tuple[str, int | None, tuple[int, ...], int, float]  # as a Wait, with when it began


class Activity:
    """The waits, steps and last deed of this process.

    Written by the thread that trains, read by the one that watches; every field is replaced whole.
    """

    def __init__(self) -> None:
        self._serial = 0
        self._waits: tuple[Noted, ...] = ()
        self._steps: dict[str, int] = {}
        self._graphs: dict[str, tuple[weakref.ref[Any], tuple[int, ...], int, int]] = {}
        self._seen: dict[str, tuple[int, int, float]] = {}  # in a graph: begun, serial, when first seen
        self._did: tuple[str, float] = ("", time.monotonic())

    def begin(self) -> None:
        """Count steps from here: ranks have come or gone, and count alike from now on."""
        self._steps, self._seen = {}, {}
        for name, (of, members, _, _) in list(self._graphs.items()):
            begun, ended = self._progress(of)
            self._graphs[name] = of, members, begun, begun - ended

    @contextmanager
    def waiting(self, what: str, members: tuple[int, ...] = ()) -> Iterator[None]:
        """Say that this process waits for others in `what` until the block ends.

        Args:
            what: names the exchange, on all of its ranks alike.
            members: the ranks of it; empty for all.
        """
        with self._wait(what, None, members):
            yield

    @contextmanager
    def waiting_in_step(self, name: str, members: tuple[int, ...] = ()) -> Iterator[None]:
        """Say that this process waits for others in the present step of the optimizer `name`."""
        with self._wait(name, self._steps.get(name, 0) + 1, members):
            yield

    @contextmanager
    def _wait(self, what: str, step: int | None, members: tuple[int, ...]) -> Iterator[None]:
        before = self._waits
        self._serial += 1
        self._waits = (*before, (what, step, members, self._serial, time.monotonic()))
        try:
            yield
        finally:
            self._waits = before

    def stepped(self, name: str) -> None:
        """Say that a step of an optimizer is finished."""
        self._steps = {**self._steps, name: self._steps.get(name, 0) + 1}
        self._did = ("finished a step", time.monotonic())

    def follow(self, name: str, exchange: Any, members: tuple[int, ...] = ()) -> None:
        """Have ``exchange.progress()`` tell how many steps have begun to wait, and how many are over.

        For steps that run in a graph. It is called in another thread, and forgotten with its owner.
        """
        self._graphs = {**self._graphs, name: (weakref.ref(exchange), members, 0, 0)}

    def did(self, what: str) -> None:
        """Say what was just done: "begun epoch 3", "read a batch"."""
        self._did = (what, time.monotonic())

    @staticmethod
    def _progress(of: weakref.ref[Any]) -> tuple[int, int]:
        exchange = of()
        if exchange is None:
            return 0, 0
        try:
            begun, ended = exchange.progress()
        except Exception:  # not readable at the moment
            return 0, 0
        return int(begun), int(ended)

    def _in_graphs(self, steps: dict[str, int], now: float) -> Noted | None:
        """Add the steps of graphs; return what is waited for in one."""
        found = None
        for name, (of, members, before, never) in list(self._graphs.items()):
            begun, ended = self._progress(of)
            count = max(begun - before, 0)
            waits = begun - ended > never  # what failed when ranks came or went never ends
            if count:
                steps[name] = count - waits
            if not waits:
                continue
            if self._seen.get(name, (0, 0, 0.0))[0] != begun:
                self._serial += 1
                self._seen[name] = begun, self._serial, now
            _, serial, since = self._seen[name]
            found = name, count, members, serial, since
        return found

    def state(self, rank: int) -> RankState:
        """Return it as a rank's state."""
        now = time.monotonic()
        steps = dict(self._steps)
        noted = self._in_graphs(steps, now)
        if self._waits:
            noted = self._waits[-1]
        wait = None
        if noted is not None:
            what, step, members, serial, began = noted
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
