"""Decisions about all ranks: whether there is a fault, and its message. No sockets, no clock.

Whoever holds the ends of the tree (the agent of rank 0's host) passes in what it receives, calls
:meth:`Root.look` now and then, and passes questions on to all hosts. Nothing here depends on the number of
ranks but the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from hvdloss.watch.tally import Exchange, Found, Summary, Tally, blocked_for_ever
from hvdloss.watch.verdict import (
    Fault,
    Limits,
    RankState,
    deadlocked,
    left_behind,
    list_states,
    lost,
    name_ranks,
    silent,
    stalled,
)

__all__ = ["Hosts", "Root"]

_ALIKE_S = 2.0  # for all ranks to fail alike, while no rank waits for a failed one
_BETTER_S = 1.5  # for a better reason than "an exchange failed" to come in
_SPACE_S = 0.5  # between two counts at least
_SELDOM_S = 30.0  # between two counts that find the same at most
_BUSY_S = 1.0  # before the first count, where some rank is blocked nowhere
_WARNINGS_S = 3600.0  # between two warnings at most
_COUNT_S, _SEARCH_S = 1.0, 8.0  # for hosts to answer


class Hosts(Protocol):
    """How the root reaches all hosts."""

    def ask(
        self,
        kind: str,
        exchanges: Sequence[Exchange],
        seconds: float,
        then: Callable[[Any], None],
    ) -> None:
        """Ask all hosts: ``"count"`` gives a Tally, a kind of :func:`~hvdloss.watch.tally.search` a Found."""

    def announce(self, fault: Fault) -> None:
        """Report a fault to all ranks."""

    def alone(self) -> None:
        """Tell all ranks that each of them has failed by itself."""

    def warn(self, text: str) -> None:
        """Log a warning on one rank."""


class Root:
    """Judges one job.

    Args:
        size: number of ranks.
        limits: when waiting counts as wrong.
        hosts: how to reach them.
    """

    def __init__(self, size: int, limits: Limits, hosts: Hosts) -> None:
        self.size, self.limits, self._hosts = size, limits, hosts
        self.fault: Fault | None = None
        self.summary = Summary()
        self._summed = 0.0  # when
        self._asking = False
        self._gone: list[tuple[int, str, RankState | None]] = []
        self._error: tuple[float, Fault] | None = None
        self._broken: tuple[float, Fault] | None = None
        self._dead: tuple[Any, float] = (None, 0.0)
        self._next, self._pause = 0.0, _SPACE_S
        self._warned: dict[str, float] = {}  # the age at which the next warning is due

    # -- input ------------------------------------------------------------------------------------

    def update(self, summary: Summary, now: float) -> None:
        """Update from the summaries of all hosts."""
        if summary.gist != self.summary.gist:
            self._pause = _SPACE_S
            soon = now + (0.0 if self._nobody_free(summary) or summary.left > self.summary.left else _BUSY_S)
            self._next = min(max(self._next, now), soon) if self.summary.exchanges else soon
        self.summary, self._summed = summary, now

    def gone(self, rank: int, what: str = "", state: RankState | None = None) -> None:
        """A rank's process is gone, or `what` has been the matter with it for too long."""
        self._gone.append((rank, what, state))

    def error(self, fault: Fault, now: float) -> None:
        """A rank reported an error."""
        if fault.kind == "broken":
            self._broken = self._broken or (now, fault)
        else:
            self._error = self._error or (now, fault)

    def forgive(self) -> None:
        """After a time without messages: earlier findings no longer count."""
        self._dead = (None, 0.0)

    @property
    def pressing(self) -> bool:
        """Whether something urgent was received."""
        return self.fault is None and not self._asking and bool(self._gone)

    # -- faults -----------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Look for a fault, and report it; cheap without one."""
        if self.fault is not None or self._asking:
            return
        if self._gone:
            self._ask("count", (), _COUNT_S / 2, self._say_gone)
        elif self._error is not None:
            self._look_at_error(now)
        elif self._broken is not None:
            if now - self._broken[0] >= _BETTER_S:
                self._ask("ended", (), _COUNT_S, self._say_broken)
        elif self.summary.exchanges and now >= self._next:
            waits = self.summary.most
            exchanges = [one for one, _, _ in waits]
            ages = [seconds + now - self._summed for _, _, seconds in waits]
            self._ask("count", exchanges, _COUNT_S, lambda tally: self._counted(tally, exchanges, ages, now))

    def _nobody_free(self, summary: Summary) -> bool:
        return summary.waiting + summary.left + summary.lost >= self.size

    def _ask(
        self, kind: str, exchanges: Sequence[Exchange], seconds: float, then: Callable[[Any], None]
    ) -> None:
        self._asking = True

        def answered(answer: Any) -> None:
            self._asking = False
            if self.fault is None:
                then(answer)

        self._hosts.ask(kind, exchanges, seconds, answered)

    def _announce(self, fault: Fault) -> None:
        self.fault = fault
        self._hosts.announce(fault)

    def _say_gone(self, tally: Tally) -> None:
        rank, what, state = min(self._gone, key=lambda one: one[0])
        if self._error is not None and self._error[1].ranks == (rank,):
            self._announce(self._error[1])  # its own error is the cause
        elif what:
            self._announce(silent(tally.step, rank, self.limits, what, state))
        else:
            self._announce(lost(tally.step, rank, state))

    def _look_at_error(self, now: float) -> None:
        """Announce an error once others wait for its rank; not where all ranks fail by themselves."""
        assert self._error is not None
        since, fault = self._error
        summary = self.summary
        if summary.errors and summary.errors + summary.left + summary.lost >= self.size:
            self._error = None
            self._hosts.alone()
        elif now - since >= _ALIKE_S or summary.waiting:
            self._announce(fault)
        else:

            def then(tally: Tally) -> None:
                if tally.blocked:
                    self._announce(fault)

            self._ask("count", (), _COUNT_S / 2, then)

    def _say_broken(self, found: Found) -> None:
        assert self._broken is not None
        fault = self._broken[1]
        if found.states:  # whoever ended in good order ended Horovod
            state = found.states[0]
            fault = left_behind(state, fault.ranks, state.step)
        self._announce(fault)

    def _counted(
        self, tally: Tally, exchanges: Sequence[Exchange], ages: Sequence[float], now: float
    ) -> None:
        """Judge where the ranks are that are waited for, and those that wait."""
        self._next, self._pause = now + self._pause, min(2 * self._pause, _SELDOM_S)
        for i, exchange in enumerate(exchanges):
            if tally.inside[i] and tally.left[i] and not tally.complete(i, exchange.size(self.size)):
                self._ask("left", [exchange], _COUNT_S, partial(self._say_left, tally, exchange))
                return
        dead = blocked_for_ever(tally, exchanges, self.size)
        seen = [(exchanges[i].id, tally.marks[i]) for i in dead]
        if not dead:
            self._dead = (None, 0.0)
        elif seen != self._dead[0]:
            self._dead = (seen, now)
            self._next, self._pause = now + self.limits.deadlock, _SPACE_S
            return
        elif now - self._dead[1] >= self.limits.deadlock:
            stuck = [exchanges[i] for i in dead]
            self._ask("inside", stuck, _SEARCH_S, partial(self._say_deadlock, tally, dead))
            return
        for i, exchange in enumerate(exchanges):
            if self.limits.stall and ages[i] > self.limits.stall and self._incomplete(tally, i, exchange):
                self._ask("away", [exchange], _SEARCH_S, partial(self._say_stall, tally, exchange, ages[i]))
                return
        if self.limits.stall:  # however long the pauses have become
            self._come_back(now, [self.limits.stall - age for age in ages])
        self._warn(tally, exchanges, ages, now)

    def _come_back(self, now: float, seconds: Sequence[float]) -> None:
        """Count again when the first of these numbers of seconds has passed, if not before."""
        self._next = min(self._next, now + max(min(seconds), _SPACE_S))

    def _incomplete(self, tally: Tally, index: int, exchange: Exchange) -> bool:
        return tally.inside[index] > 0 and not tally.complete(index, exchange.size(self.size))

    def _say_left(self, tally: Tally, exchange: Exchange, found: Found) -> None:
        if found.states:

            def then(inside: Found) -> None:
                step = exchange.step or tally.step
                self._announce(left_behind(found.states[0], inside.ranks, step, f" in {exchange.place}"))

            self._ask("inside", [exchange], _COUNT_S, then)

    def _say_deadlock(self, tally: Tally, dead: Sequence[int], found: Found) -> None:
        # Those that were counted, all of them, must still be there.
        if len(found.ranks) == sum(tally.inside[i] for i in dead):
            self._announce(deadlocked(tally.step, found.ranks, found.states))
        else:
            self.forgive()

    def _say_stall(self, tally: Tally, exchange: Exchange, age: float, found: Found) -> None:
        if found.ranks:
            step = exchange.step or tally.step
            self._announce(stalled(step, found.ranks, found.states, exchange.place, age, self.limits))

    def _warn(self, tally: Tally, exchanges: Sequence[Exchange], ages: Sequence[float], now: float) -> None:
        """Warn of what has been waited in for long: at first soon, then after growing times."""
        first = self.limits.warn
        if not first:
            return
        ids = {exchange.id for exchange in exchanges}
        self._warned = {key: age for key, age in self._warned.items() if key in ids}
        due = [
            i
            for i, exchange in enumerate(exchanges)
            if tally.inside[i] and ages[i] >= self._warned.get(exchange.id, first)
        ]
        if not due:
            self._come_back(
                now, [self._warned.get(one.id, first) - age for one, age in zip(exchanges, ages, strict=True)]
            )
            return
        i = max(due, key=lambda i: ages[i])
        exchange, age = exchanges[i], ages[i]
        self._warned[exchange.id] = age + min(max(age, first), _WARNINGS_S)
        who = (
            f"{tally.inside[i]} of {exchange.size(self.size)} ranks wait in {exchange.place} for {age:.0f} s"
        )
        if not self._incomplete(tally, i, exchange):
            self._hosts.warn(
                f"{who}, and all the others have been there: what they exchange is slow to arrive, or differs"
            )
            return
        self._ask(
            "away",
            [exchange],
            _SEARCH_S,
            lambda found: self._hosts.warn(
                f"{who}, for {name_ranks(found.ranks)}:{list_states(found.states, len(found.ranks))}\n"
                f"  Nothing is ended for it, unless HVDLOSS_WATCH_STALL says so."
            ),
        )
