"""Random numbers that differ between ranks, epochs and uses, and are the same in every rerun."""

from __future__ import annotations

import random
import zlib

import numpy as np

from hvdloss._util.checks import check_int

__all__ = ["generator_for", "seed_for", "seed_process"]


def _sequence(seed: int, rank: int, epoch: int, step: int, stream: str) -> np.random.SeedSequence:
    for name, value in (("seed", seed), ("rank", rank), ("epoch", epoch), ("step", step)):
        check_int(name, value, 0)
    # The length parts streams whose CRC is equal; and a key of five parts is no other sequence's spawn.
    word = stream.encode()
    return np.random.SeedSequence(
        int(seed), spawn_key=(zlib.crc32(word), len(word), int(rank), int(epoch), int(step))
    )


def seed_for(seed: int, *, rank: int = 0, epoch: int = 0, step: int = 0, stream: str = "") -> int:
    """Return a seed of its own for every rank, epoch, step and stream, below 2**63.

    Neighbouring ranks and epochs get unrelated numbers (``seed + rank`` would give rank 1 of seed 0 the
    numbers of rank 0 of seed 1). Made by NumPy's SeedSequence (O'Neill, "Developing a seed_seq alternative",
    2015), whose results NumPy keeps the same over versions and machines.

    Args:
        seed: of the run, any integer of at least 0.
        rank, epoch, step: the numbers belong to; the same after an interruption.
        stream: what for: ``"dropout"``, ``"mixup"``, ...

    Raises:
        ConfigError: a number that is negative or no integer.

    >>> seed_for(1, rank=0, stream="dropout") == seed_for(1, rank=0, stream="dropout")
    True
    >>> len({seed_for(1, rank=rank, epoch=epoch) for rank in range(10) for epoch in range(10)})
    100
    """
    return int(_sequence(seed, rank, epoch, step, stream).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_for(
    seed: int, *, rank: int = 0, epoch: int = 0, step: int = 0, stream: str = ""
) -> np.random.Generator:
    """Return NumPy's generator of the same name as :func:`seed_for`'s seed; arguments and errors are its."""
    return np.random.default_rng(_sequence(seed, rank, epoch, step, stream))


def seed_process(
    seed: int, rank: int, *, epoch: int = 0, stream: str = "training", alike: bool = False
) -> int:
    """Seed Python's and NumPy's random numbers for a rank, and return the seed for those of a framework.

    Args:
        seed, epoch, stream: see :func:`seed_for`.
        rank: this process's.
        alike: the same numbers on every rank.

    Raises:
        ConfigError: see :func:`seed_for`.
    """
    made = seed_for(seed, rank=0 if alike else rank, epoch=epoch, stream="alike" if alike else stream)
    random.seed(made)
    np.random.seed(made % 2**32)
    return made
