"""The state of a step: the sums of its backward passes, and what all ranks' ledgers came to.

They are TensorFlow variables, so that they are the same in eager code, in a ``tf.function``, and where
one function calls another; Python state would see only the tracing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import tensorflow as tf
from hvdloss import watch
from hvdloss.comm.agreement import raise_on_all_ranks
from hvdloss.comm.communicator import rank_and_size
from hvdloss.comm.world import register_for_reset
from hvdloss.errors import HvdlossError, UsageError
from hvdloss.losses.ledger import (
    COLUMN,
    FAULT_COLUMNS,
    LEDGER_WIDTH,
    NONFINITE_COLUMNS,
    Ledgers,
    check_step,
    unpack,
)
from hvdloss.losses.passes import SAME, another_error, uneven_division_error, unheard_error
from hvdloss.losses.reduction import TENSOR_FIELDS
from hvdloss.report import StepReport
from hvdloss.step.report import Interest, LossReport
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.ops import communicator_of
from hvdloss.tensorflow.passes import clear_refusals, pop_refusal, set_weight_of_pass
from hvdloss.tensorflow.variables import variable
from hvdloss.terms.controller import Controller, parse_counts
from hvdloss.terms.policies.compression import AdaptiveCompression
from hvdloss.terms.policies.period import period_of
from hvdloss.terms.policies.weights import Proximal
from hvdloss.terms.term import CommStats

__all__ = [
    "StepState",
    "keep_error",
    "merge_pass",
    "pop_error",
    "raise_kept_error",
    "unwrap_graph_errors",
    "with_failure",
    "without_factor",
]

# What crossed a graph as a TensorFlow error, so that those who own the call can raise the real one.
_errors: list[Exception] = []


def with_failure(row: tf.Tensor, failed: tf.Tensor) -> tf.Tensor:
    """Return a row that tells, too, that this rank cannot go on, where `failed` is above 0."""
    return tf.tensor_scatter_nd_add(row, [[_FAILED]], [failed])


def merge_pass(rows: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    """Return the row of several passes together with that of one more: sums, but for the loss's factor.

    See :func:`hvdloss.losses.passes.factor_of_passes`.
    """
    before, now = rows[_DENOMINATOR] > 0, row[_DENOMINATOR] > 0
    factor = tf.where(before, rows[_FACTOR], row[_FACTOR])
    apart = before & now & ~_same(row[_FACTOR], rows[_FACTOR])
    news = tf.maximum(tf.maximum(rows[_RESCALED], row[_RESCALED]), 2.0 * tf.cast(apart, tf.float64))
    return tf.tensor_scatter_nd_update(rows + row, _OF_FACTOR, tf.stack([factor, news]))


def without_factor(row: tf.Tensor) -> tf.Tensor:
    """Return a row that tells nothing of what the loss was multiplied with."""
    return tf.tensor_scatter_nd_update(row, _OF_FACTOR, tf.zeros(2, tf.float64))


def _same(factor: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    return tf.abs(factor - other) <= SAME * tf.maximum(tf.abs(factor), tf.abs(other))


def pop_error() -> Exception | None:
    """Return the last error that was raised inside a ``tf.function``, and forget it.

    TensorFlow turns every exception inside a function into one of its own, with our message in its text.
    """
    found = _errors[-1] if _errors else None
    _errors.clear()
    return found


def unwrap_graph_errors(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call, and raise our own error for one that crossed a TensorFlow graph."""
    pop_error()
    watch.check()
    try:
        return function(*args, **kwargs)
    except tf.errors.OpError as error:
        ours = pop_error()
        if ours is not None:
            raise ours from None
        why = watch.root_cause(error)
        if why is error:
            raise
        raise why from error


_FAILED, _MORE, _LEAVING = COLUMN["failed"], COLUMN["has_next"], COLUMN["preemption_requested"]
_READING, _DENOMINATOR = COLUMN["rows_requested"], COLUMN["denominator"]
_FACTOR, _RESCALED = COLUMN["factor"], COLUMN["rescaled"]
_OF_FACTOR = [[_FACTOR], [_RESCALED]]
_ELEMENTS, _PASSES = COLUMN["elements"], COLUMN["micro_batches"]
# Sums of passes that are not told: of squared denominators, of scaled losses, and of what arrived at losses.
_EXTRA = 3
# In the place of `failed`: which of this rank's errors it is.
_DIVISION, _REFUSAL = 1000.0, 1e6

_ALL_OF_THEM = (  # what to do with several objectives
    "Make hvd.Objectives({'name': objective, ...}) of all of them, and give that to a "
    "DistributedGradientTape. Or: "
)

_of_objectives: weakref.WeakSet[Any] = weakref.WeakSet()  # the step's state of all objectives


class StepState:
    """The open ledger row of the passes since the last step, and the table of the last step.

    Created without side effects; its variables come into being with their first use, outside any graph.

    Args:
        controller: of the objective whose terms extend the rows; None for none.
        reduction: of that objective.
        nonfinite: what that objective does about losses and gradients that are NaN or infinite.
    """

    def __init__(
        self, controller: Controller | None = None, reduction: str = "mean", nonfinite: str = "raise"
    ) -> None:
        self.controller = Controller() if controller is None else controller
        self.reduction = reduction
        self.nonfinite = nonfinite
        self.scaled: Any = False  # whether a loss was multiplied, of the passes last taken
        self._counts: tf.Variable | None = None  # of steps skipped, or dropped by rank
        # Elements of all steps, those before a checkpoint that it goes on from among them.
        self._samples: tf.Variable | None = None
        self._variables: tuple[tf.Variable, tf.Variable, tf.Variable] | None = None
        self._state: tf.Variable | None = None  # the terms' state, and what acts decided (see `_terms_state`)
        self._bound: tuple[int, int] | None = None
        # Whether this rank cannot go on, whether it has more, whether it is to leave, and whether somebody on
        # it reads what single ranks did.
        self._signal: tf.Variable | None = None
        self._own_flags = (False, False)  # the first two
        self._leaving: Callable[[], bool] = lambda: False
        self._error: BaseException | None = None  # why it cannot go on
        self._refusal: HvdlossError | None = None  # of the passes that were last traced or made
        self.process_set: Any = None  # of the ranks; set by those who exchange
        self.choices: dict[str, Any] = {}  # of how gradients travel, for the report
        self.listeners: list[Callable[[StepReport], None]] = []
        self._interest = Interest(self._signal_now)
        self.traced_unobserved = False  # whether a step was traced in which nobody listened
        self.name = ""  # of the objective
        self.losses: Callable[[], dict[str, LossReport]] = dict  # of several objectives, in the last step
        self.owned = False  # whether a tape or optimizer takes what is entered
        self.divides = True  # whether a division of the loss by the passes is one too many
        self._several: Any = 1.0  # calls of the objective in them
        self.arrived: Any = 1.0  # at the losses of the passes last taken, in sum
        self._factor: tf.Variable | None = None  # what all ranks' losses were last multiplied with
        self._passes = 1
        self._others: Sequence[str] = ()  # objectives whose losses a backward pass came from as well
        register_for_reset(self)

    def register_objective(self, name: str, divides: bool) -> None:
        """Have other tapes and optimizers see passes that go through this objective."""
        self.name, self.divides = name, divides
        _of_objectives.add(self)

    # -- other ranks, and going on ----------------------------------------------------------------

    def reset(self) -> None:
        """Forget what was of other ranks."""
        self._bound = self._error = None
        self.traced_unobserved = False  # what was traced is traced anew
        if self._variables is None:
            return
        self.clear()
        self._of(1).assign(tf.zeros((0, self.width), tf.float64))
        self._own_flags = (False, False)
        self._signal_now()
        assert self._factor is not None
        self._factor.assign(1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on needs: plain values and arrays, equal on all ranks. Eager only."""
        return {
            "steps": int(self._of(2)),
            "samples": int(self._samples_now()),
            "terms": self.controller.state_dict(),
        }

    def load_state_dict(self, state: Any, *, same_ranks: bool) -> None:
        """Go on from a :meth:`state_dict`; no collective. Eager only.

        Raises:
            ConfigError: it is none.
        """
        steps, samples = parse_counts(state, "is not what StepState.state_dict() gives")
        if self.controller.terms:
            self.begin(*rank_and_size(hvd, self.process_set))
            self.controller.load_state_dict(state["terms"], same_ranks=same_ranks)
            assert self._state is not None
            self._state.assign(self._terms_state())
        self._of(2).assign(steps)
        self._samples_now().assign(samples)

    @property
    def width(self) -> int:
        """How many numbers a row has: the ledger's, and the terms'."""
        return LEDGER_WIDTH + self.controller.width

    # -- what terms see, and what policies decided ----------------------------------------------------

    def _terms_state(self) -> np.ndarray:
        """Return the terms' state; behind it the period, the proximal strength, and whether to compress."""
        proximal = self.controller.policy(Proximal)
        compressing = self.compressing
        decided = [
            period_of(self.controller),
            0.0 if proximal is None else proximal.mu,
            0.0 if compressing is None else compressing.on,
        ]
        return np.concatenate([self.controller.state, decided])

    def begin(self, rank: int, size: int) -> None:
        """Have the terms start with these ranks, unless they have."""
        if self._bound == (rank, size):
            return
        self._bound = (rank, size)
        self.controller.reset(rank, size, force=True)
        with tf.init_scope(), tf.device("CPU:0"):
            if self._state is None:
                self._state = variable(self._terms_state(), "hvdloss_state", dtype=tf.float64)
            else:
                self._state.assign(self._terms_state())

    @property
    def state(self) -> tf.Tensor:
        """What the terms want to see again in every batch, float64; after :meth:`begin`."""
        assert self._state is not None
        return self._state[:-3]

    @property
    def period(self) -> tf.Tensor:
        """Steps between two exchanges, int64; after :meth:`begin`."""
        assert self._state is not None
        return tf.cast(self._state[-3], tf.int64)

    @property
    def proximal_strength(self) -> tf.Tensor:
        """Strength of the proximal term, float64; after :meth:`begin`."""
        assert self._state is not None
        return self._state[-2]

    @property
    def compressing(self) -> AdaptiveCompression | None:
        """The act that decides on compression, or None."""
        return self.controller.policy(AdaptiveCompression)

    @property
    def compress(self) -> tf.Tensor | None:
        """Whether 16 bits travel, for objectives that decide it while they train; else None."""
        if self._state is None or self.compressing is None:
            return None
        return self._state[-1] > 0

    @property
    def steps(self) -> tf.Variable:
        """The number of steps that were closed, int64."""
        return self._of(2)

    def _samples_now(self) -> tf.Variable:
        self._of(2)
        assert self._samples is not None
        return self._samples

    # -- a step -----------------------------------------------------------------------------------

    def _of(self, which: int) -> tf.Variable:
        if self._variables is None:
            with tf.init_scope(), tf.device("CPU:0"):
                self._variables = (
                    # The sums of the rows since the last step, of their squared denominators, and of
                    # passes whose loss was multiplied; then those of the terms.
                    variable(self._zero_row(), "hvdloss_row"),
                    variable(
                        tf.zeros((0, self.width), tf.float64), "hvdloss_table", shape=(None, self.width)
                    ),
                    variable(0, "hvdloss_step", dtype=tf.int64),
                )
                self._signal = variable(self._signals(), "hvdloss_signal", dtype=tf.float64)
                self._samples = variable(0, "hvdloss_samples", dtype=tf.float64)
                self._factor = variable(1.0, "hvdloss_factor", dtype=tf.float64)
                self._counts = variable(tf.zeros(0, tf.int64), "hvdloss_nonfinite", shape=(None,))
        return self._variables[which]

    def _zero_row(self) -> tf.Tensor:
        return tf.zeros(TENSOR_FIELDS + _EXTRA + self.controller.width, tf.float64)

    def record_on_backward(self, loss: tf.Tensor, row: tf.Tensor | Callable[[], tf.Tensor]) -> tf.Tensor:
        """Return `loss`; a backward pass through it enters `row`.

        float64: ``TENSOR_FIELDS`` sums, and those of the terms.

        A function is called for the row in the backward pass.
        """

        @tf.custom_gradient
        def through(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            def grad(upstream: tf.Tensor) -> tf.Tensor:
                # Tied to the gradient, since the backward half of an inner function keeps nothing else.
                entry = row() if callable(row) else row
                set_weight_of_pass(entry[_DENOMINATOR])
                entered = self.accumulate(entry, upstream)
                with tf.control_dependencies([entered]):
                    return tf.identity(upstream)

            return tf.identity(x), grad

        self._of(0)  # exists before any function is traced
        clear_refusals()
        if self.owned:
            self.clear_unowned()
        return through(loss)

    def accumulate(self, row: tf.Tensor, upstream: tf.Tensor | None = None) -> tf.Tensor:
        """Add the row of one backward pass; in a graph, return what does it.

        `upstream`: the gradient that came to its loss; above 1 where the loss was multiplied.
        """
        arrived = tf.ones((), tf.float64) if upstream is None else tf.cast(upstream, tf.float64)
        extra = [row[1] ** 2, tf.cast(arrived > 1, tf.float64), arrived]
        parts = [row[:TENSOR_FIELDS], tf.stack(extra), row[TENSOR_FIELDS:]]
        return self._of(0).assign_add(tf.concat(parts, 0))

    # -- what ranks tell each other ---------------------------------------------------------------

    def tell(self, more: bool, error: BaseException | None = None) -> None:
        """Say in the next exchange whether this rank has more data, or why it cannot go on. Eager only."""
        self._error = error
        self._own_flags = (error is not None, more)
        self._signal_now()

    def _signal_now(self) -> None:
        self._of(2)
        assert self._signal is not None
        self._signal.assign(self._signals())

    def _signals(self) -> list[float]:
        reading = bool(self.listeners) or self._interest.on
        return [*map(float, self._own_flags), float(self._leaving()), float(reading)]

    @property
    def preemption_requested(self) -> Callable[[], bool]:
        """Whether this rank is to leave; sent with the next step, once :attr:`preempted_ranks` was read."""
        return self._leaving

    @preemption_requested.setter
    def preemption_requested(self, asked: Callable[[], bool]) -> None:
        self._leaving = asked

    @property
    def preempted_ranks(self) -> tuple[int, ...]:
        """Which ranks were to leave by the last step, as all know. Eager only."""
        if self._leaving():  # graphs see variables only
            self._signal_now()
        return tuple(int(rank) for rank in np.flatnonzero(self._of(1).numpy()[:, _LEAVING]))

    @property
    def sync_status(self) -> tuple[int, bool]:
        """How many steps were closed, and whether a rank had more data by the last one. Eager only."""
        table = self._of(1).numpy()
        return int(self._of(2)), bool((table[:, _MORE] > 0).any())

    def with_flags(self, row: tf.Tensor) -> tf.Tensor:
        """Return the row that is exchanged with what this rank tells by now."""
        self._of(2)
        assert self._signal is not None
        return tf.tensor_scatter_nd_add(row, [[_FAILED], [_MORE], [_LEAVING], [_READING]], self._signal)

    @property
    def _size(self) -> int:
        return rank_and_size(hvd, self.process_set)[1]

    def _ledgers(self, table: np.ndarray) -> Ledgers:
        """Return what a step's table tells: all ranks' rows, or one of their sums."""
        told = table[:, :LEDGER_WIDTH]
        size = self._size
        return Ledgers(told[0], size) if len(told) == 1 < size else unpack(told)

    # -- what a loop may do that has no exact step ------------------------------------------------

    @property
    def calls(self) -> tf.Tensor:
        """How many passes were entered since they were last taken."""
        return self._of(0).read_value()[_PASSES]

    def watch_others(self, backward: Callable[[], Any]) -> tuple[Any, tf.Tensor]:
        """Do a backward pass; return what it gives, and above 0 if it went through other objectives too."""
        others = [one for one in _of_objectives if one is not self and one._variables is not None]
        before = [one.calls for one in others]
        out = backward()
        found = [one.calls > count for one, count in zip(others, before, strict=True)]
        return out, self._any(others, found)

    def _unowned(self) -> list[StepState]:
        """Return the state of objectives that no tape or optimizer has."""
        return [
            one for one in _of_objectives if one is not self and not one.owned and one._variables is not None
        ]

    def clear_unowned(self) -> None:
        """Drop what was entered for objectives that nobody takes: it is no part of the pass to come."""
        for one in self._unowned():
            one.clear()

    def unowned_calls(self) -> tf.Tensor:
        """Return above 0 if a pass went through an objective that nobody takes, and forget it.

        Of passes since this objective was last called, or the optimizer was made.
        """
        others = self._unowned()
        found = [one.calls > 0 for one in others]
        with tf.control_dependencies([] if tf.executing_eagerly() else found):
            self.clear_unowned()
        return self._any(others, found)

    def _any(self, others: list[StepState], found: list[tf.Tensor]) -> tf.Tensor:
        """Return whether any was found, float64, and keep the names for the message."""
        if not others:
            return tf.zeros((), tf.float64)
        if tf.executing_eagerly():
            names = [one.name for one, there in zip(others, found, strict=True) if bool(there)]
            self._others = names or self._others
        else:
            self._others = sorted({one.name for one in others})
        return tf.cast(tf.reduce_any(tf.stack(found)), tf.float64)

    def undo_division(self, passes: int, scale: Any = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Return what undoes a division of the loss by the passes, of the pass last taken, and if it cannot.

        Args:
            passes: of a step.
            scale: what a LossScaleOptimizer multiplies losses with.

        Returns:
            `passes` where the loss was divided, else 1; and above 0 where several losses were.
        """
        self._passes = passes
        if not self.divides or passes < 2:
            return tf.ones((), tf.float64), tf.zeros((), tf.float64)
        whole = tf.ones((), tf.float64) if scale is None else tf.cast(scale, tf.float64)

        def near(x: tf.Tensor) -> tf.Tensor:
            return tf.abs(x - whole) <= 1e-5 * whole

        arrived = self.arrived / tf.maximum(self._several, 1.0)
        divided = near(arrived * passes) & ~near(arrived)
        several = divided & (self._several > 1)
        return (
            tf.where(divided, tf.constant(float(passes), tf.float64), tf.ones((), tf.float64)),
            tf.where(several, tf.constant(_DIVISION, tf.float64), tf.zeros((), tf.float64)),
        )

    def with_factor(self, row: tf.Tensor, undone: Any = 1.0) -> tf.Tensor:
        """Return the row of the passes last taken, which tells what their losses were multiplied with.

        `undone`: what the gradients are multiplied with again. See
        :func:`hvdloss.losses.passes.factor_of_passes`.
        """
        assert self._factor is not None
        factor = self.arrived * tf.cast(undone, tf.float64)
        told = (row[_DENOMINATOR] > 0) & (self._several > 0) & tf.math.is_finite(factor)
        factor = tf.where(told, factor, tf.zeros_like(factor))
        news = tf.cast(told & ~_same(factor, self._factor.read_value()), tf.float64)
        return tf.tensor_scatter_nd_update(row, _OF_FACTOR, tf.stack([factor, news]))

    def _agreed_factor(self, table: tf.Tensor) -> tf.Tensor:
        """Return :func:`hvdloss.losses.ledger.agreed_factor` of a step's table."""
        assert self._factor is not None
        told = (table[:, _DENOMINATOR] > 0) & tf.equal(table[:, COLUMN["nonfinite_losses"]], 0)
        there = tf.reduce_any(told) & tf.reduce_any(table[:, _RESCALED] > 0)
        first = table[tf.argmax(tf.cast(told, tf.int32)), _FACTOR]
        return tf.where(there, first, self._factor.read_value())

    def _error_told(self, failed: float) -> BaseException | None:
        """Return why this rank cannot go on, by what its row tells."""
        if self._error is not None or not failed:
            return self._error
        if failed >= _REFUSAL:
            return self._refusal
        if failed >= _DIVISION:
            return uneven_division_error(self._passes)
        names = " or ".join(map(repr, self._others))
        return another_error(names, self.name, _ALL_OF_THEM) if self.name else unheard_error(names)

    def _check(self, table: np.ndarray, step: int) -> None:
        """Raise what is wrong with a step, on all ranks alike.

        Collectives: none, but where a rank cannot go on: one gather, of why.
        """
        ledgers = self._ledgers(table)
        if ledgers.total("failed") and self.process_set is not None:
            mine = self._error_told(ledgers[self.process_set.rank()].failed)
            raise_on_all_ranks(communicator_of(self.process_set), mine, "hvdloss.failed", f"step {step}")
        error = check_step(ledgers, step, self.nonfinite)
        if error is not None:
            raise error

    # -- a step -----------------------------------------------------------------------------------

    def skips(self, table: tf.Tensor) -> tf.Tensor:
        """Return whether a step that was judged is one without an update, by all ranks' rows."""
        if self.nonfinite != "skip":
            return tf.constant(False)
        return tf.reduce_any(table[:, NONFINITE_COLUMNS] > 0)

    def _unsound(self, table: tf.Tensor) -> tf.Tensor:
        """Return whether a step is an error, by all ranks' rows."""
        faults = tf.concat([table[:, FAULT_COLUMNS], table[:, _RESCALED : _RESCALED + 1]], 1)
        if self.nonfinite != "raise":
            others = (
                slice(FAULT_COLUMNS.start, NONFINITE_COLUMNS.start),
                slice(NONFINITE_COLUMNS.stop, FAULT_COLUMNS.stop),
            )
            faults = tf.concat([table[:, some] for some in (*others, slice(_RESCALED, _RESCALED + 1))], 1)
        total = tf.reduce_sum(table[:, 1])
        return tf.reduce_any(faults > 0) | tf.equal(total, 0.0) | ~tf.math.is_finite(total)

    def clear(self) -> None:
        """Drop what was entered since the last step."""
        self._of(0).assign(self._zero_row())

    def pop_row(self, allow_untracked: bool = False) -> tf.Tensor:
        """Return the row (:attr:`width` float64) of the passes entered, and start a new one.

        Several calls of the objective within one backward pass count as one if their denominators are
        equal. Otherwise, or without any, the row tells of a stray pass; `allow_untracked` turns a row without
        any pass into one that weighs the same on every rank.
        """
        book = self._of(0).read_value()
        self.clear()
        set_weight_of_pass(1.0)
        self.scaled = book[TENSOR_FIELDS + 1] > 0
        calls = self._several = book[_PASSES]
        n = tf.maximum(calls, 1.0)
        self.arrived = book[TENSOR_FIELDS + 2]
        apart = calls * book[TENSOR_FIELDS] - book[1] ** 2 > 1e-9 * book[1] ** 2
        silent = tf.equal(calls, 0.0)
        one, zero = tf.ones((), tf.float64), tf.zeros((), tf.float64)
        stray = tf.where(apart if allow_untracked else apart | silent, one, zero)
        denominator = tf.where(silent, one, book[1] / n) if allow_untracked else book[1] / n
        passes = one if allow_untracked else tf.minimum(calls, 1.0)
        own = tf.stack(
            [book[0], denominator, book[2] / n, book[3] / n, passes, book[5], book[6], book[7], zero, stray]
            + [zero] * (LEDGER_WIDTH - TENSOR_FIELDS - 2)
        )
        # What terms tell of several calls adds up, as it does over passes.
        row = tf.concat([own, book[TENSOR_FIELDS + _EXTRA :]], 0) if self.controller.width else own
        return self.with_refusal(row)

    def with_refusal(self, row: tf.Tensor) -> tf.Tensor:
        """Return the row of passes, which tells if one was refused (:mod:`hvdloss.tensorflow.passes`)."""
        found = pop_refusal()
        if found is None:
            return row
        self._refusal = found
        return with_failure(row, tf.constant(_REFUSAL, tf.float64))

    def finish_step(
        self,
        table: tf.Tensor,
        travel: Callable[[int], CommStats],
        judging: Callable[[], list[tf.Operation]] = list,
    ) -> list[tf.Operation]:
        """Judge a step from all ranks' rows ``(size, width)``, let the terms see it, and keep it.

        Eagerly, raises the step's error. In a graph, returns the operations that must come before any
        use of the step's gradients; they fail with the same error's text.

        Args:
            table: of the step.
            travel: tells how the gradients of so many steps travelled, when they are over.
            judging: judges what else belongs to the step; in a graph by operations.
        """
        step = self._of(2)
        after: list[tf.Operation] = []
        state: Any = None
        if tf.executing_eagerly():
            state = self._finish(table.numpy(), int(step) + 1, 1, travel)
        elif self.controller.terms:
            state = self._call_in_graph(self._finish, table, step + 1, 1, travel)
            after.append(state.op)
        else:
            done = tf.cond(
                self._unsound(table),
                lambda: self._check_in_graph(table, step + 1),
                lambda: tf.constant(True),
            )
            after.append(done.op)
        with tf.control_dependencies(after):
            after += judging()
        with tf.control_dependencies(after):
            kept = self.commit(table, 1, state)
        return after if tf.executing_eagerly() else [*after, *(op for op in kept if op is not None)]

    def commit(self, table: tf.Tensor, steps: Any, state: Any) -> list[Any]:
        """Keep what all ranks told of the last of so many steps, and the terms' new state if there is any."""
        kept = [
            self._of(2).assign_add(steps, read_value=False),
            self._of(1).assign(table, read_value=False),
            self._samples_now().assign_add(tf.reduce_sum(table[:, _ELEMENTS]), read_value=False),
        ]
        assert self._factor is not None
        kept.append(self._factor.assign(self._agreed_factor(table), read_value=False))
        if self.nonfinite != "raise":
            assert self._counts is not None
            told = tf.reduce_any(table[:, NONFINITE_COLUMNS] > 0, 1)
            if self.nonfinite == "skip":
                told = tf.reduce_any(told)[tf.newaxis]
            else:  # of the sums alone, which tell of nobody
                told = tf.broadcast_to(told, [self._size])
            told = tf.cast(told, tf.int64)
            past = tf.concat([self._counts.read_value(), tf.zeros_like(told)], 0)[: tf.size(told)]
            kept.append(self._counts.assign(past + told, read_value=False))
        if state is not None and self._state is not None:
            kept.append(self._state.assign(state, read_value=False))
        return kept + self._notify(table, kept)

    # -- those who follow -------------------------------------------------------------------------

    def add_listener(self, listener: Callable[[StepReport], None]) -> None:
        """Have `listener` called with the report of every step that is finished from now on.

        Raises:
            UsageError: a ``tf.function`` with a step in it was traced already, when nobody listened, so that
                nothing in it tells of steps. Keras's callback has ``fit`` traced anew.
        """
        if self.traced_unobserved and not self.listeners:
            raise UsageError(
                "steps of this objective were traced in a tf.function before anybody followed them; call "
                "recorder.follow(objective) before the first step, or make the tf.function anew after it"
            )
        self.listeners.append(listener)
        self._update_interest()

    def remove_listener(self, listener: Callable[[StepReport], None]) -> None:
        """Call `listener` no more."""
        if listener in self.listeners:
            self.listeners.remove(listener)
            self._update_interest()

    def _update_interest(self) -> None:
        if self._variables is not None:
            self._signal_now()

    def _notify(self, table: tf.Tensor, kept: list[Any]) -> list[Any]:
        """Tell those who follow of the step that `kept` keeps; in a graph, return what does it.

        Nothing is added to a graph that is traced while nobody listens.
        """
        if tf.executing_eagerly():
            if self.listeners:
                self._notify_listeners(self.report(self.reduction))
            return []
        if not self.listeners:
            self.traced_unobserved = True
            return []

        def call(table: np.ndarray, step: np.ndarray, counts: np.ndarray, samples: np.ndarray) -> np.ndarray:
            if self.listeners:
                self._notify_listeners(
                    self._report(table, int(step), counts.tolist(), self.reduction, int(samples))
                )
            return np.zeros(0)

        with tf.control_dependencies([op for op in kept if op is not None]):
            assert self._counts is not None
            counted = [self._counts.read_value(), self._samples_now().read_value()]
            told = tf.numpy_function(call, [table, self._of(2).read_value(), *counted], tf.float64)
        return [told.op]

    def _notify_listeners(self, report: StepReport | None) -> None:
        # One that began to listen in the middle of a step is told from the next one on.
        if report is not None and report.ranks.gathered:
            for listener in list(self.listeners):
                listener(report)

    def try_finish_steps(
        self, table: tf.Tensor, step: tf.Tensor, steps: tf.Tensor, travel: Callable[[int], CommStats]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Judge so many local steps that end with `step`, and let the terms see them; do not keep them.

        Returns:
            whether they are sound (else :func:`raise_kept_error` raises what is wrong), and what to keep.
        """

        def finish(
            table: np.ndarray, step: int, steps: int, travel: Callable[[int], CommStats]
        ) -> np.ndarray:
            try:
                return np.concatenate([[1.0], self._finish(table, step, steps, travel)])
            except Exception as error:
                _errors[:] = [error]
                return np.zeros(1 + len(self._terms_state()))

        found = self._call_in_graph(finish, table, step, steps, travel, 1)
        return found[0] > 0, found[1:]

    def _finish(
        self, table: np.ndarray, step: int, steps: int, travel: Callable[[int], CommStats]
    ) -> np.ndarray | None:
        """Judge `steps` steps that end with `step`, and let the terms see them.

        Returns:
            what becomes of their state; None without terms.
        """
        self._check(table, step)
        if not self.controller.terms:
            return None
        if self.nonfinite == "skip" and (table[:, NONFINITE_COLUMNS] > 0).any():
            return self._terms_state()  # a step that terms do not see
        self.controller.on_step_end(step, table, travel(steps), self.reduction)
        return self._terms_state()

    def _call_in_graph(
        self,
        finish: Callable[..., Any],
        table: tf.Tensor,
        step: tf.Tensor,
        steps: Any,
        travel: Callable[[int], CommStats],
        more: int = 0,
    ) -> tf.Tensor:
        """Return what `finish` gives when the graph runs: the state, and `more` numbers before it."""

        def call(table: np.ndarray, step: np.ndarray, steps: np.ndarray) -> Any:
            return keep_error(lambda: finish(table, int(step), int(steps), travel))

        out = tf.numpy_function(call, [table, step, steps], tf.float64)
        return tf.ensure_shape(out, (more + len(self._terms_state()),))

    def _check_in_graph(self, table: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        def judged(table: Any, step: Any) -> bool:
            keep_error(lambda: self._check(table.numpy(), int(step)))
            return True

        return tf.ensure_shape(tf.py_function(judged, [table, step], tf.bool), ())

    def report(self, reduction: str) -> StepReport | None:
        """Return the last step's report; None before the first. Eager only."""
        if self._variables is None or not int(self._of(2)):
            return None
        counts = [] if self._counts is None else self._counts.numpy().tolist()
        return self._report(
            self._of(1).numpy(), int(self._of(2)), counts, reduction, int(self._samples_now())
        )

    def _report(
        self, table: np.ndarray, step: int, counts: list[int], reduction: str, samples: int
    ) -> StepReport:
        return StepReport.of(
            step,
            self._ledgers(table),
            reduction,
            self.choices,
            self.controller.reports(),
            nonfinite=self.nonfinite,
            skipped=counts[0] if self.nonfinite == "skip" and counts else 0,
            dropped=counts if self.nonfinite == "drop" else (),
            samples=samples,
            interest=self._interest,
            losses=self.losses(),
        )


def keep_error(call: Callable[[], Any]) -> Any:
    """Call; keep what it raises for those who own the graph."""
    try:
        return call()
    except Exception as error:
        _errors[:] = [error]
        raise


def raise_kept_error() -> tf.Tensor:
    """Raise, when the graph runs, what :meth:`StepState.try_finish_steps` found."""

    def again() -> bool:
        raise _errors[-1]

    return tf.ensure_shape(tf.numpy_function(again, [], tf.bool), ())
