"""Local steps: what lies between two exchanges of parameters."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from hvdloss.comm.communicator import Communicator
from hvdloss.comm.messages import decode_all
from hvdloss.step.local import LocalSums
from hvdloss.step.scale import WeightScale
from hvdloss.terms.controller import Controller
from hvdloss.terms.policies.period import OuterStep, SyncPeriod
from hvdloss.terms.policies.weights import Proximal
from hvdloss.terms.term import CommStats
from hvdloss.torch.buckets import Wire
from hvdloss.torch.ledgers import zeroed

__all__ = ["LocalSteps", "average_optimizer_state"]


class LocalSteps:
    """The steps that a rank takes by itself since the last exchange of parameters.

    Args:
        controller: whose policies say how many, and how far they may go.
        is_sum: whether the objective's reduction is a sum.
        name: of the optimizer, on the wire.

    Attributes:
        sums: what this rank saw in them.
        scale: what the ranks' weights are measured in.
        now: whether the gradients of the present step stay on this rank.
        due: whether parameters are to be exchanged.
        mean_update: squared length of the last exchange's mean move.
        velocity: of the outer step; None before the first.
    """

    def __init__(self, controller: Controller, is_sum: bool, name: str) -> None:
        self._period = controller.policy(SyncPeriod)
        self._proximal = controller.policy(Proximal)
        self._is_sum, self._name = is_sum, name
        self.sums = LocalSums()
        self.scale = WeightScale()
        self.reset()

    def reset(self) -> None:
        """Forget everything, as before the first step: ranks, or parameters, are others now."""
        self._synced: list[torch.Tensor] = []
        self.clear()
        self.velocity: list[torch.Tensor] | None = None
        self.scale.reset()
        self.now = False
        self.mean_update = 0.0

    def clear(self) -> None:
        """Forget the parameters of the last exchange: whatever is there now is equal on all ranks."""
        if self._synced:
            self.velocity = None
        self._parameters: list[torch.nn.Parameter] = []
        self._synced = []
        self.due = False
        self.sums.clear()

    @property
    def enabled(self) -> bool:
        """Whether a policy may have ranks take any."""
        return self._period is not None

    @property
    def wanted(self) -> bool:
        """Whether there is more than one between two exchanges."""
        return self._period is not None and self._period.period > 1

    @property
    def diverged(self) -> bool:
        """Whether the ranks' parameters differ."""
        return self.sums.steps > 0

    @property
    def outer(self) -> OuterStep | None:
        """What is done with the mean of the ranks' moves."""
        return None if self._period is None else self._period.outer

    @torch.no_grad()
    def prepare(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Keep copies of the parameters, unless there are any."""
        if not self._synced:
            self._parameters = [p for p in parameters if p.requires_grad]
            self._synced = [p.detach().clone() for p in self._parameters]

    def count(self, row: torch.Tensor | None, untracked: int, nonfinite: bool) -> None:
        """Add a step of this rank, with the sums it told (None without any)."""
        self.sums.add(row, untracked, nonfinite)
        self.due = self._period is not None and self.sums.steps >= self._period.period

    @torch.no_grad()
    def add_proximal_gradient(self) -> None:
        """Add the gradient of ``mu / 2 ||theta - synced||^2``."""
        mu = 0.0 if self._proximal is None else self._proximal.mu
        if not mu:
            return
        for p, synced in zip(self._parameters, self._synced, strict=True):
            if p.grad is not None and p.grad.layout is torch.strided:
                p.grad.add_(p.detach() - synced, alpha=mu)

    @torch.no_grad()
    def updates(self) -> tuple[dict[str, torch.Tensor], float, float]:
        """Return how far this rank's parameters moved.

        Returns:
            theta - synced, side by side for each dtype and device; what they weigh; and their squared length
            times that.
        """
        parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        for p, synced in zip(self._parameters, self._synced, strict=True):
            parts[_kind(p)].append((p.detach() - synced).reshape(-1))
        flats = {kind: torch.cat(some) for kind, some in parts.items()}
        return flats, *self.sums.weigh(_squared_length(flats), self._is_sum, zeroed)

    @torch.no_grad()
    def send(
        self, flats: dict[str, torch.Tensor], weight: float, wire: Wire
    ) -> tuple[list[Callable[[], None]], CommStats]:
        """Start summing the weighted moves over ranks, in place."""
        share = self.scale.relative(weight)
        for flat in flats.values():
            # Multiplying would make NaN of what is not finite on a rank that must not count.
            flat.mul_(share) if share else flat.zero_()
        waits = [wire.send(flat, f"{self._name}.moves.{kind}") for kind, flat in flats.items()]
        comm_stats = CommStats(
            messages=len(flats) + 1,
            bytes=sum(wire.bytes_of(flat) for flat in flats.values()),
            full_bytes=sum(flat.numel() * flat.element_size() for flat in flats.values()),
            steps=self.sums.steps,
            parameters=True,
        )
        return waits, comm_stats

    @torch.no_grad()
    def apply(self, flats: dict[str, torch.Tensor], total: float) -> None:
        """Move the parameters from the last exchange's by the ranks' mean move."""
        denominator = self.scale.denominator(total)
        for flat in flats.values():
            flat.div_(denominator)
        self.mean_update = _squared_length(flats)
        at: dict[str, int] = defaultdict(int)
        if self.outer is not None and self.velocity is None:
            self.velocity = [torch.zeros_like(synced) for synced in self._synced]
        for i, (p, synced) in enumerate(zip(self._parameters, self._synced, strict=True)):
            kind = _kind(p)
            start = at[kind]
            at[kind] = start + p.numel()
            move = flats[kind][start : start + p.numel()].view(p.shape)
            if self.outer is not None:
                assert self.velocity is not None
                move, self.velocity[i] = self.outer.update(move, self.velocity[i])
            synced.add_(move)
            p.copy_(synced)
        self.scale.update(total)
        self.sums.clear()

    @torch.no_grad()
    def restore_parameters(self) -> None:
        """Return to the parameters of the last exchange."""
        for p, synced in zip(self._parameters, self._synced, strict=True):
            p.copy_(synced)
        self.sums.clear()

    @torch.no_grad()
    def save_parameters(self) -> None:
        """Take the present parameters, which are equal on all ranks, for those of the last exchange."""
        for p, synced in zip(self._parameters, self._synced, strict=True):
            synced.copy_(p)
        self.sums.clear()


@torch.no_grad()
def average_optimizer_state(
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
