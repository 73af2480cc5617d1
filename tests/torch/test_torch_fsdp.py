"""FSDP2, and FSDP2 with replicas, average exactly what was weighed ahead; what they would not is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.ranks.launch import environment, torchrun
from tests.torch import fsdp_job

JOB = Path(fsdp_job.__file__)

pytestmark = pytest.mark.timeout(600)


def launch(folder: Path, what: str, ranks: int = 2) -> list[dict]:
    """Return what each rank found."""
    out = subprocess.run(
        [*torchrun(ranks), str(JOB), str(folder), what],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment(),
        start_new_session=True,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    return [json.loads((folder / f"{what}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("what", "ranks"),
    [
        ("average", 2),
        pytest.param("added", 2, marks=pytest.mark.more),
        pytest.param("average", 4, marks=pytest.mark.more),
        pytest.param("added", 4, marks=pytest.mark.more),
    ],
)
def test_sharded_gradients_and_their_clipping_are_one_processs(tmp_path, what, ranks):
    for errors in launch(tmp_path, what, ranks):
        assert max(errors["gradient"], errors["norm"], errors["clipped"]) < 1e-12
        assert errors["plain"] > 0.1  # FSDP2 by itself


@pytest.mark.more
def test_losses_of_all_ranks_are_averaged_or_added_up(tmp_path):
    for found in launch(tmp_path, "functions"):
        assert max(found.values()) < 1e-12


@pytest.mark.more
def test_mixed_precision_is_as_near_as_its_numbers_are(tmp_path):
    for found in launch(tmp_path, "mixed"):
        for name, limit in (("bfloat16", 2e-2), ("float32", 1e-6), ("sums", 1e-6)):
            errors = found[name]
            assert max(errors["gradient"], errors["norm"], errors["clipped"]) < limit
            assert errors["plain"] > 0.1


@pytest.mark.more
def test_another_division_is_refused_on_every_rank_before_anything_is_reduced(tmp_path):
    first, second = launch(tmp_path, "refused")
    assert first == second
    assert first["factor"].startswith(
        "ConfigError: cross_entropy: ahead=True is for gradients that are averaged"
    )
    assert "divides those of FSDPTagger by 1, on 2 ranks" in first["factor"]
    assert "ahead='sum' is for gradients that are added up" in first["sum"]
    assert first["weight"].startswith("WeightError: ")
    assert float(first["after"]) < 1e-12


@pytest.mark.more
def test_accelerate_averages_exactly_and_what_it_divides_twice_is_refused(tmp_path):
    pytest.importorskip("accelerate")
    for found in launch(tmp_path, "accelerated"):
        assert max(found["gradient"], found["norm"], found["clipped"]) < 1e-12
        assert found["plain"] > 0.1
        assert found["refused"].startswith(
            "ConfigError: cross_entropy: accelerator.backward(loss) divides by"
        )


@pytest.mark.more
def test_a_sharded_checkpoint_goes_on_in_one_process(tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from torch.distributed.checkpoint.state_dict import set_state_dict

    launch(tmp_path, "checkpoint")
    dcp_to_torch_save(tmp_path / "checkpoint", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    expected, their_state = torch.load(tmp_path / "alone.pt")
    models = []
    for how in ("loaded", "alone"):
        model = fsdp_job.begin()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if how == "loaded":
            set_state_dict(
                model, optimizer, model_state_dict=whole["model"], optim_state_dict=whole["optimizer"]
            )
        else:
            model.load_state_dict(expected)
            optimizer.load_state_dict(their_state)
        if how == "loaded":
            for name, value in model.state_dict().items():
                torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
        optimizer.zero_grad()
        model(torch.arange(10).view(2, 5)).square().sum().backward()
        optimizer.step()  # with its moments
        models.append(model)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
