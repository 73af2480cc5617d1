"""Regression by a two-layer network on uneven ranks, with sample weights, in PyTorch.

Data: scikit-learn's diabetes, 442 patients, the progression of their disease after a year. The ranks hold
different numbers of patients, the smallest shard the most severe cases; the weights give every age group
the same say. Trains with hvdloss, with Horovod's plain averaging, and in one process, and compares.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from torch import nn

import hvdloss.torch as hvd
from _common import Shards, Watch, options, recorder, split
from _torch import DTYPES, Job, compare, weighted_mean


def train(job: Job, model: nn.Module, watch: Watch) -> None:
    """Train on this rank's samples. But for `watch`, this is all one has to write."""
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(make_optimizer(model), model.named_parameters(), objective=objective)
    record = recorder(hvd, job.args).follow(optimizer)
    for epoch in range(job.args.epochs):
        for x, y, weight in job.batches(epoch):  # this rank's own, of any length
            optimizer.zero_grad()
            loss = objective(model(x), y, weight)
            loss.backward()
            optimizer.step()
            watch(optimizer.last_step)  # its .loss is that of all ranks' samples
    record.close()


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def make_job(args: argparse.Namespace) -> Job:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    training, held_out = split(len(y), args.seed)
    age_group = np.digitize(x[:, 0], [40, 60])  # below 40, 40 to 59, 60 and older
    weight = 1 / np.bincount(age_group[training])[age_group]
    weight /= weight[training].mean()
    order = training[np.argsort(y[training])]
    unit = y[training].std()
    x = (x - x[training].mean(axis=0)) / x[training].std(axis=0)
    y = (y - y[training].mean()) / unit

    dtype = DTYPES[args.dtype]
    data = tuple(torch.tensor(a, dtype=dtype) for a in (x, y[:, None], weight[:, None]))

    def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target) ** 2

    def measure(model: nn.Module) -> dict[str, float]:
        x, y, weight = (a[held_out] for a in data)
        error = weighted_mean(squared_error(model(x), y), weight).sqrt().item()
        return {"RMSE (points)": error * unit}

    torch.manual_seed(args.seed)
    return Job(
        args,
        model=make_model().to(dtype),
        make_optimizer=make_optimizer,
        losses=squared_error,
        data=data,
        shards=Shards(order, args.shares, hvd.size(), args.batch, args.seed),
        measure=measure,
    )


if __name__ == "__main__":
    arguments = options("torch_regression", __doc__, epochs=30, batch=60).parse_args()
    hvd.init()
    torch.set_num_threads(1)  # ranks share the cores
    status = compare(
        make_job(arguments),
        train,
        title="Regression, two layers: scikit-learn's diabetes",
        remark="Shards follow the target: the smallest one holds the most severe cases.",
        loss_unit="squared error, variances of the target",
    )
    sys.exit(status)
