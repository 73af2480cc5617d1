"""Mixup: samples mixed in pairs, and a loss of both targets that stays exact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.errors import ConfigError, ShapeError

__all__ = ["Mixed", "blended", "mixup", "partners"]


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A batch of mixed samples, each with two targets.

    Attributes:
        x: the mixed inputs, a * x + (1 - a) * x of the partner.
        targets: of the samples, and of their partners.
        weights: a * w, and (1 - a) * w of the partner.
        concatenate: how the framework joins arrays.
    """

    x: Any
    targets: tuple[Any, Any]
    weights: tuple[Any, Any]
    concatenate: Callable[[list[Any]], Any] = np.concatenate

    def pairs(self, prediction: Any) -> tuple[Any, Any, Any]:
        """Return predictions, targets and weights of all pairs of a mixed sample and a target.

        Their weighted mean loss, sum a w l(y) + (1 - a) w' l(y') over sum a w + (1 - a) w', is that of
        mixup; and since it is one of elements and weights, it is exact over ranks and micro-batches::

            loss = objective(*mixed.pairs(model(mixed.x)))
        """
        return (
            self.concatenate([prediction, prediction]),
            self.concatenate(list(self.targets)),
            self.concatenate(list(self.weights)),
        )

    def batch(self) -> tuple[Any, Any, Any]:
        """Return inputs, targets and weights of all pairs: a batch for ``model.fit``, of twice the rows."""
        return self.pairs(self.x)


def partners(
    samples: int, alpha: float, rng: np.random.Generator, present: npt.NDArray[np.bool_] | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return each sample's own share, drawn from Beta(alpha, alpha), and its partner in the batch.

    Args:
        samples: their number; may be 0.
        alpha: above 0. Small: most samples nearly unmixed; 1: any share as likely.
        rng: of this rank, epoch and step.
        present: which samples have a weight; the others stay unchanged and are not used as partners.

    Raises:
        ConfigError: `alpha` not above 0.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha={alpha!r} must be a number above 0")
    share, partner = rng.beta(alpha, alpha, samples), np.arange(samples, dtype=np.int64)
    here = partner if present is None else np.flatnonzero(present)
    partner[here] = rng.permutation(here)
    if present is not None:
        share[~present] = 1.0
    return share, partner


def blended(x: Any, other: Any, share: Any) -> Any:
    """Return what is mixed: `share` has the axes of `x`, the first one's length and else 1."""
    return x * share + other * (1 - share)


def mixup(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    *,
    alpha: float = 0.2,
    rng: np.random.Generator,
) -> Mixed:
    """Mix the samples of a batch of NumPy arrays in random pairs.

    Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: Beyond Empirical Risk Minimization" (2018). Every sample has
    a share of its own. The loss is that of both targets by their shares, for any loss; mixing the targets
    themselves would be the same for losses that are linear in them (cross-entropy), not for others. A sample
    of weight 0 takes no part.

    Args:
        x: floats, shape (samples, ...).
        y: targets, shape (samples, ...).
        weight: shape (samples,) or (samples, ...); None for 1 each.
        alpha: of the Beta distribution of shares.
        rng: of this rank, epoch and step: see :func:`generator_for`.

    Raises:
        ConfigError: `alpha` not above 0, or inputs that are no floats.
        ShapeError: other numbers of samples.

    Collectives: none.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype.kind not in "fV":
        raise ConfigError(f"x has dtype {x.dtype}; only floats can be mixed")
    w = np.ones(len(y), np.float64) if weight is None else np.asarray(weight)
    if not len(x) == len(y) == len(w):
        raise ShapeError(f"x, y and weight have {len(x)}, {len(y)} and {len(w)} rows; they must be as many")
    present = None if weight is None else (w != 0).any(axis=tuple(range(1, w.ndim)))
    share, partner = partners(len(x), alpha, rng, present)

    def like(array: Any) -> Any:
        return share.reshape(-1, *[1] * (array.ndim - 1)).astype(np.result_type(array.dtype, np.float32))

    mixed = blended(x, x[partner], like(x)).astype(x.dtype)
    if present is not None:
        mixed[~present] = x[~present]
    return Mixed(mixed, (y, y[partner]), (w * like(w), w[partner] * (1 - like(w))))
