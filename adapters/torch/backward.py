"""The backward passes of an exact optimizer's step: what they go through, and what scales their gradients."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from hvdloss import watch
from hvdloss.errors import HvdlossError, UsageError
from hvdloss.losses.passes import alone_warning, another_error, uneven_division_error
from hvdloss.losses.reduction import TENSOR_FIELDS
from hvdloss.step.phase import Event
from hvdloss.step.scale import WeightScale
from hvdloss.step.state import StepState
from hvdloss.step.sums import PassSums
from hvdloss.torch.buckets import FlatBucket, LoneGradient
from hvdloss.torch.hooks import StepHooks
from hvdloss.torch.ops import on_host
from hvdloss.torch.parameters import OptimizerParameters
from hvdloss.torch.passes import divided, division, leads_to, not_reduced, scales, told_factor
from hvdloss.torch.reducer import GradientReducer
from hvdloss.torch.several import LossExchange

__all__ = ["BackwardPass", "OtherObjectives", "PassCollector"]

# Fields of a ledger row that add up over several calls in one backward pass; the others are shared.
_ADDED = [0, 5, 6, 7]
_ADDED_OF_SEVERAL = [0, 2, 3, 5, 6, 7]  # of several objectives: weights and elements too

_ALL_OF_THEM = (  # what to do with several objectives
    "Give the optimizer all of them, by name: DistributedOptimizer(optimizer, model.named_parameters(), "
    "{'name': objective, ...}). Or: "
)


class BackwardPass:
    """One backward pass of an optimizer's step, from its first gradient to its end.

    Args:
        objective: the optimizer's.
        scale: what weights are measured in.
        passes: the most backward passes that a step has.
        several: whether there are several objectives, each with a denominator of its own.

    Attributes:
        rows: ledger rows of the objective's calls that it goes through.
        reached: whether a gradient came to a parameter.
    """

    def __init__(self, objective: Any, scale: WeightScale, passes: int, several: bool) -> None:
        self._objective, self._unit, self._passes, self._several = objective, scale, passes, several
        self.reached = False
        self.rows: list[torch.Tensor] = []
        self._arrived: list[torch.Tensor] = []  # at the losses of those rows
        self._scale: Any = None
        self._gradient_scale: Any = None
        self._undone: Any = None
        self._division: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def enter(self, row: torch.Tensor, gradient: torch.Tensor) -> None:
        """Note a call of the objective, with its ledger row and what arrived at its loss."""
        if not any(row is other for other in self.rows):
            self.rows.append(row)
            self._arrived.append(gradient)

    def is_untracked(self) -> bool:
        """Return whether the pass has no known weight; where there were several calls, waits for a device."""
        return not self.rows or any(bool(row[1] != self.rows[0][1]) for row in self.rows[1:])

    @property
    def scale(self) -> Any:
        """The denominator of this pass's loss, in the unit of the step's weights.

        A float on a CPU; on a device a 0-dim tensor, for which nobody waits.
        """
        if self._scale is None:
            scale = self._unit.relative(self.rows[0][1])
            self._scale = float(scale) if on_host(scale) else scale
        return self._scale

    @property
    def undone(self) -> Any:
        """What undoes a division of the loss by the passes: the weights divide already."""
        if self._undone is None:
            objective = self._objective
            is_mean = objective.reduction != "sum" or objective.global_loss is not None
            self._undone = 1.0
            if self._passes > 1 and is_mean and not self._several:
                arrived = self._arrived[0]
                self._division = (arrived, scales(arrived))
                self._undone = division(arrived, self._passes, self._division[1])
        return self._undone

    @property
    def gradient_scale(self) -> Any:
        """What this pass's gradients are multiplied with."""
        if self._gradient_scale is None:
            self._gradient_scale = self.scale * self.undone
        return self._gradient_scale

    def check_division(self) -> HvdlossError | None:
        """Return the error of several calls whose losses were perhaps divided by the passes."""
        if len(self.rows) < 2 or self.undone is None or self._division is None:
            return None
        if any(bool(divided(g, self._passes, scales(g))) for g in self._arrived):
            return uneven_division_error(self._passes)
        return None

    def add_to(self, sums: PassSums) -> None:
        """Add what this pass tells to the step's."""
        # Several calls with one denominator (two heads, say): the loss is the sum of their means.
        arrived = sum(gradient.detach().double() for gradient in self._arrived)
        row = self.rows[0].clone()
        added = _ADDED_OF_SEVERAL if self._several else _ADDED
        for other in self.rows[1:]:
            row[added] += other[added]
            row[TENSOR_FIELDS:] += other[TENSOR_FIELDS:]
        sums.add(row, self.scale, (self.rows[0][1], arrived * self.undone), self._division)


class OtherObjectives:
    """Other objectives that a backward pass goes through; it may come from them to our parameters."""

    def __init__(self) -> None:
        self._found: list[tuple[str, Any]] = []

    def add(self, name: str, graph: Any) -> None:
        """Note one; `graph` is what its loss was made of."""
        self._found.append((name, graph))

    def clear(self) -> None:
        """Forget those of the last pass."""
        self._found = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def error(self, ours: str) -> HvdlossError:
        """Return the error of a pass through the first of them."""
        return another_error(repr(self._found[0][0]), ours, _ALL_OF_THEM)

    def refused(self, ours: str, parameters: set[int]) -> HvdlossError | None:
        """Return the error of a pass that came to parameters (by identity) from another loss too."""
        found, self._found = self._found, []
        for name, graph in found:
            if leads_to(graph, parameters):
                return another_error(repr(name), ours, _ALL_OF_THEM)
        return None


# The optimizers (by identity) to which the backward pass under way belongs: it goes through their objectives.
_now: set[int] | None = None


class PassCollector:
    """Collects the backward passes of an optimizer's step: listens to its objective and parameters.

    Args:
        state: of the step.
        objective: the optimizer's; one, or several.
        parameters: the optimizer's.
        reducer: what gradients go into.
        hooks: of the user.
        size: gives the number of ranks.
        prepare: called before the first pass of a step.
        completed: called at the end of the last one, with whether it belongs to this optimizer alone.

    Attributes:
        current: the pass under way; None outside.
        losses: the exchange of several objectives; None with one.
    """

    def __init__(
        self,
        state: StepState,
        objective: Any,
        parameters: OptimizerParameters,
        reducer: GradientReducer,
        hooks: StepHooks,
        size: Callable[[], int],
        prepare: Callable[[], None],
        completed: Callable[[bool], None],
    ) -> None:
        self._state, self._objective, self._parameters = state, objective, parameters
        self._reducer, self._hooks, self._size = reducer, hooks, size
        self._prepare, self._completed = prepare, completed
        self.losses: LossExchange | None = None
        self.overlap = True  # whether this step's buckets may be reduced before its last pass is over
        self._looked = False  # for parameters that no optimizer has
        self._others = OtherObjectives()
        self._together: set[int] = set()  # those of the pass under way
        self.current: BackwardPass | None = None

    def begin_step(self) -> None:
        """Forget a pass that ended in an exception."""
        self.current = None
        self._others.clear()

    def interrupt(self) -> None:
        """End a pass that ended in an exception: its gradients are not whole."""
        if self.current is not None:
            self.current = None
            self._state.phase.to(Event.END_PASS)
            self._state.sums.untracked += 1

    # -- what is told -----------------------------------------------------------------------------

    def on_backward_begin(self, row: torch.Tensor, gradient: torch.Tensor, graph: Any) -> None:
        """Note that a backward pass goes through a call of the objective with this ledger row."""
        current = self.current
        if current is None:
            current = self._begin()
            if not self._reducer.planned and self._size() > 1 and not self._looked:
                self._looked = True
                if alone := not_reduced(graph):
                    warnings.warn(alone_warning(alone), stacklevel=2)
        self._together.add(id(self))
        current.enter(row, gradient)

    def on_foreign_backward(self, name: str, graph: Any) -> None:
        """Note that a backward pass goes through another objective; it may come to these parameters."""
        self._others.add(name, graph)
        # Whichever callback comes first: while a pass is under way, its own end looks at them.
        torch.autograd.Variable._execution_engine.queue_callback(
            lambda: None if self.current is not None else self._others.clear()
        )

    def gradient_hook(self) -> Callable[[torch.nn.Parameter], None]:
        """Return what runs once per parameter and pass; what is rare happens in the methods it calls."""
        me = weakref.ref(self)

        def hook(p: torch.nn.Parameter) -> None:
            collector = me()
            if collector is None:
                return
            current = collector.current
            place = None if current is None else collector._reducer.slots.get(id(p))
            if place is None:
                collector._gradient_ready(p)
            elif place[0].fire(place[1]) and current.rows:  # type: ignore[union-attr]
                collector._bucket_full(place[0], p)

        hook._hvdloss = True  # type: ignore[attr-defined]
        return hook

    def _gradient_ready(self, p: torch.nn.Parameter) -> None:
        """Note the first gradient of a pass, and one that no bucket waits for."""
        if self.current is None and self._parameters.gone:
            return
        current = self.current or self._begin(p)
        current.reached = True
        place = self._reducer.slots.get(id(p))
        if place is None:
            self._reducer.note(p)
        elif place[0].fire(place[1]) and current.rows:
            self._bucket_full(place[0], p)

    def _bucket_full(self, bucket: FlatBucket | LoneGradient, p: torch.nn.Parameter) -> None:
        """Take in a bucket's gradients, all of which are ready, and start its reduction if it can."""
        if bucket.full:
            raise UsageError(
                f"the gradient of {self._parameters.name(p)} came twice in one backward pass (reentrant "
                f"checkpointing does that): pass use_reentrant=False to checkpoint, or a larger "
                f"backward_passes_per_step."
            )
        assert self.current is not None
        bucket.absorb(self.current.gradient_scale)
        phase, sums = self._state.phase, self._state.sums
        if not (phase.is_last and self.overlap) or sums.untracked or bucket is self._reducer.ledger_bucket:
            return
        leftover = sums.scale + self.current.scale
        self._reducer.fill(bucket, leftover, lambda: phase.to(Event.LAUNCH))

    def measured(self) -> dict[str, Any]:
        """Return what the step's passes tell beside their rows, by field of a ledger: numbers, or tensors."""
        state = self._state
        found = {"failed": self._divided()}
        if self.losses is None:
            found["factor"], found["rescaled"] = told_factor(state.sums.factors, state.factor)
        return found

    def _divided(self) -> Any:
        """Return above 0 if the losses were divided by another number of passes than the one declared."""
        phase, divisions = self._state.phase, self._state.sums.divisions
        if not 2 <= phase.done < phase.passes or len(divisions) < phase.done:
            return 0.0
        found = [divided(arrived, phase.done, by) for arrived, by in divisions]
        return torch.stack(found).all().double() if isinstance(found[0], torch.Tensor) else float(all(found))

    # -- a pass -----------------------------------------------------------------------------------

    def _begin(self, arrived: torch.nn.Parameter | None = None) -> BackwardPass:
        """Begin a pass; `arrived`: the parameter whose gradient tells of it, if it is not the objective."""
        global _now
        watch.check()
        sums, phase = self._state.sums, self._state.phase
        self._state.raise_held()
        try:
            uncleared = phase.synchronized and not self._cleared(arrived)
            phase.check_pass(uncleared, counted=sums.row is not None)
        except UsageError:
            if self._others:
                raise self._others.error(self._objective.name) from None
            raise
        if sums.untracked and sums.row is None and arrived is None and self._cleared():
            self._state.begin()
            self._reducer.begin_step()
            self._hooks.clear()
            phase.abort()
        if not phase.done:
            self._prepare()
            self._hooks.stash(phase.passes, arrived)
        self._hooks.adopt()
        phase.to(Event.BEGIN_PASS)
        if _now is None:
            _now = set()
        self._together = _now
        several = self.losses is not None
        self.current = BackwardPass(self._objective, self._state.scale, phase.passes, several)
        # Runs when the outermost backward pass is over; a reentrant one inside belongs to it.
        torch.autograd.Variable._execution_engine.queue_callback(self._end)
        return self.current

    def _cleared(self, arrived: torch.nn.Parameter | None = None) -> bool:
        """Return whether gradients have been cleared, but for one that has just arrived.

        As by ``zero_grad`` of a module that another network's loss came through: a GAN's discriminator.
        """
        grads = (p.grad for p in self._parameters.all() if p is not arrived)
        return all(grad is None or not bool(grad.any()) for grad in grads)

    def _end(self) -> None:
        global _now
        _now = None
        state, reducer = self._state, self._reducer
        current, self.current = self.current, None
        if current is None:  # the step was dropped in between
            return
        if not (current.reached or reducer.came()):  # autograd.grad: no parameter's gradient was touched
            state.sums.bypassed = bool(current.rows)
            self._others.clear()
            if self.losses is not None:
                self.losses.end_pass(counted=False)
            state.phase.to(Event.MISS_PASS)
            return
        if self._others:
            state.refuse(self._others.refused(self._objective.name, set(map(id, self._parameters.all()))))
        if self.losses is not None:
            self.losses.end_pass(bool(current.rows), self._unplanned())
        untracked = current.is_untracked()
        if not untracked:
            state.refuse(current.check_division())
        # What another loss leaves here is looked at later.
        reducer.end_pass(None if untracked else current.gradient_scale)
        state.phase.to(Event.END_PASS)
        if untracked:
            state.sums.untracked += 1
            return
        current.add_to(state.sums)
        if state.phase.complete and not state.sums.untracked:
            self._completed(len(self._together) == 1)

    def _unplanned(self) -> dict[int, torch.nn.Parameter]:
        """Return the parameters that have a gradient of this pass, by place, while there is no plan."""
        if self._reducer.planned:
            return {}
        fired = self._reducer.unplanned.fired
        return {i: p for i, p in enumerate(self._parameters.all()) if id(p) in fired}
