"""How one step's gradients and ledgers travel: scaled, summed over ranks, divided."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from hvdloss import watch
from hvdloss.comm.agreement import check_consistency
from hvdloss.comm.communicator import group_ranks, included
from hvdloss.comm.plan import ParameterInfo, plan_buckets
from hvdloss.comm.tuning import choose, launched
from hvdloss.comm.world import register_for_reset
from hvdloss.errors import ConfigError
from hvdloss.losses.ledger import COLUMN, GATHER_COLUMNS, LEDGER_WIDTH
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow._traces import register_trace
from hvdloss.tensorflow.guard import checksums, parameter_name
from hvdloss.tensorflow.ledgers import Message, exact_totals
from hvdloss.tensorflow.ops import communicator_of
from hvdloss.tensorflow.variables import variable
from hvdloss.tensorflow.waiting import raise_root_cause, uncounted
from hvdloss.terms.controller import Controller
from hvdloss.terms.policies.compression import AdaptiveCompression
from hvdloss.terms.policies.period import SyncPeriod
from hvdloss.terms.term import CommStats

__all__ = [
    "CommTimer",
    "GradientReducer",
    "check_options",
    "check_policies",
    "check_skips",
    "empty_row",
    "exceeds",
    "scale_grad",
    "with_dependencies",
    "with_nonfinite_flag",
]

Gradient = Any  # tf.Tensor or tf.IndexedSlices
_HALF = (tf.float16, tf.bfloat16)
_LARGE = 2**18  # entries; a branch in a graph costs more than dividing fewer
_GRADIENTS = COLUMN["nonfinite_gradients"]
_LOSSES = COLUMN["nonfinite_losses"]
_FIRST_KEPT = COLUMN["micro_batches"]
_TIMES = slice(COLUMN["communication"], COLUMN["computation"] + 1)


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


def check_policies(controller: Controller, compression: Any, never_local: str = "") -> None:
    """Check that what terms do about what they measure can be done here.

    Args:
        controller: of the terms.
        compression: what the caller chose.
        never_local: why ranks cannot take steps of their own; empty where they can.

    Raises:
        ConfigError: they cannot.
    """
    if controller.policy(AdaptiveCompression) is not None and compression not in (None, hvd.Compression.none):
        raise ConfigError(
            "compression= cannot be chosen together with AdaptiveCompression, which chooses it; leave one out"
        )
    if never_local and controller.policy(SyncPeriod) is not None:
        raise ConfigError(
            f"SyncPeriod: {never_local}. Local steps need an optimizer of Keras made distributed by "
            f"hvdloss.keras.DistributedOptimizer or hvdloss.tensorflow.DistributedOptimizer; otherwise leave "
            f"SyncPeriod out of the terms' policies"
        )


def check_skips(nonfinite: str, what: str) -> None:
    """Raise ConfigError for the policy "skip" where `what` leaves the update to somebody else."""
    if nonfinite == "skip":
        raise ConfigError(
            f'nonfinite="skip": {what} gives gradients, and cannot keep an optimizer from using them; '
            f"use hvdloss.tensorflow.DistributedOptimizer with an optimizer of Keras and a plain "
            f'tf.GradientTape, or choose "drop" or "raise"'
        )


class CommTimer:
    """When exchanges began and ended; what that cost goes into the next one's ledger.

    An exchange begins, for its rank, when all that the rank gives to it is computed (by then the first
    messages may have arrived already), and ends when all that it gets is there.
    """

    def __init__(self) -> None:
        self._variable: tf.Variable | None = None
        self._counts: tf.Variable | None = None

    def reset(self) -> None:
        """Forget when the last exchange was: what came between is no computation."""
        if self._variable is not None:
            self._variable.assign(tf.zeros_like(self._variable))

    def _times(self) -> tf.Variable:
        """Return seconds held up and computed of the last exchange, and when it ended (0: there was none)."""
        if self._variable is None:
            with tf.init_scope(), tf.device("CPU:0"):
                self._variable = variable(tf.zeros(3, tf.float64), "hvdloss_times")
        return self._variable

    def _progress(self) -> tf.Variable:
        """Return how many exchanges have begun, and how many are over."""
        if self._counts is None:
            with tf.init_scope(), tf.device("CPU:0"):
                self._counts = variable(tf.zeros(2, tf.int64), "hvdloss_progress")
        return self._counts

    def progress(self) -> tuple[int, int]:
        """Return how many exchanges have begun to wait for other ranks, and how many are over; eager only."""
        if self._counts is None:
            return 0, 0
        begun, ended = self._counts.numpy()
        return int(begun), int(ended)

    def with_times(self, row: tf.Tensor) -> tf.Tensor:
        """Return a ledger row with the last exchange's times in it."""
        return tf.concat([row[: _TIMES.start], self._times()[:2], row[_TIMES.stop :]], 0)

    def begin(self, given: Sequence[Gradient]) -> tf.Tensor:
        """Return when all that this rank gives is there, in a graph; no message waits for it."""
        with tf.control_dependencies(tf.nest.flatten(list(given), expand_composites=True)):
            began = tf.timestamp()
        with tf.control_dependencies([began]):
            self._progress().assign_add([1, 0], read_value=False)
        return began

    def end(self, began: tf.Tensor, got: Sequence[Gradient]) -> None:
        """Note the times of an exchange that began then, when all that this rank gets is there."""
        with tf.control_dependencies([began, *tf.nest.flatten(list(got), expand_composites=True)]):
            ended = tf.timestamp()
        before = self._times()[2]
        computed = tf.where(before > 0, began - before, tf.zeros_like(before))
        self._times().assign(tf.stack([ended - began, computed, ended]))
        with tf.control_dependencies([ended]):
            self._progress().assign_add([0, 1], read_value=False)


def wire_name(text: str) -> str:
    """Return `text` as TensorFlow allows it in an operation's name."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", text)


class GradientReducer:
    """The sum over ranks of gradients, each rank's scaled by what it saw.

    Args:
        name: tells this exchange's messages from others'; equal on all ranks.
        process_set: the ranks.
        compression: of dense gradients on the wire.
        sparse_as_dense: reduce ``tf.IndexedSlices`` as dense tensors.
        predivide: shifts the range of what travels, as Horovod's ``gradient_predivide_factor``.
        groups: a number of buckets to aim at, or lists of variables that must share one.
        device_dense, device_sparse: where the collectives run.
        bucket_cap_mb: see :func:`hvdloss.comm.tuning.choose`.

    Gradients in 16 bits, or compressed to 16 bits, are divided by the step's weight before they travel,
    since scaled ones would overflow; the ledgers then go ledgers_first, in a small all-reduce of their own.
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
        self.timer = CommTimer()
        watch.track(self.name, self.timer, group_ranks(hvd, self.process_set), inside="tensorflow")
        self._payload = (0, 0, 0, 0)  # of the last exchange: messages, bytes: full, as sent, in 16 bits
        self._zero: tf.Variable | None = None
        self._measured: tf.Variable | None = None
        self._consistent: dict[
            tuple[int, ...], list[weakref.ref[Any]]
        ] = {}  # variables that all ranks hold alike
        register_for_reset(self)

    def reset(self) -> None:
        """Forget what was made for other ranks, and what steps were measured in: all measure in the same."""
        self._eager.clear()
        self._consistent.clear()
        self.timer.reset()
        if self._measured is not None:
            self._measured.assign(1.0)

    @property
    def size(self) -> int:
        """How many ranks share the step; 1 for a rank outside the process set."""
        return self.process_set.size() if included(hvd, self.process_set) else 1

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks, for the agreement of the first step."""
        return {
            "compression": getattr(self.compression, "__name__", str(self.compression)),
            "gradient_predivide_factor": self.predivide,
            "sparse_as_dense": self.sparse_as_dense,
            "groups": self.groups if isinstance(self.groups, int) else bool(self.groups),
            **self.tuning.shared(),
        }

    @tf.autograph.experimental.do_not_convert
    def check_consistency(
        self, variables: Sequence[Any], settings: dict[str, Any], gradients: Sequence[Any] | None = None
    ) -> None:
        """Check, in the first step with these variables, that all ranks hold the same and ask for the same.

        Args:
            variables: of this rank; what is no variable is left out.
            settings: what must be equal on all ranks, besides this exchange's own.
            gradients: of the variables, None for those that get none; None where all get one.

        Raises:
            AgreementError: on every rank alike.

        Collectives: one gather in a step (or its tracing) whose variables were not seen before.
        """
        there = [hasattr(v, "assign") and hasattr(v, "numpy") for v in variables]
        known = [v for v, here in zip(variables, there, strict=True) if here]
        kinds = [_kind(g) for g, here in zip(gradients or variables, there, strict=True) if here]
        if self.size == 1 or not tf.compat.v1.executing_eagerly_outside_functions():
            return
        key = (*map(id, known), *kinds)
        before = self._consistent.get(key)
        if before is not None and all(one() is v for one, v in zip(before, known, strict=True)):
            return
        with tf.init_scope():
            check_consistency(
                communicator_of(self.process_set),
                [
                    ParameterInfo(
                        parameter_name(v), tuple(v.shape), str(v.dtype), 0, trained=bool(kind), gradient=kind
                    )
                    for v, kind in zip(known, kinds, strict=True)
                ],
                lambda: checksums(known),
                [],
                {**self.settings(), **settings},
                name=f"{self.name}.agree",
                broadcast="Call hvd.broadcast_variables(variables, root_rank=0) before the first step.",
            )
        self._consistent[key] = [weakref.ref(v) for v in known]

    @property
    def summing(self) -> bool:
        """Whether only the sums of ranks' ledgers travel, as there are many ranks."""
        return self.tuning.sums(self.size)

    def sum_table(self, row: tf.Tensor, name: str = "ledger") -> tf.Tensor:
        """Return the rows of all ranks, ``(size, n)``, from this rank's vector of float64.

        One all-reduce of ``size x n`` float64, or with many ranks an all-gather; none with one rank.
        """
        register_trace()
        if self.size == 1:
            return row[tf.newaxis]
        if self.summing:
            return self._gather_rows(row, name)
        return self._sum(self._own_row(row), f"{self.name}.{name}")

    def count(self, here: tf.Tensor, name: str) -> tf.Tensor:
        """Return on how many ranks a condition holds, float64. One small all-reduce."""
        register_trace()
        one = tf.cast(here, tf.float64)
        return one if self.size == 1 else self._sum(self._variable(one), f"{self.name}.{name}")

    def total(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Return the sums over ranks of a vector of finite float64. One small all-reduce."""
        if not self.summing or self.size == 1:
            return tf.reduce_sum(self.sum_table(x, name), 0)
        register_trace()
        return exact_totals(self.size, self._variable(x), lambda x: self._sum(x, f"{self.name}.{name}"))

    def own(self, table: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
        """Return this rank's row of a step's table, or, where only sums are there, the one that it gave."""
        if not self.summing or self.size == 1:
            return table[self.process_set.rank()]
        return tf.cond(tf.shape(table)[0] > 1, lambda: table[self.process_set.rank()], lambda: row)

    def _gather_rows(self, row: tf.Tensor, name: str) -> tf.Tensor:
        options = {"process_set": self.process_set, "ignore_name_scope": True}
        with tf.device(self.device_dense):
            rows = hvd.allgather(self._variable(row)[tf.newaxis], name=f"{self.name}.{name}", **options)
        return tf.ensure_shape(rows, (None, row.shape[0]))

    def _asked(self, totals: tf.Tensor, row: tf.Tensor, always: bool) -> tf.Tensor:
        """Return all ranks' rows where they must be known, or `always`, else the sums as one row."""
        if always:
            return self._gather_rows(row, "rows")
        asked = tf.reduce_any(tf.gather(totals, GATHER_COLUMNS) > 0)
        return tf.cond(asked, lambda: self._gather_rows(row, "rows"), lambda: totals[tf.newaxis])

    def _measure(self) -> tf.Tensor:
        """Return what this step's weights are measured in: the last one's total, 1 in the first."""
        if self._measured is None:
            with tf.init_scope():
                self._measured = variable(1.0, "hvdloss_measure", dtype=tf.float64)
        return self._measured.read_value()

    def _variable(self, x: tf.Tensor) -> tf.Tensor:
        """Return float64 numbers that are to be sent, and no constants."""
        # TensorFlow takes Horovod's operations for pure functions, so it would compute one of constants
        # (weights may be) once, while tracing, and never send it again. A variable is no constant.
        if self._zero is None:
            with tf.init_scope():
                self._zero = variable(0.0, "hvdloss_zero", dtype=tf.float64)
        return x + self._zero

    def _own_row(self, row: tf.Tensor) -> tf.Tensor:
        """Return a table of which this rank's row is filled, for summing."""
        return tf.scatter_nd(
            [[self.process_set.rank()]], self._variable(row)[tf.newaxis], [self.size, *row.shape]
        )

    def _sum(self, x: tf.Tensor, name: str, predivide: float = 1.0) -> tf.Tensor:
        with tf.device(self.device_dense), uncounted():  # the clock counts steps
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
        compress: tf.Tensor | None = None,
        judged: Callable[[tf.Tensor], Sequence[tf.Operation]] = lambda table: (),
        nonfinite: str = "raise",
        look: tf.Tensor | bool = True,
        local: Sequence[Gradient] = (),
        rows: bool = False,
    ) -> tuple[list[Gradient], tf.Tensor]:
        """Return the step's gradients, and the table of all ranks' rows.

        Args:
            gradients: this rank's, dense or sparse; none of them None.
            variables: theirs, which know the gradients' shapes; `groups` may name them.
            row: this rank's ledger, ``LEDGER_WIDTH`` float64, and what its terms tell behind it; the ledger's
                denominator scales the gradients.
            factor: what scales them instead, for gradients that were summed already.
            compress: whether dense gradients travel as float16 in this step, equal on all ranks; None to
                leave it to `compression`.
            judged: called once with the table; the gradients cannot be used before the operations it
                returns are done.
            nonfinite: of the objective. With "drop" a rank whose loss or gradients are NaN or infinite adds
                nothing; no message leaves before its rank has seen all gradients.
            look: whether gradients are looked at; the row then tells whether one is NaN, infinite, or so
                large that the sum over ranks might be.
            local: gradients that stay here, to be looked at as well.
            rows: whether all ranks' rows are needed in every step, as terms do.

        Returns:
            sum_k D_k g_k / sum_k D_k in each gradient's dtype, and all rows, ``(size, len(row))`` float64,
            with the times of the exchange before; with many ranks (:attr:`summing`), where nobody needs more,
            one row of sums (:attr:`hvdloss.losses.ledger.Ledgers.totals`). Gradients of one rank alone are
            returned as they are.

        Collectives: one all-reduce per bucket of dense gradients (:func:`hvdloss.comm.plan.plan_buckets`),
        two all-gathers per sparse one; the ledgers ride in a bucket, and what terms tell is one small message
        more; or all of it is one where there is no such bucket or `compress` is given. Where the ledgers go
        ahead, whether gradients are finite is one small message more. With many ranks there is an all-gather
        of the rows where somebody reads them or something is wrong. None with one rank.
        """
        register_trace()
        look = tf.convert_to_tensor(look)
        drop = nonfinite == "drop"
        if local:
            local = [tf.convert_to_tensor(g.values if isinstance(g, tf.IndexedSlices) else g) for g in local]
        if factor is not None:
            factor = tf.convert_to_tensor(factor, tf.float64)
        if self.size == 1:
            bad = (
                look
                & (row[1] > 0)
                & exceeds([*gradients, *local], [g.dtype.max for g in (*gradients, *local)])
            )
            if factor is not None:
                share = tf.math.divide_no_nan(factor, row[1])
                gradients = [scale_grad(g, share) for g in gradients]
            table = self.sum_table(with_nonfinite_flag(row, bad, drop))
            return with_dependencies(gradients, judged(table)), table
        factor = row[1] if factor is None else factor
        if self.sparse_as_dense:
            gradients = [tf.convert_to_tensor(g) for g in gradients]
        gradients = [_of_shape(g, v) for g, v in zip(gradients, variables, strict=True)]
        if not tf.executing_eagerly():
            plan = self._plan(gradients, variables, compress is not None, row.shape[0] > LEDGER_WIDTH, drop)
            return self._reduce(
                list(gradients),
                row,
                factor,
                plan,
                compress,
                judged,
                drop=drop,
                look=look,
                local=local,
                rows=rows,
            )
        # One function, so that the messages are under way together; eager calls would wait for each.
        # One for each shape of the gradients, so that their sizes are known inside.
        shapes = tuple(g.dtype if isinstance(g, tf.IndexedSlices) else (g.dtype, *g.shape) for g in gradients)
        grouped = isinstance(self.groups, list | tuple)  # by variables, not by number
        whose = tuple(map(id, variables)) if grouped else ()
        who = (self.size, self.process_set.process_set_id)
        key = (shapes, whose, *who, row.shape[0], compress is not None, drop, len(local), rows)
        if key not in self._eager:
            plan = self._plan(gradients, variables, compress is not None, row.shape[0] > LEDGER_WIDTH, drop)

            def together(
                gradients: list[Gradient],
                row: tf.Tensor,
                factor: tf.Tensor,
                compress: tf.Tensor | None,
                look: tf.Tensor,
                local: list[tf.Tensor],
            ) -> Any:
                return self._reduce(
                    gradients, row, factor, plan, compress, drop=drop, look=look, local=local, rows=rows
                )

            made = tf.function(together, autograph=False, reduce_retracing=True)
            self._eager[key] = made, self._payload, self.choices
        function, self._payload, self.choices = self._eager[key]
        with raise_root_cause():
            summed, table = function(list(gradients), row, factor, compress, look, list(local))
        judged(table)
        return summed, table

    def travel(self, compressing: AdaptiveCompression | None) -> Callable[[int], CommStats]:
        """Return what tells, when the exchange is over, how its gradients travelled.

        To be asked for right after (or within) :meth:`reduce`; `compressing` says what travels by then.
        """
        messages, full, sent, half = self._payload

        def told(steps: int) -> CommStats:
            moved = half if compressing is not None and compressing.on else sent
            return CommStats(messages, moved, full, steps)

        return told

    def bytes_of(self, dtype: tf.DType, count: int, compressed: bool = False) -> int:
        """Return how many bytes so many numbers have as they travel; if `compressed`, as float16."""
        if dtype == tf.bfloat16:  # which Horovod's TensorFlow operations do not know
            dtype = tf.float32
        if (compressed or self.compression is hvd.Compression.fp16) and dtype.is_floating:
            dtype = tf.float16
        return count * dtype.size

    def _plan(
        self,
        gradients: Sequence[Gradient],
        variables: Sequence[Any],
        choosing: bool,
        telling: bool,
        drop: bool,
    ) -> tuple[tuple[int, ...], ...]:
        """Return which gradients travel together as one message, and note it; sparse ones travel alone.

        `choosing`: whether compression is chosen while training; `telling`: whether terms tell anything;
        `drop`: whether gradients are looked at before anything is sent.
        """
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
            unbucketed_bytes=self.tuning.unbucketed_bytes,
            groups=groups,
        )
        together = [tuple(member.index for member in layout.members) for layout in layouts]
        plan = (*together, *((i,) for i, info in enumerate(infos) if info.sparse))
        travel = self._travel(gradients, plan, choosing, telling, drop)
        self.choices = {**self.choices, **launched(hvd), "comm_plan": travel}
        dense = [g for g in gradients if not isinstance(g, tf.IndexedSlices)]
        # What is sparse, or of a size known only later, is not counted, as nobody knows it beforehand.
        counts = [(g.dtype, g.shape.num_elements() or 0) for g in dense]
        self._payload = (
            travel["messages"],
            sum(dtype.size * n for dtype, n in counts),
            sum(self.bytes_of(dtype, n) for dtype, n in counts),
            sum(self.bytes_of(dtype, n, True) for dtype, n in counts),
        )
        return plan

    def _ledgers_first(self, gradients: Sequence[Gradient]) -> bool:
        """Return whether ledgers must be known before gradients travel, which are then divided before."""
        return self.compression is not hvd.Compression.none or any(g.dtype in _HALF for g in gradients)

    def _ledger_bucket(
        self, gradients: Sequence[Gradient], plan: tuple[tuple[int, ...], ...], choosing: bool
    ) -> int | None:
        """Return the bucket in which the ledgers ride: the last that is a copy anyway. None: in none.

        The last, as they tell of the others' gradients.
        """
        if choosing or self._ledgers_first(gradients):  # 16 bits cannot carry them
            return None
        if self.summing and self.predivide != 1.0:  # sums that are exact must not be divided
            return None
        return next((n for n in reversed(range(len(plan))) if len(plan[n]) > 1), None)

    def _travel(
        self,
        gradients: Sequence[Gradient],
        plan: tuple[tuple[int, ...], ...],
        choosing: bool,
        telling: bool,
        drop: bool,
    ) -> dict[str, int]:
        """Return how many messages a step sends, and what they hold."""
        sparse = sum(isinstance(g, tf.IndexedSlices) for g in gradients)
        buckets = sum(len(members) > 1 for members in plan)
        apart = telling or self._ledger_bucket(gradients, plan, choosing) is None
        return {
            "messages": len(plan) + sparse + apart + (self._ledgers_first(gradients) and not drop),
            "buckets": buckets,
            "unbucketed": len(plan) - buckets - sparse,
            "sparse": sparse,
        }

    def _reduce(
        self,
        gradients: list[Gradient],
        row: tf.Tensor,
        factor: tf.Tensor,
        plan: tuple[tuple[int, ...], ...],
        compress: tf.Tensor | None = None,
        judged: Callable[[tf.Tensor], Sequence[tf.Operation]] = lambda table: (),
        *,
        drop: bool,
        look: tf.Tensor,
        local: Sequence[tf.Tensor],
        rows: bool,
    ) -> tuple[list[Gradient], tf.Tensor]:
        ledgers_first = self._ledgers_first(gradients)
        ledger_bucket = self._ledger_bucket(gradients, plan, compress is not None)
        sums: list[Gradient] = [None] * len(plan)
        # Side by side in one message: few messages, one pass to scale and one to divide.
        parts = [
            gradients[members[0]]
            if len(members) == 1
            else tf.concat([tf.reshape(gradients[i], [-1]) for i in members], 0)
            for members in plan
        ]
        grow = tf.ones((), tf.float64) if ledgers_first else tf.math.divide_no_nan(factor, self._measure())
        limits = [self._limit(part.dtype, ledgers_first, compress) / grow for part in parts]
        looked = exceeds([*parts, *local], [*limits, *(g.dtype.max for g in local)])
        bad = look & (factor > 0) & looked
        if drop or not ledgers_first:
            row = with_nonfinite_flag(row, bad, drop)
        if drop:
            factor = tf.where(row[1] > 0, factor, tf.zeros_like(factor))
        row = self.timer.with_times(row)
        message = Message(self.process_set.rank(), self.size, self.summing)
        own = self._variable(row)
        table = total = None
        if ledger_bucket is None and self.summing:
            numbers = message.write(own[:LEDGER_WIDTH], tf.float64)
            totals = message.totals(self._sum(numbers, f"{self.name}.ledger"))
        elif ledger_bucket is None:
            table = self._sum(self._own_row(row), f"{self.name}.ledger")
        if ledgers_first:
            total = totals[1] if self.summing else tf.reduce_sum(table[:, 1])
        # Weights are measured in the last step's total: where it is this step's as well, what arrives is
        # divided already, and needs no further pass.
        measure = self._measure()
        scale = tf.math.divide_no_nan(factor, total if ledgers_first else measure)
        for number, part in enumerate(parts):
            name = f"{self.name}.{number}"
            if isinstance(part, tf.IndexedSlices):
                sums[number] = self._gather_sparse(part, scale, name)
            elif number != ledger_bucket:
                sums[number] = self.sum_scaled(part, scale, name, compress)
            else:
                numbers = message.write(own[:LEDGER_WIDTH], part.dtype)
                flat = self._sum(tf.concat([scale_grad(part, scale), numbers], 0), name, self.predivide)
                sums[number], numbers = tf.split(flat, [-1, numbers.shape[0]])
                if self.summing:
                    totals = message.totals(numbers)
                    continue
                table = message.table(tf.round(numbers))
                if row.shape[0] > LEDGER_WIDTH:
                    # What terms tell travels apart: here it would move gradients to other places of the
                    # message, and sums of three and more ranks round by place.
                    told = self._sum(self._own_row(row[LEDGER_WIDTH:]), f"{self.name}.terms")
                    table = tf.concat([table, told], 1)
        if ledgers_first and not drop:  # the ledgers have gone, before gradients could be looked at
            if self.summing:
                there = self.count(bad, "finite")
                totals = tf.concat([totals[:_GRADIENTS], [there], totals[_GRADIENTS + 1 :]], 0)
                row = with_nonfinite_flag(row, bad, drop)
            else:
                told = self.sum_table(tf.cast([bad], tf.float64), "finite")
                table = tf.concat([table[:, :_GRADIENTS], told, table[:, _GRADIENTS + 1 :]], 1)
        if self.summing:
            table = self._asked(totals, row, rows)
            total = totals[1]
        self.timer.end(self.timer.begin(gradients), [*sums, table])
        after = judged(table)
        with tf.control_dependencies(after):
            if ledgers_first:
                sums = [_untouched(g) for g in sums]
            else:
                total = tf.reduce_sum(table[:, 1]) if total is None else total
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

    def _limit(self, dtype: tf.DType, ledgers_first: bool, compress: tf.Tensor | None) -> tf.Tensor:
        """Return the largest size of gradients that surely have a finite sum, as they are sent; float64."""
        largest = dtype.max
        if ledgers_first:  # what is divided before sums up to a mean
            if self.compression is hvd.Compression.fp16:
                largest = min(largest, tf.float16.max)
            return tf.constant(float(largest), tf.float64)
        limit = tf.constant(float(largest) / self.size, tf.float64)
        if compress is None:
            return limit
        return tf.where(compress, tf.constant(float(tf.float16.max), tf.float64), limit)

    def sum_scaled(
        self,
        x: tf.Tensor,
        scale: tf.Tensor,
        name: str,
        compress: tf.Tensor | None = None,
        compression: Any = None,
    ) -> tf.Tensor:
        """Return sum_k scale_k x_k.

        What travels is said by `compress` (float16 where it holds), by `compression`, or by that of all
        gradients: the first that is given.
        """
        x = scale_grad(x, scale)
        # Horovod's TensorFlow operations do not know bfloat16.
        wide = tf.cast(x, tf.float32) if x.dtype == tf.bfloat16 else x

        def summed(compression: Any, name: str) -> tf.Tensor:
            small, context = compression.compress(wide)
            return compression.decompress(self._sum(small, name, self.predivide), context)

        if compress is None:
            return tf.cast(summed(compression or self.compression, name), x.dtype)
        out = tf.cond(
            compress,
            lambda: summed(hvd.Compression.fp16, f"{name}.half"),
            lambda: summed(hvd.Compression.none, name),
        )
        return tf.cast(out, x.dtype)

    def _gather_sparse(self, g: tf.IndexedSlices, scale: tf.Tensor, name: str) -> tf.IndexedSlices:
        """Return the rows of all ranks one after another, which is their sum."""
        with tf.device(self.device_sparse), uncounted():
            values = scale_grad(g.values, scale)
            wide = tf.cast(values, tf.float32) if values.dtype == tf.bfloat16 else values
            options = {"process_set": self.process_set, "ignore_name_scope": True}
            values = tf.cast(hvd.allgather(wide, name=f"{name}.values", **options), g.dtype)
            indices = hvd.allgather(g.indices, name=f"{name}.indices", **options)
        return tf.IndexedSlices(values, indices, g.dense_shape)


def scale_grad(g: Gradient, factor: tf.Tensor) -> Gradient:
    """Return ``g * factor`` in the dtype of `g`; zero where the factor is, whatever `g` holds."""
    if isinstance(g, tf.IndexedSlices):
        return tf.IndexedSlices(scale_grad(g.values, factor), g.indices, g.dense_shape)
    wide = tf.cast(g, tf.float32) if g.dtype in _HALF else g
    return tf.cast(tf.math.multiply_no_nan(wide, tf.cast(factor, wide.dtype)), g.dtype)


def exceeds(gradients: Sequence[Gradient], limits: Sequence[Any]) -> tf.Tensor:
    """Return whether any entry is NaN, infinite, or in size above the limit of its gradient: a bool.

    One pass that only reads: the sum of squares, which is as fast as memory and finite wherever all entries
    are of usual size, mostly settles it.
    """
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients]
    pairs = [
        (
            tf.cast(v, tf.float32) if v.dtype in _HALF else v,
            tf.minimum(tf.cast(limit, tf.float64), tf.cast(v.dtype.max, tf.float64)),
        )
        for v, limit in zip(values, limits, strict=True)
        if v.dtype.is_floating
    ]
    if not pairs:
        return tf.constant(False)
    squares = tf.add_n([tf.cast(tf.nn.l2_loss(v), tf.float64) for v, _ in pairs])  # half of them
    least = tf.reduce_min(tf.stack([limit for _, limit in pairs]))
    fine = (squares <= 0.5 * least * least) & tf.math.is_finite(squares)

    def exactly() -> tf.Tensor:
        within = [tf.reduce_all(tf.cast(tf.abs(v), tf.float64) <= limit) for v, limit in pairs]
        return ~tf.reduce_all(tf.stack(within))

    return tf.cond(fine, lambda: tf.constant(False), exactly)


def with_nonfinite_flag(row: tf.Tensor, bad: tf.Tensor, drop: bool) -> tf.Tensor:
    """Return a rank's row that tells whether its gradients are `bad`.

    With `drop` one that is, or whose loss is, adds nothing to the step and still tells what was wrong.
    """
    flag = tf.cast([bad], row.dtype)
    row = tf.concat([row[:_GRADIENTS], flag, row[_GRADIENTS + 1 :]], 0)
    if not drop:
        return row
    nothing = tf.zeros_like(row)
    emptied = tf.concat([nothing[:_FIRST_KEPT], row[_FIRST_KEPT:LEDGER_WIDTH], nothing[LEDGER_WIDTH:]], 0)
    return tf.where((row[_GRADIENTS] > 0) | (row[_LOSSES] > 0), emptied, row)


def _kind(g: Gradient | None) -> str:
    """Return how a gradient travels: dtype and layout; nothing for none."""
    if g is None:
        return ""
    return f"{'sparse' if isinstance(g, tf.IndexedSlices) else 'dense'} {tf.as_dtype(g.dtype).name}"


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


def with_dependencies(gradients: Sequence[Gradient], after: Sequence[tf.Operation]) -> list[Gradient]:
    """Return `gradients`, which in a graph cannot be used before the operations `after` are done."""
    if not after:
        return list(gradients)
    with tf.control_dependencies(after):
        return [tf.nest.map_structure(tf.identity, g, expand_composites=True) for g in gradients]


def empty_row(more: int = 0) -> tf.Tensor:
    """Return the row of a rank that adds nothing to a step, with `more` numbers of terms."""
    return tf.zeros(LEDGER_WIDTH + more, tf.float64)
