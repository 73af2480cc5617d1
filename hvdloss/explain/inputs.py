"""The rows that ranks bring: checked arrays, predictions of them, and numbers that identify them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.errors import ConfigError, HvdlossError, NonFiniteLossError, RankError, ShapeError
from hvdloss.explain.attribution import label_array

__all__ = ["Predict", "names_of", "predictor", "rows_of", "where_of"]

#: Rows in, one prediction per row out; NumPy arrays.
Predict = Callable[[Any], Any]


def rows_of(what: str, x: Any) -> npt.NDArray[Any]:
    """Return rows of features as an array of at least two axes; no rows may come in any shape.

    Raises:
        ShapeError: no feature axis.
        ConfigError: no numbers.
    """
    rows = np.asarray(x)
    if not rows.size and rows.ndim < 2:
        return np.zeros((0, 0))
    if rows.ndim < 2:
        raise ShapeError(f"{what} of shape {rows.shape} must have rows and features: (rows, features, ...)")
    if rows.dtype.kind not in "fiub":
        raise ConfigError(
            f"{what} of dtype {rows.dtype} must be numbers; encode other columns before, as for the model"
        )
    return rows


def names_of(x: Any, names: Sequence[str] | None) -> list[str] | None:
    """Return the features' names: as given, or a data frame's columns; None if they are not known."""
    if names is None and hasattr(x, "columns"):
        names = list(x.columns)
    return None if names is None else [str(name) for name in names]


def where_of(ids: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    """Return the place of each row, of all ranks one after another, in the order of the ids.

    Raises:
        ConfigError: an id comes twice.
    """
    every = np.concatenate([one for one in ids if len(one)] or [np.zeros(0, np.int64)])
    order = np.argsort(every, kind="stable")
    same = np.flatnonzero(every[order][1:] == every[order][:-1])
    if len(same):
        raise ConfigError(f"ids= must tell rows apart, but {every[order][same[0]].item()!r} comes twice")
    place = np.empty(len(every), np.int64)
    place[order] = np.arange(len(every))
    return place


def ids_of(ids: npt.ArrayLike | None, rows: int, what: str = "ids") -> npt.NDArray[Any]:
    """Return ids, one per row; none at all where they are None.

    Raises:
        ShapeError, ConfigError: they are not.
    """
    if ids is None:
        return np.zeros(0, np.int64)
    found = label_array(what, ids)
    if found.shape != (rows,):
        raise ShapeError(f"{what} of shape {found.shape} must be one per row, of {rows}")
    return found


def along(what: str, values: Any, rows: int) -> npt.NDArray[Any] | None:
    """Return values that have one entry per row, or None.

    Raises:
        ShapeError: another number of them.
    """
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape[:1] != (rows,):
        raise ShapeError(f"{what} of shape {array.shape} must have one entry per row, of {rows}")
    return array


def predictor(predict: Predict, batch_size: int | None) -> Predict:
    """Return `predict` in batches, whose answers are checked.

    The function returned raises RankError for what `predict` raises, ShapeError for another number of
    rows, and NonFiniteLossError for NaN or infinity. It must not be called without rows.

    Raises:
        ConfigError: `predict` is no function.
    """
    if not callable(predict):
        raise ConfigError(f"predict={predict!r} is no function of rows")

    def checked(x: Any) -> npt.NDArray[Any]:
        try:
            out = np.asarray(predict(x))
        except HvdlossError:
            raise
        except Exception as error:
            raise RankError(f"predict raised {type(error).__name__}: {error}") from error
        if out.shape[:1] != (len(x),):
            raise ShapeError(f"predict gave an array of shape {out.shape} for {len(x)} rows")
        if out.dtype.kind == "f" and not np.isfinite(out).all():
            row = int(np.flatnonzero(~np.isfinite(out).reshape(len(out), -1).all(axis=1))[0])
            raise NonFiniteLossError(f"predict gave {out[row]} for row {row} of {len(x)}")
        return out

    def in_batches(x: Any) -> npt.NDArray[Any]:
        if batch_size is None or len(x) <= batch_size:
            return checked(x)
        starts = range(0, len(x), batch_size)
        return np.concatenate([checked(x[start : start + batch_size]) for start in starts])

    return in_batches
