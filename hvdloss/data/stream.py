"""Streams of batches: pieces of files read one part ahead, and the items of any iterable, split over lanes.

A *lane* is an independent reader: a rank, or one of a rank's worker processes. Lanes are numbered over all
ranks, those of a rank consecutively, and share an epoch as ranks do.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from hvdloss._util.checks import check_int
from hvdloss.comm.agreement import run_on_all_ranks
from hvdloss.comm.communicator import Communicator
from hvdloss.data.epoch import Epoch
from hvdloss.data.files import Columns, Source
from hvdloss.data.pieces import Pieces, RowGroups
from hvdloss.data.sharding import Indices, Rule, Samples
from hvdloss.errors import ConfigError, DataError

__all__ = ["LaneSchedule", "OpenedSource", "Rules", "SharedIterable", "read_batches"]

Item = TypeVar("Item")


Rules = RowGroups | Callable[[list[int]], RowGroups]


class OpenedSource:
    """Files as seen by one rank, and how their parts are sharded.

    A rank that cannot open its files reports it in :meth:`check_consistency`, not at once: in an elastic job
    ranks come and go, and do not construct objects at the same time.

    Args:
        source: the files; the same on all ranks.
        sharding: of their parts; a function from their numbers of rows to one; None for
            ``RowGroups(source.rows)``.
        ranks: their number.

    Raises:
        ConfigError: the sharding is of other files, or has shares for another number of ranks.
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

    def with_fingerprint(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a position with the fingerprint of the files."""
        return {**state, "files": self.fingerprint}

    def check(self, state: Any, ranks: int) -> None:
        """Check that a position belongs to these files, which may lie in another folder.

        Raises:
            ConfigError: it belongs to others; or the sharding has shares for another number of ranks.
        """
        self._check_shares(ranks)
        if isinstance(state, dict) and state.get("files", self.fingerprint) != self.fingerprint:
            raise ConfigError(
                "the state is of other files: their names, order, row groups or columns differ; resume with "
                "the files that the epoch began with, in the same order"
            )

    def check_consistency(self, communicator: Communicator) -> None:
        """Check that all ranks see the same files.

        Raises:
            DataError: on every rank alike, where a rank cannot open its files.
            AgreementError: ranks see different files.

        Collectives: one gather.
        """

        def fingerprint() -> list[Any]:
            if self.problem is not None:
                raise self.problem
            return [self.fingerprint, self.rule.settings()]

        run_on_all_ranks(
            communicator,
            fingerprint,
            "hvdloss.data.open",
            "the files (names, row groups, columns) or sharding",
        )


@functools.cache
def _reading() -> ThreadPoolExecutor:
    """Return this process's threads for reading ahead.

    They never end: if a thread ends while another one forks (as a DataLoader does for its workers), the child
    process of Python 3.11 may wait for a lock that is never released (HEAD_LOCK).
    """
    return ThreadPoolExecutor(2, "hvdloss-read")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reading.cache_clear)  # a child has none of its parent's threads


def read_batches(
    source: Source, rule: RowGroups, epoch: int, pieces: Pieces, batch_size: int, *, ahead: int = 1
) -> Iterator[Columns]:
    """Yield pieces of files batch by batch, in order; all batches but the last are full.

    Args:
        source: the files.
        rule: gives the order of rows within a part.
        epoch: of the data.
        pieces: what to read.
        batch_size: rows of a batch.
        ahead: number of parts that a thread reads in advance; one more is in memory.

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


class LaneSchedule:
    """The order of batches where the lanes of each rank take turns.

    Args:
        epoch: sharded over ``ranks x lanes``.
        lanes: of a rank.
        batch_size: of a batch.
    """

    def __init__(self, epoch: Epoch[Samples], lanes: int, batch_size: int) -> None:
        self.epoch, self.lanes, self.batch_size = epoch, lanes, batch_size
        self._left = np.array([len(left) for left in epoch.remaining]).reshape(-1, lanes)
        self.batches: Indices = -(-self._left // batch_size)
        self.rounds = int(self.batches.max(initial=0))

    @property
    def steps(self) -> int:
        """Number of steps until all ranks are done."""
        return int(self.batches.sum(1).max(initial=0))

    def consumed(self, steps: int) -> list[int]:
        """Return the number of samples from each lane after this number of steps."""
        out = []
        for batches, left in zip(self.batches, self._left, strict=True):
            full = 0  # rounds in which every lane with a batch yielded one
            given = np.zeros_like(batches)
            while (total := int(given.sum())) < steps and full < batches.max(initial=0):
                waiting = np.flatnonzero(batches > full)
                # Skip as many rounds as pass before a lane runs out or the steps end.
                jump = max(1, min(int(batches[waiting].min()) - full, (steps - total) // len(waiting)))
                for lane in waiting[: steps - total]:
                    given[lane] += jump if steps - total >= len(waiting) else 1
                full += jump
            out += np.minimum(given * self.batch_size, left).tolist()
        return out


class SharedIterable:
    """The items of an iterable that lanes share round-robin, and their position.

    Every lane iterates over the whole iterable and keeps its own items; so it must yield the same items, in
    the same order, on every rank. On resuming, the items not yet consumed are dealt out again.

    Args:
        parts: number of items that each lane consumed, for each time the epoch was started or resumed.
        epoch: its number.

    >>> first = [list(itertools.islice(SharedIterable().items_for("abcdefgh", 2, i), 2)) for i in (0, 1)]
    >>> [list(SharedIterable([[2, 2]]).items_for("abcdefgh", 3, lane)) for lane in (0, 1, 2)]
    [['e', 'h'], ['f'], ['g']]
    """

    def __init__(self, parts: Sequence[Sequence[int]] = (), epoch: int = 0) -> None:
        self.parts = [[int(count) for count in part] for part in parts]
        self.number = epoch

    def items_for(self, items: Iterable[Item], lanes: int, lane: int) -> Iterator[Item]:
        """Yield the remaining items of a lane."""
        rest = iter(items)
        for taken in self.parts:
            rest = _after(rest, taken)
        return itertools.islice(rest, lane, None, lanes)

    def state_dict(self, taken: Sequence[int] | None = None) -> dict[str, Any]:
        """Return the position after lanes consumed `taken` more: small, JSON-able, equal on all ranks."""
        parts = [list(part) for part in self.parts]
        if taken is not None and any(taken):
            parts.append(list(map(int, taken)))
        return {"version": 1, "epoch": self.number, "parts": parts, "sharding": {"sharding": "Items"}}

    @classmethod
    def from_state_dict(cls, state: Any) -> SharedIterable:
        """Return the position of a :meth:`state_dict`.

        Raises:
            ConfigError: not such a state.
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
        return cls(state["parts"], check_int("epoch", state["epoch"], 0))


def _after(items: Iterator[Item], taken: Sequence[int]) -> Iterator[Item]:
    """Yield items not yet consumed by any lane, round-robin."""
    for number, item in enumerate(items):
        if number // len(taken) >= taken[number % len(taken)]:
            yield item
