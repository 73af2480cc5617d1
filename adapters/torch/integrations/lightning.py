"""PyTorch Lightning on Horovod's ranks, with the exact loss: a strategy for its Trainer.

::

    class Digits(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers, self.objective = Net(), hvd.Objective("cross_entropy")

        def training_step(self, batch, batch_idx):
            x, y = batch
            return self.objective(self.layers(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = L.Trainer(strategy=HorovodStrategy(), accelerator="cpu")
    trainer.fit(Digits(), hvd.ShardedLoader(dataset, Shuffled(len(dataset)), batch_size=32))

Started by ``horovodrun -np 4 python train.py``; every rank has a Trainer of its own, with one device.
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hvdloss._util.extras import optional_import
from hvdloss.errors import ConfigError, RankError
from hvdloss.report.trackers import scalars
from hvdloss.report.trackers.base import Tracker
from hvdloss.torch._backend import hvd
from hvdloss.torch.functions import broadcast_parameters
from hvdloss.torch.objective import Objective
from hvdloss.torch.ops import communicator_of
from hvdloss.torch.optimizer import DistributedOptimizer

__all__ = ["HorovodStrategy", "StepLog"]

# The same library under two names; the classes of one are not those of the other.
_OLD = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
_NAME = "pytorch_lightning" if _OLD else "lightning.pytorch"
_FABRIC = "lightning_fabric" if _OLD else "lightning.fabric"
_lightning = optional_import(_NAME, "lightning", "hvdloss.torch.integrations.lightning")
_rank_zero = optional_import(
    f"{_FABRIC}.utilities.rank_zero", "lightning", "hvdloss.torch.integrations.lightning"
)


class HorovodStrategy(_lightning.strategies.SingleDeviceStrategy):  # type: ignore[misc]
    """Trains a LightningModule on all ranks with the loss and gradient of one process.

    Each optimizer of ``configure_optimizers`` becomes exact (:func:`hvdloss.torch.DistributedOptimizer`).
    Rank 0's parameters are everybody's at the start; it alone logs, shows progress and writes checkpoints.
    Gradient clipping, schedulers, ``accumulate_grad_batches``, manual optimization and 16-bit precision work
    as ever. Metrics logged with ``sync_dist=True`` are weighted by each rank's batch sizes.

    The module returns what its objective gave, plus penalties. Lightning's samplers pad shards, so data is
    shared out by :class:`hvdloss.torch.ShardedLoader` or ``StreamLoader``. Ranks with any number of batches:
    ``hvd.uneven(loader, self.optimizers())`` in the module's ``train_dataloader``.

    Args:
        objective: whose loss the module returns; several, one for each optimizer; None for the module's
            attribute ``objective``.
        device: this rank's; None for the GPU of its local rank where there is one, or the CPU.
        optimizer: further arguments of ``DistributedOptimizer``, such as ``{"compression": ...}``.
        options: of Lightning's ``SingleDeviceStrategy``: ``precision_plugin``, ``checkpoint_io``.

    Raises:
        ConfigError: no objective, or not as many as optimizers; Lightning is not installed.

    Collectives: one broadcast per parameter at the start of each ``fit``, ``validate``, ...; those of the
    optimizer's steps. Lightning adds its own: small gathers where it broadcasts names and decisions, an
    all-reduce for each metric with ``sync_dist=True``.
    """

    strategy_name = "hvdloss"

    def __init__(
        self,
        objective: Objective | Sequence[Objective] | None = None,
        *,
        device: Any = None,
        optimizer: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        hvd.init()
        if device is None:
            device = f"cuda:{hvd.local_rank()}" if torch.cuda.is_available() else "cpu"
        super().__init__(device=device, **options)
        self.objective, self._options = objective, dict(optimizer or {})
        self._warned = False  # of data that is not shared out
        self.set_world_ranks()

    # -- who is who -------------------------------------------------------------------------------

    def set_world_ranks(self) -> None:
        """Tell Lightning which rank this is."""
        self.global_rank, self.local_rank, self.world_size = hvd.rank(), hvd.local_rank(), hvd.size()
        _rank_zero.rank_zero_only.rank = hvd.rank()

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return bool(self.global_rank == 0)

    @property
    def is_distributed(self) -> bool:
        """Whether there are several ranks: Lightning asks before it reduces metrics."""
        return bool(self.world_size > 1)

    # -- the optimizers ---------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        """Broadcast rank 0's model, and keep Lightning from sharding data, since it repeats samples."""
        trainer._accelerator_connector.use_distributed_sampler = False
        super().setup(trainer)
        broadcast_parameters(self.lightning_module.state_dict(), root_rank=0)

    def process_dataloader(self, dataloader: Any) -> Any:
        """Warn, once, of training data that every rank would take whole."""
        sampler = getattr(dataloader, "sampler", None)
        whole = isinstance(sampler, torch.utils.data.SequentialSampler | torch.utils.data.RandomSampler)
        if whole and self.is_distributed and self.lightning_module.trainer.training and not self._warned:
            self._warned = True
            warnings.warn(
                f"the training data is a plain DataLoader of {len(sampler)} samples, which no sampler shares "
                f"out: unless they are this rank's own part, each of {self.world_size} ranks trains on all. "
                f"Write hvd.ShardedLoader(dataset, Shuffled(len(dataset)), batch_size=...)",
                stacklevel=2,
            )
        return dataloader

    def setup_optimizers(self, trainer: Any) -> None:
        """Make the module's optimizers exact."""
        super().setup_optimizers(trainer)
        plain = list(self.optimizers)
        objectives = self.objective
        if objectives is None:
            objectives = getattr(self.lightning_module, "objective", None)
        objectives = [objectives] if objectives is None or isinstance(objectives, Objective) else objectives
        if len(objectives) != len(plain) or not all(isinstance(one, Objective) for one in objectives):
            raise ConfigError(
                f"{len(plain)} optimizer(s) need as many objectives, got {objectives!r}: give the module an "
                f"attribute `objective`, or HorovodStrategy(objective=...) an hvd.Objective for each"
            )
        names = list(self.lightning_module.named_parameters())
        passes = max(1, trainer.accumulate_grad_batches)
        exact = []
        for one, objective in zip(plain, objectives, strict=True):
            wrapped = DistributedOptimizer(
                one, names, objective, **{"backward_passes_per_step": passes, **self._options}
            )
            if not isinstance(one, torch.optim.LBFGS):
                wrapped.step = functools.partial(_step_once, wrapped)
            # Schedulers were made with the plain optimizer, and would say that it makes no steps.
            one._opt_called = True
            exact.append(wrapped)
        self.optimizers = exact
        self._passes = passes

    def pre_backward(self, closure_loss: torch.Tensor) -> None:
        """Follow a change of ``accumulate_grad_batches``, before a step's first backward pass."""
        passes = max(1, self.lightning_module.trainer.accumulate_grad_batches)
        if passes != self._passes:
            for one in self.optimizers:
                one.set_backward_passes_per_step(passes)
            self._passes = passes

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Undo Lightning's division by ``accumulate_grad_batches``: the step is divided by its weights."""
        if self.lightning_module.automatic_optimization:
            closure_loss = closure_loss * self.lightning_module.trainer.accumulate_grad_batches
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Reduce gradients before Lightning clips them, or its hooks read them."""

        def reduced() -> Any:
            value = closure()
            optimizer.synchronize()
            return value

        return super().optimizer_step(optimizer, reduced, *args, **kwargs)

    # -- what Lightning asks all ranks ------------------------------------------------------------

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the mean over ranks (or sum, min, max) of a tensor or number."""
        value = tensor if isinstance(tensor, torch.Tensor) else torch.tensor(tensor, device=self.root_device)
        name = str(getattr(reduce_op, "name", reduce_op) or "mean").lower()
        if name in ("mean", "avg"):
            wide = value if value.is_floating_point() else value.double()
            return hvd.allreduce(wide, op=hvd.Average, name="hvdloss.lightning.mean")
        if name not in ("sum", "min", "max"):
            raise ConfigError(f"reduce_op={reduce_op!r} is none of mean, sum, min and max")
        return hvd.allreduce(value, op=getattr(hvd, name.capitalize()), name=f"hvdloss.lightning.{name}")

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """Return the ranks' tensors, of one shape, along a new first axis."""
        with torch.set_grad_enabled(sync_grads and torch.is_grad_enabled()):
            return hvd.allgather(tensor[None], name="hvdloss.lightning.gather")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank `src`'s value; it goes as JSON, so that no rank runs what another one sent."""
        try:
            text = json.dumps(obj, default=str)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"only plain values are broadcast, no {type(obj).__name__}: {error}") from error
        texts = communicator_of(hvd.global_process_set).all_gather_bytes(
            text.encode(), "hvdloss.lightning.broadcast"
        )
        if hvd.rank() == src:
            return obj
        try:
            return json.loads(texts[src])
        except ValueError as error:
            raise RankError(f"rank {src} broadcast what is no JSON: {error}") from error

    def barrier(self, name: Any = None, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks."""
        communicator_of(hvd.global_process_set).all_gather_bytes(b"", "hvdloss.lightning.barrier")

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all ranks say so, or any: to stop early, say."""
        texts = communicator_of(hvd.global_process_set).all_gather_bytes(
            bytes([bool(decision)]), "hvdloss.lightning.decision"
        )
        count = sum(one == b"\x01" for one in texts)
        return count == len(texts) if all else count > 0


def _step_once(optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
    """Step with a closure that is evaluated once: its loss need not be made global, which costs a message."""
    if closure is None:
        return type(optimizer).step(optimizer)
    with torch.enable_grad():
        value = closure()
    type(optimizer).step(optimizer)
    return value


class StepLog(_lightning.Callback):  # type: ignore[misc]
    """Hands each finished step's report to Lightning's loggers and to trackers.

    Args:
        trackers: what has ``step(report)`` and ``close()``: :mod:`hvdloss.report.trackers`, say.
        loggers: whether the Trainer's loggers get :func:`hvdloss.report.trackers.scalars`, every
            ``log_every_n_steps``, under ``hvdloss/``.

    Collectives: none.
    """

    def __init__(self, *trackers: Any, loggers: bool = True) -> None:
        super().__init__()
        self.trackers, self.loggers = trackers, loggers
        self._last: dict[int, int] = {}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Tell of a step, if one was finished."""
        for number, optimizer in enumerate(trainer.optimizers):
            report = getattr(optimizer, "last_step", None)
            if report is None or self._last.get(number) == report.step:
                continue
            self._last[number] = report.step
            for tracker in self.trackers:
                tracker.step(report)
            if self.loggers and report.step % trainer.log_every_n_steps == 0 and trainer.is_global_zero:
                prefix = f"hvdloss/{number}/" if len(trainer.optimizers) > 1 else "hvdloss/"
                values = {prefix + name: value for name, value in scalars(report).items()}
                for logger in trainer.loggers:
                    logger.log_metrics(values, step=trainer.global_step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the trackers when training is over."""
        if stage == "fit":
            for tracker in self.trackers:
                tracker.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the trackers; the runs have failed."""
        for tracker in self.trackers:
            if isinstance(tracker, Tracker):
                tracker.close(failed=True)
            else:
                tracker.close()
