"""What finished steps came to: counts, the last report, and who is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hvdloss.losses.ledger import Ledgers, nonfinite_ranks
from hvdloss.step.report import Interest, LossReport, StepReport
from hvdloss.terms.controller import Controller, parse_counts

__all__ = ["StepLog"]


class StepLog:
    """What finished steps came to.

    Args:
        controller: of the objective's terms.
        reduction: of the objective.
        nonfinite: its policy.
        choices: how gradients travel, for the report.

    Attributes:
        steps: finished steps, with local ones.
        samples: elements of all steps, with those before the checkpoint that training resumed from.
        skipped: steps that were not updated with.
        ledgers: of the last exchange; None before the first.
        step: the number of the step that they are of.
        losses: of the last step, of several objectives by name.
        interest: in what single ranks did.
    """

    def __init__(
        self, controller: Controller, reduction: str, nonfinite: str, choices: Callable[[], dict[str, Any]]
    ) -> None:
        self._controller, self._reduction, self._nonfinite = controller, reduction, nonfinite
        self._choices = choices
        self.steps = self.samples = self.skipped = 0
        self.ledgers: Ledgers | None = None
        self.losses: Mapping[str, LossReport] = {}
        self.interest = Interest()
        self._dropped: np.ndarray = np.zeros(0, dtype=np.int64)  # steps, by rank
        self.step = 0
        self._listeners: list[Callable[[StepReport], None]] = []
        self._pending = False  # whether listeners are to be told of it

    # -- steps ------------------------------------------------------------------------------------

    def keep(self, ledgers: Ledgers, step: int) -> None:
        """Keep what a finished step came to."""
        self.ledgers, self.step, self._pending = ledgers, step, True
        self.samples += ledgers.elements

    def count_dropped(self, ledgers: Ledgers) -> None:
        """Count the ranks that add nothing to a step (``nonfinite="drop"``)."""
        before = self._dropped if len(self._dropped) == len(ledgers) else np.zeros(len(ledgers), np.int64)
        self._dropped = before.copy()  # earlier reports have the one before
        self._dropped[nonfinite_ranks(ledgers)] += 1

    def undo(self) -> None:
        """Take back a step whose update raises."""
        self.steps -= 1
        self.samples -= 0 if self.ledgers is None else self.ledgers.elements
        self._pending = False

    def report(self) -> StepReport | None:
        """Return the report of the last exchange; None before the first."""
        if self.ledgers is None:
            return None
        return StepReport.of(
            self.step,
            self.ledgers,
            self._reduction,
            self._choices(),
            self._controller.reports(),
            nonfinite=self._nonfinite,
            skipped=self.skipped,
            dropped=self._dropped.tolist(),
            samples=self.samples,
            interest=self.interest,
            losses=self.losses,
        )

    # -- listeners --------------------------------------------------------------------------------

    @property
    def is_read(self) -> bool:
        """Whether somebody on this rank reads what single ranks did."""
        return bool(self._listeners) or self.interest.on

    def add_listener(self, listener: Callable[[StepReport], None]) -> None:
        """Have `listener` called with the report of every step that begins from now on."""
        if not self._listeners:
            self._pending = False
        self._listeners.append(listener)

    def remove_listener(self, listener: Callable[[StepReport], None]) -> None:
        """Call `listener` no more."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def notify(self) -> None:
        """Tell the listeners of the last step, once."""
        if not (self._listeners and self._pending):
            return
        self._pending = False
        report = self.report()
        # One that began to listen in the middle of a step is told from the next one on.
        if report is not None and report.ranks.gathered:
            for listener in list(self._listeners):
                listener(report)

    # -- going on ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on needs, equal on all ranks."""
        return {"steps": self.steps, "samples": self.samples, "terms": self._controller.state_dict()}

    def load_state_dict(self, state: Any, *, same_ranks: bool) -> None:
        """Go on from a :meth:`state_dict`; no collective.

        Raises:
            ConfigError: it is none.
        """
        counts = parse_counts(state, "is not of a DistributedOptimizer")
        self._controller.load_state_dict(state["terms"], same_ranks=same_ranks)
        self.steps, self.samples = counts
