"""Classification with class weights and gradient accumulation on uneven ranks, in PyTorch.

Data: scikit-learn's digits, 1797 images of 8 x 8 pixels. The ranks hold different numbers of images, the
largest shard most of the 8s and 9s; errors on these count five times. Every rank cuts its part of a step
into micro-batches of at most --micro samples, so that ranks have different numbers of them and a ragged
last one. Trains with hvdloss, with Horovod's plain averaging, and in one process, and compares.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from torch import nn

import hvdloss
import hvdloss.torch as hvd
from _common import Shards, Watch, at_least, options, recorder, split
from _torch import DTYPES, Job, compare, device_of, weighted_mean
from hvdloss.metrics import Accuracy, Recall


def train(job: Job, model: nn.Module, watch: Watch) -> None:
    """Train on this rank's samples. But for `watch`, this is all one has to write."""
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    terms = (
        hvdloss.CommunicationCost(),
        hvdloss.DataSkew(classes=10),
    )  # measured; at no price they do nothing
    objective = hvd.Objective("cross_entropy", terms=terms)
    optimizer = hvd.DistributedOptimizer(
        make_optimizer(model),
        model.named_parameters(),
        objective=objective,
        backward_passes_per_step=job.most_micro_batches(),  # other ranks may have fewer
    )
    metrics = hvd.Metrics({"accuracy": Accuracy(10), "recall": Recall(10, average=None)})
    record = recorder(hvd, job.args).follow(optimizer)
    for epoch in range(job.args.epochs):
        metrics.reset()
        for micro_batches in job.micro_batches(epoch):
            optimizer.zero_grad()
            for x, y, weight in micro_batches:  # this rank's own, as many and as long as they are
                prediction = model(x)
                loss = objective(prediction, y, weight)
                loss.backward()
                metrics.update(prediction, y)
            optimizer.step()
            watch(optimizer.last_step)  # its .loss is that of all ranks' samples
        record.epoch(metrics=metrics.compute())
    record.close()


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def make_job(args: argparse.Namespace) -> Job:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    training, held_out = split(len(y), args.seed)
    weight = np.where(y >= 8, 5.0, 1.0)
    mixed = -y + np.random.default_rng(args.seed).uniform(0, 2, len(y))
    order = training[np.argsort(mixed[training])]

    dtype = DTYPES[args.dtype]
    device = device_of(args.device)
    data = tuple(
        torch.as_tensor(a, dtype=kind, device=device)
        for a, kind in ((x / 16, dtype), (y, None), (weight, dtype))
    )

    def losses(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(prediction, target, reduction="none")

    def measure(model: nn.Module) -> dict[str, float]:
        x, y, weight = (a[held_out] for a in data)
        prediction = model(x)
        right = (prediction.argmax(dim=1) == y).to(dtype)
        return {
            "loss (nats)": weighted_mean(losses(prediction, y), weight).item(),
            "accuracy": right.mean().item(),
        }

    torch.manual_seed(args.seed)
    return Job(
        args,
        model=make_model().to(device, dtype),
        make_optimizer=make_optimizer,
        losses=losses,
        data=data,
        shards=Shards(order, args.shares, hvd.size(), args.batch, args.seed),
        measure=measure,
        micro=args.micro,
    )


if __name__ == "__main__":
    parser = options("torch_digits", __doc__, epochs=8, batch=96)
    parser.add_argument("--micro", type=at_least(1), default=16, help="samples a micro-batch (%(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: over NCCL, a GPU each"
    )
    arguments = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)  # ranks share the cores
    status = compare(
        make_job(arguments),
        train,
        title="Classification, class weights, accumulation: scikit-learn's digits",
        remark="Shards follow the label: the largest holds most of the 8s and 9s, which count five times.",
        loss_unit="weighted cross-entropy, nats",
    )
    sys.exit(status)
