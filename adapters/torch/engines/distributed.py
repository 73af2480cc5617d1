"""Horovod's names over ``torch.distributed``, for ranks started by torchrun and its like.

Order. Horovod matches what ranks send by name; here the n-th exchange of a lane on one rank belongs to the
n-th on every other. A lane is a group of its own (or two), so that nothing beside it counts:

- Each process set has one. What is launched in it (by hvdloss off the hot path, by the user's ``allreduce``
  and the like) must be launched in the same order on all of its ranks, and carries a header of 128 bytes
  by which they see whether it is: if not, all of them raise the same :class:`UsageError`.
- Each optimizer has one for its gradients (:meth:`ProcessSet.lane`), made in its first step. Its ranks have
  agreed on what travels, and it sends in the order of the plan whichever gradient is ready first, so
  nothing is checked.

Lanes do not wait for each other. Exchanges may be launched from any thread, but one at a time.

Tensors travel over Gloo on a CPU and over NCCL on a GPU, in groups of this engine's own. A default process
group is neither needed nor used, but to find the other ranks.
"""

from __future__ import annotations

import atexit
import datetime
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from hvdloss import watch
from hvdloss.comm.single import Adasum, Average, HorovodInternalError, Max, Min, Product, Sum  # noqa: F401
from hvdloss.errors import ConfigError, UsageError
from hvdloss.torch import _single, blocking
from hvdloss.torch._single import Compression
from hvdloss.torch.engines import exchanges
from hvdloss.torch.engines.averaging import averaging_optimizer
from hvdloss.torch.engines.exchanges import reduction, scaled
from hvdloss.torch.engines.lanes import Call, Lane, Links, Steps
from hvdloss.torch.engines.objects import pickle_to_tensor, unpickle_tensor
from hvdloss.watch import process

_OURS = ("SyncBatchNorm", "broadcast_optimizer_state", "broadcast_parameters")  # for every engine

__all__ = [*(name for name in _single.__all__ if name not in _OURS), "is_homogeneous"]

_log = logging.getLogger("hvdloss")

_CONNECT = datetime.timedelta(minutes=30)  # for all ranks to be here


class ProcessSet:
    """Some of the ranks, or all: what exchanges take as ``process_set``.

    Args:
        ranks: their numbers among all; None for all.
    """

    def __init__(self, ranks: Iterable[int] | None = None) -> None:
        self.ranks = None if ranks is None else sorted(set(ranks))
        self.process_set_id: int | None = None
        self.own: Lane | None = None  # with a header for everything

    def included(self) -> bool:
        """Return whether this process is a member."""
        return self.own is not None

    def rank(self) -> int:
        """Return this process's number in the set."""
        return self._lane().rank

    def size(self) -> int:
        """Return the number of members."""
        _the_world()
        return len(self.ranks or ())

    def _lane(self) -> Lane:
        _the_world()
        if self.own is None:
            raise UsageError(f"this process is not in the process set of ranks {self.ranks}")
        return self.own

    def lane(self) -> ProcessSet:
        """Return the same ranks, whose exchanges are in an order of their own, and not checked.

        To be used first on all of them in the same order as other lanes.
        """
        other = ProcessSet(self.ranks)
        other.process_set_id = self.process_set_id
        if self.own is not None:
            other.own = Lane(_the_world().links, self.own.ranks, checked=False)
        return other

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


# -- beginning and end --------------------------------------------------------------------------------


class _World:
    """What there is between `init` and `shutdown`."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self.sets: dict[int, ProcessSet] = {}
        self.begun = False
        self.local_rank = self.cross_rank = 0
        self.local_size = self.cross_size = 1


_world: _World | None = None
_store: Any = None  # of the launch; one for all beginnings
_times = 0  # how many beginnings there were
global_process_set = ProcessSet()


def _the_world() -> _World:
    if _world is None:
        raise ValueError("hvdloss has not been initialized; use hvd.init().")
    return _world


def _find_ranks() -> Links:
    """Learn from the default process group, or from the launcher, who there is."""
    global _store, _times
    if dist.is_initialized():
        number, count = dist.get_rank(), dist.get_world_size()
        _store = _store or dist.distributed_c10d._get_default_store()
    else:
        slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
        variables = {name: os.environ.get(name) or os.environ.get(other, "") for name, other in slurm.items()}
        variables |= {name: os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")}
        if missing := [name for name, text in variables.items() if not text]:
            raise ConfigError(
                f"hvd.init(): torch.distributed needs {', '.join(missing)} in the environment, as torchrun "
                f"sets it; launch with `torchrun --nproc-per-node N train.py`, or call "
                f"torch.distributed.init_process_group() before"
            )
        number, count = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        if _store is None:
            os.environ.update({k: v for k, v in variables.items() if k in slurm})  # what rendezvous reads
            _store = next(iter(dist.rendezvous("env://", timeout=_CONNECT)))[0]
    _times += 1
    start = f"hvdloss/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_times}"
    return Links(dist.PrefixStore(start, _store), number, count)


def connect() -> None:
    """Do the part of :func:`init` that needs the network."""
    global _world
    if _world is not None:
        return
    _world = _World(_find_ranks())
    atexit.unregister(shutdown)
    atexit.register(shutdown)  # what is under way would keep the process from ending
    try:
        _add(global_process_set, range(size()))
        _look_around(_world)
    except BaseException:
        shutdown()
        raise


def _look_around(world: _World) -> None:
    """Find out which ranks share a host."""
    mine = process.host() + os.environ.get("GROUP_RANK", "")
    data = torch.frombuffer(bytearray(mine.encode()), dtype=torch.uint8)
    hosts = [part.numpy().tobytes().decode() for part in _gather_bytes(data, "hvdloss.hosts", None)]
    here = [number for number, host in enumerate(hosts) if host == mine]
    world.local_rank, world.local_size = here.index(rank()), len(here)
    distinct = list(dict.fromkeys(hosts))
    world.cross_rank, world.cross_size = distinct.index(mine), len(distinct)


def init(comm: Any = None, process_sets: Any = None) -> None:
    """Begin, with the ranks of the default process group, or of the launch; nothing if it was called before.

    Args:
        comm: Horovod's; None for all ranks.
        process_sets: to add at once, or "dynamic".

    Raises:
        ConfigError: the launch says too little, or `comm` is given.
    """
    if comm is not None and list(comm) != []:
        raise ConfigError("hvd.init(comm=...) needs Horovod; use hvd.add_process_set(ranks) for some ranks")
    connect()
    world = _the_world()
    if world.begun:
        return
    world.begun = True
    _log.info("hvdloss: rank %d of %d, over torch.distributed", rank(), size())
    for one in [] if process_sets in (None, "dynamic") else process_sets:
        add_process_set(one)


def shutdown() -> None:
    """End. What is under way fails, here and on ranks that wait for it."""
    global _world
    world, _world = _world, None
    if world is None:
        return
    for one in (global_process_set, *world.sets.values()):
        one.own = one.process_set_id = None
    global_process_set.ranks = None
    world.links.end()


def is_initialized() -> bool:
    """Return whether :func:`init` was called."""
    return _world is not None and _world.begun


def rank() -> int:
    """Return this process's number."""
    return _the_world().links.rank


def size() -> int:
    """Return how many ranks there are."""
    return _the_world().links.size


def local_rank() -> int:
    """Return this process's number among those of its host."""
    return _the_world().local_rank


def local_size() -> int:
    """Return how many ranks this host has."""
    return _the_world().local_size


def cross_rank() -> int:
    """Return the number of this host."""
    return _the_world().cross_rank


def cross_size() -> int:
    """Return how many hosts there are."""
    return _the_world().cross_size


def is_homogeneous() -> bool:
    """Return whether all hosts have as many ranks as this one."""
    return local_size() * cross_size() == size()


def _add(one: ProcessSet, ranks: Sequence[int]) -> None:
    one.ranks = list(ranks)
    one.process_set_id = 0 if one is global_process_set else max(_the_world().sets, default=0) + 1
    if one is not global_process_set:
        _the_world().sets[one.process_set_id] = one
    if rank() in one.ranks:
        one.own = Lane(_the_world().links, one.ranks, checked=True)
        one.own.group("headers")  # now, as all ranks are here


def add_process_set(process_set: Any) -> ProcessSet:
    """Add a set of ranks, a :class:`ProcessSet` or their numbers; all ranks wait for each other.

    Raises:
        ConfigError: ranks that do not exist.
        ValueError: there is such a set.
    """
    one = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    ranks = one.ranks or list(range(size()))
    if any(not 0 <= number < size() for number in ranks):
        raise ConfigError(f"process set ranks={ranks}: there are ranks 0 to {size() - 1}")
    if any(other.ranks == ranks for other in _the_world().sets.values()):
        raise ValueError(f"there is a process set of ranks {ranks} already")
    synchronize(_launch(None, "add_process_set", f"{ranks}", exchanges.barrier))
    _add(one, ranks)
    return one


def remove_process_set(process_set: ProcessSet) -> bool:
    """Remove a set; all ranks must call. Return whether there was such a one."""
    if process_set is global_process_set or process_set.process_set_id not in _the_world().sets:
        return False
    synchronize(_launch(None, "remove_process_set", f"{process_set.ranks}", exchanges.barrier))
    del _the_world().sets[process_set.process_set_id]
    process_set.own = process_set.process_set_id = None
    return True


# -- exchanges ----------------------------------------------------------------------------------------


def _launch(
    process_set: ProcessSet | None, operation: str, name: str | None, steps: Callable[[Lane, str], Steps]
) -> Call:
    return (process_set or global_process_set)._lane().launch(operation, name, steps)


def poll(handle: Any) -> bool:
    """Return whether an asynchronous exchange is over."""
    return all(poll(one) for one in handle) if isinstance(handle, list) else handle.done()


def synchronize(handle: Any) -> Any:
    """Wait for an asynchronous exchange, and return its result.

    Raises:
        RankError, LostRankError, StallError: ranks cannot go on together (:mod:`hvdloss.watch`).
        HorovodInternalError: it failed, as another rank is gone.
        UsageError: ranks launched different exchanges.
    """
    if isinstance(handle, list):
        return [synchronize(one) for one in handle]
    with blocking.raise_root_cause(HorovodInternalError):
        if not handle.done():
            with watch.waiting_for(*handle.noted):
                blocking.block_until(handle.done)
        if handle.error is not None:
            raise handle.error
    return handle.result


def _reduces(*, in_place: bool) -> Callable[..., Call]:
    def start(
        tensor: torch.Tensor,
        average: bool | None = None,
        name: str | None = None,
        op: Any = None,
        prescale_factor: float = 1.0,
        postscale_factor: float = 1.0,
        process_set: ProcessSet | None = None,
    ) -> Call:
        out = tensor if in_place else None
        steps = exchanges.all_reduce(tensor, out, reduction(op, average), prescale_factor, postscale_factor)
        return _launch(process_set, "allreduce", name, steps)

    start.__name__ = "allreduce_async_" if in_place else "allreduce_async"
    where = " in place" if in_place else ""
    start.__doc__ = f"Start a reduction over ranks{where}; a handle for synchronize(). Shapes must be equal."
    return start


allreduce_async, allreduce_async_ = _reduces(in_place=False), _reduces(in_place=True)


def allgather_async(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet | None = None
) -> Call:
    """Start gathering the rows of all ranks, of which each may have any number."""
    return _launch(process_set, "allgather", name, exchanges.all_gather(tensor))


def _broadcasts(*, in_place: bool) -> Callable[..., Call]:
    def start(
        tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet | None = None
    ) -> Call:
        steps = exchanges.broadcast(tensor, tensor if in_place else None, root_rank)
        return _launch(process_set, "broadcast", name, steps)

    start.__name__ = "broadcast_async_" if in_place else "broadcast_async"
    where = " in place" if in_place else ""
    start.__doc__ = f"Start giving every rank the root's tensor{where}; shapes must be equal."
    return start


broadcast_async, broadcast_async_ = _broadcasts(in_place=False), _broadcasts(in_place=True)


def alltoall_async(
    tensor: torch.Tensor, splits: Any = None, name: str | None = None, process_set: ProcessSet | None = None
) -> Call:
    """Start sending rows to every rank, ``splits[k]`` of them to rank k."""
    return _launch(process_set, "alltoall", name, exchanges.all_to_all(tensor, splits))


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = Average,
    process_set: ProcessSet | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Call:
    """Start reducing over ranks, of which each gets its part of the rows."""
    steps = exchanges.reduce_scatter(tensor, reduction(op, None), prescale_factor, postscale_factor)
    return _launch(process_set, "reducescatter", name, steps)


def _follows(tensor: torch.Tensor) -> bool:
    """Return whether a gradient must find its way through."""
    return torch.is_grad_enabled() and tensor.requires_grad


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet | None = None,
) -> torch.Tensor:
    """Return the reduction over ranks. Gradients flow through a sum or an average."""
    op = reduction(op, average)
    if _follows(tensor):
        from hvdloss.torch.collectives import all_reduce

        if op not in (Sum, Average):
            raise UsageError(f"allreduce(op={op}): only Sum and Average have gradients; detach() it")
        group = process_set or global_process_set
        factor = postscale_factor / (group.size() if op == Average else 1)
        return all_reduce(scaled(tensor, prescale_factor), name=name, process_set=process_set) * factor
    small, ctx = compression.compress(tensor)
    out = synchronize(allreduce_async(small, None, name, op, prescale_factor, postscale_factor, process_set))
    return compression.decompress(out, ctx)


def allreduce_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Reduce over ranks in place; see :func:`allreduce_async_`."""
    return synchronize(allreduce_async_(tensor, *args, **kwargs))


def allgather(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet | None = None
) -> torch.Tensor:
    """Return the rows of all ranks, in rank order. Gradients flow if all ranks' tensors carry one."""
    if _follows(tensor):
        from hvdloss.torch.collectives import all_gather

        return all_gather(tensor, name=name, process_set=process_set)
    return synchronize(allgather_async(tensor, name, process_set))


def broadcast(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet | None = None
) -> torch.Tensor:
    """Return the root's tensor. Gradients flow."""
    if _follows(tensor):
        from hvdloss.torch.collectives import broadcast as differentiable

        root = (process_set or global_process_set)._lane().ranks.index(root_rank)
        return differentiable(tensor, root, name=name, process_set=process_set)
    return synchronize(broadcast_async(tensor, root_rank, name, process_set))


def broadcast_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Take over the root's tensor, in place; see :func:`broadcast_async_`."""
    return synchronize(broadcast_async_(tensor, *args, **kwargs))


def alltoall(
    tensor: torch.Tensor, splits: Any = None, name: str | None = None, process_set: ProcessSet | None = None
) -> Any:
    """Return the rows that all ranks sent to this one; with `splits` also how many came from each."""
    if _follows(tensor):
        from hvdloss.torch.collectives import exchange

        size = (process_set or global_process_set).size()
        sent = [len(tensor) // size] * size if splits is None else torch.as_tensor(splits).tolist()
        rows = exchange(tensor, sent, name=name, process_set=process_set)
        if splits is None:
            return rows
        return rows, alltoall(torch.tensor(sent, dtype=torch.int32), process_set=process_set)
    return synchronize(alltoall_async(tensor, splits, name, process_set))


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = Average,
    process_set: ProcessSet | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """Return this rank's rows of the reduction. Gradients flow through a sum or an average."""
    op = reduction(op, None)
    if _follows(tensor) and op in (Sum, Average):
        from hvdloss.torch.collectives import reduce_scatter

        group = process_set or global_process_set
        factor = postscale_factor / (group.size() if op == Average else 1)
        return reduce_scatter(scaled(tensor, prescale_factor), name=name, process_set=process_set) * factor
    small, ctx = compression.compress(tensor)
    handle = reducescatter_async(small, name, None, op, process_set, prescale_factor, postscale_factor)
    return compression.decompress(synchronize(handle), ctx)


def _grouped(function: Callable[..., Any]) -> Callable[..., list[Any]]:
    def call(tensors: Iterable[torch.Tensor], *args: Any, **kwargs: Any) -> list[Any]:
        name = kwargs.pop("name", None)
        return [
            function(t, *args, name=None if name is None else f"{name}.{i}", **kwargs)
            for i, t in enumerate(tensors)
        ]

    call.__name__ = f"grouped_{function.__name__}"
    call.__doc__ = f"{function.__name__} of each tensor; handles of several are one handle."
    return call


grouped_allreduce, grouped_allreduce_ = _grouped(allreduce), _grouped(allreduce_)
grouped_allreduce_async = _grouped(allreduce_async)
grouped_allreduce_async_ = _grouped(allreduce_async_)
grouped_allgather, grouped_allgather_async = _grouped(allgather), _grouped(allgather_async)
grouped_reducescatter = _grouped(reducescatter)
grouped_reducescatter_async = _grouped(reducescatter_async)


def sparse_allreduce_async(
    tensor: torch.Tensor, name: str | None, op: Any, process_set: ProcessSet | None = None
) -> Callable[[], torch.Tensor]:
    """Start adding up sparse tensors over ranks; the result is called for the sum, or the average."""
    held = tensor.coalesce()
    rows = allgather_async(held.indices().t(), None if name is None else f"{name}.indices", process_set)
    values = allgather_async(held.values(), None if name is None else f"{name}.values", process_set)

    def ready() -> torch.Tensor:
        total = torch.sparse_coo_tensor(synchronize(rows).t(), synchronize(values), tensor.shape).coalesce()
        average = reduction(op, None) == Average
        return total / (process_set or global_process_set).size() if average else total

    return ready


def barrier(process_set: ProcessSet | None = None) -> None:
    """Wait until all ranks are here."""
    synchronize(_launch(process_set, "barrier", None, exchanges.barrier))


def _gather_bytes(mine: torch.Tensor, name: str, process_set: ProcessSet | None) -> Iterable[torch.Tensor]:
    """Return the bytes of each rank."""
    sizes = synchronize(allgather_async(torch.tensor([len(mine)]), f"{name}.sizes", process_set))
    return synchronize(allgather_async(mine, name, process_set)).split(sizes.tolist())


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet | None = None) -> list[Any]:
    """Return the objects of all ranks, pickled on their way."""
    return [
        unpickle_tensor(part)
        for part in _gather_bytes(pickle_to_tensor(obj), name or "allgather_object", process_set)
    ]


def broadcast_object(
    obj: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet | None = None
) -> Any:
    """Return the root's object, pickled on its way."""
    here = rank() == root_rank
    data = pickle_to_tensor(obj) if here else torch.empty(0, dtype=torch.uint8)
    name = name or "broadcast_object"
    size_of = synchronize(broadcast_async(torch.tensor([len(data)]), root_rank, f"{name}.size", process_set))
    if not here:
        data = torch.empty(int(size_of), dtype=torch.uint8)
    data = synchronize(broadcast_async(data, root_rank, name, process_set))
    return obj if here else unpickle_tensor(data)


# -- the rest of Horovod's names ----------------------------------------------------------------------


def _refused(name: str, instead: str) -> Callable[..., NoReturn]:
    def call(*args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(f"hvd.{name} needs Horovod; over torch.distributed {instead}")

    call.__name__, call.__doc__ = name, f"Refuse: {instead}."
    return call


join = _refused("join", "loop over hvd.uneven(batches, optimizer), in which ranks may end at different steps")
start_timeline = _refused("start_timeline", "use torch.profiler, which records exchanges")
stop_timeline = _refused("stop_timeline", "use torch.profiler, which records exchanges")
_ELASTIC = "let torchrun start ranks again (--max-restarts), and go on from an hvd.Checkpoint"
elastic = SimpleNamespace(
    run=_refused("elastic.run", _ELASTIC), TorchState=_refused("elastic.TorchState", _ELASTIC)
)


def _no(verbose: bool = False) -> bool:
    """Return False."""
    return False


mpi_built = mpi_enabled = mpi_threads_supported = ddl_built = ccl_built = cuda_built = rocm_built = _no


def gloo_built(verbose: bool = False) -> bool:
    """Return whether there is Gloo."""
    return dist.is_gloo_available()


gloo_enabled = gloo_built


def nccl_built(verbose: bool = False) -> int:
    """Return whether there is NCCL."""
    return int(dist.is_nccl_available())


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Any = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: Any = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet | None = None,
) -> Any:
    """Return the optimizer with gradients averaged (or added) over ranks in ``step()``, as Horovod does.

    Collectives per step: one all-reduce for each dtype of the gradients.
    """
    return averaging_optimizer(
        optimizer,
        lambda t, name: synchronize(
            allreduce_async_(
                t,
                name=name,
                op=reduction(op, None),
                prescale_factor=1.0 / gradient_predivide_factor,
                postscale_factor=gradient_predivide_factor,
                process_set=process_set,
            )
        ),
        compression,
    )
