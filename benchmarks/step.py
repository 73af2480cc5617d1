"""Step time of the exact optimizer beside its peers, in one run, interleaved.

    horovodrun -np 2 python benchmarks/step.py [--workload mlp] [--json out.json]

Peers: ``compute`` (no reduction at all), ``horovod`` (horovod.torch.DistributedOptimizer), ``ddp``
(torch DistributedDataParallel over Gloo), ``hvdloss`` (exact, with an objective). Each round times every
peer for a few steps, in an order that rotates; reported are medians over rounds, quartiles, and each
peer's ratio to Horovod's with a 95 % bootstrap interval. One thread per rank.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import horovod.torch as horovod
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import hvdloss.torch as hvd
from _common import environment, join_torch_distributed, ratio_interval, rotated, write_json


def many_small() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """200 x Linear(64, 64): many small tensors."""
    layers: list[nn.Module] = []
    for _ in range(200):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers), torch.randn(32, 64), torch.randn(32, 64)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def transformer() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """6 encoder layers, d 256, 4 heads, ff 1024, batch 4 x 64."""
    return _Encoder(), torch.randn(4, 64, 256), torch.randn(4, 64, 256)


def mlp() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """1024-4096-4096-2048-1024: 30 M parameters, batch 8."""
    sizes = [1024, 4096, 4096, 2048, 1024]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), torch.randn(8, 1024), torch.randn(8, 1024)


def convolution() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small convolutional net, batch 32 of 3 x 32 x 32."""
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    return net, torch.randn(32, 3, 32, 32), torch.randn(32, 10)


WORKLOADS = {"small": many_small, "transformer": transformer, "mlp": mlp, "conv": convolution}
PEERS = ("compute", "horovod", "ddp", "hvdloss")


def make_step(peer: str, build: Callable[[], tuple[nn.Module, torch.Tensor, torch.Tensor]]):
    """Return a function that makes one training step of this peer."""
    torch.manual_seed(0)
    model, x, y = build()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.mse_loss
    if peer == "horovod":
        optimizer = horovod.DistributedOptimizer(optimizer, model.named_parameters())
    elif peer == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif peer == "hvdloss":
        objective = hvd.Objective("mse")
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), objective)
        loss_of = objective

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()

    return step


def measure(names: list[str], workload: str, rounds: int, steps: int) -> dict[str, list[float]]:
    """Return each peer's step times, one mean per round, in ms; this rank's clock."""
    makers = {name: make_step(name, WORKLOADS[workload]) for name in names}
    for step in makers.values():
        for _ in range(4):
            step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in rotated(names, number):
            hvd.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                makers[name]()
            hvd.barrier()
            times[name].append((time.perf_counter() - began) / steps * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--json", help="write all numbers to this file")
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    if "ddp" in args.peers:
        join_torch_distributed(hvd)
    console = Console(quiet=hvd.rank() != 0, width=110)
    out: dict[str, dict[str, list[float]]] = {}
    for workload in WORKLOADS if args.workload == "all" else [args.workload]:
        times = measure(args.peers, workload, args.rounds, args.steps)
        out[workload] = times
        table = Table(title=f"{workload}: {WORKLOADS[workload].__doc__} {hvd.size()} ranks, ms per step")
        for column in ("peer", "median", "quartiles", "/ horovod", "/ ddp"):
            table.add_column(column, justify="left" if column == "peer" else "right")
        for name in args.peers:
            low, _, high = statistics.quantiles(times[name], n=4)
            cells = [f"{statistics.median(times[name]):.1f}", f"{low:.1f} - {high:.1f}"]
            for peer in ("horovod", "ddp"):
                if peer in times:
                    ratio, lower, upper = ratio_interval(times[name], times[peer])
                    cells.append(f"{ratio:.2f} ({lower:.2f} - {upper:.2f})")
                else:
                    cells.append("")
            table.add_row(name, *cells)
        console.print(table)
    if hvd.rank() == 0:
        write_json(args.json, {"environment": environment(hvd), "ms_per_step": out})


if __name__ == "__main__":
    main()
