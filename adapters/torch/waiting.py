"""Waiting for other ranks: not for one that will not come. The watch sees every exchange of Horovod's."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

from hvdloss import watch
from hvdloss.comm.communicator import group_ranks, ranks_of_process_set_id
from hvdloss.torch import blocking
from hvdloss.torch._backend import hvd

__all__ = ["raise_root_cause", "wait"]

_PREFIX = "horovod_torch_"

raise_root_cause = functools.partial(blocking.raise_root_cause, hvd.HorovodInternalError)


def wait(handle: int, name: str = "", process_set: Any = None) -> Any:
    """Return the result of an asynchronous call of Horovod's, or of the engine in its place.

    Args:
        handle: of the call.
        name: of the exchange, for the watch; empty for what Horovod calls it.
        process_set: whose exchange it is; None for all ranks'.

    Raises:
        RankError, LostRankError, StallError: ranks cannot go on together (:mod:`hvdloss.watch`).
    """
    with watch.waiting(name, group_ranks(hvd, process_set)) if name else contextlib.nullcontext():
        return hvd.synchronize(handle)


class _Launches:
    """Horovod's library, of which every exchange that is launched is named to the watch.

    Args:
        library: ``horovod.torch.mpi_ops.mpi_lib``.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self.begun: dict[int, tuple[str, tuple[int, ...], int]] = {}  # by handle

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        operation = name.removeprefix(_PREFIX).partition("_async_")[0]
        if "_async_" in name or operation in ("join", "barrier"):
            function = self._named(function, operation)
        setattr(self, name, function)
        return function

    def _named(self, function: Callable[..., int], operation: str) -> Callable[..., int]:
        # Where the process set is among the arguments: last, but for two factors that follow it.
        at = -3 if "reducescatter" in operation else -1

        @functools.wraps(function)
        def launch(*args: Any) -> int:
            handle = function(*args)
            name = next((one.decode() for one in args if isinstance(one, bytes)), "")
            if operation in ("join", "barrier"):
                what = operation
            else:
                what = f"{operation}.{name or f'noname.{handle}'}"  # as Horovod itself
            ranks = () if operation == "join" else ranks_of_process_set_id(hvd, args[at])
            self.begun[handle] = (what, ranks, watch.enter_exchange(what, ranks))
            return handle

        return launch


def _observe() -> None:
    """Let the watch see all of Horovod's exchanges, whoever makes them, and wait for them as for ours."""
    library = hvd.mpi_ops.mpi_lib
    launches = hvd.mpi_ops.mpi_lib = _Launches(library)
    plain = hvd.synchronize

    @functools.wraps(plain)
    def synchronize(handle: int) -> Any:
        begun = launches.begun.pop(handle, None)
        if begun is not None and not hvd.poll(handle):
            with watch.waiting_for(*begun):
                blocking.block_until(functools.partial(hvd.poll, handle))
        with raise_root_cause():
            return plain(handle)

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "horovod" and vars(module).get("synchronize") is plain:
            module.synchronize = synchronize  # type: ignore[attr-defined]


if hasattr(hvd, "mpi_ops"):
    _observe()
