"""Packed sequences in TensorFlow and Keras, in one process: graphs of unknown shapes, datasets, losses."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import hvdloss.keras as hvdk  # noqa: E402
import hvdloss.tensorflow as hvd  # noqa: E402
from hvdloss.errors import ConfigError, ShapeError, UsageError, WeightError  # noqa: E402
from hvdloss.losses.numpy_ops import NumpyOps  # noqa: E402
from hvdloss.tensorflow.ops import TensorFlowOps  # noqa: E402

EDGES = np.array([0, 3, 4, 8])
IDS = np.array([5, 5, 5, 2, 9, 9, 9, 9])
rng = np.random.default_rng(0)
Y, T, W = rng.normal(size=8), rng.normal(size=8), rng.uniform(0.5, 2.0, 8)
U, GROUPS = np.array([1.0, 2.0, 0.5]), np.array([1, 0, 1])


def right(u=None, groups=None):
    u = np.ones(3) if u is None else u
    cuts = np.split(W * (Y - T) ** 2, EDGES[1:-1])
    means = np.array([x.sum() / w.sum() for x, w in zip(cuts, np.split(W, EDGES[1:-1]), strict=True)])
    groups = np.zeros(3) if groups is None else groups
    return np.mean([np.average(means[groups == g], weights=u[groups == g]) for g in set(groups)])


def test_segment_totals_are_those_of_numpy():
    ids = np.array([[7, -3, 7], [2**60, 0, -3]])
    w = rng.uniform(size=(2, 3))
    found = TensorFlowOps().segment_totals(tf.constant(ids), tf.constant(w))
    np.testing.assert_allclose(found, NumpyOps().segment_totals(ids, w), rtol=1e-15)


@pytest.mark.parametrize("form", ["ids", "lengths", "rank 2"])
@pytest.mark.parametrize("graph", [False, True])
def test_packed_elements_give_the_loss_of_the_unpacked_ones(form, graph):
    objective = hvd.Objective("mse", reduction="sequence_mean")
    y, t, w = map(tf.constant, (Y, T, W))
    if form == "ids":
        where = np.repeat(np.arange(3), np.diff(EDGES))
        segments = hvd.Segments(IDS, groups=GROUPS[where], weight=U[where])
    else:
        segments = hvd.Segments(cu_seqlens=EDGES.astype(np.int32), groups=GROUPS, weight=U)
    segments = segments.arrays(tf.constant)
    if form == "rank 2":
        y, t, w = (x[tf.newaxis] for x in (y, t, w))

    def call(y, t, w, segments):
        with tf.GradientTape() as tape:
            tape.watch(y)
            loss = objective(y, t, w, segments=segments)
        return loss, tape.gradient(loss, y)

    if graph:  # of unknown shapes
        specs = [tf.TensorSpec([None] * len(x.shape), x.dtype) for x in (y, t, w)]
        if form == "rank 2":
            specs = [tf.TensorSpec([1, None], tf.float64)] * 3
        inner = tf.nest.map_structure(lambda x: tf.TensorSpec([None], x.dtype), segments)
        call = tf.function(call).get_concrete_function(*specs, inner)
    loss, gradient = call(y, t, w, segments)
    np.testing.assert_allclose(loss, right(U, GROUPS), rtol=1e-13)
    assert np.isfinite(gradient).all()


def test_lengths_that_do_not_fit_are_refused_and_in_a_graph_make_the_step_fail():
    objective = hvd.Objective("mse", reduction="sequence_mean")
    with pytest.raises(ShapeError, match=r"cu_seqlens=\[0, 5\] must rise from 0 to the number of losses, 8"):
        objective(Y, T, segments=hvd.Segments(cu_seqlens=np.array([0, 5])))
    v = tf.Variable(1.0, dtype=tf.float64)

    @tf.function
    def step(edges):
        with tf.GradientTape() as tape:
            loss = objective(v * Y, T, segments=hvd.Segments(cu_seqlens=edges))
        return hvd.DistributedGradientTape(tape, objective).gradient(loss, [v])

    step(tf.constant([0, 5, 8]))
    with pytest.raises(Exception, match="NaN or infinite"):
        step(tf.constant([0, 4, 5]))


def test_weights_of_a_dataset_for_fit():
    """What fit takes: weights with which the mean over elements is that over sequences."""
    one = tf.data.Dataset.from_tensors((Y, T, W, IDS))
    one = one.map(lambda y, t, w, ids: (y, t, hvdk.sequence_weights(w, ids)))
    ((y, t, w),) = list(one)
    np.testing.assert_allclose(tf.reduce_sum(w), 3, rtol=1e-14)
    np.testing.assert_allclose(hvdk.Objective("mse")(t, y, w), right(), rtol=1e-13)


def test_a_loss_of_keras_takes_segments():
    objective = hvdk.Objective("mse", reduction="sequence_mean")
    np.testing.assert_allclose(objective(T, Y, W, segments=tf.constant(IDS)), right(), rtol=1e-6)


def test_micro_batches_are_linked_eagerly():
    objective = hvd.Objective("mse", reduction="sequence_mean")
    linked = hvd.link_segments([IDS[:6], IDS[6:]], [W[:6], W[6:]])
    parts = [slice(6), slice(6, 8)]
    found = [
        float(objective(Y[p], T[p], W[p], segments=one)) * one.sequences()
        for p, one in zip(parts, linked, strict=True)
    ]
    np.testing.assert_allclose(sum(found) / 3, right(), rtol=1e-13)
    with pytest.raises(WeightError, match="weights of 2 elements are not those that link_segments"):
        objective(Y[6:], T[6:], segments=linked[1])
    with pytest.raises(UsageError, match=r"link_segments\(\) in a graph"):
        tf.function(lambda: hvd.link_segments([IDS]))()
    with pytest.raises(ConfigError, match="segments= is for losses of elements"):
        hvd.Objective("soft_dice")(Y, T, segments=IDS)
