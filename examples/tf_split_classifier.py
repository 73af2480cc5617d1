"""A classifier whose last layer is split over ranks by class, two by two ranks, with Keras layers.

The job of ``torch_split_classifier.py``: of four ranks, 0 and 1 share one model, and 2 and 3 another with
other images; of the last layer each rank holds half of the classes. Trains with hvdloss, with Horovod's plain
averaging between the pairs, and in one process with an ordinary last layer; compares, and saves an ordinary
Keras model. Two ranks share one model; on an odd number each holds a whole one.
"""

from __future__ import annotations

import sys
from typing import Any

import keras
import numpy as np
from _tensorflow import TensorFlowJob, tf

import hvdloss.keras as khvd
import hvdloss.tensorflow as hvd
from _common import Shards, at_least, compare, digit_measures, digits, options, recorder
from hvdloss.tensorflow.ops import communicator_of


class Split(TensorFlowJob):
    groups: hvd.Grid  # which ranks share a model, and which hold the same part of it

    def train(self, model: keras.Model, watch: Any) -> None:
        """Train on this pair's images. But for `watch` and `step`, this is all one has to write."""
        loss = hvd.ShardedCrossEntropy(model.layers[-1].shards, process_set=self.groups.model)
        objective = hvd.Objective(loss, process_set=self.groups.data)  # ranks that hold the same part
        record = recorder(hvd, self.args).follow(objective)
        step = self.step(model, objective, lambda tape: hvd.DistributedGradientTape(tape, objective))
        for batch in self.batches(self.groups.data.rank()):
            _, gradients = step(*batch)
            watch(objective.last_step.loss, gradients)
        record.close()
        self.save(model)

    def save(self, model: keras.Model) -> None:
        """Save an ordinary Keras model, which any program can load."""
        weights = khvd.full_weights(model)
        if hvd.rank() == 0:
            ordinary = self.make_ordinary()
            ordinary.set_weights(weights)
            self.args.output.mkdir(parents=True, exist_ok=True)
            ordinary.save(self.args.output / "model.keras")

    def train_plainly(self, model: keras.Model, watch: Any) -> None:
        """Train with local means, and Horovod's average over the ranks that hold the same part."""
        shards, groups = model.layers[-1].shards, self.groups

        def loss(logits: tf.Tensor, y: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
            losses = hvd.sharded_cross_entropy(logits, y, shards, process_set=groups.model)
            return tf.math.divide_no_nan(tf.reduce_sum(losses * weight), tf.reduce_sum(weight))

        step = self.step(model, loss, lambda tape: hvd.DistributedGradientTape(tape, process_set=groups.data))
        for batch in self.batches(groups.data.rank()):
            watch(*step(*batch))

    def make(self) -> keras.Model:
        """Return this rank's part; one seed gives it the weights of the ordinary model."""
        return self.make_ordinary(lambda: khvd.ShardedDense(10, name="head", process_set=self.groups.model))

    def make_ordinary(self, head: Any = lambda: keras.layers.Dense(10, name="head")) -> keras.Model:
        keras.utils.set_random_seed(self.seed)
        keras.config.set_floatx(self.args.dtype)
        hidden = keras.layers.Dense(16, activation="tanh", name="hidden")
        return keras.Sequential([keras.Input((16,)), hidden, head()], name="digits")  # as on the other ranks

    def descend(self, model: keras.Model) -> Any:
        optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
        optimizer.build(model.trainable_variables)
        return optimizer.apply

    def losses(self, prediction: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(y, prediction)

    def flat(self, model: keras.Model, tensors: list[Any]) -> np.ndarray:
        """Return what belongs to the ordinary model's parameters, as one vector. Collective."""
        if isinstance(model.layers[-1], khvd.ShardedDense) and self.groups.model.size() > 1:
            *features, kernel, bias = [tf.convert_to_tensor(t) for t in tensors]
            group = self.groups.model
            kernel = tf.transpose(hvd.allgather(tf.transpose(kernel), name="whole.kernel", process_set=group))
            tensors = [*features, kernel, hvd.allgather(bias, name="whole.bias", process_set=group)]
        return super().flat(model, tensors)

    def measure(self, model: keras.Model) -> dict[str, float]:
        prediction, loss = self.held_out_loss(model)
        return digit_measures(prediction, loss, self.data[1][self.held_out])


def make_job(args: Any, seed: int) -> Split:
    data, order, held_out = digits(seed)
    sharing = args.model or 2 - hvd.size() % 2
    Split.groups = hvd.grid(sharing)
    return Split(
        args, seed, data, Shards(order, args.shares, hvd.size() // sharing, args.batch, seed), held_out
    )


if __name__ == "__main__":
    parser = options("tf_split_classifier", __doc__, epochs=150, batch=1438, seeds=2)
    parser.add_argument("--model", type=at_least(1), help="ranks that share a model (2, if ranks are even)")
    arguments = parser.parse_args()
    hvd.init(process_sets="dynamic")
    status = compare(
        arguments,
        lambda seed: make_job(arguments, seed),
        hvd,
        communicator_of(hvd.global_process_set),
        title="A last layer split by class, in TensorFlow: digits",
        remark="The first pair of ranks holds most of the 8s and 9s, which count five times.",
    )
    sys.exit(status)
