"""Models split over ranks: which rank holds which part, and who computes what when.

:mod:`~hvdloss.split.parts` cuts layers, :mod:`~hvdloss.split.grid` groups ranks, and
:mod:`~hvdloss.split.schedule` orders the micro-batches of a model that is cut into stages.
"""

from hvdloss.split.grid import Grid, GridRanks, grid_ranks
from hvdloss.split.parts import Parts
from hvdloss.split.schedule import (
    SCHEDULES,
    Pass,
    Span,
    bubble_fraction,
    gpipe,
    most_held,
    one_forward_one_backward,
    timeline,
)

__all__ = [
    "SCHEDULES",
    "Grid",
    "GridRanks",
    "Parts",
    "Pass",
    "Span",
    "bubble_fraction",
    "gpipe",
    "grid_ranks",
    "most_held",
    "one_forward_one_backward",
    "timeline",
]
