"""How a data set's samples are shared out over ranks: whole, disjoint, the same on every rank.

A :class:`Sharding` says in which order an epoch sees its samples, and which rank gets which of them.
Both follow from numbers that all ranks hold (the seed, the epoch, the number of ranks), so every rank
knows all shards without a word between them. Nothing is padded and nothing dropped: shards may be of
uneven length, or empty, because the loss is exact for them.

Where an epoch is interrupted, what is left of it is shared out again by the same rule, over whatever
number of ranks there is then (:class:`hvdloss.data.Epoch`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from hvdloss._util.apportion import apportion
from hvdloss._util.checks import check_int
from hvdloss.errors import ConfigError

__all__ = [
    "Contiguous",
    "Dirichlet",
    "Grouped",
    "Rule",
    "Sharding",
    "Shuffled",
    "Stratified",
    "Strided",
    "Weighted",
]

Indices = npt.NDArray[np.int64]


class Run(Protocol):
    """A run of samples: sample numbers (int64), or :class:`hvdloss.data.pieces.Pieces` of files."""

    def __len__(self) -> int: ...

    def __getitem__(self, samples: slice, /) -> Any: ...


Samples = TypeVar("Samples", bound=Run)


class Rule(ABC, Generic[Samples]):
    """What shares samples out over ranks, whatever stands for them.

    Args:
        samples: size of the data set.
        seed: of whatever is random; equal on all ranks. Every epoch has random numbers of its own.
        shares: how much of the samples each rank gets, in any unit; None for equal shares. Needs as many
            ranks as there are shares.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(self, samples: int, *, seed: int = 0, shares: Sequence[float] | None = None) -> None:
        self.samples = check_int("samples", samples, 0)
        self.seed = check_int("seed", seed, 0)
        self.shares = None if shares is None else [float(share) for share in shares]
        if self.shares is not None and not (
            all(np.isfinite(share) and share >= 0 for share in self.shares) and sum(self.shares) > 0
        ):
            raise ConfigError(f"shares={list(shares or ())!r} must be finite, at least 0, and not all 0")

    @abstractmethod
    def order(self, epoch: int) -> Samples:
        """Return the samples of an epoch in the order in which ranks are to see them."""

    @abstractmethod
    def split(self, samples: Samples, ranks: int, epoch: int, part: int = 0) -> list[Samples]:
        """Share `samples` out over ranks: disjoint, together all of them.

        Args:
            samples: what there is to share out, in the epoch's order: all of it, or what is left.
            ranks: their number.
            epoch: of the data.
            part: how often the epoch was shared out before.
        """

    @abstractmethod
    def rest(self, left: Sequence[Samples], epoch: int) -> Samples:
        """Return what ranks have left of an epoch, in an order that depends on nothing else."""

    def random(self, *of: int) -> np.random.Generator:
        """Return random numbers that depend on the seed and on `of` alone."""
        return np.random.default_rng([self.seed, *of])

    def sizes(self, samples: int, ranks: int) -> Indices:
        """Return the number of samples for each rank, by :attr:`shares`.

        Raises:
            ConfigError: there are other ranks than shares.
        """
        if self.shares is not None and len(self.shares) != ranks:
            raise ConfigError(
                f"shares={self.shares} are {len(self.shares)}, but there are {ranks} ranks; give one each"
            )
        return apportion(samples, np.ones(ranks) if self.shares is None else np.array(self.shares))

    def shards(self, ranks: int, epoch: int = 0) -> list[Samples]:
        """Return every rank's samples of an epoch, in order.

        Raises:
            ConfigError: `ranks` below 1, or `epoch` below 0.
        """
        ranks, epoch = check_int("ranks", ranks, 1), check_int("epoch", epoch, 0)
        return self.split(self.order(epoch), ranks, epoch)

    def settings(self) -> dict[str, Any]:
        """Return what must be equal to resume an epoch, JSON-able; arrays by their digest."""
        out: dict[str, Any] = {"sharding": type(self).__name__}
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                value = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
            out[name.lstrip("_")] = value
        return out


class Sharding(Rule[Indices]):
    """A rule for samples that are numbered; a subclass overrides :meth:`order` or :meth:`split`.

    Args:
        samples, seed, shares: see :class:`Rule`.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def order(self, epoch: int) -> Indices:
        """Return the samples of an epoch, int64, in the order in which ranks are to see them."""
        return np.arange(self.samples, dtype=np.int64)

    def split(self, indices: Indices, ranks: int, epoch: int, part: int = 0) -> list[Indices]:
        """Share `indices` out over ranks: int64 arrays, disjoint as entries, together all of them."""
        return [piece.copy() for piece in np.split(indices, np.cumsum(self.sizes(len(indices), ranks))[:-1])]

    def rest(self, left: Sequence[Indices], epoch: int) -> Indices:
        """Return what is left in the epoch's order; one drawn several times, as often as it is left."""
        kept = np.bincount(np.concatenate(left), minlength=self.samples)
        # From the end: of a sample's draws the last ones are left.
        order = self.order(epoch)
        later = np.zeros(len(order), np.int64)
        flipped = order[::-1]
        by_sample = np.argsort(flipped, kind="stable")
        starts = np.flatnonzero(np.diff(flipped[by_sample], prepend=-1))
        later[by_sample] = np.arange(len(flipped)) - np.repeat(starts, np.diff([*starts, len(flipped)]))
        return order[(later < kept[flipped])[::-1]]

    def _turns(self, samples: int, ranks: int) -> Indices:
        """Return whose turn each sample is: a rank's turns are spread evenly, ties go to the lower rank."""
        sizes = self.sizes(samples, ranks)
        at = np.concatenate([(np.arange(size) + 0.5) / max(size, 1) for size in sizes])
        return np.repeat(np.arange(ranks), sizes)[np.argsort(at, kind="stable")]


class Contiguous(Sharding):
    """Each rank gets one run of samples as they lie.

    >>> [shard.tolist() for shard in Contiguous(5).shards(2)]
    [[0, 1, 2], [3, 4]]
    """


class Strided(Sharding):
    """Ranks take turns: rank k gets samples k, k + ranks, k + 2 ranks, ...; with shares, in proportion.

    >>> [shard.tolist() for shard in Strided(5).shards(2)]
    [[0, 2, 4], [1, 3]]
    """

    def split(self, indices: Indices, ranks: int, epoch: int, part: int = 0) -> list[Indices]:
        """Deal the indices out."""
        if self.shares is None:
            return [indices[rank::ranks].copy() for rank in range(ranks)]
        whose = self._turns(len(indices), ranks)
        return [indices[whose == rank] for rank in range(ranks)]


class Shuffled(Strided):
    """The same permutation on all ranks, a new one every epoch, dealt out round-robin.

    The first n samples that the ranks see together are the first n of the permutation, for any number of
    ranks: with equal batches a step's global batch does not depend on how many ranks there are.
    """

    def order(self, epoch: int) -> Indices:
        """Return the epoch's permutation."""
        return self.random(epoch).permutation(self.samples).astype(np.int64)


class Weighted(Strided):
    """Samples drawn by weight, again every epoch, and dealt out round-robin.

    Args:
        weights: one per sample, at least 0; a sample of weight 0 is never drawn.
        draws: number in an epoch; None for as many as there are samples (of weight above 0, without
            replacement).
        replacement: draw a sample more than once if it comes. Without, a draw is a weighted permutation,
            or its first `draws` (Efraimidis and Spirakis 2006).
        seed, shares: see :class:`Sharding`.

    Raises:
        ConfigError: weights that cannot be used, or more draws than samples without replacement.
    """

    def __init__(
        self,
        weights: npt.ArrayLike,
        *,
        draws: int | None = None,
        replacement: bool = False,
        seed: int = 0,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.weights = np.array(weights, dtype=np.float64)
        if self.weights.ndim != 1 or not (np.isfinite(self.weights) & (self.weights >= 0)).all():
            raise ConfigError(
                f"weights of shape {self.weights.shape} must be one finite number of at least 0 per sample"
            )
        super().__init__(len(self.weights), seed=seed, shares=shares)
        possible = int((self.weights > 0).sum())
        default = self.samples if replacement else possible
        self.draws = default if draws is None else check_int("draws", draws, 0)
        if self.draws and not possible:
            raise ConfigError("weights are all 0: nothing can be drawn")
        if not replacement and self.draws > possible:
            raise ConfigError(
                f"draws={self.draws} without replacement, but {possible} samples have a weight above 0; "
                f"draw fewer, or pass replacement=True"
            )
        self.replacement = replacement

    def order(self, epoch: int) -> Indices:
        """Return the epoch's draw."""
        random = self.random(epoch)
        if self.replacement:
            chosen = random.choice(self.samples, self.draws, p=self.weights / self.weights.sum())
            return chosen.astype(np.int64)
        possible = np.flatnonzero(self.weights > 0)
        keys = random.exponential(size=len(possible)) / self.weights[possible]
        return possible[np.argsort(keys, kind="stable")][: self.draws].astype(np.int64)


def _labels(name: str, values: npt.ArrayLike) -> tuple[Indices, int]:
    """Return labels of any kind as 0..n-1, and n."""
    given = np.asarray(values)
    if given.ndim != 1:
        raise ConfigError(f"{name} of shape {given.shape} must be one label per sample")
    found, numbers = np.unique(given, return_inverse=True)
    return numbers.astype(np.int64), len(found)


class Stratified(Sharding):
    """Every rank gets the same mixture of labels, to within one sample of each, shuffled.

    Within a rank labels are spread evenly over the epoch, so that each batch has nearly that mixture too.

    Args:
        labels: one per sample: integers, strings, any that sort.
        seed, shares: see :class:`Sharding`.
    """

    def __init__(
        self, labels: npt.ArrayLike, *, seed: int = 0, shares: Sequence[float] | None = None
    ) -> None:
        self.labels, self._kinds = _labels("labels", labels)
        super().__init__(len(self.labels), seed=seed, shares=shares)

    def order(self, epoch: int) -> Indices:
        """Return a shuffled order in which every label comes up evenly."""
        return _spread(self.random(epoch).permutation(self.samples), self.labels)

    def split(self, indices: Indices, ranks: int, epoch: int, part: int = 0) -> list[Indices]:
        """Deal each label's samples out by the shares, beginning where the last label ended."""
        by_label = indices[np.argsort(self.labels[indices], kind="stable")]
        whose = self._turns(len(indices), ranks)
        place = np.empty(self.samples, np.int64)
        place[indices] = np.arange(len(indices))
        out = []
        for rank in range(ranks):
            mine = by_label[whose == rank]
            out.append(mine[np.argsort(place[mine], kind="stable")])
        return out


def _spread(shuffled: Indices, labels: Indices) -> Indices:
    """Return shuffled samples with every label's spread evenly over the whole."""
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels[shuffled]) if len(shuffled) else np.zeros(0, np.int64)
    at = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count] or [np.zeros(0)])
    return by_label[np.argsort(at, kind="stable")].astype(np.int64)


class Grouped(Sharding):
    """No group (a patient, a document, a user) is split over ranks, and ranks get nearly as many samples.

    The largest groups are given out first, each to the rank that lacks most (Graham 1969), so that
    shards differ by at most one group. Groups, and samples within them, are shuffled every epoch.

    Args:
        groups: one label per sample.
        shuffle: else the order is that of the data.
        seed, shares: see :class:`Sharding`.
    """

    def __init__(
        self,
        groups: npt.ArrayLike,
        *,
        shuffle: bool = True,
        seed: int = 0,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.groups, self._kinds = _labels("groups", groups)
        super().__init__(len(self.groups), seed=seed, shares=shares)
        self.shuffle = bool(shuffle)

    def order(self, epoch: int) -> Indices:
        """Return the samples, a group's together."""
        random = self.random(epoch)
        samples = random.permutation(self.samples) if self.shuffle else np.arange(self.samples)
        rank_of = random.permutation(self._kinds) if self.shuffle else np.arange(self._kinds)
        return samples[np.argsort(rank_of[self.groups[samples]], kind="stable")].astype(np.int64)

    def split(self, indices: Indices, ranks: int, epoch: int, part: int = 0) -> list[Indices]:
        """Assign whole groups."""
        wanted = self.sizes(len(indices), ranks).astype(np.float64)
        counts = np.bincount(self.groups[indices], minlength=self._kinds)
        owner = np.zeros(self._kinds, np.int64)
        for group in np.argsort(-counts, kind="stable"):
            if counts[group]:
                owner[group] = int(np.argmax(wanted))
                wanted[owner[group]] -= counts[group]
        return [indices[owner[self.groups[indices]] == rank] for rank in range(ranks)]


class Dirichlet(Sharding):
    """Skewed shards for experiments: each label's samples go to ranks in proportions drawn from a Dirichlet.

    The smaller `alpha`, the fewer ranks have most of a label; some may have no sample at all. Which rank has
    what stays the same in every epoch. Source: Hsu, Qi and Brown 2019.

    Args:
        labels: one per sample.
        alpha: concentration, above 0.
        seed: see :class:`Sharding`.
    """

    def __init__(self, labels: npt.ArrayLike, alpha: float, *, seed: int = 0) -> None:
        if not (np.isfinite(alpha) and alpha > 0):
            raise ConfigError(f"alpha={alpha!r} must be a finite number above 0")
        self.labels, self._kinds = _labels("labels", labels)
        super().__init__(len(self.labels), seed=seed)
        self.alpha = float(alpha)

    def order(self, epoch: int) -> Indices:
        """Return the epoch's permutation."""
        return self.random(1, epoch).permutation(self.samples).astype(np.int64)

    def split(self, indices: Indices, ranks: int, epoch: int, part: int = 0) -> list[Indices]:
        """Assign every label's samples in its own proportions."""
        random = self.random(0, ranks)
        owner = np.zeros(self.samples, np.int64)
        for label in range(self._kinds):
            of_label = np.flatnonzero(self.labels == label)
            sizes = apportion(len(of_label), random.dirichlet(np.full(ranks, self.alpha)))
            owner[of_label] = np.repeat(np.arange(ranks), sizes)
        return [indices[owner[indices] == rank] for rank in range(ranks)]
