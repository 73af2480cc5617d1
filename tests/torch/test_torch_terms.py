"""Terms in one process."""

from __future__ import annotations

import pytest
import torch

import hvdloss
import hvdloss.torch as hvd
from hvdloss.terms.policies import BatchShares, ImportanceWeights, OuterStep, SyncPeriod


@pytest.fixture(autouse=True)
def initialised():
    hvd.init()


def test_one_rank_has_no_skew_and_exchanges_with_nobody():
    terms = (
        hvdloss.CommunicationCost(
            policies=(SyncPeriod(4, outer=OuterStep()), BatchShares(8)), calibrate=True
        ),
        hvdloss.DataSkew(classes=3, policies=(ImportanceWeights("uniform"),)),
    )
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 3)
    objective = hvd.Objective("cross_entropy", terms=terms)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)
    for step in range(1, 7):
        optimizer.zero_grad()
        objective(model(torch.randn(8, 4)), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])).backward()
        optimizer.step()
        report = optimizer.last_step
        assert report.step == step  # every step is exact
        assert report.terms["skew"].values == [0.0]
    # Five, two and one of three classes weigh alike by now.
    assert report.terms["skew"].details["effective_sample_size"][0] == pytest.approx(
        1 / (8 / 9 * (1 / 5 + 1 / 2 + 1)), rel=1e-9
    )
    assert terms[0].policies[1].sizes.tolist() == [8]
    assert objective.controller.decisions == []
    optimizer.exchange()  # nothing to do


def test_closures_cannot_take_local_steps():
    model = torch.nn.Linear(2, 1)
    objective = hvd.Objective("mse", terms=(hvdloss.CommunicationCost(policies=(SyncPeriod(4),)),))
    optimizer = hvd.DistributedOptimizer(torch.optim.LBFGS(model.parameters()), objective=objective)
    with pytest.raises(hvdloss.UsageError, match="SyncPeriod"):
        optimizer.step(lambda: objective(model(torch.ones(1, 2)), torch.ones(1, 1)))
