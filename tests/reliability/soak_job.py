"""A rank of the soak: an elastic job on uneven data, with accumulation, that tells all it does.

Started by `soak.py`. Which samples a step uses is written before the step: if the step is undone because a
rank died in it, a later generation of the job writes it anew.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import hvdloss.torch as hvd
from hvdloss.data import Parquet

BATCH, PASSES = 6, 2
COMMIT, CHECK = 5, 20  # steps


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10)).double()


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)


def inputs(batch: Any) -> torch.Tensor:
    return torch.stack([batch[f"x{i}"] for i in range(64)], 1).double() / 16


def main() -> None:
    folder, until = Path(sys.argv[1]), float(sys.argv[2])
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)  # where it is, should the job not end
    hvd.init()
    log = (folder / f"log-{os.getpid()}.jsonl").open("a")

    def tell(**record: Any) -> None:
        log.write(json.dumps({"pid": os.getpid(), "time": time.time(), **record}) + "\n")
        log.flush()

    model = make_model()
    objective = hvd.Objective("cross_entropy")
    optimizer = hvd.DistributedOptimizer(
        make_optimizer(model), model.named_parameters(), objective, backward_passes_per_step=PASSES
    )
    batches = hvd.uneven(hvd.StreamLoader(Parquet(folder / "digits.parquet"), BATCH), optimizer)
    state = hvd.elastic.TorchState(model, optimizer, data=batches, step=0, epochs=0)

    @hvd.elastic.run
    def train(state: Any) -> None:
        generation = hvd.broadcast_object(time.time_ns(), root_rank=0)
        tell(generation=generation, start=state.step, size=hvd.size(), rank=hvd.rank())
        sampled = 0.0
        # The number is the data's: a job that is interrupted between an epoch's last batch and a counter of
        # its own would count it as the epoch before.
        for epoch in batches.epochs(sys.maxsize):
            used: list[int] = []
            optimizer.zero_grad()
            for number, batch in enumerate(batches):
                used += batch["id"].tolist()
                objective(model(inputs(batch)), batch["y"], batch["w"].double()).backward()
                if number % PASSES != PASSES - 1:
                    continue
                tell(step=state.step, epoch=epoch, ids=used, generation=generation)
                optimizer.step()
                optimizer.zero_grad()
                used = []
                state.step += 1
                if state.step % CHECK == 0:
                    hvd.check_synchronized(model, when=f"after step {state.step}")
                    tell(checked=state.step)
                if time.time() - sampled > 1.0:
                    sampled = time.time()
                    tell(resident=resident(), at=state.step)
                if state.step % COMMIT == 0:
                    state.commit()
            state.epochs = epoch + 1
            state.commit()
            # Decided by one rank, since clocks are read at different times.
            if hvd.broadcast_object(time.time() > until, root_rank=0):
                return

    train(state)
    hvd.check_synchronized(model, when="at the end")
    tell(finished=state.step, epochs=state.epochs, rank=hvd.rank())
    if hvd.rank() == 0:
        torch.save(model.state_dict(), folder / "model.pt")


if __name__ == "__main__":
    main()
