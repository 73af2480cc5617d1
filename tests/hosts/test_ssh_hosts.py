"""Training across hosts that are reached by ssh: exact, on the right hosts, and when links and hosts fail.

Run by `make test-hosts`. Seconds until every surviving rank knew of a fault are recorded, and appended to
the file that HVDLOSS_FAULTS_OUT names, one JSON object a line.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hvdloss.benchmarks import ssh_hosts as module
from hvdloss.benchmarks.hosts import HostsError
from hvdloss.benchmarks.ssh_hosts import Job, SshHosts, ssh_available, wireguard_available
from hvdloss.errors import ConfigError

#: What a rank raises when another one cannot be reached any more, by the names of the error's classes.
#: Horovod's own, and Gloo's through TensorFlow, until something of ours is quicker and names the rank.
KNOWN_AS = {"HorovodInternalError", "UnknownError", "HvdlossError"}
#: Whether the error must name the rank that is missing.
NAMED = False
GLOO_TIMEOUT_S = 10  # HOROVOD_GLOO_TIMEOUT_SECONDS: what Horovod itself waits for the other ranks
MARGIN_S = 30.0  # on top, for a busy machine

reason = ssh_available()
tunnel_reason = wireguard_available()
HAVE = {name: importlib.util.find_spec(name) is not None for name in ("horovod", "torch", "keras")}
JOB = str(Path(__file__).with_name("ssh_job.py"))
ELASTIC_JOB = str(Path(__file__).with_name("ssh_elastic_job.py"))

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        reason is not None, reason=f"nothing across hosts with ssh is tested, these tests are SKIPPED: {reason}"
    ),
    pytest.mark.skipif(not all(HAVE.values()), reason=f"Horovod and both frameworks: {HAVE}"),
]
needs_tunnel = pytest.mark.skipif(
    tunnel_reason is not None, reason=f"the encrypted data plane is NOT TESTED: {tunnel_reason}"
)
ENV = {"OMP_NUM_THREADS": "1", "HOROVOD_GLOO_TIMEOUT_SECONDS": str(GLOO_TIMEOUT_S)}
#: As many seconds for Open MPI's daemons; by itself it would wait for minutes.
MPI_PATIENCE = (
    "--mca oob_tcp_keepalive_time 5 --mca oob_tcp_keepalive_intvl 1 --mca oob_tcp_keepalive_probes 5"
)


def read(folder: Path, name: str, rank: int) -> dict | None:
    path = folder / f"{name}-{rank}.json"
    return json.loads(path.read_text()) if path.exists() else None


def wait_for(path: Path, seconds: float, job: Job) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert job.running, job.output[-4000:]
        assert time.monotonic() < until, f"{path.name} after {seconds} s; {job.output[-4000:]}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    """Return what one process on all samples makes of a framework's job, each trained once."""
    made: dict[str, dict] = {}

    def result(framework: str) -> dict:
        if framework not in made:
            folder = tmp_path_factory.mktemp(f"alone-{framework}")
            done = subprocess.run(
                [sys.executable, JOB, framework, str(folder)],
                capture_output=True,
                text=True,
                timeout=120,
                env={**os.environ, **ENV, "HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"},
            )
            assert done.returncode == 0, done.stderr[-4000:]
            found = read(folder, "done", 0)
            assert found is not None
            assert found["size"] == 1
            made[framework] = found
        return made[framework]

    return result


def check_exact(folder: Path, expected: dict, hosts: SshHosts, ranks_per_host: int = 1) -> list[dict]:
    """Check that ranks ended on their hosts with the parameters and losses of one process."""
    size = hosts.count * ranks_per_host
    found = [read(folder, "done", rank) for rank in range(size)]
    for rank, one in enumerate(found):
        assert one is not None
        assert (one["host"], one["size"]) == (hosts.names[rank // ranks_per_host], size)
        for got, want in zip(one["parameters"], expected["parameters"], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(one["losses"], expected["losses"], rtol=1e-12)
    return found


def check_nothing_runs(hosts: SshHosts, seconds: float = 10.0) -> None:
    """Check that no rank, launcher or daemon of a job is left on any host."""
    until = time.monotonic() + seconds
    while True:
        left = [
            line
            for host in range(hosts.count)
            for line in hosts.processes(host).values()
            if "ssh_job" in line or "ssh_elastic_job" in line or "orted" in line or "horovodrun" in line
        ]
        if not left:
            return
        assert time.monotonic() < until, left
        time.sleep(0.1)


# Training


@pytest.mark.parametrize(
    ("framework", "controller", "count", "ranks_per_host"),
    [("torch", "gloo", 4, 1), ("torch", "mpi", 2, 2), ("keras", "gloo", 2, 1), ("keras", "mpi", 3, 1)],
)
def test_training_across_hosts_is_that_of_one_process(
    framework: str, controller: str, count: int, ranks_per_host: int, tmp_path: Path, alone
) -> None:
    with SshHosts(count) as hosts:
        hosts.horovodrun(
            [sys.executable, JOB, framework, str(tmp_path)],
            controller=controller,
            ranks_per_host=ranks_per_host,
            env=ENV,
        )
        check_exact(tmp_path, alone(framework), hosts, ranks_per_host)
        check_nothing_runs(hosts)


# Links


@pytest.mark.parametrize(("framework", "controller"), [("torch", "mpi"), ("keras", "gloo")])
def test_a_slow_link_and_a_short_cut_cost_time_only(
    framework: str, controller: str, tmp_path: Path, alone, record_property
) -> None:
    rate, cut_s = 1.0, 1.5
    with SshHosts(2) as hosts:
        command = [sys.executable, JOB, framework, str(tmp_path), "--stop", "4", "--stop", "8"]
        job = hosts.launch(command, controller=controller, env=ENV)
        wait_for(tmp_path / "in-step-4", 60, job)
        hosts.cut(1)
        (tmp_path / "go-4").touch()
        time.sleep(cut_s)
        hosts.mend(1)
        wait_for(tmp_path / "in-step-8", 60, job)
        hosts.set_rate(rate)
        (tmp_path / "go-8").touch()
        assert job.wait(90) == 0, job.output[-4000:]
        one, _ = check_exact(tmp_path, alone(framework), hosts)
        check_nothing_runs(hosts)
    seconds = np.diff(one["times"])
    # A ring of two: each rank sends all of the gradient once.
    floor = 8 * sum(np.size(p) for p in one["parameters"]) * 8 / (rate * 1e6)
    assert seconds[4] > cut_s
    assert np.median(seconds[9:]) > 0.8 * floor
    record_property("ms a step before, in the cut, slow", [float(np.median(seconds[:4])), *seconds[[4, 10]]])


def test_a_cut_link_is_known_to_both_sides(tmp_path: Path, record_property) -> None:
    inflict("torch", "gloo", "link cut", tmp_path, record_property)


def test_a_cut_link_is_known_to_both_sides_in_keras(tmp_path: Path, record_property) -> None:
    inflict("keras", "gloo", "link cut", tmp_path, record_property)


def test_a_cut_link_is_known_to_the_launcher_over_mpi(tmp_path: Path, record_property) -> None:
    inflict("torch", "mpi", "link cut", tmp_path, record_property)


def test_a_killed_host_is_known_to_the_others(tmp_path: Path, record_property) -> None:
    inflict("torch", "gloo", "host killed", tmp_path, record_property)


def inflict(framework: str, controller: str, fault: str, folder: Path, record_property) -> None:
    """Do something to host 1 in the middle of a step, and see that every rank that is left ends by an error.

    Horovod's own timeout is the bound.
    """
    step = 5
    with SshHosts(2, alive_s=10 * GLOO_TIMEOUT_S) as hosts:
        command = [sys.executable, JOB, framework, str(folder), "--stop", str(step)]
        job = hosts.launch(command, controller=controller, env=ENV, mpi_args=MPI_PATIENCE)
        wait_for(folder / f"in-step-{step}", 60, job)
        {"link cut": hosts.cut, "host killed": hosts.kill}[fault](1)
        began = time.monotonic()
        (folder / f"go-{step}").touch()
        left = [0] if fault == "host killed" else [0, 1]
        ended = {rank: ended_at(folder, rank, began + GLOO_TIMEOUT_S + MARGIN_S) for rank in left}
        errors = {rank: read(folder, "error", rank) for rank in left}
        knew = {
            rank: min([t for t in (ended[rank], (errors[rank] or {}).get("time")) if t is not None], default=None)
            for rank in left
        }
        found = {rank: errors[rank] and f"{errors[rank]['kinds'][0]}: {errors[rank]['message']}" for rank in left}
        print(fault, framework, controller, {r: k and k - began for r, k in knew.items()}, found)
        assert None not in knew.values(), f"ranks that did not end in time: {knew}; {job.output[-4000:]}"
        assert all(read(folder, "done", rank) is None for rank in left)
        if controller == "gloo":
            for rank in left:
                assert errors[rank] is not None, f"rank {rank} ended without a word: {job.output[-4000:]}"
                assert KNOWN_AS & set(errors[rank]["kinds"]), errors[rank]
                if NAMED:
                    assert f"rank {1 - rank}" in errors[rank]["message"], errors[rank]
        seconds = max(t - began for t in knew.values() if t is not None)
        if fault == "link cut":
            hosts.mend(1)  # horovodrun ends what it can reach
        status = job.wait(GLOO_TIMEOUT_S + MARGIN_S)
        print("status", status, job.output[-3000:])
        assert status, f"horovodrun ended with {status}; {job.output[-4000:]}"
        check_nothing_runs(hosts)
    report(
        fault=fault,
        framework=framework,
        controller=controller,
        repeats=1,
        seconds=round(seconds, 2),
        lost="the job",
        error=found[0] or "ended by the launcher",
    )
    record_property("seconds until every surviving rank knew", seconds)


def ended_at(folder: Path, rank: int, until: float) -> float | None:
    """Return when a rank's process had ended, or None if it still runs at a time."""
    with (folder / f"alive-{rank}").open() as file:
        while time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return time.monotonic()
            time.sleep(0.02)
    return None


def report(**what: object) -> None:
    if path := os.environ.get("HVDLOSS_FAULTS_OUT"):
        with open(path, "a") as out:
            out.write(json.dumps(what) + "\n")
