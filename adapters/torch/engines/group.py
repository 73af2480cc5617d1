"""A group of ranks over whatever engine there is: Horovod, torch.distributed, or one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hvdloss.comm.communicator import group_ranks
from hvdloss.torch._backend import hvd
from hvdloss.torch.waiting import raise_root_cause, wait

__all__ = ["EngineGroup", "EngineWork"]


class EngineWork:
    """An exchange that is under way; see :class:`hvdloss.comm.engine.Work`.

    Args:
        handle: of the engine's.
        name: what the watch is told of while it is waited for; empty where the caller tells.
        process_set: its ranks.
    """

    def __init__(self, handle: Any, name: str, process_set: Any) -> None:
        self._handle, self._name, self._process_set = handle, name, process_set

    def done(self) -> bool:
        """Return whether it is over."""
        return bool(hvd.poll(self._handle))

    def wait(self) -> Any:
        """Return its result when it is over."""
        return wait(self._handle, self._name, self._process_set)


class EngineGroup:
    """The ranks of a process set; see :class:`hvdloss.comm.engine.Group`.

    Args:
        process_set: None for all ranks.
        own_order: whether its exchanges are in an order of their own, which is nobody else's. Engines that
            match by name need no other.
        named: whether the watch is told of each exchange that is waited for; False where the caller tells.
    """

    def __init__(self, process_set: Any = None, *, own_order: bool = False, named: bool = True) -> None:
        process_set = process_set or hvd.global_process_set
        self.process_set = process_set.lane() if own_order and hasattr(process_set, "lane") else process_set
        self._named = named

    @property
    def rank(self) -> int:
        """This process's number in the group, from 0."""
        return int(self.process_set.rank())

    @property
    def size(self) -> int:
        """How many ranks it has."""
        return int(self.process_set.size())

    @property
    def ranks(self) -> tuple[int, ...]:
        """Their numbers among all; empty for all of them."""
        return group_ranks(hvd, self.process_set)

    def _start(self, call: Any, name: str, *args: Any, **options: Any) -> EngineWork:
        with raise_root_cause():
            handle = call(*args, name=name, process_set=self.process_set, **options)
        return EngineWork(handle, name if self._named else "", self.process_set)

    def all_reduce(self, tensor: torch.Tensor, name: str, *, in_place: bool = False) -> EngineWork:
        """Start summing a tensor over ranks."""
        call = hvd.allreduce_async_ if in_place else hvd.allreduce_async
        return self._start(call, name, tensor, op=hvd.Sum)

    def all_gather(self, tensor: torch.Tensor, name: str) -> EngineWork:
        """Start gathering along the first axis, in which ranks may have different lengths."""
        return self._start(hvd.allgather_async, name, tensor)

    def all_to_all(self, tensor: torch.Tensor, name: str, splits: Sequence[int] | None = None) -> EngineWork:
        """Start sending ``splits[k]`` rows to rank k; see :class:`hvdloss.comm.engine.Group`."""
        if splits is None:
            return self._start(hvd.alltoall_async, name, tensor)
        return self._start(hvd.alltoall_async, name, tensor, torch.tensor(splits, dtype=torch.int32))

    def reduce_scatter(self, tensor: torch.Tensor, name: str) -> EngineWork:
        """Start summing over ranks; its result is this rank's part of as many rows."""
        return self._start(hvd.reducescatter_async, name, tensor, op=hvd.Sum)

    def broadcast(self, tensor: torch.Tensor, root: int, name: str, *, in_place: bool = False) -> EngineWork:
        """Start giving all ranks the tensor of one, counted among all ranks."""
        return self._start(hvd.broadcast_async_ if in_place else hvd.broadcast_async, name, tensor, root)
