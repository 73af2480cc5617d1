"""Reports of steps, the record of a run, and the page that shows it.

:class:`StepReport` is what every rank knows of a finished step. Sinks are notified of each
(:mod:`hvdloss.report.subscription`): trackers, and the :class:`Recorder` that writes a run into one file
(:mod:`hvdloss.report.record`), which :func:`read` reads and checks. ``hvdloss report`` makes a page of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdloss._util.lazy import lazy_module
from hvdloss.step.report import LossReport, RankReport, RankReports, StepReport
from hvdloss.terms.term import TermReport

if TYPE_CHECKING:
    from hvdloss.report.reading import Record, read
    from hvdloss.report.record import Recorder
    from hvdloss.report.subscription import Sink, Subscription

__all__ = [
    "LossReport",
    "RankReport",
    "RankReports",
    "Record",
    "Recorder",
    "Sink",
    "StepReport",
    "Subscription",
    "TermReport",
    "read",
]

# The core reports steps; what stands on that is loaded when it is asked for.
_HOME_OF = {
    "Subscription": "subscription",
    "Sink": "subscription",
    "Record": "reading",
    "read": "reading",
    "Recorder": "record",
}

__getattr__, __dir__ = lazy_module(__name__, _HOME_OF)
