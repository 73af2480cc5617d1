"""A rank whose job strangers try to disturb; started by tests/security/test_strangers.py."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

import hvdloss.torch as hvd

STEPS, ROWS = 30, 12


def train(rank: int, size: int, distributed: bool) -> list[float]:
    """Train on this rank's rows of every step; return the parameters."""
    torch.manual_seed(5)
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    x = torch.randn(STEPS, ROWS, 3, dtype=torch.float64)
    y = torch.randn(STEPS, ROWS, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    objective = hvd.Objective("mse")
    if distributed:
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), objective)
    # Uneven: rank 0 has 3 rows of each step's 12, the others share the rest.
    cuts = [0, *(3 + (ROWS - 3) * k // max(size - 1, 1) for k in range(size))] if size > 1 else [0, ROWS]
    for step in range(STEPS):
        mine = slice(cuts[rank], cuts[rank + 1])
        optimizer.zero_grad()
        if distributed:
            objective(model(x[step, mine]), y[step, mine]).backward()
            time.sleep(0.05)
        else:
            ((model(x[step]) - y[step]) ** 2).mean().backward()
        optimizer.step()
    return [value for p in model.parameters() for value in p.detach().reshape(-1).tolist()]


def main() -> None:
    out = Path(sys.argv[1])
    # Ranks that come late keep the others' ports open, for strangers to find them.
    time.sleep(float(sys.argv[2]) * int(os.environ.get("HOROVOD_RANK", "0")))
    hvd.init()
    found = train(hvd.rank(), hvd.size(), True)
    (out / f"rank-{hvd.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
