"""A host's agent: a small process that looks at the ranks' processes, and talks for them.

    python -c "from hvdloss.watch.agent import main; main()"    # begun by a rank; its plan comes on stdin

It gets messages from a thread of each rank of its host over a Unix socket, sees through the operating system
whether their processes are alive, stopped or gone, and is a node in a tree of hosts: what its part of the
tree says is added up and passed on to the host above, and the agent of rank 0's host decides
(:mod:`hvdloss.watch.root`). It holds no lock of a rank's, and a rank that is busy is no reason for anything.

Connections between hosts are kept alive by the kernels. Each rank also holds its host's listening socket
open: where an agent is gone, whether its ranks are gone as well shows in whether that port still answers.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvdloss.errors import HvdlossError
from hvdloss.watch import verdict
from hvdloss.watch.link import Link, dial, keep_alive
from hvdloss.watch.process import Process, native_stack, user_of
from hvdloss.watch.ranges import pack, unpack
from hvdloss.watch.root import Root
from hvdloss.watch.tally import Exchange, Found, Summary, Tally, search
from hvdloss.watch.verdict import Fault, Limits, RankState

__all__ = ["FAN_OUT", "Agent", "Plan", "main"]

FAN_OUT = 32  # hosts below one host
TICK = 0.25  # seconds between two looks
_PROCESSES_S = 1.0  # between two looks at the ranks' processes
_HELLO_S = 10.0  # for a connection to identify itself
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT)
_BEGIN_S = 120.0  # for all ranks of the host to come
_QUIET_S = 3.0  # from the end of a rank's connection to that of its process
_BACK_S = 10.0  # after a pause of this host, to find what came of it
_AWAY_S = 10.0  # from the end of an agent to that of its host's ranks, if they were killed together
_DIAL_S = 5.0
_RANKS_S = 0.7  # for ranks to answer
_DEEPER_S = 0.6  # of the time for an answer, for the hosts below


@dataclass(frozen=True)
class Plan:
    """An agent's start-up configuration.

    Attributes:
        key: of the job.
        hosts: the ranks of each host; rank 0's host is the first.
        index: of this host.
        limits: when waiting counts as wrong.
        addresses: to listen on for other hosts.
        name: of the Unix socket for this host's ranks.
        fan_out: number of hosts that report to one.
    """

    key: bytes
    hosts: tuple[tuple[int, ...], ...]
    index: int
    limits: Limits
    addresses: tuple[str, ...]
    name: str
    fan_out: int = FAN_OUT

    @property
    def size(self) -> int:
        """Number of ranks."""
        return sum(len(ranks) for ranks in self.hosts)

    @property
    def above(self) -> int | None:
        """The host that this one reports to; None for the first."""
        return None if self.index == 0 else (self.index - 1) // self.fan_out

    def under(self, index: int) -> list[int]:
        """Return the ranks of a host and of all hosts below it."""
        found, level, fan = list(self.hosts[index]), range(index, index + 1), self.fan_out
        while level := range(level.start * fan + 1, min(level[-1] * fan + fan + 1, len(self.hosts))):
            found += [rank for host in level for rank in self.hosts[host]]
        return found

    def as_message(self) -> dict[str, Any]:
        """Return it as JSON."""
        hosts = [pack(ranks) for ranks in self.hosts]
        return {**vars(self), "key": self.key.hex(), "hosts": hosts, "limits": vars(self.limits)}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Plan:
        """Return the plan in a message."""
        return cls(
            bytes.fromhex(message["key"]),
            tuple(unpack(ranks) for ranks in message["hosts"]),
            int(message["index"]),
            Limits(**message["limits"]),
            tuple(message["addresses"]),
            message["name"],
            int(message["fan_out"]),
        )


class _Rank:
    """A rank of this host: its connection, its process, and its last known state."""

    def __init__(self, rank: int, link: Link, process: Process) -> None:
        self.link: Link | None = link
        self.process = process
        self.state = RankState(rank)
        self.since = 0.0  # when its wait began, by this process's clock
        self.failed = False  # it reported an error
        self.quiet_since = 0.0  # when its connection ended without a goodbye

    @property
    def running(self) -> bool:
        """Whether it has neither ended nor been lost."""
        return self.state.status == "running"

    def update(self, message: dict[str, Any]) -> None:
        """Update its state from its message."""
        self.state.update(message)
        self.state.process = ""
        if self.state.wait is not None:
            self.since = time.monotonic() - self.state.wait.seconds


@dataclass
class _Question:
    """A question under way: who has not answered, and what came until now."""

    kind: str
    exchanges: list[Exchange]
    then: Callable[[Any], None]
    ranks_until: float
    hosts_until: float
    ranks: set[int] = field(default_factory=set)  # of this host, that were asked and have not answered
    hosts: set[int] = field(default_factory=set)
    answered: set[int] = field(default_factory=set)  # ranks that have answered
    looked: bool = False  # whether what became of this host's ranks is being found out
    counted: bool = False  # whether that is part of the answer
    answer: Any = None

    def ready(self, now: float) -> bool:
        """Whether this host's part can be found out."""
        return not self.looked and (not self.ranks or now >= self.ranks_until)

    def done(self, now: float) -> bool:
        """Whether there is no more to wait for."""
        return self.counted and (not self.hosts or now >= self.hosts_until)


class Agent:
    """The agent of one host.

    Args:
        plan: what it is for.
        ended: called when there is nothing more to do.

    Raises:
        OSError: it cannot listen.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.limits = plan, plan.limits
        self._selector = selectors.DefaultSelector()
        self.local = socket.socket(socket.AF_UNIX)
        self.local.bind("\0" + plan.name)
        self.local.listen(max(16, len(plan.hosts[plan.index])))
        self.listeners: list[socket.socket] = []
        for address in plan.addresses if len(plan.hosts) > 1 else ():
            with contextlib.suppress(OSError):
                self.listeners.append(socket.create_server((address, 0), backlog=4 * FAN_OUT))
        if len(plan.hosts) > 1 and not self.listeners:
            raise OSError(f"cannot listen on {', '.join(plan.addresses)}")
        for listener in (self.local, *self.listeners):
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._table: list[list[tuple[str, int]]] = []  # where each host listens, once that is known
        self._links: set[Link] = set()
        self._ranks: dict[int, _Rank] = {}
        self._below: dict[int, Link] = {}
        self._summaries: dict[int, tuple[Summary, float]] = {}  # by the hosts below, and when
        self._above: Link | None = None
        self._above_is = plan.above
        self._above_ended = False  # in good order
        self._ended_hosts: set[int] = set()  # below, whose ranks have all ended in good order
        self._sent_gist: Any = None  # above, last
        self._sent_at = 0.0
        self._questions: dict[int, _Question] = {}
        self._count = 0
        self._begun = time.monotonic()
        self._back = -_BACK_S  # when this host was last back from a pause for which others take it for lost
        self._fault: dict[str, Any] | None = None  # as reported to all
        self._threads: list[tuple[threading.Thread, Callable[[], None]]] = []
        self.root = Root(plan.size, plan.limits, self) if plan.index == 0 else None

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where other hosts reach this one."""
        return [listener.getsockname()[:2] for listener in self.listeners]

    def connect(self, table: Sequence[Sequence[Sequence[Any]]]) -> None:
        """Join the tree.

        Args:
            table: where each host listens.

        Raises:
            OSError: the host above cannot be reached.
        """
        self._table = [[(str(address), int(port)) for address, port in host] for host in table]
        if self._above_is is not None:
            self._reach(self._above_is)

    def _reach(self, index: int) -> None:
        link = self._dialled(index)
        link.who = ("above", index)
        link.send({"host": self.plan.index})
        self._above, self._above_is, self._sent_gist = link, index, None

    def _dialled(self, index: int) -> Link:
        link = Link(dial(self._table[index], _DIAL_S, self.limits.silence), self.plan.key, listener=False)
        self._follow(link)
        return link

    # -- the loop ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until the ranks of this host, and the hosts below, have ended."""
        now = time.monotonic()
        next_look = next_processes = now
        while not self._over(now):
            for key, _ in self._selector.select(max(0.0, next_look - now)):
                key.data(key.fileobj)
            now = time.monotonic()
            if now < next_look and not self._pressing():
                continue
            late = now - next_look
            next_look = now + TICK
            if late > 2.0:
                self._forgive(late)
            if now >= next_processes:
                next_processes = now + _PROCESSES_S
                self._look_at_processes()
            self._look(now)

    def _over(self, now: float) -> bool:
        if len(self._ranks) < len(self.plan.hosts[self.plan.index]):
            return now > self._begun + _BEGIN_S
        if self._has_ranks(now):
            return False
        if self._fault:  # there are no more questions
            return True
        # Until then others may want to know how far the ranks came that have ended here.
        if self.root is None:
            return self._above is None and not self._below
        summary = self.root.summary
        return not self._below or summary.left + summary.lost >= self.plan.size

    def _has_ranks(self, now: float) -> bool:
        return any(
            one.link is not None or (one.running and now < one.quiet_since + _QUIET_S)
            for one in self._ranks.values()
        )

    def _pressing(self) -> bool:
        """Whether something has happened that is not to wait for the next look."""
        now = time.monotonic()
        answered = any(one.ready(now) or one.done(now) for one in self._questions.values())
        return answered or (self.root is not None and self.root.pressing)

    def _forgive(self, seconds: float) -> None:
        """Do not count time in which this process itself had no processor."""
        if self.limits.silence and seconds > self.limits.silence / 2:
            self._back = time.monotonic()
        for one in self._ranks.values():
            one.process.forgive(seconds)
            one.since = min(one.since + seconds, time.monotonic())
        if self.root is not None:
            self.root.forgive()

    def _look(self, now: float) -> None:
        for link in [one for one in self._links if one.who is None and now - one.since > _HELLO_S]:
            self._drop(link)
        for thread, done in [one for one in self._threads if not one[0].is_alive()]:
            self._threads.remove((thread, done))
            done()
        for number, question in list(self._questions.items()):
            if question.ready(now):
                self._look_for(question)
            if question.done(now):
                del self._questions[number]
                self._add_mute_hosts(question)
                question.then(question.answer)
        summary = self._summary(now)
        if self.root is not None:
            self.root.update(summary, now)
            self.root.look(now)
        elif self._above is not None and summary.gist != self._sent_gist and now >= self._sent_at + TICK:
            self._sent_gist, self._sent_at = summary.gist, now
            self._above.send({"summary": summary.as_message()})
        for link in list(self._links):
            if link.writing:
                link.flush()

    def _summary(self, now: float) -> Summary:
        """Return what is known of this host's ranks, and of those below."""
        out = Summary()
        for one in self._ranks.values():
            status = one.state.status
            out.left += status == "left"
            out.lost += status == "lost"
            out.errors += one.running and one.failed
            if one.running and one.state.wait is not None:
                out.waiting += 1
                out.put(Exchange.of(one.state.wait), 1, now - one.since)
        for summary, when in self._summaries.values():
            out.add(summary, now - when)
        return out

    # -- connections ------------------------------------------------------------------------------

    def _follow(self, link: Link) -> None:
        self._links.add(link)
        self._selector.register(link, selectors.EVENT_READ, self._read)

    def _accept(self, listener: Any) -> None:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            strangers = sum(link.who is None for link in self._links)
            if strangers > 4 * FAN_OUT + len(self.plan.hosts[self.plan.index]):
                sock.close()
                return
            held = [one.fileno() for one in self.listeners]
            if listener is not self.local:
                keep_alive(sock, self.limits.silence)
                held = []
            self._follow(Link(sock, self.plan.key, listener=True, descriptors=held))

    def _read(self, link: Any) -> None:
        try:
            messages = link.read()
        except HvdlossError:
            messages = None  # a stranger
        except TimeoutError:
            self._ended(link, silent=True)
            return
        except OSError as error:
            self._ended(link, silent=error.errno in _UNREACHABLE)
            return
        if messages is None:
            self._ended(link, silent=False)
            return
        for message in messages:
            try:
                self._hear(link, message)
            except (HvdlossError, LookupError, TypeError, ValueError, OSError):
                self._ended(link, silent=False)  # a stranger, or another version
                return

    def _drop(self, link: Link) -> None:
        if link in self._links:
            self._links.discard(link)
            self._selector.unregister(link)
        link.close()

    def _ended(self, link: Link, *, silent: bool) -> None:
        """A connection has ended: in what that leaves us depends on who it was."""
        if link not in self._links:
            return
        self._drop(link)
        kind, index = link.who or ("stranger", 0)
        if kind == "rank":
            one = self._ranks[index]
            one.link, one.quiet_since = None, time.monotonic()
            if self._fault:  # it knows of the fault, and shuts down
                one.state.status = "left"
                self._forget_process(one)
            for question in self._questions.values():
                question.ranks.discard(index)
            self._look_at_processes()
        elif kind == "below":
            self._below.pop(index, None)
            self._summaries.pop(index, None)
            for question in self._questions.values():
                question.hosts.discard(index)
            if not self._fault and index not in self._ended_hosts:
                self._without(index, silent)
        elif kind == "above":
            self._above = None
            if not self._fault and self._has_ranks(time.monotonic()):
                self._without(index, silent)
        # Later its ranks may have ended in good order, without an agent to say goodbye to.
        elif kind == "away" and not self._fault and time.monotonic() < link.since + _AWAY_S:
            self._host_gone(index, silent)

    def _without(self, index: int, silent: bool) -> None:
        """A host's agent is gone. Its ranks may be alive: then its port still answers."""
        if self._above_ended and index == self._above_is:
            self._lead()
            return
        if silent:
            self._host_gone(index, silent=True)
            return
        try:
            link = self._dialled(index)
        except OSError as error:
            self._host_gone(index, silent=not isinstance(error, ConnectionRefusedError))
            return
        link.who = ("away", index)
        if index == self._above_is and index != 0:
            self._reach_first(index)
        elif index != self._above_is:
            ranks = self.plan.hosts[index]
            self.warn(
                f"the watch's agent on the host of rank(s) {pack(ranks)} has ended. Training goes on; what "
                f"happens to those ranks is known only as Horovod tells it."
            )

    def _host_gone(self, index: int, silent: bool) -> None:
        """No process of a host is left, or none can be reached."""
        if index == self._above_is and index != 0:
            self._reach_first(index)
            return
        rank = self.plan.hosts[index][0]
        what = "cannot be reached (its host, or the network to it, is down)" if silent else ""
        if index != self._above_is:
            self._gone(rank, what, None)
            return
        excluded = time.monotonic() < self._back + _BACK_S

        def then(tally: Tally) -> None:  # each host that reported to the first one finds it by itself
            fault = (
                verdict.silent(tally.step, rank, self.limits, what)
                if what
                else verdict.lost(tally.step, rank)
            )
            self._spread({"fault": fault.as_message(), "excluded": excluded})

        self.ask("count", (), _DEEPER_S, then)

    def _reach_first(self, index: int) -> None:
        """The host between this one and the first has no agent any more: report to the first."""
        try:
            self._reach(0)
        except OSError as error:
            self._above_is = 0
            self._host_gone(0, silent=not isinstance(error, ConnectionRefusedError))

    def _lead(self) -> None:
        """The first host's ranks have ended in good order, and its agent: judge those that are here."""
        self._above_is = None
        self.root = Root(self.plan.size, self.limits, self)

    # -- input ------------------------------------------------------------------------------------

    def _hear(self, link: Link, message: dict[str, Any]) -> None:
        if link.who is None:
            self._welcome(link, message)
            return
        kind, index = link.who
        if kind == "rank":
            self._hear_rank(self._ranks[index], message)
        elif kind == "below":
            self._hear_below(index, message)
        elif kind == "above":
            self._hear_above(message)

    def _welcome(self, link: Link, message: dict[str, Any]) -> None:
        if "rank" in message and link.sock.family == socket.AF_UNIX:
            rank = int(message["rank"])
            pid, uid, _ = user_of(link.sock)
            if rank not in self.plan.hosts[self.plan.index] or rank in self._ranks or uid != os.getuid():
                self._drop(link)
                return
            process = Process(pid)
            self._ranks[rank] = _Rank(rank, link, process)
            link.who = ("rank", rank)
            if process.fileno() >= 0:
                self._selector.register(process.fileno(), selectors.EVENT_READ, self._process_ended)
            link.send({"welcome": 1})
        elif "host" in message and link.sock.family != socket.AF_UNIX:
            index = int(message["host"])
            if not 0 < index < len(self.plan.hosts) or index in self._below:
                self._drop(link)
                return
            link.who = ("below", index)
            self._below[index] = link
            if self._fault is not None:  # its own way up was cut when the fault was reported
                link.send(self._fault)
        else:
            self._drop(link)

    def _hear_rank(self, one: _Rank, message: dict[str, Any]) -> None:
        rank = one.state.rank
        if "state" in message:
            one.update(message["state"])
        if "answer" in message and (question := self._questions.get(int(message["answer"]))) is not None:
            question.ranks.discard(rank)
            question.answered.add(rank)
        if "fault" in message:
            fault = Fault.from_message(message["fault"])
            one.failed = fault.kind != "broken"
            self._error(fault)
        if "bye" in message:
            one.state.status, one.state.wait = "left", None
            link, one.link = one.link, None
            if link is not None:
                self._drop(link)
            self._forget_process(one)
            if not any(other.running for other in self._ranks.values()):
                self._all_left()

    def _all_left(self) -> None:
        """All ranks of this host have ended in good order: its agent may be ended with them."""
        if self.plan.index == 0:
            self._send_below({"ended": 1})
        elif self._above is not None:
            self._above.send({"host_ended": self.plan.index})

    def _hear_below(self, index: int, message: dict[str, Any]) -> None:
        if "host_ended" in message:
            self._ended_hosts.add(int(message["host_ended"]))
            if self._above is not None:
                self._above.send(message)
        if "summary" in message:
            self._summaries[index] = (Summary.from_message(message["summary"]), time.monotonic())
        if "gone" in message:
            rank, what, last_state = message["gone"]
            state = None
            if last_state is not None:
                state = RankState(int(rank))
                state.update(last_state)
            self._gone(int(rank), str(what), state)
        if "fault" in message:
            self._error(Fault.from_message(message["fault"]))
        if "warn" in message:
            self.warn(str(message["warn"]))
        if "reply" in message and (question := self._questions.get(int(message["reply"]))) is not None:
            question.hosts.discard(index)
            self._add(question, message["with"])

    def _hear_above(self, message: dict[str, Any]) -> None:
        if "ended" in message:
            self._above_ended = True
            self._send_below(message)
        if "fault" in message:
            self._spread(message)
        if "alone" in message:
            self.alone()
        if "ask" in message:
            number, above = int(message["ask"]), self._above

            def then(answer: Any) -> None:
                if above is not None:
                    above.send({"reply": number, "with": answer.as_message()})

            exchanges = [Exchange.from_message(one) for one in message["exchanges"]]
            self.ask(str(message["kind"]), exchanges, float(message["seconds"]), then)

    def _error(self, fault: Fault) -> None:
        if self.root is not None:
            self.root.error(fault, time.monotonic())
        elif self._above is not None:
            self._above.send({"fault": fault.as_message()})

    def _gone(self, rank: int, what: str, state: RankState | None) -> None:
        if any(rank in self.plan.hosts[index] for index in self._ended_hosts):
            return  # whoever reported to that host could not know how it ended
        if self.root is not None:
            self.root.gone(rank, what, state)
        elif self._above is not None:
            self._above.send({"gone": [rank, what, None if state is None else state.as_message()]})

    def _send_below(self, message: dict[str, Any]) -> None:
        for link in self._below.values():
            link.send(message)

    # -- processes --------------------------------------------------------------------------------

    def _process_ended(self, fd: Any) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)
        for one in self._ranks.values():
            # Its last messages may still be in its connection, a goodbye among them.
            if one.process.fileno() == fd and one.link is not None:
                self._read(one.link)
        self._look_at_processes()

    def _forget_process(self, one: _Rank) -> None:
        if one.process.fileno() >= 0:
            with contextlib.suppress(KeyError):
                self._selector.unregister(one.process.fileno())
        one.process.close()

    def _look_at_processes(self) -> None:
        for rank, one in self._ranks.items():
            if not one.running:
                continue
            if not one.process.look():
                one.state.status, one.state.wait = "lost", None
                self._forget_process(one)
                if one.link is not None:
                    self._drop(one.link)
                    one.link = None
                self._gone(rank, "", one.state)
            elif self.limits.silence and one.process.stopped > self.limits.silence and not self._fault:
                one.state.process = one.process.describe()
                self._gone(rank, "has been stopped (SIGSTOP)", one.state)
            elif one.link is None and time.monotonic() > one.quiet_since + _QUIET_S:
                one.state.status, one.state.wait = "unwatched", None
                self.warn(
                    f"rank {rank} lives, but its part of the watch has ended. Training goes on; what happens "
                    f"to that rank is known only as Horovod tells it."
                )

    # -- questions --------------------------------------------------------------------------------

    def ask(
        self, kind: str, exchanges: Sequence[Exchange], seconds: float, then: Callable[[Any], None]
    ) -> None:
        """Ask this host's ranks and the hosts below; see :class:`hvdloss.watch.root.Hosts`."""
        number = self._count = self._count + 1
        now = time.monotonic()
        question = _Question(kind, list(exchanges), then, now + min(seconds, _RANKS_S), now + seconds)
        question.answer = Tally.zero(len(exchanges)) if kind == "count" else Found()
        keys = [one.key for one in exchanges]
        wants_stack = kind in ("away", "inside")
        for rank, one in self._ranks.items():
            if one.running and one.link is not None:
                question.ranks.add(rank)
                one.link.send({"ask": number, "keys": keys, "stack": wants_stack})
        messages = [one.as_message() for one in exchanges]
        for index, link in self._below.items():
            question.hosts.add(index)
            link.send({"ask": number, "kind": kind, "exchanges": messages, "seconds": _DEEPER_S * seconds})
        self._questions[number] = question

    def _look_for(self, question: _Question) -> None:
        """Add this host's part: a rank that did not answer is not known to be blocked anywhere."""
        question.looked = True
        states = []
        for rank, one in self._ranks.items():
            state = one.state
            if one.running and rank not in question.answered:
                state = RankState(**{**vars(state), "wait": None, "process": one.process.describe()})
            states.append(state)
        if question.kind == "count":
            self._add(question, Tally.of(states, question.exchanges))
            question.counted = True
            return
        found = search(states, question.kind, question.exchanges)
        mute = [state for state in found.states if state.rank in question.ranks]

        def done() -> None:
            self._add(question, found)
            question.counted = True

        if question.kind != "away" or not mute:
            done()
            return

        def read() -> None:
            for state in mute[:2]:
                state.stack = native_stack(self._ranks[state.rank].process.pid)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        self._threads.append((thread, done))

    def _add_mute_hosts(self, question: _Question) -> None:
        """Mark the ranks of hosts that did not answer as being nowhere known."""
        if question.kind == "away" and question.hosts:
            under = [rank for index in question.hosts for rank in self.plan.under(index)]
            ranks = tuple(rank for rank in under if question.exchanges[0].takes(rank))
            states = [RankState(rank, process="its host's agent does not answer") for rank in ranks]
            question.answer.add(Found(ranks, states))

    def _add(self, question: _Question, answer: Any) -> None:
        if isinstance(answer, dict):
            if question.kind == "count":
                answer = Tally.from_message(answer, len(question.exchanges))
            else:
                answer = Found.from_message(answer)
        question.answer.add(answer)

    # -- output -----------------------------------------------------------------------------------

    def announce(self, fault: Fault) -> None:
        """Report a fault to all ranks."""
        self._spread({"fault": fault.as_message()})

    def _spread(self, message: dict[str, Any]) -> None:
        self._fault = message
        self._send_below(message)
        fault = Fault.from_message(message["fault"])
        for rank, one in self._ranks.items():
            if one.link is not None:
                one.link.send(message)
            # Nobody can go on, nor even leave, while the connections of a stopped process are open and dead.
            if fault.kind == "silent" and rank in fault.ranks:
                one.process.end()

    def alone(self) -> None:
        """Tell all ranks that each of them has failed by itself."""
        self._send_below({"alone": 1})
        for one in self._ranks.values():
            one.failed = False
            if one.link is not None:
                one.link.send({"alone": 1})

    def warn(self, text: str) -> None:
        """Log a warning on a rank: the lowest one here that answers, of the first host."""
        if self.root is None and self._above is not None:
            self._above.send({"warn": text})
            return
        for _, one in sorted(self._ranks.items()):
            # One in native code, or stopped, would log it when that is over.
            if one.link is not None and one.process.look() and one.process.state not in "Tt":
                one.link.send({"warn": text})
                return


def main() -> None:
    """Run an agent: read a plan from stdin, print its address, read those of the others, and work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its ranks
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    agent = Agent(Plan.from_message(json.loads(sys.stdin.readline())))
    print(json.dumps(agent.addresses), flush=True)
    table = sys.stdin.readline()
    if not table:
        return  # the rank that began it has gone
    problem = ""
    try:
        agent.connect(json.loads(table))
    except OSError as error:
        problem = str(error) or type(error).__name__
    print(json.dumps(problem), flush=True)
    if problem:
        return
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # whoever waits for the end of the ranks' output shall not wait for this process
        os.dup2(null, fd)
    agent.run()


if __name__ == "__main__":
    main()
