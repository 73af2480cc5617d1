"""The objective: a loss with its reduction, exact over all elements of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hvdloss.comm.communicator import rank_and_size
from hvdloss.errors import ConfigError
from hvdloss.losses.passes import weight_gradient_error
from hvdloss.losses.reduction import Contribution, broadcast_weights, reduce_losses
from hvdloss.step.objective import ObjectiveBase, expand_mask_axes
from hvdloss.torch._backend import hvd
from hvdloss.torch.ahead import Ahead
from hvdloss.torch.collectives import group_of
from hvdloss.torch.ops import NAMED_LOSSES, TorchOps, on_host, to_device_async
from hvdloss.torch.passes import multiplied, weight_of_pass
from hvdloss.torch.reading import Elements, own_reduction, read, with_absent_targets

__all__ = ["Objective"]

_OPS = TorchOps()


class _MaskGradient(torch.autograd.Function):
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


_SECOND = (
    "create_graph=True: the gradient of a loss of all ranks' elements is a rank's part of the "
    "whole, whose derivative would lack the other ranks' elements; differentiate once, or build "
    "the loss on hvdloss.torch.collectives, whose backward passes can be differentiated"
)


def _scale_gradient(value: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the value, with its gradient multiplied by `factor`."""
    return multiplied(value, lambda: factor, _SECOND)


def _device(given: Any) -> torch.device:
    """Return the device of a prediction of one or several tensors."""
    tensors = [given] if isinstance(given, torch.Tensor) else list(given)
    return next((x.device for x in tensors if isinstance(x, torch.Tensor)), torch.device("cpu"))


class Objective(ObjectiveBase[torch.Tensor]):
    """The weighted loss of all elements of a step, however they fall on ranks and micro-batches.

    Calling it gives this rank's local mean, an ordinary scalar tensor: ``loss.backward()`` and
    ``loss.item()`` do what they always do, and a penalty may be added. Passed to
    :func:`hvdloss.torch.DistributedOptimizer`, the step's gradient is that of

        L = sum_k sum_m sum_i w l / sum_k sum_m sum_i w        (reduction "mean")

    over ranks k, micro-batches m and elements i, plus the penalty, once.

    Args:
        loss: a name from ``hvdloss.step.objective.LOSSES``, or a callable
            ``(prediction, target) -> per-element losses``. A loss of PyTorch, as a module or function, may
            reduce by itself, and also inside a function of your own: its elements, their class weights and
            those it ignores are read from it. What returns one number otherwise is refused. Or a loss that
            is no mean, of
            :mod:`hvdloss.losses`, or its name (``"soft_dice"``, ``"correlation"``, ...): calling the
            objective then gives that of all ranks' elements.
        reduction: ``"mean"`` (sum wl / sum w), ``"sum"``, ``"batch_mean"`` (sum wl / number of elements
            with w != 0), or ``"sequence_mean"`` (losses of shape (N, T), or packed ones with segments: the
            mean over sequences of each one's weighted token mean); None for the loss's own, or ``"mean"``.
            With ``"sum"`` a call gives size x passes x its local sum, its estimate of the global sum, so
            that a penalty added to it keeps its proportion.
        ignore_index, label_smoothing, class_weight: of ``"cross_entropy"`` (the first and last of ``"nll"``
            too), as in ``torch.nn.CrossEntropyLoss``: targets that are absent, -100 by default; the part
            of each target that is spread over all classes; one weight per class.
        terms: what is measured per rank, priced and acted on: :class:`hvdloss.CommunicationCost`,
            :class:`hvdloss.DataSkew`, your own subclasses of :class:`hvdloss.Term`.
        process_set: the Horovod process set whose ranks share the step; None for the optimizer's.
        nonfinite: what :func:`hvdloss.torch.DistributedOptimizer` does where the loss or a gradient of some
            rank is NaN or infinite (a weight that is, or is negative, is always an error).

            - ``"raise"``: ``step()`` raises NonFiniteLossError or NonFiniteGradientError on every rank, and
              nothing was updated.
            - ``"skip"``: no rank updates anything; ``last_step`` counts it, and names the ranks. What the
              forward pass changed (statistics of batch normalisation) stays.
            - ``"drop"``: that rank adds nothing to the step: no gradient, weight or element, as if it had
              had no batch. With ``"sum"`` a penalty then counts for its share of the calls only. The
              reductions start after the backward pass, not during it, since a rank must know its gradients
              before it sends any, and a device is waited for.
        ahead: for gradients that somebody else averages over ranks (``DistributedDataParallel``,
            ``fully_shard``, a trainer), without :func:`hvdloss.torch.DistributedOptimizer`: the weights of
            all ranks are exchanged in the forward pass, so that the average is the exact gradient. ``"sum"``
            where they are added up instead (``set_gradient_divide_factor(1.0)`` of FSDP2); an FSDP2 model
            of this process that does otherwise is refused in the backward pass. Every rank must make the
            call, with a batch without rows if it has none. See :meth:`total` for gradient accumulation.

    Raises:
        ConfigError: an argument that cannot be used.

    >>> import torch
    >>> from hvdloss.torch import Objective
    >>> objective = Objective("mse")
    >>> y, t = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.0, 0.0, 0.0])
    >>> objective(y, t, weight=torch.tensor([1.0, 1.0, 0.0])).item()
    2.5
    """

    #: Of an optimizer that has several objectives (`hvdloss.torch.several.LossExchange`), and which this is.
    exchange: tuple[Any, int] | None = None

    def __init__(self, loss: Any, *, ahead: bool | str = False, **options: Any) -> None:
        super().__init__(loss, **options)
        if ahead not in (False, True, "sum"):
            raise ConfigError(f'ahead={ahead!r} is none of False, True (averaged) and "sum" (added up)')
        if ahead and (self.terms or self.nonfinite != "raise"):
            raise ConfigError(
                "ahead=True: terms= and nonfinite= are for hvd.DistributedOptimizer; leave them out where "
                "somebody else averages gradients"
            )
        self.ahead = Ahead(self.name, self.process_set, sums=ahead == "sum") if ahead else None

    def _named_losses(self) -> Mapping[str, Callable[..., torch.Tensor]]:
        return NAMED_LOSSES

    def __call__(
        self,
        prediction: Any,
        target: Any,
        weight: Any = None,
        *,
        segments: Any = None,
        keys: Any = None,
        total: Any = None,
    ) -> torch.Tensor:
        """Return the local loss of these elements, a scalar tensor (float32, or float64 for float64).

        Args:
            prediction: what the loss takes; ``(N, C, ...)`` logits for ``"cross_entropy"``.
            target: what the loss takes. Class indices of -100 mark absent elements.
            weight: None, a number or a tensor that broadcasts (NumPy's rule) to the per-element losses.
                An element of weight zero is absent: its loss may be NaN. A negative, NaN or infinite
                weight raises WeightError on every rank at the optimizer's step.
            segments: of packed sequences: integer ids of the losses' shape (negative: padding), or
                :class:`hvdloss.losses.segments.Segments`; or what :func:`link_segments` returned, where
                sequences are cut.
            keys: what terms may group elements by (``DataSkew(of="keys")``): integers whose leading axes
                are those of the losses.
            total: for functions of sums: those of all micro-batches of all ranks (:meth:`total`), so
                that the step's loss is that of all of them. With ``ahead=True``: their weights.

        Raises:
            ShapeError: `weight` or `segments` do not fit the losses, or no token axis.
            ConfigError: `weight` carries a gradient, or segments that this objective cannot take.
            WeightError: weights that are not those that segments were linked with.

        Collectives: none; those of the loss if it is of :mod:`hvdloss.losses` (one small all-reduce for
        functions of sums, none with `total`), which all ranks must call alike.
        """
        if torch.compiler.is_compiling():
            # Inside a compiled function: announcing a backward pass is not for the compiler to trace.
            # (The decorator on this method would load the compiler, a second, for everyone.)
            return torch.compiler.disable(self._measure)(prediction, target, weight, segments, keys, total)
        return self._measure(prediction, target, weight, segments, keys, total)

    def sums(self, prediction: Any, target: Any, weight: Any = None) -> torch.Tensor:
        """Return this rank's sums of a micro-batch, float64, without gradient; they add up.

        For a loss that is a function of sums and gradient accumulation::

            with torch.no_grad():
                total = objective.total(sum(objective.sums(model(x), y) for x, y in micro_batches))
            for x, y in micro_batches:
                objective(model(x), y, total=total).backward()
            optimizer.step()

        Raises:
            ConfigError: the loss is no function of sums.
            ShapeError: what does not fit.

        Collectives: none.
        """
        with torch.no_grad():
            return self.local_statistics(
                _OPS, prediction, target, weight, rank_and_size(hvd, self.process_set)[0]
            )

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks of what :meth:`sums` gave. One small all-reduce.

        With ``ahead=True`` of the weights of a step's micro-batches, counted ahead::

            total = objective.total(sum(weight.sum() for _, _, weight in micro_batches))
            for x, y, weight in micro_batches:  # all but the last under model.no_sync()
                objective(model(x), y, weight, total=total).backward()
        """
        sums = torch.as_tensor(sums).double() if self.ahead is not None and self.global_loss is None else sums
        return group_of(self.process_set).all_reduce(sums, f"hvdloss.{self.name}.total", replicated=True)

    def per_element(
        self, prediction: Any, target: Any, weight: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each element and its weight, of one shape, without gradient.

        What calling the objective sums up, before terms weigh it; absent elements have weight 0.

        Args:
            prediction, target, weight: as in calling it.

        Raises:
            ConfigError: the loss is one of all ranks' elements, which has none of single ones.
            ShapeError: `weight` does not broadcast to the losses.

        Collectives: none.
        """
        self.check_per_element()
        with torch.no_grad():
            rank = rank_and_size(hvd, self.process_set)[0]
            found = self._elements(prediction, target, weight, rank)
            losses = _OPS.losses(found.losses)
            w = found.weight
            return losses, _OPS.ones_like(losses) if w is None else broadcast_weights(_OPS, w, losses, rank)

    def _read(self, loss: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
        return loss, own_reduction(loss, self.name)

    def _elements(self, prediction: Any, target: Any, weight: Any, rank: int) -> Elements:
        """Return the losses of elements, with all their weights: the call's, and the loss's own."""
        if self.classes and isinstance(target, torch.Tensor) and not target.is_floating_point():
            target = with_absent_targets(target, weight, self.options.ignore_index)
            absent = target == self.options.ignore_index
            losses = self._function(prediction, target)
            own = self._class_weights(_OPS, prediction, target, _OPS.losses(losses))
            if not on_host(absent) or absent.any():
                present = (~absent).to(_OPS.losses(losses).dtype)
                own = present if own is None else own * present
            found = Elements(losses, own, True)
        elif hasattr(self._function, "absent"):  # a loss that knows by itself
            losses = self._function(prediction, target)
            absent = self._function.absent(target)
            found = Elements(losses, None if absent is None else (~absent).to(_OPS.losses(losses).dtype))
        elif self.named:
            found = Elements(self._function(prediction, target), classes=self.classes)
        else:
            found = read(self._function, prediction, target, weight, self.reduction, self.name)
        self._check_elements(_OPS, found.losses, prediction, target, rank)
        own = found.weight
        if own is not None:
            own = own.detach().to(_OPS.losses(found.losses).dtype)
            weight = own if weight is None else own * broadcast_weights(_OPS, weight, own, rank)
        return Elements(found.losses, weight, found.classes)

    def _measure(
        self, prediction: Any, target: Any, weight: Any, segments: Any, keys: Any, total: Any
    ) -> torch.Tensor:
        if isinstance(weight, torch.Tensor) and weight.requires_grad and torch.is_grad_enabled():
            raise weight_gradient_error(self.name, "weight.detach()")
        if self.global_loss is not None:
            self.check_no_segments(segments)
            return self._measure_global(prediction, target, weight, keys, total)
        if total is not None and self.ahead is None:
            raise ConfigError(f"total= is for functions of sums, which {self.name} is not; leave it out")
        rank, size = rank_and_size(hvd, self.process_set)
        holder: list[torch.Tensor] = []
        given = prediction
        controller = self.controller
        may_mask = self.classes or not self.named or weight is not None or controller.has_weights
        may_mask = may_mask or segments is not None
        if may_mask and isinstance(prediction, torch.Tensor) and prediction.requires_grad:
            prediction = _MaskGradient.apply(prediction, holder)
        found = self._elements(prediction, target, weight, rank)
        losses = found.losses
        layout, weight = self.lay_out(_OPS, losses, found.weight, segments, rank)
        class_axis = min(1, given.dim() - 1) if found.classes and isinstance(given, torch.Tensor) else None
        penalty, term_sums = None, []
        if controller.terms:
            weight, penalty, term_sums = self.apply_terms(
                _OPS,
                prediction=prediction,
                target=target,
                losses=losses,
                weight=weight,
                keys=keys,
                state=to_device_async(torch.from_numpy(controller.state), losses.device),
                class_axis=class_axis,
                rank=rank,
                size=size,
            )
        part = reduce_losses(
            _OPS,
            losses,
            weight,
            self.reduction,
            layout=layout,
            share=1.0 / (size * self.passes),
            rank=rank,
        )
        if weight is not None and isinstance(given, torch.Tensor):
            self._set_mask(holder, losses, given, weight, class_axis)
        if self.ahead is not None:
            return self.ahead.loss(part, self.reduction, total)
        return self.notifying_loss(part, penalty, term_sums)

    def _measure_global(
        self, prediction: Any, target: Any, weight: Any, keys: Any, total: Any
    ) -> torch.Tensor:
        """Return a loss of all ranks' elements."""
        holder: list[torch.Tensor] = []
        given = prediction
        if isinstance(prediction, torch.Tensor) and prediction.requires_grad:
            prediction = _MaskGradient.apply(prediction, holder)
        part, penalty, term_sums, weight = self.contribute_global(
            _OPS,
            group_of(self.process_set),
            _scale_gradient,
            prediction=prediction,
            target=target,
            weight=weight,
            keys=keys,
            state=lambda: to_device_async(torch.from_numpy(self.controller.state), _device(given)),
            total=total,
        )
        if weight is not None and isinstance(given, torch.Tensor):
            classes = self.global_loss is not None and self.global_loss.classes
            self._set_mask(holder, weight, given, weight, _OPS.class_axis(given) if classes else None)
        return self.notifying_loss(part, penalty, term_sums)

    def notifying_loss(self, part: Contribution, penalty: Any, term_sums: list[Any]) -> torch.Tensor:
        """Return the local loss, whose backward pass notifies the listeners of its ledger row."""
        loss = part.mean(_OPS)
        if self.ahead is not None:  # of all ranks' elements, whose parts may be averaged as they are
            return _scale_gradient(loss, self.ahead.share()) if loss.requires_grad else loss
        call = None
        row = part.row(_OPS) if loss.requires_grad or penalty is not None else None
        if row is not None and self.exchange is not None:
            exchange, index = self.exchange
            loss, call = exchange.enter(loss, index, row)
        if penalty is not None:
            loss = loss + penalty
        if loss.requires_grad:
            assert row is not None
            if term_sums:
                row = torch.cat([row, *term_sums])
            # What the loss was made of; the loss itself would hold itself by its hook.
            graph = [] if loss.grad_fn is None else [node for node, _ in loss.grad_fn.next_functions]

            def through(gradient: torch.Tensor) -> None:
                entry = row if call is None else call.ledger_row(gradient)
                if self._listeners:
                    weight_of_pass.begin(entry[1])
                else:
                    self.warn_without_optimizer(rank_and_size(hvd, self.process_set)[1])
                self.notify_backward(entry, gradient, graph)
                if call is not None:
                    call.exchange.passed(call, gradient, graph)

            loss.register_hook(through)
            if call is not None:
                loss._hvdloss_call = call  # type: ignore[attr-defined]
        return loss

    @staticmethod
    def _set_mask(
        holder: list[torch.Tensor],
        losses: torch.Tensor,
        prediction: torch.Tensor,
        weight: Any,
        class_axis: int | None,
    ) -> None:
        """Mask the gradient of absent elements, where the shapes determine them."""
        axes = expand_mask_axes(tuple(losses.shape), tuple(prediction.shape), class_axis)
        if axes is None:
            return
        if isinstance(weight, int | float) and weight:
            return
        mask = torch.as_tensor(weight, device=losses.device).detach().expand_as(losses) == 0
        if on_host(mask) and not mask.any():
            return
        for axis in axes:
            mask = mask.unsqueeze(axis)
        holder.append(mask)
