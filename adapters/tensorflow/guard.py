"""The guard against silent desynchronisation, for TensorFlow (see :mod:`hvdloss.comm.guard`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from hvdloss.comm.communicator import included
from hvdloss.comm.guard import assert_synchronized, checksum
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.ops import communicator_of

__all__ = ["check_synchronized", "checksums", "parameter_name"]


def parameter_name(variable: Any) -> str:
    """Return a variable's name, equal on ranks that build the same model.

    Keras numbers layers (``dense_4/kernel``) by how many the process has built, which may be more on one
    rank than on another; the numbers are left out.
    """
    return re.sub(r"_\d+(?=/|$)", "", getattr(variable, "path", variable.name))


def checksums(variables: Iterable[Any]) -> list[int]:
    """Return one integer per variable, of its bits."""
    return [checksum(np.ascontiguousarray(v.numpy()).reshape(-1).view(np.uint8)) for v in variables]


def check_synchronized(
    parameters: Any | Iterable[Any], *, process_set: Any = None, when: str = "check_synchronized"
) -> None:
    """Raise, on every rank, if parameters differ between ranks in any bit.

    Cheap enough for every few hundred steps: one pass over the parameters, a few bytes each on the wire.
    Call it eagerly.

    Args:
        parameters: something with ``trainable_variables`` (a Keras model or layer, a ``tf.Module``), or
            variables; the same on all ranks.
        process_set: the ranks to compare; None for all.
        when: how the message begins.

    Raises:
        AgreementError: naming the first parameter and the ranks that differ from rank 0.

    Collectives: one gather (two all-gathers); none with one rank.
    """
    variables = list(getattr(parameters, "trainable_variables", parameters))
    group = process_set or hvd.global_process_set
    if not included(hvd, group):
        return
    names = [parameter_name(v) for v in variables]
    assert_synchronized(communicator_of(group), names, checksums(variables), name="hvdloss.guard", when=when)
