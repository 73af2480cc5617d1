"""A rank of an elastic job that is recorded while ranks are killed; it tells what every step used and gave.

Started by tests/elastic/test_record_jobs.py; not a test by itself.

    record_job.py FRAMEWORK FOLDER KILLS RANK

FRAMEWORK is torch, tape or fit. KILLS is JSON: a list of [step, rank]: which rank is killed in which step,
before its update. RANK is the one that writes the record.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from job import Log
from sklearn.datasets import load_digits

from hvdloss.data import Shuffled

ROWS, BATCH, EPOCHS, COMMIT, RATE = 331, 6, 2, 4, 0.1


def table() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return x[:ROWS] / 16, y[:ROWS]


def killer(folder: Path, kills: list[list[int]]) -> Callable[[int, int], None]:
    """Return what kills this rank if it is its turn, once each."""

    def strike(step: int, rank: int) -> None:
        for number, kill in enumerate(kills):
            done = folder / f"done-{number}"
            if kill == [step, rank] and not done.exists():
                done.touch()
                time.sleep(0.5)  # what was recorded until now is in the file
                os.kill(os.getpid(), signal.SIGKILL)

    return strike


def torch_job(path: Path, rank: int, strike: Callable[[int, int], None], log: Log) -> None:
    import torch

    import hvdloss.torch as hvd

    torch.set_num_threads(1)
    hvd.init()
    x, y = map(torch.from_numpy, table())
    model = torch.nn.Linear(64, 10, dtype=torch.float64)
    objective = hvd.Objective("cross_entropy")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=RATE), model.named_parameters(), objective
    )
    rows = torch.utils.data.TensorDataset(x, y, torch.arange(ROWS))
    loader = hvd.ShardedLoader(rows, Shuffled(ROWS, seed=1), BATCH)
    state = hvd.elastic.TorchState(model, optimizer, data=loader, step=0)

    with hvd.Recorder(path, exists="append", rank=rank) as recorder:
        recorder.follow(optimizer)

        @hvd.elastic.run
        def train(state) -> None:
            log.attempt = hvd.broadcast_object(time.time(), 0)
            for epoch in loader.epochs(EPOCHS):
                for bx, by, ids in loader:
                    optimizer.zero_grad()
                    objective(model(bx), by).backward()
                    strike(state.step, hvd.rank())
                    optimizer.step()
                    report = optimizer.last_step
                    log(step=report.step, ids=ids.tolist(), size=hvd.size(), loss=report.loss)
                    state.step += 1
                    time.sleep(0.02)
                    if state.step % COMMIT == 0:
                        state.commit()
                recorder.epoch(epoch + 1, loss=report.loss)

        train(state)
    hvd.shutdown()


def tape_job(path: Path, rank: int, strike: Callable[[int, int], None], log: Log) -> None:
    import tensorflow as tf

    import hvdloss.keras
    import hvdloss.tensorflow as hvd

    hvd.init()
    x, y = table()
    w, b = tf.Variable(tf.zeros((64, 10), tf.float64)), tf.Variable(tf.zeros(10, tf.float64))
    objective = hvd.Objective("cross_entropy")

    @tf.function(reduce_retracing=True, autograph=False)
    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = objective(x @ w + b, y)
        return hvd.DistributedGradientTape(tape, objective).gradient(loss, [w, b])

    data = hvdloss.keras.ShardedDataset((x, y, np.arange(ROWS)), Shuffled(ROWS, seed=1), BATCH)
    state = hvd.elastic.TensorFlowState([w, b], data=data, objective=objective, step=0)

    with hvd.Recorder(path, exists="append", rank=rank) as recorder:
        recorder.follow(objective)

        @hvd.elastic.run
        def train(state) -> None:
            log.attempt = hvd.broadcast_object(time.time(), 0)
            for epoch in data.epochs(EPOCHS):
                for bx, by, ids in data.batches():
                    strike(state.step, hvd.rank())
                    for v, g in zip((w, b), gradients(bx, by), strict=True):
                        v.assign_sub(RATE * g)
                    report = objective.last_step
                    log(step=report.step, ids=ids.tolist(), size=hvd.size(), loss=report.loss)
                    state.step += 1
                    if state.step % COMMIT == 0:
                        state.commit()
                recorder.epoch(epoch + 1, loss=report.loss)

        train(state)
    hvd.shutdown()


def fit_job(path: Path, rank: int, strike: Callable[[int, int], None], log: Log) -> None:
    import keras

    import hvdloss.keras as hvd

    hvd.init()
    keras.backend.set_floatx("float64")
    layer = keras.layers.Dense(10, kernel_initializer="zeros", dtype="float64")
    model = keras.Sequential([keras.Input((64,)), layer])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE))
    model.compile(optimizer, hvd.Objective("cross_entropy"))
    data = hvd.ShardedDataset(table(), Shuffled(ROWS, seed=1), BATCH)
    state = hvd.elastic.KerasState(model, data=data, step=0)

    class Tell(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            strike(state.step, hvd.rank())

        def on_train_batch_end(self, batch, logs=None):
            report = optimizer.last_step
            ids = data._batches[batch].tolist()
            log(step=report.step, ids=ids, size=hvd.size(), loss=report.loss)
            state.step += 1

    with hvd.Recorder(path, exists="append", rank=rank) as recorder:
        recorder.follow(optimizer)

        @hvd.elastic.run
        def train(state) -> None:
            log.attempt = hvd.broadcast_object(time.time(), 0)
            callbacks = [Tell(), hvd.elastic.CommitStateCallback(state, batches_per_commit=COMMIT)]
            for epoch in data.epochs(EPOCHS):
                model.fit(data, epochs=1, callbacks=callbacks, verbose=0)
                recorder.epoch(epoch + 1, loss=optimizer.last_step.loss)

        train(state)
    hvd.shutdown()


def main() -> None:
    framework, folder, kills, rank = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
    faulthandler.register(signal.SIGUSR1, (folder / f"stack-{os.getpid()}").open("w"))
    job = {"torch": torch_job, "tape": tape_job, "fit": fit_job}[framework]
    job(folder / "record.jsonl", rank, killer(folder, kills), Log(folder))


if __name__ == "__main__":
    main()
