"""How something countable (classes, heads, columns, layers) and the parameters made of it lie on ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hvdloss.comm.collectives import even_sizes
from hvdloss.errors import ConfigError

__all__ = ["Cut", "Parts", "row_chunks"]

_CHUNK = 2**20  # entries of a parameter that are drawn, or travel, at a time
_VECTOR = 16  # PyTorch draws normal numbers sixteen at a time


@dataclass(frozen=True, init=False)
class Parts:
    """How many things lie on the ranks of a process set: one range after the other.

    Args:
        count: how many there are.
        ranks: how many ranks share them.
        sizes: how many each rank holds; None for even parts, of which the first ones get what is left over.
        noun: what they are, for messages.

    Raises:
        ConfigError: sizes that do not fit, or a rank without any.

    >>> parts = Parts(10, 4)
    >>> parts.sizes, parts.offset(2), parts.size(2), parts.range(2)
    ((3, 3, 2, 2), 6, 2, range(6, 8))
    """

    count: int
    ranks: int
    sizes: tuple[int, ...]
    noun: str = field(compare=False)

    def __init__(
        self, count: int, ranks: int = 1, sizes: Sequence[int] | None = None, noun: str = "count"
    ) -> None:
        for name, value in ((noun, count), ("ranks", ranks)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be an integer of at least 1")
        if sizes is None:
            if count < ranks:
                raise ConfigError(
                    f"{noun}={count} are fewer than the {ranks} ranks of the process set, and each rank "
                    f"needs at least one; share them among fewer ranks"
                )
            sizes = even_sizes(count, ranks)
        sizes = tuple(int(n) for n in sizes)
        if len(sizes) != ranks:
            raise ConfigError(
                f"sizes={list(sizes)} has {len(sizes)} numbers, but there are {ranks} ranks; give one each"
            )
        if min(sizes) < 1 or sum(sizes) != count:
            raise ConfigError(
                f"sizes={list(sizes)} must be at least 1 each, and together {noun}={count}; "
                f"together they are {sum(sizes)}"
            )
        for name, given in (("count", count), ("ranks", ranks), ("sizes", sizes), ("noun", noun)):
            object.__setattr__(self, name, given)

    def _check(self, rank: int) -> int:
        if not 0 <= rank < self.ranks:
            raise ConfigError(
                f"rank={rank!r} is not one of the {self.ranks} ranks that share the {self.noun}"
            )
        return rank

    def offset(self, rank: int) -> int:
        """Return the first one of a rank."""
        return sum(self.sizes[: self._check(rank)])

    def size(self, rank: int) -> int:
        """Return how many a rank holds."""
        return self.sizes[self._check(rank)]

    def range(self, rank: int) -> range:
        """Return those of a rank."""
        return range(self.offset(rank), self.offset(rank) + self.size(rank))


@dataclass(frozen=True)
class Cut:
    """How one parameter of a layer lies on the ranks that share the layer.

    Along `axis` the whole parameter is `blocks` blocks one after the other, each of which has `unit` entries
    for each of the things that are shared: the query, key and value rows of attention are three blocks
    of heads, with as many rows per head as a head is wide.

    >>> cut = Cut(Parts(3, 2, noun="heads"), unit=2, blocks=3)
    >>> cut.length, cut.ranges(1), cut.size(1)
    (18, [range(4, 6), range(10, 12), range(16, 18)], 6)
    """

    parts: Parts
    axis: int = 0
    unit: int = 1
    blocks: int = 1

    @property
    def length(self) -> int:
        """How long the axis of the whole parameter is."""
        return self.blocks * self.parts.count * self.unit

    def size(self, rank: int) -> int:
        """Return how long the axis is on a rank."""
        return self.blocks * self.parts.size(rank) * self.unit

    def ranges(self, rank: int) -> list[range]:
        """Return which entries of the whole axis a rank holds, in its order."""
        block, mine = self.parts.count * self.unit, self.parts.range(rank)
        return [
            range(n * block + mine.start * self.unit, n * block + mine.stop * self.unit)
            for n in range(self.blocks)
        ]

    def whole_shape(self, own: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the whole parameter, given that of a part."""
        return (*own[: self.axis], self.length, *own[self.axis + 1 :])

    def overlaps(self, rank: int, rows: range) -> Iterator[tuple[range, range]]:
        """Give which of some entries of the whole axis a rank holds: in the whole, and in its own part."""
        first = 0
        for mine in self.ranges(rank):
            start, stop = max(mine.start, rows.start), min(mine.stop, rows.stop)
            if start < stop:
                yield range(start, stop), range(first + start - mine.start, first + stop - mine.start)
            first += len(mine)


def row_chunks(rows: int, width: int) -> Iterator[range]:
    """Give ranges of rows that are few enough to be held beside everything else.

    Numbers drawn chunk by chunk are those drawn at once: a chunk has a multiple of 16 entries, and the last
    one at least 16, if there are so many.

    Args:
        rows: how many there are.
        width: entries of each.

    >>> [len(rows) for rows in row_chunks(40, 2**16)]
    [16, 16, 8]
    >>> [len(rows) for rows in row_chunks(2**20 + 3, 1)]
    [1048579]
    """
    step = max(1, _CHUNK // max(1, width) // _VECTOR) * _VECTOR
    first = 0
    while first < rows:
        last = rows if (rows - first - step) * width < _VECTOR else first + step
        yield range(first, last)
        first = last
