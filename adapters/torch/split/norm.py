"""The norm of all gradients of a model that lies on several ranks, and clipping by it."""

from __future__ import annotations

import torch
from hvdloss.errors import ConfigError, UsageError
from hvdloss.split.grid import Grid
from hvdloss.torch.collectives import all_reduce
from hvdloss.torch.split.base import SplitModule

__all__ = ["clip_split_grad_norm_"]


@torch.no_grad()
def clip_split_grad_norm_(model: torch.nn.Module, max_norm: float, groups: Grid) -> torch.Tensor:
    """Scale the gradients of a split model to a norm of at most `max_norm`, that of the whole model.

    As ``torch.nn.utils.clip_grad_norm_`` does in one process, on every rank alike::

        optimizer.synchronize()  # the gradients of all replicas
        hvd.clip_split_grad_norm_(stage, 1.0, groups)
        with optimizer.skip_synchronize():
            optimizer.step()

    Args:
        model: this rank's part of it: split layers, a stage, or both.
        max_norm: of all gradients together, above 0.
        groups: of :func:`hvdloss.torch.grid`, over which the model is split.

    Returns:
        the norm before, a float64 scalar; equal on all ranks of the model.

    Raises:
        ConfigError: `max_norm` is not above 0.
        UsageError: there are no gradients yet.

    Collectives: one all-reduce of one number among ranks that share layers, and one among stages.
    """
    if not max_norm > 0:
        raise ConfigError(f"max_norm={max_norm!r} must be above 0")
    parted = {
        id(layer.get_parameter(name))
        for layer in model.modules()
        if isinstance(layer, SplitModule)
        for name in layer.cuts
    }
    found = [(p.grad, id(p) in parted) for p in model.parameters() if p.grad is not None]
    if not found:
        raise UsageError(
            "clip_split_grad_norm_ before the gradients of all replicas are there: write "
            "optimizer.synchronize(), then this, then with optimizer.skip_synchronize(): optimizer.step()"
        )
    # What every rank of a group has whole counts once.
    first = groups.model.rank() == 0
    own = [grad.double().square().sum() for grad, is_part in found if is_part or first]
    total = torch.stack(own).sum() if own else found[0][0].new_zeros((), dtype=torch.float64)
    for name, ranks in (("layers", groups.model), ("stages", groups.pipe)):
        if ranks is not None and ranks.size() > 1:
            total = all_reduce(total, name=f"hvdloss.clip_split_grad_norm.{name}", process_set=ranks)
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as PyTorch
    for grad, _ in found:
        grad.mul_(factor.to(grad))
    return norm
