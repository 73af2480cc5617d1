"""Softmax cross-entropy whose classes lie on several ranks: who holds which, and the formulas.

Every rank of a group holds the same samples and some columns of their logits. With z the logits of a
sample, m_k the largest on rank k, s_k = sum_c exp(z_c - m_k) over that rank's columns, y the target:

    M = max_k m_k
    log sum_c exp(z_c) = M + log sum_k s_k exp(m_k - M)
    loss = (that) - z_y

so that a rank sends the others two or three numbers per sample, and none of its logits. All ranks then know
the loss, and each knows the softmax of its own columns, which is all that its gradient needs (the scheme
of Megatron-LM, Shoeybi et al. 2019, section 3). The numbers of all ranks are exchanged in one all-gather, in
which the ranks also find out whether they were called alike.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hvdloss.errors import AgreementError, ConfigError, ShapeError
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.losses.reduction import ArrayOps
from hvdloss.split.parts import Parts

__all__ = [
    "ArcFace",
    "ClassShards",
    "CosFace",
    "Margin",
    "NumpyRowOps",
    "Part",
    "RowOps",
    "ShardedSoftmax",
    "check_headers",
    "headers_of",
    "sample_columns",
]

_HASH = 2**24  # numbers below it are exact in float32
_FIELDS = ("length", "elements", "columns", "outside", "example", "missing", "targets", "settings")
HEADER = len(_FIELDS)


@dataclass(frozen=True, init=False)
class ClassShards(Parts):
    """How classes lie on the ranks of a process set: one range after the other.

    Args:
        classes: their number.
        ranks: number of ranks that share them.
        sizes: number on each rank; None for even parts, where the first ones get the remainder.

    Raises:
        ConfigError: sizes that do not fit, or a rank without a class.

    >>> shards = ClassShards(10, 4)
    >>> shards.sizes, shards.offset(2), shards.size(2), shards.owner(6)
    ((3, 3, 2, 2), 6, 2, 2)
    """

    def __init__(self, classes: int, ranks: int = 1, sizes: Sequence[int] | None = None) -> None:
        super().__init__(classes, ranks, sizes, noun="classes")

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return self.count

    def owner(self, label: int) -> int:
        """Return the rank that holds a class.

        Raises:
            ConfigError: there is no such class.
        """
        if not 0 <= label < self.classes:
            raise ConfigError(f"class {label!r} is not one of 0 to {self.classes - 1}")
        return next(rank for rank in range(self.ranks) if label < self.offset(rank) + self.size(rank))


# -- operations ---------------------------------------------------------------------------------------


class RowOps(ArrayOps, Protocol):
    """More operations that these formulas need from a framework; none carries a gradient.

    A matrix here is (samples, columns), a row (samples,). Operations that "may overwrite" a matrix may work
    in place: it belongs to the caller.
    """

    def scaled_copy(self, x: Any, factor: float) -> Any:
        """Return ``x * factor`` as a new matrix, in a dtype fit for sums."""

    def row_max(self, x: Any) -> Any:
        """Return the largest entry of each row of a matrix."""

    def row_sum(self, x: Any) -> Any:
        """Return the sum of each row of a matrix."""

    def gather_columns(self, x: Any, column: Any) -> Any:
        """Return one entry of each row of a matrix."""

    def scatter_columns(self, x: Any, column: Any, where: Any, value: Any) -> Any:
        """Return a matrix with one entry of each row replaced, where `where` holds; may overwrite `x`."""

    def subtract_rows(self, x: Any, row: Any, own: bool) -> Any:
        """Return a matrix minus one number per row, in the dtype of `row`; may overwrite `x` if `own`."""

    def scale_rows(self, x: Any, row: Any) -> Any:
        """Return a matrix times one number per row; may overwrite `x`."""

    def exp_inplace(self, x: Any) -> Any:
        """Return the exponential; may overwrite `x`."""

    def mask_rows(self, x: Any, present: Any) -> Any:
        """Return a matrix with zeros in rows that are not `present`; may overwrite `x`."""

    def find_columns(self, columns: Any, index: Any) -> tuple[Any, Any]:
        """Return the position of each `index` in the ascending `columns`, int64, and whether it is there.

        A valid position also where it is not.
        """

    def element_indices(self, x: Any) -> Any:
        """Return 0, 1, 2, ... for a vector, int64."""

    def first_where(self, x: Any, condition: Any) -> Any:
        """Return the first entry of a vector where `condition` holds, float64; 0 without any."""

    def maximum(self, x: Any, y: Any) -> Any:
        """Return the larger, elementwise; NaN where either is."""


class NumpyRowOps(NumpyOps):
    """:class:`RowOps` for NumPy: the reference."""

    def scaled_copy(self, x: Any, factor: float) -> Any:
        """Multiply."""
        x = np.asarray(x)
        return x * np.asarray(factor, dtype=self.losses(x[:0]).dtype)

    def row_max(self, x: Any) -> Any:
        """Find."""
        return x.max(-1)

    def row_sum(self, x: Any) -> Any:
        """Sum."""
        return x.sum(-1)

    def gather_columns(self, x: Any, column: Any) -> Any:
        """Index."""
        return np.take_along_axis(x, column[:, None], -1)[:, 0]

    def scatter_columns(self, x: Any, column: Any, where: Any, value: Any) -> Any:
        """Set in place."""
        at = np.flatnonzero(where)
        x[at, column[at]] = value[at]
        return x

    def subtract_rows(self, x: Any, row: Any, own: bool) -> Any:
        """Subtract."""
        return np.subtract(x, row[:, None], out=x if own else None)

    def scale_rows(self, x: Any, row: Any) -> Any:
        """Multiply in place."""
        return np.multiply(x, row[:, None], out=x)

    def exp_inplace(self, x: Any) -> Any:
        """Compute in place."""
        return np.exp(x, out=x)

    def mask_rows(self, x: Any, present: Any) -> Any:
        """Set in place."""
        x[~present] = 0
        return x

    def find_columns(self, columns: Any, index: Any) -> tuple[Any, Any]:
        """Search."""
        at = np.minimum(np.searchsorted(columns, index), len(columns) - 1)
        return at, columns[at] == index

    def element_indices(self, x: Any) -> Any:
        """Count."""
        return np.arange(len(x), dtype=np.int64)

    def first_where(self, x: Any, condition: Any) -> Any:
        """Find."""
        return np.float64(x[np.argmax(condition)] if np.any(condition) else 0)

    def maximum(self, x: Any, y: Any) -> Any:
        """Compare."""
        return np.maximum(x, y)


# -- margins ------------------------------------------------------------------------------------------


class Margin(Protocol):
    """What makes the target's cosine harder to reach."""

    def apply(self, ops: ArrayOps, cosine: Any) -> tuple[Any, Any]:
        """Return what stands for the target's cosine, and its derivative."""


@dataclass(frozen=True)
class CosFace:
    """An additive cosine margin: cos(theta) - m for the target (Wang et al. 2018, CosFace).

    >>> CosFace(0.25)
    CosFace(margin=0.25)
    """

    margin: float = 0.35

    def __post_init__(self) -> None:
        """Check."""
        _finite("margin", self.margin)

    def apply(self, ops: ArrayOps, cosine: Any) -> tuple[Any, Any]:
        """Return cos(theta) - m, and 1."""
        return cosine - self.margin, ops.ones_like(cosine)


@dataclass(frozen=True)
class ArcFace:
    """An additive angular margin: cos(theta + m) for the target (Deng et al. 2019, ArcFace).

    Where theta + m would be more than pi and cos(theta + m) rise again, cos(theta) - m sin(m) stands for
    it, as in the authors' program. The derivative at theta = 0 is infinite; it is cut off at 1e4 times
    sin(m).
    """

    margin: float = 0.5

    def __post_init__(self) -> None:
        """Check."""
        _finite("margin", self.margin)
        if not 0 <= self.margin < math.pi:
            raise ConfigError(f"margin={self.margin!r} is an angle of at least 0 and less than pi")

    def apply(self, ops: ArrayOps, cosine: Any) -> tuple[Any, Any]:
        """Return cos(theta + m) and its derivative by cos(theta), sin(theta + m) / sin(theta)."""
        cos_m, sin_m = math.cos(self.margin), math.sin(self.margin)
        one = ops.ones_like(cosine)
        squared = (one - cosine) * (one + cosine)  # below 0 where a cosine was rounded to more than 1
        sine = ops.sqrt(ops.where(squared > 0, squared, ops.zeros_like(cosine)))
        inside = cosine > -cos_m  # theta + m < pi
        value = ops.where(inside, cosine * cos_m - sine * sin_m, cosine - self.margin * sin_m)
        safe = ops.where(sine > 1e-4, sine, one * 1e-4)
        return value, ops.where(inside, cos_m + cosine / safe * sin_m, one)


def _finite(name: str, value: float) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} must be a finite number")


# -- the loss -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What a rank computes of a batch before it knows of the others, and keeps for its gradient.

    Attributes:
        powers: exp(z - m_k), (N, columns of this rank).
        column: of each target among this rank's columns, (N,) int64; 0 for others' targets.
        here: whether this rank has the target's column, (N,).
        present: whether the element counts, (N,).
        slope: of the target's logit by what was given, (N,); None for 1.
        highest: m_k, -inf where all logits are, (N,).
        message: to the other ranks, a vector.
    """

    powers: Any
    column: Any
    here: Any
    present: Any
    slope: Any
    highest: Any
    message: Any


@dataclass(frozen=True)
class ShardedSoftmax:
    """The formula of softmax cross-entropy over classes that lie on several ranks.

    Args:
        shards: of the classes.
        label_smoothing: the target distribution is (1 - e) at the target plus e / C everywhere (Szegedy et
            al. 2016), as in ``torch.nn.functional.cross_entropy``.
        margin: :class:`CosFace`, :class:`ArcFace`, one's own, or None; logits then are cosines.
        scale: all logits (after the margin) are multiplied with it.
        ignore_index: targets of this value are absent: loss 0, no gradient.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    shards: ClassShards
    label_smoothing: float = 0.0
    margin: Margin | None = None
    scale: float = 1.0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        """Check."""
        if not 0 <= self.label_smoothing <= 1:
            raise ConfigError(f"label_smoothing={self.label_smoothing!r} must be from 0 to 1")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"scale={self.scale!r} must be a finite number above 0")
        if self.margin is not None and not callable(getattr(self.margin, "apply", None)):
            raise ConfigError(
                f"margin={self.margin!r} must be CosFace(m), ArcFace(m), another object with their "
                f"method apply, or None"
            )

    @property
    def rows(self) -> int:
        """Numbers per element that a rank sends to the others."""
        return 4 if self.label_smoothing else 3

    def check_shapes(
        self, logits: Sequence[Any], target: Sequence[Any], columns: int | None, rank: int, size: int
    ) -> None:
        """Raise ShapeError unless shapes fit each other and the ranks (None: an axis known at run time)."""
        if size != self.shards.ranks:
            raise ShapeError(
                f"the classes are sharded over {self.shards.ranks} rank(s), but the process set has {size}; "
                f"give both the same ranks (rank {rank})"
            )
        if columns == 0:
            raise ShapeError(f"columns= is empty (rank {rank}); every rank needs at least one column")
        wanted = self.shards.size(rank) if columns is None else columns
        if not logits or logits[-1] not in (wanted, None):
            what = "columns were given" if columns is not None else "classes lie here"
            raise ShapeError(
                f"logits of shape {tuple(logits)}: the last axis must be this rank's columns, of which "
                f"{wanted} {what} (rank {rank})"
            )
        fits = len(target) == len(logits) - 1 and all(
            a == b or a is None or b is None for a, b in zip(target, logits[:-1], strict=True)
        )
        if not fits:
            raise ShapeError(
                f"target of shape {tuple(target)} does not fit logits of shape {tuple(logits)}: it must have "
                f"their axes but the last, {tuple(logits[:-1])} (rank {rank})"
            )

    def _fingerprint(self) -> int:
        margin: Any = self.margin
        if not isinstance(margin, CosFace | ArcFace | None):  # its repr may have a memory address
            margin = type(margin).__qualname__
        settings = (self.shards, self.label_smoothing, margin, self.scale, self.ignore_index)
        return zlib.crc32(repr(settings).encode()) % _HASH

    def part(self, ops: RowOps, logits: Any, target: Any, rank: int, columns: Any = None) -> Part:
        """Return what this rank knows of a batch.

        Args:
            ops: the framework's operations.
            logits: (N, C_k), of this rank's columns.
            target: (N,) int64, of all classes.
            rank: this one's, among those that share the classes.
            columns: which of the rank's columns the logits are of, sorted int64; None for all.
        """
        first, count = self.shards.offset(rank), self.shards.size(rank)
        present = target != self.ignore_index
        outside = present & ((target < 0) | (target >= self.shards.classes))
        local = target - first
        owned = present & (local >= 0) & (local < count)
        if columns is None:
            here, column = owned, ops.where(owned, local, ops.zeros_like(local))
        else:
            column, found = ops.find_columns(columns, local)
            here = owned & found

        shaped, slope = False, None  # whether `z` is a copy already
        z = logits
        if self.margin is not None or self.scale != 1.0:
            z, shaped = ops.scaled_copy(z, self.scale), True
        if self.margin is not None:
            value, slope = self.margin.apply(ops, ops.losses(ops.gather_columns(logits, column)))
            z = ops.scatter_columns(z, column, here, value * self.scale)
        highest = ops.losses(ops.row_max(z))
        zero = ops.zeros_like(highest)
        shift = _shift(ops, highest)
        at_target = ops.where(here, ops.losses(ops.gather_columns(z, column)), zero)
        z = ops.subtract_rows(z, shift, shaped)
        gaps = [ops.row_sum(z) * -1.0] if self.label_smoothing else []
        powers = ops.exp_inplace(z)
        own_rows = [highest, ops.row_sum(powers), at_target, *gaps]

        mixed = ((target % _HASH + 1) * (ops.element_indices(target) * 8191 % _HASH + 1)) % _HASH
        elements = ops.count(target == target)
        header = {
            "length": elements * self.rows + HEADER,
            "elements": elements,
            "columns": ops.scalar64(float(count), target) if columns is None else ops.count(columns >= 0),
            "outside": ops.count(outside),
            "example": ops.first_where(target, outside),
            "missing": ops.count(owned & ~here),
            "targets": ops.sum64(mixed) % _HASH,
            "settings": ops.scalar64(float(self._fingerprint()), target),
        }
        numbers = ops.stack64([header[key] for key in _FIELDS])
        message = ops.concat([ops.cast_like(numbers, highest), *own_rows], 0)
        return Part(powers, column, here, present, slope, highest, message)

    def suspect(self, ops: RowOps, heads: Any) -> Any:
        """Return whether :func:`check_headers` would raise of these headers, (ranks, HEADER)."""
        faults = sum(ops.count(heads[:, _FIELDS.index(key)] != 0) for key in ("outside", "missing"))
        for key in ("length", "elements", "targets", "settings"):
            column = heads[:, _FIELDS.index(key)]
            faults = faults + ops.count(column != column[0])
        return faults > 0

    def losses(self, ops: RowOps, part: Part, messages: Any) -> tuple[Any, Any]:
        """Return per-element losses, and what makes this rank's powers its part of the softmax.

        Args:
            ops: the framework's operations.
            part: this rank's.
            messages: of all ranks, (ranks, length).
        """
        shards = self.shards
        count = self.rows
        rows = [ops.reshape(messages[rank, HEADER:], (count, -1)) for rank in range(shards.ranks)]
        highest = functools.reduce(ops.maximum, (row[0] for row in rows))
        total = sum(row[1] * _power(ops, row[0], highest) for row in rows)
        target = sum(row[2] for row in rows)
        e = self.label_smoothing
        losses = ops.log(total) + (1.0 - e) * (highest - target)
        if e:
            # sum_c (M - z_c), added up without cancellation; columns may have been sampled.
            gaps = sum(
                messages[rank, _FIELDS.index("columns")] * (highest - _shift(ops, row[0])) + row[3]
                for rank, row in enumerate(rows)
            )
            losses = losses + gaps * (e / self.columns(messages))
        factor = _power(ops, part.highest, highest) / total
        return ops.where(part.present, losses, ops.zeros_like(losses)), factor

    def columns(self, messages: Any) -> Any:
        """Return how many columns all ranks have together: a number of the losses' dtype."""
        return sum(messages[rank, _FIELDS.index("columns")] for rank in range(self.shards.ranks))

    def gradient(self, ops: RowOps, part: Part, factor: Any, columns: Any, upstream: Any) -> Any:
        """Return the gradient by this rank's logits, in place of the part's powers where it can.

        Args:
            ops: the framework's operations.
            part: this rank's.
            factor: as :meth:`losses` returned it.
            columns: as :meth:`columns` returned it.
            upstream: the gradient of the losses, (N,).
        """
        e = self.label_smoothing
        upstream = ops.where(part.present, upstream, ops.zeros_like(upstream)) * self.scale
        even = e / columns
        probability = ops.gather_columns(part.powers, part.column) * factor
        at_target = (probability - (1.0 - e) - even) * upstream
        if part.slope is not None:
            at_target = at_target * part.slope
        out = ops.scale_rows(part.powers, factor * upstream)
        if e:
            out = ops.subtract_rows(out, upstream * even, True)
        out = ops.scatter_columns(out, part.column, part.here, at_target)
        return ops.mask_rows(out, part.present)


def _shift(ops: ArrayOps, highest: Any) -> Any:
    """Return what was subtracted from a rank's logits."""
    return ops.where(highest == -math.inf, ops.zeros_like(highest), highest)


def _power(ops: ArrayOps, own: Any, highest: Any) -> Any:
    """Return exp(own - highest); of -inf it is 0, unless `highest` is as well."""
    return ops.exp(own - highest)


def headers_of(flat: npt.NDArray[Any], ranks: int) -> npt.NDArray[Any]:
    """Return what heads each message, (ranks, HEADER), where messages may have different lengths."""
    out = np.zeros((ranks, HEADER))
    at = 0
    for rank in range(ranks):
        part = flat[at : at + HEADER]
        out[rank, : len(part)] = part
        at += max(HEADER, int(out[rank, 0]) if np.isfinite(out[rank, 0]) else 0)
    return out


def check_headers(table: npt.NDArray[Any], rule: ShardedSoftmax, what: str, ranks: Sequence[int]) -> None:
    """Raise, on every rank alike, unless all ranks were called alike with targets that there are.

    Args:
        table: what heads each rank's message, (ranks, HEADER).
        rule: this rank's.
        what: the caller's name.
        ranks: the numbers of the ranks among all, for messages.

    Raises:
        ShapeError: batches of different sizes, or a target's column that was not sampled.
        AgreementError: different targets or arguments.
        ConfigError: a target that is no class.
    """
    headers = [dict(zip(_FIELDS, row, strict=True)) for row in table.tolist()]

    def listed(key: str) -> str:
        return ", ".join(f"rank {r}: {h[key]:.0f}" for r, h in zip(ranks, headers, strict=True))

    if len({h["elements"] for h in headers}) > 1:
        raise ShapeError(
            f"{what}: the ranks that share the classes have different numbers of elements "
            f"({listed('elements')}); they must all have the same batch"
        )
    if len({h["settings"] for h in headers}) > 1:
        raise AgreementError(
            f"{what}: the ranks that share the classes were given different arguments (shards, "
            f"label_smoothing, margin, scale or ignore_index); give all of them the same"
        )
    bad = [(r, h) for r, h in zip(ranks, headers, strict=True) if h["outside"]]
    if bad:
        rank, header = bad[0]
        raise ConfigError(
            f"{what}: {header['outside']:.0f} target(s) on rank {rank} are no class of 0 to "
            f"{rule.shards.classes - 1} (the first is {header['example']:.0f}); mark elements to be left "
            f"out with ignore_index={rule.ignore_index}"
        )
    if len({h["targets"] for h in headers}) > 1:
        raise AgreementError(
            f"{what}: the ranks that share the classes have different targets; they must all have the same "
            f"batch. Give ranks of one model group the same samples"
        )
    lost = [(r, h) for r, h in zip(ranks, headers, strict=True) if h["missing"]]
    if lost:
        rank, header = lost[0]
        raise ShapeError(
            f"{what}: columns= of rank {rank} lack the class of {header['missing']:.0f} target(s); sample "
            f"with this batch's targets, for all of them must be among the columns"
        )


# -- sampling -----------------------------------------------------------------------------------------


def sample_columns(
    target: npt.NDArray[Any], shards: ClassShards, rank: int, rate: float, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return which of a rank's columns take part in a step: all targets', and others by chance.

    Partial FC (An et al. 2021 and 2022): all classes of the batch that this rank holds, and as many others,
    drawn without replacement, as make up `rate` of its columns; none if there are enough already.

    Args:
        target: of the batch, any shape; those that are no class of this rank's are left out.
        shards: of the classes.
        rank: this one's.
        rate: above 0, at most 1.
        random: draws.

    Returns:
        numbers of columns counted within the rank, ascending; at least one.

    Raises:
        ConfigError: `rate` is out of range.

    >>> shards = ClassShards(20, 2)
    >>> sample_columns(np.array([3, 12, 3]), shards, 0, 0.1, np.random.default_rng(0))
    array([3])
    """
    if not 0 < rate <= 1:
        raise ConfigError(f"rate={rate!r} must be above 0 and at most 1")
    size = shards.size(rank)
    local = np.unique(np.asarray(target).reshape(-1)) - shards.offset(rank)
    positive = local[(local >= 0) & (local < size)]
    wanted = max(1, math.ceil(rate * size - 1e-9))
    others = np.setdiff1d(np.arange(size), positive, assume_unique=True)
    more = min(len(others), max(0, wanted - len(positive)))
    drawn = random.choice(others, size=more, replace=False) if more else others[:0]
    return np.sort(np.concatenate([positive, drawn])).astype(np.int64)
