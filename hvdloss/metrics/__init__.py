"""Metrics of all ranks' samples, exactly: statistics are merged over ranks, and finished once."""

from hvdloss.metrics.base import Elements, Metric
from hvdloss.metrics.classification import (
    F1,
    Accuracy,
    BrierScore,
    CalibrationError,
    ConfusionMatrix,
    FBeta,
    LogLoss,
    Precision,
    Recall,
)
from hvdloss.metrics.collection import Metrics
from hvdloss.metrics.ranking import AUC, AveragePrecision, Estimate
from hvdloss.metrics.regression import MAE, MSE, R2, RMSE, Mean

__all__ = [
    "AUC",
    "F1",
    "MAE",
    "MSE",
    "R2",
    "RMSE",
    "Accuracy",
    "AveragePrecision",
    "BrierScore",
    "CalibrationError",
    "ConfusionMatrix",
    "Elements",
    "Estimate",
    "FBeta",
    "LogLoss",
    "Mean",
    "Metric",
    "Metrics",
    "Precision",
    "Recall",
]
