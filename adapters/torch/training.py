"""Training well, in PyTorch: decisions of all ranks, the best state in a file, seeds, changed batches.

``torch.optim.lr_scheduler.ReduceLROnPlateau`` needs nothing but a number that is the same on all ranks:
``scheduler.step(hvd.merged_value(loss, weight))``. ``LambdaLR`` takes :class:`hvdloss.train.Warmup`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

import torch
from hvdloss import train as core
from hvdloss.comm.communicator import communicator_for, rank_and_size
from hvdloss.errors import ConfigError, ShapeError
from hvdloss.torch._backend import hvd
from hvdloss.torch.ops import communicator_of

__all__ = [
    "BestCheckpoint",
    "EarlyStopping",
    "TransformedLoader",
    "merged_value",
    "mixup",
    "seed_everything",
]


def merged_value(value: Any, weight: Any = None, *, process_set: Any = None) -> float:
    """Return one number for all ranks; see :func:`hvdloss.train.merged_value`, whose errors it raises.

    Args:
        value: this rank's mean, with `weight`; else a number that all ranks have, which is checked.
        weight: what it is a mean of: the sum of weights, or the number of samples.
        process_set: the ranks; None for all.

    Collectives: one gather of two numbers.
    """
    return core.merged_value(communicator_for(hvd, communicator_of, process_set), value, weight)


class EarlyStopping(core.EarlyStopping):
    """:class:`hvdloss.train.EarlyStopping` over the ranks of a process set.

    Args:
        patience, options: its arguments.
        process_set: the ranks; None for all.
    """

    def __init__(self, patience: int = 0, *, process_set: Any = None, **options: Any) -> None:
        ranks = functools.partial(communicator_for, hvd, communicator_of, process_set)
        super().__init__(patience, communicator=ranks, **options)


class BestCheckpoint(core.BestCheckpoint):
    """The best state so far in a file of ``torch.save``: one rank writes it, whole or not at all.

    ::

        best = hvd.BestCheckpoint("best.pt", mode="max")
        best.step(metrics.compute()["auc"], model.state_dict)  # written if it is the best yet
        model.load_state_dict(best.load())

    Args:
        path, options: see :class:`hvdloss.train.BestCheckpoint`.
        process_set: the ranks; None for all.
    """

    def __init__(self, path: Any, *, process_set: Any = None, **options: Any) -> None:
        ranks = functools.partial(communicator_for, hvd, communicator_of, process_set)
        super().__init__(path, communicator=ranks, **options)

    def write(self, file: Any, state: Any) -> None:
        """Save a state."""
        torch.save(state, file)

    def load(self, map_location: Any = None, *, weights_only: bool = True) -> Any:
        """Return the state in the file, on every rank, wherever the file is.

        Args:
            map_location, weights_only: of ``torch.load``. False lets the file run code: for files of your
                own alone.

        Raises:
            ConfigError: it cannot be read; on every rank.

        Collectives: two gathers, one of them of the file's bytes.
        """
        return self.parsed(lambda file: torch.load(file, map_location, weights_only=weights_only))


def seed_everything(
    seed: int, *, epoch: int = 0, stream: str = "training", alike: bool = False, process_set: Any = None
) -> int:
    """Seed Python's, NumPy's and PyTorch's random numbers, and return the seed.

    Each rank gets numbers of its own (masks of dropout that differ), the same ones in every rerun::

        hvd.seed_everything(7, alike=True)  # the same parameters on all ranks
        model = Net()
        for epoch in range(epochs):
            hvd.seed_everything(7, epoch=epoch)

    Called at the start of every epoch, an epoch has the same numbers whether or not training was interrupted
    before it.

    Args:
        seed: of the run, equal on all ranks.
        epoch, stream: what the numbers are for.
        alike: the same numbers on every rank, for initialising the model.
        process_set: the ranks; None for all.

    Raises:
        ConfigError: a negative seed or epoch.

    Collectives: none.
    """
    rank = rank_and_size(hvd, process_set)[0]
    made = core.seed_process(seed, rank, epoch=epoch, stream=stream, alike=alike)
    torch.manual_seed(made)
    return made


class TransformedLoader(core.TransformedBatches):
    """Batches of a loader changed at random: mixup, augmentation, noise.

    Every batch has random numbers of its own, that follow from seed, rank, epoch and step: ranks differ, a
    rerun does not, nor does an epoch that goes on in the middle (``state_dict`` holds the loader's)::

        loader = hvd.ShardedLoader(dataset, Shuffled(len(dataset)), batch_size=32)
        loader = hvd.TransformedLoader(loader, lambda batch, rng: hvd.mixup(*batch, rng=rng), seed=7)
        for mixed in loader:
            loss = objective(*mixed.pairs(model(mixed.x)))

    Args:
        loader: :class:`ShardedLoader`, ``DataLoader``, or any iterable of batches.
        transform: ``(batch, rng) -> batch``, with a ``numpy.random.Generator``
            (``torch.Generator().manual_seed(int(rng.integers(2**63)))`` makes PyTorch's).
        seed: of the run, equal on all ranks.
        process_set: the ranks; None for all.

    Raises:
        ConfigError: an argument that cannot be used.

    Collectives: none.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        transform: Callable[[Any, np.random.Generator], Any],
        *,
        seed: int = 0,
        process_set: Any = None,
    ) -> None:
        super().__init__(loader, transform, seed=seed, rank=rank_and_size(hvd, process_set)[0])


def mixup(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    alpha: float = 0.2,
    rng: np.random.Generator,
) -> core.Mixed:
    """Mix the samples of a batch of tensors in random pairs; see :func:`hvdloss.train.mixup`.

    ``objective(*mixed.pairs(model(mixed.x)))`` is its loss, exact over ranks.

    Args:
        x: floats, shape (samples, ...).
        y: targets, shape (samples, ...).
        weight: as the objective takes it, with the samples as first axis; None for 1 each, with as many axes
            as `y` has (for one-hot rows pass ``torch.ones(len(y))``).
        alpha: of the Beta distribution of shares.
        rng: of this rank, epoch and step: see :class:`TransformedLoader`.

    Raises:
        ConfigError: `alpha` not above 0, or inputs that are no floats.
        ShapeError: other numbers of samples.

    Collectives: none.
    """
    if not x.is_floating_point():
        raise ConfigError(f"x has dtype {x.dtype}; only floats can be mixed")
    wide = torch.promote_types(x.dtype, torch.float32)
    w = torch.ones(y.shape[:1] + (1,) * (y.dim() - 1), dtype=wide) if weight is None else weight
    if not len(x) == len(y) == len(w):
        raise ShapeError(f"x, y and weight have {len(x)}, {len(y)} and {len(w)} rows; they must be as many")
    present = None if weight is None else (w != 0).reshape(len(w), w[:1].numel()).any(1).cpu().numpy()
    drawn, partner = core.partners(len(x), alpha, rng, present)
    index = torch.as_tensor(partner, device=x.device)

    def like(tensor: torch.Tensor) -> torch.Tensor:
        share = torch.as_tensor(drawn, dtype=wide, device=tensor.device)
        return share.reshape(-1, *[1] * (tensor.dim() - 1))

    mixed = core.mixing.blended(x, x[index], like(x)).to(x.dtype)
    if present is not None:
        away = torch.as_tensor(~present, device=x.device)
        mixed[away] = x[away]
    w = w.to(x.device)
    other = index.to(y.device)
    return core.Mixed(mixed, (y, y[other]), (w * like(w), w[index] * (1 - like(w))), torch.cat)
