"""The protocol of a term: something measured on every rank that has a price and may drive policies.

A term sees each batch of the objective (:class:`Batch`), reduces it to a few sums that are all-reduced with
the step's ledgers (:meth:`Term.observe`), gets all ranks' sums when the step is over
(:meth:`Term.on_step_end`), and returns one value per rank: C(k), D(k), or whatever a user measures. It may
also weight samples (:meth:`Term.weights`) or add a penalty to the local loss (:meth:`Term.penalty`).

All that a term learns about other ranks is in the table that :meth:`Term.on_step_end` gets, which is equal
on all ranks; what it decides from that alone is therefore equal on all ranks too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.comm.communicator import Communicator
from hvdloss.errors import ConfigError
from hvdloss.losses.ledger import COLUMN

__all__ = ["Batch", "CommStats", "Decision", "Policy", "StepStats", "Term", "check_price"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TermReport:
    """One term of the objective in one step.

    Attributes:
        unit: of the values.
        price: of one unit, in units of the loss.
        values: one per rank.
        total: their sum.
        priced: ``price * total``, its part of the objective.
        details: more of the term; plain values.
    """

    unit: str
    price: float
    values: list[float]
    total: float
    priced: float
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """What a term may look at in one call of the objective: this rank's elements, as framework tensors.

    Attributes:
        ops: operations that work in every framework (:class:`hvdloss.losses.reduction.ArrayOps`), eagerly, in
            a graph, and on a device without waiting for it.
        prediction: the argument of the loss; carries the gradient.
        target: the argument of the loss.
        losses: per element; carries the gradient.
        weight: the caller's weights in the shape of `losses`, before any term changed them.
        keys: what the caller passed as ``keys=`` (a domain, a hospital, a language), or None.
        state: float64 vector, the term's :attr:`Term.state` after the last step.
        class_axis: the axis of `prediction` that `losses` lacks, for losses over classes; else None.
        rank: this rank.
    """

    ops: Any
    prediction: Any
    target: Any
    losses: Any
    weight: Any
    keys: Any
    state: Any
    class_axis: int | None
    rank: int


@dataclass(frozen=True)
class CommStats:
    """Statistics of one exchange of gradients or parameters, equal on all ranks.

    Attributes:
        messages: number of collectives.
        bytes: payload per rank, as sent.
        full_bytes: the same without compression.
        steps: optimizer steps since the exchange before: 1, or the synchronisation period.
        parameters: whether parameters were averaged (after local steps) rather than gradients.
    """

    messages: int = 0
    bytes: int = 0
    full_bytes: int = 0
    steps: int = 1
    parameters: bool = False

    def state_dict(self) -> tuple[Any, ...]:
        """Return it as plain numbers."""
        return astuple(self)

    @classmethod
    def from_state_dict(cls, state: Any) -> CommStats:
        """Return the statistics of a :meth:`state_dict`."""
        return cls(*state)


@dataclass(frozen=True)
class StepStats:
    """Statistics of a finished step: columns over ranks, equal on all ranks but for `rank`.

    Attributes:
        step: number of the step, from 1; of the last one, where several lie between two exchanges.
        rank: this rank.
        table: all ranks' ledgers, float64 ``(ranks, LEDGER_WIDTH)`` (see :mod:`hvdloss.losses.ledger`).
        sums: the term's own sums, float64 ``(ranks, width)``.
        comm_stats: of their exchange.
        reduction: of the objective.
    """

    step: int
    rank: int
    table: Array
    sums: Array
    comm_stats: CommStats
    reduction: str = "mean"

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.table)

    def column(self, field: str) -> Array:
        """Return one field of all ranks' ledgers, float64 ``(ranks,)``."""
        return self.table[:, COLUMN[field]]

    @property
    def losses(self) -> Array:
        """Each rank's local loss; NaN where it had no weight."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(
                self.column("denominator") > 0, self.column("numerator") / self.column("denominator"), np.nan
            )

    @property
    def loss(self) -> float:
        """The loss of all ranks' elements; NaN without any."""
        total = float(self.column("denominator").sum())
        return float(self.column("numerator").sum()) / total if total else float("nan")


@dataclass(frozen=True)
class Decision:
    """Something a policy changed about training, and why; equal on all ranks.

    Attributes:
        step: after which it takes effect.
        what: "batch sizes", "period", "compression".
        before: the old value, JSON-able.
        after: the new one.
        reason: one sentence with the numbers behind it.
    """

    step: int
    what: str
    before: Any
    after: Any
    reason: str


class Policy:
    """What a term's measurements drive; held by a term (``policies=``), called after every step.

    The built-in ones are in :mod:`hvdloss.terms.policies`.
    """

    #: Whether ranks take optimizer steps without synchronising.
    takes_local_steps: bool = False
    #: Names of the attributes that are saved and restored, as plain values and arrays: in checkpoints and
    #: when an elastic job changes its ranks; the second ones only with as many ranks as saved them.
    state_attrs: tuple[str, ...] = ()
    per_rank_state_attrs: tuple[str, ...] = ()

    def reset(self, rank: int, size: int) -> None:
        """Start over with these ranks (again when an elastic job changes them)."""

    def on_step_end(self, term: Any, step: StepStats) -> Sequence[Decision]:
        """Record a finished step; return the decisions, equal on all ranks."""
        return ()


class Term:
    """Base class of every term; a subclass overrides what it needs.

    Attributes:
        name: key of the term in the reports; unique among an objective's terms.
        unit: of its values.
        price: what one unit costs in units of the loss, lambda in J = L + lambda * sum of values.
        width: number of float64 sums that :meth:`observe` returns.
        has_weights: True if :meth:`weights` may return something other than None.
        has_penalty: True if :meth:`penalty` may.
        state: float64 vector passed to every batch (``batch.state``); its length never changes after
            :meth:`reset`.
        policies: what its measurements drive.
        state_attrs, per_rank_state_attrs: names of the attributes that are saved in checkpoints and restored,
            also when an elastic job changes its ranks; the second ones only with as many ranks. Their values
            are numbers, strings, None, arrays, and lists, tuples and dicts of them.

    A term that counts tokens per rank, and reports the share of padding::

        class Padding(Term):
            name, unit, width = "padding", "share", 2

            def observe(self, batch):
                return [batch.ops.count(batch.weight == 0), batch.ops.count(batch.weight >= 0)]

            def on_step_end(self, step):
                return step.sums[:, 0] / np.maximum(step.sums[:, 1], 1)
    """

    name: str = ""
    unit: str = ""
    price: float = 0.0
    width: int = 0
    has_weights: bool = False
    has_penalty: bool = False
    state: Array = np.zeros(0)
    policies: tuple[Policy, ...] = ()
    state_attrs: tuple[str, ...] = ()
    per_rank_state_attrs: tuple[str, ...] = ()

    def reset(self, rank: int, size: int) -> None:
        """Start over with these ranks."""

    def prepare(self, communicator: Communicator) -> None:
        """Measure what is needed before the first step; called on all ranks, may block in collectives."""

    def prepared_state(self) -> Any:
        """Return what :meth:`prepare` measured, JSON-able, or None; for the log."""
        return None

    def load_prepared_state(self, state: Any) -> None:
        """Restore the :meth:`prepared_state` of a run that this one replays."""

    def observe(self, batch: Batch) -> Any:
        """Return `width` sums over the batch: a list of float64 scalars, or one vector.

        Sums, so that micro-batches and ranks merge by adding. Traced once under ``tf.function``: use
        ``batch.ops`` or the framework's operations, and no Python state that changes.
        """
        raise NotImplementedError(f"{type(self).__name__} has width={self.width} but no observe()")

    def weights(self, batch: Batch) -> Any:
        """Return factors for the elements' weights that broadcast to ``batch.losses``, or None."""
        return None

    def penalty(self, batch: Batch) -> Any:
        """Return a scalar to add to the local loss, or None. It counts once, not once per rank."""
        return None

    def on_step_end(self, step: StepStats) -> npt.ArrayLike:
        """Record a finished step; return one value per rank, equal on all ranks."""
        return np.zeros(step.size)

    def update_state(self) -> None:
        """Set :attr:`state` to what the next batches read; called after the policies have decided."""

    def details(self) -> dict[str, Any]:
        """Return more of the last step for the report: JSON-able, equal on all ranks."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks, JSON-able; compared before the first step."""
        return {"price": self.price, "policies": [type(policy).__name__ for policy in self.policies]}


def check_price(price: Any, name: str) -> float:
    """Return a price that can be used.

    Raises:
        ConfigError: not a finite number of at least 0.
    """
    if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < float("inf"):
        raise ConfigError(f"price={price!r} of {name} must be a finite number of at least 0")
    return float(price)
