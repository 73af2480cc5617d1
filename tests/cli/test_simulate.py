"""`hvdloss simulate`: its options reach the simulator, and its numbers, pictures and logs are real."""

from __future__ import annotations

import json
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hvdloss.cli import simulate as module
from hvdloss.cli.errors import Exit
from hvdloss.cli.simulate import COUNT, RATE, TIME, simulate
from hvdloss.losses.ledger import LEDGER_WIDTH
from hvdloss.simulation.model import (
    ComputeModel,
    Figures,
    NetworkModel,
    TrainingPlan,
    simulate_training,
)
from hvdloss.terms.link import LinkModel
from hvdloss.terms.policies import BatchShares, SyncPeriod
from hvdloss.terms.policies.log import replay
from tests.cli.conftest import run_cli

QUIET = ["--noise", "0", "--steps", "60"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(simulate, [str(one) for one in arguments])


def numbers(*arguments: object) -> dict[str, Any]:
    done = call(*arguments, "--json", "-")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("unit", "text", "value"),
    [
        (TIME, "50us", 50e-6),
        (TIME, "1.5 ms", 1.5e-3),
        (TIME, "2", 2.0),
        (TIME, "3min", 180.0),
        (RATE, "200Mbit", 25e6),
        (RATE, "10Gbit/s", 1.25e9),
        (RATE, "100Mbps", 12.5e6),
        (RATE, "25MB", 25e6),
        (RATE, "25 MiB/s", 25 * 2**20),
        (COUNT, "25M", 25e6),
        (COUNT, "1e6", 1e6),
    ],
)
def test_units_are_understood(unit: Any, text: str, value: float) -> None:
    assert unit.convert(text, None, None) == pytest.approx(value)


def test_what_is_simulated_is_what_was_asked_for() -> None:
    found = numbers("-np", 4, "-np", "2,4", *QUIET, "--seconds-per-sample", "2ms", "--parameters", "1M",
                    "--bandwidth", "100Mbit", "--latency", "1ms", "--messages", 3, "--no-shares")  # fmt: skip
    assert [one["ranks"] for one in found["results"]] == [2, 4]
    assert found["settings"]["ranks"] == [2, 4]
    assert found["settings"]["network"]["bandwidth"] == pytest.approx(12.5e6)
    four = found["results"][1]
    assert four["plan"] is None
    payload = 4e6 + 4 * LEDGER_WIDTH * 16
    expected = 32 * 2e-3 + 3 * 6 * 1e-3 + 1.5 * payload / 12.5e6
    assert four["plain"]["overall"]["step_seconds"] == pytest.approx(expected)
    assert set(four["plain"]["second_half"]) == {field.name for field in fields(Figures)}
    assert len(four["plain"]["losses"]) == len(four["plain"]["step_seconds"]) == 60
    assert numbers("-np", 2, "--batch-size", 10, "--steps", 3)["results"][0]["plain"]["sizes"] == [5, 5]


def test_the_plan_stands_beside_doing_nothing() -> None:
    found = numbers("-np", 4, *QUIET, "--straggler", "3:2", "--period", 4, "--compress", "--outer", "0.7:0.9",
                    "--bandwidth", "50Mbit")  # fmt: skip
    (four,) = found["results"]
    assert four["plain"]["decisions"] == []
    assert {one["what"] for one in four["plan"]["decisions"]} == {"batch sizes", "compression"}
    assert set(four["plan"]["decisions"][0]) == {"step", "what", "before", "after", "reason"}
    assert four["plan"]["second_half"]["step_seconds"] < 0.3 * four["plain"]["second_half"]["step_seconds"]
    assert four["plan"]["sizes"] == [37, 37, 36, 18]
    assert set(four["plan"]["periods"]) >= {1, 4}
    shown = call("-np", 4, *QUIET, "--straggler", "3:2")
    assert shown.exit_code == 0
    for words in ("plain", "plan", "32 each", "37, 37, 36, 18", "rank 3 computes", "Efficiency"):
        assert words in shown.stdout, shown.stdout


def test_a_straggler_that_some_numbers_of_ranks_lack_is_left_out_there() -> None:
    found = numbers("-np", "2,4", *QUIET, "--straggler", "3:2", "--slow-link", "2:1Mbit", "--no-shares")
    two, four = (one["plain"]["overall"] for one in found["results"])
    assert two["waiting"] == pytest.approx(0)
    assert four["waiting"] > 0
    assert four["step_seconds"] > 100 * two["step_seconds"]


def test_a_measured_link_feeds_the_network(tmp_path: Path) -> None:
    fits = {2: (1e-3, 1e9), 4: (1.4e-3, 0.6e9)}
    results = [
        {"environment": {"ranks": p}, "fit": {"horovod": {"alpha_s": a, "beta_bytes_per_s": b}, "copy": {}}}
        for p, (a, b) in fits.items()
    ]
    both = tmp_path / "both.json"
    both.write_text(json.dumps({"results": results}))
    expected = NetworkModel.from_fits(fits)
    got = numbers("-np", 8, "--steps", 2, "--link", both, "--overlap", "0.5")["settings"]["network"]
    assert (got["latency"], got["bandwidth"]) == pytest.approx((expected.latency, expected.bandwidth))
    assert got["overlap"] == 0.5

    link = LinkModel(2)
    for n in (8, 2**20):
        link.add(1e-3 + n / 1e9, n)
    apart = [tmp_path / "a.json", tmp_path / "b.json"]
    apart[0].write_text(json.dumps(link.state_dict()))
    apart[1].write_text(json.dumps({"ranks": 4, "alpha_s": 1.4e-3, "beta_bytes_per_s": 0.6e9}))
    again = numbers("-np", 8, "--steps", 2, "--link", apart[0], "--link", apart[1])["settings"]["network"]
    assert again["latency"] == pytest.approx(got["latency"])


def test_pictures_numbers_and_logs_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture, table = tmp_path / "new" / "plan.png", tmp_path / "other" / "plan.json"
    done = call("-np", "2,4,8", *QUIET, "--straggler", "1:3", "--plot", picture, "--json", table)
    assert done.exit_code == 0, done.output
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 800
    assert height > 300
    from matplotlib import image

    assert image.imread(picture).std() > 0.05, "something is drawn"
    assert len(json.loads(table.read_text())["results"]) == 3

    log = tmp_path / "control.jsonl"
    options = (
        "-np",
        4,
        *QUIET,
        "--steps",
        200,
        "--straggler",
        "3:2",
        "--period",
        "predicted",
        "--interval",
        "1s",
    )
    found = numbers(*options, "--log", log)["results"][0]["plan"]["decisions"]
    policies = (BatchShares(128), SyncPeriod("predicted", interval=1.0))
    again = replay(TrainingPlan(4, 128, 100e6, policies=policies).controller(), log)
    assert [(one.step, one.what, one.after) for one in again] == [
        (one["step"], one["what"], one["after"]) for one in found
    ]
    assert len(found) >= 2


def test_the_command_line_and_the_library_give_the_same_numbers() -> None:
    found = numbers("-np", 4, "--steps", 50, "--seed", 5, "--tail", "0.05:200ms", "--slow-share", "0.25:3")
    compute = ComputeModel(noise=0.05, tail=0.05, tail_seconds=0.2, slow_share=0.25, slow_factor=3.0)
    plan = TrainingPlan(4, 128, 100e6, steps=50, policies=(BatchShares(128),), compute=compute, seed=5)
    assert found["results"][0]["plan"] == simulate_training(plan).as_dict()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-np", "0"], "'0' is not a number of ranks"),
        (["-np", "4,x"], "'4,x' is not a number of ranks"),
        (["--bandwidth", "200"], "'200' is not a rate; write it like 200Mbit"),
        (["--bandwidth", "0Mbit"], "bandwidth=0.0"),
        (["--latency", "fast"], "'fast' is not a time"),
        (["--straggler", "3"], "'3' is not rank:factor; write it like 3:2.0"),
        (["--straggler", "1.5:2"], "'1.5:2' is not rank:factor"),
        (["--straggler", "99:2"], "--straggler 99: there are at most 64 ranks"),
        (["--slow-link", "8:1Mbit", "--local-ranks", "8"], "--slow-link 8: there are at most 8 hosts"),
        (["--straggler", "1:0"], "factor 0.0"),
        (["--tail", "2:1s"], "tail=2.0"),
        (["--noise", "-1"], "noise=-1.0"),
        (["--period", "often"], "'often' is neither a number of steps nor one of adacomm, predicted, priced"),
        (["--period", "4", "--initial-period", "2"], "initial_period= of SyncPeriod belongs to a rule"),
        (["--initial-period", "2"], "--initial-period belongs to a --period"),
        (["--outer", "0.7:0.9"], "--outer belongs to a --period"),
        (["--period", "4", "--outer", "0.7:1.5"], "momentum in [0, 1)"),
        (["--gain", "1"], "gain=1.0"),
        (["--loss", "1:2"], "floor=2.0"),
        (["--batch-size", "3"], "3 samples cannot give each of 4 ranks"),
        (["--batch-size", "64", "--batch-per-rank", "8"], "not both"),
        (["--log", "new.jsonl"], "--log takes one number of ranks, not 3"),
        (["-np", "2", "--log", "here.json"], "cannot make the control log"),
        (["--link", "missing.json"], "cannot be read"),
        (["--link", "here.json"], "is not what `hvdloss bench allreduce --json` prints"),
        (["--link", "one.json"], "no link of two ranks or more"),
        (["--link", "here.json", "--latency", "1ms"], "--latency is in the file of --link"),
        (["--json", "here.json/x.json"], "here.json"),
    ],
)
def test_what_cannot_be_used_is_named_and_ends_with_status_2(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.json").write_text('{"results": [{"fit": {}}]}')
    one = {"environment": {"ranks": 1}, "fit": {"horovod": {"alpha_s": 0.1, "beta_bytes_per_s": 1.0}}}
    Path("one.json").write_text(json.dumps(one))
    done = call("--steps", 2, *arguments)
    assert done.exit_code == Exit.USAGE, done.output
    assert words in " ".join(done.output.split()), done.output
    assert not done.stdout


def test_a_picture_without_matplotlib_has_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    done = call("-np", 2, "--plot", tmp_path / "x.png")
    assert done.exit_code == Exit.MISSING
    assert "hvdloss[bench]" in done.output


def test_a_picture_of_an_unknown_kind_is_a_usage_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = call("-np", 2, "--steps", 2, "--plot", tmp_path / "x.docx")
    assert done.exit_code == Exit.USAGE
    assert "docx" in done.output


def test_help_tells_the_exit_statuses() -> None:
    done = call("--help")
    assert done.exit_code == 0
    assert "Exit status" in done.output


def test_piped_output_is_plain_and_silent_otherwise() -> None:
    done = run_cli("simulate", "-np", "2", "--steps", "20", "--straggler", "1:2", env={"COLUMNS": "140"})
    assert done.returncode == 0
    assert done.stderr == ""
    assert not set("│┃━\x1b") & set(done.stdout), done.stdout
    assert "rank 1 computes" in done.stdout
