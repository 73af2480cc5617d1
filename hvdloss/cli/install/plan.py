"""From what was found and what was asked for to what will be built, and under which name."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass

from hvdloss.cli import machine
from hvdloss.cli.errors import InstallError
from hvdloss.cli.install import recipe
from hvdloss.cli.install.probe import APT_MPI, FRAMEWORKS, Framework, Probe

#: Memory that one compiler process was seen to take at its peak, roughly (TensorFlow's headers).
_BYTES_PER_JOB = 1.5e9
#: Features that Horovod's half-precision code uses where the processor has them.
_ARCH_FLAGS = ("f16c", "avx", "fma")


@dataclass(frozen=True)
class Plan:
    """One build: everything that the wheel depends on, and how fast to go."""

    frameworks: tuple[Framework, ...]
    gloo: bool
    mpi: str | None
    nccl: str | None
    cuda: str | None
    gpu_arches: tuple[str, ...]
    jobs: int
    key: str
    facts: dict[str, object]
    notes: tuple[str, ...] = ()

    @property
    def framework_names(self) -> tuple[str, ...]:
        """'torch', 'tensorflow': what is built, in that order."""
        return tuple(framework.name for framework in self.frameworks)

    @property
    def controllers(self) -> tuple[str, ...]:
        """'gloo', 'mpi': the controllers that horovodrun can start a job with."""
        return (("gloo",) if self.gloo else ()) + (("mpi",) if self.mpi else ())

    @property
    def operations(self) -> dict[str, bool]:
        """What Horovod's own ``gloo_built()`` and its like will say."""
        return {"gloo": self.gloo, "mpi": self.mpi is not None, "nccl": self.nccl is not None}

    def describe(self) -> str:
        """One line: 'torch 2.13.0 and tensorflow 2.21.0, with Gloo and Open MPI 4.1.4'."""
        names = " and ".join(f"{f.name} {f.version}" for f in self.frameworks)
        parts = ["Gloo"] if self.gloo else []
        parts += [self.mpi] if self.mpi else []
        parts += [f"NCCL {self.nccl}"] if self.nccl else []
        return f"{names}, with {' and '.join(parts)}"


def make_plan(
    probe: Probe,
    *,
    frameworks: Sequence[str] = (),
    gloo: bool = True,
    mpi: bool | None = None,
    nccl: bool = False,
    jobs: int | None = None,
) -> Plan:
    """Decide what to build.

    Args:
        probe: what was found.
        frameworks: those asked for; none means all that were found.
        gloo: build the Gloo controller.
        mpi: build the MPI controller; None means if an MPI was found.
        nccl: build GPU operations with NCCL (PyTorch only).
        jobs: compiler processes at a time; None means what cores and memory allow.

    Raises:
        InstallError: something asked for cannot be built; nothing has been changed.
    """
    notes: list[str] = []
    for name in frameworks:
        if name not in probe.frameworks:
            raise InstallError(
                f"{name} was asked for, but is {probe.trouble.get(name, 'not installed')}.",
                f"install {name} into this environment first, or leave it out of --frameworks",
            )
    chosen = [probe.frameworks[n] for n in FRAMEWORKS if n in (frameworks or probe.frameworks)]
    if nccl:
        chosen = _only_torch(chosen, asked=bool(frameworks), notes=notes)
    for framework in chosen:
        if framework.rocm:
            raise InstallError(
                f"{framework.name} {framework.version} is built for ROCm, which has no recipe here.",
                "install its CPU or CUDA build",
            )
        if framework.cuda and not nccl:
            way = ": --nccl builds GPU operations" if framework.name == "torch" else ""
            notes.append(f"{framework.name} can use CUDA; Horovod will reduce CPU tensors{way}")
    if mpi and probe.mpi is None:
        raise InstallError(
            f"MPI was asked for, but there is {probe.trouble.get('mpi', 'none')}.",
            f"{APT_MPI}, or leave --mpi out: Gloo needs nothing",
        )
    flavour = probe.mpi.flavour if probe.mpi and mpi is not False else None
    if not gloo and flavour is None:
        raise InstallError("Neither Gloo nor MPI is left to build.", "leave --no-gloo out, or install an MPI")
    cuda, nccl_version, arches = _gpu(probe, chosen) if nccl else (None, None, ())
    facts: dict[str, object] = {
        "horovod": recipe.VERSION,
        "recipe": recipe.RECIPE,
        "python": f"cp{sys.version_info[0]}{sys.version_info[1]}{getattr(sys, 'abiflags', '')}",
        "soabi": sysconfig.get_config_var("SOABI"),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "arch_flags": arch_flags(),
        "frameworks": {
            f.name: {"version": f.version, "cuda": f.cuda, "cxx11_abi": f.cxx11_abi} for f in chosen
        },
        "gloo": gloo,
        "mpi": flavour,
        "nccl": nccl_version,
        "cuda": cuda,
        "gpu_arches": list(arches),
    }
    return Plan(
        frameworks=tuple(chosen),
        gloo=gloo,
        mpi=flavour,
        nccl=nccl_version,
        cuda=cuda,
        gpu_arches=arches,
        jobs=jobs or default_jobs(probe.cores),
        key=cache_key(facts),
        facts=facts,
        notes=tuple(notes),
    )


def cache_key(facts: dict[str, object]) -> str:
    """A folder name that people can read and that differs whenever any fact differs."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    frameworks = facts["frameworks"]
    assert isinstance(frameworks, dict)
    parts = [str(facts["python"])]
    parts += [f"{name}{frameworks[name]['version']}" for name in frameworks]
    parts += [name for name in ("gloo", "mpi", "nccl") if facts[name]]
    return re.sub(r"[^\w.-]+", "_", "-".join(parts)) + "-" + digest


def arch_flags() -> str:
    """The compiler flags for the processor features that Horovod can use."""
    has = machine.cpu_flags()
    return " ".join(f"-m{flag}" for flag in _ARCH_FLAGS if flag in has)


def default_jobs(cores: int) -> int:
    """As many compiler processes as there are cores, and as memory allows."""
    memory = machine.available_memory()
    return cores if memory is None else max(1, min(cores, int(memory / _BYTES_PER_JOB)))


def build_environment(plan: Plan, probe: Probe) -> dict[str, str]:
    """What Horovod's build reads from the environment, complete: nothing inherited decides."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HOROVOD_")}
    env.update(
        MAKEFLAGS=f"-j{plan.jobs}",
        HOROVOD_BUILD_ARCH_FLAGS=arch_flags(),
        HOROVOD_WITHOUT_MXNET="1",
        # Gloo asks for a minimum that CMake 4 has dropped; older CMakes ignore this.
        CMAKE_POLICY_VERSION_MINIMUM="3.5",
        CMAKE_GENERATOR="Unix Makefiles",
        TF_CPP_MIN_LOG_LEVEL="3",
    )
    for name, part in (("torch", "PYTORCH"), ("tensorflow", "TENSORFLOW")):
        env[f"HOROVOD_{'WITH' if name in plan.framework_names else 'WITHOUT'}_{part}"] = "1"
    env[f"HOROVOD_{'WITH' if plan.gloo else 'WITHOUT'}_GLOO"] = "1"
    env[f"HOROVOD_{'WITH' if plan.mpi else 'WITHOUT'}_MPI"] = "1"
    if plan.nccl and probe.cuda and probe.nccl:
        home = probe.cuda.home
        env.update(
            HOROVOD_GPU_OPERATIONS="NCCL",
            HOROVOD_CUDA_HOME=home,
            CUDA_HOME=home,
            CUDAToolkit_ROOT=home,
            HOROVOD_NCCL_INCLUDE=probe.nccl.include,
            HOROVOD_NCCL_LIB=os.path.dirname(probe.nccl.library),
            HOROVOD_NCCL_LINK="shared",
            PATH=f"{home}/bin{os.pathsep}{env.get('PATH', os.defpath)}",
        )
        if plan.gpu_arches:
            env["HOROVOD_BUILD_CUDA_CC_LIST"] = ",".join(plan.gpu_arches)
    else:
        env["HOROVOD_WITHOUT_CUDA"] = "1"
    return env


def _only_torch(chosen: list[Framework], *, asked: bool, notes: list[str]) -> list[Framework]:
    """With NCCL every framework's code is compiled for the GPU; only PyTorch's is known to."""
    torch = [framework for framework in chosen if framework.name == "torch"]
    if not torch:
        raise InstallError(
            "--nccl needs PyTorch, which was not found or not asked for.",
            "install a CUDA build of torch, or leave --nccl out",
        )
    if len(chosen) > len(torch):
        if asked:
            raise InstallError(
                "--nccl with TensorFlow has no recipe here: Horovod's GPU code does not compile"
                " against a current TensorFlow.",
                "--frameworks torch, or leave --nccl out",
            )
        notes.append("tensorflow is left out: with NCCL there is a recipe for torch only")
    return torch


def _gpu(probe: Probe, chosen: list[Framework]) -> tuple[str, str, tuple[str, ...]]:
    torch = chosen[0]
    if torch.cuda is None:
        raise InstallError(
            f"--nccl needs a CUDA build of PyTorch, and torch {torch.version} is a CPU build.",
            "install torch's CUDA build (https://pytorch.org/get-started), or leave --nccl out",
        )
    if probe.cuda is None:
        raise InstallError(
            f"--nccl needs a CUDA toolkit: {probe.trouble.get('cuda', 'none was found')}.",
            f"install CUDA toolkit {torch.cuda} and set CUDA_HOME to it",
        )
    if probe.cuda.version.split(".")[0] != torch.cuda.split(".")[0]:
        raise InstallError(
            f"torch {torch.version} is built for CUDA {torch.cuda}, but the toolkit at"
            f" {probe.cuda.home} is {probe.cuda.version}.",
            f"set CUDA_HOME to a CUDA {torch.cuda.split('.')[0]} toolkit",
        )
    if probe.nccl is None:
        major = torch.cuda.split(".")[0]
        raise InstallError(
            f"--nccl needs NCCL: {probe.trouble.get('nccl', 'none was found')}.",
            f"pip install nvidia-nccl-cu{major}, or set HOROVOD_NCCL_HOME",
        )
    return probe.cuda.version, probe.nccl.version, torch.gpu_arches
