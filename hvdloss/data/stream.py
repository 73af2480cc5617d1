"""Streams of batches: pieces of files read one part ahead, and the items of any iterable, dealt to lanes.

A *lane* is what reads for itself: a rank, or one of a rank's worker processes. Lanes are numbered over all
ranks, a rank's side by side, and share an epoch as ranks do.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from hvdloss.agreement import together
from hvdloss.checks import whole
from hvdloss.communicator import Communicator
from hvdloss.data.epoch import Epoch
from hvdloss.data.files import Columns, Source
from hvdloss.data.pieces import Pieces, RowGroups
from hvdloss.data.sharding import Indices, Rule, Samples
from hvdloss.errors import ConfigError, DataError

__all__ = ["LaneItems", "Opened", "Rules", "Turns", "read_batches"]

Item = TypeVar("Item")


Rules = RowGroups | Callable[[list[int]], RowGroups]


class Opened:
    """Files as one rank sees them, and how their parts are shared out.

    Ranks that cannot open theirs tell the others when all meet (:meth:`agree`), rather than at once: in an
    elastic job ranks come and go, and do not construct things together.

    Args:
        source: the files; the same on all ranks.
        sharding: of their parts; a function from their numbers of rows to one; None for
            ``RowGroups(source.rows)``.
        ranks: how many there are.

    Raises:
        ConfigError: the sharding is of other files, or has shares for other ranks.
    """

    def __init__(self, source: Source, sharding: Rules | None, ranks: int) -> None:
        self.source = source
        self.problem: DataError | None = None
        self.rule = RowGroups([])
        self.fingerprint = ""
        try:
            rows = source.rows
        except DataError as error:
            self.problem = error
            return
        rule = RowGroups(rows) if sharding is None else sharding
        if not isinstance(rule, Rule) and callable(rule):
            rule = rule(rows)
        if not isinstance(rule, RowGroups):
            raise ConfigError(
                f"sharding={type(rule).__name__} deals single samples; files are read by their parts: pass "
                f"hvdloss.data.RowGroups(source.rows, ...), a function from rows to one, or None"
            )
        if rule.rows.tolist() != rows:
            raise ConfigError(
                f"sharding: has {len(rule.rows)} parts of {rule.samples} rows, but the files {len(rows)} of "
                f"{sum(rows)}; make it with RowGroups(source.rows, ...)"
            )
        self.rule = rule
        self.fingerprint = source.fingerprint()
        self._check_shares(ranks)

    def _check_shares(self, ranks: int) -> None:
        if self.rule.shares is not None and len(self.rule.shares) != ranks:
            raise ConfigError(
                f"shares={self.rule.shares} are {len(self.rule.shares)}, but there are {ranks} ranks; give "
                f"one each"
            )

    def signed(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a position with what tells which files it is of."""
        return {**state, "files": self.fingerprint}

    def check(self, state: Any, ranks: int) -> None:
        """Check that a position is of these files, which may lie in another folder.

        Raises:
            ConfigError: it is of others; or the sharding has shares for other ranks.
        """
        self._check_shares(ranks)
        if isinstance(state, dict) and state.get("files", self.fingerprint) != self.fingerprint:
            raise ConfigError(
                "the state is of other files: their names, order, row groups or columns differ; go on with "
                "the files that the epoch began with, in the same order"
            )

    def agree(self, communicator: Communicator) -> None:
        """Check that all ranks see the same files.

        Raises:
            DataError: on every rank alike, where a rank cannot open its files.
            AgreementError: ranks see other files.

        Collectives: one gather.
        """

        def fingerprint() -> list[Any]:
            if self.problem is not None:
                raise self.problem
            return [self.fingerprint, self.rule.settings()]

        together(
            communicator,
            fingerprint,
            "hvdloss.data.open",
            "the files (names, row groups, columns) or sharding",
        )


@functools.cache
def _reading() -> ThreadPoolExecutor:
    """Return the threads that read ahead, of this process.

    They stay: where a thread ends just as another one forks (as a DataLoader does for its workers), Python
    3.11's child process may wait for a lock that nobody will give back (HEAD_LOCK).
    """
    return ThreadPoolExecutor(2, "hvdloss-read")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reading.cache_clear)  # a child has none of its parent's threads


def read_batches(
    source: Source, rule: RowGroups, epoch: int, pieces: Pieces, batch_size: int, *, ahead: int = 1
) -> Iterator[Columns]:
    """Give pieces of files batch by batch, in order; all batches but the last are full.

    Args:
        source: the files.
        rule: which says in which order a part's rows come.
        epoch: of the data.
        pieces: what to read.
        batch_size: rows of a batch.
        ahead: how many parts a thread reads before they are needed; so many, and one more, are in memory.

    Raises:
        DataError: see :class:`Source`.
    """
    held: list[Columns] = []
    count = 0
    wanted = list(pieces)
    coming: list[Future[Columns]] = []
    try:
        for number, (part, start, end) in enumerate(wanted):
            while len(coming) <= ahead and number + len(coming) < len(wanted):
                coming.append(_reading().submit(source.read, wanted[number + len(coming)][0]))
            columns = coming.pop(0).result()
            order = rule.within(part, epoch)
            while start < end:
                stop = min(start + batch_size - count, end)
                rows: Any = slice(start, stop) if order is None else order[start:stop]
                held.append({name: _copied(column, rows) for name, column in columns.items()})
                count += stop - start
                start = stop
                if count == batch_size:
                    yield _joined(held)
                    held, count = [], 0
            del columns
        if count:
            yield _joined(held)
    finally:
        for one in coming:
            one.cancel()


def _copied(column: Any, rows: Any) -> Any:
    """Return rows of a column as a copy: a view keeps the whole part, and Arrow's cannot be written to."""
    return column[rows].copy() if isinstance(rows, slice) else column[rows]


def _joined(held: Sequence[Columns]) -> Columns:
    if len(held) == 1:
        return held[0]
    return {name: np.concatenate([one[name] for one in held]) for name in held[0]}


class Turns:
    """Whose batch comes when, where each rank's lanes give their batches in turns.

    Args:
        epoch: shared out over ``ranks x lanes``.
        lanes: of a rank.
        batch_size: of a batch.
    """

    def __init__(self, epoch: Epoch[Samples], lanes: int, batch_size: int) -> None:
        self.epoch, self.lanes, self.batch_size = epoch, lanes, batch_size
        self._left = np.array([len(left) for left in epoch.left]).reshape(-1, lanes)
        self.batches: Indices = -(-self._left // batch_size)
        self.rounds = int(self.batches.max(initial=0))

    @property
    def steps(self) -> int:
        """In how many steps all ranks are through."""
        return int(self.batches.sum(1).max(initial=0))

    def taken(self, steps: int) -> list[int]:
        """Return how many samples each lane has given after so many steps."""
        out = []
        for batches, left in zip(self.batches, self._left, strict=True):
            full = 0  # rounds in which every lane that has a batch gave one
            given = np.zeros_like(batches)
            while (total := int(given.sum())) < steps and full < batches.max(initial=0):
                waiting = np.flatnonzero(batches > full)
                # As many rounds at once as nobody runs out in and the steps have.
                jump = max(1, min(int(batches[waiting].min()) - full, (steps - total) // len(waiting)))
                for lane in waiting[: steps - total]:
                    given[lane] += jump if steps - total >= len(waiting) else 1
                full += jump
            out += np.minimum(given * self.batch_size, left).tolist()
        return out


class LaneItems:
    """The items of an iterable that lanes share in turns, and where they stand.

    Every lane goes through the whole iterable and gives what is its own; so it must give the same items, in
    the same order, on every rank. What lanes took before counts as used, and the rest is dealt out again.

    Args:
        parts: how many items each lane took, of each time the epoch was begun or gone on with.
        epoch: its number.

    >>> first = [list(itertools.islice(LaneItems().of("abcdefgh", 2, lane), 2)) for lane in (0, 1)]
    >>> [list(LaneItems([[2, 2]]).of("abcdefgh", 3, lane)) for lane in (0, 1, 2)]
    [['e', 'h'], ['f'], ['g']]
    """

    def __init__(self, parts: Sequence[Sequence[int]] = (), epoch: int = 0) -> None:
        self.parts = [[int(count) for count in part] for part in parts]
        self.number = epoch

    def of(self, items: Iterable[Item], lanes: int, lane: int) -> Iterator[Item]:
        """Give what is left of a lane's items."""
        rest = iter(items)
        for taken in self.parts:
            rest = _after(rest, taken)
        return itertools.islice(rest, lane, None, lanes)

    def state(self, taken: Sequence[int] | None = None) -> dict[str, Any]:
        """Return the position after lanes took so many more: small, JSON-able, the same on all ranks."""
        parts = [list(part) for part in self.parts]
        if taken is not None and any(taken):
            parts.append(list(map(int, taken)))
        return {"version": 1, "epoch": self.number, "parts": parts, "sharding": {"sharding": "Items"}}

    @classmethod
    def after(cls, state: Any) -> LaneItems:
        """Return the position that a state tells of.

        Raises:
            ConfigError: it is none.
        """
        good = (
            isinstance(state, dict)
            and state.get("version") == 1
            and state.get("sharding") == {"sharding": "Items"}
            and isinstance(state.get("epoch"), int)
            and isinstance(parts := state.get("parts"), list)
            and all(isinstance(part, list) and part for part in parts)
            and all(type(count) is int and count >= 0 for part in parts for count in part)
        )
        if not good:
            raise ConfigError(f"state={str(state)[:200]} is no position in an iterable")
        return cls(state["parts"], whole("epoch", state["epoch"], 0))


def _after(items: Iterator[Item], taken: Sequence[int]) -> Iterator[Item]:
    """Give the items that lanes did not take which took so many of theirs, in turns."""
    for number, item in enumerate(items):
        if number // len(taken) >= taken[number % len(taken)]:
            yield item
