"""Time to a loss over a 200 Mbit/s link: synchronising every step, against a chosen period and compression.

    python -m hvdloss.benchmarks.slow_link --out runs/slow_link

Two ranks in two network namespaces whose link is limited by the kernel (tc tbf). Both plans train the
same network on the same batches of scikit-learn's digits for the same number of epochs. The clock runs
while training only; the loss is that of the whole training set, after each exchange of parameters nearest
to every 10 steps. Exit status 3 where namespaces cannot be made.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hvdloss.benchmarks.common import environment, write_json

BATCH = 128
HELD_OUT = 360
LR = 0.1


def train(plan: str, epochs: int, seed: int) -> dict[str, Any]:
    """Train once; return the losses of the training set by seconds of training, and the test accuracy."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    import hvdloss
    import hvdloss.torch as hvd
    from hvdloss.terms.policies import AdaptiveCompression, SyncPeriod

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    inputs, labels = torch.from_numpy(x / 16.0).float()[order], torch.from_numpy(y)[order]
    test, train_x, train_y = slice(0, HELD_OUT), inputs[HELD_OUT:], labels[HELD_OUT:]
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 1024),
        torch.nn.ReLU(),
        torch.nn.Linear(1024, 1024),
        torch.nn.ReLU(),
        torch.nn.Linear(1024, 10),
    )
    policies = ()
    if plan == "chosen":
        policies = (
            SyncPeriod("predicted", initial_period=4, max_period=64, interval=1.0, target_loss=0.05),
            AdaptiveCompression(),
        )
    objective = hvd.Objective("cross_entropy", terms=(hvdloss.CommunicationCost(policies=policies),))
    opt = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=LR), model.named_parameters(), objective
    )

    def training_loss() -> float:
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(train_x), train_y).item()

    seconds, curve, periods = 0.0, [(0, 0.0, training_loss())], []
    steps, looked = 0, 0
    batches = np.random.default_rng(seed + 1)
    hvd.barrier()
    for _ in range(epochs):
        epoch = batches.permutation(len(train_x))
        for start in range(0, len(epoch) - BATCH + 1, BATCH):
            mine = epoch[start : start + BATCH][hvd.rank() :: hvd.size()]
            began = perf_counter()
            opt.zero_grad()
            objective(model(train_x[mine]), train_y[mine]).backward()
            opt.step()
            seconds += perf_counter() - began
            steps += 1
            if opt.last_step.step == steps and steps - looked >= 10:  # ranks are equal here
                looked = steps
                curve.append((steps, seconds, training_loss()))
                periods.append((steps, 1 if not policies else policies[0].period))
                hvd.barrier()
    began = perf_counter()
    opt.exchange()
    seconds += perf_counter() - began
    curve.append((steps, seconds, training_loss()))
    with torch.no_grad():
        accuracy = (model(inputs[test]).argmax(1) == labels[test]).float().mean().item()
    return {
        "curve": curve,
        "periods": periods,
        "accuracy": accuracy,
        "seconds": seconds,
        "decisions": [vars(d) for d in objective.controller.decisions],
    }


def inner(args: argparse.Namespace) -> None:
    import torch

    import hvdloss.torch as hvd

    hvd.init()
    torch.set_num_threads(1)
    found: dict[str, list[Any]] = {"every step": [], "chosen": []}
    for seed in range(args.rounds):
        for plan in found:
            found[plan].append(train(plan, args.epochs, seed))
            if hvd.rank() == 0:
                one = found[plan][-1]
                print(f"{plan}: {one['seconds']:.1f} s, test accuracy {one['accuracy']:.4f}", flush=True)
    if hvd.rank() == 0:
        write_json(args.json, {"environment": environment(hvd), "plans": found})


def time_to(curve: list[tuple[int, float, float]], loss: float) -> float:
    """Return the seconds at which the curve first reaches a loss, between two looks; infinity if never."""
    for (_, t0, l0), (_, t1, l1) in itertools.pairwise(curve):
        if l1 <= loss:
            return t0 + (t1 - t0) * (l0 - loss) / (l0 - l1) if l0 > loss else t0
    return float("inf")


def outer(args: argparse.Namespace) -> None:
    from hvdloss.benchmarks.hosts import Hosts, available

    if reason := available():
        print(f"slow_link: CANNOT RUN HERE: {reason}", file=sys.stderr)
        raise SystemExit(3)
    with tempfile.TemporaryDirectory(prefix="hvdloss-") as folder:
        path = Path(folder) / "numbers.json"
        command = [sys.executable, "-m", "hvdloss.benchmarks.slow_link", "--inner", "--json", str(path)]
        command += ["--rounds", str(args.rounds), "--epochs", str(args.epochs)]
        with Hosts(2, rate_mbit=args.rate) as hosts:
            hosts.run(command, timeout=1800)
        numbers = json.loads(path.read_text())
    plans = numbers["plans"]
    times = {plan: [time_to(run["curve"], args.loss) for run in runs] for plan, runs in plans.items()}
    ratios = [c / e for c, e in zip(times["chosen"], times["every step"], strict=True)]
    numbers |= {
        "rate_mbit": args.rate,
        "loss": args.loss,
        "seconds_to_loss": times,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(str(args.out / "slow_link.json"), numbers)
    for plan, runs in plans.items():
        accuracies = [run["accuracy"] for run in runs]
        print(
            f"{plan:10} {statistics.median(times[plan]):6.1f} s to a loss of {args.loss}   "
            f"test accuracy {statistics.mean(accuracies):.4f} (of {len(runs)})"
        )
    for decision in plans["chosen"][-1]["decisions"]:
        print(
            f"  step {decision['step']}: {decision['what']} {decision['before']} -> {decision['after']}: "
            f"{decision['reason']}"
        )
    print(f"chosen / every step: {numbers['ratio']:.3f} (rounds: {', '.join(f'{r:.3f}' for r in ratios)})")
    draw(numbers, args.out / "slow_link.png")


def draw(numbers: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for plan, color in (("every step", "tab:gray"), ("chosen", "tab:blue")):
        for number, run in enumerate(numbers["plans"][plan]):
            steps, seconds, losses = zip(*run["curve"], strict=True)
            label = {"label": plan} if not number else {}
            left.plot(seconds, losses, color=color, **label)
            right.plot(steps, losses, color=color, **label)
    left.set(xlabel="seconds of training", title=f"{numbers['rate_mbit']:g} Mbit/s link")
    right.set(xlabel="steps", title="the same by steps")
    for axes in (left, right):
        axes.axhline(numbers["loss"], color="tab:red", linewidth=0.8, linestyle=":")
        axes.set(ylabel="loss of the training set", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="seeds")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=200.0, help="Mbit/s")
    parser.add_argument("--loss", type=float, default=0.25, help="of the training set")
    parser.add_argument("--out", type=Path, default=Path("runs/slow_link"))
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", help=argparse.SUPPRESS)
    args = parser.parse_args()
    (inner if args.inner else outer)(args)


if __name__ == "__main__":
    main()
