"""Sequences that are cut by the end of a micro-batch or of a rank: the sums of all their pieces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hvdloss.comm.collectives import auto_name, resolve_group
from hvdloss.comm.communicator import rank_and_size
from hvdloss.losses.segments import Link, LinkedSegments, check_micro_batches
from hvdloss.torch._backend import hvd
from hvdloss.torch.ops import as_array
from hvdloss.torch.waiting import raise_root_cause, wait

__all__ = ["link_segments"]


def link_segments(
    segments: Sequence[Any], weights: Sequence[Any] | None = None, *, over: Any = None, cut: str = "any"
) -> list[LinkedSegments]:
    """Return the segments of a step's micro-batches, whose sequences may be cut.

    A sequence's mean is over all of its pieces, so the weight of all of them must be known before the first
    backward pass. Call it once a step, before its first forward pass::

        linked = hvd.link_segments([b.ids for b in micro_batches], [b.mask for b in micro_batches])
        for b, segments in zip(micro_batches, linked):
            objective(model(b.x), b.y, b.mask, segments=segments).backward()

    Args:
        segments: of each micro-batch of this rank: ids, or :class:`hvdloss.losses.segments.Segments`. An id
            means one sequence in all of them; rows and ``cu_seqlens`` are whole sequences, whose groups may
            have others elsewhere. An empty list for a rank without any.
        weights: of each one's elements, as in calling the objective: None, a number or a tensor. They must
            be all of an element's weight: 0 where the target is ignored, times its class's weight.
        over: the process set whose ranks may have pieces of one sequence (or sequences of one group):
            ``hvd.global_process_set``, or the ranks that share a context. Ids then are those of all of these
            ranks, which must all call. None: a rank's sequences end with its step.
        cut: which sequences may have pieces on other ranks: "any" of those with ids, or those at the "ends"
            of rows (of the last axis): the first and last of each. Two pieces that are both inside of rows
            are then not seen.

    Returns:
        one for each micro-batch, whose ``sequences()`` says what the call of the objective will weigh, for
        ``optimizer.expect`` and ``objective.total``.

    Raises:
        ConfigError: what is no such list; a sequence inside a row, with "ends", that has a piece elsewhere.
        ShapeError: what does not fit.

    Collectives: none without `over`. With it one all-gather of 32 bytes for each sequence that may be cut,
    and each group; it is waited for in the first call of the objective. Tensors on a device are waited for.
    """
    found, weights = check_micro_batches(segments, weights, cut)
    group, rank, size = None, rank_and_size(hvd, None)[0], 1
    if over is not None:
        group, rank, size = resolve_group(hvd, over, "link_segments")
    link = Link(
        [one.arrays(as_array) for one in found],
        [as_array(weight) for weight in weights],
        ranks=over is not None,
        cut=cut,
        rank=rank,
    )
    table: Callable[[], Any] = lambda: link.table  # noqa: E731
    if size > 1:
        name = auto_name("link_segments", group)
        with raise_root_cause():
            handle = hvd.allgather_async(torch.from_numpy(link.table), name=name, process_set=group)

        def table() -> Any:
            return wait(handle, name, group).numpy()

    coefficients = functools.cache(lambda: link.coefficients(table()))
    if not found:  # nobody will ask
        coefficients()

    def numbers(index: int) -> tuple[Any, Any]:
        return coefficients()[index], link.weights[index]

    return [
        LinkedSegments(one, functools.partial(numbers, index), over is not None)
        for index, one in enumerate(found)
    ]
