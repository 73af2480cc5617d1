"""Contrastive losses in TensorFlow: value and every gradient against one process on the union."""

from __future__ import annotations

import functools
import math

import contrastive_reference as reference
import numpy as np
import pytest
import tensorflow as tf
from tf_support import same_on_all_ranks

import hvdloss.tensorflow as hvd
from hvdloss.errors import ShapeError, UsageError
from hvdloss.losses import InfoNCE, SigLIP, SupervisedContrastive
from hvdloss.losses.base import OneRank
from hvdloss.tensorflow.collectives import group_of
from hvdloss.tensorflow.ops import TensorFlowOps
from tests.ranks import needs

NEEDS = needs("gloo-2")

OPS = TensorFlowOps()


class Arithmetic:
    """What `contrastive_reference` computes with."""

    exp, log, sqrt, transpose = tf.exp, tf.math.log, tf.sqrt, tf.transpose
    constant = staticmethod(tf.constant)

    @staticmethod
    def sum(x, axis=None):
        return tf.reduce_sum(x, axis)


def tensors(batch, keys=("x", "y", "scale", "bias")):
    return {k: tf.constant(batch[k], tf.float64) for k in keys}


def gradient(tape, value, leaves):
    grads = tape.gradient(value, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return {k: tf.convert_to_tensor(g) for k, g in grads.items()}


def definition(name, batch):
    """Return value and gradients of one process that sees the present rows only."""
    loss, formula, extra = reference.LOSSES[name]
    keep = np.flatnonzero(batch["w"])
    leaves = tensors(batch)
    with tf.GradientTape() as tape:
        tape.watch(leaves)
        value = formula(
            Arithmetic,
            tf.gather(leaves["x"], keep),
            tf.gather(leaves["y"], keep),
            tf.constant(batch["w"][keep]),
            labels=batch["labels"][keep],
            **{k: leaves[k] for k in extra if k != "y"},
            **reference.settings(loss),
        )
    return value, gradient(tape, value, leaves)


def ours(name, group):
    """Return a function of this rank's rows that gives value and gradients."""
    loss, _, extra = reference.LOSSES[name]

    def run(leaves, labels, w):
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            prediction = tuple(leaves[k] for k in ("x", *extra)) if extra else leaves["x"]
            value = loss.value(OPS, group, prediction, labels, w)
        return value, gradient(tape, value, leaves)

    return run


def graph(run, extra):
    """Return the same as a graph that knows no number of rows."""
    rows = tf.TensorSpec([None, reference.COLUMNS], tf.float64)
    number = tf.TensorSpec([], tf.float64)
    leaves = {k: rows if k in "xy" else number for k in ("x", *extra)}
    labels, w = tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.float64)
    return tf.function(run, input_signature=[leaves, labels, w], autograph=False)


def compare(batch, cut, functions, group=None):
    """Compare losses with their definition; `functions`: name -> what `ours` or `graph` gave."""
    group = group or group_of()
    mine = slice(cut[group.rank], cut[group.rank + 1])
    local = {k: v[mine] if np.ndim(v) else v for k, v in batch.items()}
    errors = []
    for name, run in functions.items():
        leaves = tensors(local, ("x", *reference.LOSSES[name][2]))
        value, grads = run(leaves, tf.constant(local["labels"]), tf.constant(local["w"]))
        expected, exact = definition(name, batch)
        errors.append(abs(float(value) - float(expected)) / abs(float(expected)))
        for key, grad in grads.items():
            whole = exact[key].numpy()
            a = grad if key in "xy" else group.all_reduce(grad, "summed")
            b = whole[mine] if key in "xy" else whole
            assert tuple(a.shape) == b.shape, (name, key)
            errors.append(np.abs(a - b).max() / np.abs(whole).max() if b.size else 0.0)
        assert max(errors) <= 1e-11, (name, errors)
    return float(max(errors))


def eager():
    return {name: ours(name, group_of()) for name in reference.LOSSES}


@functools.cache
def graphs():
    """Return every loss's graph; traced once for all cases, since tracing is most of what they take."""
    return {name: graph(ours(name, group_of()), extra) for name, (_, _, extra) in reference.LOSSES.items()}


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_random_splits_eager():
    rng = np.random.default_rng(1)
    worst = 0.0
    for trial in range(5):
        batch = reference.shuffled(rng, reference.sample(rng, weighted=trial % 3 > 0))
        worst = max(worst, compare(batch, reference.split(rng, len(batch["w"]), hvd.size()), eager()))
    return {"error, float64": worst, "random splits": 5 * len(reference.LOSSES)}


@needs("gloo-2", more="gloo-1 gloo-3 gloo-4 mpi-2")
def case_random_splits_in_a_function():
    rng = np.random.default_rng(2)
    functions = graphs()
    worst = 0.0
    for trial in range(12):
        batch = reference.shuffled(rng, reference.sample(rng, weighted=trial % 3 > 0))
        worst = max(worst, compare(batch, reference.split(rng, len(batch["w"]), hvd.size()), functions))
    return {"error, float64": worst, "random splits": 12 * len(reference.LOSSES)}


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_absent_rows_may_be_anything():
    rng = np.random.default_rng(3)
    functions = graphs()
    worst = 0.0
    for _ in range(3):
        batch = reference.shuffled(rng, reference.sample(rng))
        absent = batch["w"] == 0
        batch["x"][absent], batch["y"][absent] = np.nan, np.inf
        worst = max(worst, compare(batch, reference.split(rng, len(batch["w"]), hvd.size()), functions))
    return {"error, float64": worst}


def case_no_weight_at_all():
    rng = np.random.default_rng(4)
    batch = reference.sample(rng)
    cut = reference.split(rng, len(batch["w"]), hvd.size())
    mine = slice(cut[hvd.rank()], cut[hvd.rank() + 1])
    local = {k: v[mine] if np.ndim(v) else v for k, v in batch.items()}
    for name, run in (eager()).items():
        leaves = tensors(local, ("x", *reference.LOSSES[name][2]))
        w = tf.zeros(len(local["w"]), tf.float64)
        value, grads = run(leaves, tf.constant(local["labels"]), w)
        assert math.isnan(float(value))
        assert all((g.numpy() == 0).all() for g in grads.values()), (name, grads)


def case_a_large_scale():
    """What overflows if written down carelessly."""
    batch = reference.sample(np.random.default_rng(5))
    leaves = tensors(batch, ("x", "y"))
    for loss, rest in ((InfoNCE(), ()), (SigLIP(), (-10.0,))):
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            value = loss.value(OPS, group_of(), (*leaves.values(), math.log(2000.0), *rest), None, None)
        assert math.isfinite(float(value))
        assert np.isfinite(tape.gradient(value, leaves["x"])).all()


def _objective_against_one_process(name, rng):
    loss, formula, extra = reference.LOSSES[name]
    batch = reference.shuffled(rng, reference.sample(rng))
    cut = reference.split(rng, len(batch["w"]), hvd.size())
    mine = np.arange(cut[hvd.rank()], cut[hvd.rank() + 1])
    theta = tf.Variable(rng.normal(size=(3, 3)))
    scalars = [tf.Variable(batch[k], dtype=tf.float64) for k in extra if k != "y"]
    leaves = [theta, *scalars]
    objective = hvd.Objective(loss)

    def predict(rows):
        x = tf.constant(batch["x"][rows]) @ theta
        return (x, tf.constant(batch["y"][rows]) @ tf.transpose(theta), *scalars) if extra else x

    def step():
        with tf.GradientTape() as tape:
            value = objective(
                predict(mine), tf.constant(batch["labels"][mine]), tf.constant(batch["w"][mine])
            )
        tape = hvd.DistributedGradientTape(tape, objective=objective)
        return value, tape.gradient(value, leaves)

    keep = np.flatnonzero(batch["w"])
    with tf.GradientTape() as tape:
        given = predict(keep)
        expected = formula(
            Arithmetic,
            given[0] if extra else given,
            given[1] if extra else None,
            tf.constant(batch["w"][keep]),
            labels=batch["labels"][keep],
            **dict(zip([k for k in extra if k != "y"], scalars, strict=True)),
            **reference.settings(loss),
        )
    exact = tape.gradient(expected, leaves)
    errors = []
    for run in (step, tf.function(step, autograph=False)):
        value, grads = run()
        same_on_all_ranks([np.asarray(value)])
        errors.append(abs(float(value) - float(expected)) / abs(float(expected)))
        errors += [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(grads, exact, strict=True)]
    return errors


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_an_objective_of_them():
    """The gradients that a distributed tape gives are those of the whole."""
    rng = np.random.default_rng(7)
    errors = [max(_objective_against_one_process(name, rng)) for name in reference.LOSSES]
    assert max(errors) <= 1e-11, errors
    return {"error, float64": max(errors)}


@needs("gloo-2", more="gloo-1")
def case_parity_with_numpy():
    """One core: the values are those of NumPy's arrays in one process."""
    batch = reference.sample(np.random.default_rng(8))
    for name, (loss, _, extra) in reference.LOSSES.items():
        given = [tf.constant(batch[k], tf.float64) for k in ("x", *extra)]
        labels, w = tf.constant(batch["labels"]), tf.constant(batch["w"])
        value = float(loss.value(OPS, OneRank(), tuple(given) if extra else given[0], labels, w))
        arrays = [batch[k] for k in ("x", *extra)]
        other = float(loss.of(tuple(arrays) if extra else arrays[0], batch["labels"], batch["w"]))
        assert abs(value - other) <= 1e-13 * abs(other), (name, value, other)


def case_second_derivatives():
    """InfoNCE has them; SigLIP says that it has not."""
    rng = np.random.default_rng(9)
    batch = reference.sample(rng)
    cut = reference.split(rng, len(batch["w"]), hvd.size())
    mine = slice(cut[hvd.rank()], cut[hvd.rank() + 1])

    def penalty(x, loss):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                value = loss(x)
            squares = tf.reduce_sum(tf.convert_to_tensor(inner.gradient(value, x)) ** 2)
        return outer.gradient(squares, x)

    x, y, w = (tf.constant(batch[k]) for k in "xyw")
    of = InfoNCE(0.5)
    got = penalty(x[mine], lambda x: of.value(OPS, group_of(), (x, y[mine]), None, w[mine]))
    keep = np.flatnonzero(batch["w"])
    exact = penalty(
        x,
        lambda x: reference.info_nce(
            Arithmetic, tf.gather(x, keep), tf.gather(y, keep), tf.gather(w, keep), temperature=0.5
        ),
    )
    exact = tf.convert_to_tensor(exact).numpy()
    if got.shape[0]:
        assert np.abs(got - exact[mine]).max() <= 1e-11 * np.abs(exact).max()
    ring = SigLIP()
    with pytest.raises(UsageError, match="cannot be differentiated again"):
        penalty(x[mine], lambda x: ring.value(OPS, group_of(), (x, y[mine], 1.0, 0.0), None, w[mine]))


def case_errors():
    x, group = tf.ones((2, 3)), group_of()
    for loss, prediction, text in (
        (InfoNCE(), x, "prediction must be .x, y. or .x, y, log_scale."),
        (InfoNCE(), (x, x, x), "log_scale of shape"),
        (InfoNCE(), (x, x[:1]), "features of shape"),
        (SigLIP(), (x, x), r"prediction must be .x, y, log_scale, bias., not a tuple of 2"),
        (SupervisedContrastive(), x[0], "features of shape"),
    ):
        with pytest.raises(ShapeError, match=f"{text}.*rank {hvd.rank()}"):
            loss.value(OPS, group, prediction, tf.zeros(2), None)
