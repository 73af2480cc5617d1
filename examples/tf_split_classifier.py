"""A classifier whose last layer is split over ranks by class, two by two ranks, with Keras layers.

Data: scikit-learn's digits, 1797 images of 8 x 8 pixels. Of four ranks, 0 and 1 share one model, and 2 and 3
another with other images. All ranks hold the feature layers; of the last layer each holds half of the
classes, computes its five columns of the logits, and tells the other rank of its pair three numbers per
image. The pairs hold different numbers of images; errors on 8s and 9s count five times. Trains with
hvdloss, with Horovod's plain averaging between the pairs, and in one process with an ordinary last layer;
compares, and saves an ordinary checkpoint. Two ranks share one model; on an odd number each holds a whole
one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import hvdloss.keras as khvd
import hvdloss.tensorflow as hvd
from _common import (
    EXACT,
    ONE,
    PLAIN,
    Outcome,
    Progress,
    RankRow,
    Shards,
    Watch,
    at_least,
    conclude,
    options,
    outcome,
    recorder,
    split,
    told_by_all,
)
from hvdloss.tensorflow.ops import communicator_of

Samples = tuple[np.ndarray, np.ndarray, np.ndarray]  # inputs, targets, weights


@dataclass
class Job:
    """The data, of which each pair of ranks takes its shard, and who shares what."""

    args: argparse.Namespace
    data: Samples
    shards: Shards
    held_out: np.ndarray
    groups: hvd.Grid

    def samples(self, index: np.ndarray) -> Samples:
        x, y, weight = self.data
        return x[index], y[index], weight[index]

    def batches(self, everyone: bool = False) -> Iterator[Samples]:
        """Yield what this rank (or all of them) brings to each step, epoch after epoch."""
        for epoch in range(self.args.epochs):
            for step in range(self.shards.steps):
                rank = self.groups.data.rank()
                index = self.shards.union(epoch, step) if everyone else self.shards.batch(rank, epoch, step)
                yield self.samples(index)


def make_model(args: argparse.Namespace, groups: hvd.Grid | None = None) -> keras.Model:
    """Return the ordinary model, or this rank's part of it; the same seed gives both the same weights."""
    keras.utils.set_random_seed(args.seed)
    keras.config.set_floatx(args.dtype)
    head = keras.layers.Dense(10) if groups is None else khvd.ShardedDense(10, process_set=groups.model)
    return keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, activation="relu"), head])


@dataclass
class Step:
    """One step of training, traced once for any number of samples; `gradients` are those of the last."""

    model: keras.Model
    loss: Callable[..., tf.Tensor]  # of logits, targets and weights
    taped: Callable[[tf.GradientTape], tf.GradientTape] = lambda tape: tape
    gradients: list[tf.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        model, optimizer = self.model, keras.optimizers.SGD(0.1, momentum=0.9)
        optimizer.build(model.trainable_variables)
        dtype = keras.config.floatx()
        signature = [tf.TensorSpec([None, 64], dtype), tf.TensorSpec([None], tf.int64)]

        @tf.function(input_signature=[*signature, tf.TensorSpec([None], dtype)])
        def step(x: tf.Tensor, y: tf.Tensor, weight: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
            with tf.GradientTape() as tape:
                loss = self.loss(model(x), y, weight)
            gradients = self.taped(tape).gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
            return loss, gradients

        self._step = step

    def __call__(self, *batch: np.ndarray) -> float:
        loss, self.gradients = self._step(*batch)
        return float(loss)


def train(job: Job, step: Callable[..., Step], watch: Callable[..., Any]) -> None:
    """Train on this rank's samples. But for `watch`, this is all one has to write."""
    model = make_model(job.args, job.groups)
    head = model.layers[-1]
    loss = hvd.ShardedCrossEntropy(head.shards, process_set=job.groups.model)
    objective = hvd.Objective(loss, process_set=job.groups.data)  # ranks that hold the same part of the model
    one_step = step(model, objective, lambda tape: hvd.DistributedGradientTape(tape, objective))
    record = recorder(hvd, job.args).follow(objective)
    for batch in job.batches():
        one_step(*batch)
        watch(objective.last_step)
    record.close()


def train_plainly(job: Job, step: Callable[..., Step], watch: Callable[..., Any]) -> None:
    """Train with local means, and Horovod's average over the ranks that hold the same part."""
    model = make_model(job.args, job.groups)
    shards, group = model.layers[-1].shards, job.groups.model

    def loss(logits: tf.Tensor, y: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        return weighted_mean(hvd.sharded_cross_entropy(logits, y, shards, process_set=group), weight)

    def taped(tape: tf.GradientTape) -> tf.GradientTape:
        return hvd.DistributedGradientTape(tape, process_set=job.groups.data)

    one_step = step(model, loss, taped)
    for batch in job.batches():
        watch(one_step(*batch))


def train_alone(job: Job, step: Callable[..., Step], watch: Callable[..., Any]) -> None:
    """Train in this process alone, on all ranks' samples of each step."""
    one_step = step(make_model(job.args), plain_loss)
    for batch in job.batches(everyone=True):
        watch(one_step(*batch))


def plain_loss(logits: tf.Tensor, y: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    return weighted_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits), weight)


def weighted_mean(losses: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    return tf.math.divide_no_nan(tf.reduce_sum(losses * weight), tf.reduce_sum(weight))


def flat(arrays: Any) -> np.ndarray:
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays])


def watched(job: Job, name: str, way: Callable[..., None], progress: Progress) -> tuple[Watch, keras.Model]:
    """Train one way; return what was seen of it, as of an ordinary model, and the model."""
    made: list[Step] = []
    seen: list[Watch] = []

    def whole(gradients: bool) -> np.ndarray:
        step = made[0]
        if not gradients:
            return flat(khvd.full_weights(step.model, everywhere=True) or [])
        *features, kernel, bias = [tf.convert_to_tensor(g) for g in step.gradients]
        if name != ONE and job.groups.model.size() > 1:
            group = job.groups.model
            kernel = tf.transpose(hvd.allgather(tf.transpose(kernel), name="whole.kernel", process_set=group))
            bias = hvd.allgather(bias, name="whole.bias", process_set=group)
        return flat([*features, kernel, bias])

    def step(*arguments: Any) -> Step:
        made.append(Step(*arguments))
        seen.append(Watch(name, lambda: whole(False), lambda: whole(True), progress))
        return made[0]

    way(job, step, lambda loss: seen[0](loss))
    return seen[0], made[0].model


def compare(job: Job) -> int:
    """Train in three ways from the same start, hold each step against one process, and report."""
    args, shards, first = job.args, job.shards, hvd.rank() == 0
    ways = {EXACT: train, PLAIN: train_plainly, **({ONE: train_alone} if first else {})}
    total = 3 * args.epochs * shards.steps
    with Progress(total, show=first and not args.quiet and not args.json) as progress:
        found = {name: watched(job, name, way, progress) for name, way in ways.items()}
    exact, trained = found[EXACT]
    mine = [step[job.groups.data.rank()] for step in exact.waits]
    everyone = told_by_all(
        communicator_of(hvd.global_process_set), (exact.seconds, found[PLAIN][0].losses, mine)
    )
    weights = khvd.full_weights(trained)
    status = 0
    if first:
        found[PLAIN][0].losses = list(np.mean([losses for _, losses, _ in everyone], axis=0))
        outcomes = judge(job, {name: watch for name, (watch, _) in found.items()})
        sharing = hvd.size() // shards.size
        ranks = [
            RankRow(
                rank,
                samples=len(shards.shards[rank // sharing]),
                weight=float(job.samples(shards.shards[rank // sharing])[2].sum()),
                step_ms=float(np.median(seconds)) * 1e3,
                waiting_ms=float(np.median(waits)) * 1e3 if waits else None,
            )
            for rank, (seconds, _, waits) in enumerate(everyone)
        ]
        path = args.output / "model.keras"
        args.output.mkdir(parents=True, exist_ok=True)
        ordinary = make_model(args)
        ordinary.set_weights(weights)
        ordinary.save(path)
        loaded = measure(job, keras.models.load_model(path, compile=False))  # as any program would
        status = conclude(
            args,
            f"A split classifier on {shards.size} x {sharing} rank(s), Keras layers: scikit-learn's digits",
            outcomes,
            ranks,
            remark=f"{sharing} neighbouring rank(s) share a model and its samples. The ordinary checkpoint "
            f"{path}, loaded by Keras alone, has a held-out accuracy of {loaded['accuracy']:.4f}.",
            loss_unit="weighted cross-entropy, nats",
        )
        if loaded != outcomes[1].test:
            print(f"error: the checkpoint measures {loaded}, not {outcomes[1].test}", file=sys.stderr)
            status = 1
    return int(told_by_all(communicator_of(hvd.global_process_set), status)[0])


def measure(job: Job, model: keras.Model) -> dict[str, float]:
    """Return the loss and the accuracy on held-out samples."""
    x, y, weight = job.samples(job.held_out)
    logits = model(x)
    right = np.asarray(logits).argmax(1) == y
    return {"loss (nats)": float(plain_loss(logits, y, weight)), "accuracy": float(right.mean())}


def judge(job: Job, watches: dict[str, Watch]) -> list[Outcome]:
    """Hold every step of each way of training against one process."""
    model = make_model(job.args)
    everything = np.concatenate(job.shards.shards)

    def load(parameters: np.ndarray) -> None:
        cuts = np.cumsum([w.size for w in model.get_weights()])[:-1]
        parts = zip(np.split(parameters, cuts), model.get_weights(), strict=True)
        model.set_weights([part.reshape(w.shape) for part, w in parts])

    def oracle(parameters: np.ndarray, index: np.ndarray) -> tuple[float, np.ndarray]:
        load(parameters)
        x, y, weight = job.samples(index)
        with tf.GradientTape() as tape:
            loss = plain_loss(model(x), y, weight)
        return float(loss), flat(tape.gradient(loss, model.trainable_variables))

    def training_loss(parameters: np.ndarray) -> float:
        load(parameters)
        x, y, weight = job.samples(everything)
        return float(plain_loss(model(x), y, weight))

    def test(parameters: np.ndarray) -> dict[str, float]:
        load(parameters)
        return measure(job, model)

    one = watches[ONE]
    outcomes = [
        outcome(watches[name], one, job.shards, oracle, training_loss, test) for name in (ONE, EXACT, PLAIN)
    ]
    outcomes[0].loss_error = outcomes[0].gradient_error = outcomes[0].parameter_error = None
    outcomes[0].gradient_errors = []
    return outcomes


def make_job(args: argparse.Namespace) -> Job:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    training, held_out = split(len(y), args.seed)
    weight = np.where(y >= 8, 5.0, 1.0)
    mixed = -y + np.random.default_rng(args.seed).uniform(0, 2, len(y))
    order = training[np.argsort(mixed[training])]
    data = (x / 16).astype(args.dtype), y.astype(np.int64), weight.astype(args.dtype)
    sharing = args.model or 2 - hvd.size() % 2
    shards = Shards(order, args.shares, hvd.size() // sharing, args.batch, args.seed)
    return Job(args, data, shards, held_out, hvd.grid(sharing))


if __name__ == "__main__":
    parser = options("tf_split_classifier", __doc__, epochs=4, batch=240)
    parser.add_argument("--model", type=at_least(1), help="ranks that share a model (2, if ranks are even)")
    arguments = parser.parse_args()
    hvd.init(process_sets="dynamic")
    sys.exit(compare(make_job(arguments)))
