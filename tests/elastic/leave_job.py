"""A rank that trains, answers SIGTERM, and goes on from a checkpoint; it tells what every step used and gave.

Started by tests/elastic/test_preemption_jobs.py; not a test by itself.

    leave_job.py FRAMEWORK FOLDER SECONDS    (per step)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from job import BATCH, EPOCHS, FEATURES, MOMENTUM, RATE, ROWS, Log, table


def torch_job(folder: Path, seconds: float, log: Log) -> None:
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
    optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), objective)
    rows = torch.utils.data.TensorDataset(x, y, torch.arange(ROWS))
    loader = hvd.ShardedLoader(rows, Shuffled(ROWS, seed=1), BATCH)
    checkpoint = hvd.Checkpoint(folder / "checkpoints", model=model, optimizer=optimizer, data=loader)
    before = checkpoint.load()
    step = before.step if before else 0
    leaving = hvd.Preemption(optimizer)
    for epoch in loader.epochs(EPOCHS):
        for bx, by, ids in loader:
            optimizer.zero_grad()
            objective(model(bx), by).backward()
            time.sleep(seconds)
            optimizer.step()
            report = optimizer.last_step
            assert report.step == step + 1
            log(step=step, epoch=epoch, ids=ids.tolist(), size=hvd.size(), loss=report.loss)
            step += 1
            if leaving():
                checkpoint.save(step)
                log(left=step, ranks=leaving.ranks)
                leaving.leave()
    if hvd.rank() == 0:
        np.savez(folder / "model.npz", w=model.weight.detach().numpy().T, b=model.bias.detach().numpy())


def tape_job(folder: Path, seconds: float, log: Log) -> None:
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
    checkpoint = hvd.Checkpoint(
        folder / "checkpoints", variables=[w, b, *momenta], objective=objective, data=data
    )
    before = checkpoint.load()
    step = before.step if before else 0
    leaving = hvd.Preemption(objective)
    for epoch in data.epochs(EPOCHS):
        for bx, by, ids in data.batches():
            time.sleep(seconds)
            for v, m, g in zip((w, b), momenta, gradients(bx, by), strict=True):
                m.assign(MOMENTUM * m + g)
                v.assign_sub(RATE * m)
            report = objective.last_step
            assert report.step == step + 1
            log(step=step, epoch=epoch, ids=ids.tolist(), size=hvd.size(), loss=report.loss)
            step += 1
            if leaving():
                checkpoint.save(step)
                log(left=step, ranks=leaving.ranks)
                leaving.leave()
    if hvd.rank() == 0:
        np.savez(folder / "model.npz", w=w.numpy(), b=b.numpy())


def fit_job(folder: Path, seconds: float, log: Log) -> None:
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
    optimizer.build(model.trainable_variables)
    data = hvd.ShardedDataset((x, y), Shuffled(ROWS, seed=1), BATCH)
    checkpoint = hvd.Checkpoint(folder / "checkpoints", model=model, optimizer=optimizer, data=data)
    checkpoint.load()

    class Tell(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(seconds)
            report = optimizer.last_step
            step = int(optimizer.iterations)
            assert report.step == step
            ids = data._batches[batch].tolist()
            log(step=step - 1, epoch=data.epoch.number, ids=ids, size=hvd.size(), loss=report.loss)

    def save() -> None:
        step = int(optimizer.iterations)
        checkpoint.save(step)
        log(left=step, ranks=leave.leaving.ranks)

    leave = hvd.callbacks.PreemptionCallback(checkpoint=save)
    for _ in data.epochs(EPOCHS):
        model.fit(data, epochs=1, callbacks=[Tell(), leave], verbose=0)
    if hvd.rank() == 0:
        w, b = model.get_weights()
        np.savez(folder / "model.npz", w=w, b=b)


def main() -> None:
    framework, folder, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    log = Log(folder)
    log.attempt = float(len(list(folder.glob("round-*"))))
    {"torch": torch_job, "tape": tape_job, "fit": fit_job}[framework](folder, seconds, log)


if __name__ == "__main__":
    main()
