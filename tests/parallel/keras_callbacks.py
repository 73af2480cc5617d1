"""Callbacks, metrics, saving and loading under real ranks."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras_support import (
    before_case,
    data,
    dataset,
    difference,
    mine,
    network,
    same_on_all_ranks,
    sgd,
    step_batches,
)
from tf_support import cuts

import hvdloss.keras as hvd
from tests.ranks import needs

NEEDS = needs("gloo-2")

__all__ = ["before_case"]


def shared_folder() -> Path:
    """Return a folder that all ranks share."""
    return Path(hvd.broadcast_object(tempfile.mkdtemp(prefix="hvdloss-keras-"), root_rank=0))


def case_broadcast_of_initial_state():
    x, y, _ = data(np.random.default_rng(1), 12)
    keras.utils.set_random_seed(hvd.rank())
    i = keras.Input((5,))
    h = keras.layers.Dropout(0.1)(keras.layers.BatchNormalization()(keras.layers.Dense(3)(i)))
    model = keras.Model(i, keras.layers.Dense(1)(h))
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), loss="mse")
    first = np.array(model.get_weights()[0])
    model.fit(x, y, epochs=2, verbose=0, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    same_on_all_ranks([v.numpy() for v in model.trainable_variables])
    same_on_all_ranks([v.numpy() for v in model.optimizer.variables])
    assert (first != hvd.broadcast(first, 0, name="first")).any() or hvd.rank() == 0


def _classifier(loss):
    model = network(out=1)
    probability = keras.layers.Activation("sigmoid")(model.outputs[0])
    model = keras.Model(model.inputs, probability)
    metrics = [
        "accuracy",
        keras.metrics.AUC(name="auc"),
        keras.metrics.Precision(name="precision"),
        keras.metrics.F1Score(threshold=0.5, name="f1"),
    ]
    return model, {"loss": loss, "metrics": metrics, "weighted_metrics": ["mae"]}


@needs("gloo-2", more="gloo-3")
def case_metrics_are_those_of_one_process():
    rng = np.random.default_rng(2)
    x, y, w = data(rng, 60)
    y = (y > 0).astype("float64")
    where = cuts(rng, 60, hvd.size(), empty=False)
    mine_ = slice(where[hvd.rank()], where[hvd.rank() + 1])
    logs = {}
    for who in ("ranks", "one"):
        rows = mine_ if who == "ranks" else slice(None)
        loss = hvd.Objective("binary_cross_entropy")
        if who == "one":
            loss = keras.losses.BinaryCrossentropy(reduction="mean_with_sample_weight")
        model, options = _classifier(loss)
        optimizer = hvd.DistributedOptimizer(sgd()) if who == "ranks" else sgd()
        model.compile(optimizer, **options)
        average = [hvd.callbacks.MetricAverageCallback()] if who == "ranks" else []
        history = model.fit(
            x[rows], y[rows], sample_weight=w[rows, 0], batch_size=64, epochs=2, verbose=0, shuffle=False,
            validation_data=(x[rows] + 0.1, y[rows], w[rows, 0]), callbacks=average,
        )  # fmt: skip
        # The validation runs in batches of four, so that ranks cut it differently.
        evaluated = model.evaluate(
            x[rows], y[rows], sample_weight=w[rows, 0], batch_size=4 if who == "ranks" else 64,
            verbose=0, return_dict=True, callbacks=average,
        )  # fmt: skip
        logs[who] = history.history, evaluated
    worst = 0.0
    for name, values in logs["one"][0].items():
        if "loss" in name and "val" in name:
            continue  # one process divides by its samples there, see below
        worst = max(worst, difference([logs["ranks"][0][name]], [values]))
    for name, value in logs["one"][1].items():
        worst = max(worst, abs(logs["ranks"][1][name] - value))
    assert worst < 1e-6, (worst, logs)  # Keras keeps these metrics in float32
    assert difference([logs["ranks"][0]["val_loss"]], [logs["one"][0]["val_loss"]]) < 1e-6
    same_on_all_ranks([np.array(v) for v in logs["ranks"][0].values()])
    return {"metrics": worst}


def case_learning_rate_warmup():
    steps = step_batches(np.random.default_rng(3), 4)
    model = network()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.4, momentum=0.9)), loss="mse")
    rates = []

    class Rates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            rates.append(float(self.model.optimizer.learning_rate.numpy()))

    warmup = hvd.callbacks.LearningRateWarmupCallback(0.4, warmup_epochs=2)
    later = hvd.callbacks.LearningRateScheduleCallback(0.4, 0.5, start_epoch=2)
    history = model.fit(dataset(mine(steps)), epochs=4, verbose=0, callbacks=[warmup, later, Rates()])
    size = hvd.size()
    expected = [0.4 / size * ((i + 1) / 4 * (size - 1) / 2 + 1) for i in range(8)] + [0.4] * 4 + [0.2] * 4
    assert np.allclose(rates, expected, rtol=1e-6), rates
    assert np.allclose(history.history["lr"][-2:], [0.4, 0.2])


def case_best_model_is_written_by_one_rank():
    rng = np.random.default_rng(4)
    steps = step_batches(rng, 3)
    folder = shared_folder()
    model = network()
    model.compile(hvd.DistributedOptimizer(sgd()), loss="mse")
    best = hvd.callbacks.BestModelCheckpoint(monitor="loss", filepath=folder / f"best-{hvd.rank()}.keras")
    model.fit(dataset(mine(steps)), verbose=0, callbacks=[hvd.callbacks.MetricAverageCallback(), best])
    hvd.allreduce(np.zeros(1), name="written")
    assert sorted(p.name for p in folder.iterdir()) == ["best-0.keras"]


def case_early_stopping_on_one_rank_stops_all():
    steps = step_batches(np.random.default_rng(5), 2)
    model = network()
    model.compile(hvd.DistributedOptimizer(sgd()), loss="mse")

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1 and hvd.rank() == hvd.size() - 1:
                self.model.stop_training = True

    history = model.fit(dataset(mine(steps)), epochs=6, verbose=0, callbacks=[Stop()])
    assert len(history.history["loss"]) == 2

    class StopAtOnce(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if hvd.rank() == 0:
                self.model.stop_training = True

    history = model.fit(dataset(mine(steps)), epochs=6, verbose=0, callbacks=[StopAtOnce()])
    assert len(history.history["loss"]) == 1
    same_on_all_ranks(model.get_weights())


PLAIN = """
import sys, keras, numpy as np
keras.config.set_floatx("float64")
assert not any(name.startswith(("hvdloss", "horovod")) for name in sys.modules)
model = keras.models.load_model(sys.argv[1])
assert type(model.optimizer).__module__.startswith("keras."), type(model.optimizer)
assert int(model.optimizer.iterations) == 6
before = model.get_weights()[0].copy()
model.fit(np.ones((4, 5)), np.ones((4, 1)), verbose=0)
assert (before != model.get_weights()[0]).any()
assert not any(name.startswith(("hvdloss", "horovod")) for name in sys.modules)
"""


@needs(more="gloo-2")
def case_saved_models_load_without_the_library_and_train_on():
    steps = step_batches(np.random.default_rng(6), 3)
    folder = shared_folder()
    for number, loss in enumerate(("mse", hvd.Objective("mse"))):
        model = network()
        model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.02)), loss=loss, metrics=["mae"])
        model.fit(dataset(mine(steps)), epochs=2, verbose=0)
        path = folder / f"model-{number}.keras"
        if hvd.rank() == 0:
            model.save(path)
            run = subprocess.run([sys.executable, "-c", PLAIN, str(path)], capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
        hvd.allreduce(np.zeros(1), name="saved")
        # It trains on, as if it had not been saved.
        loaded = hvd.load_model(path)
        for one in (model, loaded):
            one.fit(dataset(mine(steps)), epochs=1, verbose=0)
        assert difference(loaded.get_weights(), model.get_weights()) < 1e-10
        same_on_all_ranks(loaded.get_weights())


def case_horovods_functions_on_values():
    rank, size = hvd.rank(), hvd.size()
    assert hvd.allreduce([float(rank)], name="a")[0] == (size - 1) / 2
    assert hvd.allreduce([float(rank)], name="s", op=hvd.Sum)[0] == size * (size - 1) / 2
    assert hvd.allgather([rank], name="g").tolist() == list(range(size))
    assert hvd.broadcast([float(rank)], 0, name="b")[0] == 0.0
    v = tf.Variable(float(rank))
    hvd.callbacks.broadcast_variables([v], 0)
    assert float(v) == 0.0
