"""Batch normalisation over the batch of all ranks, with its gradient."""

from __future__ import annotations

import functools
from typing import Any

import torch
from hvdloss.errors import ConfigError, UsageError
from hvdloss.torch._backend import hvd
from hvdloss.torch.collectives import all_reduce
from hvdloss.torch.passes import weight_of_pass
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["SyncBatchNorm", "refuse_pytorchs_own"]


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation by mean and variance of all ranks' samples, as one process with all of them.

    Arguments, parameters and buffers are those of :class:`torch.nn.BatchNorm2d`. Ranks may have different
    numbers of samples, or none, and an objective's weights may differ between them. Unlike Horovod's it works
    on every device and in every floating dtype; statistics are float32 at least. Every rank calls the layer
    equally often while it trains, and its backward pass too.

    Shapes: input and output (N, C, ...); N may differ between ranks.

    Raises:
        ValueError: the input has fewer than two dimensions, or all ranks together have one value a channel.
        UsageError: in the backward pass, on all ranks: a rank has samples here, but none with a weight in its
            objective.

    Collectives: two all-reduces of C numbers in the forward pass while training, two in the backward pass.
    Source: Ioffe and Szegedy 2015, over the batch of all ranks.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: the input has shape {tuple(input.shape)}, not (N, C, ...)")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the input, normalised."""
        by_batch = self.training or self.running_mean is None
        if not by_batch or not hvd.is_initialized() or hvd.size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        x = input if input.dtype == torch.float64 else input.float()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        spread = [1, -1] + [1] * (x.dim() - 2)
        rows = x.numel() // x.shape[1]
        sums: torch.Tensor = _Summed.apply(torch.cat([x.sum(axes), x.new_full((1,), rows)]), rows)
        count = sums[-1].detach()
        if not count > 1:
            raise ValueError(
                f"SyncBatchNorm: all ranks together have {int(count)} value a channel: no variance"
            )
        mean = sums[:-1] / count
        centred = x - mean.view(spread)
        squares: torch.Tensor = _Summed.apply((centred**2).sum(axes), rows)
        variance = squares / count
        if self.training and self.running_mean is not None and self.running_var is not None:
            self._follow(mean.detach(), variance.detach() * count / (count - 1))
        out = centred * torch.rsqrt(variance + self.eps).view(spread)
        if self.weight is not None:
            out = out * self.weight.view(spread) + self.bias.view(spread)
        return out.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Update the running statistics, as PyTorch does: with the unbiased variance."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = 1 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), rate)
        self.running_var.lerp_(variance.to(self.running_var), rate)


class _Summed(torch.autograd.Function):
    """Sum over ranks; backward: the sum of what arrives, each rank's with the weight that its pass will get.

    An objective's backward pass gives the gradient of this rank's mean, which the optimizer multiplies with
    this rank's weight only at the end: here, where gradients of several ranks meet, that comes first, and is
    undone.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.rows = rows
        return all_reduce(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        weight = weight_of_pass()
        lost = weight is not None and ctx.rows and weight == 0
        weight = torch.ones_like(grads[0][:1]) if weight is None else weight.to(grads[0]).reshape(1)
        *_, any_lost = total = all_reduce(torch.cat([weight * grads[0], weight.new_full((1,), bool(lost))]))
        if any_lost:
            raise UsageError(
                "SyncBatchNorm: a rank has samples in this layer of which none has a weight in the "
                "objective, so what they do to the statistics has no gradient; leave such samples out, or "
                "give one a weight"
            )
        return torch.where(weight == 0, torch.zeros_like(total[:-1]), total[:-1] / weight), None


def refuse_pytorchs_own() -> None:
    """Make ``torch.nn.SyncBatchNorm`` refuse to train where it would not synchronize.

    It asks the default process group of ``torch.distributed``, and where there is none takes each rank's own
    batch, without a word.
    """
    layer = torch.nn.SyncBatchNorm
    plain = layer.forward
    if hasattr(plain, "_hvdloss"):
        return

    @functools.wraps(plain)
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if alone and self.training and hvd.is_initialized() and hvd.size() > 1:
            raise ConfigError(
                f"torch.nn.SyncBatchNorm synchronizes in the default process group of torch.distributed, and "
                f"there is none: each of {hvd.size()} ranks would normalise by its own batch. Use "
                f"hvd.SyncBatchNorm, which has the same arguments and state"
            )
        return plain(self, input)

    forward._hvdloss = True  # type: ignore[attr-defined]
    layer.forward = forward  # type: ignore[method-assign]
