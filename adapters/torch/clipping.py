"""Clipping of gradients that are not yet those of all ranks: they are reduced first."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["reduce_before_clipping"]

_steps: weakref.WeakSet[Any] = weakref.WeakSet()
# The last one is what clip_grad_norm_ calls, under whatever name a script has imported it before.
_CLIPPING = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "_clip_grads_with_norm_")


def reduce_before_clipping(step: Any) -> None:
    """Have the clipping functions of ``torch.nn.utils`` synchronise an optimizer's step first.

    A rank with fewer micro-batches than others, or none, clips the gradient of all ranks then, as they do.
    """
    _steps.add(step)
    for module in (torch.nn.utils, torch.nn.utils.clip_grad):
        for name in _CLIPPING:
            plain = getattr(module, name, None)
            if plain is not None and not hasattr(plain, "_hvdloss"):
                setattr(module, name, _reducing(plain))


def _reducing(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(parameters, torch.Tensor):
            parameters = list(parameters)  # which a generator gives once
        given = {id(parameters)} if isinstance(parameters, torch.Tensor) else set(map(id, parameters))
        for step in sorted(_steps, key=lambda one: one.name):  # in one order on all ranks
            if step.awaits(given):
                step.synchronize()
        return plain(parameters, *args, **kwargs)

    clip._hvdloss = True  # type: ignore[attr-defined]
    return clip
