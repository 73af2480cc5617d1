"""Classification with sample weights on uneven ranks by Keras's compile and fit.

Data: scikit-learn's digits, 1797 images of 8 x 8 pixels. The ranks hold different numbers of images, the
largest shard most of the 8s and 9s; errors on these count five times. Trains with hvdloss, with Horovod's
plain averaging, with Horovod's own wrapper for Keras (which under Keras 3 does not reduce gradients, so that
every rank trains alone), and in one process, and compares.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import hvdloss.keras as hvd
from _common import (
    EXACT,
    ONE,
    PLAIN,
    Outcome,
    Progress,
    RankRow,
    Shards,
    Watch,
    conclude,
    options,
    recorder,
    relative,
    split,
    told_by_all,
)
from hvdloss.tensorflow.ops import communicator_of

WRAPPER = "Horovod's wrapper"
RATE = 0.2


def train(job: Job, model: keras.Model, watch: keras.callbacks.Callback) -> None:
    """Train on this rank's samples. But for `watch`, this is all one has to write."""
    optimizer = hvd.DistributedOptimizer(make_optimizer())
    model.compile(optimizer, loss=hvd.Objective("cross_entropy"), weighted_metrics=["accuracy"])
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.FollowCallback(recorder(hvd, job.args)),
    ]
    job.fit(model, job.batches(hvd.rank()), [*callbacks, watch])


def train_plainly(job: Job, model: keras.Model, watch: keras.callbacks.Callback) -> None:
    """Train as Horovod means to: local means, and gradients averaged over ranks."""
    optimizer = hvd.DistributedOptimizer(
        make_optimizer()
    )  # no objective, nothing compiled: ranks weigh the same
    loss_of = local_mean()
    watch.set_model(model)
    for _ in range(job.args.epochs * job.shards.steps):
        x, y, weight = next(job.running(hvd.rank()))
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x), weight)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        watch.on_train_batch_end(0, {"loss": float(loss)})


def train_with_the_wrapper(job: Job, model: keras.Model, watch: keras.callbacks.Callback) -> None:
    """Train with Horovod's own DistributedOptimizer for Keras."""
    import horovod.tensorflow.keras as horovod

    model.compile(horovod.DistributedOptimizer(make_optimizer()), loss=local_mean())
    job.fit(model, job.batches(hvd.rank()), [watch])


def train_alone(job: Job, model: keras.Model, watch: keras.callbacks.Callback) -> None:
    """Train in this process alone, on all ranks' samples of each step."""
    model.compile(make_optimizer(), loss=local_mean())
    job.fit(model, job.batches(None), [watch])


def make_model(dtype: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    keras.config.set_floatx(dtype)
    return keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(10)]
    )


def make_optimizer() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(RATE)


def local_mean() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")


class Notes(keras.callbacks.Callback):
    """Hands every step's loss to a Watch."""

    def __init__(self, watch: Watch, progress_loss: Callable[[keras.Model, dict], object]) -> None:
        super().__init__()
        self.watch, self.loss = watch, progress_loss

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.watch(self.loss(self.model, logs or {}))


@dataclass
class Job:
    """The data, of which each rank takes its shard, and how to measure."""

    args: argparse.Namespace
    data: tuple[np.ndarray, np.ndarray, np.ndarray]
    shards: Shards
    held_out: np.ndarray

    def samples(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(a[index] for a in self.data)

    def batches(self, rank: int | None) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield what a rank brings to each step, or all of them; epoch after epoch."""
        for epoch in range(self.args.epochs):
            for step in range(self.shards.steps):
                index = self.shards.union(epoch, step)
                yield self.samples(index if rank is None else self.shards.batch(rank, epoch, step))

    def running(self, rank: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Return one iterator of :meth:`batches` that goes on from call to call."""
        if not hasattr(self, "_running"):
            self._running = self.batches(rank)
        return self._running

    def fit(self, model: keras.Model, batches: Iterator, callbacks: list) -> None:
        model.fit(
            batches,
            steps_per_epoch=self.shards.steps,
            epochs=self.args.epochs,
            verbose=0,
            shuffle=False,  # the batches are one generator's, shuffled already
            callbacks=callbacks,
        )

    def loss(self, model: keras.Model, index: np.ndarray) -> float:
        x, y, weight = self.samples(index)
        return float(local_mean()(y, model(x), weight))


def make_job(args: argparse.Namespace) -> Job:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    training, held_out = split(len(y), args.seed)
    weight = np.where(y >= 8, 5.0, 1.0)
    mixed = -y + np.random.default_rng(args.seed).uniform(0, 2, len(y))
    order = training[np.argsort(mixed[training])]
    data = (x / 16).astype(args.dtype), y, weight.astype(args.dtype)
    return Job(args, data, Shards(order, args.shares, hvd.size(), args.batch, args.seed), held_out)


def flat(model: keras.Model) -> np.ndarray:
    return np.concatenate([w.ravel() for w in model.get_weights()]).astype(np.float64)


def put(model: keras.Model, parameters: np.ndarray) -> None:
    start, weights = 0, []
    for w in model.get_weights():
        weights.append(parameters[start : start + w.size].reshape(w.shape))
        start += w.size
    model.set_weights(weights)


def compare(job: Job) -> int:
    """Train in four ways from the same start, hold each step against one process, and report."""
    args, shards, first = job.args, job.shards, hvd.rank() == 0
    ways: dict[str, Callable[..., None]] = {EXACT: train, PLAIN: train_plainly}
    if hvd.mpi_built() or hvd.gloo_built():
        ways[WRAPPER] = train_with_the_wrapper
    if first:
        ways[ONE] = train_alone
    watches, apart, seconds = {}, {}, []
    total = 4 * args.epochs * shards.steps
    with Progress(total, show=first and not args.quiet and not args.json) as progress:
        for name, way in ways.items():
            model = make_model(args.dtype)
            watch = Watch(name, lambda m=model: flat(m), lambda: np.zeros(1), progress, keep=first)

            def loss(model: keras.Model, logs: dict, exact: bool = name == EXACT) -> object:
                return model.optimizer.last_step if exact else logs["loss"]

            way(job, model, Notes(watch, loss))
            watches[name] = watch
            if name != ONE:
                mine = flat(model)
                apart[name] = float(np.abs(hvd.allgather(mine[None], name=f"apart.{name[:2]}") - mine).max())
            if name == EXACT:
                seconds = hvd.allgather([[float(np.median(watch.seconds))]], name="seconds").ravel()
    status = 0
    if first:
        model = make_model(args.dtype)
        everything = np.concatenate(shards.shards)

        def judged(name: str) -> Outcome:
            watch, curve = watches[name], []
            for parameters in watch.parameters[:: shards.steps]:
                put(model, parameters)
                curve.append(job.loss(model, everything))
            x, y, _ = job.samples(job.held_out)
            right = np.asarray(model(x)).argmax(1) == y
            test = {"loss (nats)": job.loss(model, job.held_out), "accuracy": float(right.mean())}
            found = Outcome(name, curve, test=test)
            if name != ONE:
                found.parameter_error = relative(watch.parameters[-1], watches[ONE].parameters[-1])
            if name == EXACT:
                errors = []
                for i, loss in enumerate(watch.losses):
                    put(model, watch.parameters[i])
                    errors.append(relative(loss, job.loss(model, shards.union(*divmod(i, shards.steps)))))
                found.loss_error = max(errors)
            return found

        outcomes = [judged(name) for name in (ONE, EXACT, PLAIN, WRAPPER) if name in watches]
        ranks = [
            RankRow(r, len(shard), float(job.data[2][shard].sum()), float(s) * 1e3)
            for r, (shard, s) in enumerate(zip(shards.shards, seconds, strict=True))
        ]
        differences = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
        status = conclude(
            args,
            f"Digits on {hvd.size()} rank(s), Keras",
            outcomes,
            ranks,
            remark=f"Largest difference between the ranks' weights after training: {differences}.",
            loss_unit="nats",
        )
        if apart[EXACT] != 0:
            print(f"error: the ranks' weights differ by {apart[EXACT]:.1e} after hvdloss", file=sys.stderr)
            status = 1
    return int(told_by_all(communicator_of(hvd.global_process_set), status)[0])


def main() -> int:
    args = options("keras_digits", __doc__.splitlines()[0], epochs=8, batch=192).parse_args()
    hvd.init()
    return compare(make_job(args))


if __name__ == "__main__":
    sys.exit(main())
