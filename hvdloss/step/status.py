"""What a rank tells the others of itself in each step, and what it hears."""

from __future__ import annotations

from collections.abc import Callable

from hvdloss.ledger import Ledgers

__all__ = ["RankStatus"]


class RankStatus:
    """What a rank tells the others of itself in each step, and what it hears.

    Attributes:
        more: whether this rank has more data after this step.
        error: why this rank cannot go on; None while it can.
        leaving: asked whether this rank is to leave.
        heard: how many exchanges of ledgers there were, and whether a rank had more by the last.
        wished: the ranks that are to leave, as all know.
    """

    def __init__(self) -> None:
        self.leaving: Callable[[], bool] = lambda: False
        self.reset()

    def reset(self) -> None:
        """Forget what was of other ranks."""
        self.more = False
        self.error: BaseException | None = None
        self.heard = (0, False)
        self.wished: tuple[int, ...] = ()

    def hear(self, ledgers: Ledgers) -> None:
        """Take note of what all ranks tell."""
        self.heard = (self.heard[0] + 1, bool(ledgers.total("more")))
        self.wished = tuple(ledgers.where("leaving"))
