"""What programs written for Horovod with Keras 2 need of Keras 3, and what AutoGraph is told."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

import tensorflow as tf
from hvdloss.errors import ConfigError

__all__ = [
    "SyncBatchNormalization",
    "as_the_caller_would",
    "leave_library_unconverted",
    "let_variables_be_called",
    "refuse_synchronized",
]


def leave_library_unconverted() -> None:
    """Have AutoGraph pass over this library, as it does over TensorFlow and Keras.

    Nothing here branches in Python on a tensor's value, so converting it gains nothing, and takes 20 seconds
    of processor time in the first ``tf.function`` and as long as tracing itself in all others. TensorFlow has
    no public list of such libraries; where this one is gone, tracing is slow, and all else as it was.
    """
    try:
        from tensorflow.python.autograph.core import config

        if not any(str(rule) == str(config.DoNotConvert("hvdloss")) for rule in config.CONVERSION_RULES):
            config.CONVERSION_RULES = (config.DoNotConvert("hvdloss"), *config.CONVERSION_RULES)
    except (ImportError, AttributeError):
        pass


def as_the_caller_would(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a user's function, to be called from here as the code that is being traced would call it.

    That is: converted by AutoGraph, if that code is.
    """
    if tf.executing_eagerly():
        return function
    autograph = tf.__internal__.autograph
    return autograph.tf_convert(function, autograph.control_status_ctx(), convert_by_default=False)


class _CallableList(list[Any]):
    """A list that may be called for itself."""

    def __call__(self) -> list[Any]:
        return self


def let_variables_be_called() -> None:
    """Let ``optimizer.variables()`` be written as in Keras 2 and Horovod's examples; a list in Keras 3."""
    optimizers = (keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer)
    for owner in {next(c for c in o.__mro__ if "variables" in vars(c)) for o in optimizers}:
        plain = vars(owner)["variables"]
        if isinstance(plain, property) and not hasattr(plain.fget, "_hvdloss"):

            def variables(self: Any, get: Any = plain.fget) -> _CallableList:
                return _CallableList(get(self))

            variables._hvdloss = True  # type: ignore[attr-defined]
            variables.__doc__ = plain.__doc__
            owner.variables = property(variables)


def SyncBatchNormalization(*args: Any, fused: bool | None = None, **kwargs: Any) -> keras.layers.Layer:
    """Return ``keras.layers.BatchNormalization(..., synchronized=True)``: see :func:`refuse_synchronized`."""
    return keras.layers.BatchNormalization(*args, synchronized=True, **kwargs)


def refuse_synchronized(hvd: Any) -> None:
    """Have Keras's batch normalisation refuse to train on several ranks if it is to be synchronized.

    Keras synchronizes it under ``tf.distribute`` alone, and says nothing where there is none: each rank then
    normalises by its own batch.
    """
    layer = keras.layers.BatchNormalization
    plain = layer._moments
    if hasattr(plain, "_hvdloss"):
        return

    @functools.wraps(plain)
    def moments(self: Any, inputs: Any, mask: Any) -> Any:
        if self.synchronized and hvd.is_initialized() and hvd.size() > 1:
            raise ConfigError(
                f"layer {self.name!r}: BatchNormalization(synchronized=True), and so SyncBatchNormalization, "
                f"does nothing on {hvd.size()} ranks: each would normalise by its own batch. Use "
                f"GroupNormalization or LayerNormalization, whose statistics are each sample's own; or "
                f"synchronized=False, if statistics of each rank's own batch are meant"
            )
        return plain(self, inputs, mask)

    moments._hvdloss = True  # type: ignore[attr-defined]
    layer._moments = moments
