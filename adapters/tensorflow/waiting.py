"""Waiting for other ranks: not for one that will not come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from hvdloss import watch
from hvdloss.communicator import ranks_of
from hvdloss.tensorflow._backend import hvd

__all__ = ["explaining"]


@contextlib.contextmanager
def explaining(name: str = "", process_set: Any = None) -> Iterator[None]:
    """Raise, for what TensorFlow says of a collective that failed, what the ranks know to be wrong.

    Args:
        name: of the exchange, for the watch; empty if what it belongs to is named already.
        process_set: whose exchange it is; None for all ranks'.

    Raises:
        RankError, LostRankError, StallError: ranks cannot go on together (:mod:`hvdloss.watch`).
    """
    if tf.executing_eagerly():
        watch.check()
    try:
        with watch.waiting(name, ranks_of(hvd, process_set)) if name else contextlib.nullcontext():
            yield
    except tf.errors.OpError as error:
        why = watch.explained(error)
        if why is error:
            raise
        raise why from error
