"""Ledgers on their way: what a device writes without being waited for is what the CPU writes."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from hvdloss.losses.ledger import LEDGER_WIDTH
from hvdloss.torch.ledgers import Message
from hvdloss.torch.ops import HOST_DEVICES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, None])
@pytest.mark.parametrize("size", [2, 65, 10_000])
@pytest.mark.parametrize("sums", [False, True])
def test_a_device_writes_what_the_cpu_writes(dtype, size, sums, monkeypatch):
    message = Message(1, size, dtype, sums)
    generator = torch.Generator().manual_seed(size)
    row = torch.randn(LEDGER_WIDTH, dtype=torch.float64, generator=generator) * torch.logspace(
        -300, 300, LEDGER_WIDTH, dtype=torch.float64
    )
    written = message.write(row)
    assert len(written) == message.length
    monkeypatch.setattr("hvdloss.torch.ops.HOST_DEVICES", HOST_DEVICES - {"cpu"})
    elsewhere = message.write(row)
    assert elsewhere.dtype == written.dtype
    assert torch.equal(elsewhere, written)
    told = message.read(written)
    assert len(told) == size
    assert told.totals[:4].tolist() == row[:4].tolist()
