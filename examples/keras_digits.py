"""A ragged end in Keras's compile and fit: one rank runs out of images before the other.

Data: scikit-learn's digits at 4 x 4 pixels, in random order; 8s and 9s count five times. Both ranks take
batches of the same size, but one shard is a little smaller: at the end of an epoch that rank has a short
batch, then none. Plain averaging is off by half in that step and by a few percent in the others. On shuffled
shards that costs a few percent of the held-out loss, and no accuracy to speak of. Trains with hvdloss, with
Horovod's plain averaging, and in one process, and compares.
"""

from __future__ import annotations

import sys
from typing import Any

import keras
import numpy as np
from _tensorflow import TensorFlowJob, tf

import hvdloss.keras as hvd
from _common import Shards, compare, digit_measures, digits, options, recorder
from hvdloss.tensorflow.ops import communicator_of


class Digits(TensorFlowJob):
    def train(self, model: keras.Model, watch: Any) -> None:
        """Train on this rank's images. But for `watch`, this is all one has to write."""
        optimizer = hvd.DistributedOptimizer(make_optimizer())
        model.compile(optimizer, loss=hvd.Objective("cross_entropy"), weighted_metrics=["accuracy"])
        model.fit(
            self.batches(hvd.rank()),
            steps_per_epoch=self.shards.steps,
            epochs=self.args.epochs,
            verbose=0,
            shuffle=False,  # the batches are one generator's, shuffled already
            callbacks=[
                hvd.callbacks.BroadcastGlobalVariablesCallback(0),
                hvd.callbacks.MetricAverageCallback(),
                hvd.callbacks.FollowCallback(recorder(hvd, self.args)),
                keras.callbacks.LambdaCallback(
                    on_train_batch_end=lambda batch, logs: watch(optimizer.last_step.loss)
                ),
            ],
        )

    def make_ordinary(self) -> keras.Model:
        keras.config.set_floatx(self.args.dtype)
        keras.utils.set_random_seed(self.seed)
        hidden = keras.layers.Dense(16, activation="tanh", name="hidden")
        head = keras.layers.Dense(10, name="head")  # named: rank 0 makes more models than the others
        return keras.Sequential([keras.Input((16,)), hidden, head], name="digits")

    def descend(self, model: keras.Model) -> Any:
        optimizer = make_optimizer()
        optimizer.build(model.trainable_variables)
        return optimizer.apply

    def losses(self, prediction: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(y, prediction)

    def measure(self, model: keras.Model) -> dict[str, float]:
        prediction, loss = self.held_out_loss(model)
        return digit_measures(prediction, loss, self.data[1][self.held_out])


def make_optimizer() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.2, momentum=0.9)


def make_job(args: Any, seed: int) -> Digits:
    data, order, held_out = digits(seed)
    order = np.random.default_rng(seed).permutation(order)
    shares = args.shares or list(np.linspace(1.1, 0.9, hvd.size()))
    shards = Shards(order, shares, hvd.size(), args.batch, seed, ragged=True)
    return Digits(args, seed, data, shards, held_out)


if __name__ == "__main__":
    arguments = options("keras_digits", __doc__, epochs=40, batch=360, seeds=3).parse_args()
    hvd.init()
    status = compare(
        arguments,
        lambda seed: make_job(arguments, seed),
        hvd,
        communicator_of(hvd.global_process_set),
        title="A ragged end in fit: digits",
        remark="At an epoch's end one rank has fewer images than the other, or none.",
    )
    sys.exit(status)
