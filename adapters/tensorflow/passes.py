"""What a backward pass says while it runs: why it has no exact step, and what it weighs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from hvdloss.errors import HvdlossError
from hvdloss.losses.passes import weight_gradient_error
from hvdloss.tensorflow._graphs import depend_on
from hvdloss.tensorflow.variables import variable

__all__ = ["as_data", "clear_refusals", "pop_refusal", "refuse", "set_weight_of_pass", "weight_of_pass"]

_found: list[HvdlossError] = []
_weight: list[tf.Variable] = []  # made when a layer wants it


def refuse(error: HvdlossError) -> None:
    """Have the next row that this rank takes tell that it cannot go on, because of `error`.

    To be called where a gradient function runs, which in a graph is while it is traced.
    """
    _found[:] = [error]


def pop_refusal() -> HvdlossError | None:
    """Return what was refused since the last row was taken, and forget it."""
    return _found.pop() if _found else None


def clear_refusals() -> None:
    """Forget what was refused in a backward pass of which no row was taken."""
    _found.clear()


def as_data(weight: tf.Tensor) -> tf.Tensor:
    """Return `weight` without its gradient; a backward pass that finds it to have one is refused."""

    @tf.custom_gradient
    def data(w: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        def grad(upstream: tf.Tensor) -> tf.Tensor:
            if _is_trained(weight, upstream):
                refuse(weight_gradient_error("an objective", "tf.stop_gradient(weight)"))
            return tf.zeros_like(upstream)

        return tf.identity(w), grad

    return data(weight)


def _is_trained(x: tf.Tensor, upstream: tf.Tensor) -> bool:
    """Return whether somebody wants the gradient of `x`, which its backward function was called for.

    That of an inner ``tf.function`` gives gradients of all arguments, whoever wants them: there `x` must come
    from a trained variable.
    """
    if not tf.is_symbolic_tensor(x) or upstream.graph is x.graph:
        return True
    variables = getattr(x.graph, "trainable_variables", ())
    return bool(depend_on(x, [x.graph.capture(v.handle) for v in variables], differentiably=True))


def set_weight_of_pass(weight: Any) -> None:
    """Say what the gradients of the backward pass that begins will be multiplied with; 1 when it is over."""
    if _weight:
        _weight[0].assign(tf.cast(weight, tf.float64))


def weight_of_pass() -> tf.Variable:
    """Return what is said of the backward pass that is under way, float64."""
    if not _weight:
        with tf.init_scope(), tf.device("CPU:0"):
            _weight.append(variable(1.0, "hvdloss_weight_of_pass", dtype=tf.float64))
    return _weight[0]
