"""Local steps on skewed data: plain local SGD against settings that know of the skew.

    python -m hvdloss.benchmarks.non_iid --out runs/non_iid

scikit-learn's digits, split over four ranks by class from a Dirichlet distribution (0.1: a rank has two
or three classes), each rank with as large a share of every batch as of the data. All settings exchange
parameters equally often, with equally many bytes; the reference synchronises in every step. Several
seeds, of the split, the network and the batches.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hvdloss.benchmarks.common import environment, horovodrun, progress, write_json

BATCH = 128  # of all ranks together
LR = 0.1
HELD_OUT = 360


def settings(period: int) -> dict[str, tuple[Any, Any]]:
    """Return by name the policies on communication and on skew."""
    from hvdloss.terms.policies import ImportanceWeights, OuterStep, Proximal, SyncPeriod

    outer = OuterStep(lr=1.0, momentum=0.8)
    return {
        "every step": ((), ()),
        "plain local SGD": ((SyncPeriod(period),), ()),
        "+ proximal": ((SyncPeriod(period),), (Proximal(0.1),)),
        "+ importance": ((SyncPeriod(period),), (ImportanceWeights("global"),)),
        "+ outer step": ((SyncPeriod(period, outer=outer),), ()),
        "skew-aware": (
            (SyncPeriod(period, outer=outer),),
            (ImportanceWeights("global"), Proximal(0.03)),
        ),
    }


def train(name: str, period: int, rounds: int, seed: int) -> dict[str, Any]:
    """Train once; return the test accuracy and what the exchanges and the skew came to."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    import hvdloss
    import hvdloss.torch as hvd

    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(x))
    test, rest = order[:HELD_OUT], order[HELD_OUT:]
    parts: list[list[int]] = [[] for _ in range(hvd.size())]
    for digit in range(10):
        members = rest[y[rest] == digit]
        cuts = (np.cumsum(rng.dirichlet([0.1] * hvd.size())) * len(members)).astype(int)[:-1]
        for part, some in zip(parts, np.split(members, cuts), strict=True):
            part += some.tolist()
    mine = parts[hvd.rank()]
    batch = round(BATCH * len(mine) / len(rest))
    inputs, labels = torch.from_numpy(x / 16.0).float(), torch.from_numpy(y)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    cost_acts, skew_acts = settings(period)[name]
    terms = (
        hvdloss.CommunicationCost(policies=cost_acts),
        hvdloss.DataSkew(classes=10, window=rounds * period, policies=skew_acts),
    )
    objective = hvd.Objective("cross_entropy", terms=terms)
    opt = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=LR), model.named_parameters(), objective
    )
    draw = np.random.default_rng([seed, hvd.rank()])
    exchanges = 0
    for step in range(1, 1 + rounds * period + 1):  # the first step is done together
        indices = draw.choice(mine, batch) if batch else []
        opt.zero_grad()
        objective(model(inputs[indices]), labels[indices]).backward()
        opt.step()
        exchanges += opt.last_step is not None and opt.last_step.step == step
    opt.exchange()
    with torch.no_grad():
        accuracy = (model(inputs[test]).argmax(1) == labels[test]).float().mean().item()
    return {"accuracy": accuracy, "exchanges": exchanges, "skew": terms[1].skew.tolist()}


def inner(args: argparse.Namespace) -> None:
    import torch

    import hvdloss.torch as hvd

    hvd.init()
    torch.set_num_threads(1)
    names = list(settings(args.period))
    found: dict[str, list[Any]] = {name: [] for name in names}
    for seed in range(args.seeds):
        for name in names:
            found[name].append(train(name, args.period, args.exchanges, seed))
        progress(hvd, f"seed {seed}", seed + 1, args.seeds)
    if hvd.rank() == 0:
        write_json(args.json, {"environment": environment(hvd), "settings": found})


def outer(args: argparse.Namespace) -> None:
    arguments = ["--seeds", str(args.seeds), "--period", str(args.period), "--exchanges", str(args.exchanges)]
    numbers = horovodrun("hvdloss.benchmarks.non_iid", 4, arguments)
    found = numbers["settings"]
    reference = [run["accuracy"] for run in found["every step"]]
    lost = {
        name: [100 * (best - run["accuracy"]) for best, run in zip(reference, runs, strict=True)]
        for name, runs in found.items()
        if name != "every step"
    }
    numbers |= {"points_lost": lost, "period": args.period}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(str(args.out / "non_iid.json"), numbers)
    exchanges = found["every step"][0]["exchanges"]
    print(f"every step: test accuracy {statistics.mean(reference):.4f}, {exchanges} exchanges")
    print(f"{args.seeds} seeds, period {args.period}; points of accuracy lost: mean (least to most)")
    for name, points in lost.items():
        fewer = sum(p < q for p, q in zip(points, lost["plain local SGD"], strict=True))
        print(
            f"  {name:16} {statistics.mean(points):5.1f}  ({min(points):.1f} to {max(points):.1f})   "
            f"{found[name][0]['exchanges']} exchanges   less than plain in {fewer} of {args.seeds}"
        )
    draw(lost, args, args.out / "non_iid.png")


def draw(lost: dict[str, list[float]], args: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for number, points in enumerate(lost.values()):
        axes.plot([number] * len(points), points, "o", alpha=0.5, color="tab:blue")
        axes.plot([number - 0.2, number + 0.2], [statistics.mean(points)] * 2, color="tab:red")
    axes.set_xticks(range(len(lost)), list(lost))
    axes.set(
        ylabel="points of accuracy lost",
        title=f"Digits over 4 ranks, Dirichlet 0.1, {args.period} local steps: against every step",
    )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--period", type=int, default=32)
    parser.add_argument("--exchanges", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/non_iid"))
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", help=argparse.SUPPRESS)
    args = parser.parse_args()
    (inner if args.inner else outer)(args)


if __name__ == "__main__":
    main()
