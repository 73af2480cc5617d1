"""One optimizer step: all that it is but tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdloss.comm.agreement import raise_on_all_ranks
from hvdloss.comm.communicator import Communicator
from hvdloss.errors import HvdlossError, NoWeightError, UsageError
from hvdloss.losses.ledger import Ledger, Ledgers, check_step, common_factor
from hvdloss.losses.passes import bypassed_error, division_error
from hvdloss.step.log import StepLog
from hvdloss.step.outcome import Action, Outcome, outcome_of
from hvdloss.step.phase import StepPhase
from hvdloss.step.scale import WeightScale
from hvdloss.step.status import RankStatus
from hvdloss.step.sums import PassSums
from hvdloss.step.timer import CommTimer
from hvdloss.terms.controller import Controller

__all__ = ["StepState"]


class StepState:
    """One optimizer step, and what lasts from one to the next.

    Args:
        name: of the optimizer, on the wire.
        controller: of the objective's terms.
        reduction: of the objective.
        nonfinite: its policy.
        passes: the most backward passes that a step has.
        choices: how gradients travel, for the report.

    Attributes:
        phase: where the step is.
        sums: what its backward passes add up to on this rank.
        scale: what weights are measured in.
        factor: what all ranks' losses were last multiplied with.
        timer: how long this rank computes, and is held up.
        status: what it tells others of itself, and hears.
        log: what finished steps came to.
        outcome: of the update to come.
        refusal: what the user's loop did in this step that is not exact; None where it is.
    """

    def __init__(
        self,
        name: str,
        controller: Controller,
        reduction: str,
        nonfinite: str,
        passes: int,
        choices: Callable[[], dict[str, Any]],
    ) -> None:
        self.name, self.reduction, self.nonfinite = name, reduction, nonfinite
        self.phase = StepPhase(passes)
        self.sums = PassSums()
        self.scale = WeightScale(fixed=reduction == "sum")
        self.timer = CommTimer()
        self.status = RankStatus()
        self.log = StepLog(controller, reduction, nonfinite, choices)
        self.reset()

    def reset(self) -> None:
        """Reset what belongs to the ranks there were."""
        self.phase.abort()
        self.scale.reset()
        self.timer.reset()
        self.status.reset()
        self.factor = 1.0
        self.outcome = Outcome()
        self._held: HvdlossError | None = None
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self.sums.clear()
        self.refusal: HvdlossError | None = None

    def refuse(self, error: HvdlossError | None) -> None:
        """Have all ranks raise this in the next exchange, if it is the first; None for nothing."""
        self.refusal = self.refusal or error

    def hold(self, error: HvdlossError) -> None:
        """Keep an error that came at the end of a backward pass for whatever asks for the step's gradient."""
        self._held = error

    def raise_held(self) -> None:
        """Raise what was held, once."""
        held, self._held = self._held, None
        try:
            if held is not None:
                raise held
        finally:
            del held  # or its traceback would keep itself, and the optimizer

    @property
    def drops(self) -> bool:
        """Whether a rank whose gradients are not finite adds nothing, so that it must look at all first."""
        return self.nonfinite == "drop"

    @property
    def failure(self) -> BaseException | None:
        """Why this rank cannot go on, or what its loop did that is not exact."""
        return self.status.error or self.refusal

    def ledger(self, **known: float) -> Ledger:
        """Return what this rank tells in the next exchange that is no tensor's, and what else is `known`."""
        return Ledger(
            failed=float(self.failure is not None),
            communication=self.timer.comm_s,
            computation=self.timer.compute_s,
            has_next=float(self.status.has_next),
            preemption_requested=float(self.status.preemption_requested()),
            rows_requested=float(self.log.is_read),
            **known,
        )

    def check(self, ledgers: Ledgers, step: int, communicator: Communicator, *, gradients: bool) -> None:
        """Take note of all ranks' ledgers; raise, on every rank alike, what they show to be wrong.

        Args:
            ledgers: of the step, with rows where something is wrong.
            step: its number, for the message.
            communicator: of the ranks.
            gradients: whether a gradient that is not finite is wrong already.

        Collectives: one gather, where a rank cannot go on.
        """
        self.status.update(ledgers)
        if ledgers.total("failed"):
            mine = self.failure
            if mine is None and ledgers[communicator.rank].failed:
                mine = division_error(self.phase.done, self.phase.passes)
            raise_on_all_ranks(communicator, mine, f"{self.name}.failed", f"step {step}")
        error = check_step(ledgers, step, self.nonfinite, gradients=gradients)
        if isinstance(error, NoWeightError) and self.sums.bypassed:
            error = bypassed_error(step)
        if error is not None:
            raise error
        if self.drops:
            self.log.count_dropped(ledgers)

    def conclude(self, ledgers: Ledgers, exceeds: Callable[[], bool]) -> bool:
        """Decide what becomes of the update; return whether terms see the step. See :func:`outcome_of`."""
        self.outcome = outcome_of(ledgers, self.log.steps + 1, self.nonfinite, exceeds)
        return self.outcome.action is Action.UPDATE

    def measure(self, ledgers: Ledgers, half: bool, predivide: float) -> float:
        """Measure weights in this step's total from now on; see :meth:`WeightScale.update`.

        `half`: whether any gradient travels as float16.
        """
        return self.scale.update(ledgers.total("denominator"), len(ledgers) if half else None, predivide)

    def agree_on_factor(self, ledgers: Ledgers) -> None:
        """Take note of what all ranks multiplied their losses with."""
        self.factor = common_factor(ledgers, self.factor)

    def take_outcome(self, changed: Callable[[], UsageError | None]) -> Outcome:
        """Return what becomes of the update, once.

        Args:
            changed: gives the error of gradients that were changed on this rank and not on all. All ranks
                hear of it in the next exchange.

        Raises:
            UsageError: that one.
        """
        outcome, self.outcome = self.outcome, Outcome()
        if (error := changed()) is not None:
            self.status.error = error
            raise error
        return outcome

    def refuse_skip(self) -> None:
        """Have a step that would be skipped raise: too late to have changed nothing."""
        if self.outcome.action is Action.SKIP and self.log.ledgers is not None:
            self.outcome = Outcome(Action.RAISE, check_step(self.log.ledgers, self.log.step))
