"""The harness for real ranks tells what happened, rank by rank; a case that fails takes no other down."""

from __future__ import annotations

import pytest

from tests.ranks import case_names, cases, missing_controller, needs, run_launch


@pytest.fixture(scope="module")
def outcomes():
    if reason := missing_controller("gloo"):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVDLOSS_GRACE_SECONDS", "2")  # the hang is meant
        specs = [f"torch_harness:{name}" for name in case_names("torch_harness")]
        found = run_launch(specs, "gloo", 2, seconds=120)
    return {spec.partition(":")[2]: outcome for spec, outcome in found.items()}


def test_case_names_come_in_order_without_importing():
    assert case_names("torch_harness")[:2] == ["ranks_meet", "skips"]


def test_what_a_case_needs_stands_beside_it(tmp_path, monkeypatch):
    (tmp_path / "some.py").write_text(
        "NEEDS = needs('gloo-2', more='mpi-2')\n"
        "def helper(): ...\n"
        "def case_usual(): ...\n"
        "@needs(more='gloo-3')\n"
        "def case_of_its_own(): ...\n"
    )
    monkeypatch.setattr(cases, "MODULES", tmp_path)
    assert cases.case_needs("some") == {"usual": [("gloo", 2), ("mpi", 2)], "of_its_own": [("gloo", 3)]}

    @cases.parallel_cases("some")
    def test(case): ...

    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    found = {param.id: [mark.name for mark in param.marks] for param in mark.args[1]}
    assert found == {"gloo-2-usual": [], "mpi-2-usual": ["more"], "gloo-3-of_its_own": ["more"]}


@pytest.mark.parametrize("launches", ["", "gloo", "nccl-2", "gloo-2 gloo-2"])
def test_what_is_no_launch_is_refused(launches):
    with pytest.raises(ValueError, match="launch"):
        needs(launches)


def test_numbers_come_back(outcomes):
    ranks = outcomes["ranks_meet"].ranks
    assert [ranks[r]["status"] for r in (0, 1)] == ["passed", "passed"]
    assert ranks[1]["numbers"] == {"ranks": 2.0}


def test_skip_has_its_reason(outcomes):
    assert outcomes["skips"].ranks[0]["text"] == "on purpose"


def test_failure_names_its_rank(outcomes):
    ranks = outcomes["fails_on_one_rank"].ranks
    assert [ranks[r]["status"] for r in (0, 1)] == ["passed", "failed"]
    assert "rank one has a problem" in ranks[1]["text"]
    assert "rank 0, 1 failed" in outcomes["fails_on_all_ranks"].text


def test_a_hang_is_found(outcomes):
    ranks = outcomes["hangs_on_one_rank"].ranks
    assert "rank zero gave up" in ranks[0]["text"]
    assert ranks[1]["status"] == "hung"
    assert "case_hangs_on_one_rank" in ranks[1]["text"]  # its stack


def test_a_death_is_found(outcomes):
    outcome = outcomes["dies_on_one_rank"]
    assert 1 not in outcome.ranks
    assert "did not finish on rank(s)" in outcome.problem


def test_what_the_watch_was_told_fails_the_case_that_told_it(outcomes):
    assert not outcomes["tells_the_watch"].sound
    assert "rank one tells of this" in outcomes["tells_the_watch"].text


@pytest.mark.parametrize("name", [name for name in case_names("torch_harness") if name.startswith("after_")])
def test_whatever_a_case_did_the_next_one_passes(outcomes, name):
    outcome = outcomes[name]
    assert outcome.sound, outcome.text
    assert [outcome.ranks[r]["status"] for r in (0, 1)] == ["passed", "passed"]
