"""Softmax cross-entropy over 100,000 classes on 4 ranks: sharded, gathered, and whole on every rank.

    python -m hvdloss.benchmarks.sharded_softmax --out runs/sharded_softmax

Three ways to the same losses and gradients, behind the same features:

- sharded: `ShardedLinear` and `sharded_cross_entropy`; ranks exchange three numbers per element.
- gathered: the same head, whose logits are all-gathered for an ordinary cross-entropy on every rank. Its
  backward pass takes this rank's slice and needs no message.
- whole: an ordinary head and loss on every rank, for memory.

Memory is the peak that one step adds to a process that holds features and weights, each way in processes of
its own; once of loss and gradient alone, the logits given. Times are of forward and backward passes,
interleaved in rounds in an order that rotates. Losses and gradients are compared before any is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
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

PEERS = ("sharded", "gathered", "whole")
TIMED = ("sharded", "gathered")
MODULE = "hvdloss.benchmarks.sharded_softmax"


class Work:
    """Features, heads and targets of one rank, and a step of each peer."""

    def __init__(self, args: argparse.Namespace, peers: tuple[str, ...]) -> None:
        import torch

        import hvdloss.torch as hvd

        self.args, self.hvd, self.torch = args, hvd, torch
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(args.batch, args.features, generator=g, requires_grad=True)
        self.y = torch.randint(args.classes, (args.batch,), generator=g)
        torch.manual_seed(2)
        if set(peers) - {"whole"}:
            self.head = hvd.ShardedLinear(args.features, args.classes)
            self.shards = self.head.shards
        if "whole" in peers:
            torch.manual_seed(2)
            self.ordinary = torch.nn.Linear(args.features, args.classes)

    def logits(self, peer: str) -> Any:
        """Return this rank's logits; all of them for "whole", and (classes, batch) for "gathered"."""
        if peer == "whole":
            return self.ordinary(self.x)
        if peer == "sharded":
            return self.head(self.x)
        # Classes first, as they are gathered, so that nothing need be transposed.
        from hvdloss.torch.collectives import copy_to_ranks

        x = copy_to_ranks(self.x, name="features")
        return self.torch.addmm(self.head.bias[:, None], self.head.weight, x.T)

    def loss(self, peer: str, logits: Any, batch: int | None = None) -> Any:
        """Return the mean loss of the first samples."""
        from hvdloss.torch.collectives import all_gather

        y = self.y[:batch]
        if peer == "sharded":
            return self.hvd.sharded_cross_entropy(logits, y, self.shards).mean()
        if peer == "gathered":
            sizes = list(self.shards.sizes)
            logits = all_gather(logits, name="logits", replicated=True, sizes=sizes)[None]
            y = y[None]
        return self.torch.nn.functional.cross_entropy(logits, y)

    def step(self, peer: str) -> Any:
        """Make a forward and a backward pass; return the loss."""
        self.x.grad = None
        head = self.ordinary if peer == "whole" else self.head
        head.zero_grad()
        loss = self.loss(peer, self.logits(peer))
        loss.backward()
        return loss

    def memory(self, peer: str, what: str) -> int:
        """Return the peak of resident bytes that a step adds; trustworthy once in a process."""
        given = self.logits(peer).detach()
        small = (given[:, :2] if peer == "gathered" else given[:2]).clone().requires_grad_()
        self.loss(peer, small, 2).backward()  # what is set up once is there
        if what == "loss":
            given.requires_grad_()
            before = resident()
            self.loss(peer, given).backward()
        else:
            del given
            before = resident()
            self.step(peer)
        return peak_above(before)

    def compare(self) -> dict[str, float]:
        """Return how far the peers' losses and gradients are from those of "gathered", relative."""
        found = {}
        for peer in TIMED:
            loss = self.step(peer).item()
            found[peer] = loss, self.x.grad.clone(), self.head.weight.grad.clone()
        mine, other = found["sharded"], found["gathered"]
        return {
            "loss": abs(mine[0] - other[0]) / abs(other[0]),
            "input": float((mine[1] - other[1]).norm() / other[1].norm()),
            "weight": float((mine[2] - other[2]).norm() / other[2].norm()),
        }


def inner(args: argparse.Namespace) -> None:
    """Measure under ranks, what `args` ask for."""
    import torch

    import hvdloss.torch as hvd

    hvd.init()
    torch.set_num_threads(1)
    numbers: dict[str, Any] = {"environment": environment(hvd)}
    if args.memory:
        work = Work(args, (args.memory,))
        peaks = hvd.allgather(torch.tensor([work.memory(args.memory, args.what)]), name="peaks")
        numbers["peaks"] = peaks.tolist()
    else:
        work = Work(args, TIMED)
        numbers["differences"] = work.compare()
        steps: dict[str, Callable[[], Any]] = {peer: (lambda peer=peer: work.step(peer)) for peer in TIMED}
        for step in steps.values():
            for _ in range(WARM_UP):
                step()
        numbers["seconds"] = timed_rounds(hvd, steps, args.rounds, args.per_round, "sharded softmax")
    if hvd.rank() == 0:
        write_json(args.json, numbers)
    hvd.shutdown()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks for each measurement, and return all numbers."""
    sizes = ["--classes", args.classes, "--batch", args.batch, "--features", args.features]
    given = [*map(str, sizes), "--rounds", str(args.rounds), "--per-round", str(args.per_round)]
    numbers = horovodrun(MODULE, args.ranks, given)
    peaks: dict[str, dict[str, list[int]]] = {}
    for what in ("loss", "step"):
        for peer in PEERS:
            one = horovodrun(MODULE, args.ranks, [*given, "--memory", peer, "--what", what])
            peaks.setdefault(what, {})[peer] = one["peaks"]
    seconds = numbers["seconds"]
    ratios = [a / b for a, b in zip(seconds["sharded"], seconds["gathered"], strict=True)]
    whole = {what: max(of["whole"]) for what, of in peaks.items()}
    return {
        "sizes": {"classes": args.classes, "batch": args.batch, "features": args.features},
        **numbers,
        "peaks": peaks,
        "median_seconds": {peer: statistics.median(values) for peer, values in seconds.items()},
        "time_ratio": statistics.median(ratios),
        "time_ratio_range": [min(ratios), max(ratios)],
        "memory_ratio": {
            what: {peer: max(of[peer]) / whole[what] for peer in PEERS} for what, of in peaks.items()
        },
    }


def draw(path: Path, numbers: dict[str, Any]) -> None:
    """Draw peak memory and time of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = numbers["sizes"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    figure.suptitle(
        f"{sizes['classes']:,} classes on {numbers['environment']['ranks']} ranks, batch {sizes['batch']}, "
        f"{sizes['features']} features, float32",
        fontsize=11,
    )
    colors = {"sharded": "#003f6b", "gathered": "#d55e00", "whole": "#8ccbf0"}
    places = range(len(PEERS))
    for number, (what, label) in enumerate((("loss", "loss and gradient"), ("step", "with head"))):
        values = [max(numbers["peaks"][what][peer]) / 2**20 for peer in PEERS]
        bars = left.bar(
            [p + 0.4 * number - 0.2 for p in places],
            values,
            0.38,
            color=[colors[peer] for peer in PEERS],
            alpha=1 - 0.4 * number,
            label=label,
        )
        left.bar_label(bars, fmt="%.0f", fontsize=8)
    left.set_xticks(list(places), PEERS)
    left.set_ylabel("peak memory of a rank (MiB)\ndark: loss and gradient; light: with head")
    times = [[1e3 * s for s in numbers["seconds"][peer]] for peer in TIMED]
    for number, (peer, values) in enumerate(zip(TIMED, times, strict=True)):
        right.scatter([number] * len(values), values, color=colors[peer], alpha=0.5, s=18)
        right.hlines(
            statistics.median(values), number - 0.25, number + 0.25, color=colors[peer], linewidth=2.5
        )
    right.set_xticks(range(len(TIMED)), TIMED)
    right.set_xlim(-0.6, 1.6)
    right.set_ylim(0)
    right.set_ylabel("forward and backward pass (ms)\nrounds, and their median")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(numbers: dict[str, Any]) -> None:
    """Print the numbers."""
    for what, of in numbers["peaks"].items():
        line = ", ".join(
            f"{peer} {max(peaks) / 2**20:.0f} MiB ({numbers['memory_ratio'][what][peer]:.2f})"
            for peer, peaks in of.items()
        )
        print(f"peak memory of a rank, {what}: {line}")
    times = ", ".join(f"{peer} {1e3 * s:.1f} ms" for peer, s in numbers["median_seconds"].items())
    low, high = numbers["time_ratio_range"]
    print(f"step: {times}; sharded over gathered {numbers['time_ratio']:.2f} ({low:.2f} to {high:.2f})")
    print("differences: " + ", ".join(f"{k} {v:.1e}" for k, v in numbers["differences"].items()))


def main() -> None:
    """Parse options; measure, or (as a rank) do what is measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--ranks", type=int, default=4)
    add("--classes", type=int, default=100_000)
    add("--batch", type=int, default=64)
    add("--features", type=int, default=64)
    add("--rounds", type=int, default=15)
    add("--per-round", type=int, default=3)
    add("--out", type=Path, default=Path("runs/sharded_softmax"))
    add("--inner", action="store_true", help=argparse.SUPPRESS)
    add("--json", help=argparse.SUPPRESS)
    add("--memory", choices=PEERS, help=argparse.SUPPRESS)
    add("--what", choices=("loss", "step"), default="loss", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        inner(args)
        return
    numbers = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw(args.out / "sharded-softmax.png", numbers)
    show(numbers)


if __name__ == "__main__":
    main()
