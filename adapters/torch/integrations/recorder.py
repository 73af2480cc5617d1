"""Following a run of PyTorch: the recorder, and sinks of other kinds."""

from __future__ import annotations

import functools
from typing import Any

from hvdloss.comm.communicator import included
from hvdloss.errors import ConfigError
from hvdloss.report import record
from hvdloss.report.subscription import Subscription, check_reporting_rank
from hvdloss.torch._backend import hvd
from hvdloss.torch.objective import Objective
from hvdloss.torch.step import ExactStep

__all__ = ["Recorder", "follow"]


def _step_of(steps: Any) -> Any:
    """Return what tells of the steps of an optimizer, or of an objective that one was made with."""
    step = getattr(steps, "_hvdloss", None)
    if step is None and isinstance(steps, Objective):
        step = next((one for one in steps.listeners() if isinstance(one, ExactStep)), None)
    if step is None:
        raise ConfigError(
            f"steps={type(steps).__name__} is neither from hvdloss.torch.DistributedOptimizer with an "
            f"objective, nor an Objective that such an optimizer was made with"
        )
    return step


def _is_reporting_rank(rank: int, process_set: Any) -> bool:
    return hvd.rank() == rank and included(hvd, process_set)


def _follow(steps: Any, sinks: tuple[Any, ...], rank: int, closes: bool) -> Subscription:
    step = _step_of(steps)
    group, objective = step.process_set, step.objective
    check_reporting_rank(rank)

    def metadata() -> dict[str, Any]:
        return record.run_metadata(hvd, "torch", objective.settings(), objective.controller, group.size())

    return Subscription(
        step.state.log,
        objective.controller,
        sinks,
        metadata=metadata,
        is_reporting_rank=functools.partial(_is_reporting_rank, rank, group),
        size=group.size,
        closes=closes,
    )


def follow(optimizer: Any, *sinks: Any, rank: int = 0) -> Subscription:
    """Notify sinks, on one rank, of every step that is finished from now on.

    ::

        with hvd.follow(optimizer, hvd.Recorder("runs/a.jsonl"), MySink()):
            train()

    Args:
        optimizer: from :func:`DistributedOptimizer` with an objective; or that objective.
        sinks: objects with ``step(report)`` and ``close()``: see :class:`hvdloss.report.Sink`.
        rank: the reporting rank, counted among all ranks; it must be in the optimizer's process set.

    Returns:
        the subscription, which lasts as long as the optimizer, or until its ``close()`` or the end of its
        ``with``; that closes the sinks.

    Raises:
        ConfigError: an argument that cannot be used.

    Collectives: none.
    """
    return _follow(optimizer, sinks, rank, True)


class Recorder(record.Recorder):  # noqa: D101 - the core's docstring
    __doc__ = record.Recorder.__doc__

    def follow(self, optimizer: Any) -> Recorder:
        """Record every step that is finished from now on; return the recorder.

        Args:
            optimizer: from :func:`DistributedOptimizer` with an objective; or that objective.

        Raises:
            ConfigError: no such optimizer; on the rank that writes: the file exists, or cannot be made.
            UsageError: it records one already, or was closed.

        Collectives: none.
        """
        self._subscribe(
            lambda: _is_reporting_rank(self.rank, _step_of(optimizer).process_set),
            lambda: _follow(optimizer, (self,), self.rank, False),
        )
        return self
