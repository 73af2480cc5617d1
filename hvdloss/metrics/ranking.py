"""Metrics of an order of scores: ROC AUC and average precision, exactly or from histograms.

Exactly, every rank sends its scores: distinct ones once, with the weight of positives and negatives that
have it, in the fewest bytes that hold them (6 per sample of float32 scores without weights). From
histograms, `bins` numbers are sent whatever the number of samples, and the value comes with a bound of its
error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from hvdloss._util.checks import check_int
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.metrics.base import Array, Elements, State, check_choice
from hvdloss.metrics.classification import Classes, probabilities

__all__ = ["AUC", "AveragePrecision", "Estimate"]

_CHUNK = 4  # arrays of one table: rows per class, scores, weight of positives, weight of negatives


class Estimate(NamedTuple):
    """A value from histograms.

    Attributes:
        value: the estimate; an array for ``average=None``.
        error: the exact value is no further from it than this.
    """

    value: Any
    error: Any


def _table(counts: Array, scores: Array, positive: Array, negative: Array) -> State:
    """Return a table with every distinct score of a class once, by class and then ascending."""
    classes = np.repeat(np.arange(len(counts)), counts)
    # A stable sort is quick where sorted tables are joined.
    order = np.argsort(scores, kind="stable") if len(counts) == 1 else np.lexsort((scores, classes))
    classes, scores = classes[order], scores[order]
    new = np.ones(len(scores), bool)
    new[1:] = (scores[1:] != scores[:-1]) | (classes[1:] != classes[:-1])
    starts = np.flatnonzero(new)
    p, n = positive.astype(np.float64)[order], negative.astype(np.float64)[order]
    return (
        np.bincount(classes[new], minlength=len(counts)),
        scores[new],
        np.add.reduceat(p, starts) if len(starts) else p,
        np.add.reduceat(n, starts) if len(starts) else n,
    )


def _join(tables: State) -> State:
    """Return one table of several."""
    counts = tables[::_CHUNK]
    if len(counts) == 1:
        return tables
    parts = [np.concatenate(tables[i::_CHUNK]) for i in range(1, _CHUNK)]
    # Rows lie by table and class; the classes of each are repeated.
    classes = np.concatenate([np.repeat(np.arange(len(c)), c) for c in counts])
    order = np.argsort(classes, kind="stable")
    total = np.sum(counts, axis=0)
    return _table(total, *(part[order] for part in parts))


def _narrow(values: Array) -> Array:
    """Return the narrowest array that holds the same numbers."""
    for dtype in (np.uint8, np.uint16, np.uint32, np.float32):
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = values.astype(dtype)
        if (narrow == values).all():
            return np.asarray(narrow)
    return values


@dataclasses.dataclass(frozen=True)
class _Ranking(Classes):
    """A metric of how positives rank among negatives; see AUC for the arguments."""

    classes: int | None = None
    _: dataclasses.KW_ONLY
    bins: int | None = None
    average: str | None = "macro"
    from_logits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("average", self.average, ("macro", "weighted", "micro", None))
        if self.bins is not None:
            check_int("bins", self.bins, 2)

    def key(self) -> Hashable:
        """Return what AUC and average precision share."""
        return ("scores", self.classes, self.bins, self.from_logits)

    def measure(self, found: Elements) -> State:
        """Return one table, or the histograms of positives and negatives: shape (2, classes, bins)."""
        scores = found.prediction
        if found.labels:
            scores = (scores[:, None] == np.arange(self.classes or 2)).astype(np.float32)
        elif self.bins is not None:
            scores = probabilities(found, self.from_logits, type(self).__name__)
        elif self.from_logits and scores.ndim == 2:
            scores = np.asarray(NumpyOps().softmax(scores.astype(np.float64)))
        if scores.ndim == 1:
            scores, true = scores[:, None], (found.target == 1)[:, None]
        else:
            true = found.target[:, None] == np.arange(scores.shape[1])
        many, classes = scores.shape
        scores, true = scores.T.reshape(-1), true.T.reshape(-1)
        weight = np.tile(found.weight, classes)
        sides = np.where(true, weight, 0.0), np.where(true, 0.0, weight)
        if self.bins is None:
            return _table(np.full(classes, many), scores, *sides)
        place = np.minimum((scores * self.bins).astype(np.int64), self.bins - 1)
        cell = np.repeat(np.arange(classes), many) * self.bins + place
        size = classes * self.bins
        sums = [np.bincount(cell, weights=side, minlength=size) for side in sides]
        return (np.stack(sums).reshape(2, classes, self.bins),)

    def merge(self, a: State, b: State) -> State:
        """Return tables side by side, the last ones joined where they are of like size; or sums."""
        if self.bins is not None or not a or not b:
            return super().merge(a, b)
        both = a + b
        # So that every row is sorted a few times only, however many batches there are.
        while len(both) > _CHUNK and 2 * len(both[1 - _CHUNK]) > len(both[1 - 2 * _CHUNK]):
            both = both[: -2 * _CHUNK] + _join(both[-2 * _CHUNK :])
        return both

    def pack(self, state: State) -> State:
        """Return one table, in as few bytes as hold it."""
        if self.bins is not None or not state:
            return state
        counts, scores, positive, negative = _join(state)
        return counts, scores, _narrow(positive), _narrow(negative)

    def one(self, positive: Array, negative: Array) -> tuple[float, float]:
        """Return the value and the bound of its error, of weights by ascending score."""
        raise NotImplementedError

    def finish(self, state: State) -> Any:
        """Return the value."""
        if self.bins is None:
            counts, scores, positive, negative = _join(state)
            if self.average == "micro":
                rows = np.array([len(scores)])
                counts, scores, positive, negative = _table(rows, scores, positive, negative)
            ends = np.cumsum(counts)[:-1]
            sides = zip(np.split(positive, ends), np.split(negative, ends), strict=True)
        else:
            histograms = state[0].sum(1, keepdims=True) if self.average == "micro" else state[0]
            sides = zip(*histograms, strict=True)
        found, prevalence = [], []
        for p, n in sides:
            p, n = p.astype(np.float64), n.astype(np.float64)
            prevalence.append(p.sum())
            found.append(self.one(p, n))
        values, errors = np.array(found).T
        if self.bins is None:
            return self._averaged(values, np.array(prevalence))
        return Estimate(*(self._averaged(x, np.array(prevalence)) for x in (values, errors)))

    def _averaged(self, values: Array, prevalence: Array) -> Any:
        if self.classes is None:
            return float(values[0])
        if self.average is None:
            return values
        there = ~np.isnan(values)
        if not there.any():
            return float("nan")
        weight = prevalence[there] if self.average == "weighted" else np.ones(int(there.sum()))
        return float((values[there] * weight).sum() / weight.sum())


class AUC(_Ranking):
    """Area under the ROC curve: how often a positive scores above a negative, ties counting half.

    NaN without positives or without negatives. From `bins`, pairs in one bin count half, so that the exact
    value is within half the share of such pairs, which is the `error`. Source: Hanley and McNeil 1982.

    Args:
        classes: number of classes, each against the rest; None for targets 0 and 1 with one score each.
        bins: None for the exact value, from all scores; or from that many equal bins of probability, as an
            :class:`Estimate`.
        average: of the classes' values: ``"macro"``, ``"weighted"`` by how frequent a class is,
            ``"micro"`` (all classes' scores in one order), or None for an array with an entry per class.
            A class for which the value is not defined is left out.
        from_logits: scores are logits: of concern for `bins` and for `classes`, whose scores become
            probabilities first.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def one(self, positive: Array, negative: Array) -> tuple[float, float]:
        """Return the area, and half the share of pairs in one bin."""
        pairs = positive.sum() * negative.sum()
        if not pairs > 0:
            return float("nan"), float("nan")
        below = np.cumsum(negative) - negative / 2
        return float((positive * below).sum() / pairs), float((positive * negative).sum() / pairs / 2)


class AveragePrecision(_Ranking):
    """Average precision: precision at every positive's score, averaged over the positives.

    As in scikit-learn, without interpolation. NaN without positives. From `bins`, scores in one bin count as
    equal, and `error` is the distance to the worst or the best order within the bins. Arguments of
    :class:`AUC`.
    """

    def one(self, positive: Array, negative: Array) -> tuple[float, float]:
        """Return the average precision, and how far the best or the worst order in bins is."""
        total = positive.sum()
        if not total > 0:
            return float("nan"), float("nan")
        p, n = positive[::-1], negative[::-1]
        hits, misses = np.cumsum(p), np.cumsum(n)
        there = p > 0
        p, n, hits, misses = p[there], n[there], hits[there], misses[there]
        value = (p * hits / (hits + misses)).sum() / total
        # All positives of a bin first; and all negatives first, the positives as fine as they can be.
        high = (p * hits / (hits + misses - n)).sum() / total
        apart = np.divide(p, hits - p + misses, out=np.zeros_like(p), where=misses > 0)
        low = (p - misses * np.log1p(apart)).sum() / total
        return float(value), float(max(high - value, value - low))
