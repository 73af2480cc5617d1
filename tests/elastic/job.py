"""A rank of an elastic job to which something happens; it tells what every step used and gave.

Started by tests/elastic/test_elastic.py; not a test by itself.

    job.py FRAMEWORK FOLDER FAULTS

FRAMEWORK is torch, tape or fit. FAULTS is JSON: a list of {"kind", "step", "host", "slot"}; what is to happen
in that step (once, see `Faults`).
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

ROWS, FEATURES, BATCH, EPOCHS, COMMIT = 61, 3, 4, 2, 3
RATE, MOMENTUM = 0.0625, 0.875  # exact in float32


def table() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(ROWS, FEATURES)), rng.normal(size=(ROWS, 1))


class Faults:
    """What happens to this rank, or is done by it: in the middle of a step, before its update."""

    def __init__(self, folder: Path, faults: list[dict]) -> None:
        self.folder, self.faults = folder, faults
        self.me = (os.environ.get("HOROVOD_HOSTNAME"), int(os.environ.get("HOROVOD_LOCAL_RANK", "0")))

    def strike(self, step: int) -> None:
        for number, fault in enumerate(self.faults):
            if fault["step"] != step:
                continue
            done = self.folder / f"done-{number}"
            if fault["kind"] == "hosts":  # others come or go: all wait until Horovod has seen it
                if not done.exists() and (fault["host"], fault.get("slot", 0)) == self.me:
                    new = self.folder / "hosts.new"
                    new.write_text("\n".join(fault["hosts"]) + "\n")
                    new.replace(self.folder / "hosts")
                    time.sleep(fault.get("seconds", 4.0))
                    done.touch()
                continue
            if done.exists() or (fault["host"], fault.get("slot", 0)) != self.me:
                continue
            done.touch()
            os.kill(
                os.getpid(),
                {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[fault["kind"]],
            )


class Log:
    """What this rank tells, a line per step."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / f"log-{os.getpid()}").open("a")
        self.attempt = 0.0

    def __call__(self, **values: object) -> None:
        self.file.write(json.dumps({**values, "attempt": self.attempt, "pid": os.getpid()}) + "\n")
        self.file.flush()


def torch_job(folder: Path, faults: Faults, log: Log) -> None:
    import torch

    import hvdloss.torch as hvd
    from hvdloss.data import Shuffled

    hvd.init()
    x, y = map(torch.from_numpy, table())
    model = torch.nn.Linear(FEATURES, 1, dtype=torch.float64)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    objective = hvd.Objective("mse")
    sgd = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), objective, check_every=2)
    rows = torch.utils.data.TensorDataset(x, y, torch.arange(ROWS))
    loader = hvd.ShardedLoader(rows, Shuffled(ROWS, seed=1), BATCH)
    state = hvd.elastic.TorchState(model, optimizer, data=loader, step=0)
    leaving = hvd.Preemption(optimizer)

    @hvd.elastic.run
    def train(state) -> None:
        log.attempt = hvd.broadcast_object(time.time(), 0)
        for epoch in loader.epochs(EPOCHS):
            for bx, by, ids in loader:
                optimizer.zero_grad()
                objective(model(bx), by).backward()
                faults.strike(state.step)
                optimizer.step()
                report = optimizer.last_step
                assert report.step == state.step + 1
                log(step=state.step, epoch=epoch, ids=ids.tolist(), size=hvd.size(), loss=report.loss)
                state.step += 1
                if leaving():
                    state.commit()
                    leaving.leave()  # only the rank that was told to; the others go on
                elif state.step % COMMIT == 0:
                    state.commit()

    train(state)
    if hvd.rank() == 0:
        np.savez(folder / "model.npz", w=model.weight.detach().numpy().T, b=model.bias.detach().numpy())
    hvd.shutdown()


def tape_job(folder: Path, faults: Faults, log: Log) -> None:
    import tensorflow as tf

    import hvdloss.keras
    import hvdloss.tensorflow as hvd
    from hvdloss.data import Shuffled

    hvd.init()
    x, y = table()
    w = tf.Variable(tf.zeros((FEATURES, 1), tf.float64))
    b = tf.Variable(tf.zeros(1, tf.float64))
    momenta = [tf.Variable(tf.zeros_like(v)) for v in (w, b)]
    objective = hvd.Objective("mse")

    @tf.function(reduce_retracing=True)
    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = objective(x @ w + b, y)
        return hvd.DistributedGradientTape(tape, objective).gradient(loss, [w, b])

    data = hvdloss.keras.ShardedDataset((x, y, np.arange(ROWS)), Shuffled(ROWS, seed=1), BATCH)
    state = hvd.elastic.TensorFlowState([w, b, *momenta], data=data, objective=objective, step=0)

    @hvd.elastic.run
    def train(state) -> None:
        log.attempt = hvd.broadcast_object(time.time(), 0)
        for epoch in data.epochs(EPOCHS):
            for bx, by, ids in data.batches():
                faults.strike(state.step)
                for v, m, g in zip((w, b), momenta, gradients(bx, by), strict=True):
                    m.assign(MOMENTUM * m + g)
                    v.assign_sub(RATE * m)
                report = objective.last_step
                assert report.step == state.step + 1
                log(step=state.step, epoch=epoch, ids=ids.tolist(), size=hvd.size(), loss=report.loss)
                state.step += 1
                if state.step % COMMIT == 0:
                    state.commit()

    train(state)
    if hvd.rank() == 0:
        np.savez(folder / "model.npz", w=w.numpy(), b=b.numpy())
    hvd.shutdown()


def fit_job(folder: Path, faults: Faults, log: Log) -> None:
    import keras

    import hvdloss.keras as hvd
    from hvdloss.data import Shuffled

    hvd.init()
    keras.backend.set_floatx("float64")
    x, y = table()
    model = keras.Sequential(
        [keras.Input((FEATURES,)), keras.layers.Dense(1, kernel_initializer="zeros", dtype="float64")]
    )
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE, MOMENTUM))
    model.compile(optimizer, hvd.Objective("mse"))
    data = hvd.ShardedDataset((x, y), Shuffled(ROWS, seed=1), BATCH)
    state = hvd.elastic.KerasState(model, data=data, step=0)

    class Tell(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            faults.strike(state.step)

        def on_train_batch_end(self, batch, logs=None):
            report = optimizer.last_step
            assert report.step == state.step + 1
            ids = data._batches[batch].tolist()
            log(step=state.step, epoch=data.epoch.number, ids=ids, size=hvd.size(), loss=report.loss)
            state.step += 1

    @hvd.elastic.run
    def train(state) -> None:
        log.attempt = hvd.broadcast_object(time.time(), 0)
        callbacks = [
            Tell(),
            hvd.elastic.CommitStateCallback(state, batches_per_commit=COMMIT),
        ]
        for _ in data.epochs(EPOCHS):
            model.fit(data, epochs=1, callbacks=callbacks, verbose=0)

    train(state)
    if hvd.rank() == 0:
        w, b = model.get_weights()
        np.savez(folder / "model.npz", w=w, b=b)
    hvd.shutdown()


def main() -> None:
    framework, folder = sys.argv[1], Path(sys.argv[2])
    faulthandler.register(signal.SIGUSR1, (folder / f"stack-{os.getpid()}").open("w"))  # for those who wait
    faults = Faults(folder, json.loads(sys.argv[3]))
    {"torch": torch_job, "tape": tape_job, "fit": fit_job}[framework](folder, faults, Log(folder))


if __name__ == "__main__":
    main()
