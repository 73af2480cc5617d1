"""Collectives that carry gradients, right for ranks of any number and parts of any size.

Gradients follow one of two conventions:

- the default: what follows differs between ranks, and the loss is the *sum* over ranks of what each
  makes of the output;
- ``replicated=True``: every rank computes the same from the same output, and it counts once. The
  backward pass then needs nothing from the others.

Every backward pass is made of these same functions, so second derivatives are right too. Ranks must make
the same calls in the same order, in the backward pass as well: an input carries a gradient on all ranks
or on none (only :func:`all_gather` finds out and takes care by itself). One rank needs no Horovod.

=================  ===================================  ==============================================
function           forward                              backward (default; replicated: nothing is sent)
=================  ===================================  ==============================================
`all_reduce`       all-reduce                           all-reduce
`all_gather`       all-gather, and one of 16 bytes      reduce-scatter (uneven parts: all-to-all)
`reduce_scatter`   reduce-scatter (or all-to-all)       all-gather
`broadcast`        broadcast                            all-reduce
`exchange`         all-to-all                           the same
`shift`            all-to-all with one receiver         the same
`copy_to_ranks`    nothing                              all-reduce
=================  ===================================  ==============================================

Horovod's own functions divide some of these gradients by the number of ranks and multiply others by it;
see docs/reference/collectives.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from hvdloss.comm.collectives import (
    GroupContext,
    auto_name,
    check_root,
    check_rows,
    check_sizes,
    even_sizes,
    resolve_group,
)
from hvdloss.torch._backend import hvd
from hvdloss.torch.engines.group import EngineGroup

__all__ = [
    "HorovodGroup",
    "all_gather",
    "all_reduce",
    "broadcast",
    "copy_to_ranks",
    "exchange",
    "group_of",
    "reduce_scatter",
    "scale_gradient",
    "shift",
]

Function = TypeVar("Function", bound=Callable[..., Any])

_SAME_BITS = {torch.bfloat16: torch.int16, torch.bool: torch.uint8}  # dtypes that Horovod does not know


# -- what travels: no gradients here ------------------------------------------------------------------


def _packed(x: torch.Tensor) -> torch.Tensor:
    """Return the same bits in a dtype that Horovod can move."""
    x = x.detach().contiguous()
    return x.view(_SAME_BITS[x.dtype]) if x.dtype in _SAME_BITS else x


def _summed(x: torch.Tensor, at: GroupContext) -> torch.Tensor:
    """Return the sum over ranks."""
    if at.size == 1:
        return x.detach().clone()
    wide = x.detach().float() if x.dtype == torch.bfloat16 else x.detach()
    out: torch.Tensor = EngineGroup(at.process_set).all_reduce(wide.contiguous(), at.name).wait()
    return out.to(x.dtype)


def _gathered(x: torch.Tensor, at: GroupContext) -> torch.Tensor:
    """Return the rows of all ranks."""
    if at.size == 1:
        return x.detach().clone()
    out: torch.Tensor = EngineGroup(at.process_set).all_gather(_packed(x), at.name).wait()
    return out.view(x.dtype)


def _exchanged(x: torch.Tensor, splits: Sequence[int], at: GroupContext) -> tuple[torch.Tensor, list[int]]:
    """Send ``splits[k]`` rows to rank k; return the rows received, and how many came from each rank."""
    if at.size == 1:
        return x.detach().clone(), list(splits)
    rows, received = EngineGroup(at.process_set).all_to_all(_packed(x), at.name, splits).wait()
    return rows.view(x.dtype), received.tolist()


def _sum_of_parts(x: torch.Tensor, sizes: Sequence[int], at: GroupContext) -> torch.Tensor:
    """Return this rank's part of the sum over ranks of `x`, whose rows are cut into `sizes`."""
    if at.size == 1:
        return x.detach().clone()
    if list(sizes) == even_sizes(len(x), at.size) and x.dtype in _REDUCE_SCATTERS and len(x) >= at.size:
        whole = x.detach().contiguous()
        out: torch.Tensor = EngineGroup(at.process_set).reduce_scatter(whole, at.name).wait()
        return out
    # As many bytes as a reduce-scatter, without rows that only pad.
    rows, _ = _exchanged(x, sizes, at)
    parts = rows.view(at.size, sizes[at.rank], *x.shape[1:])
    return parts.sum(0, dtype=torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None).to(
        x.dtype
    )


_REDUCE_SCATTERS = (torch.float32, torch.float64)


# -- gradients ----------------------------------------------------------------------------------------


class _AllReduce(torch.autograd.Function):
    """Sum; backward: sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, at: GroupContext) -> torch.Tensor:
        ctx.at = at
        return _summed(x, at)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _AllReduce.apply(grads[0], ctx.at.named("backward")), None


class _SumOnce(torch.autograd.Function):
    """Sum, used alike on all ranks; backward: identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, at: GroupContext) -> torch.Tensor:
        ctx.at = at
        return _summed(x, at)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _Copy.apply(grads[0], ctx.at.named("backward")), None


class _Copy(torch.autograd.Function):
    """Identity; backward: sum, the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, at: GroupContext) -> torch.Tensor:
        ctx.at = at
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _SumOnce.apply(grads[0], ctx.at.named("backward")), None


class _Gather(torch.autograd.Function):
    """All ranks' rows; backward: this rank's part of the sum."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gathered: torch.Tensor | None, sizes: list[int], at: GroupContext
    ) -> Any:
        ctx.at, ctx.sizes = at, sizes
        return _gathered(x, at) if gathered is None else gathered

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _Scatter.apply(grads[0], ctx.sizes, ctx.at.named("backward")), None, None, None


class _Scatter(torch.autograd.Function):
    """This rank's part of the sum; backward: all ranks' rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sizes: list[int], at: GroupContext) -> torch.Tensor:
        ctx.at, ctx.sizes = at, sizes
        return _sum_of_parts(x, sizes, at)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _Gather.apply(grads[0], None, ctx.sizes, ctx.at.named("backward")), None, None


class _GatherOnce(torch.autograd.Function):
    """All ranks' rows, used alike on all ranks; backward: this rank's slice."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gathered: torch.Tensor | None, sizes: list[int], at: GroupContext
    ) -> Any:
        ctx.at, ctx.sizes = at, sizes
        return _gathered(x, at) if gathered is None else gathered

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _Slice.apply(grads[0], ctx.sizes, ctx.at.named("backward")), None, None, None


class _Slice(torch.autograd.Function):
    """This rank's rows of what all ranks have; backward: all ranks' rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sizes: list[int], at: GroupContext) -> torch.Tensor:
        ctx.at, ctx.sizes = at, sizes
        return x.detach().narrow(0, sum(sizes[: at.rank]), sizes[at.rank]).clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _GatherOnce.apply(grads[0], None, ctx.sizes, ctx.at.named("backward")), None, None


class _Broadcast(torch.autograd.Function):
    """The root's; backward: the sum at the root, or (`once`) what the root has; zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, root: int, once: bool, at: GroupContext) -> torch.Tensor:
        ctx.at, ctx.root, ctx.once = at, root, once
        if at.size == 1:
            return x.detach().clone()
        group = EngineGroup(at.process_set)
        out: torch.Tensor = group.broadcast(_packed(x), at.global_rank(root), at.name).wait()
        return out.view(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _AtRoot.apply(grads[0], ctx.root, ctx.once, ctx.at.named("backward")), None, None, None


class _AtRoot(torch.autograd.Function):
    """The sum (`once`: the root's own) at the root, zeros elsewhere; backward: the root's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, root: int, once: bool, at: GroupContext) -> torch.Tensor:
        ctx.at, ctx.root, ctx.once = at, root, once
        out = x.detach().clone() if once else _summed(x, at)
        return out if at.rank == root else torch.zeros_like(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _Broadcast.apply(grads[0], ctx.root, ctx.once, ctx.at.named("backward")), None, None, None


class _Exchange(torch.autograd.Function):
    """Rows sent by splits; backward: they go back where they came from."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, splits: list[int], at: GroupContext) -> torch.Tensor:
        rows, ctx.received = _exchanged(x, splits, at)
        ctx.at = at
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _Exchange.apply(grads[0], ctx.received, ctx.at.named("backward")), None, None


class _Scale(torch.autograd.Function):
    """Identity; backward: times a number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * ctx.factor, None


# -- the functions ------------------------------------------------------------------------------------


def _eager(function: Function) -> Function:
    """Let a compiled function call `function` as it is, outside its graph.

    (``torch.compiler.disable`` as a decorator would load the compiler, a second, for everyone.)
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def _at(what: str, name: str | None, process_set: Any) -> GroupContext:
    group, rank, size = resolve_group(hvd, process_set, what)
    return GroupContext(auto_name(what, group) if name is None else name, group, rank, size)


@_eager
def all_reduce(
    x: torch.Tensor, *, name: str | None = None, process_set: Any = None, replicated: bool = False
) -> torch.Tensor:
    """Return the sum of `x` over ranks.

    Args:
        x: of the same shape and dtype on all ranks.
        name: on the wire; equal on all ranks, and no two under way at a time. None for a number counted
            per process set.
        process_set: the ranks; None for all.
        replicated: what follows is the same on all ranks and counts once (see the module).

    Raises:
        UsageError: this rank is not in the process set.

    Collectives: one all-reduce; backward one more, with `replicated` none (Megatron's "g", Shoeybi et
    al. 2019).

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> all_reduce(x).sum().backward()  # one rank
    >>> x.grad
    tensor([1., 1.])
    """
    at = _at("all_reduce", name, process_set)
    out: torch.Tensor = (_SumOnce if replicated else _AllReduce).apply(x, at)
    return out


@_eager
def all_gather(
    x: torch.Tensor,
    *,
    name: str | None = None,
    process_set: Any = None,
    replicated: bool = False,
    sizes: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the rows of all ranks, in rank order.

    If any rank's `x` carries a gradient, all ranks take part in the backward pass.

    Args:
        x: of shape (rows, ...); the number of rows may differ between ranks, and be 0.
        name, process_set, replicated: see :func:`all_reduce`.
        sizes: how many rows each rank has, where that is known, which saves the small message. `x` then
            must carry a gradient on all ranks or on none.

    Raises:
        ShapeError: `x` is a scalar, or `sizes` do not fit.
        UsageError: this rank is not in the process set.

    Collectives: one all-gather, together with one of 16 bytes per rank; backward a reduce-scatter where
    the parts are even, else an all-to-all of as many bytes; with `replicated` none.
    """
    at = _at("all_gather", name, process_set)
    check_rows(x.shape, "all_gather", at.rank)
    gathered = None
    if sizes is not None:
        parts = check_sizes(sizes, None, at.size, at.rank, "all_gather")
        check_sizes([parts[at.rank]], len(x), 1, at.rank, "all_gather: this rank's part of")
    elif at.size == 1:
        parts = [len(x)]
    else:
        carries = torch.is_grad_enabled() and x.requires_grad
        group = EngineGroup(at.process_set)
        sizes_work = group.all_gather(torch.tensor([[len(x), carries]]), f"{at.name}.sizes")
        work = group.all_gather(_packed(x), at.name)
        table = sizes_work.wait()
        gathered = work.wait().view(x.dtype)
        parts = table[:, 0].tolist()
        if torch.is_grad_enabled() and not carries and bool(table[:, 1].any()):
            x = x.detach().requires_grad_()  # so that this rank takes part
    out: torch.Tensor = (_GatherOnce if replicated else _Gather).apply(x, gathered, parts, at)
    return out


@_eager
def reduce_scatter(
    x: torch.Tensor,
    *,
    sizes: Sequence[int] | None = None,
    name: str | None = None,
    process_set: Any = None,
) -> torch.Tensor:
    """Return this rank's rows of the sum of `x` over ranks.

    Args:
        x: of shape (rows, ...), the same on all ranks.
        sizes: how many rows each rank gets, equal on all ranks; None for even parts, of which the first
            ones get what is left over.
        name, process_set: see :func:`all_reduce`.

    Raises:
        ShapeError: `x` is a scalar, or `sizes` do not fit.
        UsageError: this rank is not in the process set.

    Collectives: one reduce-scatter for even parts, else one all-to-all of as many bytes; backward one
    all-gather.
    """
    at = _at("reduce_scatter", name, process_set)
    check_rows(x.shape, "reduce_scatter", at.rank)
    if sizes is None:
        parts = even_sizes(len(x), at.size)
    else:
        parts = check_sizes(sizes, len(x), at.size, at.rank, "reduce_scatter")
    out: torch.Tensor = _Scatter.apply(x, parts, at)
    return out


@_eager
def broadcast(
    x: torch.Tensor,
    root: int,
    *,
    name: str | None = None,
    process_set: Any = None,
    replicated: bool = False,
) -> torch.Tensor:
    """Return the `x` of one rank.

    Args:
        x: of the same shape and dtype on all ranks; only the root's values count, and only the root's
            gets a gradient (the others' is zero).
        root: a rank of the process set, counted within it from 0: of the set of ranks 2 and 5, root 1
            is rank 5. (Horovod's own ``broadcast`` wants 5.)
        name, process_set, replicated: see :func:`all_reduce`.

    Raises:
        ConfigError: `root` is no rank of the set.
        UsageError: this rank is not in the process set.

    Collectives: one broadcast; backward one all-reduce, with `replicated` none.
    """
    at = _at("broadcast", name, process_set)
    check_root(root, at.size, at.rank)
    out: torch.Tensor = _Broadcast.apply(x, root, replicated, at)
    return out


@_eager
def exchange(
    x: torch.Tensor, splits: Sequence[int], *, name: str | None = None, process_set: Any = None
) -> torch.Tensor:
    """Return the rows that all ranks sent to this one, in rank order.

    Args:
        x: of shape (rows, ...).
        splits: how many of its rows go to each rank.
        name, process_set: see :func:`all_reduce`.

    Raises:
        UsageError: this rank is not in the process set.

    Collectives: one all-to-all; backward another one.
    """
    out: torch.Tensor = _Exchange.apply(x, list(splits), _at("exchange", name, process_set))
    return out


@_eager
def shift(x: torch.Tensor, by: int = 1, *, name: str | None = None, process_set: Any = None) -> torch.Tensor:
    """Send the rows of `x` to the rank `by` further round the ring; return those received.

    Args:
        x: of shape (rows, ...); the number of rows may differ between ranks, and be 0.
        by: how far; negative for the other way round. Equal on all ranks.
        name, process_set: see :func:`all_reduce`.

    Raises:
        ShapeError: `x` is a scalar.
        UsageError: this rank is not in the process set.

    Collectives: one all-to-all in which each rank has one receiver; backward the same. None if the rows
    end where they began.
    """
    at = _at("shift", name, process_set)
    check_rows(x.shape, "shift", at.rank)
    if by % at.size == 0:
        return x.clone()
    splits = [0] * at.size
    splits[(at.rank + by) % at.size] = len(x)
    out: torch.Tensor = _Exchange.apply(x, splits, at)
    return out


@_eager
def copy_to_ranks(x: torch.Tensor, *, name: str | None = None, process_set: Any = None) -> torch.Tensor:
    """Return `x`, which is the same on all ranks and from here on is used differently by each.

    Megatron's "f" (Shoeybi et al. 2019): put it before the first layer that is split over ranks.

    Args:
        x: the same on all ranks.
        name, process_set: see :func:`all_reduce`.

    Raises:
        UsageError: this rank is not in the process set.

    Collectives: none; backward one all-reduce.
    """
    out: torch.Tensor = _Copy.apply(x, _at("copy_to_ranks", name, process_set))
    return out


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Return `x`, whose gradient is multiplied by `factor` on its way back.

    Collectives: none.
    """
    out: torch.Tensor = _Scale.apply(x, factor)
    return out


class HorovodGroup:
    """:class:`hvdloss.losses.base.Group`: the ranks of a process set, with the collectives above.

    Args:
        process_set: None for all ranks.

    Raises:
        UsageError: this rank is not in the process set.
    """

    def __init__(self, process_set: Any = None) -> None:
        self.process_set, self.rank, self.size = resolve_group(hvd, process_set, "group_of")

    def all_reduce(self, x: torch.Tensor, name: str, *, replicated: bool = False) -> torch.Tensor:
        """Return the sum of `x` over ranks; see :func:`all_reduce`."""
        return all_reduce(x, name=name, process_set=self.process_set, replicated=replicated)

    def all_gather(self, x: torch.Tensor, name: str, *, replicated: bool = False) -> torch.Tensor:
        """Return all ranks' rows; see :func:`all_gather`."""
        return all_gather(x, name=name, process_set=self.process_set, replicated=replicated)

    def shift(self, x: torch.Tensor, name: str, by: int = 1) -> torch.Tensor:
        """Return the rows of the rank `by` before this one in the ring; see :func:`shift`."""
        return shift(x, by, name=name, process_set=self.process_set)


def group_of(process_set: Any = None) -> HorovodGroup:
    """Return the ranks of a process set as losses over all ranks want them; None for all ranks."""
    return HorovodGroup(process_set)
