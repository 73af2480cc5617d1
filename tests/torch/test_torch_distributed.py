"""Scripts that torchrun starts, where Horovod cannot even be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.ranks.launch import environment, torchrun
from tests.torch.distributed_job import STEPS, data

JOB = Path(__file__).with_name("distributed_job.py")

pytestmark = pytest.mark.timeout(600)


def launch(folder: Path, what: str, ranks: int = 2, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*torchrun(ranks), str(JOB), str(folder), what],
        capture_output=True,
        text=True,
        timeout=500,
        env={**environment(), **more},
        start_new_session=True,
    )


def reference(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return one process's training on all samples, without hvdloss."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    model.load_state_dict(torch.load(folder / "begin-2.pt"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS):
        x, y, weight = data(step)
        optimizer.zero_grad()
        loss = (F.cross_entropy(model(x), y, reduction="none") * weight).sum() / weight.sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.state_dict(), losses


def test_uneven_weighted_training_is_one_processs(tmp_path):
    out = launch(tmp_path, "train")
    assert out.returncode == 0, out.stdout + out.stderr
    state, losses = torch.load(tmp_path / "end-2.pt")
    expected, their_losses = reference(tmp_path)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
    assert losses == pytest.approx(their_losses, rel=1e-12)


def test_a_killed_rank_is_named_by_the_others(tmp_path):
    out = launch(tmp_path, "kill")
    assert out.returncode != 0
    text = (tmp_path / "error").read_text()
    assert text.startswith("LostRankError: ")
    assert "rank 1" in text


@pytest.mark.more
def test_a_stage_that_fails_is_named_by_the_others(tmp_path):
    out = launch(tmp_path, "stages")
    assert out.returncode != 0
    assert (tmp_path / "stage-1").read_text() == "ValueError: the seventh micro-batch"
    text = (tmp_path / "stage-0").read_text()
    assert text.startswith("RankError: ")
    assert "rank 1" in text
    assert "the seventh micro-batch" in text


@pytest.mark.more
def test_exchanges_in_another_order_are_refused_on_every_rank(tmp_path):
    out = launch(tmp_path, "order")
    assert out.returncode == 0, out.stdout + out.stderr
    texts = [(tmp_path / f"error-{rank}").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].count("UsageError: ranks launched different exchanges: rank 1 has 'allreduce.b ") == 1
    assert texts[0].count("rank 0 has 'allreduce.b ") == 1


@pytest.mark.more
def test_a_default_process_group_stays_the_users(tmp_path):
    out = launch(tmp_path, "joined")
    assert out.returncode == 0, out.stdout + out.stderr
    assert [(tmp_path / f"total-{rank}").read_text() for rank in range(2)] == ["4.0", "4.0"]


@pytest.mark.more
def test_ddp_averages_exactly_what_was_weighed_ahead(tmp_path):
    out = launch(tmp_path, "ddp")
    assert out.returncode == 0, out.stdout + out.stderr
    for rank in range(2):
        ours, plain = map(float, (tmp_path / f"errors-{rank}").read_text().split())
        assert ours < 1e-12
        assert plain > 1e-2  # DDP by itself
        refused = (tmp_path / f"refused-{rank}").read_text()
        assert refused == "WeightError: cross_entropy: 1 weights of some rank are negative, NaN or infinite"


@pytest.mark.more
@pytest.mark.parametrize(
    ("names", "text"),
    [
        ({"HVDLOSS_ENGINE": "torch.distributed"}, "torch.distributed needs RANK, WORLD_SIZE, MASTER_ADDR"),
        ({"HVDLOSS_ENGINE": "nccl"}, "HVDLOSS_ENGINE='nccl' is none of"),
        ({"HVDLOSS_ENGINE": "horovod"}, "HVDLOSS_ENGINE='horovod' is not installed"),
    ],
)
def test_what_cannot_begin_says_why(tmp_path, names, text):
    env = {**os.environ, **names}
    out = subprocess.run(
        [sys.executable, str(JOB), str(tmp_path), "train"],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
    )
    assert out.returncode != 0
    assert text in out.stderr
