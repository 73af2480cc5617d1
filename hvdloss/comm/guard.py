"""The guard against silent desynchronisation: do all ranks still hold the same parameters?

Ranks diverge when an update happens on some of them only: a wrapper that does not reduce, a gradient clipped
before the reduction, a random number that differs. Training then goes on without an error. The guard
compares one checksum per parameter, off the hot path.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

from hvdloss.comm.communicator import Communicator, equal_on_all_ranks
from hvdloss.comm.messages import decode_all
from hvdloss.errors import AgreementError, ConfigError

__all__ = ["assert_synchronized", "checksum", "due", "mismatched_ranks"]


def checksum(data: Any) -> int:
    """Return the CRC-32 of the bytes of `data`, a C-contiguous buffer (a NumPy array, say).

    Different bytes have the same checksum with a probability of 2**-32.

    >>> checksum(b"abc") == checksum(bytearray(b"abc"))
    True
    """
    return zlib.crc32(memoryview(data).cast("B") if memoryview(data).nbytes else b"")


def mismatched_ranks(values: Sequence[Any]) -> list[int]:
    """Return the ranks whose value differs from rank 0's.

    >>> mismatched_ranks([5, 5, 7])
    [2]
    """
    return [rank for rank, value in enumerate(values) if value != values[0]]


def due(step: int, every: int | None) -> bool:
    """Return whether a check is due after this step, counted from 1; never if `every` is None.

    Raises:
        ConfigError: `every` below 1.
    """
    if every is None:
        return False
    if every < 1:
        raise ConfigError(f"every={every!r} must be at least 1, or None")
    return step % every == 0


def assert_synchronized(
    communicator: Communicator, names: Sequence[str], checksums: Sequence[int], *, name: str, when: str
) -> None:
    """Check that all ranks hold the same parameters.

    Args:
        communicator: the ranks.
        names: of this rank's parameters, in an order that is the same on all ranks.
        checksums: of the parameters.
        name: of the exchange.
        when: for the message: "after epoch 3", say.

    Raises:
        AgreementError: on every rank alike, naming the first parameter and the ranks that differ.

    Collectives: one sum of 32 numbers; where ranks differ, another sum and a gather.
    """
    named = json.dumps(list(names)).encode()
    named_alike, alike = equal_on_all_ranks(communicator, [named, json.dumps(list(checksums)).encode()], name)
    if named_alike and alike:
        return
    if not named_alike:
        mine = json.dumps([len(names), checksum(named)]).encode()
        listed = decode_all(communicator.all_gather_bytes(mine, f"{name}.names"), "names", _are_numbers)
        apart = mismatched_ranks(listed)
        lengths = [length for length, _ in listed]
        what = f"{lengths} of them" if len(set(lengths)) > 1 else "other names"
        raise AgreementError(
            f"{when}: rank(s) {_list(apart)} hold other parameters than rank 0 ({what}), so they cannot be "
            f"compared. Build the same model on every rank."
        )
    equal = equal_on_all_ranks(communicator, [str(one).encode() for one in checksums], f"{name}.each")
    i = equal.index(False)
    mine = json.dumps([i, checksums[i]]).encode()
    sums = decode_all(communicator.all_gather_bytes(mine, f"{name}.values"), "checksums", _are_numbers)
    raise AgreementError(
        f"{when}: parameter {i} ({names[i]}) has other values on rank(s) {_list(mismatched_ranks(sums))} "
        f"than on rank 0 ({equal.count(False)} of {len(names)} parameters differ): the ranks train different "
        f"models. "
        f"Broadcast the parameters before the first step, and change them only by steps whose gradients were "
        f"reduced over all ranks."
    )


def _are_numbers(message: Any) -> bool:
    return isinstance(message, list) and len(message) == 2 and all(isinstance(one, int) for one in message)


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
