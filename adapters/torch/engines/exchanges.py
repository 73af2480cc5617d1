"""What exchanges do, step by step: functions of a lane, which yield what they wait for."""

from __future__ import annotations

from typing import Any

import numpy as np

import torch
import torch.distributed as dist
from hvdloss.comm.single import Adasum, Average, Max, Min, Product, Sum
from hvdloss.errors import UsageError
from hvdloss.torch.engines.lanes import Lane, Steps

__all__ = [
    "SHORT",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "reduce_scatter",
    "reduction",
    "scaled",
]

SHORT = (torch.float16, torch.bfloat16)
_OPS = {Average: dist.ReduceOp.SUM, Sum: dist.ReduceOp.SUM, Min: dist.ReduceOp.MIN}
_OPS |= {Max: dist.ReduceOp.MAX, Product: dist.ReduceOp.PRODUCT}
_WIDER = {torch.int16: torch.int32}  # what Gloo reduces


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values as they lie, or a copy's."""
    whole = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)  # an axis of one may have any stride


def _row_bytes(tensor: torch.Tensor) -> int:
    return int(np.prod(tensor.shape[1:], dtype=np.int64)) * tensor.element_size()


def _from_bytes(flat: torch.Tensor, like: torch.Tensor, rows: int) -> torch.Tensor:
    return flat.view(like.dtype).view(rows, *like.shape[1:])


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Return a tensor times a number."""
    return tensor if factor == 1.0 else (tensor * factor).to(tensor.dtype)


def reduction(op: Any, average: bool | None) -> int:
    """Return Horovod's number of a reduction, of which `average` is an old name.

    Raises:
        UsageError: it is none that there is here.
    """
    op = (Average if average in (None, True) else Sum) if op is None else op
    if op == Adasum:
        raise UsageError("op=Adasum needs Horovod; use op=Average or op=Sum")
    if op not in _OPS:
        raise UsageError(f"op={op!r} is not one of Average, Sum, Min, Max, Product")
    return int(op)


def _divided(total: torch.Tensor, op: int, size: int, factor: float) -> torch.Tensor:
    """Return what a sum over ranks stands for."""
    if op == Average and total.is_floating_point() | total.is_complex():
        total = total / size
    elif op == Average:
        total = torch.div(total, size, rounding_mode="trunc")
    return scaled(total, factor)


def _into(out: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """Return the values, in `out` if it is given."""
    if out is None:
        return values
    if values.data_ptr() != out.data_ptr():
        out.detach().copy_(values)
    return out


def all_reduce(tensor: torch.Tensor, out: torch.Tensor | None, op: int, pre: float, post: float) -> Any:
    """Reduce over ranks, into `out` if it is given; only this one sends no header in a lane without."""

    def steps(lane: Lane, what: str) -> Steps:
        if lane.checked:
            about = f"{tensor.dtype} {tuple(tensor.shape)} op {op} {pre} {post}"
            yield from lane.header(what, about, [0] * lane.size)
        else:
            yield None
        values = scaled(tensor.detach(), pre).to(_WIDER.get(tensor.dtype, tensor.dtype))
        values = values.contiguous()
        if out is None and values.data_ptr() == tensor.data_ptr():
            values = values.clone()
        yield lane.all_reduce(values, _OPS[op])
        return _into(out, _divided(values, op, lane.size, post).to(tensor.dtype))

    return steps


def all_gather(tensor: torch.Tensor) -> Any:
    """Gather rows, padded to the most that a rank has."""

    def steps(lane: Lane, what: str) -> Steps:
        if not tensor.dim():
            raise UsageError(f"{what}: a scalar has no rows to gather; give it an axis")
        row, mine = _row_bytes(tensor), _bytes(tensor)
        counts = yield from lane.header(
            what, f"{tensor.dtype} (.., {tuple(tensor.shape[1:])})", [len(tensor)] * lane.size
        )
        most = max(counts) * row
        padded = mine if len(mine) == most else torch.nn.functional.pad(mine, (0, most - len(mine)))
        table = torch.empty(lane.size, most, dtype=torch.uint8, device=tensor.device)
        yield lane.all_gather(list(table), padded)
        parts = [part[: count * row] for part, count in zip(table, counts, strict=True)]
        whole = table.view(-1) if min(counts) == max(counts) else torch.cat(parts)
        return _from_bytes(whole, tensor, sum(counts))

    return steps


def all_to_all(tensor: torch.Tensor, splits: Any) -> Any:
    """Send rows; their number is in the header."""

    def steps(lane: Lane, what: str) -> Steps:
        sent = [len(tensor) // lane.size] * lane.size if splits is None else torch.as_tensor(splits).tolist()
        if len(sent) != lane.size or sum(sent) != len(tensor) or min(sent) < 0:
            raise UsageError(
                f"{what}: {len(tensor)} rows cannot be sent by splits {sent} to {lane.size} ranks"
            )
        row, mine = _row_bytes(tensor), _bytes(tensor)
        counts = yield from lane.header(what, f"{tensor.dtype} (.., {tuple(tensor.shape[1:])})", sent)
        out = torch.empty(sum(counts) * row, dtype=torch.uint8, device=tensor.device)
        yield lane.all_to_all(out, mine, [n * row for n in counts], [n * row for n in sent])
        rows = _from_bytes(out, tensor, sum(counts))
        return rows if splits is None else (rows, torch.tensor(counts, dtype=torch.int32))

    return steps


def reduce_scatter(tensor: torch.Tensor, op: int, pre: float, post: float) -> Any:
    """Reduce over ranks, each its rows, of which the first ranks get what is left over; in rank order."""

    def steps(lane: Lane, what: str) -> Steps:
        about = f"{tensor.dtype} {tuple(tensor.shape)} op {op} {pre} {post}"
        yield from lane.header(what, about, [0] * lane.size)
        least, more = divmod(len(tensor), lane.size)
        rows = [least + (rank < more) for rank in range(lane.size)]
        row, count = _row_bytes(tensor), rows[lane.rank]
        out = torch.empty(lane.size * count * row, dtype=torch.uint8, device=tensor.device)
        mine = _bytes(scaled(tensor, pre))
        yield lane.all_to_all(out, mine, [count * row] * lane.size, [n * row for n in rows])
        parts = _from_bytes(out, tensor, lane.size * count).view(lane.size, count, *tensor.shape[1:])
        wide = torch.float32 if tensor.dtype in SHORT else tensor.dtype
        if op in (Sum, Average):
            total = _divided(parts.sum(0, dtype=wide), op, lane.size, post)
        else:
            total = scaled({Min: parts.amin, Max: parts.amax, Product: parts.prod}[op](0), post)
        return total.to(tensor.dtype)

    return steps


def broadcast(tensor: torch.Tensor, out: torch.Tensor | None, root: int) -> Any:
    """Broadcast the tensor of `root`, a global rank, into `out` if it is given."""

    def steps(lane: Lane, what: str) -> Steps:
        if root not in lane.ranks:
            raise UsageError(f"{what}: root_rank={root!r} is none of the ranks {lane.ranks}")
        if lane.checked:
            about = f"{tensor.dtype} {tuple(tensor.shape)} from {root}"
            yield from lane.header(what, about, [0] * lane.size)
        else:
            yield None
        values = _bytes(tensor)
        if out is None and values.data_ptr() == tensor.data_ptr():
            values = values.clone()
        yield lane.broadcast(values, lane.ranks.index(root))
        return _into(out, values.view(tensor.dtype).view(tensor.shape))

    return steps


def barrier(lane: Lane, what: str) -> Steps:
    """Exchange a header and nothing else."""
    yield from lane.header(what, "", [0] * lane.size)
