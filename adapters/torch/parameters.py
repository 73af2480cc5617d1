"""The parameters of an exact optimizer: their names, and the hooks that tell when a gradient is ready."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from hvdloss.errors import ConfigError
from hvdloss.torch.passes import mark_reduced

__all__ = ["OptimizerParameters"]


class OptimizerParameters:
    """The parameters of a torch optimizer, which it may get more of.

    Args:
        optimizer: held weakly.
        named: ``(name, parameter)`` pairs of at least the optimizer's, or None.

    Attributes:
        frozen: those that required no gradient when hooks were set.

    Raises:
        ConfigError: other pairs.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named: Iterable[tuple[str, torch.nn.Parameter]] | None,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._on_gradient: Callable[[torch.nn.Parameter], None] | None = None
        self._hooks: dict[int, Any] = {}
        self.frozen: list[torch.nn.Parameter] = []
        own = self._numbered(optimizer)
        self._names = own if named is None else _named(own, list(named))

    @staticmethod
    def _numbered(optimizer: torch.optim.Optimizer, first: int = 0) -> dict[int, str]:
        groups = enumerate(optimizer.param_groups[first:], start=first)
        return {id(p): f"parameter.{i}.{j}" for i, group in groups for j, p in enumerate(group["params"])}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Whose parameters they are."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    @property
    def gone(self) -> bool:
        """Whether the optimizer is."""
        return self._optimizer() is None

    def all(self) -> list[torch.nn.Parameter]:
        """Return them in the optimizer's order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def overlap(self, ids: set[int]) -> bool:
        """Return whether some of them are among these."""
        return not self.gone and not ids.isdisjoint(map(id, self.all()))

    def name(self, p: torch.nn.Parameter) -> str:
        """Return a parameter's name."""
        return self._names[id(p)]

    def add_groups(self, first: int) -> None:
        """Take in the parameters of groups from this one on."""
        for key, name in self._numbered(self.optimizer, first).items():
            self._names.setdefault(key, name)

    def device(self) -> torch.device:
        """Return where small messages travel: the same kind of device on all ranks."""
        devices = (p.device for p in self.all())
        return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))

    def kinds(self) -> list[Any]:
        """Return what a plan depends on of each one: the user may change it in place."""
        return [(p.dtype, p.device, p.shape) for p in self.all()]

    # -- trained, or frozen -----------------------------------------------------------------------

    def set_hooks(self, on_gradient: Callable[[torch.nn.Parameter], None] | None = None) -> None:
        """Have every parameter that requires gradients tell when its gradient is ready.

        `on_gradient`: called with it; None for the one given before.
        """
        self._on_gradient = on_gradient = on_gradient or self._on_gradient
        assert on_gradient is not None
        parameters = self.all()
        for p in parameters:
            if p.requires_grad and id(p) not in self._hooks:
                self._hooks[id(p)] = p.register_post_accumulate_grad_hook(on_gradient)
        self.frozen = [p for p in parameters if id(p) not in self._hooks]
        mark_reduced(parameters)

    def remove_hooks(self) -> None:
        """Tell of no gradient any more."""
        for hook in self._hooks.values():
            hook.remove()

    def is_trained(self, p: torch.nn.Parameter) -> bool:
        """Return whether its gradient travels."""
        return id(p) in self._hooks

    def unfrozen(self) -> bool:
        """Return whether one is to be trained now that was frozen before."""
        return any(p.requires_grad for p in self.frozen)


def _named(own: dict[int, str], named: list[Any]) -> dict[int, str]:
    """Return the given name of each of the optimizer's parameters, by identity."""
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in named):
        raise ConfigError(
            "named_parameters must give (name, parameter) pairs, as model.named_parameters() does"
        )
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"named_parameters has the same name twice: {', '.join(twice)}")
    given = {id(p): name for name, p in named}
    missing = [name for key, name in own.items() if key not in given]
    if missing:
        raise ConfigError(
            f"named_parameters names {len(given)} parameters but leaves out {len(missing)} of the "
            f"optimizer's (the first at param_groups {missing[0].removeprefix('parameter.')}); pass "
            f"all of model.named_parameters()"
        )
    return {key: given[key] for key in own}
