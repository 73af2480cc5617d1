"""C(k): the seconds each rank is held up by communication, and a model of the link they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.communicator import Communicator
from hvdloss.term import Act, Closed, Term, Travel, check_price
from hvdloss.terms.link import LinkModel, calibrate

__all__ = ["CommunicationCost"]

Array = npt.NDArray[np.float64]


class CommunicationCost(Term):
    """C(k): exposed communication, in seconds per rank and step.

    *Exposed* is the time a rank was held up, from the moment its gradients were complete until those of
    all ranks were there; what overlapped computation costs nothing. The rank that was last waited for
    nobody: what it was exposed to is the time it takes to *move* the bytes, and what others were exposed
    to beyond that is *waiting* for slower ranks. No clocks are compared across machines.

    The values in a step's report are those of the step before, since a step's costs are known when it is
    over; after local steps (:class:`hvdloss.control.SyncPeriod`) they cover the whole stretch.

    Args:
        price: of one exposed second, in units of the loss.
        acts: :class:`hvdloss.control.BatchShares`, :class:`hvdloss.control.SyncPeriod`,
            :class:`hvdloss.control.AdaptiveCompression`.
        calibrate: fit the link before the first step with a few all-reduces of growing size (about half
            a second); afterwards each exchange of parameters refines the fit. Without it predictions
            start once two different sizes have been exchanged.

    Attributes:
        link: the fitted :class:`hvdloss.terms.link.LinkModel`, equal on all ranks.

    Collectives: none per step. `calibrate`: some blocking all-reduces and one gather, once.
    """

    name = "communication"
    unit = "s"
    remembers_of_ranks = (
        *("link", "exposed", "waiting", "moving", "computation", "steps", "travel", "spread"),
        *("_before", "_moved"),
    )

    def __init__(
        self, price: float = 0.0, *, acts: Sequence[Act] = (), calibrate: bool | None = None
    ) -> None:
        self.price = check_price(price, "CommunicationCost")
        self.acts = tuple(acts)
        # Those who decide by the link need it from the start.
        needed = any(getattr(act, "needs_link", False) for act in acts)
        self.calibrates = needed if calibrate is None else bool(calibrate)
        self.begin(0, 1)

    def begin(self, rank: int, size: int) -> None:
        """Start afresh with these ranks."""
        self.link = LinkModel(size)
        self._before = Travel()
        self.exposed = np.zeros(size)
        self.waiting = np.zeros(size)
        self.moving = 0.0
        self.computation = np.zeros(size)
        self.steps = 1
        self.travel = Travel()
        self.spread = math.nan
        self._moved = (math.nan, 0.0)

    def prepare(self, communicator: Communicator) -> None:
        """Fit the link, if asked to."""
        if self.calibrates and communicator.size > 1 and self.link.fit() is None:
            calibrate(communicator, self.link)

    def prepared(self) -> Any:
        """Return the link's state if it was fitted."""
        return self.link.state() if self.calibrates else None

    def restore_prepared(self, state: Any) -> None:
        """Take over another run's link."""
        self.link = LinkModel.restore(state)

    def close(self, step: Closed) -> Array:
        """Return each rank's exposed seconds in the step before."""
        self.exposed = np.array(step.column("communication"))
        self.computation = np.array(step.column("computation"))
        self.moving = float(self.exposed.min())
        self.waiting = self.exposed - self.moving
        # How the seconds in this table came about: their exchange was the one before this.
        self.travel, self._before = self._before, step.travel
        self.steps = self.travel.steps
        self.spread = self._spread(step)
        if self.travel.parameters and self.moving > 0 and self.travel.bytes:
            self.link.add(self.moving, self.travel.bytes, self.travel.messages)
        return self.exposed

    def _spread(self, step: Closed) -> float:
        """Return how far ranks moved apart: the variance of their moves over the square of the mean one.

        Of the exchange before this one, whose mean move is known now. Lengths may differ in their last
        bits between machines: rank 0's counts, on all ranks.
        """
        moved, self._moved = self._moved, (math.nan, 0.0)
        if step.travel.parameters:
            self._moved = float(step.column("moved").sum()), float(step.column("denominator").sum())
        together = float(step.column("together")[0])
        if not moved[0] >= 0 or not moved[1] > 0 or not together > 0:
            return math.nan
        return max(0.0, moved[0] / (moved[1] * together) - 1.0)

    def details(self) -> dict[str, Any]:
        """Return waiting and moving apart, bytes and messages, and the fit."""
        fit = self.link.fit()
        return {
            "waiting": self.waiting.tolist(),
            "moving": self.moving,
            "bytes": self.travel.bytes,
            "messages": self.travel.messages,
            "steps": self.travel.steps,
            "alpha": None if fit is None else fit.alpha,
            "alpha_std": None if fit is None else fit.alpha_std,
            "beta": None if fit is None else fit.beta,
            "beta_std": None if fit is None else fit.beta_std,
        }

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks."""
        return {**super().settings(), "calibrate": self.calibrates}
