"""The record of real ranks in TensorFlow and Keras: what rank 0 writes is what all of them saw."""

from __future__ import annotations

import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdloss
import hvdloss.keras
import hvdloss.tensorflow as hvd
from hvdloss.errors import UsageError
from hvdloss.report import read
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-1")

RANKED = ("weight", "elements", "micro_batches", "communication", "computation", "skew")


def folder():
    made = tempfile.mkdtemp() if hvd.rank() == 0 else None
    return Path(hvd.broadcast_object(made, root_rank=0, name="folder"))


def check(path, reports):
    """On rank 0, the record's steps are these."""
    if hvd.rank() != 0:
        return None
    found = read(path)
    assert found.status == "finished"
    assert [line["step"] for line in found.steps] == [report.step for report in reports]
    for line, report in zip(found.steps, reports, strict=True):
        assert (line["loss"], line["objective_value"]) == (report.loss, report.objective_value)
        for name in RANKED:
            told = [getattr(one, name) for one in report.ranks]
            assert line["ranks"].get(name, [None] * len(told)) == told, name
    return found


def loop(objective, function):
    """Return a step on uneven ranks."""
    W = tf.Variable(tf.zeros((4, 3)))
    rng = np.random.default_rng(hvd.rank())

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = objective(x @ W, y)
        (gradient,) = hvd.DistributedGradientTape(tape, objective).gradient(loss, [W])
        W.assign_sub(0.1 * gradient)
        return gradient

    step = tf.function(step, reduce_retracing=True) if function else step

    def go(count):
        reports = []
        for _ in range(count):
            n = 3 + 2 * hvd.rank()
            step(tf.constant(rng.normal(size=(n, 4)), tf.float32), tf.constant(rng.integers(0, 3, n)))
            reports.append(objective.last_step)
        return reports

    return go


def case_a_tape_in_a_function_and_eagerly():
    for function in (True, False):
        path = folder() / "run.jsonl"
        terms = () if not function else (hvdloss.DataSkew(price=0.1, classes=3),)
        objective = hvd.Objective("cross_entropy", terms=terms)
        with hvd.Recorder(path, name="tape") as recorder:
            recorder.follow(objective)
            reports = loop(objective, function)(4)
        found = check(path, reports)
        if found is not None:
            assert (found.runs[0]["framework"], found.name) == ("tensorflow", "tape")
            assert bool(found.classes) == function


def case_what_was_traced_before_cannot_be_followed():
    objective = hvd.Objective("cross_entropy")
    go = loop(objective, True)
    go(1)
    if hvd.rank() == 0:
        with pytest.raises(UsageError, match="traced"):
            hvd.Recorder(Path(tempfile.mkdtemp()) / "x.jsonl").follow(objective)
    go(1)


def model():
    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    optimizer = hvdloss.keras.DistributedOptimizer(keras.optimizers.SGD(0.1))
    net.compile(optimizer, loss=hvdloss.keras.Objective("cross_entropy"))
    return net


class Reports(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self.model.optimizer.last_step)


def case_fit_and_fit_again():
    path, net, reports = folder(), model(), Reports()
    rng = np.random.default_rng(hvd.rank())
    n = 8 + 4 * hvd.rank()
    data = tf.data.Dataset.from_tensor_slices((rng.normal(size=(n, 4)).astype("f"), rng.integers(0, 3, n)))
    data = data.batch(n // 4)
    net.fit(data, epochs=1, verbose=0)  # traced while nobody follows
    callbacks = hvdloss.keras.callbacks
    record = callbacks.RecorderCallback(path / "run.jsonl", settings={"lr": 0.1})
    net.fit(data, epochs=2, verbose=0, callbacks=[callbacks.MetricAverageCallback(), record, reports])
    found = check(path / "run.jsonl", reports.seen)
    if found is not None:
        assert found.runs[0]["framework"] == "keras"
        assert [line["epoch"] for line in found.epochs] == [1, 2]
        assert "loss" in found.epochs[0]["metrics"]
        assert len(found.steps) == 8
    with pytest.raises(UsageError, match="ended with the fit before"):
        net.fit(data, epochs=1, verbose=0, callbacks=[record])
    net.fit(data, epochs=1, verbose=0)
    check(path / "run.jsonl", reports.seen)
