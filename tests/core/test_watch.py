"""The watch: its wire, its verdicts, and a real hub with real members over loopback."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss import watch
from hvdloss.communicator import OneProcess, simulate
from hvdloss.errors import ConfigError, HvdlossError, LostRankError, RankError, StallError
from hvdloss.watch import Fault, Limits, RankState, Wait, process, service
from hvdloss.watch.activity import Activity, stack_of_main
from hvdloss.watch.hub import Hub
from hvdloss.watch.member import Member
from hvdloss.watch.verdict import FINISHED, STACK, deadlocked, error_text, find, missing
from hvdloss.watch.wire import LIMIT, NONCE, Channel, WireError

KEY = bytes(range(32))
QUICK = Limits(deadlock=0.3, left=0.1, warn=0.0, stall=2.0, silence=0.0)

# -- the wire -----------------------------------------------------------------------------------------

messages = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20) | st.none(), max_size=4)


def channels() -> tuple[Channel, Channel]:
    return Channel(KEY, b"n" * 2 * NONCE, hub=True), Channel(KEY, b"n" * 2 * NONCE, hub=False)


@given(st.lists(messages, max_size=6), st.lists(st.integers(1, 70), max_size=30))
def test_messages_arrive_whole_and_in_order_however_they_are_cut(said, cuts):
    hub, member = channels()
    stream = b"".join(hub.frame(one) for one in said)
    heard, at = [], 0
    for cut in [*cuts, len(stream)]:
        heard += member.feed(stream[at : at + cut])
        at += cut
    heard += member.feed(stream[at:])
    assert heard == said


@given(messages, st.data())
def test_a_changed_bit_is_noticed(said, data):
    hub, member = channels()
    frame = bytearray(hub.frame(said))
    bit = data.draw(st.integers(4 * 8, 8 * len(frame) - 1))  # behind the length
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        member.feed(bytes(frame))


@given(st.binary(max_size=300))
def test_garbage_is_refused_or_waited_for_and_never_a_message(data):
    _, member = channels()
    with contextlib.suppress(WireError):
        assert member.feed(data) == []


def test_replayed_reflected_and_foreign_frames_are_refused():
    hub, member = channels()
    frame = hub.frame({"fault": 1})
    assert member.feed(frame) == [{"fault": 1}]
    with pytest.raises(WireError, match="out of turn"):
        member.feed(frame)  # once more
    hub, member = channels()
    with pytest.raises(WireError):
        hub.feed(hub.frame({"a": 1}))  # back to its sender
    other = Channel(KEY, b"m" * 2 * NONCE, hub=False)
    with pytest.raises(WireError):
        other.feed(channels()[0].frame({"a": 1}))  # recorded on another connection
    stranger = Channel(b"x" * 32, b"n" * 2 * NONCE, hub=False)
    with pytest.raises(WireError):
        stranger.feed(channels()[0].frame({"a": 1}))


def test_large_frames_are_refused_by_their_head():
    hub, member = channels()
    with pytest.raises(WireError, match="longer"):
        hub.frame({"a": "x" * LIMIT})
    with pytest.raises(WireError, match="at most"):
        member.feed((LIMIT + 1).to_bytes(4, "big"))


# -- verdicts -----------------------------------------------------------------------------------------

waits = st.none() | st.builds(
    Wait,
    st.sampled_from("abc"),
    st.none() | st.integers(1, 3),
    st.sampled_from([(), (0, 1), (1, 2)]),
    st.integers(0, 3),
    st.floats(0, 5),
)
states = st.lists(
    st.tuples(
        waits,
        st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)),
        st.sampled_from(["running", "left"]),
    ),
    min_size=1,
    max_size=5,
).map(lambda rows: [RankState(i, status, 0.0, steps, wait) for i, (wait, steps, status) in enumerate(rows)])


@given(states)
def test_who_is_deadlocked_waits_only_for_others_who_are_or_have_ended(ranks):
    stuck = deadlocked(ranks)
    for state in stuck:
        assert state.wait is not None
        away = missing(state, ranks)
        assert away
        assert all(one in stuck or one.status != "running" for one in away)
    if any(state.status == "running" and state.wait is None for state in ranks):
        # One that computes may still come to everything that takes it.
        free = next(s for s in ranks if s.status == "running" and s.wait is None)
        assert all(free not in missing(state, ranks) for state in stuck)


@given(states)
def test_states_and_faults_survive_json(ranks):
    for state in ranks:
        copy = RankState(state.rank, state.status)
        copy.hear(json.loads(json.dumps(state.told())))
        assert copy == state
    fault = find(ranks, QUICK, 1.0)
    if fault is not None:
        assert Fault.heard(json.loads(json.dumps(fault.told()))) == fault
        error = fault.error()
        assert isinstance(error, RankError)
        assert error.ranks == fault.ranks
        assert "step " in str(error)
        assert all(f"{rank}" in str(error) for rank in fault.ranks)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    json_values | st.fixed_dictionaries(dict.fromkeys(("steps", "wait", "did", "ago", "stack"), json_values))
)
def test_what_is_no_state_and_no_fault_is_refused_and_changes_nothing(told):
    state = RankState(1, steps={"a": 3})
    try:
        state.hear(told)
    except ConfigError:
        assert state == RankState(1, steps={"a": 3})
    with pytest.raises(ConfigError):
        Fault.heard(told)


def test_a_rank_that_took_part_may_end_and_go_on():
    here = RankState(0, wait=Wait("o", 5, seconds=9.0))
    for status in ("left", "running"):
        there = RankState(1, status, steps={"o": 5}, wait=Wait("other") if status == "running" else None)
        assert find([here, there], QUICK, 9.0) is None
    fault = find([here, RankState(1, "left", steps={"o": 4})], QUICK, 0.0)
    assert fault is not None
    assert fault.kind == "left"
    assert (
        "step 5: rank 1 has ended after step 4 of o, while rank 0 wait(s) for it in step 5 of o" in fault.text
    )


def test_ranks_of_other_process_sets_are_not_waited_for():
    ranks = [RankState(0, wait=Wait("x", members=(0, 1))), RankState(1, wait=Wait("x", members=(0, 1)))]
    ranks += [RankState(2, wait=Wait("y", members=(2, 3))), RankState(3)]
    assert deadlocked(ranks) == []
    ranks[1] = RankState(1, wait=Wait("y2", members=(1, 2)))
    assert deadlocked(ranks) == []  # rank 3 may come, then 2 goes on, then 1, then 0
    ranks[3] = RankState(3, wait=Wait("z"))
    assert [state.rank for state in deadlocked(ranks)] == [0, 1, 2, 3]


def test_a_stall_names_who_is_missing_what_it_did_and_where_it_is():
    ranks = [
        RankState(0, wait=Wait("o", 3, seconds=3.0)),
        RankState(1, steps={"o": 2}, did="finished a step", ago=3.0, stack=("a/b.py:3 in f",)),
    ]
    fault = find(ranks, QUICK, 0.0)
    assert fault is not None
    assert isinstance(fault.error(), StallError)
    for part in ("step 3: rank 1 did not come to step 3 of o", "finished a step 3 s ago", "a/b.py:3 in f"):
        assert part in fault.text


def test_errors_of_ours_keep_their_way_out_and_others_get_one():
    assert error_text(2, 7, ValueError("boom"), "f.py, line 3").startswith(
        "step 7: rank 2: ValueError: boom [f.py, line 3]. The others cannot go on"
    )
    assert error_text(2, 7, ConfigError("x=1 must be 2"), "") == "step 7: rank 2: ConfigError: x=1 must be 2"


def test_limits_that_cannot_be_used_are_named():
    for value in (-1.0, float("nan"), float("inf"), "3"):
        with pytest.raises(ConfigError, match="stall="):
            Limits(stall=value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"silence=2\.0 .* at least 3 seconds"):
        Limits(silence=2.0)


# -- hub and members ----------------------------------------------------------------------------------


class Rig:
    """A hub and members of one process, each with an activity of its own."""

    def __init__(self, size: int, limits: Limits = QUICK) -> None:
        self.hub = Hub(["127.0.0.1"], size, KEY, limits)
        self.activities = [Activity() for _ in range(size)]
        self.aborted: list[int] = []
        self.members = [
            Member(
                rank,
                self.hub.addresses,
                KEY,
                self.activities[rank],
                limits,
                lambda r=rank: self.aborted.append(r),
                False,
            )
            for rank in range(size)
        ]

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.hub.close(None)
        for member in self.members:
            member.close(bye=False)

    def faults(self, *ranks: int, seconds: float = 10.0) -> list[Fault]:
        until = time.monotonic() + seconds
        found = [self.members[rank] for rank in ranks or range(len(self.members))]
        while time.monotonic() < until and any(member.fault is None for member in found):
            time.sleep(0.01)
        assert all(member.fault is not None for member in found), [m.fault for m in found]
        return [member.take() for member in found]  # type: ignore[misc]

    def quiet(self, seconds: float = 1.0) -> None:
        time.sleep(seconds)
        assert [member.fault for member in self.members] == [None] * len(self.members)


def cut(member: Member) -> None:
    """End a member's connection as a killed process does."""
    member._closed = True
    member._sock.shutdown(socket.SHUT_RDWR)


def test_an_error_of_one_rank_is_told_to_those_that_wait_for_it():
    with Rig(3) as rig, rig.activities[0].waiting("x"), rig.activities[2].waiting("x"):
        told = rig.members[1].tell(Fault("error", (1,), "step 1: rank 1: alas"))
        assert rig.faults() == [Fault("error", (1,), "step 1: rank 1: alas")] * 3
        assert told == rig.members[0].fault


def test_ranks_that_all_fail_by_themselves_keep_their_own_errors():
    with Rig(3) as rig:
        told: list[object] = [0] * 3

        def fail(rank: int) -> None:
            time.sleep(0.1 * rank)
            told[rank] = rig.members[rank].tell(Fault("error", (rank,), f"step 1: rank {rank}"))

        threads = [threading.Thread(target=fail, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert told == [None] * 3
        rig.quiet(0.6)


def test_a_rank_whose_connection_ends_is_lost_and_one_that_says_goodbye_is_not():
    with Rig(3) as rig:
        rig.members[2].close(bye=True)
        rig.quiet()
        cut(rig.members[1])
        (fault,) = rig.faults(0)
        assert fault.kind == "lost"
        assert fault.ranks == (1,)
        assert isinstance(fault.error(), LostRankError)


def test_after_a_pause_of_rank_0_nobody_was_heard_of_in_the_future():
    with Rig(3) as rig:
        passed = threading.Event()
        rig.hub._order(lambda: (rig.hub._pass_over(30.0), passed.set()))
        assert passed.wait(5.0)
        cut(rig.members[1])
        (fault,) = rig.faults(0)
        (ago,) = re.findall(r"rank 1 is gone: .* last heard of (\S+) s before", fault.text)
        assert 0 <= float(ago) < 10


def test_the_loss_of_rank_0_is_found_by_all_the_others():
    with Rig(3) as rig:
        rig.hub.close(None)
        assert {fault.ranks for fault in rig.faults(1, 2)} == {(0,)}
        assert "rank 0 is gone" in rig.faults(1)[0].text


RANK_0 = """
import json, time
from hvdloss.watch.activity import Activity
from hvdloss.watch.hub import Hub
from hvdloss.watch.member import Member
from hvdloss.watch.verdict import Limits
limits, key = Limits(silence=4.0), bytes(range(32))
hub = Hub(["127.0.0.1"], 3, key, limits)
mine = Member(0, hub.addresses, key, Activity(), limits, lambda: None, False)
print(json.dumps(hub.addresses), flush=True)
time.sleep(60)
"""


def test_rank_0_that_is_stopped_is_ended_and_all_say_so_alike():
    child = subprocess.Popen([sys.executable, "-c", RANK_0], stdout=subprocess.PIPE)
    members = []
    try:
        assert child.stdout is not None
        addresses, limits = json.loads(child.stdout.readline()), Limits(silence=4.0)
        for rank in (1, 2):
            members.append(Member(rank, addresses, bytes(range(32)), Activity(), limits, lambda: None, False))
            time.sleep(0.4)  # they do not look at the same time
        time.sleep(1.0)
        os.kill(child.pid, signal.SIGSTOP)
        assert child.wait(15) == -signal.SIGKILL
        until = time.monotonic() + 5
        while time.monotonic() < until and any(member.fault is None for member in members):
            time.sleep(0.01)
        faults = [member.take() for member in members]
        assert faults[0] == faults[1]
        assert faults[0] is not None
        assert (faults[0].kind, faults[0].ranks) == ("silent", (0,))
        assert "rank 0 has not answered for 4 s" in faults[0].text
    finally:
        for member in members:
            member.close(bye=False)
        child.kill()
        child.wait()
        child.stdout.close()  # type: ignore[union-attr]


def test_who_was_taken_for_lost_knows_it_when_it_is_back():
    with Rig(3) as rig:
        rig.hub._order(lambda: rig.hub._announce(Fault("silent", (1,), "step 1: rank 1 is silent")))
        rig.faults()
        assert [member.given_up for member in rig.members] == [False, True, False]
    with Rig(3) as rig:
        rig.members[0]._back = time.monotonic()  # as after a stop, and the others have left meanwhile
        cut(rig.members[1])
        cut(rig.members[2])
        rig.faults(0)
        assert rig.members[0].given_up


def test_who_was_stopped_with_all_others_is_not_given_up():
    with Rig(3) as rig:
        for member in rig.members:
            member._back = time.monotonic()
        cut(rig.members[1])
        rig.faults(0, 2)
        assert not rig.members[0].given_up
        assert not rig.members[2].given_up


def test_when_rank_0_ends_only_who_waits_for_it_has_a_fault():
    with Rig(3) as rig:
        rig.activities[0].stepped("o")
        rig.hub.close(rig.activities[0].state(0).told())
        rig.quiet(0.5)
        with rig.activities[1].waiting_in_step("o"):  # the first step, in which rank 0 took part
            rig.quiet(0.7)
        rig.activities[1].stepped("o")
        with rig.activities[1].waiting_in_step("o"):
            (fault,) = rig.faults(1)
        assert fault.kind == "left"
        assert "rank 0 has ended after step 1 of o" in fault.text
        assert rig.members[2].fault is None


def test_when_horovod_ends_with_rank_0_the_others_say_that_it_has_ended():
    """Horovod's own error says nothing of the kind, and comes before anybody is seen to wait."""
    with Rig(3) as rig:
        rig.activities[0].stepped("o")
        rig.hub.close(rig.activities[0].state(0).told())
        for rank in (1, 2):
            told = rig.members[rank].tell(Fault("broken", (rank,), "step 1: Horovod gave up"))
            assert told.kind == "left"
            assert told.ranks == (0,)
            assert f"rank 0 has ended after step 1 of o, while rank {rank} wait(s)" in told.text


def test_waiting_in_different_places_is_found_and_waiting_in_one_is_not():
    with Rig(2) as rig:
        with rig.activities[0].waiting("x"), rig.activities[1].waiting("x"):
            rig.quiet()
        with rig.activities[0].waiting("x"), rig.activities[1].waiting_in_step("o"):
            faults = rig.faults()
        assert {fault.kind for fault in faults} == {"deadlock"}
        assert "step 1 of o; x" in faults[0].text


def test_who_is_blocked_is_ended_if_it_does_not_look_and_else_is_not():
    with Rig(2) as rig, rig.activities[0].waiting("x"):
        rig.members[1].tell(Fault("error", (1,), "step 1: rank 1: alas"))
        until = time.monotonic() + 10
        while not rig.aborted and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)
        assert rig.aborted == [0]


def test_strangers_change_nothing():
    with Rig(2) as rig:
        address = tuple(rig.hub.addresses[0])
        with socket.create_connection(address) as quiet, socket.create_connection(address) as loud:
            nonce = loud.recv(NONCE)
            loud.sendall(b"\0" * NONCE + b"\xff" * 100000)
            forged = Channel(b"?" * 32, nonce + b"\1" * NONCE, hub=False)
            with socket.create_connection(address) as forger:
                forger.sendall(b"\1" * NONCE + forged.frame({"rank": 1}))
                assert forger.recv(1000)  # the hub's random number
                forger.settimeout(5)
                assert forger.recv(1000) == b""  # and then nothing
            many = []
            for _ in range(60):  # only so many who have not said who they are
                many.append(socket.create_connection(address))
            time.sleep(0.3)
            refused = 0
            for one in many:
                one.settimeout(0.2)
                try:
                    refused += one.recv(NONCE) == b""
                except OSError:
                    refused += 1
                one.close()
            assert refused > 20
            quiet.close()
        rig.quiet(0.5)
        with rig.activities[0].waiting("x"):  # and the ranks are heard as before
            rig.members[1].tell(Fault("error", (1,), "step 1: rank 1: alas"))
            rig.faults()


def test_a_second_connection_cannot_take_a_ranks_place():
    with Rig(2) as rig:
        with pytest.raises(WireError):
            Member(1, rig.hub.addresses, KEY, Activity(), QUICK, lambda: None, False)
        rig.quiet(0.5)


def test_a_hub_that_is_none_is_no_hub():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
        with pytest.raises((OSError, HvdlossError)):
            Member(0, [("127.0.0.1", port)], KEY, Activity(), QUICK, lambda: None, False)


# -- the service --------------------------------------------------------------------------------------


def test_one_process_has_nobody_to_watch():
    assert watch.start(OneProcess(), lambda: None) is False
    assert watch.current() is None
    watch.check()
    error = ValueError("mine")
    assert watch.tell_error(error) is None
    assert watch.explained(error) is error
    with pytest.raises(ValueError, match="mine"), watch.same_fate():
        raise error


def test_settings_that_differ_or_are_no_numbers_are_named_on_all_ranks(monkeypatch):
    monkeypatch.setenv("HVDLOSS_WATCH_STALL", "soon")
    with pytest.raises(ConfigError, match="HVDLOSS_WATCH_STALL='soon'"):
        simulate(2, lambda c: watch.start(c, lambda: None))
    monkeypatch.setenv("HVDLOSS_WATCH_STALL", "5")
    monkeypatch.setenv("HVDLOSS_WATCH", "perhaps")
    with pytest.raises(ConfigError, match="HVDLOSS_WATCH='perhaps'"):
        service.limits_from_environment()
    monkeypatch.setenv("HVDLOSS_WATCH", "0")
    assert service.limits_from_environment() is None
    assert simulate(2, lambda c: watch.start(c, lambda: None)) == [False, False]


def test_the_address_is_that_of_the_interface_in_use(monkeypatch):
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "lo")
    assert service.addresses() == ["127.0.0.1"]
    monkeypatch.setenv("HVDLOSS_WATCH_ADDRESS", "10.1.2.3")
    assert service.addresses() == ["10.1.2.3"]
    monkeypatch.delenv("HVDLOSS_WATCH_ADDRESS")
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "none-such")
    with pytest.raises(OSError, match="device"):
        service.addresses()


# -- processes ----------------------------------------------------------------------------------------


def test_only_the_very_process_is_ended_and_only_if_it_is_stopped():
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        started = process._stat(child.pid)[1]
        who = {"pid": child.pid, "started": started, "host": process.host()}
        assert not process.end(who, only_stopped=True)
        os.kill(child.pid, signal.SIGSTOP)
        until = time.monotonic() + 5
        while process._stat(child.pid)[0] != "T" and time.monotonic() < until:
            time.sleep(0.01)
        for wrong in ({**who, "started": started + 1}, {**who, "host": "other"}, {}, {"pid": "x"}):
            assert not process.end(wrong, only_stopped=True)
        assert child.poll() is None
        assert process.end(who, only_stopped=True)
        assert child.wait(10) == -signal.SIGKILL
        assert not process.end(who, only_stopped=False)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()  # type: ignore[union-attr]


# -- activity -----------------------------------------------------------------------------------------


class Counted:
    def __init__(self) -> None:
        self.counts = (0, 0)

    def progress(self) -> tuple[int, int]:
        return self.counts


def test_steps_of_graphs_are_followed_and_counted_anew_after_a_reset():
    activity, graph = Activity(), Counted()
    activity.follow("g", graph, (0, 1))
    assert activity.state(0).wait is None
    graph.counts = (3, 2)
    state = activity.state(0)
    assert state.steps == {"g": 2}
    assert (state.wait.what, state.wait.step, state.wait.members) == ("g", 3, (0, 1))
    again = activity.state(0).wait
    assert again.serial == state.wait.serial
    activity.begin()  # that step never ends
    assert activity.state(0).wait is None
    assert activity.state(0).steps == {}
    graph.counts = (4, 2)
    assert activity.state(0).wait.step == 1
    assert activity.state(0).wait.serial != state.wait.serial
    graph.counts = (4, 3)
    assert activity.state(0).wait is None
    assert activity.state(0).steps == {"g": 1}
    del graph
    assert activity.state(0).steps == {}


def test_a_graph_that_has_failed_is_not_waited_in_for_ever():
    """It began to wait, and raised instead: nothing says that it ended but where the main thread is."""
    activity, graph = Activity(), Counted()
    activity.follow("g", graph, inside="tests_of_no_such_package")
    graph.counts = (1, 0)
    assert activity.state(0).wait is None  # this code is not that package's
    assert activity.state(0).steps == {"g": 1}
    activity, graph = Activity(), Counted()
    activity.follow("g", graph, inside="threading")
    graph.counts = (1, 0)
    seen, over = [], threading.Event()

    def look() -> None:
        for _ in range(3):
            time.sleep(0.05)
            seen.append(activity.state(0).wait)
        over.set()

    threading.Thread(target=look, daemon=True).start()
    over.wait()
    assert [wait.step for wait in seen] == [1, 1, 1]  # it stood at one place, in that package
    assert len({wait.serial for wait in seen}) == 1
    assert activity.state(0).wait is None  # the main thread has gone on
    graph.counts = (2, 1)  # a step after it begins and ends by itself
    assert activity.state(0).steps == {"g": 2}
    assert activity.state(0).wait is None


def test_who_has_finished_an_exchange_is_not_waited_for_in_it():
    """Rank 0 sent what it had, and waits in the next exchange; rank 1 still receives."""
    zero, one = Activity(), Activity()
    with zero.waiting("big"):
        pass
    with zero.waiting("next"), one.waiting("big"):
        states = [zero.state(0), one.state(1)]
        for state in states:  # as they travel
            state.hear(json.loads(json.dumps(state.told())))
        assert missing(states[1], states) == []
        assert [state.rank for state in missing(states[0], states)] == [1]
        assert deadlocked(states) == []
    with zero.waiting("next"), one.waiting("another"):
        states = [zero.state(0), one.state(1)]
        assert [state.rank for state in deadlocked(states)] == [0, 1]
    with one.waiting("big"):
        pass
    with one.waiting("big"), zero.waiting("next"):  # for the second time: rank 0 was in the first only
        states = [zero.state(0), one.state(1)]
        assert [state.rank for state in deadlocked(states)] == [0, 1]
    with one.waiting("big", (0, 1)), zero.waiting("next"):  # of other ranks
        states = [zero.state(0), one.state(1)]
        assert [state.rank for state in deadlocked(states)] == [0, 1]


def test_only_the_last_exchanges_are_told():
    activity = Activity()
    for number in range(5000):
        with activity.waiting(f"x{number}"):
            pass
    told = activity.state(0).told()["finished"]
    assert list(told) == [f"x{number}" for number in range(5000 - FINISHED, 5000)]


def test_the_main_threads_stack_is_told_while_it_runs():
    def generate(depth: int):
        yield from generate(depth - 1) if depth else [1, 2]

    told: set[tuple[str, ...]] = set()
    until = time.monotonic() + 1.0

    def look() -> None:
        while time.monotonic() < until:
            told.add(stack_of_main())

    thread = threading.Thread(target=look)
    thread.start()
    while time.monotonic() < until:
        assert list(generate(5)) == [1, 2]
    thread.join()
    assert all(0 < len(stack) <= STACK for stack in told)
    assert any("in generate" in stack[-1] for stack in told)
    here = f"in {test_the_main_threads_stack_is_told_while_it_runs.__name__}"
    assert any(stack[-1].endswith(here) and stack[-1].startswith("core/test_watch.py:") for stack in told)


LOOKING = """
import gc, socket, threading, time, warnings
from hvdloss.watch.activity import stack_of_main

warnings.simplefilter("ignore")  # sockets are not closed
until = time.monotonic() + 2.0

class Ring:
    def __init__(self):
        self.me, self.sock = self, socket.socket()

def look():
    while time.monotonic() < until:
        stack_of_main()
        Ring()

threads = [threading.Thread(target=look, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert gc.isenabled()
gc.disable()
stack_of_main()
assert not gc.isenabled()
"""


def test_looking_for_the_main_thread_does_not_stop_python_while_garbage_is_collected():
    """CPython's issue 106883: all threads stood still within a second."""
    subprocess.run([sys.executable, "-c", LOOKING], check=True, timeout=60)


def test_the_innermost_wait_counts_and_steps_too():
    activity = Activity()
    with activity.waiting_in_step("o"):
        with activity.waiting("inner", (1, 2)):
            assert activity.state(0).wait.what == "inner"
        assert activity.state(0).wait.place == "step 1 of o"
    activity.stepped("o")
    with activity.waiting_in_step("o"):
        assert activity.state(0).wait.step == 2
    assert activity.state(0).wait is None
    assert activity.state(0).did == "finished a step"
    assert any("test_watch.py" in frame for frame in activity.state(0).stack)
    assert np.isfinite(activity.state(0).ago)
