"""What all split layers have in common: parameters of which each rank holds a part."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hvdloss.comm.collectives import auto_name, resolve_group
from hvdloss.errors import ShapeError
from hvdloss.split.parts import Cut, row_chunks
from hvdloss.torch._backend import hvd

__all__ = ["SplitModule", "linear_bound"]


def linear_bound(in_features: int) -> float:
    """Return between which numbers ``torch.nn.Linear`` draws its weight, to the last bit."""
    gain = torch.nn.init.calculate_gain("leaky_relu", math.sqrt(5))
    return math.sqrt(3.0) * (gain / math.sqrt(in_features)) if in_features else 0.0


class SplitModule(torch.nn.Module):
    """A layer of which each rank of a process set holds a part.

    Its initial parameters are parts of those that the ordinary layer has when it is made at the same place
    after the same ``torch.manual_seed``, bit for bit and for any number of ranks, and the generator is left
    in the same state. (They are drawn on the CPU, also for a layer on another device.) Of a split parameter
    no rank ever holds the whole. The state dict has this rank's part; ``load_state_dict`` takes that, or the
    state dict of the ordinary layer, of which it takes its part. See :func:`hvdloss.torch.full_state_dict`.

    Args:
        process_set: the ranks that share the layer; None for all.

    Attributes:
        cuts: how each split parameter lies on the ranks, by its name.

    Raises:
        UsageError: this rank is not in the process set.
    """

    def __init__(self, process_set: Any) -> None:
        super().__init__()
        kind = type(self).__name__
        group, self.rank, self.size = resolve_group(hvd, process_set, kind)
        self.process_set = process_set
        self.wire_name = auto_name(kind, group)
        self.cuts: dict[str, Cut] = {}

    def _split_parameter(self, name: str, cut: Cut, rest: tuple[int, ...], device: Any, dtype: Any) -> None:
        """Register this rank's part of a parameter, whose other axes are `rest`."""
        shape = (*rest[: cut.axis], cut.size(self.rank), *rest[cut.axis :])
        self.cuts[name] = cut
        self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    @torch.no_grad()
    def _draw(self, name: str, draw: Callable[[torch.Tensor], Any]) -> None:
        """Fill a tensor like the whole parameter in the order of its entries, and keep this rank's part.

        Args:
            name: of the parameter.
            draw: fills a tensor on the CPU in place; called with some rows after the others.
        """
        own, cut = self.get_parameter(name), self.cuts[name]
        if own.device.type == "meta":
            return
        rows, *rest = cut.whole_shape(own.shape)
        for some in row_chunks(rows, math.prod(rest)):
            scratch = torch.empty(len(some), *rest, dtype=own.dtype)
            draw(scratch)
            if cut.axis:
                at = 0
                for mine in cut.ranges(self.rank):
                    own[some.start : some.stop, at : at + len(mine)] = scratch[:, mine.start : mine.stop]
                    at += len(mine)
                continue
            for source, target in cut.overlaps(self.rank, some):
                own[target.start : target.stop] = scratch[
                    source.start - some.start : source.stop - some.start
                ]

    def _check_input(self, x: torch.Tensor, features: int, what: str) -> None:
        if x.shape[-1:] != (features,):
            raise ShapeError(
                f"{type(self).__name__}: input of shape {tuple(x.shape)} has not {what}={features} "
                f"as its last axis (rank {self.rank})"
            )

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Take this rank's part of whole tensors."""
        own = {}
        becomes = local_metadata.get("assign_to_params_buffers")  # then nobody else's part is to be kept
        for name in self.cuts:
            given = state_dict.get(prefix + name)
            if isinstance(given, torch.Tensor):
                part = self._own_part(given, name, prefix + name)
                own[prefix + name] = part.clone() if becomes else part
        super()._load_from_state_dict({**state_dict, **own}, prefix, local_metadata, *args, **kwargs)

    def _own_part(self, given: torch.Tensor, name: str, key: str) -> torch.Tensor:
        own, cut = tuple(self.get_parameter(name).shape), self.cuts[name]
        whole = cut.whole_shape(own)
        if tuple(given.shape) == whole:
            pieces = [given.narrow(cut.axis, mine.start, len(mine)) for mine in cut.ranges(self.rank)]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, cut.axis)
        if tuple(given.shape) == own:
            return given
        raise ShapeError(
            f"{key} has shape {tuple(given.shape)} in the checkpoint; rank {self.rank} takes the whole "
            f"{whole}, of which it keeps {cut.size(self.rank)} of {cut.length} along axis {cut.axis}, or "
            f"its own {own}. Save with hvdloss.torch.full_state_dict(model), or make the layer with the "
            f"checkpoint's {cut.parts.noun} and sizes"
        )
