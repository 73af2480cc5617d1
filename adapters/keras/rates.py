"""A learning rate that warms up to that of another global batch."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

import keras
from hvdloss.train.rates import Warmup

__all__ = ["WarmupSchedule"]


@keras.saving.register_keras_serializable(package="hvdloss")
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate times a factor that rises step by step: see :class:`hvdloss.train.Warmup`.

    ::

        factor = hvdloss.train.scale_factor(hvd.size() * 32, 256)
        optimizer = keras.optimizers.SGD(hvd.WarmupSchedule(0.1, factor, steps=500))

    Horovod's ``LearningRateWarmupCallback`` does it by epochs, for the number of ranks only. Keras's
    ``ReduceLROnPlateau`` needs a learning rate that is a number, not a schedule.

    Args:
        learning_rate: of the base batch: a number or a schedule.
        factor, steps, start, begin: see :class:`hvdloss.train.Warmup`; steps are updates.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(
        self, learning_rate: Any, factor: float, steps: int, *, start: float = 1.0, begin: int = 0
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.warmup = Warmup(factor, steps, start=start, begin=begin)

    def __call__(self, step: Any) -> Any:
        """Return the learning rate of an update, counted from 0."""
        rate = self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate
        return rate * self.warmup(tf.cast(step, tf.float32), clip=lambda x: tf.clip_by_value(x, 0.0, 1.0))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments."""
        w = self.warmup
        rate = self.learning_rate
        if callable(rate):
            rate = keras.optimizers.schedules.serialize(rate)
        return {
            "learning_rate": rate,
            "factor": w.factor,
            "steps": w.steps,
            "start": w.start,
            "begin": w.begin,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WarmupSchedule:
        """Return the schedule of a config."""
        rate = config["learning_rate"]
        if isinstance(rate, dict):
            rate = keras.optimizers.schedules.deserialize(rate)
        return cls(**{**config, "learning_rate": rate})
