"""The user's own hooks on parameters: they act on the gradient of all ranks' elements, as in one process.

By themselves they would run in the backward pass, on what one rank and micro-batch adds to the gradient: to
clip that is not to clip the gradient. So they are taken off the parameters before a backward pass and run
when the gradient is complete. Handles remove them as ever: they know the dictionaries, which stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hvdloss.torch.parameters import OptimizerParameters

__all__ = ["StepHooks"]

_NAME = "_hvdloss_hooks"  # on the parameter: they outlive an optimizer, and are those of the next


class _Hooks:
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


def _same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    """Return whether two tensors are equal, where NaN is NaN."""
    if a is None or a.shape != b.shape:
        return False
    a, b = (x.to_dense() if x.layout is not torch.strided else x for x in (a, b))
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _hooks_of(p: torch.nn.Parameter) -> _Hooks | None:
    """Return the hooks taken off a parameter; None if it has none."""
    return getattr(p, _NAME, None)


def _kept(p: torch.nn.Parameter) -> _Hooks:
    found = _hooks_of(p)
    if found is None:
        found = _Hooks()
        setattr(p, _NAME, found)
    return found


def _adopt(p: torch.nn.Parameter) -> None:
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


class StepHooks:
    """What the user sees and does of the gradients of an optimizer's steps.

    The hooks on its parameters; gradients that were there before a step; and what was done to gradients
    between the reduction and the update.
    """

    def __init__(self, parameters: OptimizerParameters) -> None:
        self._parameters = parameters
        self.clear()

    def clear(self) -> None:
        """Begin a step."""
        self._stashed: dict[int, torch.Tensor] = {}
        self._before: list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]] = []
        self._watched: list[tuple[torch.nn.Parameter, torch.Tensor, int]] = []

    def adopt(self) -> None:
        """Take the user's hooks off the parameters: they see the gradient of all ranks, not of a pass."""
        for p in self._parameters.all():
            _adopt(p)

    @property
    def count(self) -> int:
        """How many there are, by now."""
        found = (_hooks_of(p) for p in self._parameters.all())
        return sum(one.count for one in found if one is not None)

    def stash(self, passes: int, arrived: torch.nn.Parameter | None = None) -> None:
        """Keep gradients that were not cleared since the last step: they add to this step's, once.

        With one pass per step they may stay where they are, since weighted averaging leaves what is
        equal on all ranks as it is; with several passes only the first one's gradient would hold them.

        `arrived`: a parameter whose gradient is already this pass's.
        """
        if passes == 1:
            return
        for p in self._parameters.all():
            if p.grad is not None and p is not arrived:
                # A copy, as it is a view of the bucket that this step overwrites.
                self._stashed[id(p)] = p.grad.detach().clone()
                p.grad = None

    def run(self, reduced: Callable[[], None], check: Callable[[bool], None] | None = None) -> None:
        """Add what was stashed to the step's gradients, and let hooks see them.

        Args:
            reduced: called when gradients have their last values, before hooks see parameters.
            check: called with whether hooks changed a gradient or a parameter, whose value is restored if it
                raises. None where all ranks have the same hooks.
        """
        hooked = [
            (p, found) for p in self._parameters.all() if (found := _hooks_of(p)) and p.grad is not None
        ]
        if check is not None:
            self._before = [(p, p.grad.clone(), p.detach().clone()) for p, _ in hooked]  # type: ignore[union-attr]
        for p, hooks in hooked:
            hooks.on_gradient(p)
        if self._stashed:
            for p in self._parameters.all():
                if (kept := self._stashed.get(id(p))) is not None:
                    p.grad = kept if p.grad is None else p.grad + kept
        reduced()
        for p, hooks in hooked:
            hooks.on_accumulated(p)
        if check is None:
            return
        try:
            check(any(not self._is_as_before(*one) for one in self._before))
        except BaseException:
            self._restore()
            raise

    def _is_as_before(self, p: torch.nn.Parameter, grad: torch.Tensor, value: torch.Tensor) -> bool:
        kept = self._stashed.get(id(p))
        return _same(p.grad, grad if kept is None else grad + kept) and _same(p.detach(), value)

    @torch.no_grad()
    def _restore(self) -> None:
        """Undo what hooks did to parameters."""
        for p, _, value in self._before:
            p.copy_(value)

    def watch_gradients(self) -> None:
        """Notice from now on whether gradients are changed before the update."""
        self._watched = [(p, p.grad, p.grad._version) for p in self._parameters.all() if p.grad is not None]

    def gradients_changed(self) -> bool:
        """Return whether they were, since :meth:`watch_gradients` in this step."""
        return any(p.grad is not grad or grad._version != version for p, grad, version in self._watched)
