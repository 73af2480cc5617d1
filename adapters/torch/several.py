"""Several losses in one backward pass: how their denominators travel (:mod:`hvdloss.step.several` says why).

A call of an objective returns its local mean, whose backward pass multiplies the gradient with the call's
part of the step. The first one of a step sends what all calls of that pass weigh, and waits for the sum; or
``optimizer.expect`` has sent it before the forward pass. A rank without a backward pass sends zeros when it
synchronises. What the losses came to, and with what they were multiplied, follows behind the gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

import torch
from hvdloss.comm.agreement import check_items_consistent
from hvdloss.errors import ConfigError, HvdlossError, UsageError
from hvdloss.step.report import LossReport
from hvdloss.step.several import (
    COLUMNS,
    Objectives,
    check_expected,
    check_outside,
    check_weights,
    gradient_factor,
    left_out_error,
    loss_reports,
    twice_error,
    unexpected_error,
)
from hvdloss.torch.buckets import Wire
from hvdloss.torch.compression import Compression
from hvdloss.torch.engines.group import EngineGroup
from hvdloss.torch.ops import TorchOps, communicator_of, to_device_async
from hvdloss.torch.passes import multiplied, parameters_of, scale_of_pass

__all__ = ["Call", "LossExchange", "global_losses"]

_OPS = TorchOps()


_SECOND = (
    "create_graph=True with several objectives: the gradient of a loss is a rank's part of that "
    "of all ranks, whose derivative would lack the other ranks' elements; differentiate once"
)


class Call:
    """One call of one of several objectives.

    Attributes:
        exchange: of the optimizer.
        index: of the objective.
        row: what the call's tensors tell (:meth:`hvdloss.losses.reduction.Contribution.row`).
    """

    def __init__(self, exchange: LossExchange, index: int, row: torch.Tensor) -> None:
        self.exchange, self.index, self.row = exchange, index, row

    def ledger_row(self, arrived: torch.Tensor) -> torch.Tensor:
        """Return the row of a pass: the call's part of what the loss showed, and the weight of one pass."""
        row = self.row.clone()
        row[0] *= _unscaled(arrived) / torch.where(row[1] != 0, row[1], 1.0)
        row[1] = 1.0
        return row


class LossExchange:
    """What the ranks of an optimizer with several objectives exchange in a step.

    Args:
        objectives: the optimizer's.
        process_set: the ranks.
        name: of the exchanges.
        device: where tensors travel from.
        waiting: what to wait inside of.

    Attributes:
        refusal: why this rank's calls have no exact step; None while they have.
    """

    def __init__(
        self,
        objectives: Objectives,
        process_set: Any,
        name: str,
        device: Callable[[], torch.device],
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.objectives, self.process_set, self.name = objectives, process_set, name
        self._device, self._waiting = device, waiting
        self._wire = Wire(EngineGroup(process_set, named=False), Compression.none)
        self._pending: list[tuple[weakref.ref[Any], weakref.ref[Call]]] = []  # nodes of calls, and those
        self._agreed = False
        for index, one in enumerate(objectives.values()):
            one.exchange = (self, index)  # type: ignore[attr-defined]
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the last step; calls whose graphs live may belong to the next one."""
        self.refusal: HvdlossError | None = None
        self._sums: torch.Tensor | None = None  # passes, and by objective denominators and numerators
        self._ready: Callable[[], None] | None = None
        self._sent: list[Call] = []
        self._expected: tuple[Mapping[str, float], int] | None = None
        self._passed: list[tuple[Call, torch.Tensor]] = []  # and what they were multiplied with
        self._graphs: list[Any] = []  # what the losses of a pass were made of
        self._outside: dict[int, list[float]] = {}
        self._passes = 0
        self._table: torch.Tensor | None = None
        self._table_ready: Callable[[], None] | None = None

    def reset(self) -> None:
        """Forget what was of other ranks."""
        self._ready = self._table_ready = None
        self._agreed = False
        self.begin_step()

    def leave(self) -> None:
        """Have objectives as if they were alone: their optimizer is out of use."""
        for one in self.objectives.values():
            if one.exchange is not None and one.exchange[0] is self:
                one.exchange = None

    @property
    def began(self) -> bool:
        """Whether a backward pass of this step went through a call."""
        return bool(self._passed)

    def drain(self) -> None:
        """Wait for what is under way, and drop it."""
        for ready in (self._ready, self._table_ready):
            if ready is not None:
                ready()
        self._ready = self._table_ready = None

    # -- denominators -----------------------------------------------------------------------------

    def enter(self, value: torch.Tensor, index: int, row: torch.Tensor) -> tuple[torch.Tensor, Call]:
        """Return a call's local mean, whose gradient will be weighed, and the call."""
        call = Call(self, index, row)
        value = multiplied(value, lambda: self.factor(call), _SECOND)
        # Calls that are thrown away, as those of a validation, are gone with their graphs.
        self._pending = [pair for pair in self._pending if pair[0]() is not None]
        if value.grad_fn is not None:
            self._pending.append((weakref.ref(value.grad_fn), weakref.ref(call)))
        return value, call

    def _of_this_pass(self) -> list[Call]:
        """Return the calls that the backward pass that is under way will go through."""
        calls = []
        for node, call in self._pending:
            there, found = node(), call()
            if there is None or found is None or not torch._C._will_engine_execute_node(there):
                continue
            calls.append(found)
        return calls

    def expect(self, weights: Mapping[str, Any], passes: int) -> None:
        """Send what this rank's step will weigh, before it is computed."""
        numbers = check_weights(self.objectives, weights, passes)
        if self._sums is not None:
            raise UsageError(
                "optimizer.expect() after the denominators of this step were sent: call it once a step, "
                "before its first backward pass"
            )
        self._expected = (dict(zip(self.objectives, numbers, strict=True)), passes)
        self._send([float(passes), *numbers, *[0.0] * len(numbers)])

    def start(self, calls: Iterable[Call] | None = None) -> None:
        """Send the denominators of a step, if they were not: those of these calls, or that there are none."""
        if self._sums is not None:
            return
        numbers: list[Any] = [0.0] * (1 + 2 * len(self.objectives))
        if calls is not None:
            numbers[0] = 1.0
            if self.objectives.passes > 1:
                self.refusal = unexpected_error(self.objectives.passes)
                calls = ()
        for call in calls or ():
            if any(call.index == other.index for other in self._sent):
                self.refusal = twice_error(list(self.objectives)[call.index])
                continue
            self._sent.append(call)
            numbers[1 + call.index] = call.row[1]
            numbers[1 + len(self.objectives) + call.index] = call.row[0]
        self._send(numbers)

    def _send(self, numbers: list[Any]) -> None:
        if not self._agreed:
            check_items_consistent(
                communicator_of(self.process_set),
                lambda: list(self.objectives.settings().items()),
                name=f"{self.name}.losses.agree",
                what="setting of the objectives",
                remedy="Give the optimizer the same objectives, in the same order, on every rank.",
            )
            self._agreed = True
        plain = [0.0 if isinstance(n, torch.Tensor) else n for n in numbers]
        self._sums = to_device_async(torch.tensor(plain, dtype=torch.float64), self._device())
        for place, number in enumerate(numbers):
            if isinstance(number, torch.Tensor):
                self._sums[place] = number
        self._ready = self._wire.send(self._sums, f"{self.name}.denominators")

    def _summed(self) -> torch.Tensor:
        """Wait for the sums over ranks of passes, denominators and numerators."""
        assert self._sums is not None
        if self._ready is not None:
            ready, self._ready = self._ready, None
            with self._waiting():
                ready()
        return self._sums

    def _total(self, sums: torch.Tensor, index: int) -> torch.Tensor:
        """Return the denominator of all calls of an objective: that of a sum is 1."""
        one = list(self.objectives.values())[index]
        return torch.ones_like(sums[0]) if one.reduction == "sum" else sums[1 + index]

    def factor(self, call: Call) -> torch.Tensor:
        """Return what a call's gradient is multiplied with; the first of a step sends and waits."""
        if self._sums is None:
            self.start(self._of_this_pass())
        elif self._expected is None and call not in self._sent and self.refusal is None:
            self.refusal = left_out_error(list(self.objectives)[call.index])
        sums = self._summed()
        own = call.row[1].to(sums.device)
        return gradient_factor(_OPS, own, self._total(sums, call.index), sums[0])

    def values(self, calls: list[Call]) -> list[torch.Tensor]:
        """Return the losses of all ranks' elements of these calls; sends and waits, in the forward pass.

        Raises:
            UsageError: the denominators are on their way already, or there are several passes.
        """
        if self._expected is not None or self.objectives.passes > 1:
            raise UsageError(
                "global_losses() after optimizer.expect(), or with several backward passes per step: what "
                "the losses of all micro-batches come to is not known before the last one; add them up, or "
                "use one backward pass, and leave expect() out"
            )
        if self._sums is None:
            self.start(calls)
        elif any(call not in self._sent for call in calls):
            raise UsageError("global_losses(): give all losses of a step in one call, and do so once a step")
        sums = self._summed()
        found = []
        for call in calls:
            total = self._total(sums, call.index)
            found.append(sums[1 + len(self.objectives) + call.index] / torch.where(total != 0, total, 1.0))
        return found

    # -- losses -----------------------------------------------------------------------------------

    def passed(self, call: Call, arrived: torch.Tensor, graph: list[Any]) -> None:
        """Note that a backward pass goes through a call, at which this gradient arrived."""
        self._passed.append((call, _unscaled(arrived)))
        self._graphs += graph

    def end_pass(self, counted: bool, parameters: Mapping[int, torch.Tensor] | None = None) -> None:
        """Note that a backward pass is over; one that came to no parameter is none of the step's.

        `parameters`: those that have a gradient of it by their places, to look for such as it came to without
        going through a loss (see :func:`hvdloss.step.several.check_outside`).
        """
        graphs, self._graphs = self._graphs, []
        if not counted:
            self._passed.clear()
            return
        self._passes += 1
        if not parameters:
            return
        inside = {id(leaf) for leaf in parameters_of(graphs)}
        for place, p in parameters.items():
            if id(p) in inside or p.grad is None:
                continue
            grad = p.grad.detach()
            grad = (grad if grad.layout is torch.strided else grad.coalesce().values()).double().flatten()
            # By other weights than 1: gradients of a softmax add up to 0.
            number = float(
                grad @ torch.arange(1.0, len(grad) + 1, dtype=grad.dtype, device=grad.device).cos()
            )
            held = self._outside.setdefault(place, [0.0, 0.0, 0.0])
            for i in range(3):
                held[i] += number**i

    def check_outside(self, names: list[str]) -> None:
        """Raise on all ranks if a gradient that came through no loss differs between them; one small sum."""
        sums = np.zeros((len(names), 3))
        for place, held in self._outside.items():
            sums[place] = held
        check_outside(
            names, communicator_of(self.process_set).all_reduce(sums, f"{self.name}.losses.outside")
        )

    def send_losses(self) -> None:
        """Send what the losses of this rank came to, behind its gradients."""
        if self._table is not None:
            return
        device = self._device()
        table = torch.zeros(len(self.objectives), len(COLUMNS), dtype=torch.float64, device=device)
        one = torch.ones((), dtype=torch.float64, device=device)
        for call, factor in self._passed:
            row, c = call.row.to(device), factor.to(device)
            table[call.index] += torch.stack([row[0], row[2], row[3], one, c, c * c, row[7]])
        for call in self._sent:
            if all(call is not other for other, _ in self._passed):  # with the factor 0
                table[call.index, COLUMNS.index("calls")] += 1
        if self._expected is not None and self.refusal is None:
            said, passes = self._expected
            found = [0.0] * len(self.objectives)
            for call, _ in self._passed:
                found[call.index] += float(call.row[1])
            factors = [float(factor) for _, factor in self._passed]
            self.refusal = check_expected(self.objectives, said, found, (passes, self._passes), factors)
        self._table = table
        self._table_ready = self._wire.send(table.view(-1), f"{self.name}.losses")

    def reports(self, step: int) -> dict[str, LossReport]:
        """Return what the losses of all ranks came to.

        Raises:
            UsageError, NoWeightError: see :func:`hvdloss.step.several.loss_reports`.
        """
        assert self._table is not None
        if self._table_ready is not None:
            ready, self._table_ready = self._table_ready, None
            ready()
        sums = self._summed().cpu().numpy()
        totals = sums[1 : 1 + len(self.objectives)]
        return loss_reports(self.objectives, totals, self._table.cpu().numpy(), step, self.process_set.size())


def _unscaled(arrived: torch.Tensor) -> torch.Tensor:
    """Return what a loss was multiplied with, but for a GradScaler's scale; float64."""
    scale = scale_of_pass()
    c = arrived.detach().double()
    return c if scale is None else c / scale.to(c.device).double()


def global_losses(*losses: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return losses with their values over all ranks, where a larger graph computes with them.

    Added and multiplied with constants, losses of several objectives need no more than ``backward()``. What
    computes with their *values* (weights that are trained, as ``exp(-s) * loss + s``; a product, a ratio or a
    power of losses) needs those of all ranks' elements::

        a, b = hvd.global_losses(task_a(...), task_b(...))
        (torch.exp(-s[0]) * a + torch.exp(-s[1]) * b + s.sum()).backward()

    Args:
        losses: scalar tensors, as objectives of one optimizer returned them, all of the step. A rank
            without elements of a task calls its objective with none.

    Returns:
        As many scalars, equal on all ranks, whose gradients are those of the losses.

    Raises:
        ConfigError: what no objective of an optimizer with several returned.
        UsageError: several backward passes per step, or a second call in a step.

    Collectives: none more; the all-reduce of the denominators is waited for here, in the forward pass.
    """
    calls = [getattr(loss, "_hvdloss_call", None) for loss in losses]
    if not calls or any(call is None for call in calls) or len({id(call.exchange) for call in calls}) > 1:  # type: ignore[union-attr]
        raise ConfigError(
            "global_losses() takes what the objectives of one optimizer returned, as they returned it: "
            "DistributedOptimizer(optimizer, objective={...})"
        )
    values = calls[0].exchange.values(calls)  # type: ignore[union-attr]
    return tuple(_OPS.with_value(loss, value) for loss, value in zip(losses, values, strict=True))
