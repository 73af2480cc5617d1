"""A rank that trains on files larger than the memory it may use, and goes on from its last checkpoint.

Started by tests/torch/test_torch_larger.py; not a test by itself. Every step's rows are logged.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import numpy as np
import torch

import hvdloss.torch as hvd
from hvdloss.data import Parquet, RowGroups

CHECKPOINT = 20  # steps
LEDGER_WIDTH = 64


def data_bytes() -> int:
    """Return what this process has of memory of its own, as RLIMIT_DATA counts it (Linux, proc(5))."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmData:")[1].split()[0]) * 1024


def batch(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return columns["x"], columns["y"][:, None], columns["id"]


def main() -> None:
    folder, size, allowed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    hvd.init()
    torch.set_num_threads(1)
    model = torch.nn.Linear(LEDGER_WIDTH, 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters(), objective
    )
    files = Parquet(folder / "rows", use_threads=False)
    loader = hvd.StreamLoader(files, size, sharding=lambda rows: RowGroups(rows, seed=1), collate_fn=batch)
    batches = hvd.uneven(loader, optimizer)
    checkpoint, step = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        kept = torch.load(checkpoint)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        batches.load_state_dict(kept["data"])
        step = kept["step"]
    limit = data_bytes() + allowed
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        np.ones(2 * allowed, np.uint8)
        raise SystemExit("the limit does not hold")
    except MemoryError:
        pass
    with (folder / f"log-{hvd.size()}-{hvd.rank()}").open("w", buffering=1) as log:
        for x, y, ids in batches:
            optimizer.zero_grad()
            objective(model(x), y).backward()
            optimizer.step()
            log.write(json.dumps([step, ids.tolist()]) + "\n")
            step += 1
            if step % CHECKPOINT == 0:
                told = batches.state_dict()
                if hvd.rank() == 0:
                    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save({**kept, "data": told, "step": step}, folder / "new.pt")
                    os.replace(folder / "new.pt", checkpoint)
    print(json.dumps({"rank": hvd.rank(), "steps": step, "peak": data_bytes(), "limit": limit}), flush=True)
    hvd.shutdown()


if __name__ == "__main__":
    main()
