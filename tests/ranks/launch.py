"""The outer side: starts ranks for a list of cases, and learns from their files what became of each."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
MODULES = HERE / "parallel"
LAWS = HERE / "laws"
START_SECONDS = 120.0  # a busy machine takes long to import a framework
FRESH_STARTS = int(
    os.environ.get("HVDLOSS_FRESH_STARTS", "12")
)  # of one launch, each after a case that failed
START = "(start)"  # in the place of a case: when a rank began, and what its imports took
GOOD = ("passed", "skipped")


@dataclass
class Outcome:
    """What became of one case in one launch: each rank's record, and the launch's output if it matters."""

    ranks: dict[int, dict[str, Any]] = field(default_factory=dict)
    problem: str = ""
    output: str = ""

    @property
    def sound(self) -> bool:
        """Whether the case passed, or was skipped, on every rank."""
        return not self.problem and all(r["status"] in GOOD for r in self.ranks.values())

    @property
    def text(self) -> str:
        """What went wrong, equal texts of several ranks once."""
        merged: dict[tuple[str, str], list[int]] = {}
        for rank, record in sorted(self.ranks.items()):
            if record["status"] not in GOOD:
                merged.setdefault((record["status"], record["text"]), []).append(rank)
        told = [
            f"rank {', '.join(map(str, ranks))} {status}:\n{text}" for (status, text), ranks in merged.items()
        ]
        tail = f"\n--- output of the launch ---\n{self.output}" if self.output else ""
        return "\n".join([self.problem, *told]) + tail


@functools.cache
def missing_controller(controller: str) -> str:
    """Return why launches with `controller` cannot run here, or an empty string."""
    if controller == "dist":
        return "" if importlib.util.find_spec("torch") else "PyTorch is not installed"
    if importlib.util.find_spec("horovod") is None:
        return "Horovod is not installed; run `hvdloss install`"
    if controller == "mpi" and shutil.which("mpirun") is None:
        return "mpirun is not installed (Debian: openmpi-bin), so MPI launches are SKIPPED"
    probe = f"import horovod.{{}} as hvd; print(hvd.{controller}_built())"
    for framework in ("torch", "tensorflow"):
        if importlib.util.find_spec(framework) is None:
            continue
        out = subprocess.run(
            [sys.executable, "-c", probe.format(framework)],
            capture_output=True,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        if out.returncode == 0:
            built = out.stdout.split()[-1] in ("True", "1")
            return "" if built else f"Horovod was built without {controller}, so its launches are SKIPPED"
    return "Horovod loads with no framework here; run `hvdloss doctor`"


def environment() -> dict[str, str]:
    """Return the environment of ranks: one thread each, and signs of a stall early."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {
        **os.environ,
        **threads,
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONUNBUFFERED": "1",
        "HVDLOSS_TEST_PROCESS": str(os.getpid()),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "HOROVOD_STALL_CHECK_TIME_SECONDS": "5",
        "HOROVOD_DYNAMIC_PROCESS_SETS": "1",  # cases make their own
        # More ranks than cores: let waiting ranks give their core away.
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }


def run_launch(
    specs: Sequence[str],
    controller: str,
    np: int,
    *,
    seconds: float,
    costs: list[dict[str, Any]] | None = None,
) -> dict[str, Outcome]:
    """Run cases ("module:name") under real ranks and return the outcome of each.

    A case that does not pass ends its ranks; those after it get fresh ones, as nobody knows what state it
    left Horovod, the watch and the numbering of messages in. What each start of horovodrun cost is appended
    to `costs`: seconds in all, until ranks began, and of their imports; processor seconds.
    """
    outcomes: dict[str, Outcome] = {}
    for _ in range(FRESH_STARTS + 1):
        left = [spec for spec in specs if spec not in outcomes]
        if not left:
            break
        with tempfile.TemporaryDirectory(prefix="hvdloss-ranks-") as folder:
            began, used = time.time(), _processor_seconds()
            problem, output = _start(left, controller, np, Path(folder), seconds)
            records = _read(Path(folder), np)
            starts = [r.pop(START) for r in records.values() if START in r]
            if costs is not None:
                costs.append(
                    {
                        "seconds": time.time() - began,
                        "processor": _processor_seconds() - used,
                        "start": max((s["began"] for s in starts), default=began) - began,
                        "imports": max((s["seconds"] for s in starts), default=0.0),
                    }
                )
        for spec in left:
            of_case = {rank: r[spec] for rank, r in records.items() if spec in r}
            outcomes[spec] = outcome = Outcome(of_case)
            if len(of_case) < np:
                lost = ", ".join(str(rank) for rank in range(np) if rank not in of_case)
                outcome.problem = f"did not finish on rank(s) {lost}; {problem or 'the ranks ended'}"
                outcome.output = output
            elif any(r["status"] == "hung" for r in of_case.values()):
                outcome.problem, outcome.output = "ranks hung", output
            if not outcome.sound:
                break
    for spec in specs:
        outcomes.setdefault(
            spec,
            Outcome(
                problem=f"not run: {FRESH_STARTS + 1} cases of this launch failed before it "
                f"(HVDLOSS_FRESH_STARTS=100 goes on)"
            ),
        )
    return outcomes


def horovodrun(controller: str, np: int) -> list[str]:
    """Return the command that starts Python on `np` ranks of Horovod's."""
    beside = Path(sys.executable).parent / "horovodrun"  # of this environment, activated or not
    program = str(beside) if beside.exists() else "horovodrun"
    options = [f"--{controller}", "-np", str(np), "--start-timeout", str(int(START_SECONDS))]
    return [program, *options, sys.executable]


def torchrun(np: int) -> list[str]:
    """Return the command that starts Python on `np` ranks over torch.distributed.

    It looks for ranks that ended only now and then: the others are to tell by themselves what they see.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "5"]
    return [*launcher, "--nproc-per-node", str(np)]


def _processor_seconds() -> float:
    """Return what this process's children that have ended, and theirs, have computed."""
    used = os.times()
    return used.children_user + used.children_system


def _start(specs: Sequence[str], controller: str, np: int, folder: Path, seconds: float) -> tuple[str, str]:
    """Run the launcher once; return what went wrong with the launch itself, and the end of its output."""
    ranks = ["-m", "tests.ranks", "--out", str(folder), *specs]
    command = [*(torchrun(np) if controller == "dist" else horovodrun(controller, np)), *ranks]
    log = folder / "output.txt"
    problem = ""
    with log.open("wb") as sink:
        launcher = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment(),
            cwd=HERE.parent,
            start_new_session=True,
        )
        try:
            code = launcher.wait(seconds + START_SECONDS)
            if code:
                problem = f"the launcher ended with status {code}"
        except subprocess.TimeoutExpired:
            problem = f"the launch took more than {seconds:.0f} s"
        finally:
            # Ranks live in sessions of their own; they end by themselves when they see this file.
            (folder / "stop").touch()
            _end(launcher)
    text = log.read_text(errors="replace")
    return problem, text[-12000:]


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """End the launcher and what it started."""
    if launcher.poll() is None:
        time.sleep(2.0)  # for the ranks to see the file
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(launcher.pid, number)
                launcher.wait(5.0)
                break
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
    launcher.wait()


def _read(folder: Path, np: int) -> dict[int, dict[str, dict[str, Any]]]:
    """Return what ranks wrote, by rank and case; of several records of a case the last."""
    records: dict[int, dict[str, dict[str, Any]]] = {}
    for rank in range(np):
        path = folder / f"rank-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records[rank] = {}
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # cut off when the rank was ended
                continue
            records[rank][record["case"]] = record
    return records
