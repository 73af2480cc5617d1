"""PyTorch's own pipeline with this library's loss, which test_torch_sharded.py starts with torchrun.

    torchrun --nproc-per-node 2 pipelining_job.py FOLDER

Two stages; on 4 ranks two replicas of each. Each rank writes how far its gradients are from one process's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["horovod"] = None  # type: ignore[assignment]

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import hvdloss.torch as hvd

MICRO, ROWS, CLASSES = 3, 2, 7


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    hvd.init(process_sets="dynamic")
    groups = hvd.grid(stages=2)
    generator = torch.Generator().manual_seed(3)
    layers = [nn.Linear(5, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, CLASSES))]
    for layer in layers:
        layer.double()
        for p in layer.parameters():
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    replicas = hvd.size() // 2
    x = torch.randn(replicas, MICRO * ROWS, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (replicas, MICRO * ROWS), generator=generator)
    y[
        torch.rand(y.shape, generator=generator) < 0.5
    ] = -100  # absent: every micro-batch weighs something else
    y[0, 0] = 1
    replica, stage = groups.data.rank(), groups.pipe.rank()
    mine = layers[stage]
    # Every pipe is a group of PyTorch's; all ranks make all of them.
    pipes = [dist.new_group([replica, replicas + replica]) for replica in range(replicas)]
    runner = PipelineStage(mine, stage, 2, torch.device("cpu"), group=pipes[replica])

    found = {}
    for kind in (ScheduleGPipe, Schedule1F1B):
        mine.zero_grad()
        objective = hvd.Objective("cross_entropy", ahead="sum", process_set=groups.data)
        total = objective.total((y[replica] != -100).sum()) if stage else None

        def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return objective(output, target, total=total)  # noqa: B023

        schedule = kind(runner, MICRO, loss_fn=loss, scale_grads=False)
        if stage == 0:
            schedule.step(x[replica])
        else:
            schedule.step(target=y[replica])
        flat = torch.cat([p.grad.flatten() for p in mine.parameters()])
        flat = hvd.allreduce(flat, op=hvd.Sum, process_set=groups.data)

        whole = nn.Sequential(*layers)
        parameters = list(mine.parameters())
        right = torch.autograd.grad(F.cross_entropy(whole(x.flatten(0, 1)), y.flatten()), parameters)
        expected = torch.cat([g.flatten() for g in right])
        found[kind.__name__] = float((flat - expected).norm() / expected.norm())
    (folder / f"{hvd.rank()}.json").write_text(json.dumps(found))
    hvd.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
