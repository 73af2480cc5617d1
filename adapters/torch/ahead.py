"""Weights that are exchanged ahead of the backward pass, for gradients that somebody else averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hvdloss.errors import ConfigError, NonFiniteLossError, NoWeightError, WeightError
from hvdloss.reduction import Contribution
from hvdloss.torch._backend import hvd
from hvdloss.torch.buckets import own_lane
from hvdloss.torch.ops import TorchOps, at_hand, put_on
from hvdloss.torch.waiting import explaining, wait

__all__ = ["Ahead"]

_OPS = TorchOps()


class _Late(torch.autograd.Function):
    """The mean, whose gradient is the numerator's times a factor that is known in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, numerator: torch.Tensor, mean: torch.Tensor, factor: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        ctx.factor = factor
        return mean.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if torch.is_grad_enabled():  # backward(create_graph=True)
            raise ConfigError("create_graph=True: ahead=True gives first derivatives only")
        (grad,) = grads
        return grad * ctx.factor().to(grad), None, None


class Ahead:
    """The weights of all ranks, exchanged in the forward pass and waited for in the backward pass.

    With n ranks and the sum W of all ranks' denominators a rank's gradient is n / W times that of its
    numerator, so that their average is the gradient of all elements' mean.

    Args:
        name: of the objective.
        process_set: the ranks whose gradients are averaged; None for all.
    """

    def __init__(self, name: str, process_set: Any) -> None:
        self.name, self._process_set = name, process_set
        self._lane: Any = None

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
        group = self._process_set or hvd.global_process_set
        size = group.size() if hvd.is_initialized() else 1
        row = part.row(_OPS)
        sums = torch.stack([row[1], row[5] + row[6], row[7]])
        if total is not None:
            sums = torch.cat([put_on(torch.as_tensor(total).double().reshape(1), row.device), sums[1:]])
        ready: Callable[[], torch.Tensor] = lambda: sums  # noqa: E731
        if size > 1 and total is None:
            self._lane = self._lane or own_lane(group)
            name = f"hvdloss.{self.name}.ahead"
            with explaining():
                handle = hvd.allreduce_async(sums, name=name, op=hvd.Sum, process_set=self._lane)

            def ready() -> torch.Tensor:
                out: torch.Tensor = wait(handle)
                return out

        def factor() -> torch.Tensor:
            found = ready()
            if at_hand(found):
                self._check(found.tolist(), "this rank" if total is not None else "some rank")
            return size / (torch.ones_like(found[0]) if reduction == "sum" else found[0])

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
