"""Several hosts on one machine: network namespaces joined by a bridge, with links of a chosen rate.

    with Hosts(2, rate_mbit=200) as hosts:
        hosts.run([sys.executable, "train.py"])  # one Horovod rank per host
        hosts.set_rate(50)
        hosts.run([sys.executable, "train.py"], ranks_per_host=2)

What runs in a namespace sees one network interface (and its loopback), as on a host of its own, and real
TCP between them; processor, memory and files are the machine's. For measuring and testing what several
hosts would do where there are none; needs root on Linux, `ip` and `tc` (:func:`available` says why not).

    python -m hvdloss.benchmarks.hosts 2 200 -- python train.py

runs one program by hand, here on two hosts with 200 Mbit/s.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from hvdloss.errors import ConfigError, HvdlossError

__all__ = ["Hosts", "HostsError", "RankResult", "available"]

INTERFACE = "net0"  # on every host
MTU = 1500
HEADERS = 14  # of Ethernet; tbf counts them
# What a link could have sent in this many seconds passes at once after a pause. With less, timers that
# are late on a busy machine cost rate (at 0.25 ms up to half of it); with more, small messages would not
# feel the link.
BURST_S = 1e-3
# TCP hands down segments of up to so many bytes. tbf cuts what does not fit into its bucket into frames,
# which on a busy machine takes too long for 400 Mbit/s.
SEGMENT = 2**14
QUEUE_S = 0.1  # what waits longer is dropped, and TCP slows down
GRACE_S = 3.0  # for the other ranks, once one has failed, to say what they saw
_numbers = itertools.count()


class HostsError(HvdlossError):
    """The rig could not be made, or a rank in it failed; the message has the last words."""


@dataclass(frozen=True)
class RankResult:
    """How one rank ended.

    Attributes:
        rank: its number.
        host: the number of its host, from 0.
        status: its exit status; negative for a signal; None if it was ended at the time limit.
        output: all that it printed, standard error included.
    """

    rank: int
    host: int
    status: int | None
    output: str


def available() -> str | None:
    """Return why hosts cannot be made here, or None if they can. Leaves nothing behind."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    packages = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "hostname": "hostname"}
    for program, package in packages.items():
        if shutil.which(program) is None:
            return f"`{program}` is not installed (Debian: {package})"
    if os.geteuid() != 0:
        return "network namespaces need root"
    trial = """
        ip link add name try0 type veth peer name try1
        ip link add name try2 type bridge
        ip link set dev try0 master try2
        tc qdisc add dev try0 root tbf rate 1mbit burst 10kb latency 50ms
        hostname try
        mount --bind /dev/null /etc/hosts
    """
    command = ["unshare", "--net", "--uts", "--mount", "sh", "-ec", trial]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"the kernel refuses a network namespace with a limited link: {done.stderr.strip()}"
    return None


def burst_bytes(rate_mbit: float) -> int:
    """Return the size of tbf's bucket: `BURST_S` of the rate, but at least two full frames.

    tbf cuts the segments that TCP hands down to what fits into its bucket, so a small one is safe.
    """
    return max(math.ceil(rate_mbit * 1e6 / 8 * BURST_S), 2 * (MTU + HEADERS))


class Hosts:
    """So many hosts on one network, each link limited to a rate in both directions; a context manager.

    Everything is in namespaces of unique names, addresses included, so rigs do not see each other, and
    nothing of it is on the machine's own network. All is removed at the end of the block, also after an
    exception, Ctrl-C or SIGTERM.

    Args:
        count: how many hosts, 1 to 200.
        rate_mbit: megabits (10^6) per second of each host's link, headers included; None for no limit.

    Raises:
        ConfigError: an argument that cannot be used.
        HostsError: on entering the block, where namespaces cannot be made.
    """

    def __init__(self, count: int, rate_mbit: float | None = None) -> None:
        if not isinstance(count, int) or not 1 <= count <= 200:
            raise ConfigError(f"count={count!r} must be an integer from 1 to 200")
        _check_rate("rate_mbit", rate_mbit)
        self.count = count
        self.rate_mbit = rate_mbit
        self._up = False
        label = f"hvdloss-{os.getpid()}-{next(_numbers)}-{os.urandom(2).hex()}"
        self._switch = f"{label}-switch"
        self.namespaces = [f"{label}-{i}" for i in range(count)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(count)]
        self.gateway = "10.77.0.254"  # where the launcher is reached
        self.names = [f"host{i}" for i in range(count)]
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._previous: Any = None

    def __enter__(self) -> Hosts:
        """Make the hosts."""
        reason = available()
        if reason:
            raise HostsError(f"no hosts can be made here: {reason}")
        self._catch_sigterm()
        try:
            self._build()
            self._up = True
            self.set_rate(self.rate_mbit)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove them."""
        self._remove()

    def _build(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hvdloss-hosts-")
        lines = [f"{address} {name}" for address, name in zip(self.addresses, self.names, strict=True)]
        Path(self._folder.name, "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        _add_namespace(self._switch)
        _ip("-n", self._switch, "link", "add", "name", "bridge", "type", "bridge")
        _ip("-n", self._switch, "address", "add", f"{self.gateway}/24", "dev", "bridge")
        for i in range(self.count):
            self._plug_in(i)
        _ip("-n", self._switch, "link", "set", "dev", "bridge", "up")

    def _plug_in(self, i: int) -> None:
        """Make a host's namespace and its link to the bridge, without a limit."""
        name = self.namespaces[i]
        _add_namespace(name)
        pair = ("link", "add", "name", f"port{i}", "mtu", str(MTU), "type", "veth")
        _ip("-n", self._switch, *pair, "peer", "name", INTERFACE, "mtu", str(MTU), "netns", name)
        _ip("-n", self._switch, "link", "set", "dev", f"port{i}", "master", "bridge", "up")
        for where, device in ((name, INTERFACE), (self._switch, f"port{i}")):
            _ip("-n", where, "link", "set", "dev", device, "gso_max_size", str(SEGMENT))
        _ip("-n", name, "address", "add", f"{self.addresses[i]}/24", "dev", INTERFACE)
        _ip("-n", name, "link", "set", "dev", INTERFACE, "up")

    def _remove(self) -> None:
        """Remove all that there is, whatever goes wrong with parts of it; devices go with namespaces."""
        self._up = False
        for name in (*self.namespaces, self._switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        if self._folder is not None:
            self._folder.cleanup()
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _catch_sigterm(self) -> None:
        """Have SIGTERM end the program by an exception, so that the block is left in order."""

        def leave(number: int, frame: FrameType | None) -> None:
            raise SystemExit(128 + number)

        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGTERM)
            if before is signal.SIG_DFL:
                self._previous = before
                signal.signal(signal.SIGTERM, leave)

    def set_rate(self, mbit: float | None) -> None:
        """Limit every host's link, both ways, to so many megabits per second; None for no limit.

        Takes effect at once, also while ranks run. A limit sits on both ends of each link, so that what
        comes from several hosts at once is limited too. TCP's payload is 1448 of the 1514 bytes of a
        frame that count, 96 % of the rate.

        Raises:
            ConfigError: a rate that is not above 0.
            HostsError: outside the block.
        """
        _check_rate("mbit", mbit)
        self._need()
        for i in range(self.count):
            self._limit(i, mbit)
        self.rate_mbit = mbit

    def _limit(self, i: int, mbit: float | None) -> None:
        """Limit one host's link on both of its ends."""
        for where, device in ((self.namespaces[i], INTERFACE), (self._switch, f"port{i}")):
            if mbit is None:
                subprocess.run(
                    ["tc", "-n", where, "qdisc", "delete", "dev", device, "root"], capture_output=True
                )
                continue
            limit = ("rate", f"{round(mbit * 1e6)}bit", "burst", str(burst_bytes(mbit)))
            wait = ("latency", f"{QUEUE_S * 1e3:.0f}ms")
            _call("tc", "-n", where, "qdisc", "replace", "dev", device, "root", "tbf", *limit, *wait)

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on a host: its network, its name, its view of names.

        The name must resolve to the host's own address: Horovod 0.28.1 makes the Gloo connections of
        process sets (the global one too) by it, whatever HOROVOD_GLOO_IFACE says.
        """
        self._need()
        assert self._folder is not None
        # `ip netns exec` gives the program a view of the file system of its own, so this mount is its own.
        script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        inside = ["ip", "netns", "exec", self.namespaces[host], "unshare", "--uts", "sh", "-c", script]
        return [*inside, self.names[host], f"{self._folder.name}/hosts", *command]

    def _need(self) -> None:
        if not self._up:
            raise HostsError("the hosts exist only inside `with Hosts(...) as hosts:`")

    def run(
        self,
        command: Sequence[str],
        *,
        ranks_per_host: int = 1,
        env: Mapping[str, str] | None = None,
        timeout: float = 300.0,
        listener: Callable[[int, str], None] | None = None,
        echo: bool = True,
        check: bool = True,
    ) -> list[RankResult]:
        """Run one program as Horovod ranks on all hosts, over Gloo, and return how each rank ended.

        No ssh: each rank is started in its host's namespace with the environment that horovodrun gives,
        and they find each other through a rendezvous server of Horovod's in this process. When one rank
        fails, the others are given some seconds and then ended.

        Args:
            command: the program and its arguments, the same for every rank.
            ranks_per_host: ranks 0 .. n-1 are on the first host, and so on.
            env: environment variables besides this process's own.
            timeout: seconds after which all ranks are ended.
            listener: called as ``listener(rank, line)`` for every line that a rank prints, from threads.
            echo: print every line with its rank in front.
            check: raise if a rank failed.

        Raises:
            ConfigError: `ranks_per_host` below 1, or an empty command.
            HostsError: with `check`: a rank that failed, or the time limit; outside the block, always.
        """
        self._need()
        if not isinstance(ranks_per_host, int) or ranks_per_host < 1:
            raise ConfigError(f"ranks_per_host={ranks_per_host!r} must be an integer of at least 1")
        if not command:
            raise ConfigError(f"command={command!r} names no program")
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars

        names = ",".join(f"{name}:{ranks_per_host}" for name in self.names)
        slots = get_host_assignments(parse_hosts(names), self.count * ranks_per_host)
        inherited = {k: v for k, v in os.environ.items() if k not in _PER_RANK}
        ranks: list[_Rank] = []
        with self._rendezvous(slots) as port:
            try:
                for slot in slots:
                    host = slot.rank // ranks_per_host
                    told = {
                        **create_run_env_vars(self.gateway, [INTERFACE], port),
                        **create_slot_env_vars(slot),
                    }
                    whole = {
                        **inherited,
                        "PYTHONUNBUFFERED": "1",
                        **(env or {}),
                        **{k: str(v) for k, v in told.items()},
                    }
                    ranks.append(_Rank(slot.rank, host, self.command(host, command), whole, listener, echo))
                limited = _wait_for(ranks, timeout)
            finally:
                _end(ranks)
        results = [rank.result() for rank in ranks]
        if check:
            _check(results, ranks, timeout if limited else None)
        return results

    @contextlib.contextmanager
    def _rendezvous(self, slots: list[Any]) -> Iterator[int]:
        """Serve Horovod's rendezvous where all hosts reach it, and give its port."""
        from horovod.runner.http.http_server import RendezvousServer

        server = RendezvousServer()
        started: list[int] = []
        # A socket belongs to the namespace of the thread that makes it, and can be used from any.
        thread = threading.Thread(target=lambda: (_enter(self._switch), started.append(server.start())))
        thread.start()
        thread.join()
        if not started:
            raise HostsError("no rendezvous server could be started in the hosts' network")
        try:
            server.init(slots)
            yield started[0]
        finally:
            server.stop()
            server._httpd.server_close()  # an open socket would keep the namespace


#: What a rank is told by whoever starts it; never inherited.
_PER_RANK = {
    *(f"HOROVOD_{what}" for what in ("HOSTNAME", "RANK", "SIZE", "CONTROLLER", "CPU_OPERATIONS", "ELASTIC")),
    *(f"HOROVOD_{group}_{what}" for group in ("LOCAL", "CROSS") for what in ("RANK", "SIZE")),
    *(f"HOROVOD_GLOO_{what}" for what in ("RENDEZVOUS_ADDR", "RENDEZVOUS_PORT", "IFACE")),
}


class _Rank:
    """A rank's process, in a process group of its own, and the thread that reads what it prints."""

    def __init__(
        self,
        rank: int,
        host: int,
        command: list[str],
        env: dict[str, str],
        listener: Callable[[int, str], None] | None,
        echo: bool,
    ) -> None:
        self.rank = rank
        self.host = host
        self.limited = False
        self.order = math.inf  # when it ended
        self._lines: list[str] = []
        self._listener = listener
        self._echo = echo
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)
            if self._echo:
                print(f"[{self.rank}] {line}", end="", flush=True)
            if self._listener is not None:
                self._listener(self.rank, line.rstrip("\n"))

    def signal(self, number: int) -> None:
        """Send a signal to the rank and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def result(self) -> RankResult:
        """Return how it ended; it has."""
        self._reader.join(5.0)
        status = None if self.limited else self.process.returncode
        return RankResult(self.rank, self.host, status, "".join(self._lines))


def _wait_for(ranks: list[_Rank], timeout: float) -> bool:
    """Wait until all ranks have ended, or some time after one failed; return whether time ran out."""
    until = time.monotonic() + timeout
    failed = False
    while any(rank.process.poll() is None for rank in ranks):
        now = time.monotonic()
        for rank in ranks:
            if rank.process.poll() is not None:
                rank.order = min(rank.order, now)
        if not failed and any(rank.process.returncode for rank in ranks):
            failed = True
            until = min(until, now + GRACE_S)
        if now > until:
            for rank in ranks:
                rank.limited = not failed and rank.process.returncode is None
            return not failed
        time.sleep(0.02)
    return False


def _end(ranks: list[_Rank]) -> None:
    """End what still runs."""
    for number, seconds in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        left = [rank for rank in ranks if rank.process.poll() is None]
        for rank in left:
            rank.signal(number)
        until = None if seconds is None else time.monotonic() + seconds
        for rank in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(None if until is None else max(0.0, until - time.monotonic()))
    for rank in ranks:
        rank.signal(signal.SIGKILL)  # what an ended rank has left running


def _check(results: list[RankResult], ranks: list[_Rank], timeout: float | None) -> None:
    """Raise for the rank that failed first."""
    bad = [one for one in results if one.status != 0]
    if not bad:
        return
    first = min(bad, key=lambda one: ranks[one.rank].order)
    if timeout is not None:
        late = ", ".join(str(one.rank) for one in bad)
        what = f"rank(s) {late} had not ended after timeout={timeout:g} s"
    else:
        what = f"rank {first.rank} on host {first.host} ended with status {first.status}"
    tail = "".join(first.output.splitlines(keepends=True)[-30:])
    raise HostsError(f"{what}; its last words:\n{tail}")


def _check_rate(name: str, mbit: float | None) -> None:
    if mbit is not None and not (isinstance(mbit, (int, float)) and 0 < mbit < math.inf):
        raise ConfigError(f"{name}={mbit!r} must be megabits per second above 0, or None for no limit")


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise HostsError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


def _ip(*arguments: str) -> None:
    _call("ip", *arguments)


def _add_namespace(name: str) -> None:
    _ip("netns", "add", name)
    _ip("-n", name, "link", "set", "dev", "lo", "up")
    # One address per interface; and the same congestion control whatever the machine's own is:
    # BBR, for one, slows down every ten seconds to look at the round trip.
    _write(name, "net/ipv6/conf/all/disable_ipv6", "1")
    _write(name, "net/ipv4/tcp_congestion_control", "cubic", "reno")


def _write(namespace: str, name: str, *values: str) -> None:
    """Write the first of `values` that the kernel accepts to a setting of a namespace; none is fine."""
    for value in values:
        script = f"echo {value} > /proc/sys/{name}"
        done = subprocess.run(["ip", "netns", "exec", namespace, "sh", "-c", script], capture_output=True)
        if not done.returncode:
            return


def _enter(namespace: str) -> None:
    """Move the calling thread, and no other, into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}", "rb") as file:
        if libc.setns(file.fileno(), 0x40000000):  # CLONE_NEWNET, setns(2)
            number = ctypes.get_errno()
            raise HostsError(f"cannot enter the namespace {namespace}: {os.strerror(number)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("rate", type=float, help="Mbit/s; 0 for no limit")
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("command", nargs="+", help="after --, if it has options of its own")
    args = parser.parse_args()
    try:
        with Hosts(args.count, args.rate or None) as hosts:
            hosts.run(args.command, ranks_per_host=args.ranks_per_host, timeout=args.timeout)
    except HvdlossError as error:
        raise SystemExit(f"hosts: {error}") from error


if __name__ == "__main__":
    main()
