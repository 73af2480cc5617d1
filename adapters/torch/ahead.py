"""Weights that are exchanged ahead of the backward pass, for gradients that somebody else averages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from hvdloss.errors import ConfigError, NonFiniteLossError, NoWeightError, WeightError
from hvdloss.losses.reduction import Contribution
from hvdloss.torch._backend import hvd
from hvdloss.torch.engines.group import EngineGroup
from hvdloss.torch.ops import TorchOps, on_host, to_device_async
from hvdloss.torch.passes import parameters_of

__all__ = ["Ahead"]

_OPS = TorchOps()


class _Late(torch.autograd.Function):
    """The mean, whose gradient is the numerator's times a factor that is known in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, numerator: torch.Tensor, mean: torch.Tensor, factor: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        ctx.factor = factor
        return mean.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if torch.is_grad_enabled():  # backward(create_graph=True)
            raise ConfigError("create_graph=True: ahead=True gives first derivatives only")
        (grad,) = grads
        return grad * ctx.factor(grad).to(grad), None, None


def _check_fsdp(name: str, graph: Any, *, sums: bool) -> None:
    """Refuse gradients that FSDP2 reduces differently from the objective's settings.

    Args:
        name: of the objective.
        graph: whose parameters count. It is walked only if some FSDP2 model of this process differs.
        sums: whether they are to be added up.

    Raises:
        ConfigError: they are divided by something else than the number of ranks, or than 1 for `sums`.
    """
    composable = sys.modules.get("torch.distributed._composable_state")
    leaves: set[int] | None = None
    for module, reference in list(composable._module_state_mapping.items()) if composable else ():
        for group in getattr(reference(), "_fsdp_param_groups", ()):
            ranks = group.mesh_info.mesh.size()
            factor = ranks if group.gradient_divide_factor is None else group.gradient_divide_factor
            if factor == (1 if sums else ranks):
                continue
            leaves = set(map(id, parameters_of([graph]))) if leaves is None else leaves
            if any(id(getattr(one, "_unsharded_param", None)) in leaves for one in group.fsdp_params):
                raise ConfigError(
                    f"{name}: ahead={'sum' if sums else True!r} is for gradients that are "
                    f"{'added up over ranks' if sums else 'averaged'}, but FSDP2 divides those of "
                    f"{type(module).__name__} by {factor:g}, on {ranks} ranks: call "
                    f"set_gradient_divide_factor({1.0 if sums else float(ranks)}) on every module given to "
                    f"fully_shard, or take ahead={True if sums else 'sum'!r} with a factor of "
                    f"{float(ranks) if sums else 1.0}"
                )


def _check_accelerate(name: str, grad: torch.Tensor) -> None:
    """Refuse a loss with `total` that ``Accelerator.backward`` has divided by its accumulation steps.

    Raises:
        ConfigError: the gradient of the loss is one over these steps.
    """
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state or not on_host(grad):
        return
    steps = state.GradientState().num_steps
    if steps > 1 and torch.equal(grad, torch.ones_like(grad) / steps):
        raise ConfigError(
            f"{name}: accelerator.backward(loss) divides by gradient_accumulation_steps={steps} what total= "
            f"has divided by all micro-batches' weights; write accelerator.backward(loss * "
            f"accelerator.gradient_accumulation_steps), or leave that argument of Accelerator out"
        )


class Ahead:
    """The weights of all ranks, exchanged in the forward pass and waited for in the backward pass.

    With n ranks and the sum W of all ranks' denominators a rank's gradient is n / W times that of its
    numerator, so that their average is the gradient of all elements' mean; 1 / W times, for their sum.

    Args:
        name: of the objective.
        process_set: the ranks whose gradients are averaged; None for all.
        sums: whether they are added up instead.
    """

    def __init__(self, name: str, process_set: Any, *, sums: bool = False) -> None:
        self.name, self._process_set, self._sums = name, process_set, sums
        self._group: EngineGroup | None = None

    def share(self) -> float:
        """Return what the gradient of a loss of all ranks' elements is multiplied with."""
        return 1.0 / self._size() if self._sums else 1.0

    def _size(self) -> int:
        return (self._process_set or hvd.global_process_set).size() if hvd.is_initialized() else 1

    def loss(self, part: Contribution, reduction: str, total: torch.Tensor | None) -> torch.Tensor:
        """Return the local mean, whose gradients are to be averaged over ranks.

        Args:
            part: of a micro-batch.
            reduction: of the objective.
            total: the denominators of all micro-batches of all ranks; None if there is but this one.

        Raises (in the backward pass, on every rank):
            WeightError, NonFiniteLossError, NoWeightError: of any rank.

        Collectives: one all-reduce of three numbers, but with `total`, or without a gradient, none.
        """
        mean = part.mean(_OPS)
        if not (torch.is_grad_enabled() and part.numerator.requires_grad):
            return mean
        size = self._size()
        row = part.row(_OPS)
        sums = torch.stack([row[1], row[5] + row[6], row[7]])
        if total is not None:
            sums = torch.cat(
                [to_device_async(torch.as_tensor(total).double().reshape(1), row.device), sums[1:]]
            )
        ready: Callable[[], torch.Tensor] = lambda: sums  # noqa: E731
        if size > 1 and total is None:
            self._group = self._group or EngineGroup(self._process_set, own_order=True, named=False)
            ready = self._group.all_reduce(sums, f"hvdloss.{self.name}.ahead").wait

        graph = part.numerator.grad_fn

        def factor(grad: torch.Tensor) -> torch.Tensor:
            found = ready()
            if total is not None:
                _check_accelerate(self.name, grad)
            _check_fsdp(self.name, graph, sums=self._sums)
            if on_host(found):
                self._check(found.tolist(), "this rank" if total is not None else "some rank")
            return (1 if self._sums else size) / (
                torch.ones_like(found[0]) if reduction == "sum" else found[0]
            )

        return _Late.apply(part.numerator, mean.detach(), factor)  # type: ignore[no-any-return]

    def _check(self, sums: list[float], who: str) -> None:
        denominator, weights, losses = sums
        error: Exception | None = None
        if weights:
            error = WeightError(f"{self.name}: {weights:.0f} weights of {who} are negative, NaN or infinite")
        elif losses:
            error = NonFiniteLossError(f"{self.name}: the loss of {who} is NaN or infinite")
        elif denominator == 0:
            error = NoWeightError(f"{self.name}: no rank has an element of weight above 0")
        if error is not None:
            if who == "some rank":
                error.on_all_ranks = True  # type: ignore[attr-defined]
            raise error
