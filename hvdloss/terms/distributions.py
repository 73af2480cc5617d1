"""How ranks' data differ, and what to do about it: the formulas behind the data-skew term D(k).

Everything starts from *counts*: weighted target histograms, one row per rank, shape ``(ranks, bins)``, every
entry finite and >= 0. A row of zeros is a rank without data, a column of zeros a class that no rank saw.
They may have any scale: what is computed from them neither overflows nor becomes NaN.

==============================  ==========================================================================
measuring                       :func:`divergences`, :func:`effective_sample_size`
weights for classes or bins     :func:`importance_table`, :func:`balance_table`
weights for ranks               :func:`exponentiated_gradient`, :func:`agnostic_ascent`, :func:`q_fair`
bins for real targets           :func:`pooled_edges`, :func:`bin_positions`
over time                       :class:`Window`
==============================  ==========================================================================

Pure NumPy in float64, and no collectives: whoever calls brings the numbers of all ranks, and as every rank
computes from the same numbers, every rank gets the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.errors import ConfigError, ShapeError

__all__ = [
    "BALANCES",
    "MEASURES",
    "Window",
    "agnostic_ascent",
    "balance_table",
    "bin_positions",
    "divergences",
    "effective_sample_size",
    "exponentiated_gradient",
    "importance_table",
    "pooled_edges",
    "project_simplex",
    "q_fair",
]

Array = npt.NDArray[np.float64]

#: How far a rank's distribution is from the global one; see :func:`divergences`.
MEASURES = ("js", "tv", "w1")
#: How classes are balanced; see :func:`balance_table`.
BALANCES = ("inverse", "effective")

# Two distributions whose every entry agrees to this, relatively, differ by rounding only: pairwise sums over
# ten thousand ranks err by some 30 units in the last place, which is 2**-47.
_ROUNDING = 2.0**-45
# A share below this is no share: so that its inverse, and products of two such, stay normal numbers.
_NOTHING = 2.0**-500
_LARGEST = float(np.finfo(np.float64).max)
# Beyond it, the difference of two targets could overflow.
_TARGET_LIMIT = 1e300
# pooled_edges refines sketches up to this many points in all (and this many times): below, sorting is free.
_FINE_POINTS = 2**17
_FINE_PARTS = 64

_COUNTS_HINT = "leave elements with such a weight out of the histogram"


# Arguments


def _checked(
    name: str,
    value: npt.ArrayLike,
    axes: tuple[str, ...],
    *,
    hint: str,
    signed: bool = False,
    nan: bool = False,
) -> Array:
    """Return `value` as float64 with the axes named by `axes`, all finite, and >= 0 unless `signed`.

    With `nan` an entry may be NaN. The array is the caller's own if it was float64 already.

    Raises:
        ShapeError: another number of axes.
        ConfigError: a bad entry; names where it is.
    """
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}={value!r} is not an array of numbers; {hint}") from None
    if array.ndim != len(axes):
        wanted = ", ".join(f"{axis}s" for axis in axes) + ("," if len(axes) == 1 else "")
        raise ShapeError(f"{name} has shape {array.shape} but must have shape ({wanted})")
    if not array.size:
        return array
    # minimum and maximum find NaN too, and need no array of their own.
    low, high = float(array.min()), float(array.max())
    if low >= (-_LARGEST if signed else 0.0) and high <= _LARGEST:
        return array
    good = np.isfinite(array) | (np.isnan(array) if nan else False)
    if not signed:
        good &= ~(array < 0)
    if good.all():
        return array
    where = np.unravel_index(int(np.argmin(good)), array.shape)
    place = ", ".join(f"{axis} {int(i)}" for axis, i in zip(axes, where, strict=True))
    allowed = "finite" if signed else "finite and >= 0"
    raise ConfigError(f"{name} at {place} is {float(array[where])} but must be {allowed}; {hint}")


def _number(name: str, value: float, low: float, high: float, allowed: str, hint: str) -> float:
    """Return `value` as a float if it lies in ``[low, high]``; raise ConfigError saying `allowed` if not."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:  # false for NaN
        raise ConfigError(f"{name}={value!r} must be {allowed}; {hint}")
    return number


def _whole(name: str, value: int, hint: str) -> int:
    """Return `value` if it is a whole number >= 1, else raise ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number >= 1; {hint}")
    return int(value)


def _same_length(name: str, array: Array, other_name: str, other: Array) -> None:
    """Raise ShapeError unless both have as many entries along their first axis."""
    if len(array) != len(other):
        raise ShapeError(
            f"{name} has {len(array)} entries but {other_name} has {len(other)}; both must have the same"
        )


# Distributions


def _normalised(counts: Array) -> tuple[Array, Array]:
    """Return every row's distribution (zeros for an empty one) and its share of the total weight.

    Rows are scaled by their largest entry first, so that no sum overflows and tiny rows keep their digits.
    """
    top = counts.max(axis=1, initial=0.0, keepdims=True)
    p = counts / np.where(top > 0, top, 1.0)
    sums = p.sum(axis=1, keepdims=True)
    p /= np.where(sums > 0, sums, 1.0)
    peak = top.max(initial=0.0)
    weight = (top / peak * sums)[:, 0] if peak > 0 else np.zeros(len(counts))
    total = weight.sum()
    return p, weight / total if total > 0 else weight


def _distribution(row: Array) -> Array:
    """Return one row's distribution; zeros if it is empty."""
    p: Array = _normalised(row[None])[0].reshape(row.shape)
    return p


def divergences(
    counts: npt.ArrayLike, measure: str = "js", positions: npt.ArrayLike | None = None
) -> tuple[Array, float]:
    """Return how far each rank's distribution is from the global one, and the ranks' average.

    The global distribution is the sum of all rows, normalised. With p a rank's distribution and g the global:

    - ``"js"``: the Jensen-Shannon divergence (KL(p || m) + KL(g || m)) / 2 with m = (p + g) / 2, in nats, at
      most ln 2 (Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 1991).
    - ``"tv"``: the total variation sum |p - g| / 2, in [0, 1]: the share of the rank's elements that would
      have to be others.
    - ``"w1"``: the Wasserstein-1 distance, the integral of the difference of the cumulative distributions
      (Vallender 1974), in the unit of `positions`: how far, on average, its targets would have to move.

    Args:
        counts: weighted target histograms, shape (ranks, bins), finite and >= 0.
        measure: one of :data:`MEASURES`.
        positions: of the bins, shape (bins,), ascending (equal neighbours are allowed), in target units;
            0, 1, 2, ... if None. Only ``"w1"`` reads it.

    Returns:
        The ranks' divergences, shape (ranks,), and their average, each weighted with its rank's share of the
        total weight. A rank without data has 0 and no say; without any data all are 0. Never negative, never
        NaN, and exactly 0 for a distribution that differs from the global one by rounding only.

    Raises:
        ConfigError: an unknown measure, a bad count, positions that do not ascend.
        ShapeError: arrays of other shapes.

    >>> values, overall = divergences([[3, 0], [0, 1]], "tv")
    >>> values.tolist(), overall
    ([0.25, 0.75], 0.375)
    """
    if measure not in MEASURES:
        raise ConfigError(f"measure={measure!r} is not known; choose one of {', '.join(map(repr, MEASURES))}")
    counts = _checked("counts", counts, ("rank", "bin"), hint=_COUNTS_HINT)
    gaps = _gaps(positions, counts.shape[1]) if measure == "w1" else None
    p, share = _normalised(counts)
    # Summed along contiguous memory, NumPy adds pairwise; down the columns it would add one by one, and the
    # error would grow with the number of ranks.
    g = np.ascontiguousarray((p * share[:, None]).T).sum(axis=1)
    difference = p - g
    if gaps is not None:
        carried = np.abs(np.cumsum(difference, axis=1)[:, :-1])
        values, bound = (carried * gaps).sum(axis=1), float(gaps.sum())
    elif measure == "tv":
        values, bound = 0.5 * np.abs(difference).sum(axis=1), 1.0
    else:
        values, bound = _jensen_shannon(np.abs(difference), p + g), math.log(2.0)
    near = _ROUNDING * np.maximum(p, g) + np.finfo(np.float64).tiny
    values[(share == 0) | (np.abs(difference) <= near).all(axis=1)] = 0.0
    values = np.clip(values, 0.0, bound)
    overall = float((share * values).sum())
    return values, min(overall, float(values.max(initial=0.0)))  # an average, also after rounding


def _gaps(positions: npt.ArrayLike | None, bins: int) -> Array:
    """Return the distances between the positions of neighbouring bins."""
    if positions is None:
        return np.ones(max(bins - 1, 0))
    hint = "give one finite position per bin, in ascending order"
    x = _checked("positions", positions, ("bin",), hint=hint, signed=True)
    if len(x) != bins:
        raise ShapeError(f"positions has {len(x)} entries but counts has {bins} bins; {hint}")
    with np.errstate(over="ignore"):
        gaps = np.diff(x)
        reach = float(gaps.sum())
    if (gaps < 0).any():
        i = int(np.argmax(gaps < 0))
        raise ConfigError(f"positions falls from {float(x[i])} (bin {i}) to {float(x[i + 1])}; {hint}")
    if not math.isfinite(reach):
        raise ConfigError(
            f"positions reaches from {float(x[0])} to {float(x[-1])}, too far for a distance in float64; "
            "give it in a larger unit"
        )
    return gaps


def _jensen_shannon(difference: Array, both: Array) -> Array:
    """Return the Jensen-Shannon divergences of rows with ``|p - g|`` and ``p + g``, in nats.

    With d = (p - g) / (p + g) a bin adds (p + g) / 4 * ((1 + d) ln(1 + d) + (1 - d) ln(1 - d)). Unlike a
    difference of entropies, every bin is >= 0 by itself, so that small divergences keep their digits.
    """
    d = np.divide(difference, both, out=np.zeros_like(both), where=both > 0)
    below_one = np.minimum(d, math.nextafter(1.0, 0.0))  # a finite logarithm, for 0 ln 0 = 0
    terms = (1.0 + d) * np.log1p(d) + (1.0 - d) * np.log1p(-below_one)
    values: Array = 0.25 * (both * terms).sum(axis=1)
    return values


# Weights for classes or bins


def importance_table(counts_row: npt.ArrayLike, target: npt.ArrayLike, clip: float | None = None) -> Array:
    """Return weights per bin that take one rank's distribution to a chosen one.

    With p the distribution of `counts_row` and q that of `target`, the weight of a bin is w = q / p
    (Horvitz and Thompson 1952; Shimodaira, "Improving predictive inference under covariate shift", 2000),
    clipped at `clip`, and then normalised so that the mean weight of the rank's data, sum p w, stays 1. The
    normalisation comes last: a weight may end above `clip`, but their ratios keep to it.

    Args:
        counts_row: one rank's weighted target histogram, shape (bins,).
        target: the distribution to reach, shape (bins,), finite and >= 0; need not sum to 1.
        clip: bound of q / p before the normalisation, >= 1; None for no bound. It trades bias for variance:
            see :func:`effective_sample_size`.

    Returns:
        Shape (bins,), finite and >= 0. A bin that the rank does not have gets 1: q / p would be infinite, and
        should an element turn up there before the next table, it counts as it would without weights instead
        of outvoting all others. All ones where `target` has no mass on anything the rank has, for then no
        weights lead there, and for a rank or a target without data.

    Raises:
        ConfigError: a bad count, or `clip` below 1.
        ShapeError: arrays of other shapes.

    >>> importance_table([30, 10], [0.5, 0.5]).round(3).tolist()
    [0.667, 2.0]
    """
    row = _checked("counts_row", counts_row, ("bin",), hint=_COUNTS_HINT)
    q = _checked("target", target, ("bin",), hint="give the share of every bin")
    _same_length("target", q, "counts_row", row)
    limit = math.inf
    if clip is not None:
        limit = _number("clip", clip, 1.0, math.inf, ">= 1", "pass clip=None for weights without a bound")
    p, q = _distribution(row), _distribution(q)
    have = p >= _NOTHING
    shared = have & (q >= _NOTHING)
    weights = np.ones_like(p)
    if not shared.any():
        return weights
    weights[have] = 0.0
    weights[shared] = np.minimum(q[shared] / p[shared], limit)
    weights[have] /= (p[have] * weights[have]).sum()
    return weights


def effective_sample_size(counts_row: npt.ArrayLike, table: npt.ArrayLike) -> float:
    """Return which fraction of a rank's elements weights leave effective: (sum p w)^2 / sum p w^2.

    Kish's design effect ("Survey Sampling", 1965), with p the distribution of `counts_row` and w the weights
    of `table`: 1 for equal weights; at 0.1 the weighted mean is as noisy as one of a tenth of the elements.

    Args:
        counts_row: one rank's weighted target histogram, shape (bins,).
        table: a weight per bin, shape (bins,), finite and >= 0.

    Returns:
        A fraction in (0, 1]; 1 for a rank without data. Only where the weights are 0 on everything the rank
        has is it 0: nothing is left.

    Raises:
        ConfigError: a bad count or weight.
        ShapeError: arrays of other shapes.
    """
    row = _checked("counts_row", counts_row, ("bin",), hint=_COUNTS_HINT)
    w = _checked("table", table, ("bin",), hint="tables come from importance_table or balance_table")
    _same_length("table", w, "counts_row", row)
    p = _distribution(row)
    have = p > 0
    if not have.any():
        return 1.0
    p, w = p[have], w[have]
    top = float(w.max())
    if top == 0:
        return 0.0
    w = w / top  # the fraction does not depend on the scale, and squares of small numbers would vanish
    first, second = float((p * w).sum()), float((p * w * w).sum())
    return min(1.0, first * (first / second))


def balance_table(counts: npt.ArrayLike, kind: str, beta: float = 0.999) -> Array:
    """Return class weights from global counts, with mean weight 1 over the data.

    - ``"inverse"``: w_c proportional to 1 / n_c: every class that was seen weighs the same.
    - ``"effective"``: w_c proportional to (1 - beta) / (1 - beta^n_c), the inverse of the effective number of
      samples (Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019): equal
      weights at beta = 0, the inverse frequency as beta goes to 1. n_c is the count itself, not its share.

    Args:
        counts: the global weighted histogram, shape (bins,), finite and >= 0.
        kind: one of :data:`BALANCES`.
        beta: of ``"effective"``, in [0, 1).

    Returns:
        Shape (bins,), finite and > 0, such that sum n_c w_c / sum n_c = 1. A class that was not seen gets the
        largest weight of those seen: it is at least as rare as the rarest. All ones without data.

    Raises:
        ConfigError: an unknown kind, a bad count, `beta` outside [0, 1).
        ShapeError: `counts` has not one axis.

    >>> balance_table([8, 2, 0], "inverse").tolist()
    [0.625, 2.5, 2.5]
    """
    if kind not in BALANCES:
        raise ConfigError(f"kind={kind!r} is not known; choose one of {', '.join(map(repr, BALANCES))}")
    n = _checked("counts", counts, ("bin",), hint=_COUNTS_HINT)
    below_one = math.nextafter(1.0, 0.0)
    beta = _number(
        "beta", beta, 0.0, below_one, "at least 0 and below 1", 'kind="inverse" is what 1 would lead to'
    )
    p = _distribution(n)
    seen = p >= _NOTHING
    if not seen.any():
        return np.ones_like(p)
    number = p[seen]  # of samples, effective ones, up to a factor
    if kind == "effective":
        rate = -math.log(beta) if beta > 0 else math.inf
        with np.errstate(over="ignore"):
            exponent = n[seen] * rate
        # 1 - beta^n without the cancellation. For exponents so small that it is n itself, p has the digits.
        if float(exponent.max()) >= _NOTHING:
            number = -np.expm1(-exponent)
    weights = np.full_like(p, 1.0 / number.min())
    weights[seen] = 1.0 / number
    return weights / float((p * weights).sum())


# Weights for ranks


def _ranks(q: npt.ArrayLike, losses: npt.ArrayLike) -> tuple[Array, Array]:
    """Return the distribution over ranks, and their losses with NaN replaced by the mean of the others."""
    hint = "start from equal shares, np.full(ranks, 1 / ranks)"
    shares = _checked("q", q, ("rank",), hint=hint)
    values = _losses(losses)
    _same_length("losses", values, "q", shares)
    if not shares.any():
        raise ConfigError(f"q={shares.tolist()} has no share above 0; {hint}")
    absent = np.isnan(values)
    present = values[~absent]
    # Divided before it is summed: losses near the largest float must not overflow.
    mean = float((present / len(present)).sum()) if len(present) else 0.0
    return _distribution(shares), np.where(absent, mean, values)


def _losses(losses: npt.ArrayLike) -> Array:
    """Return the losses of the ranks, NaN for a rank without data."""
    hint = "pass NaN for a rank without data"
    return _checked("losses", losses, ("rank",), hint=hint, signed=True, nan=True)


def _step(step: float) -> float:
    """Return a step size that can be used."""
    return _number("step", step, 0.0, _LARGEST, "finite and >= 0", "0 leaves the distribution as it is")


def exponentiated_gradient(q: npt.ArrayLike, losses: npt.ArrayLike, step: float) -> Array:
    """Return group DRO's update of a distribution over ranks: q_k exp(step * L_k), normalised.

    Sagawa et al., "Distributionally robust neural networks for group shifts", ICLR 2020, algorithm 1. Ranks
    with larger losses gain; a share that has become 0 stays 0.

    Args:
        q: the shares of the ranks, shape (ranks,), finite and >= 0; need not sum to 1.
        losses: their losses, shape (ranks,). NaN for a rank without data, which is treated as if its loss
            were the plain mean of the others' (all NaN: nothing changes).
        step: how fast, in 1 / loss, finite and >= 0.

    Returns:
        A distribution, shape (ranks,). Overflows for no loss and no step.

    Raises:
        ConfigError: a bad share or step, no share above 0, an infinite loss.
        ShapeError: arrays of other shapes.
    """
    step = _step(step)
    shares, values = _ranks(q, losses)
    alive = shares > 0
    top = values[alive].max()
    with np.errstate(over="ignore"):
        behind = np.maximum(values[alive] - top, -_LARGEST)  # finite, so that step 0 gives 0
        # In logarithms: the rank with the top loss may have a share so small that others only vanish
        # beside exp(0), not beside its share.
        logits = np.log(shares[alive]) + step * behind
    raised = np.exp(logits - logits.max())
    new = np.zeros_like(shares)
    new[alive] = raised / raised.sum()
    return new


def agnostic_ascent(q: npt.ArrayLike, losses: npt.ArrayLike, step: float) -> Array:
    """Return agnostic federated learning's update of a distribution over ranks: q + step * L, projected.

    Mohri, Sivek and Suresh, "Agnostic federated learning", ICML 2019, algorithm 1: gradient ascent on the
    simplex. Other than in :func:`exponentiated_gradient`, a share may become 0 and come back.

    Args:
        q: the shares of the ranks, shape (ranks,), finite and >= 0; need not sum to 1.
        losses: their losses, shape (ranks,); NaN as in :func:`exponentiated_gradient`.
        step: how far, in 1 / loss, finite and >= 0.

    Returns:
        A distribution, shape (ranks,).

    Raises:
        ConfigError: a bad share or step, no share above 0, an infinite loss.
        ShapeError: arrays of other shapes.
    """
    step = _step(step)
    shares, values = _ranks(q, losses)
    with np.errstate(over="ignore"):
        behind = np.maximum(values - values.max(), -_LARGEST)
        # The projection does not see a shift of all entries; what falls 2 behind has no share anyway.
        return project_simplex(shares + np.maximum(step * behind, -2.0))


def project_simplex(v: npt.ArrayLike) -> Array:
    """Return the distribution nearest to `v` in Euclidean distance.

    Duchi et al., "Efficient projections onto the l1-ball for learning in high dimensions", ICML 2008, fig. 1.

    Args:
        v: shape (entries,), at least one, all finite.

    Returns:
        Shape (entries,), >= 0, with sum 1 (to rounding).

    Raises:
        ConfigError: an entry is not finite, or there is none.
        ShapeError: `v` has not one axis.
    """
    array = _checked("v", v, ("entry",), hint="a projection needs finite numbers", signed=True)
    if not len(array):
        raise ConfigError("v=[] has no entries, and a distribution needs one; pass at least one")
    with np.errstate(over="ignore"):
        # The result does not change with a shift; -inf, where the difference overflows, gets nothing.
        x = array - array.max()
    ordered = np.sort(x)[::-1]
    thresholds = (np.cumsum(ordered) - 1.0) / np.arange(1, len(x) + 1)
    threshold = thresholds[np.flatnonzero(ordered > thresholds)[-1]]
    nearest = np.maximum(x - threshold, 0.0)
    projected: Array = nearest / nearest.sum()
    return projected


def q_fair(losses: npt.ArrayLike, q: float) -> Array:
    """Return q-FFL's relative weights of ranks, L_k^q, normalised to mean 1.

    Li et al., "Fair resource allocation in federated learning", ICLR 2020: the gradient of
    sum p_k L_k^(q + 1) / (q + 1) is that of every rank times L_k^q. A rank with a larger loss counts more;
    q = 0 is the ordinary mean, and large q looks at the worst rank only.

    Args:
        losses: of the ranks, shape (ranks,). Negative ones count as 0 (rounding; the method is for losses
            >= 0). NaN for a rank without data: its factor is 1 and it has no say in the others'.
        q: the exponent, finite and >= 0.

    Returns:
        Shape (ranks,), >= 0, with mean 1. All ones if q or all losses are 0.

    Raises:
        ConfigError: a bad `q`, an infinite loss.
        ShapeError: `losses` has not one axis.
    """
    q = _number("q", q, 0.0, _LARGEST, "finite and >= 0", "0 is the ordinary mean")
    values = _losses(losses)
    factors = np.ones_like(values)
    present = ~np.isnan(values)
    clipped = np.maximum(values[present], 0.0)
    top = clipped.max(initial=0.0)
    if top == 0:
        return factors
    raised = (clipped / top) ** q  # at most 1, where L^q would overflow; 0^0 = 1
    factors[present] = raised / raised.mean()
    return factors


# Bins for real targets


def pooled_edges(sketches: npt.ArrayLike, sizes: npt.ArrayLike, bins: int) -> Array:
    """Return inner bin edges that cut the data of all ranks into bins of nearly equal weight.

    Each rank describes its data by a *sketch*: its own quantiles at evenly spaced probabilities from 0 to 1
    (``np.quantile(targets, np.linspace(0, 1, points))``), read as a distribution that is uniform between
    neighbouring quantiles. The edges are the quantiles 1/bins, ..., (bins - 1)/bins of the ranks' mixture.
    For one rank, or ranks with equal sketches, they interpolate the sketch; in general they err by at most
    about half a step of the sketches, 1 / (2 (points - 1)), in probability.

    Bin i is meant to hold ``edges[i - 1] <= x < edges[i]`` (``np.searchsorted(edges, x, side="right")``), so
    that a value which many elements have gets a bin of its own.

    Args:
        sketches: shape (ranks, points), points >= 2; rows of size 0 may hold anything. The others are sorted,
            as interpolated quantiles may be out of order in the last digit.
        sizes: number of elements (or weight) that each row stands for, shape (ranks,), finite and >= 0.
        bins: number of bins, >= 1.

    Returns:
        Strictly ascending edges, shape (bins - 1,), in target units. Where quantiles coincide (few distinct
        values), the next edge is the next larger float64. Without data, evenly spaced in [-1, 1].

    Raises:
        ConfigError: `bins` below 1, a bad size, a quantile that is not finite or beyond 1e300.
        ShapeError: arrays of other shapes, or sketches of fewer than two points.
    """
    bins = _whole("bins", bins, "1 puts everything into one bin")
    hint = "set the size of a rank without data to 0"
    weight = _checked("sizes", sizes, ("rank",), hint=hint)
    try:
        table = np.asarray(sketches, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"sketches={sketches!r} is not an array of numbers; {hint}") from None
    if table.ndim != 2 or table.shape[1] < 2:
        raise ShapeError(
            f"sketches has shape {table.shape} but must have shape (ranks, points) with at least 2 points"
        )
    _same_length("sizes", weight, "sketches", table)
    used = weight > 0
    if not used.any():
        return np.linspace(-1.0, 1.0, bins + 1)[1:-1]
    table = _checked(
        "sketches", np.where(used[:, None], table, 0.0), ("rank", "point"), hint=hint, signed=True
    )
    beyond = np.abs(table).max(axis=1) > _TARGET_LIMIT
    if beyond.any():
        raise ConfigError(
            f"sketches at rank {int(np.argmax(beyond))} reaches beyond {_TARGET_LIMIT}; "
            "give the targets in a larger unit"
        )
    edges = _mixture_quantiles(_refined(np.sort(table[used], axis=1)), _distribution(weight[used]), bins)
    for i in range(1, len(edges)):
        if edges[i] <= edges[i - 1]:
            edges[i] = np.nextafter(edges[i - 1], np.inf)
    return edges


def _refined(rows: Array) -> Array:
    """Return the sketches with points interpolated between theirs, while they are few.

    Which makes the error of :func:`_mixture_quantiles`, half a step, matter for no number of ranks: it is
    small for few of them, and for many their errors are independent.
    """
    ranks, points = rows.shape
    parts = min(_FINE_PARTS, _FINE_POINTS // (ranks * (points - 1)))
    if parts < 2:
        return rows
    left, right = rows[:, :-1, None], rows[:, 1:, None]
    fine = np.minimum(left + (right - left) * (np.arange(parts) / parts), right)
    return np.concatenate([fine.reshape(ranks, -1), rows[:, -1:]], axis=1)


def _mixture_quantiles(rows: Array, share: Array, bins: int) -> Array:
    """Return the quantiles of a mixture of sketches: sort all points, add up what they stand for.

    A point stands for half of the step before it and half of the step after it, so that the cumulative
    weight at a point is what lies before it and half of its own. Steps between equal points are *solid*: the
    cumulative weight jumps there, and all probabilities within the jump have this value as their quantile.
    """
    step = share / (rows.shape[1] - 1)
    weight = np.repeat(step[:, None], rows.shape[1], axis=1)
    weight[:, [0, -1]] *= 0.5
    values, index = np.unique(rows.ravel(), return_inverse=True)
    own = np.bincount(index, weights=weight.ravel(), minlength=len(values))
    which, where = np.nonzero(rows[:, 1:] == rows[:, :-1])
    solid = np.bincount(index.reshape(rows.shape)[which, where], weights=step[which], minlength=len(values))
    middle = np.cumsum(own) - 0.5 * own
    start, stop = middle - 0.5 * solid, middle + 0.5 * solid
    # Nothing lies outside the extremes: half of their steps is not before the smallest or after the largest.
    start[0], stop[0] = 0.0, solid[0]
    start[-1], stop[-1] = 1.0 - solid[-1], 1.0
    knots = np.maximum.accumulate(np.stack([start, stop], axis=1).ravel())
    quantiles = np.interp(np.arange(1, bins) / bins, knots, np.repeat(values, 2))
    return np.clip(quantiles, values[0], values[-1])


def bin_positions(edges: npt.ArrayLike, low: float, high: float) -> Array:
    """Return a representative position for every bin: the middle between its edges.

    Args:
        edges: inner edges, shape (bins - 1,), ascending, as of :func:`pooled_edges`.
        low: the smallest target of all ranks, which bounds the first bin.
        high: the largest, which bounds the last. Where an edge lies beyond them, it bounds the bin instead.

    Returns:
        Shape (bins,), ascending (neighbours may be equal), in target units: the `positions` of
        :func:`divergences`.

    Raises:
        ConfigError: something is not finite, edges that do not ascend, `low` above `high`.
        ShapeError: `edges` has not one axis.

    >>> bin_positions([0.0, 2.0], -1.0, 6.0).tolist()
    [-0.5, 1.0, 4.0]
    """
    inner = _checked("edges", edges, ("edge",), hint="edges come from pooled_edges", signed=True)
    falls = inner[1:] < inner[:-1]
    if falls.any():
        i = int(np.argmax(falls))
        raise ConfigError(
            f"edges falls from {float(inner[i])} (edge {i}) to {float(inner[i + 1])}; "
            "give it in ascending order"
        )
    hint = "without data pass -1 and 1, as pooled_edges does"
    low = _number("low", low, -_LARGEST, _LARGEST, "finite", hint)
    high = _number("high", high, -_LARGEST, _LARGEST, "finite", hint)
    if low > high:
        raise ConfigError(f"low={low} is above high={high}; pass the smallest and the largest target")
    lowest, highest = inner.min(initial=low), inner.max(initial=high)
    bounds = np.concatenate([[lowest], inner, [highest]])
    left, right = bounds[:-1], bounds[1:]
    # Halved first, as the sum could overflow; half of a subnormal number may round out of the bin.
    positions: Array = np.clip(0.5 * left + 0.5 * right, left, right)
    return positions


# Over time


class Window:
    """A sum of arrays over steps that forgets: the last `steps` of them, or with a half-life.

    The sliding sum never subtracts. What was added since the last renewal has a running sum; what was there
    before has the sums of its last 1, 2, ... arrays, made once at the renewal, of which the largest is
    dropped at every step ("two stacks"). So the total is always a sum of arrays >= 0: never negative, and
    within some ``steps * 1e-16`` of the exact one however large what was forgotten. Per step it costs two
    additions on average; it holds at most ``steps + 1`` arrays.

    Args:
        steps: a sliding window: the total is the sum of the last `steps` arrays, >= 1.
        half_life: a decaying window: an array that was added `half_life` arrays ago counts half, > 0.

    Raises:
        ConfigError: not exactly one of the two, or a value that cannot be used.

    >>> window = Window(steps=2)
    >>> for array in ([1, 0], [2, 5], [3, 0]):
    ...     window.add(array)
    >>> window.total.tolist(), window.count
    ([5.0, 5.0], 2)
    """

    def __init__(self, steps: int | None = None, half_life: float | None = None) -> None:
        if (steps is None) == (half_life is None):
            raise ConfigError(
                f"steps={steps!r} and half_life={half_life!r}: a window needs exactly one of them; "
                "steps=100 keeps the last 100 arrays, half_life=50 lets them fade"
            )
        self.steps = None if steps is None else _whole("steps", steps, "100 is a usual window")
        self.half_life: float | None = None
        if half_life is not None:
            tiny = math.ulp(0.0)
            self.half_life = _number(
                "half_life", half_life, tiny, _LARGEST, "finite and > 0", "50 is a usual half-life"
            )
        self._shape: tuple[int, ...] | None = None
        self._count = 0
        self._sum: Array | None = None  # of _fresh; of everything, decayed, with a half-life
        self._fresh: list[Array] = []  # arrays since the last renewal
        self._suffixes: list[Array] = []  # sums of the last 1, 2, ... arrays before it

    def from_state_dict(self, state: Mapping[str, Any]) -> Window:
        """Return a window of the same kind with this :meth:`state_dict`."""
        new = Window(self.steps, self.half_life)
        new.load_state_dict(state)
        return new

    @property
    def total(self) -> Array | None:
        """The sum, a new array; None before the first array."""
        if not self._suffixes:
            return None if self._sum is None else self._sum.copy()
        return self._suffixes[-1].copy() if self._sum is None else self._suffixes[-1] + self._sum

    @property
    def count(self) -> int:
        """How many arrays the total holds; with a half-life, how many were ever added."""
        return self._count

    def add(self, array: npt.ArrayLike) -> None:
        """Add the array of one step: any shape, but always the same; finite and >= 0. It is copied.

        Raises:
            ConfigError: an entry is negative or not finite.
            ShapeError: another shape than before.
        """
        dims = tuple("axis" for _ in np.shape(array))
        new = _checked("array", array, dims, hint="add counts, weights or times").copy()
        if self._shape is not None and new.shape != self._shape:
            raise ShapeError(
                f"array has shape {new.shape} but this window holds arrays of shape {self._shape}; "
                "start another window for another shape"
            )
        self._shape = new.shape
        if self.half_life is not None:
            self._sum = new if self._sum is None else self._sum * 0.5 ** (1.0 / self.half_life) + new
            self._count += 1
            return
        if self._count == self.steps:
            if not self._suffixes:
                self._renew()
            self._suffixes.pop()
            self._count -= 1
        self._fresh.append(new)
        self._sum = new if self._sum is None else self._sum + new
        self._count += 1

    def _renew(self) -> None:
        """Turn the arrays since the last renewal into sums of their last 1, 2, ..."""
        running: Array | None = None
        while self._fresh:
            latest = self._fresh.pop()
            running = latest if running is None else running + latest
            self._suffixes.append(running)
        self._sum = None

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as plain numbers and lists, ready for JSON, for :meth:`load_state_dict`."""
        return {
            "steps": self.steps,
            "half_life": self.half_life,
            "count": self._count,
            "shape": None if self._shape is None else list(self._shape),
            "sum": None if self._sum is None else self._sum.ravel().tolist(),
            "fresh": [one.ravel().tolist() for one in self._fresh],
            "suffixes": [one.ravel().tolist() for one in self._suffixes],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a :meth:`state_dict`, bitwise.

        Raises:
            ConfigError: the state is of a window with another `steps` or `half_life`, or not a state. Nothing
                has changed then.
        """
        try:
            kind = (state["steps"], state["half_life"])
            count, shape = int(state["count"]), state["shape"]
            shape = None if shape is None else tuple(int(n) for n in shape)
            arrays = {
                name: [np.array(one, dtype=np.float64).reshape(shape or ()) for one in many]
                for name, many in {
                    "sum": [] if state["sum"] is None else [state["sum"]],
                    "fresh": state["fresh"],
                    "suffixes": state["suffixes"],
                }.items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"state is not what Window.state_dict() returns ({type(error).__name__}: {error}); "
                "start a new window if it is lost"
            ) from None
        if kind != (self.steps, self.half_life):
            raise ConfigError(
                f"state is of a window with steps={kind[0]} and half_life={kind[1]}, but this one has "
                f"steps={self.steps} and half_life={self.half_life}; "
                "make the window with the same, or start a new one"
            )
        self._shape, self._count = shape, count
        self._sum = arrays["sum"][0] if arrays["sum"] else None
        self._fresh, self._suffixes = arrays["fresh"], arrays["suffixes"]
