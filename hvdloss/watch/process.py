"""Processes of this machine, as the operating system sees them: nothing here needs their Python."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Process", "host", "native_stack", "shut_down_sockets", "sockets"]

_TICKS = os.sysconf("SC_CLK_TCK")


def host() -> str:
    """Return what processes that see each other's process numbers, and reach each other, have in common."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return f"unknown {os.uname().nodename}"


@dataclass(frozen=True)
class _Stat:
    state: str  # R running, S sleeping, D waiting for a disk, T stopped, t under a debugger, Z ended, X gone
    started: int  # in the kernel's ticks
    used: float  # seconds of processor time


def _stat(pid: int) -> _Stat:
    """Return the ``/proc`` data of a process.

    Raises:
        OSError, ValueError, IndexError: there is none.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return _Stat(fields[0], int(fields[19]), (int(fields[11]) + int(fields[12])) / _TICKS)


class Process:
    """A process of this host, identified even if another one reuses its pid later.

    Args:
        pid: its number, as this process sees it.

    Raises:
        OSError, ValueError, IndexError: there is no such process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = -1
        with contextlib.suppress(OSError, AttributeError):  # an old kernel, or one that forbids it
            self._fd = os.pidfd_open(pid)
        stat = _stat(pid)
        self._started = stat.started
        self._stopped_since: float | None = None
        self._last = (time.monotonic(), stat.used)
        self._share = 0.0  # of one core, between the last two looks
        self.state = stat.state

    def fileno(self) -> int:
        """Return a descriptor that is readable once the process has ended; -1 if there is none."""
        return self._fd

    def close(self) -> None:
        """Let go of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def look(self) -> bool:
        """Look at it; return whether it is alive: one that only waits to be reaped is not."""
        try:
            stat = _stat(self.pid)
        except (OSError, ValueError, IndexError):
            self.state = "X"
            return False
        self.state = stat.state if stat.started == self._started else "X"
        now, (before, used) = time.monotonic(), self._last
        if now - before > 0.5:
            self._share = (stat.used - used) / (now - before)
            self._last = (now, stat.used)
        if self.state != "T":
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        return self.state not in "ZX"

    @property
    def stopped(self) -> float:
        """For how many seconds it has been stopped (SIGSTOP, SIGTSTP); 0 if it is not."""
        return 0.0 if self._stopped_since is None else time.monotonic() - self._stopped_since

    def forgive(self, seconds: float) -> None:
        """Do not count time in which no check was possible."""
        if self._stopped_since is not None:
            self._stopped_since = min(self._stopped_since + seconds, time.monotonic())

    def describe(self) -> str:
        """Return what it is about, for messages; empty if that is nothing special."""
        if self.state == "T":
            return f"its process is stopped (SIGSTOP) for {self.stopped:.0f} s"
        if self.state == "t":
            return "its process is stopped by a debugger"
        if self.state == "D":
            return "its process waits for a disk or a device"
        return f"its process runs, and used {100 * self._share:.0f} % of a core"

    def end(self) -> bool:
        """End it (SIGKILL) if it is stopped at this moment; return whether it was."""
        if self.pid in (0, 1, os.getpid()) or not self.look() or self.state != "T":
            return False
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
            return True
        return False


def native_stack(pid: int) -> tuple[str, ...]:
    """Return the main thread's stack of another Python process, read from outside by py-spy; at most 2.5 s.

    Args:
        pid: of the process, of the same user.

    Returns:
        Its innermost frames, outermost first, native ones too if that is quick; one line that says why there
        are none.
    """
    tool = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    if not os.access(tool, os.X_OK):
        return ("(install py-spy to see where: its interpreter does not answer)",)
    found: tuple[str, ...] = ("(py-spy could not read its stack)",)
    for how, seconds in ((["--nonblocking"], 1.0), (["--native"], 1.5)):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            out = subprocess.run(
                [tool, "dump", *how, "--pid", str(pid)], capture_output=True, text=True, timeout=seconds
            )
            found = _frames_of(out.stdout) or found
    return found


def _frames_of(dump: str) -> tuple[str, ...]:
    """Return the innermost frames of the first thread of py-spy's output."""
    frames: list[str] = []
    for line in dump.splitlines():
        if line.startswith("Thread") and frames:
            break
        if line.startswith(" "):
            frames.append(line.strip())
    return tuple(reversed(frames[:12]))


def sockets() -> dict[int, str]:
    """Return this process's sockets: what the kernel calls each, by file descriptor."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{name}")
                if target.startswith("socket:"):
                    found[int(name)] = target
    return found


def shut_down_sockets(those: dict[int, str]) -> None:
    """End the connections of these sockets, as far as they are still the same; they stay open.

    Whoever waits on them, at either end, gets an error at once. Listening sockets are left alone: no
    rank waits for them, and PyTorch's Gloo ends the process if it cannot accept.
    """
    now = sockets()
    for number, target in those.items():
        if now.get(number) != target:
            continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as same:
            listens = same.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if same.family in (socket.AF_INET, socket.AF_INET6) and not listens:
                same.shutdown(socket.SHUT_RDWR)


def user_of(sock: socket.socket) -> Any:
    """Return process, user and group at the other end of a Unix socket, as the kernel knows them."""
    return struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
