"""A classifier whose last layer is split over ranks by class, two by two ranks, in PyTorch.

Data: scikit-learn's digits, 1797 images of 8 x 8 pixels. Of four ranks, 0 and 1 share one model, and 2 and 3
another with other images. All ranks hold the feature layers; of the last layer each holds half of the
classes, computes its five columns of the logits, and tells the other rank of its pair three numbers per
image. The pairs hold different numbers of images; errors on 8s and 9s count five times. Trains with
hvdloss, with Horovod's plain averaging between the pairs, and in one process with an ordinary last layer;
compares, and saves an ordinary checkpoint. Two ranks share one model; on an odd number each holds a whole
one.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import hvdloss.torch as hvd
from _common import (
    EXACT,
    ONE,
    PLAIN,
    Progress,
    RankRow,
    Shards,
    Watch,
    at_least,
    conclude,
    options,
    recorder,
    split,
    told_by_all,
)
from _torch import DTYPES, Job, Samples, flat, judge, train_alone, weighted_mean
from hvdloss.torch.ops import communicator_of


@dataclass(kw_only=True)
class SplitJob(Job):
    """A job whose model is the ordinary one; `groups` say which ranks share a model, and which the data."""

    groups: hvd.Grid

    def batches(self, epoch: int) -> Iterator[Samples]:
        for step in range(self.shards.steps):
            yield self.samples(self.shards.batch(self.groups.data.rank(), epoch, step))


def make_model(groups: hvd.Grid | None = None) -> nn.Sequential:
    """Return the ordinary model, or this rank's part of it; the same seed gives both the same weights."""
    if groups is None:
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), hvd.ShardedLinear(32, 10, process_set=groups.model))


def train(job: SplitJob, model: nn.Sequential, watch: Watch) -> None:
    """Train on this rank's samples. But for `watch`, this is all one has to write."""
    loss = hvd.ShardedCrossEntropy(model[-1].shards, process_set=job.groups.model)
    objective = hvd.Objective(loss)
    optimizer = hvd.DistributedOptimizer(
        make_optimizer(model),
        model.named_parameters(),
        objective=objective,
        process_set=job.groups.data,  # ranks that hold the same part of the model
    )
    record = recorder(hvd, job.args).follow(optimizer)
    for epoch in range(job.args.epochs):
        for x, y, weight in job.batches(epoch):
            optimizer.zero_grad()
            loss = objective(model(x), y, weight)
            loss.backward()
            optimizer.step()
            watch(optimizer.last_step)
    record.close()


def train_plainly(job: SplitJob, model: nn.Sequential, watch: Watch) -> None:
    """Train with local means, and Horovod's average over the ranks that hold the same part."""
    optimizer = hvd.DistributedOptimizer(
        make_optimizer(model), model.named_parameters(), process_set=job.groups.data
    )
    for epoch in range(job.args.epochs):
        for x, y, weight in job.batches(epoch):
            optimizer.zero_grad()
            losses = hvd.sharded_cross_entropy(model(x), y, model[-1].shards, process_set=job.groups.model)
            loss = weighted_mean(losses, weight)
            loss.backward()
            optimizer.step()
            watch(loss.item())


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def whole(model: nn.Sequential, groups: hvd.Grid, of: Callable[[Any], torch.Tensor]) -> np.ndarray:
    """Return what `of` gives of each parameter of the ordinary model, as one vector. Collective."""
    features, head = model[:-1], model[-1]
    out = [of(p).detach().flatten() for p in features.parameters()]
    for number, p in enumerate(head.parameters()):
        rows = of(p).detach()
        if groups.model.size() > 1:
            rows = hvd.allgather(rows, name=f"whole.{number}", process_set=groups.model)
        out.append(rows.flatten())
    return flat(out)


def compare(job: SplitJob) -> int:
    """Train in three ways from the same start, hold each step against one process, and report."""
    args, shards, groups, first = job.args, job.shards, job.groups, hvd.rank() == 0
    steps = args.epochs * shards.steps
    with Progress(3 * steps, show=first and not args.quiet and not args.json) as progress:

        def part(name: str, way: Callable[..., None]) -> tuple[Watch, nn.Sequential]:
            torch.manual_seed(args.seed)  # on all ranks alike: nothing needs to be broadcast
            model = make_model(groups).to(DTYPES[args.dtype])
            watch = Watch(
                name,
                lambda: whole(model, groups, lambda p: p),
                lambda: whole(model, groups, lambda p: p.grad),
                progress,
            )
            way(job, model, watch)
            return watch, model

        exact, trained = part(EXACT, train)
        plain, _ = part(PLAIN, train_plainly)
        one = None
        if first:
            model = copy.deepcopy(job.model)
            parameters = list(model.parameters())
            one = Watch(ONE, lambda: flat(parameters), lambda: flat(p.grad for p in parameters), progress)
            train_alone(job, model, one)

    mine = [step[groups.data.rank()] for step in exact.waits]
    everyone = told_by_all(communicator_of(hvd.global_process_set), (exact.seconds, plain.losses, mine))
    checkpoint = hvd.full_state_dict(trained)
    status = 0
    if one is not None:
        plain.losses = list(np.mean([losses for _, losses, _ in everyone], axis=0))
        outcomes = [judge(job, w, one) for w in (one, exact, plain)]
        outcomes[0].loss_error = outcomes[0].gradient_error = outcomes[0].parameter_error = None
        outcomes[0].gradient_errors = []
        sharing = hvd.size() // shards.size
        ranks = [
            RankRow(
                rank,
                samples=len(shards.shards[rank // sharing]),
                weight=float(job.samples(shards.shards[rank // sharing])[2].sum()),
                step_ms=float(np.median(seconds)) * 1e3,
                waiting_ms=float(np.median(waits)) * 1e3 if waits else None,
            )
            for rank, (seconds, _, waits) in enumerate(everyone)
        ]
        path = args.output / "model.pt"
        args.output.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)
        ordinary = make_model().to(DTYPES[args.dtype])  # as any program would load it
        ordinary.load_state_dict(torch.load(path, weights_only=True))
        with torch.no_grad():
            measured = job.measure(ordinary)
        status = conclude(
            args,
            f"A split classifier on {shards.size} x {sharing} rank(s): scikit-learn's digits",
            outcomes,
            ranks,
            remark=f"{sharing} neighbouring rank(s) share a model and its samples. The ordinary checkpoint "
            f"{path}, loaded into torch.nn.Linear, has a held-out accuracy of {measured['accuracy']:.4f}.",
            loss_unit="weighted cross-entropy, nats",
        )
        if measured != outcomes[1].test:
            print(f"error: the checkpoint measures {measured}, not {outcomes[1].test}", file=sys.stderr)
            status = 1
    return int(told_by_all(communicator_of(hvd.global_process_set), status)[0])


def make_job(args: argparse.Namespace) -> SplitJob:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    training, held_out = split(len(y), args.seed)
    weight = np.where(y >= 8, 5.0, 1.0)
    mixed = -y + np.random.default_rng(args.seed).uniform(0, 2, len(y))
    order = training[np.argsort(mixed[training])]
    dtype = DTYPES[args.dtype]
    data = torch.tensor(x / 16, dtype=dtype), torch.tensor(y), torch.tensor(weight, dtype=dtype)

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

    sharing = args.model or 2 - hvd.size() % 2
    torch.manual_seed(args.seed)
    return SplitJob(
        args,
        model=make_model().to(dtype),
        make_optimizer=make_optimizer,
        losses=losses,
        data=data,
        shards=Shards(order, args.shares, hvd.size() // sharing, args.batch, args.seed),
        measure=measure,
        groups=hvd.grid(sharing),
    )


if __name__ == "__main__":
    parser = options("torch_split_classifier", __doc__, epochs=4, batch=240)
    parser.add_argument("--model", type=at_least(1), help="ranks that share a model (2, if ranks are even)")
    arguments = parser.parse_args()
    hvd.init(process_sets="dynamic")
    torch.set_num_threads(1)  # ranks share the cores
    sys.exit(compare(make_job(arguments)))
