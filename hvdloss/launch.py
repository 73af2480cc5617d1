"""Whether this process is one of several that a launcher started, and Horovod knows of the others."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hvdloss.errors import ConfigError

__all__ = ["Launch", "check_launch", "foreign_launch", "init_checked"]


class Launch(NamedTuple):
    """What a launcher told this process: how many there are, and in which variable."""

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
        size: how many ranks Horovod knows of.
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
        f"`horovodrun -np {launch.size} python ...` (docs/launching.md has Slurm, Kubernetes and Ray); or, "
        f"if every process is meant to train alone, unset {launch.variable}."
    )


def init_checked(hvd: Any, init: Callable[..., Any], shutdown: Callable[[], Any]) -> Callable[..., Any]:
    """Return Horovod's ``init`` with :func:`check_launch` after it; not where ranks are chosen by ``comm``.

    Args:
        hvd: the Horovod module, or its one-process stand-in.
        init, shutdown: begin and end it.
    """

    @functools.wraps(init)
    def checked(comm: Any = None, *args: Any, **kwargs: Any) -> Any:
        out = init(*([] if comm is None and not args else [comm]), *args, **kwargs)
        if not comm and hvd.is_initialized():
            try:
                check_launch(hvd.size(), bool(hvd.mpi_built()), os.environ)
            except ConfigError:
                shutdown()
                raise
        return out

    return checked
