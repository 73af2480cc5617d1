"""Policies of data skew: weights of classes and ranks, and a proximal term."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.errors import ConfigError
from hvdloss.terms.distributions import (
    agnostic_ascent,
    balance_table,
    exponentiated_gradient,
    importance_table,
    q_fair,
)
from hvdloss.terms.term import Decision, Policy, StepStats

__all__ = ["ClassBalance", "ImportanceWeights", "Proximal", "RankWeights"]

Array = npt.NDArray[np.float64]


class ImportanceWeights(Policy):
    """Weights each rank's samples so that its classes follow a target distribution.

    A sample of class c on rank k has the weight q(c) / p_k(c), at most `clip`, where p_k is the rank's own
    distribution and q the target (Shimodaira 2000); a rank's mean weight stays one. The cost in variance is
    reported as the effective sample size (Kish), as a share of the rank's samples. Classes that a rank does
    not have cannot be made up for.

    Args:
        target: ``"global"`` (that of all ranks' data), ``"uniform"``, or one number per bin.
        clip: largest factor, at least 1; None for no bound.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(self, target: str | npt.ArrayLike = "global", *, clip: float | None = 10.0) -> None:
        if isinstance(target, str):
            if target not in ("global", "uniform"):
                raise ConfigError(
                    f"target={target!r} of ImportanceWeights must be 'global', 'uniform' or a number per bin"
                )
            self.target: str | Array = target
        else:
            self.target = np.asarray(target, dtype=np.float64)
            if self.target.ndim != 1 or not (np.isfinite(self.target).all() and (self.target >= 0).all()):
                raise ConfigError(f"target={target!r} of ImportanceWeights must be numbers of at least 0")
            if not self.target.sum() > 0:
                raise ConfigError(f"target={target!r} of ImportanceWeights has no weight on any bin")
        if clip is not None and not clip >= 1:
            raise ConfigError(f"clip={clip!r} of ImportanceWeights must be at least 1, or None")
        self.clip = clip

    def goal(self, counts: Array) -> Array:
        """Return the target distribution, given all ranks' counts ``(ranks, bins)``."""
        if isinstance(self.target, str):
            return counts.sum(0) if self.target == "global" else np.ones(counts.shape[1])
        if len(self.target) != counts.shape[1]:
            raise ConfigError(
                f"target of ImportanceWeights has {len(self.target)} numbers, but there are "
                f"{counts.shape[1]} bins"
            )
        return self.target

    def table(self, counts: Array, rank: int) -> Array:
        """Return a rank's factors, one per bin."""
        return importance_table(counts[rank], self.goal(counts), self.clip)


class ClassBalance(Policy):
    """Weights classes by how rare they are in the data of *all* ranks.

    Args:
        kind: ``"inverse"`` frequency, or ``"effective"`` number of samples (Cui et al. 2019), which
            counts the n-th sample of a class as ``beta**(n-1)`` of a new one.
        beta: of the effective number, in [0, 1); with 0 all classes weigh the same.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(self, kind: str = "inverse", *, beta: float = 0.999) -> None:
        if kind not in ("inverse", "effective"):
            raise ConfigError(f"kind={kind!r} of ClassBalance must be 'inverse' or 'effective'")
        if not 0 <= beta < 1:
            raise ConfigError(f"beta={beta!r} of ClassBalance must lie in [0, 1)")
        self.kind, self.beta = kind, beta

    def table(self, counts: Array, rank: int) -> Array:
        """Return the factors, one per bin, equal on all ranks."""
        return balance_table(counts.sum(0), self.kind, self.beta)


class RankWeights(Policy):
    """Weights ranks by their losses: those with the highest loss count for more.

    The objective becomes ``sum_k r_k S_k / sum_k r_k W_k`` with rank k's loss sum S_k and weight sum W_k.
    The factors r are computed from all ranks' losses of the steps so far, so every rank knows the same.

    Args:
        kind: ``"dro"`` (group DRO, Sagawa et al. 2020: exponentiated ascent), ``"agnostic"`` (agnostic
            federated learning, Mohri et al. 2019: projected ascent) or ``"q_fair"`` (q-FFL, Li et al.
            2020: the q-th power of the loss).
        step: of the ascent.
        q: of ``"q_fair"``; 0 leaves all ranks equal.
        smoothing: share of the old loss kept when a new one comes, in [0, 1).

    Raises:
        ConfigError: an argument that cannot be used.
    """

    per_rank_state_attrs = ("shares", "losses", "factors")

    def __init__(
        self, kind: str = "dro", *, step: float = 0.01, q: float = 1.0, smoothing: float = 0.0
    ) -> None:
        if kind not in ("dro", "agnostic", "q_fair"):
            raise ConfigError(f"kind={kind!r} of RankWeights must be 'dro', 'agnostic' or 'q_fair'")
        if not 0 < step < math.inf:
            raise ConfigError(f"step={step!r} of RankWeights must be above 0 and finite")
        if not 0 <= q < math.inf:
            raise ConfigError(f"q={q!r} of RankWeights must be at least 0 and finite")
        if not 0 <= smoothing < 1:
            raise ConfigError(f"smoothing={smoothing!r} of RankWeights must lie in [0, 1)")
        self.kind, self.step, self.q, self.smoothing = kind, step, q, smoothing
        self.reset(0, 1)

    def reset(self, rank: int, size: int) -> None:
        """Start with equal weights."""
        self.shares: Array | None = None  # the distribution over ranks, for the two ascents
        self.losses = np.full(size, np.nan)
        self.factors = np.ones(size)

    def on_step_end(self, term: Any, step: StepStats) -> Sequence[Decision]:
        """Update the rank weights from the losses."""
        new = step.losses
        known = np.isfinite(self.losses) & np.isfinite(new)
        self.losses = np.where(
            known,
            self.smoothing * self.losses + (1 - self.smoothing) * new,
            np.where(np.isfinite(new), new, self.losses),
        )
        if not np.isfinite(self.losses).any():
            return ()
        counts = term.counts.sum(1)
        data = counts / counts.sum() if counts.sum() > 0 else np.full(step.size, 1 / step.size)
        if self.kind == "q_fair":
            self.factors = q_fair(self.losses, self.q)
            return ()
        if self.shares is None:
            self.shares = data
        ascend = exponentiated_gradient if self.kind == "dro" else agnostic_ascent
        self.shares = ascend(self.shares, self.losses, self.step)
        # Without factors a rank's share is `data`; these make it `shares`.
        self.factors = np.where(data > 0, self.shares / np.where(data > 0, data, 1.0), 1.0)
        return ()


class Proximal(Policy):
    """Adds a proximal term that pulls a rank's parameters toward those of the last exchange.

    Its strength grows with the rank's skew. Between two exchanges (:class:`SyncPeriod`) rank k minimises its
    own loss plus
    ``mu_k / 2 * ||theta - theta_0||^2`` (FedProx, Li et al. 2020), with mu_k = strength * D(k) / D_max:
    D_max is ln 2 for Jensen-Shannon, 1 for total variation and for Wasserstein.

    Args:
        strength: of a fully skewed rank; None for the term's price.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    per_rank_state_attrs = ("mu",)

    def __init__(self, strength: float | None = None) -> None:
        if strength is not None and not 0 <= strength < math.inf:
            raise ConfigError(f"strength={strength!r} of Proximal must be at least 0 and finite, or None")
        self.strength = strength
        self.reset(0, 1)

    def reset(self, rank: int, size: int) -> None:
        """Start without a proximal term."""
        self.mu = 0.0

    def on_step_end(self, term: Any, step: StepStats) -> Sequence[Decision]:
        """Update mu from the rank's skew."""
        strength = term.price if self.strength is None else self.strength
        self.mu = strength * float(term.skew[step.rank]) / term.largest
        return ()
