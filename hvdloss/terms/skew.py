"""D(k): how far each rank's data is from the data of all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.errors import ConfigError, UsageError
from hvdloss.terms.distributions import (
    MEASURES,
    Window,
    bin_positions,
    divergences,
    effective_sample_size,
    pooled_edges,
)
from hvdloss.terms.term import Batch, Policy, StepStats, Term, check_price

__all__ = ["DataSkew"]

Array = npt.NDArray[np.float64]

_POINTS = 33  # quantiles that a rank sends of its real targets
_UNITS = {"js": "nats", "tv": "share", "w1": "target units"}


class DataSkew(Term):
    """D(k): the divergence of rank k's weighted target histogram from that of all ranks together.

    Histograms are sums: micro-batches add up, ranks' histograms are exchanged with the ledgers, and every
    rank knows all of them. They cover the last `window` steps, or decay with `half_life`. A rank without
    data has a skew of 0; a class that a rank never saw is an empty bin.

    Args:
        price: of one unit of divergence, in units of the loss.
        classes: number of classes; targets are class indices, or probabilities along the predictions'
            class axis. With ``multilabel=True`` targets are 0 or 1 for each class, along the last axis.
        bins: instead of `classes`, for real targets: number of bins between shared quantiles, which are
            estimated in the first `warmup` steps from all ranks' targets.
        of: ``"target"``, or ``"keys"``: integers that the caller passes along, ``objective(prediction,
            target, keys=hospital)``; `classes` says how many there are.
        label: a function of the target that gives the label, where the target holds more than that; in
            ``model.fit`` the way to keys.
        measure: ``"js"`` (Jensen-Shannon, nats), ``"tv"`` (total variation) or ``"w1"`` (Wasserstein-1,
            in target units for real targets, in class numbers for ordered classes).
        window: steps that count; 100 if `half_life` is not given either.
        half_life: steps after which a step counts half.
        warmup: steps in which quantiles are estimated.
        policies: :class:`hvdloss.terms.policies.ImportanceWeights`, ``ClassBalance``, ``RankWeights``,
            ``Proximal``.

    Attributes:
        counts: the window's weighted histograms, float64 ``(ranks, bins)``.
        skew: each rank's D, float64 ``(ranks,)``.
        overall: their mean, weighted with the ranks' data.

    Raises:
        ConfigError: an argument that cannot be used; at a step, a label that is no class, on every rank.

    Collectives: none; one float64 per rank and bin rides along with the ledgers.
    """

    name = "skew"
    state_attrs = ("edges", "positions")
    per_rank_state_attrs = ("_window", "counts", "skew", "overall", "_sketches", "_sketched")

    def __init__(
        self,
        price: float = 0.0,
        *,
        classes: int | None = None,
        bins: int | None = None,
        multilabel: bool = False,
        of: str = "target",
        label: Any = None,
        measure: str = "js",
        window: int | None = None,
        half_life: float | None = None,
        warmup: int = 4,
        policies: Sequence[Policy] = (),
    ) -> None:
        self.price = check_price(price, "DataSkew")
        if (classes is None) == (bins is None):
            raise ConfigError("DataSkew needs either classes= (a number of classes) or bins= (real targets)")
        count = classes if classes is not None else bins
        if isinstance(count, bool) or not isinstance(count, int) or count < 2:
            what = "classes" if bins is None else "bins"
            raise ConfigError(f"{what}={count!r} of DataSkew must be an integer of at least 2")
        if measure not in MEASURES:
            raise ConfigError(f"measure={measure!r} of DataSkew must be one of {', '.join(MEASURES)}")
        if of not in ("target", "keys"):
            raise ConfigError(f"of={of!r} of DataSkew must be 'target' or 'keys'")
        if bins is not None and (of == "keys" or multilabel):
            raise ConfigError("bins= of DataSkew is for real targets; keys and labels need classes=")
        if window is not None and half_life is not None:
            raise ConfigError("DataSkew takes window= or half_life=, not both")
        if label is not None and not callable(label):
            raise ConfigError(f"label={label!r} of DataSkew must be a function of the target")
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 1:
            raise ConfigError(f"warmup={warmup!r} of DataSkew must be an integer of at least 1")
        self.bins, self.real, self.multilabel, self.of = count, bins is not None, multilabel, of
        self.label, self.measure, self.warmup = label, measure, warmup
        self.unit = _UNITS[measure]
        self._span = {"steps": window or 100} if half_life is None else {"half_life": half_life}
        Window(**self._span)  # raises what is wrong
        self.policies = tuple(policies)
        self.has_weights = any(
            hasattr(policy, "table") or hasattr(policy, "factors") for policy in self.policies
        )
        # The histogram, and for classes the number of labels that are none; for real targets the
        # quantiles (times the number of elements) and that number.
        self.width = self.bins + (_POINTS + 1 if self.real else 1)
        self.largest = math.log(2) if measure == "js" else 1.0
        self.reset(0, 1)
        self.update_state()

    def reset(self, rank: int, size: int) -> None:
        """Start over with these ranks."""
        self.rank = rank
        self._window = Window(**self._span)
        self.counts = np.zeros((size, self.bins))
        self.skew = np.zeros(size)
        self.overall = 0.0
        self.edges: Array | None = None
        self.positions: Array | None = None
        self._sketches = np.zeros((size, _POINTS + 1))
        self._sketched = 0

    # -- state: [are the edges known, edges...] for real targets; a factor per bin; the rank's factor --

    @property
    def _edge_entries(self) -> int:
        return self.bins if self.real else 0  # a flag and bins - 1 edges

    def update_state(self) -> None:
        """Set the weights of the policies for the next batches."""
        table = np.ones(self.bins)
        factor = 1.0
        for policy in self.policies:
            if hasattr(policy, "table"):
                table = table * policy.table(self.counts, self.rank)
            if hasattr(policy, "factors"):
                factor *= float(policy.factors[self.rank])
        front = np.zeros(self._edge_entries)
        if self.real and self.edges is not None:
            front = np.concatenate([[1.0], self.edges])
        self.state = np.concatenate([front, table, [factor]])

    # -- a batch ----------------------------------------------------------------------------------

    def _labels(self, batch: Batch) -> Any:
        if self.of == "keys":
            if batch.keys is None:
                raise UsageError(
                    "DataSkew(of='keys') needs keys: call objective(prediction, target, weight, keys=...); "
                    "in model.fit give DataSkew(label=...) a function that finds the key in the target"
                )
            return batch.keys
        return batch.target if self.label is None else self.label(batch.target)

    def _soft(self, batch: Batch, labels: Any) -> int | None:
        """Return the class axis of labels that are one number per class, or None for class indices."""
        if self.multilabel:
            return -1
        ops = batch.ops
        if self.real or len(ops.shape(labels)) != len(ops.shape(batch.losses)) + 1:
            return None
        return batch.class_axis if batch.class_axis is not None else -1

    def _per_class(self, batch: Batch, labels: Any, axis: int) -> tuple[Any, Any]:
        """Return labels of shape ``(..., classes)``, and the elements' weights, broadcast to it."""
        ops = batch.ops
        labels = ops.move_axis_last(labels, axis)
        if ops.shape(labels)[-1] not in (None, self.bins):
            raise ConfigError(
                f"targets with {ops.shape(labels)[-1]} classes, but DataSkew(classes={self.bins})"
            )
        weight = batch.weight
        if len(ops.shape(weight)) < len(ops.shape(labels)):
            weight = ops.expand_trailing(weight, labels)
        return labels, weight

    def _index(self, batch: Batch, labels: Any) -> Any:
        """Return each element's bin, in the shape of the losses; classes are not yet clipped."""
        ops = batch.ops
        if self.real:
            return ops.bucketize(labels, batch.state[1 : self.bins])
        return ops.expand_trailing(ops.to_int64(labels), batch.losses)

    def observe(self, batch: Batch) -> Any:
        """Return the batch's weighted histogram, and the sums that quantiles are estimated from."""
        ops = batch.ops
        labels = self._labels(batch)
        axis = self._soft(batch, labels)
        if axis is not None:
            labels, weight = self._per_class(batch, labels, axis)
            return ops.concat64([ops.class_sums(labels, weight), ops.zeros64(1, batch.losses)])
        index, weight = self._index(batch, labels), batch.weight
        if self.real:
            known = batch.state[:1]
            sketch, size = ops.quantiles(labels, weight, _POINTS)
            histogram = ops.histogram(index, weight, self.bins) * known
            return ops.concat64([histogram, sketch * size * (1.0 - known), size * (1.0 - known)])
        outside = ((index < 0) | (index >= self.bins)) & (weight != 0)
        return ops.concat64([ops.histogram(index, weight, self.bins), ops.count(outside)])

    def weights(self, batch: Batch) -> Any:
        """Return the policies' factors for the elements' weights."""
        ops = batch.ops
        table = batch.state[self._edge_entries : self._edge_entries + self.bins]
        factor = batch.state[-1]
        labels = self._labels(batch)
        axis = self._soft(batch, labels)
        if axis is None:
            found = ops.take(table, self._index(batch, labels), self.bins)
        elif self.multilabel and len(ops.shape(labels)) == len(ops.shape(batch.losses)):
            found = ops.interpolate(labels, table)  # per element: the class's factor where the label is set
        else:
            found = ops.label_mean(ops.move_axis_last(labels, axis), table)
        return ops.cast_like(found * factor, batch.weight)

    # -- a step -----------------------------------------------------------------------------------

    def on_step_end(self, step: StepStats) -> Array:
        """Add the step to the window; return each rank's divergence."""
        extra = step.sums[:, self.bins :]
        if self.real:
            if self.edges is None:
                self._estimate_edges(extra)
                return self.skew
        elif (extra[:, 0] > 0).any():
            ranks = ", ".join(map(str, np.flatnonzero(extra[:, 0])))
            raise ConfigError(
                f"step {step.step}: {extra[:, 0].sum():.0f} label(s) outside 0..{self.bins - 1} on rank(s) "
                f"{ranks}, but DataSkew(classes={self.bins}). Nothing was updated. Pass the number of "
                f"classes there are, or give such elements the weight 0."
            )
        self._window.add(step.sums[:, : self.bins])
        assert self._window.total is not None
        self.counts = self._window.total
        self.skew, self.overall = divergences(self.counts, self.measure, self.positions)
        return self.skew

    def _estimate_edges(self, sketches: Array) -> None:
        """Add the ranks' quantile sketches of one step; after enough steps, fix the edges."""
        self._sketches = self._sketches + sketches
        self._sketched += 1
        if self._sketched < self.warmup or not self._sketches[:, -1].any():
            return
        sizes = self._sketches[:, -1]
        points = self._sketches[:, :-1] / np.where(sizes > 0, sizes, 1.0)[:, None]
        # Means of several batches' quantiles, so in order but for rounding.
        points = np.maximum.accumulate(points, axis=1)
        self.edges = pooled_edges(points, sizes, self.bins)
        self.positions = _centres(points[sizes > 0], sizes[sizes > 0], self.edges)

    def details(self) -> dict[str, Any]:
        """Return the histograms, the overall skew, and what the weights cost."""
        table = [policy for policy in self.policies if hasattr(policy, "table")]
        sizes = None
        if table:
            sizes = []
            for rank, row in enumerate(self.counts):
                product = np.ones(self.bins)
                for policy in table:
                    product = product * policy.table(self.counts, rank)
                sizes.append(effective_sample_size(row, product))
        return {
            "measure": self.measure,
            "overall": self.overall,
            "counts": self.counts.tolist(),
            "edges": None if self.edges is None else self.edges.tolist(),
            "effective_sample_size": sizes,
            "rank_weights": next(
                (policy.factors.tolist() for policy in self.policies if hasattr(policy, "factors")), None
            ),
        }

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks."""
        return {
            **super().settings(),
            "bins": self.bins,
            "real": self.real,
            "measure": self.measure,
            **self._span,
        }


def _centres(points: Array, sizes: Array, edges: Array) -> Array:
    """Return the mean of the targets in each bin, estimated from the ranks' quantiles.

    In the outer bins most targets lie near the edge, far from the middle between it and the extreme.
    """
    weight = np.repeat(sizes[:, None], points.shape[1], axis=1)
    weight[:, [0, -1]] /= 2  # each quantile stands for what is near it, an extreme for one side only
    index = np.searchsorted(edges, points.ravel(), side="right")
    bins = len(edges) + 1
    total = np.bincount(index, weights=weight.ravel(), minlength=bins)
    sums = np.bincount(index, weights=weight.ravel() * points.ravel(), minlength=bins)
    middles = bin_positions(edges, float(points.min()), float(points.max()))
    return np.where(total > 0, sums / np.where(total > 0, total, 1.0), middles)
