"""How a rank's ledger travels in TensorFlow: as its row of a table of all ranks', or in their exact sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import tensorflow as tf
from hvdloss.comm.exact import digits_for
from hvdloss.losses.ledger import LEDGER_WIDTH, Sums

__all__ = ["Message", "exact_totals"]

_PRECISION = {tf.float32: 24, tf.float64: 53}
_SHIFTS: dict[str, Any] = {
    "left": tf.bitwise.left_shift,
    "right": tf.bitwise.right_shift,
    "clip": lambda x, low, high: tf.clip_by_value(x, tf.constant(low, x.dtype), tf.constant(high, x.dtype)),
}


class Message:
    """A ledger on its way, as numbers that are summed over ranks; in eager code and in graphs.

    Args:
        rank, size: of the ranks.
        sums: whether only their sums travel.
    """

    def __init__(self, rank: int, size: int, sums: bool) -> None:
        self.rank, self.size, self.sums = rank, size, sums

    def write(self, row: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        """Return this rank's ledger, float64 ``(LEDGER_WIDTH,)``, as a vector of this dtype."""
        if not self.sums:
            table = tf.scatter_nd([[self.rank]], row[tf.newaxis], [self.size, LEDGER_WIDTH])
            # Numbers of 16 bits, four per entry: where all but one rank add zeros, their sum in float32 is
            # exact, which that of the entries is not.
            return tf.reshape(tf.cast(tf.bitcast(table, tf.uint16), dtype), [-1])
        sums = Sums(self.size, _PRECISION[dtype])
        return sums.write(
            row,
            tf.bitcast(row, tf.int64),
            tf.constant(sums.positions),
            join=lambda parts: tf.concat([tf.cast(part, dtype) for part in parts], 0),
            flags=lambda some: some > 0,
            flat=lambda digits: tf.reshape(digits, [-1]),
            **_SHIFTS,
        )

    def table(self, numbers: tf.Tensor) -> tf.Tensor:
        """Return the table of all ranks that the summed numbers are."""
        return tf.bitcast(tf.reshape(tf.cast(numbers, tf.uint16), [self.size, LEDGER_WIDTH, 4]), tf.float64)

    def totals(self, numbers: tf.Tensor) -> tf.Tensor:
        """Return what the summed numbers come to: :attr:`hvdloss.losses.ledger.Ledgers.totals`."""
        sums = Sums(self.size, _PRECISION[numbers.dtype])

        def read(numbers: np.ndarray) -> Any:
            return sums.unpack(numbers).totals

        return tf.ensure_shape(
            tf.numpy_function(read, [numbers], tf.float64, stateful=False), (LEDGER_WIDTH,)
        )


def exact_totals(size: int, x: tf.Tensor, summed: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Return the exactly rounded sums of a vector of finite float64 over `size` ranks.

    `summed` sums over ranks.
    """
    digits = digits_for(size, _PRECISION[tf.float64])
    written = digits.write(tf.bitcast(x, tf.int64)[:, tf.newaxis], tf.constant(digits.positions), **_SHIFTS)

    def read(numbers: np.ndarray) -> Any:
        return np.array(digits.read(np.rint(numbers)))

    arrived = summed(tf.cast(written, tf.float64))
    return tf.ensure_shape(tf.numpy_function(read, [arrived], tf.float64, stateful=False), x.shape)
