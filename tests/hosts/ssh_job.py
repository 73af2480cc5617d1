"""A rank of a small training job, with a place in one step where the outside can do something.

Started by test_ssh_hosts.py through horovodrun, or alone as the one process to compare with; not a test by
itself. Ranks share the folder with the tests: `in-step-N` is there once the last rank is in step N, and it
waits there for `go-N`, while the others wait for it in their all-reduce.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

STEPS = 16
PATTERN = b"GRADIENTGRADIENT"
BATCH = 60


class Job:
    """What a rank does besides training: wait where it is told to, keep times, say how it ended."""

    def __init__(self, args: argparse.Namespace, rank: int, size: int) -> None:
        self.folder, self.rank, self.size = args.folder, rank, size
        self.stops = args.stop if size > 1 else []
        self.times: list[float] = []
        x, y = load_digits(return_X_y=True)
        self.x, self.y = x / 16, y
        # Held until this process has ended, however it does.
        self.held = (self.folder / f"alive-{rank}").open("w")
        fcntl.flock(self.held, fcntl.LOCK_EX)

    def batch(self, step: int) -> tuple[Any, Any, Any]:
        """Return this rank's part, an uneven one, of a step's samples; in one process, all of them."""
        rng = np.random.default_rng(step)
        rows = rng.integers(0, len(self.x), BATCH)
        cuts = [0, *sorted(rng.choice(np.arange(1, BATCH), self.size - 1, replace=False)), BATCH]
        mine = rows[cuts[self.rank] : cuts[self.rank + 1]]
        return self.x[mine], self.y[mine], np.where(self.y[mine] >= 8, 5.0, 1.0)

    def inside(self, step: int) -> None:
        """Be in the middle of a step."""
        self.times.append(time.monotonic())
        if step in self.stops and self.rank == self.size - 1:
            (self.folder / f"in-step-{step}").touch()
            until = time.monotonic() + 60
            while not (self.folder / f"go-{step}").exists() and time.monotonic() < until:
                time.sleep(0.01)

    def write(self, name: str, **record: Any) -> None:
        path = self.folder / f"{name}-{self.rank}.json"
        path.with_suffix(".part").write_text(json.dumps(record))
        path.with_suffix(".part").replace(path)

    def done(self, parameters: list[np.ndarray], losses: list[float]) -> None:
        self.write(
            "done",
            host=os.uname().nodename,
            size=self.size,
            parameters=[p.tolist() for p in parameters],
            losses=losses,
            times=self.times,
        )


def meet(folder: Path) -> None:
    """Wait until all ranks have imported what they need: Gloo's timeout, short here, holds from now on."""
    env = os.environ
    rank = env.get("OMPI_COMM_WORLD_RANK") or env.get("HOROVOD_RANK") or "0"
    size = int(env.get("OMPI_COMM_WORLD_SIZE") or env.get("HOROVOD_SIZE") or 1)
    (folder / f"here-{rank}").touch()
    until = time.monotonic() + 90
    while len(list(folder.glob("here-*"))) < size:
        if time.monotonic() > until:
            raise SystemExit("the other ranks did not come")
        time.sleep(0.02)


def torch_job(args: argparse.Namespace) -> Job:
    import torch

    import hvdloss.torch as hvd

    meet(args.folder)
    hvd.init()
    torch.set_num_threads(1)
    job = Job(args, hvd.rank(), hvd.size())
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)).double()
    objective = hvd.Objective("cross_entropy")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9), model.named_parameters(), objective
    )
    losses = []

    def train() -> None:
        for step in range(STEPS):
            x, y, weight = map(torch.from_numpy, job.batch(step))
            optimizer.zero_grad()
            loss = objective(model(x), y, weight)
            job.inside(step)
            loss.backward()
            optimizer.step()
            losses.append(optimizer.last_step.loss)

    tell(job, train)
    job.done([p.detach().numpy() for p in model.parameters()], losses)
    return job


def keras_job(args: argparse.Namespace) -> Job:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import tensorflow as tf

    import hvdloss.keras as hvd

    meet(args.folder)
    hvd.init()
    keras.config.set_floatx("float64")
    job = Job(args, hvd.rank(), hvd.size())
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(10)]
    )
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.2, momentum=0.9))
    model.compile(optimizer, loss=hvd.Objective("cross_entropy"), jit_compile=False)

    def batches() -> Any:
        for step in range(STEPS):
            job.inside(step)
            yield job.batch(step)

    spec = tuple(
        tf.TensorSpec((None, *shape), dtype)
        for shape, dtype in (((64,), tf.float64), ((), tf.int64), ((), tf.float64))
    )
    data = tf.data.Dataset.from_generator(batches, output_signature=spec)
    tell(job, lambda: model.fit(data, verbose=0))
    job.done([v.numpy() for v in model.trainable_variables], [])
    return job


def pattern_job(args: argparse.Namespace) -> Job:
    """Make one step whose gradient's bytes on the wire are known: the input, times a weight of 1."""
    import torch

    import hvdloss.torch as hvd

    meet(args.folder)
    hvd.init()
    job = Job(args, hvd.rank(), hvd.size())
    x = torch.from_numpy(np.frombuffer(PATTERN * 10_000).copy())[None]
    model = torch.nn.Linear(x.shape[1], 1, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    objective = hvd.Objective(lambda prediction, target: prediction[:, 0])
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters(), objective
    )
    objective(model(x), torch.zeros(1)).backward()
    optimizer.step()
    job.done([next(model.parameters()).grad[0, :10].numpy()], [])
    return job


def tell(job: Job, train: Any) -> None:
    """Train, and say when this rank knew that it cannot, and how."""
    job.write("started", pid=os.getpid())
    try:
        train()
    except BaseException as error:
        names = [kind.__name__ for kind in type(error).__mro__]
        job.write("error", time=time.monotonic(), kinds=names, message=str(error)[-2000:])
        raise


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("framework", choices=["torch", "keras", "pattern"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stop", type=int, action="append", default=[], help="a step to wait in")
    args = parser.parse_args()
    {"torch": torch_job, "keras": keras_job, "pattern": pattern_job}[args.framework](args)


if __name__ == "__main__":
    main()
