"""SIGTERM in loops of TensorFlow."""

from __future__ import annotations

import functools
from typing import Any

from hvdloss.comm.communicator import communicator_for
from hvdloss.errors import ConfigError
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.checkpoint import step_state_of
from hvdloss.tensorflow.ops import communicator_of
from hvdloss.train import preemption as core

__all__ = ["Preemption"]


class Preemption(core.Preemption):
    """Notices SIGTERM on any rank, and has all ranks leave together after a step.

    ::

        leaving = hvd.Preemption(objective)
        for x, y in batches:
            train_step(x, y)
            step += 1
            if leaving():  # the same on all ranks
                checkpoint.save(step)  # or state.commit(), in an elastic job
                leaving.leave()

    ``model.fit`` takes ``hvd.callbacks.PreemptionCallback``.

    Args:
        steps: the :class:`Objective` of the loop's ``DistributedGradientTape``, or the optimizer from
            :func:`DistributedOptimizer`, in whose ledgers ranks tell; None to tell in a small all-reduce in
            every call.
        process_set: the ranks, without `steps`; None for all.
        options: ``signals``, ``status``: see :class:`hvdloss.train.preemption.Preemption`.

    Raises:
        ConfigError: an argument that cannot be used.
        UsageError: this is not the main thread.

    Collectives: none with `steps`; else one all-reduce of a number in every call, and of one
        per rank where a rank was told.
    """

    def __init__(self, steps: Any = None, *, process_set: Any = None, **options: Any) -> None:
        step_state = step_state_of(steps)
        if steps is not None and step_state is None:
            raise ConfigError(
                f"steps={type(steps).__name__} is neither an hvdloss.tensorflow.Objective nor an optimizer "
                f"from hvdloss's DistributedOptimizer; leave it out to have ranks tell each other in a "
                f"message of their own"
            )
        group = process_set if step_state is None else step_state.process_set
        ranks = functools.partial(communicator_for, hvd, communicator_of, group)
        super().__init__(step_state, communicator=ranks, shutdown=hvd.shutdown, **options)
