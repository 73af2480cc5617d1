"""Where an optimizer step is, and what may happen then."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NoReturn

from hvdloss.errors import ConfigError, UsageError

__all__ = ["TRANSITIONS", "Event", "Phase", "StepPhase"]


class Phase(enum.Enum):
    """Where a step is."""

    GATHERING = "backward passes add gradients"
    BACKWARD = "a backward pass is under way"
    OVERLAPPING = "a backward pass is under way, and so are reductions"
    REDUCING = "reductions are under way"
    SYNCHRONIZED = ".grad holds the gradient of all ranks' elements"
    RETIRED = "another optimizer has the parameters"


class Event(enum.Enum):
    """What happens to a step."""

    BEGIN_PASS = "a backward pass begins"
    END_PASS = "it ends"
    MISS_PASS = "it ends, and came to no parameter"
    LAUNCH = "a reduction starts"
    FINISH = "all gradients are reduced"
    UPDATE = "the optimizer updates"
    CLEAR = "the gradients are dropped"
    RETIRE = "another optimizer takes the parameters"


#: The phase that follows; what is missing is refused.
TRANSITIONS: Mapping[tuple[Phase, Event], Phase] = {
    (Phase.GATHERING, Event.BEGIN_PASS): Phase.BACKWARD,
    (Phase.GATHERING, Event.LAUNCH): Phase.REDUCING,
    (Phase.GATHERING, Event.FINISH): Phase.SYNCHRONIZED,  # with nothing to reduce: local steps
    (Phase.GATHERING, Event.CLEAR): Phase.GATHERING,
    (Phase.BACKWARD, Event.END_PASS): Phase.GATHERING,
    (Phase.BACKWARD, Event.MISS_PASS): Phase.GATHERING,
    (Phase.BACKWARD, Event.LAUNCH): Phase.OVERLAPPING,
    (Phase.BACKWARD, Event.CLEAR): Phase.GATHERING,  # the pass ended in an exception
    (Phase.OVERLAPPING, Event.LAUNCH): Phase.OVERLAPPING,
    (Phase.OVERLAPPING, Event.END_PASS): Phase.REDUCING,
    (Phase.REDUCING, Event.LAUNCH): Phase.REDUCING,
    (Phase.REDUCING, Event.FINISH): Phase.SYNCHRONIZED,
    (Phase.SYNCHRONIZED, Event.BEGIN_PASS): Phase.BACKWARD,
    (Phase.SYNCHRONIZED, Event.FINISH): Phase.SYNCHRONIZED,
    (Phase.SYNCHRONIZED, Event.UPDATE): Phase.GATHERING,
    (Phase.SYNCHRONIZED, Event.CLEAR): Phase.GATHERING,
    (Phase.RETIRED, Event.CLEAR): Phase.RETIRED,
    **{(phase, Event.RETIRE): Phase.RETIRED for phase in Phase},
}


class StepPhase:
    """The phase of one optimizer's step, and how many backward passes it has had.

    Args:
        passes: the most backward passes that a step has.

    Attributes:
        now: the phase.
        done: backward passes that came to parameters, in this step.

    Raises:
        ConfigError: a number that cannot be.
    """

    def __init__(self, passes: int) -> None:
        self.passes = passes
        self.now = Phase.GATHERING
        self.done = 0

    @property
    def passes(self) -> int:
        """The most backward passes that a step has."""
        return self._passes

    @passes.setter
    def passes(self, passes: int) -> None:
        if not isinstance(passes, int) or passes < 1:
            raise ConfigError(f"backward_passes_per_step={passes!r} must be an integer of at least 1")
        self._passes = passes

    @property
    def launched(self) -> bool:
        """Whether reductions of this step are under way."""
        return self.now in (Phase.OVERLAPPING, Phase.REDUCING)

    @property
    def synchronized(self) -> bool:
        """Whether ``.grad`` holds the gradient of all ranks' elements."""
        return self.now is Phase.SYNCHRONIZED

    @property
    def is_last(self) -> bool:
        """Whether the backward pass that is under way is the step's last."""
        return self.done + 1 == self.passes

    @property
    def complete(self) -> bool:
        """Whether the step has had all its backward passes."""
        return self.done == self.passes

    def to(self, event: Event) -> None:
        """Go on to the phase that follows; a step that was cleared or finished has had no passes.

        Raises:
            UsageError: this cannot happen now.
        """
        following = TRANSITIONS.get((self.now, event))
        if following is None:
            self.refuse(event)
        self.now = following
        if event is Event.END_PASS:
            self.done += 1
        elif event in (Event.FINISH, Event.UPDATE, Event.CLEAR):
            self.done = 0

    def abort(self) -> None:
        """Drop the step, wherever it is."""
        if self.now is not Phase.RETIRED:
            self.now = Phase.GATHERING
        self.done = 0

    def check_pass(self, uncleared: bool, counted: bool) -> None:
        """Check that a backward pass may begin.

        Args:
            uncleared: whether gradients of a finished step are there that no update has used.
            counted: whether a pass of this step went through the objective.

        Raises:
            UsageError: the step has had its passes, or was not updated with.
        """
        if self.launched or (self.synchronized and uncleared) or (self.done >= self.passes and counted):
            raise too_many_passes_error(self.passes)

    def refuse(self, event: Event) -> NoReturn:
        """Raise the error of what cannot happen now."""
        raise self._refusal(event)

    def _refusal(self, event: Event) -> UsageError:
        if self.now is Phase.RETIRED:
            return UsageError(
                "this DistributedOptimizer is out of use: a newer one was made for the same objective and "
                "parameters; call step() of that one"
            )
        if event is Event.UPDATE:
            return UsageError(
                "step() inside skip_synchronize() without optimizer.synchronize() before it: the "
                "gradients of the ranks have not been reduced"
            )
        if event is Event.CLEAR:
            return UsageError(
                "optimizer.zero_grad() after loss.backward() and before optimizer.step(): the gradients "
                "are under way between ranks. To drop a step on all ranks call optimizer.synchronize() "
                "first; to skip one sample give it the weight 0. (If it was the backward pass of another "
                "network's loss, as in a GAN: give each optimizer an objective of its own.)"
            )
        return UsageError(f"{event.value}, but {self.now.value}")


def too_many_passes_error(passes: int) -> UsageError:
    """Return the error of a backward pass after the last one of a step."""
    return UsageError(
        f"a backward pass began although the step has had its backward_passes_per_step={passes}, and "
        f"optimizer.step() was not called. Pass as backward_passes_per_step the largest number of "
        f"micro-batches that any rank has in a step; others may have fewer. (Or passes were left over, from "
        f"the end of an epoch without a step(): call optimizer.zero_grad() before the next; or two "
        f"optimizers share one objective, as in a GAN: give each its own.)"
    )
