"""Why a backward pass has no exact step, from where it is found to the row that tells all ranks."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf
from hvdloss.errors import HvdlossError
from hvdloss.passes import weight_gradient_error

__all__ = ["as_data", "clear_refusals", "pop_refusal", "refuse"]

_found: list[HvdlossError] = []


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
            refuse(weight_gradient_error("an objective", "tf.stop_gradient(weight)"))
            return tf.zeros_like(upstream)

        return tf.identity(w), grad

    return data(weight)
