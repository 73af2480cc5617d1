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
KNOWN_AS = {"LostRankError"}
SILENCE_S = 4  # HVDLOSS_WATCH_SILENCE: how long a rank may say nothing
GLOO_TIMEOUT_S = 60  # HOROVOD_GLOO_TIMEOUT_SECONDS: what Horovod itself waits for the other ranks: too long
ELASTIC_TIMEOUT_S = 30
MARGIN_S = 30.0  # on top, for a busy machine
#: Within which every surviving rank must know.
KNOWN_WITHIN_S = SILENCE_S + MARGIN_S

reason = ssh_available()
tunnel_reason = wireguard_available()
HAVE = {name: importlib.util.find_spec(name) is not None for name in ("horovod", "torch", "keras")}
PATTERN = b"GRADIENTGRADIENT"  # of ssh_job.py
JOB = str(Path(__file__).with_name("ssh_job.py"))
ELASTIC_JOB = str(Path(__file__).with_name("ssh_elastic_job.py"))

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        reason is not None,
        reason=f"nothing across hosts with ssh is tested, these tests are SKIPPED: {reason}",
    ),
    pytest.mark.skipif(not all(HAVE.values()), reason=f"Horovod and both frameworks: {HAVE}"),
]
needs_tunnel = pytest.mark.skipif(
    tunnel_reason is not None, reason=f"the encrypted data plane is NOT TESTED: {tunnel_reason}"
)
ENV = {"OMP_NUM_THREADS": "1"}
SHORT = {
    **ENV,
    "HOROVOD_GLOO_TIMEOUT_SECONDS": str(GLOO_TIMEOUT_S),
    "HVDLOSS_WATCH_SILENCE": str(SILENCE_S),
}
#: As many seconds for Open MPI's daemons; by itself it would wait for minutes.
MPI_PATIENCE = (
    "--mca oob_tcp_keepalive_time 5 --mca oob_tcp_keepalive_intvl 1 --mca oob_tcp_keepalive_probes 5"
)


def read(folder: Path, name: str, rank: int) -> dict | None:
    path = folder / f"{name}-{rank}.json"
    return json.loads(path.read_text()) if path.exists() else None


def wait_for(path: Path, job: Job, seconds: float = 90.0) -> None:
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
        wait_for(tmp_path / "in-step-4", job)
        hosts.cut(1)
        (tmp_path / "go-4").touch()
        time.sleep(cut_s)
        hosts.mend(1)
        wait_for(tmp_path / "in-step-8", job)
        hosts.set_rate(rate)
        (tmp_path / "go-8").touch()
        assert job.wait(90) == 0, job.output[-4000:]
        one, _ = check_exact(tmp_path, alone(framework), hosts)
        check_nothing_runs(hosts)
    seconds = np.diff(one["times"])
    # A ring of two: each rank sends all of the gradient once.
    floor = 8 * sum(np.size(p) for p in one["parameters"]) * 8 / (rate * 1e6)
    # Keras takes a batch or two ahead, so the pause shows that much earlier.
    assert max(seconds[2:8]) > 0.9 * cut_s
    assert np.median(seconds[9:]) > 0.8 * floor
    record_property(
        "seconds a step before, in the cut, slow",
        [float(np.median(seconds[:2])), float(max(seconds[2:8])), float(np.median(seconds[9:]))],
    )


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

    The watch finds it by the silence; Horovod itself would take a minute.
    """
    step = 5
    with SshHosts(2, alive_s=10 * GLOO_TIMEOUT_S) as hosts:
        command = [sys.executable, JOB, framework, str(folder), "--stop", str(step)]
        job = hosts.launch(command, controller=controller, env=SHORT, mpi_args=MPI_PATIENCE)
        wait_for(folder / f"in-step-{step}", job)
        {"link cut": hosts.cut, "host killed": hosts.kill}[fault](1)
        began = time.monotonic()
        (folder / f"go-{step}").touch()
        left = [0] if fault == "host killed" else [0, 1]
        ended = {rank: ended_at(folder, rank, began + GLOO_TIMEOUT_S + MARGIN_S) for rank in left}
        errors = {rank: read(folder, "error", rank) for rank in left}
        knew = {
            rank: min(
                [t for t in (ended[rank], (errors[rank] or {}).get("time")) if t is not None], default=None
            )
            for rank in left
        }
        found = {
            rank: errors[rank] and f"{errors[rank]['kinds'][0]}: {errors[rank]['message']}" for rank in left
        }
        assert None not in knew.values(), f"ranks that did not end in time: {knew}; {job.output[-4000:]}"
        assert max(knew.values()) - began < KNOWN_WITHIN_S
        assert all(read(folder, "done", rank) is None for rank in left)
        if controller == "gloo":
            for rank in left:
                assert errors[rank] is not None, f"rank {rank} ended without a word: {job.output[-4000:]}"
                assert KNOWN_AS & set(errors[rank]["kinds"]), errors[rank]
                assert f"rank {1 - rank}" in errors[rank]["message"], errors[rank]
        seconds = max(t - began for t in knew.values() if t is not None)
        if fault == "link cut":
            hosts.mend(1)  # horovodrun ends what it can reach
        status = job.wait(GLOO_TIMEOUT_S + MARGIN_S)
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


# Hosts


ROWS = 150


def rows(folder: Path) -> dict[str, np.ndarray]:
    """Write the rows that an elastic job trains on; return them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    columns = {f"x{i}": rng.normal(size=ROWS) for i in range(3)}
    table = {"id": np.arange(ROWS), "y": rng.normal(size=ROWS), **columns}
    pq.write_table(pa.table(table), folder / "rows.parquet", row_group_size=7)
    return table


def launch_elastic(hosts: SshHosts, folder: Path, patience_s: int) -> Job:
    """Start an elastic job on three hosts; return it when host 1 is in the middle of a step."""
    discover = folder / "discover.sh"  # whoever lets us in
    discover.write_text(
        f"#!/bin/sh\nfor host in {' '.join(hosts.names)}; do\n"
        "    ssh -o ConnectTimeout=1 $host true 2>/dev/null && echo $host:1\ndone\nexit 0\n"
    )
    discover.chmod(0o755)
    job = hosts.launch(
        [sys.executable, ELASTIC_JOB, str(folder)],
        controller="elastic",
        options=[
            *("-np", "3", "--min-np", "2", "--max-np", "3", "--host-discovery-script", str(discover)),
            *("--blacklist-cooldown-range", "8", "12", "--elastic-timeout", str(patience_s)),
        ],
        # Also what ranks wait for the one that comes back; Gloo ends the process when that takes longer.
        env={**SHORT, "HOROVOD_GLOO_TIMEOUT_SECONDS": str(ELASTIC_TIMEOUT_S)},
    )
    wait_for(folder / "in-step", job)
    return job


def trained(folder: Path, table: dict[str, np.ndarray]) -> tuple[list[dict], list[dict]]:
    """Check that every row was used once, as by one process, though a host was away for some steps.

    Returns:
        What ranks told of steps of two ranks, and of those of three after that.
    """
    logs = {path: path.read_text().splitlines() for path in folder.glob("log-*")}
    lines = [json.loads(line) for log in logs.values() for line in log]
    again = [line for line in lines if line["size"] == 2]
    assert min(line["step"] for line in again) == 3  # the last commit
    # What was done after the last commit before the loss was undone, and done again by two; no other step
    # was done twice.
    undone = {line["step"] for line in again}
    used = again + [line for line in lines if line["size"] == 3 and line["step"] not in undone]
    assert collections.Counter(i for line in used for i in line["ids"]) == collections.Counter(range(ROWS))
    came_back = [line for line in used if line["size"] == 3 and line["step"] > max(undone)]
    assert len(came_back) == 3 * len({line["step"] for line in came_back}) > 0
    assert len(list(folder.glob("log-host1-*"))) == 2  # a process before, another after
    exact(folder, used, table)
    return again, came_back


def test_a_killed_host_comes_back_and_no_row_is_lost(tmp_path: Path, record_property) -> None:
    table = rows(tmp_path)
    with SshHosts(3, alive_s=2) as hosts:
        job = launch_elastic(hosts, tmp_path, patience_s=90)
        hosts.kill(1)
        killed = time.monotonic()
        wait_for(tmp_path / "went-on", job)
        hosts.revive(1)
        revived = time.monotonic()
        assert job.wait(150) == 0, job.output[-6000:]
        check_nothing_runs(hosts)
    again, came_back = trained(tmp_path, table)
    errors = [json.loads(path.read_text().splitlines()[0]) for path in tmp_path.glob("error-*")]
    assert len(errors) == 2
    assert all(KNOWN_AS & set(error["kinds"]) for error in errors), errors
    knew = max(error["time"] for error in errors) - killed
    assert knew < ELASTIC_TIMEOUT_S + MARGIN_S
    resumed = min(line["time"] for line in again) - killed
    joined = min(line["time"] for line in came_back) - revived
    record_property(
        "seconds until known, until training went on, from power to training", [knew, resumed, joined]
    )
    report(
        fault="host killed and brought back",
        framework="torch",
        controller="elastic",
        repeats=1,
        seconds=round(knew, 2),
        lost="nothing",
        error=f"{errors[0]['kinds'][0]}: {errors[0]['message']}",
        resumed=round(resumed, 2),
        rejoined=round(joined, 2),
    )


def test_a_rank_that_is_stopped_alone_on_its_host_does_not_hold_the_others_up(tmp_path) -> None:
    """Its host's agent ends it, as no other rank there could, and the others go on."""
    table = rows(tmp_path)
    with SshHosts(3) as hosts:
        job = launch_elastic(hosts, tmp_path, patience_s=90)
        (stopped,) = [
            pid
            for pid, line in hosts.processes(1).items()
            if line.startswith(f"{sys.executable} {ELASTIC_JOB}")
        ]
        os.kill(stopped, signal.SIGSTOP)
        until = time.monotonic() + ELASTIC_TIMEOUT_S + MARGIN_S
        while stopped in hosts.processes(1):
            assert time.monotonic() < until, "nobody ended it"
            time.sleep(0.1)
        wait_for(tmp_path / "went-on", job)
        (tmp_path / "go-on").touch()
        assert job.wait(150) == 0, job.output[-6000:]
        assert "has neither ended nor begun again" not in job.output  # the launcher saw it end
        check_nothing_runs(hosts)
    trained(tmp_path, table)


def exact(folder: Path, used: list[dict], table: dict[str, np.ndarray]) -> None:
    """Compare with one process that made the same steps of the same global batches."""
    import torch

    inputs = torch.from_numpy(np.stack([table[f"x{i}"] for i in range(3)], 1))
    targets = torch.from_numpy(table["y"])[:, None]
    one = torch.nn.Linear(3, 1, dtype=torch.float64)
    for p in one.parameters():
        torch.nn.init.zeros_(p)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.02, momentum=0.9)
    for step in range(max(line["step"] for line in used) + 1):
        ids = [i for line in used if line["step"] == step for i in line["ids"]]
        optimizer.zero_grad()
        ((one(inputs[ids]) - targets[ids]) ** 2).mean().backward()
        optimizer.step()
    found = torch.load(folder / "model.pt")
    for name, value in one.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


# What a stranger at the switch sees


def test_without_a_tunnel_gradients_are_read_on_the_wire(tmp_path: Path) -> None:
    capture = wire(tmp_path, "gloo", encrypted=False)
    assert capture.seen(PATTERN) > 0
    assert capture.seen(b"HTTP/1.") > 0  # the rendezvous
    assert "tcp" in capture.kinds()


@needs_tunnel
@pytest.mark.parametrize("controller", ["gloo", "mpi"])
def test_through_the_tunnel_only_its_packets_are_on_the_wire(controller: str, tmp_path: Path) -> None:
    capture = wire(tmp_path, controller, encrypted=True)
    assert capture.seen(PATTERN) == capture.seen(b"GRADIENT") == capture.seen(b"HTTP/1.") == 0
    # IGMP (2) is the switch's own.
    assert set(capture.kinds()) <= {"arp", "ip/2", f"udp/{module.TUNNEL_PORT}"}
    assert capture.size > 10_000 * len(PATTERN)  # the gradient was there, after all


def wire(folder: Path, controller: str, *, encrypted: bool) -> module.Capture:
    """Capture what passes host 1's port while two ranks make one step with a known gradient."""
    with SshHosts(2, encrypted=encrypted) as hosts, hosts.capture(1) as capture:
        hosts.horovodrun([sys.executable, JOB, "pattern", str(folder)], controller=controller, env=ENV)
    expected = np.frombuffer(PATTERN * 5)  # the mean of equal gradients
    for rank in range(2):
        found = read(folder, "done", rank)
        assert found is not None
        assert found["host"] == f"host{rank}"
        np.testing.assert_allclose(found["parameters"][0], expected, rtol=1e-12)
    return capture


# The rig itself


def ask(hosts: SshHosts, host: int, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(hosts.command(host, command), capture_output=True, text=True, timeout=30)


def test_ssh_takes_the_rigs_key_and_trusts_the_rigs_hosts_only() -> None:
    with SshHosts(2) as hosts:
        told = ask(hosts, 0, "/run/rig/bin/ssh", "host1", "hostname; echo $TMPDIR $HOME; pwd")
        assert told.stdout == "host1\n/run/tmp /run/home\n/run/home\n"
        # As Horovod calls it, with a host key that is not known.
        known = hosts._path(0, "known_hosts")
        kept = known.read_text()
        known.write_text(kept.replace(kept.splitlines()[1].split()[2], kept.splitlines()[0].split()[2]))
        call = ("/run/rig/bin/ssh", "-o", "StrictHostKeyChecking=no", "host1", "true")
        assert "Host key verification failed" in ask(hosts, 0, *call).stderr
        known.write_text(kept)
        assert ask(hosts, 0, *call).returncode == 0
        # No other key, no password, and nobody but root.
        assert (
            ask(hosts, 0, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/run/tmp/other").returncode
            == 0
        )
        for more in (
            ("-o", "IdentityFile=none", "-i", "/run/tmp/other"),
            ("-o", "PubkeyAuthentication=no", "-o", "PreferredAuthentications=password,keyboard-interactive"),
        ):
            config = (
                "ssh",
                "-F",
                "none",
                "-o",
                "UserKnownHostsFile=/run/rig/known_hosts",
                "-o",
                "BatchMode=yes",
            )
            refused = ask(hosts, 0, *config, *more, "root@host1", "true")
            assert "Permission denied (publickey)" in refused.stderr, refused
        assert (
            "Permission denied" in ask(hosts, 0, "/run/rig/bin/ssh", "-l", "nobody", "host1", "true").stderr
        )
        assert ask(hosts, 1, "sh", "-c", "ls /run/rig/key").returncode != 0  # only host 0 calls others


def test_keys_and_settings_are_roots_alone_and_go_with_the_rig() -> None:
    with SshHosts(2, encrypted=tunnel_reason is None) as hosts:
        folder = Path(hosts._folder.name)
        assert folder.stat().st_mode & 0o077 == 0
        for path in folder.glob("host*/**/*"):
            if (
                path.name not in ("hosts", "passwd", "first.log", "sshd.log", "wireguard.log")
                and path.suffix != ".pub"
            ):
                assert path.stat().st_mode & 0o077 == 0, path
        pids = [pid for host in range(2) for pid in hosts.processes(host)]
        assert len(pids) >= 4
    assert not folder.exists()
    check_traces(os.getpid(), pids)


def check_traces(pid: int, pids: list[int]) -> None:
    """Check that a rig which this process made has left no namespace, mount or process."""
    assert not list(Path("/run/netns").glob(f"hvdloss-{pid}-*"))
    until = time.monotonic() + 10
    while left := [one for one in pids if Path(f"/proc/{one}/ns/pid").exists() and ns(one) != ns("self")]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def ns(pid: object) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return os.readlink("/proc/self/ns/pid")


def test_a_killed_host_says_nothing_and_comes_back_empty() -> None:
    with SshHosts(2, 100) as hosts:
        assert ask(hosts, 1, "touch", "/run/tmp/mark").returncode == 0
        sleeper = subprocess.Popen(hosts.command(1, ["sleep", "602"]))
        pids = list(hosts.processes(1))
        with pytest.raises(ConfigError, match="host=1 is up"):
            hosts.revive(1)
        hosts.kill(1)
        assert sleeper.wait(10) != 0
        check_traces(-1, pids)
        assert not hosts.up(1)
        assert hosts.processes(1) == {}
        with pytest.raises(HostsError, match="host1 is down"):
            hosts.command(1, ["true"])
        refused = ask(hosts, 0, "/run/rig/bin/ssh", "-o", "ConnectTimeout=1", "host1", "true")
        assert "timed out" in refused.stderr or "No route" in refused.stderr, refused
        hosts.revive(1)
        assert ask(hosts, 0, "/run/rig/bin/ssh", "host1", "ls /run/tmp").stdout == ""
        hosts.cut(1)
        assert ask(hosts, 0, "/run/rig/bin/ssh", "-o", "ConnectTimeout=1", "host1", "true").returncode == 255
        hosts.mend(1)
        assert ask(hosts, 0, "/run/rig/bin/ssh", "host1", "true").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_program_is_ended(number: int, tmp_path: Path) -> None:
    program = (
        # Started in the background, as by CI, a shell's children ignore SIGINT.
        "import signal, subprocess\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from hvdloss.benchmarks.ssh_hosts import SshHosts\n"
        "with SshHosts(2) as hosts:\n"
        "    one = subprocess.Popen(hosts.command(1, ['sleep', '603']), stdout=subprocess.DEVNULL)\n"
        "    while 'sleep 603' not in hosts.processes(1).values(): pass\n"
        "    print(*(pid for host in range(2) for pid in hosts.processes(host)), flush=True)\n"
        "    signal.pause()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) >= 5
    process.send_signal(number)
    process.wait(30)
    process.stdout.close()
    if number == signal.SIGKILL:  # names and files are left, but nothing that runs
        check_traces(-1, pids)
        for path in Path("/run/netns").glob(f"hvdloss-{process.pid}-*"):
            subprocess.run(["ip", "netns", "delete", path.name], check=True)
    else:
        check_traces(process.pid, pids)
        assert not list(tmp_path.glob("hvdloss-hosts-*"))


def test_a_job_that_fails_is_told_with_its_last_words() -> None:
    with SshHosts(2) as hosts:
        with pytest.raises(HostsError, match=r"ended with status 1; its last words:(.|\n)*alas"):
            hosts.horovodrun(["sh", "-c", "echo alas; exit 3"])
        for wrong, named in [
            ({"controller": "ssh"}, "controller="),
            ({"ranks_per_host": 0}, "ranks_per_host=0"),
        ]:
            with pytest.raises(ConfigError, match=named):
                hosts.launch(["true"], **wrong)
        with pytest.raises(ConfigError, match="command="):
            hosts.launch([])


def test_what_cannot_be_used_is_named() -> None:
    with pytest.raises(ConfigError, match="alive_s=0"):
        SshHosts(2, alive_s=0)
    with pytest.raises(HostsError, match="inside"):
        SshHosts(2).launch(["true"])
    with pytest.raises(HostsError, match="inside"):
        SshHosts(2).cut(0)


def test_where_there_is_no_ssh_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SEARCH", "")
    assert ssh_available() == "`sshd` is not installed (Debian: openssh-server)"
    assert wireguard_available() == "`wg` is not installed (Debian: wireguard-tools)"
    with pytest.raises(HostsError, match="no hosts with ssh can be made here: `sshd`"), SshHosts(2):
        pass


def report(**what: object) -> None:
    if path := os.environ.get("HVDLOSS_FAULTS_OUT"):
        with open(path, "a") as out:
            out.write(json.dumps(what) + "\n")
