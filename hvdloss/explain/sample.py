"""A fair sample of all ranks' rows that does not depend on which rank has which row; and even shares.

Every row has a random key that follows from its id and the seed alone; the rows with the smallest keys are
the sample (a bottom-k sketch: Cohen and Kaplan 2007; with weights Efraimidis and Spirakis 2006). Each rank
sends no more than its k smallest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.comm.collectives import even_sizes
from hvdloss.errors import WeightError

__all__ = ["moves", "random_bits", "random_keys", "smallest"]

Bits = npt.NDArray[np.uint64]


def random_bits(ids: npt.NDArray[Any], seed: int, stream: int = 0) -> Bits:
    """Return 64 random bits per id that follow from the id, the seed and the stream alone.

    Integers are mixed by SplitMix64's finaliser (Steele, Lea and Flood 2014), strings by BLAKE2.

    >>> random_bits(np.array([1, 2]), seed=0).tolist() == random_bits(np.array([1, 2]), seed=0).tolist()
    True
    """
    if ids.dtype.kind == "U":
        digests = [hashlib.blake2b(one.encode(), digest_size=8).digest() for one in ids.tolist()]
        x = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
    else:
        x = ids.astype(np.int64).view(np.uint64)
    # The seed's own bits come from NumPy, so that neighbouring seeds have nothing in common.
    salt = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint64)
    return np.asarray(_mixed(_mixed(x ^ salt[0]) + salt[1]))


def _mixed(x: Bits) -> Bits:
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))


def random_keys(
    ids: npt.NDArray[Any], seed: int, stream: int, weight: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.float64]:
    """Return one key per id, exponentially distributed with its weight as the rate; the smallest are drawn.

    A row of weight zero has the key infinity: it is never drawn.

    Raises:
        WeightError: a weight that is negative, NaN or infinite.
    """
    uniform = ((random_bits(ids, seed, stream) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    keys = -np.log(uniform)
    if weight is None:
        return np.asarray(keys)
    w = np.asarray(weight, dtype=np.float64)
    if not (np.isfinite(w) & (w >= 0)).all():
        row = int(np.flatnonzero(~(np.isfinite(w) & (w >= 0)))[0])
        raise WeightError(f"the weight of row {row} is {w[row]}; weights are finite and at least 0")
    out: npt.NDArray[np.float64] = np.divide(keys, w, out=np.full(len(keys), np.inf), where=w > 0)
    return out


def smallest(
    keys: npt.NDArray[np.float64], ids: npt.NDArray[Any], count: int | None
) -> npt.NDArray[np.int64]:
    """Return where the `count` smallest finite keys are, by id; ties of keys go to the smaller id."""
    order = np.lexsort((ids, keys))
    order = order[np.isfinite(keys[order])][:count]
    return np.asarray(order[np.argsort(ids[order], kind="stable")])


def moves(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return which rank works on each row, all ranks' rows one after another: even, with few rows moved.

    A rank keeps its first rows, up to its share; what is over goes, in order, to those that have too few.

    >>> moves([5, 0, 1]).tolist()
    [0, 0, 1, 1, 2, 2]
    """
    shares = even_sizes(sum(counts), len(counts))
    spare = iter(
        [
            rank
            for rank, (has, share) in enumerate(zip(counts, shares, strict=True))
            for _ in range(share - has)
        ]
    )
    works: list[int] = []
    for rank, (has, share) in enumerate(zip(counts, shares, strict=True)):
        kept = min(has, share)
        works += [rank] * kept
        works += [next(spare) for _ in range(has - kept)]
    return np.array(works, np.int64)
