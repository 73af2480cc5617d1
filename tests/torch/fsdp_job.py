"""Scripts over FSDP2, which test_torch_fsdp.py starts with torchrun.

    torchrun --nproc-per-node 2 fsdp_job.py FOLDER average|added|....

On 4 ranks parameters are sharded over 2 and replicated twice (HSDP). Each writes what it found to FOLDER.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.modules["horovod"] = None  # type: ignore[assignment]

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import hvdloss.torch as hvd
from hvdloss.errors import HvdlossError

TRIALS = 20
TOKENS, LENGTH = 11, 5
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Tagger(nn.Module):
    """Gives logits for every token; its embedding is its head too, and its second layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 7)
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
        self.head = nn.Linear(7, TOKENS, bias=False)
        self.head.weight = self.embedding.weight
        self.layers[1].requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x).flatten(0, 1)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Return a copy that is sharded over 2 ranks; over 4 it is replicated twice, too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("replicas", "shards") if hvd.size() == 4 else ("shards",)
    mesh = init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)
    model = copy.deepcopy(model)
    model.head.weight = model.embedding.weight
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def batches(trial: int) -> list[list[Batch]]:
    """Return the micro-batches of every rank, of uneven rows, some without any; other tokens on each."""
    g = torch.Generator().manual_seed(trial)
    size, passes = hvd.size(), 1 + trial % 3
    counts = torch.randint(0, 6, (passes, size), generator=g)
    counts[0, trial % size] = 0
    counts[-1, (trial + 1) % size] += 1
    if trial % 4 == 0:
        counts[:, trial // 4 % size] = 0  # in none of the micro-batches
    counts[-1, (trial // 4 + 1) % size] += 1

    def batch(n: int, k: int) -> Batch:
        x = torch.randint(k, TOKENS, (n, LENGTH), generator=g)
        y = torch.randint(0, TOKENS - k, (n * LENGTH,), generator=g)
        y[torch.rand(n * LENGTH, generator=g) < 0.3 * k] = -100
        return x, y, torch.rand(n * LENGTH, generator=g, dtype=torch.float64) * (1 + 3 * k)

    return [[batch(int(n), k) for k, n in enumerate(row)] for row in counts]


def weights(batch: Batch) -> torch.Tensor:
    """Return the weight of a micro-batch's elements that are not absent."""
    return batch[2][batch[1] != -100].sum()


def plain_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the weighted mean of a batch, in PyTorch alone."""
    x, y, w = batch
    return (F.cross_entropy(model(x), y, reduction="none") * w).sum() / weights(batch).clamp(min=1e-9)


def gradients(model: nn.Module) -> torch.Tensor:
    """Return all gradients, whole, in float64."""
    found = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]
    return torch.cat([g.double().flatten() for g in whole])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def penalty(model: nn.Module) -> torch.Tensor:
    """Return the squares of all trained parameters; of shards of them too."""
    total = 1e-2 * sum(p.square().sum() for p in model.parameters() if p.requires_grad)
    return total.full_tensor() if hasattr(total, "full_tensor") else total


def compare(
    alone: nn.Module,
    model: nn.Module,
    objective: Any,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    sync: Callable[[bool], Any] | None = None,
    clip: Callable[[Any, float], Any] = nn.utils.clip_grad_norm_,
) -> dict[str, float]:
    """Return the largest errors against one process that sees everything, over random splits."""
    worst = {"gradient": 0.0, "norm": 0.0, "clipped": 0.0, "plain": 0.0}

    def note(name: str, value: float) -> None:
        worst[name] = max(worst[name], value)

    for trial in range(TRIALS):
        every = batches(trial)
        alone.zero_grad()
        whole = tuple(torch.cat([part[i] for row in every for part in row]) for i in range(3))
        (plain_loss(alone, whole) + penalty(alone)).backward()
        expected = gradients(alone)
        mine = [row[hvd.rank()] for row in every]

        model.zero_grad()
        total = objective.total(sum(weights(batch) for batch in mine)) if len(mine) > 1 else None
        for i, (x, y, w) in enumerate(mine):
            last = i + 1 == len(mine)
            if sync is not None and trial % 2:
                sync(last)
            extra = penalty(model) if last else 0.0  # once a step
            backward(objective(model(x), y, w, total=total) + extra)
        note("gradient", distance(gradients(model), expected))
        limit = float(expected.norm()) / 3
        norm = clip(model.parameters(), limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        note("norm", abs(float(norm) / float(expected.norm()) - 1))
        nn.utils.clip_grad_norm_(alone.parameters(), limit)
        note("clipped", distance(gradients(model), gradients(alone)))

        model.zero_grad()
        if len(mine) == 1:
            (penalty(model) + plain_loss(model, mine[0])).backward()
            note("plain", distance(gradients(model), expected))
    return worst


def begin() -> Tagger:
    torch.manual_seed(0)
    return Tagger().double()


def average() -> dict[str, float]:
    """Average what was weighed ahead."""
    model = shard(begin())
    objective = hvd.Objective("cross_entropy", ahead=True)
    return compare(begin(), model, objective, sync=model.set_requires_gradient_sync)


def added() -> dict[str, float]:
    """Add up what was weighed ahead; layers stay whole between forward and backward pass."""
    model = shard(begin(), reshard_after_forward=False)
    for part in (model, *model.layers):
        part.set_gradient_divide_factor(1.0)
    objective = hvd.Objective("cross_entropy", ahead="sum")
    return compare(begin(), model, objective, sync=model.set_requires_gradient_sync)


def functions() -> dict[str, float]:
    """Average, and add up, the gradient of a loss that is no mean: the correlation over all ranks."""
    from torch.distributed.fsdp import fully_shard

    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(9, n, generator=g, dtype=torch.float64) for n in (4, 1))
    mine = slice(0, 2) if hvd.rank() == 0 else slice(2, 9)
    found = {}
    for name, ahead in (("average", True), ("sum", "sum")):
        torch.manual_seed(0)
        alone = nn.Linear(4, 1).double()
        model = fully_shard(copy.deepcopy(alone))
        if ahead == "sum":
            model.set_gradient_divide_factor(1.0)
        (1 - torch.corrcoef(torch.cat([alone(x), y], 1).T)[0, 1]).backward()
        hvd.Objective("correlation", ahead=ahead)(model(x[mine])[:, 0], y[mine, 0]).backward()
        found[name] = distance(gradients(model), gradients(alone))
    return found


def mixed() -> dict[str, float]:
    """Compute in bfloat16, with gradients reduced in float32; and float32 with and without forced sums."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    found = {}
    for name, policy in (
        ("bfloat16", MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)),
        ("float32", MixedPrecisionPolicy()),
        ("sums", MixedPrecisionPolicy()),
    ):
        model = shard(begin().float(), mp_policy=policy)
        for part in (model, *model.layers):
            part.set_force_sum_reduction_for_comms(name == "sums")
        objective = hvd.Objective("cross_entropy", ahead=True)
        found[name] = compare(begin(), model, objective, sync=model.set_requires_gradient_sync)
    return found


def refused() -> dict[str, str]:
    """Say what is refused, on this rank; and the error of a step that follows."""
    found: dict[str, str] = {}
    kept = []
    batch = batches(1)[-1][hvd.rank()]

    def attempt(name: str, ahead: Any, factor: float | None = None, weight: float = 1.0) -> None:
        model = shard(begin())
        if factor is not None:
            model.set_gradient_divide_factor(factor)
        objective = hvd.Objective("cross_entropy", ahead=ahead)
        x, y, w = batch
        try:
            objective(model(x), torch.zeros_like(y), w * weight).backward()
        except HvdlossError as error:
            found[name] = f"{type(error).__name__}: {error}"
        if name == "weight":  # and go on
            model.reshard()  # a backward pass that failed leaves it whole
            found["after"] = str(compare(begin(), model, objective)["gradient"])
        kept.append(model)  # what is wrong with another model does not matter

    attempt("factor", True, 1.0)
    attempt("sum", "sum")
    attempt("weight", True, weight=-1.0 if hvd.rank() else 1.0)
    return found


def checkpoint(folder: Path) -> dict[str, Any]:
    """Train, and keep model and optimizer, sharded, for one process to load."""
    from torch.distributed.checkpoint import save
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = shard(begin())
    objective = hvd.Objective("cross_entropy", ahead=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for trial in range(8):
        optimizer.zero_grad()
        mine = [row[hvd.rank()] for row in batches(trial)]
        total = objective.total(sum(weights(batch) for batch in mine))
        for x, y, w in mine:
            objective(model(x), y, w, total=total).backward()
        optimizer.step()
    states = get_state_dict(model, optimizer)
    save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder / "checkpoint")
    # What one process would have done, and its next step.
    alone = begin()
    theirs = torch.optim.AdamW(alone.parameters(), lr=0.01)
    for trial in range(8):
        theirs.zero_grad()
        parts = [part for row in batches(trial) for part in row]
        plain_loss(alone, tuple(torch.cat([part[i] for part in parts]) for i in range(3))).backward()
        theirs.step()
    if hvd.rank() == 0:
        torch.save((alone.state_dict(), theirs.state_dict()), folder / "alone.pt")
    return {}


def accelerated() -> dict[str, Any]:
    """Let Accelerate wrap the model (in DDP, on a CPU), and divide the loss by its steps of accumulation."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = begin()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    objective = hvd.Objective("cross_entropy", ahead=True)
    found = compare(
        begin(),
        model,
        objective,
        backward=lambda loss: accelerator.backward(loss * accelerator.gradient_accumulation_steps),
        clip=accelerator.clip_grad_norm_,
    )
    optimizer.zero_grad()
    x, y, w = batches(0)[0][hvd.rank()]
    try:
        accelerator.backward(objective(model(x), y, w, total=objective.total(w.sum())))
    except HvdlossError as error:
        return {**found, "refused": f"{type(error).__name__}: {error}"}
    return found


JOBS = {job.__name__: job for job in (accelerated, added, average, checkpoint, functions, mixed, refused)}


def main() -> None:
    """Do what the command line says."""
    dist.init_process_group("gloo")
    hvd.init()
    found = JOBS[sys.argv[2]](*([Path(sys.argv[1])] if sys.argv[2] == "checkpoint" else []))
    Path(sys.argv[1], f"{sys.argv[2]}-{hvd.rank()}.json").write_text(json.dumps(found))
    hvd.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
