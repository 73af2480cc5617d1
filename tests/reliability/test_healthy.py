"""Jobs that are healthy but slow, for seconds instead of minutes: none may be ended."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.ranks import missing_controller

sys.path.insert(0, str(Path(__file__).resolve().parent))

from healthy import HEALTHY, run

KINDS = [(one, loop) for one in HEALTHY for loop in one.loops]


@pytest.mark.more
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("one", "loop"), [pytest.param(*k, id=f"{k[0].kind}-{k[1]}") for k in KINDS])
def test_a_healthy_job_is_not_ended(one, loop):
    if reason := missing_controller("gloo"):
        pytest.skip(reason)
    result = run(one, loop, short=True, rounds=min(one.rounds, 2))
    if "skipped" in result:
        pytest.skip(str(result["skipped"]))
    assert not result["problems"], result
