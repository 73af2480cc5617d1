"""A rank of an elastic job that reads files, dies once, and tells which rows every step used.

Started by tests/torch/test_torch_elastic.py; not a test by itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

import hvdloss.torch as hvd
from hvdloss.data import Parquet

COMMIT = 3  # steps


def main() -> None:
    folder = Path(sys.argv[1])
    hvd.init()
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model.named_parameters(), objective
    )
    batches = hvd.uneven(hvd.StreamLoader(Parquet(folder / "rows.parquet"), 4), optimizer)
    state = hvd.elastic.TorchState(model, optimizer, data=batches, step=0)
    name = os.environ["HOROVOD_HOSTNAME"]

    @hvd.elastic.run
    def train(state: hvd.elastic.TorchState) -> None:
        for batch in batches:
            x = torch.stack([batch[f"x{i}"] for i in range(3)], 1)
            optimizer.zero_grad()
            objective(model(x), batch["y"][:, None]).backward()
            if name == sys.argv[2] and state.step == COMMIT + 1 and not (folder / "died").exists():
                (folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            line = {"step": state.step, "ids": batch["id"].tolist(), "size": hvd.size()}
            with (folder / f"log-{os.getpid()}").open("a") as log:
                log.write(json.dumps(line) + "\n")
            state.step += 1
            if state.step % COMMIT == 0:
                state.commit()

    train(state)
    if hvd.rank() == 0:
        torch.save(model.state_dict(), folder / "model.pt")


if __name__ == "__main__":
    main()
