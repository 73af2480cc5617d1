"""The reductions of per-element losses to one number, each written once for every framework.

A reduction maps losses ``l`` and weights ``w`` (same shape) to two sums, a *numerator* and a
*denominator*, such that the loss over any collection of elements is the ratio of their sums
(:func:`finish`). Because sums merge by adding, micro-batches, ranks and steps are all the same
operation, and the result does not depend on how the elements are split.

========================  =====================================  ==============================
reduction                 numerator                              denominator
========================  =====================================  ==============================
``"mean"``                sum of w l                             sum of w
``"batch_mean"``          sum of w l                             number of elements with w != 0
``"sequence_mean"``       sum over sequences of (sum_t w l /     number of sequences with some
                          sum_t w)                               weight
``"sum"``                 sum of w l                             1 (shared by the contributions)
========================  =====================================  ==============================

An element of weight zero is absent: its loss may be NaN, and it is not counted. Sequences that are packed
into rows, or cut, are those of :mod:`hvdloss.losses.segments`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hvdloss.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from hvdloss.losses.segments import Layout

__all__ = [
    "REDUCTIONS",
    "ArrayOps",
    "Contribution",
    "broadcast_weights",
    "check_reduction",
    "finish",
    "reduce_losses",
]

REDUCTIONS = ("mean", "sum", "batch_mean", "sequence_mean")


class ArrayOps(Protocol):
    """The array operations that the core needs from a framework.

    ``Any`` stands for the framework's array or tensor. All of them must be differentiable where the
    framework's own operation is, and none may wait for a device.
    """

    def shape(self, x: Any) -> tuple[int | None, ...]:
        """Return the static shape of `x` (a number's is empty); None for an axis known at run time."""

    def shapes(self, x: Any) -> list[tuple[int | None, ...]]:
        """Return the shapes of all arrays in `x`, a nested structure; anything else has none."""

    def losses(self, x: Any) -> Any:
        """Return `x` in a dtype fit for sums: float64 stays, everything else becomes float32."""

    def weights_like(self, w: Any, losses: Any) -> Any:
        """Return `w` (a number or an array) broadcast to the shape of `losses`, in its dtype.

        The result carries no gradient: weights are data.
        """

    def ones_like(self, losses: Any) -> Any:
        """Return ones of the shape and dtype of `losses`."""

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        """Return `x` where `condition` holds, else `y`; no gradient flows to entries not selected."""

    def zeros_like(self, x: Any) -> Any:
        """Return zeros of the shape and dtype of `x`."""

    def count(self, condition: Any) -> Any:
        """Return the number of true entries of `condition`, a float64 scalar."""

    def isfinite(self, x: Any) -> Any:
        """Return where `x` is neither NaN nor infinite."""

    def sum(self, x: Any) -> Any:
        """Return the sum of all entries of `x`, in its dtype."""

    def sum64(self, x: Any) -> Any:
        """Return the sum of all entries of `x`, a float64 scalar without gradient."""

    def sum_rows(self, x: Any) -> Any:
        """Return the sum over every axis but the first, of shape ``x.shape[:1]``."""

    def scalar64(self, value: float, like: Any) -> Any:
        """Return `value` as a float64 scalar on the device of `like`."""

    def cast_like(self, x: Any, like: Any) -> Any:
        """Return `x` in the dtype of `like`."""

    def stack64(self, scalars: list[Any]) -> Any:
        """Return float64 scalars, without their gradient, as one vector."""

    # What terms need (hvdloss.terms.term); none of it carries a gradient.

    def concat64(self, parts: list[Any]) -> Any:
        """Return scalars and vectors one after another as one float64 vector."""

    def zeros64(self, length: int, like: Any) -> Any:
        """Return float64 zeros on the device of `like`."""

    def to_int64(self, x: Any) -> Any:
        """Return `x` as int64."""

    def expand_trailing(self, x: Any, like: Any) -> Any:
        """Return `x` broadcast to the shape of `like`, whose leading axes are those of `x`."""

    def move_axis_last(self, x: Any, axis: int) -> Any:
        """Return `x` with `axis` moved to the end."""

    def bucketize(self, x: Any, edges: Any) -> Any:
        """Return how many of the ascending `edges` are at most `x`, elementwise, int64."""

    def histogram(self, index: Any, weight: Any, bins: int) -> Any:
        """Return the weight in each of `bins` bins, float64; indices outside are not counted."""

    def class_sums(self, labels: Any, weight: Any) -> Any:
        """Return sum of ``labels * weight`` over every axis but the last, float64."""

    def take(self, table: Any, index: Any, bins: int) -> Any:
        """Return the entries of `table` at `index`, clipped to 0..bins-1."""

    def interpolate(self, labels: Any, table: Any) -> Any:
        """Return ``1 + labels * (table - 1)``; `table` lies along the last axis."""

    def label_mean(self, labels: Any, table: Any) -> Any:
        """Return the mean of `table` weighted with the labels along the last axis; 1 without any."""

    def quantiles(self, x: Any, weight: Any, points: int) -> tuple[Any, Any]:
        """Return quantiles of the `x` with weight above 0 at evenly spaced levels, and their number.

        float64, of shape ``(points,)`` and ``(1,)``; zeros without any.
        """

    # What packed sequences need (hvdloss.losses.segments); no gradient.

    def on_device_of(self, x: Any, like: Any) -> Any:
        """Return `x` (an array, also of NumPy) on the device of `like`, in its own dtype."""

    def host_array(self, x: Any) -> Any:
        """Return `x` as a NumPy array if its values are there without waiting for a device, else None."""

    def segment_totals(self, ids: Any, weight: Any) -> Any:
        """Return for each entry the sum of the float64 `weight` of all entries with the same id."""

    # What losses of all ranks need (hvdloss.losses); these carry the gradient.

    def as64(self, x: Any) -> Any:
        """Return `x` (a number or an array) in float64."""

    def with_value(self, x: Any, value: Any) -> Any:
        """Return `value`, with the gradient of `x`."""

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Return `x` in another shape; -1 for the remaining entries."""

    def concat(self, parts: list[Any], axis: int) -> Any:
        """Return the concatenation of arrays of one dtype along `axis`."""

    def unsqueeze(self, x: Any) -> Any:
        """Return `x` with a last axis of length 1."""

    def index_last(self, x: Any, index: int) -> Any:
        """Return ``x[..., index]``."""

    def sum_leading(self, x: Any, keep: int) -> Any:
        """Return the sum over all but the last `keep` axes (0 or 1) of a float64 `x`."""

    def vector64(self, values: list[float], like: Any) -> Any:
        """Return numbers as a float64 vector on the device of `like`."""

    def one_hot(self, index: Any, like: Any) -> Any:
        """Return 1 where the class is `index`, else 0, for the classes of the last axis of `like`.

        In its dtype, of shape ``(*index.shape, classes)``; zeros for an index outside.
        """

    def class_axis(self, prediction: Any) -> int:
        """Return the class axis of predictions, by the framework's convention."""

    def named_loss(self, name: str) -> Any:
        """Return the function behind a name of :data:`hvdloss.step.objective.LOSSES`."""

    def exp(self, x: Any) -> Any:
        """Return the exponential."""

    def log(self, x: Any) -> Any:
        """Return the natural logarithm."""

    def sqrt(self, x: Any) -> Any:
        """Return the square root."""

    def sigmoid(self, x: Any) -> Any:
        """Return 1 / (1 + exp(-x))."""

    def softmax(self, x: Any) -> Any:
        """Return the softmax over the last axis."""

    def logsumexp(self, x: Any) -> Any:
        """Return log(sum(exp(x))) over the last axis."""

    def softplus(self, x: Any) -> Any:
        """Return log(1 + exp(x))."""

    def transpose(self, x: Any) -> Any:
        """Return the transpose of a matrix."""

    def row_indices(self, x: Any) -> Any:
        """Return 0, 1, ... for the rows of `x`, int64."""

    def stop_gradient(self, x: Any) -> Any:
        """Return `x` without its gradient."""

    def with_gradients(self, value: Any, inputs: list[Any], gradients: list[Any]) -> Any:
        """Return the scalar `value` with these gradients with respect to `inputs`; no second derivatives."""


@dataclass(frozen=True)
class Contribution:
    """The contribution of one call's elements to a step: scalars of the framework.

    `numerator` has the dtype of the losses and carries the gradient; the others are float64 and carry
    none. `negative` and `nonfinite` count invalid weights. `fault` is above 0 if this rank makes the loss
    non-finite; None if that follows from the sums.
    """

    numerator: Any
    denominator: Any
    weight: Any
    elements: Any
    negative: Any
    nonfinite: Any
    fault: Any = None

    def mean(self, ops: ArrayOps) -> Any:
        """Return the local loss (numerator over denominator); 0, with gradient 0, without weight.

        In the dtype of the losses; the value that the user sees and differentiates.
        """
        one = ops.scalar64(1.0, self.numerator)
        safe = ops.where(self.denominator != 0, self.denominator, one)
        return self.numerator / ops.cast_like(safe, self.numerator)

    def row(self, ops: ArrayOps) -> Any:
        """Return this call as one micro-batch's ledger: a float64 vector of :data:`TENSOR_FIELDS` sums.

        In the order of the first fields of :class:`hvdloss.losses.ledger.Ledger`. Sums that are not finite (a
        NaN loss, weights whose sum overflows) are replaced by 0 and counted, since NaN would spread.
        """
        sums = [ops.sum64(self.numerator), self.denominator, self.weight]
        good = ops.isfinite(sums[0]) & ops.isfinite(sums[1]) & ops.isfinite(sums[2])
        return ops.stack64(
            [
                *(ops.where(ops.isfinite(x), x, ops.zeros_like(x)) for x in sums),
                self.elements,
                ops.scalar64(1.0, sums[0]),
                self.negative,
                self.nonfinite,
                ops.count(~good) if self.fault is None else self.fault,
            ]
        )


TENSOR_FIELDS = 8  # length of a row: the fields of a ledger that are computed from tensors


def check_reduction(reduction: str) -> str:
    """Return `reduction` if it is one of :data:`REDUCTIONS`, else raise ConfigError."""
    if reduction not in REDUCTIONS:
        raise ConfigError(
            f"reduction={reduction!r} is not known; choose one of {', '.join(map(repr, REDUCTIONS))}"
        )
    return reduction


def broadcast_error(
    weight_shape: tuple[int | None, ...], loss_shape: tuple[int | None, ...], rank: int
) -> ShapeError | None:
    """Return the error for a weight that does not broadcast to the losses, or None if it does.

    NumPy's rule, with two differences: the losses never grow, and a weight with fewer axes must not fit at
    both ends, as one for each row or column of a square.

    >>> broadcast_error((5,), (8, 5), 0), broadcast_error((8, 1), (8, 5), 0)
    (None, None)
    >>> str(broadcast_error((5,), (5, 5), 0))[:50]
    'weight of shape (5,) fits the first and the last a'
    """
    given, axes = len(weight_shape), len(loss_shape)

    def like(some: tuple[int | None, ...], *alone: int) -> bool:
        return all(
            w == n or w in alone or w is None or n is None for w, n in zip(weight_shape, some, strict=True)
        )

    leads = 0 < given < axes and like(loss_shape[:given])
    by_row = f"weight[{', '.join([':'] * given + ['None'] * (axes - given))}]"
    what = "sample" if given == 1 else "leading entry"
    if given > axes or not like(loss_shape[axes - given :], 1):
        hint = f"; for one weight per {what} pass {by_row}" if leads else ""
        return ShapeError(
            f"weight of shape {weight_shape} does not broadcast to the per-element losses of shape "
            f"{loss_shape} (rank {rank}){hint}"
        )
    if leads and any(w != 1 for w in weight_shape):
        by_column = f"weight[{', '.join(['None'] * (axes - given) + [':'] * given)}]"
        return ShapeError(
            f"weight of shape {weight_shape} fits the first and the last axes of the per-element losses of "
            f"shape {loss_shape} (rank {rank}); for one weight per {what} pass {by_row}, for one per entry "
            f"of the last axes {by_column}"
        )
    return None


def broadcast_weights(ops: ArrayOps, weight: Any, losses: Any, rank: int) -> Any:
    """Return `weight` broadcast to `losses`, without gradient.

    Raises:
        ShapeError: it does not broadcast.
    """
    error = broadcast_error(ops.shape(weight), ops.shape(losses), rank)
    if error:
        raise error
    return ops.weights_like(weight, losses)


def weight_statistics(ops: ArrayOps, w: Any, given: bool = True) -> tuple[Any, Any, Any, Any]:
    """Return the sum of weights, and the numbers of nonzero, negative and non-finite ones: float64 scalars.

    A NaN is not zero. Without `given` weights all are 1, and nothing is counted.
    """
    if not given:
        zero = ops.scalar64(0.0, w)
        total = ops.sum64(w)
        return total, total, zero, zero
    return ops.sum64(w), ops.count(w != 0), ops.count(w < 0), ops.count(~ops.isfinite(w))


def reduce_losses(
    ops: ArrayOps,
    losses: Any,
    weight: Any,
    reduction: str,
    *,
    layout: Layout | None = None,
    share: float = 1.0,
    rank: int = 0,
) -> Contribution:
    """Reduce the per-element losses of one call to the sums that a step needs.

    Args:
        ops: the framework's operations.
        losses: per-element losses, any shape; ``(N, T, ...)`` for ``"sequence_mean"`` without `layout`.
        weight: None, a number, or an array that broadcasts to `losses`.
        reduction: one of :data:`REDUCTIONS`.
        layout: which elements are a sequence, where that is not a row; `weight` is masked by it.
        share: the denominator of ``"sum"``: this call's share of all the step's calls.
        rank: for messages.

    Raises:
        ShapeError: `weight` does not broadcast, or ``"sequence_mean"`` got losses without a token axis.

    Collectives: none.
    """
    losses = ops.losses(losses)
    shape = ops.shape(losses)
    if reduction == "sequence_mean" and layout is None and len(shape) < 2:
        raise ShapeError(
            f'reduction="sequence_mean" needs per-element losses of shape (sequences, tokens), '
            f"got {shape} (rank {rank}); for packed sequences pass segments="
        )
    if weight is None:
        w = ops.ones_like(losses)
        weighted = losses
    else:
        w = broadcast_weights(ops, weight, losses, rank)
        weighted = ops.where(w != 0, losses * w, ops.zeros_like(losses))
    total_weight, elements, negative, nonfinite = weight_statistics(ops, w, weight is not None)
    if reduction == "sequence_mean" and layout is not None:
        shares = layout.shares(ops, w)
        counted = shares != 0
        part = losses * ops.cast_like(shares, losses)
        numerator = ops.sum(ops.where(counted, part, ops.zeros_like(losses)))
        denominator = ops.sum64(shares)
    elif reduction == "sequence_mean":
        rows = ops.sum_rows(w)
        counted = rows != 0
        safe = ops.where(counted, rows, ops.ones_like(rows))
        numerator = ops.sum(ops.where(counted, ops.sum_rows(weighted) / safe, ops.zeros_like(rows)))
        denominator = ops.count(counted)
    else:
        numerator = ops.sum(weighted)
        denominator = {
            "mean": total_weight,
            "batch_mean": elements,
            "sum": ops.scalar64(share, losses),
        }[reduction]
    return Contribution(numerator, denominator, total_weight, elements, negative, nonfinite)


def finish(reduction: str, numerator: float, denominator: float) -> float:
    """Return the loss of merged sums: a ratio, or the numerator itself for ``"sum"``.

    A ratio over no weight at all is NaN.
    """
    if reduction == "sum":
        return numerator
    return numerator / denominator if denominator else float("nan")
