"""Horovod's elastic state, for variables, what objectives decided, and data positions."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

import tensorflow as tf
from hvdloss import watch
from hvdloss.comm.launch import init_checked
from hvdloss.errors import ConfigError
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.checkpoint import from_array, load_state_dict_of, settle, state_dict_of, to_array
from hvdloss.tensorflow.ops import communicator_of
from hvdloss.train.checkpoint import state_from_bytes, state_to_bytes
from hvdloss.train.elastic import runner

__all__ = ["elastic", "watched"]

#: ``init`` and ``shutdown``, with which the watch begins and ends.
watched = watch.wrap_init(hvd, communicator_of)
watched["init"] = init_checked(hvd, **watched)

_PIECE = 1 << 27  # bytes
# What errors of Horovod's operations say, and of Gloo beneath them.
_LOST = ("Horovod", "gloo", "Connection closed by peer", "Connection reset by peer")


def _from_first(told: bytes, name: str) -> bytes:
    """Return what rank 0 tells, on every rank. Collectives: gathers, of 128 MiB at most."""
    communicator = communicator_of(hvd.global_process_set)
    if communicator.size == 1:
        return told
    mine = told if communicator.rank == 0 else b""
    size = int(communicator.all_gather_bytes(str(len(mine)).encode(), f"{name}.size")[0])
    pieces = [
        communicator.all_gather_bytes(mine[start : start + _PIECE], name)[0]
        for start in range(0, size, _PIECE)
    ]
    return b"".join(pieces)


def _values(variables: Sequence[Any]) -> list[np.ndarray]:
    return [np.array(to_array(v)[1]) for v in variables]


def _assign(variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(from_array(to_array(variable)[0], value))


def is_lost(error: Exception) -> bool:
    """Return whether an error of TensorFlow means that Horovod lost a rank."""
    return isinstance(error, tf.errors.OpError) and any(word in str(error) for word in _LOST)


def _states(base: type) -> type:
    """Return a class of states of variables, on top of Horovod's ``ObjectState`` for plain values."""

    class State(base):  # type: ignore[misc, valid-type]
        """What the states of TensorFlow and Keras share.

        Args:
            shared: variables that are the same on all ranks.
            own: variables that are each rank's own, but go back with a restore.
            optimizers: whose objectives' memory belongs to the state.
            values: objects with ``state_dict()`` and ``load_state_dict(state)``, such as data sets;
                objectives; and plain values.
        """

        def __init__(
            self, shared: Sequence[Any], own: Sequence[Any], optimizers: Sequence[Any], values: dict[str, Any]
        ) -> None:
            self._shared, self._own = list(shared), list(own)
            every = (*optimizers, *values.values())
            self._with_state = [one for one in every if state_dict_of(one) is not None]
            self._positions = {
                name: value for name, value in values.items() if hasattr(value, "load_state_dict")
            }
            plain = {}
            for name, value in values.items():
                if name in self._positions or any(value is one for one in self._with_state):
                    object.__setattr__(self, name, value)
                else:
                    plain[name] = value
            # Not state_dict(), which may ask all ranks: one that has just come is alone in being here.
            self._keep({k: getattr(v, "start_state", v.state_dict)() for k, v in self._positions.items()})
            super().__init__(bcast_object=hvd.broadcast_object, get_rank=hvd.rank, **plain)

        def _keep(self, positions: dict[str, Any]) -> None:
            self._kept = {
                "shared": _values(self._shared),
                "memories": [state_dict_of(one) for one in self._with_state],
                "positions": positions,
            }
            self._kept_own = _values(self._own)

        def save(self) -> None:
            """Keep everything as it is; all ranks commit together."""
            for one in self._with_state:
                settle(one)
            self._keep({name: value.state_dict() for name, value in self._positions.items()})
            super().save()

        def restore(self) -> None:
            """Go back to the last commit; alone, as the other ranks may be gone."""
            self._give(same_ranks=True)
            _assign(self._own, self._kept_own)
            super().restore()

        def _give(self, *, same_ranks: bool) -> None:
            _assign(self._shared, self._kept["shared"])
            for one, memory in zip(self._with_state, self._kept["memories"], strict=True):
                load_state_dict_of(one, memory, same_ranks=same_ranks)
            for name, value in self._positions.items():
                value.load_state_dict(self._kept["positions"][name])

        def sync(self) -> None:
            """Go on from rank 0's last commit. Collectives: gathers of it."""
            told = _from_first(state_to_bytes(self._kept), "hvdloss.elastic")
            self._kept = state_from_bytes(told)
            self._give(same_ranks=False)
            super().sync()

    return State


def elastic() -> Any:
    """Return what ``hvd.elastic`` shows: Horovod's, with states and a ``run`` that know hvdloss and Keras 3.

    ``hvd.elastic.TensorFlowKerasState(model, optimizer, data=dataset, epoch=0)`` and
    ``hvd.elastic.TensorFlowState(variables, data=dataset, objective=objective, step=0)`` hold variables, what
    objectives' terms decided, where data sets are, and plain values. ``commit`` keeps them, ``restore`` goes
    back there, and after ranks have come or gone ``sync`` has all go on from rank 0's last commit.
    """
    if importlib.util.find_spec("horovod") is None:
        return hvd.elastic
    import horovod.tensorflow.elastic as theirs
    from horovod.common.elastic import ObjectState, run_fn
    from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt

    vars(theirs).update(watched)  # for those who use Horovod's own loop
    State = _states(ObjectState)

    class TensorFlowState(State):  # type: ignore[misc, valid-type]
        """Variables and other values of an elastic job; see :func:`elastic`.

        Args:
            variables: a list of ``tf.Variable`` or Keras variables, the same on all ranks.
            session: must be None.
            values: see :func:`elastic`.
        """

        def __init__(self, variables: Any = None, session: Any = None, **values: Any) -> None:
            if session is not None or variables is None:
                raise ConfigError("TensorFlowState needs variables=, a list of variables, and no session")
            self.variables = list(variables)
            super().__init__(self.variables, [], [], values)

    class TensorFlowKerasState(State):  # type: ignore[misc, valid-type]
        """Model, optimizer and other values of an elastic job; see :func:`elastic`.

        Args:
            model: built.
            optimizer: None for the model's.
            backend: accepted for Horovod's sake.
            values: see :func:`elastic`.
        """

        def __init__(self, model: Any, optimizer: Any = None, backend: Any = None, **values: Any) -> None:
            if not model.built:
                raise ConfigError("model is not built: call model.build(input_shape), or give it an Input")
            self.model, self.optimizer = model, optimizer or model.optimizer
            if self.optimizer is None:
                raise ConfigError("optimizer=None, and the model is not compiled with one")
            if not self.optimizer.built:  # or a rank that has just come would have fewer variables
                self.optimizer.build(model.trainable_variables)
            shared = list(model.weights)
            ids = {id(v) for v in shared}
            own = [v for v in model.variables if id(v) not in ids]
            super().__init__([*shared, *self.optimizer.variables], own, [self.optimizer], values)

    names = {name: value for name, value in vars(theirs).items() if not name.startswith("_")}
    run = runner(
        run_fn=run_fn,
        changed=HostsUpdatedInterrupt,
        failed=HorovodInternalError,
        shutdown=watched["shutdown"],
        init=watched["init"],
        lost=is_lost,
    )
    ours = {"TensorFlowState": TensorFlowState, "TensorFlowKerasState": TensorFlowKerasState, "run": run}
    return SimpleNamespace(**{**names, **ours})
