"""The exact distributed optimizer: gradients of all ranks weighted by what each rank saw."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

import torch
from hvdloss import watch
from hvdloss.agreement import check_consistency, raise_on_all_ranks
from hvdloss.communicator import Communicator, group_ranks, included
from hvdloss.control.compression import AdaptiveCompression
from hvdloss.control.period import SyncPeriod
from hvdloss.control.weights import Proximal
from hvdloss.controller import parse_counts
from hvdloss.errors import AgreementError, ConfigError, HvdlossError, NoWeightError, UsageError
from hvdloss.guard import due
from hvdloss.ledger import (
    COLUMN,
    FAULT_COLUMNS,
    LEDGER_WIDTH,
    Ledger,
    Ledgers,
    check_step,
    common_factor,
    nonfinite_ranks,
)
from hvdloss.passes import alone_warning, another_error, bypassed_error, division_error, uneven_division_error
from hvdloss.plan import Bucket, ParameterInfo, plan_buckets
from hvdloss.reduction import TENSOR_FIELDS
from hvdloss.report import StepReport
from hvdloss.report.steps import Interest, LossReport
from hvdloss.several import Objectives
from hvdloss.term import CommStats
from hvdloss.torch._backend import hvd
from hvdloss.torch.buckets import (
    FlatBucket,
    LoneGradient,
    SparseSlot,
    Wire,
    beyond,
    own_lane,
    weighed,
    weighed_sparse,
)
from hvdloss.torch.clipping import see_clipping
from hvdloss.torch.compression import Compression
from hvdloss.torch.guard import check_synchronized, checksums
from hvdloss.torch.hooks import adopt, hooks_of, same
from hvdloss.torch.ledgers import Message
from hvdloss.torch.local import Stretch, share_memory
from hvdloss.torch.objective import Objective
from hvdloss.torch.ops import communicator_of, on_host, to_device_async
from hvdloss.torch.passes import (
    divided,
    division,
    leads_to,
    mark_reduced,
    not_reduced,
    scales,
    see_scalers,
    told_factor,
)
from hvdloss.torch.several import LossExchange
from hvdloss.tuning import Tuning, choose, launched
from hvdloss.world import next_name_index, register_for_reset

__all__ = ["DistributedOptimizer"]


class _Engine:
    """What an exact optimizer does between the backward pass and the update.

    States of a step: *gathering* (backward passes add scaled gradients to the buckets), *launched* (the
    reductions are under way), *synchronised* (``.grad`` holds the step's gradient).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None,
        objective: Objective | Objectives,
        compression: Any,
        passes: int,
        predivide: float,
        groups: Any,
        sparse_as_dense: bool,
        process_set: Any,
        check_every: int | None,
        tuning: Tuning,
    ) -> None:
        self.tuning = tuning
        self.check_every = check_every
        self.optimizer = weakref.ref(optimizer)
        self.objective = objective
        self.passes = passes
        self.predivide = predivide
        self.groups = groups
        self.sparse_as_dense = sparse_as_dense
        self.process_set = process_set
        self._lane = own_lane(process_set)
        self.wire = Wire(self._lane, compression)
        self.compression = compression
        self.step_count = 0
        self.ledgers: Ledgers | None = None
        self.ledger_step = 0  # the step they are of
        self.synchronized = False
        self.should_synchronize = True
        self.names = self._named(optimizer, named_parameters)
        # Optimizers are told apart on the wire by the order of their construction in a process set.
        self.name = f"hvdloss.{next_name_index(('torch', getattr(process_set, 'process_set_id', 0)))}"
        self._plain_wire = Wire(self._lane, Compression.none)  # for ledgers
        self._held_up = self._computed = 0.0
        self._ended: float | None = None  # when the last exchange was over
        self._together = 0.0  # squared length of the last exchange's mean move
        self._reference = 1.0
        self._factor = 1.0  # what all ranks' losses were last multiplied with
        self.controller = objective.controller
        self._period = self.controller.policy(SyncPeriod)
        self._compressing = self.controller.policy(AdaptiveCompression)
        self._proximal = self.controller.policy(Proximal)
        self._stretch: Stretch | None = None
        self.velocity: list[torch.Tensor] | None = None  # of the outer step, for the stretch to come
        self._local = False  # whether this step's gradients stay here
        self._due = False  # an exchange of parameters
        self.has_next = False  # whether this rank has more data after this step
        self.error: BaseException | None = None  # why it cannot go on
        self.sync_status = (0, False)  # how many tables of ledgers there were, and whether a rank had more
        self.preemption_requested: Callable[[], bool] = lambda: False  # whether this rank is to leave
        self.preempted_ranks: tuple[int, ...] = ()  # which ranks are, as all know
        self._idle = False  # whether this rank has nothing to update with
        self.verdict: HvdlossError | str | None = None  # "skip", or an error, for the update to come
        self._alone_bad = False  # whether that of a local step has gradients that are not finite
        self.samples = 0  # elements of all steps, those before a checkpoint that it goes on from among them
        self.skipped = 0  # updates
        self.dropped: np.ndarray = np.zeros(0, dtype=np.int64)  # steps, by rank
        self.interest = Interest()  # in what single ranks did
        self.listeners: list[Callable[[StepReport], None]] = []
        self._news = False  # whether they have not been told of the last step
        self._active = False
        self._rows: list[torch.Tensor] = []
        self._arrived: list[torch.Tensor] = []  # at the losses of those rows
        self._others: list[tuple[str, Any]] = []  # objectives of others in a backward pass, and their graphs
        self._looked = False  # for parameters that no optimizer has
        self._retired = False  # as another optimizer has its parameters now
        see_scalers()
        see_clipping(self)
        self._hooked: dict[int, Any] = {}
        self._frozen: list[torch.nn.Parameter] = []
        self._forget_plan()
        self._losses: LossExchange | None = None  # where there are several
        self.losses: dict[str, LossReport] = {}  # of the last step
        self._begin_step()
        if included(hvd, process_set):  # others keep their own gradients, as with Horovod
            mine = {id(p) for p in self.parameters()}
            for other in objective.listeners():  # a new optimizer for an objective takes the old one's place
                if isinstance(other, _Engine) and other._retire(mine):
                    other.objective.detach(other)
            several = isinstance(objective, Objectives) or objective.exchange is not None
            if several and objective.listeners():
                raise ConfigError(
                    f"objective {objective.name!r}: one of several objectives belongs to one optimizer, "
                    f"which sums the denominators. Give all parameters to that one, in groups, or each "
                    f"optimizer objectives of its own"
                )
            self._hook_parameters()
            objective.attach(self, passes)
            if isinstance(objective, Objectives):
                me = weakref.ref(self)  # objectives do not hold optimizers
                self._losses = LossExchange(
                    objective, process_set, self.name, lambda: me()._device(), lambda: me()._waiting()
                )
            else:
                objective.exchange = None
            self.controller.reset(process_set.rank(), process_set.size(), force=True)
        register_for_reset(self)

    # -- those who follow -------------------------------------------------------------------------

    def report(self) -> StepReport | None:
        """Return the report of the last synchronised step; None before the first."""
        if self.ledgers is None:
            return None
        choices = {**self.tuning.as_dict(), **launched(hvd), "comm_plan": self.travel()}
        return StepReport.of(
            self.ledger_step,
            self.ledgers,
            self.objective.reduction,
            choices,
            self.controller.reports(),
            nonfinite=self.objective.nonfinite,
            skipped=self.skipped,
            dropped=self.dropped,
            samples=self.samples,
            interest=self.interest,
            losses=self.losses,
        )

    def add_listener(self, listener: Callable[[StepReport], None]) -> None:
        """Have `listener` called with the report of every step that begins from now on."""
        if not self.listeners:
            self._news = False
        self.listeners.append(listener)

    def remove_listener(self, listener: Callable[[StepReport], None]) -> None:
        """Call `listener` no more."""
        if listener in self.listeners:
            self.listeners.remove(listener)

    def tell(self) -> None:
        """Tell those who follow of the last step, once."""
        if self.listeners and self._news:
            self._news = False
            report = self.report()
            # One that began to listen in the middle of a step is told from the next one on.
            if report is not None and report.ranks.gathered:
                for listener in list(self.listeners):
                    listener(report)

    # -- other ranks, and going on ----------------------------------------------------------------

    def reset(self) -> None:
        """Forget what was of other ranks: the plan, what was under way, and what steps were measured in."""
        self._table_ready = self._rows_ready = None
        self._forget_plan()
        self._stretch = self._stretch_reference = None
        if self._losses is not None:
            self._losses.reset()
        self._begin_step()
        self.synchronized = self._due = self._local = self._idle = False
        self._reference, self._together, self._factor = 1.0, 0.0, 1.0
        self._held_up = self._computed = 0.0
        self._ended = None  # or the time without any ranks would be taken for computation
        self.sync_status, self.preempted_ranks = (0, False), ()
        self.has_next, self.error = False, None
        self.velocity = None
        if included(hvd, self.process_set):
            self.controller.reset(self.process_set.rank(), self.process_set.size(), force=True)

    def memory(self) -> dict[str, Any]:
        """Return what a run that goes on needs besides the optimizer's own state; equal on all ranks.

        To be asked for when parameters are equal: after :meth:`exchange`.
        """
        velocity = self.velocity if self._stretch is None else self._stretch.velocity
        return {
            "steps": self.step_count,
            "samples": self.samples,
            "terms": self.controller.state_dict(),
            "velocity": velocity,
        }

    def remember(self, memory: Any, *, same_ranks: bool) -> None:
        """Go on from a :meth:`memory`; no collective.

        Raises:
            ConfigError: it is none.
        """
        counts = parse_counts(memory, "is not of a DistributedOptimizer")
        self.controller.load_state_dict(memory["terms"], same_ranks=same_ranks)
        self.step_count, self.samples = counts
        self._stretch = None
        self.velocity = memory["velocity"]

    # -- parameters and plan ----------------------------------------------------------------------

    @staticmethod
    def _named(
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None,
    ) -> dict[int, str]:
        """Return the name of each of the optimizer's parameters, by identity."""
        own = {
            id(p): f"parameter.{i}.{j}"
            for i, group in enumerate(optimizer.param_groups)
            for j, p in enumerate(group["params"])
        }
        if named_parameters is None:
            return own
        named = list(named_parameters)
        if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in named):
            raise ConfigError(
                "named_parameters must give (name, parameter) pairs, as model.named_parameters() does"
            )
        names = [name for name, _ in named]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"named_parameters has the same name twice: {', '.join(twice)}")
        given = {id(p): name for name, p in named}
        missing = [name for key, name in own.items() if key not in given]
        if missing:
            raise ConfigError(
                f"named_parameters names {len(given)} parameters but leaves out {len(missing)} of the "
                f"optimizer's (the first at param_groups {missing[0].removeprefix('parameter.')}); pass "
                f"all of model.named_parameters()"
            )
        return {key: given[key] for key in own}

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the optimizer's parameters, in its order."""
        optimizer = self.optimizer()
        assert optimizer is not None
        return [p for group in optimizer.param_groups for p in group["params"]]

    def _retire(self, parameters: set[int]) -> bool:
        """Take no further part if another optimizer now has parameters of this one; return whether so."""
        if self.optimizer() is not None and not parameters & {id(p) for p in self.parameters()}:
            return False
        self.abandon()
        for handle in self._hooked.values():
            handle.remove()
        if self._losses is not None:
            self._losses.leave()
        self._retired, self.synchronized = True, False
        return True

    def set_passes(self, passes: int) -> None:
        """Change how many backward passes a step has at most."""
        _check_passes(passes)
        self.passes = passes
        self.objective.passes = passes

    def added(self, old: int) -> None:
        """Take in parameters of groups added after the first `old`."""
        self.exchange()
        self._stretch = None
        optimizer = self.optimizer()
        assert optimizer is not None
        for i, group in enumerate(optimizer.param_groups[old:], start=old):
            for j, p in enumerate(group["params"]):
                self.names.setdefault(id(p), f"parameter.{i}.{j}")
        if included(hvd, self.process_set):
            self._hook_parameters()
        self._forget_plan()

    def _forget_plan(self) -> None:
        """Plan again at the next step, from what that step sees."""
        self.buckets: list[FlatBucket | LoneGradient] = []
        self.lone: list[LoneGradient] = []  # of the buckets
        self.carrier: FlatBucket | None = None  # the bucket in whose tail the ledgers travel
        self.sparse: list[SparseSlot] = []
        self._slot: dict[int, FlatBucket | LoneGradient | SparseSlot] = {}
        self._place: dict[int, tuple[FlatBucket | LoneGradient, int]] = {}  # of those in buckets
        self._densified: list[torch.nn.Parameter] = []
        self._planned = False
        self._stale = False  # whether gradients can no longer travel as planned
        self._planned_size = 0
        self._planned_kinds: list[Any] = []
        self._order: dict[int, None] = {}
        self._fired: set[int] = set()
        self._gathered: dict[int, torch.Tensor] = {}

    def _refresh(self) -> None:
        """Before the first backward pass of a step, notice what changes the plan, as all ranks do."""
        if self._due:  # the update was skipped, as a GradScaler does: ranks meet here
            self.exchange()
        if self.unfrozen() and not self._apart:  # in a stretch of local steps it has to wait
            self._stretch = None
            self._hook_parameters()
            self._forget_plan()
        if self._planned and self._kinds() != self._planned_kinds:  # model.double(), say
            self._stretch = None
            self._forget_plan()
        for bucket in self.buckets:
            if isinstance(bucket, FlatBucket):
                bucket.keep_views()
        if self._planned and self._planned_size != self.process_set.size():
            self._forget_plan()  # an elastic job has other ranks now
            self._stretch = None
            self.controller.reset(self.process_set.rank(), self.process_set.size())
        if self._compressing is not None:
            wanted = Compression.fp16 if self._compressing.on else Compression.none
            if wanted is not self.compression:
                self.compression = wanted
                self.wire = Wire(self._lane, wanted)
                self._stale = not self._stale  # where ledgers travel depends on it
        # The first step, which makes the plan, is done together.
        self._local = self._planned and self._period is not None and self._period.period > 1
        if self._stale and not self._local:
            self._forget_plan()
        if self._local and self._stretch is None:
            self._stretch = Stretch(self.parameters(), self.name)
            self._stretch.velocity, self.velocity = self.velocity, None

    @property
    def _apart(self) -> bool:
        """Whether the ranks' parameters differ, after local steps."""
        return self._stretch is not None and self._stretch.steps > 0

    def _kinds(self) -> list[Any]:
        """Return what a plan depends on of each parameter: the user may change it in place."""
        return [(p.dtype, p.device, p.shape) for p in self.parameters()]

    def unfrozen(self) -> bool:
        """Return whether a parameter is to be trained now that was frozen before."""
        return any(p.requires_grad for p in self._frozen)

    def _hook_parameters(self) -> None:
        """Have every parameter that requires gradients tell when its gradient is ready."""
        me = weakref.ref(self)

        def hook(p: torch.nn.Parameter) -> None:
            # Runs once per parameter and pass: what is rare happens in the methods it calls.
            engine = me()
            if engine is None or engine._retired:
                return
            place = engine._place.get(id(p)) if engine._active else None
            if place is None:
                engine._gradient_ready(p)
            elif place[0].fire(place[1]) and engine._rows:
                engine._bucket_full(place[0], p)

        hook._hvdloss = True  # type: ignore[attr-defined]
        for p in self.parameters():
            if p.requires_grad and id(p) not in self._hooked:
                self._hooked[id(p)] = p.register_post_accumulate_grad_hook(hook)
        self._frozen = [p for p in self.parameters() if id(p) not in self._hooked]
        mark_reduced(self.parameters())

    def _adopt_hooks(self) -> None:
        """Take the user's hooks off the parameters: they see the gradient of all ranks, not of a pass."""
        for p in self.parameters():
            adopt(p)

    def _begin_step(self) -> None:
        self._active = False  # also after a backward pass that ended in an exception
        self.passes_done = 0
        self._row_sum: torch.Tensor | None = None
        self._kept: dict[int, torch.Tensor] = {}
        self._strays = 0
        self._bypassed = False  # whether a pass went through the objective, but came to no parameter
        self._refusal: HvdlossError | None = None  # of what the user's loop did in this step
        self._factors: list[Any] = []  # what losses were multiplied with, by pass that weighs anything
        self._divisions: list[Any] = []  # what arrived at losses, by pass, over what scalers multiplied with
        self._others.clear()
        self._scale_sum: Any = 0.0
        self._table: torch.Tensor | None = None
        self._table_ready: Callable[[], None] | None = None
        self._rows_ready: Callable[[], torch.Tensor] | None = None  # what terms tell, or all ranks' rows
        self._dropped: float | None = None  # above 0 if this rank adds nothing for its gradients' sake
        self._judged: Ledgers | None = None
        for slot in (*self.buckets, *self.sparse):
            slot.begin_step()
        self._gathered.clear()
        self._fired.clear()

    # -- a backward pass --------------------------------------------------------------------------

    def on_backward_begin(self, row: torch.Tensor, gradient: torch.Tensor, graph: Any) -> None:
        """A backward pass goes through a call of the objective with this ledger row."""
        if not self._active:
            self._begin_backward()
            if not self._planned and self.process_set.size() > 1 and not self._looked:
                self._looked = True
                if alone := not_reduced(graph):
                    warnings.warn(alone_warning(alone), stacklevel=2)
        if not any(row is other for other in self._rows):
            self._rows.append(row)
            self._arrived.append(gradient)

    def on_foreign_backward(self, name: str, graph: Any) -> None:
        """A backward pass goes through another objective, and may come to this optimizer's parameters."""
        self._others.append((name, graph))
        # Whichever callback comes first: while a pass is under way, its own end looks at them.
        torch.autograd.Variable._execution_engine.queue_callback(
            lambda: None if self._active else self._others.clear()
        )

    def _refuse_others(self) -> None:
        """Refuse a backward pass that came to parameters from the loss of another objective too."""
        others, self._others = self._others, []
        for name, graph in others:
            if self._refusal is None and leads_to(graph, {id(p) for p in self.parameters()}):
                self._refusal = another_error(repr(name), self.objective.name, _ALL_OF_THEM)

    def _begin_backward(self, arrived: torch.nn.Parameter | None = None) -> None:
        watch.check()
        if self.launched or (self.passes_done >= self.passes and self._row_sum is not None):
            if self._others:
                raise another_error(repr(self._others[0][0]), self.objective.name, _ALL_OF_THEM)
            raise UsageError(
                f"a backward pass began although the gradients of this step's backward_passes_per_step="
                f"{self.passes} are already under way, and optimizer.step() was not called. Pass as "
                f"backward_passes_per_step the largest number of micro-batches that any rank has in a "
                f"step; others may have fewer. (Or passes were left over, from the end of an epoch without a "
                f"step(): call optimizer.zero_grad() before the next; or two optimizers share one objective, "
                f"as in a GAN: give each its own.)"
            )
        self.synchronized = False
        if self._strays and self._row_sum is None and arrived is None and self._discarded():
            others = list(self._others)  # of this pass
            self._begin_step()
            self._others += others
        if not self.passes_done:
            self._refresh()
            self._set_aside(arrived)
        self._adopt_hooks()
        self._active = True
        self._reached = False
        self._rows, self._arrived = [], []
        self._scale: Any = None
        self._grad_scale: Any = None
        self._undone: Any = 1.0  # a division by the passes
        # Runs when the outermost backward pass is over; a reentrant one inside belongs to it.
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _discarded(self) -> bool:
        """Return whether the gradients of passes that were none of the objective's have been cleared.

        As by ``zero_grad`` of a module that another network's loss came through: a GAN's discriminator.
        """
        return all(p.grad is None or not bool(p.grad.any()) for p in self.parameters())

    def _set_aside(self, arrived: torch.nn.Parameter | None = None) -> None:
        """Keep gradients that were not cleared since the last step: they add to this step's, once.

        With one pass per step they may stay where they are, since weighted averaging leaves what is
        equal on all ranks as it is; with several passes only the first one's gradient would hold them.
        """
        if self.passes == 1:
            return
        for p in self.parameters():
            if p.grad is not None and p is not arrived:  # whose gradient is already this pass's
                # A copy, as it is a view of the bucket that this step overwrites.
                self._kept[id(p)] = p.grad.detach().clone()
                p.grad = None

    def _gradient_ready(self, p: torch.nn.Parameter) -> None:
        """Take note of the first gradient of a pass, and of one that no bucket waits for."""
        if not self._active:
            self._begin_backward(p)
        self._reached = True
        place = self._place.get(id(p))
        if place is not None:
            if place[0].fire(place[1]) and self._rows:
                self._bucket_full(place[0], p)
        elif id(p) not in self._slot:
            self._fired.add(id(p))
            self._order[id(p)] = None

    def _bucket_full(self, bucket: FlatBucket | LoneGradient, p: torch.nn.Parameter) -> None:
        """Take in a bucket's gradients, all of which are ready, and start its reduction if it can."""
        if bucket.full:
            raise UsageError(
                f"the gradient of {self.names[id(p)]} came twice in one backward pass (reentrant "
                f"checkpointing does that): pass use_reentrant=False to checkpoint, or a larger "
                f"backward_passes_per_step."
            )
        bucket.absorb(self._gradient_scale())
        last = self.passes_done + 1 == self.passes and not self._strays and not self._local
        if not (last and self.tuning.overlap.value) or bucket is self.carrier or self._dropping:
            return
        bucket.full = True
        # In the order of the plan on every rank, whichever gradients come first on it (or do not come).
        for slot in self.buckets:
            if slot is self.carrier or slot.launched:
                continue
            if not slot.full:
                break
            slot.launch(self._scale_sum + self._scale, self.wire)

    def _gradient_scale(self) -> Any:
        """Return what this pass's gradients are multiplied with: the denominator of its loss.

        And with the passes of a step, where the loss was divided by them: the weights divide already.
        """
        if self._grad_scale is None:
            scale = self._current_scale()
            objective = self.objective
            if (
                self.passes > 1
                and self._losses is None
                and (objective.reduction != "sum" or objective.global_loss is not None)
            ):
                arrived = self._arrived[0]
                self._divisions.append((arrived, scales(arrived)))
                self._undone = division(arrived, self.passes, self._divisions[-1][1])
                scale = scale * self._undone
            self._grad_scale = scale
        return self._grad_scale

    def _divided(self) -> Any:
        """Return above 0 if the losses were divided by another number of passes than the one declared."""
        count = self.passes_done
        if not 2 <= count < self.passes or len(self._divisions) < count:
            return 0.0
        found = [divided(arrived, count, by) for arrived, by in self._divisions]
        return torch.stack(found).all().double() if isinstance(found[0], torch.Tensor) else float(all(found))

    def _current_scale(self) -> Any:
        """Return the denominator of this pass's loss, in the unit of the step's weights.

        A float on a CPU; on a device a 0-dim tensor, for which nobody waits.
        """
        if self._scale is None:
            scale = self._rows[0][1]
            if self.objective.reduction != "sum":
                scale = scale / self._reference
            self._scale = float(scale) if on_host(scale) else scale
        return self._scale

    def _end_backward(self) -> None:
        self._active = False
        reached = self._reached or any(bucket.fired_count for bucket in self.buckets)
        if not reached:  # autograd.grad, say: no parameter's gradient was touched
            self._bypassed = bool(self._rows)
            self._others.clear()
            if self._losses is not None:
                self._losses.end_pass(counted=False)
            return
        rows = self._rows
        self._refuse_others()
        if self._losses is not None:
            fired = (
                {}
                if self._planned
                else {i: p for i, p in enumerate(self.parameters()) if id(p) in self._fired}
            )
            self._losses.end_pass(bool(rows), fired)
        # Where there were several calls, a device is waited for.
        stray = not rows or any(bool(row[1] != rows[0][1]) for row in rows[1:])
        scale = 0.0 if stray else self._current_scale()
        if len(rows) > 1 and not stray:
            self._gradient_scale()
            if self._divisions and any(bool(divided(g, self.passes, scales(g))) for g in self._arrived):
                self._refusal = self._refusal or uneven_division_error(self.passes)
        for slot in (*self.buckets, *self.sparse):
            if not stray:  # a backward pass of something else leaves its gradients to be looked at
                slot.absorb(self._gradient_scale())
            slot.begin_pass()
        if not self._planned and not stray:
            self._gather(self._gradient_scale())
        self.passes_done += 1
        if stray:
            self._strays += 1
            return
        # Several calls with one denominator (two heads, say): the loss is the sum of their means.
        self._gradient_scale()
        arrived = sum(gradient.detach().double() for gradient in self._arrived)
        self._factors.append((rows[0][1], arrived * self._undone))
        row = rows[0].clone()
        added = _ADDED if self._losses is None else _ADDED_OF_SEVERAL
        for other in rows[1:]:
            row[added] += other[added]
            row[TENSOR_FIELDS:] += other[TENSOR_FIELDS:]
        self._row_sum = row if self._row_sum is None else self._row_sum + row
        self._scale_sum = self._scale_sum + scale
        if self._planned and self.passes_done == self.passes and not self._strays and not self._local:
            self._launch()

    @torch.no_grad()
    def _gather(self, scale: Any) -> None:
        """Before there is a plan, hold each parameter's scaled gradient by itself."""
        for p in self.parameters():
            if id(p) not in self._fired or p.grad is None:
                continue
            grad, p.grad = p.grad.detach(), None
            # Sums of many weights do not fit float16.
            grad = grad.float() if grad.dtype is torch.float16 else grad
            grad = (weighed if grad.layout is torch.strided else weighed_sparse)(grad, scale)
            held = self._gathered.get(id(p))
            self._gathered[id(p)] = grad if held is None else held + grad
        self._fired.clear()

    # -- the reduction ----------------------------------------------------------------------------

    @property
    def unreduced(self) -> bool:
        """Whether backward passes have left gradients here that are not yet those of all ranks."""
        return self._row_sum is not None

    @property
    def launched(self) -> bool:
        """Whether any of the step's reductions is under way."""
        return self._table is not None or any(b.launched for b in self.buckets)

    def _waiting(self) -> AbstractContextManager[None]:
        """Say, while it lasts, that this rank waits for the others in a step."""
        return watch.waiting_in_step(self.name, group_ranks(hvd, self.process_set))

    @property
    def _failure(self) -> BaseException | None:
        """Why this rank cannot go on, or what its loop did that has no exact step."""
        several = None if self._losses is None else self._losses.refusal
        return next((one for one in (self.error, self._refusal, several) if one is not None), None)

    def communicator(self) -> Communicator:
        """Return the exchange of small arrays among this optimizer's ranks."""
        return communicator_of(self.process_set)

    def _launch(self) -> None:
        """Start every reduction that has not started; the ledgers' last, as they tell of the others."""
        self._drop_if_nonfinite()
        for slot in (*self.buckets, *self.sparse):
            if not slot.launched and slot is not self.carrier:
                slot.launch(self._scale_sum, self.wire)
        if self.carrier is not None and not self.carrier.sealed:
            self.carrier.seal(self._scale_sum, self.wire)
        self._launch_ledger()
        if self.carrier is not None and not self.carrier.launched:
            self.carrier.launch(self._scale_sum, self.wire)

    @property
    def _dropping(self) -> bool:
        """Whether nothing may be sent before all gradients were looked at."""
        return self.objective.nonfinite == "drop"

    def _bad_gradients(self) -> Any:
        """Return above 0 if a gradient of this rank is NaN, infinite or too large: a number, or a tensor."""
        if self._planned:
            found = [slot.bad for slot in (*self.buckets, *self.sparse)]
        else:
            grads = [*self._gathered.values(), *(p.grad for p in self.parameters() if p.grad is not None)]
            found = [
                beyond(
                    (g if g.layout is torch.strided else g.coalesce().values()).detach().reshape(-1),
                    self.wire.limit(g.dtype),
                )
                for g in grads
            ]
        waiting = [one for one in found if isinstance(one, torch.Tensor)]
        here = float(any(one for one in found if not isinstance(one, torch.Tensor)))
        return torch.stack(waiting).any().double() + here if waiting else here

    def _drop_if_nonfinite(self) -> None:
        """Where such a rank is to add nothing, make it one without any backward pass if it is one."""
        row = self._row_sum
        if not self._dropping or row is None or self._table is not None:
            return
        slots = (*self.buckets, *self.sparse)
        for slot in slots:
            slot.seal(self._scale_sum, self.wire)
        bad = float(self._bad_gradients())
        if not bad and not bool(row[_NONFINITE] > 0):
            return
        for slot in slots:
            slot.begin_step()
        for p in self.parameters():
            p.grad = None
        self._gathered.clear()
        self._row_sum, self._scale_sum, self._dropped = _emptied(row), 0.0, bad

    def _launch_ledger(self) -> None:
        if self._table is not None:
            return
        if self._losses is not None:
            self._losses.send_losses()
        bad = self._bad_gradients() if self._dropped is None else self._dropped
        own = self._own_row(self._row_sum, self._strays, bad)
        there = torch.tensor([float(lone.there) for lone in self.lone], dtype=torch.float64)
        message = self._message
        if self.carrier is None:
            self._table = torch.cat([message.write(own), to_device_async(there, own.device)])
            self._table_ready = self._plain_wire.send(self._table, f"{self.name}.ledger")
            return
        self._table = tail = self.carrier.tail
        tail[: message.length] = message.write(own)
        if len(there):
            tail[message.length :] = to_device_async(there, tail.device)
        self._table_ready = self.carrier.drain

    def _device(self) -> torch.device:
        """Return where ledgers travel: the same kind of device on all ranks, with a batch or without."""
        if self.carrier is not None:
            return self.carrier.flat.device
        devices = (p.device for p in self.parameters())
        return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))

    @property
    def _message(self) -> Message:
        """How ledgers travel: in the carrier, or as a message of their own."""
        dtype = None if self.carrier is None else self.carrier.tail.dtype
        size = self.process_set.size()
        return Message(self.process_set.rank(), size, dtype, self.tuning.sums(size))

    def _own_row(self, row: torch.Tensor | None, strays: int, bad: Any, moved: float = 0.0) -> torch.Tensor:
        """Return this rank's ledger, float64 ``(LEDGER_WIDTH,)``, to be sent.

        What terms tell is on its way by then, as a message of its own: beside the ledgers it would move
        gradients to other places of their message, and sums of three and more ranks round by place.
        """
        own = Ledger(
            nonfinite_gradients=0.0 if isinstance(bad, torch.Tensor) else float(bad),
            untracked_backwards=float(strays),
            failed=float(self._failure is not None),
            communication=self._held_up,
            computation=self._computed,
            drift_sqnorm=moved,
            mean_update_sqnorm=self._together,
            has_next=float(self.has_next),
            preemption_requested=float(self.preemption_requested()),
            hooks=float(sum(found.count for p in self.parameters() if (found := hooks_of(p)) is not None)),
            rows_requested=float(bool(self.listeners) or self.interest.on),
        )
        device, width = self._device(), self.controller.width
        self._own = to_device_async(torch.tensor(list(vars(own).values()), dtype=torch.float64), device)
        told = torch.zeros(width, dtype=torch.float64, device=device)
        if row is not None:
            self._own[:TENSOR_FIELDS] = row[:TENSOR_FIELDS]
            told = row[TENSOR_FIELDS:]
        if isinstance(bad, torch.Tensor):
            self._own[_GRADIENTS] = bad
        if self._losses is None and not moved:
            self._own[_FACTOR], self._own[_RESCALED] = told_factor(self._factors, self._factor)
        if isinstance(wrong := self._divided(), torch.Tensor):
            self._own[_FAILED] += wrong
        elif wrong:
            self._own[_FAILED] = 1.0
        self._rows_ready = None
        if self.tuning.sums(self.process_set.size()):
            if self.controller.terms:
                self._rows_ready = self._gathered_rows(torch.cat([self._own, told]), "terms")
        elif width:
            table = torch.zeros(self.process_set.size(), width, dtype=torch.float64, device=device)
            table[self.process_set.rank()] = told
            ready = self._plain_wire.send(table.view(-1), f"{self.name}.terms")
            self._rows_ready = lambda: ready() or table
        return self._own

    def _gathered_rows(self, row: torch.Tensor, name: str) -> Callable[[], torch.Tensor]:
        """Start gathering a row of every rank; the result waits."""
        return self._plain_wire.gather(row[None], f"{self.name}.{name}")

    def _judge(self, ledgers: Ledgers, step: int, gradients: bool) -> Ledgers:
        """Return all ranks' ledgers, with their rows where those must be known; raise what is wrong.

        `gradients`: whether one that is not finite is, already.
        """
        told = np.zeros((len(ledgers), 0))
        if self._rows_ready is not None:
            ready, self._rows_ready = self._rows_ready, None
            told = ready().cpu().numpy()
        elif ledgers.table is None and ledgers.needs_rows:
            told = self._gathered_rows(self._own, "rows")().cpu().numpy()
        if ledgers.table is None and told.shape[1]:
            ledgers, told = ledgers.with_rows(told[:, :LEDGER_WIDTH]), told[:, LEDGER_WIDTH:]
        self._told = told
        self.sync_status = (self.sync_status[0] + 1, bool(ledgers.total("has_next")))
        self.preempted_ranks = tuple(ledgers.ranks_with("preemption_requested"))
        if ledgers.total("failed"):
            mine = self._failure
            if mine is None and ledgers[self.process_set.rank()].failed:
                mine = division_error(self.passes_done, self.passes)
            raise_on_all_ranks(self.communicator(), mine, f"{self.name}.failed", f"step {step}")
        error = check_step(ledgers, step, self.objective.nonfinite, gradients=gradients)
        if isinstance(error, NoWeightError) and self._bypassed:
            raise bypassed_error(step)
        if error is not None:
            raise error
        if self._dropping:
            if len(self.dropped) != len(ledgers):
                self.dropped = np.zeros(len(ledgers), dtype=np.int64)
            self.dropped = self.dropped.copy()  # earlier reports have the one before
            self.dropped[nonfinite_ranks(ledgers)] += 1
        return ledgers

    def _judged_ledgers(self) -> Ledgers:
        """Wait for all ranks' ledgers; raise, on every rank alike, what they show to be wrong."""
        if self._judged is not None:  # in the step that made the plan
            return self._judged
        assert self._table is not None
        if self._table_ready is not None:
            ready, self._table_ready = self._table_ready, None
            ready()
        message = self._message
        whole = self._table.cpu()
        told, there = message.read(whole[: message.length]), whole[message.length :].tolist()
        # Of gradients the update decides: where a GradScaler sees that they are not finite, there is none.
        ledgers = self._judge(told, self.step_count + 1, gradients=False)
        if self._losses is not None:
            self.losses = self._losses.reports(self.step_count + 1)
        if there:
            for lone, count in zip(self.lone, there, strict=True):
                lone.used = bool(count)
        self._judged = ledgers
        return ledgers

    def synchronize(self) -> None:
        """Reduce what is not reduced, wait, judge the step, and set every ``.grad``."""
        if self._retired:
            raise UsageError(
                "this DistributedOptimizer is out of use: a newer one was made for the same objective and "
                "parameters; call step() of that one"
            )
        if not included(hvd, self.process_set) or self.synchronized:
            self.synchronized = True
            return
        began = time.perf_counter()
        computed = 0.0 if self._ended is None else began - self._ended
        self.verdict, self._alone_bad = None, False
        try:
            watch.check()
            if self._active:  # a backward pass ended in an exception: its gradients are not whole
                self._active = False
                self._strays += 1
            if not self.passes_done:
                self._refresh()
                self._set_aside()
            if self._local:
                self._step_alone()
                return
            self._adopt_hooks()
            if self._losses is not None:  # this rank may have had no backward pass
                self._losses.start()
            with self._waiting():
                if not self._planned:
                    self._make_plan()
                self._launch()
                ledgers = self._judged_ledgers()
            denominator = (
                1.0 if self.objective.reduction == "sum" else ledgers.total("denominator") / self._reference
            )
            with self._waiting():
                for slot in (*self.buckets, *self.sparse):
                    slot.finish(denominator)
            self.verdict = self._verdict(ledgers, self.step_count + 1)
            if self.verdict is None:
                self._close(ledgers, self.step_count + 1, self._gradients_travel())
            else:  # a step that terms do not see
                self._keep(ledgers, self.step_count + 1)
        except BaseException:
            self.abandon()
            raise
        self._hand_over(apart=ledgers.differs("hooks"))
        self._choose_reference(ledgers)
        self._factor = common_factor(ledgers, self._factor)
        self._exchanged(began, computed)

    def _verdict(self, ledgers: Ledgers, step: int) -> HvdlossError | str | None:
        """Return what becomes of the update: None, "skip", or the error that it raises.

        Equal on all ranks: it rests on the ledgers and on reduced gradients alone.
        """
        losses = ledgers.total("nonfinite_losses")
        if self._dropping or not (losses or ledgers.total("nonfinite_gradients")):
            return None
        # A gradient may have been too large to be summed surely, and its sum be finite.
        if not losses and not any(
            bool(beyond(slot.handed, torch.finfo(slot.handed.dtype).max))
            for slot in (*self.buckets, *self.sparse)
        ):
            return None
        return "skip" if self.objective.nonfinite == "skip" else check_step(ledgers, step)

    def decide(self, scaler: bool = False) -> bool:
        """Return whether to update, by what :meth:`synchronize` found; forget gradients of a step without.

        Args:
            scaler: whether a GradScaler tells the update itself what is not finite.

        Raises:
            NonFiniteGradientError: a gradient is NaN or infinite, and such a step is not to be skipped.
        """
        verdict, self.verdict = self.verdict, None
        alone, self._alone_bad = self._alone_bad, False
        if scaler or (verdict is None and not alone):
            return True
        for p in self.parameters():
            p.grad = None
        if alone:  # the exchange tells all ranks
            assert self._stretch is not None
            self._stretch.bad += 1
            return False
        if isinstance(verdict, HvdlossError):
            self.step_count -= 1  # as for any other error
            self.samples -= 0 if self.ledgers is None else self.ledgers.elements
            self._news = False
            raise verdict
        self.skipped += 1
        return False

    def _hand_over(self, *, apart: bool = False) -> None:
        """Give the parameters what was set aside before, let the user's hooks see it, and end the step.

        `apart`: whether ranks have different hooks, which then must not change anything.

        Raises:
            AgreementError: they did.
        """
        hooked = [(p, found) for p in self.parameters() if (found := hooks_of(p)) and p.grad is not None]
        before = [(p.grad.clone(), p.detach().clone()) for p, _ in hooked] if apart else []
        for p, hooks in hooked:
            hooks.on_gradient(p)
        if self._kept:
            for p in self.parameters():
                if (kept := self._kept.get(id(p))) is not None:
                    p.grad = kept if p.grad is None else p.grad + kept
        for p in self._densified:
            if p.grad is not None:
                p.grad = p.grad.to_sparse(1)
        for p, hooks in hooked:
            hooks.on_accumulated(p)
        if apart:
            self._check_hooks([p for p, _ in hooked], before)
        self.step_count += 1
        watch.on_step(self.name)
        self._begin_step()
        if self._losses is not None:
            self._losses.begin_step()
        self.synchronized = True

    def _check_hooks(self, hooked: list[torch.nn.Parameter], before: list[Any]) -> None:
        """Raise on all ranks if hooks that not all of them have changed something; one small all-reduce."""
        own = [self._kept.get(id(p)) for p in hooked]
        changed = [
            not (same(p.grad, grad if kept is None else grad + kept) and same(p.detach(), value))
            for p, (grad, value), kept in zip(hooked, before, own, strict=True)
        ]
        told = np.zeros(self.process_set.size())
        told[self.process_set.rank()] = any(changed)
        told = self.communicator().all_reduce(told, f"{self.name}.hooks")
        if not told.any():
            return
        with torch.no_grad():
            for p, (_, value) in zip(hooked, before, strict=True):
                p.copy_(value)
        self.abandon()
        ranks = ", ".join(str(rank) for rank, flag in enumerate(told) if flag)
        raise AgreementError(
            f"step {self.step_count + 1}: hooks on parameters changed gradients on rank(s) {ranks}, and not "
            f"all ranks have the same hooks, so that they would train apart. Nothing was updated. Set hooks "
            f"that change a gradient on every rank; those that only look at it may be one rank's"
        )

    def _exchanged(self, began: float, computed: float) -> None:
        """Note what an exchange cost, for the next one's ledger."""
        self._ended = time.perf_counter()
        self._held_up, self._computed = self._ended - began, computed

    def _close(self, ledgers: Ledgers, step: int, travel: CommStats) -> None:
        """Let the terms look at a finished step."""
        if self.controller.terms:
            table = np.hstack([ledgers.rows, self._told])
            self.controller.on_step_end(step, table, travel, self.objective.reduction)
        self._keep(ledgers, step)

    def _keep(self, ledgers: Ledgers, step: int) -> None:
        """Keep the ledgers of a finished step."""
        self.ledgers, self.ledger_step, self._news = ledgers, step, True
        self.samples += ledgers.elements

    # -- local steps ------------------------------------------------------------------------------

    def _step_alone(self) -> None:
        """Set every ``.grad`` to this rank's own gradient; a step without weight, or unsound, has none."""
        assert self._stretch is not None
        wire = Wire(None, Compression.none)
        for slot in (*self.buckets, *self.sparse):
            if isinstance(slot, LoneGradient):
                slot.used = slot.there
            slot.launch(self._scale_sum, wire)
        if not self._stretch.steps:  # whatever was done or loaded in between is equal on all ranks
            self._stretch.anchor_here()
        row, strays = self._row_sum, self._strays
        bad, scale, *told = _floats(self._bad_gradients(), self._scale_sum, *([] if row is None else [row]))
        bad = bool(bad)
        sound = row is not None and not strays and told[1] > 0 and not any(told[FAULTS_TOLD])
        self._alone_bad = bad and sound and not self._dropping  # a GradScaler may be about to see it
        sound &= not bad or self._alone_bad
        for slot in (*self.buckets, *self.sparse):
            slot.finish(scale if sound else 1.0)
        if self._dropping and row is not None and (bad or told[_NONFINITE] > 0):
            row = _emptied(row)
        self._stretch.count(row, strays, bad and self._dropping)
        self._hand_over()
        self._idle = False
        for p in self._frozen:  # waits for the next exchange
            p.grad = None
        if sound:
            self._stretch.pull(0.0 if self._proximal is None else self._proximal.mu)
        else:  # the exchange tells all ranks what was wrong
            self._idle = True
            for p in self.parameters():
                if p.grad is not None:  # a GradScaler wants to see some
                    p.grad = torch.zeros_like(p.grad)
        assert self._period is not None
        self._due = self._stretch.steps >= self._period.period

    def exchange(self) -> None:
        """Average the ranks' parameters, if steps were taken since they were equal."""
        self._due = False
        stretch = self._stretch
        if stretch is None or not stretch.steps:
            return
        began = time.perf_counter()
        computed = 0.0 if self._ended is None else began - self._ended
        flats, length = stretch.moves()
        row = stretch.row
        weight = 0.0 if row is None else float(row[1])
        if not math.isfinite(length):  # steps too far, of gradients that were finite
            stretch.bad += 1
            weight = length = 0.0
            if row is not None:
                row = _emptied(row)
        if self.objective.reduction == "sum":  # ranks weigh the same, as in a step
            weight = float(weight > 0)
        own = self._own_row(row, stretch.strays, stretch.bad, moved=weight * length)
        reference = self._stretch_reference or 1.0
        message = self._message.carried(None)
        table = message.write(own)
        told = self._plain_wire.send(table, f"{self.name}.stretch")
        waits, travel = stretch.send(flats, weight / reference, self.wire)
        who = group_ranks(hvd, self.process_set)
        with watch.waiting(f"{self.name}.exchange.{self.step_count}", who):
            for wait in (told, *waits):
                wait()
        try:
            ledgers = self._judge(message.read(table.cpu()), self.step_count, gradients=True)
            if self.objective.reduction == "sum":
                total = float(np.count_nonzero(ledgers.column("denominator") > 0))
            else:
                total = ledgers.total("denominator")
            assert self._period is not None
            self._close(ledgers, self.step_count, travel)
        except BaseException:
            stretch.go_back()
            raise
        self._together = stretch.settle(flats, total / reference, self._period.outer)
        self._stretch_reference = total
        if self._period.period == 1:  # from here on gradients are equal, and so must updates be
            optimizer = self.optimizer()
            assert optimizer is not None
            share_memory(optimizer, weight / total, self._plain_wire, self.communicator(), self.name)
        self._exchanged(began, computed)

    _stretch_reference: float | None = None  # total weight of the last stretch, as in _choose_reference

    def _gradients_travel(self) -> CommStats:
        """Return how this step's gradients travelled."""
        flats = [b.flat if isinstance(b, FlatBucket) else b.parameters[0] for b in self.buckets]
        return CommStats(
            messages=self.travel()["messages"],
            bytes=sum(self.wire.bytes_of(flat) for flat in flats),
            full_bytes=sum(flat.numel() * flat.element_size() for flat in flats),
        )

    def _make_plan(self) -> None:
        """Agree with all ranks on the parameters, lay out the buckets, and fill them with this step."""
        parameters = self.parameters()
        index = {id(p): i for i, p in enumerate(parameters)}

        def is_sparse(p: torch.nn.Parameter) -> bool:
            held = self._gathered.get(id(p), p.grad)
            return held is not None and held.layout is not torch.strided

        agreed = check_consistency(
            self.communicator(),
            [
                ParameterInfo(
                    self.names[id(p)],
                    tuple(p.shape),
                    f"{p.dtype} {p.device.type}".removeprefix("torch."),
                    p.element_size(),
                    is_sparse(p),
                    trained=id(p) in self._hooked,
                    gradient=_gradient_kind(p),
                )
                for p in parameters
            ],
            lambda: checksums(parameters),
            [index[key] for key in self._order],
            {
                **self.objective.settings(),
                "backward_passes_per_step": self.passes,
                "compression": getattr(self.compression, "__name__", str(self.compression)),
                "gradient_predivide_factor": self.predivide,
                "sparse_as_dense": self.sparse_as_dense,
                "groups": self.groups if isinstance(self.groups, int) else bool(self.groups),
                **self.tuning.shared(),
            },
            name=f"{self.name}.agree",
            broadcast="Call hvd.broadcast_parameters(model.state_dict(), root_rank=0) before the first step.",
        )
        self.controller.prepare(self.communicator())
        self._drop_if_nonfinite()
        self._launch_ledger()
        measured_in = self._reference  # of the gradients held so far; 1 unless this is a new plan
        self._choose_reference(self._judged_ledgers())
        if self._losses is not None:
            self._losses.check_outside([self.names[id(p)] for p in parameters])

        infos = agreed.parameters
        if self.sparse_as_dense:
            self._densified = [p for p, info in zip(parameters, infos, strict=True) if info.sparse]
            infos = [dataclasses.replace(info, sparse=False) for info in infos]
        # A frozen parameter joins a plan when it is trained, which makes a new one.
        trained = [i for i, p in enumerate(parameters) if id(p) in self._hooked]
        position = {i: n for n, i in enumerate(trained)}
        groups = self.groups
        if groups is not None and not isinstance(groups, int):
            groups = [[position[index[id(p)]] for p in g if index.get(id(p)) in position] for g in groups]
        members = [parameters[i] for i in trained]
        layouts = plan_buckets(
            [infos[i] for i in trained],
            [position[i] for i in agreed.order if i in position],
            bucket_bytes=self.tuning.bucket_bytes,
            first_bytes=self.tuning.first_bytes,
            unbucketed_bytes=self.tuning.unbucketed_bytes,
            groups=groups,
        )
        self._lay_out(layouts, members)
        self.sparse = [
            SparseSlot(parameters[i], f"{self.name}.sparse.{i}") for i in trained if infos[i].sparse
        ]
        self._slot = {id(p): bucket for bucket in self.buckets for p in bucket.parameters}
        self._slot.update({id(slot.parameter): slot for slot in self.sparse})
        self._place = {key: (bucket, i) for bucket in self.buckets for key, i in bucket.place.items()}

        factor = measured_in / self._reference
        self._scale_sum = self._scale_sum * factor
        for key, held in self._gathered.items():
            self._slot[key].put(key, held * factor)
        self._gathered.clear()
        if self.lone:  # this step's ledgers are under way without them
            there = np.array([float(lone.there) for lone in self.lone])
            for lone, count in zip(
                self.lone, self.communicator().all_reduce(there, f"{self.name}.lone"), strict=True
            ):
                lone.used = bool(count)
        self._planned = True
        self._planned_size = self.process_set.size()
        self._planned_kinds = self._kinds()

    def _lay_out(self, layouts: list[Bucket], members: list[torch.nn.Parameter]) -> None:
        """Make the buckets. The last one that can takes the ledgers along, which saves a message."""
        carriers = [
            n
            for n, layout in enumerate(layouts)
            if not layout.unbucketed and self.wire.is_exact(members[layout.members[0].index].dtype)
        ]
        alone = sum(layout.unbucketed for layout in layouts)
        self.buckets = []
        for n, layout in enumerate(layouts):
            name = f"{self.name}.bucket.{n}"
            if layout.unbucketed:
                self.lone.append(LoneGradient(layout, members, name))
                self.buckets.append(self.lone[-1])
            elif carriers and n == carriers[-1]:
                dtype = members[layout.members[0].index].dtype
                self.carrier = FlatBucket(layout, members, name, self._message.carried(dtype).length + alone)
                self.buckets.append(self.carrier)
            else:
                self.buckets.append(FlatBucket(layout, members, name))

    def _choose_reference(self, ledgers: Ledgers) -> None:
        """Choose what the next step's weights are measured in: this step's total weight.

        Equal on all ranks, as the ledgers are, and of no effect but on rounding. When a step weighs as
        much as the one before, its gradients arrive already divided, which saves a pass over them; and
        scaled gradients are never far from their own size, so that float16 can carry them. There the
        mean weight per rank is the measure, or `gradient_predivide_factor` times that.
        """
        if self.objective.reduction == "sum":
            return
        self._reference = ledgers.total("denominator")
        if any(self.wire.is_half(dtype) for dtype in {p.dtype for p in self.parameters()}):
            self._reference *= self.predivide / len(ledgers)

    def expect(self, weights: Mapping[str, float], passes: int) -> None:
        """Send what this rank's step will weigh; see the optimizer's method."""
        if not isinstance(self.objective, Objectives):
            raise UsageError(
                "optimizer.expect() is for several objectives; the weights of one travel with the gradients. "
                "Leave it out"
            )
        if self._losses is not None:  # else this rank takes no part
            watch.check()
            if not self.passes_done:
                self._refresh()
            self._losses.expect(weights, passes)

    def travel(self) -> dict[str, int]:
        """Return how many messages a step sends, and what they hold."""
        return {
            "messages": len(self.buckets)
            + 2 * len(self.sparse)
            + (self.carrier is None)
            + bool(self.controller.width)
            + 2 * (self._losses is not None),
            "buckets": len(self.buckets) - len(self.lone),
            "unbucketed": len(self.lone),
            "sparse": len(self.sparse),
        }

    def updated(self) -> None:
        """After an update, exchange parameters, and compare those of all ranks, if that is due."""
        if self._due:
            self.exchange()
        elif self._apart:
            return
        self.tell()
        if due(self.step_count, self.check_every) and self.step_count:
            named = [(self.names[id(p)], p) for p in self.parameters()]
            check_synchronized(
                named, process_set=self.process_set, when=f"{self.name} after step {self.step_count}"
            )

    def abandon(self) -> None:
        """Finish what is under way, drop it, and be ready for a fresh step."""
        try:
            for ready in (self._table_ready, self._rows_ready):
                if ready is not None:
                    ready()
            for slot in (*self.buckets, *self.sparse):
                slot.drain()
            if self._losses is not None:
                self._losses.drain()
        finally:
            self._begin_step()
            if self._losses is not None:
                self._losses.begin_step()

    def global_value(self, value: Any) -> Any:
        """Return a closure's loss for all ranks: the average of theirs by what each one saw.

        Optimizers that search along a line decide by it, so it must be equal on all ranks.
        Collectives: one small blocking all-reduce.
        """
        if value is None or self.ledgers is None or not included(hvd, self.process_set):
            return value
        denominator = float(self._own[COLUMN["denominator"]])
        local = float(value.detach() if isinstance(value, torch.Tensor) else value)
        numerator = local * denominator if denominator else 0.0
        if self._losses is not None:  # what was added to the losses, whose own values are not averages
            numerator -= float(self._own[COLUMN["numerator"]])
        out = self.communicator().all_reduce(np.array([numerator, denominator]), f"{self.name}.closure")
        out[0] += out[1] * math.fsum(one.part for one in self.losses.values())
        return torch.tensor(
            out[0] / out[1],
            dtype=value.dtype if isinstance(value, torch.Tensor) else torch.float64,
            device=value.device if isinstance(value, torch.Tensor) else None,
        )


_ALL_OF_THEM = (  # what to do with several objectives
    "Give the optimizer all of them, by name: DistributedOptimizer(optimizer, model.named_parameters(), "
    "{'name': objective, ...}). Or: "
)

# Fields of a ledger row that add up over several calls in one backward pass; the others are shared.
_ADDED = [0, 5, 6, 7]
_ADDED_OF_SEVERAL = [0, 2, 3, 5, 6, 7]  # of several objectives: weights and elements too
FAULTS_TOLD = slice(FAULT_COLUMNS.start, TENSOR_FIELDS)  # the faults that tensors tell
_NONFINITE = COLUMN["nonfinite_losses"]
_GRADIENTS, _FAILED = COLUMN["nonfinite_gradients"], COLUMN["failed"]
_FACTOR, _RESCALED = COLUMN["factor"], COLUMN["rescaled"]
_KEPT = slice(COLUMN["micro_batches"], TENSOR_FIELDS)


def _floats(*values: Any) -> list[float]:
    """Return numbers and tensors as numbers, one after the other; a device is waited for once."""
    if not any(isinstance(value, torch.Tensor) for value in values):
        return [float(value) for value in values]
    parts = [torch.as_tensor(value, dtype=torch.float64).reshape(-1) for value in values]
    device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
    return torch.cat(
        [part if part.device == device else to_device_async(part, device) for part in parts]
    ).tolist()


def _gradient_kind(p: torch.nn.Parameter) -> str:
    """Return the dtype of a parameter's gradient, where it is another than the parameter's."""
    dtype = getattr(p, "grad_dtype", None) or p.dtype
    return "" if dtype is p.dtype else str(dtype).removeprefix("torch.")


def _emptied(row: torch.Tensor) -> torch.Tensor:
    """Return a row that adds nothing to a step, and still tells what was wrong."""
    out = torch.zeros_like(row)
    out[_KEPT] = row[_KEPT]
    return out


class _Skipped(Exception):
    """Ends an update before it has begun; holds the closure's value."""


class _Exact:
    """The methods that make a torch optimizer exact; :func:`DistributedOptimizer` mixes them in.

    Copied into a subclass of the wrapped optimizer's class rather than inherited, as Horovod does:
    Horovod's elastic state and ``broadcast_optimizer_state`` reach the plain optimizer's methods through
    ``super(type(optimizer), optimizer)``.
    """

    _base: type[torch.optim.Optimizer]
    _hvdloss: _Engine

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(
            "a DistributedOptimizer cannot be copied or pickled: its copy would take part in the ranks' "
            "exchanges, for parameters that the model copied with it does not have. Copy or save "
            "optimizer.state_dict(); for a copy of the model make an optimizer of the same kind, load that "
            "into it, and wrap it in turn, on every rank"
        )

    def synchronize(self) -> None:
        """Wait for the step's reductions; afterwards every ``.grad`` is that of all ranks' elements.

        Call it to clip or inspect gradients, then ``step()`` inside :meth:`skip_synchronize`. Gradients
        that are NaN or infinite are judged there, not here: a ``GradScaler`` looks at them in between, and
        does not call ``step()``.

        Raises:
            WeightError, NoWeightError, NonFiniteLossError, UsageError, AgreementError: the same on
                every rank; nothing was updated, and the next step may follow.

        Collectives: waits for one all-reduce per bucket and the ledgers', all already under way. The
        first step also compares parameters (two all-gathers).
        """
        self._hvdloss.synchronize()

    def exchange(self) -> None:
        """Average the ranks' parameters now, after local steps; nothing where they are equal.

        Before evaluating or saving a model in the middle of a stretch of local steps
        (:class:`hvdloss.control.SyncPeriod`). All ranks must call it after the same step.

        Raises:
            WeightError, NoWeightError, NonFiniteLossError, UsageError: the same on every rank; parameters
                are those of the last exchange again.

        Collectives: one all-reduce of the parameters per dtype, and one of the ledgers.
        """
        self._hvdloss.exchange()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Have ``step()`` use the gradients as they are, after :meth:`synchronize`."""
        self._hvdloss.should_synchronize = False
        try:
            yield
        finally:
            self._hvdloss.should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronise and update; with a `closure`, synchronise after each of its calls.

        A closure's loss is returned for all ranks' elements, so that line searches agree.

        Raises:
            WeightError, NoWeightError, NonFiniteLossError, NonFiniteGradientError, UsageError,
                AgreementError: the same on every rank; nothing was updated, and the next step may follow.
                With ``Objective(..., nonfinite="skip")`` a step with a loss or gradient that is NaN or
                infinite does nothing instead, but at a closure's second evaluation and later ones.
        """
        engine = self._hvdloss
        if closure is not None:
            if engine._period is not None:
                raise UsageError(
                    "step(closure) with SyncPeriod: a closure is evaluated several times per step, and its "
                    "loss must be that of all ranks; call step() without one, or leave out SyncPeriod"
                )

            evaluations = itertools.count()

            def global_closure() -> Any:
                with torch.enable_grad():
                    value = closure()
                engine.synchronize()
                if next(evaluations) and engine.verdict == "skip":  # too late to have changed nothing
                    engine.verdict = check_step(engine.ledgers or (), engine.ledger_step)
                if not engine.decide():
                    raise _Skipped(value)
                return engine.global_value(value)

            try:
                out = self._base.step(self, global_closure)  # type: ignore[arg-type]
            except _Skipped as skipped:
                out = skipped.args[0]
            finally:
                engine.synchronized = False
            engine.updated()
            return out
        if engine.should_synchronize:
            engine.synchronize()
        elif not engine.synchronized:
            raise UsageError(
                "step() inside skip_synchronize() without optimizer.synchronize() before it: the "
                "gradients of the ranks have not been reduced"
            )
        engine.synchronized = False
        # A fused optimizer is told by a GradScaler what is not finite, and does nothing then.
        updates = engine.decide(scaler=getattr(self, "found_inf", None) is not None)
        out = self._base.step(self) if updates and not engine._idle else None  # type: ignore[arg-type]
        engine._idle = False
        engine.updated()
        return out

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and what backward passes of an unfinished step have added."""
        engine = self._hvdloss
        if engine.launched or (engine._losses is not None and engine._losses.began):
            raise UsageError(
                "optimizer.zero_grad() after loss.backward() and before optimizer.step(): the gradients "
                "are under way between ranks. To drop a step on all ranks call optimizer.synchronize() "
                "first; to skip one sample give it the weight 0. (If it was the backward pass of another "
                "network's loss, as in a GAN: give each optimizer an objective of its own.)"
            )
        engine.synchronized = False
        # Before the next forward pass: an update was skipped (a GradScaler does that), which must not keep
        # others waiting, or there are more parameters to train.
        if engine._due or engine.unfrozen():
            engine.exchange()
        engine.tell()
        engine._begin_step()
        self._base.zero_grad(self, set_to_none)  # type: ignore[arg-type]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; every rank must add the same ones before the same step."""
        old = len(self.param_groups)  # type: ignore[attr-defined]
        self._base.add_param_group(self, param_group)  # type: ignore[arg-type]
        self._hvdloss.added(old)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state that the plain optimizer, Horovod's wrapper or this one saved."""
        self._hvdloss.abandon()
        self._hvdloss.synchronized = False
        self._hvdloss._stretch = None  # parameters are loaded along with this
        groups, state = self.param_groups, self.state  # type: ignore[has-type]
        self._base.load_state_dict(self, state_dict)  # type: ignore[arg-type]
        # Into the objects that the plain optimizer has too: its schedulers and checkpoints go on with them.
        loaded, loaded_state = [dict(group) for group in self.param_groups], dict(self.state)
        for group, values in zip(groups, loaded, strict=True):
            group.clear()
            group.update(values)
        state.clear()
        state.update(loaded_state)
        self.param_groups, self.state = groups, state

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change how many backward passes a step has at most; takes effect with the next step."""
        self._hvdloss.set_passes(passes)

    def expect(self, weights: Mapping[str, float], passes: int = 1) -> None:
        """Say what this rank's step will weigh, with several objectives: for accumulation, and to save time.

        With one backward pass per step this is optional: the denominators then travel during the forward
        pass, and nobody waits for them. With several passes it is needed in every step, on every rank that
        makes any::

            optimizer.expect({"class": sum(len(y) for _, y, _ in batches), ...}, passes=len(batches))
            for x, y, boxes in batches:
                ...
                (class_loss + 2 * box_loss).backward()
            optimizer.step()

        Args:
            weights: by objective, this rank's denominator over all micro-batches of the step: for ``"mean"``
                the sum of weights, for ``"batch_mean"`` and ``"sequence_mean"`` the number of elements or
                sequences that have any. 0 where it is left out; ``"sum"`` and losses of all ranks' elements
                need none.
            passes: backward passes that this rank will make.

        Raises:
            ConfigError: a name or number that cannot be.
            UsageError: one objective, whose weights travel with the gradients; or a second call in a step.
                A step that turns out to weigh something else is the same error on every rank.

        Collectives: one small all-reduce, which is waited for in the first backward pass; in the first step
        another one of 16 numbers.
        """
        self._hvdloss.expect(weights, passes)

    @property
    def last_step(self) -> StepReport | None:
        """The report of the last synchronised step, equal on all ranks; None before the first."""
        return self._hvdloss.report()

    @property
    def objective(self) -> Objective | Objectives:
        """The objective whose loss this optimizer minimises; several by name."""
        return self._hvdloss.objective

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler.step asks this before it looks at the gradients. They must be the reduced ones by
        # then, or ranks would disagree on whether to skip the step.
        engine = self._hvdloss
        if engine._dropping:
            raise ConfigError(
                'nonfinite="drop" with a GradScaler: it must see that a gradient is infinite, or its scale '
                'would stay too large and that rank be dropped in every step; choose "skip" or "raise", '
                "with which steps that the scaler skips stay the scaler's"
            )
        if engine.should_synchronize and not engine.synchronized:
            engine.synchronize()
        return bool(getattr(self._base, "_step_supports_amp_scaling", False))


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    objective: Objective | Mapping[str, Objective] | Sequence[Objective] | None = None,
    *,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: Any = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: Any = None,
    check_every: int | None = None,
    bucket_cap_mb: float | None = None,
    overlap: bool | None = None,
) -> Any:
    """Wrap a torch optimizer so that each step uses the gradient of all ranks' elements.

    With an `objective`, whose loss each backward pass must come from, the gradient is exactly that of
    one process that saw every element of the step: ranks and micro-batches are weighted by what they
    held. Ranks may have different batch sizes, different numbers of micro-batches, or none. Without an
    objective this is ``horovod.torch.DistributedOptimizer``, call for call.

    Args:
        optimizer: any ``torch.optim.Optimizer``. The result shares its parameter groups and state.
        named_parameters: ``model.named_parameters()``; names appear in messages.
        objective: an :class:`Objective`, or None; or several, by name or in a sequence, for a loss that is
            the sum of several, each with an objective (and a denominator) of its own:
            ``{"class": ..., "box": ...}``. Any of them may be absent on some ranks, or on all. See
            docs/howto/several-losses.md.
        compression: ``Compression.none``, ``fp16`` or ``bf16``: what travels, not what is computed.
        backward_passes_per_step: the largest number of backward passes that any rank makes before
            ``step()``; ranks may make fewer. Reductions start during a rank's last one.
        op: with an objective only ``Average``: the objective says how to combine.
        gradient_predivide_factor: shifts the range of what travels as float16, as in Horovod.
        num_groups: Horovod's old name for an integer `groups`.
        groups: a number of buckets to aim at, or lists of parameters that must share one.
        sparse_as_dense: reduce sparse gradients as dense ones.
        process_set: the ranks that share the step; None for the objective's, or all.
        check_every: with an objective, compare the parameters of all ranks, bit for bit, after every so
            many steps (:func:`hvdloss.torch.check_synchronized`); None for never.
        bucket_cap_mb: close a bucket of gradients when it holds so many MiB; None for what
            ``HVDLOSS_BUCKET_CAP_MB`` says, or 25.
        overlap: start a bucket's reduction while the backward pass goes on (True), or after it (False);
            None for what ``HVDLOSS_OVERLAP`` says, or :func:`hvdloss.tuning.choose` finds.

    Returns:
        An instance of a subclass of the optimizer's class, with ``synchronize()``,
        ``skip_synchronize()`` and ``last_step`` (a :class:`hvdloss.StepReport`).

    Raises:
        ConfigError: an argument that cannot be used.

    Collectives per step: one asynchronous all-reduce per bucket, all under way together; the ranks' ledgers
    (``size`` x 21 numbers; with more than 64 ranks their sums, at most 4 KiB) ride in the last float32 or
    float64 bucket, and need a message of their own only where there is none (compression, 16-bit
    parameters). What terms tell is one message more. Several objectives have two more of a few numbers:
    their denominators, before the first gradient, and their losses, beside the gradients. With more than 64
    ranks a step in which something is wrong, or of which a rank reads what single ranks did, has an
    all-gather of 21 numbers more. After local steps one all-reduce of the parameters per dtype, and one or
    two small ones. Buckets follow Li et al., "PyTorch Distributed" (VLDB 2020).
    """
    if groups is None and num_groups:
        groups = num_groups
    if hasattr(objective, "decompress"):  # Horovod's third positional argument
        objective, compression = None, objective
    if objective is None:
        mark_reduced(p for group in optimizer.param_groups for p in group["params"])
        return hvd.DistributedOptimizer(
            optimizer,
            named_parameters=named_parameters,
            compression=compression,
            backward_passes_per_step=backward_passes_per_step,
            op=op,
            gradient_predivide_factor=gradient_predivide_factor,
            groups=groups,
            sparse_as_dense=sparse_as_dense,
            process_set=process_set or hvd.global_process_set,
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer={optimizer!r} is not a torch.optim.Optimizer")
    if hasattr(optimizer, "_hvdloss"):
        raise ConfigError("optimizer is already wrapped by hvdloss.torch.DistributedOptimizer")
    if isinstance(objective, Mapping | list | tuple):
        objective = Objectives(objective)
        if wrong := [name for name, one in objective.items() if not isinstance(one, Objective)]:
            raise ConfigError(f"objective={{{wrong[0]!r}: ...}} is not an hvdloss.torch.Objective")
    if not isinstance(objective, Objective | Objectives):
        raise ConfigError(
            f"objective={objective!r} is not an hvdloss.torch.Objective; wrap the loss function in one"
        )
    each = objective.values() if isinstance(objective, Objectives) else [objective]
    if any(one.ahead is not None for one in each):
        raise ConfigError(
            "an objective with ahead=True is for gradients that somebody else averages; leave ahead out for "
            "hvd.DistributedOptimizer, which needs no message for the weights"
        )
    if op != hvd.Average:
        raise ConfigError(
            "op cannot be chosen together with an objective, which says how ranks are combined; leave it "
            "at Average (for a sum use Objective(..., reduction='sum'))"
        )
    _check_passes(backward_passes_per_step)
    if not gradient_predivide_factor > 0:
        raise ConfigError(f"gradient_predivide_factor={gradient_predivide_factor!r} must be above 0")
    if isinstance(groups, int) and groups < 0:
        raise ConfigError(f"groups={groups!r} must be at least 0, or lists of parameters")
    ours = objective.process_set
    if process_set is not None and ours is not None and process_set is not ours:
        raise ConfigError("objective and optimizer were given different process sets")
    process_set = process_set or ours or hvd.global_process_set
    tuning = choose(bucket_cap_mb=bucket_cap_mb, overlap=overlap)
    due(1, check_every)
    if objective.controller.policy(AdaptiveCompression) is not None and compression is not Compression.none:
        raise ConfigError(
            "compression= cannot be chosen together with AdaptiveCompression, which chooses it; leave one out"
        )
    objective.process_set = process_set

    base = type(optimizer)
    members = {
        k: v for k, v in vars(_Exact).items() if k not in ("__dict__", "__weakref__", "__annotations__")
    }
    # Horovod tells its own optimizers by their module, and then leaves their step() alone when it
    # prepares a fresh optimizer's state for broadcasting.
    members.update(_base=base, __module__="horovod.torch.optimizer", __doc__=base.__doc__)
    cls = type(base.__name__, (base,), members)
    wrapped = cls.__new__(cls)
    # The same groups and state objects, so that schedulers and checkpoints made before still apply. A
    # scheduler's patched `step` belongs to the plain optimizer.
    wrapped.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k != "step"})
    wrapped._hvdloss = _Engine(
        wrapped,
        named_parameters,
        objective,
        compression,
        backward_passes_per_step,
        gradient_predivide_factor,
        groups,
        sparse_as_dense,
        process_set,
        check_every,
        tuning,
    )
    return wrapped


def _check_passes(passes: int) -> None:
    if not isinstance(passes, int) or passes < 1:
        raise ConfigError(f"backward_passes_per_step={passes!r} must be an integer of at least 1")
