"""What PyTorch's backward passes say of the loop: what arrives at a loss, and where its graph leads."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from hvdloss.errors import ConfigError
from hvdloss.losses.passes import SAME, divided_by, factor_of_passes
from hvdloss.torch.ops import on_host, to_device_async

__all__ = [
    "divided",
    "division",
    "leads_to",
    "mark_reduced",
    "multiplied",
    "not_reduced",
    "scale_of_pass",
    "scales",
    "see_scalers",
    "told_factor",
    "weight_of_pass",
]

_scalers: weakref.WeakSet[Any] = weakref.WeakSet()


class _OfPass:
    """A value of the backward pass that is under way, if it has one."""

    def __init__(self) -> None:
        self._value: torch.Tensor | None = None

    def begin(self, value: torch.Tensor) -> None:
        """Keep the value until the pass is over, in place of what one that failed may have left."""
        self._value = value
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self._value = None

    def __call__(self) -> torch.Tensor | None:
        return self._value


#: What a GradScaler multiplied the loss of the pass with; None if none did.
scale_of_pass = _OfPass()
#: What the gradients of the pass will be multiplied with, for the objective that began it; None if none did.
weight_of_pass = _OfPass()


class _Multiplied(torch.autograd.Function):
    """Identity that multiplies the gradient, and has no second derivative."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, factor: Callable[[], torch.Tensor | float], second: str
    ) -> torch.Tensor:
        ctx.factor, ctx.second = factor, second
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if torch.is_grad_enabled():  # backward(create_graph=True)
            raise ConfigError(ctx.second)
        (grad,) = grads
        factor = ctx.factor()
        return grad * (factor.to(grad) if isinstance(factor, torch.Tensor) else factor), None, None


def multiplied(value: torch.Tensor, factor: Callable[[], torch.Tensor | float], second: str) -> torch.Tensor:
    """Return the value, whose gradient is multiplied with what `factor` returns in the backward pass.

    `second` is what to say to those who want a second derivative, which it does not have.
    """
    out: torch.Tensor = _Multiplied.apply(value, factor, second)
    return out


def see_scalers() -> None:
    """Have every GradScaler known once it scales a loss: what arrives at the loss is then its scale.

    Its ``unscale_`` then has gradients reduced before it looks at them, as its ``step`` does.
    """
    plain = torch.amp.GradScaler.scale
    if hasattr(plain, "_hvdloss"):
        return

    @functools.wraps(plain)
    def scale(self: Any, outputs: Any) -> Any:
        _scalers.add(self)
        scaled = plain(self, outputs)
        factor = None if self._scale is None else self._scale.detach().clone()
        for one in scaled if isinstance(scaled, list | tuple) else [scaled]:
            if factor is not None and isinstance(one, torch.Tensor) and one.requires_grad:
                one.register_hook(functools.partial(_begin_scaled, factor))
        return scaled

    unscale = torch.amp.GradScaler.unscale_

    @functools.wraps(unscale)
    def unscale_(self: Any, optimizer: Any) -> None:
        if hasattr(optimizer, "_hvdloss"):
            optimizer.synchronize()
        unscale(self, optimizer)

    torch.amp.GradScaler.unscale_ = unscale_  # type: ignore[method-assign]
    scale._hvdloss = True  # type: ignore[attr-defined]
    torch.amp.GradScaler.scale = scale  # type: ignore[method-assign]


def _begin_scaled(factor: torch.Tensor, gradient: torch.Tensor) -> None:
    """Note, until a backward pass is over, that its loss was scaled."""
    scale_of_pass.begin(factor)


def scales(like: torch.Tensor) -> list[torch.Tensor]:
    """Return what the GradScalers that were used multiply losses with, on the device of `like`."""
    found = [scaler._scale.detach() for scaler in _scalers if scaler._scale is not None]
    return [s if s.device == like.device else to_device_async(s.cpu(), like.device) for s in found]


def divided(arrived: torch.Tensor, passes: int, scales: list[torch.Tensor]) -> Any:
    """Return :func:`~hvdloss.losses.passes.divided_by` of what arrived at a loss; on a device a tensor."""
    if on_host(arrived):
        return divided_by(float(arrived), passes, [float(s) for s in scales])
    x = arrived.detach().double()
    whole = torch.stack([torch.ones_like(x), *(s.double() for s in scales)])
    near = torch.isclose(x * passes, whole, rtol=1e-5, atol=0.0).any()
    return near & ~torch.isclose(x, whole, rtol=1e-5, atol=0.0).any()


def division(arrived: torch.Tensor, passes: int, scales: list[torch.Tensor]) -> Any:
    """Return what undoes a division of the loss by the passes: a number, or a tensor on a device."""
    found = divided(arrived, passes, scales)
    return (
        torch.where(found, float(passes), 1.0).double() if isinstance(found, torch.Tensor) else passes**found
    )


def told_factor(passes: list[tuple[torch.Tensor, torch.Tensor]], before: float) -> tuple[Any, Any]:
    """Return :func:`hvdloss.losses.passes.factor_of_passes`, as numbers, or as tensors on a device."""
    if not passes or all(on_host(factor) for _, factor in passes):
        return factor_of_passes([(float(weight), float(factor)) for weight, factor in passes], before)
    weight, factor = (
        torch.stack([x.double().reshape(()) for x in some]) for some in zip(*passes, strict=True)
    )
    told = (weight > 0) & factor.isfinite()
    high = factor.masked_fill(~told, -torch.inf).amax()
    low = factor.masked_fill(~told, torch.inf).amin()
    zero = torch.zeros_like(high)
    apart = (high - low > SAME * torch.maximum(high.abs(), low.abs())).double()
    changed = ((high - before).abs() > SAME * abs(before)).double()
    return torch.where(told.any(), high, zero), torch.where(
        told.any(), torch.maximum(2 * apart, changed), zero
    )


def parameters_of(graph: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Give the leaves that a graph (nodes of autograd) leads to."""
    seen: set[Any] = set()
    waiting = [node for node in graph if node is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        waiting += [following for following, _ in node.next_functions if following is not None]


def leads_to(graph: Iterable[Any], parameters: set[int]) -> bool:
    """Return whether a graph leads to one of the parameters, given by identity."""
    return any(id(leaf) in parameters for leaf in parameters_of(graph))


def mark_reduced(parameters: Iterable[torch.Tensor]) -> None:
    """Note that a distributed optimizer has these parameters."""
    for p in parameters:
        p._hvdloss_reduced = True  # type: ignore[attr-defined]


def not_reduced(graph: Iterable[Any]) -> list[tuple[int, ...]]:
    """Return the shapes of parameters that a graph leads to, and no distributed optimizer has."""
    return [
        tuple(leaf.shape)
        for leaf in parameters_of(graph)
        if isinstance(leaf, torch.nn.Parameter) and not hasattr(leaf, "_hvdloss_reduced")
    ]
