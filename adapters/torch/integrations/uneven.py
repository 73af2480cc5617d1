"""Loops over data of which ranks have different amounts, and nobody knows how much."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

import torch
from hvdloss.data.uneven import Uneven
from hvdloss.errors import ConfigError
from hvdloss.terms.policies.period import period_of
from hvdloss.torch.ops import communicator_of
from hvdloss.torch.step import ExactStep

__all__ = ["uneven", "zero"]

Batch = TypeVar("Batch")


class _Signals:
    """The status of data loops in the ledgers of an optimizer's steps."""

    def __init__(self, step: ExactStep) -> None:
        self._step = step

    @property
    def patience(self) -> int:
        return self._step.state.phase.passes * period_of(self._step.controller)

    @property
    def sync_status(self) -> tuple[int, bool]:
        return self._step.state.status.sync_status

    def send_status(self, more: bool, error: BaseException | None = None) -> None:
        self._step.state.status.has_next, self._step.state.status.error = more, error


def _array(value: Any) -> tuple[str, list[int]] | None:
    if isinstance(value, np.ndarray):  # of words, say
        return f"numpy {value.dtype.str}", list(value.shape)
    if not isinstance(value, torch.Tensor):
        return None
    return str(value.dtype).removeprefix("torch."), list(value.shape)


def zero(value: Any) -> Any:
    """Return a tensor or an array without its rows; None for what is neither."""
    if isinstance(value, np.ndarray):
        return value[:0].copy() if value.ndim else value
    if not isinstance(value, torch.Tensor):
        return None
    return value[:0].clone() if value.dim() else value


def _make(kind: str, shape: list[int]) -> Any:
    if kind.startswith("numpy "):
        return np.zeros(shape, kind.removeprefix("numpy "))
    return torch.zeros(shape, dtype=getattr(torch, kind))


def uneven(batches: Iterable[Batch], optimizer: Any) -> Uneven[Batch]:
    """Yield this rank's batches, and then batches without rows until every rank is done.

    Ranks may have any number of batches, known or not, also none. All make the same number of steps, each
    of which is exact for the samples there are::

        for x, y in hvd.uneven(loader, optimizer):
            optimizer.zero_grad()
            objective(model(x), y).backward()
            optimizer.step()

    Whether a rank has more is in the ledgers of the steps, for which it reads one batch ahead. With
    accumulation (``backward_passes_per_step``) and local steps the loop ends with the step, or exchange,
    after which no rank has more. If a rank's batches raise, its last step's batches are still used; in the
    next step every rank raises the same error, and nothing is updated (all local steps since the last
    exchange are undone, as with any fault). The model must accept batches without
    rows, as with :class:`ShardedLoader`.

    Args:
        batches: a ``DataLoader``, :class:`StreamLoader`, or any iterable of tensors in tuples, lists, dicts.
        optimizer: from :func:`DistributedOptimizer`, with an objective; its ``step()`` is called in the loop.

    Returns:
        An iterable; with ``state_dict()`` and ``load_state_dict(state)`` if `batches` has them: the position
        in which the batch given last is used, and the one read ahead is not.

    Raises:
        ConfigError: an argument that cannot be used.
        DataError: a rank could not read a file, on every rank.
        RankError: a rank's batches raised something else, on every rank.
        UsageError: no step is made in the loop.

    Collectives: none per step. When it is first iterated over, two small gathers.
    """
    step = getattr(optimizer, "_hvdloss", None)
    if step is None:
        raise ConfigError(
            f"optimizer={type(optimizer).__name__} is not from hvdloss.torch.DistributedOptimizer with an "
            f"objective, in whose steps ranks exchange whether they have more"
        )
    return Uneven(
        batches,
        _Signals(step),
        lambda: communicator_of(step.process_set),
        array=_array,
        zero=zero,
        make=_make,
    )
