"""Metrics of all ranks: states merged by summing, then finished once.

Every metric in ``keras.metrics`` keeps sums (totals and counts, confusion matrices; the tests go through
all of them), so the sum of all ranks'
states is the state of one process that saw all their samples. An average of finished values is not: it
weighs a rank of ten samples like one of a thousand, and is wrong for ratios even where ranks are equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import keras
from hvdloss.comm.communicator import Communicator, communicator_for, included
from hvdloss.errors import AgreementError, ConfigError, UsageError
from hvdloss.keras._backend import hvd, pythonify_logs
from hvdloss.keras.optimizer import engine_of
from hvdloss.metrics.collection import decode_states, encode_states
from hvdloss.tensorflow.ops import communicator_of

__all__ = ["merged_results", "states", "synchronized"]


def states(model: Any) -> list[np.ndarray]:
    """Return the state of every metric of a model, as float64."""
    return [np.asarray(v.numpy(), dtype=np.float64) for m in model.metrics for v in m.variables]


def merged_results(model: Any, local: list[np.ndarray] | None = None) -> dict[str, float]:
    """Return the metrics of all ranks' samples, by name; the model's own states are left as they are.

    Args:
        model: a compiled model.
        local: this rank's states, from :func:`states`; the present ones if None.

    Raises:
        ConfigError: a metric whose states do not merge by summing; on every rank.

    Collectives: one all-reduce of all states.
    """
    variables = [v for m in model.metrics for v in m.variables]
    for metric in model.metrics:
        _check_sums(metric)
    local = states(model) if local is None else local
    engine = engine_of(model.optimizer)
    group = (engine and engine.reducer.process_set) or hvd.global_process_set
    if len(local) != len(variables) or not included(hvd, group):
        return pythonify_logs(model.get_metrics_result())
    flat = np.concatenate([x.reshape(-1) for x in local]) if local else np.zeros(0)
    summed = communicator_of(group).all_reduce(flat, "hvdloss.metrics")
    ends = np.cumsum([x.size for x in local])[:-1]
    parts = [part.reshape(x.shape) for part, x in zip(np.split(summed, ends), local, strict=True)]
    return _finished(variables, parts, lambda: pythonify_logs(model.get_metrics_result()))


def _finished(variables: Sequence[Any], merged: Sequence[np.ndarray], finish: Callable[[], Any]) -> Any:
    """Return what `finish` makes of merged states, and leave the variables as they were."""
    kept = [v.numpy() for v in variables]
    try:
        for variable, value in zip(variables, merged, strict=True):
            variable.assign(value.astype(variable.dtype))
        return finish()
    finally:
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)


# -- metrics by themselves ----------------------------------------------------------------------------


def synchronized(metric: Any, *, process_set: Any = None) -> Any:
    """Have a metric of Keras that is used by itself compute over the samples of all ranks; return it.

    ``update_state`` stays local; ``result``, which all ranks must call, sums the states that the ranks have
    by then and gives every rank the value of one process that saw all samples, with uneven or no samples on
    some ranks too. Every metric in ``keras.metrics`` can be merged so. In ``compile`` and ``fit`` use metrics
    as they are, and ``MetricAverageCallback``.

    Args:
        metric: a ``keras.metrics.Metric``; states of one's own must begin at 0 and be sums (``add_variable``
            with ``aggregation="sum"``, the default).
        process_set: the ranks; None for all.

    Raises:
        ConfigError: no metric of Keras, or one whose states do not merge by summing.

    ``result()`` raises AgreementError on every rank where they have other metrics, or other numbers of
    classes; and UsageError inside a ``tf.function``.

    Collectives: none here; ``result()`` makes one gather, two where a rank has had no batch at all.
    """
    if not isinstance(metric, keras.metrics.Metric):
        raise ConfigError(
            f"metric={type(metric).__name__} is no metric of Keras; pass a keras.metrics.Metric (for metrics "
            f"of torchmetrics, see hvdloss.torch.synchronized)"
        )
    if getattr(metric.result, "_hvdloss", False):
        raise ConfigError(f"metric={metric.name!r} is synchronized already")
    _check_sums(metric)
    _check_zero(metric)
    plain = metric.result

    def result() -> Any:
        """Return the value of all ranks' samples."""
        if tf.inside_function():
            raise UsageError(
                f"result() of the synchronized metric {metric.name!r} inside a tf.function, or in compile; "
                f"call it outside, or compile the plain metric and use MetricAverageCallback"
            )
        return _result(metric, plain, communicator_for(hvd, communicator_of, process_set))

    result._hvdloss = True  # type: ignore[attr-defined]
    metric.result = result
    return metric


def _check_sums(metric: Any) -> None:
    """Raise ConfigError if states of a metric say that they are no sums.

    Keras says of every state how replicas merge it; all of its own metrics say "sum".
    """
    for variable in metric.variables:
        how = getattr(variable, "aggregation", "sum")
        if how != "sum":
            raise ConfigError(
                f"metric={metric.name!r}: its state {variable.name!r} has aggregation={how!r}, so ranks' "
                f"states do not merge by summing; keep sums (add_variable(..., aggregation='sum'))"
            )


def _check_zero(metric: Any) -> None:
    """Raise ConfigError if a metric without samples has states other than 0, which sums would count."""
    fresh = metric
    with contextlib.suppress(Exception):  # of one's own, without a config
        fresh = type(metric).from_config(metric.get_config())
    kept = [v.numpy() for v in metric.variables]
    metric.reset_state()
    try:
        for variable in (*metric.variables, *(fresh.variables if fresh is not metric else ())):
            if np.any(variable.numpy()):
                raise ConfigError(
                    f"metric={metric.name!r}: its state {variable.name!r} begins at {variable.numpy()}, not "
                    f"at 0, so ranks' states do not merge by summing; keep sums that begin at 0"
                )
    finally:
        for variable, value in zip(metric.variables, kept, strict=True):
            variable.assign(value)


def _result(metric: Any, plain: Callable[[], Any], ranks: Communicator) -> Any:
    """Return the value of all ranks' states. Collectives: a gather, two if a rank has no states."""
    own = tuple(np.asarray(v.numpy(), dtype=np.float64) for v in metric.variables)
    name = {"metric": type(metric).__name__}
    heard = [
        decode_states(data)
        for data in ranks.all_gather_bytes(encode_states(name, None, [own]), "hvdloss.metric")
    ]
    names = [head["settings"] for head, _ in heard]
    if any(one != names[0] for one in names):
        raise AgreementError(f"metrics differ between ranks: {[one[0][1] for one in names]}, in rank order")
    # Some metrics (F1, R2, AUC of labels) make their states, or some of them, with the first batch.
    most = max(len(state) for _, (state,) in heard)
    full = [rank for rank, (_, (state,)) in enumerate(heard) if len(state) == most]
    shapes = {rank: [x.shape for x in heard[rank][1][0]] for rank in full}
    for rank, shape in shapes.items():
        if shape != shapes[full[0]]:
            raise AgreementError(
                f"metric {metric.name!r}: states of rank {rank} have shapes {shape}, those of rank {full[0]} "
                f"{shapes[full[0]]}; give all ranks the same number of classes or outputs"
            )
    merged = [np.sum(parts, axis=0) for parts in zip(*(heard[rank][1][0] for rank in full), strict=True)]
    if len(full) == len(heard):
        return _finished(metric.variables, merged, plain)
    found: list[Any] = []
    if ranks.rank == full[0]:
        found = [np.asarray(_finished(metric.variables, merged, plain))]
    told = ranks.all_gather_bytes(encode_states({}, None, [tuple(found)]), "hvdloss.metric.value")
    return keras.ops.convert_to_tensor(decode_states(told[full[0]])[1][0][0])
