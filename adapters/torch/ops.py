"""PyTorch's part of the core: array operations, named losses, and small collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import torch
import torch.nn.functional as F
from hvdloss.comm.communicator import Communicator, OneProcess
from hvdloss.comm.engine import Group
from hvdloss.errors import second_derivative_error
from hvdloss.losses.elements import ClassOptions
from hvdloss.step.objective import loss_named
from hvdloss.torch.engines.group import EngineGroup
from torch.utils._pytree import tree_leaves

__all__ = [
    "HOST_DEVICES",
    "NAMED_LOSSES",
    "GroupCommunicator",
    "TorchOps",
    "as_array",
    "communicator_of",
    "on_host",
    "to_device_async",
]

_NO_OPTIONS = ClassOptions()

#: Types of devices whose values can be read without a device sync. Tests remove "cpu" to run the code for
#: GPUs on CPU tensors.
HOST_DEVICES = {"cpu"}


def on_host(x: torch.Tensor) -> bool:
    """Return whether values of `x` can be read without waiting for a device."""
    return x.device.type in HOST_DEVICES


def to_device_async(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to `device` without waiting for it.

    A copy from pageable memory waits for the device's queue; one from pinned memory is queued.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class TorchOps:
    """:class:`hvdloss.losses.reduction.ArrayOps` for PyTorch tensors."""

    def shape(self, x: Any) -> tuple[int | None, ...]:
        """Return the shape; a number's is empty."""
        return tuple(x.shape) if isinstance(x, torch.Tensor) else tuple(np.shape(x))

    def shapes(self, x: Any) -> list[tuple[int | None, ...]]:
        """Collect from lists, dicts and the like, as PyTorch's own tools do."""
        return [tuple(one.shape) for one in tree_leaves(x) if isinstance(one, torch.Tensor)]

    def losses(self, x: torch.Tensor) -> torch.Tensor:
        """Return at least float32, as autocast does for losses."""
        return x if x.dtype in (torch.float32, torch.float64) else x.float()

    def weights_like(self, w: Any, losses: torch.Tensor) -> torch.Tensor:
        """Broadcast, cast and move; weights are data, so no gradient."""
        if isinstance(w, int | float):  # written by the device itself: a copy of it would be waited for
            w = torch.full((), w, dtype=losses.dtype, device=losses.device)
        w = torch.as_tensor(w, dtype=losses.dtype, device=losses.device)
        return w.detach().expand_as(losses)

    def ones_like(self, losses: torch.Tensor) -> torch.Tensor:
        """Return ones without storage of their own."""
        return losses.new_ones(()).expand_as(losses)

    def zeros_like(self, x: torch.Tensor) -> torch.Tensor:
        """Return one zero, which broadcasts."""
        return x.new_zeros(())

    def where(self, condition: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Choose."""
        return torch.where(condition, x, y)

    def count(self, condition: torch.Tensor) -> torch.Tensor:
        """Count."""
        return condition.sum().double()

    def isfinite(self, x: torch.Tensor) -> torch.Tensor:
        """Tell what is finite."""
        return torch.isfinite(x)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum all."""
        return x.sum()

    def sum64(self, x: torch.Tensor) -> torch.Tensor:
        """Sum all in float64."""
        return x.detach().sum(dtype=torch.float64)

    def sum_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all axes but the first."""
        return x.sum(dim=tuple(range(1, x.dim())))

    def scalar64(self, value: float, like: torch.Tensor) -> torch.Tensor:
        """Return a float64 scalar."""
        return torch.full((), value, dtype=torch.float64, device=like.device)

    def cast_like(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Cast."""
        return x.to(like.dtype)

    def stack64(self, scalars: list[torch.Tensor]) -> torch.Tensor:
        """Stack."""
        return torch.stack([torch.as_tensor(s).detach().double() for s in scalars])

    def concat64(self, parts: list[Any]) -> torch.Tensor:
        """Join."""
        return torch.cat([part.detach().double().reshape(-1) for part in parts])

    def zeros64(self, length: int, like: torch.Tensor) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros(length, dtype=torch.float64, device=like.device)

    def to_int64(self, x: Any) -> torch.Tensor:
        """Cast."""
        return torch.as_tensor(x).long()

    def expand_trailing(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Add trailing axes and broadcast."""
        return x.to(like.device)[(...,) + (None,) * (like.dim() - x.dim())].expand_as(like)

    def move_axis_last(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Move."""
        return x.movedim(axis, -1)

    def bucketize(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """Search."""
        return torch.bucketize(x.detach().double(), edges, right=True)

    def histogram(self, index: torch.Tensor, weight: torch.Tensor, bins: int) -> torch.Tensor:
        """Add up, without asking a device for the largest index."""
        inside = (index >= 0) & (index < bins)
        weight = torch.where(inside, weight.detach().double(), 0.0)
        out = torch.zeros(bins, dtype=torch.float64, device=weight.device)
        return out.index_add_(0, index.clamp(0, bins - 1).reshape(-1), weight.reshape(-1))

    def class_sums(self, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Add up."""
        product = labels.detach().double() * weight.detach()
        return product.reshape(-1, product.shape[-1]).sum(0)

    def take(self, table: torch.Tensor, index: torch.Tensor, bins: int) -> torch.Tensor:
        """Gather."""
        return table[index.clamp(0, bins - 1)]

    def interpolate(self, labels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Blend."""
        return 1.0 + labels.detach().double() * (table - 1.0)

    def label_mean(self, labels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Average."""
        labels = labels.detach().double()
        total = labels.sum(-1)
        mean = (labels * table).sum(-1) / torch.where(total > 0, total, 1.0)
        return torch.where(total > 0, mean, 1.0)

    def quantiles(
        self, x: torch.Tensor, weight: torch.Tensor, points: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Interpolate in the sorted values, absent ones at the end."""
        present = weight.detach().reshape(-1) > 0
        size = present.sum().double().reshape(1)
        if not present.numel():
            return self.zeros64(points, x), size
        ordered = torch.where(present, x.detach().double().reshape(-1), torch.inf).sort().values
        ordered = torch.where(ordered.isfinite(), ordered, 0.0)
        at = torch.linspace(0, 1, points, dtype=torch.float64, device=x.device) * (size - 1).clamp(min=0)
        low = at.floor().long()
        high = at.ceil().long()
        part = at - low
        return ordered[low] * (1 - part) + ordered[high] * part, size

    def on_device_of(self, x: Any, like: torch.Tensor) -> torch.Tensor:
        """Move, without waiting."""
        x = torch.as_tensor(x)
        return to_device_async(x, like.device) if x.device.type == "cpu" else x.to(like.device)

    def host_array(self, x: Any) -> np.ndarray | None:
        """Look, unless it is on a device."""
        if isinstance(x, torch.Tensor):
            return x.detach().numpy() if on_host(x) else None
        return np.asarray(x)

    def segment_totals(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Add up at the place that an id has in order, so that nobody asks a device how many there are."""
        flat = ids.reshape(-1).contiguous()
        slot = torch.searchsorted(flat.sort().values, flat)
        sums = torch.zeros(flat.shape, dtype=torch.float64, device=flat.device)
        return sums.index_add_(0, slot, weight.detach().reshape(-1))[slot].reshape(ids.shape)

    def as64(self, x: Any) -> torch.Tensor:
        """Cast."""
        return torch.as_tensor(x).double()

    def with_value(self, x: torch.Tensor, value: Any) -> torch.Tensor:
        """Add what changes only the gradient."""
        return torch.as_tensor(value).to(x) + (x - x.detach())

    def reshape(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Reshape."""
        return x.reshape(shape)

    def concat(self, parts: list[torch.Tensor], axis: int) -> torch.Tensor:
        """Join."""
        return torch.cat(parts, axis)

    def unsqueeze(self, x: torch.Tensor) -> torch.Tensor:
        """Add an axis."""
        return x.unsqueeze(-1)

    def index_last(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Pick."""
        return x[..., index]

    def sum_leading(self, x: torch.Tensor, keep: int) -> torch.Tensor:
        """Sum; an empty list of axes would mean all."""
        axes = tuple(range(x.dim() - keep))
        return x.sum(dim=axes) if axes else x

    def vector64(self, values: list[float], like: torch.Tensor) -> torch.Tensor:
        """Make a tensor."""
        return to_device_async(torch.tensor(values, dtype=torch.float64), like.device)

    def one_hot(self, index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Compare, which bears indices outside."""
        return (index.unsqueeze(-1) == torch.arange(like.shape[-1], device=index.device)).to(like.dtype)

    def class_axis(self, prediction: torch.Tensor) -> int:
        """Return the second, or the only one."""
        return min(1, prediction.dim() - 1)

    def named_loss(self, name: str) -> Callable[..., torch.Tensor]:
        """Look up."""
        return NAMED_LOSSES[loss_named(name)]

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        """Exponentiate."""
        return x.exp()

    def log(self, x: torch.Tensor) -> torch.Tensor:
        """Take the logarithm."""
        return x.log()

    def sqrt(self, x: torch.Tensor) -> torch.Tensor:
        """Take the root."""
        return x.sqrt()

    def sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        """Squash."""
        return x.sigmoid()

    def softmax(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        return x.softmax(-1)

    def logsumexp(self, x: torch.Tensor) -> torch.Tensor:
        """Add up."""
        return x.logsumexp(-1)

    def softplus(self, x: torch.Tensor) -> torch.Tensor:
        """Add 1 under the logarithm; PyTorch's softplus drops what is below 2e-9 of it."""
        return x.clamp(min=0) + (-x.abs()).exp().log1p()

    def transpose(self, x: torch.Tensor) -> torch.Tensor:
        """Transpose."""
        return x.t()

    def row_indices(self, x: torch.Tensor) -> torch.Tensor:
        """Count."""
        return torch.arange(len(x), device=x.device)

    def stop_gradient(self, x: torch.Tensor) -> torch.Tensor:
        """Detach."""
        return x.detach()

    def with_gradients(
        self, value: torch.Tensor, inputs: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> torch.Tensor:
        """Remember them for the backward pass."""
        out: torch.Tensor = _Given.apply(value, *inputs, *gradients)
        return out


class _Given(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if torch.is_grad_enabled():  # backward(create_graph=True)
            raise second_derivative_error()
        given = ctx.saved_tensors
        return None, *(g * grads[0].to(g) for g in given), *(None for _ in given)


def _kl_div(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.kl_div(prediction, target, reduction="none")


def _log_cosh(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    # log(cosh d) = |d| + log(1 + exp(-2|d|)) - log 2 does not overflow.
    d = (prediction - target).abs()
    return d + F.softplus(-2.0 * d) - float(np.log(2.0))


def _cross_entropy(
    prediction: torch.Tensor, target: torch.Tensor, options: ClassOptions = _NO_OPTIONS
) -> torch.Tensor:
    by_index = not target.is_floating_point()
    more: dict[str, Any] = {"ignore_index": options.ignore_index} if by_index else {}
    weights = None
    if options.class_weight is not None and (options.label_smoothing or not by_index):
        # Of each class's part of the loss; the weight of the element itself is divided out again.
        weights = to_device_async(
            torch.tensor(options.class_weight, dtype=prediction.dtype), prediction.device
        )
    losses = F.cross_entropy(
        prediction, target, weights, reduction="none", label_smoothing=options.label_smoothing, **more
    )
    if weights is None or not by_index:
        return losses
    return losses / weights[target.masked_fill(target == options.ignore_index, 0)]


def _nll(prediction: torch.Tensor, target: torch.Tensor, options: ClassOptions = _NO_OPTIONS) -> torch.Tensor:
    return F.nll_loss(prediction, target, reduction="none", ignore_index=options.ignore_index)


def _plain(function: Callable[..., torch.Tensor], **options: Any) -> Callable[..., torch.Tensor]:
    def elements(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return function(prediction, target, reduction="none", **options)

    return elements


NAMED_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mse": _plain(F.mse_loss),
    "mae": _plain(F.l1_loss),
    "huber": _plain(F.huber_loss),
    "log_cosh": _log_cosh,
    "cross_entropy": _cross_entropy,
    "nll": _nll,
    "binary_cross_entropy": _plain(F.binary_cross_entropy),
    "binary_cross_entropy_with_logits": _plain(F.binary_cross_entropy_with_logits),
    "poisson_nll": _plain(F.poisson_nll_loss),
    "hinge": lambda prediction, target: (1.0 - target * prediction).clamp(min=0.0),
    "kl_div": _kl_div,
}


class GroupCommunicator:
    """:class:`hvdloss.comm.communicator.Communicator` over a group of ranks that exchange tensors."""

    def __init__(self, group: Group[torch.Tensor]) -> None:
        self._group = group

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        return self._group.rank

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return self._group.size

    def all_reduce(self, array: np.ndarray, name: str) -> np.ndarray:
        """Sum over ranks; one all-reduce."""
        tensor = torch.from_numpy(np.array(array, dtype=np.float64))
        return self._group.all_reduce(tensor, name).wait().numpy()

    def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        """Gather bytes, never pickles; two all-gathers."""
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()

        def gathered(tensor: torch.Tensor, what: str) -> np.ndarray:
            return self._group.all_gather(tensor, f"{name}.{what}").wait().numpy()

        lengths = gathered(torch.tensor([len(data)]), "lengths")
        flat = gathered(mine, "bytes").tobytes()
        ends = np.cumsum(lengths)
        return [flat[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


def as_array(value: Any) -> Any:
    """Return a tensor as a NumPy array, floats in at least 32 bits; anything else unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() and value.itemsize < 4 else value).numpy()


def communicator_of(process_set: Any) -> Communicator:
    """Return the exchange of small arrays among the ranks of a process set; one rank needs no Horovod."""
    return GroupCommunicator(EngineGroup(process_set)) if process_set.size() > 1 else OneProcess()
