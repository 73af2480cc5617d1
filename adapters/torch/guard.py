"""The guard against silent desynchronisation, for PyTorch (see :mod:`hvdloss.comm.guard`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from hvdloss.comm.communicator import included
from hvdloss.comm.guard import assert_synchronized, checksum
from hvdloss.torch._backend import hvd
from hvdloss.torch.ops import communicator_of

__all__ = ["check_synchronized", "checksums"]


def checksums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return one integer per tensor that changes with (nearly) any bit of it."""
    return [
        checksum(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        if t.numel()
        else checksum(b"")
        for t in tensors
    ]


def check_synchronized(
    parameters: torch.nn.Module | Iterable[tuple[str, torch.Tensor]],
    *,
    process_set: Any = None,
    when: str = "check_synchronized",
) -> None:
    """Raise, on every rank, if parameters differ between ranks in any bit.

    Cheap enough for every few hundred steps: one pass over the parameters, a few bytes each on the wire.

    Args:
        parameters: a module (its parameters are compared, its buffers are not), or pairs of a name and a
            tensor; the same on all ranks.
        process_set: the ranks to compare; None for all.
        when: how the message begins.

    Raises:
        AgreementError: naming the first parameter and the ranks that differ from rank 0.

    Collectives: one gather (two all-gathers); none with one rank.
    """
    named = parameters.named_parameters() if isinstance(parameters, torch.nn.Module) else parameters
    group = process_set or hvd.global_process_set
    if not included(hvd, group):
        return
    pairs = list(named)
    sums = checksums(tensor for _, tensor in pairs)
    assert_synchronized(
        communicator_of(group), [name for name, _ in pairs], sums, name="hvdloss.guard", when=when
    )
