"""Whole numbers in proportion."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hvdloss.errors import ConfigError

__all__ = ["apportion"]


def apportion(total: int, shares: npt.ArrayLike, least: int = 0) -> npt.NDArray[np.int64]:
    """Return whole numbers that add up to `total`, nearly in proportion to `shares`, none below `least`.

    Hamilton's method of largest remainders on what lies above `least`; ties go to the lower rank.

    >>> apportion(10, [1, 1, 2]).tolist(), apportion(7, [1, 0], least=2).tolist()
    ([3, 2, 5], [5, 2])

    Raises:
        ConfigError: `total` below ``least * len(shares)``.
    """
    weights = np.asarray(shares, dtype=np.float64)
    n = len(weights)
    if total < least * n:
        raise ConfigError(f"{total} samples cannot give each of {n} ranks at least {least}")
    weights = np.full(n, 1.0) if weights.sum() <= 0 else weights
    exact = np.maximum(total * weights / weights.sum(), least)
    # Ranks held at `least` take from the others, in proportion.
    for _ in range(n):
        free = exact > least
        rest = total - least * int((~free).sum())
        if not free.any():
            break
        exact[free] = rest * weights[free] / weights[free].sum()
        if (exact >= least).all():
            break
        exact = np.maximum(exact, least)
    whole: npt.NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    return whole
