"""The part of a backward pass between the scalar that it begins with and the values of the losses.

It is run by hand, node by node, so that none of the hooks run by which gradients are reduced: what arrives at
each loss is what the script multiplies it with, and what arrives at parameters is what it adds to the losses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

__all__ = ["Arrived", "Unreadable", "arrive"]


class Unreadable(Exception):
    """What the check cannot tell from this graph, in words."""


@dataclass
class Arrived:
    """What a backward pass brings.

    Attributes:
        at_losses: the gradient that arrives at each stop, by node.
        at_leaves: leaves that are reached without passing a stop, each with its gradient.
        consumers: the nodes that use each node's value.
    """

    at_losses: dict[Any, torch.Tensor] = field(default_factory=dict)
    at_leaves: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    consumers: dict[Any, list[Any]] = field(default_factory=dict)


def arrive(
    roots: Iterable[tuple[torch.Tensor, torch.Tensor]], stops: Collection[Any], outputs: Collection[Any]
) -> Arrived:
    """Run a backward pass down to the values of losses.

    Args:
        roots: tensors with the gradients that the pass begins with.
        stops: nodes of the values of losses.
        outputs: nodes of what models returned; a gradient that arrives there went around the losses.

    Raises:
        Unreadable: one did.
    """
    waiting: dict[Any, dict[int, torch.Tensor]] = {}
    for tensor, gradient in roots:
        if tensor.grad_fn is not None:
            _add(waiting, tensor.grad_fn, tensor.output_nr, gradient)
    found = Arrived()
    for node in _in_order(list(waiting), stops, found.consumers):
        gradients = waiting.pop(node, None)
        if gradients is None:
            continue
        leaf = getattr(node, "variable", None)
        if node in stops:
            found.at_losses[node] = gradients[0]
        elif leaf is not None:
            found.at_leaves.append((leaf, gradients[0]))
        elif node in outputs and "DDPSink" not in type(node).__name__:
            raise Unreadable(
                "a part of the loss is computed from the model's output by none of PyTorch's loss functions"
            )
        else:
            _pass_on(node, gradients, waiting)
    return found


def _in_order(roots: list[Any], stops: Collection[Any], consumers: dict[Any, list[Any]]) -> list[Any]:
    """Return the nodes before the stops, each after all that use it."""
    done: list[Any] = []
    seen: set[Any] = set()
    path = [(root, False) for root in roots]
    while path:
        node, left = path.pop()
        if left:
            done.append(node)
        elif node not in seen:
            seen.add(node)
            path.append((node, True))
            for following, _ in () if node in stops else node.next_functions:
                if following is not None:
                    consumers.setdefault(following, []).append(node)
                    path.append((following, False))
    return done[::-1]


def _add(waiting: dict[Any, dict[int, torch.Tensor]], node: Any, index: int, gradient: torch.Tensor) -> None:
    at = waiting.setdefault(node, {})
    at[index] = at[index] + gradient if index in at else gradient


def _pass_on(node: Any, gradients: dict[int, torch.Tensor], waiting: dict[Any, Any]) -> None:
    """Run a node."""
    count = max(len(getattr(node, "_input_metadata", ())), max(gradients) + 1)
    given = [gradients.get(index) for index in range(count)]
    out = node.apply(*given) if isinstance(node, BackwardCFunction) else node(*given)
    out = out if isinstance(out, tuple) else (out,)
    for (following, index), gradient in zip(node.next_functions, out, strict=False):
        if following is not None and gradient is not None:
            _add(waiting, following, index, gradient)
