"""The ledger: what one rank adds to one step, and the checks of a step against all ranks' ledgers.

A ledger is a short vector of sums. Merging is adding, so the micro-batches of a rank, and the ranks of
a step, merge in any order and grouping (a commutative monoid; the tests check the laws).

Ledgers are exchanged in one of two ways. Up to :attr:`hvdloss.comm.tuning.Tuning.table_ranks` ranks they are
one
float64 matrix with a row per rank, of which each rank fills its own: the sum over ranks is the table of all
ledgers. With more ranks only their sums are exchanged (:class:`Sums`), a few numbers whatever the number of
ranks; the rows are gathered when the sums show that somebody needs them (:attr:`Ledgers.needs_rows`). Either
way all ranks know the same.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from hvdloss.comm.exact import digits_for
from hvdloss.errors import (
    ConfigError,
    HvdlossError,
    NonFiniteGradientError,
    NonFiniteLossError,
    NoWeightError,
    RankError,
    UsageError,
    WeightError,
)
from hvdloss.losses.passes import SAME
from hvdloss.losses.reduction import finish

__all__ = [
    "COLUMN",
    "FAULT_COLUMNS",
    "GATHER_COLUMNS",
    "LEDGER_WIDTH",
    "NONFINITE_COLUMNS",
    "NONFINITE_MODES",
    "Ledger",
    "Ledgers",
    "Sums",
    "check_nonfinite_mode",
    "check_step",
    "common_factor",
    "nonfinite_ranks",
    "pack",
    "unpack",
]

#: What to do with a step in which the loss or a gradient of some rank is NaN or infinite.
NONFINITE_MODES = ("raise", "skip", "drop")


@dataclass(frozen=True)
class Ledger:
    """One rank's part of one step; every field is a sum.

    Attributes:
        numerator: of the reduction (see :mod:`hvdloss.losses.reduction`).
        denominator: of the reduction; the weight of the rank's gradient.
        weight: sum of the weights.
        elements: number of elements with a weight other than zero.
        micro_batches: backward passes in the step.
        negative_weights: weights below zero.
        nonfinite_weights: weights that are NaN or infinite.
        nonfinite_losses: micro-batches whose loss is NaN or infinite.
        nonfinite_gradients: 1 if one of the rank's gradients is NaN or infinite, or so large that the sum
            over ranks might be.
        untracked_backwards: backward passes that reached parameters without passing through the objective, or
            through several calls of it with different weight sums.
        failed: 1 if the rank cannot go on.
        communication: seconds the rank was blocked by communication in the step before.
        computation: seconds between the ends of the two steps before in which it was not.
        drift_sqnorm: after local steps, the squared norm of the rank's update times its denominator.
        mean_update_sqnorm: squared norm of the mean update of the exchange before, as computed on this rank.
        factor: the rank's loss was multiplied with, apart from a division by the passes.
        has_next: 1 if the rank has more data after this step (:mod:`hvdloss.data.uneven`).
        late: 1 if the rank's gradients were reduced only when it updated: it had fewer micro-batches.
        preemption_requested: 1 if the rank is to be preempted (:mod:`hvdloss.train.preemption`).
        hooks: number of hooks that the user has set on the rank's parameters.
        rows_requested: 1 if the rank reads the parts of single ranks (:attr:`hvdloss.StepReport.ranks`).
        rescaled: 1 if `factor` differs from that of the step before, 2 if it differs between micro-batches.
    """

    numerator: float = 0.0
    denominator: float = 0.0
    weight: float = 0.0
    elements: float = 0.0
    micro_batches: float = 0.0
    negative_weights: float = 0.0
    nonfinite_weights: float = 0.0
    nonfinite_losses: float = 0.0
    nonfinite_gradients: float = 0.0
    untracked_backwards: float = 0.0
    failed: float = 0.0
    communication: float = 0.0
    computation: float = 0.0
    drift_sqnorm: float = 0.0
    mean_update_sqnorm: float = 0.0
    factor: float = 0.0
    has_next: float = 0.0
    late: float = 0.0
    preemption_requested: float = 0.0
    hooks: float = 0.0
    rows_requested: float = 0.0
    rescaled: float = 0.0

    @classmethod
    def zero(cls) -> Ledger:
        """Return the ledger of a rank without data: the neutral element of merging."""
        return cls()

    def merge(self, other: Ledger) -> Ledger:
        """Return the ledger of both parts together."""
        # Not astuple, which copies deeply: with a listener this runs in every step.
        return Ledger(*map(operator.add, vars(self).values(), vars(other).values()))

    def finish(self, reduction: str) -> float:
        """Return the loss of the elements of this ledger; NaN where there is no weight."""
        return finish(reduction, self.numerator, self.denominator)

    @classmethod
    def of_row(cls, row: npt.ArrayLike, **more: float) -> Ledger:
        """Return the ledger of a row of tensors (:meth:`Contribution.row`), plus `more` fields."""
        return cls(*map(float, np.asarray(row, dtype=np.float64)), **more)


#: Column of each field in a table of ledgers.
COLUMN = {field.name: number for number, field in enumerate(fields(Ledger))}
LEDGER_WIDTH = len(COLUMN)
# Columns in which anything above zero makes a step invalid (see `check_step`); so does no denominator.
FAULT_COLUMNS = slice(5, 11)
# Those of them that only raise with nonfinite="raise".
NONFINITE_COLUMNS = slice(7, 9)
# Fields that are summed exactly, over the whole range of float64; and fields of which the number of ranks is
# counted on which they are above zero.
_SUMMED = slice(0, 4)
_COUNTED = np.array([*range(4, 11), *range(COLUMN["has_next"], LEDGER_WIDTH)])
# Columns that need the rows of single ranks: to name a rank in an error, or because somebody reads them.
GATHER_COLUMNS = np.array(
    [*range(FAULT_COLUMNS.start, FAULT_COLUMNS.stop), *range(COLUMN["preemption_requested"], LEDGER_WIDTH)]
)


def check_nonfinite_mode(nonfinite: str) -> str:
    """Return `nonfinite` if it is one of :data:`NONFINITE_MODES`, else raise ConfigError."""
    if nonfinite not in NONFINITE_MODES:
        raise ConfigError(
            f"nonfinite={nonfinite!r} is not known; choose one of {', '.join(map(repr, NONFINITE_MODES))}: "
            f"raise the same error on every rank, skip the step on every rank, or drop the rank's part"
        )
    return nonfinite


def pack(ledger: Ledger, rank: int, size: int, more: int = 0) -> npt.NDArray[np.float64]:
    """Return the float64 matrix ``(size, LEDGER_WIDTH + more)``, zero but for `ledger` in row `rank`.

    The `more` columns are for the sums of terms (:class:`hvdloss.terms.term.Term`).

    Raises:
        ConfigError: a rank out of range.
    """
    if not 0 <= rank < size:
        raise ConfigError(f"rank={rank} is not in 0..{size - 1}")
    table = np.zeros((size, LEDGER_WIDTH + more))
    table[rank, :LEDGER_WIDTH] = list(vars(ledger).values())
    return table


class Ledgers(Sequence[Ledger]):
    """All ranks' ledgers of a step: their sums, and the rows of single ranks where those were gathered.

    A sequence of :class:`Ledger`, each made on access.

    Args:
        totals: float64 ``(LEDGER_WIDTH,)``: sums of the summed fields, and of the others the number of ranks
            on which they are above zero; times and updates are not summed.
        size: number of ranks.
        table: their rows, float64 ``(size, LEDGER_WIDTH)``; None where only sums were exchanged.
    """

    def __init__(
        self, totals: npt.NDArray[np.float64], size: int, table: npt.NDArray[np.float64] | None = None
    ) -> None:
        self.totals, self.size, self.table = totals, size, table

    @classmethod
    def of_table(cls, table: npt.NDArray[np.float64]) -> Ledgers:
        """Return the ledgers of these rows, with the sums rounded once."""
        totals = np.zeros(LEDGER_WIDTH)
        totals[_SUMMED] = [exact_sum(column) for column in table.T[_SUMMED].tolist()]
        totals[_COUNTED] = np.count_nonzero(table.T[_COUNTED] > 0, axis=1)
        return cls(totals, len(table), table)

    @classmethod
    def of(cls, ledgers: Sequence[Ledger]) -> Ledgers:
        """Return `ledgers` unchanged, or those of a list of every rank's ledger."""
        if isinstance(ledgers, Ledgers):
            return ledgers
        return cls.of_table(
            np.array([list(vars(one).values()) for one in ledgers], dtype=np.float64).reshape(
                -1, LEDGER_WIDTH
            )
        )

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Ledger: ...

    @overload
    def __getitem__(self, index: slice) -> list[Ledger]: ...

    def __getitem__(self, index: int | slice) -> Ledger | list[Ledger]:
        if isinstance(index, slice):
            return [self[rank] for rank in range(*index.indices(self.size))]
        return Ledger(*self.rows[index].tolist())

    def __iter__(self) -> Iterator[Ledger]:
        return (Ledger(*row) for row in self.rows.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def rows(self) -> npt.NDArray[np.float64]:
        """Every rank's row, float64 ``(size, LEDGER_WIDTH)``.

        Raises:
            UsageError: they were not gathered.
        """
        if self.table is None:
            raise UsageError("the ledgers of single ranks were not gathered in this step")
        return self.table

    def with_rows(self, rows: npt.NDArray[np.float64]) -> Ledgers:
        """Return these sums with the gathered rows of all ranks.

        Raises:
            ConfigError: not such rows.
        """
        return Ledgers(self.totals, self.size, _checked_table(rows))

    def column(self, field: str) -> npt.NDArray[np.float64]:
        """Return one field of all ranks, float64 ``(size,)``; see :attr:`rows`."""
        return self.rows[:, COLUMN[field]]

    def total(self, field: str) -> float:
        """Return the sum of a field, rounded once; of a counted one, the number of ranks with it above 0."""
        return float(self.totals[COLUMN[field]])

    def average(self) -> float:
        """Return the mean of the local losses of all ranks with any weight; see :attr:`rows`.

        For a reduction that is a ratio. NaN without weight on any rank.
        """
        numerator, denominator = self.column("numerator"), self.column("denominator")
        held = denominator != 0
        with np.errstate(over="ignore"):
            own = numerator[held] / denominator[held]
        return exact_sum(own.tolist()) / len(own) if len(own) else math.nan

    def ranks_with(self, *fields: str) -> list[int]:
        """Return the ranks on which one of these fields is above zero; see :attr:`rows`."""
        if not any(self.total(field) for field in fields):
            return []
        found: list[int] = np.flatnonzero(
            (self.rows[:, [COLUMN[field] for field in fields]] > 0).any(axis=1)
        ).tolist()
        return found

    def differs(self, field: str) -> bool:
        """Return whether a counted field differs between ranks; see :attr:`rows`."""
        if not self.total(field):
            return False
        column = self.column(field)
        return bool((column != column[0]).any())

    @property
    def needs_rows(self) -> bool:
        """Whether the rows must be gathered: the sums show an error, hooks, or that somebody reads them."""
        return bool(self.totals[GATHER_COLUMNS].any())

    @property
    def elements(self) -> int:
        """Number of elements in the step."""
        return round(self.total("elements"))


def exact_sum(values: Sequence[float]) -> float:
    """Return the sum, rounded once; infinite where float64 does not hold it."""
    try:
        return math.fsum(values)
    except OverflowError:  # also of a part of the sum
        whole = sum(map(Fraction, values))
        try:
            return float(whole)
        except OverflowError:
            return math.inf if whole > 0 else -math.inf


class Sums:
    """Encoding of ledgers where only their sums are exchanged: integers, which an all-reduce adds exactly.

    Args:
        size: number of ranks.
        precision: bits of an integer that the dtype of the message holds: 24 (float32) or 53 (float64).

    Attributes:
        length: of the message.
        digits: of each sum in it.
    """

    def __init__(self, size: int, precision: int) -> None:
        self.size = size
        self.digits = digits_for(size, precision)
        self.length = self.digits.count * _SUMMED.stop + len(_COUNTED)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """See :attr:`hvdloss.comm.exact.Digits.positions`."""
        return self.digits.positions

    def write(
        self,
        row: Any,
        bits: Any,
        positions: Any,
        *,
        join: Callable[[list[Any]], Any],
        flags: Callable[[Any], Any],
        flat: Callable[[Any], Any] = np.ravel,
        **ops: Any,
    ) -> Any:
        """Return the message of a rank's ledger, `length` integers, in any framework.

        Args:
            row: the ledger, float64 ``(LEDGER_WIDTH,)``.
            bits: ``row``'s bit patterns as int64.
            positions: :attr:`positions` as a tensor of the framework.
            join: concatenates vectors in the message's dtype.
            flags: returns where a vector is above zero.
            flat: flattens a matrix.
            ops: of :meth:`hvdloss.comm.exact.Digits.write`.
        """
        digits = self.digits.write(bits[_SUMMED][:, None], positions, **ops)
        first, last = _COUNTED[0], COLUMN["has_next"]
        return join([flat(digits), flags(row[first : FAULT_COLUMNS.stop]), flags(row[last:])])

    def pack(self, ledger: Ledger) -> npt.NDArray[np.float64]:
        """Return the message of a ledger as float64 numbers."""
        return self.pack_row(np.array(list(vars(ledger).values())))

    def pack_row(self, row: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the message of a ledger, given as its row."""
        packed: npt.NDArray[np.float64] = self.write(
            row,
            row.view(np.int64),
            self.positions,
            join=lambda parts: np.concatenate([part.astype(np.float64) for part in parts]),
            flags=lambda some: some > 0,
        )
        return packed

    def unpack(self, message: npt.NDArray[Any]) -> Ledgers:
        """Return the ledgers of all ranks from the sum of their messages.

        Raises:
            ConfigError: a message of another form.
        """
        if message.shape != (self.length,) or not np.isfinite(message).all():
            raise ConfigError(
                f"the sums of ledgers are {self.length} finite numbers, got shape {message.shape}; were the "
                f"ranks' versions different?"
            )
        cut = self.length - len(_COUNTED)
        totals = np.zeros(LEDGER_WIDTH)
        totals[_SUMMED] = self.digits.read(np.rint(message[:cut]).reshape(_SUMMED.stop, -1))
        totals[_COUNTED] = np.rint(message[cut:])
        return Ledgers(totals, self.size)


def unpack(table: npt.ArrayLike) -> Ledgers:
    """Return the ledgers of all ranks from the summed ``(size, LEDGER_WIDTH)`` matrix.

    Raises:
        ConfigError: not a matrix of that width, or with entries that are not finite.
    """
    return Ledgers.of_table(_checked_table(table))


def _checked_table(table: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return a table of ledgers as float64; see :func:`unpack`."""
    try:
        array = np.asarray(table)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"dtype {array.dtype}")
        array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"a ledger table is a matrix of real numbers: {error}") from error
    if array.ndim != 2 or array.shape[1] != LEDGER_WIDTH:
        raise ConfigError(f"a ledger table has shape (ranks, {LEDGER_WIDTH}), got {array.shape}")
    if not np.isfinite(array).all():
        raise ConfigError("a ledger table holds NaN or infinity; were its ranks' versions different?")
    checked: npt.NDArray[np.float64] = array
    return checked


def _named(ranks: Sequence[int]) -> str:
    """Return "rank 1" or "ranks 0, 2"; at most 16 of them."""
    more = f" and {len(ranks) - 16} more" if len(ranks) > 16 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:16]))}{more}"


def nonfinite_ranks(ledgers: Sequence[Ledger], gradients: bool = True) -> list[int]:
    """Return the ranks whose loss (or, with `gradients`, one of whose gradients) is NaN or infinite."""
    fields = ("nonfinite_losses", "nonfinite_gradients")
    return Ledgers.of(ledgers).ranks_with(*fields[: 1 + gradients])


def common_factor(ledgers: Ledgers, before: float) -> float:
    """Return the factor that all ranks multiplied this step's loss with; `before` where none had another."""
    if not ledgers.total("rescaled"):
        return before
    factors = _factors(ledgers)
    return float(factors[0]) if len(factors) else before


def _factors(ledgers: Ledgers) -> npt.NDArray[np.float64]:
    """Return the factors of the ranks that have any weight, and a loss that is finite."""
    valid = (ledgers.column("denominator") > 0) & (ledgers.column("nonfinite_losses") == 0)
    factors: npt.NDArray[np.float64] = ledgers.column("factor")[valid]
    return factors


def _factor_error(ledgers: Ledgers, step: int) -> UsageError | None:
    """Return the error of a loss that was multiplied with different factors on ranks or in micro-batches.

    Each would be the derivative of the user's function at this rank's own mean, not at that of all elements.
    """
    if not ledgers.total("rescaled"):
        return None
    several = np.flatnonzero(ledgers.column("rescaled") > 1).tolist()
    factors = _factors(ledgers)
    if not several and (not len(factors) or np.ptp(factors) <= SAME * np.abs(factors).max()):
        return None
    found = (
        f"with different factors in the micro-batches of {_named(several)}"
        if several
        else f"with factors from {factors.min():.6g} to {factors.max():.6g} on different ranks"
    )
    return UsageError(
        f"step {step}: what the objective returned was multiplied {found} before the backward pass. Nothing "
        f"was updated. A root, power, logarithm or clamp of a loss has its factor from this rank's own mean, "
        f"not from that of all elements: give the objectives to PyTorch's optimizer as a dict, or "
        f"hvd.Objectives of them to TensorFlow's tape, and use hvd.global_losses(loss), or write it as a "
        f"function of sums (hvdloss.losses.SumsLoss). Leave out a factor for the part of the samples that a "
        f"micro-batch or rank has, which the objective knows; elements that shall count more, less or not "
        f"at all have weights."
    )


def check_step(
    ledgers: Sequence[Ledger], step: int, nonfinite: str = "raise", *, gradients: bool = True
) -> HvdlossError | None:
    """Return the error that every rank raises for this step, or None for a valid step.

    Depends only on its arguments, which are equal on all ranks, so the result is too.

    Args:
        ledgers: of all ranks.
        step: its number, for the message.
        nonfinite: one of :data:`NONFINITE_MODES`. With "skip" and "drop" a loss or gradient that is not
            finite is no error; :func:`nonfinite_ranks` returns those ranks. With "drop" their ledgers hold
            nothing else.
        gradients: whether a gradient that is not finite is an error now, or is checked later.
    """
    ledgers = Ledgers.of(ledgers)
    total = ledgers.total

    def where(field: str) -> str:
        return _named(ledgers.ranks_with(field))

    def error_of(field: str, kind: type[HvdlossError], text: str) -> HvdlossError:
        error = kind(text)
        error.ranks = tuple(ledgers.ranks_with(field))
        return error

    if total("failed"):
        return error_of(
            "failed",
            RankError,
            f"step {step}: {where('failed')} cannot go on; its own error says why. Nothing was updated.",
        )
    for field, what in (
        ("negative_weights", "below zero"),
        ("nonfinite_weights", "NaN or infinite"),
    ):
        if total(field):
            return error_of(
                field,
                WeightError,
                f"step {step}: {ledgers.column(field).sum():.0f} weight(s) {what} on {where(field)}; weights "
                f"must be finite and at least 0. Nothing was updated.",
            )
    if nonfinite == "raise" and total("nonfinite_losses"):
        return error_of(
            "nonfinite_losses",
            NonFiniteLossError,
            f"step {step}: the loss is NaN or infinite on {where('nonfinite_losses')}. Nothing "
            f"was updated. Give elements that must not count the weight 0, lower the learning rate, or "
            f'choose Objective(..., nonfinite="skip") or "drop".',
        )
    if total("untracked_backwards"):
        return error_of(
            "untracked_backwards",
            UsageError,
            f"step {step}: on {where('untracked_backwards')} a backward pass reached this optimizer's "
            f"parameters without passing through one call of its objective (or through several calls "
            f"with different weight sums), so its share of the step is unknown. Call the objective once "
            f"per backward pass; penalties may be added to its result. (Several losses: give each an "
            f"Objective, and all of them to PyTorch's optimizer or TensorFlow's tape.)",
        )
    if (error := _factor_error(ledgers, step)) is not None:
        return error
    if nonfinite == "raise" and gradients and total("nonfinite_gradients"):
        return error_of(
            "nonfinite_gradients",
            NonFiniteGradientError,
            f"step {step}: the loss is finite, but a gradient is NaN or infinite (or too large to be summed "
            f"over ranks) on {where('nonfinite_gradients')}. Nothing was updated. Look for a "
            f"square root or logarithm at 0, or a division by 0, in the backward pass; lower the learning "
            f'rate, or choose Objective(..., nonfinite="skip") or "drop".',
        )
    if not total("denominator"):
        dropped = nonfinite_ranks(ledgers) if nonfinite == "drop" else []
        left = ""
        if dropped:
            left = (
                f" that is left after dropping {_named(dropped)}, whose loss or gradient is NaN or infinite"
            )
        return NoWeightError(
            f"step {step}: no element with a weight above zero on any of {len(ledgers)} rank(s){left}, so "
            f"there is no mean to take. Nothing was updated. Skip the step on all ranks, or check the "
            f"weights."
        )
    if not math.isfinite(total("denominator")):
        return WeightError(
            f"step {step}: the weights of all {len(ledgers)} rank(s) add up to more than float64 holds. "
            f"Nothing was updated. Scale the weights down: only their ratios count."
        )
    return None
