"""Steps logged to TensorBoard, MLflow and Weights & Biases, each through its own library.

Whichever of them are installed get every step's numbers; rank 0 alone writes. Nothing leaves the machine:
MLflow has a file of SQLite, and Weights & Biases is offline. Data: 600 of scikit-learn's digits on uneven
ranks.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import ExitStack
from typing import Any

import torch
from _ways_in import all_batches, arguments, conclude, difference, digits, shares
from torch import nn

import hvdloss.torch as hvd
from hvdloss.data import Shuffled
from hvdloss.report.trackers import MLflow, TensorBoard, WandB

RATE = 0.2


def trackers(folder: str) -> list[Any]:
    """Return a tracker for each library that is installed."""
    os.environ.setdefault("WANDB_SILENT", "true")
    makers = {
        "tensorboard": lambda: TensorBoard(f"{folder}/tensorboard"),
        "mlflow": lambda: MLflow("digits", tracking_uri=f"sqlite:///{folder}/mlflow.db"),
        "wandb": lambda: WandB("digits", init={"mode": "offline", "dir": folder}),
    }
    return [make() for name, make in makers.items() if importlib.util.find_spec(name)]


def train(model: nn.Module, loader: hvd.ShardedLoader, epochs: int, folder: str) -> list[str]:
    """Train on this rank's samples, and log."""
    objective = hvd.Objective("cross_entropy")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=RATE), model.named_parameters(), objective
    )
    with ExitStack() as stack:
        logs = [stack.enter_context(tracker) for tracker in trackers(folder)]
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                objective(model(x), y).backward()
                optimizer.step()
                for tracker in logs:
                    tracker.step(optimizer.last_step)
    return [tracker.title for tracker in logs if not tracker.failures]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(64, 10).double()


def main() -> int:
    args = arguments(__doc__, epochs=2)
    hvd.init()
    torch.set_num_threads(1)  # ranks share the cores
    os.makedirs(args.output, exist_ok=True)
    data, model, reference = digits(), make_model(), make_model()
    sharding = Shuffled(len(data), seed=1, shares=shares())
    logged = train(model, hvd.ShardedLoader(data, sharding, batch_size=args.batch), args.epochs, args.output)

    optimizer = torch.optim.SGD(reference.parameters(), lr=RATE)
    losses = []
    for batch in all_batches(sharding, args.epochs, args.batch):
        x, y = data[batch]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(reference(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return conclude(args, "Trackers", difference(model, reference), logged=logged, losses=losses)


if __name__ == "__main__":
    sys.exit(main())
