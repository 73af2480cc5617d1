"""Metrics of what this rank saw so far, and their values over all ranks."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from hvdloss import errors
from hvdloss.comm.communicator import Communicator, OneProcess
from hvdloss.comm.guard import mismatched_ranks
from hvdloss.comm.messages import decode_errors, parse_json
from hvdloss.errors import AgreementError, ConfigError, HvdlossError, NoWeightError
from hvdloss.metrics.base import Metric, State

__all__ = ["Metrics", "decode_states", "encode_states"]


class Metrics:
    """Metrics over the samples of all ranks: exact, also for ratios and rankings, and with uneven ranks.

    ``update`` is local. ``compute``, which all ranks must call, merges the ranks' statistics and returns on
    every rank the value of one process with all samples. Metrics with the same statistic (precision, recall,
    F1) share it.

    Args:
        metrics: one metric, or a dict of metrics by name. All see the same predictions and targets.
        communicator: returns the ranks when called.

    Raises:
        ConfigError: not a metric.

    >>> from hvdloss.metrics import MAE, RMSE
    >>> metrics = Metrics({"mae": MAE(), "rmse": RMSE()})
    >>> metrics.update([1.0, 2.0], [1.0, 4.0])
    >>> {name: round(value, 3) for name, value in metrics.compute().items()}
    {'mae': 1.0, 'rmse': 1.414}
    """

    def __init__(
        self,
        metrics: Metric | Mapping[str, Metric],
        *,
        communicator: Callable[[], Communicator] = OneProcess,
    ) -> None:
        self._single = isinstance(metrics, Metric)
        given = {"": metrics} if isinstance(metrics, Metric) else metrics
        if not isinstance(given, Mapping) or not given:
            raise ConfigError(f"metrics={metrics!r} must be a metric, or a dict of at least one by name")
        for name, metric in given.items():
            if not isinstance(metric, Metric):
                raise ConfigError(
                    f"metrics[{name!r}] is a {type(metric).__name__}, which is none of hvdloss.metrics "
                    f"(for metrics of torchmetrics or Keras, see hvd.synchronized)"
                )
        self.metrics: dict[str, Metric] = dict(given)
        self._communicator = communicator
        self._makers: dict[Hashable, Metric] = {}
        for metric in self.metrics.values():
            self._makers.setdefault(metric.key(), metric)
        self.reset()

    def reset(self) -> None:
        """Drop all samples."""
        self._states: dict[Hashable, State] = {key: one.zero() for key, one in self._makers.items()}
        self._updates = 0
        self._fault: list[str] | None = None

    def _arrays(self, prediction: Any, target: Any, weight: Any) -> tuple[Any, Any, Any]:
        """Return NumPy arrays, with the classes as the last axis."""
        return prediction, target, weight

    def update(self, prediction: Any, target: Any = None, weight: Any = None) -> None:
        """Add a batch of this rank. Collectives: none.

        Invalid samples do not raise here, where other ranks would deadlock, but in :meth:`compute`, on all
        ranks; their batch is left out.

        Args:
            prediction: any shape; values, labels, or scores with a class axis, depending on the metric.
            target: of the prediction's shape, without the axis of classes; None for :class:`Mean`.
            weight: at least 0, broadcasts against the target; a sample of weight 0 is absent. None: 1 each.
        """
        self._updates += 1
        if self._fault:
            return
        try:
            arrays = self._arrays(prediction, target, weight)
            # A batch that is invalid for one metric is added to none.
            after = {key: one.merge(self._states[key], one.of(*arrays)) for key, one in self._makers.items()}
        except HvdlossError as error:
            self._fault = [type(error).__name__, f"update {self._updates}: {error}"]
        else:
            self._states = after

    def compute(self) -> Any:
        """Return the metrics of all ranks' samples, equal on every rank: a value, or a dict by name.

        Samples are kept, so that more can be added; see :meth:`reset`.

        Raises:
            HvdlossError: on every rank alike. ConfigError, ShapeError or WeightError: invalid samples of some
                rank, naming the first such rank and its update. AgreementError: ranks have different metrics.
                NoWeightError: no sample with a weight above 0 on any rank.

        Collectives: one gather of all metrics' statistics, whatever their number.
        """
        states = self._gathered()
        values = {}
        for name, metric in self.metrics.items():
            state = states[metric.key()]
            if not state:
                raise NoWeightError(
                    f"metrics: no sample with a weight above 0 on any of {self._size} rank(s); update them "
                    f"before compute, or check the weights"
                )
            values[name] = metric.finish(state)
        return values[""] if self._single else values

    def _gathered(self) -> dict[Hashable, State]:
        """Return all ranks' statistics, merged in rank order, so bitwise equal on all ranks."""
        packed = [one.pack(self._states[key]) for key, one in self._makers.items()]
        settings = {name: metric.settings() for name, metric in self.metrics.items()}
        ranks = self._communicator()
        found = [
            decode_states(data)
            for data in ranks.all_gather_bytes(
                encode_states(settings, self._fault, packed), "hvdloss.metrics"
            )
        ]
        self._size = len(found)
        if apart := mismatched_ranks([head["settings"] for head, _ in found]):
            raise AgreementError(
                f"metrics differ between ranks: rank {apart[0]} has {found[apart[0]][0]['settings']}, rank 0 "
                f"has {found[0][0]['settings']}; make the same metrics in the same order on every rank"
            )
        for rank, (head, _) in enumerate(found):
            if head["fault"]:
                kind, text = head["fault"]
                known = {known: getattr(errors, known) for known in errors.__all__}
                raise known.get(kind, ConfigError)(f"metrics: rank {rank}, {text}")
        with decode_errors("statistics"):
            return {
                key: functools.reduce(one.merge, [states[number] for _, states in found], one.zero())
                for number, (key, one) in enumerate(self._makers.items())
            }


def encode_states(settings: dict[str, str], fault: list[str] | None, states: list[State]) -> bytes:
    """Encode statistics as bytes: a header line of JSON, and the arrays."""
    arrays = [[np.asarray(x, order="C") for x in state] for state in states]
    head = {
        "settings": list(settings.items()),
        "fault": fault,
        "states": [[[x.dtype.str, list(x.shape)] for x in state] for state in arrays],
    }
    return b"".join([json.dumps(head).encode(), b"\n", *(x.tobytes() for state in arrays for x in state)])


def decode_states(data: bytes) -> tuple[dict[str, Any], list[State]]:
    """Decode the bytes of :func:`encode_states`.

    Raises:
        AgreementError: other bytes.
    """
    with decode_errors("statistics"):
        return _read(data)


def _read(data: bytes) -> tuple[dict[str, Any], list[State]]:
    at = data.index(b"\n") + 1
    head = parse_json(data[:at])
    if not isinstance(dict(head["settings"]), dict) or not isinstance(head["fault"], list | None):
        raise ValueError("of another form")
    states = []
    for state in head["states"]:
        arrays = []
        for name, shape in state:
            dtype, size = np.dtype(name), math.prod(shape)
            if dtype.kind not in "biufcSU" or any(not isinstance(n, int) or n < 0 for n in shape):
                raise ValueError(f"an array of {name!r} and shape {shape}")
            arrays.append(np.frombuffer(data, dtype, size, at).reshape(shape))
            at += size * dtype.itemsize
        states.append(tuple(arrays))
    return head, states
