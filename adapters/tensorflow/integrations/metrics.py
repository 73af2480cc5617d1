"""Metrics over all ranks, from TensorFlow's tensors."""

from __future__ import annotations

import functools
from typing import Any

from hvdloss import metrics as core
from hvdloss.comm.communicator import communicator_for
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.ops import communicator_of

__all__ = ["Metrics"]


class Metrics(core.Metrics):
    """:class:`hvdloss.metrics.Metrics` over the ranks of a process set, from eager tensors or arrays.

    The classes' axis is the last one.

    ::

        metrics = hvd.Metrics({"f1": F1(classes=10), "auc": AUC(classes=10, from_logits=True)})
        for x, y, weight in dataset:
            metrics.update(model(x), y, weight)
        print(metrics.compute())

    Args:
        metrics: one of :mod:`hvdloss.metrics`, or a dict of them by name.
        process_set: the ranks; None for all.

    Raises:
        ConfigError: no metric. What :meth:`compute` raises is told there.

    Collectives: none here; :meth:`compute` makes one gather for all metrics.
    """

    def __init__(self, metrics: Any, *, process_set: Any = None) -> None:
        super().__init__(
            metrics, communicator=functools.partial(communicator_for, hvd, communicator_of, process_set)
        )
