"""What the PyTorch cases share: steps split over ranks, their one-process reference, plain averaging.

``HVDLOSS_TEST_DEVICE=cuda`` puts models and batches on the rank's GPU, as a user's program does, tensor by
tensor: what the library makes by itself it must put there by itself. Ranks that share a GPU tell NCCL that
they are on hosts of their own, or it would refuse them; they then talk through sockets.

``HVDLOSS_TEST_DEVICE=deferred`` leaves tensors on the CPU, and has the library treat them as those of a GPU,
whose values are not to be looked at: its code for GPUs, computed where there is none.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import hvdloss.torch as hvd
from hvdloss.benchmarks.common import device_of
from hvdloss.comm.world import set_name_base
from hvdloss.torch.ops import HOST_DEVICES, communicator_of


def _device() -> torch.device:
    """Return where this rank's models and batches lie. Called before Horovod, and NCCL, have begun."""
    kind = os.environ.get("HVDLOSS_TEST_DEVICE", "cpu")
    if kind == "deferred":
        HOST_DEVICES.clear()
        kind = "cpu"
    if kind == "cuda":  # convolutions would round to 10 bits otherwise
        torch.backends.cudnn.allow_tf32 = False
    rank, size = os.environ.get("HOROVOD_LOCAL_RANK", "0"), os.environ.get("HOROVOD_LOCAL_SIZE", "1")
    return device_of(kind, int(rank), int(size))


DEVICE = _device()
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
PLAIN_IS_WRONG = 1e-3  # below this a split would not tell exact from averaged


def before_case(number: int) -> None:
    """Give every case its own names on the wire, whatever an earlier one left behind.

    On three ranks nearly every gradient travels by itself, elsewhere in buckets: both ways see all cases.
    """
    os.environ["HVDLOSS_UNBUCKETED_MB"] = "0.0001" if hvd.size() == 3 else "4"
    set_name_base(1000 * (number + 1))


def generator(seed: int) -> torch.Generator:
    """Return a source of the same random numbers on every rank."""
    return torch.Generator().manual_seed(seed)


def here(value: Any) -> torch.Tensor:
    """Return a tensor, or an array as one, on `DEVICE`."""
    return torch.as_tensor(value).to(DEVICE)


@dataclass
class Batch:
    """One micro-batch: inputs, targets, and weights as a user would pass them, on `DEVICE`."""

    x: torch.Tensor
    y: torch.Tensor
    weight: Any = None

    def __post_init__(self) -> None:
        self.x, self.y = self.x.to(DEVICE), self.y.to(DEVICE)
        if isinstance(self.weight, torch.Tensor):
            self.weight = self.weight.to(DEVICE)


Step = Sequence[Sequence[Batch]]  # a list of micro-batches for each rank


def regression(
    g: torch.Generator, counts: Sequence[Sequence[int]], *, weighted: bool = True, dtype=torch.float64
) -> list[list[Batch]]:
    """Return a step of random samples: `counts` says how many each micro-batch of each rank has.

    Ranks see different distributions, so that averaging their means is wrong.
    """
    step = []
    for rank, micro in enumerate(counts):
        row = []
        for n in micro:
            x = torch.randn(n, 5, generator=g, dtype=dtype) + 0.5 * rank
            y = torch.randn(n, 1, generator=g, dtype=dtype) * (1 + rank) - rank
            w = torch.rand(n, 1, generator=g, dtype=dtype) * 3 if weighted else None
            row.append(Batch(x, y, w))
        step.append(row)
    return step


def network(g: torch.Generator, dtype=torch.float64, outputs: int = 1) -> torch.nn.Module:
    """Return a small network with the same values on every rank."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, outputs)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=dtype) * 0.4)
    return model.to(DEVICE)


def mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Per-element squared error."""
    return F.mse_loss(prediction, target, reduction="none")


def union(step: Step) -> Batch:
    """Return all samples of a step as one batch with per-sample weights."""
    batches = [b for row in step for b in row]
    weights = []
    for b in batches:
        w = torch.ones(1, dtype=torch.float64) if b.weight is None else torch.as_tensor(b.weight)
        w = w.to(DEVICE, b.y.dtype if b.y.is_floating_point() else torch.float64)
        weights.append(w.expand_as(b.y) if b.y.dim() else w)
    return Batch(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]), torch.cat(weights))


def reduced(losses: torch.Tensor, weight: torch.Tensor, reduction: str) -> torch.Tensor:
    """Return the loss of one process, written anew from its definition; absent elements are left out."""
    weight = weight.to(losses.dtype).expand_as(losses)
    if reduction == "sequence_mean":
        means = [
            (w[w != 0] * one[w != 0]).sum() / w.sum()
            for one, w in zip(losses, weight, strict=True)
            if w.any()
        ]
        return torch.stack(means).mean()
    present, w = losses[weight != 0], weight[weight != 0]
    total = (w * present).sum()
    return {"mean": total / w.sum(), "batch_mean": total / w.numel(), "sum": total}[reduction]


def flat(tensors) -> torch.Tensor:
    """Return tensors (None counts as zeros of no entries) as one float64 vector on the CPU."""
    return torch.cat([t.detach().cpu().to_dense().double().flatten() for t in tensors])


def gradients(model: torch.nn.Module) -> torch.Tensor:
    """Return all gradients as one vector; a missing one is zero."""
    return flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the norm of the difference, relative to `b`'s."""
    scale = b.norm().item()
    return (a - b).norm().item() / (scale or 1.0)


def gathered(text: str, process_set: Any = None) -> list[str]:
    """Return every rank's text."""
    ranks = communicator_of(process_set or hvd.global_process_set)
    return [data.decode() for data in ranks.all_gather_bytes(text.encode(), "gathered")]


def same_on_all_ranks(value: Any, process_set: Any = None) -> None:
    """Assert that all ranks hold the same value."""
    values = gathered(repr(value), process_set)
    assert len(set(values)) == 1, values


def raises_everywhere(kind: type[BaseException], action: Callable[[], Any], *words: str) -> str:
    """Assert that `action` raises the same error, with the same text, on every rank; return the text."""
    try:
        action()
    except kind as error:
        text = str(error)
    except Exception as error:
        text = f"{type(error).__name__} instead of {kind.__name__}: {error}"
    else:
        text = f"no {kind.__name__}"
    texts = gathered(text)
    assert len(set(texts)) == 1, texts
    assert not text.startswith("no "), text
    assert "instead of" not in text, text
    for word in words:
        assert word in text, (word, text)
    return text


class Trial:
    """Trains a model under hvdloss, on this rank's micro-batches, beside one process and plain averaging.

    Args:
        model: with the same values on every rank.
        make: optimizer of parameters (or of groups; called with ``model.parameters()``).
        objective: what the exact optimizer gets.
        losses: per-element losses for the reference, by the test's own formula.
        passes: the largest number of micro-batches.
        penalty: of a model; added to every micro-batch's loss, and once to the reference.
        options: further arguments of DistributedOptimizer.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        make: Callable[[Any], torch.optim.Optimizer] = lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
        *,
        loss: Any = "mse",
        reduction: str = "mean",
        nonfinite: str = "raise",
        losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = mse,
        passes: int = 1,
        penalty: Callable[[torch.nn.Module], torch.Tensor] | None = None,
        tolerance: float | None = None,
        **options: Any,
    ) -> None:
        model.to(DEVICE)
        self.model = model
        self.one = copy.deepcopy(model)
        self.plain = copy.deepcopy(model)
        self.reduction, self.losses, self.penalty, self.passes = reduction, losses, penalty, passes
        self.objective = hvd.Objective(loss, reduction=reduction, nonfinite=nonfinite)
        self.optimizer = hvd.DistributedOptimizer(
            make(model.parameters()),
            model.named_parameters(),
            self.objective,
            backward_passes_per_step=passes,
            **options,
        )
        self.one_optimizer = make(self.one.parameters())
        # Plain Horovod; its learning rate is zero since it follows the one process's parameters.
        self.plain_optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(self.plain.parameters(), lr=0.0),
            self.plain.named_parameters(),
            backward_passes_per_step=passes,
        )
        dtype = next(model.parameters()).dtype
        self.tolerance = EXACT[dtype] if tolerance is None else tolerance
        self.error = 0.0
        self.plain_errors: list[float] = []

    # -- the three ways ------------------------------------------------------------------------------

    def backward(self, step: Step) -> list[float]:
        """Make this rank's backward passes; return the losses that the user saw."""
        seen = []
        for b in step[hvd.rank()]:
            loss = self.objective(self.model(b.x), b.y, weight=b.weight)
            if self.penalty is not None:
                loss = loss + self.penalty(self.model)
            loss.backward()
            seen.append(loss.item())
        return seen

    def reference(self, step: Step) -> torch.Tensor:
        """Set the gradients of one process that sees every sample; return its loss without penalty."""
        whole = union(step)
        keep = (whole.weight != 0).flatten(1).any(1) if whole.weight.dim() > 1 else whole.weight != 0
        self.one_optimizer.zero_grad()
        loss = reduced(
            self.losses(self.one(whole.x[keep]), whole.y[keep]), whole.weight[keep], self.reduction
        )
        (loss + self.penalty(self.one) if self.penalty is not None else loss).backward()
        return loss.detach()

    def averaged(self, step: Step) -> None:
        """Set the gradients of plain Horovod: the average of the ranks' own means."""
        self.plain.load_state_dict(self.one.state_dict())
        self.plain_optimizer.zero_grad()
        rows = [b for b in step[hvd.rank()] if union([[b]]).weight.sum() > 0]
        for b in rows:
            w = union([[b]]).weight
            loss = reduced(self.losses(self.plain(b.x), b.y), w, self.reduction)
            if self.penalty is not None:
                loss = loss + self.penalty(self.plain)
            (loss / len(rows)).backward()
        self.plain_optimizer.synchronize()

    # -- a compared step -----------------------------------------------------------------------------

    def step(self, step: Step, *, plain: bool = True) -> None:
        """Train one step all three ways, and compare."""
        self.optimizer.zero_grad()
        self.backward(step)
        self.optimizer.step()
        self.compare(step, plain=plain)

    def compare(self, step: Step, *, plain: bool = True) -> None:
        """Compare what `optimizer` has just done with one process."""
        mine = gradients(self.model)
        loss = self.reference(step)
        exact = gradients(self.one)
        # Plain Horovod sends each gradient by itself; where ranks share cores, once a trial must do.
        if plain and (hvd.size() == 2 or not self.plain_errors):
            self.averaged(step)
            error = difference(gradients(self.plain), exact)
            self.plain_errors.append(math.inf if math.isnan(error) else error)
            with self.plain_optimizer.skip_synchronize():
                self.plain_optimizer.step()
        self.one_optimizer.step()
        self.near(difference(mine, exact), "gradient")
        self.near(difference(flat(self.model.parameters()), flat(self.one.parameters())), "parameters")
        report = self.optimizer.last_step
        self.near(abs(report.loss - loss.item()) / abs(loss.item()), "loss")
        weight = union(step).weight.double()
        assert abs(report.weight - weight.sum().item()) <= 1e-6 * report.weight, report
        assert report.elements == int((weight != 0).sum()), report

    def near(self, error: float, what: str) -> None:
        """Assert that an error is within the tolerance, and remember the largest."""
        assert error <= self.tolerance, f"{what}: relative difference {error:.3g} > {self.tolerance:.3g}"
        self.error = max(self.error, error)

    def finish(self, *, wrong: bool = True) -> dict[str, float]:
        """Check what all steps had in common; return the errors.

        `wrong` asserts that plain averaging would have failed here, so that the case can tell.
        """
        same_on_all_ranks(self.optimizer.last_step)
        same_on_all_ranks(flat(self.model.parameters()).tolist())
        name = {1e-12: "error, float64", 1e-5: "error, float32"}.get(self.tolerance, "error, tolerated more")
        out = {name: self.error}
        if self.plain_errors:
            out["plain averaging's error"] = max(self.plain_errors)
            if wrong:
                assert hvd.size() == 1 or out["plain averaging's error"] > PLAIN_IS_WRONG, out
        return out


def uneven(base: int = 3, *, micro: int = 1, more: int = 4) -> list[list[int]]:
    """Return counts per rank and micro-batch that differ between ranks: 3, 7, 11, ..."""
    return [[base + more * rank + m for m in range(micro)] for rank in range(hvd.size())]
