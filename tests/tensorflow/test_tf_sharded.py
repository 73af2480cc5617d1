"""Heads split over ranks by class, in TensorFlow and Keras: under real ranks, and alone."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

import keras
import numpy as np
import tensorflow as tf

import hvdloss.keras as khvd
import hvdloss.tensorflow as hvd
from hvdloss.errors import ConfigError
from tests.ranks import Case, parallel_cases


@parallel_cases("tf_sharded", group="tensorflow")
def test_sharded(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


def test_alone_it_is_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    logits, y = tf.constant(rng.normal(size=(3, 5, 4))), rng.integers(0, 4, (3, 5))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(logits)
        losses = hvd.sharded_cross_entropy(logits, y, hvd.ClassShards(4))
        right = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
    np.testing.assert_allclose(losses, right, rtol=1e-13)
    np.testing.assert_allclose(tape.gradient(losses, logits), tape.gradient(right, logits), atol=1e-15)


def test_columns_known_only_in_a_graph() -> None:
    head = khvd.ShardedDense(9)
    head.build((None, 3))

    @tf.function(input_signature=[tf.TensorSpec([None, 3]), tf.TensorSpec([None], tf.int64)] * 2)
    def losses(x, y, _, columns):
        return hvd.sharded_cross_entropy(head(x, columns=columns), y, head.shards, columns=columns)

    x, y = tf.ones((2, 3)), tf.constant([8, 1], tf.int64)
    columns = head.sample(y, 0.5, seed=1)
    some = tf.gather(head(x), columns, axis=1)
    renamed = [int(np.flatnonzero(columns.numpy() == label)[0]) for label in (8, 1)]
    right = tf.nn.sparse_softmax_cross_entropy_with_logits(renamed, some)
    np.testing.assert_allclose(losses(x, y, x, columns), right, rtol=1e-5)


def test_a_saved_head_is_an_ordinary_one(tmp_path) -> None:
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((3,)), khvd.ShardedDense(5)])
    keras.utils.set_random_seed(3)
    ordinary = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5)])
    assert np.array_equal(model.get_weights()[0], ordinary.get_weights()[0])
    ordinary.set_weights(khvd.full_weights(model))
    ordinary.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(np.ones((2, 3))), model(np.ones((2, 3))), rtol=1e-6)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="use_bias=False"):
        khvd.ShardedDense(5, normalize=True)
    with pytest.raises(ConfigError, match="divisor of 1"):
        hvd.grid(2)
