"""Functions of sums in PyTorch: value and gradient against one process on the union."""

from __future__ import annotations

import itertools
import unittest

import numpy as np
import pytest
import sums_reference as reference
import torch
from torch_support import DEVICE, before_case, difference, flat, gradients, here, network, same_on_all_ranks

import hvdloss
import hvdloss.torch as hvd
from hvdloss.losses import Correlation, SoftDice
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 dist-2")

__all__ = ["before_case"]


class Arithmetic:
    """What `sums_reference` computes with."""

    exp, log, sqrt, sigmoid, maximum = torch.exp, torch.log, torch.sqrt, torch.sigmoid, torch.maximum
    constant = staticmethod(here)

    @staticmethod
    def sum(x, axis=None):
        return x.sum() if axis is None else x.sum(axis)

    @staticmethod
    def softmax(x):
        return x.softmax(-1)

    @staticmethod
    def one_hot(t, n):
        return torch.nn.functional.one_hot(t, n).double()

    @staticmethod
    def numpy(x):
        return x.detach().cpu().numpy()


def split(rng, n, parts):
    """Return where to cut n samples into parts, some of which are empty now and then."""
    return [0, *sorted(rng.integers(0, n + 1, size=parts - 1).tolist()), n]


def averaged(x):
    """Return the average over ranks, as data-parallel optimizers take it."""
    return hvd.allreduce(x, name="averaged", op=hvd.Average)


def predict(x, theta, kind):
    y = torch.tanh(x) @ theta
    return y if reference.outputs(kind) > 1 else y[:, 0]


def definition(name, kind, x, t, w, theta):
    """Return value and gradient of one process."""
    theta = theta.detach().clone().requires_grad_()
    weight = w[:, None] if kind == "classes" else w
    value = reference.LOSSES[name][2](Arithmetic, predict(x, theta, kind), t, weight)
    value.backward()
    return value.item(), theta.grad


def near(a, b, tolerance=1e-11):
    error = difference(torch.as_tensor(a), torch.as_tensor(b))
    assert error <= tolerance, (error, a, b)
    return error


@needs("gloo-2", more="gloo-1 gloo-3 gloo-4 mpi-2 dist-2")
def case_value_and_gradient_over_random_splits():
    rng = np.random.default_rng(1)
    errors, plain = [0.0], []
    for name, (make, kind, formula) in reference.LOSSES.items():
        objective = hvd.Objective(make())
        for trial in range(12):
            x, t, w = (here(a) for a in reference.sample(rng, kind, int(rng.integers(8, 40))))
            order = here(rng.permutation(len(x)))
            x, t, w = x[order], t[order], w[order]
            cut = split(rng, len(x), hvd.size())
            mine = slice(cut[hvd.rank()], cut[hvd.rank() + 1])
            theta = here(rng.normal(size=(5, reference.outputs(kind)))).requires_grad_()
            value = objective(predict(x[mine], theta, kind), t[mine], w[mine])
            value.backward()
            expected, gradient = definition(name, kind, x, t, w, theta)
            same_on_all_ranks(value.item())
            errors += [near(value.item(), expected), near(averaged(theta.grad), gradient)]
            if trial == 0 and kind == "real" and hvd.size() > 1:
                own = theta.detach().clone().requires_grad_()
                half = slice(hvd.rank() * len(x) // hvd.size(), (hvd.rank() + 1) * len(x) // hvd.size())
                formula(Arithmetic, predict(x[half], own, kind), t[half], w[half]).backward()
                plain.append(difference(averaged(own.grad), gradient))
    assert not plain or min(plain) > 1e-3, plain
    return {"error, float64": max(errors), "random splits": 12 * len(reference.LOSSES)} | (
        {"plain averaging's error": max(plain)} if plain else {}
    )


def case_absent_elements_may_be_anything():
    rng = np.random.default_rng(2)
    errors = [0.0]
    for name, (make, kind, _) in reference.LOSSES.items():
        x, t, w = (here(a) for a in reference.sample(rng, kind, 24))
        theta = here(rng.normal(size=(5, reference.outputs(kind)))).requires_grad_()
        cut = [24 * r // hvd.size() for r in range(hvd.size() + 1)]
        mine = slice(cut[hvd.rank()], cut[hvd.rank() + 1])
        absent = (w if w.dim() == 1 else w[:, 0]) == 0
        y = predict(x, theta, kind)
        y = torch.where(absent[:, None] if y.dim() > 1 else absent, torch.nan, y)
        value = hvd.Objective(make())(y[mine], t[mine], w[mine])
        value.backward()
        keep = ~absent
        expected, gradient = definition(name, kind, x[keep], t[keep], w[keep], theta)
        errors += [near(value.item(), expected), near(averaged(theta.grad), gradient)]
    return {"error, float64": max(errors)}


def trained(objective, passes, calls, penalty=True, steps=4):
    """Train with DistributedOptimizer; return the model and its optimizer."""
    model = network(torch.Generator().manual_seed(3))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9),
        model.named_parameters(),
        objective,
        backward_passes_per_step=passes,
    )
    for step in range(steps):
        optimizer.zero_grad()
        calls(model, step, lambda loss: (loss + penal(model) if penalty else loss).backward())
        optimizer.step()
    return model, optimizer


def penal(model):
    return 0.01 * sum((p * p).sum() for p in model.parameters())


def alone(step_loss, steps=4):
    model = network(torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        loss = step_loss(model, step)
        (loss + penal(model)).backward()
        optimizer.step()
    return model, loss.item()


def concordance(y, t, w):
    return reference.LOSSES["concordance"][2](Arithmetic, y, t, w)


def steps_of(step, parts):
    rng = np.random.default_rng(100 + step)
    x, t, w = (here(a) for a in reference.sample(rng, "real", 40))
    cut = split(rng, 40, parts)
    return [(x[a:b], t[a:b], w[a:b]) for a, b in itertools.pairwise(cut)], (x, t, w)


def case_trained_with_penalty_momentum_and_a_report():
    objective = hvd.Objective("concordance")

    def calls(model, step, backward):
        x, t, w = steps_of(step, hvd.size())[0][hvd.rank()]
        backward(objective(model(x)[:, 0], t, w))

    model, optimizer = trained(objective, 1, calls)
    one, loss = alone(lambda m, s: concordance(m(steps_of(s, 1)[1][0])[:, 0], *steps_of(s, 1)[1][1:]))
    error = near(flat(model.parameters()), flat(one.parameters()))
    report = optimizer.last_step
    near(report.loss, loss)
    near(report.weight, steps_of(3, 1)[1][2].sum().item())
    assert report.elements == int((steps_of(3, 1)[1][2] != 0).sum())
    same_on_all_ranks(repr(report))
    return {"error, float64": error}


@needs("gloo-2", more="gloo-1 gloo-3 gloo-4 mpi-2 dist-2")
def case_sums_over_micro_batches_however_many_each_rank_has():
    objective = hvd.Objective("concordance")
    most = 3

    def calls(model, step, backward):
        counts = [1 + (rank + step) % most for rank in range(hvd.size())]
        parts = steps_of(step, sum(counts))[0]
        first = sum(counts[: hvd.rank()])
        mine = parts[first : first + counts[hvd.rank()]]
        with torch.no_grad():
            total = objective.total(sum(objective.sums(model(x)[:, 0], t, w) for x, t, w in mine))
        for x, t, w in mine:
            value = objective(model(x)[:, 0], t, w, total=total)
            backward(value)
        x, t, w = steps_of(step, 1)[1]
        near(value.item(), concordance(model(x)[:, 0], t, w).item())

    model, _ = trained(objective, most, calls, penalty=False)

    def one(m, s):
        x, t, w = steps_of(s, 1)[1]
        return concordance(m(x)[:, 0], t, w) - penal(m)

    reference_model, _ = alone(one)
    return {"error, float64": near(flat(model.parameters()), flat(reference_model.parameters()))}


def case_each_micro_batch_is_a_whole_of_its_own_without_total():
    objective = hvd.Objective("concordance")

    def calls(model, step, backward):
        parts = steps_of(step, 2 * hvd.size())[0]
        for micro in range(2):
            x, t, w = parts[micro * hvd.size() + hvd.rank()]
            backward(objective(model(x)[:, 0], t, w))

    def whole(step, micro):
        parts = steps_of(step, 2 * hvd.size())[0][micro * hvd.size() : (micro + 1) * hvd.size()]
        return [torch.cat(one) for one in zip(*parts, strict=True)]

    def usable(step):
        return all(whole(step, micro)[2].count_nonzero() > 2 for micro in range(2))

    assert all(usable(step) for step in range(4)), [usable(step) for step in range(4)]
    model, _ = trained(objective, 2, calls)

    def one(m, s):
        return sum(concordance(m(x)[:, 0], t, w) / 2 for x, t, w in (whole(s, 0), whole(s, 1)))

    return {"error, float64": near(flat(model.parameters()), flat(alone(one)[0].parameters()))}


def case_with_data_skew_and_its_weights():
    """Terms weigh and see the elements of a loss that is no mean."""
    from hvdloss.terms.policies import ClassBalance

    term = hvdloss.DataSkew(classes=2, policies=(ClassBalance(),))
    objective = hvd.Objective(SoftDice(), terms=(term,))
    model = network(torch.Generator().manual_seed(3))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.2), model.named_parameters(), objective
    )
    rng = np.random.default_rng(5)
    for _ in range(4):
        x, t, _ = (here(a) for a in reference.sample(rng, "binary", 20 * hvd.size()))
        mine = slice(20 * hvd.rank(), 20 * hvd.rank() + 20)
        optimizer.zero_grad()
        objective(model(x[mine])[:, 0], t[mine].long()).backward()
        optimizer.step()
    skew = optimizer.last_step.terms["skew"].values
    assert hvd.size() == 1 or max(skew) > 0.01, skew
    same_on_all_ranks(flat(model.parameters()).tolist())


def case_second_derivatives_are_refused():
    objective = hvd.Objective(Correlation())
    y = torch.randn(5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    value = objective(y, torch.arange(5.0, device=DEVICE))
    with pytest.raises(hvdloss.ConfigError, match="create_graph=True"):
        torch.autograd.grad(value, y, create_graph=True)


@needs("gloo-2", more="gloo-1 gloo-3 gloo-4 mpi-2 dist-2")
def case_one_rank_is_to_blame_for_what_is_not_finite():
    objective = hvd.Objective("correlation")
    model = network(torch.Generator().manual_seed(3))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.2), model.named_parameters(), objective
    )
    (x, t, w), culprit = steps_of(0, hvd.size())[1], hvd.size() - 1
    y = model(x)[:, 0]
    if hvd.rank() == culprit:
        y = y * torch.inf
    before = flat(model.parameters())
    objective(y, t, w).backward()
    with pytest.raises(hvdloss.NonFiniteLossError) as caught:
        optimizer.step()
    text = str(caught.value)
    assert f"rank {culprit}" in text, text
    assert hvd.size() == 1 or "rank 0" not in text, text
    same_on_all_ranks(text)
    assert torch.equal(before, flat(model.parameters()))
    assert gradients(model) is not None


def case_inside_a_compiled_function():
    objective = hvd.Objective("concordance")
    rng = np.random.default_rng(11)
    x, t, w = (here(a) for a in reference.sample(rng, "real", 30))
    theta = torch.ones(5, 1, dtype=torch.float64, device=DEVICE, requires_grad=True)
    mine = slice(30 * hvd.rank() // hvd.size(), 30 * (hvd.rank() + 1) // hvd.size())

    @torch.compile(backend="aot_eager")
    def loss(x, t, w):
        return objective(torch.tanh(x @ theta)[:, 0], t, w) * 2

    loss(x[mine], t[mine], w[mine]).backward()
    own = theta.detach().clone().requires_grad_()
    (concordance(torch.tanh(x @ own)[:, 0], t, w) * 2).backward()
    return {"error, float64": near(averaged(theta.grad), own.grad)}


@needs(more="gloo-3")
def case_a_process_set():
    if hvd.size() < 3:
        raise unittest.SkipTest("a set of some of them needs three")
    members = hvd.add_process_set([0, hvd.size() - 1])
    if members.included():
        x, t, w = (here(a) for a in reference.sample(np.random.default_rng(9), "real", 30))
        theta = torch.ones(5, 1, dtype=torch.float64, device=DEVICE, requires_grad=True)
        mine = slice(0, 11) if members.rank() == 0 else slice(11, 30)
        objective = hvd.Objective("r2", process_set=members)
        value = objective(predict(x[mine], theta, "real"), t[mine], w[mine])
        value.backward()
        expected, gradient = definition("r2", "real", x, t, w, theta)
        near(value.item(), expected)
        near(hvd.allreduce(theta.grad, name="set", op=hvd.Average, process_set=members), gradient)
    hvd.remove_process_set(members)
