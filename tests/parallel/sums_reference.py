"""What the functions of sums should come to, written anew from their definitions for any framework.

``m`` is the framework's arithmetic: sum, exp, log, sqrt, sigmoid, softmax, one_hot, maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hvdloss.losses import (
    R2,
    CalibrationError,
    CalibrationRatio,
    Concordance,
    Correlation,
    DonskerVaradhan,
    FBeta,
    GlobalLoss,
    Jaccard,
    SoftDice,
    SumsLoss,
    Tilted,
    Tversky,
)

CLASSES = 4


def _rates(m: Any, p: Any, t: Any, w: Any, axis: Any = None) -> tuple[Any, Any, Any]:
    return m.sum(w * p * t, axis), m.sum(w * p * (1 - t), axis), m.sum(w * (1 - p) * t, axis)


def _dice(m, y, t, w):
    tp, fp, fn = _rates(m, m.sigmoid(y), t, w)
    return 1 - 2 * tp / (2 * tp + fp + fn)


def _smooth_jaccard(m, y, t, w):
    tp, fp, fn = _rates(m, m.sigmoid(y), t, w)
    return 1 - (tp + 0.5) / (tp + fp + fn + 0.5)


def _tversky(m, y, t, w):
    tp, fp, fn = _rates(m, m.sigmoid(y), t, w)
    return 1 - tp / (tp + 0.3 * fp + 0.7 * fn)


def _f2_of_probabilities(m, y, t, w):
    tp, fp, fn = _rates(m, m.sigmoid(y), t, w)
    return 1 - 5 * tp / (5 * tp + 4 * fn + fp)


def _labels_macro(m, y, t, w):
    tp, fp, fn = _rates(m, m.sigmoid(y), t, w, 0)
    return m.sum(1 - 2 * tp / (2 * tp + fp + fn)) / CLASSES


def _labels_micro(m, y, t, w):
    tp, fp, fn = _rates(m, m.sigmoid(y), t, w)
    return 1 - 2 * tp / (2 * tp + fp + fn)


def _classes_macro(m, y, t, w):
    tp, fp, fn = _rates(m, m.softmax(y), m.one_hot(t, CLASSES), w, 0)
    return m.sum(1 - tp / (tp + fp + fn)) / CLASSES


def _classes_micro(m, y, t, w):
    tp, fp, fn = _rates(m, m.softmax(y), m.one_hot(t, CLASSES), w)
    return 1 - tp / (tp + 0.4 * fp + 0.6 * fn)


def _moments(m, y, t, w):
    total = m.sum(w)
    my, mt = m.sum(w * y) / total, m.sum(w * t) / total
    dy, dt = y - my, t - mt
    return my, mt, m.sum(w * dy * dy) / total, m.sum(w * dt * dt) / total, m.sum(w * dy * dt) / total


def _correlation(m, y, t, w):
    _, _, vy, vt, c = _moments(m, y, t, w)
    return 1 - c / (m.sqrt(vy) * m.sqrt(vt))


def _concordance(m, y, t, w):
    my, mt, vy, vt, c = _moments(m, y, t, w)
    return 1 - 2 * c / (vy + vt + (my - mt) ** 2)


def _r2(m, y, t, w):
    mt = m.sum(w * t) / m.sum(w)
    return m.sum(w * (y - t) ** 2) / m.sum(w * (t - mt) ** 2)


def _tilted(m, y, t, w):
    return m.log(m.sum(w * m.exp(0.7 * (y - t) ** 2)) / m.sum(w)) / 0.7


def _mutual_information(m, y, t, w):
    joint, shuffled = m.sum(w * t), m.sum(w * (1 - t))
    return m.log(m.sum(w * (1 - t) * m.exp(y)) / shuffled) - m.sum(w * t * y) / joint


def _calibration_ratio(m, y, t, w):
    return m.log(m.sum(w * m.sigmoid(y)) / m.sum(w * t)) ** 2


def _calibration_error(m, y, t, w):
    p = m.sigmoid(y)
    bins = np.minimum(np.floor(m.numpy(p) * 5), 4)
    gaps = [m.sum(m.constant((bins == b).astype(np.float64)) * w * (p - t)) for b in range(5)]
    return sum(m.maximum(gap, -gap) for gap in gaps) / m.sum(w)


def _own(m, y, t, w):
    return m.sqrt(m.sum(w * (y - t) ** 2) / m.sum(w * t * t))


# name -> (the loss, kind of data, its definition)
LOSSES: dict[str, tuple[Callable[[], GlobalLoss], str, Callable[..., Any]]] = {
    "dice": (SoftDice, "binary", _dice),
    "jaccard, smooth": (lambda: Jaccard(smooth=0.5), "binary", _smooth_jaccard),
    "tversky": (Tversky, "binary", _tversky),
    "f2": (lambda: FBeta(2.0), "binary", _f2_of_probabilities),
    "dice of labels, macro": (lambda: SoftDice("multilabel"), "labels", _labels_macro),
    "dice of labels, micro": (lambda: SoftDice("multilabel", average="micro"), "labels", _labels_micro),
    "jaccard of classes, macro": (lambda: Jaccard("multiclass"), "classes", _classes_macro),
    "tversky of classes, micro": (
        lambda: Tversky(0.4, 0.6, "multiclass", average="micro"),
        "classes",
        _classes_micro,
    ),
    "correlation": (Correlation, "real", _correlation),
    "concordance": (Concordance, "real", _concordance),
    "r2": (R2, "real", _r2),
    "tilted": (lambda: Tilted("mse", 0.7), "real", _tilted),
    "mutual information": (DonskerVaradhan, "binary", _mutual_information),
    "calibration ratio": (CalibrationRatio, "binary", _calibration_ratio),
    "calibration error": (lambda: CalibrationError(5), "binary", _calibration_error),
    "a user's own": (
        lambda: SumsLoss(
            lambda y, t: ((y - t) ** 2, t * t), lambda e, s: (e / s) ** 0.5, name="relative error"
        ),
        "real",
        _own,
    ),
}


def sample(rng: np.random.Generator, kind: str, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features (n, 5), targets and weights that drift, some of them 0; every class occurs."""
    drift = np.linspace(-1.0, 1.0, n)
    x = rng.normal(size=(n, 5)) + drift[:, None]
    w = rng.uniform(0.2, 3.0, size=n) * (rng.uniform(size=n) > 0.25)
    w[:CLASSES] = 1.0
    if kind == "real":
        t = rng.normal(size=n) * (1.2 + drift) + drift
    elif kind == "binary":
        t = (rng.uniform(size=n) < 0.5 + 0.4 * drift).astype(float)
        t[:2] = 0.0, 1.0
    elif kind == "labels":
        t = (rng.uniform(size=(n, CLASSES)) < 0.5 + 0.4 * drift[:, None]).astype(float)
        t[0], t[1] = 0.0, 1.0
        w = w[:, None] * np.linspace(0.5, 1.5, CLASSES)
    else:
        t = rng.integers(0, CLASSES, size=n)
        t[:CLASSES] = range(CLASSES)
    return x, t, w


def outputs(kind: str) -> int:
    """Return how many predictions a sample has."""
    return CLASSES if kind in ("labels", "classes") else 1
