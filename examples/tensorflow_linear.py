"""A linear model, W x + b, on uneven ranks with sample weights, in plain TensorFlow.

Data: scikit-learn's diabetes, 442 patients, the progression of their disease after a year. The smaller shard
holds the most severe cases, as a specialist clinic does; the weights count every age group the same. Averaged
means count both shards the same instead, so severe cases count too much. Two variables, a ``tf.GradientTape``
and a ``tf.function``. Trains with hvdloss, with Horovod's plain averaging, and in one process, and compares.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from _tensorflow import TensorFlowJob, tf

import hvdloss.tensorflow as hvd
from _common import Shards, compare, options, recorder, split
from hvdloss.tensorflow.ops import communicator_of

RATE = 0.1


class Model(tf.Module):
    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.W, self.b = tf.Variable(np.zeros((10, 1), dtype)), tf.Variable(np.zeros(1, dtype))

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return x @ self.W + self.b


class Diabetes(TensorFlowJob):
    unit: float  # points, of which a target of 1 stands for that many

    def train(self, model: Model, watch: Any) -> None:
        """Train on this rank's patients. But for `watch`, this is all one has to write."""
        variables = [model.W, model.b]
        hvd.broadcast_variables(variables, root_rank=0)
        objective = hvd.Objective("mse")
        record = recorder(hvd, self.args).follow(objective)

        @tf.function(reduce_retracing=True)
        def step(x: tf.Tensor, y: tf.Tensor, weight: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                loss = objective(model(x), y, weight)
            gradients = hvd.DistributedGradientTape(tape, objective).gradient(loss, variables)
            for variable, gradient in zip(variables, gradients, strict=True):
                variable.assign_sub(RATE * gradient)
            return gradients

        for x, y, weight in self.batches(hvd.rank()):  # this rank's own, of any length
            gradients = step(x, y, weight)
            watch(objective.last_step.loss, gradients)  # of all ranks' patients
        record.close()

    def make_ordinary(self) -> Model:
        return Model(self.args.dtype)

    def losses(self, prediction: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return (prediction - y) ** 2

    def descend(self, model: Model) -> Any:
        return lambda gradients, variables: [
            v.assign_sub(RATE * g) for v, g in zip(variables, gradients, strict=True)
        ]

    def measure(self, model: Model) -> dict[str, float]:
        return {"RMSE (points)": self.held_out_loss(model)[1] ** 0.5 * self.unit}


def make_job(args: Any, seed: int) -> Diabetes:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    training, held_out = split(len(y), seed)
    age_group = np.digitize(x[:, 0], [40, 60])  # below 40, 40 to 59, 60 and older
    weight = 1 / np.bincount(age_group[training])[age_group]
    Diabetes.unit = y[training].std()
    order = training[np.argsort(y[training])]
    x = (x - x[training].mean(axis=0)) / x[training].std(axis=0)
    y = (y - y[training].mean()) / Diabetes.unit
    data = x, y[:, None], weight[:, None] / weight[training].mean()
    return Diabetes(args, seed, data, Shards(order, args.shares, hvd.size(), args.batch, seed), held_out)


if __name__ == "__main__":
    arguments = options("tensorflow_linear", __doc__, epochs=40, batch=360, seeds=5).parse_args()
    hvd.init()
    status = compare(
        arguments,
        lambda seed: make_job(arguments, seed),
        hvd,
        communicator_of(hvd.global_process_set),
        title="Linear regression, uneven shards, sample weights: diabetes",
        remark="The smallest shard holds the most severe cases: averaged means overrate them.",
    )
    sys.exit(status)
