"""Making ranks equal: variables, and objects, from one rank to all."""

from __future__ import annotations

from typing import Any

import numpy as np

import tensorflow as tf
from hvdloss.comm.agreement import check_items_consistent
from hvdloss.comm.collectives import group_by_bytes, named_by_ordinal, resolve_group, root_index
from hvdloss.errors import ConfigError
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.guard import parameter_name
from hvdloss.tensorflow.ops import at_once, communicator_of
from hvdloss.tensorflow.waiting import raise_root_cause

__all__ = ["allgather_object", "broadcast_object", "broadcast_variables"]

broadcast_object = named_by_ordinal(hvd.broadcast_object)
allgather_object = named_by_ordinal(hvd.allgather_object)


def _described(variable: Any) -> tuple[str, list[Any]]:
    """Return what must be equal on all ranks for a variable to be broadcast.

    Raises:
        ConfigError: it cannot be, naming it.
    """
    name, dtype = parameter_name(variable), tf.as_dtype(variable.dtype)
    if dtype in (tf.string, tf.resource, tf.variant):
        raise ConfigError(
            f"broadcast_variables: {name} is of {dtype.name}; leave it out, and send its value with "
            f"broadcast_object"
        )
    return name, [dtype.name, list(variable.shape)]


def broadcast_variables(
    variables: Any, root_rank: int = 0, process_set: Any = None, inplace: bool = False
) -> Any:
    """Give every rank one rank's values of variables of TensorFlow or Keras, of any dtype but strings.

    In a graph (of TensorFlow 1, or of a ``tf.function``) this is Horovod's own, which returns an operation
    there and knows fewer dtypes.

    Args:
        variables: the same on all ranks, in the same order.
        root_rank: as Horovod counts, among all ranks.
        process_set: the ranks; None for all.
        inplace: accepted for Horovod's sake.

    Raises:
        ConfigError: `root_rank` is not in the process set, or a variable holds strings; names it.
        AgreementError: ranks have other variables: names the first one. Nothing has changed.
        UsageError: this rank is not in the process set.

    Collectives: one gather of a few bytes, and one broadcast per 64 MiB.
    """
    group, rank, size = resolve_group(hvd, process_set, "broadcast_variables")
    root = root_index(hvd, group, size, root_rank, "broadcast_variables")
    if not tf.executing_eagerly():
        return hvd.broadcast_variables(variables, root_rank, process_set=group, inplace=inplace)
    held = list(variables)
    if size == 1:
        return None
    check_items_consistent(
        communicator_of(group),
        lambda: [("root_rank", root_rank), *map(_described, held)],
        name="hvdloss.broadcast_variables",
        what="broadcast_variables: variable",
        remedy="Build the same model on every rank, and pass the same variables and root_rank.",
    )
    values = [np.asarray(v.numpy()) for v in held]
    for number, places in enumerate(group_by_bytes([value.nbytes for value in values])):
        flat = np.concatenate([np.ascontiguousarray(values[i]).reshape(-1).view(np.uint8) for i in places])
        with at_once(), raise_root_cause("broadcast_variables", group):
            got = hvd.broadcast(
                tf.constant(flat), root_rank, name=f"hvdloss.broadcast_variables.{number}", process_set=group
            ).numpy()
        for i in () if rank == root else places:
            piece, got = got[: values[i].nbytes], got[values[i].nbytes :]
            held[i].assign(piece.view(values[i].dtype).reshape(values[i].shape))
    return None
