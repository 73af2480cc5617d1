"""Batch shares against equal shares, one of two ranks slowed to half its speed.

    python -m hvdloss.benchmarks.shares --out runs/shares

Two ranks, each pinned to a core of its own; rank 1 is throttled: stopped for two of every four
milliseconds (SIGSTOP and SIGCONT). Both plans train the same network on the same global batches of
scikit-learn's digits (many times, with a little noise, in float64), in turn. Ideal: equal shares take 2
units of time per step, shares of 2/3 and 1/3 take 4/3, which is 1.5 times the samples per second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hvdloss.benchmarks.common import environment, horovodrun, progress, write_json

PLANS = {"equal": 0.999, "balanced": 0.05}  # the least gain for which shares change
BATCH = 4096
SETTLED = 20  # steps of a training before speed counts
THROTTLE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
rank = os.getppid()
try:
    while os.getppid() == rank:
        os.kill(rank, signal.SIGSTOP)
        time.sleep(0.002)
        os.kill(rank, signal.SIGCONT)
        time.sleep(0.002)
finally:
    os.kill(rank, signal.SIGCONT)
"""


def train(plan: str, steps: int) -> dict[str, Any]:
    """Train once; return the loss and the seconds of each step, and the shares at the end."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    import hvdloss
    import hvdloss.torch as hvd
    from hvdloss.terms.policies import BatchShares, SharedBatches

    x, y = load_digits(return_X_y=True)
    g = torch.Generator().manual_seed(1)
    pick = torch.randint(0, len(x), (BATCH * steps,), generator=g)
    inputs = torch.from_numpy(x / 16.0)[pick]
    inputs = inputs + 0.05 * torch.randn(inputs.shape, generator=g, dtype=torch.float64)
    labels = torch.from_numpy(y)[pick]
    torch.manual_seed(2)
    layers = [(64, 512), (512, 512), (512, 10)]
    model = torch.nn.Sequential(*(m for n in layers for m in (torch.nn.Linear(*n), torch.nn.ReLU())))[
        :-1
    ].double()
    shares = BatchShares(BATCH, every=5, gain=PLANS[plan])
    objective = hvd.Objective("cross_entropy", terms=(hvdloss.CommunicationCost(policies=(shares,)),))
    opt = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), objective
    )
    losses, seconds, sizes = [], [], []
    hvd.barrier()
    began = perf_counter()
    for indices in SharedBatches(len(inputs), shares, seed=3):
        sizes.append(shares.sizes.tolist())
        opt.zero_grad()
        objective(model(inputs[indices]), labels[indices]).backward()
        opt.step()
        losses.append(opt.last_step.loss)
        seconds.append(perf_counter() - began)
        began = perf_counter()
    return {
        "losses": losses,
        "seconds": seconds,
        "sizes": sizes,
        "samples_per_second": BATCH / float(np.median(seconds[SETTLED:])),
        "decisions": [vars(d) for d in objective.controller.decisions],
    }


def inner(args: argparse.Namespace) -> None:
    import torch

    import hvdloss.torch as hvd

    hvd.init()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    core = cores[hvd.local_rank() % len(cores)]
    os.sched_setaffinity(0, {core})
    throttle = None
    if hvd.rank() == 1:
        throttle = subprocess.Popen([sys.executable, "-c", THROTTLE])
    try:
        found: dict[str, list[Any]] = {plan: [] for plan in PLANS}
        for number in range(args.rounds):
            for plan in PLANS:
                found[plan].append(train(plan, args.steps))
                done = number * len(PLANS) + list(PLANS).index(plan) + 1
                progress(hvd, plan, done, args.rounds * len(PLANS))
    finally:
        if throttle is not None:
            throttle.terminate()
            throttle.wait()
    if hvd.rank() == 0:
        write_json(args.json, {"environment": environment(hvd), "plans": found})


def outer(args: argparse.Namespace) -> None:
    arguments = ["--rounds", str(args.rounds), "--steps", str(args.steps)]
    numbers = horovodrun("hvdloss.benchmarks.shares", 2, arguments)
    plans = numbers["plans"]
    speeds = {plan: [run["samples_per_second"] for run in runs] for plan, runs in plans.items()}
    ratios = [b / e for b, e in zip(speeds["balanced"], speeds["equal"], strict=True)]
    apart = max(
        abs(a - b) / abs(b)
        for one, other in zip(plans["balanced"], plans["equal"], strict=True)
        for a, b in zip(one["losses"], other["losses"], strict=True)
    )
    numbers["ratio"] = statistics.median(ratios)
    numbers["ratios"] = ratios
    numbers["losses_apart"] = apart
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(str(args.out / "shares.json"), numbers)
    for plan, found in speeds.items():
        last = plans[plan][-1]["sizes"][-1]
        print(f"{plan:9} {statistics.median(found):8.0f} samples/s   shares at the end {last}")
    print(f"balanced / equal: {numbers['ratio']:.2f} (rounds: {', '.join(f'{r:.2f}' for r in ratios)})")
    print(f"loss curves differ by at most {apart:.1e}, relative")
    draw(plans, numbers["ratio"], args.out / "shares.png")


def draw(plans: dict[str, list[dict[str, Any]]], ratio: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for plan, color, style in (("equal", "tab:gray", "-"), ("balanced", "tab:blue", "--")):
        run = plans[plan][-1]
        left.plot(run["losses"], style, color=color, label=f"{plan} shares")
        right.plot([BATCH / s for s in run["seconds"]], color=color, label=f"{plan} shares")
    left.set(xlabel="step", ylabel="loss of the global batch", yscale="log", title="the same loss curve")
    right.set(
        xlabel="step", ylabel="samples per second", title=f"{ratio:.2f} times the speed", ylim=(0, None)
    )
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/shares"))
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= SETTLED:
        parser.error(f"--steps must be above {SETTLED}")
    (inner if args.inner else outer)(args)


if __name__ == "__main__":
    main()
