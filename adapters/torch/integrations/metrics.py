"""Metrics over all ranks: our own, and those of torchmetrics, whose states are merged, not their values."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

import torch
from hvdloss import metrics as core
from hvdloss.comm.communicator import communicator_for, included
from hvdloss.comm.guard import mismatched_ranks
from hvdloss.comm.messages import decode_errors
from hvdloss.comm.world import next_name_index
from hvdloss.errors import AgreementError, ConfigError
from hvdloss.torch._backend import hvd
from hvdloss.torch.checkpoint import from_array, to_array
from hvdloss.torch.ops import as_array, communicator_of
from hvdloss.train.checkpoint import state_from_bytes, state_to_bytes

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
        ConfigError: not a metric. For errors of :meth:`compute` see there.

    Collectives: none here; :meth:`compute` makes one gather for all metrics.
    """

    def __init__(self, metrics: Any, *, process_set: Any = None) -> None:
        super().__init__(
            metrics, communicator=functools.partial(communicator_for, hvd, communicator_of, process_set)
        )

    def _arrays(self, prediction: Any, target: Any, weight: Any) -> tuple[Any, Any, Any]:
        p, t, w = map(as_array, (prediction, target, weight))
        shape = getattr(t, "shape", None)
        if shape is not None and p.ndim == len(shape) + 1 > 2 and p.shape[:1] + p.shape[2:] == shape:
            p = np.moveaxis(p, 1, -1)
        return p, t, w


class _Ranks(NamedTuple):
    """The ranks that a metric is merged over, and which metric it is.

    Attributes:
        number: of the metric among those made synchronized; its copies have the same.
        process_set: the ranks.
        late: attributes beside its states that a first update makes, so that `compute` needs one.
    """

    number: int
    process_set: Any
    late: tuple[str, ...]

    def __deepcopy__(self, memo: Any) -> _Ranks:
        return self  # a copy of a process set would be another one

    def several(self) -> bool:
        """Return whether there is anything to merge."""
        group = self.process_set
        return bool(hvd.is_initialized() and included(hvd, group) and group.size() > 1)

    def gathered(self, metric: Any) -> list[dict[str, Any]]:
        """Return the states of all ranks that have updated theirs, in rank order; this one's if none has.

        Attributes that a first update makes are taken from another rank where this one has none.

        Raises:
            AgreementError: ranks compute different metrics.
            ConfigError: a state that cannot be sent.

        Collectives: one gather.
        """
        mine = [
            f"metric {self.number} made synchronized, {type(metric).__name__}, with the states "
            f"{sorted(metric._reductions)}",
            int(metric._update_count),
            {name: _sendable(getattr(metric, name)) for name in metric._reductions},
            {
                name: value
                for name in self.late
                if isinstance(value := getattr(metric, name), torch.Tensor | int | float | str)
            },
        ]
        communicator = communicator_of(self.process_set)
        texts = communicator.all_gather_bytes(state_to_bytes(mine, to_array, name="metric"), "hvdloss.metric")
        copies = []
        for rank, text in enumerate(texts):
            with decode_errors("state of a metric", rank):
                which, updates, state, late = state_from_bytes(text, from_array)
                if not (isinstance(updates, int) and isinstance(state, dict) and isinstance(late, dict)):
                    raise ValueError("of another form")
                copies.append((which, updates, state, late))
        which = [one[0] for one in copies]
        if apart := mismatched_ranks(which):
            raise AgreementError(
                f"compute(): ranks compute different metrics: rank {apart[0]} has "
                f"{which[apart[0]]}; rank 0 has {which[0]}. Make, synchronize and compute metrics in the "
                f"same order on every rank."
            )
        updated = [one for one in copies if one[1]]
        for name, value in updated[0][3].items() if updated and not metric._update_count else ():
            setattr(metric, name, _received(value, metric.device))
        return [one[2] for one in updated] or [mine[2]]


def _late(metric: Any) -> tuple[str, ...]:
    """Return the names of a metric's attributes that are None so far, those of torchmetrics' own left out."""
    own = itertools.takewhile(lambda kind: kind.__name__ != "Metric", type(metric).__mro__)
    names = {name for holder in (metric, *own) for name in vars(holder) if not name.startswith("_")}
    return tuple(sorted(name for name in names if getattr(metric, name) is None))


def _sendable(value: Any) -> Any:
    """Return a state with texts for bytes (the masks of a detection metric)."""
    if isinstance(value, bytes):
        return {"hvdloss.bytes": value.hex()}
    return type(value)(map(_sendable, value)) if type(value) in (list, tuple) else value


def _received(value: Any, device: torch.device) -> Any:
    """Return the state again, with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) is dict and set(value) == {"hvdloss.bytes"}:
        return bytes.fromhex(value["hvdloss.bytes"])
    return (
        [_received(one, device) for one in value]
        if type(value) is list
        else (tuple(_received(one, device) for one in value) if type(value) is tuple else value)
    )


def _merged(name: str, values: list[Any], reduction: Callable[..., Any] | None) -> Any:
    """Return one state for those of several ranks: that of one process that made all of their updates.

    Raises:
        ConfigError: tensors whose shapes do not fit.
    """
    if len(values) == 1:
        return values[0]
    if any(isinstance(value, list) for value in values):
        return [one for value in values for one in (value if isinstance(value, list) else [value])]
    if getattr(reduction, "__name__", "") == "dim_zero_cat":
        return torch.cat([torch.atleast_1d(value) for value in values])
    try:
        # Where a rank's updates never reached this state, it still has the shape it began with.
        stacked = torch.stack(torch.broadcast_tensors(*values))
    except RuntimeError as error:
        shapes = [list(value.shape) for value in values]
        raise ConfigError(
            f"metric state {name!r} has shapes {shapes} on the ranks that updated it, which do not fit each "
            f"other; pass samples of the same form on every rank"
        ) from error
    return stacked if reduction is None else reduction(stacked)


def _sync_dist(metric: Any, dist_sync_fn: Any = None, process_group: Any = None) -> None:
    """Merge the states of all ranks, in the place of torchmetrics' own method."""
    states = dist_sync_fn.gathered(metric)
    for name, reduction in metric._reductions.items():
        own = getattr(metric, name)
        on_cpu = isinstance(own, list) and metric.compute_on_cpu
        device = torch.device("cpu") if on_cpu else metric.device
        setattr(metric, name, _merged(name, [_received(one[name], device) for one in states], reduction))


def synchronized(metric: Metric, *, process_set: Any = None) -> Metric:
    """Make a metric of torchmetrics compute over the samples of all ranks; return it.

    ``update`` stays local; ``compute`` merges the states that the ranks have by then and gives every rank
    the value of one process that made all of their updates, in rank order: exact also for ratios, F1
    or AUROC, which an average of ranks' values is not. Sums are summed and lists joined, whatever they hold
    and whether or not the metric says how; a rank without updates adds nothing.

    Args:
        metric: a ``torchmetrics.Metric``, a ``MetricCollection``, or any module that holds some.
        process_set: the ranks; None for all.

    Raises:
        ConfigError: there is no metric in it, or one over a running window of updates.
        AgreementError: in ``compute``, on every rank: ranks compute different metrics.

    Collectives: none here; ``compute``, which all ranks must call in the same order, makes one gather.
    """
    group = process_set or hvd.global_process_set
    found = [one for one in metric.modules() if hasattr(one, "dist_sync_fn")]
    if not found:
        raise ConfigError(
            f"metric={type(metric).__name__} is no metric of torchmetrics and holds none; pass a "
            f"torchmetrics.Metric or MetricCollection"
        )
    for one in found:
        if any(kind.__name__ == "Running" for kind in type(one).__mro__):
            raise ConfigError(
                f"metric={type(one).__name__} keeps a window of the last updates, and ranks have no common "
                f"order of theirs; synchronize the metric without the window"
            )
    for one in found:
        number = next_name_index(("metric", getattr(group, "process_set_id", 0)))
        one.dist_sync_fn = ranks = _Ranks(number, group, _late(one))
        one.distributed_available_fn = ranks.several
        if one._reductions:
            one._sync_dist = types.MethodType(_sync_dist, one)
    return metric
