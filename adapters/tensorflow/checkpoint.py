"""Checkpoints of a training run in TensorFlow and Keras: see :mod:`hvdloss.train.checkpoint`."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import tensorflow as tf
from hvdloss.comm.communicator import communicator_for
from hvdloss.errors import CheckpointError, ConfigError
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.ops import communicator_of
from hvdloss.train import checkpoint as core
from hvdloss.train.checkpoint import StateDict

__all__ = [
    "Checkpoint",
    "from_array",
    "load_state_dict_of",
    "settle",
    "state_dict_of",
    "step_state_of",
    "to_array",
]


def to_array(value: Any) -> Any:
    """Return a tensor's or variable's dtype and values; as bytes where NumPy does not know the dtype."""
    if isinstance(value, keras.Variable):
        value = value.value
    if not isinstance(value, tf.Tensor | tf.Variable):
        return None
    array = value.numpy()
    if array.dtype.kind in "fiub":
        return f"tf.{value.dtype.name}", array
    if array.dtype.kind not in "cV":
        return None
    # The last axis is of each number's bytes.
    shape = (*array.shape, array.dtype.itemsize)
    return f"tf.{value.dtype.name}", np.frombuffer(array.tobytes(), np.uint8).reshape(shape)


def from_array(kind: str, array: np.ndarray) -> tf.Tensor:
    """Return the tensor of :func:`to_array`.

    Raises:
        CheckpointError: an array of another framework.
    """
    try:
        if not kind.startswith("tf."):
            raise TypeError
        dtype = tf.as_dtype(kind.removeprefix("tf.")).as_numpy_dtype
        if array.dtype != dtype:
            array = np.frombuffer(array.tobytes(), dtype).reshape(array.shape[:-1])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"an array of kind {kind!r:.100} is no tensor of TensorFlow: {error}"
        ) from error
    return tf.constant(array)


# -- the state of objectives --------------------------------------------------------------------------------


def _step_and_local_steps(value: Any) -> tuple[Any, Any]:
    """Return the step's state of an optimizer or objective, and its local steps; None for neither."""
    inner = getattr(value, "inner_optimizer", value)
    engine = getattr(inner, "_hvd", None)
    if engine is not None and hasattr(engine, "step_state"):
        return engine.step_state, engine.local_steps
    exact = getattr(value, "_exact", value)  # of Keras's objective
    step_state = getattr(exact, "step_state", None)
    return (step_state, None) if hasattr(step_state, "controller") else (None, None)


def step_state_of(value: Any) -> Any:
    """Return the step's state of an optimizer or an objective; None for anything else."""
    return _step_and_local_steps(value)[0]


def state_dict_of(value: Any) -> Any:
    """Return the state of an optimizer's or objective's steps; None for anything else."""
    step_state, local_steps = _step_and_local_steps(value)
    if step_state is None:
        return None
    built = local_steps is not None and local_steps.built
    return {**step_state.state_dict(), "velocity": [v.numpy() for v in local_steps.velocity] if built else []}


def load_state_dict_of(value: Any, state: Any, *, same_ranks: bool) -> None:
    """Go on from a :func:`state_dict_of`; no collective.

    Raises:
        ConfigError: it is none.
    """
    step_state, local_steps = _step_and_local_steps(value)
    if not isinstance(state, dict) or "velocity" not in state:
        raise ConfigError(f"state={str(state)[:200]} is not of a DistributedOptimizer or an Objective")
    step_state.load_state_dict(state, same_ranks=same_ranks)
    if local_steps is not None and state["velocity"]:
        local_steps.build(getattr(value, "inner_optimizer", value))
        for variable, told in zip(local_steps.velocity, state["velocity"], strict=True):
            variable.assign(told)
    if local_steps is not None and local_steps.built:
        local_steps.forget()


def settle(value: Any) -> None:
    """Make the ranks' parameters equal, after local steps."""
    _, local_steps = _step_and_local_steps(value)
    if local_steps is not None:
        local_steps.sync_parameters()


# -- parts ------------------------------------------------------------------------------------------------


class _Variables:
    """Variables by name."""

    def __init__(self, value: Any, name: str, variables: Sequence[Any]) -> None:
        self.value, self.name, self._variables = value, name, variables

    def variables(self) -> dict[str, Any]:
        """Return them."""
        # Keras numbers names by how many of a kind were made before, in this process.
        names = [
            re.sub(r"_\d+(?=[_/:]|$)", "", str(getattr(v, "path", None) or v.name)) for v in self._variables
        ]
        return {f"{i}.{name}": v for i, (name, v) in enumerate(zip(names, self._variables, strict=True))}

    def state(self) -> Any:
        """Return their values."""
        return self.variables()

    def load(self, state: Any) -> None:
        """Assign values, none of them if one does not fit."""
        mine = self.variables()
        if not isinstance(state, dict) or list(state) != list(mine):
            there = list(state) if isinstance(state, dict) else []
            apart = next((k for k in [*mine, *there] if (k in mine) != (k in there)), "their order")
            raise CheckpointError(
                f"{len(there)} variables were saved, {self.name} has {len(mine)}; the first difference is "
                f"{apart!r:.200}. Build the same model under the same names"
            )
        for key, variable in mine.items():
            shape = tuple(state[key].shape)
            if shape != tuple(variable.shape):
                raise CheckpointError(f"{key} was saved with shape {shape}, but has {tuple(variable.shape)}")
        for key, variable in mine.items():
            variable.assign(state[key])


class _Model(_Variables):
    def __init__(self, value: Any, name: str) -> None:
        for layer in value._flatten_layers():
            at = getattr(layer, "shards", None)
            if at is not None and at.ranks > 1:
                raise ConfigError(
                    f"{name}.{layer.name} lies on {at.ranks} ranks, and so does what its optimizer "
                    f"remembers; save hvd.full_weights({name}) with BestCheckpoint instead"
                )
        super().__init__(value, name, ())

    def variables(self) -> dict[str, Any]:
        if not self.value.built:
            raise ConfigError(
                f"{self.name} is not built: call {self.name}.build(input_shape), or give it an Input"
            )
        self._variables = self.value.weights
        return super().variables()


class _Optimizer(_Variables):
    """An optimizer of Keras, with the state of its steps."""

    def before_save(self) -> None:
        """Make parameters equal, after local steps."""
        settle(self.value)

    def state(self) -> Any:
        if not self.value.built:
            raise ConfigError(f"{self.name} is not built: call {self.name}.build(model.trainable_variables)")
        self._variables = self.value.variables
        return {"variables": super().state(), "engine": state_dict_of(self.value)}

    def load(self, state: Any) -> None:
        if not isinstance(state, dict) or set(state) != {"variables", "engine"}:
            raise CheckpointError("what was saved was no optimizer")
        if not self.value.built:
            raise ConfigError(f"{self.name} is not built: call {self.name}.build(model.trainable_variables)")
        self._variables = self.value.variables
        super().load(state["variables"])
        if state["engine"] is not None and state_dict_of(self.value) is not None:
            load_state_dict_of(self.value, state["engine"], same_ranks=True)


class _Objective:
    """The state of an objective's terms, for loops with a tape."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state(self) -> Any:
        return state_dict_of(self.value)

    def load(self, state: Any) -> None:
        load_state_dict_of(self.value, state, same_ranks=True)


def _part(name: str, value: Any) -> Any:
    if isinstance(value, keras.Model):
        return _Model(value, name)
    if isinstance(value, keras.optimizers.Optimizer):
        return _Optimizer(value, name, ())
    if state_dict_of(value) is not None:
        return _Objective(value)
    if isinstance(value, tf.Module | keras.Layer):
        return _Variables(value, name, value.variables)
    if isinstance(value, tf.Variable | keras.Variable):
        return _Variables(value, name, [value])
    if isinstance(value, list | tuple) and all(isinstance(v, tf.Variable | keras.Variable) for v in value):
        return _Variables(value, name, value)
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return StateDict(value)
    raise ConfigError(
        f"{name}={type(value).__name__} is no model, optimizer, objective or variable, and has no "
        f"state_dict() and load_state_dict(); give plain values to checkpoint.save(step, {name}=...)"
    )


class Checkpoint(core.Checkpoint):
    """Checkpoints of a whole training run in a folder: one rank writes, whole or not at all.

    ::

        optimizer.build(model.trainable_variables)
        checkpoint = hvd.Checkpoint("run/checkpoints", model=model, optimizer=optimizer, data=dataset)
        before = checkpoint.load()  # the newest intact one, on every rank; None if there is none
        step = before.step if before else 0
        for x, y in batches:  # what is left of the epoch
            ...
            step += 1
            if step % 100 == 0:
                checkpoint.save(step, epoch=epoch)

    Models and optimizers of Keras (distributed ones with what their objective's terms measured and decided,
    and the number of steps), an :class:`Objective` in loops with a tape, variables or lists of them, data
    sets, :class:`EarlyStopping`, :class:`Metrics`: what has ``state_dict()`` and ``load_state_dict(state)``.
    A run that goes on from a checkpoint is, with as many ranks or others, the run that was not interrupted.

    Tensors are files of safetensors, all else is JSON; every file's SHA-256 is compared when it is loaded.
    Nothing is pickled.

    Args:
        path: the folder; it need only be there for the rank that writes and reads.
        keep: how many checkpoints are kept: those written last.
        root: the rank that writes and reads.
        random_numbers: save each rank's random numbers (Python's, NumPy's, TensorFlow's global generator, and
            those of the models' layers); they go on where they were if as many ranks load them.
        mode, folder_mode: of the files, and of the folder if it is made.
        process_set: the ranks; None for all.
        parts: what is saved, by name.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(
        self,
        path: Any,
        *,
        keep: int = 3,
        root: int = 0,
        random_numbers: bool = True,
        mode: int = 0o600,
        folder_mode: int = 0o700,
        process_set: Any = None,
        **parts: Any,
    ) -> None:
        self._models = [value for value in parts.values() if isinstance(value, keras.Model)]
        super().__init__(
            path,
            {name: _part(name, value) for name, value in parts.items()},
            keep=keep,
            root=root,
            random_numbers=random_numbers,
            mode=mode,
            folder_mode=folder_mode,
            communicator=functools.partial(communicator_for, hvd, communicator_of, process_set),
        )

    def to_array(self, value: Any) -> Any:
        """Return a tensor's dtype and values."""
        return to_array(value)

    def from_array(self, kind: str, array: Any) -> Any:
        """Return a tensor."""
        return from_array(kind, array)

    def _seeds(self) -> list[Any]:
        """Return the states of the models' random numbers."""
        out = []
        for model in self._models:
            shared = {id(v) for v in model.weights}
            held = {id(v) for metric in model.metrics for v in metric.variables}
            out += [v for v in model.variables if id(v) not in shared and id(v) not in held]
        return out

    def random_state(self) -> Any:
        """Return where random numbers are."""
        made = tf.random.get_global_generator()
        return {**core.random_state(), "tensorflow": made.state, "layers": list(self._seeds())}

    def set_random_state(self, state: Any) -> None:
        """Go on from there."""
        core.set_random_state(state)
        tf.random.get_global_generator().state.assign(state["tensorflow"])
        seeds = self._seeds()
        if len(seeds) == len(state["layers"]):
            for variable, value in zip(seeds, state["layers"], strict=True):
                variable.assign(value)
