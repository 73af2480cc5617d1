"""How a rank's ledger travels in PyTorch: as its row of a table of all ranks', or in their exact sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import torch
from hvdloss.comm.tuning import Tuning
from hvdloss.losses.ledger import COLUMN, LEDGER_WIDTH, Ledger, Ledgers, Sums, unpack
from hvdloss.losses.reduction import TENSOR_FIELDS
from hvdloss.terms.controller import Controller
from hvdloss.torch.buckets import FlatBucket, Wire
from hvdloss.torch.compression import Compression
from hvdloss.torch.engines.group import EngineGroup
from hvdloss.torch.ops import on_host, to_device_async

__all__ = ["LedgerExchange", "Message", "zeroed"]

_KEPT = slice(COLUMN["micro_batches"], TENSOR_FIELDS)


def zeroed(row: torch.Tensor) -> torch.Tensor:
    """Return a row that adds nothing to a step, and still tells what was wrong."""
    out = torch.zeros_like(row)
    out[_KEPT] = row[_KEPT]
    return out


class Message:
    """A ledger on its way, as numbers that are summed over ranks.

    Args:
        rank, size: of the ranks.
        dtype: float32 or float64, of the bucket of gradients in which it rides; None for a message of its
            own, of float64.
        sums: whether only their sums travel.

    Attributes:
        length: how many numbers it has.
    """

    def __init__(self, rank: int, size: int, dtype: torch.dtype | None, sums: bool) -> None:
        self.rank, self.size, self.dtype = rank, size, dtype
        self.sums = Sums(size, 24 if dtype is torch.float32 else 53) if sums else None
        if self.sums is not None:
            self.length = self.sums.length
        else:
            self.length = size * LEDGER_WIDTH * (1 if dtype is None else 4)

    def write(self, row: torch.Tensor) -> torch.Tensor:
        """Return this rank's numbers of its ledger, float64 ``(LEDGER_WIDTH,)``; no device sync."""
        dtype = self.dtype or torch.float64
        if self.sums is not None and on_host(row):  # in a quarter of the time
            return torch.from_numpy(self.sums.pack_row(row.numpy())).to(dtype)
        if self.sums is not None:
            numbers: torch.Tensor = self.sums.write(
                row,
                row.view(torch.int64),
                _positions(self.sums, row.device),
                join=lambda parts: torch.cat([part.to(dtype) for part in parts]),
                flags=lambda some: some > 0,
                flat=torch.flatten,
                left=torch.bitwise_left_shift,
                right=torch.bitwise_right_shift,
                clip=torch.clamp,
            )
            return numbers
        table = torch.zeros(self.size, LEDGER_WIDTH, dtype=torch.float64, device=row.device)
        table[self.rank] = row
        flat = table.view(-1)
        # In a bucket as numbers of 16 bits, four per entry: where all but one rank add zeros, their sum in
        # float32 is exact, which that of the entries is not.
        return flat if self.dtype is None else flat.view(torch.int16).to(dtype)

    def read(self, numbers: torch.Tensor) -> Ledgers:
        """Return what the summed numbers, on the CPU, tell of all ranks."""
        if self.sums is not None:
            return self.sums.unpack(numbers.numpy())
        whole = numbers if self.dtype is None else numbers.to(torch.int16).view(torch.float64)
        return unpack(whole.view(self.size, LEDGER_WIDTH).numpy())


def _positions(sums: Sums, device: torch.device) -> torch.Tensor:
    """Return the places of digits as a tensor, made once for each device."""
    key = (sums.digits.bits, str(device))
    if key not in _made:
        _made[key] = to_device_async(torch.from_numpy(sums.positions), device)
    return _made[key]


_made: dict[tuple[int, str], torch.Tensor] = {}


class LedgerExchange:
    """The ledgers of one optimizer's ranks on their way, with what terms tell.

    Args:
        name: of the optimizer, on the wire.
        process_set: the ranks.
        controller: of the terms, which may tell numbers more.
        tuning: says whether rows or sums travel.

    Attributes:
        own: this rank's ledger as it was sent last, float64 ``(LEDGER_WIDTH,)``.
        wire: sums without compression.
    """

    def __init__(self, name: str, process_set: Any, controller: Controller, tuning: Tuning) -> None:
        self._name, self._process_set, self._controller, self._tuning = name, process_set, controller, tuning
        self.wire = Wire(EngineGroup(process_set, own_order=True, named=False), Compression.none)
        self.own = torch.zeros(LEDGER_WIDTH, dtype=torch.float64)
        self.clear()

    def clear(self) -> None:
        """Begin a step."""
        self._numbers: torch.Tensor | None = None
        self._ready: Callable[[], None] | None = None
        self._rows: Callable[[], torch.Tensor] | None = None  # what terms tell, or all ranks' rows
        self._bucket: FlatBucket | None = None

    @property
    def sent(self) -> bool:
        """Whether this rank's ledger is on its way."""
        return self._numbers is not None

    def drain(self) -> None:
        """Wait for what is under way."""
        for ready in (self._ready, self._rows):
            if ready is not None:
                ready()

    def message(self, dtype: torch.dtype | None = None) -> Message:
        """Return how a ledger travels in a bucket of this dtype, or (None) as a message of its own."""
        size = self._process_set.size()
        return Message(self._process_set.rank(), size, dtype, self._tuning.sums(size))

    def compose(
        self,
        ledger: Ledger,
        row: torch.Tensor | None,
        measured: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> torch.Tensor:
        """Return this rank's ledger to be sent; what terms tell is on its way by then.

        As a message of its own: beside the ledgers it would move gradients to other places of their message,
        and sums of three and more ranks round by place.

        Args:
            ledger: what is known as numbers.
            row: what backward passes told; None without any.
            measured: by field, what is added that a device has and nobody waits for.
            device: where it travels from.
        """
        rank, size, width = self._process_set.rank(), self._process_set.size(), self._controller.width
        self.own = own = to_device_async(
            torch.tensor(list(vars(ledger).values()), dtype=torch.float64), device
        )
        told = torch.zeros(width, dtype=torch.float64, device=device)
        if row is not None:
            own[:TENSOR_FIELDS] = row[:TENSOR_FIELDS]
            told = row[TENSOR_FIELDS:]
        for field, value in measured.items():
            own[COLUMN[field]] += value
        self._rows = None
        if self._tuning.sums(size):
            if self._controller.terms:
                self._rows = self._gather(torch.cat([own, told]), "terms")
        elif width:
            table = torch.zeros(size, width, dtype=torch.float64, device=device)
            table[rank] = told
            ready = self.wire.send(table.view(-1), f"{self._name}.terms")
            self._rows = lambda: ready() or table
        return own

    def _gather(self, row: torch.Tensor, name: str) -> Callable[[], torch.Tensor]:
        """Start gathering a row of every rank; the result waits."""
        return self.wire.gather(row[None], f"{self._name}.{name}")

    def send(self, own: torch.Tensor, there: torch.Tensor, bucket: FlatBucket | None) -> None:
        """Send a composed ledger, and whether gradients without a bucket are there.

        In the tail of `bucket`, which is launched later; or (None) as a message of its own.
        """
        message = self.message(None if bucket is None else bucket.tail.dtype)
        self._bucket = bucket
        if bucket is None:
            self._numbers = torch.cat([message.write(own), to_device_async(there, own.device)])
            self._ready = self.wire.send(self._numbers, f"{self._name}.ledger")
            return
        self._numbers = tail = bucket.tail
        tail[: message.length] = message.write(own)
        if len(there):
            tail[message.length :] = to_device_async(there, tail.device)
        self._ready = bucket.drain

    def receive(self) -> tuple[Ledgers, list[float]]:
        """Wait for all ranks' ledgers; return them, and on how many ranks those gradients are."""
        assert self._numbers is not None
        if self._ready is not None:
            ready, self._ready = self._ready, None
            ready()
        message = self.message(None if self._bucket is None else self._bucket.tail.dtype)
        numbers = self._numbers.cpu()
        return message.read(numbers[: message.length]), numbers[message.length :].tolist()

    def with_rows(self, ledgers: Ledgers) -> tuple[Ledgers, np.ndarray]:
        """Return the ledgers, with their rows where those must be known, and what terms told, by rank.

        Collectives: where only sums travelled and something is wrong, or is read: one all-gather.
        """
        told = np.zeros((len(ledgers), 0))
        if self._rows is not None:
            ready, self._rows = self._rows, None
            told = ready().cpu().numpy()
        elif ledgers.table is None and ledgers.needs_rows:
            told = self._gather(self.own, "rows")().cpu().numpy()
        if ledgers.table is None and told.shape[1]:
            ledgers, told = ledgers.with_rows(told[:, :LEDGER_WIDTH]), told[:, LEDGER_WIDTH:]
        return ledgers, told
