"""Makes records to look at, from reports that no ranks made; and the command that shows them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hvdloss.cli import cli
from hvdloss.losses.ledger import Ledger
from hvdloss.report import Recorder, StepReport, TermReport, read
from hvdloss.terms.term import Decision

HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)> $x^2$ & \" ' {{ 7*7 }}"


def make_record(
    path: Path, *, ranks: int, steps: int, seed: int = 0, name: str = "", text: str = "", ended: bool = True
) -> Path:
    """Write a record with everything in it; `text` goes wherever a text can."""
    rng = np.random.default_rng(seed)
    classes = 6
    recorder = Recorder(
        path,
        name=text or name,
        settings={text or "lr": text or 0.1},
        classes=[f"{text}{i}" for i in range(classes)],
    )
    terms = {text or "skew": {"unit": text or "nats", "price": 0.05}}
    about = {"ranks": ranks, "framework": text or "torch", "objective": {text or "reduction": text or "mean"}}
    recorder.begin({**about, "terms": terms, "environment": {"hosts": 1, "python": text or "3"}})
    counts = rng.dirichlet(np.ones(classes), ranks) * 100
    for step in range(1, steps + 1):
        held = 0.01 + 0.01 * rng.random(ranks)
        ledgers = [
            Ledger(
                numerator=(w := 8.0 * (rank + 1)) * (0.1 + 2 * np.exp(-step / 80) + 0.05 * rng.normal()),
                denominator=w,
                weight=w,
                elements=4.0 * (rank + 1),
                micro_batches=1.0,
                communication=float(held[rank]),
                computation=0.05,
                nonfinite_losses=float(step == 3 and rank == 1),
            )
            for rank in range(ranks)
        ]
        details = {"counts": counts.tolist(), "overall": 0.1}
        skew = TermReport("nats", 0.05, [0.1] * ranks, 0.1 * ranks, 0.005 * ranks, details)
        travel = {"bucket": {"value": text or 25, "by": text or "rule"}, "comm_plan": {"messages": 2}}
        recorder.step(StepReport.of(step, ledgers, "mean", travel, {"skew": skew}, nonfinite="skip"))
        if step in (2, 40):
            recorder.decision(Decision(step, text or "period", [1, text], 4, text or f"it pays at {step}"))
    if steps:
        recorder.epoch(1, {text or "recall": rng.random(classes), "loss": 0.5})
        recorder.hardest({f"{text}a": 2.0, "b": 3.0}, what=text or "group", measure=text or "loss")
    if text:
        recorder._put("fault", {"error": text, "ranks": [1], "text": text})
    if ended:
        recorder.close()
    else:
        end = time.monotonic() + 60
        while not path.stat().st_size and time.monotonic() < end:
            time.sleep(0.01)
    return path


def hvdloss(*arguments):
    return CliRunner().invoke(cli, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_record(tmp_path_factory.mktemp("cli") / "run.jsonl", ranks=3, steps=50)


def test_text_and_json_have_the_record_s_numbers(run):
    told = json.loads(hvdloss(run, "--json").stdout)
    record = read(run)
    assert told["loss"] == record.column("loss")[-1]
    assert told["samples"] == record.steps[-1]["samples"]
    assert told["decisions"] == record.decisions
    assert [row["rank"] for row in told["rows"]] == [0, 1, 2]
    both = json.loads(hvdloss(run, run, "--json").stdout)
    assert both == [told, told]
    shown = hvdloss(run, "--text").stdout
    for word in (
        "finished",
        "3 rank(s)",
        f"{told['loss']:.4g}",
        f"plain averaging would be off by {100 * told['averaging_error']:.3g} % of the loss",
        "it pays at 40",
        "NonFiniteLossError",
        "hardest",
    ):
        assert word in shown, word


def test_the_terminal_obeys_no_record(tmp_path):
    path = make_record(tmp_path / "a.jsonl", ranks=2, steps=3, text="\x1b[31m[red]\x07")
    shown = hvdloss(path, "--text").stdout
    assert "\x1b[31m" not in shown
    assert "\x07" not in shown
    assert "[red]" in shown  # no markup either


def test_page_and_picture_are_written_for_their_owner_alone(run, tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    done = hvdloss(run)
    assert (done.exit_code, done.stdout.strip()) == (0, str(run.with_suffix(".html")))
    assert run.with_suffix(".html").stat().st_mode & 0o777 == 0o600
    done = hvdloss(run.parent, "--png", tmp_path / "a.png")  # a folder
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 2, "Missing argument"),
        (["none.jsonl"], 2, "there is no such file"),
        (["."], 2, "no record"),
        (["bad.jsonl"], 1, "bad.jsonl, line 1 is no JSON"),
        (["bad.jsonl", "--text", "--json"], 2, "choose one"),
        (["bad.jsonl", "--text", "--open"], 2, "are for the page"),
        (["good.jsonl", "--out", "good.jsonl"], 2, "is a record"),
        (["good.jsonl", "--out", "none/x.html"], 1, "cannot write"),
        (["good.jsonl", "good.jsonl", "--follow"], 2, "one run, not 2"),
        (["killed.jsonl", "--follow", "--patience", "0.1"], 1, "nothing new"),
    ],
)
def test_what_is_wrong_is_said_and_has_its_status(run, tmp_path, monkeypatch, arguments, status, says):
    pytest.importorskip("jinja2")
    monkeypatch.chdir(tmp_path)
    if arguments != ["."]:
        Path("bad.jsonl").write_text("bad\n")
        lines = run.read_bytes().splitlines(keepends=True)
        Path("good.jsonl").write_bytes(b"".join(lines))
        Path("killed.jsonl").write_bytes(b"".join(lines[:-1]))
    done = hvdloss(*arguments)
    assert (done.exit_code, says in done.output) == (status, True), done.output


def test_a_missing_library_is_named_with_its_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = hvdloss(run)
    assert done.exit_code == 3
    assert "pip install 'hvdloss[report]'" in done.output


def test_follow_waits_for_the_end_and_prints_once_where_nobody_watches(tmp_path):
    path = tmp_path / "a.jsonl"
    recorder = Recorder(path)
    recorder.begin({"ranks": 1})

    def go():
        for step in range(1, 30):
            recorder.step(StepReport.of(step, [Ledger(1.0 / step, 1.0, 1.0, 1.0, 1.0)], "mean"))
            time.sleep(0.02)
        recorder.close()

    thread = threading.Thread(target=go)
    thread.start()
    while not path.stat().st_size:
        time.sleep(0.01)
    command = [sys.executable, "-m", "hvdloss.cli", "report", str(path), "--follow", "--patience", "120"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    thread.join()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished") == 1
    assert "step 29" in done.stdout
    assert "\x1b" not in done.stdout


def test_follow_tells_by_its_status_that_a_run_failed(tmp_path):
    recorder = Recorder(tmp_path / "a.jsonl")
    recorder.begin({"ranks": 1})
    with pytest.raises(ValueError, match="broken"), recorder:
        raise ValueError("broken")
    done = hvdloss(tmp_path / "a.jsonl", "--follow")
    assert done.exit_code == 1
    assert "failed" in done.output
