"""Keras's batch normalisation over the batch of all ranks, with its gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

import tensorflow as tf
from hvdloss.errors import ConfigError, UsageError
from hvdloss.tensorflow.collectives import all_reduce
from hvdloss.tensorflow.ops import once
from hvdloss.tensorflow.passes import weight_of_pass
from hvdloss.tensorflow.step import keep_error

__all__ = ["SyncBatchNormalization", "synchronize_moments", "synchronized_layers"]


def _summed(x: tf.Tensor, rows: tf.Tensor, name: str, process_set: Any) -> tf.Tensor:
    """Return the sum of vectors over ranks; backward: of what arrives, each rank's with its pass's weight.

    An objective's backward pass gives the gradient of this rank's mean, which is multiplied with this rank's
    weight only at the end: here, where gradients of several ranks meet, that comes first, and is undone.
    """
    weight = weight_of_pass()

    @tf.custom_gradient
    def summed(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        def grad(upstream: tf.Tensor) -> tf.Tensor:
            w = tf.cast(weight.read_value(), upstream.dtype)
            lost = tf.cast((rows > 0) & tf.equal(w, 0), upstream.dtype)
            sent = tf.concat([w * upstream, lost[tf.newaxis]], 0)
            total = all_reduce(sent, name=f"{name}.backward", process_set=process_set)
            with tf.control_dependencies(_refusing(total[-1] > 0)):
                out = tf.math.divide_no_nan(total[:-1], w)
            return once(out, [x], ConfigError("a gradient of a gradient, through SyncBatchNormalization"))

        return all_reduce(x, name=name, process_set=process_set), grad

    return summed(x)


def _refusing(lost: tf.Tensor) -> list[Any]:
    """Raise, on all ranks, if a rank's samples have no gradient; in a graph return what does."""

    def refuse(lost: Any) -> bool:
        if lost:
            raise UsageError(
                "SyncBatchNormalization: a rank has samples in this layer of which none has a weight in the "
                "objective, so what they do to the statistics has no gradient; leave such samples out, or "
                "give one a weight"
            )
        return True

    if tf.executing_eagerly():
        refuse(bool(lost))
        return []
    return [tf.numpy_function(lambda lost: keep_error(lambda: refuse(lost)), [lost], tf.bool)]


def _moments(layer: Any, x: tf.Tensor, mask: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Return mean and variance of all ranks' samples by channel, as Keras would of all in one process.

    Collectives: two all-reduces of as many numbers as there are channels; two in the backward pass.
    """
    axes, name = layer._reduction_axes, f"hvdloss.{layer.name}"
    process_set = getattr(layer, "_hvdloss_process_set", None)
    present = None
    if mask is not None:
        present = tf.broadcast_to(tf.cast(mask, tf.bool)[..., tf.newaxis], tf.shape(x))
        x = tf.where(present, x, tf.zeros_like(x))
    ones = tf.ones_like(x) if present is None else tf.cast(present, x.dtype)
    sums, counts = tf.reduce_sum(x, axes), tf.reduce_sum(ones, axes)
    rows, channels = tf.reduce_max(counts), counts.shape[0]
    total = _summed(tf.concat([sums, tf.stop_gradient(counts)], 0), rows, f"{name}.mean", process_set)
    # Keras adds this where there is a mask.
    count = tf.stop_gradient(total[channels:]) + (0.0 if mask is None else keras.config.epsilon())
    mean = total[:channels] / count
    spread = [1 if axis in axes else channels for axis in range(len(x.shape))]
    squares = tf.math.squared_difference(x, tf.reshape(mean, spread))
    squares = squares if present is None else tf.where(present, squares, tf.zeros_like(squares))
    return mean, _summed(tf.reduce_sum(squares, axes), rows, f"{name}.variance", process_set) / count


def synchronize_moments(hvd: Any) -> None:
    """Have Keras's ``BatchNormalization(synchronized=True)`` take statistics of all ranks' samples.

    By itself Keras synchronizes under ``tf.distribute`` alone, and says nothing where there is none.
    """
    layer = keras.layers.BatchNormalization
    plain = layer._moments
    if hasattr(plain, "_hvdloss"):
        return

    @functools.wraps(plain)
    def moments(self: Any, inputs: Any, mask: Any) -> Any:
        if self.synchronized and hvd.is_initialized() and hvd.size() > 1:
            return _moments(self, inputs, mask)
        return plain(self, inputs, mask)

    moments._hvdloss = True  # type: ignore[attr-defined]
    layer._moments = moments


def synchronized_layers(model: Any) -> list[Any]:
    """Return the layers of a model of Keras that need all ranks in every training step."""
    return [
        one
        for one in model._flatten_layers()
        if isinstance(one, keras.layers.BatchNormalization) and one.synchronized and one.trainable
    ]


def SyncBatchNormalization(*args: Any, fused: bool | None = None, **kwargs: Any) -> keras.layers.Layer:
    """Return ``keras.layers.BatchNormalization(..., synchronized=True)``, as one process with all samples.

    Ranks may have different numbers of samples, or none, and an objective's weights may differ between them.
    Every rank calls the layer equally often while it trains, and its backward pass too; ``fit`` checks that
    ranks have equally many batches.

    Args:
        fused: accepted for Horovod's sake.

    Raises:
        UsageError: in the backward pass, on all ranks: a rank has samples here, but none with a weight in its
            objective.

    Collectives: two all-reduces of the channels' sums while training, two more in the backward pass.
    Source: Ioffe and Szegedy 2015, over the batch of all ranks.
    """
    return keras.layers.BatchNormalization(*args, synchronized=True, **kwargs)
