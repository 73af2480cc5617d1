"""The core's array operations on NumPy arrays: the reference that every framework is held against."""

from __future__ import annotations

from typing import Any

import numpy as np

from hvdloss.errors import ConfigError

__all__ = ["NumpyOps"]


class NumpyOps:
    """:class:`hvdloss.losses.reduction.ArrayOps` for NumPy."""

    def shape(self, x: Any) -> tuple[int | None, ...]:
        """Return the shape."""
        return tuple(np.shape(x))

    def shapes(self, x: Any) -> list[tuple[int | None, ...]]:
        """Return that of an array; there are no structures here."""
        return [tuple(np.shape(x))] if isinstance(x, np.ndarray) else []

    def losses(self, x: Any) -> Any:
        """Return at least float32."""
        x = np.asarray(x)
        return x if x.dtype == np.float64 else x.astype(np.float32)

    def weights_like(self, w: Any, losses: Any) -> Any:
        """Broadcast and cast."""
        return np.broadcast_to(np.asarray(w, dtype=losses.dtype), losses.shape)

    def ones_like(self, losses: Any) -> Any:
        """Return ones."""
        return np.ones_like(losses)

    def zeros_like(self, x: Any) -> Any:
        """Return zeros."""
        return np.zeros_like(x)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        """Choose."""
        return np.where(condition, x, y)

    def count(self, condition: Any) -> Any:
        """Count."""
        return np.float64(np.count_nonzero(condition))

    def isfinite(self, x: Any) -> Any:
        """Tell what is finite."""
        return np.isfinite(x)

    def sum(self, x: Any) -> Any:
        """Sum all."""
        return x.sum(dtype=x.dtype)

    def sum64(self, x: Any) -> Any:
        """Sum all in float64."""
        return np.asarray(x).sum(dtype=np.float64)

    def sum_rows(self, x: Any) -> Any:
        """Sum over all axes but the first."""
        return x.sum(axis=tuple(range(1, x.ndim)))

    def scalar64(self, value: float, like: Any) -> Any:
        """Return a float64 scalar."""
        return np.float64(value)

    def cast_like(self, x: Any, like: Any) -> Any:
        """Cast."""
        return np.asarray(x).astype(like.dtype)

    def stack64(self, scalars: list[Any]) -> Any:
        """Stack."""
        return np.array(scalars, dtype=np.float64)

    def concat64(self, parts: list[Any]) -> Any:
        """Join."""
        return np.concatenate([np.asarray(part, dtype=np.float64).reshape(-1) for part in parts])

    def zeros64(self, length: int, like: Any) -> Any:
        """Return zeros."""
        return np.zeros(length)

    def to_int64(self, x: Any) -> Any:
        """Cast."""
        return np.asarray(x).astype(np.int64)

    def expand_trailing(self, x: Any, like: Any) -> Any:
        """Add trailing axes and broadcast."""
        x = np.asarray(x)
        return np.broadcast_to(x.reshape(x.shape + (1,) * (np.ndim(like) - x.ndim)), np.shape(like))

    def move_axis_last(self, x: Any, axis: int) -> Any:
        """Move."""
        return np.moveaxis(np.asarray(x), axis, -1)

    def bucketize(self, x: Any, edges: Any) -> Any:
        """Search."""
        return np.searchsorted(edges, np.asarray(x, dtype=np.float64), side="right")

    def histogram(self, index: Any, weight: Any, bins: int) -> Any:
        """Add up."""
        inside = (index >= 0) & (index < bins)
        return np.bincount(index[inside], weights=weight[inside].astype(np.float64), minlength=bins)

    def class_sums(self, labels: Any, weight: Any) -> Any:
        """Add up."""
        product = np.asarray(labels, dtype=np.float64) * weight
        return product.reshape(-1, product.shape[-1]).sum(0)

    def take(self, table: Any, index: Any, bins: int) -> Any:
        """Gather."""
        return table[np.clip(index, 0, bins - 1)]

    def interpolate(self, labels: Any, table: Any) -> Any:
        """Blend."""
        return 1.0 + np.asarray(labels, dtype=np.float64) * (table - 1.0)

    def label_mean(self, labels: Any, table: Any) -> Any:
        """Average."""
        labels = np.asarray(labels, dtype=np.float64)
        total = labels.sum(-1)
        safe = np.where(total > 0, total, 1.0)
        return np.where(total > 0, (labels * table).sum(-1) / safe, 1.0)

    def quantiles(self, x: Any, weight: Any, points: int) -> tuple[Any, Any]:
        """Interpolate."""
        some = np.asarray(x, dtype=np.float64)[np.asarray(weight) > 0]
        if not some.size:
            return np.zeros(points), np.zeros(1)
        return np.quantile(some, np.linspace(0, 1, points)), np.array([float(some.size)])

    def on_device_of(self, x: Any, like: Any) -> Any:
        """Return an array."""
        return np.asarray(x)

    def host_array(self, x: Any) -> Any:
        """Return an array."""
        return np.asarray(x)

    def segment_totals(self, ids: Any, weight: Any) -> Any:
        """Add up."""
        _, slot = np.unique(ids, return_inverse=True)
        return np.bincount(slot.ravel(), np.ravel(weight))[slot].reshape(np.shape(ids))

    def as64(self, x: Any) -> Any:
        """Cast."""
        return np.asarray(x, dtype=np.float64)

    def with_value(self, x: Any, value: Any) -> Any:
        """Return the value."""
        return value

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Reshape."""
        return np.reshape(x, shape)

    def concat(self, parts: list[Any], axis: int) -> Any:
        """Join."""
        return np.concatenate(parts, axis)

    def unsqueeze(self, x: Any) -> Any:
        """Add an axis."""
        return np.asarray(x)[..., None]

    def index_last(self, x: Any, index: int) -> Any:
        """Pick."""
        return np.asarray(x)[..., index]

    def sum_leading(self, x: Any, keep: int) -> Any:
        """Sum."""
        return np.asarray(x).sum(axis=tuple(range(np.ndim(x) - keep)))

    def vector64(self, values: list[float], like: Any) -> Any:
        """Make an array."""
        return np.array(values, dtype=np.float64)

    def one_hot(self, index: Any, like: Any) -> Any:
        """Compare."""
        return (np.asarray(index)[..., None] == np.arange(np.shape(like)[-1])).astype(like.dtype)

    def class_axis(self, prediction: Any) -> int:
        """Return the last, as TensorFlow has it."""
        return -1

    def named_loss(self, name: str) -> Any:
        """Refuse: NumPy has no losses."""
        raise ConfigError(f"loss={name!r}: NumPy has no named losses; give a function")

    def exp(self, x: Any) -> Any:
        """Exponentiate."""
        return np.exp(x)

    def log(self, x: Any) -> Any:
        """Take the logarithm."""
        return np.log(x)

    def sqrt(self, x: Any) -> Any:
        """Take the root."""
        return np.sqrt(x)

    def sigmoid(self, x: Any) -> Any:
        """Squash."""
        return 1.0 / (1.0 + np.exp(-np.asarray(x)))

    def softmax(self, x: Any) -> Any:
        """Normalise."""
        e = np.exp(x - np.max(x, axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    def logsumexp(self, x: Any) -> Any:
        """Add up, from the largest."""
        top = np.max(x, axis=-1, keepdims=True)
        return np.log(np.exp(x - top).sum(axis=-1)) + top[..., 0]

    def softplus(self, x: Any) -> Any:
        """Add 1 under the logarithm."""
        return np.logaddexp(0.0, x)

    def transpose(self, x: Any) -> Any:
        """Transpose."""
        return np.transpose(x)

    def row_indices(self, x: Any) -> Any:
        """Count."""
        return np.arange(len(x), dtype=np.int64)

    def stop_gradient(self, x: Any) -> Any:
        """Return `x`: NumPy has no gradients."""
        return x

    def with_gradients(self, value: Any, inputs: list[Any], gradients: list[Any]) -> Any:
        """Return the value."""
        return value
