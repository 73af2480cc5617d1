"""Waiting for other ranks: not for one that will not come. The watch sees every exchange of Horovod's."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from hvdloss import watch
from hvdloss.comm.communicator import group_ranks, ranks_of_process_set_id
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.variables import variable

__all__ = ["raise_root_cause", "uncounted"]

_PREFIX = "horovod_"
_COLLECTIVES = ("allreduce", "allgather", "broadcast", "alltoall", "reducescatter", "join", "barrier")
_COUNTED = 16  # exchanges of one graph: those after them are not looked at one by one


@contextlib.contextmanager
def raise_root_cause(name: str = "", process_set: Any = None) -> Iterator[None]:
    """Raise, for what TensorFlow says of a collective that failed, what the ranks know to be wrong.

    Args:
        name: of the exchange, for the watch; empty if what it belongs to is named already.
        process_set: whose exchange it is; None for all ranks'.

    Raises:
        RankError, LostRankError, StallError: ranks cannot go on together (:mod:`hvdloss.watch`).
    """
    if tf.executing_eagerly():
        watch.check()
    try:
        with watch.waiting(name, group_ranks(hvd, process_set)) if name else contextlib.nullcontext():
            yield
    except tf.errors.OpError as error:
        why = watch.root_cause(error)
        if why is error:
            raise
        raise why from error


@watch.blocking
def _run(operation: Callable[..., Any], args: Any, options: Any) -> Any:
    """Run an operation, which returns when all ranks have been in it."""
    return operation(*args, **options)


class _Count:
    """How many exchanges of one name began in graphs, and how many are over."""

    def __init__(self) -> None:
        with tf.init_scope(), tf.device("CPU:0"):
            self._counts = variable(tf.zeros(2, tf.int64), "hvdloss_exchanges")

    def begin(self, given: Any) -> None:
        """Count one that begins when what this rank gives is there."""
        with tf.control_dependencies(tf.nest.flatten(given, expand_composites=True)):
            self._counts.assign_add([1, 0], read_value=False)

    def end(self, got: Any) -> None:
        """Count one as over when what this rank gets is there."""
        with tf.control_dependencies(tf.nest.flatten(got, expand_composites=True)):
            self._counts.assign_add([0, 1], read_value=False)

    def progress(self) -> tuple[int, int]:
        """Return both numbers; eager only."""
        begun, ended = self._counts.numpy()
        return int(begun), int(ended)


_counts: dict[tuple[str, tuple[int, ...]], _Count] = {}
_uncounted = False


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Do not count exchanges that are traced in the block: whoever makes them tells of them by itself."""
    global _uncounted
    before, _uncounted = _uncounted, True
    try:
        yield
    finally:
        _uncounted = before


class _Exchanges:
    """Horovod's operations, of which every exchange is named to the watch.

    Args:
        library: ``horovod.tensorflow.mpi_ops.MPI_LIB``.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._library, name)
        kind = name.removeprefix(_PREFIX)
        if any(kind.removeprefix("grouped_").startswith(one) for one in _COLLECTIVES):
            watch.called_by_blocking(str(inspect.unwrap(operation).__globals__["__name__"]))
            operation = self._named(operation, kind)
        setattr(self, name, operation)
        return operation

    def _named(self, operation: Callable[..., Any], kind: str) -> Callable[..., Any]:
        @functools.wraps(operation)
        def run(*args: Any, **options: Any) -> Any:
            number = options.get("process_set_id", 0)
            if tf.executing_eagerly():  # names are of graphs: here Horovod goes by the operation's kind
                ranks = ranks_of_process_set_id(hvd, number)
                with raise_root_cause(), watch.waiting_for(kind, ranks, watch.enter_exchange(kind, ranks)):
                    return _run(operation, args, options)
            what = kind if kind == "join" else f"{kind}.{options.get('name') or 'noname'}"
            if _uncounted or not _first(tf.compat.v1.get_default_graph()):
                return operation(*args, **options)
            ranks = ranks_of_process_set_id(hvd, number)
            if (what, ranks) not in _counts:
                _counts[what, ranks] = _Count()
            count = _counts[what, ranks]
            watch.track(what, count, ranks, inside="tensorflow", steps=False)
            count.begin([one for one in (*args, *options.values()) if tf.is_tensor(one)])
            out = operation(*args, **options)
            count.end(out)
            return out

        return run


def _first(graph: Any) -> bool:
    """Return whether a graph is one of a ``tf.function``, with few exchanges as yet; count another one."""
    if (
        not isinstance(graph, tf.__internal__.FuncGraph)
        or not tf.compat.v1.executing_eagerly_outside_functions()
    ):
        return False
    seen = getattr(graph, "_hvdloss_exchanges", 0)
    graph._hvdloss_exchanges = seen + 1
    return seen < _COUNTED


if hasattr(hvd, "mpi_ops"):
    hvd.mpi_ops.MPI_LIB = _Exchanges(hvd.mpi_ops.MPI_LIB)
