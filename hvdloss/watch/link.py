"""A connection of an agent, to a rank of its host or to another host's agent: frames in, frames out."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Sequence
from typing import Any

from hvdloss.watch.wire import NONCE, Channel

__all__ = ["Link", "dial", "keep_alive"]

_MOST = 2**22  # bytes that wait to be sent to somebody who does not read


def keep_alive(sock: socket.socket, silence: float) -> None:
    """Enable keepalive: the kernel ends the connection if the other host is gone.

    The other host's kernel answers for its processes, whatever they do: a process that is stopped, or busy,
    or that holds a lock, is no reason. After `silence` seconds without an answer reading raises a time-out.

    Args:
        sock: a TCP socket.
        silence: seconds; 0 for ever.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if silence:
        pause = max(1, int(silence / 6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 127)  # the next line decides
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * silence))


class Link:
    """One end of a connection that is read and written without waiting.

    Both ends send a random number first, out of which the keys of the two directions come.

    Args:
        sock: connected.
        key: the job's.
        listener: whether this is the end that listened.
        descriptors: open files to give to the other end, on a Unix socket.
    """

    def __init__(
        self, sock: socket.socket, key: bytes, *, listener: bool, descriptors: Sequence[int] = ()
    ) -> None:
        self.sock, self._key, self._listener = sock, key, listener
        self.since = time.monotonic()
        self.who: Any = None  # set by its owner, once it is known
        self.bytes = 0  # that were sent and received
        self._nonce = secrets.token_bytes(NONCE)
        self._head = b""
        self._channel: Channel | None = None
        self._out = bytearray()
        self._early: list[dict[str, Any]] = []
        sock.setblocking(False)
        if descriptors:  # a new connection takes so little at once
            socket.send_fds(sock, [self._nonce], list(descriptors))
        else:
            self._send(self._nonce)

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self.sock.fileno()

    @property
    def writing(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._out)

    def read(self) -> list[dict[str, Any]] | None:
        """Return the messages that have come; None at the end of the connection.

        Raises:
            WireError, HvdlossError: what came is no message of this job.
            OSError: the connection has failed; TimeoutError if the other host does not answer.
        """
        try:
            data = self.sock.recv(1 << 18)
        except BlockingIOError:
            return []
        if not data:
            return None
        self.bytes += len(data)
        if self._channel is None:
            self._head += data
            if len(self._head) < NONCE:
                return []
            theirs, data = self._head[:NONCE], self._head[NONCE:]
            nonces = self._nonce + theirs if self._listener else theirs + self._nonce
            self._channel = Channel(self._key, nonces, hub=self._listener)
            early, self._early = self._early, []
            for message in early:
                self.send(message)
        return self._channel.feed(data)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, now or as soon as the other end reads."""
        if self._channel is None:
            self._early.append(message)
        else:
            self._send(self._channel.frame(message))

    def _send(self, data: bytes) -> None:
        self.bytes += len(data)
        self._out += data
        self.flush()

    def flush(self) -> None:
        """Send as much of the queue as possible now. Failures show up in reading."""
        with contextlib.suppress(OSError):
            while self._out:
                del self._out[: self.sock.send(self._out)]
        if len(self._out) > _MOST:
            self._out.clear()
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection."""
        self.sock.close()


def dial(addresses: list[tuple[str, int]], seconds: float, silence: float) -> socket.socket:
    """Return a connection to the first address that answers.

    Raises:
        OSError: none does; ConnectionRefusedError if nothing listens there any more.
    """
    problem: OSError = OSError("no address was given")
    for address, port in addresses:
        try:
            sock = socket.create_connection((address, port), seconds)
        except OSError as error:
            problem = error
            continue
        keep_alive(sock, silence)
        return sock
    raise problem
