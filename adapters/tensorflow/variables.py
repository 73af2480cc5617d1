"""Variables of the library's own, made at once wherever they are first needed."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

__all__ = ["variable"]

try:
    from tensorflow.python.ops.resource_variable_ops import ResourceVariable as _Kind
except ImportError:  # where TensorFlow has moved it, tracing takes longer, and all else is as it was
    _Kind = tf.Variable


def variable(value: Any, name: str, **options: Any) -> tf.Variable:
    """Return a variable that is not trained, also while a ``tf.function`` is traced.

    A function that makes a ``tf.Variable`` while it is traced is traced twice (and once more into a
    ``tf.cond``, where an initial value cannot be lifted out of it), even where ``tf.init_scope`` makes it
    outside. Of what is made here the function is not told: its value is there at once.
    """
    with tf.init_scope():
        return _Kind(value, trainable=False, name=name, **options)
