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
import math
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 64  # of a step, on both ranks
SHARES = [32, 36, 40, 44, 48, 52, 56, 60, 62]  # samples of the first rank
SPLITS = {"plain": 1.0, "weighted": 5.0}  # what errors on 8s and 9s count
_STYLE = """
.card{fill:#fff;stroke:#d0d7de}.text{fill:#1f2328}.quiet{fill:#59636e}.line{stroke:#d0d7de}
.blue{fill:#0969da}.orange{fill:#bc4c00}.green{fill:#1a7f37}.on{stroke:#fff}
path.blue{fill:none;stroke:#0969da}path.orange{fill:none;stroke:#bc4c00}path.green{fill:none;stroke:#1a7f37}
@media (prefers-color-scheme:dark){
.card{fill:#161b22;stroke:#30363d}.text{fill:#e6edf3}.quiet{fill:#9198a1}.line{stroke:#30363d}
.blue{fill:#4493f8}.orange{fill:#f0883e}.green{fill:#3fb950}.on{stroke:#161b22}
path.blue{stroke:#4493f8}path.orange{stroke:#f0883e}path.green{stroke:#3fb950}}
path{stroke-width:3}
text{font:16px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
.on{paint-order:stroke;stroke-width:6px}
.head{font-weight:600;font-size:18px}.big{font-weight:600;font-size:22px}
""".strip()


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


def _text(x: float, y: float, text: str, kind: str = "text", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{text}</text>'


def _samples(x: float, y: float, number: int, colour: str) -> str:
    """Return squares for so many samples, in columns of six."""
    return "".join(
        f'<rect class="{colour}" x="{x + 17 * (i // 6):g}" y="{y + 17 * (i % 6):g}" '
        'width="13" height="13" rx="2"/>'
        for i in range(number)
    )


def draw(path: Path, found: dict[str, list[dict[str, float]]]) -> None:
    """Draw what a sample counts, and the errors by split, as an SVG for light and dark pages.

    It stands on a card of its own, so that it can be read where the page's colours are not the system's.
    """
    first = 60
    rest = SAMPLES - first
    counts = [SAMPLES / (2 * n) for n in (first, rest)]
    left = [
        _text(28, 40, "One step of 64 samples", "text head"),
        _text(28, 76, "60 on rank 0"),
        _text(28 + 17 * 12, 76, "4 on rank 1"),
        _samples(28, 88, first, "blue"),
        _samples(28 + 17 * 12, 88, rest, "orange"),
        _text(28, 222, "What one sample counts", "text head"),
        _text(28, 244, "(1 is right)", "quiet"),
        _text(28, 278, "averaged", "text"),
        _text(150, 278, f"{counts[0]:.2f}", "blue big"),
        _text(28 + 17 * 12, 278, f"{counts[1]:g}", "orange big"),
        _text(28, 312, "hvdloss", "text"),
        _text(150, 312, "1", "green big"),
        _text(28 + 17 * 12, 312, "1", "green big"),
        _text(28, 352, f"Averaging two means, each of the {rest}", "quiet"),
        _text(28, 374, f"counts {counts[1] / counts[0]:g} times as much as each of the {first}.", "quiet"),
    ]
    x0, x1, y0, y1, top = 430.0, 738.0, 318.0, 70.0, 2.5
    place = {n: x0 + (x1 - x0) * i / (len(SHARES) - 1) for i, n in enumerate(SHARES)}

    def height(error: float) -> float:
        return y0 - (y0 - y1) * error / top

    right = [_text(x0 - 42, 40, "Error of the averaged gradient", "text head")]
    for percent in (0, 50, 100, 150, 200, 250):
        y = height(percent / 100)
        right.append(f'<line class="line" x1="{x0}" x2="{x1}" y1="{y:g}" y2="{y:g}"/>')
        right.append(_text(x0 - 8, y + 5, f"{percent} %" if percent else "0", "quiet", "end"))
    for n in SHARES[::2]:
        right.append(_text(place[n], y0 + 24, f"{n}+{SAMPLES - n}", "quiet", "middle"))
    right.append(_text((x0 + x1) / 2, y0 + 50, "samples on rank 0 + rank 1", "quiet", "middle"))
    for kind, colour in (("plain", "blue"), ("weighted", "orange")):
        rows = found[kind]
        points = " L".join(
            f"{place[n]:.1f} {height(r['average']):.1f}" for n, r in zip(SHARES, rows, strict=True)
        )
        right.append(f'<path class="{colour}" d="M{points}"/>')
    right.append(f'<path class="green" d="M{x0} {y0} H{x1}"/>')
    right.append(_text(x0 + 12, 96, "all samples weigh 1", "blue on"))
    right.append(_text(x0 + 12, 120, "8s and 9s weigh 5", "orange on"))
    worst = max(r["exact"] for rows in found.values() for r in rows)
    right.append(_text(x0 + 12, 144, f"hvdloss: below {10 ** math.ceil(math.log10(worst)):.0e}", "green on"))
    title = "Averaging the means of ranks with 60 and 4 samples counts each of the 4 fifteen times as much"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 400" role="img" aria-label="{title}">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE}\n</style>\n"
        '<rect class="card" x="0.5" y="0.5" width="779" height="399" rx="8"/>\n'
        + "\n".join(left + right)
        + "\n</svg>\n"
    )


def main() -> None:
    """Print the table, and write the picture and the numbers where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, help="where to draw (SVG)")
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
