"""Sums of float64 numbers over any number of ranks that do not depend on the order in which they are added.

A number is written in fixed point, over the whole range of float64, as digits that are whole numbers so
small that their sums over all ranks are exact in the dtype of the message. An ordinary all-reduce of
the digits is then exact in whatever order and grouping it adds, and the sum of the numbers is rounded once,
when it is read (the long accumulator of Kulisch, "Computer Arithmetic and Validity", 2nd ed. 2013).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss.errors import ConfigError

__all__ = ["Digits", "digits_for"]

_LOWEST = 1074  # the smallest float64 above 0 is 2 to the power of minus this
_BITS = 2098  # of the largest finite float64, measured in that
_MANTISSA = 52


class Digits:
    """How float64 numbers are written as digits whose sums over `size` ranks are exact.

    Args:
        size: the number of ranks.
        precision: bits of a whole number that the travelling dtype holds exactly: 24 for float32, 53 for
            float64.

    Attributes:
        bits: of one digit.
        count: digits of one number.

    Raises:
        ConfigError: too many ranks to leave bits for a digit.
    """

    def __init__(self, size: int, precision: int) -> None:
        self.bits = precision - (size - 1).bit_length()
        if self.bits < 1:
            raise ConfigError(f"sums over size={size} ranks do not fit whole numbers of {precision} bits")
        self.count = -(-_BITS // self.bits)
        self.positions = np.arange(self.count, dtype=np.int64) * self.bits

    def write(
        self,
        bits: Any,
        positions: Any,
        *,
        left: Callable[[Any, Any], Any] = np.left_shift,
        right: Callable[[Any, Any], Any] = np.right_shift,
        clip: Callable[[Any, int, int], Any] = np.clip,
    ) -> Any:
        """Return the digits of finite numbers, ``(numbers, count)`` int64, the lowest first.

        Args:
            bits: the numbers' float64 patterns as an int64 column ``(numbers, 1)``, of any framework.
            positions: :attr:`positions` as an array of the same framework.
            left, right, clip: its shifts of int64 (right: arithmetic), and its limits to a range.
        """
        exponent = right(bits, _MANTISSA) & 2047
        normal = clip(exponent, 0, 1)
        mantissa = (bits & (2**_MANTISSA - 1)) + left(normal, _MANTISSA)
        # A digit is what of the mantissa lies in its place; what is shifted out of 64 bits is in another's.
        shift = positions - (exponent - normal)
        digits = left(right(mantissa, clip(shift, 0, 63)), clip(-shift, 0, 63)) & (2**self.bits - 1)
        return digits * (1 - 2 * (right(bits, 63) & 1))

    def read(self, digits: npt.NDArray[Any]) -> list[float]:
        """Return the numbers of summed digits ``(numbers, count)``, rounded once; infinite if too large."""
        out = []
        for row in digits:
            places = np.flatnonzero(row)
            total = sum(int(row[i]) << (self.bits * int(i)) for i in places)
            try:
                out.append(total / (1 << _LOWEST))
            except OverflowError:
                out.append(float("inf") if total > 0 else float("-inf"))
        return out


@lru_cache(maxsize=16)
def digits_for(size: int, precision: int) -> Digits:
    """Return the :class:`Digits` for a number of ranks and the bits of a dtype; cached."""
    return Digits(size, precision)
