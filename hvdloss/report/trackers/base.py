"""What all trackers share: who logs, how often, and what becomes of a tracker's own failures."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any

from hvdloss._util.checks import check_int
from hvdloss._util.extras import optional_import
from hvdloss.comm.world import launcher_rank
from hvdloss.errors import ConfigError
from hvdloss.report.trackers.scalars import scalars
from hvdloss.step.report import StepReport

__all__ = ["Tracker", "first_rank"]


def first_rank() -> bool:
    """Return whether this process is rank 0 of the job; the only process is."""
    for framework in ("torch", "tensorflow"):
        # Asked of the adapter that is in use; none is imported for it.
        backend = sys.modules.get(f"hvdloss.{framework}._backend")
        if backend is not None and backend.hvd.is_initialized():
            return bool(backend.hvd.rank() == 0)
    return launcher_rank() in (None, "0")


class Tracker(ABC):
    """Logs steps on one rank; :class:`TensorBoard`, :class:`MLflow` and :class:`WandB` say where to.

    Make it on all ranks, with the same arguments. What it logs to is opened with its first step. If logging a
    step fails, training goes on: a warning says so once, and `failures` counts such steps.

    Args:
        every: log every `every` steps, the first time in step `every`.
        prefix: of all names.
        per_rank: log numbers of each rank up to this number of ranks (:func:`scalars`).
        active: whether this process logs; None for rank 0 of the job. For the steps of a process set:
            ``active=process_set.rank() == 0``.

    Raises:
        ConfigError: an argument that cannot be used, or the library is not installed; on every rank.

    Collectives: none.
    """

    #: The library, the extra that has it, and what it is called.
    library: str
    extra: str
    title: str

    def __init__(
        self, *, every: int = 1, prefix: str = "hvdloss/", per_rank: int = 64, active: bool | None = None
    ) -> None:
        self.every = check_int("every", every, 1)
        self.per_rank = check_int("per_rank", per_rank, 0)
        self.prefix, self.active = prefix, active
        self.failures = 0
        self._open = self._closed = False
        top = self.library.partition(".")[0]
        if importlib.util.find_spec(top) is None:  # also where another rank would log
            raise ConfigError(
                f"logging to {self.title} needs the library {top}: pip install 'hvdloss[{self.extra}]'"
            )

    def step(self, report: StepReport | None) -> None:
        """Log a finished step, if this process logs and it is that step's turn. None is ignored."""
        if report is None or report.step % self.every or not self._logs():
            return
        try:
            if not self._open:
                self._begin(optional_import(self.library, self.extra, f"logging to {self.title}"))
                self._open = True
            numbers = scalars(report, per_rank=self.per_rank)
            self._log(report.step, {self.prefix + name: value for name, value in numbers.items()})
        except Exception as error:
            if isinstance(error, ConfigError):
                raise
            self.failures += 1
            if self.failures == 1:
                warnings.warn(
                    f"step {report.step} could not be logged to {self.title} ({type(error).__name__}: "
                    f"{error}); training goes on, and `failures` counts such steps",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def close(self, *, failed: bool = False) -> None:
        """End the log; more often does no harm. `failed`: whether training ended with an error."""
        if self._open and not self._closed:
            self._end(failed)
        self._closed = True

    def _logs(self) -> bool:
        if self._closed:
            return False
        # In an elastic job another process may be rank 0 later.
        return first_rank() if self.active is None else self.active

    def __enter__(self) -> Any:
        """Return the tracker."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it; an error in the block makes the run a failed one."""
        self.close(failed=kind is not None)

    @abstractmethod
    def _begin(self, module: Any) -> None:
        """Open the log, with the library's module."""

    @abstractmethod
    def _log(self, step: int, numbers: dict[str, float]) -> None:
        """Log a step's numbers."""

    @abstractmethod
    def _end(self, failed: bool) -> None:
        """Close the log."""
