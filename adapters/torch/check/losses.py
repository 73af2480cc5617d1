"""The calls of loss functions of a script, and each as a sum over elements with what divides it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hvdloss.torch import objective
from hvdloss.torch.check.graph import Arrived, Unreadable
from hvdloss.torch.reading import elements_of
from torch.overrides import TorchFunctionMode

__all__ = ["Calls", "LossCall", "Sums"]

_SAME = 1e-5  # relative: elements of one call that are multiplied with the same number


@dataclass
class Sums:
    """A call as a sum over its elements: it adds ``factor * numerator`` to what is differentiated.

    Attributes:
        numerator: sum of w l, with its graph.
        denominators: what the sum may be meant to be divided by, by name; the likeliest first.
        losses: of the elements, with their graph.
        present: which elements count.
    """

    factor: float
    numerator: torch.Tensor
    denominators: dict[str, float]
    losses: torch.Tensor
    present: torch.Tensor


class LossCall:
    """A loss that a script computed, with its elements.

    Args:
        name, reduction: of the loss.
        value: what the script got.
        losses: of the elements; None for a loss that has none.
        weight: of the elements, of their shape; None for all 1.
        ours: whether it is one of this library's objectives.
    """

    def __init__(
        self,
        name: str,
        reduction: str,
        value: torch.Tensor,
        losses: torch.Tensor | None,
        weight: torch.Tensor | None,
        ours: bool = False,
    ) -> None:
        self.name, self.reduction, self.ours = name, reduction, ours
        self.node, self._value = value.grad_fn, value.detach()
        self._losses, self._weight = losses, weight

    def sums(self, arrived: Arrived, scale: float) -> Sums:
        """Return the call as sums.

        Args:
            arrived: in the backward pass.
            scale: of a GradScaler, which is undone after the backward pass.

        Raises:
            Unreadable: its elements are multiplied with numbers of which nobody can tell what divides them.
        """
        losses = self._losses
        if losses is None:
            raise Unreadable(f"{self.name} is a loss of all elements together, which is not a mean over them")
        gradient = arrived.at_losses[self.node].detach().double() / scale
        weight = torch.ones_like(losses) if self._weight is None else self._weight.detach()
        if self.reduction == "none":
            factor, given = self._weights_given(gradient, arrived)
            weight = weight * given.to(weight)
        else:
            factor = float(gradient)
        present = weight != 0
        weighed = torch.where(present, weight * losses, torch.zeros_like(losses))
        total, count = float(weight.double().sum()), float(present.sum())
        denominators = {"weights": total}
        if self.reduction == "sequence_mean":
            per_row = weight.flatten(1).sum(1)
            rows = weighed.flatten(1).sum(1) / torch.where(per_row == 0, 1, per_row)
            weighed, denominators = rows, {"sequences": float((per_row != 0).sum())}
        elif self.reduction == "batch_mean":
            denominators = {"elements": count}
        elif self.reduction in ("none", "sum"):
            rows_of = float(losses.shape[0] if losses.dim() else 1)
            denominators |= {"elements that count": count, "elements": float(losses.numel()), "rows": rows_of}
        numerator = weighed.sum()
        if self.reduction not in ("none", "sum"):
            (divisor,) = denominators.values()
            factor = factor / divisor if divisor else 0.0
        return Sums(factor, numerator, denominators, losses, present)

    def _weights_given(self, gradient: torch.Tensor, arrived: Arrived) -> tuple[float, torch.Tensor]:
        """Return what the script multiplies elements with: a common factor, and a weight of each."""
        if not gradient.numel() or not bool((gradient != 0).any()):
            return 0.0, torch.zeros_like(gradient)
        weight = self._multiplied_with(arrived, gradient)
        if weight is None:
            weight = (gradient != 0).double()
        at = int(weight.abs().argmax())
        factor = float(gradient.reshape(-1)[at] / weight.reshape(-1)[at])
        if not torch.allclose(
            gradient, factor * weight, rtol=_SAME, atol=_SAME * float(gradient.abs().max())
        ):
            raise Unreadable(
                f"the elements of {self.name} are multiplied with different numbers, whose scale does not "
                f"show"
            )
        return factor, weight

    def _multiplied_with(self, arrived: Arrived, like: torch.Tensor) -> torch.Tensor | None:
        """Return the weights by which the script multiplies the elements, if it multiplies them at once."""
        node, weight = self.node, None
        while True:
            following = arrived.consumers.get(node, [])
            if len(following) != 1 or type(following[0]).__name__ != "MulBackward0":
                return weight
            (node,) = following
            saved = [s for s in (node._saved_self, node._saved_other) if s is not None and s.dim()]
            if len(saved) == 1:
                try:
                    other = saved[0].detach().double().expand_as(like)
                except RuntimeError:
                    return weight
                weight = other if weight is None else weight * other


class Calls(TorchFunctionMode):
    """Sees the calls of loss functions, of objectives, and of embeddings, wherever they come from.

    Args:
        embedded: told of the output of an embedding and of its indices.
    """

    def __init__(self, embedded: Callable[[torch.Tensor, Any], None]) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self._embedded, self._paused = embedded, 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look away."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._paused or not isinstance(out, torch.Tensor) or not out.requires_grad:
            return out
        if func is F.embedding:
            self._embedded(out, args[0] if args else None)
        elif (found := elements_of(func, args, kwargs or {})) is not None:
            asked, elements = found
            self.calls.append(LossCall(func.__name__, asked, out, elements.losses, elements.weight))
        return out

    @contextmanager
    def of_objectives(self) -> Iterator[None]:
        """Record the calls of this library's objectives, and not what they call."""
        measure, reduce_losses = objective.Objective._measure, objective.reduce_losses
        seen: list[tuple[Any, Any, str]] = []

        def observed(ops: Any, losses: Any, weight: Any, reduction: str, **more: Any) -> Any:
            out = reduce_losses(ops, losses, weight, reduction, **more)
            if weight is not None:
                weight = torch.as_tensor(weight, device=losses.device).to(losses.dtype).expand_as(losses)
            seen.append((losses, weight, reduction))
            return out

        def recorded(one: Any, *args: Any) -> Any:
            with self.paused():
                seen.clear()
                out = measure(one, *args)
            if out.requires_grad:
                losses, weight, reduction = seen[-1] if seen else (None, None, one.reduction)
                self.calls.append(LossCall(one.name, reduction, out, losses, weight, ours=True))
            return out

        objective.Objective._measure, objective.reduce_losses = recorded, observed  # type: ignore[method-assign]
        try:
            yield
        finally:
            objective.Objective._measure, objective.reduce_losses = measure, reduce_losses  # type: ignore[method-assign]
