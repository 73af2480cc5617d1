"""What can go wrong on the command line, and the exit status of each."""

from __future__ import annotations

import signal
from enum import IntEnum

from hvdloss.errors import HvdlossError


class Exit(IntEnum):
    """Exit statuses of every subcommand (listed for users in `hvdloss.cli`)."""

    OK = 0
    NOT_READY = 1
    USAGE = 2
    MISSING = 3
    SOURCE = 4
    BUILD = 5
    INSTALL = 6
    RANKS = 7


class InstallError(HvdlossError):
    """``hvdloss install`` cannot go on.

    Args:
        problem: one sentence, what is wrong.
        way_out: what the reader can do about it, or "".
        status: the exit status that tells scripts which kind of failure this is.
        detail: further lines worth seeing (compiler errors, the end of a program's output).
        log: where the full log lies, if there is one.
    """

    def __init__(
        self,
        problem: str,
        way_out: str = "",
        *,
        status: Exit = Exit.MISSING,
        detail: str = "",
        log: str | None = None,
    ) -> None:
        super().__init__(problem if not way_out else f"{problem} Way out: {way_out}")
        self.problem = problem
        self.way_out = way_out
        self.status = status
        self.detail = detail
        self.log = log


class Interrupted(BaseException):
    """A signal asked the command to stop.

    Not an `Exception`: nothing between the signal and the command's outermost frame may
    take it for a failed attempt and carry on.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status a shell expects: 128 plus the signal's number."""
        return 128 + self.signum
