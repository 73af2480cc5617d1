"""The synchronisation period: how many local steps lie between two exchanges of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from hvdloss.controller import Controller
from hvdloss.errors import ConfigError
from hvdloss.term import Act, Closed, Decision

__all__ = ["RULES", "OuterStep", "SyncPeriod", "period_of"]

RULES = ("constant", "adacomm", "predicted", "priced")


@dataclass(frozen=True)
class OuterStep:
    """What is done with the mean of the ranks' moves: an SGD step with Nesterov momentum.

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

    def move(self, mean: Any, velocity: Any) -> tuple[Any, Any]:
        """Return by how much parameters move, and the new velocity; any arrays of one shape."""
        velocity = velocity * self.momentum + mean
        return (mean + velocity * self.momentum) * self.lr, velocity


class SyncPeriod(Act):
    """Lets ranks take several steps of their own between two exchanges of parameters.

    After `period` optimizer steps with the local gradient, the ranks' parameters are averaged, weighted
    by what each rank saw since the last exchange. With a period of 1 gradients travel in every step, and
    the step is exact.

    Args:
        period: local steps between two exchanges, or a rule: ``"adacomm"`` (Wang and Joshi 2019: the
            period shrinks with the square root of the loss), ``"predicted"`` (the period with the least
            predicted time to a given loss) or ``"priced"`` (the period with the least predicted
            objective: the price of a second's communication against the progress lost to drift).
        first: the period to begin with, for a rule; AdaComm's tau_0.
        most: the longest period that may be chosen.
        interval: seconds of training between two decisions, by the ranks' agreed measure; AdaComm's T_0.
        start: synchronise in every step before this one (post-local SGD, Lin et al. 2020).
        outer: an :class:`OuterStep` for DiLoCo, or None for plain averaging.
        target_loss: for ``"predicted"``: the loss whose time is predicted; for ``"adacomm"``: the lowest
            loss, which the paper takes for 0.
        smoothness: learning rate times smoothness of the loss, for the cost of drift: how fast progress
            suffers where ranks move apart. Below 2 where training is stable.

    The cost of drift: with r the mean squared distance of the ranks' moves from their mean, relative to
    the mean move, a stretch of tau local steps needs 1 + (smoothness tau)^2 r / 3 times the steps
    (the gradient at a rank's own parameters is off by smoothness times its distance, a third of whose
    square at the end is its mean on the way). r is measured at every exchange.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    of = "communication"
    steps_alone = True
    remembers = ("_chosen", "_step", "_first_loss", "_clock", "_due", "_spread", "_recent", "_computing")

    def __init__(
        self,
        period: int | str = 16,
        *,
        first: int | None = None,
        most: int = 128,
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
            self.first = 8 if first is None else first
        else:
            self.rule = "constant"
            self.first = period
            if first is not None:
                raise ConfigError("first= of SyncPeriod belongs to a rule, not to a constant period")
            most = max(most, period) if isinstance(period, int) else most
        for name, value, low in (("period", self.first, 1), ("most", most, 1), ("start", start, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name}={value!r} of SyncPeriod must be an integer of at least {low}")
        for name, number in (("interval", interval), ("smoothness", smoothness)):
            if not 0 < number < math.inf:
                raise ConfigError(f"{name}={number!r} of SyncPeriod must be above 0 and finite")
        if outer is not None and not isinstance(outer, OuterStep):
            raise ConfigError(f"outer={outer!r} of SyncPeriod must be an OuterStep or None")
        self.most, self.interval, self.start = most, interval, start
        self.outer, self.target_loss, self.smoothness = outer, target_loss, smoothness
        self.needs_link = self.rule in ("predicted", "priced")
        self.begin(0, 1)

    def begin(self, rank: int, size: int) -> None:
        """Start afresh."""
        self.size = size
        self._chosen = min(self.first, self.most)
        self._step = 0
        self._first_loss: float | None = None
        self._clock = 0.0
        self._due = self.interval
        self._spread: float | None = None  # r of the docstring, smoothed
        self._recent: list[tuple[int, float]] = []  # (step, loss)
        self._computing: list[float] = []  # seconds per step of the slowest rank

    @property
    def period(self) -> int:
        """How many steps lie between the last exchange and the next; 1: gradients travel."""
        if self.size == 1 or self._step < self.start:
            return 1
        return self._chosen

    def close(self, term: Any, step: Closed) -> Sequence[Decision]:
        """Take note of an exchange, and choose anew if it is time."""
        was, before = self.period, self._chosen
        self._step = step.step
        decisions = []
        if was == 1 and self.period > 1:
            decisions.append(
                Decision(step.step, "period", 1, self.period, f"local steps begin after step {self.start}")
            )
        self._clock += float((step.column("computation") + step.column("communication")).max())
        computing = float(step.column("computation").max()) / max(1, getattr(term, "steps", 1))
        if computing > 0:  # which it is not before the first step's is told
            self._computing = [*self._computing[-7:], computing]
        loss = step.loss
        if math.isfinite(loss):
            if self._first_loss is None:
                self._first_loss = loss
            self._recent.append((step.step, loss))
            del self._recent[:-64]
        spread = getattr(term, "spread", None)
        if spread is not None and math.isfinite(spread):
            self._spread = spread if self._spread is None else 0.7 * self._spread + 0.3 * spread
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
        period = max(1, math.ceil(math.sqrt(now / start) * self.first))
        if period < self._chosen:
            why = f"sqrt({now:.4g} / {start:.4g}) of {self.first}"
        else:
            period = max(1, self._chosen // 2)
            why = f"the loss has not fallen enough ({now:.4g} of {start:.4g}), so half of {self._chosen}"
        return min(period, self.most), f"AdaComm: {why}"

    def costs(self, term: Any) -> tuple[float, float, float] | None:
        """Return seconds of computation per step, seconds per exchange, and drift; None if unknown."""
        travel = term.travel
        fit = term.link.fit()
        # One stretch alone may have met a hitch on some rank.
        computing = median(self._computing or [float(term.computation.max()) / max(1, term.steps)])
        if fit is None or not travel.bytes or computing <= 0:
            return None
        # A period of 1 sends gradients: as many bytes, give or take a message.
        exchange = term.link.predict(travel.bytes, travel.messages).seconds
        return computing, exchange, self._spread if self._spread is not None else 1.0

    def slowdown(self, period: int, spread: float) -> float:
        """Return by what share more steps are needed than with an exchange in every step."""
        return (self.smoothness * (period - 1)) ** 2 * spread / 3

    def _predicted(self, term: Any) -> tuple[int, str] | None:
        costs = self.costs(term)
        if costs is None:
            return None
        computing, exchange, spread = costs

        def seconds(period: int) -> float:
            return (1 + self.slowdown(period, spread)) * (computing + exchange / period)

        best = min(range(1, self.most + 1), key=seconds)
        why = (
            f"a step computes {computing:.3g} s, an exchange takes {exchange:.3g} s, ranks drift by "
            f"{spread:.3g}: {seconds(best):.3g} s per effective step, {seconds(1):.3g} s with one every step"
        )
        steps = self._steps_to_target()
        if steps is not None:
            why += f"; about {steps * seconds(best):.3g} s to a loss of {self.target_loss:g}"
        return best, why

    def _priced(self, term: Any) -> tuple[int, str] | None:
        costs, progress = self.costs(term), self._progress()
        if costs is None or progress is None:
            return None
        _, exchange, spread = costs

        def objective(period: int) -> float:
            slow = self.slowdown(period, spread)
            return float(term.price) * exchange / period + progress * slow / (1 + slow)

        best = min(range(1, self.most + 1), key=objective)
        return best, (
            f"an exchange of {exchange:.3g} s costs {term.price * exchange:.3g}, the loss falls by "
            f"{progress:.3g} a step, ranks drift by {spread:.3g}: {objective(best):.3g} per step, "
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
    """Return how many steps lie between two exchanges by now; 1 where nothing decides on them."""
    period = controller.act(SyncPeriod)
    return 1 if period is None else period.period
