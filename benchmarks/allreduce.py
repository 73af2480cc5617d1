"""All-reduce by size: Horovod beside torch.distributed and this machine's memory copy.

    horovodrun --gloo -np 2 python -m hvdloss.benchmarks.allreduce --json out.json

For each size the median time of one in-place float32 sum, interleaved over rounds, and the bandwidth
(payload bytes per second). The copy is the same payload copied once by every rank at the same time: no
all-reduce through memory can be faster. The last lines fit t = alpha + bytes / beta to each
(:class:`hvdloss.terms.link.LinkModel`). ``hvdloss bench allreduce`` runs this and shows it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

import hvdloss.torch as hvd
from hvdloss.benchmarks.common import (
    environment,
    join_torch_distributed,
    progress,
    rotated,
    write_json,
)
from hvdloss.terms.link import LinkModel


def fit(ranks: int, times: dict[int, list[float]]) -> dict[str, float]:
    """Return alpha in seconds and beta in bytes per second of the times of each size."""
    model = LinkModel(ranks, window=max(2, sum(map(len, times.values()))))
    for size, seconds in times.items():
        for one in seconds:
            model.add(one, size)
    found = model.fit()
    if found is None:
        raise SystemExit("allreduce: fitting alpha and beta takes two sizes at least; raise --largest")
    # JSON has no infinity, which beta is where the larger sizes took no longer.
    return {"alpha_s": found.alpha, "beta_bytes_per_s": min(found.beta, 1e15)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--largest", type=int, default=64, help="MiB")
    parser.add_argument("--json", help="write all numbers to this file")
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    join_torch_distributed(hvd)

    def horovod_sum(x: torch.Tensor) -> None:
        hvd.allreduce_(x, op=hvd.Sum, name=f"bench.{x.numel()}")

    def distributed_sum(x: torch.Tensor) -> None:
        dist.all_reduce(x)

    spare = torch.zeros(args.largest * 2**18)

    def copy(x: torch.Tensor) -> None:
        spare[: x.numel()].copy_(x)

    peers: dict[str, Callable[[torch.Tensor], None]] = {
        "horovod": horovod_sum,
        "torch.distributed": distributed_sum,
        "copy": copy,
    }
    sizes = [4 * 4**k for k in range(1, 20) if 4 * 4**k <= args.largest * 2**20]
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in sizes} for name in peers}
    for size in sizes:
        x = torch.zeros(size // 4)
        repeats = max(1, min(50, 2**22 // size))
        for function in peers.values():
            function(x)
        for number in range(args.rounds):
            for name in rotated(list(peers), number):
                hvd.barrier()
                began = time.perf_counter()
                for _ in range(repeats):
                    peers[name](x)
                times[name][size].append((time.perf_counter() - began) / repeats)
        progress(hvd, f"{size / 2**10:.3g} KiB", sizes.index(size) + 1, len(sizes))
    if hvd.rank() == 0:
        write_json(
            args.json,
            {
                "environment": environment(hvd),
                "sizes": sizes,
                "seconds": {name: [times[name][n] for n in sizes] for name in peers},
                "fit": {name: fit(hvd.size(), of_name) for name, of_name in times.items()},
            },
        )


if __name__ == "__main__":
    main()
