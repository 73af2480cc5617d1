"""The protocol of a term: something measured on every rank that has a price and may act.

A term sees each batch of the objective (:class:`Batch`), tells a few sums of it that travel with the
step's ledgers (:meth:`Term.observe`), gets all ranks' sums back when the step is over
(:meth:`Term.close`), and gives one value per rank: C(k), D(k), or whatever a user measures. It may also
weigh samples (:meth:`Term.weights`) or add a penalty to the local loss (:meth:`Term.penalty`).

Everything a term learns of other ranks is in the table that :meth:`Term.close` gets, which is equal on
all ranks; what it decides from that alone is therefore equal on all ranks too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.communicator import Communicator
from hvdloss.errors import ConfigError
from hvdloss.ledger import COLUMN

__all__ = ["Act", "Batch", "Closed", "Decision", "Term", "Travel", "check_price"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Batch:
    """What a term may look at in one call of the objective: this rank's elements, as framework tensors.

    Attributes:
        ops: operations that work in every framework (:class:`hvdloss.reduction.ArrayOps`), eagerly, in a
            graph, and on a device without waiting for it.
        prediction: as the loss got it; carries the gradient.
        target: as the loss got it.
        losses: per element; carries the gradient.
        weight: the caller's weights in the shape of `losses`, before any term changed them.
        keys: what the caller passed as ``keys=`` (a domain, a hospital, a language), or None.
        state: float64 vector, what the term's :attr:`Term.state` held after the last step.
        class_axis: the axis of `prediction` that `losses` lack, for losses over classes; else None.
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
class Travel:
    """How what was just summed over ranks travelled, as far as all ranks know it alike.

    Attributes:
        messages: collectives of the exchange.
        bytes: of payload in them, per rank, as it travelled.
        full_bytes: the same without compression.
        steps: optimizer steps since the exchange before: 1, or the synchronisation period.
        parameters: whether parameters travelled (after local steps) rather than gradients.
    """

    messages: int = 0
    bytes: int = 0
    full_bytes: int = 0
    steps: int = 1
    parameters: bool = False

    def memory(self) -> tuple[Any, ...]:
        """Return it as plain numbers."""
        return astuple(self)

    @classmethod
    def remembered(cls, told: Any) -> Travel:
        """Return what :meth:`memory` told of."""
        return cls(*told)


@dataclass(frozen=True)
class Closed:
    """A finished step, as every rank sees it: columns over ranks.

    Attributes:
        step: number of the step, from 1; of the last one, where several lie between two exchanges.
        rank: this rank.
        table: all ranks' ledgers, float64 ``(ranks, WIDTH)`` (see :mod:`hvdloss.ledger`).
        rows: the term's own sums, float64 ``(ranks, width)``.
        travel: how they travelled.
        reduction: of the objective.
    """

    step: int
    rank: int
    table: Array
    rows: Array
    travel: Travel
    reduction: str = "mean"

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.table)

    def column(self, field: str) -> Array:
        """Return one field of all ranks' ledgers, float64 ``(ranks,)``."""
        return self.table[:, COLUMN[field]]

    @property
    def losses(self) -> Array:
        """Each rank's own loss; NaN where it had no weight."""
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
    """Something a term changed about training, and why; equal on all ranks.

    Attributes:
        step: after which it holds.
        what: "batch sizes", "period", "compression".
        before: the old value, JSON-able.
        after: the new one.
        reason: one sentence with the numbers it rests on.
    """

    step: int
    what: str
    before: Any
    after: Any
    reason: str


class Act:
    """What a term does about what it measured; held by a term (``acts=``), driven after every step.

    The built-in ones are in :mod:`hvdloss.control` and :mod:`hvdloss.terms`.
    """

    #: whether ranks take steps without each other
    steps_alone: bool = False
    #: attributes that a run which goes on from a checkpoint, or with other ranks, has again; and those that
    #: are of the ranks there were, so that only as many ranks have them again. Plain values and arrays.
    remembers: tuple[str, ...] = ()
    remembers_of_ranks: tuple[str, ...] = ()

    def begin(self, rank: int, size: int) -> None:
        """Start afresh with these ranks (again when an elastic job changes them)."""

    def close(self, term: Any, step: Closed) -> Sequence[Decision]:
        """Take note of a finished step; return what was decided, equal on all ranks."""
        return ()


class Term:
    """Base class of every term; a subclass overrides what it needs.

    Attributes:
        name: key of the term in the reports; unique among an objective's terms.
        unit: of its values.
        price: what one unit costs in units of the loss, lambda in J = L + lambda * sum of values.
        width: how many float64 sums :meth:`observe` tells.
        weighs: True if :meth:`weights` may return something else than None.
        penalizes: True if :meth:`penalty` may.
        state: float64 vector handed to every batch (``batch.state``); its length never changes after
            :meth:`begin`.
        acts: what it does about what it measures.
        remembers, remembers_of_ranks: names of attributes that a run which goes on from a checkpoint, or
            with other ranks in an elastic job, has again; the second ones only with the same ranks. Their
            values are numbers, strings, None, arrays, and lists, tuples and dicts of them.

    A term that counts tokens per rank, and reports the share of padding::

        class Padding(Term):
            name, unit, width = "padding", "share", 2

            def observe(self, batch):
                return [batch.ops.count(batch.weight == 0), batch.ops.count(batch.weight >= 0)]

            def close(self, step):
                return step.rows[:, 0] / np.maximum(step.rows[:, 1], 1)
    """

    name: str = ""
    unit: str = ""
    price: float = 0.0
    width: int = 0
    weighs: bool = False
    penalizes: bool = False
    state: Array = np.zeros(0)
    acts: tuple[Act, ...] = ()
    remembers: tuple[str, ...] = ()
    remembers_of_ranks: tuple[str, ...] = ()

    def begin(self, rank: int, size: int) -> None:
        """Start afresh with these ranks."""

    def prepare(self, communicator: Communicator) -> None:
        """Measure what is needed before the first step; all ranks call, and blocking collectives may run."""

    def prepared(self) -> Any:
        """Return what :meth:`prepare` measured, JSON-able, or None; for the log."""
        return None

    def restore_prepared(self, state: Any) -> None:
        """Take what :meth:`prepared` gave in a run that this one repeats."""

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

    def close(self, step: Closed) -> npt.ArrayLike:
        """Take note of a finished step; return one value per rank, the same on all ranks."""
        return np.zeros(step.size)

    def settle(self) -> None:
        """Make :attr:`state` what the next batches should see; called after the acts have decided."""

    def details(self) -> dict[str, Any]:
        """Return more of the last step for the report: JSON-able, equal on all ranks."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks, JSON-able; compared before the first step."""
        return {"price": self.price, "acts": [type(act).__name__ for act in self.acts]}


def check_price(price: Any, name: str) -> float:
    """Return a price that can be used.

    Raises:
        ConfigError: not a finite number of at least 0.
    """
    if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < float("inf"):
        raise ConfigError(f"price={price!r} of {name} must be a finite number of at least 0")
    return float(price)
