"""What this process is doing, as far as hvdloss knows. Cheap to note: it is looked at only now and then."""

from __future__ import annotations

import gc
import operator
import os
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate, chain, repeat, starmap
from typing import Any

from hvdloss.watch.verdict import FINISHED, STACK, RankState, Wait, key_of

__all__ = ["Activity", "stack_of_main"]

Noted = tuple[str, int | None, tuple[int, ...], int, float, int]  # as a Wait, with when it began
_PLACE = operator.attrgetter("f_code.co_filename", "f_lineno", "f_code.co_name")  # of a frame
_looking = threading.Lock()
_COUNTED = 1024  # names of exchanges that are counted, those that were used last


class _Graph:
    """What tells of the steps of one optimizer that run in graphs.

    Attributes:
        inside: the package whose code the main thread is in while it waits; empty for any.
        before: how many had begun when counting began.
        never: how many of those that have begun will not end, since they failed.
        begun: as last seen in a wait.
        at: where the main thread was then.
        serial: of that wait.
        since: when it was first seen.
    """

    def __init__(self, exchange: Any, inside: str) -> None:
        self._of, self.inside = weakref.ref(exchange), inside
        self.before = self.never = 0
        self.begun, self.serial, self.since = 0, 0, 0.0
        self.at: tuple[int, int] | None = None

    def progress(self) -> tuple[int, int]:
        """Return how many steps have begun to wait, and how many are over."""
        exchange = self._of()
        if exchange is None:
            return 0, 0
        try:
            begun, ended = exchange.progress()
        except Exception:  # not readable at the moment
            return 0, 0
        return int(begun), int(ended)

    def begin(self) -> None:
        """Count from here; what is not over will never be."""
        begun, ended = self.progress()
        self.before, self.never, self.begun = begun, begun - ended, 0


class Activity:
    """The waits, steps and last deed of this process.

    Written by the thread that trains, read by the one that watches; every field is replaced whole.
    """

    def __init__(self) -> None:
        self._serial = 0
        self._waits: tuple[Noted, ...] = ()
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._finished: dict[str, int] = {}
        self._steps: dict[str, int] = {}
        self._graphs: dict[tuple[str, tuple[int, ...]], _Graph] = {}
        self._did: tuple[str, float] = ("", time.monotonic())

    def begin(self) -> None:
        """Count steps from here: ranks have come or gone, and count alike from now on."""
        self._steps, self._finished = {}, {}
        self._counts.clear()
        for graph in list(self._graphs.values()):
            graph.begin()

    @contextmanager
    def waiting(self, what: str, members: tuple[int, ...] = ()) -> Iterator[None]:
        """Say that this process waits for others in `what` until the block ends.

        Args:
            what: names the exchange, on all of its ranks alike.
            members: the ranks of it; empty for all.
        """
        key = key_of(what, members)
        count = self._counts[key] = self._counts.pop(key, 0) + 1
        if len(self._counts) > _COUNTED:
            self._counts.popitem(last=False)
        with self._wait(what, None, members, count):
            yield
        # Put last: those that were over last are told.
        kept = [(k, n) for k, n in self._finished.items() if k != key][1 - FINISHED :]
        self._finished = dict([*kept, (key, count)])

    @contextmanager
    def waiting_in_step(self, name: str, members: tuple[int, ...] = ()) -> Iterator[None]:
        """Say that this process waits for others in the present step of the optimizer `name`."""
        with self._wait(name, self._steps.get(name, 0) + 1, members):
            yield

    @contextmanager
    def _wait(self, what: str, step: int | None, members: tuple[int, ...], count: int = 0) -> Iterator[None]:
        before = self._waits
        self._serial += 1
        self._waits = (*before, (what, step, members, self._serial, time.monotonic(), count))
        try:
            yield
        finally:
            self._waits = before

    def stepped(self, name: str) -> None:
        """Say that a step of an optimizer is finished."""
        self._steps = {**self._steps, name: self._steps.get(name, 0) + 1}
        self._did = ("finished a step", time.monotonic())

    def follow(self, name: str, exchange: Any, members: tuple[int, ...] = (), *, inside: str = "") -> None:
        """Have ``exchange.progress()`` tell how many steps have begun to wait, and how many are over.

        For steps that run in a graph. It is called in another thread, and forgotten with its owner. Of
        several exchanges of one name and the same ranks, the last one made is followed.

        Args:
            name: of the optimizer, on all of its ranks alike.
            exchange: what knows.
            members: the ranks of it; empty for all.
            inside: the package whose code the main thread is in while it waits; empty for any.
        """
        self._graphs = {**self._graphs, (name, members): _Graph(exchange, inside)}

    def did(self, what: str) -> None:
        """Say what was just done: "begun epoch 3", "read a batch"."""
        self._did = (what, time.monotonic())

    def _in_graphs(self, steps: dict[str, int], now: float) -> Noted | None:
        """Add the steps of graphs; return what is waited for in one."""
        found = None
        for (name, members), graph in list(self._graphs.items()):
            begun, ended = graph.progress()
            count = max(begun - graph.before, 0)
            waits = begun - ended > graph.never
            if waits and not self._blocked(graph, begun, now):
                # The graph has failed, and is no longer run: this step never ends.
                waits, graph.never = False, begun - ended
            if count:
                steps[name] = max(steps.get(name, 0), count - waits)
            if waits:
                found = name, count, members, graph.serial, graph.since, 0
        return found

    def _blocked(self, graph: _Graph, begun: int, now: float) -> bool:
        """Return whether the main thread still is where it was when this step was first seen to wait."""
        at, package = _place_of_main()
        if graph.inside and package != graph.inside:
            return False  # it is not in the graph
        if graph.begun != begun:
            self._serial += 1
            graph.begun, graph.serial, graph.since, graph.at = begun, self._serial, now, at
        return not graph.inside or graph.at == at

    def state(self, rank: int) -> RankState:
        """Return it as a rank's state."""
        now = time.monotonic()
        steps = dict(self._steps)
        noted = self._in_graphs(steps, now)
        if waits := self._waits:
            noted = waits[-1]
        wait = None
        if noted is not None:
            what, step, members, serial, began, count = noted
            wait = Wait(what, step, members, serial, now - began, count)
        what, when = self._did
        return RankState(
            rank,
            steps=steps,
            wait=wait,
            did=what,
            ago=now - when,
            stack=stack_of_main(),
            finished=self._finished,
        )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Collect no garbage in the block, in which frames of other threads are asked for.

    Python holds a lock of its own as it looks for them. What is collected meanwhile may let another thread
    run (a socket that is closed), and if that one wants the same lock, all of Python stands still: CPython's
    issue 106883, mended in the last releases of 3.11.
    """
    with _looking:  # lest another one that looks switches it on again in the middle
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def _place_of_main() -> tuple[tuple[int, int] | None, str]:
    """Return where exactly the main thread is, and in which package."""
    with _undisturbed():
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return None, ""
    package = str(frame.f_globals.get("__name__") or "").partition(".")[0]
    return (id(frame), frame.f_lasti), package


def stack_of_main() -> tuple[str, ...]:
    """Return the innermost frames of the main thread, outermost first: "train.py:31 in main"."""
    # One call, of C functions only, so that the main thread cannot go on meanwhile: f_back of a frame that is
    # left, or yields, may be whatever lies there by then (seen on Python 3.11: a dict).
    main = map(operator.itemgetter(threading.main_thread().ident or 0), starmap(sys._current_frames, [()]))
    frames = accumulate(chain(main, repeat("f_back", STACK - 1)), getattr)
    found: list[tuple[str, int, str]] = []
    with (
        _undisturbed(),
        suppress(AttributeError, KeyError),
    ):  # None is beyond the outermost; what came before it stays
        found.extend(map(_PLACE, frames))
    return tuple(
        f"{os.path.basename(os.path.dirname(file))}/{os.path.basename(file)}:{line} in {name}"
        for file, line, name in reversed(found)
    )
