"""What the weights of a step are measured in."""

from __future__ import annotations

from typing import Any

__all__ = ["WeightScale"]


class WeightScale:
    """What the weights of a step are measured in: the total weight of the step before.

    Equal on all ranks, as ledgers are, and of no effect but on rounding. When a step weighs as much as the
    one before, its gradients arrive already divided, which saves a pass over them; and scaled gradients are
    never far from their own size, so that float16 can carry them.

    Args:
        fixed: whether it stays 1: sums are not divided by weights.
    """

    def __init__(self, fixed: bool = False) -> None:
        self._fixed = fixed
        self.reset()

    def reset(self) -> None:
        """Measure in units of 1, as before the first step."""
        self._value = 1.0

    def relative(self, weight: Any) -> Any:
        """Return a weight in this unit; a number, or a tensor."""
        return weight if self._fixed else weight / self._value

    def denominator(self, total: float) -> float:
        """Return what to divide summed gradients by, where all ranks weigh `total`."""
        return 1.0 if self._fixed else total / self._value

    def update(self, total: float, ranks: int | None = None, predivide: float = 1.0) -> float:
        """Measure in units of a step's total weight from now on.

        Args:
            total: the weight of all ranks.
            ranks: where gradients travel as float16: how many share it, as the mean weight per rank is the
                measure then; None otherwise.
            predivide: a factor on that (``gradient_predivide_factor``).

        Returns:
            What scaled gradients are to be multiplied with to be in the new unit.
        """
        if self._fixed:
            return 1.0
        before = self._value
        self._value = total if ranks is None else total * predivide / ranks
        return before / self._value
