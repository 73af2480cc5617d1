"""The controller: drives an objective's terms and their policies, the same on every rank.

One per objective. The adapters pass it each batch (:meth:`Controller.weight_factors`,
:meth:`Controller.observe`) and each finished step (:meth:`Controller.on_step_end`), and ask it what was
decided: batch sizes, the synchronisation period, compression. It never communicates. It decides from the
table of all ranks' ledgers alone, which is bitwise equal on all ranks, so its decisions are too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hvdloss.comm.communicator import Communicator
from hvdloss.errors import ConfigError
from hvdloss.losses.ledger import LEDGER_WIDTH
from hvdloss.terms.term import Batch, CommStats, Decision, Policy, StepStats, Term, TermReport, check_price

__all__ = ["Controller", "parse_counts"]

Array = npt.NDArray[np.float64]
Kind = TypeVar("Kind", bound=Policy)


def parse_counts(state: Any, otherwise: str) -> tuple[int, int]:
    """Return the steps and samples in the state of an optimizer or a tape; an older state has no samples.

    Raises:
        ConfigError: not such a state; `otherwise` ends the message.
    """
    steps, samples = (state.get("steps"), state.get("samples", 0)) if isinstance(state, dict) else (None, 0)
    if not isinstance(steps, int) or not isinstance(samples, int):
        raise ConfigError(f"state={str(state)[:200]} {otherwise}")
    return steps, samples


class Controller:
    """Drives the terms of an objective.

    Args:
        terms: instances of :class:`hvdloss.terms.term.Term`, each with a name of its own.

    Attributes:
        terms: the terms, as a tuple.
        policies: pairs of a term and one of its policies.
        width: number of float64 sums per batch, over all terms.
        decisions: all decisions so far, oldest first.

    Raises:
        ConfigError: not a term, a name used twice, or two policies of one kind.
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
        self.policies = tuple((term, policy) for term in self.terms for policy in term.policies)
        for kind in {type(policy) for _, policy in self.policies}:
            if sum(type(policy) is kind for _, policy in self.policies) > 1:
                raise ConfigError(f"policies has two of {kind.__name__}; an objective can follow only one")
        self.width = sum(term.width for term in self.terms)
        self.has_weights = any(term.has_weights for term in self.terms)
        self.has_penalty = any(term.has_penalty for term in self.terms)
        self.decisions: list[Decision] = []
        #: Called with every decision, and with every finished step's number, table and communication.
        self.on_decision: list[Callable[[Decision], None]] = []
        self.on_step: list[Callable[[int, Array, CommStats], None]] = []
        self.on_prepare: list[Callable[[list[Any]], None]] = []
        #: What terms measured before the first step of a run whose times this one replays.
        self.prepared_override: Sequence[Any] | None = None
        #: Returns the table to decide by in place of the measured one (see
        #: :mod:`hvdloss.terms.policies.log`).
        self.table_override: Callable[[int, Array], Array] | None = None
        self._bound: tuple[int, int] | None = None
        self._prepared = False
        self._values: list[Array] = []  # of the last finished step

    # -- ranks ------------------------------------------------------------------------------------

    def reset(self, rank: int, size: int, *, force: bool = False) -> None:
        """Start over with these ranks; does nothing if they have not changed, unless `force`."""
        if self._bound == (rank, size) and not force:
            return
        self._bound = (rank, size)
        self._prepared = False
        for term in self.terms:
            term.reset(rank, size)
            for policy in term.policies:
                policy.reset(rank, size)
            term.update_state()

    @property
    def size(self) -> int:
        """Number of ranks; 1 before the first step."""
        return self._bound[1] if self._bound else 1

    def prepare(self, communicator: Communicator) -> None:
        """Let terms measure what they need before the first step, with blocking collectives; once."""
        if self._prepared:
            return
        self._prepared = True
        if self.prepared_override is not None:
            self.load_prepared_state(self.prepared_override)
        else:
            for term in self.terms:
                term.prepare(communicator)
        for listener in self.on_prepare:
            listener([term.prepared_state() for term in self.terms])

    def load_prepared_state(self, states: Sequence[Any]) -> None:
        """Restore what every term measured in another run's :meth:`prepare`."""
        for term, state in zip(self.terms, states, strict=True):
            if state is not None:
                term.load_prepared_state(state)

    # -- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of terms and policies: plain values and arrays, equal on all ranks."""
        return {
            "ranks": self.size,
            "terms": {
                name: {
                    "shared": {key: _to_plain(getattr(one, key)) for key in one.state_attrs},
                    "per_rank": {key: _to_plain(getattr(one, key)) for key in one.per_rank_state_attrs},
                }
                for name, one in self._named_parts()
            },
        }

    def load_state_dict(self, state: Any, *, same_ranks: bool) -> None:
        """Restore a :meth:`state_dict`; after :meth:`reset`.

        What it lacks keeps its value: terms and policies may have been added.

        Args:
            state: of a controller whose terms have these names.
            same_ranks: whether it was saved by the same ranks, or as many; if not, what is per rank is not
                restored.

        Raises:
            ConfigError: not such a state; nothing is changed then.
        """
        try:
            held = state["terms"]
            size = int(state["ranks"])
            kinds = ("shared", "per_rank") if same_ranks and size == self.size else ("shared",)
            found = [
                (one, key, held[name][kind][key])
                for name, one in self._named_parts()
                if name in held
                for kind in kinds
                for key in (one.state_attrs if kind == "shared" else one.per_rank_state_attrs)
                if key in held[name][kind]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"state={str(state)[:200]} is not what Controller.state_dict() returns"
            ) from error
        for one, key, value in found:
            _set_from_plain(one, key, value)
        for term in self.terms:
            term.update_state()

    def _named_parts(self) -> list[tuple[str, Term | Policy]]:
        """Return terms and policies by name."""
        terms: list[tuple[str, Term | Policy]] = [(term.name, term) for term in self.terms]
        return terms + [(f"{term.name}.{type(policy).__name__}", policy) for term, policy in self.policies]

    # -- a batch ----------------------------------------------------------------------------------

    @property
    def state(self) -> Array:
        """The state that the terms read in every batch, concatenated: float64."""
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

    def weight_factors(self, batches: Sequence[Batch]) -> Any:
        """Return the product of the terms' factors for the weights, or None if no term has any."""
        product = None
        for term, batch in zip(self.terms, batches, strict=True):
            factor = term.weights(batch) if term.has_weights else None
            if factor is not None:
                product = factor if product is None else product * factor
        return product

    def penalty(self, batches: Sequence[Batch]) -> Any:
        """Return the sum of the terms' penalties, or None."""
        total = None
        for term, batch in zip(self.terms, batches, strict=True):
            part = term.penalty(batch) if term.has_penalty else None
            if part is not None:
                total = part if total is None else total + part
        return total

    def observe(self, batches: Sequence[Batch]) -> list[Any]:
        """Return the terms' sums of a batch as float64 vectors, `width` numbers in all, each finite."""
        vectors = []
        for term, batch in zip(self.terms, batches, strict=True):
            if not term.width:
                continue
            sums = term.observe(batch)
            vector = batch.ops.stack64(list(sums)) if isinstance(sums, list | tuple) else sums
            shape = batch.ops.shape(vector)
            if len(shape) != 1 or shape[0] not in (None, term.width):
                raise ConfigError(
                    f"{type(term).__name__}.observe() gave sums of shape {shape}, but width={term.width}"
                )
            # What is not finite would spread to all ranks; such a step is refused anyway.
            vectors.append(batch.ops.where(batch.ops.isfinite(vector), vector, batch.ops.zeros_like(vector)))
        return vectors

    # -- a step -----------------------------------------------------------------------------------

    def on_step_end(self, step: int, table: Array, comm_stats: CommStats, reduction: str = "mean") -> Array:
        """Record a finished step, decide, and return the new :attr:`state`.

        Args:
            step: its number, from 1.
            table: all ranks' ledgers and terms' sums, float64 ``(ranks, LEDGER_WIDTH + width)``.
            comm_stats: of their exchange.
            reduction: of the objective.
        """
        if not self.terms:
            return np.zeros(0)
        if self.table_override is not None:
            table = self.table_override(step, table)
        for listener in self.on_step:
            listener(step, table, comm_stats)
        rank = self._bound[0] if self._bound else 0
        ledgers, at = table[:, :LEDGER_WIDTH], LEDGER_WIDTH
        values: list[Array] = []
        for term in self.terms:
            sums = table[:, at : at + term.width]
            at += term.width
            stats = StepStats(step, rank, ledgers, sums, comm_stats, reduction)
            one = np.asarray(term.on_step_end(stats), dtype=np.float64)
            if one.shape != (len(table),) or not np.isfinite(one).all():
                raise ConfigError(
                    f"{type(term).__name__}.on_step_end() must return one finite value per rank, shape "
                    f"({len(table)},); it returned {one!r}"
                )
            values.append(one)
            for policy in term.policies:
                for decision in policy.on_step_end(term, stats):
                    self._record(decision)
            term.update_state()
        self._values = values
        return self.state

    def _record(self, decision: Decision) -> None:
        self.decisions.append(decision)
        for listener in self.on_decision:
            listener(decision)

    def reports(self) -> dict[str, TermReport]:
        """Return the terms' values in the last finished step, by name; empty before the first."""
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

    def policy(self, kind: type[Kind]) -> Kind | None:
        """Return the policy of this class, or None."""
        return next((policy for _, policy in self.policies if isinstance(policy, kind)), None)

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks, for the consistency check of the first step."""
        return {f"terms.{term.name}": term.settings() for term in self.terms}


def _to_plain(value: Any) -> Any:
    """Return an attribute as plain values; an object by its ``state_dict()``."""
    return value.state_dict() if hasattr(value, "state_dict") else value


def _set_from_plain(one: Any, key: str, value: Any) -> None:
    """Set an attribute from what :func:`_to_plain` returned."""
    current = getattr(one, key)
    setattr(one, key, current.from_state_dict(value) if hasattr(current, "from_state_dict") else value)
