"""The user's own hooks on parameters: they act on the gradient of all ranks' elements, as in one process.

By themselves they would run in the backward pass, on what one rank and micro-batch adds to the gradient: to
clip that is not to clip the gradient. So they are taken off the parameters before a backward pass and run
when the gradient is complete. Handles remove them as ever: they know the dictionaries, which stay.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Hooks", "adopt", "hooks_of", "same"]

_NAME = "_hvdloss_hooks"  # on the parameter: they outlive an optimizer, and are those of the next


class Hooks:
    """Hooks that were taken off a parameter, in the order in which they were set."""

    def __init__(self) -> None:
        self._of_gradient: list[Any] = []  # dictionaries of torch's, by handle
        self._of_accumulated: list[Any] = []

    def take_gradient(self, hooks: Any) -> None:
        """Keep what ``Tensor.register_hook`` set."""
        self._of_gradient = [one for one in self._of_gradient if one] + [hooks]

    def take_accumulated(self, hooks: Any) -> None:
        """Keep what ``register_post_accumulate_grad_hook`` set."""
        self._of_accumulated = [one for one in self._of_accumulated if one] + [hooks]

    @property
    def count(self) -> int:
        """How many there are, by now."""
        return sum(map(len, (*self._of_gradient, *self._of_accumulated)))

    def on_gradient(self, p: torch.nn.Parameter) -> None:
        """Let hooks look at the gradient of the step, or replace it."""
        for hooks in self._of_gradient:
            for hook in list(hooks.values()):
                found = hook(p.grad)
                if found is not None:
                    p.grad = found

    def on_accumulated(self, p: torch.nn.Parameter) -> None:
        """Let hooks look at the parameter, whose ``.grad`` is set."""
        for hooks in self._of_accumulated:
            for hook in list(hooks.values()):
                hook(p)


def same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    """Return whether two tensors are equal, where NaN is NaN."""
    if a is None or a.shape != b.shape:
        return False
    a, b = (x.to_dense() if x.layout is not torch.strided else x for x in (a, b))
    return bool(((a == b) | ((a != a) & (b != b))).all())


def hooks_of(p: torch.nn.Parameter) -> Hooks | None:
    """Return the hooks taken off a parameter; None if it has none."""
    return getattr(p, _NAME, None)


def _kept(p: torch.nn.Parameter) -> Hooks:
    found = hooks_of(p)
    if found is None:
        found = Hooks()
        setattr(p, _NAME, found)
    return found


def adopt(p: torch.nn.Parameter) -> None:
    """Take the user's hooks off a parameter; those of distributed optimizers stay."""
    if p._backward_hooks:
        _kept(p).take_gradient(p._backward_hooks)
        p._backward_hooks = None
    hooks = p._post_accumulate_grad_hooks
    if hooks is None or all(hasattr(hook, "_hvdloss") for hook in hooks.values()):
        return
    ours = {key: hook for key, hook in hooks.items() if hasattr(hook, "_hvdloss")}
    for key in ours:
        del hooks[key]
    p._post_accumulate_grad_hooks = None
    for hook in ours.values():
        p.register_post_accumulate_grad_hook(hook)
    _kept(p).take_accumulated(hooks)
