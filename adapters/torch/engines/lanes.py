"""Lanes: groups of ranks in which the n-th exchange of one rank belongs to the n-th of every other."""

from __future__ import annotations

import datetime
import hashlib
import os
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from hvdloss import watch
from hvdloss.comm.single import HorovodInternalError
from hvdloss.errors import UsageError
from hvdloss.watch import process

__all__ = ["Call", "Lane", "Links", "Steps"]

_CONNECT = datetime.timedelta(minutes=30)
_EXCHANGE = datetime.timedelta(days=20)  # a job that is only slow goes on; the watch finds who is lost
_TEXT = 14 * 8  # bytes of a header that say what is exchanged

# What an exchange does: yields first what it must wait for before it may send data (a header's work, or
# None), then the data's, and returns its result.
Steps = Generator[Any, None, Any]

_groups: weakref.WeakSet[Any] = weakref.WeakSet()  # of torch, in this process
_kept: list[Any] = []


def _keep_groups() -> None:
    """In a forked process, never let go of a group: its end waits for threads that were not forked.

    One may be garbage already, which the process (a DataLoader's worker) would collect, and stand still.
    """
    _kept.extend(_groups)


os.register_at_fork(after_in_child=_keep_groups)


class Links:
    """The connections of all lanes, and the exchanges that may be under way on them.

    Args:
        store: through which ranks find each other.
        rank, size: of this process, among all.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._counts: Counter[tuple[int, ...]] = Counter()
        self._sockets: dict[int, str] = {}
        self._calls: weakref.WeakSet[Call] = weakref.WeakSet()

    def new_group(self, ranks: Sequence[int], over: str) -> Any:
        """Connect some ranks, which wait for each other; the n-th time on each is the same.

        Not torch.distributed.new_group, which gives a name again once the group that had it is gone.

        Args:
            ranks: ascending, this process's among them.
            over: "gloo" or "nccl".
        """
        key = tuple(ranks)
        self._counts[key] += 1
        name = hashlib.blake2b(repr((key, self._counts[key], over)).encode(), digest_size=8).hexdigest()
        before = process.sockets()
        kind = {"gloo": dist.ProcessGroupGloo, "nccl": getattr(dist, "ProcessGroupNCCL", None)}[over]
        try:
            group = kind(dist.PrefixStore(name, self._store), ranks.index(self.rank), len(ranks), _CONNECT)
        except RuntimeError as error:
            raise HorovodInternalError(f"ranks {list(ranks)} do not connect: {error}") from error
        self._sockets |= {k: v for k, v in process.sockets().items() if before.get(k) != v}
        _groups.add(group)
        return group

    def add(self, call: Call) -> None:
        """Remember an exchange as long as somebody may wait for it."""
        self._calls.add(call)

    def end(self) -> None:
        """Cut off what is under way: this rank will not do its part, nor wait for others."""
        if any(call.under_way for call in self._calls):
            process.cut(self._sockets)


def _wait(work: Any, what: str) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise HorovodInternalError(f"{what}: {error}") from error


class Call:
    """An exchange on its way."""

    def __init__(self, lane: Lane, what: str, steps: Steps) -> None:
        self.what, self._lane, self._steps = what, lane, steps
        self.noted = (what, lane.members, watch.enter_exchange(what, lane.members))
        self._work: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.over = self.sends = False
        self._go_on()

    def _go_on(self) -> None:
        """Do what comes next; keep an error for whoever waits."""
        try:
            if self._work is not None:
                _wait(self._work, self.what)
            self._work = next(self._steps)
        except StopIteration as end:
            self.over, self.result = True, end.value
        except BaseException as error:
            self.over, self.error = True, error

    @property
    def ready(self) -> bool:
        """Whether what it waits for is there."""
        return self._work is None or self._work.is_completed()

    @property
    def under_way(self) -> bool:
        """Whether it waits for other ranks."""
        return not (self.over or self.ready)

    def send(self) -> None:
        """Begin with the data; the header is here."""
        self.sends = True
        if not self.over:
            self._go_on()

    @watch.blocking
    def done(self) -> bool:
        """Return whether it is over, after doing what can be done towards it."""
        self._lane.advance()
        if self.sends and not self.over and self.ready:
            self._go_on()
        return self.over


class Lane:
    """Exchanges among some ranks, which send their data in the order in which they are launched.

    Args:
        links: what it is part of.
        ranks: their numbers among all, ascending.
        checked: whether every exchange has a header, by which ranks see that theirs is the same.
    """

    def __init__(self, links: Links, ranks: Sequence[int], checked: bool) -> None:
        self.ranks, self.checked, self._links = list(ranks), checked, links
        self.rank, self.size = self.ranks.index(links.rank), len(self.ranks)
        self.members = () if self.size == links.size else tuple(self.ranks)
        self._waiting: deque[Call] = deque()  # whose data is not under way
        self._groups: dict[str, Any] = {}
        self._advancing = False
        self._unnamed = 0

    def group(self, what: str) -> Any:
        """Return the group for headers, or for tensors of a kind of device.

        Made when first asked for, on all ranks together.
        """
        if what not in self._groups:
            self._groups[what] = self._links.new_group(self.ranks, "nccl" if what == "cuda" else "gloo")
        return self._groups[what]

    # -- what the engine's exchanges are made of; each starts, and returns what to wait for

    def all_reduce(self, tensor: torch.Tensor, op: Any) -> Any:
        """Reduce in place."""
        options = dist.AllreduceOptions()
        options.reduceOp, options.timeout = op, _EXCHANGE
        return self.group(tensor.device.type).allreduce([tensor], options)

    def all_gather(self, out: Sequence[torch.Tensor], tensor: torch.Tensor) -> Any:
        """Gather tensors of one shape."""
        options = dist.distributed_c10d.AllgatherOptions()
        options.timeout = _EXCHANGE
        return self.group(tensor.device.type).allgather([list(out)], [tensor], options)

    def all_to_all(
        self,
        out: torch.Tensor,
        tensor: torch.Tensor,
        received: Sequence[int] = (),
        sent: Sequence[int] = (),
        what: str = "",
    ) -> Any:
        """Send rows to every rank; without splits as many to each."""
        options = dist.AllToAllOptions()
        options.timeout = _EXCHANGE
        group = self.group(what or tensor.device.type)
        return group.alltoall_base(out, tensor, list(received), list(sent), options)

    def broadcast(self, tensor: torch.Tensor, root: int) -> Any:
        """Broadcast in place, from a rank of the lane."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = root, 0, _EXCHANGE
        return self.group(tensor.device.type).broadcast([tensor], options)

    def launch(self, operation: str, name: str | None, steps: Callable[[Lane, str], Steps]) -> Call:
        """Begin an exchange."""
        watch.check()
        if name is None:
            name, self._unnamed = f"noname.{self._unnamed}", self._unnamed + 1
        what = f"{operation}.{name}"
        call = Call(self, what, steps(self, what))
        self._links.add(call)
        self._waiting.append(call)
        self.advance()
        return call

    def advance(self) -> None:
        """Begin to send the data of all whose headers are here, in order."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._waiting and self._waiting[0].ready:
                self._waiting.popleft().send()
        finally:
            self._advancing = False

    def header(self, what: str, about: str, counts: Sequence[int]) -> Generator[Any, None, list[int]]:
        """Tell every rank what is launched here, and one number each; return theirs.

        Raises:
            UsageError: ranks launched different exchanges; on all of them.
        """
        text = f"{what} {about}".encode()
        mine = torch.zeros(self.size, _TEXT // 8 + 2, dtype=torch.int64)
        mine[:, 0] = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
        mine[:, 1] = torch.tensor(counts)
        mine[:, 2:] = torch.frombuffer(bytearray(text[:_TEXT].ljust(_TEXT)), dtype=torch.int64)
        theirs = torch.empty_like(mine)
        yield self.all_to_all(theirs, mine, what="headers")
        if bool((theirs[:, 0] != theirs[0, 0]).any()):
            first = next(rank for rank in range(1, self.size) if theirs[rank, 0] != theirs[0, 0])
            texts = [theirs[k, 2:].numpy().tobytes().decode(errors="replace").strip() for k in (0, first)]
            raise UsageError(
                f"ranks launched different exchanges: rank {self.ranks[first]} has {texts[1]!r} where "
                f"rank {self.ranks[0]} has {texts[0]!r}. Over torch.distributed all ranks of a process set "
                f"must launch the same exchanges, with the same shapes, in the same order"
            )
        return theirs[:, 1].tolist()
