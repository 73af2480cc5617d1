"""A classifier whose last layer is split over ranks by class, two by two ranks, in PyTorch.

Data: scikit-learn's digits at 4 x 4 pixels. Of four ranks, 0 and 1 share one model, and 2 and 3 another with
other images. All ranks hold the feature layers; of the last layer each holds half of the classes, computes
its five columns of the logits, and tells the other rank of its pair three numbers per image. Between the
pairs, whose images differ in number and kind, errors on 8s and 9s count five times. Trains with hvdloss, with
Horovod's plain averaging between the pairs, and in one process with an ordinary last layer; compares, and
saves an ordinary checkpoint. Two ranks share one model; on an odd number each holds a whole one.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import nn

import hvdloss.torch as hvd
from _common import Shards, at_least, compare, digit_measures, digits, options, recorder
from _torch import TorchJob, mean, weighted_mean
from hvdloss.torch.ops import communicator_of


class Split(TorchJob):
    groups: hvd.Grid  # which ranks share a model, and which hold the same part of it

    def train(self, model: nn.Sequential, watch: Any) -> None:
        """Train on this pair's images. But for `watch`, this is all one has to write."""
        loss = hvd.ShardedCrossEntropy(model[-1].shards, process_set=self.groups.model)
        objective = hvd.Objective(loss)
        optimizer = hvd.DistributedOptimizer(
            self.make_optimizer(model),
            model.named_parameters(),
            objective,
            process_set=self.groups.data,  # ranks that hold the same part of the model
        )
        record = recorder(hvd, self.args).follow(optimizer)
        for x, y, weight in self.batches(self.groups.data.rank()):
            optimizer.zero_grad()
            objective(model(x), y, weight).backward()
            optimizer.step()
            watch(optimizer.last_step.loss)
        record.close()
        self.save(model)

    def save(self, model: nn.Module) -> None:
        """Save an ordinary checkpoint, which any program can load into ``torch.nn.Linear``."""
        checkpoint = hvd.full_state_dict(model)
        if hvd.rank() == 0:
            self.args.output.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, self.args.output / "model.pt")

    def train_plainly(self, model: nn.Sequential, watch: Any) -> None:
        """Train with local means, and Horovod's average over the ranks that hold the same part."""
        groups, shards = self.groups, model[-1].shards
        optimizer = hvd.DistributedOptimizer(
            self.make_optimizer(model), model.named_parameters(), process_set=groups.data
        )
        for x, y, weight in self.batches(groups.data.rank()):
            optimizer.zero_grad()
            losses = hvd.sharded_cross_entropy(model(x), y, shards, process_set=groups.model)
            loss = weighted_mean(losses, weight)
            loss.backward()
            optimizer.step()
            watch(loss.item())

    def make_model(self) -> nn.Sequential:
        """Return this rank's part; one seed gives it the weights of the ordinary model."""
        head = hvd.ShardedLinear(16, 10, process_set=self.groups.model)
        return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), head)

    def make_plain_model(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10))

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    def flat(self, model: nn.Sequential, tensors: list[torch.Tensor]) -> np.ndarray:
        """Return what belongs to the ordinary model's parameters, as one vector. Collective."""
        if isinstance(model[-1], hvd.ShardedLinear) and self.groups.model.size() > 1:
            *features, kernel, bias = (t.detach() for t in tensors)
            group = self.groups.model
            head = [hvd.allgather(t, name=f"whole.{t.dim()}", process_set=group) for t in (kernel, bias)]
            tensors = [*features, *head]
        return super().flat(model, tensors)

    def measure(self, model: nn.Module) -> dict[str, float]:
        batch = self.samples(self.held_out)
        with torch.no_grad():
            return digit_measures(model(batch[0]).numpy(), mean(model, batch).item(), batch[1].numpy())


def make_job(args: Any, seed: int) -> Split:
    data, order, held_out = digits(seed)
    sharing = args.model or 2 - hvd.size() % 2
    Split.groups = hvd.grid(sharing)
    return Split(
        args, seed, data, Shards(order, args.shares, hvd.size() // sharing, args.batch, seed), held_out
    )


if __name__ == "__main__":
    parser = options("torch_split_classifier", __doc__, epochs=150, batch=1438, seeds=2)
    parser.add_argument("--model", type=at_least(1), help="ranks that share a model (2, if ranks are even)")
    arguments = parser.parse_args()
    hvd.init(process_sets="dynamic")
    torch.set_num_threads(1)  # ranks share the cores
    status = compare(
        arguments,
        lambda seed: make_job(arguments, seed),
        hvd,
        communicator_of(hvd.global_process_set),
        title="A last layer split by class, two by two ranks: digits",
        remark="The first pair of ranks holds most of the 8s and 9s, which count five times.",
    )
    sys.exit(status)
