"""How long stages of a model wait for each other, beside what theory says of equal stages.

    horovodrun -np 2 python -m hvdloss.benchmarks.pipeline_bubble
    torchrun --nproc-per-node 2 -m hvdloss.benchmarks.pipeline_bubble

Each stage is a layer that sleeps, forward and twice as long backward, and passes its input on, so that no
number of cores limits it: what is more than theory is what sending costs. The first stage's idle time is that
of a whole step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

import hvdloss.torch as hvd


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        time.sleep(2 * ctx.seconds)
        return grads[0], None


class Sleeping(torch.nn.Module):
    """A stage that takes its time, with one parameter."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Sleep.apply(x * self.factor, self.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.02, help="of a forward pass (%(default)s)")
    parser.add_argument("--rows", type=int, default=64, help="of 4 kB in a micro-batch (%(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="(%(default)s)")
    args = parser.parse_args()
    hvd.init(process_sets="dynamic")
    torch.set_num_threads(1)
    groups = hvd.grid(stages=hvd.size())
    for schedule in ("gpipe", "1f1b"):
        stage = Sleeping(args.seconds)
        objective = hvd.Objective("mse")
        pipeline = hvd.Pipeline(stage, objective, groups, schedule=schedule)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(stage.parameters(), lr=0.0),
            objective=objective,
            process_set=groups.data,
            backward_passes_per_step=16,
        )
        for count in (4, 8, 16):
            batches = [(torch.ones(args.rows, 1024), torch.ones(args.rows, 1024))] * count
            found = []
            for _ in range(args.repeat):
                optimizer.zero_grad()
                pipeline.run(batches)
                optimizer.step()
                assert pipeline.last_run is not None
                found.append(pipeline.last_run.bubble)
            if hvd.rank() == 0:
                row = {
                    "schedule": schedule,
                    "micro_batches": count,
                    "bubble": statistics.median(found),
                    "theory": pipeline.last_run.expected_bubble,
                    "bytes": pipeline.last_run.bytes,
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
