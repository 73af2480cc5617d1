"""What the watch decides, without a process or a clock: tallies add up, and verdicts follow from them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss.errors import ConfigError, LostRankError, StallError
from hvdloss.watch.ranges import pack, unpack
from hvdloss.watch.root import Root
from hvdloss.watch.tally import Exchange, Found, Summary, Tally, blocked_for_ever, search
from hvdloss.watch.verdict import Fault, Limits, RankState, Wait

# -- sets of ranks ------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 300)))
def test_sets_of_ranks_survive_their_text(ranks):
    assert unpack(pack(ranks)) == tuple(sorted(ranks))


def test_regular_sets_of_ranks_are_short_whatever_their_size():
    assert pack(range(10_000)) == "0-9999"
    assert pack(range(3, 10_000, 8)) == "3-9995:8"


@given(st.text(max_size=20))
def test_what_is_no_set_of_ranks_is_refused(text):
    with contextlib.suppress(ValueError):
        assert unpack(pack(unpack(text))) == unpack(text)


def test_a_text_cannot_name_more_ranks_than_there_can_be():
    with pytest.raises(ValueError, match="no set of ranks"):
        unpack("0-99999999999")


# -- tallies ------------------------------------------------------------------------------------------

EXCHANGES = (
    Exchange("a", count=1),
    Exchange("b", count=1),
    Exchange("o", step=2),
    Exchange("c", members=(0, 1, 2), count=1),
    Exchange("d", members=(1, 3), count=2),
)


@st.composite
def job(draw: Any) -> list[RankState]:
    states = []
    for rank in range(draw(st.integers(1, 6))):
        status = draw(st.sampled_from(["running"] * 4 + ["left"]))
        mine = [one for one in EXCHANGES if one.takes(rank)]
        at = draw(st.none() | st.sampled_from(mine)) if status == "running" else None
        wait = at and Wait(at.what, at.step, at.members, draw(st.integers(0, 3)), 2.0, at.count)
        reached = {one.key: one.count for one in mine if one.step is None and draw(st.booleans())}
        steps = {"o": draw(st.integers(0, 2))}
        states.append(RankState(rank, status, steps, wait, reached=reached))
    return states


def stuck_by_definition(states: Sequence[RankState]) -> set[int]:
    """The same question, rank by rank: who waits for somebody that can never come, directly or not."""

    def away(state: RankState) -> list[RankState]:
        at = next(one for one in EXCHANGES if one.has(state))
        return [
            other
            for other in states
            if at.takes(other.rank) and not at.has(other) and not at.reached_by(other)
        ]

    running = [state for state in states if state.status == "running"]
    live = {state.rank for state in running if state.wait is None or not away(state)}
    while True:
        more = {
            state.rank
            for state in running
            if state.rank not in live and any(other.rank in live for other in away(state))
        }
        if not more:
            return {state.rank for state in running} - live
        live |= more


@given(job())
def test_counting_finds_the_ranks_that_can_never_go_on(states):
    size = max(6, len(states))
    tally = Tally.of(states, EXCHANGES)
    if len(states) < size:  # somebody was not counted: whoever waits for all may go on
        for i in blocked_for_ever(tally, EXCHANGES, size):
            assert EXCHANGES[i].members
        return
    dead = blocked_for_ever(tally, EXCHANGES, size)
    stuck = stuck_by_definition(states)
    assert {s.rank for s in states if any(EXCHANGES[i].has(s) for i in dead)} == stuck
    found = search(states, "inside", [EXCHANGES[i] for i in dead])
    assert set(found.ranks) == stuck


@given(job(), st.integers(0, 6))
def test_tallies_and_findings_of_parts_add_up_and_survive_json(states, cut):
    whole = Tally.of(states, EXCHANGES)
    total = Tally.zero(len(EXCHANGES))
    for part in (states[:cut], states[cut:]):
        total.add(
            Tally.from_message(json.loads(json.dumps(Tally.of(part, EXCHANGES).as_message())), len(EXCHANGES))
        )
    assert total == whole
    for kind in ("inside", "away", "left", "ended"):
        parts = Found()
        for part in (states[cut:], states[:cut]):
            parts.add(
                Found.from_message(json.loads(json.dumps(search(part, kind, EXCHANGES[:1]).as_message())))
            )
        assert parts == search(states, kind, EXCHANGES[:1])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_what_is_no_tally_no_summary_and_no_exchange_is_refused(told):
    for read in (
        lambda: Tally.from_message(told, 2),
        lambda: Summary.from_message(told),
        lambda: Found.from_message(told),
    ):
        with pytest.raises(ConfigError):
            read()
    with contextlib.suppress(ConfigError):
        assert Exchange.from_message(Exchange.from_message(told).as_message()) == Exchange.from_message(told)


def test_a_summary_says_the_most_crowded_exchanges_and_does_not_grow():
    summary = Summary()
    for number in range(500):
        summary.put(Exchange(f"x{number}"), 1 + number, 1.0)
    assert len(json.dumps(Summary.from_message(summary.as_message()).as_message())) < 4000
    assert summary.most[0][1] == 500


# -- the root -----------------------------------------------------------------------------------------


class Job:
    """Ranks whose states a test writes, and a clock that it turns; questions are answered at once."""

    def __init__(self, size: int, **limits: float) -> None:
        self.states = [RankState(rank) for rank in range(size)]
        self.mute: set[int] = set()  # that do not answer
        self.failed: set[int] = set()
        self.now = 100.0
        self.since: dict[int, float] = {}
        self.faults: list[Fault] = []
        self.warnings: list[str] = []
        self.left_alone = 0
        self.asked: list[str] = []
        self.root = Root(size, Limits(**{"warn": 0.0, **limits}), self)

    # What the root may do.

    def ask(self, kind: str, exchanges: Sequence[Exchange], seconds: float, then: Any) -> None:
        self.asked.append(kind)
        states = [s if s.rank not in self.mute else RankState(s.rank, s.status) for s in self.states]
        then(Tally.of(states, exchanges) if kind == "count" else search(states, kind, exchanges))

    def announce(self, fault: Fault) -> None:
        self.faults.append(fault)

    def alone(self) -> None:
        self.left_alone += 1

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    # What a test does.

    def wait(self, rank: int, what: str, step: int | None = None, members: tuple[int, ...] = ()) -> None:
        state = self.states[rank]
        serial = 1 + (state.wait.serial if state.wait is not None else 10 * rank)
        state.wait = Wait(what, step, members, serial, count=0 if step else state.reached.get(what, 0) + 1)
        self.since[rank] = self.now

    def free(self, rank: int) -> None:
        state = self.states[rank]
        if state.wait is not None and state.wait.step is None:
            state.reached[state.wait.key] = state.wait.count
        state.wait = None

    def goes(self, seconds: float) -> Job:
        for _ in range(round(4 * seconds)):
            summary = Summary()
            for state in self.states:
                summary.left += state.status == "left"
                summary.lost += state.status == "lost"
                summary.errors += state.rank in self.failed
                if state.wait is not None:
                    summary.waiting += 1
                    summary.put(Exchange.of(state.wait), 1, self.now - self.since[state.rank])
            self.root.update(summary, self.now)
            self.root.look(self.now)
            self.now += 0.25
        return self


def test_ranks_that_wait_for_each_other_are_found_within_seconds_of_the_last_ones_coming():
    one = Job(3)
    one.wait(0, "x")
    one.wait(1, "x")
    assert not one.goes(700.0).faults  # rank 2 may come yet, however long that takes
    one.wait(2, "y")
    (fault,) = one.goes(3.0).faults
    assert (fault.kind, fault.ranks) == ("deadlock", (0, 1, 2))
    assert "ranks 0, 1, 2 wait for each other in different places (x; y)" in fault.text
    assert isinstance(fault.error(), StallError)


def test_nobody_is_taken_for_deadlocked_who_has_moved_between_two_looks():
    one = Job(2)
    for _ in range(40):
        one.wait(0, "x")
        one.wait(1, "y")
        one.goes(0.75)
        one.free(0)
        one.free(1)
    assert not one.faults


def test_a_rank_that_does_not_answer_is_busy_and_no_reason_for_a_verdict():
    one = Job(2)
    one.wait(0, "x")
    one.wait(1, "y")
    one.mute.add(1)  # its interpreter does not answer: it is not known to be blocked now
    assert not one.goes(120.0).faults
    one.mute.clear()
    assert [fault.kind for fault in one.goes(35.0).faults] == ["deadlock"]


def test_what_is_on_its_way_is_waited_for():
    """Rank 0 sent what it had, and waits in the next exchange; rank 1 still receives."""
    one = Job(2)
    one.wait(0, "big")
    one.free(0)
    one.wait(0, "next")
    one.wait(1, "big")
    assert not one.goes(600.0).faults
    one.free(1)
    one.wait(1, "big")  # for the second time: rank 0 was in the first only
    assert [fault.kind for fault in one.goes(35.0).faults] == ["deadlock"]


def test_who_has_joined_takes_part_in_everything():
    one = Job(3)
    one.wait(0, "join")
    one.wait(1, "allreduce.x")
    one.wait(2, "allreduce.x")
    assert not one.goes(60.0).faults


def test_process_sets_are_judged_apart():
    one = Job(4)
    one.wait(0, "x", members=(0, 1))
    one.wait(1, "y", members=(0, 1))
    one.wait(2, "z")  # rank 3 works
    (fault,) = one.goes(5.0).faults
    assert fault.ranks == (0, 1)


def test_by_default_waiting_is_warned_about_with_growing_pauses_and_never_an_error():
    one = Job(2, warn=60.0)
    one.wait(0, "o", 5)
    one.states[1] = RankState(
        1, steps={"o": 4}, last_activity="begun epoch 3", ago=3.0, stack=("a/train.py:3 in f",)
    )
    assert not one.goes(7300.0).faults
    assert [int(text.partition(" for ")[2].partition(" s")[0]) for text in one.warnings] == pytest.approx(
        [60, 120, 240, 480, 960, 1920, 3840], rel=0.05
    )
    for part in ("1 of 2 ranks wait in step 5 of o", "for rank 1:", "a/train.py:3 in f", "Nothing is ended"):
        assert part in one.warnings[0]
    assert len(one.asked) < 600  # two hours of it


def test_all_in_one_exchange_for_long_is_warned_about_too():
    one = Job(2, warn=60.0)
    one.wait(0, "x")
    one.wait(1, "x")
    assert not one.goes(100.0).faults
    assert "all the others have been there" in one.warnings[0]


def test_a_hard_limit_ends_the_job_where_it_is_set():
    one = Job(2, stall=10.0)
    one.wait(0, "o", 3)
    one.states[1] = RankState(
        1, steps={"o": 2}, last_activity="finished a step", ago=3.0, stack=("a/b.py:3 in f",)
    )
    assert not one.goes(9.0).faults
    (fault,) = one.goes(8.0).faults
    assert (fault.kind, fault.ranks) == ("stall", (1,))
    for part in ("step 3: rank 1 did not come to step 3 of o", "finished a step 3 s ago", "a/b.py:3 in f"):
        assert part in fault.text
    for limit in (3.0, 5.0, 7.0, 40.0, 700.0):  # whatever the pauses between two counts are by then
        one = Job(2, stall=limit)
        one.wait(0, "x")
        one.goes(limit + 1.5)
        assert [fault.kind for fault in one.faults] == ["stall"], limit
    one = Job(2, stall=10.0)  # an exchange that all are in is no stall
    one.wait(0, "x")
    one.wait(1, "x")
    assert not one.goes(60.0).faults


def test_a_rank_that_ended_in_good_order_is_missed_only_by_those_who_wait_for_it():
    one = Job(3)
    one.states[0] = RankState(0, "left", steps={"o": 4})
    assert not one.goes(5.0).faults
    one.wait(1, "o", 4)  # it took part in that
    assert not one.goes(5.0).faults
    one.wait(1, "o", 5)
    (fault,) = one.goes(3.0).faults
    assert (fault.kind, fault.ranks) == ("left", (0,))
    assert (
        "step 5: rank 0 has ended after step 4 of o, while rank 1 wait(s) for it in step 5 of o" in fault.text
    )


def test_a_process_that_is_gone_is_told_at_once_and_its_own_error_before_that():
    one = Job(3)
    one.wait(2, "o", 7)
    one.states[1].status = "lost"
    one.root.gone(1, "", RankState(1, steps={"o": 6}))
    (fault,) = one.goes(0.25).faults
    assert isinstance(fault.error(), LostRankError)
    assert "step 7: rank 1 is gone" in fault.text
    assert "after step 6 of o" in fault.text
    one = Job(3)
    one.root.error(Fault("error", (1,), "step 1: rank 1: alas"), one.now)
    one.root.gone(1)
    assert [fault.text for fault in one.goes(0.25).faults] == ["step 1: rank 1: alas"]


def test_an_error_is_told_once_somebody_waits_and_not_where_all_fail_by_themselves():
    one = Job(3)
    one.failed.add(1)
    one.root.error(Fault("error", (1,), "step 1: rank 1: alas"), one.now)
    assert not one.goes(1.0).faults
    one.wait(0, "x")
    assert [fault.kind for fault in one.goes(0.5).faults] == ["error"]
    one = Job(2)
    one.failed |= {0, 1}
    one.root.error(Fault("error", (1,), "step 1: rank 1: alas"), one.now)
    assert not one.goes(5.0).faults
    assert one.left_alone == 1


def test_that_horovod_gave_up_is_told_only_where_there_is_no_better_reason():
    one = Job(2)
    one.root.error(Fault("broken", (0,), "step 1: an exchange failed"), one.now)
    one.goes(1.0)
    one.root.gone(1)
    assert [fault.kind for fault in one.goes(1.0).faults] == ["lost"]
    one = Job(2)
    one.states[0] = RankState(0, "left", steps={"o": 1})
    one.root.error(Fault("broken", (1,), "step 1: an exchange failed"), one.now)
    (fault,) = one.goes(3.0).faults
    assert "rank 0 has ended after step 1 of o, while rank 1 wait(s)" in fault.text


def test_the_cost_of_a_verdict_does_not_depend_on_the_number_of_ranks():
    one = Job(3)
    asked = []
    for _ in range(2):
        one.asked.clear()
        one.wait(0, "x")
        one.goes(3600.0)
        asked.append(len(one.asked))
        one.free(0)
        one.goes(1.0)
    assert max(asked) < 140  # an hour of waiting
