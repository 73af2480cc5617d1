"""How one step's gradients and ledgers travel: scaled, summed over ranks, divided."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from hvdloss.communicator import included
from hvdloss.errors import ConfigError
from hvdloss.ledger import WIDTH
from hvdloss.plan import ParameterInfo, plan_buckets
from hvdloss.tensorflow._backend import hvd
from hvdloss.tuning import choose, launched

__all__ = ["Exchange", "check_options", "empty_row", "scaled", "tied"]

Gradient = Any  # tf.Tensor or tf.IndexedSlices
_HALF = (tf.float16, tf.bfloat16)
_LARGE = 2**18  # entries; a branch in a graph costs more than dividing fewer


def check_options(op: Any, gradient_predivide_factor: float, groups: Any) -> None:
    """Check what an objective leaves open of Horovod's arguments.

    Raises:
        ConfigError: an argument that cannot be used.
    """
    if op != hvd.Average:
        raise ConfigError(
            "op cannot be chosen together with an objective, which says how ranks are combined; leave it "
            "at Average (for a sum use Objective(..., reduction='sum'))"
        )
    if not gradient_predivide_factor > 0:
        raise ConfigError(f"gradient_predivide_factor={gradient_predivide_factor!r} must be above 0")
    if isinstance(groups, int) and groups < 0:
        raise ConfigError(f"groups={groups!r} must be at least 0, or lists of variables")


def as_numbers(table: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Return a float64 tensor as a vector of numbers of 16 bits, four per entry.

    Where all but one rank add zeros, their sum in float32 is exact, which that of the entries is not.
    """
    return tf.reshape(tf.cast(tf.bitcast(table, tf.uint16), dtype), [-1])


def from_numbers(numbers: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """Return the float64 tensor of this shape that :func:`as_numbers` wrote."""
    return tf.bitcast(tf.reshape(tf.cast(numbers, tf.uint16), [*shape, 4]), tf.float64)


def wire_name(text: str) -> str:
    """Return `text` as TensorFlow allows it in an operation's name."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", text)


class Exchange:
    """The sum over ranks of gradients, each rank's scaled by what it saw.

    Args:
        name: tells this exchange's messages from others'; equal on all ranks.
        process_set: the ranks.
        compression: of dense gradients on the wire.
        sparse_as_dense: reduce ``tf.IndexedSlices`` as dense tensors.
        predivide: shifts the range of what travels, as Horovod's ``gradient_predivide_factor``.
        groups: a number of buckets to aim at, or lists of variables that must share one.
        device_dense, device_sparse: where the collectives run.
        bucket_cap_mb: see :func:`hvdloss.tuning.choose`.

    Gradients in 16 bits, or compressed to 16 bits, are divided by the step's weight before they travel,
    since scaled ones would overflow; the ledgers then go ahead, in a small all-reduce of their own.
    Otherwise ledgers and gradients go together.
    """

    def __init__(
        self,
        name: str,
        *,
        process_set: Any = None,
        compression: Any = None,
        sparse_as_dense: bool = False,
        predivide: float = 1.0,
        groups: Any = None,
        device_dense: str = "",
        device_sparse: str = "",
        bucket_cap_mb: float | None = None,
    ) -> None:
        self.name = wire_name(name)
        self.process_set = process_set or hvd.global_process_set
        self.compression = compression or hvd.Compression.none
        self.sparse_as_dense = sparse_as_dense
        self.predivide = predivide
        self.groups = groups
        self.tuning = choose(bucket_cap_mb=bucket_cap_mb)
        self.device_dense, self.device_sparse = device_dense, device_sparse
        # A message starts when the graph has it ready: `overlap` is not ours to choose.
        self.choices: dict[str, Any] = {k: v for k, v in self.tuning.as_dict().items() if k != "overlap"}
        self._eager: dict[Any, Any] = {}
        self._zero: tf.Variable | None = None
        self._measured: tf.Variable | None = None

    @property
    def size(self) -> int:
        """How many ranks share the step; 1 for a rank outside the process set."""
        return self.process_set.size() if included(hvd, self.process_set) else 1

    def sum_table(self, rows: tf.Tensor, name: str = "ledger") -> tf.Tensor:
        """Return the rows of all ranks, ``(size, n)``, from this rank's vector of float64.

        One all-reduce of ``size x n`` float64; none with one rank.
        """
        if self.size == 1:
            return rows[tf.newaxis]
        return self._sum(self._own_row(rows), f"{self.name}.{name}")

    def _measure(self) -> tf.Tensor:
        """Return what this step's weights are measured in: the last one's total, 1 in the first."""
        if self._measured is None:
            with tf.init_scope():
                self._measured = tf.Variable(1.0, trainable=False, dtype=tf.float64, name="hvdloss_measure")
        return self._measured.read_value()

    def _own_row(self, rows: tf.Tensor) -> tf.Tensor:
        """Return a table of which this rank's row is filled, for summing."""
        # TensorFlow takes Horovod's operations for pure functions, so it would compute one of constants
        # (weights may be) once, while tracing, and never send it again. A variable is no constant.
        if self._zero is None:
            with tf.init_scope():
                self._zero = tf.Variable(0.0, trainable=False, dtype=tf.float64, name="hvdloss_zero")
        rows += self._zero
        return tf.scatter_nd([[self.process_set.rank()]], rows[tf.newaxis], [self.size, *rows.shape])

    def _sum(self, x: tf.Tensor, name: str, predivide: float = 1.0) -> tf.Tensor:
        with tf.device(self.device_dense):
            return hvd.allreduce(
                x,
                op=hvd.Sum,
                name=name,
                process_set=self.process_set,
                prescale_factor=1.0 / predivide,
                postscale_factor=predivide,
                ignore_name_scope=True,
            )

    def reduce(
        self,
        gradients: Sequence[Gradient],
        variables: Sequence[Any],
        row: tf.Tensor,
        *,
        factor: tf.Tensor | float | None = None,
        judged: Callable[[tf.Tensor], Sequence[tf.Operation]] = lambda table: (),
    ) -> tuple[list[Gradient], tf.Tensor]:
        """Return the step's gradients, and the table of all ranks' ledgers.

        Args:
            gradients: this rank's, dense or sparse; none of them None.
            variables: theirs, which know the gradients' shapes; `groups` may name them.
            row: this rank's ledger, ``WIDTH`` float64; its denominator scales the gradients.
            factor: what scales them instead, for gradients that were summed already.
            judged: called once with the table; the gradients cannot be used before the operations it
                returns are done.

        Returns:
            sum_k D_k g_k / sum_k D_k in each gradient's dtype, and ``(size, WIDTH)`` float64. Gradients
            of one rank alone are returned as they are.

        Collectives: one all-reduce per bucket of dense gradients (:func:`hvdloss.plan.plan_buckets`), two
        all-gathers per sparse one; the ledgers ride in a bucket, or in one all-reduce of ``size x WIDTH``
        float64 where there is none; none with one rank.
        """
        if factor is not None:
            factor = tf.convert_to_tensor(factor, tf.float64)
        if self.size == 1:
            if factor is not None:
                share = tf.math.divide_no_nan(factor, row[1])
                gradients = [scaled(g, share) for g in gradients]
            table = self.sum_table(row)
            return tied(gradients, judged(table)), table
        factor = row[1] if factor is None else factor
        if self.sparse_as_dense:
            gradients = [tf.convert_to_tensor(g) for g in gradients]
        gradients = [_of_shape(g, v) for g, v in zip(gradients, variables, strict=True)]
        if not tf.executing_eagerly():
            plan = self._plan(gradients, variables)
            return self._reduce(list(gradients), row, factor, plan, judged)
        # One function, so that the messages are under way together; eager calls would wait for each.
        # One for each shape of the gradients, so that their sizes are known inside.
        shapes = tuple(g.dtype if isinstance(g, tf.IndexedSlices) else (g.dtype, *g.shape) for g in gradients)
        grouped = isinstance(self.groups, list | tuple)  # by variables, not by number
        whose = tuple(map(id, variables)) if grouped else ()
        key = (shapes, whose, self.size, self.process_set.process_set_id)
        if key not in self._eager:
            plan = self._plan(gradients, variables)

            def together(gradients: list[Gradient], row: tf.Tensor, factor: tf.Tensor) -> Any:
                return self._reduce(gradients, row, factor, plan)

            self._eager[key] = tf.function(together, autograph=False, reduce_retracing=True)
        summed, table = self._eager[key](list(gradients), row, factor)
        judged(table)
        return summed, table

    def _plan(self, gradients: Sequence[Gradient], variables: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
        """Return which gradients travel together as one message, and note it; sparse ones travel alone."""
        infos = [
            ParameterInfo(
                name=str(i),
                shape=tuple(n or 0 for n in g.shape),
                kind=g.dtype.name,
                itemsize=g.dtype.size,
                # Such a one shares no message: nobody knows its size yet.
                sparse=isinstance(g, tf.IndexedSlices) or not g.shape.is_fully_defined(),
            )
            for i, g in enumerate(gradients)
        ]
        groups = self.groups
        if groups is not None and not isinstance(groups, int):
            place = {id(v): i for i, v in enumerate(variables)}
            groups = [[place[id(v)] for v in group if id(v) in place] for group in groups]
        # Gradients become ready about in the reverse of the order in which variables are used.
        backwards = range(len(gradients))[::-1]
        layouts = plan_buckets(
            infos,
            backwards,
            bucket_bytes=self.tuning.bucket_bytes,
            first_bytes=self.tuning.first_bytes,
            alone_bytes=self.tuning.alone_bytes,
            groups=groups,
        )
        dense = [tuple(member.index for member in layout.members) for layout in layouts]
        plan = (*dense, *((i,) for i, info in enumerate(infos) if info.sparse))
        self.choices |= {**launched(hvd), "travel": self._travel(gradients, plan)}
        return plan

    def _ahead(self, gradients: Sequence[Gradient]) -> bool:
        """Return whether ledgers must be known before gradients travel, which are then divided before."""
        return self.compression is not hvd.Compression.none or any(g.dtype in _HALF for g in gradients)

    def _carrier(self, gradients: Sequence[Gradient], plan: tuple[tuple[int, ...], ...]) -> int | None:
        """Return the bucket in which the ledgers ride: the first that is a copy anyway. None: in none."""
        if self._ahead(gradients):
            return None
        return next((n for n, members in enumerate(plan) if len(members) > 1), None)

    def _travel(self, gradients: Sequence[Gradient], plan: tuple[tuple[int, ...], ...]) -> dict[str, int]:
        """Return how many messages a step sends, and what they hold."""
        sparse = sum(isinstance(g, tf.IndexedSlices) for g in gradients)
        buckets = sum(len(members) > 1 for members in plan)
        return {
            "messages": len(plan) + sparse + (self._carrier(gradients, plan) is None),
            "buckets": buckets,
            "alone": len(plan) - buckets - sparse,
            "sparse": sparse,
        }

    def _reduce(
        self,
        gradients: list[Gradient],
        row: tf.Tensor,
        factor: tf.Tensor,
        plan: tuple[tuple[int, ...], ...],
        judged: Callable[[tf.Tensor], Sequence[tf.Operation]] = lambda table: (),
    ) -> tuple[list[Gradient], tf.Tensor]:
        ahead = self._ahead(gradients)
        carrier = self._carrier(gradients, plan)
        sums: list[Gradient] = [None] * len(plan)
        mine = self._own_row(row)
        if carrier is None:
            table = self._sum(mine, f"{self.name}.ledger")
        total = tf.reduce_sum(table[:, 1]) if ahead else None
        # Weights are measured in the last step's total: where it is this step's as well, what arrives is
        # divided already, and needs no further pass.
        measure = self._measure()
        scale = tf.math.divide_no_nan(factor, total if ahead else measure)
        for number, members in enumerate(plan):
            name = f"{self.name}.{number}"
            first = gradients[members[0]]
            if isinstance(first, tf.IndexedSlices):
                sums[number] = self._gather_sparse(first, scale, name)
            elif len(members) == 1:
                sums[number] = self._sum_scaled(first, scale, name)
            else:
                # Side by side in one message: few messages, one pass to scale and one to divide.
                flat = tf.concat([tf.reshape(gradients[i], [-1]) for i in members], 0)
                if number != carrier:
                    sums[number] = self._sum_scaled(flat, scale, name)
                    continue
                numbers = as_numbers(mine, flat.dtype)
                flat = self._sum(tf.concat([scaled(flat, scale), numbers], 0), name, self.predivide)
                sums[number], numbers = tf.split(flat, [-1, numbers.shape[0]])
                table = from_numbers(tf.round(numbers), mine.shape)
        after = judged(table)
        with tf.control_dependencies(after):
            if ahead:
                sums = [_untouched(g) for g in sums]
            else:
                total = tf.reduce_sum(table[:, 1])
                sums = [_divided(g, total / measure) for g in sums]
                sound = tf.math.is_finite(total) & (total > 0)  # what is judged to be bad leaves no trace
                self._measured.assign(tf.where(sound, total, measure))
        summed: list[Gradient] = [None] * len(gradients)
        for members, out in zip(plan, sums, strict=True):
            if len(members) == 1:
                summed[members[0]] = out
                continue
            pieces = tf.split(out, [gradients[i].shape.num_elements() for i in members])
            for i, piece in zip(members, pieces, strict=True):
                summed[i] = tf.reshape(piece, gradients[i].shape)
        return summed, table

    def _sum_scaled(self, x: tf.Tensor, scale: tf.Tensor, name: str) -> tf.Tensor:
        """Return sum_k scale_k x_k."""
        x = scaled(x, scale)
        # Horovod's TensorFlow operations do not know bfloat16.
        wide = tf.cast(x, tf.float32) if x.dtype == tf.bfloat16 else x
        small, context = self.compression.compress(wide)
        out = self.compression.decompress(self._sum(small, name, self.predivide), context)
        return tf.cast(out, x.dtype)

    def _gather_sparse(self, g: tf.IndexedSlices, scale: tf.Tensor, name: str) -> tf.IndexedSlices:
        """Return the rows of all ranks one after another, which is their sum."""
        with tf.device(self.device_sparse):
            values = scaled(g.values, scale)
            wide = tf.cast(values, tf.float32) if values.dtype == tf.bfloat16 else values
            options = {"process_set": self.process_set, "ignore_name_scope": True}
            values = tf.cast(hvd.allgather(wide, name=f"{name}.values", **options), g.dtype)
            indices = hvd.allgather(g.indices, name=f"{name}.indices", **options)
        return tf.IndexedSlices(values, indices, g.dense_shape)


def scaled(g: Gradient, factor: tf.Tensor) -> Gradient:
    """Return ``g * factor`` in the dtype of `g`; zero where the factor is, whatever `g` holds."""
    if isinstance(g, tf.IndexedSlices):
        return tf.IndexedSlices(scaled(g.values, factor), g.indices, g.dense_shape)
    wide = tf.cast(g, tf.float32) if g.dtype in _HALF else g
    return tf.cast(tf.math.multiply_no_nan(wide, tf.cast(factor, wide.dtype)), g.dtype)


def _of_shape(g: Gradient, variable: Any) -> Gradient:
    """Return a dense gradient that knows its shape, as far as its variable (or source tensor) does.

    Ranks must plan alike, though one of them may not have had a batch and so no traced backward pass.
    """
    if isinstance(g, tf.IndexedSlices) or g.shape.is_fully_defined():
        return g
    return tf.ensure_shape(g, variable.shape)


def _untouched(g: Gradient) -> Gradient:
    """Return `g`, which is not to be used before what is under control here."""
    return tf.nest.map_structure(tf.identity, g, expand_composites=True)


def _divided(g: Gradient, by: tf.Tensor) -> Gradient:
    """Return ``g / by``; a large one is not touched where that would change nothing."""

    def quotient() -> Gradient:
        if isinstance(g, tf.IndexedSlices):
            return tf.IndexedSlices(g.values / tf.cast(by, g.dtype), g.indices, g.dense_shape)
        return g / tf.cast(by, g.dtype)

    size = g.shape.num_elements()
    if size is None or size < _LARGE or tf.executing_eagerly():
        return quotient()
    return tf.cond(tf.equal(by, 1.0), lambda: _untouched(g), quotient)


def tied(gradients: Sequence[Gradient], after: Sequence[tf.Operation]) -> list[Gradient]:
    """Return `gradients`, which in a graph cannot be used before the operations `after` are done."""
    if not after:
        return list(gradients)
    with tf.control_dependencies(after):
        return [tf.nest.map_structure(tf.identity, g, expand_composites=True) for g in gradients]


def empty_row() -> tf.Tensor:
    """Return the ledger row of a rank that adds nothing to a step."""
    return tf.zeros(WIDTH, tf.float64)
