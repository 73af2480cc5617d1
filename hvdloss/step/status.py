"""What a rank tells the others of itself in each step, and what it hears."""

from __future__ import annotations

from collections.abc import Callable

from hvdloss.losses.ledger import Ledgers

__all__ = ["RankStatus"]


class RankStatus:
    """What a rank tells the others of itself in each step, and what it hears.

    Attributes:
        has_next: whether this rank has more data after this step.
        error: why this rank cannot go on; None while it can.
        preemption_requested: asked whether this rank is to leave.
        sync_status: how many exchanges of ledgers there were, and whether a rank had more by the last.
        preempted_ranks: the ranks that are to leave, as all know.
    """

    def __init__(self) -> None:
        self.preemption_requested: Callable[[], bool] = lambda: False
        self.reset()

    def reset(self) -> None:
        """Forget what was of other ranks."""
        self.has_next = False
        self.error: BaseException | None = None
        self.sync_status = (0, False)
        self.preempted_ranks: tuple[int, ...] = ()

    def update(self, ledgers: Ledgers) -> None:
        """Take note of what all ranks tell."""
        self.sync_status = (self.sync_status[0] + 1, bool(ledgers.total("has_next")))
        self.preempted_ranks = tuple(ledgers.ranks_with("preemption_requested"))
