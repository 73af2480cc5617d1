"""Data for ``fit`` whose ranks together see every sample exactly once, and can go on from the middle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import keras
from hvdloss._util.checks import check_int
from hvdloss.comm.communicator import rank_and_size
from hvdloss.data import Epoch, Sharding
from hvdloss.errors import ConfigError, UsageError
from hvdloss.keras._backend import hvd
from hvdloss.train.seeds import generator_for

__all__ = ["EpochDataset", "ShardedDataset"]


class EpochDataset(keras.utils.PyDataset):
    """What knows which epoch of its sharding it is in, and where; ``fit`` tells it.

    A subclass gives the batches of what is left of an epoch, by number.
    """

    epoch: Epoch[Any]
    batch_size: int
    sharding: Any
    rank: int
    ranks: int
    _process_set: Any
    _begun = False
    #: steps of this epoch that a ``fit`` has made, which tells; None without one
    made: int | None = None
    _fitting = False

    def _start(self, epoch: Epoch[Any]) -> None:
        """Fix the batches of what is left of an epoch: ``fit`` asks for them ahead, and by number."""
        self.epoch = epoch
        self._steps = epoch.steps(self.batch_size)
        # The steps of this epoch that were made before, by whatever number of ranks.
        self._done = sum(-(-max(taken) // self.batch_size) for taken in epoch.state_dict()["parts"])
        self._begun = False
        self.made = None

    @property
    def num_batches(self) -> int:
        """How many steps this epoch has, the same on all ranks."""
        return self._steps

    def __len__(self) -> int:
        """Return :attr:`num_batches`."""
        return self.num_batches

    def on_epoch_begin(self) -> None:
        """Go to the next epoch, if this one has begun already. Keras calls it."""
        if self._begun:
            self.next_epoch()
        self._begun = True
        self.made = 0 if self._fitting else None

    def epochs(self, count: int) -> Iterator[int]:
        """Give the numbers of the epochs that are left of so many, as often as a loop over each begins.

        An interrupted run goes on in the middle of one: its number comes from the position, so that no epoch
        is left out or done twice, wherever the position was taken.
        """
        while (number := self._upcoming()) < count:
            yield number

    def _upcoming(self) -> int:
        """Return the number of the epoch that the next batch is of."""
        over = self._begun and (self.made is None or self.made >= len(self))
        return self.epoch.number + over

    def batches(self) -> Iterator[Any]:
        """Give what is left of this epoch, or else the next one, in a loop of one's own.

        The batch last given counts as used: :meth:`state_dict` has it.

        Raises:
            UsageError: a position was loaded in the middle of the loop.
        """
        if self.made is not None and self.made < len(self):  # a loop that was left
            self.load_state_dict(self.state_dict())
        self.on_epoch_begin()
        epoch, self.made = self.epoch, 0
        for number in range(len(self)):
            batch = self[number]
            if self.epoch is not epoch:
                raise UsageError("a position was loaded in the middle of this loop; begin another one")
            self.made = number + 1
            yield batch

    def next_epoch(self) -> None:
        """Leave what is left of this epoch, and begin with the next one."""
        self._start(Epoch(self.sharding, self.ranks, self.epoch.number + 1))

    def enter(self, epochs: int) -> None:
        """Get ready for a ``fit`` of so many epochs, which calls it.

        Raises:
            ConfigError: several, where the first one is what is left of an interrupted one.
        """
        if self._begun:
            self.next_epoch()
        if epochs > 1 and not self.epoch.is_fresh:
            raise ConfigError(
                f"epochs: the data goes on inside epoch {self.epoch.number}, of which {len(self)} steps are "
                f"left, and Keras would take as few of the epochs after it; fit the rest of this one by "
                f"itself (epochs=initial_epoch + 1), and then the others"
            )
        self._fitting = True

    def leave(self) -> None:
        """Take note that the ``fit`` is over, which calls it."""
        self._fitting = False

    def state_dict(self, steps: int | None = None) -> dict[str, Any]:
        """Return the position after so many steps of this epoch, the same on all ranks; JSON-able.

        Args:
            steps: that this ``fit`` has made of it, such as ``batch + 1`` in a callback's
                ``on_train_batch_end(batch)``; None for what the ``fit`` has made by now. Without one, all of
                an epoch that has begun, and none of one that has not.
        """
        if steps is None:
            steps = self.made if self.made is not None else len(self) if self._begun else 0
        reached = copy.copy(self.epoch)  # which notes what is taken anew
        reached.advance_steps(steps, self.batch_size)
        return reached.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Go on from a position, with whatever number of ranks there is now.

        Raises:
            ConfigError: no position, or one of other data or another sharding; nothing is changed then.
        """
        rank, ranks = rank_and_size(hvd, self._process_set)  # in an elastic job there are others now
        epoch = Epoch.from_state_dict(self.sharding, state, ranks)
        self.rank, self.ranks = rank, ranks
        self._start(Epoch(self.sharding, ranks, epoch.number + 1) if epoch.exhausted else epoch)


class ShardedDataset(EpochDataset):
    """Batches of this rank's shard of a data set, the same number of them on every rank, for Keras's ``fit``.

    Shards may be uneven, or empty: ranks whose samples are used up give batches of no rows until all are
    through, so that every rank takes every step, and the exact loss makes that right. Every epoch of
    ``fit`` is the next epoch of the sharding, in the order of the shard whatever ``shuffle`` says. The
    position is a small dict; an epoch goes on in the middle, on another number of ranks too::

        data = hvd.ShardedDataset((x, y), Shuffled(len(x), seed=1), batch_size=32)
        model.fit(data, epochs=5)

    Keras takes the number of steps of all epochs of a ``fit`` from the first one, so what is left of an
    interrupted epoch is a ``fit`` of its own.

    Args:
        arrays: a tuple of arrays (NumPy, memory maps, h5py) of ``sharding.samples`` rows each: x, y and
            sample weights as ``fit`` takes them; or a function from int64 row numbers to such a tuple of
            their rows.
        sharding: how they are shared out (:mod:`hvdloss.data`); equal on all ranks.
        batch_size: samples of one rank in one step.
        process_set: the ranks; None for all.
        transform: ``(batch, rng) -> batch``: changes every batch (mixup, augmentation), with a
            ``numpy.random.Generator`` that follows from `seed`, rank, epoch and step, also where an epoch
            goes on in the middle.
        seed: of `transform`'s random numbers, equal on all ranks.
        options: of ``keras.utils.PyDataset``: ``workers``, ``use_multiprocessing``, ``max_queue_size``.

    Raises:
        ConfigError: an argument that cannot be used.

    Collectives: none.
    """

    def __init__(
        self,
        arrays: Any,
        sharding: Sharding,
        batch_size: int,
        *,
        process_set: Any = None,
        transform: Callable[[Any, np.random.Generator], Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if transform is not None and not callable(transform):
            raise ConfigError(f"transform={transform!r} must be a function (batch, rng) -> batch")
        self.transform, self.seed = transform, seed
        if not callable(arrays):
            if not isinstance(arrays, tuple):
                raise ConfigError(
                    f"arrays= is a {type(arrays).__name__}; give a tuple, (x, y) or (x, y, sample_weight), "
                    f"or a function from row numbers to one"
                )
            lengths = {len(a) for a in keras.tree.flatten(arrays)}
            if lengths != {sharding.samples}:
                raise ConfigError(
                    f"arrays= have {sorted(lengths)} rows, but the sharding {sharding.samples}; make the "
                    f"sharding with their length"
                )
        self.arrays, self.sharding, self.batch_size = arrays, sharding, check_int("batch_size", batch_size, 1)
        self._process_set = process_set
        self.rank, self.ranks = rank_and_size(hvd, process_set)
        self._start(Epoch(sharding, self.ranks))

    def _start(self, epoch: Epoch[Any]) -> None:
        """Fix the batches of what is left of an epoch."""
        super()._start(epoch)
        self._batches = list(epoch.batches(self.rank, self.batch_size))

    def __getitem__(self, number: int) -> Any:
        """Return a batch of this rank, by its number in what is left of the epoch."""
        rows = self._batches[number]
        if callable(self.arrays):
            batch = self.arrays(rows)
        else:
            batch = keras.tree.map_structure(lambda a: _rows(a, rows), self.arrays)
        if self.transform is None:
            return batch
        place = {"rank": self.rank, "epoch": self.epoch.number, "step": self._done + number}
        return self.transform(batch, generator_for(self.seed, **place, stream="batch"))


def _rows(array: Any, rows: np.ndarray) -> np.ndarray:
    """Return rows of an array, read in order of place, as files like it."""
    order = np.argsort(rows, kind="stable")
    ordered, back = rows[order], np.empty_like(order)
    back[order] = np.arange(len(order))
    unique, again = np.unique(ordered, return_inverse=True)
    return np.asarray(array[unique] if len(unique) else array[:0])[again][back]
