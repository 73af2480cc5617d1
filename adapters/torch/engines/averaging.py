"""Horovod's optimizer without an objective: gradients are averaged over ranks, whatever each rank saw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["averaging_optimizer"]


class _Averaging:
    """The methods that reduce gradients; mixed into a subclass of the optimizer's class, as Horovod does."""

    _base: type[torch.optim.Optimizer]
    _reduce: Callable[[torch.Tensor, str], torch.Tensor]
    _compression: Any
    _skips = False
    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def synchronize(self) -> None:
        """Reduce the gradients; one that this rank does not have counts as zero."""
        by_dtype: defaultdict[Any, list[torch.nn.Parameter]] = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    by_dtype[p.dtype].append(p)
        for dtype, parameters in by_dtype.items():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
            flat, ctx = self._compression.compress(torch.cat([g.reshape(-1) for g in grads]))
            flat = self._compression.decompress(self._reduce(flat, f"gradients.{dtype}"), ctx)
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = part.view_as(p).clone()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Let ``step()`` use the gradients unchanged, after :meth:`synchronize`."""
        self._skips = True
        try:
            yield
        finally:
            self._skips = False

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Nothing: gradients are reduced in ``step()``, after however many passes."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Reduce, and update."""
        if closure is not None:
            given = closure

            def closure() -> Any:
                with torch.enable_grad():
                    value = given()
                self.synchronize()
                return value

        elif not self._skips:
            self.synchronize()
        return self._base.step(self, closure)  # type: ignore[arg-type]


def averaging_optimizer(
    optimizer: torch.optim.Optimizer,
    reduce: Callable[[torch.Tensor, str], torch.Tensor],
    compression: Any,
) -> Any:
    """Return an instance of a subclass of the optimizer's class that reduces gradients in ``step()``.

    Args:
        optimizer: whose parameter groups and state it shares.
        reduce: reduces a flat tensor over ranks, in place.
        compression: what travels.
    """
    base = type(optimizer)
    members = {k: v for k, v in vars(_Averaging).items() if not k.startswith("__")}
    cls = type(base.__name__, (base,), {**members, "_base": base, "__doc__": base.__doc__})
    wrapped = cls.__new__(cls)
    wrapped.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k != "step"})
    wrapped._reduce, wrapped._compression = reduce, compression
    return wrapped
