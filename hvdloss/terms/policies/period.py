"""The synchronisation period: how many local steps lie between two exchanges of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from hvdloss.errors import ConfigError
from hvdloss.terms.controller import Controller
from hvdloss.terms.term import Decision, Policy, StepStats

__all__ = ["RULES", "OuterStep", "SyncPeriod", "period_of"]

RULES = ("constant", "adacomm", "predicted", "priced")


@dataclass(frozen=True)
class OuterStep:
    """The outer optimizer of local steps: SGD with Nesterov momentum on the mean pseudogradient.

    DiLoCo (Douillard et al. 2023): the outer gradient is the old parameters minus the mean of the ranks'
    new ones. ``OuterStep(lr=1, momentum=0)`` is plain averaging.

    Attributes:
        lr: of the outer step.
        momentum: Nesterov's; 0 for none.
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not (0 < self.lr < math.inf and 0 <= self.momentum < 1):
            raise ConfigError(
                f"OuterStep(lr={self.lr!r}, momentum={self.momentum!r}): lr must be above 0 and finite, "
                f"momentum in [0, 1)"
            )

    def update(self, mean: Any, velocity: Any) -> tuple[Any, Any]:
        """Return the update of the parameters and the new velocity; any arrays of one shape."""
        velocity = velocity * self.momentum + mean
        return (mean + velocity * self.momentum) * self.lr, velocity


class SyncPeriod(Policy):
    """Lets ranks take several local steps between two synchronisations of the parameters (local SGD).

    After `period` optimizer steps with the local gradient, the ranks' parameters are averaged, weighted
    by the weight sum of each rank since the last synchronisation. With a period of 1 gradients are
    all-reduced in every step, and the step is exact.

    Args:
        period: local steps between two exchanges, or a rule: ``"adacomm"`` (Wang and Joshi 2019: the
            period shrinks with the square root of the loss), ``"predicted"`` (the period with the least
            predicted time to a given loss) or ``"priced"`` (the period with the least predicted
            objective: the price of a second's communication against the progress lost to drift).
        initial_period: the period to begin with, for a rule; AdaComm's tau_0.
        max_period: the longest period that may be chosen.
        interval: seconds of training between two decisions, by the ranks' agreed measure; AdaComm's T_0.
        start: synchronise in every step before this one (post-local SGD, Lin et al. 2020).
        outer: an :class:`OuterStep` for DiLoCo, or None for plain averaging.
        target_loss: for ``"predicted"``: the loss whose time is predicted; for ``"adacomm"``: the lowest
            loss, which the paper takes for 0.
        smoothness: learning rate times smoothness of the loss, for the cost of drift: how fast progress
            suffers where ranks diverge. Below 2 where training is stable.

    The cost of drift: with r the mean squared distance of the ranks' updates from their mean, relative to
    the mean update, tau local steps need 1 + (smoothness tau)^2 r / 3 times the steps (the gradient at a
    rank's own parameters is off by smoothness times its distance; the mean of its square over the local
    steps is a third of its last value). r is measured at every synchronisation.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    takes_local_steps = True
    state_attrs = ("_chosen", "_step", "_first_loss", "_clock", "_due", "_drift", "_recent", "_computing")

    def __init__(
        self,
        period: int | str = 16,
        *,
        initial_period: int | None = None,
        max_period: int = 128,
        interval: float = 5.0,
        start: int = 0,
        outer: OuterStep | None = None,
        target_loss: float = 0.0,
        smoothness: float = 0.1,
    ) -> None:
        if isinstance(period, str):
            if period not in RULES[1:]:
                raise ConfigError(
                    f"period={period!r} of SyncPeriod must be an integer or one of {', '.join(RULES[1:])}"
                )
            self.rule = period
            self.initial_period = 8 if initial_period is None else initial_period
        else:
            self.rule = "constant"
            self.initial_period = period
            if initial_period is not None:
                raise ConfigError("initial_period= of SyncPeriod belongs to a rule, not to a constant period")
            max_period = max(max_period, period) if isinstance(period, int) else max_period
        for name, value, low in (
            ("period", self.initial_period, 1),
            ("max_period", max_period, 1),
            ("start", start, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name}={value!r} of SyncPeriod must be an integer of at least {low}")
        for name, number in (("interval", interval), ("smoothness", smoothness)):
            if not 0 < number < math.inf:
                raise ConfigError(f"{name}={number!r} of SyncPeriod must be above 0 and finite")
        if outer is not None and not isinstance(outer, OuterStep):
            raise ConfigError(f"outer={outer!r} of SyncPeriod must be an OuterStep or None")
        self.max_period, self.interval, self.start = max_period, interval, start
        self.outer, self.target_loss, self.smoothness = outer, target_loss, smoothness
        self.needs_link = self.rule in ("predicted", "priced")
        self.reset(0, 1)

    def reset(self, rank: int, size: int) -> None:
        """Start over with these ranks."""
        self.size = size
        self._chosen = min(self.initial_period, self.max_period)
        self._step = 0
        self._first_loss: float | None = None
        self._clock = 0.0
        self._due = self.interval
        self._drift: float | None = None  # r of the docstring, smoothed
        self._recent: list[tuple[int, float]] = []  # (step, loss)
        self._computing: list[float] = []  # seconds per step of the slowest rank

    @property
    def period(self) -> int:
        """Steps from the last synchronisation to the next; 1: gradients are all-reduced in every step."""
        if self.size == 1 or self._step < self.start:
            return 1
        return self._chosen

    def on_step_end(self, term: Any, step: StepStats) -> Sequence[Decision]:
        """Record a synchronisation; choose a new period if one is due."""
        was, before = self.period, self._chosen
        self._step = step.step
        decisions = []
        if was == 1 and self.period > 1:
            decisions.append(
                Decision(step.step, "period", 1, self.period, f"local steps begin after step {self.start}")
            )
        self._clock += float((step.column("computation") + step.column("communication")).max())
        computing = float(step.column("computation").max()) / max(1, getattr(term, "steps", 1))
        if computing > 0:  # 0 until the first step's measurement arrives
            self._computing = [*self._computing[-7:], computing]
        loss = step.loss
        if math.isfinite(loss):
            if self._first_loss is None:
                self._first_loss = loss
            self._recent.append((step.step, loss))
            del self._recent[:-64]
        drift = getattr(term, "drift", None)
        if drift is not None and math.isfinite(drift):
            self._drift = drift if self._drift is None else 0.7 * self._drift + 0.3 * drift
        if self.rule == "constant" or self._clock < self._due or self._step < self.start:
            return decisions
        self._due = self._clock + self.interval
        found = {"adacomm": self._adacomm, "predicted": self._predicted, "priced": self._priced}[self.rule](
            term
        )
        if found is None or found[0] == before:
            return decisions
        self._chosen = found[0]
        return [*decisions, Decision(step.step, "period", before, *found)]

    # -- rules ------------------------------------------------------------------------------------

    def _loss_now(self) -> float:
        """Return the mean loss of the latest exchanges: one batch alone is noisy."""
        latest = self._recent[-8:]
        return sum(loss for _, loss in latest) / len(latest)

    def _adacomm(self, term: Any) -> tuple[int, str] | None:
        if not self._recent or self._first_loss is None:
            return None
        # Their losses are nonnegative and end at zero; ours end at `target_loss`.
        start = self._first_loss - self.target_loss
        now = max(self._loss_now() - self.target_loss, 0.0)
        if start <= 0:
            return None
        period = max(1, math.ceil(math.sqrt(now / start) * self.initial_period))
        if period < self._chosen:
            why = f"sqrt({now:.4g} / {start:.4g}) of {self.initial_period}"
        else:
            period = max(1, self._chosen // 2)
            why = f"the loss has not fallen enough ({now:.4g} of {start:.4g}), so half of {self._chosen}"
        return min(period, self.max_period), f"AdaComm: {why}"

    def costs(self, term: Any) -> tuple[float, float, float] | None:
        """Return seconds of computation per step, seconds per exchange, and drift; None if unknown."""
        comm_stats = term.comm_stats
        fit = term.link.fit()
        # A single measurement may have met a hitch on some rank.
        computing = median(self._computing or [float(term.computation.max()) / max(1, term.steps)])
        if fit is None or not comm_stats.bytes or computing <= 0:
            return None
        # A period of 1 sends gradients: the same bytes, give or take a message.
        exchange = term.link.predict(comm_stats.bytes, comm_stats.messages).seconds
        return computing, exchange, self._drift if self._drift is not None else 1.0

    def slowdown(self, period: int, drift: float) -> float:
        """Return by what share more steps are needed than with an exchange in every step."""
        return (self.smoothness * (period - 1)) ** 2 * drift / 3

    def _predicted(self, term: Any) -> tuple[int, str] | None:
        costs = self.costs(term)
        if costs is None:
            return None
        computing, exchange, drift = costs

        def seconds(period: int) -> float:
            return (1 + self.slowdown(period, drift)) * (computing + exchange / period)

        best = min(range(1, self.max_period + 1), key=seconds)
        why = (
            f"a step computes {computing:.3g} s, an exchange takes {exchange:.3g} s, ranks drift by "
            f"{drift:.3g}: {seconds(best):.3g} s per effective step, {seconds(1):.3g} s with one every step"
        )
        steps = self._steps_to_target()
        if steps is not None:
            why += f"; about {steps * seconds(best):.3g} s to a loss of {self.target_loss:g}"
        return best, why

    def _priced(self, term: Any) -> tuple[int, str] | None:
        costs, progress = self.costs(term), self._progress()
        if costs is None or progress is None:
            return None
        _, exchange, drift = costs

        def objective(period: int) -> float:
            slow = self.slowdown(period, drift)
            return float(term.price) * exchange / period + progress * slow / (1 + slow)

        best = min(range(1, self.max_period + 1), key=objective)
        return best, (
            f"an exchange of {exchange:.3g} s costs {term.price * exchange:.3g}, the loss falls by "
            f"{progress:.3g} a step, ranks drift by {drift:.3g}: {objective(best):.3g} per step, "
            f"{objective(1):.3g} with one every step"
        )

    def _progress(self) -> float | None:
        """Return by how much the loss falls per step, by a line through the latest exchanges, or None."""
        if len(self._recent) < 4:
            return None
        steps, losses = zip(*self._recent, strict=True)
        middle = sum(steps) / len(steps)
        mean = sum(losses) / len(losses)
        slope = sum((s - middle) * (x - mean) for s, x in self._recent) / sum(
            (s - middle) ** 2 for s in steps
        )
        return max(0.0, float(-slope))

    def _steps_to_target(self) -> float | None:
        progress = self._progress()
        if not progress or self._loss_now() <= self.target_loss:
            return None
        return (self._loss_now() - self.target_loss) / progress


def period_of(controller: Controller) -> int:
    """Return the current synchronisation period; 1 where no policy sets it."""
    period = controller.policy(SyncPeriod)
    return 1 if period is None else period.period
