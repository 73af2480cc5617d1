"""The state dict of the whole model, from all parts."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import torch
from hvdloss.comm.messages import decode_all
from hvdloss.split.parts import Cut, row_chunks
from hvdloss.torch.collectives import all_gather, broadcast
from hvdloss.torch.ops import communicator_of
from hvdloss.torch.split.base import SplitModule

__all__ = ["full_state_dict"]


def full_state_dict(
    model: torch.nn.Module, *, everywhere: bool = False, pipe: Any = None
) -> dict[str, torch.Tensor]:
    """Return the state dict of the same model, of ordinary layers and whole.

    Args:
        model: with any number of split layers, the same on all ranks that share them; with `pipe`, a stage
            whose names are those of the whole model.
        everywhere: whether all ranks get it, or the first of those that share a layer (of the first stage)
            only; others then get what they hold whole of their own state dict, and never hold a whole
            split parameter.
        pipe: the ranks that are stages of the model (``hvd.grid(...).pipe``); None for a model of one stage.

    Returns:
        tensors on the CPU where they come from other ranks, else the model's own, as ``state_dict`` returns
        them.

    Collectives: all-gathers of at most 8 MiB (float64) at a time, for each split parameter; with `pipe`
    two more, and broadcasts of as much for each tensor of a stage.
    """
    out: dict[str, torch.Tensor] = dict(model.state_dict())
    for name, layer in model.named_modules():
        if not isinstance(layer, SplitModule):
            continue
        for leaf, cut in layer.cuts.items():
            key = f"{name}.{leaf}" if name else leaf
            whole = _whole(layer, layer.get_parameter(leaf).detach(), cut, everywhere or layer.rank == 0)
            if whole is None:
                out.pop(key)
            else:
                out[key] = whole
    return out if pipe is None or pipe.size() == 1 else _of_stages(out, pipe, everywhere)


def _whole(layer: SplitModule, own: torch.Tensor, cut: Cut, keep: bool) -> torch.Tensor | None:
    """Gather a parameter's parts chunk by chunk; return them all, or None unless they are to be kept."""
    if layer.size == 1:
        return own.cpu().clone()
    own = own.movedim(cut.axis, 0)
    out = torch.empty(cut.length, *own.shape[1:], dtype=own.dtype) if keep else None
    counts = [cut.size(rank) for rank in range(layer.size)]
    places = [
        torch.tensor(list(itertools.chain(*cut.ranges(rank))) if keep else [], dtype=torch.int64)
        for rank in range(layer.size)
    ]
    for rows in row_chunks(max(counts), math.prod(own.shape[1:]) * layer.size):
        sizes = [max(0, min(rows.stop, count) - rows.start) for count in counts]
        mine = own[rows.start : rows.start + sizes[layer.rank]].cpu()
        with torch.no_grad():
            got = all_gather(
                mine, name="hvdloss.full_state_dict", process_set=layer.process_set, sizes=sizes
            ).split(sizes)
        if out is not None:
            for place, part in zip(places, got, strict=True):
                out[place[rows.start : rows.start + len(part)]] = part
    return None if out is None else out.movedim(0, cut.axis).contiguous()


def _is_list_of_tensors(told: Any) -> bool:
    return isinstance(told, list) and all(
        isinstance(key, str)
        and isinstance(getattr(torch, str(kind), None), torch.dtype)
        and all(type(n) is int and n >= 0 for n in shape)
        for key, kind, shape in told
    )


def _of_stages(own: dict[str, torch.Tensor], pipe: Any, everywhere: bool) -> dict[str, torch.Tensor]:
    """Return the tensors of all stages, in their order; a rank that is not to have them gets its own."""
    me, keep = pipe.rank(), everywhere or pipe.rank() == 0
    listed = [[key, str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in own.items()]
    texts = communicator_of(pipe).all_gather_bytes(
        json.dumps(listed).encode(), "hvdloss.full_state_dict.names"
    )
    told = decode_all(texts, "names of a stage's tensors", _is_list_of_tensors)
    out: dict[str, torch.Tensor] = {}
    for stage, tensors in enumerate(told):
        for key, kind, shape in tensors:
            dtype = getattr(torch, kind)
            whole = own[key] if stage == me else torch.empty(shape if keep else 0, dtype=dtype)
            flat = whole.detach().cpu().reshape(-1) if stage == me else whole.view(-1)
            for some in row_chunks(math.prod(shape), 1):
                kept = stage == me or keep
                piece = flat[some.start : some.stop] if kept else torch.empty(len(some), dtype=dtype)
                with torch.no_grad():
                    got = broadcast(piece, stage, name="hvdloss.full_state_dict.stage", process_set=pipe)
                if keep and stage != me:
                    flat[some.start : some.stop] = got
            out[key] = whole
    return out if keep else own
