"""The exact distributed optimizer for loops over TensorFlow variables."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from hvdloss.comm.communicator import included
from hvdloss.errors import ConfigError
from hvdloss.report import StepReport
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.objective import Objective
from hvdloss.tensorflow.reducer import GradientReducer, check_options, check_policies, check_skips

__all__ = ["DistributedOptimizer"]


class _ExactV1(tf.compat.v1.train.Optimizer):
    """A ``tf.compat.v1`` optimizer whose ``compute_gradients`` gives those of all ranks' elements."""

    def __init__(self, optimizer: Any, objective: Objective, reducer: GradientReducer) -> None:
        super().__init__(use_locking=False, name=f"Distributed{type(optimizer).__name__}")
        self._optimizer, self._objective, self._reducer = optimizer, objective, reducer

    @property
    def last_step(self) -> StepReport | None:
        """The report of the last reduced step, equal on all ranks; None before the first."""
        return self._objective.last_step

    def compute_gradients(self, *args: Any, **kwargs: Any) -> list[tuple[Any, Any]]:
        """Return (gradient, variable) pairs, reduced. See the plain optimizer's method."""
        step_state = self._objective.step_state
        step_state.clear()
        pairs = self._optimizer.compute_gradients(*args, **kwargs)
        row = step_state.with_factor(step_state.pop_row())
        if not included(hvd, self._reducer.process_set):
            return pairs
        row = step_state.with_flags(row)
        self._reducer.check_consistency(
            [v for _, v in pairs], self._objective.settings(), [g for g, _ in pairs]
        )
        there = [(g, v) for g, v in pairs if g is not None]
        reduced, _ = self._reducer.reduce(
            [g for g, _ in there],
            [v for _, v in there],
            row,
            compress=step_state.compress,
            judged=lambda table: step_state.finish_step(table, self._reducer.travel(step_state.compressing)),
            nonfinite=step_state.nonfinite,
            look=~step_state.scaled,
        )
        step_state.choices = self._reducer.choices
        done = iter(reduced)
        return [(g if g is None else next(done), v) for g, v in pairs]

    def apply_gradients(self, *args: Any, **kwargs: Any) -> Any:
        """Call the plain optimizer's method."""
        return self._optimizer.apply_gradients(*args, **kwargs)

    def get_slot(self, *args: Any, **kwargs: Any) -> Any:
        """Call the plain optimizer's method."""
        return self._optimizer.get_slot(*args, **kwargs)

    def get_slot_names(self, *args: Any, **kwargs: Any) -> Any:
        """Call the plain optimizer's method."""
        return self._optimizer.get_slot_names(*args, **kwargs)

    def variables(self, *args: Any, **kwargs: Any) -> Any:
        """Call the plain optimizer's method."""
        return self._optimizer.variables(*args, **kwargs)


def DistributedOptimizer(
    optimizer: Any,
    objective: Any = None,
    *,
    name: str | None = None,
    use_locking: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = hvd.Compression.none,
    sparse_as_dense: bool = False,
    backward_passes_per_step: int = 1,
    op: Any = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    average_aggregated_gradients: bool = True,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = None,
    scale_local_gradients: bool = True,
    bucket_cap_mb: float | None = None,
) -> Any:
    """Make an optimizer use the gradient of all ranks' elements.

    Use it with a plain ``tf.GradientTape``: the reduction happens in ``apply_gradients`` (an optimizer of
    Keras, over ``tf.Variable`` or Keras variables) or in ``compute_gradients`` (``tf.compat.v1``). With
    :func:`hvdloss.tensorflow.DistributedGradientTape` use a plain optimizer instead.

    Args:
        optimizer: an optimizer of Keras, which becomes distributed itself (see
            :func:`hvdloss.keras.DistributedOptimizer`), or of ``tf.compat.v1.train``.
        objective: the :class:`Objective` whose loss is differentiated; without one every rank weighs the
            same.
        backward_passes_per_step: with an optimizer of Keras, add up so many calls of
            ``apply_gradients`` before ranks exchange and the update is made; passes are weighted by
            what they held.
        use_locking: accepted for Horovod's sake.
        name, device_dense, device_sparse, compression, sparse_as_dense, op, gradient_predivide_factor,
        average_aggregated_gradients, num_groups, groups, process_set, scale_local_gradients,
        bucket_cap_mb: see
            :func:`hvdloss.keras.DistributedOptimizer`.

    Raises:
        ConfigError: an argument that cannot be used.
    """
    if groups is None and num_groups:
        groups = num_groups
    options = {
        "name": name,
        "device_dense": device_dense,
        "device_sparse": device_sparse,
        "compression": compression,
        "sparse_as_dense": sparse_as_dense,
        "backward_passes_per_step": backward_passes_per_step,
        "op": op,
        "gradient_predivide_factor": gradient_predivide_factor,
        "average_aggregated_gradients": average_aggregated_gradients,
        "groups": groups,
        "scale_local_gradients": scale_local_gradients,
    }
    if isinstance(optimizer, tf.keras.optimizers.Optimizer):
        from hvdloss.keras import DistributedOptimizer as KerasOptimizer

        return KerasOptimizer(
            optimizer, objective, process_set=process_set, bucket_cap_mb=bucket_cap_mb, **options
        )
    if not isinstance(optimizer, tf.compat.v1.train.Optimizer):
        raise ConfigError(
            f"optimizer={optimizer!r} is neither an optimizer of Keras nor of tf.compat.v1.train"
        )
    if objective is None:
        return hvd.DistributedOptimizer(
            optimizer, use_locking=use_locking, process_set=process_set or hvd.global_process_set, **options
        )
    if not isinstance(objective, Objective):
        raise ConfigError(
            f"objective={objective!r} is not an hvdloss.tensorflow.Objective; wrap the loss function in one"
        )
    check_options(op, gradient_predivide_factor, groups)
    check_policies(
        objective.controller, compression, "optimizers of tf.compat.v1.train cannot take local steps"
    )
    check_skips(objective.nonfinite, "an optimizer of tf.compat.v1.train")
    if backward_passes_per_step != 1:
        raise ConfigError(
            f"backward_passes_per_step={backward_passes_per_step!r}: optimizers of tf.compat.v1.train cannot "
            f"accumulate; use an optimizer of Keras"
        )
    ours = objective.process_set
    if process_set is not None and ours is not None and process_set is not ours:
        raise ConfigError("objective and optimizer were given different process sets")
    objective.process_set = process_set or ours
    objective.step_state.owned = True
    objective.step_state.process_set = objective.process_set or hvd.global_process_set
    reducer = GradientReducer(
        f"hvdloss.v1.{name or type(optimizer).__name__}",
        process_set=objective.process_set,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        predivide=gradient_predivide_factor,
        groups=groups,
        device_dense=device_dense,
        device_sparse=device_sparse,
        bucket_cap_mb=bucket_cap_mb,
    )
    return _ExactV1(optimizer, objective, reducer)
