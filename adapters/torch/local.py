"""Local steps: what lies between two exchanges of parameters."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from hvdloss.communicator import Communicator
from hvdloss.control.period import OuterStep
from hvdloss.messages import decode_all
from hvdloss.term import CommStats
from hvdloss.torch.buckets import Wire

__all__ = ["Stretch", "share_memory"]


class Stretch:
    """The steps that a rank takes by itself since the last exchange of parameters.

    Holds the parameters of that exchange (the anchor, equal on all ranks) and what the rank saw since.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], name: str) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.name = name
        self.anchor = [p.detach().clone() for p in self.parameters]
        self.velocity: list[torch.Tensor] | None = None
        self.begin()

    def begin(self) -> None:
        """Start counting anew."""
        self.steps = 0
        self.row: torch.Tensor | None = None
        self.strays = 0
        self.bad = 0  # steps with a gradient that was not finite

    def count(self, row: torch.Tensor | None, strays: int, bad: bool) -> None:
        """Add a step of this rank, with the sums it told (None without any)."""
        self.steps += 1
        self.strays += strays
        self.bad += bad
        if row is not None:
            self.row = row if self.row is None else self.row + row

    @torch.no_grad()
    def pull(self, strength: float) -> None:
        """Add the gradient of ``strength / 2 ||theta - anchor||^2``."""
        if not strength:
            return
        for p, anchor in zip(self.parameters, self.anchor, strict=True):
            if p.grad is not None and p.grad.layout is torch.strided:
                p.grad.add_(p.detach() - anchor, alpha=strength)

    @torch.no_grad()
    def moves(self) -> tuple[dict[str, torch.Tensor], float]:
        """Return theta - anchor, side by side for each dtype and device, and the squared length of all."""
        parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        for p, anchor in zip(self.parameters, self.anchor, strict=True):
            parts[_kind(p)].append((p.detach() - anchor).reshape(-1))
        flats = {kind: torch.cat(some) for kind, some in parts.items()}
        return flats, _squared_length(flats)

    @torch.no_grad()
    def send(
        self, flats: dict[str, torch.Tensor], share: float, wire: Wire
    ) -> tuple[list[Callable[[], None]], CommStats]:
        """Start summing ``share`` times the moves over ranks, in place."""
        for flat in flats.values():
            # Multiplying would make NaN of what is not finite on a rank that must not count.
            flat.mul_(share) if share else flat.zero_()
        waits = [wire.send(flat, f"{self.name}.moves.{kind}") for kind, flat in flats.items()]
        travel = CommStats(
            messages=len(flats) + 1,
            bytes=sum(wire.bytes_of(flat) for flat in flats.values()),
            full_bytes=sum(flat.numel() * flat.element_size() for flat in flats.values()),
            steps=self.steps,
            parameters=True,
        )
        return waits, travel

    @torch.no_grad()
    def settle(self, flats: dict[str, torch.Tensor], denominator: float, outer: OuterStep | None) -> float:
        """Move anchor and parameters by the ranks' mean move; return its squared length."""
        for flat in flats.values():
            flat.div_(denominator)
        length = _squared_length(flats)
        at: dict[str, int] = defaultdict(int)
        if outer is not None and self.velocity is None:
            self.velocity = [torch.zeros_like(anchor) for anchor in self.anchor]
        for i, (p, anchor) in enumerate(zip(self.parameters, self.anchor, strict=True)):
            kind = _kind(p)
            start = at[kind]
            at[kind] = start + p.numel()
            move = flats[kind][start : start + p.numel()].view(p.shape)
            if outer is not None:
                assert self.velocity is not None
                move, self.velocity[i] = outer.update(move, self.velocity[i])
            anchor.add_(move)
            p.copy_(anchor)
        self.begin()
        return length

    @torch.no_grad()
    def go_back(self) -> None:
        """Return to the parameters of the last exchange."""
        for p, anchor in zip(self.parameters, self.anchor, strict=True):
            p.copy_(anchor)
        self.begin()

    @torch.no_grad()
    def anchor_here(self) -> None:
        """Take the present parameters, which are equal on all ranks, for the anchor."""
        for p, anchor in zip(self.parameters, self.anchor, strict=True):
            anchor.copy_(p)
        self.begin()


@torch.no_grad()
def share_memory(
    optimizer: torch.optim.Optimizer, share: float, wire: Wire, communicator: Communicator, name: str
) -> None:
    """Average what the ranks' optimizers remember: with equal gradients they must make equal updates.

    What not all ranks have is forgotten; numbers of steps are rounded.

    Args:
        optimizer: whose ``state`` is averaged.
        share: of this rank in the average.
        wire: without compression: squares of small gradients are beyond float16.
        communicator: of the same ranks.
        name: of the messages.

    Collectives: one gather of the entries' names, one all-reduce per dtype.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    mine = {
        f"{i} {key} {tuple(value.shape)} {value.dtype}": (p, key)
        for i, p in enumerate(parameters)
        for key, value in optimizer.state.get(p, {}).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    texts = communicator.all_gather_bytes(json.dumps(list(mine)).encode(), f"{name}.memory")
    told = decode_all(
        texts, "state of the optimizer", lambda names: all(isinstance(one, str) for one in names)
    )
    everywhere = set(told[0]).intersection(*told[1:])
    for entry in set(mine) - everywhere:
        optimizer.state.pop(mine[entry][0], None)
    groups: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
    for entry in told[0]:
        if entry in everywhere:
            p, key = mine[entry]
            groups[optimizer.state[p][key].dtype].append(optimizer.state[p][key])
    for dtype, values in groups.items():
        flat = torch.cat([value.reshape(-1).to(_device(values)) for value in values]).mul_(share)
        wire.send(flat, f"{name}.memory.{dtype}")()
        for value, mean in zip(values, flat.split([value.numel() for value in values]), strict=True):
            value.copy_((mean.round() if value.dim() == 0 else mean).view(value.shape))


def _device(values: Sequence[torch.Tensor]) -> torch.device:
    """Return where most of what is to be sent together lies: counters of steps stay on the host."""
    return max(values, key=lambda value: value.numel()).device


def _kind(p: torch.Tensor) -> str:
    """Return what can lie side by side, equal on all ranks, whose devices may have other numbers."""
    return f"{p.dtype} {p.device.type}"


def _squared_length(flats: dict[str, torch.Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(flat, dtype=_wide(flat)).abs() ** 2) for flat in flats.values())


def _wide(flat: torch.Tensor) -> torch.dtype:
    return torch.complex128 if flat.is_complex() else torch.float64
