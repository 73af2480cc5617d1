"""A linear model, W x + b, on uneven ranks with sample weights, in plain TensorFlow.

Data: scikit-learn's diabetes, 442 patients, the progression of their disease after a year. The ranks hold
different numbers of patients, the smallest shard the most severe cases; the weights give every age group
the same say. Two variables, a ``tf.GradientTape`` and a ``tf.function``. Trains with hvdloss, with
Horovod's plain averaging, and in one process, and compares.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

import hvdloss.tensorflow as hvd
from _common import (
    EXACT,
    ONE,
    PLAIN,
    Progress,
    RankRow,
    Shards,
    Watch,
    conclude,
    options,
    outcome,
    recorder,
    split,
    told_by_all,
)
from hvdloss.tensorflow.ops import communicator_of

RATE = 0.1


def train(job: Job, W: tf.Variable, b: tf.Variable, watch: Watch) -> None:
    """Train on this rank's samples. But for `watch`, this is all one has to write."""
    hvd.broadcast_variables([W, b], root_rank=0)
    objective = hvd.Objective("mse")
    record = recorder(hvd, job.args).follow(objective)

    @tf.function(reduce_retracing=True)
    def step(x: tf.Tensor, y: tf.Tensor, weight: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = objective(x @ W + b, y, weight)
        tape = hvd.DistributedGradientTape(tape, objective)
        gradients = tape.gradient(loss, [W, b])
        for variable, gradient in zip([W, b], gradients, strict=True):
            variable.assign_sub(RATE * gradient)
        return gradients

    for epoch in range(job.args.epochs):
        for x, y, weight in job.batches(epoch):  # this rank's own, of any length
            watch.used = step(x, y, weight)
            watch(objective.last_step)  # its .loss is that of all ranks' samples
    record.close()


def train_plainly(job: Job, W: tf.Variable, b: tf.Variable, watch: Watch) -> None:
    """Train as with Horovod alone: local means, and gradients averaged over ranks."""
    for epoch in range(job.args.epochs):
        for samples in job.batches(epoch):
            with tf.GradientTape() as tape:
                loss = mean_squared_error(samples, W, b)
            tape = hvd.DistributedGradientTape(tape)  # without an objective this is Horovod's
            watch.used = descend(tape, loss, W, b)
            watch(loss)


def train_alone(job: Job, W: tf.Variable, b: tf.Variable, watch: Watch) -> None:
    """Train in this process alone, on all ranks' samples of each step."""
    for epoch in range(job.args.epochs):
        for step in range(job.shards.steps):
            with tf.GradientTape() as tape:
                loss = mean_squared_error(job.samples(job.shards.union(epoch, step)), W, b)
            watch.used = descend(tape, loss, W, b)
            watch(loss)


def descend(tape: tf.GradientTape, loss: tf.Tensor, W: tf.Variable, b: tf.Variable) -> list[tf.Tensor]:
    gradients = tape.gradient(loss, [W, b])
    for variable, gradient in zip([W, b], gradients, strict=True):
        variable.assign_sub(RATE * gradient)
    return gradients


def mean_squared_error(samples: Any, W: Any, b: Any) -> tf.Tensor:
    x, y, weight = samples
    return tf.math.divide_no_nan(tf.reduce_sum(weight * (x @ W + b - y) ** 2), tf.reduce_sum(weight))


@dataclass
class Job:
    """The data, of which each rank takes its shard, and how to measure."""

    args: argparse.Namespace
    data: tuple[np.ndarray, np.ndarray, np.ndarray]
    shards: Shards
    held_out: np.ndarray
    unit: float

    def samples(self, index: np.ndarray) -> tuple[tf.Tensor, ...]:
        return tuple(tf.constant(a[index]) for a in self.data)

    def batches(self, epoch: int) -> Iterator[tuple[tf.Tensor, ...]]:
        for step in range(self.shards.steps):
            yield self.samples(self.shards.batch(hvd.rank(), epoch, step))

    def start(self) -> tuple[tf.Variable, tf.Variable]:
        dtype = self.data[0].dtype
        return tf.Variable(np.zeros((10, 1), dtype)), tf.Variable(np.zeros(1, dtype))


def make_job(args: argparse.Namespace) -> Job:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    training, held_out = split(len(y), args.seed)
    age_group = np.digitize(x[:, 0], [40, 60])  # below 40, 40 to 59, 60 and older
    weight = 1 / np.bincount(age_group[training])[age_group]
    weight /= weight[training].mean()
    order = training[np.argsort(y[training])]
    unit = y[training].std()
    x = (x - x[training].mean(axis=0)) / x[training].std(axis=0)
    y = (y - y[training].mean()) / unit
    data = tuple(a.astype(args.dtype) for a in (x, y[:, None], weight[:, None]))
    shards = Shards(order, args.shares, hvd.size(), args.batch, args.seed)
    return Job(args, data, shards, held_out, unit)


def flat(tensors: Any) -> np.ndarray:
    return np.concatenate([np.asarray(t).ravel() for t in tensors])


def compare(job: Job) -> int:
    """Train in three ways from the same start, hold each step against one process, and report."""
    args, shards, first = job.args, job.shards, hvd.rank() == 0
    watches: dict[str, Watch] = {}
    ways: list[tuple[str, Callable[..., None]]] = [(EXACT, train), (PLAIN, train_plainly)]
    total = 3 * args.epochs * shards.steps
    with Progress(total, show=first and not args.quiet and not args.json) as progress:
        for name, way in [*ways, (ONE, train_alone)] if first else ways:
            W, b = job.start()
            watch = Watch(
                name, lambda v=(W, b): flat(v), lambda n=name: flat(watches[n].used), progress, keep=first
            )
            watches[name] = watch
            way(job, W, b, watch)
    everyone = told_by_all(
        communicator_of(hvd.global_process_set), (watches[EXACT].seconds, watches[PLAIN].losses)
    )
    status = 0
    if first:
        watches[PLAIN].losses = list(np.mean([losses for _, losses in everyone], axis=0))

        def at(parameters: np.ndarray) -> tuple[tf.Variable, tf.Variable]:
            W, b = job.start()
            W.assign(parameters[:-1, None])
            b.assign(parameters[-1:])
            return W, b

        def oracle(parameters: np.ndarray, index: np.ndarray) -> tuple[float, np.ndarray]:
            W, b = at(parameters)
            with tf.GradientTape() as tape:
                loss = mean_squared_error(job.samples(index), W, b)
            return float(loss), flat(tape.gradient(loss, [W, b]))

        def training_loss(parameters: np.ndarray) -> float:
            return oracle(parameters, np.concatenate(shards.shards))[0]

        def test(parameters: np.ndarray) -> dict[str, float]:
            return {"RMSE (points)": oracle(parameters, job.held_out)[0] ** 0.5 * job.unit}

        one = watches[ONE]
        outcomes = [
            outcome(watches[name], one, shards, oracle, training_loss, test) for name in (ONE, EXACT, PLAIN)
        ]
        outcomes[0].loss_error = outcomes[0].gradient_error = outcomes[0].parameter_error = None
        outcomes[0].gradient_errors = []
        ranks = [
            RankRow(r, len(shard), float(job.data[2][shard].sum()), float(np.median(seconds)) * 1e3)
            for r, (shard, (seconds, _)) in enumerate(zip(shards.shards, everyone, strict=True))
        ]
        status = conclude(
            args,
            f"Linear model of diabetes on {hvd.size()} rank(s), TensorFlow",
            outcomes,
            ranks,
            remark="The smallest shard holds the most severe cases: averaged means overrate them.",
        )
    return int(told_by_all(communicator_of(hvd.global_process_set), status)[0])


def main() -> int:
    args = options("tensorflow_linear", __doc__.splitlines()[0], epochs=30, batch=96).parse_args()
    hvd.init()
    return compare(make_job(args))


if __name__ == "__main__":
    sys.exit(main())
