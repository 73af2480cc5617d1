"""A model cut into consecutive stages on different ranks, through which micro-batches pass in turn.

The last stage alone knows the loss and its weights. What a micro-batch weighs travels back with its gradient,
and every stage begins its backward pass with a loss of that value and weight: so each stage's distributed
optimizer divides by the same sum of weights over all replicas, and reports the same loss.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from hvdloss.comm import world
from hvdloss.comm.messages import decode_all
from hvdloss.errors import AgreementError, ConfigError, ShapeError, UsageError
from hvdloss.losses.reduction import TENSOR_FIELDS, Contribution
from hvdloss.split.grid import Grid
from hvdloss.split.parts import Parts
from hvdloss.split.schedule import Pass, bubble_fraction, schedule_named
from hvdloss.torch._backend import hvd
from hvdloss.torch.objective import Objective
from hvdloss.torch.ops import communicator_of
from hvdloss.torch.split.links import Activations, Channel, Gradients, Traffic
from hvdloss.torch.waiting import wait

__all__ = ["Pipeline", "PipelineStats", "pipeline_stage"]


_UNLIMITED = 2**31  # backward passes, where no optimizer has said how many it takes


def pipeline_stage(
    layers: Sequence[Callable[[], torch.nn.Module]], groups: Grid, sizes: Sequence[int] | None = None
) -> torch.nn.Sequential:
    """Return this rank's stage of ``torch.nn.Sequential(*(make() for make in layers))``.

    Every rank makes all layers, one after the other, and keeps its own: after the same ``torch.manual_seed``
    their parameters are those of the whole model, of which no rank holds more than its stage and a layer.
    Names are those of the whole model, so ``stage.load_state_dict({key: whole[key] for key in
    stage.state_dict()})`` loads a stage from it, and ``full_state_dict(stage, pipe=groups.pipe)`` gives it.

    Args:
        layers: functions without arguments that each make a layer.
        groups: of :func:`hvdloss.torch.grid`.
        sizes: how many layers each stage has; None for even parts.

    Raises:
        ConfigError: fewer layers than stages, or sizes that do not fit.

    >>> pipeline_stage([lambda: torch.nn.Linear(2, 3), torch.nn.ReLU], grid())  # one rank
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True)
      (1): ReLU()
    )
    """
    stage, stages = _place(groups)
    mine = Parts(len(layers), stages, sizes, "layers").range(stage)
    kept = torch.nn.Sequential()
    for number, make in enumerate(layers):
        layer = make()
        if number in mine:
            kept.add_module(str(number), layer)
    return kept


def _place(groups: Grid) -> tuple[int, int]:
    """Return which stage this rank is, of how many."""
    return (0, 1) if groups.pipe is None else (groups.pipe.rank(), groups.pipe.size())


class PipelineStats(NamedTuple):
    """What one run of a pipeline took on this rank.

    Attributes:
        micro_batches: how many there were.
        seconds: from the beginning to the end of the run.
        waited: seconds of them in which this stage had nothing to compute.
        messages, bytes: sent and received between stages.
        expected_bubble: what theory says of the idle part of a step.
    """

    micro_batches: int
    seconds: float
    waited: float
    messages: int
    bytes: int
    expected_bubble: float

    @property
    def bubble(self) -> float:
        """The part of the run in which this stage was idle; the first stage's is the whole step's."""
        return self.waited / self.seconds if self.seconds else 0.0


class _Relayed(torch.autograd.Function):
    """A micro-batch's weighted sum of losses, as the last stage told it; backward: the gradients it sent."""

    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, gradients: list[torch.Tensor], *outputs: Any) -> torch.Tensor:
        ctx.weight, ctx.gradients = row[1], gradients
        return row[0].clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        factor = grads[0] * ctx.weight  # what arrives has been divided by the weight
        return None, None, *(gradient * factor.to(gradient) for gradient in ctx.gradients)


class Pipeline:
    """The stage of a model that this rank computes, and its part in every step's micro-batches.

    ::

        groups = hvd.grid(stages=2)
        stage = hvd.pipeline_stage(layers, groups).to(device)
        objective = hvd.Objective("cross_entropy")
        pipeline = hvd.Pipeline(stage, objective, groups)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.AdamW(stage.parameters()), stage.named_parameters(), objective,
            process_set=groups.data, backward_passes_per_step=8,
        )
        for micro_batches in batches:  # at most 8 of (x, y) or (x, y, weight), those of this replica
            optimizer.zero_grad()
            pipeline.run(micro_batches)
            optimizer.step()
            optimizer.last_step.loss  # of all replicas, on every stage

    Replicas may have any number of micro-batches, of any sizes; every stage of a replica must be told the
    same number. The update is that of one process with the whole model and all micro-batches.

    Args:
        module: this rank's stage. It takes what the stage before returns, a tensor or a tuple of tensors,
            of whatever shapes; integers pass without a gradient.
        objective: the loss, made alike on every stage, for this and the optimizer; computed on the last one.
        groups: of :func:`hvdloss.torch.grid`. Ranks of ``groups.model`` run one stage together, each with
            its part of the split layers and the same micro-batches.
        schedule: ``"1f1b"`` (one forward, one backward) or ``"gpipe"`` (fill and drain): see
            :mod:`hvdloss.split.schedule`.

    Attributes:
        stage, stages: which stage this rank is, of how many.
        last_run: :class:`PipelineStats` of the last run; None before.

    Raises:
        ConfigError: an argument that cannot be used. A step with a loss or gradient that is not finite cannot
            be skipped, since no stage knows the others' gradients: `nonfinite` must be ``"raise"``. There are
            no `terms`, no ``ahead=True``.
        AgreementError: stages were made differently; on all ranks of ``groups.pipe``.

    Collectives: two gathers among the stages, and two broadcasts for each neighbour and kind of device.
    """

    def __init__(
        self, module: torch.nn.Module, objective: Objective, groups: Grid, *, schedule: str = "1f1b"
    ) -> None:
        self._passes = schedule_named(schedule)
        _check_objective(objective)
        self.module, self.objective, self._groups = module, objective, groups
        self.stage, self.stages = _place(groups)
        self.last_run: PipelineStats | None = None
        self._row: torch.Tensor | None = None
        self._running = False
        self._generation = world.generation()
        pipe = groups.pipe
        self._name = (
            f"hvdloss.pipeline.{world.next_name_index(('pipeline', getattr(pipe, 'process_set_id', 0)))}"
        )
        self._traffic = Traffic()
        device = next((p.device for p in module.parameters() if p.device.type != "cpu"), torch.device("cpu"))
        if pipe is not None:
            self._check_alike({"schedule": schedule, "device": device.type, **objective.settings()})

        def channel(pair: Any, forward: bool) -> Channel | None:
            name = f"{self._name}.{'forward' if forward else 'backward'}"
            return None if pair is None else Channel(pair, forward, name, device, self._traffic)

        # From the first stage on, so that none waits for one that waits for it.
        channels = [channel(pair, fw) for pair in (groups.before, groups.after) for fw in (True, False)]
        self._channels = [one for one in channels if one is not None]
        before, before_back, after, after_back = channels
        self._received = None if before is None else Activations(before)
        self._returned = None if before_back is None else Gradients(before_back)
        self._passed_on = None if after is None else Activations(after)
        self._answered = None if after_back is None else Gradients(after_back)

    def _check_alike(self, settings: dict[str, Any]) -> None:
        texts = communicator_of(self._groups.pipe).all_gather_bytes(
            json.dumps({k: str(v) for k, v in settings.items()}).encode(), f"{self._name}.settings"
        )
        told = decode_all(texts, "settings of a stage", lambda one: isinstance(one, dict))
        for rank, one in enumerate(told):
            wrong = [k for k in {**told[0], **one} if one.get(k) != told[0].get(k)]
            if wrong:
                raise AgreementError(
                    f"stages of one Pipeline were made differently: {wrong[0]} is {one.get(wrong[0])!r} on "
                    f"stage {rank}, and {told[0].get(wrong[0])!r} on stage 0; make them alike on every rank"
                )

    # -- a step ---------------------------------------------------------------------------------------

    def run(self, micro_batches: Sequence[Any] | int) -> torch.Tensor:
        """Do the forward and backward passes of a step's micro-batches; the optimizer's step comes after.

        Args:
            micro_batches: of this replica, each ``(x, y)`` or ``(x, y, weight)``: what the first stage takes
                (a tensor, or a tuple of them), and what the objective does. The first stage reads `x` only,
                the last one `y` and `weight`; others may be given the number of micro-batches. None at all
                is fine: the optimizer's step then adds nothing for this replica.

        Returns:
            the weighted mean of this replica's losses, a float64 scalar, equal on its stages; 0 without any
            weight. Of all replicas it is ``optimizer.last_step.loss``.

        Raises:
            UsageError: stages were told different numbers of micro-batches, or more than the optimizer was
                made for; on all ranks of ``groups.pipe``. Or an earlier run ended in an error.
            ConfigError, ShapeError: a micro-batch that cannot be used.

        Messages: per micro-batch and pair of stages one broadcast of 512 bytes and as many as the activations
        before had, another one of what is more than that, and back one of the gradients and 64 bytes; once
        a run, an all-gather of 16 bytes among the stages.
        """
        began = time.perf_counter()
        batches = self._begin(micro_batches, training=True)
        rows: list[torch.Tensor] = []
        outputs: dict[int, tuple[torch.Tensor, ...]] = {}
        inputs: dict[int, tuple[torch.Tensor, ...]] = {}
        todo = self._passes(self.stages, self.stage, len(batches))
        for what in todo:
            self._advance()
            number = what.micro_batch
            if what.forward:
                inputs[number], outputs[number] = self._forward(what, batches)
            else:
                rows.append(self._backward(number, inputs.pop(number), outputs.pop(number), batches[number]))
        self._end(began, len(batches))
        total = torch.stack(rows).sum(0) if rows else torch.zeros(TENSOR_FIELDS, dtype=torch.float64)
        return torch.where(total[1] != 0, total[0] / total[1], 0.0)

    @torch.no_grad()
    def predict(self, inputs: Sequence[Any] | int) -> list[Any]:
        """Return what the model makes of inputs, on its last stage; nothing on others. No gradients.

        Args:
            inputs: of this replica, what the first stage takes; other stages may be given their number.

        Raises:
            UsageError: see :meth:`run`.

        Messages: per input and pair of stages one or two broadcasts; see :meth:`run`.
        """
        began = time.perf_counter()
        batches = self._begin(inputs if isinstance(inputs, int) else [(x,) for x in inputs], training=False)
        out: list[Any] = []
        for number in range(len(batches)):
            self._advance()
            _, outputs = self._forward(Pass(True, number), batches)
            if self.stage == self.stages - 1:
                out.append(outputs[0] if len(outputs) == 1 else outputs)
        self._end(began, len(batches))
        return out

    def _begin(self, micro_batches: Sequence[Any] | int, *, training: bool) -> list[Any]:
        """Return the micro-batches, once all stages were told the same number."""
        if self._running:
            raise UsageError(
                "an earlier run of this Pipeline ended in an error, and its messages are lost; make a new "
                "Pipeline on all ranks"
            )
        if self._generation != world.generation():
            raise UsageError(
                "the ranks have changed since this Pipeline was made; make a new one, and its grid"
            )
        _check_objective(self.objective)
        reads = self.stage == 0 or (training and self.stage == self.stages - 1)
        if isinstance(micro_batches, int):
            if reads and micro_batches:
                raise ConfigError(
                    f"micro_batches={micro_batches}: stage {self.stage} of {self.stages} needs the "
                    f"micro-batches themselves"
                )
            batches: list[Any] = [None] * micro_batches
        else:
            batches = list(micro_batches)
            if reads and training:
                _check_batches(batches)
        self._traffic.messages = self._traffic.bytes = 0
        self._traffic.waited = 0.0
        self._check_count(len(batches), training)
        self._running = True
        if self._received is not None and batches:
            self._received.expect(0)
        return batches

    def _check_count(self, count: int, training: bool) -> None:
        pipe = self._groups.pipe
        if pipe is None:
            return
        name = f"{self._name}.count"
        began = time.perf_counter()
        most = self.objective.passes if training and self.objective.listeners() else _UNLIMITED
        mine = torch.tensor([[count, most]])
        told = wait(hvd.allgather_async(mine, name=name, process_set=pipe), name, pipe)
        self._traffic.waited += time.perf_counter() - began
        counts, most = told[:, 0].tolist(), int(told[:, 1].min())
        if len(set(counts)) > 1:
            listed = ", ".join(f"{n} on stage {stage}" for stage, n in enumerate(counts))
            raise UsageError(
                f"Pipeline: the stages of one replica were told different numbers of micro-batches: {listed}"
            )
        if count > most:  # each stage would find out by itself, while others wait for it
            raise UsageError(
                f"Pipeline: {count} micro-batches, but the optimizer was made for "
                f"backward_passes_per_step={most}; pass the largest number that any replica has in a step"
            )

    def _advance(self) -> None:
        if self._received is not None:
            self._received.advance()

    def _forward(self, what: Pass, batches: list[Any]) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """Compute a micro-batch's activations, and send them on; return what came in and what came out."""
        number = what.micro_batch
        if self._received is None:
            x = batches[number][0]
            inputs = x if isinstance(x, tuple) else (x,)
        else:
            inputs = self._received.take()
            if number + 1 < len(batches):
                self._received.expect(number + 1)
        given = self.module(*inputs)
        outputs = given if isinstance(given, tuple) else (given,)
        if self._passed_on is not None:
            if not all(isinstance(one, torch.Tensor) for one in outputs):
                raise ShapeError(
                    f"stage {self.stage} returns {[type(one).__name__ for one in outputs]}; return a tensor "
                    f"or a tuple of tensors for the next stage"
                )
            self._passed_on.send(number, outputs, self.stage)
            if torch.is_grad_enabled():
                self._answered.expect(number, outputs)  # type: ignore[union-attr]
        return inputs, outputs

    def _backward(
        self, number: int, inputs: Any, outputs: tuple[torch.Tensor, ...], batch: Any
    ) -> torch.Tensor:
        """Compute a micro-batch's gradients, and send back those of what came in; return its ledger row."""
        if self._answered is None:
            row = self._backward_of_loss(number, outputs, batch)
        else:
            row, gradients = self._answered.take()
            self._backward_of_others(row, gradients, [one for one in outputs if one.requires_grad])
        if self._returned is not None:
            self._returned.send(number, inputs, row)
        return row

    def _backward_of_loss(self, number: int, outputs: tuple[torch.Tensor, ...], batch: Any) -> torch.Tensor:
        prediction = outputs[0] if len(outputs) == 1 else outputs
        weight = batch[2] if len(batch) > 2 else None
        loss = self.objective(prediction, batch[1], weight)
        if not self.objective.listeners():
            self.objective.warn_without_optimizer(self._groups.data.size() if hvd.is_initialized() else 1)
        self._row = None
        self.objective.attach(self, self.objective.passes)
        try:
            loss.backward()
        finally:
            self.objective.detach(self)
        if self._row is None:
            raise UsageError(f"micro-batch {number}: the backward pass did not come through the objective")
        return self._row[:TENSOR_FIELDS].detach()

    def _backward_of_others(
        self, row: torch.Tensor, gradients: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        """Begin a backward pass as the last stage did: with a loss of the same value and weight."""
        if not outputs:
            return
        numerator = _Relayed.apply(row, gradients, *outputs)
        part = Contribution(numerator, row[1], row[2], row[3], row[5], row[6], fault=row[7])
        self.objective.notifying_loss(part, None, []).backward()

    def _end(self, began: float, count: int) -> None:
        for channel in self._channels:
            channel.flush()
        self._running = False
        seconds, traffic = time.perf_counter() - began, self._traffic
        expected = bubble_fraction(self.stages, count) if count else 0.0
        self.last_run = PipelineStats(
            count, seconds, traffic.waited, traffic.messages, traffic.bytes, expected
        )

    # -- what the objective tells of the backward pass on the last stage

    def on_backward_begin(self, row: torch.Tensor, gradient: Any, graph: Any) -> None:
        """Keep what the micro-batch's loss is made of."""
        self._row = row

    def on_foreign_backward(self, name: str, graph: Any) -> None:
        """Nothing: the optimizer decides whether it may be."""


def _check_objective(objective: Any) -> None:
    """Raise ConfigError for an objective that stages cannot share."""
    if not isinstance(objective, Objective):
        raise ConfigError(f"objective={objective!r} must be an hvdloss.torch.Objective")
    wrong = {
        "nonfinite": objective.nonfinite != "raise",
        "terms": bool(objective.terms),
        "ahead": objective.ahead is not None,
        "objectives": objective.exchange is not None,
    }
    reasons = {
        "nonfinite": f"nonfinite={objective.nonfinite!r}: no stage knows whether the others' gradients are "
        f'finite, so they could not leave out the same step; use "raise"',
        "terms": "terms= measure and act on one rank's whole model; leave them out",
        "ahead": "ahead= is for gradients that somebody else averages; leave it out",
        "objectives": "one of several objectives: the stages share one; add the losses up in one function",
    }
    for name, found in wrong.items():
        if found:
            raise ConfigError(f"Pipeline, objective {objective.name!r}: {reasons[name]}")


def _check_batches(batches: list[Any]) -> None:
    """Raise ConfigError for a micro-batch that is none."""
    for number, batch in enumerate(batches):
        if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
            length = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise ConfigError(
                f"micro-batch {number} must be (x, y) or (x, y, weight), not a {type(batch).__name__}{length}"
            )
