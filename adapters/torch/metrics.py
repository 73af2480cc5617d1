"""Metrics over all ranks: our own, and those of torchmetrics, whose states are merged, not their values."""

from __future__ import annotations

import functools
import json
import math
from typing import Any, TypeVar

import numpy as np

import torch
from hvdloss import metrics as core
from hvdloss.communicator import among, included
from hvdloss.errors import ConfigError
from hvdloss.hearing import hear
from hvdloss.torch._backend import hvd
from hvdloss.torch.collectives import all_gather
from hvdloss.torch.ops import as_array, communicator_of

__all__ = ["Metrics", "synchronized"]

Metric = TypeVar("Metric", bound=torch.nn.Module)


class Metrics(core.Metrics):
    """:class:`hvdloss.metrics.Metrics` over the ranks of a process set, from tensors or arrays.

    The classes' axis is the second one, as in PyTorch's losses, or the last one.

    ::

        metrics = hvd.Metrics({"f1": F1(classes=10), "auc": AUC(classes=10, from_logits=True)})
        for x, y, weight in loader:
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
        super().__init__(metrics, communicator=functools.partial(among, hvd, communicator_of, process_set))

    def _arrays(self, prediction: Any, target: Any, weight: Any) -> tuple[Any, Any, Any]:
        p, t, w = map(as_array, (prediction, target, weight))
        shape = getattr(t, "shape", None)
        if shape is not None and p.ndim == len(shape) + 1 > 2 and p.shape[:1] + p.shape[2:] == shape:
            p = np.moveaxis(p, 1, -1)
        return p, t, w


def _is_kind(told: Any) -> bool:
    name, shape = told
    whole = all(isinstance(n, int) and n >= 0 for n in shape)
    return whole and isinstance(getattr(torch, name), torch.dtype)


def _gathered(tensor: torch.Tensor, group: Any = None, *, process_set: Any) -> list[torch.Tensor]:
    """Return every rank's tensor, in rank order; shapes may differ, and a rank may have nothing."""
    ranks = communicator_of(process_set)
    header = json.dumps([str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode()
    heads = hear(ranks.gather(header, "hvdloss.metrics.header"), "kind of tensor", _is_kind)
    # A rank that saw nothing does not know what it would have seen.
    dtype, shape = next((head for head in heads if math.prod(head[1])), heads[0])
    flat = tensor.detach().reshape(-1).to(getattr(torch, dtype))
    sizes = [math.prod(own) for _, own in heads]
    parts = all_gather(flat, name="hvdloss.metrics.states", process_set=process_set, sizes=sizes).split(sizes)
    return [
        part.reshape(own if size else [0, *shape[1:]] if shape else [0])
        for part, size, (_, own) in zip(parts, sizes, heads, strict=True)
    ]


def synchronized(metric: Metric, *, process_set: Any = None) -> Metric:
    """Have a metric of torchmetrics compute over the samples of all ranks; return it.

    ``update`` stays local; ``compute`` merges the states that the ranks have by then (sums are summed, lists
    joined) and gives every rank the value of one process that saw all samples: exact also for ratios, F1
    or AUROC, which an average of ranks' values is not, and with uneven or no samples on some ranks.

    Args:
        metric: a ``torchmetrics.Metric``, a ``MetricCollection``, or any module that holds some.
        process_set: the ranks; None for all.

    Raises:
        ConfigError: there is no metric in it.

    Collectives: none here; ``compute``, which all ranks must call, makes three all-gathers per state.
    """
    group = process_set or hvd.global_process_set
    found = [one for one in metric.modules() if hasattr(one, "dist_sync_fn")]
    if not found:
        raise ConfigError(
            f"metric={type(metric).__name__} is no metric of torchmetrics and holds none; pass a "
            f"torchmetrics.Metric or MetricCollection"
        )
    for one in found:
        one.dist_sync_fn = functools.partial(_gathered, process_set=group)
        one.distributed_available_fn = functools.partial(_several, group)
    return metric


def _several(group: Any) -> bool:
    """Return whether there is anything to merge."""
    return bool(hvd.is_initialized() and included(hvd, group) and group.size() > 1)
