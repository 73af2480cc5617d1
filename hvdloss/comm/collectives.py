"""What differentiable collectives share in every framework: groups, names, part sizes."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvdloss.comm import world
from hvdloss.comm.communicator import group_ranks, included
from hvdloss.errors import ConfigError, ShapeError, UsageError

__all__ = [
    "GroupContext",
    "auto_name",
    "check_known_rows",
    "check_root",
    "check_rows",
    "check_sizes",
    "even_sizes",
    "group_by_bytes",
    "named_by_ordinal",
    "resolve_group",
    "root_index",
]

NUMBERS = 256  # of one kind of call; Horovod remembers the answers to 1024 names

_counters: defaultdict[Any, Iterator[int]] = defaultdict(itertools.count)


@dataclass(frozen=True)
class GroupContext:
    """The group of a collective: its name, its process set, and this process's rank in it."""

    name: str
    process_set: Any
    rank: int
    size: int

    def named(self, suffix: str) -> GroupContext:
        """Return the same group with a longer name."""
        return replace(self, name=f"{self.name}.{suffix}")

    def global_rank(self, rank: int) -> int:
        """Return the global rank of a rank of the process set, as Horovod's broadcast takes it."""
        ranks = self.process_set.ranks
        return rank if ranks is None else list(ranks)[rank]


def resolve_group(hvd: Any, process_set: Any, what: str) -> tuple[Any, int, int]:
    """Return a process set, this process's number in it and its size; (.., 0, 1) before ``hvd.init()``.

    Raises:
        UsageError: this process is not in the set.
    """
    group = process_set or hvd.global_process_set
    if not hvd.is_initialized():
        return group, 0, 1
    if not included(hvd, group):
        raise UsageError(
            f"{what}: rank {hvd.rank()} is not in the process set of ranks {list(group.ranks)}; "
            f"only its members may call"
        )
    return group, group.rank(), group.size()


def auto_name(what: str, process_set: Any) -> str:
    """Return a name for an unnamed call: the same on all ranks of a process set.

    Counted per process set, since ranks need not be in the same sets. Numbers repeat after :data:`NUMBERS`.
    """
    # In an elastic job, ranks that have just joined have made no calls.
    kind = what, getattr(process_set, "process_set_id", 0), world.generation()
    return f"hvdloss.{what}.{next(_counters[kind]) % NUMBERS}"


def named_by_ordinal(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return Horovod's ``broadcast_object`` or ``allgather_object``, named by ordinal and root.

    Horovod names the exchange by the type of the object, which may differ between ranks: None, say, on all
    but the root. They would then deadlock.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if bound.arguments.get("name") is None:
            name = auto_name(function.__name__, bound.arguments.get("process_set"))
            bound.arguments["name"] = f"{name}.{bound.arguments.get('root_rank', 0)}"
        return function(*bound.args, **bound.kwargs)

    return call


def root_index(hvd: Any, group: Any, size: int, root_rank: int, what: str) -> int:
    """Return the rank within a process set of a global rank.

    Raises:
        ConfigError: it is not in the set.
    """
    ranks = group_ranks(hvd, group) or tuple(range(size))
    if root_rank not in ranks:
        raise ConfigError(
            f"{what}: root_rank={root_rank!r} is none of the ranks {list(ranks)}; it counts among all ranks"
        )
    return ranks.index(root_rank)


def group_by_bytes(sizes: Iterable[int], most: int = 1 << 26) -> Iterator[list[int]]:
    """Yield the indices of what goes into one message: at most `most` bytes, or a single item.

    >>> list(group_by_bytes([5, 3, 0, 4, 20, 1], most=8))
    [[0, 1], [3], [4], [5]]
    """
    part: list[int] = []
    held = 0
    for place, size in enumerate(sizes):
        if part and held + size > most:
            yield part
            part, held = [], 0
        if size:
            part.append(place)
            held += size
    if part:
        yield part


def even_sizes(rows: int, size: int) -> list[int]:
    """Return how Horovod's reduce-scatter splits rows: the first parts get the remainder.

    >>> even_sizes(7, 3)
    [3, 2, 2]
    """
    least, more = divmod(rows, size)
    return [least + (rank < more) for rank in range(size)]


def check_rows(shape: Sequence[int | None], what: str, rank: int) -> None:
    """Raise ShapeError unless there is a first axis."""
    if not shape:
        raise ShapeError(
            f"{what}: x has no axis 0 to hold rows, it is a scalar (rank {rank}); reshape it to (1,) first"
        )


def check_known_rows(rows: int | None, rank: int) -> int:
    """Return `rows`, or raise ShapeError if they are known only at run time."""
    if rows is None:
        raise ShapeError(
            f"reduce_scatter: the number of rows of x is not known while tracing (rank {rank}); "
            f"pass sizes=, or an input_signature with the number"
        )
    return rows


def check_sizes(sizes: Sequence[int], rows: int | None, size: int, rank: int, what: str) -> list[int]:
    """Return part sizes as a list of int.

    Raises:
        ShapeError: not one per rank, negative, or their sum is not the number of rows.
    """
    parts = [int(n) for n in sizes]
    if len(parts) != size or min(parts) < 0 or (rows is not None and sum(parts) != rows):
        raise ShapeError(
            f"{what}: sizes={parts} must be {size} numbers of rows, one for each rank, at least 0, "
            f"together {rows} (rank {rank})"
        )
    return parts


def check_root(root: int, size: int, rank: int) -> None:
    """Raise ConfigError unless `root` is a rank of the process set."""
    if not 0 <= root < size:
        raise ConfigError(
            f"broadcast: root={root} is not a rank of this process set, whose ranks are 0 to {size - 1} "
            f"(rank {rank}); root counts within the set, not over all ranks"
        )
