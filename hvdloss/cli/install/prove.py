"""Prove an installed Horovod: real jobs of two ranks, started by horovodrun."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path

from hvdloss.cli import machine
from hvdloss.cli.errors import Exit, InstallError
from hvdloss.cli.install.progress import Reporter
from hvdloss.cli.process import Log

RANKS = 2
TIMEOUT = 180.0


@dataclass(frozen=True)
class Proof:
    """One job that ran and gave the right numbers."""

    framework: str
    controller: str
    ranks: int
    on_gpu: bool = False
    gpus: int = 0

    def __str__(self) -> str:
        where = "on the GPU over NCCL" if self.on_gpu else "on CPU tensors"
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{self.framework}, horovodrun --{self.controller}, {ranks}, {where}"


def jobs(frameworks: Sequence[str], controllers: Sequence[str], *, every: bool) -> list[tuple[str, str]]:
    """Which jobs to run: every combination, or the fewest that use each of both once."""
    if every:
        return list(product(frameworks, controllers))
    pairs = zip_longest(frameworks, controllers)
    return [(f or frameworks[-1], c or controllers[-1]) for f, c in pairs]


def prove(
    frameworks: Sequence[str],
    controllers: Sequence[str],
    *,
    nccl: bool,
    every: bool,
    log: Log,
    reporter: Reporter,
) -> list[Proof]:
    """Run the jobs and check the numbers of every rank.

    With NCCL and one GPU a further job of one rank reduces on the GPU: NCCL refuses two ranks
    on one GPU.

    Raises:
        InstallError: a job did not start, did not end in time, or gave wrong numbers.
    """
    proofs = []
    for framework, controller in jobs(frameworks, controllers, every=every):
        reporter.detail(f"{framework} over {controller}, {RANKS} ranks")
        proofs.append(run_job(framework, controller, RANKS, log))
    if nccl and not any(proof.on_gpu for proof in proofs) and proofs[0].gpus:
        reporter.detail("torch over NCCL, 1 rank")
        alone = run_job("torch", controllers[0], 1, log)
        if not alone.on_gpu:
            raise InstallError(
                "NCCL was built and a GPU is there, but nothing was reduced on it.",
                "hvdloss doctor",
                status=Exit.INSTALL,
                log=str(log.path),
            )
        proofs.append(alone)
    return proofs


def run_job(framework: str, controller: str, ranks: int, log: Log) -> Proof:
    """One job: start it, wait for it, check what every rank wrote.

    Raises:
        InstallError: with the job's own last words.
    """
    launcher = machine.script_path("horovodrun")
    if launcher is None:
        raise InstallError(
            "horovodrun was installed, but is neither beside this Python nor on PATH.",
            "hvdloss install --force",
            status=Exit.INSTALL,
        )
    with tempfile.TemporaryDirectory(prefix="hvdloss-prove-") as folder:
        worker = str(machine.SCRIPTS / "prove_worker.py")
        command = [launcher, f"--{controller}", "-np", str(ranks)]
        command += [sys.executable, worker, framework, folder]
        env = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", OMP_NUM_THREADS="1")
        # Open MPI spins while it waits; on a machine with few cores that starves the other rank.
        env.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        # horovodrun reads these, and a shell inside another job may have them set.
        for name in ("HOROVOD_RANK", "HOROVOD_SIZE", "OMPI_COMM_WORLD_RANK"):
            env.pop(name, None)
        ended = log.run(command, env=env, timeout=TIMEOUT)
        what = f"{ranks} ranks of {framework} under horovodrun --{controller}"
        if ended.timed_out:
            raise _job_failed(
                f"{what} had not ended after {TIMEOUT:.0f} s",
                ended.tail,
                log,
                "a firewall or a proxy on the loopback interface can do this",
            )
        if ended.status != 0:
            raise _job_failed(f"{what} ended with status {ended.status}", ended.tail, log)
        results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*.json"))]
    wrong = check(results, ranks, controller)
    if wrong:
        raise _job_failed(f"{what}: {wrong}", ended.tail, log)
    on_gpu = all(any("NCCL" in name for name in result["sums"]) for result in results)
    gpus = max(result.get("gpus", 0) for result in results)
    return Proof(framework, controller, ranks, on_gpu, gpus)


def check(results: Sequence[dict[str, object]], ranks: int, controller: str) -> str:
    """What is wrong with the ranks' results, or "" if nothing is."""
    if sorted(int(str(result["rank"])) for result in results) != list(range(ranks)):
        return f"{len(results)} of {ranks} ranks wrote a result"
    total = ranks * (ranks + 1) / 2
    for result in results:
        who = f"rank {result['rank']}"
        if result["size"] != ranks:
            return f"{who} saw {result['size']} ranks"
        if not result[controller]:
            return f"{who} did not use {controller}"
        sums = result["sums"]
        assert isinstance(sums, dict)
        for name, values in sums.items():
            if values != [total] * 5:
                return f"{who}: the sum in {name} is {values}, not {total}"
        if result["average"] != [total / 4 / ranks] * 5:
            return f"{who}: the average is {result['average']}, not {total / 4 / ranks}"
    return ""


def _job_failed(problem: str, tail: Sequence[str], log: Log, hint: str = "") -> InstallError:
    words = [line for line in tail if line.strip()][-6:]
    return InstallError(
        f"Horovod was installed, but does not work: {problem}.",
        hint or "see the log; hvdloss install --force builds it again",
        status=Exit.INSTALL,
        detail="\n".join(words),
        log=str(log.path),
    )
