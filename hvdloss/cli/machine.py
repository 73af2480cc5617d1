"""Questions about this machine that `install` and `doctor` both ask."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"
_MARK = "HVDLOSS-JSON "


def run_quietly(
    command: Sequence[str], timeout: float = 20.0, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run a short command; return its exit status and all it printed.

    A program that is not there, or does not end in time, gives a status other than 0.
    """
    try:
        done = subprocess.run(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            env=None if env is None else dict(env),
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        return 127, f"{command[0]}: not found"
    except PermissionError:
        return 126, f"{command[0]}: may not be run"
    except OSError as error:
        return 126, f"{command[0]}: {error}"
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]}: no answer in {timeout:.0f} s"
    return done.returncode, done.stdout


@dataclass(frozen=True)
class Answer:
    """What a script of `hvdloss.cli.scripts` said: `facts`, or None and why in `trouble`."""

    facts: dict[str, Any] | None
    trouble: str = ""


def inquire(script: str, *arguments: str, timeout: float = 180.0) -> Answer:
    """Run a script of `hvdloss.cli.scripts` under this Python and read its answer."""
    env = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0")
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    status, output = run_quietly(command, timeout=timeout, env=env)
    for line in reversed(output.splitlines()):
        if line.startswith(_MARK):
            facts: dict[str, Any] = json.loads(line[len(_MARK) :])
            return Answer(facts)
    lines = [line for line in output.splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else "it printed nothing"
    if status < 0:
        reason = f"killed by signal {-status}; {reason}"
    return Answer(None, reason)


def inquire_all(script: str, names: Sequence[str]) -> dict[str, Answer]:
    """`inquire` for each name, at the same time (each imports a framework, which takes seconds)."""
    if not names:
        return {}
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(lambda name: inquire(script, name), names), strict=True))


def version_in(text: str) -> str | None:
    """The first dotted number in a program's ``--version`` output."""
    found = re.search(r"\d+(?:\.\d+)+", text)
    return found.group(0) if found else None


def version_tuple(version: str | None) -> tuple[int, ...]:
    """'3.25.1' -> (3, 25, 1); None -> ()."""
    return tuple(int(part) for part in re.findall(r"\d+", version or "")[:3])


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut by a container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores


def available_memory() -> int | None:
    """Bytes of memory that can still be had, or None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags as Linux names them (empty where it does not say)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def gpus() -> list[str]:
    """The NVIDIA GPUs that ``nvidia-smi`` lists, by name and memory."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    status, output = run_quietly(query)
    return [line.strip() for line in output.splitlines() if line.strip()] if status == 0 else []


def script_path(name: str) -> str | None:
    """Where a console script of this Python's environment lies: beside it first, then on PATH."""
    folders = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    return shutil.which(name, path=os.pathsep.join(folders)) or shutil.which(name)


def mpi_flavour(text: str) -> str | None:
    """The MPI implementation and version that ``mpirun --version`` names."""
    for mark, name in (
        ("Open MPI", "Open MPI"),
        ("OpenRTE", "Open MPI"),
        ("Spectrum MPI", "Spectrum MPI"),
        ("Intel(R) MPI", "Intel MPI"),
        ("HYDRA", "MPICH"),
        ("MPICH", "MPICH"),
    ):
        if mark in text:
            return f"{name} {version_in(text) or ''}".strip()
    return None
