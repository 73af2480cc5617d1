"""Horovod's framework-neutral names for one process, used where Horovod is not installed.

A program written for Horovod then runs unchanged, as the only rank. What needs other ranks (another
root, a process set with other members) is refused by name.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from hvdloss.errors import ConfigError, HvdlossError

__all__ = [
    "Adasum",
    "Average",
    "HorovodInternalError",
    "Max",
    "Min",
    "ObjectState",
    "ProcessSet",
    "Product",
    "Sum",
    "add_process_set",
    "barrier",
    "ccl_built",
    "check_root",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic_run",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "init",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rank",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
]

Function = TypeVar("Function", bound=Callable[..., Any])

# Horovod's numbers for its reduce operations.
Average, Sum, Adasum, Min, Max, Product = 0, 1, 2, 3, 4, 5

_state = {"initialized": False}


class HorovodInternalError(RuntimeError):
    """Raised by Horovod when a collective fails; never here."""


class ProcessSet:
    """A set of ranks; here it can only be all of them or none."""

    def __init__(self, ranks: Sequence[int] | None = None) -> None:
        self.ranks = [0] if ranks is None else list(ranks)
        if any(r != 0 for r in self.ranks):
            raise ConfigError(f"process set ranks={self.ranks}: this process is the only rank, 0")
        self.process_set_id = 0

    def included(self) -> bool:
        """Return whether this process is a member."""
        return bool(self.ranks)

    def size(self) -> int:
        """Return the number of members."""
        return len(self.ranks)

    def rank(self) -> int:
        """Return this process's number in the set."""
        return 0


global_process_set = ProcessSet()


def init(*args: Any, **kwargs: Any) -> None:
    """Begin; arguments are Horovod's and have no effect on one process."""
    _state["initialized"] = True


def shutdown() -> None:
    """End."""
    _state["initialized"] = False


def is_initialized() -> bool:
    """Return whether :func:`init` was called."""
    return _state["initialized"]


def _one_process(value: int) -> Callable[[], int]:
    def number() -> int:
        if not is_initialized():
            raise ValueError("Horovod has not been initialized; use hvd.init().")
        return value

    return number


size, local_size, cross_size = _one_process(1), _one_process(1), _one_process(1)
rank, local_rank, cross_rank = _one_process(0), _one_process(0), _one_process(0)


def _not_built(verbose: bool = False) -> bool:
    """Return False: there is no Horovod here."""
    return False


mpi_built = gloo_built = ddl_built = ccl_built = cuda_built = rocm_built = _not_built
mpi_enabled = gloo_enabled = mpi_threads_supported = _not_built


def nccl_built(verbose: bool = False) -> int:
    """Return 0: no NCCL."""
    return 0


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Return the set, which must have no other member than rank 0."""
    return process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)


def remove_process_set(process_set: ProcessSet) -> bool:
    """Return whether a set was removed."""
    return process_set is not global_process_set


def join(device: int = -1) -> int:
    """Return the last rank to join: this one."""
    return 0


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return at once."""


def start_timeline(file_path: str, mark_cycles: bool = False) -> NoReturn:
    """Refuse: there are no collectives to record."""
    raise HvdlossError("start_timeline needs Horovod; run `hvdloss install`")


def stop_timeline() -> None:
    """Stop nothing."""


def check_root(root_rank: int) -> None:
    """Raise ConfigError unless `root_rank` is the only rank there is."""
    if root_rank != 0:
        raise ConfigError(f"root_rank={root_rank} does not exist: this process is the only rank, 0")


class ObjectState:
    """Values that an elastic job commits and restores; here in memory only."""

    def __init__(self, **values: Any) -> None:
        # Objectives, of which a copy is another one, are left as they are.
        self._values = [name for name, value in values.items() if not hasattr(value, "controller")]
        for name, value in values.items():
            setattr(self, name, value)
        self._callbacks: list[Callable[[], None]] = []
        self.save()

    def _capture(self, value: Any) -> Any:
        return value.state_dict() if hasattr(value, "state_dict") else value

    def save(self) -> None:
        """Remember the present values."""
        self._saved = {n: copy.deepcopy(self._capture(getattr(self, n))) for n in self._values}

    def restore(self) -> None:
        """Return to the values of the last :meth:`save`."""
        for name, saved in self._saved.items():
            value = getattr(self, name)
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(copy.deepcopy(saved))
            else:
                setattr(self, name, copy.deepcopy(saved))

    def commit(self) -> None:
        """Save; there are no other ranks."""
        self.save()

    def sync(self) -> None:
        """Save; there are no other ranks to agree with."""
        self.save()

    def check_host_updates(self) -> None:
        """Find no change."""

    def register_reset_callbacks(self, callbacks: Sequence[Callable[[], None]]) -> None:
        """Keep callbacks that only a change of ranks would call."""
        self._callbacks.extend(callbacks)


def elastic_run(function: Function) -> Function:
    """Return `function` as it is, but for a ``state.sync()`` before it."""

    @functools.wraps(function)
    def run(state: Any, *args: Any, **kwargs: Any) -> Any:
        state.sync()
        return function(state, *args, **kwargs)

    return run  # type: ignore[return-value]
