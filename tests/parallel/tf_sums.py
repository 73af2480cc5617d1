"""Functions of sums in TensorFlow and Keras: value and gradient against one process on the union."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import sums_reference as reference
import tensorflow as tf
from tf_support import cuts, difference, raised, same_on_all_ranks, traced

import hvdloss
import hvdloss.keras
import hvdloss.tensorflow as hvd
from hvdloss.losses import Correlation, SoftDice
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")


class Arithmetic:
    """What `sums_reference` computes with."""

    exp, log, sqrt, sigmoid, maximum = tf.exp, tf.math.log, tf.sqrt, tf.sigmoid, tf.maximum
    softmax, constant = tf.nn.softmax, tf.constant

    @staticmethod
    def sum(x, axis=None):
        return tf.reduce_sum(x, axis)

    @staticmethod
    def one_hot(t, n):
        return tf.one_hot(t, n, dtype=tf.float64)

    @staticmethod
    def numpy(x):
        return x.numpy()


def predict(x, theta, kind):
    y = tf.tanh(x) @ theta
    return y if reference.outputs(kind) > 1 else y[:, 0]


def definition(name, kind, x, t, w, theta):
    """Return value and gradient of one process."""
    weight = w[:, None] if kind == "classes" else w
    theta = tf.constant(theta)
    with tf.GradientTape() as tape:
        tape.watch(theta)
        value = reference.LOSSES[name][2](Arithmetic, predict(x, theta, kind), t, weight)
    return value.numpy(), tape.gradient(value, theta).numpy()


def near(a, b, tolerance=1e-11):
    error = difference([np.asarray(a)], [np.asarray(b)])
    assert error <= tolerance, (error, a, b)
    return error


def averaged(x):
    """Return the average over ranks, as data-parallel optimizers take it."""
    return hvd.allreduce(x, name="averaged", op=hvd.Average)


def over_random_splits(in_a_function):
    rng = np.random.default_rng(1)
    errors = [0.0]
    for number, (name, (make, kind, _)) in enumerate(reference.LOSSES.items()):
        if in_a_function and number % 3 != hvd.size() % 3:  # tracing takes long
            continue
        objective = hvd.Objective(make())

        def gradient(x, t, w, theta, objective=objective, kind=kind):
            with tf.GradientTape() as tape:
                tape.watch(theta)
                value = objective(predict(x, theta, kind), t, w)
            return value, tape.gradient(value, theta)

        if in_a_function:
            gradient = traced(gradient)
        for _ in range(4 if in_a_function else 8):
            x, t, w = reference.sample(rng, kind, int(rng.integers(8, 40)))
            order = rng.permutation(len(x))
            x, t, w = x[order], t[order], w[order]
            where = cuts(rng, len(x), hvd.size())
            mine = slice(where[hvd.rank()], where[hvd.rank() + 1])
            theta = rng.normal(size=(5, reference.outputs(kind)))
            value, own = gradient(*(tf.constant(a) for a in (x[mine], t[mine], w[mine], theta)))
            expected, exact = definition(name, kind, x, t, w, theta)
            same_on_all_ranks([value.numpy()])
            errors += [near(value, expected), near(averaged(own), exact)]
    return {"error, float64": max(errors)}


@needs(more="gloo-2 gloo-3")
def case_value_and_gradient_over_random_splits():
    return over_random_splits(False)


@needs("gloo-2", more="gloo-1 gloo-3 gloo-4 mpi-2")
def case_value_and_gradient_over_random_splits_in_a_function():
    return over_random_splits(True)


def case_absent_elements_may_be_anything():
    rng = np.random.default_rng(2)
    errors = [0.0]
    for name, (make, kind, _) in reference.LOSSES.items():
        x, t, w = reference.sample(rng, kind, 24)
        theta = tf.constant(rng.normal(size=(5, reference.outputs(kind))))
        where = [24 * r // hvd.size() for r in range(hvd.size() + 1)]
        mine = slice(where[hvd.rank()], where[hvd.rank() + 1])
        absent = (w if w.ndim == 1 else w[:, 0]) == 0
        with tf.GradientTape() as tape:
            tape.watch(theta)
            y = predict(x, theta, kind)
            y = tf.where(absent[:, None] if len(y.shape) > 1 else absent, np.nan, y)
            value = hvd.Objective(make())(y[mine], tf.constant(t[mine]), tf.constant(w[mine]))
        gradient = tape.gradient(value, theta)
        expected, exact = definition(name, kind, x[~absent], t[~absent], w[~absent], theta)
        errors += [near(value, expected), near(averaged(gradient), exact)]
    return {"error, float64": max(errors)}


def real(step, parts):
    rng = np.random.default_rng(100 + step)
    arrays = reference.sample(rng, "real", 40)
    where = cuts(rng, 40, parts)
    return [[a[i:j] for a in arrays] for i, j in itertools.pairwise(where)], arrays


def case_a_tape_with_a_penalty_and_a_report():
    objective = hvd.Objective("concordance")
    theta = tf.Variable(np.linspace(-1, 1, 5)[:, None])
    one = tf.Variable(theta)

    @tf.function(reduce_retracing=True)
    def train(x, t, w):
        with tf.GradientTape() as tape:
            loss = objective(predict(x, theta, "real"), t, w) + 0.1 * tf.reduce_sum(theta**2)
        tape = hvd.DistributedGradientTape(tape, objective)
        (gradient,) = tape.gradient(loss, [theta])
        theta.assign_sub(0.3 * gradient)

    for step in range(4):
        parts, (x, t, w) = real(step, hvd.size())
        train(*(tf.constant(a) for a in parts[hvd.rank()]))
        with tf.GradientTape() as tape:
            loss = reference.LOSSES["concordance"][2](Arithmetic, predict(x, one, "real"), t, w)
            penalised = loss + 0.1 * tf.reduce_sum(one**2)
        one.assign_sub(0.3 * tape.gradient(penalised, one))
    error = near(theta, one)
    near(objective.last_step.loss, loss)
    near(objective.last_step.weight, w.sum())
    same_on_all_ranks([theta.numpy()])
    return {"error, float64": error}


@needs("gloo-2", more="gloo-1 gloo-3 gloo-4 mpi-2")
def case_sums_over_micro_batches():
    objective = hvd.Objective("concordance")
    parts, (x, t, w) = real(7, 2 * hvd.size())
    theta = tf.constant(np.linspace(-1, 1, 5)[:, None])
    mine = [[tf.constant(a) for a in parts[2 * hvd.rank() + i]] for i in range(2)]
    total = objective.total(sum(objective.sums(predict(a, theta, "real"), b, c) for a, b, c in mine))
    gradient = tf.zeros_like(theta)
    for a, b, c in mine:
        with tf.GradientTape() as tape:
            tape.watch(theta)
            value = objective(predict(a, theta, "real"), b, c, total=total)
        gradient += tape.gradient(value, theta)
    expected, exact = definition("concordance", "real", x, t, w, theta)
    return {"error, float64": max(near(value, expected), near(averaged(gradient), exact))}


def case_keras_fit():
    """``model.fit`` on uneven parts, with sample weights, equals one process on each step's union."""
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(4)
    steps = [reference.sample(rng, "binary", 30) for _ in range(3)]

    def make():
        keras.utils.set_random_seed(2)
        return keras.Sequential(
            [keras.Input((5,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)], name="small"
        )

    keras.backend.set_floatx("float64")
    try:
        model, one = make(), make()
        model.compile(
            hvdloss.keras.DistributedOptimizer(keras.optimizers.SGD(0.5, momentum=0.9)),
            hvdloss.keras.Objective(SoftDice(smooth=1.0)),
        )

        def batches():
            for number, (x, t, w) in enumerate(steps):
                where = cuts(np.random.default_rng(number), len(x), hvd.size())
                mine = slice(where[hvd.rank()], where[hvd.rank() + 1])
                yield x[mine], t[mine, None], w[mine]

        spec = [tf.TensorSpec(shape, tf.float64) for shape in ((None, 5), (None, 1), (None,))]
        data = tf.data.Dataset.from_generator(batches, output_signature=tuple(spec))
        if hvd.size() > 1:
            error = raised(lambda: model.fit(data, verbose=0))
            assert isinstance(error, hvdloss.ConfigError), error
            assert "unknown" in str(error)
        data = data.apply(tf.data.experimental.assert_cardinality(len(steps)))
        history = model.fit(data, epochs=2, verbose=0).history["loss"]
        optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
        for _ in range(2):
            seen = []
            for x, t, w in steps:
                with tf.GradientTape() as tape:
                    p = tf.sigmoid(one(x)[:, 0])
                    both, sizes = tf.reduce_sum(w * p * t), tf.reduce_sum(w * (p + t))
                    loss = 1 - (2 * both + 1) / (sizes + 1)
                optimizer.apply(tape.gradient(loss, one.trainable_variables), one.trainable_variables)
                seen.append(float(loss))
        error = difference(model.get_weights(), one.get_weights())
        assert error < 1e-11, error
        if hvd.rank() == 0:  # one rank evaluates by itself, and nobody waits
            x, t, w = steps[0]
            alone = model.evaluate(x, t[:, None], sample_weight=w, verbose=0)
            expected = SoftDice(smooth=1.0).of(model.predict(x, verbose=0)[:, 0], t, w)
            near(alone, expected, 1e-6)
        assert abs(history[-1] - np.mean(seen)) < 1e-9, (history, seen)
    finally:
        keras.backend.set_floatx("float32")
    return {"error, float64": error}


def case_second_derivatives_are_refused():
    objective = hvd.Objective(Correlation())
    y = tf.constant(np.arange(5.0) ** 2)

    def twice():
        with tf.GradientTape() as outer:
            outer.watch(y)
            with tf.GradientTape() as inner:
                inner.watch(y)
                value = objective(y, np.arange(5.0))
            (gradient,) = inner.gradient(value, [y])
        return outer.gradient(gradient, y)

    error = raised(twice)
    assert isinstance(error, hvdloss.ConfigError), error
    assert "differentiate once" in str(error)


@needs("gloo-2", more="gloo-1 gloo-3 gloo-4 mpi-2")
def case_one_rank_is_to_blame_for_what_is_not_finite():
    objective = hvd.Objective("correlation")
    theta = tf.Variable(np.ones((5, 1)))
    (x, t, w), culprit = real(0, 1)[1], hvd.size() - 1

    def step():
        with tf.GradientTape() as tape:
            y = predict(x, theta, "real") * (np.inf if hvd.rank() == culprit else 1.0)
            loss = objective(y, t, w)
        hvd.DistributedGradientTape(tape, objective).gradient(loss, [theta])

    error = raised(step)
    assert isinstance(error, hvdloss.NonFiniteLossError), error
    assert f"rank {culprit}" in str(error)
    assert hvd.size() == 1 or "rank 0" not in str(error), error
