"""What a step's bookkeeping costs one rank, by the number of ranks: simulated, in this process.

Everything that a rank computes for exactness and reports is done as in a real step; what would come from the
other ranks is made beforehand. No message is sent: bytes and messages are counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.comm.agreement import check_consistency
from hvdloss.comm.plan import ParameterInfo
from hvdloss.comm.tuning import TABLE_RANKS
from hvdloss.losses.ledger import LEDGER_WIDTH, Ledger, Ledgers, Sums, check_step, pack, unpack
from hvdloss.report import StepReport

__all__ = ["PARAMETERS", "RANKS", "measure"]

RANKS = (2, 8, 32, 64, 65, 128, 512, 2048, 10_000)
PARAMETERS = 300
_OWN = Ledger(numerator=40.5, denominator=32.25, weight=32.25, elements=32.0, micro_batches=1.0)


class _AllTheSame:
    """A rank among `size` that all bring the same; counts what it sends and gets."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size, self.bytes, self.messages = size, 0, 0

    def all_reduce(self, array: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        self.bytes += array.nbytes
        self.messages += 1
        return array * self.size

    def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        self.bytes += len(data) * self.size
        self.messages += 2
        return [data] * self.size


def measure(size: int, *, rounds: int = 7, table_ranks: int = TABLE_RANKS) -> dict[str, Any]:
    """Return what bookkeeping costs one rank among `size`.

    Args:
        size: number of ranks.
        rounds: of which the medians are reported.
        table_ranks: up to so many ranks all ledgers travel (:class:`hvdloss.comm.tuning.Tuning`).

    Returns:
        by "step" (nobody reads what single ranks did), "read" (somebody does, all of it) and "agreement": the
        median ``seconds`` of processor time, ``bytes`` of the messages, and how many ``messages`` there are
        besides those of the gradients.
    """
    rng = np.random.default_rng(0)
    rows = np.zeros((size, LEDGER_WIDTH))
    rows[:, :3] = rng.uniform(1, 100, (size, 3))
    rows[:, 3:5] = 32, 1
    rows[:, 11:13] = rng.uniform(0, 1, (size, 2))
    sums = None if size <= table_ranks else Sums(size, 24)
    message = rows if sums is None else sum(sums.pack(Ledger(*row)) for row in rows.tolist())

    def told() -> Ledgers:
        """What a rank does with its own ledger, and with what has come."""
        if sums is None:
            pack(_OWN, 0, size)
            return unpack(message)
        sums.pack(_OWN)
        return sums.unpack(np.asarray(message))

    def step() -> StepReport:
        ledgers = told()
        assert check_step(ledgers, 1) is None
        return StepReport.of(1, ledgers, "mean")

    def read() -> None:
        ledgers = told()
        if sums is not None:
            ledgers = ledgers.with_rows(rows)
        assert check_step(ledgers, 1) is None
        StepReport.of(1, ledgers, "mean").ranks.columns()

    parameters = [
        ParameterInfo(f"layers.{i}.weight", (512, 512), "float32 cpu", 4) for i in range(PARAMETERS)
    ]
    order = list(range(PARAMETERS))
    communicators = []

    def agreement() -> None:
        communicators.append(_AllTheSame(size))
        check_consistency(
            communicators[-1], parameters, lambda: order, order, {"reduction": "mean"}, name="bench"
        )

    of_ledgers = size * LEDGER_WIDTH * 16 if sums is None else sums.length * 4  # in a float32 bucket
    times = {what.__name__: _seconds(what, rounds) for what in (step, read, agreement)}
    gathered = 0 if sums is None else rows.nbytes
    return {
        "ranks": size,
        "way": "table" if sums is None else "sums",
        "step": {"seconds": times["step"], "bytes": of_ledgers, "messages": 0},
        "read": {"seconds": times["read"], "bytes": of_ledgers + gathered, "messages": int(gathered > 0)},
        "agreement": {
            "seconds": times["agreement"],
            "bytes": communicators[-1].bytes,
            "messages": communicators[-1].messages,
        },
    }


def _seconds(work: Callable[[], Any], rounds: int) -> float:
    """Return the median processor time of one call; each round lasts about 20 ms at least."""
    work()
    began = time.process_time()
    work()
    calls = max(1, round(0.02 / max(1e-6, time.process_time() - began)))
    found = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(calls):
            work()
        found.append((time.process_time() - began) / calls)
    return statistics.median(found)
