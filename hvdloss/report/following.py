"""Following a run: who is told of every finished step, on one rank, and when they are told no more.

An optimizer or objective has listeners, empty until somebody follows; a step asks whether there are any, and
that is all it costs. Nothing that a sink does can end training, which would leave the other ranks alone: what
it raises is a warning, and it is told no more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from hvdloss.controller import Controller
from hvdloss.errors import ConfigError
from hvdloss.report.steps import StepReport
from hvdloss.term import Decision
from hvdloss.world import register_for_reset, reset_cause

__all__ = ["Following", "Sink", "Source", "check_sink", "check_teller"]


@runtime_checkable
class Sink(Protocol):
    """Takes in what a run tells of itself: a tracker, a recorder, a class of your own.

    Only these two methods are needed. A sink that has them is also told, on the same rank:

    - ``begin(about)``: once, before the first step: a dict of plain values (see
      :func:`hvdloss.report.record.about_run`): framework, ranks, objective, terms, environment.
    - ``decision(decision)``: every :class:`hvdloss.term.Decision` of the terms' policies.
    - ``before_reset()``: the ranks are about to change (an elastic job): release what only the reporting rank
      may hold, such as a file. The only call made on all ranks.
    - ``ranks(number)``: the number of ranks from here on; this one still reports.
    - ``lost(error)``: after that, or after ``begin`` on a rank that tells now in place of another: why ranks
      were lost. Steps since the last commit are undone: what is told next has their numbers again.
    - ``epoch(number, metrics)``: an epoch of Keras's ``fit`` is over, counted from 1, with its logs; in loops
      of your own call it yourself.
    - ``fault(error)``: training under the sink's ``with``, or ``fit``, ended with this exception.

    All are called by the thread that trains, between two steps: hand over what takes long.
    """

    def step(self, report: StepReport) -> None:
        """Take in a finished step."""

    def close(self) -> None:
        """Write out what is left; called once, when following ends. Must not raise if called again."""


class Source(Protocol):
    """What can be followed: what an adapter keeps of an optimizer or an objective."""

    listeners: list[Callable[[StepReport], None]]

    def listen(self, listener: Callable[[StepReport], None]) -> None:
        """Have `listener` called with the report of every step that begins from now on."""

    def unlisten(self, listener: Callable[[StepReport], None]) -> None:
        """Call `listener` no more."""


def check_sink(sink: Any) -> Any:
    """Return a sink that can be used.

    Raises:
        ConfigError: it lacks a method.
    """
    if isinstance(sink, type) or not isinstance(sink, Sink):
        raise ConfigError(
            f"sink={sink!r} must be an object with step(report) and close(), like hvd.Recorder(path); see "
            f"hvdloss.report.Sink"
        )
    return sink


def check_teller(rank: Any) -> None:
    """Check the number of the rank that is to tell.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise ConfigError(f"rank={rank!r} must be the number of a rank")


class Following:
    """Sinks that follow a run, until :meth:`close`; on ranks that are not to tell it does nothing.

    Args:
        source: of the steps.
        controller: of their objective, whose decisions are told as well; None for none.
        sinks: what is told.
        about: gives what ``begin`` is told.
        tells: whether it is this rank that tells; asked again when an elastic job's ranks change.
        size: gives the number of ranks.
        closes: whether to close the sinks with it.

    Raises:
        ConfigError: a sink that lacks a method.

    Collectives: none.
    """

    def __init__(
        self,
        source: Source,
        controller: Controller | None,
        sinks: tuple[Any, ...],
        *,
        about: Callable[[], Mapping[str, Any]],
        tells: Callable[[], bool],
        size: Callable[[], int] = lambda: 1,
        closes: bool = True,
    ) -> None:
        self.sinks = [check_sink(sink) for sink in sinks]
        self._all = tuple(self.sinks)
        self._source, self._controller = source, controller
        self._about, self._tells, self._size = about, tells, size
        self._closes = closes
        self._open, self._listening, self._begun = True, False, False
        self._attach()
        # Lives as long as what it follows, also where it only waits to be the one that tells.
        vars(source).setdefault("followers", []).append(self)
        register_for_reset(self)

    def _attach(self) -> None:
        if not self._open or self._listening or not self._tells():
            return
        self._source.listen(self._step)  # raises what is wrong before anything is told
        self._listening = True
        if self._controller is not None:
            self._controller.on_decision.append(self._decision)
        if not self._begun:
            self._begun = True
            self._tell("begin", lambda: (self._about(),))

    def _detach(self) -> None:
        if not self._listening:
            return
        self._listening = False
        self._source.unlisten(self._step)
        if self._controller is not None and self._decision in self._controller.on_decision:
            self._controller.on_decision.remove(self._decision)

    def before_reset(self) -> None:
        """Have sinks let go of what only one rank may hold: it may be another one's when the ranks change."""
        if self._open:
            self._tell("before_reset", tuple)

    def reset(self) -> None:
        """Follow on the rank that tells now."""
        if not self._open:
            return
        if not self._tells():
            self._detach()
            return
        if self._begun:
            size = self._size()
            self._tell("ranks", lambda: (size,))
        try:
            self._attach()
        except Exception as error:  # must not end the training of the others
            warnings.warn(f"hvdloss: steps are not followed any more: {error}", RuntimeWarning, stacklevel=2)
            return
        if (lost := reset_cause()) is not None:
            self._tell("lost", lambda: (lost,))

    def of(self, source: Source) -> bool:
        """Return whether it follows this source."""
        return self._open and self._source is source

    # -- telling ----------------------------------------------------------------------------------

    def _tell(self, method: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
        for sink in list(self.sinks):
            try:
                call = getattr(sink, method, None)
                if call is not None:
                    call(*arguments())
            except Exception as error:
                self.sinks.remove(sink)
                warnings.warn(
                    f"hvdloss: {type(sink).__name__}.{method}() raised {type(error).__name__}: {error}; it "
                    f"is told no more, and training goes on",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _step(self, report: StepReport) -> None:
        self._tell("step", lambda: (report,))

    def _decision(self, decision: Decision) -> None:
        self._tell("decision", lambda: (decision,))

    def epoch(self, number: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Tell sinks that want to know of the end of an epoch, counted from 1."""
        if self._listening:
            self._tell("epoch", lambda: (number, dict(metrics or {})))

    def fault(self, error: BaseException) -> None:
        """Tell sinks that want to know that training ended with this."""
        if self._listening:
            self._tell("fault", lambda: (error,))

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Follow no more, and close the sinks; calling it again does nothing."""
        if not self._open:
            return
        self._open = False
        self._detach()
        vars(self._source)["followers"].remove(self)
        if self._closes:
            self.sinks = list(self._all) if self._begun else []  # those that failed have files to close, too
            self._tell("close", tuple)

    def __enter__(self) -> Following:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.fault(error)
        self.close()
