"""The protocol of the watch over TCP: short JSON messages that a stranger can neither read in
full, nor forge, nor replay.

A frame is 4 bytes of length, a MAC of 32 bytes, and JSON of that length. The key of a connection comes
from the job's key, which travelled over Horovod, and from one random number of either end; every frame has
a number. So what was recorded on one connection is worth nothing on another one, or later on this one. It
is not encrypted: who can read the network sees states and error texts, as it sees gradients
(docs/explanation/security.md).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from typing import Any

from hvdloss.comm.messages import parse_json
from hvdloss.errors import HvdlossError

__all__ = ["LIMIT", "NONCE", "Channel", "WireError"]

LIMIT = 2**18  # bytes of one message: ten thousand ranks' numbers fit in
NONCE = 16  # bytes of each end's random number
_HEAD = struct.Struct("!I")
_MAC = hashlib.sha256().digest_size


class WireError(HvdlossError):
    """What arrived is no message of this job: garbage, too large, forged, or out of turn."""


class Channel:
    """One end of a connection: makes frames, and reads those of the other end. No sockets here.

    Args:
        key: the job's.
        nonces: the random numbers of the hub and of the member, one after the other.
        hub: whether this is the hub's end.

    >>> a, b = Channel(b"key", b"12", hub=True), Channel(b"key", b"12", hub=False)
    >>> b.feed(a.frame({"said": 1}))
    [{'said': 1}]
    """

    def __init__(self, key: bytes, nonces: bytes, *, hub: bool) -> None:
        self._key = hmac.digest(key, nonces, "sha256")
        self._mine, self._theirs = (b"h", b"m") if hub else (b"m", b"h")
        self._sent = self._heard = 0
        self._buffer = bytearray()

    def _mac(self, who: bytes, number: int, payload: bytes) -> bytes:
        return hmac.digest(self._key, who + struct.pack("!Q", number) + payload, "sha256")

    def frame(self, message: dict[str, Any]) -> bytes:
        """Return the bytes that carry a message.

        Raises:
            WireError: it is longer than :data:`LIMIT`.
        """
        payload = json.dumps(message, separators=(",", ":")).encode()
        if len(payload) > LIMIT:
            raise WireError(f"a message of {len(payload)} bytes is longer than {LIMIT}")
        mac = self._mac(self._mine, self._sent, payload)
        self._sent += 1
        return _HEAD.pack(len(payload)) + mac + payload

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Take what arrived, and return the messages that are complete by now.

        Never holds more than one frame beyond `data`.

        Raises:
            WireError: what arrived is no frame of the other end; the connection is to be closed.
        """
        self._buffer += data
        out: list[dict[str, Any]] = []
        while len(self._buffer) >= _HEAD.size:
            (length,) = _HEAD.unpack_from(self._buffer)
            if length > LIMIT:
                raise WireError(f"a frame claims {length} bytes; at most {LIMIT} are accepted")
            whole = _HEAD.size + _MAC + length
            if len(self._buffer) < whole:
                break
            mac = bytes(self._buffer[_HEAD.size : _HEAD.size + _MAC])
            payload = bytes(self._buffer[_HEAD.size + _MAC : whole])
            if not hmac.compare_digest(mac, self._mac(self._theirs, self._heard, payload)):
                raise WireError("a frame does not come from this job, or out of turn")
            self._heard += 1
            del self._buffer[:whole]
            try:
                message = parse_json(payload)
            except ValueError as error:
                raise WireError(f"a frame holds no JSON: {error}") from None
            if not isinstance(message, dict):
                raise WireError(f"a frame holds a {type(message).__name__} instead of an object")
            out.append(message)
        return out
