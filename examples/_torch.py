"""What the PyTorch demos hold hvdloss against: one process, and plain averaging of local means."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import hvdloss.torch as hvd
from _common import Job

Samples = tuple[torch.Tensor, ...]  # inputs, labels, and perhaps weights


class TorchJob(Job):
    """A classifier (:class:`_common.Job`); a demo gives `make_model`, `make_optimizer` and `train`."""

    device = "cpu"

    def make_model(self) -> nn.Module:
        raise NotImplementedError

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        raise NotImplementedError

    def make_plain_model(self) -> nn.Module:
        """Return the model as one process has it."""
        return self.make_model()

    def make(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return self.make_model().to(self.device, getattr(torch, self.args.dtype))

    def make_ordinary(self) -> nn.Module:
        return self.make_plain_model().to(self.device, getattr(torch, self.args.dtype))

    def samples(self, index: np.ndarray) -> Samples:
        return tuple(torch.as_tensor(a, device=self.device) for a in super().samples(index))

    def train_plainly(self, model: nn.Module, watch: Any) -> None:
        """Train as with Horovod or DDP alone: local means, and gradients averaged over ranks."""
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        # Without an objective this is horovod.torch.DistributedOptimizer.
        optimizer = hvd.DistributedOptimizer(self.make_optimizer(model), model.named_parameters())
        for batch in self.batches(hvd.rank()):
            optimizer.zero_grad()
            loss = mean(model, batch)
            loss.backward()
            optimizer.step()
            watch(loss.item())

    def train_alone(self, model: nn.Module, watch: Any) -> None:
        """Train in this process alone, on all ranks' samples of each step."""
        optimizer = self.make_optimizer(model)
        for batch in self.batches(None):
            optimizer.zero_grad()
            loss = mean(model, batch)
            loss.backward()
            optimizer.step()
            watch(loss.item())

    def parameters(self, model: nn.Module) -> list[torch.Tensor]:
        return list(model.parameters())

    def gradients(self, model: nn.Module) -> list[torch.Tensor]:
        return [p.grad for p in model.parameters()]

    def flat(self, model: nn.Module, tensors: list[torch.Tensor]) -> np.ndarray:
        return torch.cat([t.detach().flatten() for t in tensors]).double().cpu().numpy()

    def put(self, model: nn.Module, parameters: np.ndarray) -> nn.Module:
        vector = torch.tensor(parameters, dtype=getattr(torch, self.args.dtype), device=self.device)
        nn.utils.vector_to_parameters(vector, model.parameters())
        return model

    def loss(self, model: nn.Module, samples: Samples) -> tuple[float, np.ndarray]:
        loss = mean(model, samples)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return loss.item(), self.flat(model, list(gradients))


def mean(model: nn.Module, samples: Samples) -> torch.Tensor:
    """Return the weighted mean cross-entropy of some samples, written out."""
    x, y, *weights = samples
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    return weighted_mean(losses, weights[0] if weights else (y != -100).to(losses))


def weighted_mean(losses: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight * losses).sum() / weight.sum().clamp(min=torch.finfo(losses.dtype).tiny)
