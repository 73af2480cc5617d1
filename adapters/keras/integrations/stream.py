"""Files larger than memory for Keras's ``fit``, and as a ``tf.data.Dataset`` for loops of one's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

import keras
from hvdloss._util.checks import check_int
from hvdloss.comm.agreement import run_on_all_ranks
from hvdloss.comm.communicator import Communicator, rank_and_size
from hvdloss.data import Epoch, Source
from hvdloss.data.stream import OpenedSource, Rules, read_batches
from hvdloss.errors import ConfigError, DataError
from hvdloss.keras._backend import hvd
from hvdloss.keras.integrations.data import EpochDataset
from hvdloss.tensorflow.ops import communicator_of

__all__ = ["StreamDataset"]


class StreamDataset(EpochDataset):
    """Batches of this rank's part of files, the same number of them on every rank, for Keras's ``fit``.

    Files (:class:`hvdloss.data.Parquet`, ``Csv``, ``NumpyFiles``) are read a row group at a time, one ahead,
    and never held whole. Every row is on exactly one rank; ranks that are through give batches of no rows
    until all are. Epochs, and the position in one, are as with :class:`ShardedDataset`::

        files = hvdloss.data.Parquet("data/", columns=["x", "y"])
        data = hvd.StreamDataset(files, batch_size=256, collate_fn=lambda c: (c["x"], c["y"]))
        model.fit(data, epochs=5)

    A file that cannot be read is the same error on every rank, naming the file and the row group.

    Args:
        data: the files; the same on all ranks.
        batch_size: rows of one rank in one step.
        sharding: which rank reads which row groups (:class:`hvdloss.data.RowGroups`), or a function from
            their numbers of rows to it; None for shuffled ones with seed 0.
        process_set: the ranks; None for all.
        collate_fn: makes ``(x, y)`` or ``(x, y, sample_weight)`` from a dict of NumPy arrays by column, also
            from arrays without rows; None for the dict itself.
        max_queue_size: batches that ``fit`` holds ready.

    Raises:
        ConfigError: an argument that cannot be used.
        DataError: of ``fit`` and ``as_tf_data``: a file cannot be opened, on every rank.
        AgreementError: of these: ranks see other files.

    Collectives: two gathers when a ``fit`` begins, one in ``as_tf_data``.
    """

    def __init__(
        self,
        data: Source,
        batch_size: int,
        *,
        sharding: Rules | None = None,
        process_set: Any = None,
        collate_fn: Callable[[dict[str, np.ndarray]], Any] | None = None,
        max_queue_size: int = 10,
    ) -> None:
        # One thread asks for batches, in order; what reads ahead is here.
        super().__init__(workers=1, use_multiprocessing=False, max_queue_size=max_queue_size)
        if not isinstance(data, Source):
            raise ConfigError(
                f"data={type(data).__name__} must be files (hvdloss.data.Parquet, Csv, NumpyFiles); for "
                f"arrays there is ShardedDataset"
            )
        self.data, self.collate_fn = data, collate_fn
        self.batch_size = check_int("batch_size", batch_size, 1)
        self._process_set = process_set
        self.rank, self.ranks = rank_and_size(hvd, process_set)
        self._opened = OpenedSource(data, sharding, self.ranks)
        self.sharding = self._opened.rule
        self.error: DataError | None = None  # which Keras's threads turn into another
        self._lock = threading.Lock()
        self._start(Epoch(self.sharding, self.ranks))

    @property
    def _ranks(self) -> Communicator:
        return communicator_of(self._process_set or hvd.global_process_set)

    def _start(self, epoch: Epoch[Any]) -> None:
        with self._lock:
            super()._start(epoch)
            self._mine = epoch.remaining[self.rank]
            self._next, self._reading = 0, iter(())

    def enter(self, epochs: int) -> None:
        """Get ready for a ``fit`` of so many epochs, which calls it, and see that all ranks can read.

        Raises:
            ConfigError: see :class:`ShardedDataset`.
            DataError: a rank cannot open its files, or read its first batch, on every rank.
            AgreementError: ranks see other files.

        Collectives: two gathers.
        """
        self._opened.check_consistency(self._ranks)
        super().enter(epochs)
        self.error = None
        run_on_all_ranks(self._ranks, self._try, "hvdloss.stream.first", "what first batches tell")

    def _try(self) -> None:
        self[0]

    def state_dict(self, steps: int | None = None) -> dict[str, Any]:
        """Return the position, as :meth:`ShardedDataset.state_dict`, with which files it is of."""
        return self._opened.with_fingerprint(super().state_dict(steps))

    def load_state_dict(self, state: Any) -> None:
        """Go on from a position, with whatever number of ranks there is now.

        Where this rank could not open its files the position is left alone: ``fit`` tells all ranks why.

        Raises:
            ConfigError: no position, or one of other files or another sharding; nothing is changed then.
        """
        if self._opened.problem is None:
            self._opened.check(state, rank_and_size(hvd, self._process_set)[1])
            super().load_state_dict(state)

    def __getitem__(self, number: int) -> Any:
        """Return a batch of this rank, by its number in what is left of the epoch; quick in order."""
        try:
            with self._lock:
                columns = self._columns(number)
        except DataError as error:
            self.error = error
            raise
        return columns if self.collate_fn is None else self.collate_fn(columns)

    def _columns(self, number: int) -> dict[str, np.ndarray]:
        first = number * self.batch_size
        if first >= len(self._mine):
            return self.data.empty()
        if number != self._next:
            self._reading = iter(())
        if number != self._next or not number:
            self._reading = read_batches(
                self.data, self.sharding, self.epoch.number, self._mine[first:], self.batch_size
            )
        self._next = number + 1
        return next(self._reading)

    def as_tf_data(self) -> tf.data.Dataset:
        """Return the batches as a ``tf.data.Dataset``: every iteration of it is the next epoch's.

        Its elements have the structure of a batch. For loops of one's own; wrapped in
        ``hvd.uneven(dataset, objective)`` a file that cannot be read is known to all ranks. ``fit`` takes the
        :class:`StreamDataset` itself.

        Raises:
            DataError: a rank cannot open its files, on every rank.
            AgreementError: ranks see other files.

        Collectives: one gather.
        """
        self._opened.check_consistency(self._ranks)
        empty = self.data.empty()
        template = empty if self.collate_fn is None else self.collate_fn(empty)
        spec = keras.tree.map_structure(
            lambda a: tf.TensorSpec((None, *np.shape(a)[1:]), _dtype(np.asarray(a).dtype)), template
        )

        def epoch() -> Iterator[Any]:
            self.on_epoch_begin()
            for number in range(len(self)):
                yield self[number]

        return tf.data.Dataset.from_generator(epoch, output_signature=spec)


def _dtype(kind: np.dtype[Any]) -> tf.DType:
    return tf.string if kind.kind in "OUS" else tf.as_dtype(kind)
