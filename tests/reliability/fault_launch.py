"""Starts the ranks of a job, does to them what is done from outside, and sees how they end.

Ranks are joined as `horovodrun` joins them, by Horovod's own rendezvous, but nobody ends the others when one
of them ends: they have to find out by themselves. (`horovodrun` would kill them, and hide a hang.) They are
forked from a process that has only imported the framework, so that a launch takes a second; with horovodrun
they are started afresh.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from fault_job import Item  # noqa: E402
from faults import BY_NAME, STUCK, Fault  # noqa: E402

from tests.ranks import environment  # noqa: E402

JOB = Path(__file__).resolve().parent / "fault_job.py"
START_SECONDS = 240.0
GRACE = 8.0  # seconds beyond a fault's own until a rank counts as hung
ENDING = 90.0  # the same for ranks that know, and are about to end; a busy machine takes long
SIGNALS = {"oom": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigstop": signal.SIGSTOP}


@dataclass
class Launch:
    """What became of a launch.

    Attributes:
        records: what the ranks wrote, by rank.
        status: exit statuses by rank, negative for signals (of the launcher, under key -1, with horovodrun).
        hung: why it was ended from outside; empty if it ended by itself.
        stacks: of the ranks that were left then, by rank.
        output: the end of what the ranks printed.
        inflicted: when a signal was sent from outside.
    """

    records: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    status: dict[int, int] = field(default_factory=dict)
    hung: str = ""
    stacks: dict[int, str] = field(default_factory=dict)
    output: str = ""
    inflicted: float | None = None


class _Records:
    """The ranks' records, read as they are written."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths = [folder / f"rank-{rank}.jsonl" for rank in range(size)]
        self.places = [0] * size
        self.all: dict[int, list[dict[str, Any]]] = {rank: [] for rank in range(size)}

    def read(self) -> None:
        for rank, path in enumerate(self.paths):
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(self.places[rank])
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self.places[rank] += len(line)
                    self.all[rank].append(json.loads(line))

    def events(self, name: str) -> list[dict[str, Any]]:
        return [record for records in self.all.values() for record in records if record["event"] == name]


class Child:
    """A forked rank; what is needed of `subprocess.Popen`."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.nursery, self.pid = nursery, pid

    @property
    def returncode(self) -> int | None:
        return self.nursery.ended.get(self.pid)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            _signal(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> None:
        deadline = time.monotonic() + 30.0
        while self.poll() is None and self.nursery.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)


class Nursery:
    """A process that has imported a framework, and forks ranks: a launch then takes no time to import it.

    Ranks are forked before the framework has done anything, so nothing is shared between them.
    """

    def __init__(self, loop: str) -> None:
        self.loop = loop
        self.ended: dict[int, int] = {}
        self._told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [sys.executable, str(JOB), loop], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self._told.get(timeout=START_SECONDS)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told = json.loads(line)
            if "status" in told:
                self.ended[told["pid"]] = told["status"]
            else:
                self._told.put(told)

    def start(self, folder: Path, environments: Sequence[Mapping[str, str]]) -> list[Child]:
        """Fork a rank for each environment."""
        assert self.process.stdin is not None
        for number, variables in enumerate(environments):
            asked = {
                "name": number,
                "folder": str(folder),
                "output": str(folder / "output.txt"),
                "environment": dict(variables),
            }
            self.process.stdin.write(json.dumps(asked).encode() + b"\n")
            self.process.stdin.flush()
        pids = [self._told.get(timeout=30.0)["pid"] for _ in environments]
        return [Child(self, pid) for pid in pids]

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _rendezvous(size: int) -> tuple[list[dict[str, str]], Any]:
    """Start Horovod's rendezvous; return each rank's environment, and the server."""
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.gloo_run import create_slot_env_vars
    from horovod.runner.http.http_server import RendezvousServer

    slots = get_host_assignments(parse_hosts(f"localhost:{size}"), size)
    server = RendezvousServer()
    port = server.start()
    server.init(slots)
    common = {
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
    }
    return [{**common, **create_slot_env_vars(slot)} for slot in slots], server


def _horovodrun(loop: str, folder: Path, size: int, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with (folder / "output.txt").open("wb") as out:
        return subprocess.Popen(
            [
                str(Path(sys.executable).with_name("horovodrun")),
                *("--gloo", "-np", str(size), "--network-interfaces", "lo"),
                *(sys.executable, str(JOB), loop, str(folder)),
            ],
            env={**environment(), **variables},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def launch(
    loop: str,
    plan: Sequence[Item],
    folder: Path,
    size: int,
    *,
    nursery: Nursery | None,
    variables: Mapping[str, str] | None = None,
) -> Launch:
    """Run a plan once, and return what became of it.

    Args:
        loop: of :data:`faults.LOOPS`.
        plan: what to inflict, in order.
        folder: empty; for records.
        size: ranks.
        nursery: where ranks come from; None to start them through horovodrun, and wait for it.
        variables: of the environment.
    """
    (folder / "plan.json").write_text(json.dumps([asdict(item) for item in plan]))
    server = None
    horovodrun = nursery is None
    processes: Sequence[Any]
    if nursery is None:
        processes = [_horovodrun(loop, folder, size, variables or {})]
    else:
        environments, server = _rendezvous(size)
        processes = nursery.start(folder, [{**one, **(variables or {})} for one in environments])
    records = _Records(folder, size)
    out = Launch(records=records.all)
    pids: dict[int, int] = {}
    try:
        _watch(out, records, processes, plan, loop, pids, horovodrun)
    finally:
        left = sorted(set(range(size)) - set(out.status)) if not horovodrun else []
        if out.hung:  # the stacks of those that are left
            for pid in pids.values():
                _signal(pid, signal.SIGCONT)
                _signal(pid, signal.SIGUSR1)
            time.sleep(0.5)
        for process in processes:
            if process.poll() is None:
                process.terminate() if horovodrun else process.kill()
        for pid in pids.values():
            _signal(pid, signal.SIGKILL)
        for process in processes:
            process.wait()
        if server is not None:
            server.stop()
    records.read()
    for rank in left:
        path = folder / f"stacks-{rank}.txt"
        out.stacks[rank] = path.read_text()[-20000:] if path.exists() else ""
    out.output = (folder / "output.txt").read_text(errors="replace")[-6000:]
    return out


def _signal(pid: int, number: int) -> None:
    """Send a signal to a rank, if it is still there."""
    with contextlib.suppress(OSError):
        if JOB.name in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, number)


def _watch(
    out: Launch,
    records: _Records,
    processes: Sequence[Any],
    plan: Sequence[Item],
    loop: str,
    pids: dict[int, int],
    horovodrun: bool,
) -> None:
    """Wait for the end, or for what takes too long."""
    began = time.time()
    number, since = -1, began  # of the item under way
    waking: float | None = None  # when the stuck rank was let go
    while True:
        now = time.time()
        for rank, process in enumerate(processes):
            key = -1 if horovodrun else rank
            if key not in out.status and process.poll() is not None:
                out.status[key] = process.returncode
        if len(out.status) == len(processes):
            return
        records.read()
        for record in records.events("started"):
            pids[record["rank"]] = record["pid"]
        current = max((r[-1]["number"] for r in records.all.values() if r), default=-1)
        if current > number:
            number, since = current, now
        if number < 0:
            if now - began > START_SECONDS:
                out.hung = "did not start"
                return
            time.sleep(0.01)
            continue
        if number >= len(plan):
            if now - since > 60.0:
                out.hung = "did not end"
                return
            time.sleep(0.01)
            continue
        item = plan[number]
        fault = BY_NAME[item.fault]
        if out.inflicted is None and fault.how == "signal" and records.events("ready"):
            out.inflicted = time.time()
            _signal(pids[item.victim], SIGNALS[item.fault])
        inflicted = [r["time"] for r in records.events("inflicted") if r["number"] == number]
        if out.inflicted is not None:
            inflicted.append(out.inflicted)
        waking = _wake(out, item, fault, processes, waking, now, horovodrun)
        if inflicted:
            told = {
                r["rank"]
                for event in ("knew", "unnoticed", "ended")
                for r in records.events(event)
                if r["number"] == number
            }
            ignorant = any(
                rank not in told and (rank != item.victim or fault.victim) and rank not in out.status
                for rank in records.all
            )
            limit = min(inflicted) + fault.seconds + (GRACE if ignorant else ENDING)
            if fault.stuck and waking is not None:
                limit = max(waking, min(inflicted) + STUCK) + fault.seconds + ENDING
        else:
            limit = since + 60.0  # building, and the good steps
        if now > limit:
            out.hung = f"{now - min(inflicted):.0f} s after the fault" if inflicted else "before the fault"
            return
        time.sleep(0.005)


def _wake(
    out: Launch,
    item: Item,
    fault: Fault,
    processes: Sequence[Any],
    waking: float | None,
    now: float,
    horovodrun: bool,
) -> float | None:
    """Let a stuck rank go when all others have ended; return when."""
    if not fault.stuck or horovodrun or waking is not None:
        return waking
    if any(rank not in out.status for rank in range(len(processes)) if rank != item.victim):
        return None
    if fault.name == "sigstop":
        processes[item.victim].send_signal(signal.SIGCONT)
    return now
