"""Clipping of gradients that are not yet those of all ranks: refused, as ``.grad`` is None by then."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from hvdloss.errors import UsageError

__all__ = ["see_clipping"]

_engines: weakref.WeakSet[Any] = weakref.WeakSet()
# The last one is what clip_grad_norm_ calls, under whatever name a script has imported it before.
_CLIPPING = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "_clip_grads_with_norm_")


def see_clipping(engine: Any) -> None:
    """Have the clipping functions of ``torch.nn.utils`` look at what this optimizer holds."""
    _engines.add(engine)
    for module in (torch.nn.utils, torch.nn.utils.clip_grad):
        for name in _CLIPPING:
            plain = getattr(module, name, None)
            if plain is not None and not hasattr(plain, "_hvdloss"):
                setattr(module, name, _checked(plain, name))


def _checked(plain: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(plain)
    def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(parameters, torch.Tensor):
            parameters = list(parameters)  # which a generator gives once
        given = {id(parameters)} if isinstance(parameters, torch.Tensor) else set(map(id, parameters))
        for engine in _engines:
            if engine.unreduced and not given.isdisjoint(map(id, engine.parameters())):
                raise UsageError(
                    f"{name.removeprefix('_')} before the gradients of all ranks are there: until "
                    f"optimizer.synchronize() the parameters' .grad is None, so nothing would be clipped. "
                    f"Write optimizer.synchronize(), then clip, then with optimizer.skip_synchronize(): "
                    f"optimizer.step()"
                )
        return plain(parameters, *args, **kwargs)

    clip._hvdloss = True  # type: ignore[attr-defined]
    return clip
