"""The controller: drives an objective's terms and what they do, the same on every rank.

One per objective. The adapters hand it each batch (:meth:`Controller.weigh`, :meth:`Controller.observe`)
and each finished step (:meth:`Controller.close`), and ask it what was decided: batch sizes, the
synchronisation period, compression. It never communicates. What it decides rests on the table of all
ranks' ledgers alone, which is the same on all ranks to the last bit, so its decisions are too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hvdloss.communicator import Communicator
from hvdloss.errors import ConfigError
from hvdloss.ledger import WIDTH
from hvdloss.report.steps import TermReport
from hvdloss.term import Act, Batch, Closed, Decision, Term, Travel, check_price

__all__ = ["Controller", "counts_of"]

Array = npt.NDArray[np.float64]
Kind = TypeVar("Kind", bound=Act)


def counts_of(memory: Any, otherwise: str) -> tuple[int, int]:
    """Return the steps and samples that an optimizer's or a tape's memory holds (older ones: no samples).

    Raises:
        ConfigError: it is none; the text says what it is not.
    """
    steps, samples = (
        (memory.get("steps"), memory.get("samples", 0)) if isinstance(memory, dict) else (None, 0)
    )
    if not isinstance(steps, int) or not isinstance(samples, int):
        raise ConfigError(f"memory={str(memory)[:200]} {otherwise}")
    return steps, samples


class Controller:
    """Drives the terms of an objective.

    Args:
        terms: instances of :class:`hvdloss.term.Term`, each with a name of its own.

    Attributes:
        terms: what it was given, as a tuple.
        width: float64 sums that the terms tell of each batch, one after another.
        decisions: all decisions so far, oldest first.

    Raises:
        ConfigError: something that is no term, a name used twice, or two acts that contradict each other.
    """

    def __init__(self, terms: Sequence[Term] = ()) -> None:
        if terms is None or isinstance(terms, str | Term) or not all(isinstance(t, Term) for t in terms):
            raise ConfigError(
                f"terms={terms!r} must be a tuple of terms: hvdloss.CommunicationCost, hvdloss.DataSkew, or "
                f"instances of your own subclass of hvdloss.Term"
            )
        self.terms = tuple(terms)
        for term in self.terms:
            term.price = check_price(term.price, term.name or type(term).__name__)
            if not term.name:
                raise ConfigError(f"{type(term).__name__} has no name; give the class `name = ...`")
        names = [term.name for term in self.terms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"terms has two terms named {twice[0]!r}; give each its own name")
        self.acts = tuple((term, act) for term in self.terms for act in term.acts)
        for kind in {type(act) for _, act in self.acts}:
            if sum(type(act) is kind for _, act in self.acts) > 1:
                raise ConfigError(f"acts has two of {kind.__name__}; an objective can follow one only")
        self.width = sum(term.width for term in self.terms)
        self.weighs = any(term.weighs for term in self.terms)
        self.penalizes = any(term.penalizes for term in self.terms)
        self.decisions: list[Decision] = []
        #: Called with every decision, and with every closed step's number, table and travel.
        self.on_decision: list[Callable[[Decision], None]] = []
        self.on_step: list[Callable[[int, Array, Travel], None]] = []
        self.on_prepare: list[Callable[[list[Any]], None]] = []
        #: What terms measured before the first step of a run that this one follows.
        self.prepared_instead: Sequence[Any] | None = None
        #: Gives the table to decide by in place of what was measured (see :mod:`hvdloss.control.log`).
        self.measured_instead: Callable[[int, Array], Array] | None = None
        self._bound: tuple[int, int] | None = None
        self._prepared = False
        self._values: list[Array] = []  # of the last closed step

    # -- ranks ------------------------------------------------------------------------------------

    def begin(self, rank: int, size: int, *, anew: bool = False) -> None:
        """Start afresh with these ranks; if they are the ones there were, only with `anew`."""
        if self._bound == (rank, size) and not anew:
            return
        self._bound = (rank, size)
        self._prepared = False
        for term in self.terms:
            term.begin(rank, size)
            for act in term.acts:
                act.begin(rank, size)
            term.settle()

    @property
    def size(self) -> int:
        """How many ranks there are; 1 before the first step."""
        return self._bound[1] if self._bound else 1

    def prepare(self, communicator: Communicator) -> None:
        """Let terms measure what they need before the first step, with blocking collectives; once."""
        if self._prepared:
            return
        self._prepared = True
        if self.prepared_instead is not None:
            self.restore_prepared(self.prepared_instead)
        else:
            for term in self.terms:
                term.prepare(communicator)
        for tell in self.on_prepare:
            tell([term.prepared() for term in self.terms])

    def restore_prepared(self, states: Sequence[Any]) -> None:
        """Give every term what it had measured in another run's :meth:`prepare`."""
        for term, state in zip(self.terms, states, strict=True):
            if state is not None:
                term.restore_prepared(state)

    # -- going on ---------------------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """Return what terms and acts remember: plain values and arrays, equal on all ranks."""
        return {
            "ranks": self.size,
            "terms": {
                name: {
                    "always": {key: _plain(getattr(one, key)) for key in one.remembers},
                    "of ranks": {key: _plain(getattr(one, key)) for key in one.remembers_of_ranks},
                }
                for name, one in self._remembering()
            },
        }

    def remember(self, memory: Any, *, same_ranks: bool) -> None:
        """Go on from a :meth:`memory`; after :meth:`begin`.

        What it does not have is left as it is: terms and acts may have been added.

        Args:
            memory: of a controller whose terms have these names.
            same_ranks: whether it is of the ranks there are now, or as many: else what is of ranks starts
                afresh.

        Raises:
            ConfigError: no such memory; nothing is changed then.
        """
        try:
            held = memory["terms"]
            size = int(memory["ranks"])
            kinds = ("always", "of ranks") if same_ranks and size == self.size else ("always",)
            found = [
                (one, key, held[name][kind][key])
                for name, one in self._remembering()
                if name in held
                for kind in kinds
                for key in (one.remembers if kind == "always" else one.remembers_of_ranks)
                if key in held[name][kind]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"memory={str(memory)[:200]} is not what Controller.memory() gives") from error
        for one, key, value in found:
            _give(one, key, value)
        for term in self.terms:
            term.settle()

    def _remembering(self) -> list[tuple[str, Term | Act]]:
        """Return terms and acts by name."""
        terms: list[tuple[str, Term | Act]] = [(term.name, term) for term in self.terms]
        return terms + [(f"{term.name}.{type(act).__name__}", act) for term, act in self.acts]

    # -- a batch ----------------------------------------------------------------------------------

    @property
    def state(self) -> Array:
        """What the terms want to see again in every batch: float64, one term's after another's."""
        parts = [term.state for term in self.terms]
        return np.concatenate(parts) if parts else np.zeros(0)

    def batches(self, state: Any, **of: Any) -> list[Batch]:
        """Return one view of a batch per term, each with its own part of `state`."""
        views, at = [], 0
        for term in self.terms:
            stop = at + len(term.state)
            views.append(Batch(state=state[at:stop], **of))
            at = stop
        return views

    def weigh(self, batches: Sequence[Batch]) -> Any:
        """Return the product of the terms' factors for the weights, or None if no term has any."""
        product = None
        for term, batch in zip(self.terms, batches, strict=True):
            factor = term.weights(batch) if term.weighs else None
            if factor is not None:
                product = factor if product is None else product * factor
        return product

    def penalty(self, batches: Sequence[Batch]) -> Any:
        """Return the sum of the terms' penalties, or None."""
        total = None
        for term, batch in zip(self.terms, batches, strict=True):
            part = term.penalty(batch) if term.penalizes else None
            if part is not None:
                total = part if total is None else total + part
        return total

    def observe(self, batches: Sequence[Batch]) -> list[Any]:
        """Return the terms' sums of a batch as float64 vectors, `width` numbers in all, each finite."""
        vectors = []
        for term, batch in zip(self.terms, batches, strict=True):
            if not term.width:
                continue
            told = term.observe(batch)
            vector = batch.ops.row64(list(told)) if isinstance(told, list | tuple) else told
            shape = batch.ops.shape(vector)
            if len(shape) != 1 or shape[0] not in (None, term.width):
                raise ConfigError(
                    f"{type(term).__name__}.observe() gave sums of shape {shape}, but width={term.width}"
                )
            # What is not finite would spread to all ranks; such a step is refused anyway.
            vectors.append(batch.ops.where(batch.ops.isfinite(vector), vector, batch.ops.zeros_like(vector)))
        return vectors

    # -- a step -----------------------------------------------------------------------------------

    def close(self, step: int, table: Array, travel: Travel, reduction: str = "mean") -> Array:
        """Take note of a finished step, decide, and return the new :attr:`state`.

        Args:
            step: its number, from 1.
            table: all ranks' ledgers and terms' sums, float64 ``(ranks, WIDTH + width)``.
            travel: how they travelled.
            reduction: of the objective.
        """
        if not self.terms:
            return np.zeros(0)
        if self.measured_instead is not None:
            table = self.measured_instead(step, table)
        for note in self.on_step:
            note(step, table, travel)
        rank = self._bound[0] if self._bound else 0
        ledgers, at = table[:, :WIDTH], WIDTH
        values: list[Array] = []
        for term in self.terms:
            rows = table[:, at : at + term.width]
            at += term.width
            closed = Closed(step, rank, ledgers, rows, travel, reduction)
            one = np.asarray(term.close(closed), dtype=np.float64)
            if one.shape != (len(table),) or not np.isfinite(one).all():
                raise ConfigError(
                    f"{type(term).__name__}.close() must give one finite value per rank, shape "
                    f"({len(table)},); it gave {one!r}"
                )
            values.append(one)
            for act in term.acts:
                for decision in act.close(term, closed):
                    self._decided(decision)
            term.settle()
        self._values = values
        return self.state

    def _decided(self, decision: Decision) -> None:
        self.decisions.append(decision)
        for tell in self.on_decision:
            tell(decision)

    def reports(self) -> dict[str, TermReport]:
        """Return what the terms came to in the last closed step, by name; empty before the first."""
        return {
            term.name: TermReport(
                unit=term.unit,
                price=term.price,
                values=values.tolist(),
                total=(total := math.fsum(values)),
                priced=term.price * total,
                details=term.details(),
            )
            for term, values in zip(self.terms, self._values, strict=False)
        }

    # -- what was decided -------------------------------------------------------------------------

    def act(self, kind: type[Kind]) -> Kind | None:
        """Return the act of this class, or None."""
        return next((act for _, act in self.acts if isinstance(act, kind)), None)

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks, for the agreement of the first step."""
        return {f"terms.{term.name}": term.settings() for term in self.terms}


def _plain(value: Any) -> Any:
    """Return an attribute as plain values; what has ``memory()`` by what that gives."""
    return value.memory() if hasattr(value, "memory") else value


def _give(one: Any, key: str, value: Any) -> None:
    """Set an attribute from what :func:`_plain` gave."""
    there = getattr(one, key)
    setattr(one, key, there.remembered(value) if hasattr(there, "remembered") else value)
