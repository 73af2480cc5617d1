"""Data on many ranks: every sample exactly once, whatever number of ranks there is."""

from hvdloss.data.epoch import Epoch
from hvdloss.data.sharding import (
    Contiguous,
    Dirichlet,
    Grouped,
    Sharding,
    Shuffled,
    Stratified,
    Strided,
    Weighted,
)

__all__ = [
    "Contiguous",
    "Dirichlet",
    "Epoch",
    "Grouped",
    "Sharding",
    "Shuffled",
    "Stratified",
    "Strided",
    "Weighted",
]
