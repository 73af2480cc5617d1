"""Sharding of data that lies in files, by row group, without a number per row.

A data set of a billion rows has no room for a permutation of them in memory. Here an epoch is a list of
*pieces*: a part of the data (a Parquet row group, a block of a CSV file, a run of rows of an array), and
the places in that part's own order from which to which it is to be read. What a rank has yet to see is
such a list too, and so is what was left where an epoch was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from hvdloss._util.apportion import apportion
from hvdloss.data.sharding import Indices, Rule
from hvdloss.errors import ConfigError

__all__ = ["Pieces", "RowGroups"]


class Pieces:
    """Rows of parts, in order: a sequence that is as long as it has rows, and can be cut and joined.

    Args:
        table: int64 ``(pieces, 3)``: part, first place, end place, in the part's order of the epoch.
    """

    def __init__(self, table: npt.ArrayLike = ()) -> None:
        self.table: Indices = np.asarray(table, dtype=np.int64).reshape(-1, 3)
        self.table = self.table[self.table[:, 1] < self.table[:, 2]]
        self.ends: Indices = np.cumsum(self.table[:, 2] - self.table[:, 1], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Yield part, first and end row of each piece."""
        return ((int(part), int(start), int(end)) for part, start, end in self.table)

    def __getitem__(self, rows: slice) -> Pieces:
        """Return the pieces of a run of rows."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ConfigError(f"rows={rows!r}: pieces are cut into runs of rows")
        if start >= stop:
            return Pieces()
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        table = self.table[first : last + 1].copy()
        table[-1, 2] -= self.ends[last] - stop
        table[0, 1] += start - (self.ends[first - 1] if first else 0)
        return Pieces(table)

    @classmethod
    def joined(cls, several: Sequence[Pieces]) -> Pieces:
        """Return all of them, one after the other."""
        return cls(np.concatenate([one.table for one in several]) if several else ())


class RowGroups(Rule[Pieces]):
    """Parts of files (row groups, blocks), in a new order every epoch, sharded over ranks.

    Ranks get equal numbers of rows, or by `shares`; where that cuts a row group, two ranks read it, at
    most one cut per rank. With ``whole=True`` none is cut, and ranks differ by up to a row group: the
    largest are given out first, each to the rank that lacks most (Graham 1969).

    Rows are shuffled within their row group only, so files should be written in no order that matters, or
    with small row groups.

    Args:
        rows: of each part, as in ``source.rows`` (:mod:`hvdloss.data.files`).
        shuffle: draw a new order of the parts, and of the rows in each, every epoch; else the file order.
        whole: give out whole parts only.
        seed, shares: see :class:`hvdloss.data.sharding.Rule`.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(
        self,
        rows: Sequence[int] | Indices,
        *,
        shuffle: bool = True,
        whole: bool = False,
        seed: int = 0,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.rows: Indices = np.asarray(rows, dtype=np.int64).reshape(-1)
        if (self.rows < 0).any():
            raise ConfigError(f"rows={list(rows)[:20]} must be numbers of rows, at least 0")
        super().__init__(int(self.rows.sum()), seed=seed, shares=shares)
        self.shuffle, self.whole = bool(shuffle), bool(whole)

    def order(self, epoch: int) -> Pieces:
        """Return the parts of an epoch."""
        parts = self.random(epoch).permutation(len(self.rows)) if self.shuffle else np.arange(len(self.rows))
        return Pieces(np.stack([parts, np.zeros_like(parts), self.rows[parts]], 1))

    def within(self, part: int, epoch: int) -> Indices | None:
        """Return the order of a part's rows in an epoch; None for the order in which they lie."""
        if not self.shuffle:
            return None
        return self.random(epoch, 1 + part).permutation(int(self.rows[part])).astype(np.int64)

    def sizes(self, samples: int, ranks: int) -> Indices:
        """Return how many rows each rank gets; a rank's lanes (workers) share its part."""
        if self.shares is None or ranks % len(self.shares):
            return super().sizes(samples, ranks)
        lanes = ranks // len(self.shares)
        return apportion(samples, np.repeat(np.array(self.shares), lanes))

    def split(self, pieces: Pieces, ranks: int, epoch: int, part: int = 0) -> list[Pieces]:
        """Share pieces out over ranks."""
        wanted = self.sizes(len(pieces), ranks)
        if not self.whole:
            ends = np.cumsum(wanted)
            return [
                pieces[end - size : end] for size, end in zip(wanted.tolist(), ends.tolist(), strict=True)
            ]
        counts = pieces.table[:, 2] - pieces.table[:, 1]
        owner = np.zeros(len(counts), np.int64)
        lacking = wanted.astype(np.float64)
        for number in np.argsort(-counts, kind="stable"):
            owner[number] = int(np.argmax(lacking))
            lacking[owner[number]] -= counts[number]
        return [Pieces(pieces.table[owner == rank]) for rank in range(ranks)]

    def rest(self, left: Sequence[Pieces], epoch: int) -> Pieces:
        """Return what ranks have left, one rank's after the other's."""
        return Pieces.joined(left)

    def row_numbers(self, pieces: Pieces, epoch: int) -> Indices:
        """Return the rows of pieces by their number in the whole data set, int64: for tests and ids."""
        begins = np.concatenate([[0], np.cumsum(self.rows)])
        out = []
        for part, start, end in pieces:
            order = self.within(part, epoch)
            rows = np.arange(start, end) if order is None else order[start:end]
            out.append(begins[part] + rows)
        return np.concatenate(out) if out else np.zeros(0, np.int64)
