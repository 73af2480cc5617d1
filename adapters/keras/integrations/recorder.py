"""Subscription ``model.fit``: callbacks for the recorder, and for sinks of other kinds."""

from __future__ import annotations

import os
from typing import Any

import keras
from hvdloss.errors import ConfigError, UsageError
from hvdloss.keras.optimizer import engine_of
from hvdloss.report.subscription import Subscription, check_sink
from hvdloss.tensorflow.integrations import recorder
from hvdloss.tensorflow.integrations.recorder import follow

__all__ = ["FollowCallback", "Recorder", "RecorderCallback", "follow"]


class Recorder(recorder.Recorder):  # noqa: D101 - the core's words
    __doc__ = recorder.Recorder.__doc__
    _framework = "keras"


class FollowCallback(keras.callbacks.Callback):
    """Has sinks told, on one rank, of every step and epoch of ``fit``.

    Put it after :class:`MetricAverageCallback`, so that epochs have the metrics of all ranks.

    Args:
        sinks: objects with ``step(report)`` and ``close()``: see :class:`hvdloss.report.Sink`. They are
            closed when ``fit`` is over; if it raises, when the process ends, or by whoever made them.
        rank: which one reports, counted among all ranks, if it is in the optimizer's process set.

    Raises:
        ConfigError: a sink that lacks a method; in ``fit``, a model that was not compiled with a
            ``DistributedOptimizer``.

    Collectives: none.
    """

    def __init__(self, *sinks: Any, rank: int = 0) -> None:
        super().__init__()
        self.rank = rank
        self.sinks = tuple(check_sink(sink) for sink in sinks)
        self._following: Subscription | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin to follow; have the training step traced anew if it was traced without."""
        engine = engine_of(self.model.optimizer)
        if engine is None:
            raise ConfigError(f"{type(self).__name__} needs a model compiled with hvd.DistributedOptimizer")
        if self._following is not None and self._following.of(engine.step_state):
            return  # an elastic job runs a fit again that did not come to its end
        traced, engine.step_state.traced_unobserved = engine.step_state.traced_unobserved, False
        self._following = recorder.following(self.model.optimizer, self.sinks, self.rank, True, "keras")
        if traced:
            engine.empty_steps = {}
            if self.model.train_function is not None:
                self.model.make_train_function(force=True)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Tell of the epoch and its logs."""
        if self._following is not None:
            self._following.epoch(epoch + 1, logs)

    def on_train_end(self, logs: Any = None) -> None:
        """Follow no more, and close the sinks."""
        if self._following is not None:
            self._following.close()
            self._following = None


class RecorderCallback(FollowCallback):
    """Writes the record of a ``fit``: :class:`FollowCallback` of a :class:`Recorder`.

    ::

        model.fit(data, callbacks=[hvd.callbacks.RecorderCallback("runs/a.jsonl")])

    Args:
        path, options: of :class:`Recorder`.

    Raises:
        ConfigError: an argument that cannot be used. In ``fit``, on the rank that writes: the file exists,
            or cannot be made.
        UsageError: in a further ``fit``, on all ranks: the record ended with the first.

    Collectives: none.
    """

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        self.recorder = Recorder(path, **options)
        self._ended = False
        super().__init__(self.recorder, rank=self.recorder.rank)

    def on_train_begin(self, logs: Any = None) -> None:
        """Make the file, and begin to follow."""
        if self._ended:
            raise UsageError(
                f"the record {self.recorder.path.name} ended with the fit before; make another "
                f"RecorderCallback for this one (exists='append' goes on in its file), or record several by "
                f"hvd.Recorder(...) and its follow(optimizer)"
            )
        engine = engine_of(self.model.optimizer)
        if engine is not None and recorder.is_reporting_rank(self.rank, engine.step_state):
            self.recorder.open()
        super().on_train_begin(logs)

    def on_train_end(self, logs: Any = None) -> None:
        """Follow no more, and close the file."""
        self._ended = True
        super().on_train_end(logs)
