"""The global view of a finished step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hvdloss.ledger import Ledger, offenders
from hvdloss.reduction import finish

__all__ = ["RankReport", "StepReport", "TermReport"]


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


@dataclass(frozen=True)
class TermReport:
    """One term of the objective in one step.

    Attributes:
        unit: of the values.
        price: of one unit, in units of the loss.
        values: one per rank.
        total: their sum.
        priced: ``price * total``, its part of the objective.
        details: what else the term tells; plain values.
    """

    unit: str
    price: float
    values: list[float]
    total: float
    priced: float
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """What all ranks together did in one step; equal on every rank.

    Attributes:
        step: counted from 1.
        loss: the loss of all elements of the step, as the reduction defines it.
        weight: sum of all weights.
        elements: number of elements with a weight other than zero.
        objective_value: the loss plus the priced terms.
        ranks: one :class:`RankReport` per rank.
        choices: how gradients travelled: value and decider of every choice of
            :class:`hvdloss.tuning.Tuning` and of the launch, and as ``"travel"`` the numbers of messages,
            of buckets, and of gradients that travelled alone or sparse, as this rank has them.
        terms: by name, what the objective's terms came to (:class:`TermReport`).
        skipped: steps so far in which nothing was updated, since a loss or gradient was NaN or infinite
            (``nonfinite="skip"``); `ranks` tell whose it was in this one.
        samples: elements of all steps up to this one, those before a checkpoint or commit that training went
            on from among them; None where nobody counted.
    """

    step: int
    loss: float
    weight: float
    elements: int
    objective_value: float
    ranks: list[RankReport]
    choices: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    terms: Mapping[str, TermReport] = field(default_factory=dict)
    skipped: int = 0
    samples: int | None = None

    @classmethod
    def of(
        cls,
        step: int,
        ledgers: list[Ledger],
        reduction: str,
        choices: Mapping[str, Any] | None = None,
        terms: Mapping[str, TermReport] | None = None,
        *,
        nonfinite: str = "raise",
        skipped: int = 0,
        dropped: Sequence[int] = (),
        samples: int | None = None,
    ) -> StepReport:
        """Return the report of the step whose ranks' ledgers these are.

        `nonfinite` is the objective's policy; `skipped`, and `dropped` by rank (none if empty), what it came
        to so far; `samples` the elements of all steps.
        """
        whole = Ledger.zero()
        for ledger in ledgers:
            whole = whole.merge(ledger)
        # Sums that were not finite travelled as zeros: what is left is no loss of these elements.
        lost = set() if nonfinite == "drop" else set(offenders(ledgers, gradients=False))
        loss = float("nan") if lost else whole.finish(reduction)
        terms = dict(terms or {})
        skew: Sequence[float | None] = terms["skew"].values if "skew" in terms else [None] * len(ledgers)
        return cls(
            step=step,
            loss=loss,
            weight=whole.weight,
            elements=round(whole.elements),
            objective_value=loss + math.fsum(term.priced for term in terms.values()),
            ranks=[
                RankReport(
                    rank=rank,
                    loss=finish(reduction, one.numerator, one.denominator)
                    if one.denominator and rank not in lost
                    else float("nan"),
                    weight=one.weight,
                    elements=round(one.elements),
                    micro_batches=round(one.micro_batches),
                    communication=one.communication,
                    skew=skew[rank],
                    computation=one.computation,
                    nonfinite="loss"
                    if one.nonfinite_losses > 0
                    else "gradient"
                    if one.nonfinite_gradients > 0
                    else "",
                    dropped=dropped[rank] if len(dropped) else 0,
                )
                for rank, one in enumerate(ledgers)
            ],
            choices=dict(choices or {}),
            terms=terms,
            skipped=skipped,
            samples=samples,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain numbers, lists and dicts, ready for JSON."""
        return asdict(self)
