"""The TensorFlow loops on which faults are inflicted: a tape, eager or inside a ``tf.function``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

import hvdloss
import hvdloss.tensorflow as hvd
from hvdloss.tensorflow.step import unwrap_graph_errors

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(2)


class TapeLoop:
    """One set of variables after another; the twin of the PyTorch loop."""

    hvd = hvd

    def __init__(self, name: str) -> None:
        self.name = name
        self.keeps = name == "function"  # a model between repeats of a fault
        self.model: list[tf.Variable] | None = None
        self.unarmed = tf.Variable(1.0, trainable=False)
        self.factor = tf.Variable(0.0, trainable=False)
        self.other = tf.Variable(0.0, trainable=False)

    def build(self, other: str, *, broadcast: bool = False) -> None:
        """Build variables, objective and step; `other` says what is other on this rank."""
        rng = np.random.default_rng(5)
        hidden = 17 if other == "shapes-differ" else 16
        self.dtype = tf.float64 if other == "dtypes-differ" else tf.float32
        shapes = [(64, hidden), (hidden,), (hidden, 10), (10,)]
        if other == "count-differs":
            shapes.append((10,))
        prefix = "net" if other == "names-differ" else "v"
        self.model = [
            tf.Variable(tf.cast(rng.normal(size=shape) * 0.1, self.dtype), name=f"{prefix}{i}")
            for i, shape in enumerate(shapes)
        ]
        if broadcast:
            hvd.broadcast_variables(self.model, root_rank=0)
        if other == "values-differ":
            self.model[1].assign_add(tf.fill([hidden], tf.constant(1e-3, self.dtype)))
        self.sources = self.model[::-1] if other == "order-differs" else self.model
        self.compression = hvd.Compression.fp16 if other == "compression-differs" else hvd.Compression.none
        self.objective = hvd.Objective(
            "mae" if other == "loss-differs" else "mse",
            reduction="batch_mean" if other == "reduction-differs" else "mean",
            terms=(hvdloss.CommunicationCost(price=0.1),) if other == "terms-differ" else (),
        )
        self._whole = tf.function(self._step, reduce_retracing=True) if self.name == "function" else None

    def _predict(self, x: tf.Tensor) -> tf.Tensor:
        assert self.model is not None
        a, b, c, d, *more = self.model
        y = tf.tanh(x @ a + b) @ c + d
        for extra in more:
            y += extra
        s = tf.reduce_sum(y)
        z = s - tf.stop_gradient(s) + tf.cast(self.unarmed, self.dtype)
        # Two infinite gradients of different sign are NaN; one of 0 times infinity TensorFlow takes for 0.
        trip = tf.cast(self.factor, self.dtype) * tf.sqrt(z) - tf.cast(self.other, self.dtype) * tf.sqrt(
            2 * z
        )
        return y + trip

    def _gradients(self, x: tf.Tensor, y: tf.Tensor, w: tf.Tensor, middle: Any = None) -> Any:
        tape = hvd.DistributedGradientTape(tf.GradientTape(), self.objective, compression=self.compression)
        with tape:
            loss = self.objective(self._predict(x), y, w)
        if middle is not None:
            middle()
        return tape.gradient(loss, self.sources)

    def _update(self, gradients: Any) -> None:
        for v, g in zip(self.sources, gradients, strict=True):
            v.assign_sub(0.05 * g)

    def _step(self, x: tf.Tensor, y: tf.Tensor, w: tf.Tensor) -> None:
        self._update(self._gradients(x, y, w))

    def tensors(self, batch: Any) -> tuple[tf.Tensor, ...]:
        x, y, w = (tf.constant(part, self.dtype) for part in batch)
        return x, y, w[:, None]

    def train(self, batches: Iterator[Any], hooks: Any, item: Any) -> None:
        """Train on batches, as a user's loop would."""
        tensors = map(self.tensors, batches)
        uneven = item is not None and item.fault == "raise-uneven"
        for step, (x, y, w) in enumerate(hvd.uneven(tensors, self.objective) if uneven else tensors, start=1):
            hooks.begin(step)
            if self._whole is not None:
                hooks.middle(step)
                unwrap_graph_errors(self._whole, x, y, w)
                hooks.done(step)
                continue
            caught: list[Exception] = []

            def middle(step: int = step, caught: list[Exception] = caught) -> None:
                try:
                    hooks.middle(step)
                except Exception as error:
                    caught.append(error)
                    raise

            try:
                gradients = self._gradients(x, y, w, middle)
            except Exception:
                if caught:
                    continue  # with the next batch
                raise
            hooks.between(step)
            self._update(gradients)
            hooks.done(step)

    def evaluate(self, plain: bool) -> None:
        """A number of all ranks, for which they meet."""
        if plain:
            hvd.allreduce(tf.ones(1), name="evaluation")
        else:
            hvd.merged_value(1.0)

    def trip(self, factor: float | None) -> None:
        """Make the next gradients NaN (0.0) or infinite (1.0), or finite again (None)."""
        self.unarmed.assign(1.0 if factor is None else 0.0)
        self.factor.assign(0.0 if factor is None else 1.0)
        self.other.assign(1.0 if factor == 0.0 else 0.0)

    def parameters(self) -> list[np.ndarray]:
        return [] if self.model is None else [v.numpy() for v in self.model]

    def reported(self) -> int:
        report = self.objective.last_step
        return 0 if report is None else int(report.step)


def make(name: str) -> TapeLoop:
    return TapeLoop(name)
