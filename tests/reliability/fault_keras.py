"""Keras's ``fit``, on which faults are inflicted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvdloss
import hvdloss.keras as hvd
from hvdloss.tensorflow import broadcast_variables

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(2)
keras.config.disable_traceback_filtering()


class Trip(keras.layers.Layer):
    """Where the gradient can be made NaN or infinite while the loss is finite."""

    def build(self, shape: Any) -> None:
        self.unarmed = self.add_weight(shape=(), initializer="ones", trainable=False, name="unarmed")
        self.factor = self.add_weight(shape=(), initializer="zeros", trainable=False, name="factor")
        self.other = self.add_weight(shape=(), initializer="zeros", trainable=False, name="other")

    def call(self, y: Any) -> Any:
        s = keras.ops.sum(y)
        unarmed, factor, other = (keras.ops.cast(w, y.dtype) for w in (self.unarmed, self.factor, self.other))
        z = s - keras.ops.stop_gradient(s) + unarmed
        # Two infinite gradients of different sign are NaN; one of 0 times infinity TensorFlow takes for 0.
        return y + factor * keras.ops.sqrt(z) - other * keras.ops.sqrt(2 * z)


class Batches(keras.utils.PyDataset):
    """Batches of an iterator, in its order."""

    def __init__(self, batches: Iterator[Any], count: int) -> None:
        super().__init__()
        self.batches, self.count = batches, count
        self.held: list[Any] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        while index >= len(self.held):  # Keras may ask for the first one twice
            self.held.append(next(self.batches))
        return self.held[index]


class Validation(keras.utils.PyDataset):
    """Validation data that raises."""

    def __init__(self, hooks: Any, batch: Any) -> None:
        super().__init__()
        self.hooks, self.batch = hooks, batch

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        if index == 1 and self.hooks.mine:
            self.hooks.inflicted()
            raise ValueError("user code in the validation data")
        return self.batch


class Around(keras.callbacks.Callback):
    """Calls the hooks."""

    def __init__(self, hooks: Any, loader: int | None) -> None:
        super().__init__()
        self.hooks, self.loader = hooks, loader

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.hooks.begin(batch + 1)
        self.hooks.middle(batch + 1)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.hooks.done(batch + 1)
        if self.loader == batch + 2:  # the next batch is the one that fails
            self.hooks.inflicted()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.hooks.epoch()


class FitLoop:
    """One model after another; a ``fit`` is a loop."""

    name = "fit"
    keeps = True  # a model between repeats of a fault
    hvd = hvd

    def __init__(self) -> None:
        self.model: Any = None

    def build(self, other: str, *, broadcast: bool = False) -> None:
        """Build and compile a model; `other` says what is other on this rank."""
        keras.utils.set_random_seed(5)
        dtype = "float64" if other == "dtypes-differ" else "float32"
        first = "net" if other == "names-differ" else "first"
        inputs = keras.Input((64,), dtype=dtype)
        hidden = 17 if other == "shapes-differ" else 16
        sizes = {first: hidden, "second": 10}
        if other == "count-differs":
            sizes["third"] = 10
        if other == "order-differs":
            sizes = {"second": 10, first: 10}
        y = inputs
        for name, size in sizes.items():
            y = keras.layers.Dense(size, "tanh" if name == first else None, name=name, dtype=dtype)(y)
        self.trips = Trip(dtype=dtype)
        model = keras.Model(inputs, self.trips(y))
        if broadcast:
            broadcast_variables([v.value for v in model.variables], root_rank=0)
        if other == "values-differ":
            bias = model.layers[1].bias
            bias.assign(bias + 1e-3)
        objective = hvd.Objective(
            "mae" if other == "loss-differs" else "mse",
            reduction="batch_mean" if other == "reduction-differs" else "mean",
            terms=(hvdloss.CommunicationCost(price=0.1),) if other == "terms-differ" else (),
        )
        optimizer = hvd.DistributedOptimizer(
            keras.optimizers.SGD(0.05),
            compression=hvd.Compression.fp16 if other == "compression-differs" else hvd.Compression.none,
            backward_passes_per_step=2 if other == "passes-differ" else 1,
        )
        model.compile(optimizer, loss=objective)
        self.model = model

    def train(self, batches: Iterator[Any], hooks: Any, item: Any) -> None:
        """Fit an epoch of batches."""
        first = next(batches, None)
        batches = itertools.chain([] if first is None else [first], batches)
        mine = getattr(hooks, "mine", False)
        loader = item.step if item is not None and mine and item.fault == "raise-loader" else None
        validation = None
        if item is None:
            count = 2
        elif item.fault in ("raise-callback", "raise-validation"):
            count = item.step + 1
            validation = Validation(hooks, first) if item.fault == "raise-validation" else None
        else:
            count = item.step if hooks.survives() else 4000
        self.model.fit(
            Batches(batches, count),
            epochs=1,
            shuffle=False,  # the fault is in a batch of a certain number
            verbose=0,
            callbacks=[Around(hooks, loader)],
            validation_data=validation,
        )

    def evaluate(self, plain: bool) -> None:
        """Not called: `fit` keeps ranks in step."""
        raise NotImplementedError

    def trip(self, factor: float | None) -> None:
        """Make the next gradients NaN (0.0) or infinite (1.0), or finite again (None)."""
        if self.model is not None:
            self.trips.unarmed.assign(1.0 if factor is None else 0.0)
            self.trips.factor.assign(0.0 if factor is None else 1.0)
            self.trips.other.assign(1.0 if factor == 0.0 else 0.0)

    def parameters(self) -> list[np.ndarray]:
        return [] if self.model is None else [np.asarray(v) for v in self.model.trainable_variables]

    def reported(self) -> int:
        report = self.model.optimizer.last_step
        return 0 if report is None or math.isnan(report.step) else int(report.step)


def make(name: str) -> FitLoop:
    return FitLoop()
