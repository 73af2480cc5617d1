"""Subscription a run of TensorFlow or Keras: the recorder, and sinks of other kinds."""

from __future__ import annotations

import functools
from typing import Any

from hvdloss.comm.communicator import included
from hvdloss.errors import ConfigError
from hvdloss.report import record
from hvdloss.report.subscription import Subscription, check_reporting_rank
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.checkpoint import step_state_of

__all__ = ["Recorder", "follow", "following", "is_reporting_rank"]


def _step_state(steps: Any) -> Any:
    """Return what tells of the steps of an objective, or of an optimizer."""
    step_state = step_state_of(steps)
    if step_state is None:
        raise ConfigError(
            f"steps={type(steps).__name__} is neither an Objective nor an optimizer from hvdloss's "
            f"DistributedOptimizer"
        )
    return step_state


def _group(step_state: Any) -> Any:
    return step_state.process_set or hvd.global_process_set


def is_reporting_rank(rank: int, step_state: Any) -> bool:
    """Return whether this rank is the one that tells of these steps."""
    return hvd.rank() == rank and included(hvd, _group(step_state))


def following(
    steps: Any, sinks: tuple[Any, ...], rank: int, closes: bool, framework: str = "tensorflow"
) -> Subscription:
    """Return what follows; see :func:`follow`."""
    step_state = _step_state(steps)
    check_reporting_rank(rank)
    own = getattr(steps, "settings", None)

    def metadata() -> dict[str, Any]:
        settings = (
            own()
            if own is not None
            else {"reduction": step_state.reduction, "nonfinite": step_state.nonfinite}
        )
        return record.run_metadata(hvd, framework, settings, step_state.controller, _group(step_state).size())

    return Subscription(
        step_state,
        step_state.controller,
        sinks,
        metadata=metadata,
        is_reporting_rank=functools.partial(is_reporting_rank, rank, step_state),
        size=lambda: int(_group(step_state).size()),
        closes=closes,
    )


def follow(steps: Any, *sinks: Any, rank: int = 0) -> Subscription:
    """Have sinks told, on one rank, of every step that is finished from now on.

    ::

        with hvd.follow(objective, hvd.Recorder("runs/a.jsonl"), MySink()):
            train()

    Args:
        steps: the :class:`Objective` of a ``DistributedGradientTape``, or an optimizer from
            :func:`DistributedOptimizer`; before a ``tf.function`` that holds its steps is traced.
        sinks: objects with ``step(report)`` and ``close()``: see :class:`hvdloss.report.Sink`.
        rank: which one reports, counted among all ranks, if it is in the process set of the steps.

    Returns:
        what follows, as long as the objective lives, until its ``close()`` or the end of its ``with``; that
        closes the sinks.

    Raises:
        ConfigError: an argument that cannot be used.
        UsageError: steps were traced already.

    Collectives: none. On the rank that tells a traced step gets one operation that calls Python.
    """
    return following(steps, sinks, rank, True)


class Recorder(record.Recorder):  # noqa: D101 - the core's words
    __doc__ = record.Recorder.__doc__
    _framework = "tensorflow"

    def follow(self, steps: Any) -> Recorder:
        """Record every step that is finished from now on; return the recorder.

        Args:
            steps: the :class:`Objective` of a ``DistributedGradientTape``, or an optimizer from
                :func:`DistributedOptimizer`; before a ``tf.function`` that holds its steps is traced.

        Raises:
            ConfigError: neither of them; on the rank that writes: the file exists, or cannot be made.
            UsageError: it follows one already, or was closed; or steps were traced already.

        Collectives: none. On the rank that tells a traced step gets one operation that calls Python.
        """
        self._subscribe(
            lambda: is_reporting_rank(self.rank, _step_state(steps)),
            lambda: following(steps, (self,), self.rank, False, self._framework),
        )
        return self
