"""Packed sequences: which element belongs to which, and what it weighs in a mean over sequences.

The mean over sequences s of each one's weighted token mean is a weighted mean of tokens,

    L = sum_s u_s (sum_t w l / W_s) / sum_s u_s  =  sum_t c l / sum_t c,    c = u w / W_s,    W_s = sum_t w

with coefficients c that depend on data only. The c of a sequence's pieces add up to u_s wherever they lie,
provided that each piece knows W_s of all of them. So a sequence may be cut by the end of a row, of a
micro-batch or of a rank. A mean over groups of sequences divides once more: c by the sum of c in its group.

:class:`Segments` says what lies in one call, where all pieces are in that call; :class:`Link` finds W_s where
they are not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.errors import ConfigError, ShapeError, WeightError
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.losses.reduction import ArrayOps, broadcast_weights

__all__ = ["Layout", "Link", "LinkedSegments", "Segments", "check_micro_batches"]

CUTS = ("any", "ends")
_SAME = 1e-6  # of weights: a mask in float32 against one in float64
_OPS = NumpyOps()


@dataclass(frozen=True)
class Layout:
    """What the elements of one call belong to; arrays of the losses' shape, without gradient.

    Attributes:
        ids: int64; of the sequence, negative for padding.
        groups: int64; of the group of sequences, negative for padding. None without groups.
        weight: float64; of the sequence. None for all 1.
        fits: a boolean scalar, where that could not be looked at; None where it was.
        coefficients: float64; of the mean over sequences, where sequences are cut. None where they are not.
        linked_weight: the weights that these coefficients were made of.
    """

    ids: Any
    groups: Any = None
    weight: Any = None
    fits: Any = None
    coefficients: Any = None
    linked_weight: Any = None

    def masked(self, ops: ArrayOps, losses: Any, weight: Any, *, per_token: bool, rank: int) -> Any:
        """Return the weights, 0 at padding, in the dtype of the losses.

        Args:
            ops: the framework's operations.
            losses: per-element losses, in a dtype fit for sums.
            weight: None, a number or an array that broadcasts to them.
            per_token: whether weights of sequences are to be multiplied in.
            rank: for messages.

        Weights that cannot be right become NaN where nobody may wait for a device to raise an error. The
        step then raises it.

        Raises:
            ShapeError: `weight` does not broadcast.
            WeightError: not the weights of :attr:`linked_weight`.
        """
        zero = ops.zeros_like(losses)
        w = ops.ones_like(losses) if weight is None else broadcast_weights(ops, weight, losses, rank)
        present = self.ids >= 0
        if self.groups is not None:
            present = present & (self.groups >= 0)
        if self.weight is not None:
            own = ops.cast_like(self.weight, losses)
            present = present & (own != 0)
            sound = (own >= 0) & ops.isfinite(own)
            w = ops.where(sound, w * own if per_token else w, own)  # a bad one is counted as such
        w = ops.where(present, w, zero)
        fits = self.fits
        if self.linked_weight is not None:
            there = ops.where(present, ops.cast_like(self.linked_weight, losses), zero)
            apart = ops.count(abs(w - there) > _SAME * (abs(w) + abs(there)))
            known = ops.host_array(apart)
            if known is not None and known > 0:
                raise WeightError(
                    f"weights of {int(known)} elements are not those that link_segments() was given "
                    f"(rank {rank}), with which the sums of cut sequences were taken. Give it all of an "
                    f"element's weight: 0 where the target is ignored, and times its class's weight"
                )
            fits = apart == 0 if fits is None else fits & (apart == 0)
        if fits is not None:
            w = ops.where(fits, w, w + float("nan"))
        return w

    def shares(self, ops: ArrayOps, w: Any) -> Any:
        """Return the coefficients c of the mean over sequences (or groups) for masked weights, float64."""
        if self.coefficients is not None:
            return ops.where(ops.isfinite(w), self.coefficients, ops.as64(w))
        w = ops.as64(w)
        own = w if self.weight is None else w * self.weight
        shares = _divided(ops, own, ops.segment_totals(self.ids, w))
        return (
            shares if self.groups is None else _divided(ops, shares, ops.segment_totals(self.groups, shares))
        )


def _divided(ops: ArrayOps, x: Any, by: Any) -> Any:
    """Return the quotient; 0 where it would be by 0."""
    there = by != 0
    return ops.where(there, x / ops.where(there, by, ops.ones_like(by)), ops.zeros_like(x))


@dataclass(frozen=True)
class Segments:
    """The sequences of one call's losses.

    Args:
        ids: integers of the losses' shape, equal for the elements of one sequence, wherever they lie in the
            call. A negative id is padding: absent. (Where 0 is padding and sequences count from 1, give
            ``ids - 1``.)
        cu_seqlens: cumulative lengths instead, as attention kernels take them: integers ``(S + 1,)`` from 0
            to the number of losses, in the order of the flattened losses. Without both a row (an index of
            the first axis) is a sequence, as in losses of shape (N, T).
        groups: integers; the sequences of one group (a prompt's answers, say) are averaged first, then
            groups. Of the shape of `ids`, or one for each sequence of `cu_seqlens` ``(S,)`` or row ``(N,)``.
            Negative is padding.
        weight: what a sequence weighs among the others (of its group), at least 0; shapes as of `groups`. Of
            an id whose elements have different ones it is their mean, weighted as the elements are.

    Raises:
        ConfigError: both `ids` and `cu_seqlens`, or what are no integers.
    """

    ids: Any = None
    cu_seqlens: Any = None
    groups: Any = None
    weight: Any = None

    def __post_init__(self) -> None:
        if self.ids is not None and self.cu_seqlens is not None:
            raise ConfigError("ids and cu_seqlens were both given; leave one of them out")
        for name in ("ids", "cu_seqlens", "groups"):
            x = getattr(self, name)
            if x is None:
                continue
            dtype = str(getattr(x, "dtype", None) or np.asarray(x).dtype)
            if not re.search(r"(?<![a-z])u?int(8|16|32|64)", dtype):
                raise ConfigError(f"segments: {name} of dtype {dtype} must be integers")

    @classmethod
    def of(cls, given: Any) -> Segments | LinkedSegments:
        """Return segments as they are, and ids as segments."""
        return given if isinstance(given, Segments | LinkedSegments) else cls(given)

    def arrays(self, convert: Callable[[Any], Any]) -> Segments:
        """Return the same with every array converted."""
        return Segments(**{name: x if x is None else convert(x) for name, x in vars(self).items()})

    # A structure of tensors to TensorFlow, so that it may be an argument of a tf.function.

    def __tf_flatten__(self) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Return which arrays there are, and these."""
        given = {name: x for name, x in vars(self).items() if x is not None}
        return tuple(given), tuple(given.values())

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[str, ...], components: tuple[Any, ...]) -> Segments:
        """Return what :meth:`__tf_flatten__` took apart."""
        return cls(**dict(zip(metadata, components, strict=True)))

    def lay_out(self, ops: ArrayOps, losses: Any, rank: int = 0) -> Layout:
        """Return what each element of the losses belongs to.

        Raises:
            ShapeError: what does not fit the losses.
        """
        shape = ops.shape(losses)
        fits: Any = None
        sequences: Any = None  # how many there are, where they are numbered; None in a graph
        if self.cu_seqlens is not None:
            ids, fits = self._from_lengths(ops, losses, rank)
            count = ops.shape(self.cu_seqlens)[0]
            sequences = None if count is None else count - 1
        elif self.ids is not None:
            _check_shape("ids", ops.shape(self.ids), shape, rank)
            ids = ops.to_int64(ops.on_device_of(self.ids, losses))
        else:
            if len(shape) < 2:
                raise ShapeError(
                    f"segments without ids take each row of the losses as a sequence, but these have shape "
                    f"{shape} (rank {rank}); give ids or cu_seqlens"
                )
            ids = ops.expand_trailing(ops.row_indices(losses), losses)
            sequences = shape[0]

        def of_elements(name: str, x: Any) -> Any:
            if self.ids is not None:
                _check_shape(name, ops.shape(x), shape, rank)
                return ops.on_device_of(x, losses)
            _check_shape(name, ops.shape(x), (sequences,), rank)
            return ops.take(ops.on_device_of(x, losses), ids, sequences)

        groups = None if self.groups is None else ops.to_int64(of_elements("groups", self.groups))
        weight = (
            None if self.weight is None else ops.stop_gradient(ops.as64(of_elements("weight", self.weight)))
        )
        return Layout(ids, groups, weight, fits)

    def _from_lengths(self, ops: ArrayOps, losses: Any, rank: int) -> tuple[Any, Any]:
        """Return ids of cumulative lengths, and whether they fit where that could not be looked at."""
        shape = ops.shape(losses)
        given = ops.shape(self.cu_seqlens)
        if len(given) != 1 or given[0] == 0:
            raise ShapeError(f"cu_seqlens of shape {given} must have shape (sequences + 1,) (rank {rank})")
        if shape.count(None) > 1:
            raise ShapeError(
                f"cu_seqlens with losses of shape {shape} (rank {rank}): at most one axis may be unknown "
                f"while tracing; reshape the losses to (-1,)"
            )
        flat = tuple(-1 if n is None else n for n in shape)
        edges = ops.host_array(self.cu_seqlens)
        known = tuple(n for n in shape if n is not None)
        if edges is not None and len(known) == len(shape):
            count = math.prod(known)
            edges = edges.astype(np.int64)
            if edges[0] != 0 or edges[-1] != count or (np.diff(edges) < 0).any():
                shown = np.array2string(edges, threshold=8, separator=", ")
                raise ShapeError(
                    f"cu_seqlens={shown} must rise from 0 to the number of losses, {count} (rank {rank}); "
                    f"count padding as a sequence of its own, of weight 0"
                )
            ids = np.repeat(np.arange(len(edges) - 1), np.diff(edges)).reshape(known)
            return ops.to_int64(ops.on_device_of(ids, losses)), None
        edges = ops.as64(ops.on_device_of(self.cu_seqlens, losses))
        places = ops.row_indices(ops.reshape(losses, (-1,)))
        fits = (edges[0] == 0) & (edges[-1] == ops.count(places >= 0))
        fits = fits & (ops.count(edges[1:] < edges[:-1]) == 0)
        return ops.reshape(ops.bucketize(places, edges) - 1, flat), fits


def _check_shape(name: str, got: tuple[int | None, ...], want: tuple[int | None, ...], rank: int) -> None:
    if len(got) != len(want) or any(
        m != n and m is not None and n is not None for m, n in zip(got, want, strict=False)
    ):
        what = "one for each loss" if name == "ids" else "one for each id, sequence of cu_seqlens, or row"
        raise ShapeError(f"segments: {name} of shape {got} must have shape {want}, {what} (rank {rank})")


class Link:
    """The sums of sequences whose pieces lie in several micro-batches, or on several ranks.

    Args:
        segments: of this rank's micro-batches of one step, of NumPy arrays.
        weights: of their elements; None, a number or an array for each.
        ranks: whether pieces may lie on other ranks too. Then ids (and groups) are those of all ranks.
        cut: "any" sequence may have pieces on other ranks, or only those at the "ends" of rows (of the last
            axis): the first and the last of each.
        rank: for messages.

    Attributes:
        table: what other ranks must know, int64 ``(pieces, 4)``: the sequence, or -1 for a group's whole
            sequences; its group, or -1; the bits of the float64 sums of w, and of u w. Empty where nothing
            may be cut.
        weights: float64 and flat, by micro-batch; 0 at padding.

    Raises:
        ConfigError, ShapeError: what does not fit.
    """

    def __init__(
        self,
        segments: Sequence[Segments],
        weights: Sequence[Any],
        *,
        ranks: bool = False,
        cut: str = "any",
        rank: int = 0,
    ) -> None:
        self.ranks, self.rank = ranks, rank
        self.weights: list[npt.NDArray[np.float64]] = []
        names, slots, groups, ends = ([np.zeros(0, np.int64)] for _ in range(4))
        own = [np.zeros(0)]
        at = 0
        for one, weight in zip(segments, weights, strict=True):
            ones = np.ones(_shape_of(one, weight, rank))
            layout = one.lay_out(_OPS, ones, rank)
            w = layout.masked(_OPS, ones, weight, per_token=False, rank=rank).ravel()
            self.weights.append(w)
            here, slot = np.unique(layout.ids, return_inverse=True)
            # Rows and cumulative lengths are whole: names that no id has.
            names.append(here if one.ids is not None else -2 - at - np.arange(len(here)))
            slots.append(at + slot.ravel())
            at += len(here)
            groups.append(
                np.full(w.shape, -1) if layout.groups is None else np.asarray(layout.groups).ravel()
            )
            own.append(w if layout.weight is None else w * np.asarray(layout.weight).ravel())
            if one.ids is not None and cut == "ends":
                ends.append(_ends(layout.ids))
        with_groups = {one.groups is not None for one in segments}
        if len(with_groups) > 1:
            raise ConfigError("link_segments(): give groups of all micro-batches, or of none")
        self._grouped = with_groups.pop() if with_groups else None  # None: nothing to be grouped
        # One number for each sequence of this rank, whichever micro-batches its pieces lie in.
        self._names, again = np.unique(np.concatenate(names), return_inverse=True)
        self._slot = again[np.concatenate(slots)]
        self._group, self._own = np.concatenate(groups), np.concatenate(own)
        w = np.concatenate([np.zeros(0), *self.weights])
        self._total = np.bincount(self._slot, w, len(self._names))
        may = self._names >= 0
        self._cut = may & np.isin(self._names, np.concatenate(ends)) if cut == "ends" else may
        if not ranks:
            self._cut = np.zeros_like(self._cut)
        self.table = self._pieces()

    def _pieces(self) -> npt.NDArray[np.int64]:
        """Return the rows of :attr:`table`."""
        cut = self._cut[self._slot]
        present = self._own != 0
        rows = [self._summed(cut & present, self._names[self._slot], self._own)]
        if self.ranks and self._grouped:
            rows.append(self._summed(~cut & present, np.full(len(cut), -1), self._shares(self._total)))
        return np.concatenate(rows)

    def _summed(self, where: Any, names: Any, u: Any) -> npt.NDArray[np.int64]:
        """Return one row for each pair of a name and a group, with the sums of its elements."""
        pairs = np.stack([names[where], self._group[where]], 1).astype(np.int64)
        found, slot = _unique_rows(pairs)
        w = np.concatenate([np.zeros(0), *self.weights])[where]
        sums = np.stack([np.bincount(slot, x, len(found)) for x in (w, u[where])], 1)
        return np.concatenate([found, sums.view(np.int64)], 1)

    def _shares(self, total: Any) -> Any:
        """Return each element's part of its sequence, for sums of these."""
        return _quotient(self._own, total[self._slot])

    def coefficients(self, table: npt.NDArray[np.int64]) -> list[npt.NDArray[np.float64]]:
        """Return the coefficients of the mean over sequences (or groups), flat, by micro-batch.

        Args:
            table: the rows of all ranks' :attr:`table`, one after another; this rank's own without ranks.

        Raises:
            ConfigError: a sequence that is not at an end has a piece on another rank; or other ranks have
                groups, and this one has none, or the other way round.
        """
        if self._grouped is not None and ((table[:, 1] >= 0) != self._grouped).any():
            raise ConfigError(
                f"link_segments(): rank {self.rank} has {'' if self._grouped else 'no '}groups, other ranks "
                f"have {'none' if self._grouped else 'some'}; give groups on all ranks, or on none"
            )
        cut = table[:, 0] >= 0
        w, u = table[:, 2:].copy().view(np.float64).T
        names, slot = np.unique(table[cut, 0], return_inverse=True)
        totals = np.bincount(slot, w[cut], len(names))
        inside = ~self._cut & (self._total != 0)
        lost = self._names[inside][np.isin(self._names[inside], names)]
        if len(lost):
            raise ConfigError(
                f'link_segments(cut="ends"): the sequence {lost[0]} is inside a row of rank {self.rank}, and '
                f'has a piece elsewhere; choose cut="any"'
            )
        shares = self._shares(np.where(self._cut, _found(names, totals, self._names), self._total))
        if self._grouped:
            of, parts = self._group, shares
            if self.ranks:
                of, parts = table[:, 1], u.copy()
                parts[cut] = _quotient(u[cut], totals[slot])
            groups, slot = np.unique(of, return_inverse=True)
            sums = np.bincount(slot, parts, len(groups))
            shares = _quotient(shares, _found(groups, sums, self._group))
        ends = np.cumsum([len(one) for one in self.weights])
        return np.split(shares, ends[:-1]) if len(ends) else []


def _quotient(x: Any, by: Any) -> Any:
    """Return the quotient; 0 where it would be by 0."""
    return np.divide(x, by, out=np.zeros_like(x), where=by != 0)


def _found(names: Any, values: Any, wanted: Any) -> Any:
    """Return the values of wanted names among sorted ones; 0 of those that are not there."""
    at = np.searchsorted(names, wanted)
    names, values = np.append(names, -1), np.append(values, 0.0)
    return np.where(names[at] == wanted, values[at], 0.0)


def _unique_rows(pairs: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.intp]]:
    """Return the different rows of a matrix of two columns, and which each row is."""
    order = np.lexsort(pairs.T[::-1])
    ordered = pairs[order]
    new = np.ones(len(pairs), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    slot = np.empty(len(pairs), np.intp)
    slot[order] = np.cumsum(new) - 1
    return ordered[new], slot


def _shape_of(one: Segments, weight: Any, rank: int) -> tuple[int, ...]:
    """Return the shape of the losses of a micro-batch."""
    if one.ids is not None:
        return np.shape(one.ids)
    if one.cu_seqlens is not None and np.size(one.cu_seqlens):
        return (int(np.ravel(one.cu_seqlens)[-1]),)
    if np.ndim(weight) < 2:
        raise ShapeError(
            f"link_segments(): segments without ids are the rows of their weights, which have shape "
            f"{np.shape(weight)} (rank {rank}); give weights of the losses' shape, (N, T)"
        )
    return np.shape(weight)


def _ends(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the ids of the first and last sequence of each row, padding aside."""
    if not ids.size:
        return ids.ravel()
    rows = ids.reshape(-1, ids.shape[-1] if ids.ndim else 1)
    there = rows >= 0
    rows, there = rows[there.any(1)], there[there.any(1)]
    each = np.arange(len(rows))
    last = rows.shape[1] - 1 - there[:, ::-1].argmax(1)
    return np.concatenate([rows[each, there.argmax(1)], rows[each, last]])


@dataclass(frozen=True)
class LinkedSegments:
    """The sequences of one micro-batch, cut ones with the sums of all their pieces; see `link_segments`.

    Attributes:
        segments: what was given.
        numbers: gives the coefficients and the weights that they were made of, flat arrays; they may have
            to be waited for.
        ranks: whether pieces may lie on other ranks.
    """

    segments: Segments
    numbers: Callable[[], tuple[Any, Any]]
    ranks: bool = False

    def sequences(self) -> float:
        """Return how many sequences these are, cut ones by their part: what a call of the objective weighs.

        Sums of their weights, where they have some; groups, where they are averaged first.
        """
        return float(np.sum(self.numbers()[0]))

    def lay_out(self, ops: ArrayOps, losses: Any, rank: int = 0) -> Layout:
        """Return what each element of the losses belongs to; see :meth:`Segments.lay_out`."""
        layout = self.segments.lay_out(ops, losses, rank)
        found = [ops.reshape(ops.on_device_of(x, losses), (-1,)) for x in self.numbers()]
        (count,), shape = ops.shape(found[0]), ops.shape(losses)
        known = [n for n in shape if n is not None]
        if count is not None and len(known) == len(shape) and count != math.prod(known):
            raise ShapeError(
                f"segments linked for {count} elements, but losses of shape {shape} (rank {rank}); give each "
                f"call the segments of its own micro-batch"
            )
        given = ops.shape(layout.ids) if None in shape else shape
        c, w = (ops.reshape(x, tuple(-1 if n is None else n for n in given)) for x in found)
        return replace(layout, coefficients=c, linked_weight=w)

    def __tf_flatten__(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the arrays; see :meth:`Segments.__tf_flatten__`."""
        names, arrays = self.segments.__tf_flatten__()
        return (self.ranks, names), (*arrays, *self.numbers())

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[Any, ...], components: tuple[Any, ...]) -> LinkedSegments:
        """Return what :meth:`__tf_flatten__` took apart."""
        ranks, names = metadata
        *arrays, c, w = components
        return cls(Segments.__tf_unflatten__(names, tuple(arrays)), lambda: (c, w), ranks)


def check_micro_batches(segments: Any, weights: Any, cut: str) -> tuple[list[Segments], list[Any]]:
    """Return what `link_segments` was given, as lists of one length.

    Raises:
        ConfigError: no lists, of different lengths, or an unknown `cut`.
    """
    if cut not in CUTS:
        raise ConfigError(f"cut={cut!r} is not known; choose one of {', '.join(map(repr, CUTS))}")
    for name, x in (("segments", segments), ("weights", weights)):
        if not isinstance(x, list | tuple) and not (name == "weights" and x is None):
            raise ConfigError(
                f"link_segments(): {name} must be a list, one for each micro-batch of this rank's step"
            )
    weights = [None] * len(segments) if weights is None else list(weights)
    if len(weights) != len(segments):
        raise ConfigError(f"link_segments(): {len(segments)} segments, but {len(weights)} weights")
    found = [Segments.of(one) for one in segments]
    if any(isinstance(one, LinkedSegments) for one in found):
        raise ConfigError("link_segments(): these segments are linked already")
    return found, weights  # type: ignore[return-value]
