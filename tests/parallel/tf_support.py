"""What the TensorFlow and Keras cases share: random splits, the one-process reference, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import hvdloss.tensorflow as hvd


def cuts(rng: np.random.Generator, n: int, ranks: int, *, empty: bool = True) -> list[int]:
    """Return where to cut `n` elements into parts; parts may be empty."""
    inner = rng.integers(0 if empty else 1, n + 1 if empty else n, size=ranks - 1)
    if not empty:
        inner = rng.choice(np.arange(1, n), size=ranks - 1, replace=False)
    return [0, *sorted(int(c) for c in inner), n]


def part(arrays: Sequence[np.ndarray], where: Sequence[int], rank: int | None = None) -> list[np.ndarray]:
    """Return a rank's part of arrays cut at `where`."""
    rank = hvd.rank() if rank is None else rank
    return [a[where[rank] : where[rank + 1]] for a in arrays]


def data(
    rng: np.random.Generator, n: int, dtype: Any = np.float64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features, targets and weights that drift, so that averages of parts are wrong."""
    drift = np.linspace(-2.0, 2.0, n)[:, None]
    x = rng.normal(size=(n, 5)) + drift
    y = rng.normal(size=(n, 1)) * (1.5 + drift) + drift
    w = rng.uniform(0.0, 3.0, size=(n, 1)) * (rng.uniform(size=(n, 1)) > 0.2)
    w[0] = 1.0
    return x.astype(dtype), y.astype(dtype), w.astype(dtype)


class Network(tf.Module):
    """A small network of raw variables: tanh between two layers."""

    def __init__(self, rng: np.random.Generator, dtype: Any = np.float64, out: int = 1) -> None:
        super().__init__()
        self.w1 = tf.Variable(rng.normal(size=(5, 4)).astype(dtype), name="w1")
        self.b1 = tf.Variable(rng.normal(size=4).astype(dtype), name="b1")
        self.w2 = tf.Variable(rng.normal(size=(4, out)).astype(dtype), name="w2")

    @classmethod
    def of(cls, parameters: Sequence[np.ndarray]) -> Network:
        """Return a network with these numbers."""
        net = cls.__new__(cls)
        super(Network, net).__init__()
        net.w1, net.b1, net.w2 = map(tf.Variable, parameters)
        return net

    def __call__(self, x: Any) -> tf.Tensor:
        return tf.tanh(tf.linalg.matmul(x, self.w1) + self.b1) @ self.w2

    @property
    def parameters(self) -> list[tf.Variable]:
        """In the order in which cases use them."""
        return [self.w1, self.b1, self.w2]


def difference(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Return the largest difference, relative to the largest entry of `b`."""
    a, b = [np.asarray(x, np.float64) for x in a], [np.asarray(x, np.float64) for x in b]
    scale = max(float(np.abs(x).max()) for x in b if x.size) or 1.0
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True) if y.size) / scale


def weighted_mse(y_: tf.Tensor, y: Any, w: Any) -> tf.Tensor:
    """Return the reference loss, written without the library."""
    return tf.reduce_sum(w * (y_ - y) ** 2) / tf.reduce_sum(tf.zeros_like(y_) + w)


def reference(loss: Callable[[], tf.Tensor], variables: Sequence[tf.Variable]) -> list[np.ndarray]:
    """Return one process's gradients."""
    with tf.GradientTape() as tape:
        value = loss()
    return [tf.convert_to_tensor(g).numpy() for g in tape.gradient(value, list(variables))]


def traced(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return `step` as a ``tf.function`` that is traced once for any numbers of rows.

    By itself a ``tf.function`` is traced for the first shapes, and again for others; cases that are about
    that use one. Tracing is most of what cases in TensorFlow take.
    """
    made: list[Callable[..., Any]] = []

    def call(*tensors: tf.Tensor) -> Any:
        if not made:
            rows = [tf.TensorSpec((None, *x.shape[1:]), x.dtype) for x in tensors]
            made.append(tf.function(step, input_signature=rows))
        return made[0](*tensors)

    return call


def same_on_all_ranks(arrays: Sequence[Any]) -> None:
    """Assert that arrays are bitwise equal on all ranks."""
    for number, a in enumerate(arrays):
        a = np.ascontiguousarray(a)
        mine = tf.constant(a.reshape(-1).view(np.uint8)[None])
        both = hvd.allgather(mine, name=f"same.{number}").numpy()
        assert (both == both[0]).all(), f"array {number} differs between ranks"


def raised(call: Callable[[], Any]) -> BaseException | None:
    """Return what a call raises."""
    try:
        call()
    except Exception as error:
        return error
    return None
