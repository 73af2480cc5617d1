"""Following a run of TensorFlow or Keras: the recorder, and sinks of other kinds."""

from __future__ import annotations

import functools
from typing import Any

from hvdloss.communicator import included
from hvdloss.errors import ConfigError
from hvdloss.report import record
from hvdloss.report.subscription import Subscription, check_reporting_rank
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.checkpoint import books_of

__all__ = ["Recorder", "follow", "following", "is_reporting_rank"]


def _books(steps: Any) -> Any:
    """Return what tells of the steps of an objective, or of an optimizer."""
    books = books_of(steps)
    if books is None:
        raise ConfigError(
            f"steps={type(steps).__name__} is neither an Objective nor an optimizer from hvdloss's "
            f"DistributedOptimizer"
        )
    return books


def _group(books: Any) -> Any:
    return books.process_set or hvd.global_process_set


def is_reporting_rank(rank: int, books: Any) -> bool:
    """Return whether this rank is the one that tells of the steps of some books."""
    return hvd.rank() == rank and included(hvd, _group(books))


def following(
    steps: Any, sinks: tuple[Any, ...], rank: int, closes: bool, framework: str = "tensorflow"
) -> Subscription:
    """Return what follows; see :func:`follow`."""
    books = _books(steps)
    check_reporting_rank(rank)
    own = getattr(steps, "settings", None)

    def metadata() -> dict[str, Any]:
        settings = own() if own is not None else {"reduction": books.reduction, "nonfinite": books.nonfinite}
        return record.run_metadata(hvd, framework, settings, books.controller, _group(books).size())

    return Subscription(
        books,
        books.controller,
        sinks,
        metadata=metadata,
        is_reporting_rank=functools.partial(is_reporting_rank, rank, books),
        size=lambda: int(_group(books).size()),
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
        rank: which one tells, counted among all ranks, if it is in the process set of the steps.

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
            lambda: is_reporting_rank(self.rank, _books(steps)),
            lambda: following(steps, (self,), self.rank, False, self._framework),
        )
        return self
