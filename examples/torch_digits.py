"""Class weights on shards that hold different classes, with gradient accumulation, in PyTorch.

Data: scikit-learn's digits at 4 x 4 pixels. One rank holds most of the 8s and 9s, on which errors count five
times; ranks have different numbers of images, and so of micro-batches. Each rank's own weighted mean divides
by its own weights: the class weights cancel where they matter. Trains with hvdloss, with Horovod's plain
averaging, and in one process, and compares.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

import hvdloss
import hvdloss.torch as hvd
from _common import Shards, at_least, compare, digit_measures, digits, options, recorder
from _torch import TorchJob, mean
from hvdloss.torch.ops import communicator_of


class Digits(TorchJob):
    def train(self, model: nn.Module, watch: Any) -> None:
        """Train on this rank's images. But for `watch`, this is all one has to write."""
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        terms = (hvdloss.CommunicationCost(), hvdloss.DataSkew(classes=10))  # measured, for the report
        objective = hvd.Objective("cross_entropy", terms=terms)
        micro = self.args.micro
        optimizer = hvd.DistributedOptimizer(
            self.make_optimizer(model),
            model.named_parameters(),
            objective,
            backward_passes_per_step=self.most_micro_batches(micro),  # other ranks may have fewer
        )
        record = recorder(hvd, self.args).follow(optimizer)
        for micro_batches in self.micro_batches(hvd.rank(), micro):
            optimizer.zero_grad()
            for x, y, weight in micro_batches:  # this rank's own, as many and as long as they are
                objective(model(x), y, weight).backward()
            optimizer.step()
            watch(optimizer.last_step.loss)  # of all ranks' images
        record.close()

    def make_model(self) -> nn.Module:
        return nn.Linear(16, 10)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)

    def measure(self, model: nn.Module) -> dict[str, float]:
        batch = self.samples(self.held_out)
        with torch.no_grad():
            return digit_measures(
                model(batch[0]).cpu().numpy(), mean(model, batch).item(), self.data[1][self.held_out]
            )


def make_job(args: Any, seed: int) -> Digits:
    data, order, held_out = digits(seed)
    return Digits(args, seed, data, Shards(order, args.shares, hvd.size(), args.batch, seed), held_out)


if __name__ == "__main__":
    parser = options("torch_digits", __doc__, epochs=36, batch=360, seeds=3)
    parser.add_argument("--micro", type=at_least(1), default=96, help="images in a micro-batch (%(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: over NCCL, a GPU each"
    )
    arguments = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)  # ranks share the cores
    if arguments.device == "cuda":
        torch.cuda.set_device(hvd.local_rank())
        Digits.device = f"cuda:{hvd.local_rank()}"
    status = compare(
        arguments,
        lambda seed: make_job(arguments, seed),
        hvd,
        communicator_of(hvd.global_process_set),
        title="Class weights, uneven shards, accumulation: digits",
        remark="Rank 0 holds most of the 8s and 9s, which count five times.",
    )
    sys.exit(status)
