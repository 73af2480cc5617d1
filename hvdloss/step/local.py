"""What a rank saw in its local steps, between two exchanges of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from hvdloss.losses.ledger import FAULT_COLUMNS
from hvdloss.losses.reduction import TENSOR_FIELDS
from hvdloss.step.outcome import Action, Outcome

__all__ = ["LocalSums", "local_outcome"]


def local_outcome(row: Sequence[float], untracked: int, nonfinite: bool, drops: bool) -> Outcome:
    """Return what becomes of the update of a local step; of what was wrong the exchange tells all ranks.

    Args:
        row: what the step's backward passes told, as in a ledger; empty without any.
        untracked: backward passes that did not go through one call of the objective.
        nonfinite: whether a gradient is NaN or infinite.
        drops: whether such a rank adds nothing to a step.
    """
    sound = bool(row) and not untracked and row[1] > 0 and not any(row[FAULT_COLUMNS.start : TENSOR_FIELDS])
    if not sound or (nonfinite and drops):
        return Outcome(Action.EMPTY)
    return Outcome(Action.SKIP_LOCAL if nonfinite else Action.UPDATE)  # a GradScaler may be about to see it


class LocalSums:
    """What a rank saw in its local steps since parameters were equal on all ranks.

    Attributes:
        steps: how many it took.
        row: the sum of their ledger rows, a tensor or array; None without any.
        untracked: backward passes that did not go through one call of the objective.
        nonfinite: steps with a gradient that was not finite.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin at an exchange of parameters."""
        self.steps = self.untracked = self.nonfinite = 0
        self.row: Any = None

    def add(self, row: Any, untracked: int, nonfinite: bool) -> None:
        """Add a step."""
        self.steps += 1
        self.untracked += untracked
        self.nonfinite += nonfinite
        if row is not None:
            self.row = row if self.row is None else self.row + row

    def weigh(self, length: float, is_sum: bool, zeroed: Callable[[Any], Any]) -> tuple[float, float]:
        """Return what this rank's move weighs, and its squared length times that.

        Args:
            length: squared length of the move. Where it is not finite, steps of finite gradients went too
                far: the rank adds nothing, and tells so.
            is_sum: whether the reduction is a sum, where ranks with any weight weigh the same.
            zeroed: gives the row that adds nothing, and tells the same faults.
        """
        weight = 0.0 if self.row is None else float(self.row[1])
        if not math.isfinite(length):
            self.nonfinite += 1
            weight = length = 0.0
            if self.row is not None:
                self.row = zeroed(self.row)
        if is_sum:
            weight = float(weight > 0)
        return weight, weight * length
