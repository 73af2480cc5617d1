"""The global view of a finished step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from hvdloss.errors import UsageError
from hvdloss.losses.ledger import COLUMN, Ledger, Ledgers
from hvdloss.losses.reduction import finish
from hvdloss.terms.term import TermReport

__all__ = ["Interest", "LossReport", "RankReport", "RankReports", "StepReport"]


@dataclass(frozen=True)
class RankReport:
    """One rank's part of a step.

    Attributes:
        rank: within the optimizer's process set.
        loss: of the rank's own elements; NaN if it had none.
        weight: sum of its weights.
        elements: number of its elements with a weight other than zero.
        micro_batches: backward passes it made.
        communication: seconds it was held up by communication in the step before this one.
        skew: divergence of its data from the global distribution; None where nothing measures it.
        computation: seconds, up to the end of the step before this one, that it was not held up.
        nonfinite: what of it was NaN or infinite in this step: ``"loss"``, ``"gradient"``, or nothing.
        dropped: steps so far to which it added nothing for that reason (``nonfinite="drop"``).
    """

    rank: int
    loss: float
    weight: float
    elements: int
    micro_batches: int
    communication: float
    skew: float | None = None
    computation: float = 0.0
    nonfinite: str = ""
    dropped: int = 0


class Interest:
    """Whether this rank reads the parts of single ranks; a copy starts without interest.

    Args:
        notify: called when reading begins.
    """

    def __init__(self, notify: Callable[[], None] | None = None) -> None:
        self.on = False
        self._notify = notify

    def begin(self) -> None:
        """Note that somebody reads, from the next step on."""
        self.on = True
        if self._notify is not None:
            self._notify()

    def __reduce__(self) -> tuple[Any, ...]:
        return Interest, ()


class RankReports(Sequence[RankReport]):
    """One :class:`RankReport` per rank, each made when it is looked at; compares equal to a list of them.

    With many ranks (:attr:`hvdloss.comm.tuning.Tuning.table_ranks`) what single ranks did is gathered only in
    steps of which somebody is known to read it. Looking at a report without it raises, and has it gathered
    from the next step on.

    Args:
        ledgers: of the step.
        reduction: of the objective.
        lost: the ranks whose loss is not known.
        skew: one per rank, or None.
        dropped: one per rank; empty for none.
        interest: set when somebody reads what was not gathered.
    """

    def __init__(
        self,
        ledgers: Ledgers,
        reduction: str,
        lost: Sequence[int] = (),
        skew: Sequence[float] | None = None,
        dropped: Sequence[int] = (),
        interest: Interest | None = None,
    ) -> None:
        self._ledgers, self._reduction, self._lost = ledgers, reduction, lost
        self._skew, self._dropped, self._interest = skew, dropped, interest
        self._columns: dict[str, list[Any]] | None = None

    @property
    def gathered(self) -> bool:
        """Whether they are there to be looked at."""
        return self._ledgers.table is not None

    def read(self) -> Mapping[str, list[Any]] | None:
        """Return :meth:`columns`, or None where they were not gathered: from the next step on they are."""
        if not self.gathered:
            if self._interest is not None:
                self._interest.begin()
            return None
        return self.columns()

    @property
    def dropped(self) -> int:
        """Steps so far to which a rank added nothing (``nonfinite="drop"``), of all ranks; always known."""
        return int(np.sum(self._dropped))

    @property
    def average(self) -> float | None:
        """See :attr:`StepReport.averaged_loss`."""
        if self._reduction == "sum":
            return None
        if not self.gathered:
            self.read()
            return None
        return math.nan if self._lost else self._ledgers.average()

    def columns(self) -> Mapping[str, list[Any]]:
        """Return every field of all ranks by its name, as lists of plain values.

        Raises:
            UsageError: they were not gathered in this step.
        """
        if not self.gathered:
            self.read()
            raise UsageError(
                f"what single ranks did in this step was not gathered: with as many as {len(self)} ranks it "
                f"is only in steps of which somebody is known to read it, as this rank is from the next one "
                f"on. Follow the run (hvd.Recorder, a tracker), try again after the next step, or set "
                f"HVDLOSS_TABLE_RANKS={len(self)} on all ranks"
            )
        if self._columns is None:
            self._columns = self._made()
        return self._columns

    def _made(self) -> dict[str, list[Any]]:
        size, ledgers = len(self), self._ledgers
        columns = ledgers.rows.T
        numerator, denominator = columns[_RATIO]
        with np.errstate(all="ignore"):
            loss = numerator if self._reduction == "sum" else numerator / denominator
        loss = np.where(denominator != 0, loss, np.nan)
        loss[list(self._lost)] = np.nan
        elements, micro_batches = _rounded(columns[_COUNTS])
        weight, communication, computation = columns[_NUMBERS].tolist()
        nonfinite = [""] * size
        for rank in ledgers.ranks_with("nonfinite_gradients"):
            nonfinite[rank] = "gradient"
        for rank in ledgers.ranks_with("nonfinite_losses"):
            nonfinite[rank] = "loss"
        return {
            "rank": list(range(size)),
            "loss": loss.tolist(),
            "weight": weight,
            "elements": elements,
            "micro_batches": micro_batches,
            "communication": communication,
            "skew": [None] * size if self._skew is None else list(self._skew),
            "computation": computation,
            "nonfinite": nonfinite,
            "dropped": [int(n) for n in self._dropped] if len(self._dropped) else [0] * size,
        }

    def __len__(self) -> int:
        return len(self._ledgers)

    @overload
    def __getitem__(self, index: int) -> RankReport: ...

    @overload
    def __getitem__(self, index: slice) -> list[RankReport]: ...

    def __getitem__(self, index: int | slice) -> RankReport | list[RankReport]:
        columns = self.columns()
        if isinstance(index, slice):
            return [self[rank] for rank in range(*index.indices(len(self)))]
        return RankReport(*(columns[name][index] for name in _FIELDS))

    def __iter__(self) -> Iterator[RankReport]:
        columns = self.columns()
        return (RankReport(*row) for row in zip(*(columns[name] for name in _FIELDS), strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        if isinstance(other, RankReports) and not (self.gathered and other.gathered):
            return self.gathered == other.gathered and len(self) == len(other)
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self)) if self.gathered else f"<{len(self)} ranks, not gathered>"


_FIELDS = [one.name for one in fields(RankReport)]
_RATIO, _COUNTS, _NUMBERS = (
    np.array([COLUMN[name] for name in names])
    for names in (
        ("numerator", "denominator"),
        ("elements", "micro_batches"),
        ("weight", "communication", "computation"),
    )
)


def _rounded(columns: npt.NDArray[np.float64]) -> list[list[int]]:
    """Return numbers as whole ones."""
    if np.abs(columns).max(initial=0.0) < 2**53:
        return [*np.rint(columns).astype(np.int64).tolist()]
    return [list(map(round, column)) for column in columns.tolist()]


@dataclass(frozen=True)
class LossReport:
    """One of several losses of a step, over all ranks (:class:`hvdloss.step.several.Objectives`).

    Attributes:
        value: of all its elements; NaN if there were none.
        weight: sum of their weights; 0 where the task was absent everywhere.
        elements: number of its elements with a weight other than zero.
        factor: what it was multiplied with in the sum of losses.
    """

    value: float
    weight: float
    elements: int
    factor: float

    @property
    def part(self) -> float:
        """Its part of the step's loss: factor times value, and 0 without elements."""
        return self.factor * self.value if self.weight else 0.0


@dataclass(frozen=True)
class StepReport:
    """What all ranks together did in one step; equal on every rank.

    Attributes:
        step: counted from 1.
        loss: the loss of all elements of the step, as the reduction defines it; with several objectives the
            sum of their parts, and a rank's the mean of what its backward passes showed.
        weight: sum of all weights.
        elements: number of elements with a weight other than zero.
        objective_value: the loss plus the priced terms.
        ranks: one :class:`RankReport` per rank; with many ranks see :class:`RankReports`.
        choices: how gradients were sent: value and decider of every choice of
            :class:`hvdloss.comm.tuning.Tuning` and of the launch, and as ``"comm_plan"`` the numbers of
            messages, of buckets, and of unbucketed and sparse gradients, as this rank has them.
        terms: by name, what the objective's terms came to (:class:`TermReport`).
        skipped: steps so far in which nothing was updated, since a loss or gradient was NaN or infinite
            (``nonfinite="skip"``); `ranks` show which rank it was in this one.
        samples: elements of all steps up to this one, those before a checkpoint or commit that training went
            on from among them; None where they were not counted.
        losses: by name, what each came to (:class:`LossReport`), if the optimizer has several objectives.
    """

    step: int
    loss: float
    weight: float
    elements: int
    objective_value: float
    ranks: RankReports
    choices: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    terms: Mapping[str, TermReport] = field(default_factory=dict)
    skipped: int = 0
    samples: int | None = None
    losses: Mapping[str, LossReport] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        step: int,
        ledgers: Sequence[Ledger],
        reduction: str,
        choices: Mapping[str, Any] | None = None,
        terms: Mapping[str, TermReport] | None = None,
        *,
        nonfinite: str = "raise",
        skipped: int = 0,
        dropped: Sequence[int] = (),
        samples: int | None = None,
        interest: Interest | None = None,
        losses: Mapping[str, LossReport] | None = None,
    ) -> StepReport:
        """Return the report of the step whose ranks' ledgers these are.

        `nonfinite` is the objective's policy; `skipped`, and `dropped` by rank (none if empty), what it came
        to so far; `samples` the elements of all steps; `interest` is set when somebody reads `ranks`
        that were not gathered; `losses` what each of several came to.
        """
        ledgers = Ledgers.of(ledgers)
        # Sums that were not finite were sent as zeros: the rest is not the loss of these elements.
        lost = [] if nonfinite == "drop" else ledgers.ranks_with("nonfinite_losses")
        loss = (
            float("nan")
            if lost
            else finish(reduction, ledgers.total("numerator"), ledgers.total("denominator"))
        )
        if losses:
            loss = math.fsum(one.part for one in losses.values())
        terms = dict(terms or {})
        return cls(
            step=step,
            loss=loss,
            weight=ledgers.total("weight"),
            elements=ledgers.elements,
            objective_value=loss + math.fsum(term.priced for term in terms.values()),
            ranks=RankReports(
                ledgers, reduction, lost, terms["skew"].values if "skew" in terms else None, dropped, interest
            ),
            choices=dict(choices or {}),
            terms=terms,
            skipped=skipped,
            samples=samples,
            losses=dict(losses or {}),
        )

    @property
    def averaged_loss(self) -> float | None:
        """What averaging over ranks would have reported of this step: the mean of ranks' own means.

        A rank's own mean is that of all its micro-batches together; a rank without weight has none, and is
        left out. None for ``"sum"``, which averages nothing, and where what single ranks did was not gathered
        (see :class:`RankReports`): from the next step on it is. Costs no message else.
        """
        return self.ranks.average

    @property
    def averaging_error(self) -> float | None:
        """How far :attr:`averaged_loss` is off, relative to the loss: 0.25 is a quarter too high.

        Of the loss: ranks whose losses agree may have gradients that do not.
        """
        averaged = self.averaged_loss
        if averaged is None or averaged == self.loss:
            return None if averaged is None else 0.0
        return (averaged - self.loss) / abs(self.loss) if self.loss else math.copysign(math.inf, averaged)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain numbers, lists and dicts, ready for JSON.

        Without what single ranks did, where that was not gathered: ``ranks``, ``averaged_loss`` and
        ``averaging_error`` are None.
        """
        known = self.ranks.gathered
        whole = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            **whole,
            "averaged_loss": self.averaged_loss if known else None,
            "averaging_error": self.averaging_error if known else None,
            "ranks": [asdict(one) for one in self.ranks] if known else None,
            "choices": dict(self.choices),
            "terms": {name: asdict(term) for name, term in self.terms.items()},
            "losses": {name: asdict(one) for name, one in self.losses.items()},
        }
