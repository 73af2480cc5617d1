"""The ledger: what one rank adds to one step, and how a step is judged from all ranks' ledgers.

A ledger is a short vector of sums. Merging is adding, so the micro-batches of a rank, and the ranks of
a step, merge in any order and grouping (a commutative monoid; the tests check the laws). The ranks'
ledgers travel as one float64 matrix with a row per rank, of which each rank fills its own: the sum over
ranks is then the table of all ledgers, known to every rank alike.
"""

from __future__ import annotations

import operator
from dataclasses import astuple, dataclass, fields

import numpy as np
import numpy.typing as npt

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
from hvdloss.reduction import finish

__all__ = [
    "COLUMN",
    "FAULTS",
    "NONFINITE",
    "POLICIES",
    "WIDTH",
    "Ledger",
    "check_policy",
    "judge",
    "offenders",
    "pack",
    "unpack",
]

#: What happens to a step in which the loss or a gradient of some rank is NaN or infinite.
POLICIES = ("raise", "skip", "drop")


@dataclass(frozen=True)
class Ledger:
    """One rank's part of one step; every field is a sum.

    Attributes:
        numerator: of the reduction (see :mod:`hvdloss.reduction`).
        denominator: of the reduction; what the rank's gradient is weighted with.
        weight: sum of the weights.
        elements: number of elements with a weight other than zero.
        micro_batches: backward passes in the step.
        negative_weights: weights below zero.
        nonfinite_weights: weights that are NaN or infinite.
        nonfinite_losses: micro-batches whose loss is NaN or infinite.
        nonfinite_gradients: 1 if one of the rank's gradients is NaN or infinite, or so large that the sum
            over ranks might be.
        strays: backward passes that reached parameters without passing through the objective, or
            through several calls of it with different weight sums.
        failed: 1 if the rank cannot go on.
        communication: seconds the rank was held up by communication in the step before.
        computation: seconds between the ends of the two steps before in which it was not.
        moved: after local steps, the squared length of the rank's move times its denominator.
        together: squared length of the mean move of the exchange before, as this rank has it.
        more: 1 if the rank has more data after this step (:mod:`hvdloss.data.uneven`).
        leaving: 1 if the rank was told to leave (:mod:`hvdloss.training.preemption`).
        hooks: how many hooks the user has set on the rank's parameters.
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
    strays: float = 0.0
    failed: float = 0.0
    communication: float = 0.0
    computation: float = 0.0
    moved: float = 0.0
    together: float = 0.0
    more: float = 0.0
    leaving: float = 0.0
    hooks: float = 0.0

    @classmethod
    def zero(cls) -> Ledger:
        """Return the ledger of a rank that saw nothing: the neutral element of merging."""
        return cls()

    def merge(self, other: Ledger) -> Ledger:
        """Return the ledger of both parts together."""
        # Not astuple, which copies deeply: every follower of a run has this done in every step.
        return Ledger(*map(operator.add, vars(self).values(), vars(other).values()))

    def finish(self, reduction: str) -> float:
        """Return the loss of the elements of this ledger; NaN where there is no weight."""
        return finish(reduction, self.numerator, self.denominator)

    @classmethod
    def of_row(cls, row: npt.ArrayLike, **more: float) -> Ledger:
        """Return the ledger of a row that tensors told (:meth:`Contribution.row`), plus `more`."""
        return cls(*map(float, np.asarray(row, dtype=np.float64)), **more)


#: By field of a ledger: its column in a table of ledgers.
COLUMN = {field.name: number for number, field in enumerate(fields(Ledger))}
WIDTH = len(COLUMN)
# The columns in which anything above zero makes a step unsound (see `judge`); so does no denominator.
FAULTS = slice(5, 11)
# Those of them that a policy other than "raise" lets pass.
NONFINITE = slice(7, 9)


def check_policy(nonfinite: str) -> str:
    """Return `nonfinite` if it is one of :data:`POLICIES`, else raise ConfigError."""
    if nonfinite not in POLICIES:
        raise ConfigError(
            f"nonfinite={nonfinite!r} is not known; choose one of {', '.join(map(repr, POLICIES))}: raise "
            f"the same error on every rank, skip the step on every rank, or drop what the rank adds to it"
        )
    return nonfinite


def pack(ledger: Ledger, rank: int, size: int, more: int = 0) -> npt.NDArray[np.float64]:
    """Return the ``(size, WIDTH + more)`` float64 matrix whose row `rank` begins with `ledger`, else zero.

    The `more` columns are for what terms tell (:class:`hvdloss.term.Term`).

    Raises:
        ConfigError: a rank out of range.
    """
    if not 0 <= rank < size:
        raise ConfigError(f"rank={rank} is not in 0..{size - 1}")
    table = np.zeros((size, WIDTH + more))
    table[rank, :WIDTH] = astuple(ledger)
    return table


def unpack(table: npt.ArrayLike) -> list[Ledger]:
    """Return the ledgers of all ranks from the summed ``(size, WIDTH)`` matrix.

    Raises:
        ConfigError: not a matrix of that width, or with entries that are not finite.
    """
    try:
        array = np.asarray(table)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"dtype {array.dtype}")
        array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"a ledger table is a matrix of real numbers: {error}") from error
    if array.ndim != 2 or array.shape[1] != WIDTH:
        raise ConfigError(f"a ledger table has shape (ranks, {WIDTH}), got {array.shape}")
    if not np.isfinite(array).all():
        raise ConfigError("a ledger table holds NaN or infinity; were its ranks' versions different?")
    return [Ledger(*map(float, row)) for row in array]


def _where(ledgers: list[Ledger], field: str) -> str:
    """Return "rank 1" or "ranks 0, 2": those whose `field` is above zero."""
    ranks = [str(rank) for rank, ledger in enumerate(ledgers) if getattr(ledger, field) > 0]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"


def offenders(ledgers: list[Ledger], gradients: bool = True) -> list[int]:
    """Return the ranks whose loss (or one of whose gradients, with `gradients`) is NaN or infinite."""
    return [
        rank
        for rank, one in enumerate(ledgers)
        if one.nonfinite_losses > 0 or (gradients and one.nonfinite_gradients > 0)
    ]


def judge(
    ledgers: list[Ledger], step: int, nonfinite: str = "raise", *, gradients: bool = True
) -> HvdlossError | None:
    """Return the error that every rank raises for this step, or None for a sound step.

    Depends on nothing but its arguments, which are equal on all ranks, so the ranks agree.

    Args:
        ledgers: of all ranks.
        step: its number, for the message.
        nonfinite: one of :data:`POLICIES`. With "skip" and "drop" a loss or gradient that is not finite is
            no error; :func:`offenders` has those ranks. With "drop" their ledgers hold no more than that.
        gradients: whether a gradient that is not finite is an error now, or will be judged later.
    """

    def total(field: str) -> float:
        return float(sum(getattr(ledger, field) for ledger in ledgers))

    def blamed(field: str, kind: type[HvdlossError], text: str) -> HvdlossError:
        error = kind(text)
        error.ranks = tuple(rank for rank, ledger in enumerate(ledgers) if getattr(ledger, field) > 0)
        return error

    if total("failed"):
        return blamed(
            "failed",
            RankError,
            f"step {step}: {_where(ledgers, 'failed')} cannot go on; its own error says why. Nothing was "
            f"updated.",
        )
    for field, what in (
        ("negative_weights", "below zero"),
        ("nonfinite_weights", "NaN or infinite"),
    ):
        if count := total(field):
            return blamed(
                field,
                WeightError,
                f"step {step}: {count:.0f} weight(s) {what} on {_where(ledgers, field)}; weights must "
                f"be finite and at least 0. Nothing was updated.",
            )
    if nonfinite == "raise" and total("nonfinite_losses"):
        return blamed(
            "nonfinite_losses",
            NonFiniteLossError,
            f"step {step}: the loss is NaN or infinite on {_where(ledgers, 'nonfinite_losses')}. Nothing "
            f"was updated. Give elements that must not count the weight 0, lower the learning rate, or "
            f'choose Objective(..., nonfinite="skip") or "drop".',
        )
    if total("strays"):
        return blamed(
            "strays",
            UsageError,
            f"step {step}: on {_where(ledgers, 'strays')} a backward pass reached this optimizer's "
            f"parameters without passing through one call of its objective (or through several calls "
            f"with different weight sums), so its share of the step is unknown. Call the objective once "
            f"per backward pass; penalties may be added to its result.",
        )
    if nonfinite == "raise" and gradients and total("nonfinite_gradients"):
        return blamed(
            "nonfinite_gradients",
            NonFiniteGradientError,
            f"step {step}: the loss is finite, but a gradient is NaN or infinite (or too large to be summed "
            f"over ranks) on {_where(ledgers, 'nonfinite_gradients')}. Nothing was updated. Look for a "
            f"square root or logarithm at 0, or a division by 0, in the backward pass; lower the learning "
            f'rate, or choose Objective(..., nonfinite="skip") or "drop".',
        )
    if not total("denominator"):
        dropped = offenders(ledgers) if nonfinite == "drop" else []
        left = ""
        if dropped:
            ranks = f"rank{'s' if len(dropped) > 1 else ''} {', '.join(map(str, dropped))}"
            left = f" that is left after dropping {ranks}, whose loss or gradient is NaN or infinite"
        return NoWeightError(
            f"step {step}: no element with a weight above zero on any of {len(ledgers)} rank(s){left}, so "
            f"there is no mean to take. Nothing was updated. Skip the step on all ranks, or check the "
            f"weights."
        )
    return None
