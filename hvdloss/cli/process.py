"""Run long programs: their output to the log and a listener, their end never left to chance."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hvdloss._util.private import open_private
from hvdloss.cli.errors import Interrupted


@dataclass(frozen=True)
class Ended:
    """How a program ended: its status, the end of its output, and whether it was cut off."""

    status: int
    tail: list[str]
    timed_out: bool = False


class Log:
    """The full log of one install: every command and all that it printed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] = open_private(path, "w", encoding="utf-8", errors="replace")

    def write(self, line: str) -> None:
        """Append one line."""
        self._file.write(line.rstrip("\n") + "\n")

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        listener: Callable[[str], None] | None = None,
        timeout: float | None = None,
        kept: int = 4000,
    ) -> Ended:
        """Run `command` in a process group of its own; on any exception, end the whole group.

        Args:
            command: the program and its arguments.
            env: its whole environment; None means ours.
            cwd: where it runs.
            listener: called with every line as it comes.
            timeout: seconds after which the group is ended (`Ended.timed_out`).
            kept: number of last lines to return.
        """
        self.write(f"\n$ {shlex.join(command)}" + (f"   (in {cwd})" if cwd else ""))
        self._file.flush()
        started = time.monotonic()
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            cwd=cwd,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        cut_off = threading.Event()

        def cut() -> None:
            cut_off.set()
            _end_group(process, grace=3.0)

        timer = threading.Timer(timeout, cut) if timeout else None
        tail: deque[str] = deque(maxlen=kept)
        try:
            if timer:
                timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                line = line.rstrip("\n")
                self.write(line)
                tail.append(line)
                if listener:
                    listener(line)
            status = process.wait()
        except BaseException:
            _end_group(process, grace=3.0)
            process.wait()
            raise
        finally:
            if timer:
                timer.cancel()
            # Anything the program left behind in its group must not outlive it.
            _end_group(process, grace=0.0)
            if process.stdout:
                process.stdout.close()
        self.write(f"-> status {status} after {time.monotonic() - started:.1f} s")
        self._file.flush()
        return Ended(status, list(tail), cut_off.is_set())


def _end_group(process: subprocess.Popen[str], grace: float) -> None:
    """End every process of a group: politely, and after `grace` seconds for good."""
    deadline = time.monotonic() + grace
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if grace > 0:
            os.killpg(process.pid, signal.SIGTERM)
            while time.monotonic() < deadline:
                process.poll()  # reap it, or its group would never look empty
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into `Interrupted` inside the block (main thread only)."""

    def stop(signum: int, frame: object) -> None:
        raise Interrupted(signum)

    return _handled_by(stop)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold these signals back during the block, and raise `Interrupted` at its end.

    For the seconds in which pip swaps one Horovod for another. (Blocking the signals would not
    do: another thread, NumPy's say, would take them.)
    """
    came: list[int] = []
    with _handled_by(lambda signum, frame: came.append(signum)):
        yield
    if came:
        raise Interrupted(came[0])


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
