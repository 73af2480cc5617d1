"""The exact distributed optimizer for Keras 3: gradients of all ranks weighted by what each rank saw."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

import keras
from hvdloss.comm.communicator import included
from hvdloss.comm.world import next_name_index, register_for_reset
from hvdloss.errors import ConfigError
from hvdloss.keras._backend import hvd
from hvdloss.keras.local import LocalSteps, check_local
from hvdloss.keras.losses import ExactCompileLoss, Objective
from hvdloss.losses.ledger import COLUMN
from hvdloss.losses.passes import changed_gradients_error, changed_gradients_warning
from hvdloss.report import StepReport
from hvdloss.tensorflow.objective import Objective as TensorFlowObjective
from hvdloss.tensorflow.own_gradients import changed, watch_tapes
from hvdloss.tensorflow.passes import refuse
from hvdloss.tensorflow.reducer import (
    GradientReducer,
    check_options,
    check_policies,
    exceeds,
    scale_grad,
    with_dependencies,
    with_nonfinite_flag,
)
from hvdloss.tensorflow.step import StepState, merge_pass, with_failure
from hvdloss.tensorflow.variables import variable
from hvdloss.terms.policies.period import SyncPeriod

__all__ = ["DistributedOptimizer", "PartialDistributedOptimizer", "engine_of"]

_PASSES, _FAILED = COLUMN["micro_batches"], COLUMN["failed"]
_classes: dict[type, type] = {}


class _Engine:
    """What an exact optimizer does between the backward pass and the update.

    Within a step Keras calls ``_backend_apply_gradients`` with the local gradients of one backward pass
    and, when an update is due, ``_clip_gradients`` with what is to be clipped and applied: there the
    reduction belongs, since clipping must act on the gradient of all ranks.
    """

    def __init__(self, objective: Any, reducer: GradientReducer, op: Any, scale_local: bool) -> None:
        self.objective = objective
        self.reducer = reducer
        self.op = op
        self.scale_local = scale_local
        self.local: set[int] = set()
        self.local_later: list[Any] = []  # variables that are, once the optimizer is built
        self.local_steps: LocalSteps | None = None  # of local steps, where terms decide on their number
        # Without an objective or a compiled loss every backward pass weighs the same, as in Horovod.
        self.step_state = StepState() if objective is None else objective.step_state
        self.step_state.process_set = reducer.process_set
        self.step_state.owned = True
        with tf.init_scope():
            self.step_state.clear_unowned()
        self.loss_scale: Callable[[], Any] = lambda: None  # what a LossScaleOptimizer multiplies with
        self.allow_untracked = objective is None
        self.warned = False  # that nothing is known of the loss
        self.looked = False  # at what tapes gave, as it came to the optimizer outside of this one
        self._warned_of_changes = False
        self.compile_loss: ExactCompileLoss | None = None
        self.accumulated_row: tf.Variable | None = None
        self.empty_row: Any = None  # the empty row, while a step is traced to which this rank adds nothing
        self.ending = False  # and which is dropped if no rank adds anything
        self.ended: tf.Variable | None = None
        self.empty_steps: dict[Any, Any] = {}  # traced
        self.sparse: dict[int, tf.DType] = {}  # places of sparse gradients, once known
        self.places: list[int] | None = None  # of all that have a gradient
        # Of the step being traced:
        self.row: Any = None
        self.factor: Any = None
        self.variables: list[Any] = []
        self.reduced: Any = None
        self.done = 0
        self.after_empty_step: Callable[[], None] = lambda: None  # what to do after an idle step
        watch_tapes()
        register_for_reset(self)

    def reset(self) -> None:
        """Forget what was of other ranks."""
        self.empty_steps = {}
        self.row = self.factor = self.reduced = None
        self.empty_row, self.ending = None, False
        if self.accumulated_row is not None:
            self.accumulated_row.assign(tf.zeros_like(self.accumulated_row))
        if self.local_steps is not None and self.local_steps.built:
            self.local_steps.reset()

    def listen(self, compile_loss: ExactCompileLoss, optimizer: Any) -> None:
        """Have the compiled loss of a model tell the weight of each backward pass.

        Raises:
            ConfigError: terms of the optimizer's objective, which the model does not have; what terms do
                about what they measure cannot be done here.
        """
        given = self.objective
        if given is not None and given.controller.terms and given.step_state is not compile_loss.step_state:
            raise ConfigError(
                "the objective given to DistributedOptimizer has terms, but the model was compiled with "
                "another loss, of which they would see nothing; compile the model with loss=objective"
            )
        self.compile_loss = compile_loss
        self.step_state, self.allow_untracked = compile_loss.step_state, False
        self.step_state.process_set = self.reducer.process_set
        # What was traced for another loss, and rows of another width, are of no use.
        self.accumulated_row, self.empty_steps = None, {}
        self.follow(optimizer)

    def follow(self, optimizer: Any) -> None:
        """Prepare for what the objective's terms may decide.

        Raises:
            ConfigError: it cannot be done here.
        """
        controller = self.step_state.controller
        check_policies(controller, self.reducer.compression)
        scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if scales:
            self.loss_scale = lambda: optimizer.dynamic_scale.value
        if scales and self.step_state.nonfinite == "drop":
            raise ConfigError(
                'nonfinite="drop" with a LossScaleOptimizer: it skips every step in which a gradient of any '
                'rank is infinite, and must see it to lower its scale; choose "skip" or "raise"'
            )
        self.local_steps = None
        if controller.policy(SyncPeriod) is not None:
            check_local(optimizer, self.local)
            self.local_steps = LocalSteps(
                self.step_state, self.reducer, optimizer.gradient_accumulation_steps or 1
            )

    def begin(self) -> None:
        """Have the terms start with the present ranks, unless they have."""
        if self.step_state.controller.terms:
            self.step_state.begin(self.reducer.process_set.rank(), self.reducer.size)

    @property
    def skips(self) -> bool:
        """Whether a step may turn out to be one without an update."""
        return self.step_state.nonfinite == "skip"

    @property
    def included(self) -> bool:
        """Whether this rank shares the steps."""
        return included(hvd, self.reducer.process_set)

    def look(self, gradients: Sequence[Any]) -> None:
        """Refuse gradients that were changed since the tape gave them, or warn where that is not known."""
        found = changed(gradients)
        if self.looked or self.allow_untracked or self.empty_row is not None or self.reducer.size == 1:
            return
        if found:
            refuse(changed_gradients_error())
        elif found is None and not self._warned_of_changes:
            self._warned_of_changes = True
            warnings.warn(changed_gradients_warning(), stacklevel=4)

    def collect(self, optimizer: Any, gradients: list[Any], variables: Sequence[Any]) -> list[Any]:
        """Take the gradients of one backward pass; return them as Keras is to add them up."""
        self.begin()
        if self.local_steps is not None:
            self.local_steps.build(optimizer)
        row = self.empty_row
        undo, unclear = tf.ones((), tf.float64), tf.zeros((), tf.float64)
        if row is None:
            row, scale = self.step_state.pop_row(allow_untracked=self.allow_untracked), self.loss_scale()
            undo, unclear = self.step_state.undo_division(optimizer.gradient_accumulation_steps or 1, scale)
            row = self.step_state.with_factor(
                row, undo if scale is None else undo / tf.cast(scale, tf.float64)
            )
            row = with_failure(row, self.step_state.unowned_calls() + unclear)
        self.row, self.factor = row, None
        self.variables = list(variables)
        if self.empty_row is None:
            self.places = [optimizer._get_variable_index(v) for v in variables]
            self.sparse = {
                place: g.dtype
                for place, g in zip(self.places, gradients, strict=True)
                if isinstance(g, tf.IndexedSlices)
            }
        steps = optimizer.gradient_accumulation_steps
        if steps:
            if self.accumulated_row is None:
                with tf.init_scope():
                    self.accumulated_row = variable(
                        tf.zeros(self.step_state.width, tf.float64), "hvdloss_accumulated"
                    )
            self.accumulated_row.assign(merge_pass(self.accumulated_row, row))
            self.row = self.accumulated_row.read_value()
            # Keras divides what it adds up by the number of passes.
            self.factor = float(steps)
            gradients = [scale_grad(g, row[1] * undo) for g in gradients]
        return gradients

    def reduce(self, optimizer: Any, gradients: list[Any]) -> tuple[list[Any], tf.Tensor]:
        """Return the gradients of all ranks' elements, and the table of their ledgers."""
        place_of = optimizer._get_variable_index
        shared = [i for i, v in enumerate(self.variables) if place_of(v) not in self.local]
        reduced, table = self.reducer.reduce(
            [gradients[i] for i in shared],
            [self.variables[i] for i in shared],
            self.step_state.with_flags(self.row),
            factor=self.factor,
            compress=self.step_state.compress,
            nonfinite=self.step_state.nonfinite,
            look=not self.allow_untracked,
            local=[g for i, g in enumerate(gradients) if i not in set(shared)],
            rows=bool(self.step_state.controller.terms),
        )
        self.step_state.choices = self.reducer.choices
        total = tf.reduce_sum(table[:, 1])
        own = self.reducer.own(table, self.row)[1]  # nothing, of a rank that was dropped
        factor = own if self.factor is None else tf.where(own > 0, self.factor, 0.0)
        share = tf.math.divide_no_nan(tf.cast(factor, tf.float64), total)
        alone = tf.math.divide_no_nan(tf.cast(factor, tf.float64), own)
        out = [
            scale_grad(g, share if self.scale_local else alone) if place_of(v) in self.local else g
            for g, v in zip(gradients, self.variables, strict=True)
        ]
        for i, g in zip(shared, reduced, strict=True):
            out[i] = g
        if self.op == hvd.Sum and self.allow_untracked:
            out = [scale_grad(g, tf.cast(self.reducer.size, tf.float64)) for g in out]
        return out, table

    def finish_step(self, gradients: list[Any], table: tf.Tensor) -> list[Any]:
        """Judge the step and keep its report; return gradients that cannot be used before that."""
        after = self.step_state.finish_step(table, self.reducer.travel(self.step_state.compressing))
        if self.accumulated_row is not None:
            with tf.control_dependencies([*after, self.row]):
                done = self.accumulated_row.assign(tf.zeros_like(self.accumulated_row))
            after = after and [*after, done.op]
        return with_dependencies(gradients, after)

    def local_gradients(self, optimizer: Any, gradients: list[Any]) -> list[Any]:
        """Return the gradient of this rank's elements alone, for a local step."""
        assert self.local_steps is not None
        if self.factor is not None:
            share = tf.math.divide_no_nan(tf.constant(self.factor, tf.float64), self.row[1])
            gradients = [scale_grad(g, share) for g in gradients]
        return self.local_steps.add_proximal_grad(
            gradients, [optimizer._get_variable_index(v) for v in self.variables]
        )


class _Exact:
    """The methods that make an optimizer of Keras exact; :func:`DistributedOptimizer` mixes them in."""

    _hvd: _Engine
    _base: type

    @property
    def __class__(self) -> type:
        # Keras writes an object's class into saved models: let that be its own, plain one.
        return type(self)._base

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Reduce the gradients, or add them to those of the step, and update. See Keras."""
        grads = list(grads)
        self._hvd.look(grads)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                # Outside of what waits for a gradient below, from which a tf.function could not lift it.
                with tf.init_scope(), keras.name_scope(self.name, caller=self):  # type: ignore[attr-defined]
                    self.build(trainable_variables)
        # What needs no gradient (counting the step, weight decay) must still not happen when a batch
        # turns out not to exist, at the end of data of unknown length: in Keras it does. One gradient is
        # waited for, the one that is ready first, so that reductions start while others are computed.
        first = next((g for g in reversed(grads) if g is not None), None)
        with tf.control_dependencies([] if first is None or tf.executing_eagerly() else [_values(first)]):
            self._base.apply(self, grads, trainable_variables)
        local_steps = self._hvd.local_steps
        if local_steps is not None and local_steps.built:
            # Not before the step is counted, so that an error leaves it counted on every rank.
            with tf.control_dependencies([tf.convert_to_tensor(self._iterations)]):  # type: ignore[attr-defined]
                local_steps.sync_parameters_if_due()

    def _backend_apply_gradients(self, grads: list[Any], trainable_variables: list[Any]) -> None:
        engine = self._hvd
        if not engine.included:
            self._base._backend_apply_gradients(self, grads, trainable_variables)
            return
        grads = engine.collect(self, list(grads), trainable_variables)
        if engine.local_steps is None and not engine.ending and not engine.skips:
            self._base._backend_apply_gradients(self, grads, trainable_variables)
            return
        steps = self.gradient_accumulation_steps  # type: ignore[has-type]
        if not steps:
            self._step(grads, trainable_variables)
            return
        places = [self._get_variable_index(v) for v in trainable_variables]  # type: ignore[attr-defined]
        gathered = [self._accumulated_gradients[place] for place in places]  # type: ignore[attr-defined]

        def gather() -> tf.Tensor:
            self._backend_increment_gradient_accumulators(grads, gathered)  # type: ignore[attr-defined]
            return tf.constant(False)

        def step() -> tf.Tensor:
            whole = [(g + a) / steps for g, a in zip(grads, gathered, strict=True)]
            return self._step(whole, trainable_variables)

        if engine.ending:
            step()
        else:
            tf.cond(tf.equal((self._iterations + 1) % steps, 0), step, gather)  # type: ignore[attr-defined]

    def build(self, variables: Any) -> None:
        """Make the optimizer's variables, and know those that stay local. See Keras."""
        self._base.build(self, variables)
        later, self._hvd.local_later = self._hvd.local_later, []
        for one in later:
            self.register_local_var(one)

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        engine = self._hvd
        if not engine.included:
            return self._base._clip_gradients(self, grads)
        if engine.reduced is None:
            reduced, table = engine.reduce(self, list(grads))
            grads = engine.finish_step(reduced, table)
        return self._base._clip_gradients(self, grads)

    def _step(self, grads: list[Any], trainable_variables: list[Any]) -> tf.Tensor:
        """Do a step with all of its gradients: together with the other ranks, or alone."""
        engine, local_steps = self._hvd, self._hvd.local_steps

        def together() -> tf.Tensor:
            reduced, table = engine.reduce(self, grads)
            if not engine.ending:
                return self._settled(reduced, table, trainable_variables)
            # This rank adds nothing; neither does any other, and there is no step, unless one failed.
            anything = tf.reduce_any(table[:, _PASSES] + table[:, _FAILED] > 0)
            assert engine.ended is not None
            engine.ended.assign(~anything)
            return tf.cond(
                anything,
                lambda: self._settled(reduced, table, trainable_variables),
                lambda: tf.constant(False),
            )

        def alone() -> tf.Tensor:
            assert local_steps is not None
            bad = (engine.row[1] > 0) & exceeds(grads, [g.dtype.max for g in grads])
            sound = local_steps.count(
                with_nonfinite_flag(engine.row, bad, engine.step_state.nonfinite == "drop")
            )
            if engine.accumulated_row is not None:
                engine.accumulated_row.assign(tf.zeros_like(engine.accumulated_row))
            return tf.cond(
                sound,
                lambda: self._update(engine.local_gradients(self, grads), trainable_variables),
                lambda: self._forget(),
            )

        return together() if local_steps is None else tf.cond(local_steps.local, alone, together)

    def _settled(self, reduced: list[Any], table: tf.Tensor, trainable_variables: list[Any]) -> tf.Tensor:
        """Judge a step of all ranks, and update, or leave everything as it was."""
        engine = self._hvd
        grads = engine.finish_step(reduced, table)
        if not engine.skips:
            return self._update(grads, trainable_variables)

        def skip() -> tf.Tensor:
            # `apply` adds one when this is over, and has for every pass before it.
            self._iterations.assign_sub(self.gradient_accumulation_steps or 1)  # type: ignore[attr-defined]
            return self._forget()

        return tf.cond(engine.step_state.skips(table), skip, lambda: self._update(grads, trainable_variables))

    def _update(self, grads: list[Any], trainable_variables: list[Any]) -> tf.Tensor:
        """Clip and apply gradients that are not to be reduced, or added up, any more."""
        engine = self._hvd
        steps = self.gradient_accumulation_steps
        engine.reduced, self.gradient_accumulation_steps = grads, None
        try:
            self._base._backend_apply_gradients(self, grads, trainable_variables)
        finally:
            engine.reduced, self.gradient_accumulation_steps = None, steps
        return self._forget()

    def _forget(self) -> tf.Tensor:
        """Drop gradients that were added up for this step."""
        if self.gradient_accumulation_steps:
            self._backend_reset_gradient_accumulators()  # type: ignore[attr-defined]
        return tf.constant(True)

    def exchange(self) -> None:
        """Average the ranks' parameters now, after local steps; nothing where they are equal.

        Before evaluating or saving a model in the middle of a stretch of local steps
        (:class:`hvdloss.terms.policies.SyncPeriod`) in a loop of your own; ``fit`` does it at the end of
        every epoch. All ranks must call it, eagerly, after the same step.

        Raises:
            WeightError, NoWeightError, NonFiniteLossError, UsageError, ConfigError: the same on every
                rank; parameters are those of the last exchange again.

        Collectives: one all-reduce of the parameters per dtype, and one of the ledgers before it.
        """
        if self._hvd.local_steps is not None and self._hvd.included:
            self._hvd.local_steps.sync_parameters()

    @property
    def last_step(self) -> StepReport | None:
        """The report of the last reduced step, equal on all ranks; None before the first."""
        return self._hvd.step_state.report("mean")

    @property
    def objective(self) -> Any:
        """The objective it was given."""
        return self._hvd.objective

    def register_local_var(self, variable: Any) -> None:
        """Have `variable` keep this rank's own gradient; before the optimizer is built or after."""
        if not self.built:  # type: ignore[attr-defined]
            self._hvd.local_later.append(variable)
            return
        place = self._get_variable_index(variable)  # type: ignore[attr-defined]
        if self._hvd.local_steps is not None:
            check_local(self, {place})
        self._hvd.local.add(place)


class _ExactScale:
    """The same for ``LossScaleOptimizer``, whose inner optimizer reduces: ranks agree on what is finite."""

    _base: type

    @property
    def __class__(self) -> type:
        return type(self)._base

    @property
    def _hvd(self) -> _Engine:
        return self.inner_optimizer._hvd  # type: ignore[attr-defined]

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Unscale gradients for the inner optimizer. See Keras."""
        grads, engine = list(grads), self._hvd
        engine.look(grads)
        engine.looked = True
        try:
            self._base.apply(self, grads, trainable_variables)
        finally:
            engine.looked = False

    def check_finite(self, grads: list[Any]) -> tf.Tensor:
        """Return whether the gradients of all ranks are finite. One small all-reduce."""
        finite = self._base.check_finite(self, grads)
        engine = self._hvd
        if not engine.included or engine.reducer.size == 1:
            return finite
        return tf.equal(engine.reducer.count(~finite, "finite"), 0.0)

    def _stateful_handle_non_finite_grads(self) -> None:
        self._hvd.step_state.clear()
        self._base._stateful_handle_non_finite_grads(self)

    last_step = _Exact.last_step
    objective = _Exact.objective

    def register_local_var(self, variable: Any) -> None:
        """Have `variable` keep this rank's own gradient; before the optimizer is built or after."""
        self.inner_optimizer.register_local_var(variable)  # type: ignore[attr-defined]


def _values(g: Any) -> tf.Tensor:
    return g.values if isinstance(g, tf.IndexedSlices) else g


def engine_of(optimizer: Any) -> _Engine | None:
    """Return the engine of a distributed optimizer, or None for any other."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return engine_of(optimizer.inner_optimizer)
    return getattr(optimizer, "_hvd", None) if issubclass(type(optimizer), _Exact) else None


def as_exact_class(optimizer: Any) -> None:
    """Give `optimizer` the methods of an exact one; it stays the same object, with its state."""
    base = type(optimizer)
    if issubclass(base, _Exact | _ExactScale):
        return
    if base not in _classes:
        mixin = _ExactScale if issubclass(base, keras.optimizers.LossScaleOptimizer) else _Exact
        _classes[base] = type(
            base.__name__,
            (mixin, base),
            {"_base": base, "__module__": base.__module__, "__doc__": base.__doc__},
        )
    optimizer.__class__ = _classes[base]


def DistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    objective: Any = None,
    *,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = hvd.Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = hvd.Average,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = None,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = True,
    scale_local_gradients: bool = True,
    bucket_cap_mb: float | None = None,
) -> keras.optimizers.Optimizer:
    """Make an optimizer of Keras use the gradient of all ranks' elements.

    In a compiled model nothing else is needed: each loss given to ``compile``, an :class:`Objective` or
    one of Keras's own, by name or not, tells its weight, and the step is exactly that of one process
    that saw every sample. In a loop of your own pass the `objective` whose loss you differentiate;
    without one every backward pass weighs the same on each rank, as in Horovod.

    Args:
        optimizer: any optimizer of Keras, built or not; a ``LossScaleOptimizer`` as well. Options like
            ``clipnorm``, ``use_ema``, ``weight_decay`` act on the reduced gradient, and with
            ``gradient_accumulation_steps`` micro-batches are weighted by what they held.
        objective: an :class:`Objective`, of this module or of ``hvdloss.tensorflow``, for loops without
            ``compile``.
        name: of the messages; by order of construction if None.
        device_dense, device_sparse: where collectives run.
        compression: ``Compression.none`` or ``fp16``: what travels, not what is computed.
        sparse_as_dense: reduce sparse gradients as dense ones.
        gradient_predivide_factor: shifts the range of what travels, as in Horovod.
        op: ``Average``; ``Sum`` only without an objective.
        num_groups: Horovod's old name for an integer `groups`.
        groups: a number of messages to aim at, or lists of variables that must share one.
        process_set: the ranks that share the step; None for the objective's, or all.
        backward_passes_per_step: Horovod's name for ``gradient_accumulation_steps``.
        average_aggregated_gradients: must stay True where passes are accumulated.
        scale_local_gradients: scale gradients of local variables to this rank's share of the step.
        bucket_cap_mb: the size of a message of several gradients in MiB; None for what
            ``HVDLOSS_BUCKET_CAP_MB`` says, or 25.

    Returns:
        `optimizer` itself, which now reduces: its state, and its class as far as saving and
        ``isinstance`` see it, are what they were. It has ``last_step``, a :class:`hvdloss.StepReport`.

    Raises:
        ConfigError: an argument that cannot be used; terms whose policies cannot be followed here:
            :class:`hvdloss.terms.policies.SyncPeriod` with a ``LossScaleOptimizer``, with ``use_ema``, or
            with local variables, and ``AdaptiveCompression`` with `compression`.

    Collectives per step: one all-reduce per bucket of dense gradients, two all-gathers per sparse
    one, one all-reduce of the ranks' ledgers (``size`` x 21 float64 and what terms tell; with more than 64
    ranks see :meth:`hvdloss.tensorflow.reducer.GradientReducer.reduce`), all under way together; one small
    one more for a model of several losses, and for a ``LossScaleOptimizer``. After local steps
    (``SyncPeriod``) instead, once per stretch: one all-reduce of the ledgers, then one of the parameters per
    dtype.
    """
    if groups is None and num_groups:
        groups = num_groups
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigError(f"optimizer={optimizer!r} is not a keras.optimizers.Optimizer")
    if engine_of(optimizer) is not None:
        raise ConfigError("optimizer is already distributed by hvdloss.keras.DistributedOptimizer")
    if objective is not None and not isinstance(objective, Objective | TensorFlowObjective):
        raise ConfigError(
            f"objective={objective!r} is not an hvdloss.keras.Objective; wrap the loss function in one"
        )
    if objective is None and op == hvd.Sum:
        check_options(hvd.Average, gradient_predivide_factor, groups)
    else:
        check_options(op, gradient_predivide_factor, groups)
    ours = None if objective is None else objective.process_set
    if process_set is not None and ours is not None and process_set is not ours:
        raise ConfigError("objective and optimizer were given different process sets")
    inner = optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = optimizer.inner_optimizer
    if backward_passes_per_step != 1:
        if not isinstance(backward_passes_per_step, int) or backward_passes_per_step < 1:
            raise ConfigError(
                f"backward_passes_per_step={backward_passes_per_step!r} must be an integer of at least 1"
            )
        if not average_aggregated_gradients:
            raise ConfigError(
                "average_aggregated_gradients=False cannot be exact: an average weighted by what each "
                "pass held is taken over all passes and ranks"
            )
        if inner.built or inner.gradient_accumulation_steps not in (None, backward_passes_per_step):
            raise ConfigError(
                "backward_passes_per_step must be set before the optimizer is built, and agree with its "
                "gradient_accumulation_steps; construct the optimizer with gradient_accumulation_steps"
            )
        inner.gradient_accumulation_steps = backward_passes_per_step
    if objective is not None:
        exact = objective._exact if isinstance(objective, Objective) else objective
        exact.process_set = process_set or ours
        exact.passes = inner.gradient_accumulation_steps or 1
    reducer = GradientReducer(
        # Optimizers are told apart on the wire by the order of their construction.
        f"hvdloss.keras.{name or next_name_index('keras')}",
        process_set=process_set or ours,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        predivide=gradient_predivide_factor,
        groups=groups,
        device_dense=device_dense,
        device_sparse=device_sparse,
        bucket_cap_mb=bucket_cap_mb,
    )
    engine = _Engine(objective, reducer, op, scale_local_gradients)
    engine.follow(optimizer)
    inner._hvd = engine
    as_exact_class(inner)
    if inner is not optimizer:
        as_exact_class(optimizer)
    return optimizer


def PartialDistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    objective: Any = None,
    *,
    local_layers: Any = None,
    **options: Any,
) -> keras.optimizers.Optimizer:
    """Like :func:`DistributedOptimizer`, but layers in `local_layers` keep this rank's gradients.

    Args:
        optimizer, objective, options: see :func:`DistributedOptimizer`.
        local_layers: a Keras layer or a list of them.

    Raises:
        ConfigError: an argument that cannot be used.
    """
    layers = local_layers if isinstance(local_layers, list | tuple) else [local_layers]
    out = DistributedOptimizer(optimizer, objective, **options)
    for layer in layers:
        if layer is not None:
            if not isinstance(layer, keras.layers.Layer):
                raise ConfigError(f"local_layers={local_layers!r} must hold Keras layers")
            for variable in layer.trainable_weights:
                out.register_local_var(variable)
    return out
