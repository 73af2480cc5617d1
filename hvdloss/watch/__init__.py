"""The watch: a rank that fails, ends, is killed or does not come is known to all ranks in seconds, by name.

The ledgers of a step tell what goes wrong *in* steps. What keeps a rank from its next step they cannot tell:
an exception in user code, a script that ends early, a killed process, ranks that wait for each other in
different places. For that each rank has a thread that talks to rank 0's, over TCP and beside Horovod: who
waits in what, at which step, what it did last, where its Python stack is. When ranks cannot go on together,
every rank raises the same :class:`hvdloss.errors.RankError`.

It begins with ``hvd.init()``, and costs no collective afterwards: a rank sends one to four short messages a
second. Environment variables, read when it begins:

``HVDLOSS_WATCH``: ``0`` for no watch.
``HVDLOSS_WATCH_WARN``: seconds of waiting after which rank 0 logs who is missing, and where it is (60).
``HVDLOSS_WATCH_STALL``: seconds after which that is an error on every rank (600; 0: never).
``HVDLOSS_WATCH_SILENCE``: seconds after which a rank that says nothing at all counts as lost (30; 0: never).
``HVDLOSS_WATCH_ADDRESS``: the address of rank 0 that others reach it at, where the choice is wrong.
"""

from __future__ import annotations

from hvdloss.watch.service import (
    begins_with,
    check,
    current,
    did,
    explained,
    follow,
    given_up,
    limits_from_environment,
    same_fate,
    start,
    stepped,
    stop,
    tell_error,
    waiting,
    waiting_in_step,
    watched,
)
from hvdloss.watch.verdict import Fault, Limits, RankState, Wait

__all__ = [
    "Fault",
    "Limits",
    "RankState",
    "Wait",
    "begins_with",
    "check",
    "current",
    "did",
    "explained",
    "follow",
    "given_up",
    "limits_from_environment",
    "same_fate",
    "start",
    "stepped",
    "stop",
    "tell_error",
    "waiting",
    "waiting_in_step",
    "watched",
]
