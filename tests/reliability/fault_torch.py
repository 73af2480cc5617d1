"""The PyTorch loop on which faults are inflicted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch._dynamo  # an optimizer's first step would import it, in every rank
from torch import nn

import hvdloss
import hvdloss.torch as hvd

torch.set_num_threads(1)


class Net(nn.Module):
    """Two layers, and a place where the gradient can be made NaN or infinite while the loss is finite."""

    def __init__(self, hidden: int, deeper: bool) -> None:
        super().__init__()
        self.first = nn.Linear(64, hidden)
        self.second = nn.Linear(hidden, 10)
        self.third = nn.Linear(10, 10) if deeper else nn.Identity()
        self.unarmed, self.factor = 1.0, 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.third(self.second(torch.tanh(self.first(x))))
        s = y.sum()
        # The square root of 0 has an infinite slope, and 0 times that is NaN.
        return y + self.factor * torch.sqrt(s - s.detach() + self.unarmed)


class TorchLoop:
    """One model and optimizer after another."""

    name = "torch"
    keeps = False
    hvd = hvd

    def __init__(self) -> None:
        self.model: Net | None = None

    def build(self, other: str, *, broadcast: bool = False) -> None:
        """Build model, objective and optimizer; `other` says what is other on this rank."""
        torch.manual_seed(5)
        self.model = model = Net(17 if other == "shapes-differ" else 16, other == "count-differs")
        self.dtype = torch.float64 if other == "dtypes-differ" else torch.float32
        model.to(self.dtype)
        if broadcast:
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        if other == "values-differ":
            with torch.no_grad():
                model.first.bias += 1e-3
        named = list(model.named_parameters())
        if other == "names-differ":
            named = [(f"net.{name}", p) for name, p in named]
        if other == "order-differs":
            named.reverse()
        self.objective = hvd.Objective(
            "mae" if other == "loss-differs" else "mse",
            reduction="batch_mean" if other == "reduction-differs" else "mean",
            terms=(hvdloss.CommunicationCost(price=0.1),) if other == "terms-differ" else (),
        )
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([p for _, p in named], lr=0.05),
            named,
            self.objective,
            compression=hvd.Compression.fp16 if other == "compression-differs" else hvd.Compression.none,
            backward_passes_per_step=2 if other == "passes-differ" else 1,
        )

    def tensors(self, batch: Any) -> tuple[torch.Tensor, ...]:
        x, y, w = (torch.from_numpy(part).to(self.dtype) for part in batch)
        return x, y, w[:, None]

    def train(self, batches: Iterator[Any], hooks: Any, item: Any) -> None:
        """Train on batches, as a user's loop would."""
        assert self.model is not None
        tensors = map(self.tensors, batches)
        uneven = item is not None and item.fault == "raise-uneven"
        for step, (x, y, w) in enumerate(hvd.uneven(tensors, self.optimizer) if uneven else tensors, start=1):
            hooks.begin(step)
            self.optimizer.zero_grad()
            loss = self.objective(self.model(x), y, w)
            try:
                hooks.middle(step)
            except Exception:
                continue  # with the next batch
            loss.backward()
            hooks.between(step)
            self.optimizer.step()
            hooks.done(step)

    def evaluate(self, plain: bool) -> None:
        """A number of all ranks, for which they meet."""
        if plain:
            hvd.allreduce(torch.ones(1), name="evaluation")
        else:
            hvd.merged_value(1.0)

    def trip(self, factor: float | None) -> None:
        """Make the next gradients NaN (0.0) or infinite (1.0), or finite again (None)."""
        if self.model is not None:
            self.model.unarmed, self.model.factor = (1.0, 0.0) if factor is None else (0.0, factor)

    def parameters(self) -> list[np.ndarray]:
        return [] if self.model is None else [p.detach().numpy() for p in self.model.parameters()]

    def reported(self) -> int:
        report = self.optimizer.last_step
        return 0 if report is None else int(report.step)


def make(name: str) -> TorchLoop:
    return TorchLoop()
