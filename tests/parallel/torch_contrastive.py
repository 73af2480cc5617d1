"""Contrastive losses in PyTorch: value and every gradient against one process on the union."""

from __future__ import annotations

import math
import unittest

import contrastive_reference as reference
import numpy as np
import pytest
import torch
from torch_support import DEVICE, before_case, difference, here, same_on_all_ranks

import hvdloss.torch as hvd
from hvdloss.errors import ShapeError, UsageError
from hvdloss.losses import InfoNCE, SigLIP, SupervisedContrastive
from hvdloss.losses.base import OneRank
from hvdloss.torch.collectives import group_of
from hvdloss.torch.ops import TorchOps
from tests.ranks import needs

NEEDS = needs("gloo-3")

__all__ = ["before_case"]

OPS = TorchOps()


class Arithmetic:
    """What `contrastive_reference` computes with."""

    exp, log, sqrt = torch.exp, torch.log, torch.sqrt
    constant = staticmethod(here)

    @staticmethod
    def transpose(x):
        return x.t()

    @staticmethod
    def sum(x, axis=None):
        return x.sum() if axis is None else x.sum(axis)


def near(a, b, what, tolerance=1e-11):
    a, b = torch.as_tensor(a).detach(), torch.as_tensor(b).detach()
    error = difference(a, b) if b.numel() else 0.0
    assert error <= tolerance, (what, error, a, b)
    return error


def definition(name, batch):
    """Return value and gradients of one process that sees the present rows only."""
    loss, formula, _ = reference.LOSSES[name]
    keep = batch["w"] != 0
    leaves = {
        k: torch.tensor(batch[k], dtype=torch.float64, device=DEVICE, requires_grad=True)
        for k in ("x", "y", "scale", "bias")
    }
    value = formula(
        Arithmetic,
        leaves["x"][keep],
        leaves["y"][keep],
        here(batch["w"][keep]),
        labels=batch["labels"][keep],
        **{k: leaves[k] for k in reference.LOSSES[name][2] if k != "y"},
        **reference.settings(loss),
    )
    value.backward()
    return value.item(), {k: v.grad for k, v in leaves.items()}


def distributed(name, batch, mine, group, dtype=torch.float64):
    """Return value and gradients of this rank's rows."""
    loss, _, extra = reference.LOSSES[name]
    leaves = {
        k: torch.tensor(
            batch[k][mine] if k in "xy" else batch[k], dtype=dtype, device=DEVICE, requires_grad=True
        )
        for k in ("x", *extra)
    }
    prediction = tuple(leaves.values()) if extra else leaves["x"]
    w = torch.tensor(batch["w"][mine], dtype=dtype, device=DEVICE)
    value = loss.value(OPS, group, prediction, here(batch["labels"][mine]), w)
    value.backward()
    return value.item(), {k: v.grad for k, v in leaves.items()}


def summed(x, group):
    return group.all_reduce(x, "summed")


def compare(name, batch, cut, group=None, tolerance=1e-11, dtype=torch.float64):
    group = group or group_of()
    mine = slice(cut[group.rank], cut[group.rank + 1])
    value, grads = distributed(name, batch, mine, group, dtype)
    expected, exact = definition(name, batch)
    errors = [near(value, expected, f"{name}: value", tolerance)]
    for key, grad in grads.items():
        ours, theirs = (grad, exact[key][mine]) if key in "xy" else (summed(grad, group), exact[key])
        # A number's gradient is a sum of all pairs', which may cancel: in float32 to within its terms.
        scale = max(exact[key].abs().max().item(), 1.0 if dtype == torch.float32 else 0.0)
        error = (ours - theirs).abs().max().item() / scale if theirs.numel() else 0.0
        assert error <= tolerance, (name, key, error)
        errors.append(error)
    return max(errors)


@needs("gloo-3", more="gloo-2 gloo-1 gloo-4 mpi-2")
def case_value_and_gradients_over_random_splits():
    rng = np.random.default_rng(1)
    worst = 0.0
    for trial in range(15):
        batch = reference.shuffled(rng, reference.sample(rng, weighted=trial % 3 > 0))
        cut = reference.split(rng, len(batch["w"]), hvd.size())
        for name in reference.LOSSES:
            worst = max(worst, compare(name, batch, cut))
    return {"error, float64": worst, "random splits": 15 * len(reference.LOSSES)}


@needs("gloo-3", more="gloo-2 gloo-1 gloo-4 mpi-2")
def case_absent_rows_may_be_anything():
    rng = np.random.default_rng(2)
    worst = 0.0
    for _ in range(4):
        batch = reference.shuffled(rng, reference.sample(rng))
        absent = batch["w"] == 0
        batch["x"][absent], batch["y"][absent] = np.nan, np.inf
        cut = reference.split(rng, len(batch["w"]), hvd.size())
        for name in reference.LOSSES:
            worst = max(worst, compare(name, batch, cut))
    return {"error, float64": worst}


def case_all_rows_on_one_rank():
    rng = np.random.default_rng(3)
    batch = reference.sample(rng)
    n = len(batch["w"])
    for who in range(hvd.size()):
        cut = [0] * (who + 1) + [n] * (hvd.size() - who)
        for name in reference.LOSSES:
            compare(name, batch, cut)


def case_float32():
    rng = np.random.default_rng(4)
    worst = 0.0
    for _ in range(4):
        batch = reference.shuffled(rng, reference.sample(rng))
        cut = reference.split(rng, len(batch["w"]), hvd.size())
        for name in reference.LOSSES:
            worst = max(worst, compare(name, batch, cut, tolerance=2e-5, dtype=torch.float32))
    return {"error, float32": worst}


def case_a_large_scale():
    """What overflows if written down carelessly."""
    rng = np.random.default_rng(5)
    batch = reference.sample(rng)
    batch["scale"] = math.log(2000.0)
    x, y = (torch.tensor(batch[k], device=DEVICE, requires_grad=True) for k in "xy")
    for loss, rest in ((InfoNCE(), ()), (SigLIP(), (here(-10.0),))):
        value = loss.value(OPS, group_of(), (x, y, here(batch["scale"]), *rest), None, None)
        value.backward()
        assert math.isfinite(value.item())
        assert x.grad.isfinite().all()


@needs("gloo-3", more="gloo-2 gloo-1 gloo-4 mpi-2")
def case_no_weight_at_all():
    rng = np.random.default_rng(6)
    batch = reference.sample(rng)
    batch["w"][:] = 0.0
    cut = reference.split(rng, len(batch["w"]), hvd.size())
    mine = slice(cut[hvd.rank()], cut[hvd.rank() + 1])
    for name in reference.LOSSES:
        value, grads = distributed(name, batch, mine, group_of())
        assert math.isnan(value)
        assert all((g == 0).all() for g in grads.values()), (name, grads)


def case_anchors_without_positives_are_left_out():
    loss = SupervisedContrastive()
    z = torch.eye(4, dtype=torch.float64, device=DEVICE)[: 2 + hvd.rank()].requires_grad_()
    alone = torch.arange(len(z), device=DEVICE) + 10 * hvd.rank()
    value = loss.value(OPS, group_of(), z, alone, None)
    value.backward()
    assert math.isnan(value.item())
    assert (z.grad == 0).all()
    alone[0] = -1  # one positive on each other rank
    value = loss.value(OPS, group_of(), z, alone, None)
    if hvd.size() > 1:
        assert math.isfinite(value.item())


@needs("gloo-3", more="gloo-2 gloo-1 gloo-4 mpi-2")
def case_an_objective_of_them():
    """Averaged by an optimizer's reduction, an objective's gradient is that of the whole."""
    rng = np.random.default_rng(7)
    errors = []
    for name, (loss, formula, extra) in reference.LOSSES.items():
        batch = reference.shuffled(rng, reference.sample(rng))
        cut = reference.split(rng, len(batch["w"]), hvd.size())
        mine = slice(cut[hvd.rank()], cut[hvd.rank() + 1])
        theta = here(rng.normal(size=(3, 3))).requires_grad_()
        scalars = [
            torch.tensor(batch[k], dtype=torch.float64, device=DEVICE, requires_grad=True)
            for k in extra
            if k != "y"
        ]

        def predict(rows, theta=theta, batch=batch, extra=extra, scalars=scalars):
            x = here(batch["x"][rows]) @ theta
            return (x, here(batch["y"][rows]) @ theta.t(), *scalars) if extra else x

        value = hvd.Objective(loss)(predict(mine), here(batch["labels"][mine]), here(batch["w"][mine]))
        leaves = [theta, *scalars]
        ours = [
            hvd.allreduce(g.contiguous(), name=f"g{i}", op=hvd.Average)
            for i, g in enumerate(torch.autograd.grad(value, leaves))
        ]
        keep = np.flatnonzero(batch["w"])
        given = predict(keep)
        exact = formula(
            Arithmetic,
            given[0] if extra else given,
            given[1] if extra else None,
            here(batch["w"][keep]),
            labels=batch["labels"][keep],
            **dict(zip([k for k in extra if k != "y"], scalars, strict=True)),
            **reference.settings(loss),
        )
        same_on_all_ranks(value.item())
        errors.append(near(value, exact, name))
        for a, b in zip(ours, torch.autograd.grad(exact, leaves), strict=True):
            errors.append(near(a, b, name))
    return {"error, float64": max(errors)}


def case_parity_with_numpy():
    """One core: the values are those of NumPy's arrays in one process."""
    batch = reference.sample(np.random.default_rng(8))
    for name, (loss, _, extra) in reference.LOSSES.items():
        given = [torch.tensor(batch[k], dtype=torch.float64, device=DEVICE) for k in ("x", *extra)]
        labels, w = here(batch["labels"]), here(batch["w"])
        value = loss.value(OPS, OneRank(), tuple(given) if extra else given[0], labels, w).item()
        arrays = [batch[k] for k in ("x", *extra)]
        other = float(loss.of(tuple(arrays) if extra else arrays[0], batch["labels"], batch["w"]))
        assert abs(value - other) <= 1e-13 * abs(other), (name, value, other)


def case_process_sets():
    if hvd.size() < 3:
        raise unittest.SkipTest("needs three ranks")
    members = hvd.add_process_set([0, 2])
    if members.included():
        rng = np.random.default_rng(8)
        group = group_of(members)
        for _ in range(3):
            batch = reference.sample(rng)
            for name in reference.LOSSES:
                compare(name, batch, reference.split(rng, len(batch["w"]), group.size), group)
    hvd.barrier()
    hvd.remove_process_set(members)


def case_second_derivatives():
    """InfoNCE has them; SigLIP says that it has not."""
    rng = np.random.default_rng(9)
    batch = reference.sample(rng)
    cut = reference.split(rng, len(batch["w"]), hvd.size())
    mine = slice(cut[hvd.rank()], cut[hvd.rank() + 1])

    def penalty(x, value):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        return torch.autograd.grad((grad**2).sum(), x)[0]

    x, y, w = (here(batch[k]) for k in "xyw")
    own = x[mine].clone().requires_grad_()
    ours = penalty(own, InfoNCE(0.5).value(OPS, group_of(), (own, y[mine]), None, w[mine]))
    keep = w != 0
    whole = x.clone().requires_grad_()
    exact = penalty(whole, reference.info_nce(Arithmetic, whole[keep], y[keep], w[keep], temperature=0.5))
    assert not len(ours) or (ours - exact[mine]).abs().max() <= 1e-11 * exact.abs().max()
    scalars = here(1.0), here(0.0)
    with pytest.raises(UsageError, match="cannot be differentiated again"):
        penalty(own, SigLIP().value(OPS, group_of(), (own, y[mine], *scalars), None, w[mine]))


def case_errors():
    x, group = torch.ones(2, 3), group_of()
    for loss, prediction, text in (
        (InfoNCE(), x, "prediction must be .x, y. or .x, y, log_scale."),
        (InfoNCE(), (x, x, x), "log_scale of shape"),
        (InfoNCE(), (x, x[:1]), "features of shape"),
        (SigLIP(), (x, x), r"prediction must be .x, y, log_scale, bias., not a tuple of 2"),
        (SigLIP(), (x, x, x, 0.0), "log_scale of shape"),
        (SupervisedContrastive(), x[0], "features of shape"),
    ):
        with pytest.raises(ShapeError, match=f"{text}.*rank {hvd.rank()}"):
            loss.value(OPS, group, prediction, torch.zeros(2), None)
    with pytest.raises(ShapeError, match="target of shape"):
        SupervisedContrastive().value(OPS, group, x, torch.zeros(3), None)
    with pytest.raises(ShapeError, match="weight of shape"):
        InfoNCE().value(OPS, group, (x, x), None, torch.ones(3))
