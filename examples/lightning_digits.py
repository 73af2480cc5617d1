"""A LightningModule on several ranks, with uneven data, clipping and accumulation.

Data: 600 of scikit-learn's digits. The last rank has the fewest images; when its own are used up it takes
part with batches of no rows. Trains by Lightning's Trainer on all ranks, and compares with one process.
"""

from __future__ import annotations

import logging
import sys
import warnings

import lightning as L
import torch
from _ways_in import all_batches, arguments, conclude, difference, digits, shares
from torch import nn

import hvdloss.torch as hvd
from hvdloss.data import Shuffled
from hvdloss.report.trackers import TensorBoard
from hvdloss.torch.integrations.lightning import HorovodStrategy, StepLog

ACCUMULATE, CLIP = 2, 0.5


class Digits(L.LightningModule):
    """What one writes: an ordinary module that has an objective."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.objective = hvd.Objective("cross_entropy")

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = self.objective(self.layers(x), y)
        self.log("train_loss", loss, on_epoch=True, on_step=False, sync_dist=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def one_process(model: Digits, data: torch.utils.data.TensorDataset, sharding: Shuffled, args) -> None:
    """Train in a plain loop on all ranks' samples."""
    settings = model.configure_optimizers()
    optimizer, scheduler = settings["optimizer"], settings["lr_scheduler"]
    batches = list(all_batches(sharding, args.epochs, args.batch))
    of_an_epoch = len(batches) // args.epochs
    for epoch in range(args.epochs):
        mine = batches[epoch * of_an_epoch : (epoch + 1) * of_an_epoch]
        for first in range(0, len(mine), ACCUMULATE):
            x, y = data[torch.cat(mine[first : first + ACCUMULATE])]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.layers(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        scheduler.step()


def main() -> int:
    args = arguments(__doc__)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Total length of `ShardedLoader`.*")
    strategy = HorovodStrategy()  # initialises Horovod
    torch.set_num_threads(1)  # ranks share the cores
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(hvd.rank())  # the ranks' models differ until rank 0's is everybody's
    data, model = digits(), Digits()
    sharding = Shuffled(len(data), seed=1, shares=shares())
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        precision="64-true",
        max_epochs=args.epochs,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=CLIP,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        default_root_dir=args.output,
        logger=False,
        callbacks=[StepLog(TensorBoard(f"{args.output}/tensorboard"))],
    )
    trainer.fit(model, hvd.ShardedLoader(data, sharding, batch_size=args.batch))

    torch.manual_seed(0)
    reference = Digits()
    one_process(reference, data, sharding, args)
    steps = trainer.optimizers[0].last_step.step
    loss = trainer.callback_metrics["train_loss"].item()
    return conclude(args, "Lightning", difference(model, reference), steps=steps, train_loss=loss)


if __name__ == "__main__":
    sys.exit(main())
