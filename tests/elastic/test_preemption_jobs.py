"""SIGTERM to ranks of real jobs: the step is finished, all leave together, and a restart goes on exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.elastic.test_elastic import check
from tests.ranks import environment, missing_controller

HERE = Path(__file__).resolve().parent

RANKS = 2


def lines_of(folder: Path) -> list[dict]:
    """Return what ranks have told by now; the last line of a file may not be whole yet."""
    out = []
    for log in folder.glob("log-*"):
        for line in log.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                out.append(json.loads(line))
    return out


def launch(folder: Path, framework: str, seconds: float, number: int) -> subprocess.Popen:
    (folder / f"round-{number}").touch()
    command = [
        str(Path(sys.executable).with_name("horovodrun")),
        *("--gloo", "-np", str(RANKS), sys.executable),
        *(str(HERE / "leave_job.py"), framework, str(folder), str(seconds)),
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )


def interrupted(folder: Path, framework: str, whom: str) -> tuple[int, str, list[dict]]:
    """Run until three steps are done, send SIGTERM, and return the exit status and what was told."""
    job = launch(folder, framework, 0.3, 1)
    output: list[str] = []
    assert job.stdout is not None
    reader = threading.Thread(target=lambda: output.append(job.stdout.read()), daemon=True)
    reader.start()
    end = time.monotonic() + 150
    while sum(line.get("step") == 2 for line in lines_of(folder)) < RANKS:
        assert job.poll() is None, output
        assert time.monotonic() < end
        time.sleep(0.05)
    pids = sorted({line["pid"] for line in lines_of(folder)})
    assert len(pids) == RANKS
    if whom == "horovodrun":
        os.kill(job.pid, signal.SIGTERM)
    else:
        for pid in pids[:1] if whom == "one" else pids:
            os.kill(pid, signal.SIGTERM)
        if whom == "twice":
            time.sleep(0.1)
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
    job.wait(60)
    reader.join(10)
    return job.returncode, "".join(output), lines_of(folder)


MORE = pytest.mark.more


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("framework", "whom"),
    [
        pytest.param("torch", "one", marks=MORE),
        pytest.param("torch", "all", marks=MORE),
        pytest.param("torch", "twice", marks=MORE),
        pytest.param("torch", "horovodrun", marks=MORE),
        pytest.param("tape", "one", marks=MORE),
        pytest.param("tape", "horovodrun", marks=MORE),
        pytest.param("fit", "one", marks=MORE),
        pytest.param("fit", "all", marks=MORE),
    ],
)
def test_sigterm(framework, whom, tmp_path):
    if reason := missing_controller("gloo"):
        pytest.skip(reason)
    status, output, told = interrupted(tmp_path, framework, whom)
    left = [line for line in told if "left" in line]
    assert len(left) == RANKS, output  # all of them, after the same step
    assert len({line["left"] for line in left}) == 1
    assert len(left[0]["ranks"]) == (1 if whom == "one" else RANKS) or whom in ("all", "twice", "horovodrun")
    assert left[0]["left"] <= 7  # soon
    assert status != 0, output
    if whom != "horovodrun":
        assert "exit with status code 143" in output
    again = launch(tmp_path, framework, 0.0, 2)
    rest, _ = again.communicate(timeout=200)
    assert again.returncode == 0, rest
    steps = [line for line in lines_of(tmp_path) if "step" in line]
    # Nothing is done twice, and nothing is left out.
    assert len(steps) == len({(line["step"], line["pid"]) for line in steps})
    assert min(line["step"] for line in steps if line["attempt"] == 2) == left[0]["left"]
    assert not any(step["undone"] for step in check(tmp_path, steps))
