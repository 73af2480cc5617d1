"""Elastic jobs of real ranks: killed, stopped, added, taken away; no sample is lost or used twice."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.elastic.job import EPOCHS, MOMENTUM, RATE, ROWS, table
from tests.ranks import environment, missing_controller

HERE = Path(__file__).resolve().parent

TWO_HOSTS = ["localhost:2", "127.0.0.1:1"]  # names of this machine: Horovod gives up on a host as a whole


def horovodrun(folder: Path, *command: str, ranks: tuple[int, int, int], hosts: list[str]) -> list[str]:
    """Return the command line of an elastic job."""
    (folder / "hosts").write_text("\n".join(hosts) + "\n")
    discover = folder / "discover.sh"
    # Of hosts that are found together any may get rank 0; the one that was found first gets it.
    discover.write_text(
        f"#!/bin/sh\ncd {folder}\nif [ -e found ]; then cat hosts; else touch found; head -n 1 hosts; fi\n"
    )
    discover.chmod(0o755)
    number, least, most = map(str, ranks)
    return [
        str(Path(sys.executable).with_name("horovodrun")),
        *("--gloo", "-np", number, "--min-np", least, "--max-np", most),
        *("--host-discovery-script", str(discover), "--network-interfaces", "lo"),
        # Longer than Horovod takes to end what is left on a host it gave up: see docs/howto/elastic.md.
        *("--blacklist-cooldown-range", "8", "12", "--gloo-timeout-seconds", "120"),
        *(sys.executable, *command),
    ]


def run(folder: Path, framework: str, faults: list[dict], ranks=(3, 2, 3), hosts=TWO_HOSTS) -> list[dict]:
    """Run a job; return what its ranks told."""
    if reason := missing_controller("gloo"):
        pytest.skip(reason)
    command = horovodrun(
        folder, str(HERE / "job.py"), framework, str(folder), json.dumps(faults), ranks=ranks, hosts=hosts
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment())
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    for number in range(len(faults)):
        assert (folder / f"done-{number}").exists()
    return [json.loads(line) for log in folder.glob("log-*") for line in log.read_text().splitlines()]


def reference(batches: list[list[int]]) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Train on one process with these batches; return parameters, and the loss of each step."""
    x, y = table()
    w, b = np.zeros((x.shape[1], 1)), np.zeros(1)
    mw, mb = np.zeros_like(w), np.zeros_like(b)
    losses = []
    for ids in batches:
        off = x[ids] @ w + b - y[ids]
        losses.append(float((off**2).mean()))
        mw = MOMENTUM * mw + 2 * x[ids].T @ off / len(ids)
        mb = MOMENTUM * mb + 2 * off.mean(0)
        w, b = w - RATE * mw, b - RATE * mb
    return w, b, losses


def those_that_count(lines: list[dict], step: int) -> list[dict]:
    """Return what ranks told of a step when it was last done; what was done before was undone."""
    those = [line for line in lines if line["step"] == step]
    latest = max(line["attempt"] for line in those)
    return [line for line in those if line["attempt"] == latest]


def check(folder: Path, lines: list[dict]) -> list[dict[str, Any]]:
    """Check that what counts in the end is one process's training; return it by step."""
    steps = []
    for step in range(max(line["step"] for line in lines) + 1):
        counted = those_that_count(lines, step)
        assert len(counted) == counted[0]["size"], counted
        assert len({line["loss"] for line in counted}) == 1
        steps.append(
            {
                "ids": sorted(i for line in counted for i in line["ids"]),
                "epoch": counted[0]["epoch"],
                "size": counted[0]["size"],
                "loss": counted[0]["loss"],
                "undone": len({line["attempt"] for line in lines if line["step"] == step}) - 1,
            }
        )
    for epoch in range(EPOCHS):
        used = collections.Counter(i for step in steps if step["epoch"] == epoch for i in step["ids"])
        assert used == collections.Counter(range(ROWS))
    w, b, losses = reference([step["ids"] for step in steps])
    np.testing.assert_allclose([step["loss"] for step in steps], losses, rtol=1e-12)
    with np.load(folder / "model.npz") as trained:
        np.testing.assert_allclose(trained["w"], w, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(trained["b"].reshape(-1), b, rtol=1e-12, atol=1e-14)
    return steps


FRAMEWORKS = [
    "torch",
    pytest.param("tape", marks=pytest.mark.more),
    "fit",
]
ALL = [pytest.param(name, marks=pytest.mark.more) for name in ("torch", "tape", "fit")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_killed_rank(framework, tmp_path):
    """SIGKILL in the middle of a step: what was not committed is undone, and done again by those left."""
    lines = run(tmp_path, framework, [{"kind": "kill", "step": 4, "host": "127.0.0.1"}])
    steps = check(tmp_path, lines)
    assert steps[2]["size"] == 3
    assert steps[3]["undone"] == 1  # the commit was after step 2
    assert steps[3]["size"] in (2, 3)  # 3 if the host is back by then


@pytest.mark.timeout(300)
@pytest.mark.parametrize("framework", ALL)
def test_the_first_rank_is_killed(framework, tmp_path):
    lines = run(
        tmp_path, framework, [{"kind": "kill", "step": 7, "host": "127.0.0.1"}], hosts=TWO_HOSTS[::-1]
    )
    assert check(tmp_path, lines)[6]["undone"] == 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize("framework", ALL)
def test_a_rank_is_added(framework, tmp_path):
    fault = {"kind": "hosts", "step": 4, "host": "localhost", "hosts": ["localhost:2", "127.0.0.1:1"]}
    lines = run(tmp_path, framework, [fault], ranks=(2, 2, 3), hosts=["localhost:2"])
    steps = check(tmp_path, lines)
    assert {step["size"] for step in steps} == {2, 3}
    assert not any(step["undone"] for step in steps)  # by agreement: nothing is lost


@pytest.mark.timeout(300)
@pytest.mark.parametrize("framework", ALL)
def test_a_rank_is_taken_away(framework, tmp_path):
    fault = {"kind": "hosts", "step": 4, "host": "localhost", "hosts": ["localhost:2"]}
    lines = run(tmp_path, framework, [fault], ranks=(3, 2, 3))
    steps = check(tmp_path, lines)
    assert [step["size"] for step in (steps[0], steps[-1])] == [3, 2]


@pytest.mark.more
@pytest.mark.timeout(300)
def test_a_rank_that_is_told_to_leave(tmp_path):
    """SIGTERM to one: it commits with the others and goes; they go on from there, and nothing is undone."""
    steps = check(tmp_path, run(tmp_path, "torch", [{"kind": "term", "step": 4, "host": "127.0.0.1"}]))
    assert not any(step["undone"] for step in steps)
    assert steps[5]["size"] == 3  # the step in which all ranks were told
    assert 2 in {step["size"] for step in steps}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("hosts", [TWO_HOSTS, TWO_HOSTS[::-1]], ids=["last", "first"])
@pytest.mark.parametrize("framework", ALL)
def test_a_stopped_rank(framework, hosts, tmp_path, monkeypatch):
    """SIGSTOP, of rank 2 or of rank 0, whom all hear: a peer's watch ends it, as SIGKILL would."""
    monkeypatch.setenv("HVDLOSS_WATCH_SILENCE", "8")
    lines = run(tmp_path, framework, [{"kind": "stop", "step": 4, "host": "127.0.0.1"}], hosts=hosts)
    assert check(tmp_path, lines)[3]["undone"] == 1
