"""The laws of tests/laws in PyTorch: an optimizer of several backward passes."""

from __future__ import annotations

import itertools

import torch
from torch_support import before_case

import hvdloss.torch as hvd
from tests.laws.driver import RATE
from tests.ranks import needs

__all__ = ["before_case"]

LAWS = ("exact", "packed")
ALSO = needs("dist-2", more="dist-3 dist-4")  # over torch.distributed


class Model(torch.nn.Module):
    def __init__(self, parameters):
        super().__init__()
        self.numbers = torch.nn.ParameterList([torch.tensor(p) for p in parameters])

    def forward(self, x):
        w, b, v = self.numbers
        return torch.tanh(x @ w + b) @ v


class driver:
    def __init__(self):
        self.rank, self.size = hvd.rank(), hvd.size()

    def build(self, parameters, *, reduction="mean", nonfinite="raise", penalty=0.0, passes=1):
        self.model = Model(parameters)
        self.objective = hvd.Objective("mse", reduction=reduction, nonfinite=nonfinite)
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=RATE),
            self.model.named_parameters(),
            self.objective,
            backward_passes_per_step=passes,
        )
        self.penalty = penalty

    def step(self, micro_batches, segments=()):
        self.optimizer.zero_grad()
        loss = None
        for (x, y, w), of in itertools.zip_longest(micro_batches, segments):
            x, y, w = map(torch.tensor, (x, y, w))
            loss = self.objective(self.model(x), y, w, segments=of)
            total = loss
            if self.penalty:
                total = loss + self.penalty * sum((p**2).sum() for p in self.model.parameters())
            total.backward()
        self.optimizer.step()
        return None if loss is None or len(micro_batches) > 1 else loss.item()

    def step_packed(self, micro_batches, cut):
        segments = [hvd.Segments(*one[:1], None, *one[1:]).arrays(torch.tensor) for _, *one in micro_batches]
        if cut is not None:
            weights = [torch.tensor(one.batch.w) for one in micro_batches]
            segments = hvd.link_segments(segments, weights, over=hvd.global_process_set, cut=cut)
        return self.step([one.batch for one in micro_batches], segments)

    def parameters(self):
        return [p.detach().numpy().copy() for p in self.model.parameters()]

    def report(self):
        return self.optimizer.last_step

    def gather(self, array):
        # Horovod names others by a count that differs after exchanges of some ranks.
        return hvd.allgather(torch.tensor(array)[None], name="laws.gather").numpy()
