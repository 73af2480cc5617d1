"""hvdloss: the exact weighted loss and gradient of all samples of a step, over Horovod.

This package is the framework-neutral core; ``import hvdloss`` imports no framework. Use it through
``hvdloss.torch``, which stands in for ``horovod.torch``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdloss._util.lazy import lazy_module
from hvdloss._version import __version__

if TYPE_CHECKING:
    from hvdloss.comm.communicator import OneProcess, SimulatedRank, simulate
    from hvdloss.errors import (
        AgreementError,
        CheckpointError,
        ConfigError,
        DataError,
        HvdlossError,
        LostRankError,
        NonFiniteGradientError,
        NonFiniteLossError,
        NoWeightError,
        RankError,
        ShapeError,
        StallError,
        UsageError,
        WeightError,
    )
    from hvdloss.losses.ledger import Ledger
    from hvdloss.losses.reduction import REDUCTIONS
    from hvdloss.report import LossReport, RankReport, StepReport, TermReport
    from hvdloss.terms.communication import CommunicationCost
    from hvdloss.terms.skew import DataSkew
    from hvdloss.terms.term import Batch, StepStats, Term

# Loaded on first use, so that importing the package costs a few milliseconds.
_HOMES = {
    "comm.communicator": ("OneProcess", "SimulatedRank", "simulate"),
    "errors": (
        "AgreementError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "HvdlossError",
        "LostRankError",
        "NonFiniteGradientError",
        "NonFiniteLossError",
        "NoWeightError",
        "RankError",
        "ShapeError",
        "StallError",
        "UsageError",
        "WeightError",
    ),
    "losses.ledger": ("Ledger",),
    "losses.reduction": ("REDUCTIONS",),
    "report": ("LossReport", "RankReport", "StepReport", "TermReport"),
    "terms.term": ("Batch", "StepStats", "Term"),
    "terms.communication": ("CommunicationCost",),
    "terms.skew": ("DataSkew",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "REDUCTIONS",
    "AgreementError",
    "Batch",
    "CheckpointError",
    "CommunicationCost",
    "ConfigError",
    "DataError",
    "DataSkew",
    "HvdlossError",
    "Ledger",
    "LossReport",
    "LostRankError",
    "NoWeightError",
    "NonFiniteGradientError",
    "NonFiniteLossError",
    "OneProcess",
    "RankError",
    "RankReport",
    "ShapeError",
    "SimulatedRank",
    "StallError",
    "StepReport",
    "StepStats",
    "Term",
    "TermReport",
    "UsageError",
    "WeightError",
    "__version__",
    "simulate",
]

__getattr__, __dir__ = lazy_module(__name__, _HOME_OF)
