"""The core's array operations on NumPy arrays: the reference that every framework is held against."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["NumpyOps"]


class NumpyOps:
    """:class:`hvdloss.reduction.ArrayOps` for NumPy."""

    def shape(self, x: Any) -> tuple[int | None, ...]:
        """Return the shape."""
        return tuple(np.shape(x))

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

    def total(self, x: Any) -> Any:
        """Sum all."""
        return x.sum(dtype=x.dtype)

    def total64(self, x: Any) -> Any:
        """Sum all in float64."""
        return np.asarray(x).sum(dtype=np.float64)

    def total_rows(self, x: Any) -> Any:
        """Sum over all axes but the first."""
        return x.sum(axis=tuple(range(1, x.ndim)))

    def scalar64(self, value: float, like: Any) -> Any:
        """Return a float64 scalar."""
        return np.float64(value)

    def cast_like(self, x: Any, like: Any) -> Any:
        """Cast."""
        return np.asarray(x).astype(like.dtype)

    def row64(self, scalars: list[Any]) -> Any:
        """Stack."""
        return np.array(scalars, dtype=np.float64)
