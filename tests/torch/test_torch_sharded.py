"""Models split over ranks, in PyTorch, by class, by layer and into stages: under real ranks, and alone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

import hvdloss.torch as hvd
from hvdloss.errors import ConfigError
from tests.ranks import Case, parallel_cases
from tests.ranks.launch import environment, torchrun
from tests.torch import pipelining_job


# Launches of their own: process sets of a grid stay, and other cases make the same ones.
@parallel_cases("torch_sharded", group="torch_sharded")
def test_sharded(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("torch_split", group="torch_sharded")
def test_split_layers(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("torch_stages", group="torch_sharded")
def test_stages(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.more)])
def test_pytorchs_own_pipeline_with_an_exact_loss(ranks: int, tmp_path: Path) -> None:
    out = subprocess.run(
        [*torchrun(ranks), pipelining_job.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
        start_new_session=True,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    for rank in range(ranks):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == 2
        assert max(found.values()) <= 1e-12, found


def test_alone_it_is_cross_entropy() -> None:
    logits = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine, whole = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    target = torch.randint(4, (3, 5), generator=torch.Generator().manual_seed(1))
    losses = hvd.sharded_cross_entropy(mine, target, hvd.ClassShards(4), label_smoothing=0.2)
    right = torch.nn.functional.cross_entropy(
        whole.movedim(-1, 1), target, reduction="none", label_smoothing=0.2
    )
    torch.testing.assert_close(losses, right, rtol=1e-13, atol=1e-14)
    losses.pow(2).sum().backward()
    right.pow(2).sum().backward()
    torch.testing.assert_close(mine.grad, whole.grad, rtol=1e-12, atol=1e-14)


def test_a_compiled_caller() -> None:
    head = hvd.ShardedLinear(3, 5)

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return hvd.sharded_cross_entropy(head(x), y, head.shards).mean()

    x, y = torch.randn(4, 3), torch.tensor([0, 4, 2, 1])
    compiled = torch.compile(loss, backend="eager")
    torch.testing.assert_close(compiled(x, y), loss(x, y))
    compiled(x, y).backward()
    assert head.weight.grad is not None


def test_a_head_on_the_meta_device_draws_nothing() -> None:
    before = torch.random.get_rng_state()
    head = hvd.ShardedLinear(3, 5, device="meta")
    assert head.weight.device.type == "meta"
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_saved_head_is_an_ordinary_one(tmp_path) -> None:
    head = hvd.ShardedLinear(3, 5)
    torch.save(hvd.full_state_dict(head), tmp_path / "head.pt")
    ordinary = torch.nn.Linear(3, 5)
    ordinary.load_state_dict(torch.load(tmp_path / "head.pt"))
    assert torch.equal(ordinary.weight, head.weight)
    assert "classes=5" in repr(head)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="bias=False"):
        hvd.ShardedLinear(3, 5, normalize=True)
    with pytest.raises(ConfigError, match="in_features=3"):
        hvd.ShardedLinear(3, 5)(torch.zeros(2, 4))
    with pytest.raises(ConfigError, match="divisor of 1"):
        hvd.grid(2)
