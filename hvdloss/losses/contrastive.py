"""Contrastive losses over the global batch: every sample of every rank is a negative of every other.

The average over ranks of losses that know only their own rank's negatives is another, easier loss. Here
rank k holds rows x_i, y_i, weights w_i (1 where none are given) of its own; sums run over the rows of all
ranks, and an element of weight 0 is absent: it is no positive and no negative either, and may be NaN.

==========================  =========================================  =================================
loss                        held by a rank, besides its own rows       on the wire, per rank
==========================  =========================================  =================================
:class:`InfoNCE`            all rows; own x all similarities           one all-gather forward, one
                                                                       reduce-scatter backward
:class:`SupervisedContrastive`  the same                               and one all-gather of labels
:class:`SigLIP`             one other rank's rows; own x own           a ring of all-to-alls forward,
                            similarities                               nothing backward
==========================  =========================================  =================================

All of them need one more all-reduce of three numbers in the forward pass, for the value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hvdloss.errors import ConfigError, ShapeError
from hvdloss.losses.base import GlobalLoss, Group, Measured
from hvdloss.losses.reduction import ArrayOps, broadcast_weights

__all__ = ["InfoNCE", "SigLIP", "SupervisedContrastive"]

_FAR = -1e30  # the logit of what is absent: its exponential is 0, without the NaN that -inf may give
_TINY = 1e-12  # the least norm, as torch.nn.functional.normalize has it


class _Contrastive(GlobalLoss):
    """What contrastive losses have in common."""

    normalize: bool

    def elements(self, ops: ArrayOps, prediction: Any, target: Any) -> Any:
        """Return ones: one for each row."""
        x = prediction[0] if isinstance(prediction, tuple | list) else prediction
        return ops.ones_like(ops.index_last(ops.losses(x), 0))

    def _parts(self, prediction: Any, least: int, most: int, what: str, rank: int) -> Sequence[Any]:
        """Return the parts of a prediction."""
        if not isinstance(prediction, tuple | list) or not least <= len(prediction) <= most:
            found = (
                f"a tuple of {len(prediction)}"
                if isinstance(prediction, tuple | list)
                else type(prediction).__name__
            )
            raise ShapeError(f"{self.name}: prediction must be {what}, not {found} (rank {rank})")
        return prediction

    def _rows(
        self, ops: ArrayOps, features: Sequence[Any], weight: Any, rank: int
    ) -> tuple[list[Any], Any, Any]:
        """Return features with absent rows set to 0, weights, and how many numbers are not finite."""
        wide = [ops.losses(f) for f in features]
        shapes = [ops.shape(f) for f in wide]
        if any(len(s) != 2 for s in shapes) or not all(
            m == n or m is None or n is None for m, n in zip(shapes[0], shapes[-1], strict=True)
        ):
            raise ShapeError(
                f"{self.name}: features of shape {' and '.join(map(str, shapes))} must be (rows, columns), "
                f"equal for both sides (rank {rank}); row i of one side belongs to row i of the other"
            )
        if any(s[1] is None for s in shapes):
            raise ShapeError(
                f"{self.name}: the number of columns must be known while tracing, features have shape "
                f"{shapes[0]} (rank {rank}); give them a static last axis"
            )
        ones = ops.ones_like(ops.index_last(wide[0], 0))
        w = ones if weight is None else broadcast_weights(ops, weight, ones, rank)
        bad: Any = 0.0
        rows = []
        for f in wide:
            f = ops.cast_like(f, wide[0])
            f = ops.where(ops.unsqueeze(w) != 0, f, ops.zeros_like(f))
            bad = bad + ops.count(~ops.isfinite(f))
            if self.normalize:
                square = ops.sum_rows(f * f)
                tiny = ops.zeros_like(square) + _TINY**2
                f = f / ops.unsqueeze(ops.sqrt(ops.where(square > tiny, square, tiny)))
            rows.append(f)
        return rows, w, bad

    def _finished(
        self, ops: ArrayOps, group: Group, numerator: Any, weight: Any, bad: Any
    ) -> tuple[Measured, Any]:
        """Return the ratio of the sums over ranks (NaN without weight), and the summed weight or 1."""
        zero = ops.scalar64(0.0, numerator)
        local = ops.concat(
            [ops.reshape(ops.as64(n) + zero, (1,)) for n in (numerator, ops.as64(weight), bad)], 0
        )
        total = group.all_reduce(local, f"hvdloss.{self.name}.sums", replicated=True)
        some = total[1] != 0
        safe = ops.where(some, total[1], zero + 1.0)
        value = ops.where(some, total[0] / safe, zero + math.nan)
        # For what overflows without anything bad in it, all ranks are to blame.
        own = bad + zero
        fault = own + ops.where(total[2] == 0, ops.count(~ops.isfinite(total[0])), zero)
        return Measured(value, fault), safe

    def _number(self, ops: ArrayOps, what: str, value: Any, rank: int) -> Any:
        """Return a trained number as a float64 scalar."""
        if any(n != 1 for n in ops.shape(value)):
            raise ShapeError(
                f"{self.name}: {what} of shape {ops.shape(value)} must be one number (rank {rank})"
            )
        return ops.reshape(ops.as64(value), ())


def _above(**numbers: float) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name}={value!r} must be a finite number above 0")


class InfoNCE(_Contrastive):
    """Which of all ranks' y belongs to x (and x to y): CLIP's loss, exact over the global batch.

        L = sum_i w_i l_i / sum_i w_i
        l_i = -log( exp(s x_i.y_i) / sum_{j: w_j > 0} exp(s x_i.y_j) )

    with s = 1 / temperature; if symmetric, l_i is the mean of this and of the same with x and y
    exchanged. A weight weighs its own pair's term; every present pair counts once as a negative.

    Sources: van den Oord, Li and Vinyals 2018 (InfoNCE); Radford et al. 2021 (CLIP: symmetric, with a
    trained scale).

    Args:
        temperature: above 0; what similarities are divided by, unless the prediction has a log_scale.
        symmetric: also from y to x.
        normalize: scale rows to length 1 first.

    Called with the prediction ``(x, y)`` or ``(x, y, log_scale)``: x, y of shape (rows, columns), row i
    of x and y a pair, the number of rows different on each rank (0 as well); ``log_scale`` a trained
    scalar, s = exp(log_scale). No target (None). Weights of shape (rows,).

    Raises:
        ConfigError: a temperature that cannot be.
        ShapeError: a prediction, or a weight, that does not fit.

    Collectives: forward one all-gather of the rows (both sides and the weights, next to each other) with
    their numbers, one all-reduce of 24 bytes; backward one reduce-scatter (even rows) or all-to-all.

    >>> import numpy as np
    >>> x = np.eye(3)
    >>> round(float(InfoNCE(1.0).of((x, x))), 4)
    0.5514
    """

    def __init__(self, temperature: float = 0.07, *, symmetric: bool = True, normalize: bool = True) -> None:
        _above(temperature=temperature)
        self.temperature, self.symmetric, self.normalize = temperature, symmetric, normalize
        self.name = "InfoNCE"

    def measure(self, ops: ArrayOps, group: Group, prediction: Any, target: Any, weight: Any) -> Measured:
        """Return the loss over all ranks' pairs, and whether this rank is why it is not finite."""
        parts = self._parts(prediction, 2, 3, "(x, y) or (x, y, log_scale)", group.rank)
        (x, y), w, bad = self._rows(ops, parts[:2], weight, group.rank)
        columns = ops.shape(x)[1] or 0
        scale: Any = 1.0 / self.temperature
        if len(parts) == 3:
            scale = ops.exp(self._number(ops, "log_scale", parts[2], group.rank))
            bad = bad + ops.count(~ops.isfinite(scale))
            scale = ops.cast_like(scale, x)
        sent = [x, y] if self.symmetric else [y]
        rows = group.all_gather(ops.concat([*sent, ops.unsqueeze(w)], 1), f"hvdloss.{self.name}.rows")
        there = (rows[:, -1] != 0)[None, :]
        own = scale * ops.sum_rows(x * y)

        def against(mine: Any, all_rows: Any) -> Any:
            logits = scale * (mine @ ops.transpose(all_rows))
            return ops.logsumexp(ops.where(there, logits, ops.zeros_like(logits) + _FAR)) - own

        losses = against(x, rows[:, -1 - columns : -1])
        if self.symmetric:
            losses = (losses + against(y, rows[:, :columns])) / 2
        weighted = ops.where(w != 0, losses * w, ops.zeros_like(losses))
        return self._finished(ops, group, ops.sum(weighted), ops.sum64(w), bad)[0]


class SupervisedContrastive(_Contrastive):
    """Samples of one class near each other, over the global batch (the paper's L_out).

        L = sum_i w_i l_i / sum_i w_i                 over anchors i with a positive
        l_i = -1/|P(i)| sum_{p in P(i)} log( exp(z_i.z_p / t) / sum_{a != i} exp(z_i.z_a / t) )

    with P(i) all other present samples of i's label, on any rank, and t the temperature. An anchor
    without a positive is left out, above and below the line (the paper does not say what to do with it).
    A weight weighs its anchor's term; every present sample counts once as a positive or negative.

    Source: Khosla et al. 2020, equation 2.

    Args:
        temperature: above 0.
        normalize: scale rows to length 1 first.

    Called with the prediction z of shape (rows, columns), the target: integer labels (rows,), and
    weights (rows,). Several views of a sample are several rows with its label.

    Raises:
        ConfigError: a temperature that cannot be.
        ShapeError: a prediction, target or weight that does not fit.

    Collectives: forward two all-gathers (rows with weights; labels), one all-reduce of 24 bytes; backward
    one reduce-scatter (even rows) or all-to-all. Without any anchor that has a positive the value is NaN.
    """

    def __init__(self, temperature: float = 0.1, *, normalize: bool = True) -> None:
        _above(temperature=temperature)
        self.temperature, self.normalize = temperature, normalize
        self.name = "SupervisedContrastive"

    def measure(self, ops: ArrayOps, group: Group, prediction: Any, target: Any, weight: Any) -> Measured:
        """Return the loss over all ranks' samples, and whether this rank is why it is not finite."""
        (z,), w, bad = self._rows(ops, [prediction], weight, group.rank)
        labels = ops.to_int64(target)
        if len(ops.shape(labels)) != 1 or ops.shape(labels)[0] not in (None, ops.shape(z)[0]):
            raise ShapeError(
                f"{self.name}: target of shape {ops.shape(labels)} must hold one label for each of the rows "
                f"of the prediction, {ops.shape(z)} (rank {group.rank})"
            )
        rows = group.all_gather(ops.concat([z, ops.unsqueeze(w)], 1), f"hvdloss.{self.name}.rows")
        number = ops.row_indices(z)
        whose = ops.concat([ops.unsqueeze(k) for k in (labels, number * 0 + group.rank, number)], 1)
        known = group.all_gather(whose, f"hvdloss.{self.name}.labels")
        itself = (known[:, 1] == group.rank)[None, :] & (known[:, 2][None, :] == ops.unsqueeze(number))
        others = (rows[:, -1] != 0)[None, :] & ~itself
        alike = others & (known[:, 0][None, :] == ops.unsqueeze(labels))
        logits = (z @ ops.transpose(rows[:, :-1])) / self.temperature
        zero = ops.zeros_like(logits)
        size = ops.sum_rows(ops.cast_like(alike, logits))
        counted = (w != 0) & (size > 0)
        some = ops.where(size > 0, size, ops.ones_like(size))
        near = ops.sum_rows(ops.where(alike, logits, zero)) / some
        losses = ops.logsumexp(ops.where(others, logits, zero + _FAR)) - near
        none = ops.zeros_like(losses)
        weight = ops.sum64(ops.where(counted, w, none))
        weighted = ops.sum(ops.where(counted, losses * w, none))
        return self._finished(ops, group, weighted, weight, bad)[0]


class SigLIP(_Contrastive):
    """Whether y belongs to x, for every pair of the global batch; memory stays that of two ranks' rows.

        L = sum_ij w_i w_j softplus(-z_ij (exp(log_scale) x_i.y_j + bias)) / sum_i w_i

    with z_ij = 1 for i = j, else -1: with weights of 0 and 1 the paper's loss of the present pairs.

    The y of each rank, with the gradient that it has collected so far, go round the ring of ranks. One
    round gives the value and all gradients, which the backward pass only scales. No rank ever holds more
    than one other rank's rows. Second derivatives are refused.

    Source: Zhai, Mustafa, Kolesnikov and Beyer 2023 (who send y round the ring for the value, and again
    for the gradient).

    Args:
        normalize: scale rows to length 1 first.

    Called with the prediction ``(x, y, log_scale, bias)``: x, y of shape (rows, columns), row i of x and
    y a pair, the number of rows different on each rank (0 as well); log_scale and bias trained scalars,
    which the paper begins at log 10 and -10. No target (None). Weights of shape (rows,).

    Raises:
        ShapeError: a prediction, or a weight, that does not fit.

    Collectives: forward, with n ranks, n all-to-alls, each to one receiver: n - 1 of 2 columns + 1 numbers
    per row, one of columns numbers; one all-reduce of 24 bytes. Backward none.

    >>> import numpy as np
    >>> x = np.eye(2)
    >>> round(float(SigLIP().of((x, x, np.log(10.0), -10.0))), 4)
    0.6932
    """

    def __init__(self, *, normalize: bool = True) -> None:
        self.normalize = normalize
        self.name = "SigLIP"

    def measure(self, ops: ArrayOps, group: Group, prediction: Any, target: Any, weight: Any) -> Measured:
        """Return the loss over all ranks' pairs, and whether this rank is why it is not finite."""
        parts = self._parts(prediction, 4, 4, "(x, y, log_scale, bias)", group.rank)
        rows, w, bad = self._rows(ops, parts[:2], weight, group.rank)
        names = zip(("log_scale", "bias"), parts[2:], strict=True)
        log_scale, shift = (self._number(ops, name, value, group.rank) for name, value in names)
        inputs = [*rows, log_scale, shift]
        x, y, log_scale, shift = (ops.stop_gradient(v) for v in inputs)
        bad = bad + ops.count(~ops.isfinite(log_scale)) + ops.count(~ops.isfinite(shift))
        total, gradients = self._ring(ops, group, x, y, w, log_scale, shift)
        measured, summed = self._finished(ops, group, total, ops.sum64(w), bad)
        parts_of = [g / ops.cast_like(summed, g) for g in gradients]
        return Measured(ops.with_gradients(measured.value, inputs, parts_of), measured.fault)

    def _ring(
        self, ops: ArrayOps, group: Group, x: Any, y: Any, w: Any, log_scale: Any, bias: Any
    ) -> tuple[Any, list[Any]]:
        """Return this rank's sum, and its gradients of x, y (all ranks' sums), log_scale, bias."""
        columns = ops.shape(x)[1] or 0
        scale, offset = ops.cast_like(ops.exp(log_scale), x), ops.cast_like(bias, x)
        w = ops.unsqueeze(w)
        held, there = y, w
        total, dx, dy, d_bias = self._block(ops, x, w, y, w, scale, offset, True)
        for step in range(1, group.size):
            name = f"hvdloss.{self.name}.ring.{step}"
            came = group.shift(ops.concat([held, dy, there], 1), name)
            held, dy, there = came[:, :columns], came[:, columns : 2 * columns], came[:, 2 * columns :]
            block = self._block(ops, x, w, held, there, scale, offset, False)
            total, dx, dy, d_bias = (a + b for a, b in zip((total, dx, dy, d_bias), block, strict=True))
        if group.size > 1:
            dy = group.shift(dy, f"hvdloss.{self.name}.ring.home")
        # Similarities grow with the scale as they do with x.
        return total, [dx, dy, ops.sum64(x * dx), d_bias]

    @staticmethod
    def _block(
        ops: ArrayOps, x: Any, w: Any, y: Any, v: Any, scale: Any, offset: Any, own: bool
    ) -> tuple[Any, Any, Any, Any]:
        """Return the sum over x (weights w) and y (weights v), and its gradients of x, y and the bias.

        Weights are columns, applied to what has few numbers. `own`: row i of y belongs to row i of x.
        """
        logits = (scale * x) @ ops.transpose(y) + offset
        if own:
            number = ops.row_indices(x)
            pair = ops.unsqueeze(number) == number[None, :]
            logits = ops.where(pair, -logits, logits)
        total = ops.sum64(w * (ops.softplus(logits) @ v))
        slope = ops.sigmoid(logits)
        if own:
            slope = ops.where(pair, -slope, slope)
        dx = scale * w * (slope @ (v * y))
        dy = scale * v * (ops.transpose(slope) @ (w * x))
        return total, dx, dy, ops.sum64(w * (slope @ v))
