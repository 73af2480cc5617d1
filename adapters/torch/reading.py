"""What a loss of PyTorch says of its elements: modules, functions, and functions that call those.

PyTorch's losses divide a mean by more than the number of entries: by the class weights of the targets,
without those ignored. Their ``reduction="none"`` does not show it. So a loss runs under a mode that sees each
call of a loss function of ``torch.nn.functional``, from wherever it comes, and keeps its elements and their
weights; if the loss returns what such a call gave, they are the objective's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hvdloss.errors import ConfigError
from hvdloss.losses.elements import check_object, check_smoothing
from hvdloss.losses.reduction import broadcast_error
from hvdloss.torch.ops import on_host
from torch.nn.modules.loss import _Loss
from torch.overrides import TorchFunctionMode

__all__ = ["Elements", "own_reduction", "read", "with_absent_targets"]


def _loss_functions() -> dict[Callable[..., Any], inspect.Signature]:
    """Return PyTorch's loss functions: those that have a reduction."""
    functions = [f for f in vars(F).values() if inspect.isfunction(f) and f.__module__ == F.__name__]
    signatures = {f: inspect.signature(f) for f in functions if not f.__name__.startswith("_")}
    return {f: s for f, s in signatures.items() if "reduction" in s.parameters}


_FUNCTIONS = _loss_functions()
_DIVIDE_BY_WEIGHT = (F.mse_loss, F.l1_loss)  # the others with a weight for each entry divide by their number


@dataclass(frozen=True)
class Elements:
    """The losses of elements, and what they say of themselves.

    Attributes:
        losses: of each element.
        weight: the elements' own weights, of the losses' shape; None for all 1.
        classes: whether the prediction has a class axis, the second, that the losses lack.
    """

    losses: torch.Tensor
    weight: torch.Tensor | None = None
    classes: bool = False


@dataclass(frozen=True)
class _Call:
    """A call of one of PyTorch's loss functions: what it returned, and its elements."""

    name: str
    asked: str
    out: torch.Tensor
    elements: Elements
    weighed: bool  # by more than being there or not


def own_reduction(loss: Callable[..., Any], name: str) -> str:
    """Return the reduction that a loss says it has; "none" where it says nothing.

    Raises:
        ConfigError: one whose per-element losses cannot be known, or are no function of two arguments.
    """
    if isinstance(loss, _Loss):
        _check_two(type(loss).forward, name, skip=1)
        return _of_mean(loss.reduction)
    function = loss.func if isinstance(loss, functools.partial) else loss
    if function in _FUNCTIONS:
        bound = loss.keywords if isinstance(loss, functools.partial) else {}
        _check_two(
            function,
            name,
            given=set(bound) | set(list(_FUNCTIONS[function].parameters)[2:]) - _required(function),
        )
        # Without a word it reduces to the mean, which then is the objective's to say.
        return _of_mean(_asked(bound)) if {"reduction", "reduce", "size_average"} & set(bound) else "none"
    check_object(loss, name)
    return "none"


def _required(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.default is p.empty}


def _check_two(
    function: Callable[..., Any], name: str, *, skip: int = 0, given: set[str] | None = None
) -> None:
    """Raise ConfigError for a loss of more than a prediction and a target."""
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    needed = [p.name for p in parameters if p.default is p.empty and p.name not in (given or ())]
    if len(needed) > 2:
        raise ConfigError(
            f"loss={name} takes {', '.join(needed)}, but an objective has a prediction and a target; pass a "
            f"function of the two: Objective(lambda prediction, target: {name}(...))"
        )


def _of_mean(reduction: str) -> str:
    return "mean" if reduction == "batchmean" else reduction


def _asked(arguments: dict[str, Any]) -> str:
    """Return the reduction that a call asks for, in the old way or the new."""
    average, reduce = arguments.get("size_average"), arguments.get("reduce")
    if average is not None or reduce is not None:
        return "none" if reduce is False else "mean" if average in (None, True) else "sum"
    return arguments.get("reduction", "mean")


def with_absent_targets(target: torch.Tensor, weight: Any, ignore_index: int) -> torch.Tensor:
    """Return class indices with those of weight 0 ignored: they may be no class at all."""
    if weight is None or target.is_floating_point():
        return target
    w = torch.as_tensor(weight, device=target.device)
    if broadcast_error(tuple(w.shape), tuple(target.shape), 0) is not None:
        return target  # which is refused when it meets the losses
    return target.masked_fill((w == 0).expand_as(target), ignore_index)


class _Reader(TorchFunctionMode):
    """Sees the calls of PyTorch's loss functions."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = weight
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _FUNCTIONS:
            return func(*args, **(kwargs or {}))
        bound = _FUNCTIONS[func].bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        arguments = bound.arguments
        asked = _asked(arguments)
        if asked not in ("none", "mean", "sum", "batchmean"):
            return func(*args, **(kwargs or {}))  # which raises
        arguments.update({"reduction": "none"})
        arguments.update({k: None for k in ("size_average", "reduce") if k in arguments})
        call = _call(func, arguments, asked, self.weight)
        self.calls.append(call)
        return call.out


def _call(func: Any, arguments: dict[str, Any], asked: str, weight: Any) -> _Call:
    """Call a loss function for its elements, and reduce them as it would."""
    keywords = {k: v for k, v in arguments.items() if k != "target"}
    own = present = None
    target, class_weight = arguments.get("target"), arguments.get("weight")
    classes = "ignore_index" in arguments and isinstance(target, torch.Tensor)
    by_index = classes and not target.is_floating_point()
    if by_index:
        ignored = -100 if arguments["ignore_index"] is None else arguments["ignore_index"]
        target = with_absent_targets(target, weight, ignored)
        absent = target == ignored
        if not on_host(absent) or bool(absent.any()):
            present = ~absent
        if class_weight is not None:
            smoothing = arguments.get("label_smoothing", 0.0)
            if smoothing:
                check_smoothing(smoothing, bool((class_weight == 0).any()))
            own = class_weight[target.masked_fill(absent, 0)]
    elif class_weight is not None and func in _DIVIDE_BY_WEIGHT:
        own = class_weight
    losses = func(**keywords, **({"target": target} if "target" in arguments else {}))
    given = losses
    if asked == "batchmean":
        losses = losses.flatten(1).sum(1)
    if func is F.ctc_loss and asked == "mean":
        lengths = torch.as_tensor(arguments["target_lengths"], device=losses.device)
        losses = losses / lengths.to(losses.dtype).clamp(min=1)
    weighed = own is not None
    if present is not None:
        own = present.to(losses.dtype) if own is None else own * present
    if asked == "none":
        out = given
    elif asked == "sum":
        out = losses.sum()
    else:
        out = losses.sum() / (losses.numel() if own is None else own.sum())
    if weighed:  # they are weighed already
        assert own is not None
        losses = torch.where(own == 0, losses.new_zeros(()), losses / torch.where(own == 0, 1, own))
    return _Call(func.__name__, asked, out, Elements(losses, own, classes), weighed)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what was compiled: a compiled function does not show what it calls."""
    for name in ("_torchdynamo_orig_callable", "_orig_mod"):
        function = getattr(function, name, None) or function
    return function


def read(
    function: Callable[..., Any], prediction: Any, target: Any, weight: Any, reduction: str, name: str
) -> Elements:
    """Return the elements of a loss, and the weights that it gives them itself.

    Args:
        function: of prediction and target.
        weight: of the call; targets of weight 0 may be no class.
        reduction: of the objective.
        name: of the loss, for messages.

    Raises:
        ConfigError: it reduces otherwise than the objective; elements are ignored or weighed in a way that
            does not show in what it returns.

    Collectives: none.
    """
    with _Reader(weight) as reader:
        out = _plain(function)(prediction, target)
    if not isinstance(out, torch.Tensor):
        raise ConfigError(f"loss={name} returns {type(out).__name__}, and no tensor of per-element losses")
    for call in reversed(reader.calls):
        if call.out is out:
            if call.asked != "none" and _of_mean(call.asked) != reduction:
                raise ConfigError(
                    f"loss={name} calls {call.name}(reduction={call.asked!r}), but the objective has "
                    f'reduction={reduction!r}; call it with reduction="none", or give the objective the same'
                )
            return call.elements
    return _derived(out, [call for call in reader.calls if call.asked == "none"], name)


def _derived(out: torch.Tensor, calls: list[_Call], name: str) -> Elements:
    """Return the elements of what was computed from the elements that loss functions gave."""
    weight = None
    for call in calls:
        own = call.elements.weight
        if own is None or not out.dim() or own.numel() != out.numel():
            continue  # or what is returned belongs to fewer, larger elements, by the loss's own formula
        same = own.shape == out.shape
        if call.weighed or not (same or _reshaped(out, call.out)):
            raise ConfigError(
                f"loss={name} calls {call.name} with ignored targets or weights, and returns something else "
                f"made of it, so that what its mean divides by cannot be known. Leave them out of the "
                f"function, and give weight= in the call, 0 for an element that is to be ignored"
            )
        own = own.reshape(out.shape)
        weight = own if weight is None else weight * own
    return Elements(out, weight)


def _reshaped(out: torch.Tensor, given: torch.Tensor) -> bool:
    """Return whether `out` is `given` in another shape, in the same order."""
    return out.data_ptr() == given.data_ptr() and out.is_contiguous() and given.is_contiguous()


def elements_of(func: Any, args: Any, kwargs: Any) -> tuple[str, Elements] | None:
    """Return what a call of one of PyTorch's loss functions asks for, and its elements; None for others.

    The reduction is "none", "mean", "sum" or "batchmean". Elements of "none" are not yet weighed by classes.
    """
    if func not in _FUNCTIONS:
        return None
    arguments = _FUNCTIONS[func].bind(*args, **kwargs)
    arguments.apply_defaults()
    asked = _asked(arguments.arguments)
    arguments.arguments.update({"reduction": "none"})
    arguments.arguments.update({k: None for k in ("size_average", "reduce") if k in arguments.arguments})
    return asked, _call(func, arguments.arguments, asked, None).elements
