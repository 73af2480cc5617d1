"""What the benchmarks share: ranks, peers in rotation, ratios with an interval, tables and files."""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
from pathlib import Path
from typing import Any

import numpy as np


def ratio_interval(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Return median(a) / median(b) with its 95 % bootstrap interval over paired rounds."""
    rng = np.random.default_rng(0)
    pairs = np.stack([a, b], axis=1)
    draws = pairs[rng.integers(0, len(pairs), (2000, len(pairs)))]
    ratios = np.median(draws[..., 0], axis=1) / np.median(draws[..., 1], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return statistics.median(a) / statistics.median(b), float(low), float(high)


def rotated(names: list[str], number: int) -> list[str]:
    """Return the names in an order that no peer is always first in."""
    number %= len(names)
    return names[number:] + names[:number]


def join_torch_distributed(hvd: Any) -> None:
    """Start torch.distributed over Gloo among Horovod's ranks, which are all on this machine."""
    import torch
    import torch.distributed as dist

    port = 0
    if hvd.rank() == 0:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
    port = int(hvd.broadcast(torch.tensor([port]), root_rank=0).item())
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=hvd.rank(), world_size=hvd.size()
    )


def environment(hvd: Any) -> dict[str, Any]:
    """Return what a reader must know of the run to make sense of its numbers."""
    return {
        "ranks": hvd.size(),
        "controller": "mpi" if hvd.mpi_enabled() else "gloo",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def write_json(path: str | None, numbers: dict[str, Any]) -> None:
    """Write the numbers, if a path was asked for."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(numbers, indent=1) + "\n")
