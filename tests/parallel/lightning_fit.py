"""Lightning's Trainer on real ranks: what HorovodStrategy promises beyond the example's exact parameters."""

from __future__ import annotations

import logging
import math
import tempfile
import unittest
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import lightning as L
except ImportError:
    raise unittest.SkipTest("lightning is not installed: pip install 'hvdloss[lightning]'") from None
import pytest
import torch
from torch import nn

import hvdloss.torch as hvd
from hvdloss.errors import ConfigError
from hvdloss.torch.integrations.lightning import HorovodStrategy, StepLog
from hvdloss.torch.ops import communicator_of
from tests.ranks import needs

NEEDS = needs(more="gloo-2")

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


class Line(L.LightningModule):
    """A line through points, of which every rank has others."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(hvd.rank())
        self.layer = nn.Linear(3, 1, dtype=torch.float64)
        self.objective = hvd.Objective("mse")
        self.settings = settings
        self.automatic_optimization = not settings.get("manual")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        if self.automatic_optimization:
            loss = self.objective(self.layer(x), y)
            self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(x))
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.objective(self.layer(x), y))
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        if self.settings.get("lbfgs"):
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)

    def train_dataloader(self) -> Any:
        return Known(points(hvd.rank()))


class Unknown:
    """Batches of which nobody knows the number."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Known(Unknown):
    """The same with a number. (A list would be several loaders to Lightning.)"""

    def __len__(self) -> int:
        return len(self.batches)


def points(rank: int, steps: int = 3) -> list[Any]:
    """Return a rank's batches of unequal length."""
    made = torch.Generator().manual_seed(100 + rank)
    out = []
    for step in range(steps):
        x = torch.randn(2 + 3 * rank + step, 3, dtype=torch.float64, generator=made)
        out.append((x, x.sum(1, keepdim=True) + rank))
    return out


def fit(model: L.LightningModule, epochs: int = 2, **options: Any) -> L.Trainer:
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            **{
                "strategy": HorovodStrategy(),
                "accelerator": "cpu",
                "max_epochs": epochs,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": folder,
                **options,
            }
        )
        trainer.fit(model)
    return trainer


def reference(lengths: Any = None, epochs: int = 2, lbfgs: bool = False) -> tuple[nn.Linear, list[float]]:
    """Train in a plain loop on all ranks' points; return the layer, and the mean loss of each epoch."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 1, dtype=torch.float64)
    ranks = [points(rank, 3 if lengths is None else lengths(rank)) for rank in range(hvd.size())]
    optimizer = (
        torch.optim.LBFGS(layer.parameters(), lr=0.5, max_iter=4)
        if lbfgs
        else torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.5)
    )
    means = []
    for _ in range(epochs):
        losses, count = 0.0, 0
        for step in range(max(map(len, ranks))):
            mine = [batches[step] for batches in ranks if step < len(batches)]
            x, y = torch.cat([x for x, _ in mine]), torch.cat([y for _, y in mine])

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(layer(x), y)
                loss.backward()
                return loss

            losses += len(x) * nn.functional.mse_loss(layer(x), y).item()
            count += len(x)
            optimizer.step(closure)
        means.append(losses / count)
    return layer, means


def error(model: Line, layer: nn.Linear) -> float:
    mine = torch.cat([model.layer.weight.detach().flatten(), model.layer.bias.detach()])
    right = torch.cat([layer.weight.detach().flatten(), layer.bias.detach()])
    return float((mine - right).norm() / right.norm())


def case_unequal_batches_and_the_metric_of_all_samples() -> dict[str, float]:
    model = Line()
    trainer = fit(model)
    layer, means = reference()
    found = {"parameters": error(model, layer)}
    assert found["parameters"] <= 1e-12
    # Lightning keeps its sums in float32, and means them over ranks by what each had.
    told = trainer.callback_metrics["loss"].item()
    assert math.isclose(told, means[-1], rel_tol=1e-5), (told, means)
    assert trainer.world_size == hvd.size()
    assert trainer.is_global_zero == (hvd.rank() == 0)
    assert trainer.optimizers[0].last_step.step == 6
    return found


def case_manual_optimization() -> dict[str, float]:
    model = Line(manual=True)
    fit(model)
    found = {"parameters": error(model, reference()[0])}
    assert found["parameters"] <= 1e-12
    return found


def case_a_closure_that_is_evaluated_several_times() -> dict[str, float]:
    model = Line(lbfgs=True)
    fit(model, epochs=1)
    found = {"parameters": error(model, reference(epochs=1, lbfgs=True)[0])}
    assert found["parameters"] <= 1e-10  # its line search magnifies rounding
    return found


def case_ranks_with_other_numbers_of_batches_stop_together() -> dict[str, float]:
    def lengths(rank: int) -> int:
        return 3 if rank == 0 else 1

    class Ragged(Line):
        def train_dataloader(self) -> Any:
            return hvd.uneven(Unknown(points(hvd.rank(), lengths(hvd.rank()))), self.optimizers())

    model = Ragged()
    trainer = fit(model)
    found = {"parameters": error(model, reference(lengths)[0])}
    assert found["parameters"] <= 1e-12
    assert trainer.optimizers[0].last_step.step == 6
    return found


def case_all_stop_early_if_one_would() -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            mine = hvd.rank() == hvd.size() - 1 and trainer.current_epoch == 1
            trainer.should_stop = trainer.strategy.reduce_boolean_decision(mine, all=False)

    trainer = fit(Line(), epochs=9, callbacks=[Stop()])
    assert trainer.current_epoch == 2
    assert trainer.strategy.reduce_boolean_decision(True)
    assert not trainer.strategy.reduce_boolean_decision(hvd.rank() == 0)


def case_rank_0_alone_logs_and_saves() -> None:
    class Sink:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.closed = 0

        def step(self, report: Any) -> None:
            self.steps.append(report.step)

        def close(self) -> None:
            self.closed += 1

    sink = Sink()
    communicator = communicator_of(hvd.global_process_set)
    own = tempfile.mkdtemp()
    folder = Path(communicator.all_gather_bytes(own.encode(), "folder")[0].decode())
    # Each rank names a folder of its own; rank 0's counts.
    fit(
        Line(),
        enable_checkpointing=True,
        logger=L.pytorch.loggers.CSVLogger(folder if hvd.rank() == 0 else own),
        log_every_n_steps=1,
        callbacks=[StepLog(sink), L.pytorch.callbacks.ModelCheckpoint(dirpath=Path(own) / "saved")],
    )
    communicator.all_gather_bytes(b"", "saved")
    assert sink.steps == [1, 2, 3, 4, 5, 6]
    assert sink.closed == 1
    files = [path for path in Path(own).rglob("*") if path.is_file()]
    if hvd.rank():
        assert not files, files
        return
    assert len([path for path in files if path.suffix == ".ckpt"]) == 1
    (table,) = (path for path in files if path.name == "metrics.csv")
    text = table.read_text()
    assert "hvdloss/ranks/1/share" in text


def case_what_lightning_asks_all_ranks() -> None:
    strategy = HorovodStrategy()
    rank, size = hvd.rank(), hvd.size()
    assert strategy.reduce(torch.tensor(rank)).item() == (size - 1) / 2  # of integers, too
    assert strategy.reduce(torch.tensor(rank), reduce_op="sum").item() == size * (size - 1) / 2
    assert strategy.reduce(float(rank), reduce_op="max").item() == size - 1
    assert strategy.all_gather(torch.tensor([rank])).tolist() == [[one] for one in range(size)]
    assert strategy.broadcast({"a": [rank, None]}, src=1) == {"a": [1, None]}
    strategy.barrier()
    with pytest.raises(ConfigError, match="reduce_op='product'"):
        strategy.reduce(torch.ones(1), reduce_op="product")


def case_a_module_without_an_objective_is_told() -> None:
    class Without(Line):
        def __init__(self) -> None:
            super().__init__()
            del self.objective

    with pytest.raises(ConfigError, match="give the module an attribute `objective`"):
        fit(Without())


def case_data_that_every_rank_takes_whole_is_warned_of_once() -> None:
    x = torch.ones(4, 3, dtype=torch.float64)
    data = torch.utils.data.TensorDataset(x, x[:, :1])
    ours = Known(points(hvd.rank()))
    for loader, count in (
        (torch.utils.data.DataLoader(data, 2), int(hvd.size() > 1)),
        (ours, 0),
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            L.Trainer(
                strategy=HorovodStrategy(),
                accelerator="cpu",
                max_epochs=2,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(Line(), loader)
        found = [one for one in told if "plain DataLoader of 4 samples" in str(one.message)]
        assert len(found) == count, [str(one.message) for one in told]
