"""How many ranks are where, exchange by exchange: counts that add up over hosts, and what they show.

A tally of some ranks is the sum of the tallies of any parts they are split into, so that a tree of hosts adds
them up, and the cost of a verdict does not depend on the number of ranks but on how many different exchanges
are waited in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvdloss.errors import ConfigError
from hvdloss.watch.ranges import pack, unpack
from hvdloss.watch.verdict import TEXT, RankState, Wait, key_of

__all__ = ["EXCHANGES", "Exchange", "Found", "Summary", "Tally", "blocked_for_ever", "search"]

EXCHANGES = 32  # different ones that are looked at together; ranks in others count as able to go on
JOIN = "join"  # what Horovod's join() is called
_MASK = 2**64 - 1
_ROWS = ("inside", "reached", "left", "free", "marks")


@dataclass(frozen=True)
class Exchange:
    """What ranks wait in together.

    Attributes:
        what: its name, equal on all of its ranks.
        step: of the optimizer `what` is of; None for an exchange that is no step.
        members: the ranks that it takes; empty for all.
        count: its ordinal among exchanges of this name and these ranks; 0 for one of a step.
    """

    what: str
    step: int | None = None
    members: tuple[int, ...] = ()
    count: int = 0

    @classmethod
    def of(cls, wait: Wait) -> Exchange:
        """Return what a rank waits in."""
        return cls(wait.what, wait.step, wait.members, wait.count)

    @property
    def id(self) -> str:
        """Tells exchanges apart, in few bytes."""
        return f"{self.key}|{self.step}|{self.count}"

    @property
    def place(self) -> str:
        """For messages: "step 3 of hvdloss.0"."""
        return self.what if self.step is None else f"step {self.step} of {self.what}"

    def size(self, ranks: int) -> int:
        """Return its number of ranks, given the number of all ranks."""
        return len(self.members) or ranks

    def takes(self, rank: int) -> bool:
        """Return whether a rank takes part."""
        return not self.members or rank in self.members

    def has(self, state: RankState) -> bool:
        """Return whether a rank waits in it. Exchanges meet by name: their ordinals may differ."""
        wait = state.wait
        return (
            wait is not None
            and (wait.what, wait.step) == (self.what, self.step)
            and wait.members == self.members
        )

    @property
    def key(self) -> str:
        """As :attr:`Wait.key`."""
        return key_of(self.what, self.members)

    def reached_by(self, state: RankState) -> bool:
        """Return whether a rank has given its part: what others still wait for there is on its way."""
        if state.wait is not None and state.wait.what == JOIN:
            return True  # Horovod gives zeros in its place
        if self.step is not None:
            return state.steps.get(self.what, 0) >= self.step
        return state.reached.get(self.key, 0) >= self.count > 0

    def as_message(self) -> list[Any]:
        """Return it as JSON."""
        return [self.what, self.step, pack(self.members), self.count]

    @classmethod
    def from_message(cls, message: Any) -> Exchange:
        """Return the exchange in a message.

        Raises:
            ConfigError: not such a value.
        """
        try:
            what, step, members, count = message
            return cls(
                str(what)[:TEXT], None if step is None else int(step), unpack(str(members)), int(count)
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"not an exchange: {type(error).__name__}: {error}") from None


@dataclass
class Tally:
    """Where the members of some exchanges are. Ranks that were not counted are missing from all of it.

    Attributes:
        inside: of each exchange, the ranks that are blocked in it.
        reached: the members that have given their part, and wait elsewhere or not at all.
        left: the members that have ended in good order, and never came to it.
        free: the members that are blocked nowhere, or not known to be: they may come yet.
        away: the members that are blocked in another one of these exchanges, by its index.
        marks: of each exchange, a sum over `inside` that identifies their waits; the same if all stayed.
        blocked: number of ranks blocked in any exchange.
        step: the largest step that any rank is in, counted from 1.
    """

    inside: list[int]
    reached: list[int]
    left: list[int]
    free: list[int]
    marks: list[int]
    away: list[list[int]]
    blocked: int = 0
    step: int = 1

    @classmethod
    def zero(cls, exchanges: int) -> Tally:
        """Return the tally of no ranks."""
        rows: dict[str, Any] = {name: [0] * exchanges for name in _ROWS}
        return cls(**rows, away=[[0] * exchanges for _ in range(exchanges)])

    @classmethod
    def of(cls, states: Iterable[RankState], exchanges: Sequence[Exchange]) -> Tally:
        """Return the tally of ranks. A rank is blocked if its state has a `wait`."""
        out = cls.zero(len(exchanges))
        members = [frozenset(exchange.members) for exchange in exchanges]
        for state in states:
            running, wait, at = state.status == "running", state.wait, None
            if running:
                out.step = max(out.step, wait.step if wait is not None and wait.step else state.step)
            if running and wait is not None:
                out.blocked += 1
                at = next((i for i, exchange in enumerate(exchanges) if exchange.has(state)), None)
            for i, exchange in enumerate(exchanges):
                if members[i] and state.rank not in members[i]:
                    continue
                if at is not None and (at == i or exchange.has(state)):
                    out.inside[i] += 1
                    assert wait is not None
                    seen = f"{state.rank} {wait.serial}".encode()
                    mark = int.from_bytes(hashlib.blake2b(seen, digest_size=8).digest(), "big")
                    out.marks[i] = (out.marks[i] + mark) & _MASK
                elif exchange.reached_by(state):
                    out.reached[i] += 1
                elif state.status == "left":
                    out.left[i] += 1
                elif at is not None:
                    out.away[i][at] += 1
                elif running:
                    out.free[i] += 1
        return out

    def add(self, other: Tally) -> None:
        """Add the tally of other ranks."""
        for mine, theirs in (
            (self.inside, other.inside),
            (self.reached, other.reached),
            (self.left, other.left),
            (self.free, other.free),
            *zip(self.away, other.away, strict=True),
        ):
            mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]
        self.marks = [(a + b) & _MASK for a, b in zip(self.marks, other.marks, strict=True)]
        self.step = max(self.step, other.step)
        self.blocked += other.blocked

    def as_message(self) -> dict[str, Any]:
        """Return it as JSON."""
        return dict(vars(self))

    @classmethod
    def from_message(cls, message: Any, exchanges: int) -> Tally:
        """Return the tally in a message.

        Raises:
            ConfigError: not a tally of this number of exchanges.
        """
        try:
            rows: dict[str, Any] = {name: [int(n) for n in message[name]] for name in _ROWS}
            rows["away"] = [[int(n) for n in row] for row in message["away"]]
            blocked, step = int(message["blocked"]), int(message["step"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a tally: {type(error).__name__}: {error}") from None
        if any(len(row) != exchanges for row in [*rows.values(), *rows["away"]]):
            raise ConfigError(f"a tally of another number than {exchanges} exchanges")
        return cls(**rows, blocked=blocked, step=step)

    def complete(self, index: int, size: int) -> bool:
        """Return whether all members of an exchange are in it, or have given their part."""
        return self.inside[index] + self.reached[index] >= size


def blocked_for_ever(tally: Tally, exchanges: Sequence[Exchange], size: int) -> list[int]:
    """Return the exchanges, by index, whose ranks can never go on: they wait for each other.

    Ranks in an exchange may go on if it is complete, if a member may come that is blocked nowhere (or that
    was not counted), or if a member is blocked in another exchange whose ranks may go on. A member that has
    ended never comes.

    Args:
        tally: of all ranks, as far as they could be asked.
        exchanges: what it counts.
        size: number of ranks.

    >>> x, y = Exchange("x"), Exchange("y")
    >>> states = [RankState(0, wait=Wait("x")), RankState(1, wait=Wait("y"))]
    >>> blocked_for_ever(Tally.of(states, [x, y]), [x, y], 2)
    [0, 1]
    >>> blocked_for_ever(Tally.of([states[0], RankState(1)], [x, y]), [x, y], 2)
    []
    """
    every = range(len(exchanges))
    known = [
        tally.inside[i] + tally.reached[i] + tally.left[i] + tally.free[i] + sum(tally.away[i]) for i in every
    ]
    live = {
        i
        for i in every
        if tally.complete(i, exchanges[i].size(size)) or tally.free[i] or known[i] < exchanges[i].size(size)
    }
    grown = True
    while grown:
        more = {i for i in every if i not in live and any(tally.away[i][j] for j in live)}
        grown, live = bool(more), live | more
    return [i for i in every if i not in live and tally.inside[i]]


@dataclass
class Summary:
    """A host's periodic summary of its ranks, and of those of the hosts below it.

    Attributes:
        left: ranks that have ended in good order.
        lost: ranks whose process is gone.
        errors: ranks that reported an error and still run.
        waiting: ranks that were last known to be blocked.
        exchanges: what they wait in, how many of them, and for how many seconds the first one.
    """

    left: int = 0
    lost: int = 0
    errors: int = 0
    waiting: int = 0
    exchanges: dict[str, tuple[Exchange, int, float]] = field(default_factory=dict)

    def put(self, exchange: Exchange, ranks: int, seconds: float) -> None:
        """Add ranks that wait in an exchange."""
        _, before, longest = self.exchanges.get(exchange.id, (exchange, 0, 0.0))
        self.exchanges[exchange.id] = (exchange, before + ranks, max(longest, seconds))

    def add(self, other: Summary, seconds: float = 0.0) -> None:
        """Add the summaries of other hosts, `seconds` old."""
        self.left += other.left
        self.lost += other.lost
        self.errors += other.errors
        self.waiting += other.waiting
        for exchange, ranks, longest in other.exchanges.values():
            self.put(exchange, ranks, longest + seconds)

    @property
    def most(self) -> list[tuple[Exchange, int, float]]:
        """The exchanges with the most ranks in them."""
        return sorted(self.exchanges.values(), key=lambda one: -one[1])[:EXCHANGES]

    @property
    def gist(self) -> Any:
        """All but the seconds: worth telling when it changes."""
        counts = {key: ranks for key, (_, ranks, _) in self.exchanges.items()}
        return (self.left, self.lost, self.errors, self.waiting, counts)

    def as_message(self) -> dict[str, Any]:
        """Return it as JSON."""
        numbers = {name: getattr(self, name) for name in ("left", "lost", "errors", "waiting")}
        return {**numbers, "exchanges": [[one.as_message(), n, seconds] for one, n, seconds in self.most]}

    @classmethod
    def from_message(cls, message: Any) -> Summary:
        """Return the summary in a message.

        Raises:
            ConfigError: it is no summary.
        """
        try:
            numbers: Any = {name: int(message[name]) for name in ("left", "lost", "errors", "waiting")}
            out = cls(**numbers)
            for one, ranks, seconds in message["exchanges"]:
                out.put(Exchange.from_message(one), int(ranks), float(seconds))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a summary: {type(error).__name__}: {error}") from None
        return out


@dataclass
class Found:
    """Ranks that were looked for: how many, which, and the states of the first few.

    Attributes:
        ranks: all of them.
        states: of the lowest ones.
    """

    ranks: tuple[int, ...] = ()
    states: list[RankState] = field(default_factory=list)
    most: int = 8

    def add(self, other: Found) -> None:
        """Add what was found among other ranks."""
        self.ranks = tuple(sorted((*self.ranks, *other.ranks)))
        self.states = sorted((*self.states, *other.states), key=lambda state: state.rank)[: self.most]

    def as_message(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "ranks": pack(self.ranks),
            "states": [{"rank": one.rank, "status": one.status, **one.as_message()} for one in self.states],
        }

    @classmethod
    def from_message(cls, message: Any) -> Found:
        """Return what another process found.

        Raises:
            ConfigError: it is nothing of the kind.
        """
        try:
            ranks = unpack(str(message["ranks"]))
            states = [RankState(int(one["rank"]), str(one["status"])) for one in list(message["states"])[:64]]
            for state, one in zip(states, message["states"], strict=False):
                state.update(one)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not ranks: {type(error).__name__}: {error}") from None
        return cls(ranks, states)


def search(states: Iterable[RankState], kind: str, exchanges: Sequence[Exchange], most: int = 8) -> Found:
    """Return the ranks of one kind with regard to some exchanges.

    Args:
        states: where to look.
        kind: ``"ended"``: that have ended in good order; ``"inside"``: blocked in one of them; ``"away"``:
            running members of the first that are neither in it nor have given their part; ``"left"``:
            members of the first that ended without it.
        exchanges: which.
        most: states to keep.
    """
    found = []
    for state in states:
        if kind == "ended":
            hit = state.status == "left"
        elif kind == "inside":
            hit = state.status == "running" and any(one.has(state) for one in exchanges)
        else:
            one = exchanges[0]
            hit = one.takes(state.rank) and not one.has(state) and not one.reached_by(state)
            hit = hit and state.status == ("left" if kind == "left" else "running")
        if hit:
            found.append(state)
    found.sort(key=lambda state: state.rank)
    return Found(tuple(state.rank for state in found), found[:most], most)
