"""Data on many ranks: every sample exactly once, whatever number of ranks there is."""

from hvdloss.data.epoch import Epoch
from hvdloss.data.files import Csv, NumpyFiles, Parquet, Source
from hvdloss.data.pieces import Pieces, RowGroups
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
    "Csv",
    "Dirichlet",
    "Epoch",
    "Grouped",
    "NumpyFiles",
    "Parquet",
    "Pieces",
    "RowGroups",
    "Sharding",
    "Shuffled",
    "Source",
    "Stratified",
    "Strided",
    "Weighted",
]
