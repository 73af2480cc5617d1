"""The soak: its judge, and a short one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.ranks import missing_controller

sys.path.insert(0, str(Path(__file__).resolve().parent))

from soak import Soak, _judge_memory, judge, run, valid_steps


def line(generation, step, ids, epoch=0):
    return {"pid": 1, "time": step, "generation": generation, "step": step, "ids": ids, "epoch": epoch}


def start(generation, step, size=2):
    return {"pid": 1, "time": step, "generation": generation, "start": step, "size": size, "rank": 0}


def test_what_a_later_generation_does_again_replaces_what_was_done():
    records = [start(1, 0), line(1, 0, [0]), line(1, 1, [1]), line(1, 2, [2])]
    records += [start(2, 1), line(2, 1, [2]), line(2, 2, [1])]
    steps, undone = valid_steps(records)
    assert [[r["ids"] for r in lines] for lines in steps.values()] == [[[0]], [[2]], [[1]]]
    assert undone == 2


@pytest.mark.parametrize(("ids", "lost", "repeated"), [([2], 0, 0), ([1], 1, 1), ([], 1, 0)])
def test_lost_and_repeated_samples_are_found(tmp_path, ids, lost, repeated):
    records = [start(1, 0), line(1, 0, [0]), line(1, 1, [1]), line(1, 2, ids)]
    records += [{"pid": 1, "time": 9, "finished": 3, "epochs": 1}, {"pid": 1, "time": 9, "checked": 2}]
    out = Soak(2, 1.0)
    judge(out, records, [], 3, tmp_path)
    assert (out.lost, out.repeated) == (lost, repeated)
    assert bool(out.problems) == bool(lost or repeated)


@pytest.mark.parametrize(("growth", "grows"), [(0.0, False), (0.01, True)])
def test_growing_memory_is_found(growth, grows):
    out = Soak(2, 20.0)
    noise = [0, 1, 0, 2, 0, 30]  # MiB: what comes and goes is no leak
    records = [
        {"pid": 1, "time": float(t), "resident": (200 + noise[t % 6] + growth * t) * 2**20, "at": t}
        for t in range(900)
    ]
    _judge_memory(out, records)
    assert bool(out.problems) == grows, out
    assert out.memory


@pytest.mark.more
@pytest.mark.timeout(700)
def test_a_short_soak(tmp_path):
    if reason := missing_controller("gloo"):
        pytest.skip(reason)
    out = run(4, 2.0, 10.0, tmp_path, seed=0)
    assert not out.problems, out
    assert out.kills >= 1
    assert out.smallest < 4
    assert out.epochs >= 1
