"""The exact distributed optimizer: gradients of all ranks weighted by what each rank saw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

import torch
from hvdloss.comm.guard import due
from hvdloss.comm.tuning import choose
from hvdloss.errors import ConfigError, UsageError
from hvdloss.losses.ledger import COLUMN
from hvdloss.report import StepReport
from hvdloss.step.phase import Event
from hvdloss.step.several import Objectives
from hvdloss.terms.policies.compression import AdaptiveCompression
from hvdloss.torch._backend import hvd
from hvdloss.torch.clipping import reduce_before_clipping
from hvdloss.torch.compression import Compression
from hvdloss.torch.objective import Objective
from hvdloss.torch.passes import mark_reduced, see_scalers
from hvdloss.torch.reducer import Options
from hvdloss.torch.step import ExactStep

__all__ = ["DistributedOptimizer"]


class _Skipped(Exception):
    """Ends an update before it has begun; holds the closure's value."""


class _Exact:
    """The methods that make a torch optimizer exact; :func:`DistributedOptimizer` mixes them in.

    Copied into a subclass of the wrapped optimizer's class rather than inherited, as Horovod does:
    Horovod's elastic state and ``broadcast_optimizer_state`` reach the plain optimizer's methods through
    ``super(type(optimizer), optimizer)``.
    """

    _base: type[torch.optim.Optimizer]
    _hvdloss: ExactStep
    _should_synchronize = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(
            "a DistributedOptimizer cannot be copied or pickled: its copy would take part in the ranks' "
            "exchanges, for parameters that the model copied with it does not have. Copy or save "
            "optimizer.state_dict(); for a copy of the model make an optimizer of the same kind, load that "
            "into it, and wrap it in turn, on every rank"
        )

    def synchronize(self) -> None:
        """Wait for the step's reductions; afterwards every ``.grad`` is that of all ranks' elements.

        The last of ``backward_passes_per_step`` backward passes does so by itself. A rank that has fewer, or
        none, calls it to clip or inspect gradients; then ``step()``, inside :meth:`skip_synchronize` or not.
        Gradients that are NaN or infinite are judged in ``step()``: a ``GradScaler`` looks at them in
        between, and does not call it.

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
        (:class:`hvdloss.terms.policies.SyncPeriod`). All ranks must call it after the same step.

        Raises:
            WeightError, NoWeightError, NonFiniteLossError, UsageError: the same on every rank; parameters
                are those of the last exchange again.

        Collectives: one all-reduce of the parameters per dtype, and one of the ledgers.
        """
        self._hvdloss.exchange()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Have ``step()`` use the gradients as they are, after :meth:`synchronize`."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronise and update; with a `closure`, synchronise after each of its calls.

        A closure's loss is returned for all ranks' elements, so that line searches agree.

        Raises:
            WeightError, NoWeightError, NonFiniteLossError, NonFiniteGradientError, UsageError,
                AgreementError: the same on every rank; nothing was updated, and the next step may follow.
                With ``Objective(..., nonfinite="skip")`` a step with a loss or gradient that is NaN or
                infinite does nothing instead, but at a closure's second evaluation and later ones.
        """
        step = self._hvdloss
        if closure is not None:
            return self._step_with(closure)
        if self._should_synchronize:
            step.synchronize(late=True)
        step.state.phase.to(Event.UPDATE)
        # A fused optimizer is told by a GradScaler what is not finite, and does nothing then.
        updates = step.should_update(scaler=getattr(self, "found_inf", None) is not None)
        out = self._base.step(self) if updates else None  # type: ignore[arg-type]
        step.updated()
        return out

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        """Update with a closure, which the wrapped optimizer may evaluate several times."""
        step = self._hvdloss
        if step.local.enabled:
            raise UsageError(
                "step(closure) with SyncPeriod: a closure is evaluated several times per step, and its "
                "loss must be that of all ranks; call step() without one, or leave out SyncPeriod"
            )
        evaluations = itertools.count()

        def global_closure() -> Any:
            with torch.enable_grad():
                value = closure()
            step.synchronize(late=True)
            if next(evaluations):
                step.state.refuse_skip()
            if not step.should_update():
                raise _Skipped(value)
            return _global_value(step, value)

        try:
            out = self._base.step(self, global_closure)  # type: ignore[arg-type]
        except _Skipped as skipped:
            out = skipped.args[0]
        finally:
            if step.state.phase.synchronized:
                step.state.phase.to(Event.UPDATE)
        step.updated()
        return out

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and what backward passes of an unfinished step have added."""
        self._hvdloss.clear()
        self._base.zero_grad(self, set_to_none)  # type: ignore[arg-type]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; every rank must add the same ones before the same step."""
        old = len(self.param_groups)  # type: ignore[attr-defined]
        self._base.add_param_group(self, param_group)  # type: ignore[arg-type]
        self._hvdloss.add_groups(old)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state that the plain optimizer, Horovod's wrapper or this one saved."""
        self._hvdloss.abort()
        self._hvdloss.local.clear()  # parameters are loaded along with this
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
        return self._hvdloss.state.log.report()

    @property
    def objective(self) -> Objective | Objectives:
        """The objective whose loss this optimizer minimises; several by name."""
        return self._hvdloss.objective

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler.step asks this before it looks at the gradients. They must be the reduced ones by
        # then, or ranks would disagree on whether to skip the step.
        if self._hvdloss.state.drops:
            raise ConfigError(
                'nonfinite="drop" with a GradScaler: it must see that a gradient is infinite, or its scale '
                'would stay too large and that rank be dropped in every step; choose "skip" or "raise", '
                "with which steps that the scaler skips stay the scaler's"
            )
        if self._should_synchronize:
            self._hvdloss.synchronize()
        return bool(getattr(self._base, "_step_supports_amp_scaling", False))


def _global_value(step: ExactStep, value: Any) -> Any:
    """Return a closure's loss for all ranks: the average of theirs by what each one saw.

    Optimizers that search along a line decide by it, so it must be equal on all ranks.
    Collectives: one small blocking all-reduce.
    """
    if value is None or step.state.log.ledgers is None or not step.included:
        return value
    own = step.ledgers.own
    denominator = float(own[COLUMN["denominator"]])
    local = float(value.detach() if isinstance(value, torch.Tensor) else value)
    numerator = local * denominator if denominator else 0.0
    if step.passes.losses is not None:  # what was added to the losses, whose own values are not averages
        numerator -= float(own[COLUMN["numerator"]])
    out = step.communicator().all_reduce(np.array([numerator, denominator]), f"{step.name}.closure")
    out[0] += out[1] * math.fsum(one.part for one in step.state.log.losses.values())
    return torch.tensor(
        out[0] / out[1],
        dtype=value.dtype if isinstance(value, torch.Tensor) else torch.float64,
        device=value.device if isinstance(value, torch.Tensor) else None,
    )


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
            ``step()``; ranks may make fewer. The last one waits for the others.
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
            None for what ``HVDLOSS_OVERLAP`` says, or :func:`hvdloss.comm.tuning.choose` finds.

    Returns:
        An instance of a subclass of the optimizer's class, with ``synchronize()``,
        ``skip_synchronize()`` and ``last_step`` (a :class:`hvdloss.StepReport`).

    Raises:
        ConfigError: an argument that cannot be used.

    Collectives per step: one asynchronous all-reduce per bucket, all under way together; the ranks' ledgers
    (``size`` x 22 numbers; with more than 64 ranks their sums, at most 4 KiB) ride in the last float32 or
    float64 bucket, and need a message of their own only where there is none (compression, 16-bit
    parameters). What terms tell is one message more. Several objectives have two more of a few numbers:
    their denominators, before the first gradient, and their losses, beside the gradients. With more than 64
    ranks a step in which something is wrong, or of which a rank reads what single ranks did, has an
    all-gather of 22 numbers more. After local steps one all-reduce of the parameters per dtype, and one or
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
    options = Options(
        compression, gradient_predivide_factor, groups, sparse_as_dense, process_set, check_every, tuning
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
    wrapped._hvdloss = ExactStep(wrapped, named_parameters, objective, backward_passes_per_step, options)
    see_scalers()
    reduce_before_clipping(wrapped._hvdloss)
    return wrapped
