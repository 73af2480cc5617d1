"""C(k): the seconds each rank is held up by communication, and a model of the link they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.comm.communicator import Communicator
from hvdloss.terms.link import LinkModel, calibrate
from hvdloss.terms.term import CommStats, Policy, StepStats, Term, check_price

__all__ = ["CommunicationCost"]

Array = npt.NDArray[np.float64]


class CommunicationCost(Term):
    """C(k): exposed communication, in seconds per rank and step.

    *Exposed* is the time a rank was blocked, from the moment its gradients were complete until those of
    all ranks had been summed; what overlapped computation costs nothing. The last rank did not wait:
    its exposed time is what *moving* the bytes takes, and what other ranks have above it is *waiting* for
    slower ranks. No clocks are compared across machines.

    The values in a step's report are those of the step before, since a step's costs are known when it is
    over; after local steps (:class:`hvdloss.terms.policies.SyncPeriod`) they cover all of them.

    Args:
        price: of one exposed second, in units of the loss.
        policies: :class:`hvdloss.terms.policies.BatchShares`, :class:`hvdloss.terms.policies.SyncPeriod`,
            :class:`hvdloss.terms.policies.AdaptiveCompression`.
        calibrate: fit the link before the first step with a few all-reduces of growing size (about half
            a second); afterwards each exchange of parameters refines the fit. Without it predictions
            start once two different sizes have been exchanged. The default is to calibrate if a policy
            needs the link.

    Attributes:
        link: the fitted :class:`hvdloss.terms.link.LinkModel`, equal on all ranks.

    Collectives: none per step. `calibrate`: some blocking all-reduces and one gather, once.
    """

    name = "communication"
    unit = "s"
    per_rank_state_attrs = (
        *("link", "exposed", "waiting", "moving", "computation", "steps", "comm_stats", "drift"),
        *("_before", "_moved"),
    )

    def __init__(
        self, price: float = 0.0, *, policies: Sequence[Policy] = (), calibrate: bool | None = None
    ) -> None:
        self.price = check_price(price, "CommunicationCost")
        self.policies = tuple(policies)
        # Policies that decide by the link need it from the start.
        needed = any(getattr(policy, "needs_link", False) for policy in policies)
        self.calibrates = needed if calibrate is None else bool(calibrate)
        self.reset(0, 1)

    def reset(self, rank: int, size: int) -> None:
        """Start over with these ranks."""
        self.link = LinkModel(size)
        self._before = CommStats()
        self.exposed = np.zeros(size)
        self.waiting = np.zeros(size)
        self.moving = 0.0
        self.computation = np.zeros(size)
        self.steps = 1
        self.comm_stats = CommStats()
        self.drift = math.nan
        self._moved = (math.nan, 0.0)

    def prepare(self, communicator: Communicator) -> None:
        """Fit the link, if asked to."""
        if self.calibrates and communicator.size > 1 and self.link.fit() is None:
            calibrate(communicator, self.link)

    def prepared_state(self) -> Any:
        """Return the link's state if it was fitted."""
        return self.link.state_dict() if self.calibrates else None

    def load_prepared_state(self, state: Any) -> None:
        """Restore the link of another run."""
        self.link = LinkModel.from_state_dict(state)

    def on_step_end(self, step: StepStats) -> Array:
        """Return each rank's exposed seconds in the step before."""
        self.exposed = np.array(step.column("communication"))
        self.computation = np.array(step.column("computation"))
        self.moving = float(self.exposed.min())
        self.waiting = self.exposed - self.moving
        # The seconds in this table were measured in the exchange before this one.
        self.comm_stats, self._before = self._before, step.comm_stats
        self.steps = self.comm_stats.steps
        self.drift = self._relative_drift(step)
        if self.comm_stats.parameters and self.moving > 0 and self.comm_stats.bytes:
            self.link.add(self.moving, self.comm_stats.bytes, self.comm_stats.messages)
        return self.exposed

    def _relative_drift(self, step: StepStats) -> float:
        """Return how far the ranks drifted: the variance of their updates over the squared mean update.

        Of the exchange before this one, whose mean update is known now. Lengths may differ in their last
        bits between machines, so all ranks use rank 0's.
        """
        moved, self._moved = self._moved, (math.nan, 0.0)
        if step.comm_stats.parameters:
            self._moved = float(step.column("drift_sqnorm").sum()), float(step.column("denominator").sum())
        together = float(step.column("mean_update_sqnorm")[0])
        if not moved[0] >= 0 or not moved[1] > 0 or not together > 0:
            return math.nan
        return max(0.0, moved[0] / (moved[1] * together) - 1.0)

    def details(self) -> dict[str, Any]:
        """Return waiting and moving separately, bytes and messages, and the fit."""
        fit = self.link.fit()
        return {
            "waiting": self.waiting.tolist(),
            "moving": self.moving,
            "bytes": self.comm_stats.bytes,
            "messages": self.comm_stats.messages,
            "steps": self.comm_stats.steps,
            "alpha": None if fit is None else fit.alpha,
            "alpha_std": None if fit is None else fit.alpha_std,
            "beta": None if fit is None else fit.beta,
            "beta_std": None if fit is None else fit.beta_std,
        }

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks."""
        return {**super().settings(), "calibrate": self.calibrates}
