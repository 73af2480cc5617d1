"""Several losses in one tape: how their denominators travel (:mod:`hvdloss.step.several` says why)."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import tensorflow as tf
from hvdloss.comm.communicator import included, rank_and_size
from hvdloss.errors import ConfigError, UsageError
from hvdloss.losses.ledger import LEDGER_WIDTH
from hvdloss.losses.reduction import TENSOR_FIELDS
from hvdloss.report import StepReport
from hvdloss.step import several
from hvdloss.step.report import LossReport
from hvdloss.step.several import (
    COLUMNS,
    changed_factor_warning,
    gradient_factor,
    loss_reports,
    twice_error,
    value_error,
)
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow._graphs import depend_on
from hvdloss.tensorflow.collectives import group_of
from hvdloss.tensorflow.objective import CallSums, Objective
from hvdloss.tensorflow.ops import TensorFlowOps, once
from hvdloss.tensorflow.passes import clear_refusals, refuse
from hvdloss.tensorflow.step import StepState, keep_error
from hvdloss.tensorflow.variables import variable

__all__ = ["Objectives", "global_losses"]

_OPS = TensorFlowOps()


class _Call:
    """A call of an objective: its local mean, what it adds to a step, and what multiplies its gradient."""

    factor: tf.Tensor | None = None
    arrived: tf.Tensor | None = None
    value: Callable[[], tf.Tensor | None]

    def __init__(self, objectives: Objectives, index: int, row: tf.Tensor) -> None:
        self.objectives, self.index, self.row = objectives, index, row


class Objectives(several.Objectives):
    """Several objectives by name, for losses that are added up, each with a denominator of its own.

    Make it once, as an objective, and give it to the tape::

        tasks = hvd.Objectives({"class": hvd.Objective("cross_entropy"), "box": hvd.Objective("huber")})

        with tf.GradientTape() as tape:
            loss = tasks["class"](logits, labels) + 2 * tasks["box"](boxes, targets)
        tape = hvd.DistributedGradientTape(tape, tasks)

    Calling one gives this rank's local mean. Losses may be added, multiplied with constants and nested in
    larger sums; any of them may be absent on some ranks, or on all. Each is called at most once per tape, in
    the function that takes the gradient. `last_step` has a line for each:
    :attr:`hvdloss.StepReport.losses`.

    Args:
        objectives: by name, or a sequence.

    Raises:
        ConfigError: what cannot be combined; see :class:`hvdloss.step.several.Objectives`.
    """

    def __init__(self, objectives: Mapping[str, Objective] | Sequence[Objective]) -> None:
        super().__init__(objectives)
        self.step_state = StepState(self.controller, self.reduction, self.nonfinite)
        self.step_state.name = self.name
        self.step_state.losses = self._reports
        self._calls: list[weakref.ref[_Call]] = []  # that live as long as a tape or graph has them
        self._sent: tuple[Any, list[_Call], tf.Tensor] | None = (
            None  # what global_losses() summed, in a graph
        )
        self._factors: dict[str, float] = {}  # of the last step
        self._warned = False  # that one of them changes
        self._last: tf.Variable | None = None  # denominators and sums of the last step's losses
        for index, one in enumerate(self.values()):
            if not isinstance(one, Objective):
                raise ConfigError(f"objective={one!r} is not an hvdloss.tensorflow.Objective")
            one.several = (self, index)

    @property
    def last_step(self) -> StepReport | None:
        """The report of the last reduced step, equal on all ranks; None before the first."""
        return self.step_state.report(self.reduction)

    def weigh_on_backward(self, index: int, told: CallSums) -> tf.Tensor:
        """Return a call's local mean, whose gradient will be multiplied with its part of the step."""
        clear_refusals()
        call = _Call(self, index, told.row())

        @tf.custom_gradient
        def weighed(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            def grad(upstream: tf.Tensor) -> tf.Tensor:
                if call.factor is None:
                    raise UsageError(
                        f"the loss {list(self)[index]!r} was differentiated without its denominator: with "
                        f"several objectives take gradients by hvd.DistributedGradientTape(tape, "
                        f"objectives), in the function that calls them"
                    )
                call.arrived = tf.cast(upstream, tf.float64)
                error = ConfigError("a gradient of a gradient, with several objectives: differentiate once")
                return once(upstream * tf.cast(call.factor, upstream.dtype), [x], error)

            return tf.identity(x), grad

        value = weighed(told.mean())
        value._hvdloss_call = weakref.ref(call)
        call.value = weakref.ref(value)
        # What no tape has seen, as in a validation, is gone by now.
        self._calls = [one for one in self._calls if one() is not None]
        self._calls.append(weakref.ref(call))
        return told.with_penalty(value)

    def _denominators(self, calls: Sequence[_Call]) -> tf.Tensor:
        """Return the sums over ranks of passes, and by objective of denominators and numerators.

        Raises:
            UsageError: an objective was called twice.
        """
        zero = tf.zeros((), tf.float64)
        numbers = [tf.ones((), tf.float64), *[zero] * (2 * len(self))]
        for call in calls:
            if any(call.index == other.index for other in calls if other is not call):
                raise twice_error(list(self)[call.index])
            numbers[1 + call.index], numbers[1 + len(self) + call.index] = call.row[1], call.row[0]
        return self._summed(tf.stack(numbers), "denominators")

    def _total(self, sums: tf.Tensor, index: int) -> tf.Tensor:
        """Return the denominator of an objective; that of a sum is 1."""
        one = list(self.values())[index]
        return tf.ones((), tf.float64) if one.reduction == "sum" else sums[1 + index]

    def values_of(self, calls: Sequence[_Call]) -> list[tf.Tensor]:
        """Return the losses of all ranks' elements of these calls: one small all-reduce."""
        sums = self._denominators(calls)
        self._sent = _graph(), list(calls), sums
        return [
            tf.math.divide_no_nan(sums[1 + len(self) + call.index], self._total(sums, call.index))
            for call in calls
        ]

    def backward(self, backward: Callable[[], Any]) -> tuple[Any, tf.Tensor, Callable[[], list[Any]]]:
        """Do a backward pass, with the denominators of all ranks.

        Returns:
            its gradients, this rank's row, and what judges and keeps the losses of the step.

        Raises:
            UsageError: an objective was called twice, or in another function.

        Collectives: two small all-reduces.
        """
        graph = _graph()
        alive, self._calls = [one() for one in self._calls], []
        calls = [
            call
            for call in alive
            if call is not None and (call.row.graph if tf.is_symbolic_tensor(call.row) else None) is graph
        ]
        zero, one = tf.zeros((), tf.float64), tf.ones((), tf.float64)
        sent, self._sent = self._sent, None
        if sent is None or sent[0] is not graph:
            sums = self._denominators(calls)
        else:
            sums = sent[2]
            for call in calls:
                if all(call is not other for other in sent[1]):
                    raise UsageError(
                        f"the loss {list(self)[call.index]!r} is not among those given to global_losses(); "
                        f"give all losses of a step in one call"
                    )
        for call in calls:
            call.factor = gradient_factor(_OPS, call.row[1], self._total(sums, call.index), sums[0])
        gradients = backward()
        if graph is not None:
            for name in self._used_values(calls, gradients):
                refuse(value_error(name))
        table = [tf.zeros(len(COLUMNS), tf.float64)] * len(self)
        rows, factors = [], []
        for call in calls:
            call.factor, r, c = None, call.row, zero if call.arrived is None else call.arrived
            table[call.index] = tf.stack([r[0], r[2], r[3], one, c, c * c, r[7]])
            if call.arrived is not None:
                shown = c * tf.math.divide_no_nan(r[0], r[1])
                rows.append(tf.stack([shown, r[2], r[3], r[5], r[6], r[7]]))
                factors.append(c)
        losses = self._summed(tf.stack(table), "losses")
        last = tf.concat([sums[1 : 1 + len(self), tf.newaxis], losses], 1)
        self.step_state.scaled = tf.reduce_all(tf.stack(factors) > 1) if factors else tf.constant(False)
        n = tf.add_n(rows) if rows else tf.zeros(6, tf.float64)
        stray = zero if rows else one
        row = [
            n[0],
            one,
            n[1],
            n[2],
            one,
            n[3],
            n[4],
            n[5],
            zero,
            stray,
            *[zero] * (LEDGER_WIDTH - TENSOR_FIELDS - 2),
        ]
        return (
            gradients,
            self.step_state.with_refusal(tf.stack(row)),
            lambda: self._keep(last, sent is not None),
        )

    def _used_values(self, calls: Sequence[_Call], gradients: Any) -> list[str]:
        """Return the losses whose values gradients of a graph depend on."""
        found = [(call, call.value()) for call in calls]
        there = depend_on(gradients, [value for _, value in found if value is not None])
        return [list(self)[call.index] for call, value in found if any(value is one for one in there)]

    def _summed(self, x: tf.Tensor, what: str) -> tf.Tensor:
        """Return the sum over ranks; a process that is none of them keeps its own."""
        if not included(hvd, self.process_set or hvd.global_process_set):
            return x
        return group_of(self.process_set).all_reduce(x, f"hvdloss.{self.name}.{what}", replicated=True)

    def _warn_of_changes(self, reports: Mapping[str, LossReport], summed: bool) -> None:
        """Warn, once, of a factor that may be trained: eagerly it cannot be seen where one comes from."""
        before, self._factors = self._factors, {n: r.factor for n, r in reports.items() if r.factor}
        changed = [n for n, f in self._factors.items() if abs(before.get(n, f) - f) > 1e-6 * abs(f)]
        if changed and not summed and not self._warned and rank_and_size(hvd, self.process_set)[1] > 1:
            self._warned = True
            warnings.warn(changed_factor_warning(changed[0]), stacklevel=2)

    def _keep(self, last: tf.Tensor, summed: bool) -> list[Any]:
        """Judge the losses of a step, and keep them; in a graph, return the operations that do.

        `summed`: whether their values were those of all ranks.
        """
        if self._last is None:
            with tf.init_scope(), tf.device("CPU:0"):
                shape = (len(self), 1 + len(COLUMNS))
                self._last = variable(tf.zeros(shape, tf.float64), "hvdloss_losses")
        step = self.step_state.steps + 1

        def judged(last: np.ndarray, step: np.ndarray) -> np.ndarray:
            keep_error(lambda: self._reports(last, int(step)))
            return np.zeros(0)

        if tf.executing_eagerly():
            self._warn_of_changes(self._reports(last.numpy(), int(step)), summed)
            self._last.assign(last)
            return []
        done = tf.numpy_function(judged, [last, step], tf.float64)
        with tf.control_dependencies([done]):
            return [done.op, self._last.assign(last, read_value=False)]

    def _reports(self, last: np.ndarray | None = None, step: int = 0) -> dict[str, LossReport]:
        """Return what each loss came to in a step; by default in the last one."""
        if last is None:
            if self._last is None:
                return {}
            last = self._last.numpy()
        return loss_reports(self, last[:, 0], last[:, 1:], step, rank_and_size(hvd, self.process_set)[1])


def _graph() -> Any:
    """Return the graph that is being made, or None."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def global_losses(*losses: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Return losses with their values over all ranks, where a larger graph computes with them.

    Added and multiplied with constants, losses of several objectives need no more than the tape. What
    computes with their *values* (weights that are trained, as ``exp(-s) * loss + s``; a product, a ratio, a
    root or a power of losses) needs those of all ranks' elements::

        tasks = hvd.Objectives({"a": hvd.Objective("mse"), "b": hvd.Objective("mae")})

        with tf.GradientTape() as tape:
            a, b = hvd.global_losses(tasks["a"](...), tasks["b"](...))
            loss = tf.exp(-s[0]) * a + tf.exp(-s[1]) * b + tf.reduce_sum(s)
        gradients = hvd.DistributedGradientTape(tape, tasks).gradient(loss, variables)

    Args:
        losses: scalars, as the objectives of one :class:`Objectives` returned them, all of the step. A rank
            without elements of a task calls its objective with none.

    Returns:
        As many scalars, equal on all ranks, whose gradients are those of the losses.

    Raises:
        ConfigError: what no objective of several returned.
        UsageError: an objective was called twice.

    Collectives: none more; the all-reduce of the denominators is made here, in the forward pass.
    """
    calls = [getattr(loss, "_hvdloss_call", lambda: None)() for loss in losses]
    if not calls or any(call is None for call in calls) or len({id(call.objectives) for call in calls}) > 1:
        raise ConfigError(
            "global_losses() takes what the objectives of one hvd.Objectives returned, as they returned it, "
            "in the function that calls them and under a tape"
        )
    values = calls[0].objectives.values_of(calls)
    return tuple(_OPS.with_value(loss, value) for loss, value in zip(losses, values, strict=True))
