"""Collectives with gradients, under real ranks and on one."""

from __future__ import annotations

import doctest

import pytest

pytest.importorskip("tensorflow")

import tensorflow as tf

import hvdloss.tensorflow as hvd
from hvdloss.tensorflow import collectives as c
from tests.ranks import Case, parallel_cases


@parallel_cases("tf_collectives", group="tensorflow")
def test_collectives(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@pytest.mark.parametrize(
    "function",
    [
        c.all_reduce,
        c.all_gather,
        c.reduce_scatter,
        lambda x: c.broadcast(x, 0),
        c.shift,
        c.copy_to_ranks,
        lambda x: c.all_reduce(x, replicated=True),
        lambda x: c.all_gather(x, replicated=True),
    ],
)
@pytest.mark.parametrize("graph", [False, True])
def test_one_rank(function, graph):
    hvd.init()
    x = tf.random.stateless_normal((4, 3), (1, 2), dtype=tf.float64)

    def twice(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                out = function(x)
                loss = tf.reduce_sum(out**3)
            grad = inner.gradient(loss, x)
        return out, grad, outer.gradient(grad, x)

    out, grad, again = (tf.function(twice) if graph else twice)(x)
    tf.debugging.assert_equal(out, x)
    tf.debugging.assert_near(grad, 3 * x**2)
    tf.debugging.assert_near(again, 6 * x)


def test_examples():
    assert doctest.testmod(c).failed == 0
