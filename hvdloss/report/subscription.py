"""Subscriptions: sinks that are notified of every finished step of a run, on one rank.

An optimizer or objective has a list of listeners; while it is empty, a step only checks that. A sink cannot
end training, which would leave the other ranks waiting: what it raises becomes a warning, and it is dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from hvdloss.comm.world import register_for_reset, reset_cause
from hvdloss.errors import ConfigError
from hvdloss.step.report import StepReport
from hvdloss.terms.controller import Controller
from hvdloss.terms.term import Decision

__all__ = ["Sink", "StepSource", "Subscription", "check_reporting_rank", "check_sink"]


@runtime_checkable
class Sink(Protocol):
    """Receives the events of a run: a tracker, a recorder, a class of your own.

    Only these two methods are needed. These are called too if a sink has them, on the same rank:

    - ``begin(metadata)``: once, before the first step: a dict of plain values (see
      :func:`hvdloss.report.record.run_metadata`): framework, ranks, objective, terms, environment.
    - ``decision(decision)``: every :class:`hvdloss.terms.term.Decision` of the terms' policies.
    - ``before_reset()``: the ranks are about to change (an elastic job): release what only the reporting
      rank may hold, such as a file. The only call made on all ranks.
    - ``ranks(number)``: the number of ranks from here on; this one still reports.
    - ``lost(error)``: after that, or after ``begin`` on a rank that reports now in place of another: why
      ranks were lost. Steps since the last commit are undone, and their numbers come again.
    - ``epoch(number, metrics)``: an epoch of Keras's ``fit`` is over, counted from 1, with its logs; in your
      own loops call it yourself.
    - ``fault(error)``: training under the sink's ``with``, or ``fit``, ended with this exception.

    All are called by the training thread, between two steps: pass long work to another thread.
    """

    def step(self, report: StepReport) -> None:
        """Handle a finished step."""

    def close(self) -> None:
        """Flush and close; called once, when the subscription ends. Must not raise if called again."""


class StepSource(Protocol):
    """Something with listeners: the adapter's state of an optimizer or an objective."""

    listeners: list[Callable[[StepReport], None]]

    def add_listener(self, listener: Callable[[StepReport], None]) -> None:
        """Call `listener` with the report of every step from now on."""

    def remove_listener(self, listener: Callable[[StepReport], None]) -> None:
        """Stop calling `listener`."""


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


def check_reporting_rank(rank: Any) -> None:
    """Check the number of the reporting rank.

    Raises:
        ConfigError: not a rank.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise ConfigError(f"rank={rank!r} must be the number of a rank")


class Subscription:
    """Notifies sinks of the steps of a run, until :meth:`close`; does nothing on ranks that do not report.

    Args:
        source: of the steps.
        controller: of their objective, whose decisions are reported as well; or None.
        sinks: that are notified.
        metadata: returns the argument of ``begin``.
        is_reporting_rank: whether this rank reports; called again when an elastic job's ranks change.
        size: returns the number of ranks.
        closes: whether to close the sinks with it.

    Raises:
        ConfigError: a sink that lacks a method.

    Collectives: none.
    """

    def __init__(
        self,
        source: StepSource,
        controller: Controller | None,
        sinks: tuple[Any, ...],
        *,
        metadata: Callable[[], Mapping[str, Any]],
        is_reporting_rank: Callable[[], bool],
        size: Callable[[], int] = lambda: 1,
        closes: bool = True,
    ) -> None:
        self.sinks = [check_sink(sink) for sink in sinks]
        self._all = tuple(self.sinks)
        self._source, self._controller = source, controller
        self._metadata, self._is_reporting_rank, self._size = metadata, is_reporting_rank, size
        self._closes = closes
        self._open, self._subscribed, self._started = True, False, False
        self._attach()
        # Kept alive by its source, also where it only waits to become the reporting rank.
        vars(source).setdefault("followers", []).append(self)
        register_for_reset(self)

    def _attach(self) -> None:
        if not self._open or self._subscribed or not self._is_reporting_rank():
            return
        self._source.add_listener(self._step)  # raises before any sink is notified
        self._subscribed = True
        if self._controller is not None:
            self._controller.on_decision.append(self._decision)
        if not self._started:
            self._started = True
            self._notify("begin", lambda: (self._metadata(),))

    def _detach(self) -> None:
        if not self._subscribed:
            return
        self._subscribed = False
        self._source.remove_listener(self._step)
        if self._controller is not None and self._decision in self._controller.on_decision:
            self._controller.on_decision.remove(self._decision)

    def before_reset(self) -> None:
        """Let sinks release what only one rank may hold: it may be another rank's after the reset."""
        if self._open:
            self._notify("before_reset", tuple)

    def reset(self) -> None:
        """Subscribe on the rank that reports now."""
        if not self._open:
            return
        if not self._is_reporting_rank():
            self._detach()
            return
        if self._started:
            size = self._size()
            self._notify("ranks", lambda: (size,))
        try:
            self._attach()
        except Exception as error:  # must not end the training of the others
            warnings.warn(f"hvdloss: steps are no longer reported: {error}", RuntimeWarning, stacklevel=2)
            return
        if (lost := reset_cause()) is not None:
            self._notify("lost", lambda: (lost,))

    def of(self, source: StepSource) -> bool:
        """Return whether it is subscribed to this source."""
        return self._open and self._source is source

    # -- notifications ----------------------------------------------------------------------------

    def _notify(self, method: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
        for sink in list(self.sinks):
            try:
                call = getattr(sink, method, None)
                if call is not None:
                    call(*arguments())
            except Exception as error:
                self.sinks.remove(sink)
                warnings.warn(
                    f"hvdloss: {type(sink).__name__}.{method}() raised {type(error).__name__}: {error}; it "
                    f"is no longer notified, and training goes on",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _step(self, report: StepReport) -> None:
        self._notify("step", lambda: (report,))

    def _decision(self, decision: Decision) -> None:
        self._notify("decision", lambda: (decision,))

    def epoch(self, number: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Notify sinks of the end of an epoch, counted from 1."""
        if self._subscribed:
            self._notify("epoch", lambda: (number, dict(metrics or {})))

    def fault(self, error: BaseException) -> None:
        """Notify sinks that training ended with this error."""
        if self._subscribed:
            self._notify("fault", lambda: (error,))

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Unsubscribe, and close the sinks; calling it again does nothing."""
        if not self._open:
            return
        self._open = False
        self._detach()
        vars(self._source)["followers"].remove(self)
        if self._closes:
            self.sinks = list(self._all) if self._started else []  # failed ones have files to close, too
            self._notify("close", tuple)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.fault(error)
        self.close()
