"""What the Keras cases share: models, batches split over ranks, and the same training in one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tf_support import cuts, data, difference, same_on_all_ranks

import hvdloss.keras as hvd
from hvdloss.comm.world import set_name_base

keras.config.set_floatx("float64")
keras.config.disable_traceback_filtering()

Batch = tuple[Any, Any, Any]  # x, y, sample_weight


def before_case(number: int) -> None:
    """Give every case its own names on the wire, whatever an earlier one left behind."""
    set_name_base(1000 * (number + 1))
    keras.backend.clear_session()
    keras.config.set_floatx("float64")


def network(**options: Any) -> keras.Model:
    """Return a small network with a regularizer, the same on every rank."""
    keras.utils.set_random_seed(7)
    i = keras.Input((5,))
    h = keras.layers.Dense(4, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.02))(i)
    return keras.Model(i, keras.layers.Dense(options.get("out", 1))(h))


def sgd() -> keras.optimizers.Optimizer:
    """Return the optimizer of most cases."""
    return keras.optimizers.SGD(0.02, momentum=0.9)


def dataset(batches: Sequence[Batch], *, counted: bool = True) -> tf.data.Dataset:
    """Return batches of different sizes as ``tf.data``; without a known length if not `counted`."""
    first = batches[0]

    def spec(a: Any) -> Any:
        return tf.TensorSpec((None, *a.shape[1:]), a.dtype)

    made = tf.data.Dataset.from_generator(
        lambda: iter(batches), output_signature=keras.tree.map_structure(spec, tuple(first))
    )
    return made.apply(tf.data.experimental.assert_cardinality(len(batches))) if counted else made


def step_batches(
    rng: np.random.Generator, steps: int, *, empty: bool = False, n: int = 24, dtype: Any = np.float64
) -> list[list[Batch]]:
    """Return, for each step, one batch per rank (of uneven sizes)."""
    out = []
    for _ in range(steps):
        x, y, w = data(rng, n, dtype)
        where = cuts(rng, n, hvd.size(), empty=empty)
        out.append([(x[a:b], y[a:b], w[a:b, 0]) for a, b in itertools.pairwise(where)])
    return out


def union(step: Sequence[Batch | None]) -> Batch:
    """Return the batch of one process."""
    there = [b for b in step if b is not None]
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts), *map(tuple, there))


def train_alone(model: keras.Model, steps: Sequence[Sequence[Batch | None]], epochs: int = 1) -> None:
    """Train as one process that sees the union of each step's batches."""
    for _ in range(epochs):
        for step in steps:
            x, y, w = union(step)
            model.train_on_batch(x, y, sample_weight=w)


def mine(steps: Sequence[Sequence[Batch | None]]) -> list[Batch]:
    """Return this rank's batches."""
    return [step[hvd.rank()] for step in steps if step[hvd.rank()] is not None]


def trial(
    steps: Sequence[Sequence[Batch | None]],
    *,
    loss: Any = "mse",
    alone: Any = None,
    make: Callable[[], keras.Model] = network,
    optimizer: Callable[[], keras.optimizers.Optimizer] = sgd,
    epochs: int = 2,
    tolerance: float = 1e-10,
    callbacks: Sequence[Any] = (),
    options: dict[str, Any] | None = None,
    fit: dict[str, Any] | None = None,
    counted: bool = True,
    **compile: Any,
) -> dict[str, float]:
    """Fit under all ranks and compare with one process; `loss` and `alone` mean the same."""
    model = make()
    model.compile(hvd.DistributedOptimizer(optimizer(), **(options or {})), loss=loss, **compile)
    own = mine(steps)
    model.fit(
        dataset(own, counted=counted), epochs=epochs, verbose=0, callbacks=list(callbacks), **(fit or {})
    )
    model.optimizer.finalize_variable_values(model.trainable_variables)
    same_on_all_ranks([v.numpy() for v in model.trainable_variables])
    error = 0.0
    if hvd.rank() == 0:  # the others hold the same
        other = make()
        other.compile(optimizer(), loss=loss if alone is None else alone, **compile)
        train_alone(other, steps, epochs)
        other.optimizer.finalize_variable_values(other.trainable_variables)
        error = difference(model.get_weights(), other.get_weights())
        assert error < tolerance, error
    return {"relative error": error}
