"""SIGTERM in loops of PyTorch."""

from __future__ import annotations

import functools
from typing import Any

from hvdloss.comm.communicator import communicator_for
from hvdloss.errors import ConfigError
from hvdloss.torch._backend import hvd
from hvdloss.torch.ops import communicator_of
from hvdloss.train import preemption as core

__all__ = ["Preemption"]


class Preemption(core.Preemption):
    """Notices SIGTERM on any rank, and has all ranks leave together after a step.

    ::

        leaving = hvd.Preemption(optimizer)
        for x, y in loader:
            optimizer.zero_grad()
            objective(model(x), y).backward()
            optimizer.step()
            step += 1
            if leaving():  # the same on all ranks
                checkpoint.save(step)  # or state.commit(), in an elastic job
                leaving.leave()

    Args:
        optimizer: from :func:`DistributedOptimizer` with an objective, whose ledgers carry it. None for
            a small all-reduce in every call.
        process_set: the ranks, without an optimizer; None for all.
        options: ``signals``, ``status``: see :class:`hvdloss.train.preemption.Preemption`.

    Raises:
        ConfigError: an argument that cannot be used.
        UsageError: this is not the main thread.

    Collectives: none with an optimizer; else one all-reduce of a number in every call, and of one
        per rank where a rank received a signal.
    """

    def __init__(self, optimizer: Any = None, *, process_set: Any = None, **options: Any) -> None:
        step = getattr(optimizer, "_hvdloss", None)
        if optimizer is not None and step is None:
            raise ConfigError(
                f"optimizer={type(optimizer).__name__} is not from hvdloss.torch.DistributedOptimizer with "
                f"an objective; leave it out for a message of its own"
            )
        group = process_set if step is None else step.process_set
        ranks = functools.partial(communicator_for, hvd, communicator_of, group)
        status = None if step is None else step.state.status
        super().__init__(status, communicator=ranks, shutdown=hvd.shutdown, **options)
