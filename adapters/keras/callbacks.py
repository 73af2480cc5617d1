"""Horovod's callbacks for Keras 3, and the guard against silent desynchronisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
from hvdloss._util.private import open_private
from hvdloss.errors import ConfigError
from hvdloss.keras._backend import hvd
from hvdloss.keras.integrations.metrics import merged_results, states
from hvdloss.keras.integrations.recorder import FollowCallback, RecorderCallback
from hvdloss.keras.seeds import seed_everything
from hvdloss.keras.training import SynchronizationCallback
from hvdloss.tensorflow.functions import broadcast_variables
from hvdloss.train.files import replace_durably, unfinished
from hvdloss.train.seeds import seed_for

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "FollowCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "PreemptionCallback",
    "RecorderCallback",
    "SeedCallback",
    "SynchronizationCallback",
    "broadcast_variables",
]


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Gives every rank the root's weights and optimizer state before the first step.

    Random seeds of layers stay each rank's own.

    Args:
        root_rank: whose values.
        device: accepted for Horovod's sake.
        local_variables: variables that stay each rank's own.

    Collectives: a small gather, and one broadcast per 64 MiB, once.
    """

    def __init__(self, root_rank: int = 0, device: str = "", local_variables: Any = None) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.broadcast_done = False
        self._local = {id(v) for v in local_variables or ()}

    def register_local_var(self, variable: Any) -> None:
        """Leave `variable` each rank's own."""
        self._local.add(id(variable))

    def on_train_begin(self, logs: Any = None) -> None:
        """Broadcast."""
        if self.broadcast_done:
            return
        model = self.model
        own = [*model.trainable_variables, *model.non_trainable_variables]
        seeds = {id(v) for v in own if "seed_generator" in v.path}
        kept = [v for v in own if id(v) not in self._local | seeds]
        if model.optimizer is not None and model.optimizer.built:
            kept += list(model.optimizer.variables)
        broadcast_variables(kept, self.root_rank)
        self.broadcast_done = True


class MetricAverageCallback(keras.callbacks.Callback):
    """Replaces metrics in the logs of each epoch by those of all ranks' samples.

    Exact: states are summed over ranks, so each rank counts by what it saw (see
    :mod:`hvdloss.keras.integrations.metrics`). Put it before callbacks that read the logs. Passed to
    ``evaluate`` it makes the returned values global as well.

    Args:
        device: accepted for Horovod's sake.

    Collectives: one all-reduce of the metrics' states an epoch, two with validation.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()
        self._training: Any = None
        self._validation: Any = None
        self._fitting = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start anew."""
        self._training = self._validation = None
        self._fitting = True

    def on_test_begin(self, logs: Any = None) -> None:
        """Keep the training metrics before validation resets them."""
        if self._fitting:
            self._training = states(self.model)

    def on_test_end(self, logs: Any = None) -> None:
        """Keep the validation metrics."""
        if self._fitting:
            self._validation = states(self.model)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write global values into `logs`."""
        self._fitting = False
        if logs is None:
            return
        _put(logs, merged_results(self.model, self._training), "")
        if self._validation is not None:
            _put(logs, merged_results(self.model, self._validation), "val_")


def _put(logs: dict[str, Any], results: dict[str, float], prefix: str) -> None:
    for name, value in results.items():
        logs[prefix + name] = value


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Multiplies the initial learning rate by a factor of the epoch.

    Args:
        initial_lr: the learning rate that `multiplier` multiplies.
        multiplier: a number, raised to the epochs since `start_epoch`, or a function of the epoch.
        start_epoch, end_epoch: act only in epochs of this range; None for no end.
        staircase: once per epoch; otherwise after every batch, with fractions of epochs.
        momentum_correction: scale what momentum has gathered with the learning rate (Goyal et al.,
            "Accurate, Large Minibatch SGD", 2017, section 3), for ``SGD``.
        steps_per_epoch: where `staircase` is False and Keras cannot tell.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if initial_lr is None or not initial_lr > 0:
            raise ConfigError(f"initial_lr={initial_lr!r} must be a number above 0")
        self.initial_lr = initial_lr
        self.start_epoch, self.end_epoch = start_epoch, end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = 0
        if callable(multiplier):
            self.multiplier = multiplier
        else:
            self.multiplier = lambda epoch: multiplier ** (epoch - start_epoch)

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the number of steps if it is needed."""
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ConfigError("steps_per_epoch is not known: pass it to the callback, or to fit")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Take note of the epoch; set the learning rate if it changes with epochs only."""
        self.current_epoch = epoch
        if self.staircase and self._within():
            self._set(epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set the learning rate if it changes with batches."""
        if not self.staircase and self._within():
            self._set(self.current_epoch + batch / self.steps_per_epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Log the learning rate."""
        if logs is not None:
            logs["lr"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def _within(self) -> bool:
        return self.current_epoch >= self.start_epoch and (
            self.end_epoch is None or self.current_epoch < self.end_epoch
        )

    def _set(self, epoch: float) -> None:
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        old = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
        new = self.initial_lr * self.multiplier(epoch)
        if math.isclose(old, new, rel_tol=1e-12):
            return
        optimizer.learning_rate = new
        # Keras's SGD gathers lr * gradient, so the correction scales what it has gathered.
        if self.momentum_correction and getattr(optimizer, "momentum", 0) and old > 0 and optimizer.built:
            for gathered in getattr(optimizer, "momentums", None) or []:
                if gathered is not None:
                    gathered.assign(gathered * (new / old))


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from ``initial_lr / size`` to `initial_lr` over the first epochs.

    Goyal et al., "Accurate, Large Minibatch SGD" (2017). `initial_lr` is the rate already scaled for
    all ranks.

    Args:
        initial_lr: the rate to arrive at.
        warmup_epochs: over how many epochs.
        momentum_correction, steps_per_epoch: see :class:`LearningRateScheduleCallback`.
        verbose: 1 prints when the rate is reached, on rank 0.
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        def multiplier(epoch: float) -> float:
            # A full step is added so that an epoch ends at a round number, as in Horovod.
            epoch += 1.0 / self.steps_per_epoch
            return 1.0 / hvd.size() * (epoch * (hvd.size() - 1) / warmup_epochs + 1)

        super().__init__(
            initial_lr,
            multiplier,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Log the learning rate, and tell when it is reached."""
        super().on_epoch_end(epoch, logs)
        if epoch == self.end_epoch - 1 and self.verbose and hvd.rank() == 0:
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {self.initial_lr:g}.")


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Saves the best model so far, on one rank only, whole or not at all.

    Put it after :class:`MetricAverageCallback`, so that the metrics of all ranks decide. The file is written
    under another name and renamed when it is on disk: whoever is interrupted keeps the former one.

    Args:
        monitor, verbose, mode, save_freq, options: as in ``keras.callbacks.ModelCheckpoint``.
        filepath: where to.
        root_rank: who writes.

    Raises:
        ConfigError: no `filepath`.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        mode: str = "auto",
        save_freq: Any = "epoch",
        *,
        filepath: Any = None,
        root_rank: int = 0,
        **options: Any,
    ) -> None:
        if filepath is None:
            raise ConfigError("BestModelCheckpoint needs filepath=, where the best model is written")
        options = {"save_best_only": True, "save_weights_only": False, **options}
        super().__init__(
            filepath, monitor=monitor, verbose=verbose, mode=mode, save_freq=save_freq, **options
        )
        self.root_rank = root_rank

    def _get_file_path(self, *args: Any, **kwargs: Any) -> str:
        return str(unfinished(super()._get_file_path(*args, **kwargs)))

    def _save_model(self, epoch: int, batch: int | None, logs: Any) -> None:
        if hvd.rank() != self.root_rank:
            return
        path = Path(super()._get_file_path(epoch, batch, logs))
        new = unfinished(path)
        new.unlink(missing_ok=True)  # of a writer that was killed
        if path.parent.is_dir():
            open_private(new, "wb").close()  # Keras would let everybody read what it writes
        try:
            super()._save_model(epoch, batch, logs)
            if new.exists() and new.stat().st_size:
                replace_durably(new, path)
        finally:
            new.unlink(missing_ok=True)


class SeedCallback(keras.callbacks.Callback):
    """Gives each rank random numbers of its own at every epoch's beginning: see :func:`seed_everything`.

    Masks of dropout differ between ranks, and are the same in every rerun, and in an epoch before which
    training was interrupted (``fit(initial_epoch=...)``).

    Args:
        seed: of the run, equal on all ranks.
        stream: what the numbers are for.

    Raises:
        ConfigError: a negative seed.

    Collectives: none.
    """

    def __init__(self, seed: int, stream: str = "training") -> None:
        super().__init__()
        seed_for(seed)
        self.seed, self.stream = seed, stream

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Seed."""
        seed_everything(self.seed, epoch=epoch, stream=self.stream, model=self.model)


class PreemptionCallback(keras.callbacks.Callback):
    """On SIGTERM, finishes the step, keeps the state, and has all ranks leave together.

    ::

        checkpoint = hvd.Checkpoint("checkpoints", model=model, optimizer=model.optimizer, data=data)
        checkpoint.load()
        model.fit(data, epochs=1, callbacks=[hvd.callbacks.PreemptionCallback(checkpoint=checkpoint)])

    That SIGTERM came to any rank rides in the ledger of the next step: no message more. In an elastic job
    pass `state`; then only ranks that were told to leave do, and the others go on from the commit.

    Args:
        checkpoint: :class:`hvdloss.keras.Checkpoint`, saved with the number of steps; or a function to call.
        state: of an elastic job, which is committed.
        everyone: see :meth:`hvdloss.train.preemption.Preemption.leave`.
        options: of :class:`hvdloss.keras.Preemption`: ``signals``, ``status``.

    Raises:
        ConfigError: an argument that cannot be used.
        SystemExit: in ``fit``, on ranks that leave, with status 143.

    Collectives: none, but for what is saved.
    """

    def __init__(
        self, *, checkpoint: Any = None, state: Any = None, everyone: bool | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.checkpoint, self.state, self.everyone, self.options = checkpoint, state, everyone, options
        self.leaving: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin to notice SIGTERM."""
        from hvdloss.keras.optimizer import engine_of
        from hvdloss.tensorflow.integrations.preemption import Preemption

        self.on_train_end()
        engine = engine_of(self.model.optimizer)
        if engine is None:
            raise ConfigError("PreemptionCallback needs a model compiled with hvd.DistributedOptimizer")
        self.leaving = Preemption(self.model.optimizer, **self.options)
        engine.after_empty_step = self._after_step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Leave, if a rank is to."""
        self._after_step()

    def _after_step(self) -> None:
        if not self.leaving():
            return
        if self.state is not None:
            self.state.commit()
        if callable(self.checkpoint):
            self.checkpoint()
        elif self.checkpoint is not None:
            self.checkpoint.save(int(self.model.optimizer.iterations))
        self.leaving.leave(self.everyone)

    def on_train_end(self, logs: Any = None) -> None:
        """Handle SIGTERM as before."""
        if self.leaving is not None:
            self.leaving.close()
            self.leaving = None
