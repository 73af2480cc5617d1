"""Peak memory of the SigLIP loss as ranks grow at a fixed local batch: round the ring, and gathered.

    python -m hvdloss.benchmarks.siglip_memory --out runs/siglip_memory

Two ways to the same loss and gradients:

- ring: :class:`hvdloss.losses.SigLIP`; a rank holds its own rows and those of one other rank.
- gathered: the rows of all ranks are gathered, and compared with the local ones by ordinary operations.

Memory is the peak that one forward and backward pass adds to a process that holds the features, of the
rank with the most, each repeat in processes of its own. The allocator is told to give back what is freed
(MALLOC_MMAP_THRESHOLD_), for otherwise holes of up to 30 MiB come and go between repeats. Times are
interleaved in rounds, in an order that rotates. Values and gradients are compared before any is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hvdloss.benchmarks.common import (
    WARM_UP,
    environment,
    horovodrun,
    peak_above,
    resident,
    timed_rounds,
    write_json,
)

PEERS = ("ring", "gathered")
MODULE = "hvdloss.benchmarks.siglip_memory"


class Work:
    """Features of one rank, and a step of each peer."""

    def __init__(self, rows: int, columns: int) -> None:
        import torch

        import hvdloss.torch as hvd
        from hvdloss.losses import SigLIP
        from hvdloss.torch.collectives import group_of
        from hvdloss.torch.ops import TorchOps

        self.torch = torch
        self.group, self.ops, self.ring = group_of(), TorchOps(), SigLIP()
        g = torch.Generator().manual_seed(hvd.rank())
        self.x, self.y = (torch.randn(rows, columns, generator=g).requires_grad_() for _ in range(2))
        self.log_scale = torch.tensor(math.log(10.0), requires_grad=True)
        self.bias = torch.tensor(-10.0, requires_grad=True)

    @property
    def leaves(self) -> list[Any]:
        """What has a gradient."""
        return [self.x, self.y, self.log_scale, self.bias]

    def loss(self, peer: str, rows: int | None = None) -> Any:
        """Return the loss of the first rows of each rank."""
        x, y = self.x[:rows], self.y[:rows]
        if peer == "ring":
            return self.ring.value(self.ops, self.group, (x, y, self.log_scale, self.bias), None, None)
        torch = self.torch
        x, y = (torch.nn.functional.normalize(v) for v in (x, y))
        everything = self.group.all_gather(y, "gathered")
        logits = self.log_scale.exp() * (x @ everything.t()) + self.bias
        first = len(x) * self.group.rank
        sign = -torch.ones_like(logits)
        sign.diagonal(first).fill_(1.0)
        losses = torch.nn.functional.logsigmoid(sign * logits).neg()
        count = self.group.size * len(x)
        return self.group.all_reduce(losses.sum(), "summed", replicated=True) / count

    def step(self, peer: str, rows: int | None = None) -> float:
        """Make a forward and a backward pass; return the loss."""
        for leaf in self.leaves:
            leaf.grad = None
        loss = self.loss(peer, rows)
        loss.backward()
        return float(loss.detach())

    def memory(self, peer: str) -> int:
        """Return the peak of resident bytes that a step adds; trustworthy once in a process."""
        self.step(peer, 2)  # what is set up once is there
        for leaf in self.leaves:
            leaf.grad = None
        before = resident()
        self.step(peer)
        return peak_above(before)

    def compare(self) -> dict[str, float]:
        """Return how far the ring's value and gradients are from the gathered ones, relative."""
        found = {}
        for peer in PEERS:
            value = self.step(peer)
            found[peer] = value, [leaf.grad.clone() for leaf in self.leaves]
        mine, other = found["ring"], found["gathered"]
        pairs = zip(("x", "y", "log_scale", "bias"), mine[1], other[1], strict=True)
        return {
            "value": abs(mine[0] - other[0]) / abs(other[0]),
            **{name: float((a - b).norm() / b.norm()) for name, a, b in pairs},
        }


def inner(args: argparse.Namespace) -> None:
    """Measure under ranks, what `args` ask for."""
    import torch

    import hvdloss.torch as hvd

    hvd.init()
    torch.set_num_threads(1)
    numbers: dict[str, Any] = {"environment": environment(hvd)}
    work = Work(args.rows, args.columns)
    if args.memory:
        mine = torch.tensor([work.memory(args.memory)])
        numbers["peaks"] = hvd.allgather(mine, name="peaks").tolist()
    else:
        numbers["differences"] = work.compare()
        steps = {peer: (lambda peer=peer: work.step(peer)) for peer in PEERS}
        for step in steps.values():
            for _ in range(WARM_UP):
                step()
        numbers["seconds"] = timed_rounds(hvd, steps, args.rounds, 1, f"SigLIP, {hvd.size()} ranks")
    if hvd.rank() == 0:
        write_json(args.json, numbers)
    hvd.shutdown()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks for each measurement, and return all numbers."""
    given = ["--rows", str(args.rows), "--columns", str(args.columns), "--rounds", str(args.rounds)]
    found: dict[str, Any] = {}
    for ranks in args.ranks:
        one = horovodrun(MODULE, ranks, given)
        one["median_seconds"] = {peer: statistics.median(v) for peer, v in one["seconds"].items()}
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        one["peaks"] = {
            peer: [
                max(horovodrun(MODULE, ranks, [*given, "--memory", peer])["peaks"])
                for _ in range(args.repeats)
            ]
            for peer in PEERS
        }
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        one["median_peak"] = {peer: statistics.median(v) for peer, v in one["peaks"].items()}
        found[str(ranks)] = one
    return {"rows": args.rows, "columns": args.columns, "ranks": found}


def draw(path: Path, numbers: dict[str, Any]) -> None:
    """Draw peak memory over the number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    places = [int(ranks) for ranks in numbers["ranks"]]
    for peer, color in (("ring", "#003f6b"), ("gathered", "#d55e00")):
        of = [one["peaks"][peer] for one in numbers["ranks"].values()]
        for place, peaks in zip(places, of, strict=True):
            ax.scatter([place] * len(peaks), [p / 2**20 for p in peaks], color=color, alpha=0.5, s=18)
        middle = [statistics.median(peaks) / 2**20 for peaks in of]
        ax.plot(places, middle, color=color, linewidth=2)
        ax.annotate(peer, (places[-1], middle[-1]), color=color, xytext=(6, 0), textcoords="offset points")
    ax.set_xticks(places)
    ax.margins(x=0.18)
    ax.set_ylim(0)
    ax.set_xlabel("ranks")
    ax.set_ylabel("peak that a step adds to a rank (MiB)\nrepeats, and their median")
    ax.set_title(
        f"SigLIP, {numbers['rows']} rows of {numbers['columns']} columns on each rank, float32", fontsize=11
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(numbers: dict[str, Any]) -> None:
    """Print the numbers."""
    for ranks, one in numbers["ranks"].items():
        peaks = ", ".join(f"{peer} {p / 2**20:.1f} MiB" for peer, p in one["median_peak"].items())
        times = ", ".join(f"{peer} {1e3 * s:.0f} ms" for peer, s in one["median_seconds"].items())
        worst = max(one["differences"].values())
        print(f"{ranks} ranks: peak {peaks}; step {times}; differ by {worst:.1e} at most")


def main() -> None:
    """Parse options; measure, or (as a rank) do what is measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--rows", type=int, default=1024)
    add("--columns", type=int, default=128)
    add("--repeats", type=int, default=3)
    add("--rounds", type=int, default=7)
    add("--out", type=Path, default=Path("runs/siglip_memory"))
    add("--inner", action="store_true", help=argparse.SUPPRESS)
    add("--json", help=argparse.SUPPRESS)
    add("--memory", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        inner(args)
        return
    numbers = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw(args.out / "siglip-memory.png", numbers)
    show(numbers)


if __name__ == "__main__":
    main()
