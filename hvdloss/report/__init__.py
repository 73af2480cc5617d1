"""What a run tells of itself: reports of steps, the record of a run, and the page that shows it.

:class:`StepReport` is what every rank knows of a finished step. Sinks are told of each
(:mod:`hvdloss.report.following`): trackers, and the :class:`Recorder` that writes a run into one file
(:mod:`hvdloss.report.record`), which :func:`read` gives back, checked. ``hvdloss report`` makes a page of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdloss.lazy import lazily
from hvdloss.report.steps import LossReport, RankReport, RankReports, StepReport, TermReport

if TYPE_CHECKING:
    from hvdloss.report.following import Following, Sink
    from hvdloss.report.reading import Record, read
    from hvdloss.report.record import Recorder

__all__ = [
    "Following",
    "LossReport",
    "RankReport",
    "RankReports",
    "Record",
    "Recorder",
    "Sink",
    "StepReport",
    "TermReport",
    "read",
]

# The core reports steps; what stands on that is loaded when it is asked for.
_HOME_OF = {
    "Following": "following",
    "Sink": "following",
    "Record": "reading",
    "read": "reading",
    "Recorder": "record",
}

__getattr__, __dir__ = lazily(__name__, _HOME_OF)
