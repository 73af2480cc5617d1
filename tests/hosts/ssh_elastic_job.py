"""A rank of an elastic job on hosts of which one is killed and comes back; tells which rows it used.

Started by test_ssh_hosts.py through horovodrun; not a test by itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

import hvdloss.torch as hvd
from hvdloss.data import Parquet

COMMIT = 3  # steps
KILLED = "host1"
SIZE = 3
WAIT = 60  # commits, one a second


def main() -> None:
    folder = Path(sys.argv[1])
    hvd.init()
    torch.set_num_threads(1)
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), model.named_parameters(), objective
    )
    batches = hvd.uneven(hvd.StreamLoader(Parquet(folder / "rows.parquet"), 4), optimizer)
    state = hvd.elastic.TorchState(model, optimizer, data=batches, step=0)
    host = os.uname().nodename
    process = f"{host}-{os.getpid()}-{time.time_ns()}"  # a host that comes back counts its processes anew

    def write(name: str, **record: object) -> None:
        with (folder / f"{name}-{process}").open("a") as log:
            log.write(json.dumps({"time": time.monotonic(), **record}) + "\n")

    def step_of(batch: dict[str, torch.Tensor], step: int) -> None:
        x = torch.stack([batch[f"x{i}"] for i in range(3)], 1)
        optimizer.zero_grad()
        objective(model(x), batch["y"][:, None]).backward()
        if host == KILLED and step == COMMIT + 1 and not (folder / "in-step").exists():
            (folder / "in-step").touch()
            until = time.monotonic() + 60  # the host is killed meanwhile, or this process stopped
            while time.monotonic() < until and not (folder / "go-on").exists():
                time.sleep(0.1)
        optimizer.step()

    @hvd.elastic.run
    def train(state: hvd.elastic.TorchState) -> None:
        for batch in batches:
            try:
                step_of(batch, state.step)
            except Exception as error:
                write("error", kinds=[kind.__name__ for kind in type(error).__mro__], message=str(error))
                raise
            write("log", step=state.step, ids=batch["id"].tolist(), size=hvd.size(), rank=hvd.rank())
            state.step += 1
            if state.step % COMMIT == 0:
                state.commit()
                if state.step > 2 * COMMIT:
                    wait_for_the_host(state)

    def wait_for_the_host(state: hvd.elastic.TorchState) -> None:
        """Commit, which is where Horovod tells of hosts that have come, until the killed one is back."""
        if hvd.size() < SIZE:
            (folder / "went-on").touch()
        for _ in range(WAIT):
            if hvd.size() == SIZE:
                break
            time.sleep(1.0)
            state.commit()

    train(state)
    if hvd.rank() == 0:
        torch.save(model.state_dict(), folder / "model.pt")


if __name__ == "__main__":
    main()
