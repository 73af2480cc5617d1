"""The hub: rank 0's thread that hears all ranks, and tells all what is wrong."""

from __future__ import annotations

import contextlib
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from hvdloss.errors import HvdlossError
from hvdloss.watch import process
from hvdloss.watch.verdict import Fault, Limits, RankState, deadlocked, find, left_behind, missing, step_of
from hvdloss.watch.wire import NONCE, Channel, WireError

__all__ = ["TICK", "Hub"]

TICK = 0.25  # seconds between two looks
BEAT = 1.0  # seconds between two signs of life
_HELLO_S = 5.0  # for a connection to say who it is
_STRANGERS = 16  # connections that have not said who they are, beyond one for each rank
_ANSWER_S = 0.2  # for ranks that are asked where they are
_ALIKE_S = 2.0  # for all ranks to fail alike, where nobody waits for one that has
_BETTER_S = 1.5  # for a better reason than "Horovod gave up" to come in
_log = logging.getLogger("hvdloss.watch")


class _Guest:
    """A connection, of a rank or not (yet)."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.nonce = secrets.token_bytes(NONCE)
        self.since = time.monotonic()
        self.channel: Channel | None = None
        self.head = b""
        self.rank: int | None = None
        self.out = bytearray()


class Hub:
    """Listens for the ranks of one job on the given addresses.

    Args:
        addresses: to listen on; a port is chosen for each.
        size: how many ranks there are.
        key: of the job, 32 bytes.
        limits: when waiting counts as wrong.

    Raises:
        OSError: it cannot listen on any of them.
    """

    def __init__(self, addresses: Sequence[str], size: int, key: bytes, limits: Limits) -> None:
        self.size, self._key, self.limits = size, key, limits
        self._me = process.identity()  # for ranks of this host to end it if it is silent
        self._selector = selectors.DefaultSelector()
        self.addresses: list[tuple[str, int]] = []
        problem: OSError | None = None
        self._listeners = []
        for address in addresses:
            try:
                listener = socket.create_server((address, 0), backlog=max(128, size))
            except OSError as error:
                problem = error
                continue
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, None)
            self._listeners.append(listener)
            self.addresses.append((address, listener.getsockname()[1]))
        if not self.addresses:
            raise problem or OSError("no address to listen on")
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._guests: dict[int, _Guest] = {}  # by rank
        self._all: set[_Guest] = set()
        self._strangers: set[_Guest] = set()
        self.states = [RankState(rank) for rank in range(size)]
        self._who: list[dict[str, Any]] = [{} for _ in range(size)]
        self._heard = [time.monotonic()] * size
        self._told = [0.0] * size  # when its state came
        self._since = [(-1, 0.0)] * size  # serial of the wait, and when it was first told
        self._stuck: tuple[tuple[tuple[int, int], ...], float] = ((), 0.0)
        self._asked = 0.0
        self._errors: dict[int, tuple[float, Fault]] = {}
        self._broken: tuple[float, Fault] | None = None
        self._warned: set[tuple[int, int]] = set()
        self.fault: Fault | None = None
        self._lock = threading.Lock()
        self._orders: list[Callable[[], None]] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hvdloss-watch-hub", daemon=True)
        self._thread.start()

    def close(self, last: dict[str, Any] | None) -> None:
        """Tell all members that rank 0 ends, with its last state if there is one, and stop listening."""

        def closing() -> None:
            if last is not None:
                self._tell_all({"closing": last})
            self._closed.set()

        self._order(closing)
        self._thread.join(2.0)

    def sockets(self) -> list[socket.socket]:
        """Return all sockets, for a forked child to close."""
        return [*self._listeners, self._wake, self._woken, *(guest.sock for guest in list(self._all))]

    def _order(self, what: Callable[[], None]) -> None:
        with self._lock:
            self._orders.append(what)
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        next_look = beat = time.monotonic()
        try:
            while not self._closed.is_set():
                for key, _ in self._selector.select(max(0.0, next_look - time.monotonic())):
                    if key.fileobj is self._woken:
                        with contextlib.suppress(OSError):
                            self._woken.recv(4096)
                    elif key.data is None:
                        self._accept(key.fileobj)  # type: ignore[arg-type]
                    else:
                        self._read(key.data)
                with self._lock:
                    orders, self._orders = self._orders, []
                for order in orders:
                    order()
                now = time.monotonic()
                if now >= next_look:
                    if now > next_look + 2.0:  # this process itself was stopped, or had no processor
                        self._pass_over(now - next_look)
                    next_look = now + TICK
                    if now >= beat:
                        beat = now + BEAT
                        self._tell_all({"alive": 1})
                    self._look(now)
        except Exception:
            _log.exception("hvdloss: the watch over the ranks has ended by a mistake of its own")
        finally:
            for guest in list(self._all):
                self._drop(guest, lost=False)
            for end in (*self._listeners, self._wake, self._woken):
                end.close()
            self._selector.close()

    def _pass_over(self, seconds: float) -> None:
        """Do not count time in which this process could not hear anybody, nor perhaps others tell."""
        now = time.monotonic()  # some were heard of just now
        self._heard = [min(heard + seconds, now) for heard in self._heard]
        self._since = [(serial, min(began + seconds, now)) for serial, began in self._since]
        self._stuck = ((), 0.0)  # who is stuck must say so again from here on

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            if len(self._strangers) >= self.size + _STRANGERS:
                sock.close()
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            guest = _Guest(sock)
            self._all.add(guest)
            self._strangers.add(guest)
            self._selector.register(sock, selectors.EVENT_READ, guest)
            with contextlib.suppress(OSError):
                sock.send(guest.nonce)

    def _read(self, guest: _Guest) -> None:
        try:
            data = guest.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(guest, lost=True)
            return
        if guest.channel is None:
            guest.head += data
            if len(guest.head) < NONCE:
                return
            guest.channel = Channel(self._key, guest.nonce + guest.head[:NONCE], hub=True)
            data, guest.head = guest.head[NONCE:], b""
        try:
            for message in guest.channel.feed(data):
                self._hear(guest, message)
        except HvdlossError as error:
            _log.warning("hvdloss: a connection to the watch was closed: %s", error)
            self._drop(guest, lost=True)

    def _hear(self, guest: _Guest, message: dict[str, Any]) -> None:
        if guest.rank is None:
            rank = message.get("rank")
            if not isinstance(rank, int) or not 0 <= rank < self.size or rank in self._guests:
                raise WireError(f"rank={rank!r} said hello, but is none that is awaited")
            guest.rank = rank
            self._strangers.discard(guest)
            self._guests[rank] = guest
            self._who[rank] = {k: message.get(k) for k in ("pid", "started", "host")}
            self._heard[rank] = time.monotonic()
            self._tell(guest, {"welcome": self._me})
            return
        rank, now = guest.rank, time.monotonic()
        self._heard[rank] = now
        state = self.states[rank]
        if "state" in message:
            state.hear(message["state"])
            self._told[rank] = now
            serial = state.wait.serial if state.wait is not None else -1
            if self._since[rank][0] != serial:
                self._since[rank] = (serial, now - (state.wait.seconds if state.wait is not None else 0.0))
        if "fault" in message:
            fault = Fault.heard(message["fault"])
            if fault.kind == "broken":
                if self._broken is None:
                    self._broken = (now, fault)
            elif self.fault is None:
                self._errors.setdefault(rank, (now, fault))
                if len(self._errors) == sum(one.status == "running" for one in self.states):
                    self._alone()
        if "bye" in message:
            state.status = "left"
            state.wait = None
            self._drop(guest, lost=False)
            self._ask()

    def _drop(self, guest: _Guest, *, lost: bool) -> None:
        if guest not in self._all:
            return
        self._all.discard(guest)
        self._strangers.discard(guest)
        with contextlib.suppress(KeyError, ValueError, OSError):
            self._selector.unregister(guest.sock)
        guest.sock.close()
        if guest.rank is not None and lost and self.states[guest.rank].status == "running":
            self.states[guest.rank].status = "lost"
            self._ask()

    def _ask(self) -> None:
        """Have the others say where they are by now, before it is said what is wrong."""
        self._asked = time.monotonic()
        self._tell_all({"ask": 1})

    def _tell(self, guest: _Guest, message: dict[str, Any]) -> None:
        if guest.channel is None:
            return
        guest.out += guest.channel.frame(message)
        try:
            sent = guest.sock.send(guest.out)
            del guest.out[:sent]
        except BlockingIOError:
            if len(guest.out) > 2**20:  # it does not read
                self._drop(guest, lost=False)
        except OSError:
            pass  # reading will tell

    def _tell_all(self, message: dict[str, Any]) -> None:
        for guest in list(self._guests.values()):
            if guest in self._all:
                self._tell(guest, message)

    # -- what is wrong ----------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        """Find out whether something is wrong, and say so."""
        for guest in [one for one in self._strangers if now - one.since > _HELLO_S]:
            self._drop(guest, lost=False)
        if self.fault is not None or len(self._guests) < self.size or now - self._asked < _ANSWER_S:
            return
        for rank, state in enumerate(self.states):
            state.silent = now - self._heard[rank]
            if state.wait is not None:
                began = self._since[rank][1]
                state.wait = type(state.wait)(**{**vars(state.wait), "seconds": now - began})
        stuck = tuple((s.rank, s.wait.serial) for s in deadlocked(self.states) if s.wait is not None)
        if stuck != self._stuck[0]:
            self._stuck = (stuck, now)
        # Each of them must have said so again meanwhile, lest an old state be taken for the present one.
        again = all(self._told[rank] > self._stuck[1] + BEAT / 2 for rank, _ in stuck)
        fault = find(self.states, self.limits, now - self._stuck[1] if stuck and again else 0.0)
        fault = fault if fault is not None and fault.kind != "left" else self._pending(now) or fault
        if fault is None and self._broken is not None:
            since, fault = self._broken
            left = [state for state in self.states if state.status == "left"]
            if left:
                fault = left_behind(left[0], fault.ranks, step_of(self.states))
            elif now - since < _BETTER_S:
                fault = None
        if fault is not None:
            self._announce(fault)
        else:
            self._warn()

    def _pending(self, now: float) -> Fault | None:
        """Return an error that a rank told of itself, once others wait for it or have not failed too."""
        for rank, (since, fault) in self._errors.items():
            ended = self.states[rank].status != "running"
            waited_for = any(
                state.wait is not None and any(one.rank == rank for one in missing(state, self.states))
                for state in self.states
                if state.rank not in self._errors
            )
            if ended or waited_for or now - since > _ALIKE_S:
                return fault
        return None

    def _alone(self) -> None:
        """Every rank has failed by itself, each with an error of its own: nobody is to be told of another."""
        for rank in self._errors:
            self._tell(self._guests[rank], {"alone": 1})
        self._errors.clear()

    def _warn(self) -> None:
        if not self.limits.warn:
            return
        for state in self.states:
            wait = state.wait
            if wait is None or wait.seconds < self.limits.warn or (state.rank, wait.serial) in self._warned:
                continue
            away = missing(state, self.states)
            if away:
                self._warned.add((state.rank, wait.serial))
                if len(self._warned) > 10 * self.size:
                    self._warned.clear()
                where = "".join(f"\n  {one.describe()}" for one in away)
                _log.warning(
                    "hvdloss: rank %d waits in %s for %.0f s, for:%s",
                    state.rank,
                    wait.place,
                    wait.seconds,
                    where,
                )
                return

    def _announce(self, fault: Fault) -> None:
        if self.fault is not None:
            return
        self.fault = fault
        who = [self._who[rank] for rank in fault.ranks if rank < self.size] if fault.kind == "silent" else []
        left = all(state.status != "running" for state in self.states[1:])
        self._tell_all({"fault": fault.told(), "end": who, "left": left})
