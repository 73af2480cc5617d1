"""Metrics of all ranks: states merged by summing, then finished once.

Every metric of Keras keeps sums (totals and counts, confusion matrices), so the sum of all ranks'
states is the state of one process that saw all their samples. An average of finished values is not: it
weighs a rank of ten samples like one of a thousand, and is wrong for ratios even where ranks are equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hvdloss.communicator import included
from hvdloss.keras._backend import hvd, pythonify_logs
from hvdloss.keras.optimizer import engine_of
from hvdloss.tensorflow.ops import communicator_of

__all__ = ["merged_results", "states"]


def states(model: Any) -> list[np.ndarray]:
    """Return the state of every metric of a model, as float64."""
    return [np.asarray(v.numpy(), dtype=np.float64) for m in model.metrics for v in m.variables]


def merged_results(model: Any, local: list[np.ndarray] | None = None) -> dict[str, float]:
    """Return the metrics of all ranks' samples, by name; the model's own states are left as they are.

    Args:
        model: a compiled model.
        local: this rank's states, from :func:`states`; the present ones if None.

    Collectives: one all-reduce of all states.
    """
    variables = [v for m in model.metrics for v in m.variables]
    kept = [v.numpy() for v in variables]
    local = states(model) if local is None else local
    engine = engine_of(model.optimizer)
    group = (engine and engine.exchange.process_set) or hvd.global_process_set
    if len(local) != len(variables) or not included(hvd, group):
        return pythonify_logs(model.get_metrics_result())
    flat = np.concatenate([x.reshape(-1) for x in local]) if local else np.zeros(0)
    summed = communicator_of(group).sum(flat, "hvdloss.metrics")
    start = 0
    try:
        for variable, x in zip(variables, local, strict=True):
            variable.assign(summed[start : start + x.size].reshape(x.shape).astype(variable.dtype))
            start += x.size
        return pythonify_logs(model.get_metrics_result())
    finally:
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)
