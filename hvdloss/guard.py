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

from hvdloss.communicator import Communicator, same
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

    Collectives: one sum of 32 numbers; where ranks differ, a sum and a gather more.
    """
    named = json.dumps(list(names)).encode()
    named_alike, alike = same(communicator, [named, json.dumps(list(checksums)).encode()], name)
    if named_alike and alike:
        return
    if not named_alike:
        mine = json.dumps([len(names), checksum(named)]).encode()
        listed = hear(communicator.gather(mine, f"{name}.names"), "names", _are_numbers)
        apart = ranks_apart(listed)
        lengths = [length for length, _ in listed]
        what = f"{lengths} of them" if len(set(lengths)) > 1 else "other names"
        raise AgreementError(
            f"{when}: rank(s) {_list(apart)} hold other parameters than rank 0 ({what}), so they cannot be "
            f"compared. Build the same model on every rank."
        )
    equal = same(communicator, [str(one).encode() for one in checksums], f"{name}.each")
    i = equal.index(False)
    mine = json.dumps([i, checksums[i]]).encode()
    sums = hear(communicator.gather(mine, f"{name}.values"), "checksums", _are_numbers)
    raise AgreementError(
        f"{when}: parameter {i} ({names[i]}) has other values on rank(s) {_list(ranks_apart(sums))} than on "
        f"rank 0 ({equal.count(False)} of {len(names)} parameters differ): the ranks train different models. "
        f"Broadcast the parameters before the first step, and change them only by steps whose gradients were "
        f"reduced over all ranks."
    )


def _are_numbers(told: Any) -> bool:
    return isinstance(told, list) and len(told) == 2 and all(isinstance(one, int) for one in told)


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
