"""What is there to build with: looked at, never changed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvdloss.cli import machine
from hvdloss.cli.errors import InstallError
from hvdloss.cli.install import recipe

FRAMEWORKS = ("torch", "tensorflow")
APT_BUILD = "apt-get install g++ make"
APT_MPI = "apt-get install libopenmpi-dev openmpi-bin"


@dataclass(frozen=True)
class Framework:
    """An installed framework that was imported to see that it works."""

    name: str
    version: str
    cxx11_abi: bool
    cuda: str | None = None
    rocm: str | None = None
    gpu_arches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tool:
    """A program, where it lies and its version."""

    path: str
    version: str


@dataclass(frozen=True)
class Mpi:
    """An MPI that programs can be built and started with."""

    compiler: str
    launcher: str
    flavour: str


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit with its compiler."""

    home: str
    version: str


@dataclass(frozen=True)
class Nccl:
    """NCCL's header and shared library."""

    include: str
    library: str
    version: str
    origin: str


@dataclass
class Probe:
    """Everything that was found. `trouble` says why a framework or tool cannot be used."""

    python: str
    platform: str
    cores: int
    frameworks: dict[str, Framework] = field(default_factory=dict)
    compiler: Tool | None = None
    make: str | None = None
    cmake: Tool | None = None
    ccache: str | None = None
    mpi: Mpi | None = None
    cuda: Cuda | None = None
    nccl: Nccl | None = None
    trouble: dict[str, str] = field(default_factory=dict)


def look(frameworks: Sequence[str], *, want_gpu: bool = False) -> Probe:
    """Look at this machine and this Python; `frameworks` are those to look for."""
    probe = Probe(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=f"{platform.system()} {platform.machine()}",
        cores=machine.usable_cores(),
    )
    present = [name for name in frameworks if importlib.util.find_spec(name) is not None]
    for name, answer in machine.inquire_all("inquire_framework.py", present).items():
        if answer.facts is None:
            probe.trouble[name] = f"installed, but importing it fails: {answer.trouble}"
            continue
        probe.frameworks[name] = Framework(
            name=name,
            version=answer.facts["version"],
            cxx11_abi=answer.facts["cxx11_abi"],
            cuda=answer.facts["cuda"],
            rocm=answer.facts["rocm"],
            gpu_arches=_arches(answer.facts),
        )
    for name in frameworks:
        if name not in present:
            probe.trouble[name] = "not installed"
    probe.compiler = _compiler(probe)
    probe.make = shutil.which("make") or shutil.which("gmake")
    probe.cmake = _cmake(probe)
    probe.ccache = shutil.which("ccache")
    probe.mpi = _mpi(probe)
    if want_gpu:
        probe.cuda = _cuda(probe)
        probe.nccl = _nccl(probe)
    return probe


def require_python() -> None:
    """Refuse a Python, a platform or an environment that cannot be built for or installed into.

    Raises:
        InstallError: with the way out; nothing has been changed.
    """
    if platform.python_implementation() != "CPython":
        raise InstallError(
            f"Horovod builds for CPython, and this is {platform.python_implementation()}.",
            "use CPython 3.10 or newer",
        )
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise InstallError(
            "This is the free-threaded build of Python, which Horovod was not written for.",
            "use the ordinary build of the same version",
        )
    if platform.system() != "Linux":
        hint = "use WSL 2" if platform.system() == "Windows" else "use Linux, or a container"
        raise InstallError(f"hvdloss install builds on Linux, and this is {platform.system()}.", hint)
    if platform.machine() not in ("x86_64", "aarch64") or sys.maxsize < 2**32:
        raise InstallError(
            f"No known build for a {platform.architecture()[0]} Python on {platform.machine()}.",
            "use 64-bit Linux on x86_64 or aarch64",
        )
    in_venv = sys.prefix != sys.base_prefix
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if marker.exists() and not in_venv and os.environ.get("PIP_BREAK_SYSTEM_PACKAGES") != "1":
        raise InstallError(
            f"{sys.executable} belongs to the system, and pip may not install into it.",
            "make a virtual environment: python3 -m venv .venv && . .venv/bin/activate,"
            " then install the framework and hvdloss there",
        )
    target = sysconfig.get_path("platlib")
    if not os.access(target, os.W_OK):
        user = site.getusersitepackages() if site.ENABLE_USER_SITE else None
        raise InstallError(
            f"{target} may not be written to" + (f" (and {user} is not used)." if user else "."),
            "use a virtual environment of your own",
        )


def require_tools(probe: Probe) -> None:
    """Refuse when something that every build needs is missing.

    Raises:
        InstallError: naming what is missing and how to get it; nothing has been changed.
    """
    if not probe.frameworks:
        broken = [f"{name}: {why}" for name, why in probe.trouble.items() if why != "not installed"]
        raise InstallError(
            "Neither PyTorch nor TensorFlow can be imported by " + sys.executable + ".",
            "pip install torch, or pip install tensorflow-cpu, into this environment first"
            " (Horovod is compiled against it)",
            detail="\n".join(line for line in broken if line.split(":")[0] in FRAMEWORKS),
        )
    if probe.compiler is None:
        raise InstallError(probe.trouble.get("compiler", "No C++ compiler was found."), APT_BUILD)
    if probe.make is None:
        raise InstallError("No make was found.", APT_BUILD)
    if "python headers" in probe.trouble:
        raise InstallError(
            f"Python's own headers are missing: {probe.trouble['python headers']}.",
            f"apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev"
            " (or python3-dev), or use a Python that brings them",
        )


def _arches(facts: dict[str, object]) -> tuple[str, ...]:
    """GPU architectures to build for: those of the GPUs here, or else those torch was built for."""
    gpus = facts.get("gpus") or []
    assert isinstance(gpus, list)
    here = sorted({str(gpu["capability"]) for gpu in gpus}, key=int)
    if here:
        return tuple(here)
    arches = facts.get("gpu_arches") or []
    assert isinstance(arches, list)
    return tuple(arch for arch in arches if arch.isdigit())


def _compiler(probe: Probe) -> Tool | None:
    """The C++ compiler that CMake will take, tried on a program that includes Python.h."""
    named = os.environ.get("CXX")
    path = shutil.which(named.split()[0]) if named else shutil.which("c++") or shutil.which("g++")
    if path is None:
        probe.trouble["compiler"] = (
            f"The C++ compiler that CXX names, {named}, was not found."
            if named
            else "No C++ compiler was found."
        )
        return None
    if shutil.which(os.environ.get("CC", "cc").split()[0]) is None and not shutil.which("gcc"):
        probe.trouble["compiler"] = "A C++ compiler is there, but no C compiler (cc)."
        return None
    _, text = machine.run_quietly([path, "--version"])
    full = machine.run_quietly([path, "-dumpfullversion"])[1].strip()
    version = full if full[:1].isdigit() else machine.version_in(text) or "?"
    first = text.splitlines()[0] if text else path
    is_gcc = "clang" not in text.lower()
    if is_gcc and (machine.version_tuple(version) or (99,))[0] < recipe.GCC_MINIMUM:
        probe.trouble["compiler"] = (
            f"{first} is too old: current frameworks' headers are C++20, gcc {recipe.GCC_MINIMUM} or newer."
        )
        return None
    tool = Tool(path, ("gcc " if is_gcc else "clang ") + version)
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        probe.trouble["python headers"] = f"no Python.h in {include}"
        return tool
    with tempfile.TemporaryDirectory(prefix="hvdloss-") as folder:
        source = Path(folder) / "try.cc"
        source.write_text("#include <Python.h>\n#include <string>\nint main() { return 0; }\n")
        command = [path, "-std=c++20", "-I", include, "-fsyntax-only", str(source)]
        status, output = machine.run_quietly(command, timeout=60)
    if status != 0:
        errors = [line for line in output.splitlines() if "error" in line]
        why = errors[0] if errors else f"exit status {status}"
        if "Python.h" in why or "pyconfig" in why:
            probe.trouble["python headers"] = why
            return tool
        probe.trouble["compiler"] = f"{path} cannot compile a small C++20 program: {why}."
        return None
    return tool


def _cmake(probe: Probe) -> Tool | None:
    """A CMake that is new enough, or None (then the build takes one from PyPI)."""
    path = os.environ.get("HOROVOD_CMAKE") or shutil.which("cmake")
    if path is None:
        probe.trouble["cmake"] = "none on PATH"
        return None
    status, text = machine.run_quietly([path, "--version"])
    version = machine.version_in(text)
    if status != 0 or version is None:
        probe.trouble["cmake"] = f"{path} does not run"
        return None
    if machine.version_tuple(version) < recipe.CMAKE_MINIMUM:
        probe.trouble["cmake"] = f"{path} is {version}, older than 3.13"
        return None
    return Tool(path, version)


def _mpi(probe: Probe) -> Mpi | None:
    """An MPI with headers, a compiler wrapper and a launcher."""
    launcher = shutil.which("mpirun")
    compiler = shutil.which("mpicxx") or shutil.which("mpic++") or shutil.which("mpiicpc")
    if launcher is None or compiler is None:
        missing = [n for n, p in (("mpirun", launcher), ("mpicxx", compiler)) if p is None]
        probe.trouble["mpi"] = f"no {' and no '.join(missing)}"
        return None
    flavour = machine.mpi_flavour(machine.run_quietly([launcher, "--version"])[1])
    if flavour is None:
        probe.trouble["mpi"] = f"{launcher} --version names no MPI that horovodrun knows"
        return None
    with tempfile.TemporaryDirectory(prefix="hvdloss-") as folder:
        source = Path(folder) / "try.cc"
        source.write_text("#include <mpi.h>\nint main() { return MPI_VERSION > 9; }\n")
        command = [compiler, "-fsyntax-only", str(source)]
        status, output = machine.run_quietly(command, timeout=60)
    if status != 0:
        errors = [line for line in output.splitlines() if "error" in line] or [f"status {status}"]
        probe.trouble["mpi"] = f"{compiler} does not compile: {errors[0]}"
        return None
    return Mpi(compiler, launcher, flavour)


def _cuda(probe: Probe) -> Cuda | None:
    """The CUDA toolkit: named by the environment, on PATH, or at its usual place."""
    homes = [os.environ.get(name) for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH")]
    on_path = shutil.which("nvcc")
    if on_path:
        # nvcc may be a link or a wrapper outside the toolkit: let it say where its toolkit is.
        homes += [_toolkit_of(on_path), str(Path(on_path).resolve().parent.parent)]
    homes.append("/usr/local/cuda")
    tried = []
    for home in homes:
        if not home or home in tried:
            continue
        tried.append(home)
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.exists() or not _header("cuda_runtime.h", home):
            continue
        status, text = machine.run_quietly([str(nvcc), "--version"])
        release = text.partition("release ")[2].partition(",")[0]
        if status == 0 and release:
            return Cuda(home, release)
    probe.trouble["cuda"] = "no toolkit (bin/nvcc and its headers) in " + ", ".join(tried)
    return None


def _toolkit_of(nvcc: str) -> str | None:
    try:
        done = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "/dev/null"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in done.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return str(Path(line.partition("=")[2].strip()).resolve())
    return None


def _header(name: str, home: str) -> bool:
    places = [Path(home) / "include", *(Path(home) / "targets").glob("*/include")]
    return any((place / name).exists() for place in places)


def _nccl(probe: Probe) -> Nccl | None:
    """NCCL: named by the environment, from an nvidia-nccl package, or the system's."""
    places: list[tuple[Path, Path, str]] = []
    named = os.environ.get("HOROVOD_NCCL_HOME")
    if named:
        places.append((Path(named) / "include", Path(named) / "lib", "HOROVOD_NCCL_HOME"))
    # The package first: it is the library that torch itself loads.
    for folder in _site_folders():
        home = folder / "nvidia" / "nccl"
        places.append((home / "include", home / "lib", _nccl_package()))
    if probe.cuda:
        toolkit = Path(probe.cuda.home)
        places += [(toolkit / "include", toolkit / lib, "the CUDA toolkit") for lib in ("lib64", "lib")]
    for system in (f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/lib64"):
        places.append((Path("/usr/include"), Path(system), "the system"))
    for include, lib, origin in places:
        header = include / "nccl.h"
        library = next((lib / n for n in ("libnccl.so", "libnccl.so.2") if (lib / n).exists()), None)
        if library is None or not header.exists():
            continue
        numbers = {
            key: value
            for line in header.read_text(errors="replace").splitlines()
            for key in ("NCCL_MAJOR", "NCCL_MINOR", "NCCL_PATCH")
            for value in [line.removeprefix(f"#define {key} ").strip()]
            if value.isdigit()
        }
        version = ".".join(numbers.get(f"NCCL_{k}", "?") for k in ("MAJOR", "MINOR", "PATCH"))
        return Nccl(str(include), str(library), version, origin)
    probe.trouble["nccl"] = "no nccl.h with a libnccl.so in any known place"
    return None


def _site_folders() -> list[Path]:
    return [Path(entry) for entry in sys.path if entry and Path(entry).is_dir()]


def _nccl_package() -> str:
    for distribution in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        try:
            return f"{distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "an nvidia-nccl package"
