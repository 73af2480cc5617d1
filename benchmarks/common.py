"""What the benchmarks share: ranks, peers in rotation, memory, messages, progress and files."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

__all__ = [
    "WARM_UP",
    "device_of",
    "environment",
    "horovodrun",
    "join_torch_distributed",
    "measured",
    "meet",
    "peak_above",
    "progress",
    "resident",
    "rotated",
    "timed_rounds",
    "write_json",
]


WARM_UP = 5  # steps before any is timed


def rotated(names: list[str], number: int) -> list[str]:
    """Return the names in an order that no peer is always first in."""
    number %= len(names)
    return names[number:] + names[:number]


def timed_rounds(
    hvd: Any,
    steps: dict[str, Callable[[], None]],
    rounds: int,
    per_round: int,
    label: str,
    settle: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Return each peer's seconds per step, one mean per round, by this rank's clock.

    Every round times every peer, in an order that rotates, between two barriers, before which `settle` waits
    for what the rank's device has still to do.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in rotated(list(steps), number):
            settle()
            meet(hvd)
            began = perf_counter()
            for _ in range(per_round):
                steps[name]()
            settle()
            meet(hvd)
            times[name].append((perf_counter() - began) / per_round)
        progress(hvd, label, number + 1, rounds)
    return times


def measured(
    hvd: Any,
    title: str | None,
    steps: dict[str, Callable[[], Any]],
    messages: Callable[[str], dict[str, int]],
    rounds: int,
    per_round: int,
    label: str,
    settle: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return a workload's numbers: seconds per step of each peer by round, and its messages."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    seconds = timed_rounds(hvd, steps, rounds, per_round, label, settle)
    return {"title": title, "seconds": seconds, "messages": {peer: messages(peer) for peer in steps}}


def horovodrun(module: str, ranks: int, arguments: list[str]) -> dict[str, Any]:
    """Run a module's inner part as ranks on this machine, over Gloo; return the numbers of its ``--json``.

    Ends the program with exit status 7 if a rank failed.
    """
    with tempfile.TemporaryDirectory(prefix="hvdloss-") as folder:
        path = Path(folder) / "numbers.json"
        launcher = str(Path(sys.executable).with_name("horovodrun"))
        command = [launcher, "--gloo", "-np", str(ranks), sys.executable, "-m", module]
        done = subprocess.run([*command, "--inner", "--json", str(path), *arguments], check=False)
        if done.returncode or not path.exists():
            print(f"{module}: ranks failed (exit status {done.returncode})", file=sys.stderr)
            raise SystemExit(7)
        return json.loads(path.read_text())


def meet(hvd: Any) -> None:
    """Wait for all ranks. Horovod's TensorFlow module has no barrier."""
    if hasattr(hvd, "barrier"):
        hvd.barrier()
    else:
        hvd.allgather([0], name="hvdloss.bench.meet")


def progress(hvd: Any, label: str, done: int, of: int) -> None:
    """Tell how far the run is, once per job; ``hvdloss bench`` shows it as a bar."""
    if hvd.rank() == 0:
        print(f"hvdloss-bench {done}/{of} {label}", flush=True)


def device_of(kind: str, local_rank: int, local_size: int) -> Any:
    """Return this rank's torch device. To be called before Horovod has used NCCL.

    Ranks that share a GPU tell NCCL that they are on hosts of their own, or it would refuse them; they talk
    through sockets then.
    """
    import torch

    if kind != "cuda":
        return torch.device(kind)
    gpus = torch.cuda.device_count()
    if local_size > gpus:
        os.environ["NCCL_HOSTID"] = f"hvdloss-{local_rank}"
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    return device


def join_torch_distributed(hvd: Any, backend: str = "gloo") -> None:
    """Start torch.distributed among Horovod's ranks, which are all on this machine."""
    import torch
    import torch.distributed as dist

    port = 0
    if hvd.rank() == 0:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
    port = int(hvd.broadcast(torch.tensor([port]), root_rank=0).item())
    dist.init_process_group(
        backend, init_method=f"tcp://127.0.0.1:{port}", rank=hvd.rank(), world_size=hvd.size()
    )


def resident() -> int:
    """Return this process's resident memory in bytes, and start a new peak (Linux, proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_above(before: int) -> int:
    """Return by how many bytes the peak since :func:`resident` lies above what it returned."""
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def environment(hvd: Any) -> dict[str, Any]:
    """Return what a reader must know of the run to make sense of its numbers."""
    return {
        "ranks": hvd.size(),
        "controller": "mpi" if hvd.mpi_enabled() else "gloo",
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "cycle_time_ms": os.environ.get("HOROVOD_CYCLE_TIME"),
    }


def write_json(path: str | None, numbers: dict[str, Any]) -> None:
    """Write the numbers, if a path was asked for."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(numbers, indent=1) + "\n")
