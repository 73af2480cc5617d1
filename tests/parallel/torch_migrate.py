"""Scripts before and after their change to hvdloss (`examples/migrate`): wrong, then exact. PyTorch."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data.distributed import DistributedSampler

import hvdloss.torch as hvd
from tests.docs import pages
from tests.ranks import needs

NEEDS = needs("gloo-2")

MIGRATE = pages.ROOT / "examples" / "migrate"
sys.path.insert(0, str(MIGRATE))
BATCH = 32


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).double() for p in model.parameters()])


def one_process() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the parameters before and after an epoch of one process with all ranks' batches at once."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    first = flat(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shards = [torch.tensor(list(DistributedSampler(y, hvd.size(), r))) for r in range(hvd.size())]
    for parts in zip(*(shard.split(BATCH) for shard in shards), strict=True):
        rows = torch.cat(parts)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows], weight=torch.tensor([1.0] * 8 + [5.0] * 2)).backward()
        optimizer.step()
    return first, flat(model)


def compare(name: str) -> dict[str, float]:
    """Return how far off each script's training is from one process's, relative to how far that moved."""
    first, right = one_process()
    off = {}
    for which in ("before", "after"):
        model = importlib.import_module(f"{name}_{which}").train(epochs=1, batch_size=BATCH)
        # PyTorch 2.13 waits for the thread of its Gloo group, holding Python's lock, when a
        # DistributedDataParallel goes; that thread may want the lock for what it did last. Let it finish.
        time.sleep(0.5)
        off[f"{name}, {which}"] = float((flat(model) - right).norm() / (right - first).norm())
    assert off[f"{name}, after"] < 1e-5, off
    assert 0.01 < off[f"{name}, before"] < 0.04, off  # the pages say 2 %
    return off


def case_horovod():
    return compare("horovod")


def as_torchrun() -> None:
    """Set what torchrun sets, since that is how the scripts are started before."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = hvd.broadcast_object(free.getsockname()[1], root_rank=0)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(hvd.rank()),
        WORLD_SIZE=str(hvd.size()),
    )


def case_ddp():
    as_torchrun()
    return compare("ddp")


def case_ddp_with_the_diff_of_the_readme():
    """The script keeps DistributedDataParallel, and is exact."""
    as_torchrun()
    diff = [text for kind, text in pages.blocks("README.md") if kind == "diff"][1]
    names = {"__name__": "script"}
    exec(compile(pages.patched((MIGRATE / "ddp_before.py").read_text(), diff), "README.md", "exec"), names)
    first, right = one_process()
    model = names["train"](epochs=1, batch_size=BATCH)
    time.sleep(0.5)  # as above
    off = float((flat(model) - right).norm() / (right - first).norm())
    assert off < 1e-5, off
    return {"ddp, README": off}
