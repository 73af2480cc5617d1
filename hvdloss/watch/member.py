"""A rank's thread of the watch: reports to the host's agent what this rank waits in, and receives faults."""

from __future__ import annotations

import contextlib
import logging
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from hvdloss.errors import HvdlossError
from hvdloss.watch.activity import Activity
from hvdloss.watch.verdict import Fault
from hvdloss.watch.wire import NONCE, Channel, WireError

__all__ = ["Member"]

TICK = 0.25  # seconds between two looks at what the main thread waits in
_CONNECT_S = 30.0  # for an agent on a busy machine
_ABORT_S = 0.75  # for the main thread to take a fault up, before what it may be blocked in is ended
_log = logging.getLogger("hvdloss.watch")


class Member:
    """One rank's end of the watch.

    Args:
        rank: of this process.
        name: of the agent's Unix socket.
        key: the job's.
        activity: of this process.
        abort: ends what this process may be blocked in; called in a thread of its own.

    Raises:
        OSError, WireError: the agent cannot be reached, or is none.
    """

    def __init__(
        self, rank: int, name: str, key: bytes, activity: Activity, abort: Callable[[], None]
    ) -> None:
        self.rank, self.activity, self._abort = rank, activity, abort
        self._changed = threading.Condition()
        self._fault: Fault | None = None
        self._taken = False
        self._closed = False
        self._alone = False
        self._away = False  # the agent is
        self._excluded = False
        self._sending = threading.Lock()
        self._reported = -1  # serial of the last wait that was reported
        self._held: list[socket.socket] = []
        self._sock = socket.socket(socket.AF_UNIX)
        self._connect(name, key)
        self._thread = threading.Thread(target=self._run, name="hvdloss-watch", daemon=True)
        self._thread.start()

    def _connect(self, name: str, key: bytes) -> None:
        try:
            self._sock.settimeout(_CONNECT_S)
            self._sock.connect("\0" + name)
            # The agent's listening sockets: as long as this process lives, their ports answer.
            theirs, descriptors, _, _ = socket.recv_fds(self._sock, NONCE, 64)
            self._held = [socket.socket(fileno=fd) for fd in descriptors]
            while len(theirs) < NONCE:
                if not (data := self._sock.recv(NONCE - len(theirs))):
                    raise WireError("the watch closed the connection")
                theirs += data
            mine = secrets.token_bytes(NONCE)
            self._sock.sendall(mine)
            self._channel = Channel(key, theirs + mine, hub=False)
            self._send({"rank": self.rank})
            while data := self._sock.recv(65536):
                if any("welcome" in message for message in self._channel.feed(data)):
                    return
            raise WireError("the watch did not answer")
        except BaseException:
            for sock in self.sockets():
                sock.close()
            raise

    def _send(self, message: dict[str, Any]) -> bool:
        try:
            with self._sending:
                self._sock.sendall(self._channel.frame(message))
        except TimeoutError:
            # Part of it may have gone: what came after would be read as garbage.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
            return False
        except OSError:  # reading finds out whether the agent is gone
            return False
        except HvdlossError as error:
            _log.warning("hvdloss: rank %d has a longer state than the watch accepts: %s", self.rank, error)
            return False
        return True

    # -- for the main thread ----------------------------------------------------------------------

    @property
    def fault(self) -> Fault | None:
        """What is wrong, once that is known."""
        return self._fault

    @property
    def excluded(self) -> bool:
        """Whether the fault is that this rank, or its host, was away for too long."""
        return self._excluded

    def take_fault(self) -> Fault | None:
        """Return the fault for the caller to raise: nothing needs to be ended by force then."""
        if self._fault is not None:
            self._taken = True
        return self._fault

    def report_fault(self, fault: Fault, seconds: float = 4.0) -> Fault | None:
        """Report a fault to all ranks, unless there is one already.

        Returns:
            The fault that all ranks raise; None if all ranks failed by themselves.
        """
        with self._changed:
            self._alone = False
            if self._fault is None and self._send({"fault": fault.as_message()}):
                self._changed.wait_for(
                    lambda: self._fault is not None or self._closed or self._alone or self._away, seconds
                )
            if self._alone:
                return None
            if self._fault is None:
                self._fault = fault
            self._taken = True
            return self._fault

    def close(self, *, bye: bool) -> None:
        """Close the connection with a goodbye, so that others know that this rank was not killed."""
        if self._closed:
            return
        self._closed = True  # before it is sent: the agent may close first
        if bye and self._fault is None:
            self._send({"state": self.activity.state(self.rank).as_message(), "bye": 1})
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        self._thread.join(1.0)
        for sock in self.sockets():
            sock.close()

    def sockets(self) -> list[socket.socket]:
        """Return all sockets, for a forked child to close."""
        return [self._sock, *self._held]

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        seen = -1  # serial of what was waited in at the last look
        poll = select.poll()  # no limit on the number of open files, as select() has
        poll.register(self._sock, select.POLLIN)
        try:
            while not self._closed:
                if poll.poll(1000 * TICK):
                    try:
                        data = self._sock.recv(65536)
                    except OSError:
                        data = b""
                    if not data:
                        self._agent_gone()
                        return
                    for message in self._channel.feed(data):
                        self._hear(message)
                    continue
                wait = self.activity.wait()
                serial = -1 if wait is None else wait.serial
                # A wait that is over by the next check is not reported.
                if serial != self._reported and (serial == seen or serial == -1):
                    self._tell_state({})
                seen = serial
        except Exception as error:
            if not self._closed:
                _log.warning(
                    "hvdloss: rank %d is no longer watched, and training goes on: %s: %s",
                    self.rank,
                    type(error).__name__,
                    error,
                )
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def _tell_state(self, more: dict[str, Any], **asked: Any) -> None:
        asked.setdefault("stack", False)
        asked.setdefault("keys", ())
        state = self.activity.state(self.rank, **asked)
        self._reported = -1 if state.wait is None else state.wait.serial
        self._send({"state": state.as_message(), **more})

    def _hear(self, message: dict[str, Any]) -> None:
        if "fault" in message:
            fault = Fault.from_message(message["fault"])
            self._excluded = (fault.kind == "silent" and self.rank in fault.ranks) or bool(
                message.get("excluded")
            )
            self._found(fault)
        if "alone" in message:
            with self._changed:
                self._alone = True
                self._changed.notify_all()
        if "ask" in message:
            self._tell_state(
                {"answer": message["ask"]}, stack=bool(message["stack"]), keys=list(message["keys"])
            )
        if "warn" in message:
            _log.warning("hvdloss: %s", message["warn"])

    def _agent_gone(self) -> None:
        if self._closed or self._fault is not None:
            return
        with self._changed:
            self._away = True
            self._changed.notify_all()
        _log.warning(
            "hvdloss: rank %d is no longer watched: its host's agent has ended. Training goes on; what "
            "happens to ranks of this host is known only as Horovod tells it.",
            self.rank,
        )

    def _found(self, fault: Fault) -> None:
        with self._changed:
            if self._fault is None:
                self._fault = fault
            self._changed.notify_all()
        threading.Thread(target=self._end_waiting, name="hvdloss-watch-end", daemon=True).start()

    def _end_waiting(self) -> None:
        until = time.monotonic() + _ABORT_S
        while time.monotonic() < until:
            if self._taken or self._closed:
                return
            time.sleep(0.05)
        # Failures from here on come from Horovod's shutdown: log the reason first.
        if self._fault is not None:
            _log.error("hvdloss: rank %d ends Horovod: %s", self.rank, self._fault.text)
        self._abort()
