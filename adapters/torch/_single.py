"""Every public name of ``horovod.torch`` for one process, used where Horovod is not installed.

Collectives over one rank are copies; handles are done as soon as they exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from hvdloss.comm.single import *  # noqa: F403 - the neutral names are this module's too
from hvdloss.comm.single import Adasum, Average, ObjectState, Sum, check_root, elastic_run
from hvdloss.errors import HvdlossError

__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "DistributedOptimizer",
    "HorovodInternalError",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "Sum",
    "SyncBatchNorm",
    "add_process_set",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "poll",
    "rank",
    "reducescatter",
    "reducescatter_async",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "sparse_allreduce_async",
    "start_timeline",
    "stop_timeline",
    "synchronize",
]

_handles: dict[int, Any] = {}


def _handle(result: Any) -> int:
    number = max(_handles, default=-1) + 1
    _handles[number] = result
    return number


def poll(handle: int) -> bool:
    """Return True: one process never waits."""
    return True


def synchronize(handle: int) -> Any:
    """Return the result of an asynchronous call."""
    return _handles.pop(handle)


def _reduced(tensor: torch.Tensor, prescale_factor: float, postscale_factor: float) -> torch.Tensor:
    factor = prescale_factor * postscale_factor
    return tensor.clone() if factor == 1.0 else tensor * factor


def allreduce(
    tensor: torch.Tensor,
    average: Any = None,
    name: str | None = None,
    compression: Any = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> torch.Tensor:
    """Return the reduction over the only rank: the tensor, scaled; gradients flow through."""
    return _reduced(tensor, prescale_factor, postscale_factor)


def allreduce_(
    tensor: torch.Tensor,
    average: Any = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> torch.Tensor:
    """Reduce in place."""
    return tensor.copy_(_reduced(tensor, prescale_factor, postscale_factor))


def _asynchronous(function: Callable[..., Any]) -> Callable[..., int]:
    def call(*args: Any, **kwargs: Any) -> int:
        return _handle(function(*args, **kwargs))

    call.__doc__ = f"Asynchronous form of {function.__name__}; returns a handle."
    return call


def _grouped(function: Callable[..., Any]) -> Callable[..., list[Any]]:
    def call(tensors: Iterable[Any], *args: Any, **kwargs: Any) -> list[Any]:
        return [function(tensor, *args, **kwargs) for tensor in tensors]

    call.__name__ = f"grouped_{function.__name__}"
    call.__doc__ = f"{function.__name__} of each tensor."
    return call


def allgather(tensor: torch.Tensor, name: str | None = None, process_set: Any = None) -> torch.Tensor:
    """Return the only rank's tensor."""
    return tensor.clone()


def broadcast(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: Any = None
) -> torch.Tensor:
    """Return the root's tensor."""
    check_root(root_rank)
    return tensor.clone()


def broadcast_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: Any = None
) -> torch.Tensor:
    """Broadcast in place."""
    check_root(root_rank)
    return tensor


def alltoall(
    tensor: torch.Tensor, splits: Any = None, name: str | None = None, process_set: Any = None
) -> Any:
    """Return what the only rank sends itself; with `splits` also their received counterpart."""
    return tensor.clone() if splits is None else (tensor.clone(), torch.as_tensor(splits).clone())


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: Any = None,
    op: Any = Average,
    process_set: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """Return the only rank's part of the reduction: all of it."""
    return _reduced(tensor, prescale_factor, postscale_factor)


def sparse_allreduce_async(
    tensor: torch.Tensor, name: str, op: Any, process_set: Any = None
) -> Callable[[], torch.Tensor]:
    """Return a function that gives the sparse tensor, as Horovod does."""
    return tensor.clone


allreduce_async, allreduce_async_ = _asynchronous(allreduce), _asynchronous(allreduce_)
grouped_allreduce, grouped_allreduce_ = _grouped(allreduce), _grouped(allreduce_)
grouped_allreduce_async = _asynchronous(grouped_allreduce)
grouped_allreduce_async_ = _asynchronous(grouped_allreduce_)
allgather_async, grouped_allgather = _asynchronous(allgather), _grouped(allgather)
grouped_allgather_async = _asynchronous(grouped_allgather)
broadcast_async, broadcast_async_ = _asynchronous(broadcast), _asynchronous(broadcast_)
alltoall_async, reducescatter_async = _asynchronous(alltoall), _asynchronous(reducescatter)
grouped_reducescatter = _grouped(reducescatter)
grouped_reducescatter_async = _asynchronous(grouped_reducescatter)


def broadcast_parameters(params: Any, root_rank: int, process_set: Any = None) -> None:
    """Leave the parameters as they are."""
    check_root(root_rank)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int, process_set: Any = None, model: Any = None
) -> None:
    """Leave the state as it is."""
    check_root(root_rank)


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None, process_set: Any = None) -> Any:
    """Return the object."""
    check_root(root_rank)
    return obj


def allgather_object(obj: Any, name: str | None = None, process_set: Any = None) -> list[Any]:
    """Return the only rank's object, in a list."""
    return [obj]


class _NoneCompressor:
    """Send as it is."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return the tensor."""
        return tensor, None

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Return the tensor."""
        return tensor


class _FP16Compressor:
    """Send floating point as float16."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Round to float16."""
        return (tensor.half() if tensor.is_floating_point() else tensor), tensor.dtype

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Return to the dtype it came from."""
        return tensor.to(ctx)


class Compression:
    """What may be passed as ``compression=``."""

    none = _NoneCompressor
    fp16 = _FP16Compressor


class SyncBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the batch of all ranks, which is this rank's."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


class _TorchState(ObjectState):
    """Model, optimizer and other values of an elastic job."""

    def __init__(self, model: Any = None, optimizer: Any = None, **values: Any) -> None:
        super().__init__(model=model, optimizer=optimizer, **values)


elastic = SimpleNamespace(run=elastic_run, TorchState=_TorchState)


def DistributedOptimizer(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
    """Return a plain optimizer's wrapper for one rank: no reduction, Horovod's extra methods."""
    if kwargs.get("op", Average) not in (Average, Sum, Adasum):
        raise HvdlossError(f"op={kwargs['op']!r} is not a way to combine gradients")
    base = type(optimizer)
    methods = {
        "synchronize": lambda self: None,
        "skip_synchronize": lambda self: contextlib.nullcontext(),
        "set_backward_passes_per_step": lambda self, passes: None,
    }
    wrapped = (cls := type(base.__name__, (base,), methods)).__new__(cls)
    wrapped.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k != "step"})
    return wrapped
