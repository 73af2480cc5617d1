"""Agents of hosts, and ranks in processes of their own: killed, stopped, busy, and left in peace."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hvdloss.watch import process
from hvdloss.watch.activity import Activity
from hvdloss.watch.link import dial
from hvdloss.watch.member import Member
from hvdloss.watch.service import HostAgent
from hvdloss.watch.verdict import Fault, Limits
from hvdloss.watch.wire import NONCE, Channel, WireError

KEY = bytes(range(32))
SECONDS = 60.0  # for what comes at once on a quiet machine


class Rank:
    """A rank's process, and what it said."""

    def __init__(self, rank: int, name: str) -> None:
        self.rank = rank
        self.said: list[dict[str, Any]] = []
        self._popen = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("watch_member.py")), str(rank), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._popen.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.hear("up")

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self.said.append(json.loads(line))

    def do(self, command: str) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(command + "\n")
        self._popen.stdin.flush()

    def hear(self, what: str) -> Any:
        """Return what it says under a name, as soon as it does."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            for one in list(self.said):
                if what in one:
                    return one[what]
            time.sleep(0.02)
        raise AssertionError(f"rank {self.rank} said nothing of {what}, but {self.said}")

    def fault(self) -> Fault:
        return Fault.from_message(self.hear("fault"))

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def ends(self) -> int:
        return self._popen.wait(SECONDS)

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._reader.join(SECONDS)
        for pipe in (self._popen.stdin, self._popen.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


class Job:
    """Hosts with their agents and ranks, all on this machine."""

    def __init__(self, *hosts: Sequence[int], fan_out: int = 2, **limits: float) -> None:
        given = Limits(**{"warn": 0.0, "silence": 4.0, **limits})
        names = [f"hvdloss-test-{secrets.token_hex(8)}" for _ in hosts]
        listen = ("127.0.0.1",) if len(hosts) > 1 else ()
        self.hosts = hosts
        self.agents = [
            HostAgent(KEY, hosts, index, given, name, listen, fan_out) for index, name in enumerate(names)
        ]
        table = [agent.begin() for agent in self.agents]
        for agent in self.agents:
            agent.connect(table)
        self.name, self.table = names[0], table
        self.ranks: dict[int, Rank] = {}
        for host, name in zip(hosts, names, strict=True):
            for rank in host:
                self.ranks[rank] = Rank(rank, name)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks.values():
            rank.close()
        for agent in self.agents:
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(0.0)
            agent.end()

    def __getitem__(self, rank: int) -> Rank:
        return self.ranks[rank]

    def all(self, command: str, *but: int) -> None:
        for rank in self.ranks.values():
            if rank.rank not in but:
                rank.do(command)

    def faults(self, *but: int) -> list[Fault]:
        return [one.fault() for one in self.ranks.values() if one.rank not in but]

    def quiet(self, seconds: float) -> None:
        """See that nothing is wrong for some time."""
        time.sleep(seconds)
        assert [one for rank in self.ranks.values() for one in rank.said if "fault" in one] == []

    def kill_host(self, index: int) -> None:
        for rank in self.hosts[index]:
            self[rank].send(signal.SIGKILL)
        os.kill(self.agents[index].pid, signal.SIGKILL)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


HOSTS = pytest.mark.parametrize("hosts", [((0, 1, 2),), ((0, 2), (1,)), ((0,), (1,), (2,), (3, 4))], ids=len)

# -- what is wrong ------------------------------------------------------------------------------------


@HOSTS
def test_a_killed_rank_is_known_to_all_and_agents_end_with_their_ranks(hosts):
    with Job(*hosts) as job:
        job.all("step o", 1)
        job[1].send(signal.SIGKILL)
        faults = job.faults(1)
        assert {fault.kind for fault in faults} == {"lost"}
        assert len(set(faults)) == 1
        assert "step 1: rank 1 is gone" in faults[0].text
        job.all("exit", 1)
        for agent in job.agents:
            assert agent.wait(SECONDS) == 0


@HOSTS
def test_rank_0_is_missed_as_any_other(hosts):
    with Job(*hosts) as job:
        job[0].send(signal.SIGKILL)
        assert {fault.ranks for fault in job.faults(0)} == {(0,)}


@HOSTS
def test_ranks_in_different_exchanges_are_found(hosts):
    with Job(*hosts) as job:
        job.all("wait x", 1)
        job.quiet(1.5)
        job[1].do("step o")
        faults = job.faults()
        assert {fault.kind for fault in faults} == {"deadlock"}
        assert "(step 1 of o; x)" in faults[0].text
        assert "in block" in faults[0].text  # where they are


@HOSTS
def test_an_error_reaches_all_and_errors_of_all_nobody(hosts):
    with Job(*hosts) as job:
        job.all("wait x", 1)
        job[1].do("fail alas")
        assert {fault.text for fault in job.faults()} == {job[1].hear("told")["text"]}
        assert "step 1: rank 1: ValueError: alas" in job[0].fault().text
    with Job(*hosts) as job:
        job.all("fail alas")
        assert [one.hear("told") for one in job.ranks.values()] == [None] * len(job.ranks)
        job.quiet(0.5)


@HOSTS
def test_who_ended_in_good_order_is_missed_only_if_waited_for(hosts):
    with Job(*hosts) as job:
        for rank in (0, 1):
            job[rank].do("stepped o")
        job[1].do("bye")
        job[1].hear("left")
        job[1].do("exit")
        job[1].ends()
        job.quiet(1.0)
        job[0].do("step o")
        assert job[0].fault().kind == "left"
        assert (
            "rank 1 has ended after step 1 of o, while rank 0 wait(s) for it in step 2" in job[0].fault().text
        )


def test_rank_0_may_end_before_the_ranks_of_other_hosts():
    with Job((0,), (1, 2)) as job:
        job[0].do("stepped o")
        job[0].do("bye")
        job[0].hear("left")
        job[0].do("exit")
        job.quiet(1.5)
        for rank in (1, 2):
            job[rank].do("stepped o")
            job[rank].do("step o")
        assert {(fault.kind, fault.ranks) for fault in job.faults(0)} == {("left", (0,))}


def test_a_stopped_rank_is_lost_after_the_limit_and_ended():
    with Job((0, 1)) as job:
        job[1].send(signal.SIGSTOP)
        fault = job[0].fault()
        assert (fault.kind, fault.ranks) == ("silent", (1,))
        assert "rank 1 has been stopped (SIGSTOP) for 4 s" in fault.text
        assert job[1].ends() == -signal.SIGKILL


@pytest.mark.parametrize("gone", [0, 1, 2, 3])
def test_a_killed_host_is_known_wherever_it_is_in_the_tree(gone):
    with Job((0,), (1, 5), (2,), (3,), fan_out=1) as job:  # a chain
        job.kill_host(gone)
        dead = job.hosts[gone]
        assert {(fault.kind, fault.ranks[0] in dead) for fault in job.faults(*dead)} == {("lost", True)}


# -- what is not --------------------------------------------------------------------------------------


def test_a_short_stop_and_a_long_one_under_a_debugger_are_no_reason():
    with Job((0, 1), silence=8.0) as job:
        job[0].do("wait x")
        job[1].send(signal.SIGSTOP)
        job.quiet(3.0)
        job[1].send(signal.SIGCONT)
        job.quiet(7.0)  # and the seconds of one stop do not count in the next one
        job[1].send(signal.SIGSTOP)
        job.quiet(3.0)
        job[1].send(signal.SIGCONT)


def test_native_code_with_pythons_lock_is_alive():
    with Job((0, 1), warn=3.0) as job:
        job[0].do("wait x")
        job[1].do("hold 20")
        text = job[0].hear("log")
        assert "1 of 2 ranks wait in x" in text
        assert "for rank 1" in text
        assert "its process runs, and used" in text or "its process waits" in text
        job.quiet(5.0)
        job[1].do("wait x")
        until(lambda: len([one for one in job[0].said if "log" in one]) > 1)
        job.quiet(0.5)


def test_a_finalizer_within_a_wait_is_no_waiting():
    with Job((0, 1)) as job:
        job[0].do("wait y")
        job[1].do("finalizer 8")  # it waits in x, as it says, and does something else
        job.quiet(6.0)


def test_thousands_of_open_files_are_no_reason():
    with Job((0, 1)) as job:
        job[1].do("files 1100")
        assert job[1].hear("files") > 1024
        job.quiet(1.0)
        job[1].do("wait x")
        job[0].do("wait y")
        assert {fault.kind for fault in job.faults()} == {"deadlock"}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_agent_that_is_killed_changes_nothing_but_one_line(index):
    with Job((0, 1), (2, 3), (4,), fan_out=1) as job:
        os.kill(job.agents[index].pid, signal.SIGKILL)
        first = job[job.hosts[index][0]]
        assert "is no longer watched" in first.hear("log")
        job.all("step o", 4)
        job.quiet(6.0)
        if index == 1:  # those that reported to it report to the first one now
            assert "of rank(s) 2-3 has ended" in job[0].hear("log")
            job[4].send(signal.SIGKILL)
            assert {job[rank].fault().ranks for rank in (0, 1)} == {(4,)}


def test_a_host_whose_agent_was_killed_may_end_in_good_order():
    with Job((0,), (1, 2)) as job:
        os.kill(job.agents[1].pid, signal.SIGKILL)
        assert "is no longer watched" in job[1].hear("log")
        job.quiet(14.0)
        job[1].do("exit")
        job[2].do("exit")
        job.quiet(4.0)  # rank 0 may have something left to do


def test_a_host_that_ended_in_good_order_may_be_taken_down():
    """As a container is with its last process, the agent with it."""
    with Job((0,), (1, 2), (3,), fan_out=1) as job:
        for rank in (1, 2):
            job[rank].do("bye")
            job[rank].hear("left")
            job[rank].do("exit")
        time.sleep(1.0)
        os.kill(job.agents[1].pid, signal.SIGKILL)
        job.quiet(4.0)
        job[3].send(signal.SIGKILL)
        assert job[0].fault().ranks == (3,)


def test_a_stopped_agent_is_no_reason():
    with Job((0,), (1,), warn=3.0) as job:
        os.kill(job.agents[1].pid, signal.SIGSTOP)
        job[0].do("step o")
        assert "its host's agent does not answer" in job[0].hear("log")
        job.quiet(6.0)
        os.kill(job.agents[1].pid, signal.SIGCONT)
        job.quiet(1.0)
        job[1].send(signal.SIGKILL)
        assert job[0].fault().ranks == (1,)


def test_a_forked_child_does_not_keep_a_killed_rank_alive():
    """As a DataLoader's worker that outlives its parent: it has the same connections."""
    with Job((0, 1)) as job:
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
        try:
            job[1].send(signal.SIGKILL)
            assert job[0].fault().ranks == (1,)
        finally:
            child.kill()
            child.wait()


# -- strangers ----------------------------------------------------------------------------------------


def test_strangers_change_nothing():
    with Job((0,), (1,)) as job:
        address = tuple(job.table[0][0])
        with socket.create_connection(address) as quiet, socket.create_connection(address) as loud:
            nonce = loud.recv(NONCE)
            loud.sendall(b"\0" * NONCE + b"\xff" * 100000)
            forged = Channel(b"?" * 32, nonce + b"\1" * NONCE, hub=False)
            with socket.create_connection(address) as forger:
                forger.sendall(b"\1" * NONCE + forged.frame({"host": 1}))
                forger.settimeout(SECONDS)
                assert len(forger.recv(1000)) == NONCE  # the agent's random number
                assert forger.recv(1000) == b""  # and then nothing
            many = [socket.create_connection(address) for _ in range(200)]

            def refused() -> int:
                count = 0
                for one in many:
                    one.settimeout(0.05)
                    try:
                        count += one.recv(NONCE) == b""
                    except OSError:
                        count += 0
                return count

            until(lambda: refused() > 20)  # only so many who have not said who they are
            for one in many:
                one.close()
            quiet.close()
        job.quiet(0.5)
        job[0].do("wait x")  # and the ranks are heard as before
        job[1].do("fail alas")
        job.faults()


def test_nobody_can_take_a_ranks_or_a_hosts_place():
    with Job((0,), (1,)) as job:
        for rank in (0, 1, 7):
            with pytest.raises((WireError, OSError)):
                Member(rank, job.name, KEY, Activity(), lambda: None)
        with pytest.raises(WireError):
            Member(0, job.name, b"?" * 32, Activity(), lambda: None)
        sock = dial([tuple(job.table[0][0])], 5.0, 4.0)
        with sock:
            theirs = sock.recv(NONCE)
            channel = Channel(KEY, theirs + b"\1" * NONCE, hub=False)
            sock.sendall(b"\1" * NONCE + channel.frame({"host": 1}))
            sock.settimeout(SECONDS)
            assert sock.recv(1000) == b""
        job.quiet(0.5)


def test_an_agent_that_is_none_is_no_agent():
    name = f"hvdloss-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
        with pytest.raises((OSError, WireError)):
            Member(0, name, KEY, Activity(), lambda: None)


# -- processes ----------------------------------------------------------------------------------------


def test_only_the_very_process_is_ended_and_only_if_it_is_stopped():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        one = process.Process(child.pid)
        assert one.look()
        assert not one.end()
        os.kill(child.pid, signal.SIGSTOP)
        until(lambda: one.look() and one.state == "T")
        other = process.Process(child.pid)
        other._started += 1  # as if the number had been given again
        assert not other.end()
        assert not other.look()
        assert child.poll() is None
        assert one.end()
        assert child.wait(SECONDS) == -signal.SIGKILL
        assert not one.look()
        one.close()
        other.close()
    finally:
        child.kill()
        child.wait()
