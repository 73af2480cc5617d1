"""A user's script, which test_torch_distributed.py starts with torchrun, and once by itself.

    torchrun --nproc-per-node 2 distributed_job.py FOLDER train|kill|order|joined|ddp|stages

It is written as one would be, but for `horovod`, which it cannot import.
"""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.modules["horovod"] = None  # type: ignore[assignment]

import torch

import hvdloss.torch as hvd
from hvdloss.errors import HvdlossError

STEPS = 12
SPLITS = ((11, 3), (0, 14), (14, 0), (1, 13), (7, 7))  # of a step's samples over two ranks


def data(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a step's samples, classes, and weights: of all ranks."""
    g = torch.Generator().manual_seed(step)
    x = torch.randn(14, 6, generator=g, dtype=torch.float64)
    return x, (x.sum(1) > 0).long(), 4.0 * torch.rand(14, generator=g, dtype=torch.float64)


def train(folder: Path) -> None:
    """Train on this rank's part of every step; rank 0 keeps parameters and losses."""
    torch.manual_seed(hvd.rank())  # ranks begin apart
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    if hvd.rank() == 0:
        torch.save(model.state_dict(), folder / f"begin-{hvd.size()}.pt")
    objective = hvd.Objective("cross_entropy")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.05), model.named_parameters(), objective
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    losses = []
    for step in range(STEPS):
        x, y, weight = data(step)
        if hvd.size() == 2:
            mine = slice(*((0, SPLITS[step % 5][0]) if hvd.rank() == 0 else (SPLITS[step % 5][0], 14)))
            x, y, weight = x[mine], y[mine], weight[mine]
        optimizer.zero_grad()
        if len(x) or step % 2:  # without samples a rank may leave the backward pass out, or not
            objective(model(x), y, weight).backward()
        optimizer.step()
        losses.append(optimizer.last_step.loss)
    if hvd.rank() == 0:
        torch.save((model.state_dict(), losses), folder / f"end-{hvd.size()}.pt")


def kill(folder: Path) -> None:
    """Train, and have rank 1 vanish."""
    model = torch.nn.Linear(6, 1)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), None, objective)
    try:
        for step in range(1000):
            if hvd.rank() == 1 and step == 5:
                (folder / "killed").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.zero_grad()
            objective(model(torch.ones(4, 6)), torch.ones(4, 1)).backward()
            optimizer.step()
    except HvdlossError as error:
        took = time.time() - float((folder / "killed").read_text())
        (folder / "error").write_text(f"{type(error).__name__}: {error}\n{took:.2f}")
        raise


def order(folder: Path) -> None:
    """Launch two exchanges in another order on each rank."""
    names = ("a", "b") if hvd.rank() == 0 else ("b", "a")
    handles = [hvd.allreduce_async(torch.ones(3), name=name) for name in names]
    for handle in handles:
        try:
            hvd.synchronize(handle)
        except HvdlossError as error:
            with (folder / f"error-{hvd.rank()}").open("a") as out:
                out.write(f"{type(error).__name__}: {error}\n")
    assert hvd.allreduce(torch.ones(2), op=hvd.Sum).tolist() == [2.0, 2.0]  # and go on


def joined(folder: Path) -> None:
    """Begin with a default process group of the user's own, and leave it to the user."""
    assert torch.distributed.is_initialized()
    assert hvd.allgather(torch.tensor([hvd.rank()])).tolist() == [0, 1]
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    hvd.shutdown()
    torch.distributed.all_reduce(total)
    (folder / f"total-{torch.distributed.get_rank()}").write_text(str(total.item()))
    torch.distributed.destroy_process_group()


def ddp(folder: Path) -> None:
    """Compare the gradients of DistributedDataParallel with one process's, over random uneven splits."""
    from torch.nn.parallel import DistributedDataParallel

    rank, size = hvd.rank(), hvd.size()
    g = torch.Generator().manual_seed(7)
    torch.manual_seed(0)
    alone = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    model = DistributedDataParallel(copy.deepcopy(alone))
    cross_entropy = torch.nn.functional.cross_entropy
    objective = hvd.Objective("cross_entropy", ahead=True)
    worst, plain = 0.0, 0.0
    for trial in range(20):
        counts = torch.randint(0, 9, (2, size), generator=g)  # of two micro-batches
        counts[0, trial % size] = 0  # a rank without samples in one, and sometimes in both
        counts[1, trial % size] *= trial % 3
        counts[1, (trial + 1) % size] += 1
        every = [
            [
                (
                    torch.randn(int(n), 6, generator=g, dtype=torch.float64) + k,
                    torch.randint(0, 3, (int(n),), generator=g),
                    torch.rand(int(n), generator=g, dtype=torch.float64) * (1 + 3 * k),
                )
                for k, n in enumerate(row)
            ]
            for row in counts
        ]
        passes = 1 + trial % 2
        batches = every[-passes:]
        x, y, w = (torch.cat([part[i] for row in batches for part in row]) for i in range(3))
        alone.zero_grad()
        ((cross_entropy(alone(x), y, reduction="none") * w).sum() / w.sum()).backward()
        expected = torch.cat([p.grad.flatten() for p in alone.parameters()])

        def error() -> float:
            found = torch.cat([p.grad.flatten() for p in model.parameters()])
            return float((found - expected).norm() / expected.norm())  # noqa: B023

        model.zero_grad()
        mine = [row[rank] for row in batches]
        total = objective.total(sum(w.sum() for _, _, w in mine)) if passes > 1 else None
        for i, (x, y, w) in enumerate(mine):
            with model.no_sync() if i + 1 < passes else contextlib.nullcontext():
                loss = objective(model(x), y, w, total=total) + 1e-3 * sum(
                    p.sum() for p in model.parameters()
                )
                loss.backward()
        for p in model.parameters():
            p.grad -= 1e-3 * passes
        worst = max(worst, error())
        model.zero_grad()
        x, y, w = mine[-1]
        local = (cross_entropy(model(x), y, reduction="none") * w).sum() / w.sum().clamp(min=1e-9)
        local.backward()
        plain = max(plain, error()) if passes == 1 else plain
    (folder / f"errors-{rank}").write_text(f"{worst} {plain}")
    try:  # on every rank, whichever it is of
        x, y, w = torch.ones(2, 6).double(), torch.zeros(2).long(), torch.tensor([1.0, -1.0 if rank else 1.0])
        objective(model(x), y, w).backward()
    except HvdlossError as found:
        (folder / f"refused-{rank}").write_text(f"{type(found).__name__}: {found}")


def stages(folder: Path) -> None:
    """Have the last of two stages fail in the middle of a step."""

    def losses(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if target[0] == 7:
            raise ValueError("the seventh micro-batch")
        return (prediction - target[:, None]).square().mean(1)

    groups = hvd.grid(stages=2)
    stage = hvd.pipeline_stage([lambda: torch.nn.Linear(3, 3)] * 2, groups)
    objective = hvd.Objective(losses)
    pipeline = hvd.Pipeline(stage, objective, groups)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(stage.parameters(), lr=0.01),
        objective=objective,
        process_set=groups.data,
        backward_passes_per_step=5,
    )
    try:
        for step in range(2):
            optimizer.zero_grad()
            pipeline.run([(torch.ones(2, 3), torch.full((2,), 5.0 * step + i)) for i in range(5)])
            optimizer.step()
    except Exception as error:
        (folder / f"stage-{pipeline.stage}").write_text(f"{type(error).__name__}: {error}")
        raise


def main() -> None:
    """Do what the command line says."""
    if sys.argv[2] in ("joined", "ddp"):
        torch.distributed.init_process_group("gloo")
    hvd.init()
    jobs = {"train": train, "kill": kill, "order": order, "joined": joined, "ddp": ddp, "stages": stages}
    jobs[sys.argv[2]](Path(sys.argv[1]))
    hvd.shutdown()


if __name__ == "__main__":
    main()
