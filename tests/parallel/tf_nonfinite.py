"""What a tape does where a loss or a gradient of one rank is NaN or infinite: raise, or drop that rank."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from tf_support import Network, cuts, data, difference, part, raised, reference, weighted_mse

import hvdloss.tensorflow as hvd
from hvdloss.errors import (
    ConfigError,
    NonFiniteGradientError,
    NonFiniteLossError,
    NoWeightError,
    ShapeError,
    WeightError,
)
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-1 gloo-3 mpi-2")

nan, inf = np.nan, np.inf
FAULT_COLUMNS = {
    "loss NaN": ("loss", nan),
    "loss infinite": ("loss", inf),
    "gradient NaN": ("gradient", nan),
    "gradient infinite": ("gradient", inf),
    "gradient -infinite": ("gradient", -inf),
}


def last():
    return hvd.size() - 1


@tf.custom_gradient
def poisoned(x, bad):
    """Identity whose gradient is `bad` in one entry, where that is not 0: the loss stays finite."""

    def grad(upstream):
        mask = tf.reshape(tf.one_hot(0, tf.size(upstream), True, False), tf.shape(upstream))
        return tf.where(mask & (bad != 0), tf.cast(bad, upstream.dtype), upstream), None

    return tf.identity(x), grad


def exact(net, objective, x, y, w, bad, factor=1.0, **options):
    with tf.GradientTape() as tape:
        loss = objective(poisoned(net(x), bad), y, w) * factor
    return hvd.DistributedGradientTape(tape, objective, **options).gradient(loss, net.parameters)


def ways(**options):
    """Eagerly, and in a function."""

    def step(*args):
        return exact(*args, **options)

    return step, tf.function(step)


def spoiled(fault, x, y, w):
    """This rank's arguments of a step in which the last rank has such a fault."""
    what, value = FAULT_COLUMNS.get(fault, ("", 0.0))
    bad = 0.0
    if hvd.rank() == last():
        if what == "loss":
            y = y.copy()
            y[0], w[0] = value, 1.0
        elif what == "gradient":
            bad = value
    return x, y, w, tf.constant(bad, tf.float64)


def told(error, kind, function):
    """Whether an error is of this kind; a function raises one of TensorFlow's with its text."""
    return kind.__name__ in str(error) if function else type(error) is kind


def case_raise_names_the_rank():
    rng = np.random.default_rng(31)
    net, objective = Network(rng), hvd.Objective("mse")
    x, y, w = data(rng, 20)
    where = cuts(rng, 20, hvd.size(), empty=False)
    for options in ({}, {"compression": hvd.Compression.fp16}, {"groups": 1}):
        for function, step in enumerate(ways(**options)):
            for fault, (what, _) in FAULT_COLUMNS.items():
                before = objective.last_step
                args = spoiled(fault, *(a.copy() for a in part((x, y, w), where)))
                error = raised(lambda s=step, a=args: s(net, objective, *a))
                kind = NonFiniteLossError if what == "loss" else NonFiniteGradientError
                assert told(error, kind, function), (fault, error)
                assert f"on rank {last()}" in str(error)
                assert objective.last_step == before
            g = step(net, objective, *spoiled("", *part((x, y, w), where)))
            expected = reference(lambda: weighted_mse(net(x), y, w), net.parameters)
            assert difference(g, expected) < (1e-2 if "compression" in options else 1e-12)


@needs("gloo-2", more="gloo-3 mpi-2")
def case_drop_is_the_step_of_the_other_ranks():
    rng = np.random.default_rng(32)
    error = 0.0
    for options in ({}, {"groups": 1}, {"compression": hvd.Compression.fp16}):
        net, objective = Network(rng), hvd.Objective("mse", nonfinite="drop")
        x, y, w = data(rng, 20)
        where = cuts(rng, 20, hvd.size(), empty=False)
        rest = slice(0, where[-2])
        for step in ways(**options):
            count = objective.last_step.ranks[-1].dropped if objective.last_step else 0
            for fault, (what, _) in [*FAULT_COLUMNS.items(), ("", ("", 0))]:
                args = spoiled(fault, *(a.copy() for a in part((x, y, w), where)))
                g = step(net, objective, *args)
                kept = rest if fault else slice(None)
                expected = reference(
                    lambda k=kept, net=net, x=x, y=y, w=w: weighted_mse(net(x[k]), y[k], w[k]),
                    net.parameters,
                )
                found = difference(g, expected)
                assert found < (1e-2 if "compression" in options else 1e-12), (fault, found)
                error = max(error, 0.0 if "compression" in options else found)
                count += bool(fault)
                report = objective.last_step
                assert [one.dropped for one in report.ranks] == [0] * last() + [count]
                assert report.ranks[-1].nonfinite == what
                assert abs(report.weight - w[kept].sum()) < 1e-9
                loss = weighted_mse(net(x[kept]), y[kept], w[kept])
                assert abs(report.loss - float(loss)) < 1e-12 * abs(float(loss))
                assert report.skipped == 0
    return {"relative error": error}


def case_drop_of_all_ranks_and_bad_weights_are_errors():
    rng = np.random.default_rng(33)
    net, objective = Network(rng), hvd.Objective("mse", nonfinite="drop")
    x, y, w = data(rng, 6)
    for function, step in enumerate(ways()):
        for bad in (nan, inf):
            error = raised(lambda s=step, b=bad: s(net, objective, x, y, w, tf.constant(b, tf.float64)))
            assert told(error, NoWeightError, function), error
            assert "after dropping" in str(error)
        worse = w.copy()
        worse[0] = -1.0
        error = raised(lambda s=step, b=worse: s(net, objective, x, y, b, tf.constant(nan, tf.float64)))
        assert told(error, WeightError, function), error
        step(net, objective, x, y, w, tf.constant(0.0, tf.float64))


def case_scaled_losses_are_the_scalers_business():
    """An infinite gradient of a loss that was multiplied goes to whoever multiplied it."""
    rng = np.random.default_rng(34)
    net, objective = Network(rng), hvd.Objective("mse")
    x, y, w = data(rng, 8)
    for step in ways():
        bad = tf.constant(inf if hvd.rank() == last() else 0.0, tf.float64)
        g = step(net, objective, x, y, w, bad, tf.constant(2.0**15, tf.float64))
        assert not all(np.isfinite(one).all() for one in g)
        g = step(net, objective, x, y, w, tf.constant(0.0, tf.float64), tf.constant(2.0**15, tf.float64))
        expected = reference(lambda: weighted_mse(net(x), y, w), net.parameters)
        assert difference([one / 2.0**15 for one in g], expected) < 1e-12


def case_sparse_gradients():
    rng = np.random.default_rng(35)
    table = tf.Variable(rng.normal(size=(7, 2)))
    rows, y = rng.integers(0, 7, 4), rng.normal(size=(4, 2))

    def step(objective, bad):
        with tf.GradientTape() as tape:
            loss = objective(poisoned(tf.gather(table, rows), bad), y)
        (g,) = hvd.DistributedGradientTape(tape, objective).gradient(loss, [table])
        return tf.convert_to_tensor(g)

    bad = tf.constant(inf if hvd.rank() == last() else 0.0, tf.float64)
    error = raised(lambda: step(hvd.Objective("mse"), bad))
    assert type(error) is NonFiniteGradientError, error
    if hvd.size() > 1:
        objective = hvd.Objective("mse", nonfinite="drop")
        (expected,) = reference(lambda: tf.reduce_mean((tf.gather(table, rows) - y) ** 2), [table])
        assert difference([step(objective, bad)], [expected]) < 1e-12


def case_local_sources_are_looked_at():
    rng = np.random.default_rng(36)
    net = Network(rng)
    x, y, w = data(rng, 6)
    for policy in ("raise", "drop"):
        objective = hvd.Objective("mse", nonfinite=policy)
        with tf.GradientTape() as tape:
            bias = poisoned(net.b1, tf.constant(nan if hvd.rank() == last() else 0.0, tf.float64))
            loss = objective(tf.tanh(x @ net.w1 + bias) @ net.w2, y, w)
        tape = hvd.DistributedGradientTape(tape, objective)
        tape.register_local_source(net.b1)
        if policy == "raise" or hvd.size() == 1:
            error = raised(lambda tape=tape, loss=loss: tape.gradient(loss, net.parameters))
            assert isinstance(error, NonFiniteGradientError | NoWeightError), error
            continue
        g = tape.gradient(loss, net.parameters)
        assert all(np.isfinite(one).all() for one in g)
        assert bool(np.any(g[1])) == (hvd.rank() != last())


def case_what_cannot_be_done_is_refused():
    with pytest.raises(ConfigError, match="gradient tape"):
        hvd.DistributedGradientTape(tf.GradientTape(), hvd.Objective("mse", nonfinite="skip"))
    with pytest.raises(ConfigError, match="SoftDice"):
        hvd.Objective("soft_dice", nonfinite="drop")
    with pytest.raises(ConfigError, match="nonfinite='ignore'"):
        hvd.Objective("mse", nonfinite="ignore")
    with pytest.raises(ConfigError, match=r"tf\.compat\.v1"):
        hvd.DistributedOptimizer(
            tf.compat.v1.train.GradientDescentOptimizer(0.1), hvd.Objective("mse", nonfinite="skip")
        )


def case_losses_of_all_ranks_name_the_rank():
    rng = np.random.default_rng(37)
    net, objective = Network(rng), hvd.Objective("soft_dice")
    x, y, _ = data(rng, 8)
    for bad in (nan, inf):

        def step(bad=bad):
            with tf.GradientTape() as tape:
                value = poisoned(net(x), tf.constant(bad if hvd.rank() == last() else 0.0, tf.float64))
                loss = objective(tf.sigmoid(value), (y > 0).astype(float))
            hvd.DistributedGradientTape(tape, objective).gradient(loss, net.parameters)

        error = raised(step)
        assert type(error) is NonFiniteGradientError, error
        assert f"on rank {last()}" in str(error)


def case_shapes_that_do_not_broadcast():
    rng = np.random.default_rng(38)
    net, objective = Network(rng), hvd.Objective("mse")
    x, y, w = data(rng, 8)
    zero = tf.constant(0.0, tf.float64)
    for function, step in enumerate(ways()):
        error = raised(lambda s=step: s(net, objective, x, y, np.ones((9, 1)), zero))
        assert told(error, ShapeError, function), error
        assert f"rank {hvd.rank()}" in str(error)
        error = raised(lambda s=step: s(net, objective, x, y, 0 * w, zero))
        assert told(error, NoWeightError, function), error
        step(net, objective, x, y, w, zero)


def case_an_optimizer_that_skips():
    """A loop over TensorFlow variables: what an update changes is as if the step had not been."""
    import keras

    rng = np.random.default_rng(39)
    net, other = Network(rng), Network(np.random.default_rng(39))
    objective = hvd.Objective("mse", nonfinite="skip")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.05), objective)
    alone = keras.optimizers.Adam(0.05)
    optimizer.build(net.parameters)

    def step(x, y, w, bad):
        with tf.GradientTape() as tape:
            loss = objective(poisoned(net(x), bad), y, w)
        optimizer.apply_gradients(zip(tape.gradient(loss, net.parameters), net.parameters, strict=True))

    count = 0
    for one in (step, tf.function(step)):
        for fault in ("", *FAULT_COLUMNS, ""):
            x, y, w = data(rng, 20)
            where = cuts(rng, 20, hvd.size(), empty=False)
            before = [v.numpy() for v in optimizer.variables] + [v.numpy() for v in net.parameters]
            one(*spoiled(fault, *(a.copy() for a in part((x, y, w), where))))
            after = [v.numpy() for v in optimizer.variables] + [v.numpy() for v in net.parameters]
            same = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
            assert same == bool(fault), fault
            count += bool(fault)
            report = objective.last_step
            assert report.skipped == count
            assert report.ranks[-1].nonfinite == (FAULT_COLUMNS[fault][0] if fault else "")
            if not fault:
                g = reference(lambda: weighted_mse(other(x), y, w), other.parameters)  # noqa: B023
                alone.apply_gradients(zip(map(tf.constant, g), other.parameters, strict=True))
    error = difference(net.parameters, other.parameters)
    assert error < 1e-12, error
    return {"relative error": error}
