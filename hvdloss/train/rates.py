"""Learning rates for another global batch: how to scale them, and how to get there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from hvdloss.errors import ConfigError

__all__ = ["SCALING_RULES", "Warmup", "scale_factor"]

#: How the learning rate follows the global batch; see :func:`scale_factor`.
SCALING_RULES = ("linear", "sqrt")


def scale_factor(batch: float, base_batch: float, rule: str = "linear") -> float:
    """Return by what to multiply a learning rate that was found good for another global batch.

    With k = batch / base_batch:

    - ``"linear"``: k. For SGD, with warmup (Goyal et al., "Accurate, Large Minibatch SGD", 2017).
    - ``"sqrt"``: the root of k, which keeps the variance of a step (Krizhevsky, "One weird trick", 2014;
      Hoffer, Hubara and Soudry, "Train longer, generalize better", 2017). For Adam too (Malladi et al. 2022).

    Args:
        batch: samples of all ranks in one step, accumulation included.
        base_batch: the same, where the learning rate was found.
        rule: one of :data:`SCALING_RULES`.

    Raises:
        ConfigError: a batch not above 0, or an unknown rule.

    >>> scale_factor(1024, 256), scale_factor(1024, 256, "sqrt")
    (4.0, 2.0)
    """
    for name, value in (("batch", batch), ("base_batch", base_batch)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name}={value!r} must be a number of samples above 0")
    if rule not in SCALING_RULES:
        raise ConfigError(f"rule={rule!r} is not known; choose one of {', '.join(map(repr, SCALING_RULES))}")
    return batch / base_batch if rule == "linear" else math.sqrt(batch / base_batch)


@dataclasses.dataclass(frozen=True)
class Warmup:
    """The learning rate's multiplier by step: from `start` in equal increments to `factor`, which it keeps.

    Goyal et al. 2017, section 2.2: start with the rate of the small batch, arrive at the scaled one. Give it
    to ``torch.optim.lr_scheduler.LambdaLR``, whose ``step()`` is called after each update.

    Args:
        factor: where to arrive, such as :func:`scale_factor`'s.
        steps: number of updates.
        start: the multiplier of the first update: 1, or the former factor where the number of ranks changed.
        begin: the update at which it starts; before it the multiplier is `start`.
        then: multiplies all of it: a schedule of its own, by the step.

    Raises:
        ConfigError: a factor not above 0, or a negative number of steps.

    >>> [Warmup(4.0, steps=3)(step) for step in range(5)]
    [1.0, 2.0, 3.0, 4.0, 4.0]
    """

    factor: float
    steps: int
    _: dataclasses.KW_ONLY
    start: float = 1.0
    begin: int = 0
    then: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        for name in ("factor", "start"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value!r} must be a number above 0")
        for name in ("steps", "begin"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least 0")

    def __call__(self, step: Any, clip: Callable[[Any], Any] = lambda x: min(max(x, 0.0), 1.0)) -> Any:
        """Return the multiplier of an update, counted from 0.

        Args:
            step: a number, or a tensor if `clip` can take one.
            clip: to 0 and 1.
        """
        done = clip((step - self.begin) / self.steps) if self.steps else clip(step - self.begin + 1)
        factor = self.start + (self.factor - self.start) * done
        return factor if self.then is None else factor * self.then(step)
