"""Processes that something else than Horovod launched do not train alone without a word."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hvdloss.comm.launch import check_launch, choose_engine, foreign_launch, init_checked
from hvdloss.errors import ConfigError

SEVERAL = {
    "torchrun": {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
    "mpiexec": {"PMI_SIZE": "4", "PMI_RANK": "1"},
    "srun": {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"},
}
ALONE = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost"}  # torchrun of one process
ONE = [
    {},
    {"WORLD_SIZE": "4"},  # left over in a shell
    {"WORLD_SIZE": "1", "RANK": "0"},
    {"WORLD_SIZE": "four", "RANK": "0"},
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script's own process
]


@pytest.mark.parametrize("launcher", SEVERAL)
@pytest.mark.parametrize("mpi_built", [False, True])
def test_several_processes_that_horovod_does_not_know_of_are_refused(launcher, mpi_built):
    environ = SEVERAL[launcher]
    with pytest.raises(ConfigError, match=f"{launcher}.*=4.*horovodrun -np 4.*unset") as caught:
        check_launch(1, mpi_built, environ)
    if launcher != "torchrun":
        assert ("without MPI" in str(caught.value)) is not mpi_built
    check_launch(4, mpi_built, environ)  # through MPI
    check_launch(1, mpi_built, {**environ, "HOROVOD_RANK": "0", "HOROVOD_SIZE": "1"})  # horovodrun within


@pytest.mark.parametrize("environ", ONE)
def test_one_process_may_train_alone(environ):
    assert foreign_launch(environ) is None
    check_launch(1, False, environ)


@pytest.mark.parametrize(
    ("environ", "default_group", "with_horovod", "without"),
    [
        ({}, False, "horovod", "one process"),
        (SEVERAL["torchrun"], False, "torch.distributed", "torch.distributed"),
        (
            {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "h"},
            False,
            "torch.distributed",
            "torch.distributed",
        ),
        ({"WORLD_SIZE": "1", "RANK": "0"}, False, "horovod", "one process"),  # left over in a shell
        ({"WORLD_SIZE": "four", "RANK": "0"}, False, "horovod", "one process"),
        ({**SEVERAL["torchrun"], "HOROVOD_RANK": "0"}, False, "horovod", "torch.distributed"),
        ({**SEVERAL["torchrun"], **SEVERAL["Open MPI"]}, False, "horovod", "torch.distributed"),
        (SEVERAL["Open MPI"], False, "horovod", "one process"),  # which check_launch refuses
        (SEVERAL["srun"], False, "horovod", "torch.distributed"),
        ({}, True, "torch.distributed", "torch.distributed"),
        ({"HOROVOD_RANK": "0"}, True, "horovod", "torch.distributed"),
        ({**SEVERAL["torchrun"], "HVDLOSS_ENGINE": "one process"}, False, "one process", "one process"),
    ],
)
def test_the_engine_is_the_one_that_the_launch_is_for(environ, default_group, with_horovod, without):
    for horovod, expected in ((True, with_horovod), (False, without)):
        found, why = choose_engine(
            environ, horovod=horovod, torch_distributed=True, default_group=default_group
        )
        assert found == expected
        assert why


def test_without_torch_distributed_there_is_horovod_or_one_process():
    assert choose_engine(SEVERAL["torchrun"], horovod=True, torch_distributed=False)[0] == "horovod"
    assert choose_engine(SEVERAL["torchrun"], horovod=False, torch_distributed=False)[0] == "one process"


@pytest.mark.parametrize("engine", ["nccl", "horovod", "torch.distributed"])
def test_an_engine_that_is_not_here_is_refused(engine):
    with pytest.raises(ConfigError, match=f"HVDLOSS_ENGINE='{engine}'"):
        choose_engine({"HVDLOSS_ENGINE": engine}, horovod=False, torch_distributed=False)


def test_init_ends_what_it_began_before_it_refuses(monkeypatch):
    for name, value in SEVERAL["torchrun"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HOROVOD_RANK", raising=False)
    calls = []
    hvd = SimpleNamespace(
        is_initialized=lambda: bool(calls) and calls[-1][0] == "init", size=lambda: 1, mpi_built=lambda: True
    )
    init = init_checked(
        hvd, lambda *a, **k: calls.append(("init", a, k)), lambda: calls.append(("shutdown",))
    )
    with pytest.raises(ConfigError, match="torchrun"):
        init()
    assert calls == [("init", (), {}), ("shutdown",)]
    init([0], process_sets=[])  # chosen by the caller
    assert calls[-1] == ("init", ([0],), {"process_sets": []})
