"""Metrics of torchmetrics over all ranks equal those of one process that saw all samples."""

from __future__ import annotations

import pytest
import torch
import torchmetrics.classification as classification
import torchmetrics.regression as regression
from torch_support import DEVICE, before_case, generator, here, same_on_all_ranks
from torchmetrics import MeanMetric, MetricCollection

import hvdloss
import hvdloss.torch as hvd
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 dist-2")

__all__ = ["before_case"]

KINDS = {
    "accuracy": lambda: classification.MulticlassAccuracy(3, average="micro"),
    "macro f1": lambda: classification.MulticlassF1Score(3, average="macro"),
    "confusion": lambda: classification.MulticlassConfusionMatrix(3),
    "auroc": lambda: classification.MulticlassAUROC(3),  # exact: keeps all scores
    "auroc, binned": lambda: classification.MulticlassAUROC(3, thresholds=50),
    "calibration": lambda: classification.MulticlassCalibrationError(3, n_bins=7),
}
REAL = {
    "mae": regression.MeanAbsoluteError,
    "rmse": lambda: regression.MeanSquaredError(squared=False),
    "r2": regression.R2Score,
    "spearman": regression.SpearmanCorrCoef,
    "pearson": regression.PearsonCorrCoef,
}


def parts(seed, kinds):
    """Return all samples, and where each rank's lie; one rank has none, the others uneven numbers."""
    g = generator(seed)
    n = 20 * hvd.size()
    y = torch.randn(n, 3, generator=g, dtype=torch.float64)
    target = torch.randint(0, 3, (n,), generator=g)
    cut = [0, *sorted(torch.randint(0, n, (hvd.size() - 1,), generator=g).tolist()), n]
    if hvd.size() > 1:
        cut[1] = 0  # rank 0 sees nothing
    return here(y), here(target), slice(cut[hvd.rank()], cut[hvd.rank() + 1])


def near(a, b, name):
    error = (torch.as_tensor(a).double().cpu() - torch.as_tensor(b).double().cpu()).abs().max().item()
    assert error < 1e-6, (name, a, b)  # torchmetrics keeps some states in float32
    return error


def feed(metric, prediction, target):
    """Update in two goes, if there is anything."""
    for s in (slice(0, len(target) // 2), slice(len(target) // 2, len(target))):
        if len(target[s]):
            metric.update(prediction[s], target[s])
    return metric


def case_classification_equals_one_process():
    errors = []
    for seed, (name, make) in enumerate(KINDS.items()):
        y, target, mine = parts(seed, 3)
        ours = feed(hvd.synchronized(make().to(DEVICE)), y[mine].softmax(-1), target[mine])
        value = ours.compute()
        errors.append(near(value, feed(make().to(DEVICE), y.softmax(-1), target).compute(), name))
        same_on_all_ranks(value.tolist())
        assert sum(map(len, [target[mine]])) == len(target[mine])
    return {"error": max(errors)}


def case_regression_equals_one_process():
    errors = []
    for seed, (name, make) in enumerate(REAL.items()):
        y, _, mine = parts(seed, 3)
        prediction, target = y[:, 0].float(), (y[:, 0] + y[:, 1]).float()
        ours = feed(hvd.synchronized(make().to(DEVICE)), prediction[mine], target[mine])
        errors.append(near(ours.compute(), feed(make().to(DEVICE), prediction, target).compute(), name))
    return {"error": max(errors)}


def case_after_computing_each_goes_on_with_its_own():
    metric = hvd.synchronized(MeanMetric().to(DEVICE))
    total, count = 0.0, 0
    for step in range(3):
        values = here(torch.arange(1.0 + hvd.rank())) + step
        metric.update(values)
        for rank in range(hvd.size()):
            total, count = total + (torch.arange(1.0 + rank) + step).sum().item(), count + rank + 1
        near(metric.compute(), total / count, "mean")
    metric.reset()
    metric.update(float(hvd.rank()))
    near(metric.compute(), (hvd.size() - 1) / 2, "mean")


def case_collections_and_modules_that_hold_metrics():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)
            self.scores = MetricCollection(
                {"mae": regression.MeanAbsoluteError(), "rmse": regression.MeanSquaredError(squared=False)}
            )

    model = hvd.synchronized(Model().to(DEVICE))
    y, _, mine = parts(9, 3)
    feed(model.scores, y[mine, 0], y[mine, 1])
    found = model.scores.compute()
    near(found["mae"], (y[:, 0] - y[:, 1]).abs().mean(), "mae")
    near(found["rmse"], (y[:, 0] - y[:, 1]).square().mean().sqrt(), "rmse")
    with pytest.raises(hvdloss.ConfigError, match="Linear is no metric"):
        hvd.synchronized(torch.nn.Linear(1, 1))
