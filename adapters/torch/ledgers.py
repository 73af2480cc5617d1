"""How a rank's ledger travels in PyTorch: as its row of a table of all ranks', or in their exact sums."""

from __future__ import annotations

import torch
from hvdloss.ledger import LEDGER_WIDTH, Ledgers, Sums, unpack
from hvdloss.torch.ops import on_host, to_device_async

__all__ = ["Message"]


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

    def carried(self, dtype: torch.dtype | None) -> Message:
        """Return the same in a bucket of this dtype, or (None) as a message of its own."""
        return Message(self.rank, self.size, dtype, self.sums is not None)

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
