"""The one watch of this process: begins with Horovod, ends with it, and is asked by whoever waits."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import ipaddress
import json
import logging
import os
import secrets
import selectors
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hvdloss.comm.communicator import Communicator
from hvdloss.comm.messages import decode_all
from hvdloss.errors import (
    AgreementError,
    ConfigError,
    HvdlossError,
    LostRankError,
    NonFiniteLossError,
    NoWeightError,
    RankError,
)
from hvdloss.watch import process
from hvdloss.watch.activity import Activity
from hvdloss.watch.agent import FAN_OUT, Plan
from hvdloss.watch.member import Member
from hvdloss.watch.verdict import Fault, Limits, error_text

__all__ = [
    "check",
    "current",
    "enter_exchange",
    "excluded_error",
    "is_rank_loss",
    "limits_from_environment",
    "on_step",
    "record_activity",
    "report_error",
    "root_cause",
    "same_fate",
    "start",
    "stop",
    "track",
    "waiting",
    "waiting_for",
    "waiting_in_step",
    "wrap_init",
]

_log = logging.getLogger("hvdloss.watch")
_activity = Activity()
_lock = threading.RLock()
_shutting_down = threading.RLock()  # Horovod does not bear two threads that end it
_member: Member | None = None
_agents: list[subprocess.Popen[bytes]] = []  # begun by this process
_AGENT_S = 60.0  # for an agent to begin, on a busy machine
_pid = 0  # of the process that they belong to; a forked child has none
_connections: dict[int, str] = {}  # Horovod's
_installed = False
_before: Any = None  # the excepthook that was there

waiting = _activity.waiting
waiting_for = _activity.waiting_for
enter_exchange = _activity.enter_exchange
waiting_in_step = _activity.waiting_in_step
on_step = _activity.on_step
track = _activity.track
record_activity = _activity.record_activity


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
    global _member, _pid
    stop()
    _activity.begin()
    if communicator.size == 1:
        return False
    try:
        limits, problem = limits_from_environment(), ""
    except ConfigError as error:
        limits, problem = None, str(error)
    settings = None if limits is None else [limits.warn, limits.stall, limits.silence]
    host = hashlib.sha256(process.host().encode()).hexdigest()[:16]
    key = secrets.token_hex(32) if communicator.rank == 0 else ""
    mine = {"host": host, "settings": settings, "problem": problem, "key": key}
    texts = communicator.all_gather_bytes(json.dumps(mine).encode(), "hvdloss.watch.settings")
    ranks = decode_all(texts, "settings of the watch", lambda one: one.keys() == mine.keys())
    for rank, one in enumerate(ranks):
        if one["problem"]:
            raise ConfigError(f"rank {rank}: {one['problem']}")
        if one["settings"] != ranks[0]["settings"]:
            raise ConfigError(
                f"HVDLOSS_WATCH and its settings differ between ranks: rank {rank} has {one['settings']} "
                f"(warn, stall, silence), rank 0 has {ranks[0]['settings']}. Set them alike, in the "
                f"environment that horovodrun is started from."
            )
    if limits is None:
        return False

    hosts: dict[str, list[int]] = {}
    for rank, one in enumerate(ranks):
        hosts.setdefault(one["host"], []).append(rank)
    index, first = list(hosts).index(host), hosts[host][0]
    job = bytes.fromhex(ranks[0]["key"])
    agent: HostAgent | None = None
    offer: dict[str, Any] = {"at": [], "name": "", "problem": ""}
    if communicator.rank == first:
        offer["name"] = f"hvdloss-watch-{secrets.token_hex(8)}"
        try:
            listen = addresses() if len(hosts) > 1 else ()
            agent = HostAgent(job, list(hosts.values()), index, limits, offer["name"], listen)
            offer["at"] = agent.begin()
        except (OSError, ValueError) as error:
            offer["problem"] = f"the watch's agent of rank {first}'s host did not begin: {error}"
    texts = communicator.all_gather_bytes(json.dumps(offer).encode(), "hvdloss.watch.offer")
    offers = decode_all(texts, "address of the watch", lambda one: one.keys() == offer.keys())
    problem = next((one["problem"] for one in offers if one["problem"]), "")
    if agent is not None and not problem:
        try:
            agent.connect([offers[host_ranks[0]]["at"] for host_ranks in hosts.values()])
        except (OSError, ValueError) as error:
            problem = f"the watch's agent of rank {first}'s host does not reach the others: {error}"
    member = None
    if not problem:
        try:
            member = Member(communicator.rank, offers[first]["name"], job, _activity, abort)
        except (OSError, HvdlossError) as error:
            problem = f"rank {communicator.rank} does not reach its host's agent: {error}"
    problems = [
        text.decode() for text in communicator.all_gather_bytes(problem.encode(), "hvdloss.watch.begun")
    ]
    with _lock:
        _member, _pid = member, os.getpid()
    if any(problems):
        stop()
        if agent is not None:
            agent.end()
        if communicator.rank == 0:
            _log.warning(
                "hvdloss: ranks do not watch each other: %s. What happens to a rank is then known only as "
                "Horovod tells it. Set HVDLOSS_WATCH_ADDRESS to the network that joins the hosts, such as "
                "10.1.0.0/16, or HVDLOSS_WATCH=0.",
                next(text for text in problems if text),
            )
        return False
    _install()
    return True


# What an agent runs, with this package and nothing else to import.
_AGENT = "import sys; sys.path.insert(0, sys.argv[1]); from hvdloss.watch.agent import main; main()"


class HostAgent:
    """This host's agent, as the rank that begins it sees it.

    Args:
        key: the job's.
        hosts: the ranks of each host.
        index: of this host among them.
        limits: when waiting counts as wrong.
        name: of the socket for this host's ranks.
        listen: addresses for other hosts.
        fan_out: number of hosts that report to one.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        key: bytes,
        hosts: Sequence[Sequence[int]],
        index: int,
        limits: Limits,
        name: str,
        listen: Sequence[str] = (),
        fan_out: int = FAN_OUT,
    ) -> None:
        ranks = tuple(tuple(one) for one in hosts)
        self._plan = Plan(key, ranks, index, limits, tuple(listen), name, fan_out)
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _AGENT, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # signals of a terminal are for the ranks, not for it
            cwd="/",
        )
        _agents.append(self._process)

    def _line(self) -> Any:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(_AGENT_S):
                raise OSError(f"it sent nothing for {_AGENT_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise OSError("it ended at once")
        return json.loads(line)

    def _say(self, what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")
        self._process.stdin.flush()

    def begin(self) -> Any:
        """Return where it listens.

        Raises:
            OSError, ValueError: it did not begin.
        """
        self._say(self._plan.as_message())
        return self._line()

    def connect(self, table: Any) -> None:
        """Let it join the tree of hosts, which listen at the addresses of `table`.

        Raises:
            OSError, ValueError: it could not.
        """
        self._say(table)
        if problem := self._line():
            raise OSError(problem)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def wait(self, seconds: float) -> int:
        """Wait for its end, and return its exit status."""
        return self._process.wait(seconds)

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def wrap_init(hvd: Any, communicator_of: Callable[[Any], Communicator]) -> dict[str, Callable[..., Any]]:
    """Return ``init`` and ``shutdown`` of a Horovod module, wrapped to start and stop the watch.

    Args:
        hvd: the module, or its one-process stand-in.
        communicator_of: the adapter's.
    """

    @functools.wraps(hvd.init)
    def init(*args: Any, **kwargs: Any) -> Any:
        global _connections
        first = not hvd.is_initialized()  # calling it again does nothing, maybe on one rank only
        before = process.sockets()
        out = hvd.init(*args, **kwargs)
        if first and hvd.is_initialized():
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
    """End what this process is blocked in, unless it shuts down or restarts by itself."""
    with _shutting_down:
        if _member is not None:
            _disconnect()
            shutdown()


def _disconnect() -> None:
    """End Horovod's connections, where a rank is gone that could not close its own.

    Horovod waits on a dead connection until its time-out; and a rank that has given up, and restarts,
    leaves its old connections open, on which others wait as long.
    """
    member = _member
    if member is not None and member.fault is not None and member.fault.kind in ("lost", "silent", "broken"):
        process.shut_down_sockets(_connections)


def stop(*, bye: bool = True) -> None:
    """Stop the watch of this process, if there is one; the others are notified that this rank ended."""
    global _member, _pid
    with _shutting_down, _lock:
        if _pid != os.getpid():
            return
        _disconnect()
        member, _member = _member, None
        _pid = 0
    _agents[:] = [one for one in _agents if one.poll() is None]  # those of earlier watches have ended
    if member is not None:
        member.close(bye=bye)


def addresses() -> list[str]:
    """Return at which of this machine's addresses other hosts reach it: of the interface that Horovod uses.

    Raises:
        ConfigError: HVDLOSS_WATCH_ADDRESS is no address.
        OSError: an interface without an address.
    """
    if given := os.environ.get("HVDLOSS_WATCH_ADDRESS"):
        try:
            network = ipaddress.ip_network(given, strict=False)
        except ValueError as error:
            raise ConfigError(
                f"HVDLOSS_WATCH_ADDRESS={given!r} is no address and no network: {error}"
            ) from None
        if found := [one for one in _own_addresses() if ipaddress.ip_address(one) in network]:
            return found
    for variable in ("HOROVOD_GLOO_IFACE", "OMPI_MCA_btl_tcp_if_include"):
        names = [name for name in os.environ.get(variable, "").split(",") if name and "/" not in name]
        if names:
            return [_address_of(name) for name in names]
    return [one for one in _own_addresses() if not one.startswith("127.")] or ["127.0.0.1"]


def _own_addresses() -> list[str]:
    """Return the IPv4 addresses of all interfaces."""
    found = []
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError):
            found.append(_address_of(name))
    return found


def _address_of(interface: str) -> str:
    """Return an interface's IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        get_address = 0x8915  # SIOCGIFADDR
        found = fcntl.ioctl(sock.fileno(), get_address, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(found[20:24])


def _install() -> None:
    """Install the exception hooks that notify the other ranks; once."""
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
    if _member is not None:
        for sock in _member.sockets():
            with contextlib.suppress(OSError):
                os.close(sock.detach())


# -- faults -------------------------------------------------------------------------------------------


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
    """Raise the fault of any rank, if there is one; cheap.

    Raises:
        RankError, LostRankError, StallError: the same on all ranks.
    """
    member = _member
    if member is not None and member.fault is not None and (fault := member.take_fault()) is not None:
        raise _raisable(fault)


def is_rank_loss(error: BaseException) -> bool:
    """Return whether an error only means that ranks are gone: Horovod gave up, or the watch found it."""
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


def root_cause(error: BaseException) -> BaseException:
    """Return the root cause of a failed collective, if the ranks know it; else the error itself.

    Args:
        error: Horovod's own, or TensorFlow's about it.
    """
    member = current()
    if member is None or isinstance(error, RankError):
        return error
    if not is_rank_loss(error) and member.fault is None:
        return error
    fault = member.take_fault()
    if fault is None:
        step = _activity.state(member.rank).step
        text = " ".join(str(error).split())[:500]
        fault = member.report_fault(
            Fault(
                "broken",
                (member.rank,),
                f"step {step}: an exchange failed on rank {member.rank}: {text}. Another rank, its machine "
                f"or the network between them failed. Start the job again from its last checkpoint.",
            ),
        )
    if fault is None:
        return error
    out = _raisable(fault)
    out.__cause__ = error
    return out


def excluded_error() -> RankError | None:
    """Return the error of this rank if the others took it for lost, since it was silent for too long."""
    member = current()
    if member is None or not member.excluded:
        return None
    error = LostRankError(
        f"rank {member.rank} was away for longer than HVDLOSS_WATCH_SILENCE allows: it was stopped, or its "
        f"host could not be reached. The others took it for lost; the job goes on from its last commit "
        f"without this process, which has nothing left to do."
    )
    error.ranks = (member.rank,)
    return error


def report_error(error: BaseException) -> RankError | None:
    """Report an exception that ends this rank's training to all ranks.

    Returns:
        The error that all ranks raise for it, or for an earlier fault that caused it; None without a watch,
        or if all ranks raise this error anyway.
    """
    member = current()
    if member is None or _known(error):
        return None
    # After a fault Horovod was shut down, and whatever this rank was doing failed in some way.
    if is_rank_loss(error) or member.fault is not None:
        found = root_cause(error)
        return found if isinstance(found, RankError) else None
    frames = traceback.extract_tb(error.__traceback__)
    frame = next(
        (one for one in reversed(frames) if "hvdloss" not in one.filename), frames[-1] if frames else None
    )
    where = (
        "" if frame is None else f"{os.path.basename(frame.filename)}, line {frame.lineno}, in {frame.name}"
    )
    state = _activity.state(member.rank)
    own = Fault("error", (member.rank,), error_text(member.rank, state.step, error, where))
    fault = member.report_fault(own)
    return None if fault is None else _raisable(fault)


def _known(error: BaseException) -> bool:
    """Return whether all ranks raise this error anyway, from data that all of them have."""
    if isinstance(error, RankError):
        return bool(error.ranks)
    return isinstance(error, AgreementError | NonFiniteLossError | NoWeightError) or getattr(
        error, "on_all_ranks", False
    )


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Exception hook: report the exception to the other ranks, then print what they raise."""
    reported = None
    with contextlib.suppress(Exception):
        reported = report_error(error)
    if reported is None:
        _before(kind, error, trace)
        return
    if reported.__cause__ is None:
        reported.__cause__ = error
    _before(type(reported), reported, reported.__traceback__)


@contextlib.contextmanager
def same_fate() -> Iterator[None]:
    """Raise an exception of the block on every rank, as the same error, even if it is caught later.

    An uncaught exception is reported to all ranks anyway; this is for code that catches exceptions around the
    training loop, for notebooks and for test runners::

        with hvd.same_fate():
            train()

    Raises:
        RankError: on this rank, from the exception; on the others in what they wait for.

    Collectives: none.
    """
    try:
        yield
    except Exception as error:
        reported = report_error(error)
        if reported is None:
            raise
        raise reported from error
