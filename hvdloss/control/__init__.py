"""What measured terms decide: batch shares, the synchronisation period, compression, weights."""

from __future__ import annotations

from hvdloss.control.compression import AdaptiveCompression
from hvdloss.control.period import OuterStep, SyncPeriod
from hvdloss.control.shares import BatchShares, SharedBatches
from hvdloss.control.weights import ClassBalance, ImportanceWeights, Proximal, RankWeights

__all__ = [
    "AdaptiveCompression",
    "BatchShares",
    "ClassBalance",
    "ImportanceWeights",
    "OuterStep",
    "Proximal",
    "RankWeights",
    "SharedBatches",
    "SyncPeriod",
]
