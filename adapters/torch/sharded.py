"""Models whose last layer is split over ranks by class, for PyTorch (see :mod:`hvdloss.losses.shards`).

A :class:`ShardedLinear` head holds some rows of an ordinary ``torch.nn.Linear``'s weight,
:func:`sharded_cross_entropy` takes its columns of the logits, and :func:`grid` makes the process sets with
which ranks share a model and, on the other axis, the data. ``full_state_dict`` and ``load_state_dict`` write
and read ordinary checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import torch
import torch.nn.functional as F
from hvdloss.comm.collectives import GroupContext, resolve_group
from hvdloss.errors import ConfigError, ShapeError
from hvdloss.losses.shards import (
    HEADER,
    ArcFace,
    ClassShards,
    CosFace,
    Margin,
    Part,
    ShardedSoftmax,
    check_headers,
    headers_of,
    sample_columns,
)
from hvdloss.split.grid import Grid, make_grid
from hvdloss.torch._backend import hvd
from hvdloss.torch.collectives import all_gather
from hvdloss.torch.ops import TorchOps, on_host
from hvdloss.torch.split.layers import ColumnParallelLinear

__all__ = [
    "ArcFace",
    "ClassShards",
    "CosFace",
    "Grid",
    "ShardedCrossEntropy",
    "ShardedLinear",
    "grid",
    "sharded_cross_entropy",
]


class TorchRowOps(TorchOps):
    """:class:`hvdloss.losses.shards.RowOps` for PyTorch."""

    def scaled_copy(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        """Multiply."""
        wide = self.losses(x)
        return wide * factor if wide is x else wide.mul_(factor)

    def row_max(self, x: torch.Tensor) -> torch.Tensor:
        """Find."""
        return x.amax(-1)

    def row_sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum."""
        return x.sum(-1)

    def gather_columns(self, x: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Gather."""
        return x.gather(1, column[:, None])[:, 0]

    def scatter_columns(
        self, x: torch.Tensor, column: torch.Tensor, where: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Scatter in place; nobody waits for a device to learn where."""
        value = torch.where(where, value, self.gather_columns(x, column))
        return x.scatter_(1, column[:, None], value[:, None])

    def subtract_rows(self, x: torch.Tensor, row: torch.Tensor, own: bool) -> torch.Tensor:
        """Subtract."""
        return x.sub_(row[:, None]) if own else torch.sub(x, row[:, None])

    def scale_rows(self, x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Multiply in place."""
        return x.mul_(row[:, None])

    def exp_inplace(self, x: torch.Tensor) -> torch.Tensor:
        """Compute in place."""
        return x.exp_()

    def mask_rows(self, x: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Fill in place, if there is anything to fill."""
        if on_host(present) and bool(present.all()):
            return x
        return x.masked_fill_(~present[:, None], 0)

    def find_columns(self, columns: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Search."""
        at = torch.searchsorted(columns, index).clamp(max=len(columns) - 1)
        return at, columns[at] == index

    def element_indices(self, x: torch.Tensor) -> torch.Tensor:
        """Count."""
        return torch.arange(len(x), device=x.device)

    def first_where(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Find, without asking a device."""
        if not len(x):
            return self.scalar64(0.0, x)
        at = condition.to(torch.uint8).argmax()
        return torch.where(condition[at], x[at], 0).double()

    def maximum(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Compare."""
        return torch.maximum(x, y)


_OPS = TorchRowOps()


# -- the loss -----------------------------------------------------------------------------------------


class _CrossEntropy(torch.autograd.Function):
    """Per-element losses of rows of logits; keeps the local softmax and nothing else of that size."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        columns: Any,
        rule: ShardedSoftmax,
        at: GroupContext,
    ) -> torch.Tensor:
        part = rule.part(_OPS, logits, target, at.rank, columns)
        messages = _all_messages(part.message, rule, at)
        losses, factor = rule.losses(_OPS, part, messages)
        ctx.rule, ctx.dtype = rule, logits.dtype
        ctx.columns = rule.columns(messages)
        ctx.sloped = part.slope is not None
        kept = (part.powers, part.column, part.here, part.present, factor)
        ctx.save_for_backward(*kept, *([part.slope] if ctx.sloped else []))
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if torch.is_grad_enabled():  # backward(create_graph=True)
            raise ConfigError(
                "create_graph=True: sharded_cross_entropy can be differentiated once; for second derivatives "
                "build it on hvdloss.torch.collectives"
            )
        powers, column, here, present, factor, *slope = ctx.saved_tensors
        # Done in place, unless there may be another backward pass.
        if torch._C._autograd._get_current_graph_task_keep_graph():
            powers = powers.clone()
        part = Part(powers, column, here, present, slope[0] if slope else None, None, None)
        out = ctx.rule.gradient(_OPS, part, factor, ctx.columns, grads[0].to(factor.dtype))
        return out.to(ctx.dtype), None, None, None, None


def _all_messages(message: torch.Tensor, rule: ShardedSoftmax, at: GroupContext) -> torch.Tensor:
    """Return the messages of all ranks, checked. One all-gather."""
    flat, length = message, len(message)
    if at.size > 1:
        sizes = [length] * at.size
        flat = all_gather(message, name=at.name, process_set=at.process_set, replicated=True, sizes=sizes)
    heads = None
    if len(flat) == at.size * length:
        heads = flat.view(at.size, -1)[:, :HEADER].cpu().numpy()
    if heads is None or (heads[:, 0] != length).any():  # another rank had more or fewer elements
        heads = headers_of(flat.cpu().numpy(), at.size)
    ranks = list(at.process_set.ranks or range(at.size))
    check_headers(heads, rule, "sharded_cross_entropy", ranks)
    return flat.view(at.size, -1)


def sharded_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    shards: ClassShards,
    *,
    process_set: Any = None,
    label_smoothing: float = 0.0,
    margin: Margin | None = None,
    scale: float = 1.0,
    columns: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Return the softmax cross-entropy of each element, whose logits lie on several ranks.

    Equal on all ranks of the process set, and equal to ``torch.nn.functional.cross_entropy(...,
    reduction="none")`` of the whole logits. Every rank gets the gradient of its own logits.
    It counts once: sum or average the losses as you would in one process; ranks that share a model do not
    average each other's gradients.

    Args:
        logits: this rank's, (..., C_k): the class axis is the last. float16 and bfloat16 are computed in
            float32.
        target: class numbers from 0 to ``shards.classes - 1``, or `ignore_index`, (...) integers; the same
            on all ranks of the process set.
        shards: which rank holds which classes.
        process_set: the ranks that share the classes; None for all.
        label_smoothing: of the target, from 0 to 1; e of it is spread evenly over all classes.
        margin: :class:`CosFace` or :class:`ArcFace`, for logits that are cosines
            (``ShardedLinear(..., normalize=True)``); not scaled.
        scale: what logits are multiplied with, after the margin.
        columns: which of this rank's columns the logits are of (:meth:`ShardedLinear.sample`), ascending; the
            softmax is then over the columns of all ranks.
        ignore_index: targets of this value have loss 0 and no gradient. They are no less elements of a mean:
            give them the weight 0, as :class:`ShardedCrossEntropy` has an ``Objective`` do.

    Returns:
        losses (...), float32, or float64 for float64 logits. They may be differentiated once.

    Raises:
        ShapeError: shapes that do not fit; on all ranks, batches of different sizes.
        ConfigError: an argument that cannot be used; on all ranks, a target that is no class.
        AgreementError: on all ranks, different targets or arguments.
        UsageError: this rank is not in the process set.

    Collectives: one all-gather of 3 numbers per element (4 with label smoothing) and 8 more from each
    rank; none in the backward pass. Memory: one matrix of the logits' shape, which becomes their gradient.

    >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
    >>> sharded_cross_entropy(logits, torch.tensor([2]), ClassShards(3))
    tensor([1.4076])
    """
    rule = ShardedSoftmax(shards, label_smoothing, margin, scale, ignore_index)
    return _losses(logits, target, rule, process_set, columns)


def _losses(
    logits: torch.Tensor, target: torch.Tensor, rule: ShardedSoftmax, process_set: Any, columns: Any
) -> torch.Tensor:
    if torch.compiler.is_compiling():
        # (As a decorator this would load the compiler, a second, for everyone.)
        return torch.compiler.disable(_losses)(logits, target, rule, process_set, columns)
    group, rank, size = resolve_group(hvd, process_set, "sharded_cross_entropy")
    if not isinstance(target, torch.Tensor) or target.is_floating_point() or target.dtype == torch.bool:
        raise ShapeError(
            f"sharded_cross_entropy: target must be class numbers (int64), not {_kind(target)} "
            f"(rank {rank}); probabilities have no owner"
        )
    rule.check_shapes(
        tuple(logits.shape), tuple(target.shape), None if columns is None else len(columns), rank, size
    )
    at = GroupContext("hvdloss.sharded_cross_entropy", group, rank, size)
    if columns is not None:
        columns = columns.to(logits.device)
    flat: torch.Tensor = _CrossEntropy.apply(
        logits.reshape(-1, logits.shape[-1]), target.reshape(-1).long(), columns, rule, at
    )
    return flat.view(target.shape)


def _kind(x: Any) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, torch.Tensor) else f"{type(x).__name__}"


class ShardedCrossEntropy:
    """:func:`sharded_cross_entropy` as a loss for an ``Objective``: ignored elements are absent there.

    Args:
        shards, process_set, label_smoothing, margin, scale, ignore_index: see
            :func:`sharded_cross_entropy`. `process_set` are the ranks that share the model; the objective's
            are those that share the data.

    Raises:
        ConfigError: an argument that cannot be used.

    >>> from hvdloss.torch import Objective
    >>> objective = Objective(ShardedCrossEntropy(ClassShards(3)))
    >>> objective(torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), torch.tensor([2, -100]))
    tensor(1.4076)
    """

    def __init__(
        self,
        shards: ClassShards,
        *,
        process_set: Any = None,
        label_smoothing: float = 0.0,
        margin: Margin | None = None,
        scale: float = 1.0,
        ignore_index: int = -100,
    ) -> None:
        self.rule = ShardedSoftmax(shards, label_smoothing, margin, scale, ignore_index)
        self.process_set = process_set

    def __call__(
        self, logits: torch.Tensor, target: torch.Tensor, columns: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return per-element losses; see :func:`sharded_cross_entropy`."""
        return _losses(logits, target, self.rule, self.process_set, columns)

    def absent(self, target: torch.Tensor) -> torch.Tensor:
        """Return which elements are to be ignored."""
        return target == self.rule.ignore_index


# -- the head -----------------------------------------------------------------------------------------


class ShardedLinear(ColumnParallelLinear):
    """A ``torch.nn.Linear`` whose outputs are classes, each rank holding some of them.

    It is made, saved and loaded as the ordinary layer (:class:`~hvdloss.torch.split.base.SplitModule`), and
    no rank ever holds the whole weight.

    Args:
        in_features: of each sample.
        classes: of all ranks together.
        bias: whether there is one.
        process_set: the ranks that share the classes; None for all.
        sizes: how many classes each of them holds; None for even parts.
        normalize: outputs are cosines, of the input and of the rows of the weight, for margins; without a
            bias.
        device, dtype: of the parameters.

    Attributes:
        weight: (C_k, in_features), this rank's rows.
        bias: (C_k,), or None.
        shards: which rank holds which classes.

    Raises:
        ConfigError: an argument that cannot be used.
        UsageError: this rank is not in the process set.
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        *,
        bias: bool = True,
        process_set: Any = None,
        sizes: Sequence[int] | None = None,
        normalize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if normalize and bias:
            raise ConfigError(
                "ShardedLinear(normalize=True) gives cosines, which have no bias; pass bias=False"
            )
        super().__init__(
            in_features,
            classes,
            bias=bias,
            process_set=process_set,
            sizes=sizes,
            device=device,
            dtype=dtype,
        )
        self.normalize = normalize

    def _parts(self, outputs: int, sizes: Sequence[int] | None) -> ClassShards:
        self.shards = ClassShards(outputs, self.size, sizes)
        return self.shards

    def forward(self, x: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Return this rank's columns of the logits.

        Args:
            x: (..., in_features), the same on all ranks of the process set.
            columns: which of this rank's columns; None for all. See :meth:`sample`.

        Raises:
            ShapeError: another last axis.

        Collectives: none; one all-reduce of the gradient of `x` in the backward pass.
        """
        x = self._copied(x)
        weight, bias = self.weight, self.bias
        if columns is not None:
            weight = weight.index_select(0, columns)
            bias = None if bias is None else bias.index_select(0, columns)
        if self.normalize:
            x, weight = F.normalize(x, dim=-1), F.normalize(weight, dim=-1)
        return F.linear(x, weight, bias)

    def sample(self, target: torch.Tensor, rate: float, seed: Any = None) -> torch.Tensor:
        """Return which of this rank's columns take part in a step (Partial FC, An et al. 2021 and 2022).

        All classes of the batch that this rank holds, and others by chance up to `rate` of its columns. Pass
        them to the layer and to :func:`sharded_cross_entropy`.

        Args:
            target: of the batch, the same on all ranks of the process set.
            rate: above 0, at most 1.
            seed: a number, a ``torch.Generator`` or a NumPy generator; None for torch's own generator.
                Other ranks may draw with the same seed: what they draw is their own all the same.

        Returns:
            ascending column numbers, int64, at least one.

        Raises:
            ConfigError: `rate` is out of range.

        Collectives: none. Waits for a device that holds `target`.
        """
        if not isinstance(seed, np.random.Generator):
            if not isinstance(seed, int):
                seed = int(torch.randint(2**62, (), generator=seed))
            seed = np.random.default_rng([seed, self.rank])
        found = sample_columns(target.detach().cpu().numpy(), self.shards, self.rank, rate, seed)
        return torch.from_numpy(found).to(self.weight.device)


# -- ranks that share a model, and ranks that share the data ------------------------------------------


def grid(model: int = 1, stages: int = 1) -> Grid:
    """Make the process sets of a grid: ranks that share layers, that are stages, and that share the data.

    Rank ``(stage * replicas + replica) * model + part``: ranks 0 to ``model - 1`` share the layers of one
    stage, the next ones those of another replica of it, and then come the other stages. All ranks must
    call it, with the same numbers; again, it finds the sets that it made.

    Args:
        model: how many ranks share a layer.
        stages: how many consecutive parts the model has (:class:`hvdloss.torch.Pipeline`). The product
            divides ``hvd.size()``.

    Raises:
        ConfigError: it does not divide, or Horovod was not started for process sets: set
            ``HOROVOD_DYNAMIC_PROCESS_SETS=1`` or call ``hvd.init(process_sets="dynamic")``.

    Collectives: those of ``hvd.add_process_set``, once per set.
    """
    return make_grid(hvd, model, stages)
