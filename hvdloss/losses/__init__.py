"""Losses that need every rank: functions of sums, contrast over the global batch, split classes."""

from __future__ import annotations

from hvdloss.losses.base import GlobalLoss, Group
from hvdloss.losses.contrastive import InfoNCE, SigLIP, SupervisedContrastive
from hvdloss.losses.sums import (
    R2,
    CalibrationError,
    CalibrationRatio,
    Concordance,
    Correlation,
    DonskerVaradhan,
    FBeta,
    Jaccard,
    SoftDice,
    SumsLoss,
    Tilted,
    Tversky,
)

__all__ = [
    "NAMED",
    "R2",
    "CalibrationError",
    "CalibrationRatio",
    "Concordance",
    "Correlation",
    "DonskerVaradhan",
    "FBeta",
    "GlobalLoss",
    "Group",
    "InfoNCE",
    "Jaccard",
    "SigLIP",
    "SoftDice",
    "SumsLoss",
    "SupervisedContrastive",
    "Tilted",
    "Tversky",
]

# What an objective also knows by name, with its arguments' defaults.
NAMED: dict[str, type[GlobalLoss]] = {
    "soft_dice": SoftDice,
    "jaccard": Jaccard,
    "tversky": Tversky,
    "f_beta": FBeta,
    "correlation": Correlation,
    "concordance": Concordance,
    "r2": R2,
    "donsker_varadhan": DonskerVaradhan,
    "calibration_ratio": CalibrationRatio,
    "calibration_error": CalibrationError,
    "info_nce": InfoNCE,
    "supervised_contrastive": SupervisedContrastive,
    "siglip": SigLIP,
}
