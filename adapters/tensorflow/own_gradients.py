"""What happens to a rank's own gradients between a tape and an optimizer.

Gradients are reduced where the optimizer takes them. What was done to them before is done to this rank's own:
exact if it is linear, and the same on all ranks; clipping is not.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from hvdloss.tensorflow._graphs import linear_in

__all__ = ["changed", "watch_tapes"]

_given: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # what tapes gave, by identity
_eager = False  # whether one gave something since gradients were last looked at, outside any graph


def watch_tapes() -> None:
    """Have every gradient that a ``tf.GradientTape`` gives from now on known."""
    plain = tf.GradientTape.gradient
    if hasattr(plain, "_hvdloss"):
        return

    @functools.wraps(plain)
    def gradient(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _eager
        out = plain(self, *args, **kwargs)
        found = [one for one in tf.nest.flatten(out) if one is not None]
        for one in (*found, *_tensors(found)):
            _given[id(one)] = one
        _eager = _eager or (bool(found) and tf.executing_eagerly())
        return out

    gradient._hvdloss = True  # type: ignore[attr-defined]
    tf.GradientTape.gradient = gradient


def changed(gradients: Sequence[Any]) -> bool | None:
    """Return whether gradients are another function of what tapes gave than a linear one.

    None where that cannot be known: eagerly, or where they came by way of variables. What another function
    gave, of which nothing is known, counts as unchanged.
    """
    global _eager
    known, _eager = _eager, False
    others = [g for g in gradients if g is not None and _given.get(id(g)) is not g]
    if not others:
        return False
    if tf.executing_eagerly():
        return None if known else False
    graph = tf.compat.v1.get_default_graph()
    sources = [
        one for one in _tensors(list(_given.values())) if tf.is_symbolic_tensor(one) and one.graph is graph
    ]
    if not sources:
        return False
    found = [linear_in(one, sources) for one in _tensors(others) if tf.is_symbolic_tensor(one)]
    if False in found:
        return True
    return None if None in found else False


def _tensors(gradients: Sequence[Any]) -> list[tf.Tensor]:
    """Return dense gradients, and the rows of sparse ones."""
    return [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients]
