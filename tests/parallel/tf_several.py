"""Several losses in one tape, each with its denominator over all ranks, against one process."""

from __future__ import annotations

import math
import warnings

import numpy as np
import tensorflow as tf
from tf_support import (
    Network,
    cuts,
    data,
    difference,
    part,
    raised,
    reference,
    same_on_all_ranks,
    traced,
    weighted_mse,
)

import hvdloss.tensorflow as hvd
from hvdloss.errors import ConfigError, NonFiniteLossError, NoWeightError, UsageError
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")
FACTORS = {"a": 1.0, "b": 0.7, "dice": 0.5}


def tasks():
    """Return a mean of squares, absolute errors by their number, and Dice of signs."""
    return hvd.Objectives(
        {
            "a": hvd.Objective("mse"),
            "b": hvd.Objective("mae", reduction="batch_mean"),
            "dice": hvd.Objective("soft_dice"),
        }
    )


def decay(net):
    return 0.1 * tf.add_n([tf.reduce_sum(one**2) for one in net.parameters])


def union(net, x, y, a, b):
    """Return the losses in one process, by their definitions, of weights `a` and `b`; those there are."""
    p = net(x)
    t, q = (y > 0).astype(y.dtype), tf.sigmoid(p)
    losses = {"dice": 1 - 2 * tf.reduce_sum(q * t) / tf.reduce_sum(q + t)}
    if a.any():
        losses["a"] = tf.reduce_sum(a * (p - y) ** 2) / tf.reduce_sum(a)
    if b.any():
        losses["b"] = tf.reduce_sum(b * tf.abs(p - y)) / np.count_nonzero(b)
    return losses


def gradients(net, objectives, x, y, a, b, called=("a", "b")):
    """Return what the tape of all ranks gives."""
    with tf.GradientTape() as tape:
        p = net(x)
        loss = 0.5 * objectives["dice"](p, tf.cast(y > 0, y.dtype)) + decay(net)
        if "a" in called:
            loss += objectives["a"](p, y, a)
        if "b" in called:
            loss += 0.7 * objectives["b"](p, y, b)
    return hvd.DistributedGradientTape(tape, objectives).gradient(loss, net.parameters)


def random_steps(net, objectives, step, *, absent):
    """Take steps of random splits; return the largest error of gradients and reports."""
    rng, error = np.random.default_rng(3), 0.0
    for _ in range(8):
        x, y, a = data(rng, 24)
        b = a[::-1].copy()
        where = cuts(rng, 24, hvd.size())
        called = [[name for name in "ab" if not absent or rng.random() < 0.5] for _ in range(hvd.size())]
        for rank, names in enumerate(called):
            rows = slice(where[rank], where[rank + 1])
            a[rows] *= "a" in names
            b[rows] *= "b" in names
        mine = map(tf.constant, part((x, y, a, b), where))
        found = step(*mine, called[hvd.rank()]) if absent else step(*mine)

        def loss(x=x, y=y, a=a, b=b):
            parts = [FACTORS[name] * one for name, one in union(net, x, y, a, b).items()]
            return tf.add_n([*parts, decay(net)])

        error = max(error, difference(found, reference(loss, net.parameters)))
        losses, report = union(net, x, y, a, b), objectives.last_step
        for name, told in report.losses.items():
            if name not in losses:
                assert math.isnan(told.value), told
                assert told.weight == told.part == 0, told
                continue
            error = max(error, abs(told.value / float(losses[name]) - 1))
            assert abs(told.factor - FACTORS[name]) < 1e-12, (name, told)
        whole = sum(FACTORS[name] * float(one) for name, one in losses.items())
        error = max(error, abs(report.loss / whole - 1))
        same_on_all_ranks([np.array([report.loss]), *[g.numpy() for g in found]])
        for one, g in zip(net.parameters, found, strict=True):
            one.assign_sub(0.05 * g)
    assert error < 1e-12, error
    return {"error, float64": error}


def case_random_steps_of_three_losses():
    """Tasks that ranks do not call in a step, or nobody does; elements without weight; a penalty."""
    net, objectives = Network(np.random.default_rng(1)), tasks()
    return random_steps(net, objectives, lambda *args: gradients(net, objectives, *args), absent=True)


def case_three_losses_in_a_graph():
    net, objectives = Network(np.random.default_rng(2)), tasks()
    step = traced(lambda x, y, a, b: gradients(net, objectives, x, y, a, b))
    return random_steps(net, objectives, step, absent=False)


def case_what_has_no_exact_step_is_refused():
    rng = np.random.default_rng(4)
    net = Network(rng)
    x, y, w = map(tf.constant, part(data(rng, 20), cuts(rng, 20, hvd.size(), empty=False)))
    objectives = hvd.Objectives([hvd.Objective("mse"), hvd.Objective("mae")])
    mse, mae = objectives.values()

    def step(factor=1.0, weight=w, target=y, twice=False):
        with tf.GradientTape() as tape:
            p = net(x)
            loss = mse(p, target, weight) + factor * (mse if twice else mae)(p, y, weight)
        return hvd.DistributedGradientTape(tape, objectives).gradient(loss, net.parameters)

    step()
    mse(net(x), y)  # a validation, which no tape has seen
    for call, kind, words in (
        (lambda: step(1.0 + hvd.rank()), UsageError, "'mae' was multiplied with different numbers"),
        (lambda: step(weight=0 * w), NoWeightError, "no element"),
        (lambda: step(target=y * (math.nan if hvd.rank() == 0 else 1.0)), NonFiniteLossError, "rank 0"),
        (lambda: step(twice=True), UsageError, "'mse' was called more than once"),
    ):
        error = raised(call)
        assert isinstance(error, kind), (kind, error)
        assert words in str(error), error
        assert objectives.last_step.step == 1
    step()
    assert objectives.last_step.step == 2

    with tf.GradientTape() as tape:
        loss = mse(net(x), y)
    assert isinstance(raised(lambda: tape.gradient(loss, net.parameters)), UsageError)
    graph = tf.function(lambda factor: step(factor))
    error = raised(lambda: graph(tf.constant(1.0 + hvd.rank(), tf.float64)))
    assert "multiplied with different numbers" in str(error), error


def weighed_by(losses, s):
    """Return losses under trained weights (Kendall et al. 2018), and a function of their values."""
    a, b = losses
    return tf.exp(-s[0]) * a + tf.exp(-s[1]) * b + tf.reduce_sum(s) + 0.1 * a * tf.sqrt(b)


def case_trained_weights_of_losses():
    """Exact with the values of all ranks; without, refused in a graph, and warned of once eagerly."""
    rng = np.random.default_rng(5)
    net, s = Network(rng), tf.Variable(tf.constant([0.3, -0.2], tf.float64))
    variables = [*net.parameters, s]
    objectives = hvd.Objectives({"a": hvd.Objective("mse"), "b": hvd.Objective("mae")})
    a, b = objectives.values()

    def step(x, y, w, known=True, loss_of=weighed_by):
        with tf.GradientTape() as tape:
            p = net(x)
            losses = a(p, y, w), b(p, y)
            loss = loss_of(hvd.global_losses(*losses) if known else losses, s)
        return hvd.DistributedGradientTape(tape, objectives).gradient(loss, variables)

    error, graph = 0.0, traced(lambda x, y, w: step(x, y, w))
    for call in (step, graph, graph):
        x, y, w = data(rng, 20)
        found = call(*map(tf.constant, part((x, y, w), cuts(rng, 20, hvd.size()))))

        def loss(x=x, y=y, w=w):
            p = net(x)
            return weighed_by((weighted_mse(p, y, w), tf.reduce_mean(tf.abs(p - y))), s)

        error = max(error, difference(found, reference(loss, variables)))
        for one, g in zip(variables, found, strict=True):
            one.assign_sub(0.02 * g)
    assert error < 1e-12, error

    mine = list(map(tf.constant, part((x, y, w), cuts(rng, 20, hvd.size(), empty=False))))

    def trained(losses, s):
        return tf.exp(-s[0]) * losses[0] + losses[1] + s[0]

    if hvd.size() > 1:
        refusing = tf.function(lambda: step(*mine, known=False, loss_of=trained), autograph=False)
        message = str(raised(refusing))
        for words in ("RankError", "value of the loss 'a'", "global_losses"):
            assert words in message, message
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for number in range(3):
                step(*mine, known=False, loss_of=trained)
                s.assign_add([0.1 * (number > 0), 0.0])
        assert sum("loss 'a' is multiplied with changes" in str(one.message) for one in told) == 1, told
    for wrong in (lambda: hvd.global_losses(tf.constant(1.0)), lambda: hvd.global_losses(a(net(x), y))):
        assert isinstance(raised(wrong), ConfigError)
    return {"error, float64": error}
