"""Contrastive losses of one process, written from their papers; random batches and splits."""

from __future__ import annotations

import numpy as np

from hvdloss.losses import InfoNCE, SigLIP, SupervisedContrastive

COLUMNS = 3


def unit(xp, x):
    return x / xp.sqrt(xp.sum(x * x, 1))[:, None]


def info_nce(xp, x, y, w, *, scale=None, symmetric=True, normalize=True, temperature=0.07, **_):
    """Of present pairs only."""
    x, y = (unit(xp, x), unit(xp, y)) if normalize else (x, y)
    s = x @ xp.transpose(y) * (1 / temperature if scale is None else xp.exp(scale))
    eye = xp.constant(np.eye(len(w)))
    p = eye * s
    losses = xp.log(xp.sum(xp.exp(s), 1)) - xp.sum(p, 1)
    if symmetric:
        losses = (losses + xp.log(xp.sum(xp.exp(s), 0)) - xp.sum(p, 1)) / 2
    return xp.sum(w * losses) / xp.sum(w)


def siglip(xp, x, y, w, *, scale, bias, normalize=True, **_):
    """Of present pairs only."""
    x, y = (unit(xp, x), unit(xp, y)) if normalize else (x, y)
    z = xp.constant(2 * np.eye(len(w)) - 1)
    logits = z * (x @ xp.transpose(y) * xp.exp(scale) + bias)
    return xp.sum(w[:, None] * w[None, :] * xp.log(1 + xp.exp(-logits))) / xp.sum(w)


def supervised(xp, x, y, w, *, labels, temperature=0.1, normalize=True, **_):
    """Of present samples only, anchor by anchor."""
    z = unit(xp, x) if normalize else x
    s = z @ xp.transpose(z) / temperature
    n = len(labels)
    total, weight = 0.0, 0.0
    for i in range(n):
        positives = [p for p in range(n) if p != i and labels[p] == labels[i]]
        if not positives:
            continue
        below = sum(xp.exp(s[i, a]) for a in range(n) if a != i)
        mean = sum(xp.log(xp.exp(s[i, p]) / below) for p in positives) / len(positives)
        total, weight = total - w[i] * mean, weight + w[i]
    return total / weight


# name -> the loss, its definition, what the prediction has beside x: y, scale, bias
LOSSES = {
    "clip": (InfoNCE(), info_nce, ("y", "scale")),
    "info_nce": (InfoNCE(0.3, symmetric=False), info_nce, ("y",)),
    "raw": (InfoNCE(0.9, normalize=False), info_nce, ("y",)),
    "supervised": (SupervisedContrastive(0.4), supervised, ()),
    "siglip": (SigLIP(), siglip, ("y", "scale", "bias")),
    "siglip_raw": (SigLIP(normalize=False), siglip, ("y", "scale", "bias")),
}


def settings(loss):
    return {k: v for k, v in vars(loss).items() if k in ("temperature", "symmetric", "normalize")}


def sample(rng, weighted=True):
    """Return a random batch: x, y, weights of which some are 0, labels, log_scale, bias."""
    n = int(rng.integers(4, 16))
    x, y = rng.normal(size=(2, n, COLUMNS))
    y = y + x
    w = rng.uniform(0.1, 3.0, size=n) * (rng.uniform(size=n) > 0.25) if weighted else np.ones(n)
    w[:2] = 1.0
    labels = rng.integers(0, 3, size=n)
    labels[:2] = 1  # some anchor has a positive
    return {"x": x, "y": y, "w": w, "labels": labels, "scale": rng.uniform(-1, 1.5), "bias": rng.normal()}


def shuffled(rng, batch):
    order = rng.permutation(len(batch["w"]))
    return {k: v[order] if np.ndim(v) else v for k, v in batch.items()}


def split(rng, n, parts):
    """Return where to cut n samples into parts, some of which are empty now and then."""
    return [0, *sorted(rng.integers(0, n + 1, size=parts - 1).tolist()), n]
