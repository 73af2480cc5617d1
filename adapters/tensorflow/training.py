"""Training well, in loops of one's own with TensorFlow: decisions of all ranks, and seeds."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import tensorflow as tf
from hvdloss import train as core
from hvdloss.comm.communicator import communicator_for, rank_and_size
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.ops import communicator_of

__all__ = ["BestCheckpoint", "EarlyStopping", "merged_value", "seed_everything"]


def merged_value(value: Any, weight: Any = None, *, process_set: Any = None) -> float:
    """Return one number for all ranks; see :func:`hvdloss.train.merged_value`, whose errors it raises.

    Args:
        value: this rank's mean, with `weight`; else a number that all ranks have, which is checked.
        weight: what it is a mean of: the sum of weights, or the number of samples.
        process_set: the ranks; None for all.

    Collectives: one gather of two numbers.
    """
    return core.merged_value(communicator_for(hvd, communicator_of, process_set), value, weight)


class EarlyStopping(core.EarlyStopping):
    """:class:`hvdloss.train.EarlyStopping` over the ranks of a process set.

    Args:
        patience, options: its arguments.
        process_set: the ranks; None for all.
    """

    def __init__(self, patience: int = 0, *, process_set: Any = None, **options: Any) -> None:
        ranks = functools.partial(communicator_for, hvd, communicator_of, process_set)
        super().__init__(patience, communicator=ranks, **options)


class BestCheckpoint(core.BestCheckpoint):
    """The best arrays so far in a file of NumPy's: one rank writes it, whole or not at all.

    ::

        best = hvd.BestCheckpoint("best.npz", mode="max")
        best.step(metrics.compute()["auc"], model.get_weights)  # written if it is the best yet
        model.set_weights(best.load())

    Args:
        path, options: see :class:`hvdloss.train.BestCheckpoint`.
        process_set: the ranks; None for all.
    """

    def __init__(self, path: Any, *, process_set: Any = None, **options: Any) -> None:
        ranks = functools.partial(communicator_for, hvd, communicator_of, process_set)
        super().__init__(path, communicator=ranks, **options)

    def write(self, file: Any, state: Any) -> None:
        """Save a list of arrays."""
        np.savez(file, *[np.asarray(array) for array in state])

    def load(self) -> list[np.ndarray]:
        """Return the arrays in the file, on every rank, wherever the file is.

        Raises:
            ConfigError: it cannot be read; on every rank.

        Collectives: two gathers, one of them of the file's bytes.
        """

        def parse(file: Any) -> list[np.ndarray]:
            with np.load(file, allow_pickle=False) as held:
                return [held[name] for name in held.files]

        return self.parsed(parse)


def seed_everything(
    seed: int, *, epoch: int = 0, stream: str = "training", alike: bool = False, process_set: Any = None
) -> int:
    """Seed Python's, NumPy's and TensorFlow's random numbers, and return the seed.

    Each rank gets numbers of its own, the same ones in every rerun. Layers of Keras have generators of their
    own: see ``hvdloss.keras.seed_everything``.

    Args:
        seed: of the run, equal on all ranks.
        epoch, stream: what the numbers are for.
        alike: the same numbers on every rank, for initialising the model.
        process_set: the ranks; None for all.

    Raises:
        ConfigError: a negative seed or epoch.

    Collectives: none.
    """
    rank = rank_and_size(hvd, process_set)[0]
    made = core.seed_process(seed, rank, epoch=epoch, stream=stream, alike=alike)
    tf.random.set_seed(made)
    return made
