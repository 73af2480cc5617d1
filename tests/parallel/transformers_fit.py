"""Hugging Face's Trainer on real ranks: what HorovodTrainer promises beyond its example's parameters."""

from __future__ import annotations

import os
import tempfile
import unittest
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import accelerate
    import transformers
except ImportError:
    raise unittest.SkipTest("transformers is not installed: pip install 'hvdloss[transformers]'") from None
import pytest
import torch
from torch import nn

import hvdloss.torch as hvd
from hvdloss.data import Shuffled
from hvdloss.errors import ConfigError, UsageError
from hvdloss.torch.integrations.transformers import HorovodTrainer, absent, one_of_many
from hvdloss.torch.ops import communicator_of
from tests.ranks import needs

NEEDS = needs(more="gloo-2")

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Classifier(nn.Module):
    """Of points; as Trainer wants a model: a dict with logits, and a loss where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(hvd.rank())
        self.layer = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        logits = self.layer(x)
        return {"logits": logits}


def points(count: int = 30) -> list[dict[str, torch.Tensor]]:
    made = torch.Generator().manual_seed(3)
    x = torch.randn(count, 4, dtype=torch.float64, generator=made)
    return [{"x": x[i], "labels": torch.tensor(i % 3)} for i in range(count)]


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([one[name] for one in samples]) for name in samples[0]}


def trainer(folder: Path, model: Any = None, **settings: Any) -> HorovodTrainer:
    data = points()
    shares = [float(2 + hvd.size() - rank) for rank in range(hvd.size())]
    shares[-1] = 0.0  # a rank without a sample
    return HorovodTrainer(
        model or Classifier(),
        transformers.TrainingArguments(
            str(folder),
            **{
                "num_train_epochs": 2,
                "per_device_train_batch_size": 8,
                "optim": "sgd",
                "learning_rate": 0.3,
                "lr_scheduler_type": "constant",
                "use_cpu": True,
                "disable_tqdm": True,
                "remove_unused_columns": False,
                "save_strategy": "no",
                "report_to": "none",
                "logging_steps": 1,
                **settings,
            },
        ),
        train_dataset=data,
        data_collator=collate,
        sharding=Shuffled(len(data), seed=1, shares=shares),
    )


def shared_folder() -> Path:
    own = tempfile.mkdtemp(prefix="hvdloss-hf-")
    return Path(communicator_of(hvd.global_process_set).all_gather_bytes(own.encode(), "folder")[0].decode())


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def case_a_rank_without_samples_takes_part() -> dict[str, float]:
    one = trainer(shared_folder())
    one.train()
    ranks = one.last_step.ranks
    assert ranks[-1].elements == 0
    assert one.last_step.step == one.state.global_step == 8
    assert one.last_step.elements == 30 - 3 * 8
    # Rank 0 alone has all samples of two: the steps are those of a plain loop over its batches.
    if hvd.size() > 2:
        return {}
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    sharding, data = one.sharding, points()
    for epoch in range(2):
        order = sharding.shards(hvd.size(), epoch)[0]
        for first in range(0, 30, 8):
            batch = collate([data[i] for i in order[first : first + 8]])
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(batch["x"]), batch["labels"]).backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
    right = torch.cat([p.detach().flatten() for p in layer.parameters()])
    found = {"parameters": float((flat(one.model) - right).norm() / right.norm())}
    assert found["parameters"] <= 1e-12
    return found


def case_label_smoothing_and_the_logged_loss_are_of_all_ranks() -> dict[str, float]:
    """Two micro-batches a step, the last one of a rank by itself: as one process with a step's rows."""
    model = Classifier()
    model.config = None  # Trainer looks there for another kind of task
    one = trainer(
        shared_folder(), model, label_smoothing_factor=0.1, gradient_accumulation_steps=2, num_train_epochs=1
    )
    shares = [float(1 + rank) for rank in range(hvd.size())]
    one.sharding = Shuffled(30, seed=1, shares=shares)
    one.train()
    torch.manual_seed(0)
    layer, data = nn.Linear(4, 3, dtype=torch.float64), points()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    shards = [one.sharding.shards(hvd.size(), 0)[rank] for rank in range(hvd.size())]
    losses = []
    for first in range(0, max(map(len, shards)), 16):
        batch = collate([data[i] for shard in shards for i in shard[first : first + 16]])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(batch["x"]), batch["labels"], label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    right = torch.cat([p.detach().flatten() for p in layer.parameters()])
    found = {"parameters": float((flat(one.model) - right).norm() / right.norm())}
    assert found["parameters"] <= 1e-12, found
    told = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
    assert told == pytest.approx(losses, abs=1e-4)
    return found


def case_training_goes_on_from_the_end_of_an_epoch() -> dict[str, float]:
    whole = trainer(shared_folder())
    whole.train()
    folder = shared_folder()
    first = trainer(folder, num_train_epochs=1, save_strategy="epoch")
    first.train()
    communicator_of(hvd.global_process_set).all_gather_bytes(b"", "saved")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-4"]
    second = trainer(folder)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert second.state.global_step == 8
    found = {"parameters": float((flat(second.model) - flat(whole.model)).norm() / flat(whole.model).norm())}
    assert found["parameters"] <= 1e-12, found
    return found


def case_the_middle_of_an_epoch_is_refused() -> None:
    folder = shared_folder()
    first = trainer(folder, max_steps=3, save_strategy="steps", save_steps=3)
    first.train()
    communicator_of(hvd.global_process_set).all_gather_bytes(b"", "saved")
    second = trainer(folder)
    with pytest.raises(UsageError, match="saved in the middle of an epoch"):
        second.train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def case_rank_0_alone_logs_and_saves() -> None:
    own = Path(tempfile.mkdtemp(prefix="hvdloss-hf-"))  # each rank names a folder of its own
    one = trainer(own, save_strategy="epoch")
    one.train()
    files = [path for path in own.rglob("*") if path.is_file()]
    assert bool(files) == (hvd.rank() == 0), files
    assert one.is_world_process_zero() == one.args.should_save == (hvd.rank() == 0)
    assert accelerate.PartialState().is_main_process == (hvd.rank() == 0)
    told = [entry for entry in one.state.log_history if "hvdloss/loss" in entry]
    assert [entry["hvdloss/elements"] for entry in told] == [8.0, 8.0, 8.0, 6.0] * 2
    assert told[-1]["hvdloss/loss"] == one.last_step.loss


def case_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="label_smoothing_factor="):
        HorovodTrainer(
            Classifier(),
            transformers.TrainingArguments(str(shared_folder()), label_smoothing_factor=0.1, use_cpu=True),
            objective=hvd.Objective("cross_entropy"),
        )
    with pytest.raises(ConfigError, match='integer "labels"'):
        absent({"x": torch.ones(1)})
    state = accelerate.PartialState()
    state.num_processes = 2
    try:
        with pytest.raises(ConfigError, match="Accelerate has 2 processes of its own"):
            one_of_many()
    finally:
        state.num_processes = 1
