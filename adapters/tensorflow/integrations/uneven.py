"""Loops over data of which ranks have different amounts, and nobody knows how much."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

import tensorflow as tf
from hvdloss.data.uneven import Uneven
from hvdloss.errors import ConfigError
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.ops import communicator_of
from hvdloss.tensorflow.step import StepState
from hvdloss.terms.policies.period import period_of

__all__ = ["uneven"]

Batch = TypeVar("Batch")


class _Signals:
    """What ranks tell each other in the ledgers of an objective's steps."""

    def __init__(self, step_state: StepState, passes: int) -> None:
        self.step_state, self.passes = step_state, passes
        self.send_status = step_state.tell

    @property
    def patience(self) -> int:
        return self.passes * period_of(self.step_state.controller)

    @property
    def sync_status(self) -> tuple[int, bool]:
        return self.step_state.sync_status


def _array(value: Any) -> tuple[str, list[int]] | None:
    if isinstance(value, tf.Tensor):
        return f"tf.{value.dtype.name}", list(value.shape)
    if isinstance(value, np.ndarray):
        return value.dtype.str, list(value.shape)
    return None


def _zero(value: Any) -> Any:
    return None if _array(value) is None else value[:0] if len(value.shape) else value


def _make(kind: str, shape: list[int]) -> Any:
    name = kind.removeprefix("tf.")
    return tf.zeros(shape, name) if name != kind else np.zeros(shape, kind)


def uneven(batches: Iterable[Batch], steps: Any) -> Uneven[Batch]:
    """Give this rank's batches, and then batches without rows until every rank is through.

    Ranks may have any number of batches, known or not, also none. All make the same number of steps, each
    of which is exact for the samples there are::

        for x, y in hvd.uneven(dataset, objective):
            train_step(x, y)  # a tf.function or not

    Whether a rank has more is told in the ledgers of the steps, for which it reads one batch ahead. With
    accumulation and local steps the loop ends with the step, or exchange, after which no rank has more. If a
    rank's batches raise, in the next step every rank raises the same error (inside a ``tf.function`` as
    TensorFlow's own with that text), and nothing is updated. ``model.fit`` needs none of it: ranks that run
    out stay in step by themselves.

    Args:
        batches: a ``tf.data.Dataset``, or any iterable of tensors or arrays in tuples, lists, dicts.
        steps: the :class:`Objective` of the loop's ``DistributedGradientTape``, or the optimizer from
            :func:`DistributedOptimizer`.

    Returns:
        An iterable; with ``state_dict()`` and ``load_state_dict(state)`` if `batches` has them: the position
        in which the batch given last is used, and the one read ahead is not.

    Raises:
        ConfigError: an argument that cannot be used.
        DataError: a rank could not read a file, on every rank.
        RankError: a rank's batches raised something else, on every rank.
        UsageError: no step is made in the loop.

    Collectives: none per step. When it is first iterated over, two small gathers.
    """
    from hvdloss.tensorflow.objective import Objective

    inner = getattr(steps, "inner_optimizer", steps)
    engine = getattr(inner, "_hvd", None)
    if isinstance(steps, Objective):
        step_state, passes = steps.step_state, 1
    elif engine is not None and hasattr(engine, "step_state"):
        step_state, passes = engine.step_state, inner.gradient_accumulation_steps or 1
    else:
        raise ConfigError(
            f"steps={type(steps).__name__} is neither an hvdloss.tensorflow.Objective nor an optimizer from "
            f"hvdloss's DistributedOptimizer, in whose steps ranks tell whether they have more"
        )
    return Uneven(
        batches,
        _Signals(step_state, passes),
        lambda: communicator_of(
            step_state.process_set or getattr(steps, "process_set", None) or hvd.global_process_set
        ),
        array=_array,
        zero=_zero,
        make=_make,
    )
