"""What measured terms decide: batch shares, the synchronisation period, compression, weights."""

from __future__ import annotations

from hvdloss.terms.policies.compression import AdaptiveCompression
from hvdloss.terms.policies.period import OuterStep, SyncPeriod
from hvdloss.terms.policies.shares import BatchShares, SharedBatches
from hvdloss.terms.policies.weights import ClassBalance, ImportanceWeights, Proximal, RankWeights

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
