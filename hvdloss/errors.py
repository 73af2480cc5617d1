"""What can go wrong, by name.

Every error of the project derives from :class:`HvdlossError`. A message says what was wrong, with the
argument and its value, on which rank, and what to do about it. Errors that are found from global
numbers (a step's ledgers, the consistency check of the first step) are the same error on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = [
    "AgreementError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HvdlossError",
    "LostRankError",
    "NoWeightError",
    "NonFiniteGradientError",
    "NonFiniteLossError",
    "RankError",
    "ShapeError",
    "StallError",
    "UsageError",
    "WeightError",
]


#: What to do where an error of another kind ended one rank.
WAY_OUT = "The others cannot go on without it. Mend it there, and start from the last checkpoint."


class HvdlossError(RuntimeError):
    """Base class of every error that hvdloss raises.

    Attributes:
        ranks: on which something was wrong, where that is known.
    """

    ranks: tuple[int, ...] = ()

    if not TYPE_CHECKING:
        # TensorFlow's AutoGraph raises an exception again, with the user's own lines in its text, if that is
        # how it is made; any other becomes a StagingError.
        __init__ = Exception.__init__


class ConfigError(HvdlossError, ValueError):
    """An argument has a value that cannot be used; raised before anything has happened."""


class ShapeError(ConfigError):
    """Arrays whose shapes do not fit each other (a weight that does not broadcast, say)."""


class UsageError(HvdlossError):
    """Calls in an order that cannot give an exact step (a backward pass without a loss, say)."""


class WeightError(HvdlossError, ValueError):
    """A weight is negative, NaN or infinite on some rank; raised on every rank of the step."""


class NoWeightError(HvdlossError, ValueError):
    """No element with a weight above zero on any rank, so that the step has no mean."""


class NonFiniteLossError(HvdlossError, ArithmeticError):
    """The loss of some rank is NaN or infinite; raised on every rank of the step."""


class NonFiniteGradientError(HvdlossError, ArithmeticError):
    """A gradient of some rank is NaN or infinite, of a loss that is finite; raised on every rank."""


class RankError(HvdlossError):
    """Something failed on some rank, so that the others cannot go on; the text is that rank's."""


class DataError(RankError):
    """A file of data is missing, damaged, or was changed while it was in use; names it and the place."""


class LostRankError(RankError):
    """A rank is gone, has ended before the others, or does not answer."""


class StallError(RankError):
    """Ranks wait for each other in different places, or for one that does not come."""


class CheckpointError(HvdlossError):
    """A checkpoint is damaged, was cut off, is none, or does not fit what it is loaded into; names it."""


class AgreementError(HvdlossError):
    """Ranks that must hold the same parameters or settings do not."""


def second_derivative_error() -> UsageError:
    """Return the error of a loss that knows its gradients beforehand, and is derived twice."""
    return UsageError(
        "this loss computes its gradients in the forward pass (SigLIP's ring of ranks), and they cannot be "
        "differentiated again; leave create_graph=True (or the outer tape) out, or use InfoNCE, whose can"
    )
