"""The record of elastic jobs of real ranks, of which some are killed: the one that writes, and others."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from hvdloss.report import Record, read
from hvdloss.report.summary import summarize
from tests.elastic.test_elastic import horovodrun, those_that_count
from tests.ranks import environment, missing_controller

HERE = Path(__file__).resolve().parent

ROWS, EPOCHS = 331, 2  # of record_job.py
THREE_HOSTS = ["LOCALHOST:1", "localhost:1", "127.0.0.1:1"]  # names of this machine


def recorded(
    folder: Path, framework: str, kills: list[tuple[int, int]], rank: int
) -> tuple[Record, dict[int, dict]]:
    """Run a job, reading its record all the while; return it, and what ranks told of the steps that count."""
    if reason := missing_controller("gloo"):
        pytest.skip(reason)
    pytest.importorskip("sklearn")
    job, path = str(HERE / "record_job.py"), folder / "record.jsonl"
    command = horovodrun(
        folder, job, framework, str(folder), json.dumps(kills), str(rank), ranks=(3, 2, 3), hosts=THREE_HOSTS
    )
    reads, end = 0, time.monotonic() + 280
    with (folder / "output").open("w") as output:
        running = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment())
        try:
            while running.poll() is None:
                assert time.monotonic() < end, (folder / "output").read_text()[-6000:]
                time.sleep(0.1)
                if path.exists() and path.stat().st_size:
                    read(path)  # raises where it is damaged
                    reads += 1
        finally:
            running.terminate()
            try:
                running.wait(60)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
    assert running.returncode == 0, (folder / "output").read_text()[-6000:]
    assert reads > 10
    assert all((folder / f"done-{number}").exists() for number in range(len(kills)))
    lines = [json.loads(line) for log in folder.glob("log-*") for line in log.read_text().splitlines()]
    counted = {}
    for step in {line["step"] for line in lines}:
        last = those_that_count(lines, step)
        counted[step] = {**last[0], "ids": [i for line in last for i in line["ids"]]}
    return read(path), counted


def check(record: Record, counted: dict[int, dict]) -> None:
    """Check that the record says what the steps that count in the end were, each once."""
    assert record.status == "finished"
    assert not record.half
    steps = record.column("step").astype(int).tolist()
    assert steps == sorted(set(steps))
    assert steps[-1] == max(counted)
    samples = 0
    for step in range(1, steps[-1] + 1):
        samples += len(counted[step]["ids"])
        for line in (one for one in record.steps if one["step"] == step):
            assert line["loss"] == counted[step]["loss"]
            assert line["samples"] == samples
            assert len(line["ranks"]["loss"]) == counted[step]["size"]
    assert samples == ROWS * EPOCHS
    assert [line["epoch"] for line in record.epochs] == [1, 2]
    assert summarize(record).samples == samples


def check_undone(record: Record, spans: list[tuple[int, int]]) -> None:
    """Check which steps were undone: after a commit, up to one that the killed rank did not end."""
    assert len(record.undone) == len(record.faults) == len(spans)
    for line, fault, (step, until) in zip(record.undone, record.faults, spans, strict=True):
        assert line["step"] == step
        # The others end the step if it was killed when its gradients had left.
        assert line["until"] == fault["step"]
        assert line["until"] in (until, until + 1)


@pytest.mark.more
@pytest.mark.timeout(300)
def test_ranks_are_killed_and_then_the_one_that_writes(tmp_path):
    record, counted = recorded(tmp_path, "torch", [(10, 2), (22, 0)], rank=0)
    check(record, counted)
    lost = [(line["error"], line["ranks"]) for line in record.faults]
    assert lost == [("LostRankError", [2]), ("LostRankError", [0])]
    check_undone(record, [(8, 10), (20, 22)])
    assert record.ranks[0]["ranks"] in (2, 3)  # 3 if the host is back by then
    assert len(record.runs) == 2  # the rank that writes was there to go on, and then another one did


@pytest.mark.more
@pytest.mark.timeout(300)
@pytest.mark.parametrize("framework", ["torch", "tape", "fit"])
def test_the_rank_that_writes_is_there_and_has_another_number(framework, tmp_path):
    """Rank 1 writes; rank 0 is killed, so that it becomes rank 0, and rank 2 goes on in its file."""
    record, counted = recorded(tmp_path, framework, [(10, 0)], rank=1)
    check(record, counted)
    assert [(line["error"], line["ranks"]) for line in record.faults] == [("LostRankError", [0])]
    check_undone(record, [(8, 10)])
    assert len(record.runs) == 2
    assert len(record.ends) == 1
