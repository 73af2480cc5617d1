"""Collectives that carry gradients, right for ranks of any number and parts of any size.

Gradients follow one of two conventions:

- the default: what follows differs between ranks, and the loss is the *sum* over ranks of what each
  makes of the output;
- ``replicated=True``: every rank computes the same from the same output, and it counts once. The
  backward pass then needs nothing from the others.

Every backward pass is made of these same functions, so second derivatives are right too. Ranks must make
the same calls in the same order, in the backward pass as well: an input carries a gradient on all ranks
or on none. One rank needs no Horovod. Eager and in a ``tf.function``,
where calls run side by side unless one needs another's result. (Passes of a ``tf.while_loop`` do so as
well; a loop that holds such a call needs ``parallel_iterations=1``, as of any operation of Horovod's.)

=================  ===================================  ==============================================
function           forward                              backward (default; replicated: nothing is sent)
=================  ===================================  ==============================================
`all_reduce`       all-reduce                           all-reduce
`all_gather`       all-gather, and one of 4 bytes       all-to-all, as many bytes as a reduce-scatter
`reduce_scatter`   reduce-scatter (or all-to-all)       all-gather
`broadcast`        broadcast                            all-reduce
`shift`            all-to-all with one receiver         the same
`copy_to_ranks`    nothing                              all-reduce
=================  ===================================  ==============================================

Horovod's own functions divide some of these gradients by the number of ranks and multiply others by it;
see docs/reference/collectives.md.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from hvdloss.comm.collectives import (
    GroupContext,
    check_known_rows,
    check_root,
    check_rows,
    check_sizes,
    even_sizes,
    resolve_group,
)
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.reducer import wire_name
from hvdloss.tensorflow.variables import variable

__all__ = [
    "HorovodGroup",
    "all_gather",
    "all_reduce",
    "broadcast",
    "copy_to_ranks",
    "group_of",
    "reduce_scatter",
    "scale_gradient",
    "shift",
]

Parts = list[int] | tf.Tensor  # numbers of rows, one for each rank
_REDUCE_SCATTERS = (tf.float32, tf.float64)

_used: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()
_zeros: list[tf.Variable] = []
_sinks: dict[tf.DType, tf.Variable] = {}


# -- what travels: no gradients here ------------------------------------------------------------------


def _call(at: GroupContext) -> dict[str, Any]:
    """Return what every operation of Horovod is told.

    Operations of one graph run side by side, so each has a name of its own, counted within the graph:
    ranks need not have traced equally often. Name scopes are kept, for a function that is called twice
    appears twice.
    """
    name = wire_name(at.name)
    number = getattr(at.process_set, "process_set_id", 0)
    if number:  # ranks need not be in the same sets
        name += f".set{number}"
    if not tf.executing_eagerly():
        used = _used.setdefault(tf.compat.v1.get_default_graph(), Counter())
        used[name] += 1
        name += f".{used[name] - 1}"
    return {"name": name, "process_set": at.process_set}


def _sent(x: tf.Tensor) -> tf.Tensor:
    """Return `x`, of which TensorFlow cannot know that it is constant, or equal to another.

    It takes Horovod's operations for pure functions: it would compute one of a constant only once, while
    tracing, and one of two with equal inputs.
    """
    if tf.executing_eagerly():
        return x
    if x.shape.rank == 0:
        return tf.reshape(_sent(x[tf.newaxis]), [])
    # From row 0 on, a number that is read every time: all of it, without a copy.
    return tf.ensure_shape(x[_nothing() :], x.shape)


def _came(x: tf.Tensor) -> tf.Tensor:
    """Return `x`, which came from other ranks, so that they must get this rank's though nobody uses it.

    A graph leaves out what nobody uses, as the gradient of no rows; the others would wait for ever.
    """
    if tf.executing_eagerly():
        return x
    with tf.init_scope(), tf.device("CPU:0"):
        if x.dtype not in _sinks:
            _sinks[x.dtype] = variable(tf.zeros([0], x.dtype), "hvdloss_sink", shape=tf.TensorShape(None))
    none = tf.reshape(x, [-1])[: _nothing()]
    with tf.device("CPU:0"):
        _sinks[x.dtype].assign(none)
    return x


def _nothing() -> tf.Tensor:
    """Return 0, of which a graph cannot know that it is."""
    if not _zeros:
        with tf.init_scope(), tf.device("CPU:0"):
            _zeros.append(variable(0, "hvdloss_nothing", dtype=tf.int32))
    with tf.device("CPU:0"):
        return _zeros[0].read_value()


def _packed(x: tf.Tensor) -> tf.Tensor:
    """Return the same bits in a dtype that Horovod can move."""
    return _sent(tf.bitcast(x, tf.uint16) if x.dtype == tf.bfloat16 else x)


def _unpacked(x: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Return rows that have travelled in the dtype of `like`, with its trailing axes."""
    x = tf.bitcast(x, tf.bfloat16) if like.dtype == tf.bfloat16 else x
    return tf.ensure_shape(x, [None, *like.shape[1:]])


def _summed(x: tf.Tensor, at: GroupContext) -> tf.Tensor:
    """Return the sum over ranks."""
    if at.size == 1:
        return tf.identity(x)
    wide = tf.cast(x, tf.float32) if x.dtype == tf.bfloat16 else x
    return tf.cast(_came(hvd.allreduce(_sent(wide), op=hvd.Sum, **_call(at))), x.dtype)


def _gathered(x: tf.Tensor, at: GroupContext) -> tf.Tensor:
    """Return the rows of all ranks."""
    if at.size == 1:
        return tf.identity(x)
    return _unpacked(_came(hvd.allgather(_packed(x), **_call(at))), x)


def _exchanged(x: tf.Tensor, splits: Parts, at: GroupContext) -> tuple[tf.Tensor, tf.Tensor]:
    """Send ``splits[k]`` rows to rank k; return the rows received, and how many came from each rank."""
    splits = tf.cast(splits, tf.int32)
    if at.size == 1:
        return tf.identity(x), splits
    with tf.device("CPU:0"):
        splits = tf.identity(splits)
    rows, received = hvd.alltoall(_packed(x), splits=splits, **_call(at))
    return _unpacked(_came(rows), x), received


def _sum_of_parts(x: tf.Tensor, sizes: Parts, at: GroupContext) -> tf.Tensor:
    """Return this rank's part of the sum over ranks of `x`, whose rows are cut into `sizes`."""
    if at.size == 1:
        return tf.identity(x)
    if isinstance(sizes, list) and x.dtype in _REDUCE_SCATTERS:
        rows = sum(sizes)
        if sizes == even_sizes(rows, at.size) and rows >= at.size:
            return _came(hvd.reducescatter(_sent(x), op=hvd.Sum, **_call(at)))
    # As many bytes as a reduce-scatter, without rows that only pad.
    rows, _ = _exchanged(x, sizes, at)
    shape = tf.concat([[at.size], [sizes[at.rank]], tf.shape(x)[1:]], 0)
    wide = tf.cast(rows, tf.float32) if x.dtype in (tf.float16, tf.bfloat16) else rows
    out = tf.cast(tf.reduce_sum(tf.reshape(wide, shape), 0), x.dtype)
    return tf.ensure_shape(out, [None, *x.shape[1:]])


# -- gradients ----------------------------------------------------------------------------------------


def _with_gradient(
    x: tf.Tensor, forward: Callable[[tf.Tensor], tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]]
) -> tf.Tensor:
    """Return the first of what `forward` returns for `x`; the second maps its gradient to that of `x`."""

    @tf.custom_gradient
    def call(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        out, backward = forward(x)
        return out, lambda upstream: backward(tf.convert_to_tensor(upstream))

    return call(x)


def _all_reduce(x: tf.Tensor, at: GroupContext) -> tf.Tensor:
    """Sum; backward: sum."""
    return _with_gradient(x, lambda x: (_summed(x, at), lambda g: _all_reduce(g, at.named("backward"))))


def _sum_once(x: tf.Tensor, at: GroupContext) -> tf.Tensor:
    """Sum, used alike on all ranks; backward: identity."""
    return _with_gradient(x, lambda x: (_summed(x, at), lambda g: _copy(g, at.named("backward"))))


def _copy(x: tf.Tensor, at: GroupContext) -> tf.Tensor:
    """Identity; backward: sum, the same on all ranks."""
    return _with_gradient(x, lambda x: (tf.identity(x), lambda g: _sum_once(g, at.named("backward"))))


def _all_gather(x: tf.Tensor, sizes: Parts, at: GroupContext) -> tf.Tensor:
    """All ranks' rows; backward: this rank's part of the sum."""
    return _with_gradient(x, lambda x: (_gathered(x, at), lambda g: _scatter(g, sizes, at.named("backward"))))


def _scatter(x: tf.Tensor, sizes: Parts, at: GroupContext) -> tf.Tensor:
    """This rank's part of the sum; backward: all ranks' rows."""
    return _with_gradient(
        x, lambda x: (_sum_of_parts(x, sizes, at), lambda g: _all_gather(g, sizes, at.named("backward")))
    )


def _gather_once(x: tf.Tensor, sizes: Parts, at: GroupContext) -> tf.Tensor:
    """All ranks' rows, used alike on all ranks; backward: this rank's slice."""
    return _with_gradient(x, lambda x: (_gathered(x, at), lambda g: _slice(g, sizes, at.named("backward"))))


def _slice(x: tf.Tensor, sizes: Parts, at: GroupContext) -> tf.Tensor:
    """This rank's rows of what all ranks have; backward: all ranks' rows."""

    def forward(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        begin = tf.reduce_sum(tf.cast(sizes[: at.rank], tf.int32))
        return x[begin : begin + sizes[at.rank]], lambda g: _gather_once(g, sizes, at.named("backward"))

    return _with_gradient(x, forward)


def _broadcast(x: tf.Tensor, root: int, once: bool, at: GroupContext) -> tf.Tensor:
    """The root's; backward: the sum at the root, or (`once`) what the root has; zero elsewhere."""

    def forward(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        if at.size == 1:
            out = tf.identity(x)
        else:
            out = _came(hvd.broadcast(_packed(x), root_rank=at.global_rank(root), **_call(at)))
            out = tf.bitcast(out, tf.bfloat16) if x.dtype == tf.bfloat16 else out
        return out, lambda g: _at_root(g, root, once, at.named("backward"))

    return _with_gradient(x, forward)


def _at_root(x: tf.Tensor, root: int, once: bool, at: GroupContext) -> tf.Tensor:
    """The sum (`once`: the root's own) at the root, zeros elsewhere; backward: the root's."""

    def forward(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        out = tf.identity(x) if once else _summed(x, at)
        out = out if at.rank == root else tf.zeros_like(out)
        return out, lambda g: _broadcast(g, root, once, at.named("backward"))

    return _with_gradient(x, forward)


def _exchange(x: tf.Tensor, splits: Parts, at: GroupContext) -> tf.Tensor:
    """Rows sent by splits; backward: they go back where they came from."""

    def forward(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        rows, received = _exchanged(x, splits, at)
        return rows, lambda g: _exchange(g, received, at.named("backward"))

    return _with_gradient(x, forward)


# -- the functions ------------------------------------------------------------------------------------


def _shape(x: tf.Tensor) -> tuple[int | None, ...]:
    """Return what is known of a shape; of one of unknown rank, that it has rows."""
    return (None,) if x.shape.rank is None else tuple(x.shape)


def _at(what: str, name: str | None, process_set: Any) -> GroupContext:
    group, rank, size = resolve_group(hvd, process_set, what)
    return GroupContext(name or f"hvdloss.{what}", group, rank, size)


def all_reduce(
    x: Any, *, name: str | None = None, process_set: Any = None, replicated: bool = False
) -> tf.Tensor:
    """Return the sum of `x` over ranks.

    Args:
        x: of the same shape and dtype on all ranks.
        name: on the wire; equal on all ranks. In a ``tf.function`` it is made unique.
        process_set: the ranks; None for all.
        replicated: what follows is the same on all ranks and counts once (see the module).

    Raises:
        UsageError: this rank is not in the process set.

    Collectives: one all-reduce; backward one more, with `replicated` none (Megatron's "g", Shoeybi et
    al. 2019).

    >>> x = tf.constant([1.0, 2.0])
    >>> with tf.GradientTape() as tape:
    ...     tape.watch(x)
    ...     total = tf.reduce_sum(all_reduce(x))  # one rank
    >>> tape.gradient(total, x).numpy().tolist()
    [1.0, 1.0]
    """
    x, at = tf.convert_to_tensor(x), _at("all_reduce", name, process_set)
    return _sum_once(x, at) if replicated else _all_reduce(x, at)


def all_gather(
    x: Any,
    *,
    name: str | None = None,
    process_set: Any = None,
    replicated: bool = False,
    sizes: Sequence[int] | None = None,
) -> tf.Tensor:
    """Return the rows of all ranks, in rank order.

    Args:
        x: of shape (rows, ...); the number of rows may differ between ranks, and be 0.
        name, process_set, replicated: see :func:`all_reduce`.
        sizes: how many rows each rank has, where that is known, which saves the small message.

    Raises:
        ShapeError: `x` is a scalar, or `sizes` do not fit.
        UsageError: this rank is not in the process set.

    Collectives: one all-gather, and one of 4 bytes per rank; backward an all-to-all of as many bytes as a
    reduce-scatter (a reduce-scatter for even `sizes`); with `replicated` none.
    """
    x, at = tf.convert_to_tensor(x), _at("all_gather", name, process_set)
    check_rows(_shape(x), "all_gather", at.rank)
    parts: Parts
    if sizes is not None:
        parts = check_sizes(sizes, None, at.size, at.rank, "all_gather")
        check_sizes([parts[at.rank]], x.shape[0], 1, at.rank, "all_gather: this rank's part of")
    elif at.size == 1:
        parts = tf.shape(x)[:1]
    else:
        with tf.device("CPU:0"):
            parts = _came(hvd.allgather(_sent(tf.shape(x)[:1]), **_call(at.named("sizes"))))
            parts = tf.ensure_shape(parts, [at.size])
    return _gather_once(x, parts, at) if replicated else _all_gather(x, parts, at)


def reduce_scatter(
    x: Any,
    *,
    sizes: Sequence[int] | None = None,
    name: str | None = None,
    process_set: Any = None,
) -> tf.Tensor:
    """Return this rank's rows of the sum of `x` over ranks.

    Args:
        x: of shape (rows, ...), the same on all ranks; in a ``tf.function`` the number of rows must be
            known when it is traced, or `sizes` be given.
        sizes: how many rows each rank gets, equal on all ranks; None for even parts, of which the first
            ones get what is left over.
        name, process_set: see :func:`all_reduce`.

    Raises:
        ShapeError: `x` is a scalar, or its number of rows is not known, or `sizes` do not fit.
        UsageError: this rank is not in the process set.

    Collectives: one reduce-scatter for even parts, else one all-to-all of as many bytes; backward one
    all-gather.
    """
    x, at = tf.convert_to_tensor(x), _at("reduce_scatter", name, process_set)
    check_rows(_shape(x), "reduce_scatter", at.rank)
    if sizes is None:
        parts = even_sizes(check_known_rows(x.shape[0], at.rank), at.size)
    else:
        parts = check_sizes(sizes, x.shape[0], at.size, at.rank, "reduce_scatter")
    return _scatter(x, parts, at)


def broadcast(
    x: Any,
    root: int,
    *,
    name: str | None = None,
    process_set: Any = None,
    replicated: bool = False,
) -> tf.Tensor:
    """Return the `x` of one rank.

    Args:
        x: of the same shape and dtype on all ranks; only the root's values count, and only the root's
            gets a gradient (the others' is zero).
        root: a rank of the process set, counted within it from 0: of the set of ranks 2 and 5, root 1
            is rank 5. (Horovod's own ``broadcast`` wants 5.)
        name, process_set, replicated: see :func:`all_reduce`.

    Raises:
        ConfigError: `root` is no rank of the set.
        UsageError: this rank is not in the process set.

    Collectives: one broadcast; backward one all-reduce, with `replicated` none.
    """
    x, at = tf.convert_to_tensor(x), _at("broadcast", name, process_set)
    check_root(root, at.size, at.rank)
    return _broadcast(x, root, replicated, at)


def shift(x: Any, by: int = 1, *, name: str | None = None, process_set: Any = None) -> tf.Tensor:
    """Send the rows of `x` to the rank `by` further round the ring; return those received.

    Args:
        x: of shape (rows, ...); the number of rows may differ between ranks, and be 0.
        by: how far; negative for the other way round. Equal on all ranks.
        name, process_set: see :func:`all_reduce`.

    Raises:
        ShapeError: `x` is a scalar.
        UsageError: this rank is not in the process set.

    Collectives: one all-to-all in which each rank has one receiver; backward the same. None if the rows
    end where they began.
    """
    x, at = tf.convert_to_tensor(x), _at("shift", name, process_set)
    check_rows(_shape(x), "shift", at.rank)
    if by % at.size == 0:
        return tf.identity(x)
    rows = tf.one_hot((at.rank + by) % at.size, at.size, tf.shape(x)[0], 0, dtype=tf.int32)
    return _exchange(x, rows, at)


def copy_to_ranks(x: Any, *, name: str | None = None, process_set: Any = None) -> tf.Tensor:
    """Return `x`, which is the same on all ranks and from here on is used differently by each.

    Megatron's "f" (Shoeybi et al. 2019): put it before the first layer that is split over ranks.

    Args:
        x: the same on all ranks.
        name, process_set: see :func:`all_reduce`.

    Raises:
        UsageError: this rank is not in the process set.

    Collectives: none; backward one all-reduce.
    """
    return _copy(tf.convert_to_tensor(x), _at("copy_to_ranks", name, process_set))


def scale_gradient(x: Any, factor: float) -> tf.Tensor:
    """Return `x`, whose gradient is multiplied by `factor` on its way back.

    Collectives: none.
    """
    return _with_gradient(
        tf.convert_to_tensor(x), lambda x: (tf.identity(x), lambda g: g * tf.cast(factor, g.dtype))
    )


class HorovodGroup:
    """:class:`hvdloss.losses.base.Group`: the ranks of a process set, with the collectives above.

    Args:
        process_set: None for all ranks.

    Raises:
        UsageError: this rank is not in the process set.
    """

    def __init__(self, process_set: Any = None) -> None:
        self.process_set, self.rank, self.size = resolve_group(hvd, process_set, "group_of")

    def all_reduce(self, x: tf.Tensor, name: str, *, replicated: bool = False) -> tf.Tensor:
        """Return the sum of `x` over ranks; see :func:`all_reduce`."""
        return all_reduce(x, name=name, process_set=self.process_set, replicated=replicated)

    def all_gather(self, x: tf.Tensor, name: str, *, replicated: bool = False) -> tf.Tensor:
        """Return all ranks' rows; see :func:`all_gather`."""
        return all_gather(x, name=name, process_set=self.process_set, replicated=replicated)

    def shift(self, x: tf.Tensor, name: str, by: int = 1) -> tf.Tensor:
        """Return the rows of the rank `by` before this one in the ring; see :func:`shift`."""
        return shift(x, by, name=name, process_set=self.process_set)


def group_of(process_set: Any = None) -> HorovodGroup:
    """Return the ranks of a process set as losses over all ranks want them; None for all ranks."""
    return HorovodGroup(process_set)
