"""States of ranks, faults, and their messages. No sockets, no threads."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hvdloss.errors import WAY_OUT, ConfigError, HvdlossError, LostRankError, RankError, StallError
from hvdloss.watch.ranges import pack, unpack

__all__ = ["Fault", "Limits", "RankState", "Wait"]

STACK = 12  # frames that are sent, the innermost
MANY = 16  # ranks that a message names one by one
TEXT = 4000  # characters of an error that are sent
SILENCE = 3.0  # seconds: shorter pauses happen to healthy machines
REACHED = 256  # names of exchanges that a rank reports at most


@dataclass(frozen=True)
class Limits:
    """When waiting counts as wrong, in seconds.

    Attributes:
        deadlock: between two looks that must find the same ranks waiting for each other.
        warn: of waiting, after which it is logged who is missing, and where; again after twice the time, and
            so on; 0 for never.
        stall: of waiting, after which it is an error; 0 for never, the default.
        silence: for which a process may be stopped, or a host unreachable, before its ranks count as lost, at
            least 3; 0 for never.
    """

    deadlock: float = 1.0
    warn: float = 60.0
    stall: float = 0.0
    silence: float = 30.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}={value!r} must be a number of seconds, at least 0")
        if 0 < self.silence < SILENCE:
            raise ConfigError(
                f"silence={self.silence!r} (HVDLOSS_WATCH_SILENCE) must be 0 (never) or at least {SILENCE:g} "
                f"seconds: healthy machines pause for shorter times"
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
        count: its ordinal among exchanges with this name and these members; 0 for one of a step.
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
        status: ``"running"``, ``"left"`` (with a goodbye) or ``"lost"`` (its process is gone without one).
        steps: finished ones, by optimizer.
        wait: what its main thread is blocked in; None if it is not, as far as is known.
        last_activity: what it did last, and `ago`: how many seconds before.
        stack: its main thread's innermost frames, outermost first.
        reached: by :attr:`Wait.key`, how many exchanges it has begun, whether they are over or not.
        process: noteworthy state of its process by the operating system.
    """

    rank: int
    status: str = "running"
    steps: dict[str, int] = field(default_factory=dict)
    wait: Wait | None = None
    last_activity: str = ""
    ago: float = 0.0
    stack: tuple[str, ...] = ()
    reached: dict[str, int] = field(default_factory=dict)
    process: str = ""

    @property
    def step(self) -> int:
        """The step that it is in, of the optimizer with the most steps, counted from 1."""
        return max(self.steps.values(), default=0) + 1

    def as_message(self) -> dict[str, Any]:
        """Return the state as a JSON message."""
        wait = None if self.wait is None else {**asdict(self.wait), "members": pack(self.wait.members)}
        return {
            "steps": self.steps,
            "wait": wait,
            "last_activity": self.last_activity,
            "ago": self.ago,
            "stack": list(self.stack),
            "reached": self.reached,
            "process": self.process,
        }

    def update(self, message: Mapping[str, Any]) -> None:
        """Update the state from the rank's message.

        Raises:
            ConfigError: a message of another form; nothing is changed then.
        """
        try:
            steps = {str(name): int(count) for name, count in dict(message["steps"]).items()}
            wait = message["wait"]
            if wait is not None:
                step = wait["step"]
                members = unpack(str(wait["members"]))
                wait = Wait(
                    str(wait["what"])[:TEXT],
                    None if step is None else int(step),
                    members,
                    int(wait["serial"]),
                    float(wait["seconds"]),
                    int(wait["count"]),
                )
            last_activity, ago = str(message["last_activity"])[:TEXT], float(message["ago"])
            stack = tuple(str(frame)[:TEXT] for frame in list(message["stack"])[-STACK:])
            last = list(dict(message["reached"]).items())[-REACHED:]
            reached = {str(key)[:TEXT]: int(count) for key, count in last}
            process = str(message.get("process", ""))[:TEXT]
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ConfigError(f"rank {self.rank} sent no state: {type(error).__name__}: {error}") from None
        self.steps, self.wait, self.last_activity, self.ago = steps, wait, last_activity, ago
        self.stack, self.reached, self.process = stack, reached, process

    def describe(self) -> str:
        """Return where the rank is, for messages."""
        if self.status == "left":
            return f"rank {self.rank} has ended after {self.done()}"
        if self.status == "lost":
            return f"rank {self.rank} is gone, after {self.done()}"
        doing = (
            f"last known to have {self.last_activity} {self.ago:.0f} s ago"
            if self.last_activity
            else "nothing known yet"
        )
        if self.wait is not None:
            doing = f"waits in {self.wait.place} for {self.wait.seconds:.0f} s"
        if self.process:
            doing += f"; {self.process}"
        where = "".join(f"\n    {frame}" for frame in self.stack)
        return f"rank {self.rank} (after {self.done()}) {doing}" + (f"; its stack:{where}" if where else "")

    def done(self) -> str:
        """Return how far it came, for messages."""
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

    def as_message(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Any) -> Fault:
        """Return the fault in a message.

        Raises:
            ConfigError: not a fault.
        """
        try:
            kind, text = str(message["kind"]), str(message["text"])
            ranks = tuple(int(rank) for rank in message["ranks"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a fault: {type(error).__name__}: {error}") from None
        if kind not in _ERRORS:
            raise ConfigError(f"kind={kind[:40]!r} of a fault is not known")
        return cls(kind, ranks, text)

    def error(self) -> RankError:
        """Return the error that every rank raises for it."""
        error = _ERRORS[self.kind](self.text)
        error.ranks = self.ranks
        return error


def name_ranks(ranks: Iterable[int]) -> str:
    listed = sorted(ranks)
    if len(listed) > MANY:
        return f"{len(listed)} ranks ({pack(listed)[:200]})"
    return f"rank{'s' if len(listed) > 1 else ''} {', '.join(map(str, listed))}"


def list_states(states: Iterable[RankState], ranks: int = 0) -> str:
    """Return a line or more for each of the states, and the number of `ranks` that are not shown."""
    shown = list(states)
    more = f"\n  ... and {ranks - len(shown)} more" if ranks > len(shown) else ""
    return "".join(f"\n  {state.describe()}" for state in shown) + more


def lost(step: int, rank: int, state: RankState | None = None) -> Fault:
    """Return the fault of a rank whose process is gone."""
    where = "" if state is None else f" It was last known {_at(state)}."
    return Fault(
        "lost",
        (rank,),
        f"step {step}: rank {rank} is gone: its process ended without a word (killed, perhaps for want of "
        f"memory).{where} Nothing of this step was updated. Start the job again from its last checkpoint, or "
        f"run it as an elastic job, which goes on from the last commit.",
    )


def silent(step: int, rank: int, limits: Limits, what: str, state: RankState | None = None) -> Fault:
    """Return the fault of a rank that is stopped, or whose host cannot be reached.

    Args:
        step: that ranks are in.
        rank: which.
        limits: the job's.
        what: is the matter.
        state: of the rank, where it is known.
    """
    where = "" if state is None else f" It was last known {_at(state)}.{list_states([state])}"
    return Fault(
        "silent",
        (rank,),
        f"step {step}: rank {rank} {what} for {limits.silence:g} s (HVDLOSS_WATCH_SILENCE). Start the job "
        f"again from its last checkpoint, or run it as an elastic job.{where}",
    )


def left_behind(gone: RankState, waiting: Iterable[int], step: int, place: str = "") -> Fault:
    """Return the fault of a rank that ended while others wait for it."""
    return Fault(
        "left",
        (gone.rank,),
        f"step {step}: rank {gone.rank} has ended after {gone.done()}, while {name_ranks(waiting)} wait(s) "
        f"for it{place}. All ranks must make the same number of steps: loop over "
        f"hvd.uneven(batches, optimizer), which ends on all ranks together, or give ranks the same number "
        f"of batches.",
    )


def deadlocked(step: int, ranks: Sequence[int], states: Sequence[RankState]) -> Fault:
    """Return the fault of ranks that wait for each other in different exchanges.

    Args:
        step: that ranks are in.
        ranks: all of them.
        states: of some of them.
    """
    places = sorted({state.wait.place for state in states if state.wait is not None})
    return Fault(
        "deadlock",
        tuple(ranks),
        f"step {step}: {name_ranks(ranks)} wait for each other in different places ({'; '.join(places)}), "
        f"and none can go on. All ranks must make the same steps and the same collective calls in the same "
        f"order.{list_states(states, len(ranks))}",
    )


def stalled(
    step: int, ranks: Sequence[int], states: Sequence[RankState], place: str, seconds: float, limits: Limits
) -> Fault:
    """Return the fault of ranks that did not come to an exchange within the hard limit.

    Args:
        step: that ranks are in.
        ranks: that did not come.
        states: of some of them.
        place: of the exchange.
        seconds: that others have waited in it.
        limits: the job's.
    """
    return Fault(
        "stall",
        tuple(ranks),
        f"step {step}: {name_ranks(ranks)} did not come to {place} within {seconds:.0f} s "
        f"(HVDLOSS_WATCH_STALL={limits.stall:g}). Where a rank does something long by itself, set "
        f"HVDLOSS_WATCH_STALL higher, or to 0 for no limit; else mend what its stack shows, and start "
        f"again from the last checkpoint.{list_states(states, len(ranks))}",
    )


def _at(state: RankState) -> str:
    """Return the last known place of a rank."""
    return f"in {state.wait.place}" if state.wait is not None else f"after {state.done()}"


def error_text(rank: int, step: int, error: BaseException, where: str) -> str:
    """Return the message to all ranks about an exception on one of them."""
    ours = isinstance(error, HvdlossError)
    text = str(error) if ours else " ".join(str(error).split())
    out = f"step {step}: rank {rank}: {type(error).__name__}: {text[:TEXT]}" + (
        f" [{where}]" if where else ""
    )
    if ours:  # its text says what to do
        return out
    return f"{out}. {WAY_OUT}"
