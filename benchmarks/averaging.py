"""How wrong the average of ranks' own means is, on real data: the picture of docs/explanation/averaging.md.

Handwritten digits, two ranks, softmax regression in the middle of its training, one step of 64 samples. The
gradient of the average of the two ranks' weighted means is held against that of the weighted mean over both
ranks' samples, for every share of samples that the first rank may have. NumPy only; ranks are slices, since
what they would tell each other is a sum.

    python -m hvdloss.benchmarks.averaging --picture docs/images/averaging.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 64  # of a step, on both ranks
SHARES = [32, 36, 40, 44, 48, 52, 56, 60, 62]  # samples of the first rank
SPLITS = {"plain": 1.0, "weighted": 5.0}  # what errors on 8s and 9s count


def mean_gradient(x: Any, y: Any, weight: Any, parameters: Any) -> Any:
    """Return the gradient of the weighted mean cross-entropy of some samples.

    Args:
        x: inputs, (N, D); y: classes, (N,); weight: (N,); parameters: (D, C).
    """
    z = x @ parameters
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1.0
    return x.T @ (weight[:, None] * p) / weight.sum()


def errors(first: int, factor: float, *, batches: int = 200, seed: int = 0) -> dict[str, float]:
    """Return the relative errors of the gradient if the first rank has `first` of the samples.

    Args:
        first: samples of the first rank, of SAMPLES.
        factor: the weight of classes 8 and 9; other classes have 1.
        batches: how many steps are looked at.
        seed: of the batches.

    Returns:
        The median, 10 % and 90 % quantiles for the average of means (``average``, ``low``, ``high``), and the
        largest for means weighted by the ranks' weights (``exact``).
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, weight = x / 16, np.where(y >= 8, factor, 1.0)
    parameters = np.zeros((64, 10))
    for _ in range(50):
        parameters -= 0.5 * mean_gradient(x, y, np.ones(len(y)), parameters)
    random = np.random.default_rng(seed)
    average, exact = [], []
    for _ in range(batches):
        rows = random.permutation(len(y))[:SAMPLES]
        ranks = rows[:first], rows[first:]
        right = mean_gradient(x[rows], y[rows], weight[rows], parameters)
        own = [mean_gradient(x[r], y[r], weight[r], parameters) for r in ranks]
        total = [weight[r].sum() for r in ranks]
        scale = np.linalg.norm(right)
        average.append(np.linalg.norm((own[0] + own[1]) / 2 - right) / scale)
        weighted = (total[0] * own[0] + total[1] * own[1]) / sum(total)
        exact.append(np.linalg.norm(weighted - right) / scale)
    low, middle, high = np.quantile(average, [0.1, 0.5, 0.9])
    return {"average": middle, "low": low, "high": high, "exact": max(exact)}


def draw(path: Path, found: dict[str, list[dict[str, float]]]) -> None:
    """Draw the errors by share; grey on nothing, so that it can be read on light and dark pages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    grey, colours = "#808080", {"plain": "#3f83d6", "weighted": "#e0592a"}
    names = {"plain": "all samples count alike", "weighted": "errors on 8s and 9s count five times"}
    style = {"svg.hashsalt": "hvdloss", "font.size": 13, "text.color": grey, "axes.edgecolor": grey,
             "axes.labelcolor": grey, "xtick.color": grey, "ytick.color": grey}  # fmt: skip
    with plt.rc_context(style):
        figure, (counts, curve) = plt.subplots(
            1, 2, figsize=(11, 4.4), width_ratios=[1, 1.6], layout="constrained"
        )
        shares = [60, 4]
        bars = [1 / (2 * n) * SAMPLES for n in shares]
        counts.bar(
            ["each of 60\non rank 0", "each of 4\non rank 1"], bars, color=colours["weighted"], width=0.6
        )
        counts.axhline(1.0, color=grey, linestyle="--")
        counts.text(0.5, 1.15, "right: 1", ha="center", color=grey)
        for place, value in enumerate(bars):
            counts.text(place, max(value, 1.0) + 0.12, f"{value:.2g}", ha="center", color=grey)
        counts.set_ylim(0, max(bars) * 1.15)
        counts.set_title("What a sample counts in the average")
        x = np.array(SHARES) / SAMPLES
        for kind, rows in found.items():
            curve.plot(x, [r["average"] for r in rows], "o-", color=colours[kind], label=names[kind])
            curve.fill_between(
                x, [r["low"] for r in rows], [r["high"] for r in rows], color=colours[kind], alpha=0.2, lw=0
            )
        worst = max(r["exact"] for rows in found.values() for r in rows)
        curve.axhline(
            0.0, color="#2f9e5f", lw=2.5, label=f"weighted by the ranks' weights (at most {worst:.0e})"
        )
        curve.set_xlabel(f"share of the {SAMPLES} samples on rank 0")
        curve.set_title("Relative error of the gradient")
        curve.set_ylim(-0.03, None)
        curve.legend(frameon=False, loc="upper left", fontsize=11)
        for axes in (counts, curve):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def main() -> None:
    """Print the table, and write the picture and the numbers where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, help="where to draw (svg or png)")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--batches", type=int, default=200, help="steps looked at (%(default)s)")
    args = parser.parse_args()
    found = {
        kind: [errors(first, factor, batches=args.batches) for first in SHARES]
        for kind, factor in SPLITS.items()
    }
    for kind, rows in found.items():
        for first, row in zip(SHARES, rows, strict=True):
            print(
                f"{kind:9} {first:2}/{SAMPLES - first:2}  average of means {row['average']:.1e} "
                f"({row['low']:.1e} to {row['high']:.1e})   exact {row['exact']:.1e}"
            )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.picture:
        draw(args.picture, found)


if __name__ == "__main__":
    main()
