"""Every public name of ``horovod.tensorflow`` for one process, used where Horovod is not installed.

Collectives over one rank are copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import tensorflow as tf
from hvdloss.comm.single import *  # noqa: F403 - the neutral names are this module's too
from hvdloss.comm.single import Average, ObjectState, check_root, elastic_run


def is_homogeneous() -> bool:
    """Return True: every machine has as many ranks as this one."""
    return True


def _op(value: int) -> Callable[..., tf.Tensor]:
    def number(*args: Any, **kwargs: Any) -> tf.Tensor:
        return tf.constant(value)

    return number


rank_op = local_rank_op = _op(0)
size_op = local_size_op = process_set_included_op = _op(1)


def _reduced(tensor: Any, prescale_factor: float = 1.0, postscale_factor: float = 1.0) -> Any:
    factor = prescale_factor * postscale_factor
    if isinstance(tensor, tf.IndexedSlices):
        return tensor
    return tf.identity(tensor) if factor == 1.0 else tensor * tf.cast(factor, tensor.dtype)


def allreduce(
    tensor: Any,
    average: Any = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: Any = None,
    ignore_name_scope: bool = False,
) -> Any:
    """Return the reduction over the only rank: the tensor, scaled; gradients flow through."""
    return _reduced(tensor, prescale_factor, postscale_factor)


def grouped_allreduce(tensors: Iterable[Any], *args: Any, **kwargs: Any) -> list[Any]:
    """:func:`allreduce` of each tensor."""
    return [allreduce(tensor, *args, **kwargs) for tensor in tensors]


def allgather(
    tensor: Any, name: str | None = None, ignore_name_scope: bool = False, process_set: Any = None
) -> tf.Tensor:
    """Return the only rank's tensor."""
    return tf.identity(tensor)


def grouped_allgather(tensors: Iterable[Any], *args: Any, **kwargs: Any) -> list[tf.Tensor]:
    """:func:`allgather` of each tensor."""
    return [allgather(tensor) for tensor in tensors]


def broadcast(
    tensor: Any,
    root_rank: int,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = None,
) -> tf.Tensor:
    """Return the root's tensor."""
    check_root(root_rank)
    return tf.identity(tensor)


def broadcast_(variables: Any, root_rank: int, *args: Any, **kwargs: Any) -> Any:
    """Leave the variables as they are."""
    check_root(root_rank)
    return variables


def broadcast_variables(variables: Any, root_rank: int, *args: Any, **kwargs: Any) -> None:
    """Leave the variables as they are."""
    check_root(root_rank)


def alltoall(tensor: Any, splits: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Return what the only rank sends itself; with `splits` also their received counterpart."""
    return tf.identity(tensor) if splits is None else (tf.identity(tensor), tf.convert_to_tensor(splits))


def reducescatter(
    tensor: Any,
    device_dense: str = "",
    compression: Any = None,
    op: Any = Average,
    name: str | None = None,
    process_set: Any = None,
    ignore_name_scope: bool = False,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> tf.Tensor:
    """Return the only rank's part of the reduction: all of it."""
    return _reduced(tensor, prescale_factor, postscale_factor)


def grouped_reducescatter(tensors: Iterable[Any], *args: Any, **kwargs: Any) -> list[tf.Tensor]:
    """:func:`reducescatter` of each tensor."""
    return [reducescatter(tensor, *args, **kwargs) for tensor in tensors]


def broadcast_object(obj: Any, root_rank: int = 0, *args: Any, **kwargs: Any) -> Any:
    """Return the object."""
    check_root(root_rank)
    return obj


def broadcast_object_fn(root_rank: int = 0, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    """Return a function that returns its argument."""
    check_root(root_rank)
    return lambda obj: obj


def allgather_object(obj: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """Return the only rank's object, in a list."""
    return [obj]


class _NoneCompressor:
    """Send as it is."""

    @staticmethod
    def compress(tensor: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Return the tensor."""
        return tensor, None

    @staticmethod
    def decompress(tensor: tf.Tensor, ctx: Any) -> tf.Tensor:
        """Return the tensor."""
        return tensor


class _FP16Compressor:
    """Send floating point as float16."""

    @staticmethod
    def compress(tensor: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Round to float16."""
        return (tf.cast(tensor, tf.float16) if tensor.dtype.is_floating else tensor), tensor.dtype

    @staticmethod
    def decompress(tensor: tf.Tensor, ctx: Any) -> tf.Tensor:
        """Return to the dtype it came from."""
        return tf.cast(tensor, ctx)


class Compression:
    """What may be passed as ``compression=``."""

    none = _NoneCompressor
    fp16 = _FP16Compressor


class TensorFlowState(ObjectState):
    """Variables and other values of an elastic job."""

    def __init__(self, variables: Any = None, session: Any = None, **values: Any) -> None:
        self.variables = list(variables or ())
        super().__init__(**values)

    def save(self) -> None:
        """Remember the present values."""
        super().save()
        self._kept = [v.numpy() for v in self.variables]

    def restore(self) -> None:
        """Return to the values of the last :meth:`save`."""
        super().restore()
        for variable, value in zip(self.variables, self._kept, strict=True):
            variable.assign(value)


class TensorFlowKerasState(TensorFlowState):
    """Model, optimizer and other values of an elastic job."""

    def __init__(self, model: Any, optimizer: Any = None, backend: Any = None, **values: Any) -> None:
        self.model, self.optimizer = model, optimizer or model.optimizer
        own = self.optimizer.variables if self.optimizer is not None else []
        super().__init__([*model.variables, *own], **values)


elastic = SimpleNamespace(
    run=elastic_run, TensorFlowState=TensorFlowState, TensorFlowKerasState=TensorFlowKerasState
)


def SyncBatchNormalization(*args: Any, **kwargs: Any) -> Any:
    """Return a batch normalisation layer: the batch of all ranks is this rank's."""
    return tf.keras.layers.BatchNormalization(*args, **kwargs)


def broadcast_global_variables(root_rank: int) -> None:
    """Leave them as they are."""
    check_root(root_rank)


def DistributedGradientTape(gradtape: tf.GradientTape, *args: Any, **kwargs: Any) -> tf.GradientTape:
    """Return the tape: there is nothing to reduce."""
    return gradtape


def DistributedOptimizer(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the optimizer: there is nothing to reduce."""
    return optimizer


def handle_average_backwards_compatibility(op: Any, average: Any) -> Any:
    """Return the operation that Horovod's old argument `average` means."""
    if average is not None:
        return Average if average else 1
    return Average if op is None else op


def gpu_available(*args: Any) -> bool:
    """Return whether TensorFlow sees a GPU."""
    return bool(tf.config.list_physical_devices("GPU"))


def check_num_rank_power_of_2(count: int) -> bool:
    """Return whether `count` is a power of two."""
    return count > 0 and count & (count - 1) == 0
