"""The guard against silent desynchronisation: do all ranks still hold the same parameters?

Ranks that once agreed drift apart when an update happens on some of them only: a wrapper that does not
reduce, a gradient clipped before the reduction, a random number that differs. Training then goes on,
and nothing tells. The guard compares one checksum per parameter, off the hot path.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

from hvdloss.communicator import Communicator
from hvdloss.errors import AgreementError, ConfigError
from hvdloss.hearing import hear

__all__ = ["checksum", "compare", "due", "ranks_apart"]


def checksum(data: Any) -> int:
    """Return the CRC-32 of the bytes of `data`, a C-contiguous buffer (a NumPy array, say).

    Equal if and only if the bytes are equal, but for one chance in four thousand million.

    >>> checksum(b"abc") == checksum(bytearray(b"abc"))
    True
    """
    return zlib.crc32(memoryview(data).cast("B") if memoryview(data).nbytes else b"")


def ranks_apart(values: Sequence[Any]) -> list[int]:
    """Return the ranks whose value differs from rank 0's.

    >>> ranks_apart([5, 5, 7])
    [2]
    """
    return [rank for rank, value in enumerate(values) if value != values[0]]


def due(step: int, every: int | None) -> bool:
    """Return whether a check falls due after this step, counted from 1; never if `every` is None.

    Raises:
        ConfigError: `every` below 1.
    """
    if every is None:
        return False
    if every < 1:
        raise ConfigError(f"every={every!r} must be at least 1, or None")
    return step % every == 0


def compare(
    communicator: Communicator, names: Sequence[str], checksums: Sequence[int], *, name: str, when: str
) -> None:
    """Check that all ranks hold the same parameters.

    Args:
        communicator: the ranks.
        names: of this rank's parameters, in an order that is the same on all ranks.
        checksums: theirs.
        name: of the exchange.
        when: for the message: "after epoch 3", say.

    Raises:
        AgreementError: on every rank alike, naming the first parameter and the ranks that differ.

    Collectives: one gather of a few bytes per parameter.
    """
    mine = json.dumps([list(names), list(checksums)]).encode()
    ranks = hear(communicator.gather(mine, name), "checksums", _is_list_of_sums)
    listed = [names for names, _ in ranks]
    if apart := ranks_apart(listed):
        lengths = [len(names) for names in listed]
        what = f"{lengths} of them" if len(set(lengths)) > 1 else "other names"
        raise AgreementError(
            f"{when}: rank(s) {_list(apart)} hold other parameters than rank 0 ({what}), so they cannot be "
            f"compared. Build the same model on every rank."
        )
    for i, parameter in enumerate(listed[0]):
        if apart := ranks_apart([sums[i] for _, sums in ranks]):
            differ = sum(bool(ranks_apart([sums[j] for _, sums in ranks])) for j in range(len(listed[0])))
            raise AgreementError(
                f"{when}: parameter {i} ({parameter}) has other values on rank(s) {_list(apart)} than on "
                f"rank 0 ({differ} of {len(listed[0])} parameters differ): the ranks train different "
                f"models. Broadcast the parameters before the first step, and change them only by steps "
                f"whose gradients were reduced over all ranks."
            )


def _is_list_of_sums(told: Any) -> bool:
    names, sums = told
    return isinstance(names, list) and isinstance(sums, list) and len(names) == len(sums)


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
