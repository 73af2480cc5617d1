"""What stages of a model send each other: activations one way, gradients the other way.

A channel is one direction between two ranks. Its messages have one order on both, and a name each, so that
any engine can match them. They are broadcasts of bytes in a process set of the two.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from hvdloss.comm.collectives import GroupContext, resolve_group
from hvdloss.comm.engine import Work
from hvdloss.comm.messages import decode_errors
from hvdloss.losses.reduction import TENSOR_FIELDS
from hvdloss.split.messages import HEADER_BYTES, ROW_BYTES, TensorKind, read_header, write_header
from hvdloss.torch._backend import hvd
from hvdloss.torch.engines.group import EngineGroup

__all__ = ["Activations", "Channel", "Gradients", "Traffic"]


class Traffic:
    """What a rank has sent and received, and how long it waited for it."""

    def __init__(self) -> None:
        self.messages = self.bytes = 0
        self.waited = 0.0


class Channel:
    """Bytes from one rank of a pair to the other.

    Args:
        pair: the process set of the two.
        forward: whether from the first to the second.
        name: on the wire.
        device: where the bytes lie.
        traffic: what to count in.
    """

    def __init__(self, pair: Any, forward: bool, name: str, device: torch.device, traffic: Traffic) -> None:
        group, rank, size = resolve_group(hvd, pair, "Pipeline")
        self.device, self._traffic = device, traffic
        self._name = name
        self._group = EngineGroup(group, own_order=True)
        self.source = GroupContext(name, group, rank, size).global_rank(0 if forward else 1)
        self._sent: deque[Work] = deque()
        # Both ranks are here: an engine that connects them when they first talk does it now.
        for one in [torch.device("cpu")] + [device] * (device.type != "cpu"):
            self.wait(self.start(torch.zeros(1, dtype=torch.uint8, device=one), f"open.{one.type}"))

    def start(self, data: torch.Tensor, name: str) -> Work:
        """Send, or receive in place, bytes; return what to wait for."""
        self._traffic.messages += 1
        self._traffic.bytes += len(data)
        return self._group.broadcast(data, self.source, f"{self._name}.{name}", in_place=True)

    def send(self, data: torch.Tensor, name: str) -> None:
        """Start sending bytes, if there are any; let go of those that have arrived."""
        while self._sent and self._sent[0].done():
            self.wait(self._sent.popleft())
        if len(data):
            self._sent.append(self.start(data, name))

    def flush(self) -> None:
        """Wait until all are sent."""
        while self._sent:
            self.wait(self._sent.popleft())

    def wait(self, work: Work) -> torch.Tensor:
        """Return what came, or was sent."""
        began = time.perf_counter()
        out: torch.Tensor = work.wait()
        self._traffic.waited += time.perf_counter() - began
        return out


def _kind(tensor: torch.Tensor) -> TensorKind:
    return TensorKind(
        str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), bool(tensor.requires_grad)
    )


def _packed(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the bytes of tensors, one after the other."""
    parts = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)


class _Layout:
    """How tensors lie in one message of bytes."""

    def __init__(self, kinds: Sequence[TensorKind], source: int) -> None:
        with decode_errors("activations' dtypes", source):
            self.dtypes = [getattr(torch, kind.dtype) for kind in kinds]
            if not all(isinstance(dtype, torch.dtype) for dtype in self.dtypes):
                raise ValueError(f"{[kind.dtype for kind in kinds]}"[:80])
        self.shapes = [kind.shape for kind in kinds]
        self.sizes = [
            math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    def unpacked(self, data: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors, each with memory of its own, which a view's dtype needs to be aligned."""
        return [
            part.clone().view(dtype).view(shape)
            for part, dtype, shape in zip(data.split(self.sizes), self.dtypes, self.shapes, strict=True)
        ]


class Activations:
    """Activations of the micro-batches of a step, in their order, each of any shape.

    A message is a header and as many bytes as the one before had, so that the next stage can be ready for it
    while it computes; what is more follows in a second message.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._room = 0  # bytes of the one before: equal on both ranks
        self._number = 0
        self._first: Work | None = None  # of the expected message, until it is read
        self._rest: Work | None = None
        self._kinds: list[TensorKind] = []
        self._layout = _Layout([], 0)
        self._data = torch.empty(0, dtype=torch.uint8, device=channel.device)

    # -- the stage that sends

    def send(self, number: int, tensors: Sequence[torch.Tensor], rank: int) -> None:
        """Start sending those of a micro-batch."""
        header = torch.frombuffer(
            bytearray(write_header([_kind(t) for t in tensors], rank)), dtype=torch.uint8
        )
        data = _packed(tensors, self._channel.device)
        first = data.new_zeros(HEADER_BYTES + self._room)
        first[:HEADER_BYTES] = header
        here = data[: self._room]
        first[HEADER_BYTES : HEADER_BYTES + len(here)] = here
        self._channel.send(first, f"{number}")
        self._channel.send(data[self._room :], f"{number}.rest")
        self._room = len(data)

    # -- the stage that receives

    def expect(self, number: int) -> None:
        """Be ready for those of a micro-batch."""
        self._number = number
        first = torch.empty(HEADER_BYTES + self._room, dtype=torch.uint8, device=self._channel.device)
        self._first = self._channel.start(first, f"{number}")

    def advance(self) -> None:
        """Be ready for what is more, if the first message is here."""
        if self._first is not None and self._first.done():
            self._read_first()

    def _read_first(self) -> None:
        assert self._first is not None
        first = self._channel.wait(self._first)
        self._first = self._rest = None
        self._kinds = read_header(first[:HEADER_BYTES].cpu().numpy().tobytes(), self._channel.source)
        self._layout = _Layout(self._kinds, self._channel.source)
        size = sum(self._layout.sizes)
        self._data = first[HEADER_BYTES : HEADER_BYTES + min(size, self._room)]
        if size > self._room:
            rest = first.new_empty(size - self._room)
            self._rest = self._channel.start(rest, f"{self._number}.rest")
        self._room = size

    def take(self) -> tuple[torch.Tensor, ...]:
        """Return those that were expected, of which some require a gradient."""
        if self._first is not None:
            self._read_first()
        data = self._data
        if self._rest is not None:
            data = torch.cat([data, self._channel.wait(self._rest)])
        return tuple(
            tensor.requires_grad_(kind.differentiable)
            for tensor, kind in zip(self._layout.unpacked(data), self._kinds, strict=True)
        )


class Gradients:
    """Gradients of activations, in the order of the micro-batches, and what each one's loss was made of."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._expected: deque[tuple[Work, _Layout]] = deque()

    def send(self, number: int, inputs: Sequence[torch.Tensor], row: torch.Tensor) -> None:
        """Start sending the gradients of a micro-batch's inputs."""
        gradients = [
            torch.zeros_like(t) if t.grad is None else t.grad.to(t.dtype) for t in inputs if t.requires_grad
        ]
        data = _packed([row.to(self._channel.device, torch.float64), *gradients], self._channel.device)
        self._channel.send(data, f"{number}")

    def expect(self, number: int, outputs: Sequence[torch.Tensor]) -> None:
        """Be ready for the gradients of a micro-batch's outputs."""
        row = TensorKind("float64", (TENSOR_FIELDS,), False)
        layout = _Layout([row, *(_kind(t) for t in outputs if t.requires_grad)], self._channel.source)
        assert layout.sizes[0] == ROW_BYTES
        data = torch.empty(sum(layout.sizes), dtype=torch.uint8, device=self._channel.device)
        self._expected.append((self._channel.start(data, f"{number}"), layout))

    def take(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return what the loss was made of, and the gradients of the outputs that require one."""
        work, layout = self._expected.popleft()
        row, *gradients = layout.unpacked(self._channel.wait(work))
        return row, gradients
