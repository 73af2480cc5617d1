"""What a graph says of how one tensor came from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

__all__ = ["depend_on", "linear_in"]

# What depends on the shape of an input, not on its values.
_OF_SHAPES = {"BroadcastGradientArgs", "OnesLike", "Rank", "Shape", "ShapeN", "Size", "ZerosLike"}


# Linear in all inputs together; in each input alone; in the first; in all but the first.
_SUMS = {"Add", "AddN", "AddV2", "BroadcastTo", "Cast", "ConcatV2", "ExpandDims", "Identity", "Mean", "Neg"}
_SUMS |= {
    "Pack",
    "Reshape",
    "Slice",
    "Split",
    "SplitV",
    "Squeeze",
    "StopGradient",
    "StridedSlice",
    "Sub",
    "Sum",
}
_SUMS |= {"Tile", "Transpose", "Unpack", "UnsortedSegmentSum"}
_PRODUCTS = {"BatchMatMulV2", "Einsum", "MatMul", "Mul", "MulNoNan"}
_QUOTIENTS = {"Div", "DivNoNan", "RealDiv"}
_CHOICES = {"Select", "SelectV2"}


def linear_in(tensor: tf.Tensor, given: Sequence[tf.Tensor]) -> bool | None:
    """Return whether a tensor is a linear function of others of its graph; None if it is none of them.

    By the operations between them: what is not known to be linear is not.
    """
    sources = {id(one) for one in given}
    reached, waiting = dict.fromkeys(sources, True), list(given)
    while waiting:
        for op in waiting.pop().consumers():
            for out in op.outputs if op.type not in _OF_SHAPES else ():
                if id(out) not in reached:
                    reached[id(out)] = True
                    waiting.append(out)

    def linear(tensor: tf.Tensor) -> bool:
        if id(tensor) in sources or id(tensor) not in reached:
            return True
        inputs = _made_of(tensor)
        kind, moving = tensor.op.type, [i for i, one in enumerate(inputs) if id(one) in reached]
        fits = (
            kind in _SUMS | {"IdentityN"}
            or (kind in _PRODUCTS and len(moving) == 1)
            or (kind in _QUOTIENTS and moving == [0])
            or (kind in _CHOICES and 0 not in moving)
        )
        return fits and all(linear(inputs[i]) for i in moving)

    return linear(tensor) if id(tensor) in reached else None


def depend_on(tensors: Any, values: Sequence[tf.Tensor], *, differentiably: bool = False) -> list[tf.Tensor]:
    """Return those of `values` that tensors of the same graph, in any structure, are computed from.

    `differentiably`: by way of what has a gradient only.
    """
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
        if not differentiably or _has_gradient(tensor):
            waiting.extend(_made_of(tensor))
    return list(found.values())


def _has_gradient(tensor: tf.Tensor) -> bool:
    kind = tensor.dtype
    return tensor.op.type != "StopGradient" and (kind.is_floating or kind.is_complex or kind == tf.resource)


def _made_of(tensor: tf.Tensor) -> Sequence[tf.Tensor]:
    """Return the tensors whose values a tensor was computed from."""
    op = tensor.op
    if op.type == "IdentityN":  # what functions with a gradient of their own become
        return [op.inputs[tensor.value_index]]
    return [] if op.type in _OF_SHAPES else list(op.inputs)
