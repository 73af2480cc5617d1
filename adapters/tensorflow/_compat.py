"""What programs written for Horovod with Keras 2 need of Keras 3, and what AutoGraph is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

import tensorflow as tf

__all__ = [
    "as_the_caller_would",
    "leave_library_unconverted",
    "let_variables_be_called",
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
