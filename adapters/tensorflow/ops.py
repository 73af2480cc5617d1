"""TensorFlow's side of the core: array operations, named losses, and exchanges over Horovod."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import tensorflow as tf
from hvdloss.comm.communicator import Communicator, OneProcess
from hvdloss.errors import ShapeError, second_derivative_error
from hvdloss.losses.elements import ClassOptions
from hvdloss.step.objective import loss_named
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.passes import as_data
from hvdloss.tensorflow.waiting import raise_root_cause
from tensorflow.python.eager import context

__all__ = ["NAMED_LOSSES", "HorovodCommunicator", "TensorFlowOps", "at_once", "communicator_of", "once"]


_NO_OPTIONS = ClassOptions()


class TensorFlowOps:
    """:class:`hvdloss.losses.reduction.ArrayOps` for TensorFlow tensors, eager or in a graph."""

    def shape(self, x: Any) -> tuple[int | None, ...]:
        """Return the static shape; a number's is empty, an axis known only at run time is None."""
        return tuple(x.shape) if tf.is_tensor(x) else tuple(np.shape(x))

    def shapes(self, x: Any) -> list[tuple[int | None, ...]]:
        """Collect from any structure; arrays of NumPy count, whose rank is not known does not."""
        arrays = [one for one in tf.nest.flatten(x) if tf.is_tensor(one) or isinstance(one, np.ndarray)]
        return [tuple(one.shape) for one in arrays if getattr(one.shape, "rank", 0) is not None]

    def losses(self, x: tf.Tensor) -> tf.Tensor:
        """Return at least float32, as mixed precision does for losses."""
        return x if x.dtype in (tf.float32, tf.float64) else tf.cast(x, tf.float32)

    def weights_like(self, w: Any, losses: tf.Tensor) -> tf.Tensor:
        """Broadcast and cast; weights are data, so no gradient."""
        w = as_data(tf.cast(w, losses.dtype)) if tf.is_tensor(w) else tf.cast(np.asarray(w), losses.dtype)
        return tf.broadcast_to(w, tf.shape(losses))

    def ones_like(self, losses: tf.Tensor) -> tf.Tensor:
        """Return ones."""
        return tf.ones_like(losses)

    def zeros_like(self, x: tf.Tensor) -> tf.Tensor:
        """Return one zero, which broadcasts."""
        return tf.zeros((), x.dtype)

    def where(self, condition: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """Choose."""
        return tf.where(condition, x, y)

    def count(self, condition: tf.Tensor) -> tf.Tensor:
        """Count."""
        return tf.reduce_sum(tf.cast(condition, tf.float64))

    def isfinite(self, x: tf.Tensor) -> tf.Tensor:
        """Tell what is finite."""
        return tf.math.is_finite(x)

    def sum(self, x: tf.Tensor) -> tf.Tensor:
        """Sum all."""
        return tf.reduce_sum(x)

    def sum64(self, x: tf.Tensor) -> tf.Tensor:
        """Sum all in float64."""
        return tf.reduce_sum(tf.cast(tf.stop_gradient(x), tf.float64))

    def sum_rows(self, x: tf.Tensor) -> tf.Tensor:
        """Sum over all axes but the first."""
        return tf.reduce_sum(x, axis=list(range(1, len(x.shape))))

    def scalar64(self, value: float, like: tf.Tensor) -> tf.Tensor:
        """Return a float64 scalar."""
        return tf.constant(value, tf.float64)

    def cast_like(self, x: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
        """Cast."""
        return tf.cast(x, like.dtype)

    def stack64(self, scalars: list[tf.Tensor]) -> tf.Tensor:
        """Stack."""
        return tf.stack([_float64(s) for s in scalars])

    def concat64(self, parts: list[Any]) -> tf.Tensor:
        """Join."""
        return tf.concat([tf.reshape(_float64(part), [-1]) for part in parts], 0)

    def zeros64(self, length: int, like: tf.Tensor) -> tf.Tensor:
        """Return zeros."""
        return tf.zeros(length, tf.float64)

    def to_int64(self, x: Any) -> tf.Tensor:
        """Cast."""
        return tf.cast(x, tf.int64)

    def expand_trailing(self, x: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
        """Add trailing axes and broadcast."""
        for _ in range(len(like.shape) - len(x.shape)):
            x = tf.expand_dims(x, -1)
        return tf.broadcast_to(x, tf.shape(like))

    def move_axis_last(self, x: tf.Tensor, axis: int) -> tf.Tensor:
        """Move."""
        rank = len(x.shape)
        axes = [i for i in range(rank) if i != axis % rank]
        return tf.transpose(x, [*axes, axis % rank]) if axis % rank != rank - 1 else x

    def bucketize(self, x: tf.Tensor, edges: tf.Tensor) -> tf.Tensor:
        """Search."""
        flat = tf.reshape(_float64(x), [-1])
        found = tf.searchsorted(edges, flat, side="right", out_type=tf.int64)
        return tf.reshape(found, tf.shape(x))

    def histogram(self, index: tf.Tensor, weight: tf.Tensor, bins: int) -> tf.Tensor:
        """Add up; indices outside are dropped."""
        inside = (index >= 0) & (index < bins)
        flat = tf.reshape(tf.where(inside, index, tf.constant(-1, index.dtype)), [-1])
        return tf.math.unsorted_segment_sum(tf.reshape(_float64(weight), [-1]), flat, bins)

    def class_sums(self, labels: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        """Add up."""
        product = _float64(labels) * _float64(weight)
        return tf.reduce_sum(product, axis=list(range(len(product.shape) - 1)))

    def take(self, table: tf.Tensor, index: tf.Tensor, bins: int | None) -> tf.Tensor:
        """Gather."""
        last = tf.shape(table, index.dtype)[0] - 1 if bins is None else bins - 1
        return tf.gather(table, tf.clip_by_value(index, 0, last))

    def interpolate(self, labels: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
        """Blend."""
        return 1.0 + _float64(labels) * (table - 1.0)

    def label_mean(self, labels: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
        """Average."""
        labels = _float64(labels)
        total = tf.reduce_sum(labels, -1)
        mean = tf.math.divide_no_nan(tf.reduce_sum(labels * table, -1), total)
        return tf.where(total > 0, mean, tf.ones_like(total))

    def quantiles(self, x: tf.Tensor, weight: tf.Tensor, points: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Interpolate in the sorted values."""
        some = tf.sort(tf.boolean_mask(_float64(x), tf.stop_gradient(weight) > 0))
        size = tf.size(some, tf.int64)
        padded = tf.concat([some, tf.zeros(1, tf.float64)], 0)  # something to look up where there is none
        last = tf.cast(tf.maximum(size - 1, 0), tf.float64)
        at = tf.linspace(tf.zeros((), tf.float64), tf.ones((), tf.float64), points) * last
        low, high = tf.floor(at), tf.math.ceil(at)
        values = tf.gather(padded, tf.cast(low, tf.int64)) * (1 - (at - low))
        values += tf.gather(padded, tf.cast(high, tf.int64)) * (at - low)
        return values, tf.reshape(tf.cast(size, tf.float64), [1])

    def on_device_of(self, x: Any, like: tf.Tensor) -> tf.Tensor:
        """Convert; TensorFlow moves by itself."""
        return tf.convert_to_tensor(x)

    def host_array(self, x: Any) -> np.ndarray | None:
        """Look, unless it is in a graph or on a device."""
        if not tf.is_tensor(x):
            return np.asarray(x)
        there = not tf.is_symbolic_tensor(x) and "CPU" in (x.device or "CPU")
        return x.numpy() if there else None

    def segment_totals(self, ids: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        """Add up at the place that an id has in order."""
        flat = tf.reshape(ids, [-1])
        slot = tf.searchsorted(tf.sort(flat), flat)
        sums = tf.math.unsorted_segment_sum(tf.reshape(_float64(weight), [-1]), slot, tf.size(flat))
        return tf.reshape(tf.gather(sums, slot), tf.shape(ids))

    def as64(self, x: Any) -> tf.Tensor:
        """Cast."""
        return tf.cast(x, tf.float64)

    def with_value(self, x: tf.Tensor, value: Any) -> tf.Tensor:
        """Take the place of `x`; a graph then has no way from its value to what follows."""

        @tf.custom_gradient
        def known(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            return tf.identity(tf.cast(value, x.dtype)), tf.identity

        return known(x)

    def reshape(self, x: tf.Tensor, shape: tuple[int, ...]) -> tf.Tensor:
        """Reshape."""
        return tf.reshape(x, shape)

    def concat(self, parts: list[tf.Tensor], axis: int) -> tf.Tensor:
        """Join."""
        return tf.concat(parts, axis)

    def unsqueeze(self, x: tf.Tensor) -> tf.Tensor:
        """Add an axis."""
        return tf.expand_dims(x, -1)

    def index_last(self, x: tf.Tensor, index: int) -> tf.Tensor:
        """Pick."""
        return x[..., index]

    def sum_leading(self, x: tf.Tensor, keep: int) -> tf.Tensor:
        """Sum; an empty list of axes means none."""
        return tf.reduce_sum(x, axis=list(range(len(x.shape) - keep)))

    def vector64(self, values: list[float], like: tf.Tensor) -> tf.Tensor:
        """Make a tensor."""
        return tf.constant(values, tf.float64)

    def one_hot(self, index: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
        """Place ones."""
        return tf.one_hot(tf.cast(index, tf.int64), tf.shape(like)[-1], dtype=like.dtype)

    def class_axis(self, prediction: tf.Tensor) -> int:
        """Return the last."""
        return -1

    def named_loss(self, name: str) -> Callable[..., tf.Tensor]:
        """Look up."""
        return NAMED_LOSSES[loss_named(name)]

    def exp(self, x: tf.Tensor) -> tf.Tensor:
        """Exponentiate."""
        return tf.exp(x)

    def log(self, x: tf.Tensor) -> tf.Tensor:
        """Take the logarithm."""
        return tf.math.log(x)

    def sqrt(self, x: tf.Tensor) -> tf.Tensor:
        """Take the root."""
        return tf.sqrt(x)

    def sigmoid(self, x: tf.Tensor) -> tf.Tensor:
        """Squash."""
        return tf.sigmoid(x)

    def softmax(self, x: tf.Tensor) -> tf.Tensor:
        """Normalise."""
        return tf.nn.softmax(x)

    def logsumexp(self, x: tf.Tensor) -> tf.Tensor:
        """Add up."""
        return tf.reduce_logsumexp(x, -1)

    def softplus(self, x: tf.Tensor) -> tf.Tensor:
        """Add 1 under the logarithm."""
        return tf.maximum(x, 0) + tf.math.log1p(tf.exp(-tf.abs(x)))

    def transpose(self, x: tf.Tensor) -> tf.Tensor:
        """Transpose."""
        return tf.transpose(x)

    def row_indices(self, x: tf.Tensor) -> tf.Tensor:
        """Count."""
        return tf.range(tf.shape(x, tf.int64)[0], dtype=tf.int64)

    def stop_gradient(self, x: tf.Tensor) -> tf.Tensor:
        """Stop the gradient."""
        return tf.stop_gradient(x)

    def with_gradients(
        self, value: tf.Tensor, inputs: list[tf.Tensor], gradients: list[tf.Tensor]
    ) -> tf.Tensor:
        """Remember them for the backward pass."""

        @tf.custom_gradient
        def given(*inputs: tf.Tensor) -> tuple[tf.Tensor, Callable[..., list[tf.Tensor]]]:
            def grad(upstream: tf.Tensor) -> list[tf.Tensor]:
                error = second_derivative_error()
                return [once(g * tf.cast(upstream, g.dtype), inputs, error) for g in gradients]

            return tf.identity(value), grad

        return given(*inputs)


def once(gradient: tf.Tensor, of: Sequence[tf.Tensor], error: Exception) -> tf.Tensor:
    """Return `gradient`, which cannot be differentiated again, by what the tensors `of` depend on either.

    Raises:
        `error`, when a tape tries.
    """

    @tf.custom_gradient
    def final(gradient: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
        def again(*_: tf.Tensor) -> Any:
            raise error

        return tf.identity(gradient), again

    return final(gradient, *of)


def _float64(x: Any) -> tf.Tensor:
    return tf.stop_gradient(tf.cast(x, tf.float64))


def _elementwise(formula: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """Return `formula` for a prediction and a target of one shape, both in the prediction's dtype."""

    def elements(prediction: Any, target: Any) -> tf.Tensor:
        y = tf.convert_to_tensor(prediction)
        t = tf.cast(target if tf.is_tensor(target) else np.asarray(target), y.dtype)
        if not y.shape.is_compatible_with(t.shape):
            raise ShapeError(
                f"prediction of shape {tuple(y.shape)} and target of shape {tuple(t.shape)} must have "
                f"the same shape"
            )
        return formula(y, t)

    return elements


def _huber(y: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
    d = tf.abs(y - t)
    return tf.where(d <= 1, d * d / 2, d - 0.5)


def _log_cosh(y: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
    # log(cosh d) = |d| + log(1 + exp(-2|d|)) - log 2 does not overflow.
    d = tf.abs(y - t)
    return d + tf.math.softplus(-2.0 * d) - math.log(2.0)


def _binary_cross_entropy(y: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
    # Logarithms are held above -100, as torch does, so that a sure and wrong prediction stays finite.
    least = tf.constant(-100.0, y.dtype)
    log_y, log_not_y = tf.maximum(tf.math.log(y), least), tf.maximum(tf.math.log1p(-y), least)
    return -(t * log_y + (1 - t) * log_not_y)


def _wide(logits: Any) -> tf.Tensor:
    """Return logits in at least float32."""
    return TensorFlowOps().losses(tf.convert_to_tensor(logits))


def _cross_entropy(prediction: Any, target: Any, options: ClassOptions = _NO_OPTIONS) -> tf.Tensor:
    """Class axis last; `target` holds class indices, or probabilities in the prediction's shape."""
    y, t = _wide(prediction), tf.convert_to_tensor(target)
    smoothing, weights = options.label_smoothing, None
    if options.class_weight is not None:
        weights = tf.constant(options.class_weight, y.dtype)
    if t.dtype.is_floating:
        t = tf.cast(t, y.dtype)
        t = t * (1 - smoothing) + smoothing / tf.cast(tf.shape(y)[-1], y.dtype) if smoothing else t
        if weights is None:
            return tf.nn.softmax_cross_entropy_with_logits(labels=t, logits=y)
        return -tf.reduce_sum(weights * t * tf.nn.log_softmax(y), -1)
    index = _indices(t, options.ignore_index)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=index, logits=y)
    if not smoothing:
        return losses
    spread = tf.nn.log_softmax(y)
    if weights is not None:  # the element's own weight comes later, so it is divided out here
        spread = spread * weights / tf.gather(weights, index)[..., tf.newaxis]
    return (1 - smoothing) * losses - smoothing * tf.reduce_mean(spread, -1)


def _nll(prediction: Any, target: Any, options: ClassOptions = _NO_OPTIONS) -> tf.Tensor:
    y, t = _wide(prediction), tf.convert_to_tensor(target)
    return -tf.gather(y, _indices(t, options.ignore_index), batch_dims=len(t.shape))


def _indices(t: tf.Tensor, ignored: int) -> tf.Tensor:
    """Return class indices with the absent ones replaced by class 0; their weight is zero."""
    t = t if t.dtype in (tf.int32, tf.int64) else tf.cast(t, tf.int64)
    return tf.where(t == ignored, tf.zeros((), t.dtype), t)


NAMED_LOSSES: dict[str, Callable[..., tf.Tensor]] = {
    "mse": _elementwise(lambda y, t: tf.math.squared_difference(y, t)),
    "mae": _elementwise(lambda y, t: tf.abs(y - t)),
    "huber": _elementwise(_huber),
    "log_cosh": _elementwise(_log_cosh),
    "cross_entropy": _cross_entropy,
    "nll": _nll,
    "binary_cross_entropy": _elementwise(_binary_cross_entropy),
    "binary_cross_entropy_with_logits": _elementwise(
        lambda y, t: tf.nn.sigmoid_cross_entropy_with_logits(labels=t, logits=y)
    ),
    "poisson_nll": _elementwise(lambda y, t: tf.exp(y) - t * y),
    "hinge": _elementwise(lambda y, t: tf.maximum(1 - t * y, 0)),
    "kl_div": _elementwise(lambda y, t: tf.math.xlogy(t, t) - t * y),
}


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Compute eagerly, whatever is being traced, and where scripts of TensorFlow 1 build a graph."""
    with tf.init_scope(), context.eager_mode():
        yield


class HorovodCommunicator:
    """A :class:`~hvdloss.comm.communicator.Communicator` over Horovod; at once, in a graph too."""

    def __init__(self, process_set: Any = None) -> None:
        self._process_set = process_set or hvd.global_process_set

    @property
    def rank(self) -> int:
        """This process's number in the process set."""
        return self._process_set.rank()

    @property
    def size(self) -> int:
        """How many ranks the process set has."""
        return self._process_set.size()

    def all_reduce(self, array: np.ndarray, name: str) -> np.ndarray:
        """Sum over ranks; one all-reduce."""
        with at_once(), raise_root_cause(name, self._process_set):
            tensor = tf.constant(np.asarray(array, dtype=np.float64))
            out = hvd.allreduce(tensor, name=name, op=hvd.Sum, process_set=self._process_set)
        return out.numpy()

    def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        """Gather bytes, never pickles; two all-gathers."""
        with at_once(), raise_root_cause(name, self._process_set):
            mine = tf.constant(np.frombuffer(data, dtype=np.uint8))
            length = tf.constant([len(data)], tf.int64)
            lengths = hvd.allgather(length, name=f"{name}.lengths", process_set=self._process_set).numpy()
            flat = hvd.allgather(mine, name=f"{name}.bytes", process_set=self._process_set).numpy().tobytes()
        ends = np.cumsum(lengths)
        return [flat[end - n : end] for end, n in zip(ends.tolist(), lengths.tolist(), strict=True)]


def communicator_of(process_set: Any) -> Communicator:
    """Return the exchange of small arrays among the ranks of a process set; one rank needs no Horovod."""
    return HorovodCommunicator(process_set) if process_set.size() > 1 else OneProcess()
