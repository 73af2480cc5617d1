"""Models whose last layer is split over ranks by class, for TensorFlow (see :mod:`hvdloss.losses.shards`).

:func:`sharded_cross_entropy` takes this rank's columns of the logits, and :func:`grid` makes the process
sets with which ranks share a model and, on the other axis, the data. A layer that gives such logits is
:class:`hvdloss.keras.ShardedDense`; a matrix multiplication by this rank's columns of a kernel, behind
:func:`hvdloss.tensorflow.collectives.copy_to_ranks`, is another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import tensorflow as tf
from hvdloss.comm.collectives import GroupContext, resolve_group
from hvdloss.errors import ConfigError, ShapeError
from hvdloss.losses.shards import (
    HEADER,
    ArcFace,
    ClassShards,
    CosFace,
    Margin,
    ShardedSoftmax,
    check_headers,
    headers_of,
)
from hvdloss.losses.shards import sample_columns as _sample
from hvdloss.split.grid import Grid, make_grid
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.collectives import _gathered
from hvdloss.tensorflow.ops import TensorFlowOps, once

__all__ = [
    "ArcFace",
    "ClassShards",
    "CosFace",
    "Grid",
    "ShardedCrossEntropy",
    "grid",
    "sample_columns",
    "sharded_cross_entropy",
]


class TensorFlowRowOps(TensorFlowOps):
    """:class:`hvdloss.losses.shards.RowOps` for TensorFlow, which overwrites nothing."""

    def scaled_copy(self, x: tf.Tensor, factor: float) -> tf.Tensor:
        """Multiply."""
        return self.losses(x) * factor

    def row_max(self, x: tf.Tensor) -> tf.Tensor:
        """Find."""
        return tf.reduce_max(x, -1)

    def row_sum(self, x: tf.Tensor) -> tf.Tensor:
        """Sum."""
        return tf.reduce_sum(x, -1)

    def gather_columns(self, x: tf.Tensor, column: tf.Tensor) -> tf.Tensor:
        """Gather."""
        return tf.gather(x, column, axis=1, batch_dims=1)

    def scatter_columns(
        self, x: tf.Tensor, column: tf.Tensor, where: tf.Tensor, value: tf.Tensor
    ) -> tf.Tensor:
        """Scatter."""
        value = tf.where(where, value, self.gather_columns(x, column))
        return tf.tensor_scatter_nd_update(x, tf.stack([self.element_indices(column), column], 1), value)

    def subtract_rows(self, x: tf.Tensor, row: tf.Tensor, own: bool) -> tf.Tensor:
        """Subtract."""
        return tf.cast(x, row.dtype) - row[:, tf.newaxis]

    def scale_rows(self, x: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
        """Multiply."""
        return x * row[:, tf.newaxis]

    def exp_inplace(self, x: tf.Tensor) -> tf.Tensor:
        """Compute."""
        return tf.exp(x)

    def mask_rows(self, x: tf.Tensor, present: tf.Tensor) -> tf.Tensor:
        """Choose, if there is anything to leave out."""
        return tf.cond(
            tf.reduce_all(present),
            lambda: x,
            lambda: tf.where(present[:, tf.newaxis], x, tf.zeros((), x.dtype)),
        )

    def find_columns(self, columns: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Search."""
        at = tf.searchsorted(columns, index, out_type=tf.int64)
        at = tf.minimum(at, tf.size(columns, tf.int64) - 1)
        return at, tf.gather(columns, at) == index

    def element_indices(self, x: tf.Tensor) -> tf.Tensor:
        """Count."""
        return tf.range(tf.size(x, tf.int64))

    def first_where(self, x: tf.Tensor, condition: tf.Tensor) -> tf.Tensor:
        """Find."""
        found = tf.concat([tf.boolean_mask(x, condition)[:1], tf.zeros(1, x.dtype)], 0)
        return tf.cast(found[0], tf.float64)

    def maximum(self, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """Compare."""
        return tf.maximum(x, y)


_OPS = TensorFlowRowOps()
_WHAT = "sharded_cross_entropy"
_ONCE = (
    f"tape.gradient of a gradient: {_WHAT} can be differentiated once; for second derivatives build it on "
    f"hvdloss.tensorflow.collectives"
)


def sharded_cross_entropy(
    logits: Any,
    target: Any,
    shards: ClassShards,
    *,
    process_set: Any = None,
    label_smoothing: float = 0.0,
    margin: Margin | None = None,
    scale: float = 1.0,
    columns: Any = None,
    ignore_index: int = -100,
) -> tf.Tensor:
    """Return the softmax cross-entropy of each element, whose logits lie on several ranks.

    Equal on all ranks of the process set, and equal to ``tf.nn.sparse_softmax_cross_entropy_with_logits`` of
    the whole logits. Every rank gets the gradient of its own logits. It counts once: sum or average the
    losses as you would in one process; ranks that share a model do not average each other's gradients.

    Args:
        logits: this rank's, (..., C_k). float16 and bfloat16 are computed in float32.
        target: class numbers from 0 to ``shards.classes - 1``, or `ignore_index`, (...) integers; the same
            on all ranks of the process set.
        shards: which rank holds which classes.
        process_set: the ranks that share the classes; None for all.
        label_smoothing: of the target, from 0 to 1; e of it is spread evenly over all classes.
        margin: :class:`CosFace` or :class:`ArcFace`, for logits that are cosines
            (``ShardedDense(..., normalize=True)``); not scaled.
        scale: what logits are multiplied with, after the margin.
        columns: which of this rank's columns the logits are of (:func:`sample_columns`), ascending; the
            softmax is then over the columns of all ranks.
        ignore_index: targets of this value have loss 0 and no gradient. They are no less elements of a mean:
            give them the weight 0, as :class:`ShardedCrossEntropy` has an ``Objective`` do.

    Returns:
        losses (...), float32, or float64 for float64 logits. They may be differentiated once.

    Raises:
        ShapeError: shapes that do not fit; on all ranks, batches of different sizes.
        ConfigError: an argument that cannot be used; on all ranks, a target that is no class.
        AgreementError: on all ranks, different targets or arguments.
        UsageError: this rank is not in the process set.
        Inside a ``tf.function`` TensorFlow raises an error of its own, with the same text, for what is
        found on all ranks.

    Collectives: one all-gather of 3 numbers per element (4 with label smoothing) and 8 more from each
    rank; none in the backward pass.

    >>> logits = tf.constant([[2.0, 0.0, 1.0]])
    >>> print(sharded_cross_entropy(logits, [2], ClassShards(3)).numpy())
    [1.407606]
    """
    rule = ShardedSoftmax(shards, label_smoothing, margin, scale, ignore_index)
    return _losses(logits, target, rule, process_set, columns)


def _losses(logits: Any, target: Any, rule: ShardedSoftmax, process_set: Any, columns: Any) -> tf.Tensor:
    group, rank, size = resolve_group(hvd, process_set, _WHAT)
    logits, target = tf.convert_to_tensor(logits), tf.convert_to_tensor(target)
    if not target.dtype.is_integer:
        raise ShapeError(
            f"{_WHAT}: target must be class numbers (int64), not {target.dtype.name} (rank {rank}); "
            f"probabilities have no owner"
        )
    if columns is not None:
        columns = tf.cast(columns, tf.int64)
    known = -1 if columns is None or columns.shape[0] is None else columns.shape[0]
    if columns is not None and known < 0:  # known only when the graph runs
        rule.check_shapes([*logits.shape[:-1], None], target.shape, -1, rank, size)
    else:
        rule.check_shapes(logits.shape, target.shape, None if columns is None else known, rank, size)
    at = GroupContext(f"hvdloss.{_WHAT}", group, rank, size)
    labels = tf.reshape(tf.cast(target, tf.int64), [-1])

    @tf.custom_gradient
    def losses(z: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        # What is computed here is differentiated below, so no tape needs to keep it.
        part = rule.part(_OPS, tf.stop_gradient(z), labels, rank, columns)
        messages = _told(part.message, rule, at)
        out, factor = rule.losses(_OPS, part, messages)

        def grad(upstream: tf.Tensor) -> tf.Tensor:
            g = rule.gradient(_OPS, part, factor, rule.columns(messages), upstream)
            return once(tf.cast(g, z.dtype), [z], ConfigError(_ONCE))

        return out, grad

    matrix = tf.reshape(logits, [-1, tf.shape(logits)[-1]])
    matrix.set_shape([None, logits.shape[-1]])
    return tf.reshape(losses(matrix), tf.shape(target))


def _told(message: tf.Tensor, rule: ShardedSoftmax, at: GroupContext) -> tf.Tensor:
    """Return the messages of all ranks, checked. One all-gather."""
    flat = _gathered(message, at)
    ranks = list(at.process_set.ranks or range(at.size))

    def check(flat: Any) -> None:
        check_headers(headers_of(np.asarray(flat), at.size), rule, _WHAT, ranks)

    length = tf.size(message)
    # Where messages have different lengths these are no headers, and differ all the same.
    padded = tf.concat([flat, tf.zeros([at.size * length], flat.dtype)], 0)[: at.size * length]
    heads = tf.reshape(padded, [at.size, -1])[:, :HEADER]
    bad = (tf.size(flat) != at.size * length) | rule.suspect(_OPS, heads)
    if tf.executing_eagerly():
        if bool(bad):
            check(flat.numpy())
    else:

        def tell() -> tf.Tensor:
            with tf.control_dependencies([tf.numpy_function(check, [flat], [], stateful=True)]):
                return tf.constant(True)

        with tf.control_dependencies([tf.cond(bad, tell, lambda: tf.constant(False))]):
            flat = tf.identity(flat)
    return tf.reshape(flat, [at.size, -1])


class ShardedCrossEntropy:
    """:func:`sharded_cross_entropy` as a loss for an ``Objective``: ignored elements are absent there.

    Args:
        shards, process_set, label_smoothing, margin, scale, ignore_index: see
            :func:`sharded_cross_entropy`. `process_set` are the ranks that share the model; the objective's
            are those that share the data.

    Raises:
        ConfigError: an argument that cannot be used.

    >>> from hvdloss.tensorflow import Objective
    >>> objective = Objective(ShardedCrossEntropy(ClassShards(3)))
    >>> print(objective(tf.constant([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), tf.constant([2, -100])).numpy())
    1.407606
    """

    def __init__(
        self,
        shards: ClassShards,
        *,
        process_set: Any = None,
        label_smoothing: float = 0.0,
        margin: Margin | None = None,
        scale: float = 1.0,
        ignore_index: int = -100,
    ) -> None:
        self.rule = ShardedSoftmax(shards, label_smoothing, margin, scale, ignore_index)
        self.process_set = process_set

    def __call__(self, logits: Any, target: Any, columns: Any = None) -> tf.Tensor:
        """Return per-element losses; see :func:`sharded_cross_entropy`."""
        return _losses(logits, target, self.rule, self.process_set, columns)

    def absent(self, target: Any) -> tf.Tensor:
        """Return which elements are to be ignored."""
        return tf.convert_to_tensor(target) == self.rule.ignore_index


def sample_columns(target: Any, shards: ClassShards, rank: int, rate: float, seed: Any = None) -> tf.Tensor:
    """Return which of a rank's columns take part in a step (Partial FC, An et al. 2021 and 2022).

    All classes of the batch that the rank holds, and others by chance up to `rate` of its columns. Pass them
    to the layer and to :func:`sharded_cross_entropy`. Call it eagerly (in the data pipeline, say).

    Args:
        target: of the batch, the same on all ranks that share the classes.
        shards, rank: of the classes, and this one's number among these ranks.
        rate: above 0, at most 1.
        seed: a number or a NumPy generator; None for NumPy's own.

    Returns:
        ascending column numbers, int64, at least one.

    Raises:
        ConfigError: `rate` is out of range.

    Collectives: none.
    """
    if not isinstance(seed, np.random.Generator):
        number = int(np.random.randint(2**31)) if seed is None else int(seed)
        seed = np.random.default_rng([number, rank])
    return tf.constant(_sample(np.asarray(target), shards, rank, rate, seed))


def grid(model: int) -> Grid:
    """Make the process sets for a model that `model` ranks share, and data shared by the others.

    Ranks 0 to ``model - 1`` share one model, the next ones another. All ranks must call it, with the same
    number; again, it finds the sets that it made.

    Args:
        model: how many ranks share a model; divides ``hvd.size()``.

    Raises:
        ConfigError: it does not divide, or Horovod was not started for process sets: set
            ``HOROVOD_DYNAMIC_PROCESS_SETS=1`` or call ``hvd.init(process_sets="dynamic")``.

    Collectives: those of ``hvd.add_process_set``, once per set.
    """
    return make_grid(hvd, model)
