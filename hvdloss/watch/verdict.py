"""Who keeps whom waiting: what the ranks' states, side by side, show to be wrong. Pure functions."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hvdloss.errors import WAY_OUT, ConfigError, HvdlossError, LostRankError, RankError, StallError

__all__ = ["Fault", "Limits", "RankState", "Wait", "deadlocked", "find", "missing"]

STACK = 12  # frames that are told, the innermost
TEXT = 4000  # characters of an error that are told
SILENCE = 3.0  # seconds: three signs of life
FINISHED = 32  # exchanges that are told to be over, the last ones


@dataclass(frozen=True)
class Limits:
    """When waiting counts as wrong, in seconds.

    Attributes:
        deadlock: for which ranks must be seen to wait for each other.
        left: for which a rank must wait for one that has ended.
        warn: of waiting, after which rank 0 logs who is missing; 0 for never.
        stall: of waiting, after which it is an error; 0 for never.
        silence: after which a rank that says nothing counts as lost, at least 3; 0 for never.
    """

    deadlock: float = 1.5
    left: float = 0.5
    warn: float = 60.0
    stall: float = 600.0
    silence: float = 30.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}={value!r} must be a number of seconds, at least 0")
        if 0 < self.silence < SILENCE:
            raise ConfigError(
                f"silence={self.silence!r} (HVDLOSS_WATCH_SILENCE) must be 0 (never) or at least {SILENCE:g} "
                f"seconds: ranks give a sign of life every second"
            )


@dataclass(frozen=True)
class Wait:
    """What a rank waits in.

    Attributes:
        what: names the exchange; ranks in the same one wait for each other.
        step: of the optimizer that `what` is of; None for an exchange that is no step.
        members: the ranks that it takes; empty for all.
        serial: which of this rank's waits it is.
        seconds: since when, by this rank's clock.
        count: the how-manieth exchange so named, with these members, of this rank; 0 for one of a step.
    """

    what: str
    step: int | None = None
    members: tuple[int, ...] = ()
    serial: int = 0
    seconds: float = 0.0
    count: int = 0

    @property
    def key(self) -> str:
        """Tells exchanges of one name among different ranks apart, however many ranks they are."""
        return key_of(self.what, self.members)

    @property
    def place(self) -> str:
        """For messages: "step 3 of hvdloss.0"."""
        return self.what if self.step is None else f"step {self.step} of {self.what}"


@functools.lru_cache(maxsize=1024)
def key_of(what: str, members: tuple[int, ...]) -> str:
    """Return :attr:`Wait.key`."""
    return what if not members else f"{what} of {hashlib.sha256(repr(members).encode()).hexdigest()[:16]}"


@dataclass
class RankState:
    """What is known of one rank.

    Attributes:
        rank: its number.
        status: ``"running"``, ``"left"`` (said so) or ``"lost"`` (its connection ended without a word).
        silent: seconds since it was last heard of.
        steps: finished ones, by optimizer.
        wait: what it waits in; None if it does not, as far as is known.
        did: what it did last, as it says, and `ago`: how many seconds before.
        stack: its main thread's innermost frames, outermost first.
        finished: by :attr:`Wait.key`, how many exchanges are over, of those that were over last.
    """

    rank: int
    status: str = "running"
    silent: float = 0.0
    steps: dict[str, int] = field(default_factory=dict)
    wait: Wait | None = None
    did: str = ""
    ago: float = 0.0
    stack: tuple[str, ...] = ()
    finished: dict[str, int] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The step that it is in, of the optimizer with the most steps, counted from 1."""
        return max(self.steps.values(), default=0) + 1

    def told(self) -> dict[str, Any]:
        """Return what a rank tells of itself, as JSON."""
        wait = None if self.wait is None else asdict(self.wait)
        return {
            "steps": self.steps,
            "wait": wait,
            "did": self.did,
            "ago": self.ago,
            "stack": list(self.stack),
            "finished": self.finished,
        }

    def hear(self, told: Mapping[str, Any]) -> None:
        """Take in what the rank told.

        Raises:
            ConfigError: it is not of that form; nothing is changed then.
        """
        try:
            steps = {str(name): int(count) for name, count in dict(told["steps"]).items()}
            wait = told["wait"]
            if wait is not None:
                step = wait["step"]
                members = tuple(int(rank) for rank in wait["members"])
                wait = Wait(
                    str(wait["what"])[:TEXT],
                    None if step is None else int(step),
                    members,
                    int(wait["serial"]),
                    float(wait["seconds"]),
                    int(wait["count"]),
                )
            did, ago = str(told["did"])[:TEXT], float(told["ago"])
            stack = tuple(str(frame)[:TEXT] for frame in list(told["stack"])[-STACK:])
            last = list(dict(told["finished"]).items())[-FINISHED:]
            finished = {str(key)[:TEXT]: int(count) for key, count in last}
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ConfigError(f"rank {self.rank} told no state: {type(error).__name__}: {error}") from None
        self.steps, self.wait, self.did, self.ago = steps, wait, did, ago
        self.stack, self.finished = stack, finished

    def describe(self) -> str:
        """Return where the rank is, for messages."""
        if self.status == "left":
            return f"rank {self.rank} has ended after {self._done()}"
        if self.status == "lost":
            return f"rank {self.rank} is gone, after {self._done()}"
        doing = f"last known to have {self.did} {self.ago:.0f} s ago" if self.did else "nothing known yet"
        if self.wait is not None:
            doing = f"waits in {self.wait.place} for {self.wait.seconds:.0f} s"
        where = "".join(f"\n    {frame}" for frame in self.stack)
        return f"rank {self.rank} (after {self._done()}) {doing}" + (
            f"; its Python stack:{where}" if where else ""
        )

    def _done(self) -> str:
        if not any(self.steps.values()):
            return "no step"
        return ", ".join(f"step {count} of {name}" for name, count in self.steps.items() if count)


_ERRORS: dict[str, type[RankError]] = {
    "error": RankError,
    "lost": LostRankError,
    "silent": LostRankError,
    "left": LostRankError,
    "broken": LostRankError,
    "deadlock": StallError,
    "stall": StallError,
}


@dataclass(frozen=True)
class Fault:
    """Why ranks cannot go on together; the same on all of them.

    Attributes:
        kind: ``"error"``, ``"lost"``, ``"silent"``, ``"left"``, ``"broken"``, ``"deadlock"`` or ``"stall"``.
        ranks: whose fault it is.
        text: the message of the error.
    """

    kind: str
    ranks: tuple[int, ...]
    text: str

    def told(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)

    @classmethod
    def heard(cls, told: Any) -> Fault:
        """Return the fault that another rank told.

        Raises:
            ConfigError: it is none.
        """
        try:
            kind, text = str(told["kind"]), str(told["text"])
            ranks = tuple(int(rank) for rank in told["ranks"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"no fault was told: {type(error).__name__}: {error}") from None
        if kind not in _ERRORS:
            raise ConfigError(f"kind={kind[:40]!r} of a fault is not known")
        return cls(kind, ranks, text)

    def error(self) -> RankError:
        """Return the error that every rank raises for it."""
        error = _ERRORS[self.kind](self.text)
        error.ranks = self.ranks
        return error


def missing(state: RankState, states: Sequence[RankState]) -> list[RankState]:
    """Return the ranks that `state` waits for: those of its exchange that are not in it, and were not."""
    wait = state.wait
    if wait is None:
        return []

    def there(other: RankState) -> bool:
        # One that has finished it took part in it: what is waited for is on its way, however long that takes.
        if wait.step is not None:
            done = other.steps.get(wait.what, 0) >= wait.step
        else:
            done = other.finished.get(wait.key, 0) >= wait.count > 0
        return done or _same(other.wait, wait)

    members = wait.members or range(len(states))
    return [states[rank] for rank in members if rank < len(states) and not there(states[rank])]


def _same(one: Wait | None, other: Wait) -> bool:
    return one is not None and (one.what, one.step) == (other.what, other.step)


def deadlocked(states: Sequence[RankState]) -> list[RankState]:
    """Return the running ranks that can never go on, because they wait for each other in different exchanges.

    A rank may go on if it does not wait (as far as is known), if all of its exchange are in it, or if one of
    those it waits for may go on. The others are the result; ranks that have ended are none of them.

    >>> a, b = RankState(0, wait=Wait("x")), RankState(1, wait=Wait("y"))
    >>> [state.rank for state in deadlocked([a, b])], deadlocked([a, RankState(1)])
    ([0, 1], [])
    """
    away = {state.rank: missing(state, states) for state in states}
    live = {
        state.rank
        for state in states
        if state.status == "running" and (state.wait is None or not away[state.rank])
    }
    grown = True
    while grown:
        more = {
            state.rank
            for state in states
            if state.rank not in live and any(one.rank in live for one in away[state.rank])
        }
        grown, live = bool(more), live | more
    return [state for state in states if state.status == "running" and state.rank not in live]


def step_of(states: Iterable[RankState]) -> int:
    """Return the step, counted from 1, that the ranks that go on are in."""
    alive = [state for state in states if state.status == "running"]
    steps = [state.wait.step for state in alive if state.wait is not None and state.wait.step is not None]
    return max(steps, default=max((state.step for state in alive), default=1))


def _named(ranks: Iterable[int]) -> str:
    listed = sorted(ranks)
    return f"rank{'s' if len(listed) > 1 else ''} {', '.join(map(str, listed))}"


def _list(states: Iterable[RankState]) -> str:
    return "".join(f"\n  {state.describe()}" for state in states)


def find(states: Sequence[RankState], limits: Limits, held: float) -> Fault | None:
    """Return what is wrong with the ranks' states, or None.

    Args:
        states: of all ranks, in order.
        limits: when waiting counts as wrong.
        held: for how many seconds the ranks :func:`deadlocked` have been the same ones in the same waits.
    """
    step = step_of(states)
    for state in states:
        if state.status == "lost":
            return Fault("lost", (state.rank,), gone_text(step, state.rank, f" It was {_at(state)}."))
        if state.status == "running" and limits.silence and state.silent > limits.silence:
            return Fault(
                "silent",
                (state.rank,),
                silent_text(step, state.rank, limits, f" It was {_at(state)}.{_list([state])}"),
            )
    for state in states:
        wait = state.wait
        if state.status != "running" or wait is None:
            continue
        for other in missing(state, states):
            if other.status != "left" or wait.seconds < limits.left:
                continue
            waiting = [s.rank for s in states if s.status == "running" and _same(s.wait, wait)]
            return left_behind(other, waiting, wait.step or step, f" in {wait.place}")
    stuck = deadlocked(states)
    if stuck and held >= limits.deadlock:
        places = sorted({state.wait.place for state in stuck if state.wait is not None})
        ranks = tuple(state.rank for state in stuck)
        return Fault(
            "deadlock",
            ranks,
            f"step {step}: {_named(ranks)} wait for each other in different "
            f"places ({'; '.join(places)}), and none can go on. All ranks must make the same steps and the "
            f"same collective calls in the same order.{_list(stuck)}",
        )
    if limits.stall:
        for state in states:
            if (
                state.wait is not None
                and state.wait.seconds > limits.stall
                and (away := missing(state, states))
            ):
                return Fault(
                    "stall",
                    tuple(one.rank for one in away),
                    f"step {state.wait.step or step}: {_named(one.rank for one in away)} did not come "
                    f"to {state.wait.place} within {state.wait.seconds:.0f} s (HVDLOSS_WATCH_STALL="
                    f"{limits.stall:g}), in which rank {state.rank} waits. Where it does something long by "
                    f"itself, set HVDLOSS_WATCH_STALL higher; else mend what its stack shows, and start "
                    f"again from the last checkpoint.{_list(away)}",
                )
    return None


def gone_text(step: int, rank: int, more: str = "") -> str:
    """Return what is told of a rank whose process is gone."""
    return (
        f"step {step}: rank {rank} is gone: its process ended without a word (killed, perhaps for want of "
        f"memory).{more} Nothing of this step was updated. Start the job again from its last checkpoint, or "
        f"run it under Horovod elastic, which goes on from the last commit."
    )


def silent_text(step: int, rank: int, limits: Limits, more: str = "") -> str:
    """Return what is told of a rank that no longer answers."""
    return (
        f"step {step}: rank {rank} has not answered for {limits.silence:g} s (HVDLOSS_WATCH_SILENCE): it is "
        f"stopped, its machine or the network to it is down, or native code holds Python's lock. Start the "
        f"job again from its last checkpoint, or run it under Horovod elastic.{more}"
    )


def left_behind(gone: RankState, waiting: Iterable[int], step: int, place: str = "") -> Fault:
    """Return the fault of a rank that ended while others wait for it."""
    return Fault(
        "left",
        (gone.rank,),
        f"step {step}: rank {gone.rank} has ended after {gone._done()}, while {_named(waiting)} wait(s) for "
        f"it{place}. All ranks must make the same number of steps: loop over hvd.uneven(batches, optimizer), "
        f"which ends on all ranks together, or give ranks the same number of batches.",
    )


def _at(state: RankState) -> str:
    """Return where a rank was when it was last heard of."""
    if state.wait is not None:
        return f"last heard of {state.silent:.1f} s before, in {state.wait.place}"
    return f"last heard of {state.silent:.1f} s before, after {state._done()}"


def error_text(rank: int, step: int, error: BaseException, where: str) -> str:
    """Return what all ranks are told of an exception on one of them."""
    ours = isinstance(error, HvdlossError)
    text = str(error) if ours else " ".join(str(error).split())
    out = f"step {step}: rank {rank}: {type(error).__name__}: {text[:TEXT]}" + (
        f" [{where}]" if where else ""
    )
    if ours:  # it says what to do
        return out
    return f"{out}. {WAY_OUT}"
