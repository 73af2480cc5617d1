"""What the PyTorch examples hold hvdloss against: one process, and Horovod's plain averaging."""

from __future__ import annotations

import argparse
import copy
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
    Outcome,
    Progress,
    RankRow,
    Shards,
    Watch,
    conclude,
    outcome,
    told_by_all,
)
from hvdloss.torch.ops import communicator_of

DTYPES = {"float64": torch.float64, "float32": torch.float32}
Samples = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # inputs, targets, weights


@dataclass
class Job:
    """One model, one way to make its optimizer, and data of which each rank takes its shard."""

    args: argparse.Namespace
    model: nn.Module
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # per sample
    data: Samples
    shards: Shards
    measure: Callable[[nn.Module], dict[str, float]]  # on held-out samples
    micro: int | None = None  # samples in a micro-batch

    def samples(self, index: np.ndarray) -> Samples:
        x, y, weight = self.data
        picked = torch.from_numpy(index)
        return x[picked], y[picked], weight[picked]

    def batches(self, epoch: int) -> Iterator[Samples]:
        """Yield what this rank brings to each step of an epoch."""
        for step in range(self.shards.steps):
            yield self.samples(self.shards.batch(hvd.rank(), epoch, step))

    def micro_batches(self, epoch: int) -> Iterator[list[Samples]]:
        """Yield the same cut into micro-batches, the last of which may be shorter."""
        assert self.micro is not None
        for batch in self.batches(epoch):
            yield list(zip(*(part.split(self.micro) for part in batch), strict=True))

    def count_micro_batches(self, rank: int) -> int:
        """Return the largest number of micro-batches that a rank has in a step."""
        assert self.micro is not None
        longest = -(-len(self.shards.shards[rank]) // self.shards.steps)
        return max(1, -(-longest // self.micro))

    def most_micro_batches(self) -> int:
        """Return the largest number of micro-batches that any rank has in a step."""
        return max(map(self.count_micro_batches, range(self.shards.size)))

    def mean(self, model: nn.Module, samples: Samples) -> torch.Tensor:
        """Return the weighted mean loss of some samples, written out."""
        x, y, weight = samples
        return weighted_mean(self.losses(model(x), y), weight)


def device_of(kind: str) -> torch.device:
    """Return this rank's device: of the machine's GPUs the one with its local rank."""
    if kind == "cuda":
        torch.cuda.set_device(hvd.local_rank())
        return torch.device("cuda", hvd.local_rank())
    return torch.device(kind)


def weighted_mean(losses: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight * losses).sum() / weight.sum().clamp(min=torch.finfo(losses.dtype).tiny)


def flat(tensors: Any) -> np.ndarray:
    return torch.cat([t.detach().flatten() for t in tensors]).double().cpu().numpy()


def compare(job: Job, train: Callable[[Job, nn.Module, Watch], None], title: str, **report: Any) -> int:
    """Train in three ways from the same start, hold each step against one process, and report.

    Args:
        job: what to train.
        train: the example's own training loop, ``train(job, model, watch)``.
        title: of the report.
        report: for :func:`_common.conclude`.

    Returns:
        the exit status, the same on every rank.
    """
    args, shards, first = job.args, job.shards, hvd.rank() == 0
    steps = args.epochs * shards.steps
    with Progress(3 * steps, show=first and not args.quiet and not args.json) as progress:

        def watched(name: str, model: nn.Module) -> Watch:
            parameters = list(model.parameters())
            return Watch(
                name,
                lambda: flat(parameters),
                lambda: flat(p.grad for p in parameters),
                progress,
                keep=first,
            )

        model = copy.deepcopy(job.model)
        exact = watched(EXACT, model)
        train(job, model, exact)

        model = copy.deepcopy(job.model)
        plain = watched(PLAIN, model)
        train_plainly(job, model, plain)

        one = None
        if first:
            model = copy.deepcopy(job.model)
            one = watched(ONE, model)
            train_alone(job, model, one)

    everyone = told_by_all(communicator_of(hvd.global_process_set), (exact.seconds, plain.losses))
    status = 0
    if one is not None:
        plain.losses = list(np.mean([losses for _, losses in everyone], axis=0))
        outcomes = [judge(job, w, one) for w in (one, exact, plain)]
        outcomes[0].loss_error = outcomes[0].gradient_error = outcomes[0].parameter_error = None
        outcomes[0].gradient_errors = []
        waits = [float(np.median(one)) * 1e3 for one in zip(*exact.waits, strict=True)]
        ranks = [
            RankRow(
                rank,
                samples=len(shard),
                weight=float(job.samples(shard)[2].sum()),
                step_ms=float(np.median(seconds)) * 1e3,
                waiting_ms=waits[rank] if waits else None,
                micro_batches=job.count_micro_batches(rank) if job.micro else 1,
            )
            for rank, (shard, (seconds, _)) in enumerate(zip(shards.shards, everyone, strict=True))
        ]
        status = conclude(args, title, outcomes, ranks, **report)
    return int(told_by_all(communicator_of(hvd.global_process_set), status)[0])


def train_plainly(job: Job, model: nn.Module, watch: Watch) -> None:
    """Train as with Horovod alone: local means, and gradients averaged over ranks."""
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    # Without an objective this is horovod.torch.DistributedOptimizer.
    optimizer = hvd.DistributedOptimizer(job.make_optimizer(model), model.named_parameters())
    for epoch in range(job.args.epochs):
        for batch in job.batches(epoch):  # at once: it takes as many micro-batches on every rank only
            optimizer.zero_grad()
            loss = job.mean(model, batch)
            loss.backward()
            optimizer.step()
            watch(loss.item())


def train_alone(job: Job, model: nn.Module, watch: Watch) -> None:
    """Train in this process alone, on all ranks' samples of each step."""
    optimizer = job.make_optimizer(model)
    for epoch in range(job.args.epochs):
        for step in range(job.shards.steps):
            optimizer.zero_grad()
            loss = job.mean(model, job.samples(job.shards.union(epoch, step)))
            loss.backward()
            optimizer.step()
            watch(loss.item())


def judge(job: Job, watch: Watch, one: Watch) -> Outcome:
    """Hold every step of `watch` against one process."""
    model = copy.deepcopy(job.model)
    everything = job.samples(np.concatenate(job.shards.shards))

    def load(parameters: np.ndarray) -> None:
        start = 0
        with torch.no_grad():
            for p in model.parameters():
                values = torch.from_numpy(parameters[start : start + p.numel()])
                p.copy_(values.view(p.shape))
                start += p.numel()

    def oracle(parameters: np.ndarray, index: np.ndarray) -> tuple[float, np.ndarray]:
        load(parameters)
        loss = job.mean(model, job.samples(index))
        return loss.item(), flat(torch.autograd.grad(loss, list(model.parameters())))

    def training_loss(parameters: np.ndarray) -> float:
        load(parameters)
        with torch.no_grad():
            return job.mean(model, everything).item()

    def test(parameters: np.ndarray) -> dict[str, float]:
        load(parameters)
        with torch.no_grad():
            return job.measure(model)

    return outcome(watch, one, job.shards, oracle, training_loss, test)
