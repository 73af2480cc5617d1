"""SIGTERM: the step is finished, the state is kept, and all ranks leave together.

Schedulers announce the end of a job by SIGTERM and end it by SIGKILL some seconds later (Slurm: KillWait,
30 s; Kubernetes: terminationGracePeriodSeconds, 30 s). It may come to one rank, or to all, at different
moments. That it came rides in the ledger of the next step, so that all ranks know it after the same step,
without a message more.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

import numpy as np

from hvdloss.comm.communicator import Communicator, OneProcess
from hvdloss.errors import ConfigError, UsageError

__all__ = ["EXIT_STATUS", "Preemption", "PreemptionChannel"]

#: The exit status that a shell reports for a process ended by SIGTERM. Schedulers take it for "ended, not
#: done": Kubernetes restarts a pod (restartPolicy OnFailure); 0 would mean that training is complete.
EXIT_STATUS = 128 + signal.SIGTERM


class PreemptionChannel(Protocol):
    """How ranks announce a preemption in the ledgers of their steps."""

    preemption_requested: Callable[[], bool]  # of this rank; called when the step's ledger is made

    @property
    def preempted_ranks(self) -> tuple[int, ...]:
        """Ranks with a request in the last step that was exchanged; equal on all ranks."""


class Preemption:
    """Handles SIGTERM, and notifies all ranks in the steps of an optimizer; see the adapters' for an example.

    A second SIGTERM changes nothing; SIGKILL ends a process at once, and loses what was done since the last
    checkpoint.

    Args:
        channel: the optimizer's; None for a small all-reduce in every call.
        signals: that are handled.
        status: with which ranks exit.
        communicator: returns the ranks when called.
        shutdown: Horovod's.

    Raises:
        ConfigError: an argument that cannot be used.
        UsageError: this is not the main thread, where Python handles signals.
    """

    def __init__(
        self,
        channel: PreemptionChannel | None,
        *,
        signals: Sequence[int] = (signal.SIGTERM,),
        status: int = EXIT_STATUS,
        communicator: Callable[[], Communicator] = OneProcess,
        shutdown: Callable[[], Any] = lambda: None,
    ) -> None:
        if isinstance(status, bool) or not isinstance(status, int) or not 0 <= status <= 255:
            raise ConfigError(f"status={status!r} must be an integer from 0 to 255")
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("signals are handled in the main thread: make the Preemption there")
        self.status = status
        #: Whether this rank received a signal.
        self.requested = False
        self._channel, self._communicator, self._shutdown = channel, communicator, shutdown
        self._ranks: tuple[int, ...] = ()
        self._before: dict[int, Any] = {}
        if channel is not None:
            channel.preemption_requested = lambda: self.requested
        for number in signals:
            try:
                self._before[number] = signal.signal(number, self._notice)
            except (OSError, ValueError, TypeError) as error:
                self.close()
                raise ConfigError(f"signals: {number!r} cannot be handled: {error}") from error

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def close(self) -> None:
        """Restore the previous signal handlers."""
        if self._channel is not None:
            self._channel.preemption_requested = lambda: False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def __enter__(self) -> Preemption:
        """Return it."""
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the previous signal handlers."""
        self.close()

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that received a signal, as of the last call; equal on all ranks."""
        return self._ranks

    def __call__(self) -> bool:
        """Return whether to leave, equal on all ranks; call it after every optimizer step.

        Collectives: none with an optimizer; else one all-reduce of a number, and of one per rank where a
            rank received a signal.
        """
        if self._channel is not None:
            self._ranks = self._channel.preempted_ranks
        else:
            communicator = self._communicator()
            self._ranks = ()
            if communicator.all_reduce(np.array([float(self.requested)]), "hvdloss.preemption")[0]:
                flags = np.zeros(communicator.size)
                flags[communicator.rank] = self.requested
                flags = communicator.all_reduce(flags, "hvdloss.preemption.ranks")
                self._ranks = tuple(int(rank) for rank in np.flatnonzero(flags))
        return bool(self._ranks)

    def leave(self, everyone: bool | None = None) -> None:
        """End this process with the exit status `status`; save what is to be kept before.

        Args:
            everyone: whether all ranks leave, or only those with a signal: the others go on from the last
                commit. None: all, except in an elastic job, where some ranks lose their machine and the
                others stay.

        Raises:
            SystemExit: on ranks that leave.
        """
        if everyone is None:
            everyone = os.environ.get("HOROVOD_ELASTIC") != "1"
        if not everyone and not self.requested:
            return
        self._shutdown()
        self.close()
        sys.exit(self.status)
