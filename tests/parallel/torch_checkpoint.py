"""Checkpoints on several ranks: a run that goes on is the one that was not interrupted."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from torch_support import DEVICE, before_case, flat, generator, here, raises_everywhere, same_on_all_ranks

import hvdloss
import hvdloss.torch as hvd
from hvdloss.data import Shuffled
from hvdloss.terms.policies import BatchShares, RankWeights, SyncPeriod
from hvdloss.terms.policies.period import OuterStep
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 dist-2")

__all__ = ["before_case"]

ROWS = 50


class Run:
    """A model with dropout, an objective with terms, a loader, a schedule: all that a checkpoint holds."""

    def __init__(self, folder: Path, terms) -> None:
        g = generator(3)
        x = torch.randn(ROWS, 3, generator=g, dtype=torch.float64)
        y = torch.randint(0, 2, (ROWS,), generator=g)
        torch.manual_seed(5)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(3, 8, dtype=torch.float64),
            torch.nn.LayerNorm(8, dtype=torch.float64),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(8, 2, dtype=torch.float64),
        ).to(DEVICE)
        self.objective = hvd.Objective("cross_entropy", terms=terms)
        plain = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1)
        self.optimizer = hvd.DistributedOptimizer(plain, self.model.named_parameters(), self.objective)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        rows = torch.utils.data.TensorDataset(x, y)
        self.loader = hvd.ShardedLoader(rows, Shuffled(ROWS, seed=2), 4)
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        self.checkpoint = hvd.Checkpoint(folder, **parts, data=self.loader, keep=2)

    def train(self, steps: int):
        out = []
        for _ in self.loader.epochs(9):
            for x, y in self.loader:
                self.optimizer.zero_grad()
                self.objective(self.model(here(x)), here(y)).backward()
                self.optimizer.step()
                self.schedule.step()
                out.append(self.optimizer.last_step)
                if len(out) == steps:
                    return out
        raise AssertionError


def _folder() -> Path:
    """Return a folder that is there for rank 0 only."""
    made = Path(tempfile.mkdtemp(prefix="hvdloss-checkpoint-"))
    return made / "checkpoints" if hvd.rank() == 0 else made / "none" / "here"


def _goes_on(terms):
    folder = _folder()
    hvd.seed_everything(7)
    run = Run(folder, terms())
    assert run.checkpoint.load() is None
    before = run.train(5)[-1].step
    run.checkpoint.save(before, epoch=run.loader.epoch.number)
    expected, end = run.train(11), flat(run.model.parameters())
    hvd.seed_everything(8)
    again = Run(folder, terms())
    loaded = again.checkpoint.load()
    assert (loaded.step, loaded.ranks, loaded.values) == (before, hvd.size(), {"epoch": 0})
    found = again.train(11)
    assert [r.step for r in found] == [r.step for r in expected] == list(range(before + 1, before + 12))
    error = max(abs(a.loss / b.loss - 1) for a, b in zip(found, expected, strict=True))
    assert error < 1e-12
    assert (flat(again.model.parameters()) - end).abs().max() < 1e-12
    same_on_all_ranks(repr([r.loss for r in found]))
    assert hvd.rank() == 0 or not folder.exists()
    shutil.rmtree(folder.parent, ignore_errors=True)
    return {"error": error}


def case_a_run_that_goes_on_is_the_run_that_was_not_interrupted():
    return _goes_on(
        lambda: (hvdloss.DataSkew(price=0.1, classes=2, window=4, policies=(RankWeights("dro", step=0.5),)),)
    )


def case_local_steps_with_an_outer_step_go_on():
    def terms():
        period = SyncPeriod(3, outer=OuterStep(0.7, 0.9))
        return (hvdloss.CommunicationCost(policies=(period, BatchShares(8, every=2))),)

    folder = _folder()
    hvd.seed_everything(7)
    run = Run(folder, terms())
    run.train(5)
    run.checkpoint.save(5)  # in the middle of a stretch: parameters are averaged
    same_on_all_ranks(repr(flat(run.model.parameters()).tolist()))
    velocity = run.optimizer._hvdloss.state_dict()["velocity"]
    assert velocity is not None
    again = Run(folder, terms())
    again.checkpoint.load()
    held = again.optimizer._hvdloss.state_dict()["velocity"]
    assert all(torch.equal(a, b) for a, b in zip(held, velocity, strict=True))
    again.train(6)
    again.optimizer.exchange()
    same_on_all_ranks(repr(flat(again.model.parameters()).tolist()))
    shutil.rmtree(folder.parent, ignore_errors=True)


def case_damage_is_the_same_on_all_ranks():
    folder = _folder()
    run = Run(folder, ())
    run.train(1)
    for step in (1, 2):
        run.checkpoint.save(step)
    if hvd.rank() == 0:
        file = folder / "00000002.optimizer.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    raises_everywhere(
        hvdloss.CheckpointError,
        lambda: run.checkpoint.load(fallback=False),
        "rank 0 could not load",
        "00000002.optimizer.safetensors",
        "SHA-256",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = run.checkpoint.load()
    assert (loaded.step, list(loaded.skipped)) == (1, ["00000002.json"])
    assert "going on from checkpoint 1" in str(caught[-1].message)
    other = hvd.Checkpoint(folder, model=torch.nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raises_everywhere(hvdloss.CheckpointError, other.load, "part 'model'", "does not fit")
    shutil.rmtree(folder.parent, ignore_errors=True)
