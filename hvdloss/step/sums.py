"""What the backward passes of a step add up to on one rank."""

from __future__ import annotations

from typing import Any

__all__ = ["PassSums"]


class PassSums:
    """What the backward passes of a step add up to on one rank.

    Works on numbers, and on tensors of any framework that add and multiply as numbers do.

    Attributes:
        row: the sum of the passes' ledger rows; None before one went through the objective.
        scale: the sum of what their gradients were multiplied with.
        factors: of each, what its elements weigh, and what its loss was multiplied with.
        divisions: of each, what arrived at its loss, and what GradScalers multiply with.
        untracked: passes that reached parameters, but not through one call of the objective.
        bypassed: whether a pass went through the objective, but reached no parameter.
        dropped: what was found in the gradients of a rank that adds nothing for their sake; None otherwise.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin a step."""
        self.row: Any = None
        self.scale: Any = 0.0
        self.factors: list[tuple[Any, Any]] = []
        self.divisions: list[tuple[Any, Any]] = []
        self.untracked = 0
        self.bypassed = False
        self.dropped: float | None = None

    def add(self, row: Any, scale: Any, factor: tuple[Any, Any], division: tuple[Any, Any] | None) -> None:
        """Add a pass through the objective."""
        self.row = row if self.row is None else self.row + row
        self.scale = self.scale + scale
        self.factors.append(factor)
        if division is not None:
            self.divisions.append(division)

    def drop(self, row: Any, found: float) -> None:
        """Have this rank add nothing to the step; `row` tells why."""
        self.row, self.scale, self.dropped = row, 0.0, found
