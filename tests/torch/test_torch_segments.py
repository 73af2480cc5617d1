"""Packed sequences in PyTorch, in one process: what an objective takes, and what it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hvdloss.torch as hvd
from hvdloss.errors import ConfigError, ShapeError
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.terms import CommunicationCost, DataSkew
from hvdloss.terms.policies.period import SyncPeriod
from hvdloss.terms.policies.weights import ImportanceWeights
from hvdloss.torch.ops import TorchOps

D = torch.float64
LENGTHS = [3, 1, 4]
y = torch.rand(10, dtype=D)
WEIGHING = DataSkew(classes=2, policies=(ImportanceWeights("global"),))
IDS = torch.tensor([5, 5, 5, 2, 9, 9, 9, 9, -1, -1])


@pytest.fixture
def batch():
    """Return logits (10, 6), of which the last two tokens are padding, and targets, one of them ignored."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 6, dtype=D, generator=g, requires_grad=True)
    target = torch.randint(0, 6, (10,), generator=g)
    target[6] = -100
    return logits, target


def unpacked(logits, target):
    return torch.stack(
        [
            F.cross_entropy(x, t)
            for x, t in zip(logits[:8].split(LENGTHS), target[:8].split(LENGTHS), strict=True)
        ]
    ).mean()


@pytest.mark.parametrize("form", ["ids", "lengths", "linked", "compiled"])
def test_packed_targets_give_the_loss_of_the_unpacked_ones(batch, form):
    logits, target = batch
    objective = hvd.Objective("cross_entropy", reduction="sequence_mean")
    call = torch.compile(objective, backend="eager") if form == "compiled" else objective
    with torch.no_grad():
        logits[8:] = torch.nan  # padding may be anything
    segments, weight, rows = IDS.int(), None, slice(None)
    if form == "lengths":
        segments, rows = hvd.Segments(cu_seqlens=torch.tensor([0, 3, 4, 8], dtype=torch.int32)), slice(8)
    elif form == "linked":
        weight = (target != -100).float()
        (segments,) = hvd.link_segments([IDS], [weight])
        assert segments.sequences() == pytest.approx(3, rel=1e-15)
    loss = call(logits[rows], target[rows], weight, segments=segments)
    right = unpacked(*batch)
    (found,), (expected,) = (torch.autograd.grad(one, logits) for one in (loss, right))
    torch.testing.assert_close(loss, right, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_ids_of_rows_of_a_batch(batch):
    logits, target = batch
    objective = hvd.Objective("cross_entropy", reduction="sequence_mean")
    two = logits.reshape(2, 5, 6).movedim(-1, 1)  # cut inside the sequence 9
    loss = objective(two, target.reshape(2, 5), segments=IDS.reshape(2, 5))
    torch.testing.assert_close(loss, unpacked(*batch), rtol=1e-12, atol=0)


def test_segment_totals_are_those_of_numpy():
    ids = torch.tensor([[7, -3, 7], [2**60, 0, -3]])
    w = torch.rand(2, 3, dtype=D)
    found = TorchOps().segment_totals(ids, w)
    np.testing.assert_allclose(found, NumpyOps().segment_totals(ids.numpy(), w.numpy()), rtol=1e-15)
    assert TorchOps().segment_totals(ids[:0], w[:0]).shape == (0, 3)


@pytest.mark.parametrize("form", ["ids", "lengths", "on the host"])
def test_nobody_waits_for_a_device(form):
    """On the meta device, whose values cannot be looked at."""
    meta = torch.device("meta")
    ids = torch.zeros(8, dtype=torch.long, device="cpu" if form == "on the host" else meta)
    groups = ids
    given = hvd.Segments(ids, groups=groups, weight=torch.ones(8, device=ids.device))
    if form == "lengths":
        given = hvd.Segments(cu_seqlens=torch.zeros(4, dtype=torch.int32, device=meta))
    y = torch.empty(8, device=meta, requires_grad=True)
    hvd.Objective("mse", reduction="sequence_mean")(y, torch.empty(8, device=meta), segments=given).backward()
    assert y.grad.shape == (8,)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: hvd.Objective("mse")(y, y, segments=IDS[:3]), ShapeError, "ids of shape (3,)"),
        (lambda: hvd.Objective("mse")(y, y, segments=y), ConfigError, "ids of dtype torch.float64"),
        (lambda: hvd.Objective("mse")(y, y, segments=IDS > 0), ConfigError, "ids of dtype torch.bool"),
        (
            lambda: hvd.Objective("mse")(y, y, segments=hvd.Segments(IDS, groups=IDS)),
            ConfigError,
            "groups are for reduction=\"sequence_mean\", and mse has reduction='mean'",
        ),
        (
            lambda: hvd.Objective("soft_dice")(y, y.round(), segments=IDS),
            ConfigError,
            "segments= is for losses of elements",
        ),
        (
            lambda: hvd.Objective("mse", reduction="sequence_mean")(y, y),
            ShapeError,
            "for packed sequences pass segments=",
        ),
        (
            lambda: hvd.Objective(
                "mse", terms=(DataSkew(classes=2, policies=(ImportanceWeights("global"),)),)
            )(y, y, segments=hvd.link_segments([IDS])[0]),
            ConfigError,
            "terms that weigh elements with linked segments",
        ),
        (
            lambda: hvd.Objective("mse", nonfinite="drop")(y, y, segments=shared()),
            ConfigError,
            'nonfinite="drop" with sequences that may have pieces on several ranks',
        ),
        (
            lambda: hvd.Objective("mse", terms=(CommunicationCost(policies=(SyncPeriod(4),)),))(
                y, y, segments=shared()
            ),
            ConfigError,
            "SyncPeriod with sequences that may have pieces on several ranks",
        ),
        (lambda: hvd.link_segments(IDS), ConfigError, "segments must be a list"),
    ],
)
def test_what_cannot_be_is_refused(make, kind, words):
    with pytest.raises(kind, match=re.escape(words)):
        make()


def shared():
    hvd.init()
    return hvd.link_segments([IDS], over=hvd.global_process_set)[0]
