"""How one step's gradients and ledgers travel: scaled, summed over ranks, divided."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from hvdloss.errors import ConfigError
from hvdloss.ledger import WIDTH
from hvdloss.tensorflow._backend import hvd

__all__ = ["Exchange", "check_options", "empty_row", "scaled", "tied"]

Gradient = Any  # tf.Tensor or tf.IndexedSlices
_HALF = (tf.float16, tf.bfloat16)


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
        groups: a number of groups, or lists of variables that travel together.
        device_dense, device_sparse: where the collectives run.

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
    ) -> None:
        self.name = wire_name(name)
        self.process_set = process_set or hvd.global_process_set
        self.compression = compression or hvd.Compression.none
        self.sparse_as_dense = sparse_as_dense
        self.predivide = predivide
        self.groups = groups
        self.device_dense, self.device_sparse = device_dense, device_sparse
        self._eager: dict[Any, Any] = {}
        self._zero: tf.Variable | None = None

    @property
    def size(self) -> int:
        """How many ranks share the step; 1 for a rank outside the process set."""
        return self.process_set.size() if self.process_set.included() else 1

    def sum_table(self, rows: tf.Tensor, name: str = "ledger") -> tf.Tensor:
        """Return the rows of all ranks, ``(size, n)``, from this rank's vector of float64.

        One all-reduce of ``size x n`` float64; none with one rank.
        """
        if self.size == 1:
            return rows[tf.newaxis]
        # TensorFlow takes Horovod's operations for pure functions, so it would compute one of constants
        # (weights may be) once, while tracing, and never send it again. A variable is no constant.
        if self._zero is None:
            with tf.init_scope():
                self._zero = tf.Variable(0.0, trainable=False, dtype=tf.float64, name="hvdloss_zero")
        rows += self._zero
        mine = tf.one_hot(self.process_set.rank(), self.size, dtype=tf.float64)[:, tf.newaxis] * rows
        return self._sum(mine, f"{self.name}.{name}")

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
        places: Sequence[int] | None = None,
    ) -> tuple[list[Gradient], tf.Tensor]:
        """Return the step's gradients, and the table of all ranks' ledgers.

        Args:
            gradients: this rank's, dense or sparse; none of them None.
            variables: theirs, for names.
            row: this rank's ledger, ``WIDTH`` float64; its denominator scales the gradients.
            factor: what scales them instead, for gradients that were summed already.
            places: the variables' numbers on the wire; their order if None.

        Returns:
            sum_k D_k g_k / sum_k D_k in each gradient's dtype, and ``(size, WIDTH)`` float64. Gradients
            of one rank alone are returned as they are.

        Collectives: one all-reduce per dense gradient (or per group and dtype), two all-gathers per
        sparse one, one all-reduce of ``size x WIDTH`` float64; none with one rank.
        """
        names = tuple(
            wire_name(f"{self.name}.{i}.{getattr(v, 'name', 'tensor')}")
            for i, v in zip(places or range(len(variables)), variables, strict=True)
        )
        if factor is not None:
            factor = tf.convert_to_tensor(factor, tf.float64)
        if self.size == 1:
            if factor is not None:
                share = tf.math.divide_no_nan(factor, row[1])
                gradients = [scaled(g, share) for g in gradients]
            return list(gradients), self.sum_table(row)
        factor = row[1] if factor is None else factor
        groups = self._grouping(variables)
        if not tf.executing_eagerly():
            return self._reduce(list(gradients), row, factor, names, groups)
        # One function, so that the messages are under way together; eager calls would wait for each.
        key = (names, groups, self.size, self.process_set.process_set_id)
        if key not in self._eager:

            def together(gradients: list[Gradient], row: tf.Tensor, factor: tf.Tensor) -> Any:
                return self._reduce(gradients, row, factor, names, groups)

            self._eager[key] = tf.function(together, autograph=False, reduce_retracing=True)
        return self._eager[key](list(gradients), row, factor)

    def _grouping(self, variables: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
        """Return indices of variables that travel together; the others travel alone."""
        if not self.groups:
            return ()
        indices = range(len(variables))
        if isinstance(self.groups, int):
            count = min(self.groups, len(variables))
            bounds = [len(variables) * i // count for i in range(count + 1)] if count else [0]
            return tuple(tuple(indices[a:b]) for a, b in itertools.pairwise(bounds))
        place = {id(v): i for i, v in enumerate(variables)}
        return tuple(tuple(place[id(v)] for v in group if id(v) in place) for group in self.groups)

    def _reduce(
        self,
        gradients: list[Gradient],
        row: tf.Tensor,
        factor: tf.Tensor,
        names: tuple[str, ...],
        groups: tuple[tuple[int, ...], ...],
    ) -> tuple[list[Gradient], tf.Tensor]:
        gradients = [
            tf.convert_to_tensor(g) if self.sparse_as_dense and isinstance(g, tf.IndexedSlices) else g
            for g in gradients
        ]
        ahead = self.compression is not hvd.Compression.none or any(g.dtype in _HALF for g in gradients)
        table = self.sum_table(row)
        total = tf.reduce_sum(table[:, 1])
        scale = tf.math.divide_no_nan(factor, total) if ahead else factor
        summed: list[Gradient] = [None] * len(gradients)
        grouped = {i for group in groups for i in group}
        for group in (*groups, *((i,) for i in range(len(gradients)) if i not in grouped)):
            dense = [i for i in group if not isinstance(gradients[i], tf.IndexedSlices)]
            for dtype in dict.fromkeys(gradients[i].dtype for i in dense):
                alike = [i for i in dense if gradients[i].dtype == dtype]
                out = self._sum_dense([scaled(gradients[i], scale) for i in alike], [names[i] for i in alike])
                for i, x in zip(alike, out, strict=True):
                    summed[i] = x
            for i in set(group) - set(dense):
                summed[i] = self._gather_sparse(gradients[i], scale, names[i])
        if not ahead:
            summed = [_divided(g, total) for g in summed]
        return summed, table

    def _sum_dense(self, tensors: list[tf.Tensor], names: list[str]) -> list[tf.Tensor]:
        """Return sums over ranks of tensors of one dtype; as one message where there are several."""
        dtype = tensors[0].dtype
        # Horovod's TensorFlow operations do not know bfloat16.
        tensors = [tf.cast(x, tf.float32) if x.dtype == tf.bfloat16 else x for x in tensors]
        small, contexts = zip(*(self.compression.compress(x) for x in tensors), strict=True)
        if len(small) == 1:
            out = [self._sum(small[0], names[0], self.predivide)]
        else:
            with tf.device(self.device_dense):
                out = hvd.grouped_allreduce(
                    list(small),
                    op=hvd.Sum,
                    process_set=self.process_set,
                    prescale_factor=1.0 / self.predivide,
                    postscale_factor=self.predivide,
                    ignore_name_scope=True,
                )
        return [tf.cast(self.compression.decompress(x, c), dtype) for x, c in zip(out, contexts, strict=True)]

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


def _divided(g: Gradient, total: tf.Tensor) -> Gradient:
    if isinstance(g, tf.IndexedSlices):
        return tf.IndexedSlices(_divided(g.values, total), g.indices, g.dense_shape)
    return g / tf.cast(total, g.dtype)


def tied(gradients: Sequence[Gradient], after: Sequence[tf.Operation]) -> list[Gradient]:
    """Return `gradients`, which in a graph cannot be used before the operations `after` are done."""
    if not after:
        return list(gradients)
    with tf.control_dependencies(after):
        return [tf.nest.map_structure(tf.identity, g, expand_composites=True) for g in gradients]


def empty_row() -> tf.Tensor:
    """Return the ledger row of a rank that adds nothing to a step."""
    return tf.zeros(WIDTH, tf.float64)
