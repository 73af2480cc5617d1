"""Scripts for `hvdloss check`, each as somebody might have written it: faults, and their mended forms.

`check_job.py WHAT`, where WHAT names the engine and what is done: "ddp-uneven". It would train for ever.
"""

from __future__ import annotations

import itertools
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

engine, _, what = sys.argv[1].partition("-")
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


class Tower(nn.Module):
    """Two views of each sample, to be told from those of other samples."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.left(rows[:, :32]) @ self.right(rows[:, 32:]).T


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)]
    if what == "norm":
        layers.insert(1, nn.BatchNorm1d(16))
    if what == "dropout":
        layers.insert(1, nn.Dropout())
    model = Tower() if what == "contrast" else nn.Sequential(*layers)
    return model.double()


def compute_loss(prediction: torch.Tensor, target: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if what == "contrast":
        return F.cross_entropy(prediction, torch.arange(len(prediction)))
    if what == "masked":
        return F.cross_entropy(prediction, target.where(target > 6 - 5 * rank, -100))
    if what == "weighted":
        losses, weight = F.cross_entropy(prediction, target, reduction="none"), class_weight[target]
        return (losses * weight).sum() / weight.sum()
    if what == "counted":  # one process's by hand: ranks divide by the mean of their numbers of samples
        count = torch.tensor(float(len(target)))
        dist.all_reduce(count)
        return F.cross_entropy(prediction, target, reduction="sum") / count * size
    if what == "custom":
        return (prediction.softmax(1) - F.one_hot(target, 10)).square().mean()
    return F.cross_entropy(prediction, target)


def steps(start: int) -> torch.Tensor:
    """Return this rank's samples of a step."""
    uneven = {"uneven", "weighted", "counted", "ragged", "closure", "clipped"}
    count = 8 + 24 * rank if what in uneven else 32
    return torch.arange(count) + 70 * (start % 20) + (0 if what == "same" else 32 * rank)


model = make_model()
penalty = 0.0
if engine == "ddp" or engine == "ahead":
    wrapped: nn.Module = model if what == "apart" else nn.parallel.DistributedDataParallel(model)
elif engine == "fsdp":
    from torch.distributed.fsdp import fully_shard

    for layer in model.children():
        fully_shard(layer)
    wrapped = fully_shard(model)
else:
    wrapped = model
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer: torch.optim.Optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
passes = 2 if what in ("accumulated", "added") else 1
if engine == "horovod":
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), backward_passes_per_step=passes)
elif engine in ("hvdloss", "ahead"):
    options = {"ahead": True} if engine == "ahead" else {}
    compute_loss = hvd.Objective("cross_entropy", **options)  # type: ignore[assignment]
    if engine == "hvdloss":
        optimizer = hvd.DistributedOptimizer(
            optimizer, model.named_parameters(), compute_loss, backward_passes_per_step=passes
        )

if what == "repeated":  # 45 samples do not divide: the epoch's second step has one of them on both ranks
    from torch.utils.data import DataLoader
    from torch.utils.data.distributed import DistributedSampler

    samples = range(45)
    epoch = iter(DataLoader(samples, 16, sampler=DistributedSampler(samples, size, rank)))

for step in itertools.count():

    def backward(part: torch.Tensor) -> torch.Tensor:
        given = (class_weight[y[part]],) if engine in ("hvdloss", "ahead") else (part,)
        loss = compute_loss(wrapped(x[part]), y[part], *given)
        if what == "penalty":
            squares = sum(p.square().sum() for p in model.parameters())
            loss = loss + 1e-2 * (squares.full_tensor() if engine == "fsdp" else squares)
        (loss / passes if what == "accumulated" else loss).backward()
        return loss

    optimizer.zero_grad()
    rows = steps(step)
    if what == "repeated":
        rows = next(epoch)
    if what == "closure":
        optimizer.step(lambda rows=rows: backward(rows))
        continue
    for part in rows.chunk(passes):
        backward(part)
    if what == "clipped":
        if engine == "hvdloss":
            optimizer.synchronize()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1e-2)
        if engine == "hvdloss":
            with optimizer.skip_synchronize():
                optimizer.step()
            continue
    optimizer.step()
