"""The harness for real ranks tells what happened, rank by rank."""

from __future__ import annotations

import os

import pytest
from ranks import case_names, missing_controller, run_launch


@pytest.fixture(scope="module")
def outcomes():
    os.environ["HVDLOSS_GRACE_SECONDS"] = "2"  # the hang below is meant
    if reason := missing_controller("gloo"):
        pytest.skip(reason)
    try:
        specs = [f"torch_harness:{name}" for name in case_names("torch_harness")]
        found = run_launch(specs, "gloo", 2, seconds=120)
        return {spec.partition(":")[2]: outcome for spec, outcome in found.items()}
    finally:
        del os.environ["HVDLOSS_GRACE_SECONDS"]


def test_case_names_come_in_order_without_importing():
    assert case_names("torch_harness")[:2] == ["ranks_meet", "skips"]


def test_numbers_come_back(outcomes):
    ranks = outcomes["ranks_meet"].ranks
    assert [ranks[r]["status"] for r in (0, 1)] == ["passed", "passed"]
    assert ranks[1]["numbers"] == {"ranks": 2.0}


def test_skip_has_its_reason(outcomes):
    assert outcomes["skips"].ranks[0]["text"] == "on purpose"


def test_failure_names_its_rank_and_the_next_case_runs(outcomes):
    ranks = outcomes["fails_on_one_rank"].ranks
    assert [ranks[r]["status"] for r in (0, 1)] == ["passed", "failed"]
    assert "rank one has a problem" in ranks[1]["text"]
    assert outcomes["after_a_failure"].ranks[1]["status"] == "passed"


def test_hang_is_found_and_the_rest_runs_in_a_new_launch(outcomes):
    ranks = outcomes["hangs_on_one_rank"].ranks
    assert "rank zero gave up" in ranks[0]["text"]
    assert ranks[1]["status"] == "hung"
    assert "case_hangs_on_one_rank" in ranks[1]["text"]  # its stack
    assert [outcomes["after_a_hang"].ranks[r]["status"] for r in (0, 1)] == ["passed", "passed"]
