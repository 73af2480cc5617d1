"""What a graph says of how one tensor came from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

__all__ = ["depend_on"]

# What depends on the shape of an input, not on its values.
_OF_SHAPES = {"BroadcastGradientArgs", "OnesLike", "Rank", "Shape", "ShapeN", "Size", "ZerosLike"}


def depend_on(tensors: Any, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Return those of `values` that tensors of the same graph, in any structure, are computed from."""
    sought = {id(value): value for value in values}
    found: dict[int, tf.Tensor] = {}
    waiting = [t for t in tf.nest.flatten(tensors, expand_composites=True) if tf.is_symbolic_tensor(t)]
    seen: set[int] = set()
    while waiting and len(found) < len(sought):
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if id(tensor) in sought:
            found[id(tensor)] = tensor
        waiting.extend(_made_of(tensor))
    return list(found.values())


def _made_of(tensor: tf.Tensor) -> Sequence[tf.Tensor]:
    """Return the tensors whose values a tensor was computed from."""
    op = tensor.op
    if op.type == "IdentityN":  # what functions with a gradient of their own become
        return [op.inputs[tensor.value_index]]
    return [] if op.type in _OF_SHAPES else list(op.inputs)
