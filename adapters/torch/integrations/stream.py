"""Batches of data that is read as a stream: files larger than memory, and iterables of any length."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from hvdloss._util.checks import check_int
from hvdloss.comm.communicator import Communicator, rank_and_size
from hvdloss.comm.messages import decode_all
from hvdloss.data import Epoch, RowGroups, Source
from hvdloss.data.stream import LaneSchedule, OpenedSource, Rules, SharedIterable, read_batches
from hvdloss.errors import ConfigError, DataError, UsageError
from hvdloss.torch._backend import hvd
from hvdloss.torch.ops import communicator_of
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from torch.utils.data._utils.collate import default_convert

__all__ = ["StreamLoader"]

_OURS = ("batch_size", "batch_sampler", "sampler", "shuffle", "drop_last", "dataset")
_ROOM = 1 << 20  # bytes for a position


class StreamLoader:
    """Batches of this rank's part of files, or of an iterable, each row or item on exactly one rank.

    Files (:class:`hvdloss.data.Parquet`, ``Csv``, ``NumpyFiles``) are read a row group at a time, one
    ahead, and never held whole. Their number of rows is known, so all ranks give the same number of
    batches, those that are through without rows. Batches are dicts of tensors by column, or what
    `collate_fn` makes of the columns::

        data = hvdloss.data.Parquet("data/", columns=["x", "y"])
        loader = hvd.StreamLoader(data, batch_size=256, collate_fn=lambda c: (c["x"], c["y"]))

    An iterable of unknown length is gone through by every rank (and worker), which take its items in turns:
    it must give the same items in the same order everywhere. Ranks may end at different steps, so loop over
    ``hvd.uneven(loader, optimizer)``.

    Iterating again is the next epoch. The position is a small dict: an epoch goes on in the middle, on
    another number of ranks (and workers) too.

    Args:
        data: a :class:`hvdloss.data.Source`; or an iterable, such as an ``IterableDataset``, of samples.
        batch_size: rows of one rank in one step.
        sharding: of files: :class:`hvdloss.data.RowGroups`, or a function from their numbers of rows to one;
            None for shuffled ones with seed 0.
        process_set: the ranks; None for all.
        collate_fn: makes a batch: from a dict of NumPy arrays (files; also from arrays without rows), by
            default the same as tensors; or from a list of items, by default as ``DataLoader`` does.
        options: of ``torch.utils.data.DataLoader``: ``num_workers`` (each reads a part of its own),
            ``persistent_workers``, ``pin_memory``, ``prefetch_factor``, ...

    Raises:
        ConfigError: an argument that cannot be used.
        DataError: in a loop: a file cannot be opened, on every rank; or cannot be read any more, on this
            rank, and on every rank in a loop over ``hvd.uneven``. Names the file and the row group.
        AgreementError: in a loop: ranks see other files.

    Collectives: of files, one gather in the first loop, and the first after ``load_state_dict``.
    ``state_dict()`` of an iterable, one gather.
    """

    def __init__(
        self,
        data: Source | Iterable[Any],
        batch_size: int,
        *,
        sharding: Rules | None = None,
        process_set: Any = None,
        collate_fn: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        taken = [name for name in _OURS if name in options]
        if taken:
            raise ConfigError(f"{', '.join(taken)}: StreamLoader has its own; leave it out")
        self.batch_size = check_int("batch_size", batch_size, 1)
        self._process_set = process_set
        self.rank, self.ranks = rank_and_size(hvd, process_set)
        self.lanes = max(1, check_int("num_workers", options.get("num_workers", 0), 0))
        self.data = data
        self._turns: LaneSchedule | None = None  # of files
        # Steps of this epoch, items of this rank's lanes, and whether they are through.
        self._given, self._taken, self._over = 0, [0] * self.lanes, False
        if isinstance(data, Source):
            self._opened: OpenedSource | None = OpenedSource(data, sharding, self.ranks)
            self.sharding: RowGroups | None = self._opened.rule
            self._begin(Epoch(self.sharding, self.ranks * self.lanes))
        else:
            if sharding is not None:
                raise ConfigError("sharding= is of files; the items of an iterable are dealt out in turns")
            self._opened = self.sharding = None
            self._begin(SharedIterable())
        self._agreed = False
        self._running: object = None  # the loop that is under way
        self._collate, self._options = collate_fn, options
        self._make()

    def _make(self) -> None:
        """Make what reads, for the present rank."""
        self._lane = _Lane(self, self._collate)
        self._loader = DataLoader(self._lane, batch_size=None, collate_fn=_same, **self._options)

    def _communicator(self) -> Communicator:
        return communicator_of(self._process_set or hvd.global_process_set)

    # -- position ---------------------------------------------------------------------------------

    def get_position(self) -> Any:
        """Return the current position for a later :meth:`state_dict`; no collectives."""
        return self._given, self._over, list(self._taken)

    def set_position(self, position: Any) -> None:
        """Go back to an earlier position of an interrupted loop, from :meth:`get_position`."""
        self._given, self._over, taken = position
        self._taken = list(taken)

    def state_dict(self, position: Any = None) -> dict[str, Any]:
        """Return the position, the same on all ranks; JSON-able. The batch last given counts as used.

        Args:
            position: an earlier one of this loop, from :meth:`get_position`; None for the current one.

        Collectives: none of files; one gather of an iterable, so all ranks must call it.
        """
        given, over, taken = self.get_position() if position is None else position
        if self._turns is not None:
            reached = copy.copy(self._turns.epoch)
            reached.advance(self._turns.consumed(given))
            return self._of_files(reached.state_dict())
        message = json.dumps([over, taken]).encode()
        positions = decode_all(
            self._communicator().all_gather_bytes(message, "hvdloss.stream.position"),
            "position",
            _is_position,
        )
        if all(over for over, _ in positions):
            return SharedIterable(epoch=self._items.number + 1).state_dict()
        return self._items.state_dict([count for _, taken in positions for count in taken])

    def _of_files(self, state: dict[str, Any]) -> dict[str, Any]:
        return state if self._opened is None else self._opened.with_fingerprint(state)

    def start_state(self) -> dict[str, Any]:
        """Return the position at which the loop began that is under way, or was last; no collective."""
        return (
            self._items.state_dict()
            if self._turns is None
            else self._of_files(self._turns.epoch.state_dict())
        )

    def load_state_dict(self, state: Any) -> None:
        """Go on from a position, with whatever number of ranks and workers there is now.

        A loop that is under way is over with it. Where this rank could not open its files the position is
        left alone: the next loop raises the reason on all ranks.

        Raises:
            ConfigError: no position, or one of other files or another sharding; nothing is changed then.
        """
        rank, ranks = rank_and_size(hvd, self._process_set)  # in an elastic job there are others now
        if self._opened is not None and self._opened.problem is not None:
            self._agreed, self._running = False, None
            return
        if self.sharding is not None:
            assert self._opened is not None
            self._opened.check(state, ranks)
            self._begin(Epoch.from_state_dict(self.sharding, state, ranks * self.lanes))
        else:
            self._begin(SharedIterable.from_state_dict(state))
        if (rank, ranks) != (self.rank, self.ranks):
            self.rank, self.ranks = rank, ranks
            self._make()
        self._agreed, self._running = False, None

    def _begin(self, position: Epoch[Any] | SharedIterable) -> None:
        """Begin at a position."""
        if isinstance(position, SharedIterable):
            self._items = position
        else:
            self._turns = LaneSchedule(position, self.lanes, self.batch_size)
        self._given, self._taken, self._over = 0, [0] * self.lanes, False

    def _go_on(self) -> None:
        """Begin what is left of this epoch, or the next one."""
        if self.sharding is not None:
            lanes = self.ranks * self.lanes
            epoch = Epoch.from_state_dict(self.sharding, self.state_dict(), lanes)
            if epoch.exhausted and self.sharding.samples:
                epoch = Epoch(self.sharding, lanes, epoch.number + 1)
            self._begin(epoch)
        elif self._over:
            self._begin(SharedIterable(epoch=self._items.number + 1))
        elif any(self._taken):
            raise UsageError(
                "the loop over this StreamLoader was left before its end, and only all ranks together "
                "know the position: call loader.load_state_dict(loader.state_dict()) on every rank to "
                "continue with the rest of the epoch"
            )

    # -- batches ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return how many steps this epoch still has, or the next one if it is over; equal on all ranks.

        Raises:
            TypeError: nobody knows how long an iterable is.
        """
        if self._turns is None or self.sharding is None:
            raise TypeError("the length of an iterable is not known")
        left = self._turns.steps - self._given
        if left or not self.sharding.samples:
            return left
        following = Epoch(self.sharding, self.ranks * self.lanes, self._turns.epoch.number + 1)
        return LaneSchedule(following, self.lanes, self.batch_size).steps

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the numbers of the remaining epochs out of `count`, one for each loop over the loader.

        An interrupted run goes on in the middle of one: its number comes from the position, so that no epoch
        is left out or done twice, wherever the position was taken.
        """
        while (number := self._upcoming()) < count:
            yield number

    def _upcoming(self) -> int:
        """Return the number of the epoch that the next batch is of."""
        if self._turns is None:
            return self._items.number + self._over
        return self._turns.epoch.number + (self._given >= self._turns.steps)

    def __iter__(self) -> Iterator[Any]:
        """Yield the remaining batches of this epoch, or those of the next one."""
        if self._running is not None:
            raise UsageError("this StreamLoader is being iterated over already; make another one")
        if self._opened is not None and not self._agreed:
            self._opened.check_consistency(self._communicator())
            self._agreed = True
        self._go_on()
        this = self._running = object()
        batches: Any = None
        try:
            turns = self._turns
            self._lane.begin(self.start_state())
            batches = iter(self._loader)
            for received in batches:
                if self._running is not this:
                    raise UsageError("a position was loaded in the middle of this loop; begin another one")
                if received is None:  # a lane that is done, while others are not
                    continue
                lane, count, batch = received
                self._given += 1
                self._taken[lane] += count
                yield batch
            if turns is None:
                self._over = True
                return
            for _ in range(turns.steps - self._given):
                self._given += 1
                yield self._lane.without_rows()
        except DataError as error:
            # A worker's comes with its traceback as text, of which the last line is the message.
            raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from error
        finally:
            if self._running is this:
                self._running = None
            if batches is not None and not self._loader.persistent_workers:
                del batches  # ends workers that are reading ahead


class _Lane(IterableDataset[Any]):
    """What a rank, or each of its workers, reads; a copy of it lives in every worker."""

    def __init__(self, loader: StreamLoader, collate: Callable[[Any], Any] | None) -> None:
        self.data, self.sharding = loader.data, loader.sharding
        self.rank, self.ranks, self.lanes = loader.rank, loader.ranks, loader.lanes
        self.batch_size, self.collate = loader.batch_size, collate
        # Workers that stay see a new position here.
        self._state = torch.zeros(_ROOM, dtype=torch.uint8).share_memory_()

    def begin(self, state: dict[str, Any]) -> None:
        """Start lanes at a position."""
        text = json.dumps(state).encode()
        if len(text) >= _ROOM:
            raise ConfigError(f"state: a position of {len(text)} bytes; the epoch was gone on with too often")
        self._state[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._state[len(text)] = 0

    def _batch(self, columns: Any) -> Any:
        return default_convert(columns if self.collate is None else self.collate(columns))

    def without_rows(self) -> Any:
        """Return a batch without rows."""
        return self._batch(self.data.empty())

    def __iter__(self) -> Iterator[tuple[int, int, Any] | None]:
        info = get_worker_info()
        own = 0 if info is None else info.id
        lane, lanes = self.rank * self.lanes + own, self.ranks * self.lanes
        text = self._state.numpy().tobytes()
        state = json.loads(text[: text.index(0)])
        if self.sharding is None:
            items = SharedIterable.from_state_dict(state).items_for(self.data, lanes, lane)
            while batch := list(itertools.islice(items, self.batch_size)):
                yield own, len(batch), (self.collate or default_collate)(batch)
            return
        epoch: Epoch[Any] = Epoch.from_state_dict(self.sharding, state, lanes)
        turns = LaneSchedule(epoch, self.lanes, self.batch_size)
        mine = epoch.remaining[lane]
        for columns in read_batches(self.data, self.sharding, epoch.number, mine, self.batch_size):
            yield own, 0, self._batch(columns)
        for _ in range(turns.rounds - int(turns.batches[self.rank, own])):
            yield None  # DataLoader asks workers in turns only while all give something


def _is_position(message: Any) -> bool:
    over, taken = message
    return isinstance(over, bool | int) and all(isinstance(count, int) and count >= 0 for count in taken)


def _same(batch: Any) -> Any:
    return batch
