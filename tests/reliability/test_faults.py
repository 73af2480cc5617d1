"""Faults inflicted on real jobs: every rank knows, in seconds, by name.

`make test` inflicts some of what a job survives, one launch per loop; `make test-reliability` all kinds,
once each; `make reliability` (`inflict.py`) all of it many times, for docs/explanation/reliability.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import missing_controller

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fault_job import Item
from fault_launch import Launch
from fault_page import PAGE, measured, page
from faults import ALL, BY_NAME, FAULTS, LOOPS
from inflict import Verdict, items, judge, run

RANKS = {loop: 3 if loop == "torch" else 2 for loop in LOOPS}
QUICK = {
    "torch": [fault.name for fault in FAULTS if "torch" in fault.caught],
    "tape": ["nan-loss", "negative-weight", "no-weight", "raise-uneven"],
    "fit": ["nan-loss", "values-differ", "raise-loader"],
}
CAUGHT = [(loop, fault.name) for fault in FAULTS for loop in fault.caught]
DEADLY = [(loop, fault.name) for fault in FAULTS for loop in fault.loops if loop not in fault.caught]
_verdicts: dict[tuple[str, bool], dict[str, Verdict]] = {}


def _marks(loop: str, name: str) -> list[Any]:
    return [] if name in QUICK.get(loop, ()) else [pytest.mark.more]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("loop", "name"), [pytest.param(*pair, marks=_marks(*pair), id="-".join(pair)) for pair in CAUGHT]
)
def test_what_a_job_survives(loop, name):
    if reason := missing_controller("gloo"):
        pytest.skip(reason)
    quick = name in QUICK.get(loop, ())
    if (loop, quick) not in _verdicts:
        faults = [f for f in FAULTS if loop in f.caught and (f.name in QUICK.get(loop, ())) == quick]
        found = run(loop, faults, size=RANKS[loop], repeats=1, deadly=0, slow=0, give_up=1)
        _verdicts[loop, quick] = {verdict.fault: verdict for verdict in found}
    verdict = _verdicts[loop, quick][name]
    assert not verdict.problems, verdict


@pytest.mark.more
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("loop", "name"), [pytest.param(*pair, id="-".join(pair)) for pair in DEADLY])
def test_what_ends_a_job(loop, name):
    if reason := missing_controller("gloo"):
        pytest.skip(reason)
    (verdict,) = run(loop, [BY_NAME[name]], size=2, repeats=0, deadly=1, slow=1)
    assert not verdict.problems, verdict


# -- the table and the page ---------------------------------------------------------------------------


def test_the_table_has_enough_kinds():
    assert len(FAULTS) >= 20
    both = [f for f in FAULTS if "torch" in f.loops and set(f.loops) - {"torch"}]
    assert len(both) >= 15


def test_the_page_shows_what_was_measured():
    text = PAGE.read_text()
    assert page(text, measured()) == text, "run tests/reliability/inflict.py --page"


def test_every_rank_is_hit_and_rank_0_is_what_others_differ_from():
    assert {item.victim for item in items(BY_NAME["nan-loss"], 3, 3)} == {0, 1, 2}
    assert {item.victim for item in items(BY_NAME["names-differ"], 4, 3)} == {1, 2}


# -- the judge: it must find what is wrong ------------------------------------------------------------


def launched(item: Item, **changes: Any) -> Launch:
    """Return a launch of two ranks in which the judged fault went as it should; but for changes."""
    text = f"step 3: the loss is NaN or infinite on rank {item.victim}. Give them the weight 0."
    told = {
        "event": "knew",
        "number": 0,
        "time": 11.0,
        "at": 11.0,
        "kinds": ["NonFiniteLossError", "HvdlossError", "Exception"],
        "text": text,
        "expected": 3,
        "unchanged": True,
        **changes.pop("told", {}),
    }
    on = {"event": "went on", "number": 0, "time": 12.0, "checksum": 7}
    records: dict[int, list[dict[str, Any]]] = {0: [dict(told), dict(on)], 1: [dict(told), dict(on)]}
    records[item.victim].insert(0, {"event": "inflicted", "number": 0, "time": 10.0, "step": 3})
    return Launch(records=records, status={0: 0, 1: 0}, **changes)


NAN = Item("nan-loss", 0, 1, 3)


def test_the_judge_lets_pass_what_is_right():
    verdict = judge(NAN, 0, "torch", 2, launched(NAN))
    assert not verdict.problems
    assert verdict.seconds == 1.0


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ({"at": 16.0}, "all knew after 6.0 s only"),
        ({"kinds": ["ValueError", "Exception"]}, "raised ValueError"),
        ({"text": "step 3: rank 0 gave NaN, weight 0"}, "does not name the rank"),
        ({"text": "step 3: rank 10 gave NaN, weight 0"}, "does not name the rank"),
        ({"expected": 4}, "does not name step 4"),
        ({"text": "step 3: rank 1 gave NaN"}, "names no way out"),
        ({"unchanged": False}, "parameters were changed"),
    ],
)
def test_the_judge_finds_what_is_wrong_with_an_error(told, problem):
    assert problem in "; ".join(judge(NAN, 0, "torch", 2, launched(NAN, told=told)).problems)


def test_the_judge_finds_ranks_that_know_nothing_or_do_not_go_on():
    silent = launched(NAN)
    del silent.records[0][0]
    assert "another rank did not know" in "; ".join(judge(NAN, 0, "torch", 2, silent).problems)
    apart = launched(NAN)
    apart.records[0][-1]["checksum"] = 8
    assert "ranks did not go on alike" in judge(NAN, 0, "torch", 2, apart).problems
    never = launched(NAN)
    del never.records[1][0]
    assert "was not inflicted" in judge(NAN, 0, "torch", 2, never).problems[0]


@pytest.mark.parametrize(
    ("status", "hung", "problem"),
    [
        ({0: 1, 1: -9}, "", ""),
        ({0: 0, 1: -9}, "", "another rank's exit status was 0"),
        ({0: 1, 1: 0}, "", "the exit status of the rank at fault was 0"),
        ({1: -9}, "13 s after the fault", "did not end by itself"),
    ],
)
def test_the_judge_looks_at_how_ranks_end(status, hung, problem):
    item = Item("sigkill", 0, 1, 3)
    text = "step 3: rank 1 is gone. Start again from the last checkpoint."
    kinds = ["RankError", "HvdlossError"]
    done = launched(item, told={"text": text, "kinds": kinds}, hung=hung, stacks={0: ""} if hung else {})
    done.status = status
    del done.records[1][1:]
    assert problem in "; ".join(judge(item, 0, "torch", 2, done).problems)
    assert bool(problem) == bool(judge(item, 0, "torch", 2, done).problems)


def test_every_loop_has_a_name():
    assert tuple(LOOPS) == ALL
