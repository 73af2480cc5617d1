"""A DataLoader whose ranks together see every sample exactly once, to the end, and can go on from there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from hvdloss._util.checks import check_int
from hvdloss.comm.communicator import rank_and_size
from hvdloss.data import Epoch, Sharding
from hvdloss.data.uneven import empty_like
from hvdloss.errors import ConfigError, UsageError
from hvdloss.torch._backend import hvd
from hvdloss.torch.integrations.uneven import zero
from torch.utils.data import DataLoader, Dataset, default_collate

__all__ = ["ShardedLoader"]

_OURS = ("batch_size", "batch_sampler", "sampler", "shuffle", "drop_last")


class ShardedLoader:
    """Batches of this rank's shard of a map-style data set, the same number of them on every rank.

    Shards may be uneven, or empty: ranks whose samples are used up get batches of no rows until all are
    through, so that every rank takes every step, and the exact loss makes that right (a plain average of
    ranks would not). Iterating again is the next epoch. The position is a small dict: the epoch goes on in
    the middle, with another number of ranks too, and every sample of it is used exactly once.

    A loop::

        loader = hvd.ShardedLoader(dataset, Shuffled(len(dataset), seed=1), batch_size=32, num_workers=2)
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                objective(model(x), y).backward()
                optimizer.step()
            torch.save({"data": loader.state_dict(), ...})

    Args:
        dataset: of ``sharding.samples`` samples, the same on all ranks.
        sharding: how they are shared out (:mod:`hvdloss.data`); equal on all ranks.
        batch_size: samples of one rank in one step.
        process_set: the ranks; None for all.
        collate_fn: as in ``DataLoader``.
        empty: makes the batch of a rank without samples from that of the first sample, for models that
            cannot bear none: one without weight, say. None for the same batch with no rows.
        options: of ``torch.utils.data.DataLoader``: ``num_workers``, ``pin_memory``,
            ``persistent_workers``, ...

    Raises:
        ConfigError: an argument that cannot be used.

    Collectives: none.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sharding: Sharding,
        batch_size: int,
        *,
        process_set: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        empty: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        for name in _OURS:
            if name in options:
                raise ConfigError(f"{name}= is decided by the sharding; leave it out")
        length = len(dataset) if hasattr(dataset, "__len__") else None
        if length != sharding.samples:
            raise ConfigError(
                f"the data set has {length} samples, but the sharding {sharding.samples}; make the sharding "
                f"with len(dataset)"
            )
        self.sharding, self.batch_size = sharding, check_int("batch_size", batch_size, 1)
        self._process_set = process_set
        self.rank, self.ranks = rank_and_size(hvd, process_set)
        self.epoch = Epoch(sharding, self.ranks)
        self._running: object = None  # the loop that is under way
        self._loader = DataLoader(
            dataset,
            batch_sampler=_Batches(self),
            collate_fn=_Collate(dataset, collate_fn or default_collate, empty or _without_rows),
            **options,
        )

    def __len__(self) -> int:
        """Return how many steps this epoch still has, or the next one if it is over; equal on all ranks."""
        return self._upcoming().steps(self.batch_size)

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the numbers of the remaining epochs out of `count`, one for each loop over the loader.

        An interrupted run goes on in the middle of one: its number comes from the position, so that no epoch
        is left out or done twice, wherever the position was taken.
        """
        while (number := self._upcoming().number) < count:
            yield number

    def _upcoming(self) -> Epoch:
        """Return the epoch that the next batch is of."""
        if self.epoch.exhausted and self.sharding.samples:
            return Epoch(self.sharding, self.ranks, self.epoch.number + 1)
        return self.epoch

    def __iter__(self) -> Iterator[Any]:
        """Yield the remaining batches of this epoch, or those of the next one."""
        if self._running is not None:
            raise UsageError("this ShardedLoader is being iterated over already; make another one")
        epoch = self.epoch = self._upcoming()
        left = len(self)
        this = self._running = object()
        try:
            for batch in self._loader:
                if self._running is not this:
                    raise UsageError("a position was loaded in the middle of this loop; begin another one")
                # The batch counts as used from here on: a state saved after its step has it.
                epoch.advance_steps(1, self.batch_size)
                left -= 1
                yield batch
        finally:
            if self._running is this:
                self._running = None
        assert not left

    def get_position(self) -> Any:
        """Return the current position for a later :meth:`state_dict`."""
        return list(self.epoch.consumed)

    def set_position(self, position: Any) -> None:
        """Go back to an earlier position of an interrupted loop, from :meth:`get_position`."""
        self.epoch.consumed = list(position)

    def state_dict(self, position: Any = None) -> dict[str, Any]:
        """Return the position, the same on all ranks; JSON-able. The batch last given counts as used.

        Args:
            position: an earlier one of this loop, from :meth:`get_position`; None for the current one.
        """
        reached = copy.copy(self.epoch)
        if position is not None:
            reached.consumed = position
        return reached.state_dict()

    start_state = state_dict  # before a loop; see StreamLoader

    def load_state_dict(self, state: Any) -> None:
        """Go on from a position, with whatever number of ranks there is now.

        A loop that is under way is over with it.

        Raises:
            ConfigError: no position, or one of other data or another sharding; nothing is changed then.
        """
        rank, ranks = rank_and_size(hvd, self._process_set)  # in an elastic job there are others now
        self.epoch = Epoch.from_state_dict(self.sharding, state, ranks)
        self.rank, self.ranks, self._running = rank, ranks, None


class _Batches:
    """The indices of one epoch's batches, for a DataLoader, which asks for them ahead."""

    def __init__(self, loader: ShardedLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[int]]:
        # The epoch notes what is used while it goes on: its batches must not shift meanwhile.
        batches = list(self.loader.epoch.batches(self.loader.rank, self.loader.batch_size))
        return (batch.tolist() for batch in batches)


def _without_rows(batch: Any) -> Any:
    return empty_like(batch, zero)


class _Collate:
    """Collates samples; none of them as an empty batch made from the first sample's."""

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], empty: Callable[[Any], Any]
    ) -> None:
        self.dataset, self.collate, self.empty = dataset, collate, empty

    def __call__(self, samples: list[Any]) -> Any:
        if samples:
            return self.collate(samples)
        return self.empty(self.collate([self.dataset[0]]))
