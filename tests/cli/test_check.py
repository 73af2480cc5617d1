"""`hvdloss check` on real ranks: faults are found, and named; their mended forms are exact."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from hvdloss.cli.errors import Exit
from tests.cli.conftest import run_cli

pytest.importorskip("torch")
JOB = Path(__file__).with_name("check_job.py")
horovod = pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod: hvdloss install")
OFF = {
    "uneven": ["mean_of_means"],
    "masked": ["mean_of_means"],
    "weighted": ["mean_of_means"],
    "clipped": ["mean_of_means"],
    "closure": ["mean_of_means"],
    "added": ["passes_added_up"],
    "same": ["same_data"],
    "norm": ["batch_norm"],
}


def checked(engine: str, *kinds: str, ranks: int = 2, launcher: str = "torchrun") -> tuple[int, Any]:
    """Return the exit status, and what was found of each kind of step."""
    options = ["-np", str(ranks), "--steps", str(len(kinds)), "--launcher", launcher, "--json"]
    done = run_cli("check", *options, str(JOB), engine, ",".join(kinds))
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == ranks
    return done.returncode, dict(zip(kinds, found["steps"], strict=True))


def causes(found: Any) -> list[str]:
    return [cause["kind"] for cause in found["causes"]]


def hold(found: Any, exact: set[str], by: str) -> None:
    """Assert that steps of these kinds are exact, and the others off, for the causes of their kinds."""
    for kind, one in found.items():
        assert one["reduced_by"] == by
        assert one["problems"] == []
        if kind in exact:
            assert (one["verdict"], causes(one)) == ("exact", []), (kind, one)
            assert one["error"] < 1e-12
        else:
            assert (one["verdict"], causes(one)) == ("not exact", OFF[kind]), (kind, one)
            assert kind in ("same", "norm") or one["error"] > 0.02
            assert kind in ("same", "norm") or one["parameter"] == "0.weight"


def test_steps_of_ddp_are_told_apart():
    exact = {"even", "penalty", "accumulated", "counted"}
    off = ("uneven", "masked", "weighted", "added", "same", "clipped", "closure")
    status, found = checked("ddp", *exact, *off, "custom")
    custom = found.pop("custom")
    assert status == 1
    hold(found, exact, "DDP")
    assert custom["verdict"] == "could not tell"
    assert custom["causes"] == []
    assert "none of PyTorch's loss functions" in custom["problems"][0]
    assert found["masked"]["causes"][0]["because"] == ["masked or ignored elements"]
    assert found["uneven"]["weights"] == [8, 32]


@horovod
def test_horovods_optimizer_is_off_where_ranks_are_uneven():
    status, found = checked("horovod", "even", "uneven", launcher="horovodrun")
    assert status == 1
    hold(found, {"even"}, "Horovod")


def test_this_librarys_optimizer_is_exact():
    kinds = ("uneven", "even", "penalty", "accumulated", "added", "clipped", "closure")
    status, found = checked("hvdloss", *kinds)
    assert status == 0
    hold(found, set(kinds), "hvdloss")


@pytest.mark.more
@pytest.mark.parametrize(
    ("engine", "kinds", "exact", "by"),
    [
        ("ahead", ["uneven", "even", "penalty"], {"uneven", "even", "penalty"}, "DDP"),
        ("fsdp", ["even", "uneven", "penalty", "clipped"], {"even", "penalty"}, "FSDP"),
        ("ddp", ["norm"], set(), "DDP"),
        ("ddp", ["dropout"], {"dropout"}, "DDP"),
    ],
)
def test_other_ways_of_averaging_and_layers(engine, kinds, exact, by):
    status, found = checked(engine, *kinds)
    assert status == (0 if exact == set(kinds) else 1)
    hold(found, exact, by)


@pytest.mark.more
def test_a_loss_within_each_ranks_batch_is_not_called_exact():
    status, found = checked("ddp", "contrast")
    assert status == 2
    assert "depends on several samples" in found["contrast"]["problems"][0]


def test_three_ranks_without_a_reduction_are_told_in_words():
    done = run_cli("check", "-np", "3", "--steps", "1", "--launcher", "torchrun", str(JOB), "none", "even")
    assert done.returncode == 1, done.stderr
    assert "check_job.py: 3 ranks, 1 step" in done.stdout
    assert "NOT EXACT: step 1" in done.stdout
    assert "ranks step with different gradients" in done.stdout
    assert "Next: docs/" in done.stdout


def test_ranks_of_another_launcher_are_refused(tmp_path):
    done = run_cli("check", str(JOB), env={"RANK": "0"})
    assert done.returncode == Exit.USAGE
    assert "hvdloss check starts the ranks itself" in done.stderr


def test_a_script_that_fails_or_is_not_covered_is_told(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys\nraise ValueError(sys.argv[1:])\n")
    done = run_cli("check", "-np", "1", str(script), "--steps", "5")
    assert done.returncode == Exit.RANKS
    assert "ValueError: ['--steps', '5']" in done.stderr
    assert "after 0 steps" in done.stderr
    script.write_text("import keras\n")
    done = run_cli("check", str(script))
    assert done.returncode == 2
    assert "COULD NOT TELL: only PyTorch is covered" in done.stderr
    script.write_text("import torch\n")
    done = run_cli("check", "-np", "1", str(script))
    assert done.returncode == 2
    assert "no step of a PyTorch optimizer" in done.stdout
