"""The objective: a loss with its reduction, exact over all elements of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hvdloss.communicator import rank_and_size
from hvdloss.objective import CLASS_LOSSES, IGNORED, ObjectiveBase, expand_mask_axes
from hvdloss.reduction import contribution, weights_for
from hvdloss.torch._backend import hvd
from hvdloss.torch.ops import NAMED_LOSSES, TorchOps

__all__ = ["Objective"]

_OPS = TorchOps()


class _Gate(torch.autograd.Function):
    """Identity whose gradient is zero at absent elements, even where it would be NaN.

    The mask is set after the losses are known: only then is their shape.
    """

    @staticmethod
    def forward(ctx: Any, prediction: torch.Tensor, holder: list[torch.Tensor]) -> torch.Tensor:
        ctx.holder = holder
        return prediction.view_as(prediction)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        return (grad.masked_fill(ctx.holder[0], 0) if ctx.holder else grad), None


class Objective(ObjectiveBase[torch.Tensor]):
    """The weighted loss of all elements of a step, however they fall on ranks and micro-batches.

    Calling it gives this rank's local mean, an ordinary scalar tensor: ``loss.backward()`` and
    ``loss.item()`` do what they always do, and a penalty may be added. Passed to
    :func:`hvdloss.torch.DistributedOptimizer`, the step's gradient is that of

        L = sum_k sum_m sum_i w l / sum_k sum_m sum_i w        (reduction "mean")

    over ranks k, micro-batches m and elements i, plus the penalty, once.

    Args:
        loss: a name from ``hvdloss.objective.LOSSES``, or a callable
            ``(prediction, target) -> per-element losses``.
        reduction: ``"mean"`` (sum wl / sum w), ``"sum"``, ``"batch_mean"`` (sum wl / number of elements
            with w != 0), or ``"sequence_mean"`` (losses of shape (N, T): the mean over sequences of each
            one's weighted token mean). With ``"sum"`` a call gives size x passes x its local sum, its
            estimate of the global sum, so that a penalty added to it keeps its proportion.
        terms: what is measured per rank, priced and acted on: :class:`hvdloss.CommunicationCost`,
            :class:`hvdloss.DataSkew`, your own subclasses of :class:`hvdloss.Term`.
        process_set: the Horovod process set whose ranks share the step; None for the optimizer's.

    Raises:
        ConfigError: an argument that cannot be used.

    >>> import torch
    >>> from hvdloss.torch import Objective
    >>> objective = Objective("mse")
    >>> y, t = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.0, 0.0, 0.0])
    >>> objective(y, t, weight=torch.tensor([1.0, 1.0, 0.0])).item()
    2.5
    """

    def _named_losses(self) -> Mapping[str, Callable[..., torch.Tensor]]:
        return NAMED_LOSSES

    def __call__(self, prediction: Any, target: Any, weight: Any = None, *, keys: Any = None) -> torch.Tensor:
        """Return the local loss of these elements, a scalar tensor (float32, or float64 for float64).

        Args:
            prediction: what the loss takes; ``(N, C, ...)`` logits for ``"cross_entropy"``.
            target: what the loss takes. Class indices of -100 mark absent elements.
            weight: None, a number or a tensor that broadcasts (NumPy's rule) to the per-element losses.
                An element of weight zero is absent: its loss may be NaN. A negative, NaN or infinite
                weight raises WeightError on every rank at the optimizer's step.
            keys: what terms may group elements by (``DataSkew(of="keys")``): integers whose leading axes
                are those of the losses.

        Raises:
            ShapeError: `weight` does not broadcast to the losses, or no token axis.

        Collectives: none.
        """
        if torch.compiler.is_compiling():
            # Inside a compiled function: announcing a backward pass is not for the compiler to trace.
            # (The decorator on this method would load the compiler, a second, for everyone.)
            return torch.compiler.disable(self._measure)(prediction, target, weight, keys)
        return self._measure(prediction, target, weight, keys)

    def _measure(self, prediction: Any, target: Any, weight: Any, keys: Any) -> torch.Tensor:
        rank, size = rank_and_size(hvd, self.process_set)
        holder: list[torch.Tensor] = []
        given = prediction
        absent = None
        classes = self.name in CLASS_LOSSES
        if hasattr(self._function, "absent"):  # a loss that knows by itself
            absent = self._function.absent(target)
        elif classes and isinstance(target, torch.Tensor) and not target.is_floating_point():
            absent = target == IGNORED
        if absent is not None and absent.device.type == "cpu" and not absent.any():
            absent = None
        acting = self.controller
        may_mask = weight is not None or absent is not None or acting.weighs
        if may_mask and isinstance(prediction, torch.Tensor) and prediction.requires_grad:
            prediction = _Gate.apply(prediction, holder)
        losses = self._function(prediction, target)
        if absent is not None:
            present = (~absent).to(_OPS.losses(losses).dtype)
            weight = present if weight is None else present * weights_for(_OPS, weight, present, rank)
        penalty, told = None, []
        if acting.terms:
            weight, penalty, told = self.consult(
                _OPS,
                prediction=prediction,
                target=target,
                losses=losses,
                weight=weight,
                keys=keys,
                state=torch.from_numpy(acting.state).to(losses.device),
                class_axis=min(1, given.dim() - 1) if classes else None,
                rank=rank,
                size=size,
            )
        part = contribution(
            _OPS,
            losses,
            weight,
            self.reduction,
            share=1.0 / (size * self.passes),
            rank=rank,
        )
        if weight is not None and isinstance(given, torch.Tensor):
            class_axis = min(1, given.dim() - 1) if classes else None
            self._set_gate(holder, losses, given, weight, class_axis)
        loss = part.mean(_OPS)
        if penalty is not None:
            loss = loss + penalty
        if loss.requires_grad and self._listeners:
            row = part.row(_OPS)
            if told:
                row = torch.cat([row, *told])
            loss.register_hook(lambda _: self.announce(row))
        return loss

    @staticmethod
    def _set_gate(
        holder: list[torch.Tensor],
        losses: torch.Tensor,
        prediction: torch.Tensor,
        weight: Any,
        class_axis: int | None,
    ) -> None:
        """Let the gate hold back the gradient of absent elements, where the shapes tell which they are."""
        axes = expand_mask_axes(tuple(losses.shape), tuple(prediction.shape), class_axis)
        if axes is None:
            return
        mask = torch.as_tensor(weight, device=losses.device).detach().expand_as(losses) == 0
        if mask.device.type == "cpu" and not mask.any():
            return
        for axis in axes:
            mask = mask.unsqueeze(axis)
        holder.append(mask)
