"""The exact distributed tape: gradients of all ranks weighted by what each rank saw."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import keras

import tensorflow as tf
from hvdloss.comm.communicator import included
from hvdloss.comm.tuning import choose
from hvdloss.errors import ConfigError
from hvdloss.report import StepReport
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.objective import Objective
from hvdloss.tensorflow.reducer import GradientReducer, check_options, check_policies, check_skips, scale_grad
from hvdloss.tensorflow.several import Objectives
from hvdloss.tensorflow.step import with_failure

__all__ = ["DistributedGradientTape", "PartialDistributedGradientTape"]

# Tapes come and go with every step; how their gradients travel is kept, since it holds traced functions.
_reducers: dict[Any, GradientReducer] = {}
# In one graph, tapes are told apart on the wire by their order.
_order: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _reducer(name: str, process_set: Any, compression: Any, groups: Any, **options: Any) -> GradientReducer:
    hashable = (
        groups
        if groups is None or isinstance(groups, int)
        else tuple(tuple(id(v) for v in group) for group in groups)
    )
    # Not by the set's number, which another one gets when it is removed; the reducer keeps the set itself.
    key = (name, id(process_set), compression, hashable, *sorted(options.items()))
    if key not in _reducers:
        _reducers[key] = GradientReducer(
            name, process_set=process_set, compression=compression, groups=groups, **options
        )
    return _reducers[key]


class _Exact:
    """The methods that make a gradient tape exact; :func:`DistributedGradientTape` mixes them in."""

    _hvd_objective: Objective | Objectives
    _hvd_options: dict[str, Any]
    _hvd_local: set[int]
    _hvd_scale_local: bool

    def register_local_source(self, source: Any) -> None:
        """Have `source` keep this rank's own gradient, scaled (see ``scale_local_gradients``)."""
        self._hvd_local.add(id(source))

    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        unconnected_gradients: Any = tf.UnconnectedGradients.NONE,
        use_generic_names: bool = False,
    ) -> Any:
        """Return the gradient that one process would have that saw all ranks' elements.

        Args:
            target: a scalar that comes from the objective; penalties may have been added.
            sources: variables or tensors, in any nested structure; equal on all ranks.
            output_gradients, unconnected_gradients: as in TensorFlow.
            use_generic_names: accepted for Horovod's sake; names never depend on tensors here.

        Returns:
            gradients in the structure of `sources`: dense, ``tf.IndexedSlices``, or None.

        Raises:
            AgreementError: sources or settings that differ between ranks, in the first step with them.
            WeightError, NoWeightError, NonFiniteLossError, NonFiniteGradientError, UsageError: the same on
                every rank. Inside a ``tf.function`` TensorFlow raises an error of its own with the same
                text. Gradients of a loss that was multiplied (by a ``LossScaleOptimizer``) may be infinite:
                that optimizer looks at them.

        Collectives: see :meth:`hvdloss.tensorflow.reducer.GradientReducer.reduce`; in the first step with
        these sources one gather, which compares them and the settings of all ranks.
        """
        step_state = self._hvd_objective.step_state
        process_set = self._hvd_options["process_set"]
        step_state.clear()
        backward = super(type(self), self).gradient  # type: ignore[misc]
        keep: Callable[[], list[Any]] = list
        row: Any = None

        def plain() -> Any:
            return backward(target, sources, output_gradients, unconnected_gradients)

        def weighed() -> Any:
            nonlocal keep, row
            gradients, row, keep = self._hvd_objective.backward(plain)
            return gradients

        several = isinstance(self._hvd_objective, Objectives)
        gradients, others = step_state.watch_others(weighed if several else plain)
        row = row if several else step_state.with_factor(step_state.pop_row())
        if not included(hvd, process_set):
            return gradients
        row = with_failure(step_state.with_flags(row), others)
        flat_sources = tf.nest.flatten(sources)
        flat = tf.nest.flatten(gradients)
        local = [id(source) in self._hvd_local for source in flat_sources]
        there = [i for i, g in enumerate(flat) if g is not None and not local[i]]
        reducer = self._hvd_reducer()
        shared = [i for i, own in enumerate(local) if not own]
        reducer.check_consistency(
            [flat_sources[i] for i in shared], self._hvd_objective.settings(), [flat[i] for i in shared]
        )
        reduced, table = reducer.reduce(
            [flat[i] for i in there],
            [flat_sources[i] for i in there],
            row,
            compress=step_state.compress,
            judged=lambda table: step_state.finish_step(table, reducer.travel(step_state.compressing), keep),
            nonfinite=step_state.nonfinite,
            look=~step_state.scaled,
            local=[g for i, g in enumerate(flat) if g is not None and local[i]],
            rows=bool(step_state.controller.terms),
        )
        step_state.choices = reducer.choices
        if self._hvd_scale_local:
            own = reducer.own(table, row)[1]  # nothing, of a rank that was dropped
            share = tf.math.divide_no_nan(own, tf.reduce_sum(table[:, 1]))
            for i, g in enumerate(flat):
                if g is not None and local[i]:
                    flat[i] = scale_grad(g, share)
        for i, g in zip(there, reduced, strict=True):
            flat[i] = g
        return tf.nest.pack_sequence_as(gradients, flat)

    def get_local_and_global_gradients(
        self, target: Any, sources: Any, output_gradients: Any = None, use_generic_names: bool = False
    ) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
        """Return (source, gradient) pairs of registered local sources, and of the others."""
        flat = tf.nest.flatten(sources)
        pairs = list(
            zip(flat, tf.nest.flatten(self.gradient(target, sources, output_gradients)), strict=True)
        )
        return (
            [p for p in pairs if id(p[0]) in self._hvd_local],
            [p for p in pairs if id(p[0]) not in self._hvd_local],
        )

    @property
    def last_step(self) -> StepReport | None:
        """The report of the last reduced step of the tape's objective; None before the first."""
        return self._hvd_objective.last_step

    def _hvd_reducer(self) -> GradientReducer:
        number = 0
        if not tf.executing_eagerly():
            graph = tf.compat.v1.get_default_graph()
            number = next(_order.setdefault(graph, itertools.count()))
        return _reducer(f"hvdloss.tape{number}", **self._hvd_options)


def _raw(source: Any) -> Any:
    """Return the TensorFlow variable of a variable of Keras 3; anything else as it is."""
    return getattr(source, "value", source) if isinstance(source, keras.Variable) else source


def _taking_keras_variables(tape: tf.GradientTape) -> tf.GradientTape:
    """Let Horovod's tape, which knows ``tf.Variable`` only, take variables of Keras 3 as well."""
    for name, place in (("gradient", 1), ("register_local_source", 0)):
        plain = getattr(tape, name, None)

        def method(*args: Any, plain: Any = plain, place: int = place, **kwargs: Any) -> Any:
            arguments = list(args)
            if len(arguments) > place:
                arguments[place] = tf.nest.map_structure(_raw, arguments[place])
            elif "sources" in kwargs:
                kwargs["sources"] = tf.nest.map_structure(_raw, kwargs["sources"])
            return plain(*arguments, **kwargs)

        if plain is not None:
            setattr(tape, name, method)
    return tape


def DistributedGradientTape(
    gradtape: tf.GradientTape,
    objective: Objective | Objectives | None = None,
    *,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = hvd.Compression.none,
    sparse_as_dense: bool = False,
    op: Any = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = None,
    scale_local_gradients: bool = True,
    bucket_cap_mb: float | None = None,
) -> tf.GradientTape:
    """Wrap a gradient tape so that ``gradient`` gives the gradient of all ranks' elements.

    With an `objective`, whose loss the target must come from, the gradient is exactly that of one
    process that saw every element: each rank is weighted by what it held. Ranks may have different
    batch sizes, or none. Without an objective this is ``horovod.tensorflow.DistributedGradientTape``.

    Args:
        gradtape: any ``tf.GradientTape``, persistent or not, used or not yet used.
        objective: an :class:`Objective`, or :class:`Objectives` for the sum of several losses, or None.
        device_dense, device_sparse: where collectives run.
        compression: ``Compression.none`` or ``fp16``: what travels, not what is computed.
        sparse_as_dense: reduce sparse gradients as dense ones.
        op: with an objective only ``Average``: the objective says how to combine.
        gradient_predivide_factor: shifts the range of what travels, as in Horovod.
        num_groups: Horovod's old name for an integer `groups`.
        groups: a number of messages to aim at, or lists of variables that must share one.
        process_set: the ranks that share the step; None for the objective's, or all.
        scale_local_gradients: scale gradients of local sources to this rank's share of the step.
        bucket_cap_mb: with an objective, the size of a message of several gradients in MiB; None for what
            ``HVDLOSS_BUCKET_CAP_MB`` says, or 25.

    Returns:
        A tape of a subclass of `gradtape`'s class, with ``last_step`` (a :class:`hvdloss.StepReport`).

    Raises:
        ConfigError: an argument that cannot be used; an objective with
            :class:`hvdloss.terms.policies.SyncPeriod`, since a tape knows no parameters to average, or with
            ``nonfinite="skip"``, since a tape makes no update that it could leave out.

    Collectives: none; see the tape's ``gradient``.
    """
    if groups is None and num_groups:
        groups = num_groups
    if objective is None:
        theirs = hvd.DistributedGradientTape(
            gradtape,
            device_dense=device_dense,
            device_sparse=device_sparse,
            compression=compression,
            sparse_as_dense=sparse_as_dense,
            op=op,
            gradient_predivide_factor=gradient_predivide_factor,
            groups=groups,
            process_set=process_set or hvd.global_process_set,
            scale_local_gradients=scale_local_gradients,
        )
        return _taking_keras_variables(theirs)
    if not isinstance(objective, Objective | Objectives):
        raise ConfigError(
            f"objective={objective!r} is not an hvdloss.tensorflow.Objective; wrap the loss function in one"
        )
    if not isinstance(gradtape, tf.GradientTape):
        raise ConfigError(f"gradtape={gradtape!r} is not a tf.GradientTape")
    if hasattr(gradtape, "_hvd_objective"):
        raise ConfigError("gradtape is already wrapped by hvdloss.tensorflow.DistributedGradientTape")
    check_options(op, gradient_predivide_factor, groups)
    check_policies(objective.controller, compression, "a gradient tape has no parameters to average")
    check_skips(objective.nonfinite, "a gradient tape")
    choose(bucket_cap_mb=bucket_cap_mb)
    ours = objective.process_set
    if process_set is not None and ours is not None and process_set is not ours:
        raise ConfigError("objective and tape were given different process sets")
    objective.process_set = process_set or ours

    base = type(gradtape)
    members = {
        k: v for k, v in vars(_Exact).items() if k not in ("__dict__", "__weakref__", "__annotations__")
    }
    cls = type(base.__name__, (base,), members)
    tape = cls.__new__(cls)
    tape.__dict__.update(gradtape.__dict__)
    tape._hvd_objective = objective
    tape._hvd_options = {
        "process_set": objective.process_set or hvd.global_process_set,
        "compression": compression,
        "sparse_as_dense": sparse_as_dense,
        "predivide": gradient_predivide_factor,
        "groups": groups,
        "device_dense": device_dense,
        "device_sparse": device_sparse,
        "bucket_cap_mb": bucket_cap_mb,
    }
    objective.step_state.owned = True
    objective.step_state.process_set = tape._hvd_options["process_set"]
    tape._hvd_local = set()
    tape._hvd_scale_local = scale_local_gradients
    return tape


def PartialDistributedGradientTape(
    gradtape: tf.GradientTape, objective: Objective | None = None, *, local_layers: Any = None, **options: Any
) -> tf.GradientTape:
    """Like :func:`DistributedGradientTape`, but layers in `local_layers` keep this rank's gradients.

    Args:
        gradtape, objective, options: see :func:`DistributedGradientTape`.
        local_layers: a Keras layer or a list of them.

    Raises:
        ConfigError: an argument that cannot be used.
    """
    layers = local_layers if isinstance(local_layers, (list, tuple)) else [local_layers]
    tape = DistributedGradientTape(gradtape, objective, **options)
    for layer in layers:
        if layer is not None:
            if not hasattr(layer, "trainable_weights"):
                raise ConfigError(f"local_layers={local_layers!r} must hold Keras layers")
            for variable in layer.trainable_weights:
                tape.register_local_source(variable)
    return tape
