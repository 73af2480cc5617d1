"""Where a step goes: its phases by peer, processor time, the costliest operations, Horovod's timeline.

    horovodrun -np 2 python -m hvdloss.benchmarks.profile --workload mlp

Phases are medians of this rank's wall clock. "cpu" is the processor time of all of the process's threads
in a step: where ranks fill the cores, what one of them spends another one lacks. The timeline's seconds
(https://horovod.readthedocs.io/en/stable/timeline.html) are per step, of rank 0, summed over messages.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HOROVOD_TIMELINE", "DYNAMIC")

import itertools

import torch
from rich.console import Console
from rich.table import Table

import hvdloss.torch as hvd
from hvdloss.benchmarks.common import join_torch_distributed, write_json
from hvdloss.benchmarks.step import build
from hvdloss.benchmarks.workloads import WORKLOADS

PEERS = ("compute", "horovod", "ddp", "hvdloss")
PHASES = ("forward", "backward", "wait", "update", "whole", "cpu")


class Stepper:
    """One peer's training step, its phases timed apart."""

    def __init__(self, peer: str, workload: str) -> None:
        self.model, self.optimizer, self.loss_of, self.x, self.y = build(peer, workload)

    def step(self) -> list[float]:
        """Make a step; return the seconds of each phase."""
        waits = hasattr(self.optimizer, "synchronize")
        cpu = time.process_time()
        marks = [time.perf_counter()]
        self.optimizer.zero_grad()
        loss = self.loss_of(self.model(self.x), self.y)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        if waits:
            self.optimizer.synchronize()
        marks.append(time.perf_counter())
        with self.optimizer.skip_synchronize() if waits else nullcontext():
            self.optimizer.step()
        marks.append(time.perf_counter())
        phases = [b - a for a, b in itertools.pairwise(marks)]
        return [*phases, marks[-1] - marks[0], time.process_time() - cpu]


def timeline(stepper: Stepper, steps: int) -> dict[str, float]:
    """Return the milliseconds per step of each activity of Horovod's timeline."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timeline.json"
        hvd.start_timeline(str(path))
        for _ in range(steps):
            stepper.step()
        hvd.stop_timeline()
        time.sleep(0.5)  # it is written by another thread
        text = path.read_text().rstrip().rstrip(",") if path.exists() else "["
    events = json.loads(text if text.endswith("]") else text + "]")
    open_at: defaultdict[int, list[tuple[str, float]]] = defaultdict(list)
    spent: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.get("ph") == "B":
            open_at[event["pid"]].append((event["name"], event["ts"]))
        elif event.get("ph") == "E" and open_at[event["pid"]]:
            name, began = open_at[event["pid"]].pop()
            spent[name] += (event["ts"] - began) / 1e3 / steps
    return dict(spent)


def costliest(stepper: Stepper, steps: int, shown: int = 8) -> list[tuple[str, float, int]]:
    """Return the operations that took most of this rank's processor time: name, ms per step, calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            stepper.step()
    found = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)[:shown]
    return [(e.key, e.self_cpu_time_total / 1e3 / steps, e.count // steps) for e in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", help="write all numbers to this file")
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    join_torch_distributed(hvd)
    console = Console(quiet=hvd.rank() != 0, width=100)
    out: dict[str, Any] = {}
    for workload in args.workload:
        steppers = {peer: Stepper(peer, workload) for peer in PEERS}
        rows: dict[str, list[list[float]]] = {peer: [] for peer in PEERS}
        for number in range(args.steps + 5):
            for peer, stepper in steppers.items():
                hvd.barrier()
                phases = stepper.step()
                if number >= 5:
                    rows[peer].append(phases)
        table = Table(title=f"{workload}: ms per step, {hvd.size()} ranks", title_justify="left")
        for column in ("peer", *PHASES):
            table.add_column(column, justify="left" if column == "peer" else "right")
        medians = {p: [statistics.median(c) * 1e3 for c in zip(*rows[p], strict=True)] for p in PEERS}
        for peer, values in medians.items():
            table.add_row(peer, *(f"{v:.1f}" for v in values))
        console.print(table)
        spent = timeline(steppers["hvdloss"], 10)
        console.print("timeline:", {name: round(ms, 2) for name, ms in spent.items()})
        operations = costliest(steppers["hvdloss"], 5)
        console.print("operations:", [(name, round(ms, 2), n) for name, ms, n in operations])
        out[workload] = {"phases_ms": medians, "timeline_ms": spent, "operations_ms": operations}
    if hvd.rank() == 0:
        write_json(args.json, out)


if __name__ == "__main__":
    main()
