"""Hugging Face's Trainer on Horovod's ranks, with exact token counts over ranks and micro-batches.

::

    trainer = HorovodTrainer(model, TrainingArguments("runs/lm", use_cpu=True), train_dataset=tokens)
    trainer.train()

Started by ``horovodrun --gloo -np 4 python train.py``; every rank has a Trainer of its own, which for
Accelerate is the only process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hvdloss._util.extras import optional_import
from hvdloss.data import Epoch, Sharding, Shuffled
from hvdloss.errors import ConfigError, UsageError
from hvdloss.report.trackers import scalars
from hvdloss.torch._backend import hvd
from hvdloss.torch.functions import broadcast_parameters
from hvdloss.torch.integrations.data import ShardedLoader
from hvdloss.torch.objective import Objective
from hvdloss.torch.optimizer import DistributedOptimizer

__all__ = ["HorovodTrainer", "absent", "one_of_many", "token_loss"]

_transformers = optional_import("transformers", "transformers", "hvdloss.torch.integrations.transformers")
optional_import("accelerate", "transformers", "hvdloss.torch.integrations.transformers")
IGNORED = -100


def token_loss(objective: Objective, *, shift: bool) -> Callable[..., torch.Tensor]:
    """Return a ``compute_loss_func`` for ``transformers.Trainer``: the objective of logits and labels.

    Labels of -100 are absent, as everywhere in Transformers.

    Args:
        objective: of logits ``(N, C)`` or ``(N, C, T)`` and class indices.
        shift: whether the logits at one place are for the label at the next: causal language models.

    Collectives: none.
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
        if shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        if logits.dim() > labels.dim() > 1:  # classes last; the objective has them second
            logits = logits.movedim(-1, 1)
        return objective(logits, labels)

    return loss


def absent(batch: Any) -> Any:
    """Return a batch in which every label is absent: what a rank without samples brings.

    Raises:
        ConfigError: it has no integer labels.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        raise ConfigError('a rank without samples needs batches with integer "labels", which can be absent')
    return {**batch, "labels": torch.full_like(labels, IGNORED)}


def one_of_many() -> None:
    """Tell Accelerate which of Horovod's ranks this is, so that rank 0 alone logs and saves.

    To be called when there is an ``Accelerator`` or ``TrainingArguments``. Accelerate knows one process, and
    shares neither data nor gradients out: Horovod does.

    Raises:
        ConfigError: Accelerate has ranks of its own, as it starts them under ``mpirun`` and ``torchrun``.

    Collectives: none.
    """
    hvd.init()
    states = optional_import("accelerate.state", "transformers", "hvdloss.torch.integrations.transformers")
    count = states.PartialState().num_processes
    if count != 1:
        raise ConfigError(
            f"Accelerate has {count} processes of its own, whose gradients it would average: launch with "
            f"horovodrun --gloo, not with mpirun, torchrun or accelerate launch"
        )
    for kind in (states.PartialState, states.AcceleratorState):
        if kind._shared_state:  # all of a kind are one
            state = kind()
            state.process_index, state.local_process_index = hvd.rank(), hvd.local_rank()


class HorovodTrainer(_transformers.Trainer):  # type: ignore[misc]
    """A ``transformers.Trainer`` whose steps are those of one process that saw all ranks' batches.

    Each rank takes its shard of the training data; ranks that are through take part with batches whose labels
    are all absent. The loss is divided by the tokens (labels other than -100) of all ranks and micro-batches
    of the step. Clipping, schedules, ``gradient_accumulation_steps`` and ``label_smoothing_factor`` work as
    ever. Rank 0 alone logs and saves; ``loss`` is the mean of the steps' losses, each that of all ranks and
    micro-batches, and with it come :func:`hvdloss.report.trackers.scalars` of the last step, under
    ``hvdloss/``. ``evaluate`` does the same on every rank.

    Checkpoints at the ends of epochs (``save_strategy="epoch"``) can be gone on from.

    Args:
        args, options: of ``transformers.Trainer``.
        objective: the loss; by default cross-entropy.
        sharding: of the training data; by default ``Shuffled(len(train_dataset), seed=args.seed)``.
        shift: see :func:`token_loss`; None to ask the model.
        optimizer: further arguments of :func:`hvdloss.torch.DistributedOptimizer`.

    Raises:
        ConfigError: an argument that cannot be used; Accelerate has ranks of its own.

    Collectives: one broadcast per parameter when training begins, and those of the optimizer's steps.
    """

    def __init__(
        self,
        *args: Any,
        objective: Objective | None = None,
        sharding: Sharding | None = None,
        shift: bool | None = None,
        optimizer: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        hvd.init()
        settings = options.get("args", args[1] if len(args) > 1 else None)
        smoothing = getattr(settings, "label_smoothing_factor", 0.0)
        if smoothing and objective is not None:
            raise ConfigError(
                f"label_smoothing_factor={smoothing!r} with objective=: say it there, "
                f'Objective("cross_entropy", label_smoothing={smoothing!r}), and leave the argument out'
            )
        super().__init__(*args, **options)
        one_of_many()
        self.state.is_world_process_zero = self.state.is_local_process_zero = hvd.rank() == 0
        self.objective = objective or Objective("cross_entropy", label_smoothing=smoothing)
        self.sharding = sharding
        self._options = dict(optimizer or {})
        if self.compute_loss_func is None:
            if shift is None:
                shift = _causal(self.model)
            self.compute_loss_func = token_loss(self.objective, shift=shift)

    @property
    def last_step(self) -> Any:
        """The report of the last step (:class:`hvdloss.StepReport`); None before the first."""
        return getattr(self._exact(), "last_step", None)

    def _exact(self) -> Any:
        optimizer = self.optimizer
        while optimizer is not None and not hasattr(optimizer, "_hvdloss"):  # Accelerate's is around it
            optimizer = getattr(optimizer, "optimizer", None)
        return optimizer

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Make the optimizer, or take the one given, and make it exact."""
        super().create_optimizer(*args, **options)
        if self._exact() is None:
            broadcast_parameters(self.model.state_dict(), root_rank=0)
            self.optimizer = DistributedOptimizer(
                self.optimizer,
                self.model.named_parameters(),
                self.objective,
                **{"backward_passes_per_step": self.args.gradient_accumulation_steps, **self._options},
            )
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """Return this rank's batches of the training data."""
        if self.train_dataset is None or not hasattr(self.train_dataset, "__len__"):
            raise ConfigError("train_dataset must be one with a length, to be shared out over ranks")
        sharding = self.sharding or Shuffled(len(self.train_dataset), seed=self.args.seed)
        return _Loader(
            self.train_dataset,
            sharding,
            self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            empty=absent,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """Go forward and backward; have gradients reduced before they are clipped."""
        loss = super().training_step(*args, **options)
        if not self.accelerator.sync_gradients:  # Trainer adds up what it logs: the whole step's comes last
            return torch.zeros_like(loss)
        self._exact().synchronize()
        return torch.full_like(loss, self.last_step.loss)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Add the last step's numbers where the loss is logged."""
        if "loss" in logs and self.last_step is not None:
            logs.update({f"hvdloss/{name}": value for name, value in scalars(self.last_step).items()})
        super().log(logs, *args, **options)

    def is_world_process_zero(self) -> bool:
        """Whether this is rank 0."""
        return bool(hvd.rank() == 0)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:  # one file, of which every rank would be the writer
            super()._save_rng_state(output_dir)


def _causal(model: Any) -> bool:
    """Return whether the model's own loss takes the logits at one place for the label at the next."""
    losses = optional_import(
        "transformers.loss.loss_utils", "transformers", "hvdloss.torch.integrations.transformers"
    )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return getattr(model, "loss_function", None) is losses.ForCausalLMLoss  # also where it names none


class _Loader(ShardedLoader):
    """A loader as Trainer expects one."""

    def __init__(self, dataset: Any, *args: Any, **options: Any) -> None:
        super().__init__(dataset, *args, **options)
        self.dataset = dataset

    def set_epoch(self, number: int) -> None:
        """Begin this epoch next."""
        self.epoch = Epoch(self.sharding, self.ranks, number)

    @property
    def sampler(self) -> Any:
        """Asked for when an epoch is to be gone on with in its middle."""
        raise UsageError(
            "this checkpoint was saved in the middle of an epoch, where HorovodTrainer cannot go on. Save at "
            'the ends of epochs (save_strategy="epoch"), or begin the epoch again (ignore_data_skip=True)'
        )
