"""Horovod's functions on plain values, and loading a saved model to train on."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

import keras
from hvdloss.keras import training
from hvdloss.keras._backend import hvd
from hvdloss.keras.optimizer import DistributedOptimizer
from hvdloss.tensorflow.functions import broadcast_variables

__all__ = ["allgather", "allreduce", "broadcast", "broadcast_global_variables", "load_model", "reducescatter"]


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: Any = None,
    compression: Any = hvd.Compression.none,
) -> Any:
    """Return `value` reduced over ranks (the average by default), as a NumPy array."""
    if op is None:
        op = hvd.Sum if average is False else hvd.Average
    out = hvd.allreduce(
        tf.convert_to_tensor(value),
        name=name,
        op=op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        compression=compression,
    )
    return out.numpy()


def allgather(value: Any, name: str | None = None) -> Any:
    """Return all ranks' values, one after another along the first axis, as a NumPy array."""
    return hvd.allgather(tf.convert_to_tensor(value), name=name).numpy()


def broadcast(value: Any, root_rank: int, name: str | None = None) -> Any:
    """Return the root's value, as a NumPy array."""
    return hvd.broadcast(tf.convert_to_tensor(value), root_rank, name=name).numpy()


def reducescatter(value: Any, name: str | None = None, op: Any = hvd.Average) -> Any:
    """Return this rank's part, along the first axis, of `value` reduced over ranks."""
    return hvd.reducescatter(tf.convert_to_tensor(value), name=name, op=op).numpy()


def broadcast_global_variables(root_rank: int, model: Any = None) -> None:
    """Give every rank the root's variables of `model`: TensorFlow 2 has no global ones of its own.

    Raises:
        ConfigError: no model.
    """
    from hvdloss.errors import ConfigError

    if model is None:
        raise ConfigError(
            "broadcast_global_variables needs model=: TensorFlow 2 keeps no list of variables. Or pass "
            "BroadcastGlobalVariablesCallback to fit"
        )
    variables = [*model.variables, *(model.optimizer.variables if model.optimizer is not None else [])]
    broadcast_variables(variables, root_rank)


def load_model(
    filepath: Any,
    custom_optimizers: Any = None,
    custom_objects: dict[str, Any] | None = None,
    compression: Any = hvd.Compression.none,
    legacy_opts: bool = False,
) -> Any:
    """Load a saved model, and make its optimizer distributed; its state is kept.

    Args:
        filepath: of a model saved by Keras, with or without hvdloss.
        custom_optimizers: classes of optimizers to know.
        custom_objects: as in ``keras.models.load_model``.
        compression: see :func:`DistributedOptimizer`.
        legacy_opts: accepted for Horovod's sake.
    """
    known = {c.__name__: c for c in custom_optimizers or ()} | (custom_objects or {})
    # Never code from the file: a lambda in it is refused.
    model = keras.models.load_model(filepath, custom_objects=known, safe_mode=True)
    if model.optimizer is not None:
        DistributedOptimizer(model.optimizer, compression=compression)
        training._compiled(model)
        model.train_function = None
        model.jit_compile = False
    return model
