"""The laws of tests/laws in Keras's ``fit``: each step is a fit of one batch."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras_support import before_case, dataset
from laws_tape import linked

import hvdloss.keras as hvd
from tests.laws.driver import RATE

__all__ = ["before_case"]

LAWS = ("exact", "packed")
EXCEPT = {
    "micro_batches_count_by_what_they_hold": "fit accumulates the same number on every rank",
    "sequences_may_be_cut_by_micro_batches": "fit accumulates the same number on every rank",
}


class driver:
    def __init__(self):
        self.rank, self.size = hvd.rank(), hvd.size()

    def build(self, parameters, *, reduction="mean", nonfinite="raise", penalty=0.0, passes=1):
        l2 = keras.regularizers.L2(penalty) if penalty else None
        dtype = parameters[0].dtype.name
        first = keras.layers.Dense(4, "tanh", kernel_regularizer=l2, bias_regularizer=l2, dtype=dtype)
        last = keras.layers.Dense(1, use_bias=False, kernel_regularizer=l2, dtype=dtype)
        self.model = keras.Sequential([keras.Input((5,), dtype=dtype), first, last])
        self.model.set_weights(parameters)
        if reduction == "sequence_mean":  # by the weights; fit has no place for segments
            reduction = "mean"
        self.model.compile(
            hvd.DistributedOptimizer(keras.optimizers.SGD(RATE)),
            loss=hvd.Objective("mse", reduction=reduction, nonfinite=nonfinite),
        )

    def step(self, micro_batches):
        ((x, y, w),) = micro_batches
        self.model.fit(dataset([(x, y, w[:, 0])]), verbose=0)

    def step_packed(self, micro_batches, cut):
        (one,) = micro_batches
        (segments,) = linked(micro_batches, cut)
        self.step([one.batch._replace(w=hvd.sequence_weights(one.batch.w, segments).numpy())])

    def parameters(self):
        return [np.array(w) for w in self.model.get_weights()]

    def report(self):
        return self.model.optimizer.last_step

    def gather(self, array):
        return np.asarray(hvd.allgather(tf.constant(array)[None], name="laws.gather"))
