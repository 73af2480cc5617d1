"""`hvdloss bench` with real ranks: the numbers it shows are those that were measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hvdloss.cli import bench as bench_module
from hvdloss.cli.bench import _goals, ratio_interval
from hvdloss.cli.errors import Exit
from hvdloss.losses.ledger import LEDGER_WIDTH
from tests.cli.conftest import run_cli

pytest.importorskip("torch")
ranks = pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod: hvdloss install")


def test_a_ratio_lies_in_its_interval_and_pairs_cancel_common_noise() -> None:
    noise = [1.0, 3.0, 2.0, 9.0, 1.5, 4.0, 2.5]
    ratio, low, high = ratio_interval([2 * x for x in noise], noise)
    assert ratio == low == high == 2.0
    ratio, low, high = ratio_interval([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0])
    assert low < 1 == ratio < high


def test_goals_are_met_or_missed_as_measured() -> None:
    seconds = {"hvdloss": [0.7, 0.7, 0.7], "horovod": [1.0, 1.0, 1.0], "ddp": [0.6, 0.6, 0.6]}
    found = {
        "environment": {"controller": "gloo", "ranks": 2},
        "workloads": {"small": {"seconds": seconds}, "mlp": {"seconds": seconds}},
    }
    met = {(goal["what"], goal["workload"]): goal["met"] for goal in _goals([found])}
    assert met == {
        ("hvdloss / Horovod's optimizer", "small"): False,  # 0.65 is asked for
        ("hvdloss / Horovod's optimizer", "mlp"): True,  # 0.80
        ("hvdloss / DDP over Gloo", "small"): False,
        ("hvdloss / DDP over Gloo", "mlp"): False,
    }
    four = {**found, "environment": {"controller": "gloo", "ranks": 4}}
    assert not list(_goals([four]))  # the goals are for two ranks


@ranks
@pytest.mark.more
def test_steps_are_measured_counted_and_drawn(tmp_path: Path) -> None:
    options = ["--workload", "conv", "--rounds", "2", "--steps", "1", "--out", str(tmp_path)]
    done = run_cli("bench", "step", *options, "--peer", "compute", "--peer", "horovod", "--peer", "hvdloss")
    assert done.returncode == 0, done.stderr
    assert "2 ranks over Gloo" in done.stdout
    assert (tmp_path / "bench-step.png").stat().st_size > 5000
    (found,) = json.loads((tmp_path / "bench-step.json").read_text())["results"]
    conv = found["workloads"]["conv"]
    assert {peer: len(times) for peer, times in conv["seconds"].items()} == dict.fromkeys(
        ("compute", "horovod", "hvdloss"), 2
    )
    assert all(t > 0 for times in conv["seconds"].values() for t in times)
    sent = conv["messages"]
    entries = (3 * 9 + 1) * 32 + (32 * 9 + 1) * 64 + (64 * 9 + 1) * 128 + (128 + 1) * 10
    assert sent["compute"] == {"messages": 0, "bytes": 0}
    assert sent["horovod"] == {"messages": 8, "bytes": 4 * entries}
    # One bucket: the gradients, a flag each, and 2 ledgers of 10 float64 as four numbers each.
    assert sent["hvdloss"] == {"messages": 1, "bytes": 4 * (entries + 8 + 2 * LEDGER_WIDTH * 4)}
    assert all(peak > 4 * entries for peak in conv["memory"].values())


@pytest.mark.more
@ranks
def test_the_messages_of_tapes_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    options = ["--workload", "tf-small", "--rounds", "2", "--steps", "1", "--json", "--out", str(tmp_path)]
    done = run_cli("bench", "step", *options, "--peer", "horovod", "--peer", "hvdloss")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["results"]
    entries = 60 * (64 * 64 + 64)
    assert found["workloads"]["tf-small"]["messages"] == {
        "horovod": {"messages": 120, "bytes": 4 * entries},
        "hvdloss": {"messages": 1, "bytes": 4 * (entries + 2 * LEDGER_WIDTH * 4)},
    }


@ranks
def test_sums_are_measured_by_size(tmp_path: Path) -> None:
    done = run_cli("bench", "allreduce", "--rounds", "2", "--largest", "1", "--json", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["results"]
    assert found["sizes"][-1] == 2**20
    for name in ("horovod", "torch.distributed", "copy"):
        assert len(found["seconds"][name]) == len(found["sizes"])
        assert found["fit"][name]["beta_bytes_per_s"] > 0


@ranks
def test_ranks_that_fail_are_told_with_their_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVDLOSS_OVERLAP", "perhaps")
    options = ["--workload", "conv", "--peer", "hvdloss", "--no-memory", "--out", str(tmp_path)]
    done = run_cli("bench", "step", *options)
    assert done.returncode == Exit.RANKS
    assert "ended with status" in done.stderr
    assert "HVDLOSS_OVERLAP='perhaps' must be 0 or 1" in (tmp_path / "bench.log").read_text()


def test_without_horovodrun_the_way_out_is_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module.machine, "script_path", lambda name: None)
    done = CliRunner().invoke(bench_module.bench, ["allreduce", "--out", str(tmp_path)])
    assert done.exit_code == Exit.MISSING
    assert "hvdloss install" in done.output


def test_bookkeeping_is_measured_without_ranks(tmp_path: Path) -> None:
    done = run_cli(
        "bench", "scale", "-np", "2", "-np", "100", "--rounds", "1", "--json", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout)["results"]
    assert (few["way"], many["way"]) == ("table", "sums")
    assert many["step"]["bytes"] <= 4096
    assert (many["step"]["messages"], many["read"]["messages"], many["agreement"]["messages"]) == (0, 1, 1)
    assert json.loads((tmp_path / "bench-scale.json").read_text())["results"] == [few, many]
