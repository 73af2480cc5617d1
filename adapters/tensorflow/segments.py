"""Packed sequences for loops that have no place for segments, and sequences that are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import tensorflow as tf
from hvdloss.comm.collectives import auto_name, resolve_group
from hvdloss.comm.communicator import rank_and_size
from hvdloss.errors import UsageError
from hvdloss.losses.segments import Link, LinkedSegments, Segments, check_micro_batches
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.ops import TensorFlowOps, communicator_of

__all__ = ["link_segments", "sequence_weights"]

_OPS = TensorFlowOps()


def sequence_weights(weight: Any, segments: Any) -> tf.Tensor:
    """Return weights with which the mean over elements is the mean over sequences.

    For what takes no segments, as Keras's ``fit``; with ``reduction="mean"``. In a dataset too::

        dataset.map(lambda x, y, mask, ids: (x, y, hvd.sequence_weights(mask, ids)))

    Args:
        weight: of the elements, a tensor of their shape; 0 where the target is ignored.
        segments: ids of the same shape, or :class:`hvdloss.losses.segments.Segments`.

    Returns:
        weights of that shape; those of a sequence add up to 1, or to its weight.

    Raises:
        ShapeError: what does not fit.

    Collectives: none.
    """
    rank, _ = rank_and_size(hvd, None)
    weight = _OPS.losses(tf.convert_to_tensor(weight))
    segments = Segments.of(segments)
    layout = segments.lay_out(_OPS, weight, rank)
    w = layout.masked(_OPS, weight, weight, per_token=False, rank=rank)
    return tf.cast(layout.shares(_OPS, w), weight.dtype)


def link_segments(
    segments: Sequence[Any], weights: Sequence[Any] | None = None, *, over: Any = None, cut: str = "any"
) -> list[LinkedSegments]:
    """Return the segments of a step's micro-batches, whose sequences may be cut.

    A sequence's mean is over all of its pieces, so the weight of all of them must be known before the first
    backward pass. Call it eagerly, once a step, before its first forward pass. What it returns may be an
    argument of a ``tf.function``.

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
        one for each micro-batch, whose ``sequences()`` says what the call of the objective will weigh.

    Raises:
        ConfigError: what is no such list; a sequence inside a row, with "ends", that has a piece elsewhere.
        ShapeError: what does not fit.
        UsageError: inside a graph.

    Collectives: none without `over`. With it two all-gathers: of a number, and of 32 bytes for each sequence
    that may be cut, and each group.
    """
    if not tf.executing_eagerly():
        raise UsageError(
            "link_segments() in a graph: call it before the tf.function, and pass what it returns to that"
        )
    found, weights = check_micro_batches(segments, weights, cut)
    group, rank = None, rank_and_size(hvd, None)[0]
    if over is not None:
        group, rank, _ = resolve_group(hvd, over, "link_segments")
    link = Link(
        [one.arrays(np.asarray) for one in found],
        [None if weight is None else np.asarray(weight) for weight in weights],
        ranks=over is not None,
        cut=cut,
        rank=rank,
    )
    table = link.table
    if group is not None and hvd.is_initialized():
        parts = communicator_of(group).all_gather_bytes(table.tobytes(), auto_name("link_segments", group))
        table = np.frombuffer(b"".join(parts), np.int64).reshape(-1, 4)
    numbers = [
        (tf.constant(c), tf.constant(w)) for c, w in zip(link.coefficients(table), link.weights, strict=True)
    ]
    return [
        LinkedSegments(one.arrays(tf.convert_to_tensor), lambda pair=pair: pair, over is not None)
        for one, pair in zip(found, numbers, strict=True)
    ]
