"""Local steps: what lies between two exchanges of parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

import keras
from hvdloss.errors import ConfigError
from hvdloss.keras._backend import hvd
from hvdloss.losses.ledger import COLUMN, FAULT_COLUMNS
from hvdloss.tensorflow.reducer import GradientReducer, with_nonfinite_flag
from hvdloss.tensorflow.step import StepState, raise_kept_error, unwrap_graph_errors, without_factor
from hvdloss.tensorflow.variables import variable
from hvdloss.terms.policies.period import SyncPeriod
from hvdloss.terms.policies.weights import Proximal
from hvdloss.terms.term import CommStats

__all__ = ["LocalSteps"]

_DENOMINATOR, _PASSES, _STRAYS = COLUMN["denominator"], COLUMN["micro_batches"], COLUMN["untracked_backwards"]
_FAILED = COLUMN["failed"]
_TOLD_HERE = [[COLUMN["nonfinite_gradients"]], [COLUMN["drift_sqnorm"]], [COLUMN["mean_update_sqnorm"]]]


class LocalSteps:
    """The steps that a rank takes by itself since the last exchange of parameters.

    Holds the parameters of that exchange (the anchor, equal on all ranks) and what the rank saw since,
    as variables, so that everything happens in the graph of the training step.

    Args:
        step_state: of the objective, whose terms have a :class:`hvdloss.terms.policies.SyncPeriod`.
        reducer: how gradients travel; parameters travel the same way.
        passes: backward passes per step.
    """

    def __init__(self, step_state: StepState, reducer: GradientReducer, passes: int) -> None:
        period = step_state.controller.policy(SyncPeriod)
        assert period is not None
        self.step_state, self.reducer, self.passes = step_state, reducer, passes
        self.outer = period.outer
        self.proximal = step_state.controller.policy(Proximal) is not None
        self.built = False

    def build(self, optimizer: Any) -> None:
        """Make the variables, once, for the parameters that an optimizer was built on."""
        if self.built:
            return
        self.built = True
        self.parameters = [_raw(p) for p in optimizer._trainable_variables]
        # What the optimizer remembers of gradients is a rank's own as long as its steps are.
        adding = getattr(optimizer, "_accumulated_gradients", ())
        shared = [optimizer._iterations, optimizer._learning_rate, *adding]
        self.optimizer_state = [
            _raw(v)
            for v in optimizer.variables
            if all(v is not one for one in shared) and tf.as_dtype(v.dtype).is_floating
        ]

        def like(p: tf.Variable, name: str) -> tf.Variable:
            return variable(tf.zeros(p.shape, p.dtype), name)

        with tf.init_scope():
            self.synced_params = [like(p, "hvdloss_synced") for p in self.parameters]
            outer = [] if self.outer is None else self.parameters
            self.velocity = [like(p, "hvdloss_velocity") for p in outer]
            self.row = variable(tf.zeros(self.step_state.width, tf.float64), "hvdloss_local")
            self.steps = variable(0, "hvdloss_local_steps", dtype=tf.int64)
            #: Steps at the end of the last stretch in which no rank had a batch.
            self.overrun_steps = variable(0, "hvdloss_local", dtype=tf.int64)
            #: Of the last mean move, squared.
            self.length = variable(0.0, "hvdloss_local", dtype=tf.float64)
        self._synchronize = tf.function(self._sync_parameters, autograph=False)

    # -- a step -----------------------------------------------------------------------------------

    @property
    def local(self) -> tf.Tensor:
        """Whether this step's gradients stay here; the first step is done together."""
        return (self.step_state.period > 1) & (self.step_state.steps > 0)

    def count(self, row: tf.Tensor) -> tf.Tensor:
        """Add a step of this rank, before its update; return whether it may be made.

        A step without weight, or unsound, moves nothing: the exchange tells all ranks what was wrong.
        """

        def save_params() -> tf.Tensor:
            for p, saved in zip(self.parameters, self.synced_params, strict=True):
                saved.assign(p)
            return tf.constant(True)

        # Now rather than after the last exchange: whatever was loaded in between is equal on all ranks.
        tf.cond(tf.equal(self.steps, 0), save_params, lambda: tf.constant(False))
        self.row.assign_add(without_factor(row))  # a factor may change from step to step
        self.steps.assign_add(1)
        return (row[_DENOMINATOR] > 0) & ~tf.reduce_any(row[FAULT_COLUMNS] > 0)

    def add_proximal_grad(self, gradients: Sequence[Any], places: Sequence[int]) -> list[Any]:
        """Return the gradients with that of ``mu / 2 ||theta - anchor||^2`` added; sparse ones as they are.

        `places`: of the gradients' parameters.
        """
        if not self.proximal:
            return list(gradients)
        mu = self.step_state.proximal_strength
        return [
            g
            if isinstance(g, tf.IndexedSlices)
            else g + tf.cast(mu, g.dtype) * tf.cast(self.parameters[i] - self.synced_params[i], g.dtype)
            for g, i in zip(gradients, places, strict=True)
        ]

    # -- an exchange ------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether ranks are apart. Eager only."""
        return self.built and int(self.steps) > 0

    def sync_parameters(self) -> None:
        """Average the ranks' parameters, if steps were taken since they were equal. Eager only."""
        if self.pending:
            unwrap_graph_errors(self._synchronize)

    def sync_parameters_if_due(self) -> None:
        """Average the ranks' parameters, if the stretch is complete; eagerly or in a graph."""
        due = (self.steps > 0) & (self.steps >= self.step_state.period)
        if not tf.executing_eagerly():
            tf.cond(due, self._synchronize, lambda: tf.constant(False))
        elif bool(due):
            unwrap_graph_errors(self._synchronize)

    def _sync_parameters(self) -> tf.Tensor:
        row, steps = self.row.read_value(), self.steps.read_value()
        groups = _by_dtype(self.parameters)
        moved = [p - saved for p, saved in zip(self.parameters, self.synced_params, strict=True)]
        flats = [_flat([moved[i] for i in group]) for group in groups]
        began = self.reducer.timer.begin(flats)
        length = _squared_length(flats)
        finite = tf.math.is_finite(length)  # else steps went too far, of gradients that were finite
        weight = self._weights(row[_DENOMINATOR])
        weight = tf.where(finite, weight, tf.zeros_like(weight))
        if self.step_state.nonfinite == "drop":
            row = tf.where(finite, row, with_nonfinite_flag(row, ~finite, drop=True))
        bad = tf.cast(~finite, tf.float64)
        told = [bad, tf.math.multiply_no_nan(length, weight), self.length]
        row = tf.tensor_scatter_nd_add(row, _TOLD_HERE, tf.stack(told))
        table = self.reducer.sum_table(
            self.reducer.timer.with_times(self.step_state.with_flags(row)), "stretch"
        )
        # At the end of an epoch of unknown length ranks without batches cannot tell that others have
        # none either; those steps did not happen.
        made = table[:, _PASSES] + table[:, _STRAYS] + table[:, _FAILED]
        rounds = tf.math.ceil(tf.reduce_max(made) / self.passes)
        real = tf.minimum(steps, tf.cast(rounds, tf.int64))

        def close() -> tf.Tensor:
            step = self.step_state.steps + real
            sound, state = self.step_state.try_finish_steps(table, step, real, self._travel(flats))
            return tf.cond(sound, lambda: move_all(state), self._restore_params)

        def move_all(state: tf.Tensor) -> tf.Tensor:
            share = weight / tf.reduce_sum(self._weights(table[:, _DENOMINATOR]))
            means = [
                self.reducer.sum_scaled(
                    flat, share, f"{self.reducer.name}.moves.{number}", self.step_state.compress
                )
                for number, flat in enumerate(flats)
            ]
            self.reducer.timer.end(began, means)
            for mean, group in zip(means, groups, strict=True):
                self._apply_outer_step(mean, group)
            self.length.assign(_squared_length(means))
            self.step_state.commit(table, real, state)
            self._restart()
            apart = self.step_state.period > 1
            return tf.cond(apart, lambda: tf.constant(True), lambda: self._average_optimizer_state(share))

        def drop() -> tf.Tensor:
            self._restart()
            return tf.constant(True)

        done = tf.cond(real > 0, close, drop)
        self.overrun_steps.assign(steps - real)
        return done

    def _average_optimizer_state(self, share: tf.Tensor) -> tf.Tensor:
        """Average what the ranks' optimizers remember: with equal gradients they must make equal updates.

        As it is: squares of small gradients are beyond float16.
        """
        for number, group in enumerate(_by_dtype(self.optimizer_state)):
            some = [self.optimizer_state[i] for i in group]
            name = f"{self.reducer.name}.memory.{number}"
            mean = self.reducer.sum_scaled(_flat(some), share, name, compression=hvd.Compression.none)
            for v, value in zip(some, _split(mean, some), strict=True):
                v.assign(value)
        return tf.constant(True)

    def _weights(self, denominators: tf.Tensor) -> tf.Tensor:
        """Return what ranks count: what they saw; with the reduction "sum" the same, as in a step."""
        if self.step_state.reduction == "sum":
            return tf.cast(denominators > 0, tf.float64)
        return denominators

    def _apply_outer_step(self, mean: tf.Tensor, group: Sequence[int]) -> None:
        """Move parameters of one dtype from the anchor by the ranks' mean move."""
        for i, move in zip(group, _split(mean, [self.parameters[i] for i in group]), strict=True):
            if self.outer is not None:
                move, velocity = self.outer.update(move, self.velocity[i])
                self.velocity[i].assign(velocity)
            self.parameters[i].assign(self.synced_params[i] + move)

    def _restart(self) -> list[Any]:
        """Start counting anew."""
        return [
            self.row.assign(tf.zeros_like(self.row), read_value=False),
            self.steps.assign(0, read_value=False),
        ]

    def reset(self) -> None:
        """Forget what was of other ranks. Eager only."""
        self.forget()
        self.length.assign(0.0)
        for velocity in self.velocity:
            velocity.assign(tf.zeros_like(velocity))

    def forget(self) -> None:
        """Start counting anew, as parameters were loaded. Eager only."""
        self._restart()

    def _restore_params(self) -> tf.Tensor:
        """Return to the parameters of the last exchange, and raise what was wrong."""
        done = [
            p.assign(a, read_value=False) for p, a in zip(self.parameters, self.synced_params, strict=True)
        ]
        done += self._restart()
        with tf.control_dependencies(done):
            return raise_kept_error()

    def _travel(self, flats: Sequence[tf.Tensor]) -> Any:
        """Return what tells, after so many steps, how parameters travelled."""
        sizes = [(flat.dtype, flat.shape.num_elements()) for flat in flats]
        compressing = self.step_state.compressing

        def told(steps: int) -> CommStats:
            half = compressing is not None and compressing.on
            return CommStats(
                messages=len(sizes) + 1,
                bytes=sum(self.reducer.bytes_of(dtype, n, half) for dtype, n in sizes),
                full_bytes=sum(dtype.size * n for dtype, n in sizes),
                steps=steps,
                parameters=True,
            )

        return told


def check_local(optimizer: Any, local: set[int]) -> None:
    """Check that an optimizer can take local steps.

    Args:
        optimizer: of Keras.
        local: places of variables that keep this rank's own gradient.

    Raises:
        ConfigError: it cannot.
    """
    why = None
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        why = "a LossScaleOptimizer must ask all ranks in every step whether gradients are finite"
    elif local:
        why = "variables that stay each rank's own cannot be averaged with the others"
    elif optimizer.use_ema:
        why = "use_ema=True averages each rank's own parameters, which differ between exchanges"
    if why is not None:
        raise ConfigError(f"SyncPeriod: {why}. Leave SyncPeriod out of the terms' policies, or the other out")


def _raw(variable: Any) -> tf.Variable:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _by_dtype(variables: Sequence[tf.Variable]) -> list[list[int]]:
    """Return the places of the variables of each dtype."""
    groups: dict[tf.DType, list[int]] = defaultdict(list)
    for i, v in enumerate(variables):
        groups[v.dtype].append(i)
    return list(groups.values())


def _flat(some: Sequence[Any]) -> tf.Tensor:
    return tf.concat([tf.reshape(x, [-1]) for x in some], 0)


def _split(flat: tf.Tensor, like: Sequence[tf.Variable]) -> list[tf.Tensor]:
    """Return the parts of a vector in the shapes of variables."""
    parts = tf.split(flat, [v.shape.num_elements() for v in like])
    return [tf.reshape(part, v.shape) for part, v in zip(parts, like, strict=True)]


def _squared_length(flats: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.add_n([tf.reduce_sum(tf.cast(flat, tf.float64) ** 2) for flat in flats])
