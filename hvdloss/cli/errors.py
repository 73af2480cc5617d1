"""What can go wrong on the command line, and the exit status of each."""

from __future__ import annotations

import signal
from enum import IntEnum

from hvdloss.errors import HvdlossError


class Exit(IntEnum):
    """Exit statuses, the same for every subcommand; 128 plus a signal's number where one stopped it."""

    OK = 0
    NOT_READY = 1
    USAGE = 2
    MISSING = 3
    SOURCE = 4
    BUILD = 5
    INSTALL = 6
    RANKS = 7
    INTERRUPTED = 130
    TERMINATED = 143

    @property
    def meaning(self) -> str:
        """The exit status; docs/reference/commands.md lists all of them."""
        return _MEANINGS[self]


_MEANINGS = {
    Exit.OK: "done; for `doctor`: training can start",
    Exit.NOT_READY: "`doctor`: training cannot start; `report`: no page, or the run that is followed failed; "
    "`check`: not exact",
    Exit.USAGE: "the command line is wrong, or a file that it names; `check`: could not tell",
    Exit.MISSING: "something needed is missing; nothing was changed",
    Exit.SOURCE: "Horovod's source could not be had (network, or a hash that differs)",
    Exit.BUILD: "the build failed; nothing was installed",
    Exit.INSTALL: "the wheel could not be installed, or what was installed does not work",
    Exit.RANKS: "ranks that were started failed",
    Exit.INTERRUPTED: "interrupted (Ctrl-C)",
    Exit.TERMINATED: "terminated (SIGTERM)",
}


class InstallError(HvdlossError):
    """``hvdloss install`` cannot go on.

    Args:
        problem: one sentence, what is wrong.
        way_out: what the reader can do about it, or "".
        status: the exit status for this kind of failure.
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
