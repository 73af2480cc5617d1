"""Parameters by name, and what is compared of their gradients."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

import torch

__all__ = ["Parameters", "sampled"]

_MOST = 1 << 16  # entries of one parameter that are compared


def sampled(gradient: torch.Tensor | None, size: int) -> Any:
    """Return a gradient as a float64 vector; of a large one every n-th entry, zeros for None.

    Of a DTensor its whole. Collectives: those of ``full_tensor()``, for a DTensor.
    """
    stride = math.ceil(size / _MOST)
    if gradient is None:
        return np.zeros(math.ceil(size / stride))
    gradient = gradient.detach()
    gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    gradient = gradient.to_dense() if gradient.layout is not torch.strided else gradient
    return gradient.reshape(-1)[::stride].double().cpu().numpy().copy()  # which may be changed in place


class Parameters:
    """The parameters of the models that were called, by name."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._known: dict[str, torch.Tensor] = {}  # keeps them alive, for their identity

    def learn(self, module: torch.nn.Module) -> None:
        """Learn the names of a model's parameters."""
        for name, p in module.named_parameters():
            name = name.removeprefix("module.")
            if id(p) in self._names:
                continue
            if name in self._known:
                name = f"{type(module).__name__}.{name}"
            while name in self._known:
                name += "'"
            self._names[id(p)], self._known[name] = name, p

    @staticmethod
    def _sharded() -> dict[int, int]:
        """Return, for FSDP2's whole parameters, which graphs lead to, the shards that models show."""
        composable = sys.modules.get("torch.distributed._composable_state")
        found: dict[int, int] = {}
        for reference in list(composable._module_state_mapping.values()) if composable else ():
            for group in getattr(reference(), "_fsdp_param_groups", ()):
                for one in group.fsdp_params:
                    whole = getattr(one, "_unsharded_param", None)
                    if whole is not None:
                        found[id(whole)] = id(one.sharded_param)
        return found

    def of(self, tensors: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return those of some tensors that are parameters, by name."""
        sharded = self._sharded()
        names = ((self._names.get(sharded.get(id(p), id(p))), p) for p in tensors)
        return {name: p for name, p in names if name is not None}
