"""Processes of this machine: told apart for certain, and ended where they are stopped for good."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Any

__all__ = ["cut", "end", "host", "identity", "sockets"]


def host() -> str:
    """Return what processes that see each other's process numbers have in common."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {os.uname().nodename}"


def _stat(pid: int) -> tuple[str, int]:
    """Return a process's state letter and when it started, in the kernel's ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


def identity() -> dict[str, Any]:
    """Return what tells this process from all others on its host, as JSON."""
    pid = os.getpid()
    try:
        started = _stat(pid)[1]
    except (OSError, ValueError, IndexError):
        started = -1
    return {"pid": pid, "started": started, "host": host()}


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


def cut(those: dict[int, str]) -> None:
    """End the connections of these sockets, as far as they are still the same; they stay open.

    Whoever waits on them, here or at the other end, is told at once.
    """
    now = sockets()
    for number, target in those.items():
        if now.get(number) != target:
            continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as same:
            if same.family in (socket.AF_INET, socket.AF_INET6):
                same.shutdown(socket.SHUT_RDWR)


def end(who: dict[str, Any], *, only_stopped: bool) -> bool:
    """End a process of this host that no longer answers; return whether it was.

    Args:
        who: its :func:`identity`.
        only_stopped: only if it is stopped (SIGSTOP); one under a debugger is never ended.
    """
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError, TypeError):
        pid, started = int(who["pid"]), int(who["started"])
        if who["host"] != host() or pid in (0, 1, os.getpid()):
            return False
        state, since = _stat(pid)
        if since != started or state in "tZX" or (only_stopped and state != "T"):
            return False
        os.kill(pid, signal.SIGKILL)
        return True
    return False
