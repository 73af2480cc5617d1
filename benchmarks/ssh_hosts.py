"""Hosts out of namespaces, each with an sshd of its own: `horovodrun` across them, and their faults.

    with SshHosts(2) as hosts:
        hosts.horovodrun([sys.executable, "train.py"])             # Gloo, one rank per host
        hosts.horovodrun([sys.executable, "train.py"], controller="mpi", ranks_per_host=2)

        job = hosts.launch([sys.executable, "train.py"])           # and while it runs:
        hosts.cut(1)      # as if host 1's cable had been pulled
        hosts.mend(1)
        hosts.kill(1)     # as if host 1 had lost its power
        hosts.revive(1)   # and come back, with nothing in its memory

    with SshHosts(2, encrypted=True) as hosts: ...                 # all that ranks say goes through WireGuard

On top of what a host of :class:`~hvdloss.benchmarks.hosts.Hosts` has, one of these has process numbers of
its own, so that all of it ends at once; its own /run, /dev/shm, /etc/hosts and home; an sshd with its own
host key that takes one public key and nothing else. `horovodrun` is started on host 0, reaches the others by
ssh alone, and accepts only the host keys that the rig made. Files are the machine's, so programs are the
same everywhere. Needs root on Linux, openssh and, for `encrypted`, WireGuard's tools
(:func:`ssh_available`, :func:`wireguard_available` say why not).

    python -m hvdloss.benchmarks.ssh_hosts 2 --mpi --encrypted -- python train.py
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvdloss.benchmarks.hosts import (
    INTERFACE,
    Hosts,
    HostsError,
    _call,
    _check,
    _end,
    _enter,
    _ip,
    _Rank,
    _wait_for,
    available,
)
from hvdloss.errors import ConfigError, HvdlossError

__all__ = ["Capture", "Job", "SshHosts", "ssh_available", "wireguard_available"]

TUNNEL = "wg0"  # the encrypted interface, on every host
TUNNEL_PORT = 51820  # in each host's own namespace
START_S = 20.0  # for a host to come up
#: What a program on a host is given of this process's environment: horovodrun hands all that it has to
#: every rank, on ssh's command line.
INHERITED = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_OWN = {"HOME": "/run/home", "TMPDIR": "/run/tmp"}
# Debian keeps sshd and others where an ordinary PATH does not look.
_SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

#: Makes a host and stays its first process; when it ends, also because the rig ended, all of the host does.
_FIRST = r"""
set -e
folder=$1 name=$2 sshd=$3 tunnel=$4
hostname "$name"
mount -t tmpfs -o mode=755 hvdloss "$folder/run"
mkdir -m 755 "$folder/run/sshd" "$folder/run/wireguard"
mkdir -m 700 "$folder/run/rig" "$folder/run/home"
mkdir -m 1777 "$folder/run/tmp"
mount --bind "$folder/$name" "$folder/run/rig"
mount --rbind "$folder/run" /run
mount -t tmpfs -o mode=1777 hvdloss /dev/shm
mount --bind /run/rig/hosts /etc/hosts
# A home and a shell without start-up files of the user's, which may do anything and write anywhere.
mount --bind /run/rig/passwd /etc/passwd
# Where the machine's root account is locked, sshd would refuse a key as well.
if [ -e /etc/shadow ]; then mount --bind /run/rig/shadow /etc/shadow; fi
if [ -n "$tunnel" ]; then
    export LOG_LEVEL=error
    ip link add wg0 type wireguard 2>/dev/null || wireguard-go wg0 >/run/rig/wireguard.log 2>&1
    wg setconf wg0 /run/rig/wg.conf
    ip address add "$tunnel" dev wg0
    ip link set dev wg0 mtu 1420 up
fi
"$sshd" -f /run/rig/sshd_config -E /run/rig/sshd.log
echo up
exec >/dev/null
cat
"""

_SSHD = """\
ListenAddress {address}
HostKey /run/rig/host_key
AuthorizedKeysFile /run/rig/authorized_keys
AllowUsers root
PermitRootLogin prohibit-password
AuthenticationMethods publickey
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes yes
PermitUserRC no
PermitUserEnvironment no
AllowTcpForwarding no
AllowAgentForwarding no
X11Forwarding no
UseDNS no
PidFile none
MaxStartups 100
SetEnv TMPDIR=/run/tmp
"""

_SSH = """\
Host *
    User root
    IdentityFile /run/rig/key
    IdentitiesOnly yes
    BatchMode yes
    StrictHostKeyChecking yes
    UserKnownHostsFile /run/rig/known_hosts
    GlobalKnownHostsFile none
    ConnectTimeout 5
    ServerAliveInterval 1
    ServerAliveCountMax {alive}
    LogLevel ERROR
"""

#: Found before the system's ssh. Horovod calls ssh with StrictHostKeyChecking=no; of an option that is
#: given twice ssh takes the first.
_WRAPPER = """\
#!/bin/sh
exec {ssh} -F /run/rig/ssh_config -o StrictHostKeyChecking=yes "$@"
"""


def _find(program: str) -> str | None:
    return shutil.which(program, path=_SEARCH)


def ssh_available() -> str | None:
    """Return why hosts with sshd cannot be made here, or None if they can. Leaves nothing behind."""
    if reason := available():
        return reason
    needed = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client"}
    for program, package in {**needed, "nsenter": "util-linux"}.items():
        if _find(program) is None:
            return f"`{program}` is not installed (Debian: {package})"
    trial = "mount -t tmpfs hvdloss /run && mount -t tmpfs hvdloss /dev/shm"
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", trial]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"the kernel refuses a namespace of processes and mounts: {done.stderr.strip()}"
    return None


def wireguard_available() -> str | None:
    """Return why hosts cannot be joined by WireGuard here, or None if they can."""
    if _find("wg") is None:
        return "`wg` is not installed (Debian: wireguard-tools)"
    trial = ["unshare", "--net", "ip", "link", "add", TUNNEL, "type", "wireguard"]
    if subprocess.run(trial, capture_output=True).returncode == 0:
        return None
    if _find("wireguard-go") is None:
        return "this kernel has no WireGuard, and `wireguard-go` is not installed (Debian: wireguard-go)"
    if not Path("/dev/net/tun").exists():
        return "this kernel has no WireGuard, and there is no /dev/net/tun for wireguard-go"
    return None


@dataclass
class Job:
    """A `horovodrun` that runs on host 0."""

    _process: _Rank

    def wait(self, timeout: float) -> int | None:
        """Return its exit status, or None if it had not ended after so many seconds and was ended."""
        limited = _wait_for([self._process], timeout)
        _end([self._process])
        return None if limited else self._process.process.returncode

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.process.poll() is None

    @property
    def output(self) -> str:
        """What it has printed so far, ranks included."""
        return "".join(self._process._lines)

    def end(self) -> None:
        """End it."""
        _end([self._process])


@dataclass
class Capture:
    """The frames that passed a host's port while they were captured."""

    frames: list[bytes] = field(default_factory=list)

    def seen(self, pattern: bytes) -> int:
        """Return how many frames hold these bytes."""
        return sum(pattern in frame for frame in self.frames)

    @property
    def size(self) -> int:
        """All frames' bytes."""
        return sum(map(len, self.frames))

    def kinds(self) -> dict[str, int]:
        """Return the number of frames by kind: arp, tcp, udp/PORT (the lower), ip/NUMBER, ether/TYPE."""
        out: dict[str, int] = {}
        for frame in self.frames:
            kind = f"ether/{frame[12:14].hex()}"
            if frame[12:14] == b"\x08\x06":
                kind = "arp"
            elif frame[12:14] == b"\x08\x00":
                kind = f"ip/{frame[23]}"
                ports = 14 + 4 * (frame[14] & 15)
                if frame[23] == 6:
                    kind = "tcp"
                elif frame[23] == 17:
                    lower = min(int.from_bytes(frame[ports + i : ports + i + 2], "big") for i in (0, 2))
                    kind = f"udp/{lower}"
            out[kind] = out.get(kind, 0) + 1
        return out


class SshHosts(Hosts):
    """So many hosts with an sshd each; a context manager. See the module for what a host has.

    All is removed at the end of the block, also after an exception, Ctrl-C or SIGTERM; processes on hosts
    end even when this process is killed. Keys and settings are in a folder that only root can enter, and go
    with it.

    Args:
        count: how many hosts, 1 to 200.
        rate_mbit: megabits per second of each host's link; None for no limit.
        encrypted: join the hosts by WireGuard, the kernel's or wireguard-go. Names then stand for addresses
            in the tunnel, and ssh, rendezvous and ranks use it.
        alive_s: seconds of silence after which ssh, and so horovodrun, gives a host up (ServerAliveInterval).

    Attributes:
        names: what hosts are called in ``horovodrun -H``: host0, host1, ...
        interface: what to give ``--network-interfaces``.

    Raises:
        ConfigError: an argument that cannot be used.
        HostsError: on entering the block, where such hosts cannot be made.
    """

    def __init__(
        self, count: int, rate_mbit: float | None = None, *, encrypted: bool = False, alive_s: int = 5
    ) -> None:
        super().__init__(count, rate_mbit)
        if not isinstance(alive_s, int) or alive_s < 1:
            raise ConfigError(f"alive_s={alive_s!r} must be an integer of at least 1, in seconds")
        self.encrypted = encrypted
        self.alive_s = alive_s
        self.interface = TUNNEL if encrypted else INTERFACE
        self._inner = [f"10.78.0.{i + 1}" for i in range(count)] if encrypted else self.addresses
        self._first: list[subprocess.Popen[str] | None] = [None] * count
        self._jobs: list[Job] = []

    def __enter__(self) -> SshHosts:
        """Make the hosts."""
        reason = ssh_available() or (wireguard_available() if self.encrypted else None)
        if reason:
            raise HostsError(f"no hosts with ssh can be made here: {reason}")
        super().__enter__()
        return self

    def _build(self) -> None:
        super()._build()
        self._write_settings()
        for i in range(self.count):
            self._boot(i)

    def _remove(self) -> None:
        """Remove all that there is, whatever goes wrong with parts of it."""
        for job in self._jobs:
            with contextlib.suppress(Exception):
                job.end()
        for i in range(self.count):
            with contextlib.suppress(Exception):
                self._stop(i)
        super()._remove()

    # What hosts are told

    def _path(self, i: int, name: str = "") -> Path:
        assert self._folder is not None
        return Path(self._folder.name, self.names[i], name)

    def _write_settings(self) -> None:
        assert self._folder is not None
        pairs = zip(self._inner, self.names, strict=True)
        table = "".join(f"{address} {name}\n" for address, name in pairs)
        known = []
        ssh_keygen, ssh = _find("ssh-keygen"), _find("ssh")
        assert ssh_keygen is not None
        Path(self._folder.name, "run").mkdir(mode=0o700)
        for i, name in enumerate(self.names):
            self._path(i).mkdir(mode=0o700)
            made = self._path(i, "host_key")
            _call(ssh_keygen, "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(made))
            public = made.with_suffix(".pub").read_text().split()
            known.append(f"{name},{self._inner[i]} {public[0]} {public[1]}\n")
        _call(ssh_keygen, "-q", "-t", "ed25519", "-N", "", "-C", "rig", "-f", str(self._path(0, "key")))
        authorized = self._path(0, "key.pub").read_text()
        for i in range(self.count):
            self._put(i, "hosts", f"127.0.0.1 localhost\n{table}", 0o644)
            self._put(i, "passwd", _accounts(), 0o644)
            self._put(i, "shadow", "root:*:19000:0:99999:7:::\n")
            self._put(i, "authorized_keys", authorized)
            self._put(i, "sshd_config", _SSHD.format(address=self._inner[i]))
        self._put(0, "known_hosts", "".join(known))
        self._put(0, "ssh_config", _SSH.format(alive=self.alive_s))
        self._path(0, "bin").mkdir(mode=0o700)
        self._put(0, "bin/ssh", _WRAPPER.format(ssh=ssh), 0o700)
        if self.encrypted:
            self._write_tunnels()

    def _write_tunnels(self) -> None:
        """Give every host a key of its own, and the public keys and addresses of all others."""
        private = [_ask(["wg", "genkey"]) for _ in range(self.count)]
        public = [_ask(["wg", "pubkey"], key) for key in private]
        for i in range(self.count):
            lines = ["[Interface]", f"PrivateKey = {private[i]}", f"ListenPort = {TUNNEL_PORT}"]
            for j in range(self.count):
                if j != i:
                    lines += ["[Peer]", f"PublicKey = {public[j]}", f"AllowedIPs = {self._inner[j]}/32"]
                    lines += [f"Endpoint = {self.addresses[j]}:{TUNNEL_PORT}"]
            self._put(i, "wg.conf", "\n".join([*lines, ""]))

    def _put(self, i: int, name: str, text: str, mode: int = 0o600) -> None:
        file = os.open(self._path(i, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(file, "w") as out:
            out.write(text)

    # Up and down

    def _boot(self, i: int) -> None:
        """Start a host's first process, and wait until its sshd listens."""
        assert self._folder is not None
        sshd = _find("sshd")
        assert sshd is not None
        unshare = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        tunnel = f"{self._inner[i]}/24" if self.encrypted else ""
        script = ["sh", "-c", _FIRST, "first", self._folder.name, self.names[i], sshd, tunnel]
        log = self._path(i, "first.log").open("a")
        first = subprocess.Popen(
            ["ip", "netns", "exec", self.namespaces[i], *unshare, *script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**_inherited(), "PATH": _SEARCH},
            start_new_session=True,  # Ctrl-C is for the rig, which then ends its hosts
        )
        log.close()
        self._first[i] = first
        assert first.stdout is not None
        ready, _, _ = select.select([first.stdout], [], [], START_S)
        if not ready or first.stdout.readline() != "up\n":
            self._stop(i)
            logs = "".join(path.read_text() for path in sorted(self._path(i).glob("*.log")))
            raise HostsError(f"{self.names[i]} did not come up: {logs.strip()}")

    def _stop(self, i: int) -> None:
        """End every process of a host."""
        first = self._first[i]
        if first is None:
            return
        for pid in _children(first.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # a first process takes all others with it
        try:
            first.wait(10.0)
        except subprocess.TimeoutExpired:
            first.kill()
            first.wait()
        for stream in (first.stdin, first.stdout):
            assert stream is not None
            stream.close()
        self._first[i] = None

    def up(self, host: int) -> bool:
        """Return whether a host has not been killed."""
        return self._first[host] is not None

    def cut(self, host: int) -> None:
        """Pull the cable: nothing comes to the host or from it any more, and nobody is told."""
        self._need()
        _ip("-n", self._switch, "link", "set", "dev", f"port{host}", "down")

    def mend(self, host: int) -> None:
        """Put the cable back in; what TCP still tries to send arrives."""
        self._need()
        _ip("-n", self._switch, "link", "set", "dev", f"port{host}", "up")

    def kill(self, host: int) -> None:
        """Take a host's power: its link is dead, then all its processes; connections end without a word."""
        self.cut(host)
        self._stop(host)

    def revive(self, host: int) -> None:
        """Start a killed host again, with its name, address and keys, and nothing that was running."""
        self._need()
        if self.up(host):
            raise ConfigError(f"host={host} is up; only a killed host is revived")
        # In a new namespace: connections of the old one would go on closing.
        subprocess.run(["ip", "-n", self._switch, "link", "delete", f"port{host}"], capture_output=True)
        _ip("netns", "delete", self.namespaces[host])
        self._plug_in(host)
        self._limit(host, self.rate_mbit)
        self._boot(host)

    def processes(self, host: int) -> dict[int, str]:
        """Return the command lines of all that runs on a host, by process number on the machine."""
        first = self._first[host]
        own = _children(first.pid) if first is not None else []
        out = {}
        for pid in own:
            space = os.readlink(f"/proc/{pid}/ns/pid")
            for path in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if os.readlink(path / "ns/pid") == space:
                        text = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                        if text:  # else it has ended, or is the kernel's
                            out[int(path.name)] = text.strip()
        return out

    # Programs on hosts

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on a host, in its namespaces and in this folder."""
        self._need()
        first = self._first[host]
        pids = _children(first.pid) if first is not None else []
        if not pids:
            raise HostsError(f"{self.names[host]} is down")
        enter = ["nsenter", "--target", str(pids[0]), "--net", "--uts", "--mount", "--pid"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', os.getcwd(), *command]

    def run(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Run ranks without ssh, as :meth:`Hosts.run` does; not where hosts are joined by a tunnel."""
        if self.encrypted:
            raise HostsError("run() goes past the tunnel; horovodrun() goes through it")
        return super().run(*args, **kwargs)

    def launch(
        self,
        command: Sequence[str],
        *,
        controller: str = "gloo",
        ranks_per_host: int = 1,
        options: Sequence[str] = (),
        mpi_args: str = "",
        env: Mapping[str, str] | None = None,
        listener: Callable[[str], None] | None = None,
        echo: bool = False,
    ) -> Job:
        """Start `horovodrun` on host 0 and return at once.

        Args:
            command: the program and its arguments.
            controller: "gloo", "mpi", or "elastic" (over Gloo; give ``--host-discovery-script`` and the
                numbers of ranks in `options`).
            ranks_per_host: ranks 0 .. n-1 are on the first host, and so on.
            options: more options of horovodrun.
            mpi_args: more options of mpirun.
            env: environment variables of horovodrun and all ranks.
            listener: called with every line that is printed, from a thread.
            echo: print every line.

        Raises:
            ConfigError: an argument that cannot be used.
            HostsError: outside the block.
        """
        self._need()
        if controller not in ("gloo", "mpi", "elastic"):
            raise ConfigError(f"controller={controller!r} must be 'gloo', 'mpi' or 'elastic'")
        if not isinstance(ranks_per_host, int) or ranks_per_host < 1:
            raise ConfigError(f"ranks_per_host={ranks_per_host!r} must be an integer of at least 1")
        if not command:
            raise ConfigError(f"command={command!r} names no program")
        # By a file's name: without its cache horovodrun writes nothing into the user's home.
        whole = [str(Path(sys.executable).with_name("horovodrun")), "--disable-cache"]
        whole += ["--network-interfaces", self.interface, "--mpi" if controller == "mpi" else "--gloo"]
        if controller != "elastic":
            slots = ",".join(f"{name}:{ranks_per_host}" for name in self.names)
            whole += ["-np", str(self.count * ranks_per_host), "-H", slots]
        if controller == "mpi":
            # Open MPI's daemons talk too, besides the ranks.
            whole += ["--mpi-args", f"--mca oob_tcp_if_include {self.interface} {mpi_args}".strip()]
        whole += [*options, *command]
        search = f"/run/rig/bin{os.pathsep}{_SEARCH}"
        told = {**_inherited(), **_OWN, "PYTHONUNBUFFERED": "1", **(env or {}), "PATH": search}
        heard = None if listener is None else lambda _, line: listener(line)
        job = Job(_Rank(0, 0, self.command(0, whole), told, heard, echo))
        self._jobs.append(job)
        return job

    def horovodrun(
        self, command: Sequence[str], *, timeout: float = 120.0, check: bool = True, **options: object
    ) -> Job:
        """Run `horovodrun` on host 0 to its end; `options` are those of :meth:`launch`.

        Raises:
            HostsError: with `check`: it failed, or took longer than `timeout` seconds; its last words are in
                the message. Outside the block, always.
        """
        job = self.launch(command, **options)  # type: ignore[arg-type]
        status = job.wait(timeout)
        if check and status != 0:
            _check([job._process.result()], [job._process], timeout if status is None else None)
        return job

    @contextlib.contextmanager
    def capture(self, host: int) -> Iterator[Capture]:
        """Record every frame to and from a host, as a stranger at the switch would see it."""
        self._need()
        made: list[socket.socket] = []

        def listen() -> None:
            _enter(self._switch)
            one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
            one.setsockopt(socket.SOL_SOCKET, 33, 2**28)  # SO_RCVBUFFORCE: nothing may be missed
            one.bind((f"port{host}", 0))
            one.settimeout(0.2)
            made.append(one)

        opener = threading.Thread(target=listen)
        opener.start()
        opener.join()
        if not made:
            raise HostsError(f"nothing can be captured at {self.names[host]}'s port")
        capture, done = Capture(), threading.Event()

        def read() -> None:
            while True:
                try:
                    capture.frames.append(made[0].recv(2**17))
                except TimeoutError:
                    if done.is_set():
                        return
                except OSError:  # the port is gone
                    return

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield capture
        finally:
            done.set()
            reader.join(10.0)
            made[0].close()


def _inherited() -> dict[str, str]:
    return {name: os.environ[name] for name in INHERITED if name in os.environ}


def _accounts() -> str:
    """Return the machine's accounts, with a home on the host and a plain shell for root."""
    lines = Path("/etc/passwd").read_text().splitlines()
    others = [line for line in lines if not line.startswith("root:")]
    return "\n".join(["root:x:0:0:root:/run/home:/bin/sh", *others, ""])


def _ask(command: list[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, env={"PATH": _SEARCH})
    if done.returncode:
        raise HostsError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout.strip()


def _children(pid: int) -> list[int]:
    """Return a process's children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--rate", type=float, help="Mbit/s of each host's link")
    parser.add_argument("--encrypted", action="store_true", help="join the hosts by WireGuard")
    parser.add_argument("--mpi", action="store_true", help="over MPI; else over Gloo")
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("command", nargs="+", help="after --, if it has options of its own")
    args = parser.parse_args()
    try:
        with SshHosts(args.count, args.rate, encrypted=args.encrypted) as hosts:
            hosts.horovodrun(
                args.command,
                controller="mpi" if args.mpi else "gloo",
                ranks_per_host=args.ranks_per_host,
                timeout=args.timeout,
                echo=True,
            )
    except HvdlossError as error:
        raise SystemExit(f"ssh_hosts: {error}") from error


if __name__ == "__main__":
    main()
