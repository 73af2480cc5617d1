"""What a metric is: a statistic of samples that merges, and a value made of it once.

    zero()                      of a rank without samples
    of(prediction, target, w)   of a batch
    merge(a, b)                 of two parts together: micro-batches, ranks and time are the same
    finish(state)               the value

The value of all ranks is the ``finish`` of the merged statistics, never an average of ranks' values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.errors import ConfigError, ShapeError, WeightError
from hvdloss.step.objective import IGNORED

__all__ = ["Array", "Elements", "Metric", "State", "check_choice", "elements"]

Array = npt.NDArray[Any]
State = tuple[Array, ...]


def check_choice(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raise ConfigError unless `value` is one of `known`."""
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, known))}")


@dataclasses.dataclass(frozen=True)
class Elements:
    """The samples of a batch that are there: those of weight 0 are left out.

    Attributes:
        prediction: shape (n,), or (n, classes) for scores of classes, float32 or float64; (n,) class
            indices where labels were predicted.
        target: shape (n,): float64, or int64 class indices.
        weight: shape (n,), float64, above 0.
    """

    prediction: Array
    target: Array
    weight: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def labels(self) -> bool:
        """Whether class indices were predicted, not scores."""
        return self.prediction.dtype.kind == "i"


def _numbers(name: str, value: Any) -> Array:
    """Return an array of float32, float64 or int64."""
    try:
        array = np.asarray(value)
        if array.dtype.kind in "biu":
            return array.astype(np.int64)
        if array.dtype in (np.float32, np.float64):
            return array
        # Half precisions of all kinds fit into float32; whatever else there is must become float64.
        narrow = array.dtype.itemsize <= 2 and array.dtype.kind in "fV"
        return array.astype(np.float32 if narrow else np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} is a {type(value).__name__} that is no array of numbers: {error}"
        ) from None


def _weights(weight: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return weights of every element.

    Raises:
        ShapeError: they do not broadcast.
        WeightError: one is negative, NaN or infinite.
    """
    if weight is None:
        return np.ones(shape)
    given = _numbers("weight", weight).astype(np.float64)
    bad = ~np.isfinite(given) | (given < 0)
    if bad.any():
        raise WeightError(
            f"{int(bad.sum())} weight(s) negative, NaN or infinite, the first {float(given[bad][0])}; "
            f"weights must be finite and at least 0"
        )
    try:
        return np.array(np.broadcast_to(given, shape))
    except ValueError:
        raise ShapeError(
            f"weight has shape {given.shape}, which does not broadcast to the targets' {shape}; give one "
            f"weight per target"
        ) from None


def elements(
    prediction: Any,
    target: Any,
    weight: Any = None,
    *,
    task: str = "real",
    classes: int | None = None,
) -> Elements:
    """Return the elements of a batch with a weight above 0, checked.

    Args:
        prediction: numbers of the target's shape, or with the classes as one more, last axis.
        target: numbers; None for predictions that need none.
        weight: broadcasts against the target; None for 1 each.
        task: ``"real"``, ``"binary"`` (targets 0 or 1) or ``"multiclass"`` (targets are class indices, of
            which -100 is absent, or one-hot rows of the prediction's shape).
        classes: number of classes, for ``"multiclass"``.

    Raises:
        ShapeError: shapes that do not fit each other, or another number of classes.
        WeightError: a weight that cannot be used.
        ConfigError: NaN, or a target that is no class.
    """
    p = _numbers("prediction", prediction)
    t = np.zeros(p.shape) if target is None else _numbers("target", target)
    if task == "multiclass":
        assert classes is not None
        p, t = _multiclass(p, t, classes)
        shape = t.shape
    else:
        if p.shape != t.shape and p.ndim == t.ndim + 1 and p.shape[-1] == 1:
            p = p[..., 0]  # one output per sample
        elif p.shape != t.shape and t.ndim == p.ndim + 1 and t.shape[-1] == 1:
            t = t[..., 0]
        if p.shape != t.shape:
            raise ShapeError(
                f"prediction has shape {p.shape}, but target {t.shape}; give one prediction per target"
                + (", or classes= for scores of classes" if task == "binary" else "")
            )
        shape = p.shape
    w = _weights(weight, shape).reshape(-1)
    scores = p.shape[len(shape) :]
    p, t = p.reshape(-1, *scores), t.reshape(-1)
    here = w > 0
    if task == "multiclass":
        here &= t != IGNORED
    if not here.all():
        p, t, w = p[here], t[here], w[here]
    for name, array in (("prediction", p), ("target", t)):
        if array.dtype.kind == "f" and (nans := int(np.isnan(array).sum())):
            raise ConfigError(f"{nans} {name}(s) are NaN; give samples that must not count the weight 0")
    if task == "real":
        p, t = p.astype(np.float64), t.astype(np.float64)
        if not (np.isfinite(p).all() and np.isfinite(t).all()):
            raise ConfigError(
                "prediction or target is infinite; give samples that must not count the weight 0"
            )
    else:
        limit = 2 if task == "binary" else classes
        _are_classes("target", t, limit or 2)
        t = t.astype(np.int64)
        if task == "binary" and p.dtype.kind == "i":
            p = p.astype(np.float64)
        elif task == "multiclass" and not scores:
            _are_classes("prediction", p, limit or 2)
            p = p.astype(np.int64)
    return Elements(p, t, w)


def _multiclass(p: Array, t: Array, classes: int) -> tuple[Array, Array]:
    """Return scores (with the class axis) or labels, and class indices.

    Raises:
        ShapeError: another number of classes, or shapes that do not fit.
    """
    if p.ndim == t.ndim + 1 and p.shape[:-1] == t.shape:
        if p.shape[-1] == classes:
            return p, t
    elif p.shape == t.shape:
        if p.dtype.kind == "i" or p.ndim < 2:
            return p, t
        if p.shape[-1] == classes:
            rows = (t == 0) | (t == 1)
            if not (rows.all() and (t.sum(-1) == 1).all()):
                raise ConfigError(
                    "target has the prediction's shape but is not one-hot (one 1 in each row, else 0); give "
                    "class indices"
                )
            return p, t.argmax(-1)
    raise ShapeError(
        f"prediction has shape {p.shape} and target {t.shape}, but classes={classes}; give targets of shape "
        f"(...) and scores of shape (..., {classes}), or predicted class indices of shape (...)"
    )


def _are_classes(name: str, labels: Array, classes: int) -> None:
    bad = (labels < 0) | (labels >= classes) | (labels != np.floor(labels))
    if bad.any():
        raise ConfigError(
            f"{name} {labels[bad][0].item()} is no class; classes are 0 to {classes - 1}"
            + ("; give classes= if there are more" if classes == 2 else "")
        )


class Metric:
    """A value of samples that merges exactly over micro-batches, ranks and time.

    To make one, override :meth:`of` and :meth:`finish`, and :meth:`merge` where a statistic is not a sum.
    A metric holds settings only, no samples; :class:`hvdloss.metrics.Metrics` holds their statistics.

    >>> import numpy as np
    >>> class GeometricMean(Metric):
    ...     def of(self, prediction, target=None, weight=None):
    ...         return (np.array([np.log(prediction).sum(), len(prediction)]),)
    ...     def finish(self, state):
    ...         return float(np.exp(state[0][0] / state[0][1]))
    >>> metric = GeometricMean()
    >>> round(metric.finish(metric.merge(metric.of([1.0, 4.0]), metric.of([16.0]))), 6)
    4.0
    """

    def key(self) -> Hashable:
        """Return what is equal for metrics that need the same statistic, which is then kept once."""
        return (type(self).__qualname__, repr(self) if dataclasses.is_dataclass(self) else id(self))

    def settings(self) -> str:
        """Return what must be equal on all ranks."""
        return repr(self) if dataclasses.is_dataclass(self) else type(self).__qualname__

    def zero(self) -> State:
        """Return the statistic of no samples: the neutral element of :meth:`merge`."""
        return ()

    def of(self, prediction: Any, target: Any = None, weight: Any = None) -> State:
        """Return the statistic of a batch: a tuple of arrays; :meth:`zero` where nothing is there.

        Raises:
            HvdlossError: samples that cannot be used.
        """
        found = self.read(prediction, target, weight)
        return self.measure(found) if len(found) else self.zero()

    def read(self, prediction: Any, target: Any, weight: Any) -> Elements:
        """Return the elements of a batch, for :meth:`measure`."""
        return elements(prediction, target, weight)

    def measure(self, found: Elements) -> State:
        """Return the statistic of at least one element."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither of nor measure")

    def merge(self, a: State, b: State) -> State:
        """Return the statistic of both parts together; here their sum."""
        if not a or not b:
            return a or b
        if [x.shape for x in a] != [x.shape for x in b]:
            shapes = [x.shape for x in a], [x.shape for x in b]
            raise ShapeError(f"{type(self).__name__}: statistics of shapes {shapes[0]} and {shapes[1]}")
        return tuple(x + y for x, y in zip(a, b, strict=True))

    def pack(self, state: State) -> State:
        """Return the statistic in as few bytes as represent it exactly, to be sent and merged."""
        return state

    def finish(self, state: State) -> Any:
        """Return the value of a statistic of at least one sample."""
        raise NotImplementedError(f"{type(self).__name__} does not override finish")

    def __call__(self, prediction: Any, target: Any = None, weight: Any = None) -> Any:
        """Return the value of one process's samples. Collectives: none."""
        return self.finish(self.of(prediction, target, weight))
