"""What this process is doing, as far as hvdloss knows. Cheap to record: it is read only now and then."""

from __future__ import annotations

import gc
import operator
import os
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate, chain, repeat, starmap
from typing import Any, TypeVar

from hvdloss.watch.verdict import REACHED, STACK, RankState, Wait, key_of

__all__ = ["Activity", "blocking", "called_by_blocking", "stack_of_main"]

Noted = tuple[str, int | None, tuple[int, ...], int, float, int]  # as a Wait, with when it began
_PLACE = operator.attrgetter("f_code.co_filename", "f_lineno", "f_code.co_name")  # of a frame
_looking = threading.Lock()
_COUNTED = 1024  # names of exchanges that are counted, those that were used last


class _Graph:
    """Progress of one optimizer's steps that run in graphs.

    Attributes:
        inside: the package whose code the main thread is in while it waits; empty for any.
        steps: whether these are steps of an optimizer, and not exchanges by themselves.
        before: number begun when counting began.
        never: number of those begun that will not end, since they failed.
        begun: as last seen in a wait.
        at: where the main thread was then.
        serial: of that wait.
        since: when it was first seen.
    """

    def __init__(self, exchange: Any, inside: str, steps: bool) -> None:
        self._of, self.inside, self.steps = weakref.ref(exchange), inside, steps
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
    """The waits, steps and last activity of this process.

    Written by the training thread, read by the watching one; every field is replaced as a whole.
    """

    def __init__(self) -> None:
        self._serial = 0
        self._waits: tuple[Noted, ...] = ()
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._steps: dict[str, int] = {}
        self._graphs: dict[tuple[str, tuple[int, ...]], _Graph] = {}
        self._did: tuple[str, float] = ("", time.monotonic())

    def begin(self) -> None:
        """Count steps from here: the ranks have changed, and start counting together."""
        self._steps = {}
        self._counts.clear()
        for graph in list(self._graphs.values()):
            graph.begin()

    @contextmanager
    def waiting(self, what: str, members: tuple[int, ...] = ()) -> Iterator[None]:
        """Name the exchange that a :func:`blocking` function waits in until the block ends.

        Anything else in the block (a callback, a finalizer, reading tensors) does not count as waiting.

        Args:
            what: name of the exchange, the same on all of its ranks.
            members: its ranks; empty for all.
        """
        members = tuple(sorted(members))
        with self._wait(what, None, members, self.enter_exchange(what, members)):
            yield

    def enter_exchange(self, what: str, members: tuple[int, ...] = ()) -> int:
        """Record that this rank has entered an exchange; return its ordinal among exchanges with this name.

        Args:
            what: name of the exchange, the same on all of its ranks.
            members: its ranks, in ascending order; empty for all.
        """
        key = key_of(what, members)
        count = self._counts[key] = self._counts.pop(key, 0) + 1
        if len(self._counts) > _COUNTED:
            self._counts.popitem(last=False)
        return count

    @contextmanager
    def waiting_for(self, what: str, members: tuple[int, ...], count: int) -> Iterator[None]:
        """Wait in the exchange given to :meth:`enter_exchange`, unless another one is named already."""
        if self._waits:
            yield
            return
        with self._wait(what, None, members, count):
            yield

    @contextmanager
    def waiting_in_step(self, name: str, members: tuple[int, ...] = ()) -> Iterator[None]:
        """Name the present step of the optimizer `name` as what is waited in; see :meth:`waiting`."""
        with self._wait(name, self._steps.get(name, 0) + 1, tuple(sorted(members))):
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

    def on_step(self, name: str) -> None:
        """Record that a step of an optimizer is finished."""
        self._steps = {**self._steps, name: self._steps.get(name, 0) + 1}
        self._did = ("finished a step", time.monotonic())

    def track(
        self, name: str, exchange: Any, members: tuple[int, ...] = (), *, inside: str = "", steps: bool = True
    ) -> None:
        """Track an exchange in a graph by ``exchange.progress()``: the numbers of waits begun and ended.

        It is called in another thread, and dropped with its owner. Of several exchanges with one name and the
        same ranks, the latest is tracked.

        Args:
            name: of the optimizer, the same on all of its ranks.
            exchange: has ``progress()``.
            members: its ranks; empty for all.
            inside: the package whose code the main thread is in while it waits; empty for any.
            steps: whether these are optimizer steps, and not single exchanges.
        """
        self._graphs = {**self._graphs, (name, tuple(sorted(members))): _Graph(exchange, inside, steps)}

    def record_activity(self, what: str) -> None:
        """Record what was just done: "begun epoch 3", "read a batch"."""
        self._did = (what, time.monotonic())

    def _in_graphs(self, steps: dict[str, int], counts: dict[str, int], now: float) -> Noted | None:
        """Add the steps of graphs, and the counts of their exchanges; return what is waited for in one."""
        found: Noted | None = None
        for (name, members), graph in list(self._graphs.items()):
            begun, ended = graph.progress()
            count = max(begun - graph.before, 0)
            waits = begun - ended > graph.never
            if waits and not self._stays(graph, begun, now):
                # The graph has failed, and is no longer run: this step never ends.
                waits, graph.never = False, begun - ended
            if count and graph.steps:
                steps[name] = max(steps.get(name, 0), count - waits)
            elif count:
                counts[key_of(name, members)] = count
            if waits and graph.steps:
                found = name, count, members, graph.serial, graph.since, 0
            elif waits:
                found = name, None, members, graph.serial, graph.since, count
        return found

    def _stays(self, graph: _Graph, begun: int, now: float) -> bool:
        """Return whether the main thread still is where it was when this step was first seen to wait."""
        at, package = _place_of_main()
        if graph.inside and package != graph.inside:
            return False  # it is not in the graph
        if graph.begun != begun:
            self._serial += 1
            graph.begun, graph.serial, graph.since, graph.at = begun, self._serial, now, at
        return not graph.inside or graph.at == at

    def wait(self) -> Wait | None:
        """Return what the main thread is blocked in at this moment; None if it is not. Cheap."""
        now = time.monotonic()
        return self._waits_in(self._in_graphs({}, {}, now) if self._graphs else None, now)

    def _waits_in(self, in_graph: Noted | None, now: float) -> Wait | None:
        noted = in_graph
        if waits := self._waits:
            noted = waits[-1] if _blocked() else None
        if noted is None:
            return None
        what, step, members, serial, began, count = noted
        return Wait(what, step, members, serial, now - began, count)

    def state(self, rank: int, *, stack: bool = True, keys: Iterable[str] | None = None) -> RankState:
        """Return it as a rank's state.

        Args:
            rank: of this process.
            stack: whether to add the main thread's stack.
            keys: the exchanges that are asked about; None for those that were begun last.
        """
        now = time.monotonic()
        steps, counts = dict(self._steps), self._counted()
        wait = self._waits_in(self._in_graphs(steps, counts, now), now)
        if keys is None:
            reached = dict([*counts.items()][-REACHED:])
        else:
            reached = {key: counts[key] for key in keys if key in counts}
        what, when = self._did
        return RankState(
            rank,
            steps=steps,
            wait=wait,
            last_activity=what,
            ago=now - when,
            stack=stack_of_main() if stack else (),
            reached=reached,
        )

    def _counted(self) -> dict[str, int]:
        try:
            return self._counts.copy()
        except RuntimeError:  # the main thread has just begun another one: it is not blocked
            return {}


_Function = TypeVar("_Function", bound=Callable[..., Any])
_blocking: set[Any] = set()  # code of functions that only block
# Packages whose functions are called by blocking ones; anything else on the stack (a finalizer) is no wait.
_called_by_blocking = {"horovod", "tensorflow", "contextlib"}


def blocking(function: _Function) -> _Function:
    """Mark a function that only waits for other ranks, after this rank has contributed its part.

    A rank counts as waiting only while its main thread is in such a function, with nothing else on top.
    """
    _blocking.add(function.__code__)
    return function


def called_by_blocking(package: str) -> None:
    """Mark a package whose functions are called by blocking ones, and only wait."""
    _called_by_blocking.add(package)


def _blocked() -> bool:
    """Return whether the main thread is in a function of :func:`blocking`, and in nothing on top of it."""
    for code, module in _frames_of_main(8):
        if code in _blocking:
            return True
        if not (module.partition(".")[0] in _called_by_blocking or module.startswith("hvdloss.watch")):
            return False
    return False


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


def _of_main(count: int, what: Callable[[Any], Any]) -> list[Any]:
    """Return something of each of the main thread's innermost frames, innermost first."""
    # One call, of C functions only, so that the main thread cannot go on meanwhile: f_back of a frame that is
    # left, or yields, may be whatever lies there by then (seen on Python 3.11: a dict).
    main = map(operator.itemgetter(threading.main_thread().ident or 0), starmap(sys._current_frames, [()]))
    frames = accumulate(chain(main, repeat("f_back", count - 1)), getattr)
    found: list[Any] = []
    with (
        _undisturbed(),
        suppress(AttributeError, KeyError),
    ):  # None is beyond the outermost; what came before it stays
        found.extend(map(what, frames))
    return found


def _frames_of_main(count: int) -> list[tuple[Any, str]]:
    """Return code and module of the main thread's innermost frames, innermost first."""
    found = _of_main(count, operator.attrgetter("f_code", "f_globals"))
    return [(code, str(names.get("__name__") or "")) for code, names in found]


def stack_of_main() -> tuple[str, ...]:
    """Return the innermost frames of the main thread, outermost first: "train.py:31 in main"."""
    found = _of_main(STACK, _PLACE)
    return tuple(
        f"{os.path.basename(os.path.dirname(file))}/{os.path.basename(file)}:{line} in {name}"
        for file, line, name in reversed(found)
    )
