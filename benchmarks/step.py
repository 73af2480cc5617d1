"""Step time of the exact optimizer beside its peers, in PyTorch, in one run, interleaved.

    horovodrun -np 2 python -m hvdloss.benchmarks.step --json out.json

Peers: "compute" (no reduction at all), "horovod" (horovod.torch.DistributedOptimizer), "ddp" (torch
DistributedDataParallel over Gloo), "plain" (hvdloss without an objective), "hvdloss" (exact). One thread
per rank, SGD, float32. ``hvdloss bench step`` runs this for several numbers of ranks and shows it. With
``--device cuda`` gradients travel over NCCL, those of "ddp" too.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import horovod.torch as horovod
import torch
import torch.nn.functional as F
from horovod.torch import mpi_ops
from torch import nn

import hvdloss.torch as hvd
from hvdloss.benchmarks.common import (
    WARM_UP,
    device_of,
    environment,
    join_torch_distributed,
    measured,
    peak_above,
    resident,
    write_json,
)
from hvdloss.benchmarks.workloads import WORKLOADS

PEERS = ("compute", "horovod", "ddp", "plain", "hvdloss")


def build(
    peer: str, workload: str, device: torch.device | str = "cpu", times: int = 1
) -> tuple[nn.Module, Any, Callable[..., torch.Tensor], Any, Any]:
    """Return this peer's model, optimizer and loss, and the workload's input and target, `times` over."""
    torch.manual_seed(0)
    model, x, y = WORKLOADS[workload]()
    model = model.to(device)
    x, y = (t.repeat(times, *[1] * (t.dim() - 1)).to(device) for t in (x, y))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss_of: Callable[..., torch.Tensor] = F.mse_loss
    if peer == "horovod":
        optimizer = horovod.DistributedOptimizer(optimizer, model.named_parameters())
    elif peer == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif peer == "plain":
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    elif peer == "hvdloss":
        loss_of = hvd.Objective("mse")
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), loss_of)
    return model, optimizer, loss_of, x, y


def make_step(
    peer: str, workload: str, device: torch.device, times: int = 1
) -> tuple[Callable[[], None], nn.Module]:
    """Return a function that makes one training step of this peer, and its model."""
    model, optimizer, loss_of, x, y = build(peer, workload, device, times)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()

    return step, model


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Count the messages handed to Horovod, and their bytes, inside the block."""
    seen = {"messages": 0, "bytes": 0}
    names = ("_allreduce_async", "_grouped_allreduce_async", "_allgather_async", "_alltoall_async")
    originals = {name: getattr(mpi_ops, name) for name in names if hasattr(mpi_ops, name)}

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = tensor if isinstance(tensor, (list, tuple)) else [tensor]
            seen["messages"] += 1
            seen["bytes"] += sum(t.numel() * t.element_size() for t in tensors)
            return original(tensor, *args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(mpi_ops, name, counted(original))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(mpi_ops, name, original)


def messages(peer: str, step: Callable[[], None], model: nn.Module) -> dict[str, int]:
    """Return how many messages of how many bytes one steady step hands over."""
    if peer == "ddp":
        data = model._get_ddp_logging_data()
        sizes = [int(n) for n in str(data.get("rebuilt_bucket_sizes") or data["bucket_sizes"]).split(",")]
        return {"messages": len(sizes), "bytes": sum(sizes)}
    with counting() as seen:
        step()
    return dict(seen)


def measure(
    peers: list[str], workload: str, rounds: int, steps: int, device: torch.device, times: int = 1
) -> dict[str, Any]:
    """Return seconds per step of each peer, by round, and its messages."""
    made = {peer: make_step(peer, workload, device, times) for peer in peers}
    return measured(
        hvd,
        WORKLOADS[workload].__doc__,
        {peer: step for peer, (step, _) in made.items()},
        lambda peer: messages(peer, *made[peer]),
        rounds,
        steps,
        workload,
        torch.cuda.synchronize if device.type == "cuda" else lambda: None,
    )


def memory(peer: str, workload: str, device: torch.device) -> int:
    """Return the peak of resident bytes that training adds. Trustworthy once in a process only.

    On a GPU those that torch's allocator has handed out.
    """
    for _ in range(2):  # buffers that exist once, whatever the model
        hvd.allreduce(torch.zeros(2**20, device=device), name="warm")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()
    step, _ = make_step(peer, workload, device)
    for _ in range(WARM_UP):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return peak_above(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="per peer and round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="N times the workload's batch")
    parser.add_argument("--memory", action="store_true", help="peak memory of one peer and workload instead")
    parser.add_argument("--json", help="write all numbers to this file")
    args = parser.parse_args()
    if args.memory and (len(args.workload) > 1 or len(args.peers) > 1):
        parser.error("--memory takes one peer and one workload")
    hvd.init()
    torch.set_num_threads(1)
    device = device_of(args.device, hvd.local_rank(), hvd.local_size())
    if "ddp" in args.peers:
        join_torch_distributed(hvd, "nccl" if device.type == "cuda" else "gloo")
    out: dict[str, Any] = {"environment": {**environment(hvd), "framework": f"torch {torch.__version__}"}}
    if device.type == "cuda":
        out["environment"]["gpu"] = torch.cuda.get_device_name(device)
        out["environment"]["batch"] = args.batch
    if args.memory:
        out["memory"] = memory(args.peers[0], args.workload[0], device)
    else:
        out["workloads"] = {
            name: measure(args.peers, name, args.rounds, args.steps, device, args.batch)
            for name in args.workload
        }
    if hvd.rank() == 0:
        write_json(args.json, out)


if __name__ == "__main__":
    main()
