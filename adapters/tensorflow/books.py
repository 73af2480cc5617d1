"""The books of a step: what backward passes told of themselves, and what all ranks' ledgers came to.

They are TensorFlow variables, so that they are the same in eager code, in a ``tf.function``, and where
one function calls another; Python state would see only the tracing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from hvdloss.errors import HvdlossError
from hvdloss.ledger import FAULTS, WIDTH, judge, unpack
from hvdloss.reduction import MEASURED
from hvdloss.report import StepReport

__all__ = ["Books", "fault"]

# What crossed a graph as a TensorFlow error, so that those who own the call can raise the real one.
_faults: list[HvdlossError] = []


def fault() -> HvdlossError | None:
    """Return the last error that was raised inside a ``tf.function``, and forget it.

    TensorFlow turns every exception inside a function into one of its own, with our message in its text.
    """
    found = _faults[-1] if _faults else None
    _faults.clear()
    return found


def _raise_judgement(table: tf.Tensor, step: tf.Tensor) -> None:
    error = judge(unpack(table.numpy()), int(step))
    if error is not None:
        _faults[:] = [error]
        raise error


class Books:
    """The open ledger row of the passes since the last step, and the table of the last step.

    Created without side effects; its variables come into being with their first use, outside any graph.
    """

    def __init__(self) -> None:
        self._variables: tuple[tf.Variable, tf.Variable, tf.Variable] | None = None
        self.choices: dict[str, Any] = {}  # of how gradients travel, for the report

    def _of(self, which: int) -> tf.Variable:
        if self._variables is None:
            with tf.init_scope(), tf.device("CPU:0"):
                self._variables = (
                    # The sums of the rows since the last step, and of their squared denominators.
                    tf.Variable(tf.zeros(MEASURED + 1, tf.float64), trainable=False, name="hvdloss_row"),
                    tf.Variable(
                        tf.zeros((0, WIDTH), tf.float64),
                        trainable=False,
                        shape=(None, WIDTH),
                        name="hvdloss_table",
                    ),
                    tf.Variable(0, trainable=False, dtype=tf.int64, name="hvdloss_step"),
                )
        return self._variables[which]

    def announced(self, loss: tf.Tensor, row: tf.Tensor | Callable[[], tf.Tensor]) -> tf.Tensor:
        """Return `loss`; a backward pass through it enters `row` (``MEASURED`` float64 sums).

        A function is called for the row in the backward pass.
        """

        @tf.custom_gradient
        def through(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            def grad(upstream: tf.Tensor) -> tf.Tensor:
                # Tied to the gradient, since the backward half of an inner function keeps nothing else.
                with tf.control_dependencies([self.enter(row() if callable(row) else row)]):
                    return tf.identity(upstream)

            return tf.identity(x), grad

        self._of(0)  # exists before any function is traced
        return through(loss)

    def enter(self, row: tf.Tensor) -> tf.Tensor:
        """Add the row of one backward pass; in a graph, return what does it."""
        return self._of(0).assign_add(tf.concat([row, row[1:2] ** 2], 0))

    def forget(self) -> None:
        """Drop what was entered since the last step."""
        self._of(0).assign(tf.zeros(MEASURED + 1, tf.float64))

    def take(self, lenient: bool = False) -> tf.Tensor:
        """Return the ledger row (``WIDTH`` float64) of the passes entered, and start a new one.

        Several calls of the objective within one backward pass count as one if their denominators are
        equal. Otherwise, or without any, the row tells of a stray pass; `lenient` turns a row without
        any pass into one that weighs the same on every rank.
        """
        book = self._of(0).read_value()
        self.forget()
        calls = book[4]
        n = tf.maximum(calls, 1.0)
        apart = calls * book[MEASURED] - book[1] ** 2 > 1e-9 * book[1] ** 2
        silent = tf.equal(calls, 0.0)
        one, zero = tf.ones((), tf.float64), tf.zeros((), tf.float64)
        stray = tf.where(apart if lenient else apart | silent, one, zero)
        denominator = tf.where(silent, one, book[1] / n) if lenient else book[1] / n
        passes = one if lenient else tf.minimum(calls, 1.0)
        return tf.stack(
            [book[0], denominator, book[2] / n, book[3] / n, passes, book[5], book[6], book[7], stray, zero]
        )

    def close(self, table: tf.Tensor, *, check: bool = True) -> list[tf.Operation]:
        """Judge a step from all ranks' ledgers ``(size, WIDTH)``, and keep it as the last one.

        Eagerly, raises the step's error. In a graph, returns the operations that must come before any
        use of the step's gradients; they fail with the same error's text.
        """
        step = self._of(2)
        after: list[tf.Operation] = []
        if tf.executing_eagerly():
            if check:
                _raise_judgement(table, step + 1)
        elif check:
            bad = tf.reduce_any(table[:, FAULTS] > 0) | tf.equal(tf.reduce_sum(table[:, 1]), 0.0)
            done = tf.cond(
                bad,
                lambda: _raising(table, step + 1),
                lambda: tf.constant(True),
            )
            after.append(done.op)
        with tf.control_dependencies(after):
            kept = [step.assign_add(1, read_value=False), self._of(1).assign(table, read_value=False)]
        return after if tf.executing_eagerly() else [*after, *(op for op in kept if op is not None)]

    def report(self, reduction: str) -> StepReport | None:
        """Return the last step's report; None before the first. Eager only."""
        if self._variables is None or not int(self._of(2)):
            return None
        return StepReport.of(int(self._of(2)), unpack(self._of(1).numpy()), reduction, self.choices)


def _raising(table: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
    def judged(table: Any, step: Any) -> bool:
        _raise_judgement(table, step)
        return True

    return tf.ensure_shape(tf.py_function(judged, [table, step], tf.bool), ())
