"""A rank's own thread of the watch: says what this rank does, and hears what is wrong with others."""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hvdloss.errors import HvdlossError
from hvdloss.watch import process
from hvdloss.watch.activity import Activity
from hvdloss.watch.hub import BEAT, TICK
from hvdloss.watch.verdict import Fault, Limits, RankState, find, gone_text, left_behind, silent_text
from hvdloss.watch.wire import NONCE, Channel, WireError

__all__ = ["Member"]

_CONNECT_S = 3.0
_ABORT_S = 0.75  # for the main thread to take a fault up, before what it may be blocked in is ended
_BACK_S = 10.0  # after a silence, for this rank to find what came of it
_AWAY_S = 1.0  # for this rank's thread to read what rank 0 said last
_log = logging.getLogger("hvdloss.watch")


class Member:
    """One rank's end of the watch.

    Args:
        rank: of this process.
        addresses: the hub's.
        key: the job's.
        activity: of this process.
        limits: when waiting counts as wrong.
        abort: ends what this process may be blocked in; called in a thread of its own.
        recovers: whether the job goes on without a rank that is lost (Horovod elastic).

    Raises:
        OSError, WireError: the hub cannot be reached, or is none.
    """

    def __init__(
        self,
        rank: int,
        addresses: Iterable[Sequence[Any]],
        key: bytes,
        activity: Activity,
        limits: Limits,
        abort: Callable[[], None],
        recovers: bool,
    ) -> None:
        self.rank, self.limits, self.activity = rank, limits, activity
        self._abort, self._recovers = abort, recovers
        self._changed = threading.Condition()
        self._fault: Fault | None = None
        self._taken = False
        self._closed = False
        self._alone = False
        self._hub_ended: RankState | None = None
        self._hub_away = False
        self._back = -math.inf  # when it was last back from a silence for which others take it for lost
        self._given_up = False
        self._hub_who: dict[str, Any] = {}
        self._sending = threading.Lock()
        self._sock, self._channel = _connected(addresses, key)
        self._send({"rank": rank, **process.identity()})
        self._welcomed()
        self._thread = threading.Thread(target=self._run, name="hvdloss-watch", daemon=True)
        self._thread.start()

    def _send(self, message: dict[str, Any]) -> bool:
        try:
            with self._sending:
                self._sock.sendall(self._channel.frame(message))
        except TimeoutError:
            # Part of it may have gone: what came after would be read as garbage.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
            return False
        except OSError:  # reading finds out whether the hub is gone
            return False
        except HvdlossError as error:
            _log.warning("hvdloss: rank %d has more to tell than the watch takes: %s", self.rank, error)
            return False
        return True

    def _tell_state(self, state: RankState) -> None:
        self._send({"state": state.told()})

    def _welcomed(self) -> None:
        """Wait until the hub knows this rank.

        Raises:
            WireError: it does not take it.
        """
        try:
            while data := self._sock.recv(65536):
                for message in self._channel.feed(data):
                    if "welcome" in message:
                        self._hub_who = message["welcome"]
                        return
        except OSError:
            pass
        self._sock.close()
        raise WireError("the watch did not answer")

    # -- for the main thread ----------------------------------------------------------------------

    @property
    def fault(self) -> Fault | None:
        """What is wrong, once that is known."""
        return self._fault

    @property
    def given_up(self) -> bool:
        """Whether what is wrong is that this very rank was silent for too long."""
        return self._given_up

    @property
    def closed(self) -> bool:
        """Whether this end of the watch is over."""
        return self._closed

    def take(self) -> Fault | None:
        """Return what is wrong, to be raised by the caller: nothing needs to be ended by force then."""
        if self._fault is not None:
            self._taken = True
        return self._fault

    def tell(self, fault: Fault, seconds: float = 4.0) -> Fault | None:
        """Tell all ranks what is wrong, unless they know of something.

        Returns:
            What all are told by then; None if all ranks failed by themselves.
        """
        with self._changed:
            self._alone = False
            if self._fault is None:
                # Where rank 0 no longer hears, this rank's thread is about to find out why.
                heard = self._send({"fault": fault.told()})
                self._changed.wait_for(
                    lambda: self._fault is not None or self._closed or self._alone or self._hub_away,
                    seconds if heard else min(seconds, _AWAY_S),
                )
            if self._alone:
                return None
            if self._fault is None:
                if fault.kind == "broken" and self._hub_ended is not None:
                    # Rank 0 ended in good order, and Horovod with it.
                    fault = left_behind(self._hub_ended, fault.ranks, self.activity.state(self.rank).step)
                self._fault = fault
            self._taken = True
            return self._fault

    def close(self, *, bye: bool) -> None:
        """End: say goodbye, so that others know that this rank was not killed."""
        if self._closed:
            return
        self._closed = True  # before it is said: the hub may be quicker to close
        if bye and self._fault is None:
            self._tell_state(self.activity.state(self.rank))
            self._send({"bye": 1})
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        self._thread.join(1.0)
        self._sock.close()

    def sockets(self) -> list[socket.socket]:
        """Return all sockets, for a forked child to close."""
        return [self._sock]

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        told, beat, heard, before = -1, 0.0, time.monotonic(), time.monotonic()
        last = heard  # the same, whatever this process itself missed
        try:
            while not self._closed:
                readable = select.select([self._sock], [], [], TICK)[0]
                now = time.monotonic()
                if now > before + TICK + 2.0:  # this process itself was stopped, or had no processor
                    heard += now - before
                    if self._too_long(now - before):
                        self._back = now
                before = now
                if readable:
                    try:
                        data = self._sock.recv(65536)
                    except OSError:
                        data = b""
                    if not data:
                        self._hub_gone(now - last)
                        return
                    heard = last = now
                    for message in self._channel.feed(data):
                        self._hear(message)
                state = self.activity.state(self.rank)
                serial = -1 if state.wait is None else state.wait.serial
                if now >= beat or serial != told:
                    told, beat = serial, now + BEAT
                    self._tell_state(state)
                if self.limits.silence and now - heard > self.limits.silence and self._hub_ended is None:
                    self._end(self._hub_who)
                    self._found(self._of_hub("silent", state))
                    with contextlib.suppress(OSError):
                        self._sock.shutdown(socket.SHUT_RDWR)  # rank 0 shall see it when it is back
                    return
        except (OSError, ValueError) as error:
            if not self._closed:
                _log.warning("hvdloss: rank %d no longer watches the others: %s", self.rank, error)

    def _hear(self, message: dict[str, Any]) -> None:
        if "fault" in message:
            fault = Fault.heard(message["fault"])
            for who in message.get("end") or []:
                self._end(who)
            # What rank 0 finds after a silence of its own is that the others have left.
            self._given_up = (fault.kind == "silent" and self.rank in fault.ranks) or (
                self.rank == 0 and message.get("left") is True and time.monotonic() - self._back < _BACK_S
            )
            self._found(fault)
        if "alone" in message:
            with self._changed:
                self._alone = True
                self._changed.notify_all()
        if "ask" in message:
            self._tell_state(self.activity.state(self.rank))
        if "closing" in message:
            self._hub_ended = RankState(0, status="left")
            self._hub_ended.hear(message["closing"])

    def _end(self, who: dict[str, Any]) -> None:
        """End a process of this host that was silent for too long."""
        # Nobody can go on, nor even leave, while its connections are open and dead.
        process.end(who, only_stopped=not self._recovers)

    def _too_long(self, silent: float) -> bool:
        """Return whether another rank may have taken one for lost that was silent for so many seconds."""
        limit = self.limits.silence  # the other's began when the last beat came, and it looks now and then
        return limit > 0 and silent > max(limit - 2 * BEAT, limit / 2)

    def _hub_gone(self, silent: float) -> None:
        """Rank 0's connection has ended, `silent` seconds after it was last heard of."""
        if self.closed or self._fault is not None:
            return
        if self._hub_ended is None:
            # One that was silent until now was ended for it.
            kind = "silent" if self._too_long(silent) else "lost"
            self._found(self._of_hub(kind, self.activity.state(self.rank)))
            return
        with self._changed:
            self._hub_away = True
            self._changed.notify_all()
        # Rank 0 ended in good order, and with it Horovod: what this rank still waits for will not come.
        only_left = Limits(left=self.limits.left, deadlock=3600.0, stall=0.0, silence=0.0)
        while not self.closed:
            states = [self._hub_ended, *(RankState(rank) for rank in range(1, self.rank + 1))]
            states[self.rank] = self.activity.state(self.rank)
            if (fault := find(states, only_left, 0.0)) is not None:
                self._found(fault)
                return
            time.sleep(TICK)

    def _of_hub(self, kind: str, mine: RankState) -> Fault:
        """Return the same text on all ranks, as each of them finds by itself that rank 0 is gone."""
        text = gone_text(mine.step, 0) if kind == "lost" else silent_text(mine.step, 0, self.limits)
        return Fault(kind, (0,), text)

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
        # What fails from here on, fails because Horovod is ended: say why, whoever comes to see it first.
        if self._fault is not None:
            _log.error("hvdloss: rank %d ends Horovod: %s", self.rank, self._fault.text)
        self._abort()


def _connected(addresses: Iterable[Sequence[Any]], key: bytes) -> tuple[socket.socket, Channel]:
    """Return a connection to the first address that answers, and its channel."""
    problem: Exception = OSError("no address was given")
    for address, port in addresses:
        try:
            sock = socket.create_connection((address, port), _CONNECT_S)
        except OSError as error:
            problem = error
            continue
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            theirs = b""
            while len(theirs) < NONCE:
                data = sock.recv(NONCE - len(theirs))
                if not data:
                    raise WireError("the watch closed the connection")
                theirs += data
            mine = secrets.token_bytes(NONCE)
            sock.sendall(mine)
            return sock, Channel(key, theirs + mine, hub=False)
        except (OSError, WireError) as error:
            problem = error
            sock.close()
    raise problem
