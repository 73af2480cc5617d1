"""The watch: a rank that fails, ends, is killed or does not come is known to all ranks in seconds, by name.

The ledgers of a step tell what goes wrong *in* steps. What keeps a rank from its next step they cannot tell:
an exception in user code, a script that ends early, a killed process, ranks that wait for each other in
different places. For that each host has a small process, its agent, which looks at the ranks' processes
through the operating system, hears from a thread of each rank what it waits in, and talks to the other
hosts' agents along a tree. When ranks cannot go on together, every rank raises the same
:class:`hvdloss.errors.RankError`. A job that is only slow is warned about, and goes on.

It begins with ``hvd.init()``, and costs no collective afterwards. Environment variables, read when it begins:

``HVDLOSS_WATCH``: ``0`` for no watch.
``HVDLOSS_WATCH_WARN``: seconds of waiting after which it is logged who is missing, and where it is (60).
``HVDLOSS_WATCH_STALL``: seconds after which that is an error on every rank (0: never).
``HVDLOSS_WATCH_SILENCE``: seconds for which a process may be stopped, or a host out of reach (30; 0: ever).
``HVDLOSS_WATCH_ADDRESS``: the address at which other hosts reach this one, where the choice is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdloss._util.lazy import lazy_module

if TYPE_CHECKING:
    from hvdloss.watch.activity import blocking, called_by_blocking
    from hvdloss.watch.service import (
        check,
        current,
        enter_exchange,
        excluded_error,
        is_rank_loss,
        limits_from_environment,
        on_step,
        record_activity,
        report_error,
        root_cause,
        same_fate,
        start,
        stop,
        track,
        waiting,
        waiting_for,
        waiting_in_step,
        wrap_init,
    )
    from hvdloss.watch.verdict import Fault, Limits, RankState, Wait

__all__ = [
    "Fault",
    "Limits",
    "RankState",
    "Wait",
    "blocking",
    "called_by_blocking",
    "check",
    "current",
    "enter_exchange",
    "excluded_error",
    "is_rank_loss",
    "limits_from_environment",
    "on_step",
    "record_activity",
    "report_error",
    "root_cause",
    "same_fate",
    "start",
    "stop",
    "track",
    "waiting",
    "waiting_for",
    "waiting_in_step",
    "wrap_init",
]

# Loaded on first use: a host's agent imports its own modules from here, and nothing heavy.
__getattr__, __dir__ = lazy_module(
    __name__,
    {
        **dict.fromkeys(__all__, "service"),  # but for these:
        **dict.fromkeys(("Fault", "Limits", "RankState", "Wait"), "verdict"),
        **dict.fromkeys(("called_by_blocking", "blocking"), "activity"),
    },
)
