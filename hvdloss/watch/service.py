"""The one watch of this process: begins with Horovod, ends with it, and is asked by whoever waits."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import json
import logging
import os
import secrets
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from hvdloss.communicator import Communicator
from hvdloss.errors import (
    AgreementError,
    ConfigError,
    HvdlossError,
    LostRankError,
    NonFiniteLossError,
    NoWeightError,
    RankError,
)
from hvdloss.hearing import hear
from hvdloss.watch import process
from hvdloss.watch.activity import Activity
from hvdloss.watch.hub import Hub
from hvdloss.watch.member import Member
from hvdloss.watch.verdict import Fault, Limits, error_text

__all__ = [
    "begins_with",
    "check",
    "current",
    "did",
    "explained",
    "follow",
    "given_up",
    "limits_from_environment",
    "same_fate",
    "start",
    "stepped",
    "stop",
    "tell_error",
    "waiting",
    "waiting_in_step",
    "watched",
]

_log = logging.getLogger("hvdloss.watch")
_activity = Activity()
_lock = threading.RLock()
_shutting_down = threading.RLock()  # Horovod does not bear two threads that end it
_member: Member | None = None
_hub: Hub | None = None
_pid = 0  # of the process that the two belong to; a forked child has none
_connections: dict[int, str] = {}  # Horovod's
_installed = False
_before: Any = None  # the excepthook that was there

waiting = _activity.waiting
waiting_in_step = _activity.waiting_in_step
stepped = _activity.stepped
follow = _activity.follow
did = _activity.did


def current() -> Member | None:
    """Return this process's end of the watch; None without one."""
    return _member if _pid == os.getpid() else None


# -- settings -----------------------------------------------------------------------------------------


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        return float(text) if text else default
    except ValueError:
        raise ConfigError(f"{name}={text!r} is no number of seconds") from None


def limits_from_environment() -> Limits | None:
    """Return what the environment asks for; None for no watch.

    Raises:
        ConfigError: a variable that holds no number of seconds.
    """
    switch = os.environ.get("HVDLOSS_WATCH", "1").strip().lower()
    if switch in ("0", "false", "no", "off"):
        return None
    if switch not in ("", "1", "true", "yes", "on"):
        raise ConfigError(f"HVDLOSS_WATCH={switch!r} is neither 0 nor 1")
    return Limits(
        warn=_seconds("HVDLOSS_WATCH_WARN", Limits.warn),
        stall=_seconds("HVDLOSS_WATCH_STALL", Limits.stall),
        silence=_seconds("HVDLOSS_WATCH_SILENCE", Limits.silence),
    )


# -- beginning and end --------------------------------------------------------------------------------


def start(communicator: Communicator, abort: Callable[[], None]) -> bool:
    """Begin to watch; return whether all ranks do. To be called on all ranks, right after ``hvd.init()``.

    Args:
        communicator: of all ranks.
        abort: ends whatever this process may be blocked in, as ``hvd.shutdown`` does.

    Raises:
        ConfigError: settings that cannot be used, or differ between ranks; on all ranks.

    Collectives: three small gathers; none with one rank.
    """
    global _member, _hub, _pid
    stop()
    _activity.begin()
    if communicator.size == 1:
        return False
    try:
        limits, problem = limits_from_environment(), ""
    except ConfigError as error:
        limits, problem = None, str(error)
    settings = None if limits is None else [limits.warn, limits.stall, limits.silence]
    mine = {"host": process.host(), "settings": settings, "problem": problem}
    texts = communicator.gather(json.dumps(mine).encode(), "hvdloss.watch.settings")
    ranks = hear(texts, "settings of the watch", lambda told: told.keys() == mine.keys())
    for rank, told in enumerate(ranks):
        if told["problem"]:
            raise ConfigError(f"rank {rank}: {told['problem']}")
        if told["settings"] != ranks[0]["settings"]:
            raise ConfigError(
                f"HVDLOSS_WATCH and its settings differ between ranks: rank {rank} has {told['settings']} "
                f"(warn, stall, silence), rank 0 has {ranks[0]['settings']}. Set them alike, in the "
                f"environment that horovodrun is started from."
            )
    if limits is None:
        return False

    hub, offer = None, {}
    if communicator.rank == 0:
        key = secrets.token_bytes(32)
        here = len({told["host"] for told in ranks}) == 1
        try:
            hub = Hub(["127.0.0.1"] if here else addresses(), communicator.size, key, limits)
            offer = {"addresses": hub.addresses, "key": key.hex()}
        except OSError as error:
            offer = {"problem": f"rank 0 cannot listen: {error}"}
    texts = communicator.gather(json.dumps(offer).encode(), "hvdloss.watch.offer")
    (told,) = hear(
        texts[:1], "address of the watch", lambda told: told.keys() <= {"addresses", "key", "problem"}
    )
    member, problem = None, told.get("problem", "")
    if not problem:
        recovers = os.environ.get("HOROVOD_ELASTIC") == "1"
        try:
            member = Member(
                communicator.rank,
                told["addresses"],
                bytes.fromhex(told["key"]),
                _activity,
                limits,
                abort,
                recovers,
            )
        except (OSError, HvdlossError) as error:
            problem = f"rank {communicator.rank} cannot reach rank 0 at {told['addresses']}: {error}"
    problems = [text.decode() for text in communicator.gather(problem.encode(), "hvdloss.watch.begun")]
    with _lock:
        _member, _hub, _pid = member, hub, os.getpid()
    if any(problems):
        stop()
        if communicator.rank == 0:
            _log.warning(
                "hvdloss: ranks do not watch each other: %s. What happens to a rank is then known only as "
                "Horovod tells it. Set HVDLOSS_WATCH_ADDRESS to an address of rank 0 that all reach, or "
                "HVDLOSS_WATCH=0.",
                next(text for text in problems if text),
            )
        return False
    _install()
    return True


def begins_with(hvd: Any, communicator_of: Callable[[Any], Communicator]) -> dict[str, Callable[..., Any]]:
    """Return ``init`` and ``shutdown`` of a Horovod module, with which the watch begins and ends.

    Args:
        hvd: the module, or its one-process stand-in.
        communicator_of: the adapter's.
    """

    @functools.wraps(hvd.init)
    def init(*args: Any, **kwargs: Any) -> Any:
        global _connections
        anew = not hvd.is_initialized()  # calling it again is nothing, maybe on one rank alone
        before = process.sockets()
        out = hvd.init(*args, **kwargs)
        if anew and hvd.is_initialized():
            _connections = {k: v for k, v in process.sockets().items() if before.get(k) != v}
            start(communicator_of(hvd.global_process_set), functools.partial(_abort, hvd.shutdown))
        return out

    @functools.wraps(hvd.shutdown)
    def shutdown() -> Any:
        stop()
        with _shutting_down:
            return hvd.shutdown()

    return {"init": init, "shutdown": shutdown}


def _abort(shutdown: Callable[[], Any]) -> None:
    """End what this process is blocked in, unless it is being ended, or begins anew, by itself."""
    with _shutting_down:
        if _member is not None:
            _disconnect()
            shutdown()


def _disconnect() -> None:
    """End Horovod's connections, where a rank is gone that could not close its own.

    Horovod waits on a dead connection until its time-out; and a rank that has given up, and begins anew,
    leaves its old connections open, on which others wait as long.
    """
    member = _member
    if member is not None and member.fault is not None and member.fault.kind in ("lost", "silent", "broken"):
        process.cut(_connections)


def stop(*, bye: bool = True) -> None:
    """End the watch of this process, if there is one; the others are told that this rank ended."""
    global _member, _hub, _pid
    with _shutting_down, _lock:
        if _pid != os.getpid():
            return
        _disconnect()
        member, hub = _member, _hub
        _member = _hub = None
        _pid = 0
    if hub is not None:
        hub.close(_activity.state(0).told() if bye else None)
    if member is not None:
        member.close(bye=bye)


def addresses() -> list[str]:
    """Return at which of this machine's addresses others reach it: of the interface that Horovod uses.

    Raises:
        OSError: an interface without an address.
    """
    if given := os.environ.get("HVDLOSS_WATCH_ADDRESS"):
        return [given]
    for variable in ("HOROVOD_GLOO_IFACE", "OMPI_MCA_btl_tcp_if_include"):
        names = [name for name in os.environ.get(variable, "").split(",") if name and "/" not in name]
        if names:
            return [_address_of(name) for name in names]
    found = []
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError):
            address = _address_of(name)
            if not address.startswith("127."):
                found.append(address)
    return found or ["127.0.0.1"]


def _address_of(interface: str) -> str:
    """Return an interface's IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        get_address = 0x8915  # SIOCGIFADDR
        told = fcntl.ioctl(sock.fileno(), get_address, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(told[20:24])


def _install() -> None:
    """Have what ends this process tell the others; once."""
    global _installed, _before
    if _installed:
        return
    _installed = True
    # Horovod's own, registered by init() before, runs after this one.
    atexit.register(stop)
    os.register_at_fork(after_in_child=_forked)
    _before, sys.excepthook = sys.excepthook, _uncaught


def _forked() -> None:
    """In a child, close what would keep connections open after its parent was killed."""
    for part in (_hub, _member):
        if part is not None:
            for sock in part.sockets():
                with contextlib.suppress(OSError):
                    os.close(sock.detach())


# -- what is wrong ------------------------------------------------------------------------------------


def _raisable(fault: Fault) -> RankError:
    """Return a fault's error; one that Horovod elastic recovers from, where it can be."""
    error = fault.error()
    theirs = sys.modules.get("horovod.common.exceptions")
    if theirs is None or fault.kind == "deadlock":
        return error
    kind = type(error)
    # By name the same class, and to Horovod's elastic loop one of its own.
    both = type(kind.__name__, (kind, theirs.HorovodInternalError), {"__module__": kind.__module__})
    out: RankError = both(fault.text)
    out.ranks = error.ranks
    return out


def check() -> None:
    """Raise what is wrong on any rank, if that is known; cheap.

    Raises:
        RankError, LostRankError, StallError: the same on all ranks.
    """
    member = _member
    if member is not None and member.fault is not None and (fault := member.take()) is not None:
        raise _raisable(fault)


def watched(error: BaseException) -> bool:
    """Return whether an error says only that others are gone: Horovod gave up, or the watch found it."""
    text = f"{type(error).__name__} {error}"
    return type(error).__name__ == "HorovodInternalError" or any(
        sign in text
        for sign in (
            "Horovod has been shut down",
            "Horovod has not been initialized",
            "HorovodInternalError",
            "gloo",
        )
    )


def explained(error: BaseException) -> BaseException:
    """Return why a collective failed, if the ranks know it; else the error itself.

    Args:
        error: Horovod's own, or TensorFlow's about it.
    """
    member = current()
    if member is None or isinstance(error, RankError):
        return error
    if not watched(error) and member.fault is None:
        return error
    fault = member.take()
    if fault is None:
        step = _activity.state(member.rank).step
        text = " ".join(str(error).split())[:500]
        fault = member.tell(
            Fault(
                "broken",
                (member.rank,),
                f"step {step}: Horovod gave up on rank {member.rank}: {text}. Another rank, its machine or "
                f"the network between them failed. Start the job again from its last checkpoint.",
            ),
        )
    if fault is None:
        return error
    out = _raisable(fault)
    out.__cause__ = error
    return out


def given_up() -> RankError | None:
    """Return what to raise where this very rank was silent for so long that the others took it for lost."""
    member = current()
    if member is None or not member.given_up:
        return None
    error = LostRankError(
        f"rank {member.rank} was silent for more than {member.limits.silence:g} s (HVDLOSS_WATCH_SILENCE): "
        f"it was stopped, or native code held Python's lock. The others took it for lost; the job goes on "
        f"from its last commit without this process, which has nothing left to do."
    )
    error.ranks = (member.rank,)
    return error


def tell_error(error: BaseException) -> RankError | None:
    """Tell all ranks of an exception on this one that ends its training.

    Returns:
        The error that all ranks raise for it, or for what they were told of before, of which this one is a
        consequence; None if there is nobody to tell, or it says itself what all know.
    """
    member = current()
    if member is None or _known(error):
        return None
    # Where all were told of something, Horovod was ended: whatever this rank was about failed in some way.
    if watched(error) or member.fault is not None:
        found = explained(error)
        return found if isinstance(found, RankError) else None
    frames = traceback.extract_tb(error.__traceback__)
    frame = next(
        (one for one in reversed(frames) if "hvdloss" not in one.filename), frames[-1] if frames else None
    )
    where = (
        "" if frame is None else f"{os.path.basename(frame.filename)}, line {frame.lineno}, in {frame.name}"
    )
    state = _activity.state(member.rank)
    told = Fault("error", (member.rank,), error_text(member.rank, state.step, error, where))
    fault = member.tell(told)
    return None if fault is None else _raisable(fault)


def _known(error: BaseException) -> bool:
    """Return whether all ranks raise this one, from numbers or texts that all of them have."""
    if isinstance(error, RankError):
        return bool(error.ranks)
    return isinstance(error, AgreementError | NonFiniteLossError | NoWeightError) or getattr(
        error, "on_all_ranks", False
    )


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """The process ends with an exception: tell the others first, and say what they are told."""
    told = None
    with contextlib.suppress(Exception):
        told = tell_error(error)
    if told is None:
        _before(kind, error, trace)
        return
    if told.__cause__ is None:
        told.__cause__ = error
    _before(type(told), told, told.__traceback__)


@contextlib.contextmanager
def same_fate() -> Iterator[None]:
    """Raise what goes wrong in the block on every rank, as the same error, even if it is caught there.

    An exception that nobody catches is told to all ranks anyway; this is for code that catches exceptions
    around the training loop, for notebooks and for test runners::

        with hvd.same_fate():
            train()

    Raises:
        RankError: on this rank, from the exception; on the others in what they wait for.

    Collectives: none.
    """
    try:
        yield
    except Exception as error:
        told = tell_error(error)
        if told is None:
            raise
        raise told from error
