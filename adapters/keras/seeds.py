"""Random numbers of layers and of everything else, for each rank its own."""

from __future__ import annotations

from typing import Any

import keras
from hvdloss.comm.communicator import rank_and_size
from hvdloss.keras._backend import hvd
from hvdloss.train.seeds import seed_for

__all__ = ["seed_everything"]


def seed_everything(
    seed: int,
    *,
    epoch: int = 0,
    stream: str = "training",
    alike: bool = False,
    model: Any = None,
    process_set: Any = None,
) -> int:
    """Seed Python's, NumPy's, TensorFlow's and Keras's random numbers, and return the seed.

    Each rank gets numbers of its own (masks of dropout that differ), the same ones in every rerun::

        hvd.seed_everything(7, alike=True)  # the same weights on all ranks
        model = make_model()
        model.fit(..., callbacks=[hvd.callbacks.SeedCallback(7)])  # seeds at every epoch's beginning

    Args:
        seed: of the run, equal on all ranks.
        epoch, stream: what the numbers are for.
        alike: the same numbers on every rank, for initialising the model.
        model: whose layers' own generators (dropout, noise, augmentation) are seeded as well.
        process_set: the ranks; None for all.

    Raises:
        ConfigError: a negative seed or epoch.

    Collectives: none.
    """
    rank = 0 if alike else rank_and_size(hvd, process_set)[0]
    name = "alike" if alike else stream
    made = seed_for(seed, rank=rank, epoch=epoch, stream=name)
    keras.utils.set_random_seed(made % 2**32)
    held = [] if model is None else [v for v in model.non_trainable_variables if "seed_generator" in v.path]
    for number, state in enumerate(held):
        own = seed_for(seed, rank=rank, epoch=epoch, stream=f"{name} of generator {number}")
        # A seed and how often it was drawn from: together 51 bits, with room to go on counting.
        state.assign([own % 2**31, (own >> 31) % 2**20])
    return made
