"""Which engine a process was launched for, and whether that engine knows of the other processes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hvdloss.errors import ConfigError

__all__ = ["ENGINES", "Launch", "check_launch", "choose_engine", "foreign_launch", "init_checked"]

#: What may move tensors between ranks; HVDLOSS_ENGINE names one.
ENGINES = ("horovod", "torch.distributed", "one process")


class Launch(NamedTuple):
    """The number of processes by the launcher, and the variable that has it."""

    launcher: str
    size: int
    variable: str


# Launcher; its variable for the number of processes; one that only its processes have beside it. Slurm sets
# SLURM_NTASKS in a batch script as well, whose one process may well train alone.
_LAUNCHERS = (
    ("torchrun (or accelerate, or deepspeed)", "WORLD_SIZE", "RANK"),
    ("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpiexec", "PMI_SIZE", "PMI_RANK"),
    ("Slurm's srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def choose_engine(
    environ: Mapping[str, str], *, horovod: bool, torch_distributed: bool, default_group: bool = False
) -> tuple[str, str]:
    """Return one of `ENGINES` for PyTorch, and why.

    Args:
        environ: the environment.
        horovod: whether Horovod is installed.
        torch_distributed: whether PyTorch was built with ``torch.distributed``.
        default_group: whether ``torch.distributed`` has a default process group already.

    Raises:
        ConfigError: HVDLOSS_ENGINE names none, or one that is not here.

    >>> torchrun = {"RANK": "0", "WORLD_SIZE": "2"}
    >>> choose_engine(torchrun, horovod=True, torch_distributed=True)
    ('torch.distributed', 'RANK and WORLD_SIZE are set, as by torchrun')
    >>> choose_engine({**torchrun, "HOROVOD_RANK": "0"}, horovod=True, torch_distributed=True)
    ('horovod', 'HOROVOD_RANK is set, as by horovodrun')
    >>> choose_engine({}, horovod=False, torch_distributed=True)
    ('one process', 'nothing says that there are others, and Horovod is not installed')
    """
    if wanted := environ.get("HVDLOSS_ENGINE", "").strip():
        here = {"horovod": horovod, "torch.distributed": torch_distributed, "one process": True}
        if wanted not in here:
            raise ConfigError(f"HVDLOSS_ENGINE={wanted!r} is none of {', '.join(map(repr, ENGINES))}")
        if not here[wanted]:
            raise ConfigError(f"HVDLOSS_ENGINE={wanted!r} is not installed; run `hvdloss doctor`")
        return wanted, "HVDLOSS_ENGINE says so"
    if horovod:
        for name, launcher in _HOROVODS.items():
            if name in environ:
                return "horovod", f"{name} is set, as by {launcher}"
    if torch_distributed:
        if default_group:
            return "torch.distributed", "there is a default process group already"
        size = environ.get("WORLD_SIZE", "").strip()
        if "RANK" in environ and size.isdecimal() and (int(size) > 1 or "MASTER_ADDR" in environ):
            return "torch.distributed", "RANK and WORLD_SIZE are set, as by torchrun"
    if horovod:
        return "horovod", "it is installed"
    launch = foreign_launch(environ)
    if torch_distributed and launch is not None and launch.variable.startswith("SLURM"):
        return "torch.distributed", "SLURM_PROCID is set, as by srun, and Horovod is not installed"
    return "one process", "nothing says that there are others, and Horovod is not installed"


# Ranks of Horovod's, and who sets them.
_HOROVODS = {
    "HOROVOD_RANK": "horovodrun",
    "OMPI_COMM_WORLD_RANK": "mpirun",
    "PMI_RANK": "mpiexec",
}


def foreign_launch(environ: Mapping[str, str]) -> Launch | None:
    """Return what a launcher that is not Horovod's says of several processes; None if none does.

    >>> foreign_launch({"WORLD_SIZE": "4", "RANK": "1"}).size
    4
    >>> foreign_launch({"WORLD_SIZE": "4", "RANK": "1", "HOROVOD_RANK": "0"}) is None
    True
    """
    if "HOROVOD_RANK" in environ:
        return None
    for launcher, size, rank in _LAUNCHERS:
        text = environ.get(size, "").strip()
        if rank in environ and text.isdecimal() and int(text) > 1:
            return Launch(launcher, int(text), size)
    return None


def check_launch(size: int, mpi_built: bool, environ: Mapping[str, str]) -> None:
    """Raise where every process of a launch would train a model of its own.

    Args:
        size: number of ranks that Horovod knows of.
        mpi_built: whether Horovod can be launched by mpirun and srun.
        environ: the environment.

    Raises:
        ConfigError: Horovod has one rank, and the launcher started several processes.
    """
    launch = foreign_launch(environ)
    if size > 1 or launch is None:
        return
    why = (
        "it cannot be launched that way"
        if launch.variable == "WORLD_SIZE"
        else "it was built without MPI, through which that launch would have to reach it"
        if not mpi_built
        else "its MPI does not belong to that launch (srun: try --mpi=pmix)"
    )
    raise ConfigError(
        f"hvd.init(): {launch.launcher} started {launch.size} processes ({launch.variable}={launch.size}), "
        f"but Horovod has 1 rank: {why}, so each process would train a model of its own. Launch with "
        f"`horovodrun -np {launch.size} python ...` (docs/howto/launching.md has Slurm, Kubernetes and Ray); "
        f"or, if every process is meant to train alone, unset {launch.variable}."
    )


def init_checked(
    hvd: Any, init: Callable[..., Any], shutdown: Callable[[], Any], others: Callable[[], int] = lambda: 1
) -> Callable[..., Any]:
    """Return an engine's ``init`` with :func:`check_launch` after it; not where ranks are chosen by ``comm``.

    Args:
        hvd: the Horovod module, or what stands in for it.
        init, shutdown: begin and end it.
        others: returns the number of ranks that the framework itself knows of.
    """

    @functools.wraps(init)
    def checked(comm: Any = None, *args: Any, **kwargs: Any) -> Any:
        if hasattr(hvd, "connect"):  # what the watch need not see
            hvd.connect()
        out = init(*([] if comm is None and not args else [comm]), *args, **kwargs)
        if not comm and hvd.is_initialized():
            try:
                check_launch(hvd.size(), bool(hvd.mpi_built()), os.environ)
                if hvd.size() < others():
                    raise ConfigError(
                        f"hvd.init(): torch.distributed has a process group of {others()} ranks, of which "
                        f"hvdloss.torch knew nothing when it was imported: each would train a model of its "
                        f"own. Import it after init_process_group(), or set HVDLOSS_ENGINE=torch.distributed"
                    )
            except ConfigError:
                shutdown()
                raise
        return out

    return checked
