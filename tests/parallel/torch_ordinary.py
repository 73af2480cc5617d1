"""Code as users of PyTorch write it: the number of one process, or an error on every rank."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch_support import (
    Batch,
    before_case,
    difference,
    generator,
    gradients,
    here,
    network,
)

import hvdloss.torch as hvd
from hvdloss.errors import ShapeError

__all__ = ["before_case"]

D = torch.float64


def split(n: int, *, first: int | None = None) -> slice:
    """Return this rank's part of `n` rows: rank 0 has `first`, the others share what is left."""
    first = n - hvd.size() + 1 if first is None else first
    cuts = [0, *(first + i * (n - first) // max(1, hvd.size() - 1) for i in range(hvd.size()))]
    cuts[-1] = n
    a, b = list(itertools.pairwise(cuts))[hvd.rank()]
    return slice(a, b)


def classes(seed: int, n: int = 12) -> Batch:
    """Return features and labels, of which some are ignored, unevenly."""
    g = generator(seed)
    y = torch.randint(0, 4, (n,), generator=g)
    y[: n // 2 : 2] = -100
    return Batch(torch.randn(n, 5, generator=g, dtype=D), y)


def one_step(loss, batch: Batch, whole_loss, outputs: int = 4) -> float:
    """Return how far a step's gradient is from one process's, relative to it."""
    model, one = network(generator(5), outputs=outputs), network(generator(5), outputs=outputs)
    objective = loss if isinstance(loss, hvd.Objective) else hvd.Objective(loss)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), objective
    )
    rows = split(len(batch.x))
    objective(model(batch.x[rows]), batch.y[rows]).backward()
    optimizer.synchronize()
    whole_loss(one(batch.x), batch.y).backward()
    return difference(gradients(model), gradients(one))


def case_losses_of_torch_with_weights_and_ignored_labels():
    w = here(torch.tensor([0.5, 3.0, 1.0, 0.2], dtype=D))
    error = 0.0
    for options in (
        {},
        {"weight": w},
        {"ignore_index": 2},
        {"weight": w, "label_smoothing": 0.1},
    ):
        whole = functools.partial(F.cross_entropy, **options)
        batch = classes(3)
        if "ignore_index" in options:
            batch.y.clamp_(min=0)
        named = {("class_weight" if k == "weight" else k): v for k, v in options.items()}
        for loss in (
            nn.CrossEntropyLoss(**options),
            nn.CrossEntropyLoss(**options, reduction="none"),
            whole,
            lambda y, t, whole=whole: whole(y, t),
            hvd.Objective("cross_entropy", **named),
        ):
            error = max(error, one_step(loss, batch, whole))
    assert error < 1e-12
    return {"error, float64": error}


def case_the_first_row_of_a_linear_model_at_zero():
    """Two of four labels are ignored, ranks hold 3 and 1: by hand [-0.25, 0]."""
    x = here(torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1]], dtype=D))
    y = here(torch.tensor([-100, -100, 1, 0]))
    rows = split(4)
    model = nn.Linear(2, 2, bias=False).to(x)
    nn.init.zeros_(model.weight)
    objective = hvd.Objective(nn.CrossEntropyLoss(reduction="none"))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters(), objective
    )
    objective(model(x[rows]), y[rows]).backward()
    optimizer.step()
    torch.testing.assert_close(model.weight[0].cpu(), torch.tensor([0.25, 0.0], dtype=D))


def case_a_mean_of_ones_own_is_refused_on_every_rank():
    """The last rank has one element, of which a mean would be right by itself."""
    x = here(torch.arange(1.0, 5.0, dtype=D))
    v = nn.Parameter(here(torch.zeros((), dtype=D)))
    for loss in (
        lambda y, t: ((y - t) ** 2).mean(),
        lambda y, t: ((y - t) ** 2).sum() / len(y),
    ):
        objective = hvd.Objective(loss)
        try:
            objective(v * x[split(4)], x[split(4)])
        except ShapeError as error:
            assert "one number" in str(error)
        else:
            raise AssertionError("not refused")
    # A mean that torch takes is known by its elements: d/dv of (v x - t)^2 at 0, over t = 0, 0, 0, 8.
    t = here(torch.tensor([0.0, 0, 0, 8], dtype=D))
    objective = hvd.Objective(lambda y, t: F.mse_loss(y, t))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([v], lr=1.0), [("v", v)], objective)
    objective(v * x[split(4)], t[split(4)]).backward()
    optimizer.synchronize()
    assert abs(float(v.grad) + 16) < 1e-12, v.grad
