"""The order in which a stage of a model computes the micro-batches of a step.

A model is cut into `stages` consecutive parts on different ranks. Micro-batch i goes forward through stage 0,
1, ..., and its gradient back the other way. A schedule says in which order each stage does its passes:

- :func:`gpipe`: all forward passes, then all backward passes (fill and drain; Huang et al. 2019). A stage
  holds the activations of all micro-batches.
- :func:`one_forward_one_backward`: as soon as it can, a stage does a backward pass after each forward pass
  (PipeDream-Flush, Narayanan et al. 2021, section 2.2). It holds those of at most ``stages - stage``.

Both do the backward passes in the order of the forward passes, so what travels between two stages has one
order in each direction. With f and b seconds for a pass of any stage, a step of m micro-batches takes
(m + stages - 1)(f + b), of which a stage is idle for (stages - 1)(f + b): :func:`bubble_fraction`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hvdloss.errors import ConfigError

__all__ = [
    "SCHEDULES",
    "Pass",
    "Schedule",
    "Span",
    "bubble_fraction",
    "gpipe",
    "most_held",
    "one_forward_one_backward",
    "schedule_named",
    "timeline",
]


class Pass(NamedTuple):
    """A forward or backward pass of a stage."""

    forward: bool
    micro_batch: int

    def __str__(self) -> str:
        """Return, say, F3 or B3."""
        return f"{'F' if self.forward else 'B'}{self.micro_batch}"


#: ``(stages, stage, micro_batches) -> passes``, in their order.
Schedule = Callable[[int, int, int], list[Pass]]


def gpipe(stages: int, stage: int, micro_batches: int) -> list[Pass]:
    """Return all forward passes, then all backward passes.

    >>> " ".join(map(str, gpipe(2, 0, 3)))
    'F0 F1 F2 B0 B1 B2'
    """
    return [Pass(forward, i) for forward in (True, False) for i in range(micro_batches)]


def one_forward_one_backward(stages: int, stage: int, micro_batches: int) -> list[Pass]:
    """Return as many forward passes as the stages that follow need, then backward and forward by turns.

    >>> " ".join(map(str, one_forward_one_backward(2, 0, 3)))
    'F0 F1 B0 F2 B1 B2'
    >>> " ".join(map(str, one_forward_one_backward(2, 1, 3)))
    'F0 B0 F1 B1 F2 B2'
    """
    ahead = min(stages - 1 - stage, micro_batches)
    passes = [Pass(True, i) for i in range(ahead)]
    for i in range(micro_batches - ahead):
        passes += [Pass(True, ahead + i), Pass(False, i)]
    return passes + [Pass(False, i) for i in range(micro_batches - ahead, micro_batches)]


SCHEDULES: dict[str, Schedule] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def schedule_named(name: str) -> Schedule:
    """Return one of :data:`SCHEDULES`.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule={name!r} is not known; choose one of {', '.join(map(repr, SCHEDULES))}")
    return SCHEDULES[name]


def bubble_fraction(stages: int, micro_batches: int) -> float:
    """Return the part of a step in which a stage is idle, if all passes of a kind take equally long.

    (stages - 1) / (micro_batches + stages - 1), in both schedules (Huang et al. 2019; Narayanan et al. 2021).

    >>> bubble_fraction(2, 7)
    0.125
    """
    return (stages - 1) / (micro_batches + stages - 1)


def most_held(passes: list[Pass]) -> int:
    """Return of how many micro-batches a stage holds the activations at most.

    >>> most_held(gpipe(2, 0, 5)), most_held(one_forward_one_backward(2, 0, 5))
    (5, 2)
    """
    held = most = 0
    for one in passes:
        held += 1 if one.forward else -1
        most = max(most, held)
    return most


class Span(NamedTuple):
    """When a pass began and ended."""

    what: Pass
    begin: float
    end: float


def timeline(
    schedule: Schedule, stages: int, micro_batches: int, forward: float = 1.0, backward: float = 2.0
) -> list[list[Span]]:
    """Return when each stage does its passes, if nothing but computing takes time.

    Args:
        schedule: of :data:`SCHEDULES`.
        stages, micro_batches: how many there are.
        forward, backward: seconds of a pass, alike on all stages.

    Raises:
        ValueError: stages wait for each other for ever.

    >>> one, two = timeline(gpipe, 2, 1)
    >>> [f"{span.what} {span.begin:g} {span.end:g}" for span in one + two]
    ['F0 0 1', 'B0 4 6', 'F0 1 2', 'B0 2 4']
    """
    todo = [schedule(stages, stage, micro_batches) for stage in range(stages)]
    done: list[list[Span]] = [[] for _ in range(stages)]
    ends: dict[tuple[int, Pass], float] = {}
    while any(len(d) < len(t) for d, t in zip(done, todo, strict=True)):
        moved = False
        for stage in range(stages):
            while len(done[stage]) < len(todo[stage]):
                what = todo[stage][len(done[stage])]
                at = stage + (-1 if what.forward else 1)
                first = (
                    ends.get((at, what))
                    if 0 <= at < stages
                    else (0.0 if what.forward else ends.get((stage, Pass(True, what.micro_batch))))
                )
                if first is None:
                    break
                begin = max(first, done[stage][-1].end if done[stage] else 0.0)
                done[stage].append(Span(what, begin, begin + (forward if what.forward else backward)))
                ends[stage, what] = done[stage][-1].end
                moved = True
        if not moved:
            raise ValueError("the stages of this schedule wait for each other")
    return done
