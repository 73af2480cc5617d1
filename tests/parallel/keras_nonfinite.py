"""What ``fit`` does where a loss or a gradient of one rank is NaN or infinite: raise, skip, or drop."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_support import before_case, dataset, mine, network, sgd, step_batches, train_alone
from tf_support import difference, raised, same_on_all_ranks

import hvdloss
import hvdloss.keras as hvd
from hvdloss.errors import (
    ConfigError,
    NonFiniteGradientError,
    NonFiniteLossError,
    NoWeightError,
    ShapeError,
)
from hvdloss.terms.policies.period import SyncPeriod
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 mpi-2")

__all__ = ["before_case"]

nan, inf = np.nan, np.inf
FAULT_COLUMNS = {
    "loss NaN": ("loss", nan),
    "loss infinite": ("loss", inf),
    "gradient NaN": ("gradient", 1e6),  # targets beyond 1e5 are marked: see `tricky`
    "gradient infinite": ("gradient", -1e6),
}


def last():
    return hvd.size() - 1


@tf.custom_gradient
def _poisoned(x, marks):
    def grad(upstream):
        bad = tf.where(marks > 0, tf.cast(nan, upstream.dtype), tf.cast(inf, upstream.dtype))
        return tf.where(marks != 0, bad, upstream), None

    return tf.identity(x), grad


def tricky(y_true, y_pred):
    """Squared errors; where the target is marked the loss is finite, and the gradient is not."""
    marks = tf.where(tf.abs(y_true) > 1e5, tf.sign(y_true), 0.0)
    marks = tf.where(tf.math.is_finite(y_true), marks, 0.0)
    target = tf.where(marks != 0, tf.zeros_like(y_true), y_true)
    return (_poisoned(y_pred, marks) - target) ** 2


def spoiled(steps, faults):
    """Steps, some of which have a fault on the last rank: by number of the step."""
    out = [list(step) for step in steps]
    for number, fault in faults.items():
        x, y, w = (a.copy() for a in out[number][last()])
        y[0], w[0] = FAULT_COLUMNS[fault][1], 1.0
        out[number][last()] = (x, y, w)
    return out


def adam():
    return keras.optimizers.Adam(0.03, weight_decay=0.01, clipnorm=1.0, use_ema=True)


def accumulating():
    return keras.optimizers.SGD(0.02, momentum=0.9, gradient_accumulation_steps=2)


def case_fit_skips():
    results = []
    for make, per_update, eager in (
        (sgd, 1, False),
        (adam, 1, False),
        (accumulating, 2, False),
        (sgd, 1, True),
    ):
        rng = np.random.default_rng(41)
        steps = step_batches(rng, 5 * per_update)
        faults = {per_update * k: fault for k, fault in zip((0, 1, 3, 4), FAULT_COLUMNS, strict=True)}
        bad = {number // per_update for number in faults}
        rest = [step for n, step in enumerate(steps) if n // per_update not in bad]
        model, other = network(), network()
        model.compile(
            hvd.DistributedOptimizer(make()), loss=hvd.Objective(tricky, nonfinite="skip"), run_eagerly=eager
        )
        history = model.fit(dataset(mine(spoiled(steps, faults))), epochs=2, verbose=0)
        report = model.optimizer.last_step
        assert report.skipped == 2 * len(faults), report
        assert report.ranks[-1].nonfinite == "gradient"
        assert np.isfinite(history.history["loss"]).all()
        same_on_all_ranks([v.numpy() for v in model.trainable_variables])
        # Keras alone weighs passes alike; ours by what they hold, as one batch of all of them does.
        other.compile(sgd() if make is accumulating else make(), loss=hvd.Objective("mse"))
        whole = [sum(rest[n : n + per_update], []) for n in range(0, len(rest), per_update)]  # noqa: RUF017
        train_alone(other, whole, 2)
        other.optimizer.finalize_variable_values(other.trainable_variables)  # as `fit` does at its end
        assert int(model.optimizer.iterations) == int(other.optimizer.iterations)
        mine_all, theirs = [
            [v.numpy() for v in (*one.variables, *(() if make is accumulating else one.optimizer.variables))]
            for one in (model, other)
        ]
        error = difference(mine_all, theirs)
        assert error < 1e-12, (make, error)
        results.append(error)
    return {"relative error": max(results)}


def case_fit_drops():
    if hvd.size() == 1:
        return None
    results = []
    for make in (sgd, accumulating):
        rng = np.random.default_rng(42)
        steps = step_batches(rng, 6)
        faults = dict(zip((0, 2, 3, 4) if make is sgd else (0, 2, 3, 5), FAULT_COLUMNS, strict=True))
        model, other = network(), network()
        model.compile(hvd.DistributedOptimizer(make()), loss=hvd.Objective(tricky, nonfinite="drop"))
        history = model.fit(dataset(mine(spoiled(steps, faults))), epochs=2, verbose=0)
        report = model.optimizer.last_step
        assert [one.dropped for one in report.ranks[:-1]] == [0] * last()
        assert np.isfinite(history.history["loss"]).all()
        same_on_all_ranks([v.numpy() for v in model.trainable_variables])
        gone = set(faults)
        if make is accumulating:  # the rank's whole step goes, with all of its micro-batches
            gone = {n for n in range(6) if n // 2 in {f // 2 for f in faults}}
        assert report.ranks[-1].dropped == 2 * (len(gone) if make is sgd else len({n // 2 for n in gone}))
        rest = [[*step[:-1], None] if n in gone else step for n, step in enumerate(steps)]
        other.compile(make(), loss=hvd.Objective("mse"))
        if make is sgd:
            train_alone(other, rest, 2)
        else:  # passes weighted by what they hold: both of a step in one batch
            other.compile(sgd(), loss=hvd.Objective("mse"))
            train_alone(other, [[*rest[n], *rest[n + 1]] for n in (0, 2, 4)], 2)
        error = difference(model.get_weights(), other.get_weights())
        assert error < 1e-12, (make, error)
        results.append(error)
    return {"relative error": max(results)}


def case_fit_raises():
    (step,) = step_batches(np.random.default_rng(43), 1)
    for fault, (what, _) in FAULT_COLUMNS.items():
        model = network()
        model.compile(hvd.DistributedOptimizer(sgd()), loss=hvd.Objective(tricky))
        before = model.get_weights()
        (batch,) = mine(spoiled([step], {0: fault}))
        error = raised(lambda m=model, b=batch: m.fit(dataset([b]), verbose=0))
        kind = NonFiniteLossError if what == "loss" else NonFiniteGradientError
        assert type(error) is kind, (fault, error)
        assert f"on rank {last()}" in str(error)
        assert difference(model.get_weights(), before) == 0.0
        assert not any(np.any(v) for v in model.optimizer.variables[2:])  # momentum, of a first step


def case_a_loss_scale_optimizer_skips_as_ever():
    steps = step_batches(np.random.default_rng(44), 3)
    for policy in ("raise", "skip"):
        model = network()
        optimizer = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=64.0)
        model.compile(hvd.DistributedOptimizer(optimizer), loss=hvd.Objective(tricky, nonfinite=policy))
        own = mine(spoiled(steps, {1: "gradient infinite"}))
        model.fit(dataset(own[:1]), verbose=0)
        before = model.get_weights()
        model.fit(dataset(own[1:2]), verbose=0)
        assert difference(model.get_weights(), before) == 0.0
        assert float(model.optimizer.dynamic_scale) == 32.0
        model.fit(dataset(own[2:]), verbose=0)
        assert difference(model.get_weights(), before) > 0.0
        assert model.optimizer.last_step.skipped == 0
        same_on_all_ranks([v.numpy() for v in model.trainable_variables])
    model = network()
    optimizer = keras.optimizers.LossScaleOptimizer(sgd())
    with pytest.raises(ConfigError, match="LossScaleOptimizer"):
        model.compile(hvd.DistributedOptimizer(optimizer), loss=hvd.Objective("mse", nonfinite="drop"))


@needs(more="gloo-2 gloo-3 mpi-2")
def case_local_steps():
    def terms():
        return (hvdloss.CommunicationCost(policies=(SyncPeriod(2),)),)

    with pytest.raises(ConfigError, match="SyncPeriod"):
        hvd.Objective("mse", terms=terms(), nonfinite="skip")
    steps = step_batches(np.random.default_rng(45), 5)
    own = mine(spoiled(steps, {2: "gradient infinite"}))
    model = network()
    model.compile(hvd.DistributedOptimizer(sgd()), loss=hvd.Objective(tricky, terms=terms()))
    error = raised(lambda: model.fit(dataset(own), verbose=0))
    assert type(error) is NonFiniteGradientError, error
    assert f"on rank {last()}" in str(error)
    same_on_all_ranks([v.numpy() for v in model.trainable_variables])
    model = network()
    model.compile(
        hvd.DistributedOptimizer(sgd()), loss=hvd.Objective(tricky, terms=terms(), nonfinite="drop")
    )
    model.fit(dataset(own), verbose=0)
    assert [one.dropped for one in model.optimizer.last_step.ranks] == [0] * last() + [1]
    assert all(np.isfinite(v).all() for v in model.get_weights())
    same_on_all_ranks([v.numpy() for v in model.trainable_variables])


def case_shapes_and_weights_of_zero():
    (step,) = step_batches(np.random.default_rng(46), 1)
    x, y, w = step[hvd.rank()]
    model = network()
    model.compile(hvd.DistributedOptimizer(sgd()), loss=hvd.Objective("mse"))
    before = model.get_weights()
    error = raised(lambda: model.fit(x, y, sample_weight=0 * w, batch_size=64, verbose=0))
    assert type(error) is NoWeightError, error
    objective = hvd.Objective("mse")
    error = raised(lambda: objective(y, model(x), np.ones((len(y) + 1, 1))))
    assert type(error) is ShapeError, error
    assert f"rank {hvd.rank()}" in str(error)
    assert difference(model.get_weights(), before) == 0.0


def case_one_policy_for_a_model():
    def two_heads():
        i = keras.Input((5,))
        return keras.Model(i, [keras.layers.Dense(1, name="a")(i), keras.layers.Dense(1, name="b")(i)])

    losses = {"a": hvd.Objective("mse", nonfinite="skip"), "b": "mse"}
    with pytest.raises(ConfigError, match=r"'raise' and 'skip'"):
        two_heads().compile(hvd.DistributedOptimizer(sgd()), loss=losses)
    (step,) = step_batches(np.random.default_rng(47), 1)
    x, y, _ = step[hvd.rank()]
    model = two_heads()
    losses = {name: hvd.Objective("mse", nonfinite="drop") for name in "ab"}
    model.compile(hvd.DistributedOptimizer(sgd()), loss=losses)
    error = raised(lambda: model.fit(x, {"a": y, "b": y}, verbose=0))
    assert type(error) is ConfigError, error
    model = two_heads()
    losses = {name: hvd.Objective(tricky, nonfinite="skip") for name in "ab"}
    model.compile(hvd.DistributedOptimizer(sgd()), loss=losses)
    bad = y.copy()
    if hvd.rank() == last():
        bad[0] = 1e6
    before = model.get_weights()
    model.fit(x, {"a": y, "b": bad}, batch_size=64, verbose=0)
    assert difference(model.get_weights(), before) == 0.0
    assert model.optimizer.last_step.skipped == 1


def case_the_policy_is_part_of_the_config():
    objective = hvd.Objective("mse", nonfinite="skip")
    assert hvd.Objective.from_config(objective.get_config()).nonfinite == "skip"
    assert hvd.Objective("mse").get_config()["nonfinite"] == "raise"
    with pytest.raises(ConfigError, match="nonfinite='never'"):
        hvd.Objective("mse", nonfinite="never")
