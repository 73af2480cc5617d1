"""Loops over data of unknown length: ends together, exact, and failures known to all."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tf_support import Network, difference, raised, same_on_all_ranks

import hvdloss
import hvdloss.tensorflow as hvd
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 mpi-2")


def batches_of(counts: list[int], seed: int = 3) -> list[list[Any]]:
    """Return batches of every rank: so many, of different sizes."""
    rng = np.random.default_rng(seed)
    out = []
    for rank, count in enumerate(counts):
        sizes = [2 + (i + rank) % 3 for i in range(count)]
        out.append([(rng.normal(size=(n, 5)), rng.normal(size=(n, 1)) * (1 + rank) - rank) for n in sizes])
    return out


def as_dataset(batches: list[Any]) -> tf.data.Dataset:
    """Return a data set that does not know how long it is."""
    spec = (tf.TensorSpec((None, 5), tf.float64), tf.TensorSpec((None, 1), tf.float64))
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=spec)


def uneven_counts() -> list[list[int]]:
    size = hvd.size()
    return [[3 + 2 * rank for rank in range(size)], [0] * (size - 1) + [3]]


def reference(batches: list[list[Any]], passes: int = 1) -> Network:
    """Train one process on the same global batches."""
    one = Network(np.random.default_rng(1))
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    for step in range(-(-max(map(len, batches)) // passes)):
        group = [b for own in batches for b in own[step * passes : (step + 1) * passes]]
        x, y = (np.concatenate(part) for part in zip(*group, strict=True))
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((one(x) - y) ** 2)
        gradients = tape.gradient(loss, one.parameters)
        optimizer.apply_gradients(zip(gradients, one.parameters, strict=True))
    return one


def trainer(model: Network, objective: Any, graph: bool) -> Any:
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    optimizer.build(model.parameters)

    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = objective(model(x), y)
        tape = hvd.DistributedGradientTape(tape, objective)
        gradients = tape.gradient(loss, model.parameters)
        optimizer.apply_gradients(zip(gradients, model.parameters, strict=True))

    shapes = [tf.TensorSpec((None, 5), tf.float64), tf.TensorSpec((None, 1), tf.float64)]
    return tf.function(step, input_signature=shapes, autograph=False) if graph else step


def case_ends_that_nobody_knows_are_one_process_with_the_same_global_batches():
    errors = []
    for number, counts in enumerate(uneven_counts()):
        for graph in (False, True):
            batches = batches_of(counts, number)
            own = batches[hvd.rank()]
            model = Network(np.random.default_rng(1))
            objective = hvd.Objective("mse")
            step = trainer(model, objective, graph)
            given = 0
            for x, y in hvd.uneven(as_dataset(own) if graph else own, objective):
                step(x, y)
                given += 1
            assert given == max(counts) == objective.last_step.step
            errors.append(difference(model.parameters, reference(batches).parameters))
            assert errors[-1] < 1e-12, errors
    return {"error, float64": max(errors)}


def case_with_an_optimizer_that_accumulates():
    errors = []
    for number, counts in enumerate(uneven_counts()):
        batches = batches_of(counts, number)
        model = Network(np.random.default_rng(1))
        objective = hvd.Objective("mse")
        optimizer = hvd.DistributedOptimizer(
            keras.optimizers.SGD(0.05, momentum=0.9), objective, backward_passes_per_step=2
        )
        given = 0
        for x, y in hvd.uneven(batches[hvd.rank()], optimizer):
            with tf.GradientTape() as tape:
                loss = objective(model(x), y)
            gradients = tape.gradient(loss, model.parameters)
            optimizer.apply_gradients(zip(gradients, model.parameters, strict=True))
            given += 1
        assert given == -(-max(counts) // 2) * 2
        errors.append(difference(model.parameters, reference(batches, 2).parameters))
        assert errors[-1] < 1e-12, errors
    return {"error, float64": max(errors)}


def failing(batches: list[Any], after: int, bad: int) -> Any:
    for number, batch in enumerate(batches):
        if number == after and hvd.rank() == bad:
            raise KeyError("no such thing")
        yield batch


def case_what_one_rank_cannot_read_is_raised_on_all():
    last = hvd.size() - 1
    for after in (0, 2):
        for graph in (False, True):
            batches = batches_of([4] * hvd.size())
            model = Network(np.random.default_rng(1))
            objective = hvd.Objective("mse")
            step = trainer(model, objective, graph)

            def loop(step=step, batches=batches, objective=objective, after=after) -> None:
                for x, y in hvd.uneven(failing(batches[hvd.rank()], after, last), objective):
                    step(x, y)

            error = raised(loop)
            words = f"rank {last}: KeyError: 'no such thing'"
            assert isinstance(error, tf.errors.OpError if graph and after else hvdloss.RankError), error
            assert words in str(error), error
            same_on_all_ranks(model.parameters)
            used = [row[:after] for row in batches]
            expected = reference(used).parameters if after else Network(np.random.default_rng(1)).parameters
            assert difference(model.parameters, expected) < 1e-12
            for x, y in hvd.uneven(batches[hvd.rank()], objective):  # and goes on
                step(x, y)
            same_on_all_ranks(model.parameters)
    error = raised(lambda: hvd.uneven([], 3))
    assert isinstance(error, hvdloss.ConfigError)
