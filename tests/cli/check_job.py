"""A script for `hvdloss check`, whose steps are what somebody might have written: faults, and mended forms.

`check_job.py ENGINE WHAT[,WHAT...]`: a step of each kind, and so on for ever.
"""

from __future__ import annotations

import itertools
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

engine, kinds = sys.argv[1], sys.argv[2].split(",")
if engine == "horovod":
    import horovod.torch as hvd

    hvd.init()
    rank, size = hvd.rank(), hvd.size()
else:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
if engine in ("hvdloss", "ahead"):
    import hvdloss.torch as hvd

    hvd.init()

x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
x = x.double() / 16
class_weight = torch.tensor([1.0] * 8 + [5.0] * 2, dtype=torch.float64)
UNEVEN = {"uneven", "weighted", "counted", "closure", "clipped"}
PASSES = 2


class Towers(nn.Module):
    """Two views of each sample, each to be found among those of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.left(rows[:, :32]) @ self.right(rows[:, 32:]).T


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)]
    if "norm" in kinds:
        layers.insert(1, nn.BatchNorm1d(16))
    if "dropout" in kinds:
        layers.insert(1, nn.Dropout())
    model = Towers() if "contrast" in kinds else nn.Sequential(*layers)
    return model.double()


def plain_loss(prediction: torch.Tensor, target: torch.Tensor, what: str) -> torch.Tensor:
    if what == "contrast":
        return F.cross_entropy(prediction, torch.arange(len(prediction)))
    if what == "masked":
        return F.cross_entropy(prediction, target.where(target > 6 - 5 * rank, -100))
    if what == "weighted":
        losses, weight = F.cross_entropy(prediction, target, reduction="none"), class_weight[target]
        return (losses * weight).sum() / weight.sum()
    if what == "counted":  # right, by hand: ranks divide by the mean of their numbers of samples
        count = torch.tensor(float(len(target)))
        dist.all_reduce(count)
        return F.cross_entropy(prediction, target, reduction="sum") / count * size
    if what == "custom":
        return (prediction.softmax(1) - F.one_hot(target, 10)).square().mean()
    return F.cross_entropy(prediction, target)


def wrap(model: nn.Module) -> nn.Module:
    if engine in ("ddp", "ahead"):
        return nn.parallel.DistributedDataParallel(model)
    if engine == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.children():
            fully_shard(layer)
        return fully_shard(model)
    if engine != "none":
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    return model


def main() -> None:
    model = make_model()
    wrapped = wrap(model)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    ours = engine in ("hvdloss", "ahead")
    if engine == "horovod":
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    if ours:
        objective = hvd.Objective("cross_entropy", ahead=engine == "ahead")
    if engine == "hvdloss":
        optimizer = hvd.DistributedOptimizer(
            optimizer, model.named_parameters(), objective, backward_passes_per_step=PASSES
        )

    def backward(rows: torch.Tensor, what: str) -> torch.Tensor:
        if ours:
            loss = objective(wrapped(x[rows]), y[rows], class_weight[y[rows]])
        else:
            loss = plain_loss(wrapped(x[rows]), y[rows], what)
        if what == "penalty":
            squares = sum(p.square().sum() for p in model.parameters())
            loss = loss + 1e-2 * (squares.full_tensor() if engine == "fsdp" else squares)
        (loss / PASSES if what == "accumulated" else loss).backward()
        return loss

    for step, what in enumerate(itertools.cycle(kinds)):
        rows = torch.arange(8 + 24 * rank if what in UNEVEN else 32) + 70 * (step % 20)
        rows += 0 if what == "same" else 32 * rank
        optimizer.zero_grad()
        if what == "closure":
            optimizer.step(lambda rows=rows: backward(rows, "closure"))
            continue
        for part in rows.chunk(PASSES if what in ("accumulated", "added") else 1):
            backward(part, what)
        if what == "clipped" and engine == "hvdloss":
            optimizer.synchronize()
            nn.utils.clip_grad_norm_(wrapped.parameters(), 1e-2)
            with optimizer.skip_synchronize():
                optimizer.step()
            continue
        if what == "clipped":
            nn.utils.clip_grad_norm_(wrapped.parameters(), 1e-2)
        optimizer.step()


main()
