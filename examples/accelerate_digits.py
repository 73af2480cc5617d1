"""A training loop with Hugging Face's Accelerate on several ranks: what changes, held against one process.

Accelerate keeps its devices, mixed precision and clipping; ranks, data and gradients are Horovod's.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _ways_in import all_batches, arguments, conclude, difference, digits, shares
from accelerate import Accelerator
from torch import nn

import hvdloss.torch as hvd
from hvdloss.data import Shuffled
from hvdloss.torch.integrations.transformers import one_of_many

RATE, CLIP = 0.2, 0.5


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()


def train(model: nn.Module, loader: hvd.ShardedLoader, epochs: int) -> None:
    """Train on this rank's samples: all one has to write."""
    accelerator = Accelerator(cpu=True)
    one_of_many()  # rank 0 is the main process
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    objective = hvd.Objective("cross_entropy")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=RATE), model.named_parameters(), objective
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(epochs):
        for x, y in loader:  # not prepared: it knows the ranks
            optimizer.zero_grad()
            accelerator.backward(objective(model(x), y))
            optimizer.optimizer.synchronize()  # before gradients are looked at
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
    accelerator.print(optimizer.optimizer.last_step)  # of all ranks; printed once


def one_process(model: nn.Module, data: torch.utils.data.TensorDataset, batches: list[torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for batch in batches:
        x, y = data[batch]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


def main() -> int:
    args = arguments(__doc__)
    hvd.init()
    torch.set_num_threads(1)  # ranks share the cores
    data, model, reference = digits(), make_model(), make_model()
    sharding = Shuffled(len(data), seed=1, shares=shares())
    train(model, hvd.ShardedLoader(data, sharding, batch_size=args.batch), args.epochs)
    one_process(reference, data, list(all_batches(sharding, args.epochs, args.batch)))
    return conclude(args, "Accelerate", difference(model, reference))


if __name__ == "__main__":
    sys.exit(main())
