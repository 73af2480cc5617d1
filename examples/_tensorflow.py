"""What the TensorFlow and Keras demos hold hvdloss against: one process, and plain averaging."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

import hvdloss.tensorflow as hvd
from _common import Job

Loss = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]  # of prediction, targets and weights


class TensorFlowJob(Job):
    """A model with `trainable_variables` (:class:`_common.Job`); a demo gives the rest.

    It gives `make_ordinary` (a new model as one process has it), `losses` (per sample), `descend` (returns
    a new optimizer's ``apply(gradients, variables)``), and `train`.
    """

    losses: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    descend: Callable[[Any], Callable[..., Any]]

    def make(self) -> Any:
        return self.make_ordinary()

    def mean(self, prediction: tf.Tensor, y: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        """Return the weighted mean loss, written out."""
        total = tf.reduce_sum(weight * self.losses(prediction, y))
        return tf.math.divide_no_nan(total, tf.reduce_sum(weight))

    def step(
        self, model: Any, loss: Loss, taped: Callable[[tf.GradientTape], Any] = lambda tape: tape
    ) -> Callable[..., tuple[tf.Tensor, list[tf.Tensor]]]:
        """Return one step of training, traced once for any number of samples."""
        variables, apply = model.trainable_variables, self.descend(model)
        signature = [tf.TensorSpec([None, *a.shape[1:]], a.dtype) for a in self.data]

        @tf.function(input_signature=signature)
        def step(x: tf.Tensor, y: tf.Tensor, weight: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
            with tf.GradientTape() as tape:
                value = loss(model(x), y, weight)
            gradients = taped(tape).gradient(value, variables)
            apply(gradients, variables)
            return value, gradients

        return step

    def train_plainly(self, model: Any, watch: Any) -> None:
        """Train as with Horovod alone: local means, and gradients averaged over ranks."""
        step = self.step(model, self.mean, hvd.DistributedGradientTape)  # without an objective: Horovod's
        for batch in self.batches(hvd.rank()):
            watch(*step(*batch))

    def train_alone(self, model: Any, watch: Any) -> None:
        """Train in this process alone, on all ranks' samples of each step."""
        step = self.step(model, self.mean)
        for batch in self.batches(None):
            watch(*step(*batch))

    def parameters(self, model: Any) -> list[Any]:
        return model.trainable_variables

    def gradients(self, model: Any) -> None:
        return None  # they are those of a tape, and handed to Watch

    def flat(self, model: Any, tensors: list[Any]) -> np.ndarray:
        return np.concatenate([np.asarray(t).ravel() for t in tensors])

    def put(self, model: Any, parameters: np.ndarray) -> Any:
        cuts = np.cumsum([np.prod(v.shape, dtype=int) for v in model.trainable_variables])[:-1]
        for v, part in zip(model.trainable_variables, np.split(parameters, cuts), strict=True):
            v.assign(part.reshape(v.shape).astype(self.args.dtype))
        return model

    def loss(self, model: Any, samples: tuple) -> tuple[float, np.ndarray]:
        x, y, weight = samples
        with tf.GradientTape() as tape:
            value = self.mean(model(x), y, weight)
        return float(value), self.flat(model, tape.gradient(value, model.trainable_variables))

    def held_out_loss(self, model: Any) -> tuple[np.ndarray, float]:
        """Return the prediction of the held-out samples, and their loss."""
        x, y, weight = self.samples(self.held_out)
        prediction = model(x)
        return np.asarray(prediction), float(self.mean(prediction, y, weight))
