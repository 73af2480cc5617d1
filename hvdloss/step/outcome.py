"""What becomes of an update, once a step's ledgers and gradients are known."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from hvdloss.errors import HvdlossError
from hvdloss.losses.ledger import Ledgers, check_step

__all__ = ["Action", "Outcome", "outcome_of"]


class Action(enum.Enum):
    """What an update does."""

    UPDATE = "updates"
    SKIP = "skips, on all ranks, what is not finite"
    RAISE = "raises, on all ranks"
    SKIP_LOCAL = "skips, on this rank, a local step that is not finite"
    EMPTY = "has nothing to update with on this rank, in a local step"


@dataclass(frozen=True)
class Outcome:
    """What becomes of an update.

    Attributes:
        action: what it does.
        error: what it raises, for ``Action.RAISE``.
    """

    action: Action = Action.UPDATE
    error: HvdlossError | None = None

    def updates(self, scaler: bool = False) -> bool:
        """Return whether the wrapped optimizer is called.

        `scaler`: whether a GradScaler tells that optimizer itself what is not finite.
        """
        return self.action is Action.UPDATE or (scaler and self.action is not Action.EMPTY)


def outcome_of(ledgers: Ledgers, step: int, policy: str, exceeds: Callable[[], bool]) -> Outcome:
    """Return what becomes of a sound step's update, equal on all ranks.

    Args:
        ledgers: of all ranks, without a fault but what `policy` lets pass.
        step: its number, for the message.
        policy: what to do about what is not finite (:data:`hvdloss.losses.ledger.NONFINITE_MODES`).
        exceeds: whether a reduced gradient is not finite; asked only if a rank's own was not, or was too
            large to be summed surely: the sum may be finite.
    """
    losses = ledgers.total("nonfinite_losses")
    if policy == "drop" or not (losses or ledgers.total("nonfinite_gradients")):
        return Outcome()
    if not losses and not exceeds():
        return Outcome()
    if policy == "skip":
        return Outcome(Action.SKIP)
    error = check_step(ledgers, step)
    return Outcome() if error is None else Outcome(Action.RAISE, error)
