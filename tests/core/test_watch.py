"""The watch: its wire, its words, what a rank knows of itself, and how it begins."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss import watch
from hvdloss.comm.communicator import OneProcess, simulate
from hvdloss.errors import ConfigError, RankError
from hvdloss.watch import Fault, Limits, RankState, Wait, service, verdict
from hvdloss.watch.activity import Activity, stack_of_main
from hvdloss.watch.verdict import REACHED, STACK, error_text
from hvdloss.watch.wire import LIMIT, NONCE, Channel, WireError

KEY = bytes(range(32))

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


# -- states and faults --------------------------------------------------------------------------------

states = st.builds(
    RankState,
    st.integers(0, 9),
    st.sampled_from(["running", "left"]),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)),
    st.none()
    | st.builds(
        Wait,
        st.sampled_from("abc"),
        st.none() | st.integers(1, 3),
        st.sampled_from([(), (0, 1), (1, 2)]),
        st.integers(0, 3),
        st.floats(0, 5),
        st.integers(0, 4),
    ),
    st.text(max_size=5),
    st.floats(0, 5),
    st.just(("a/b.py:3 in f",)),
    st.dictionaries(st.sampled_from("xyz"), st.integers(0, 3)),
    st.sampled_from(["", "its process is stopped"]),
)


@given(states)
def test_states_and_faults_survive_json(state):
    copy = RankState(state.rank, state.status)
    copy.update(json.loads(json.dumps(state.as_message())))
    assert copy == state
    for fault in (
        verdict.lost(3, state.rank, state),
        verdict.silent(3, state.rank, Limits(), "is stopped", state),
        verdict.left_behind(state, (7,), 3, " in x"),
        verdict.deadlocked(3, (state.rank,), [state]),
        verdict.stalled(3, (state.rank,), [state], "x", 9.0, Limits(stall=5.0)),
    ):
        assert Fault.from_message(json.loads(json.dumps(fault.as_message()))) == fault
        error = fault.error()
        assert isinstance(error, RankError)
        assert error.ranks == fault.ranks == (state.rank,)
        assert "step 3: rank" in str(error)


def test_a_fault_of_many_ranks_says_how_many_and_shows_some():
    states = [RankState(rank, wait=Wait("x")) for rank in range(8)]
    text = verdict.deadlocked(2, range(10_000), states).text
    assert "10000 ranks (0-9999) wait for each other" in text
    assert "... and 9992 more" in text
    assert len(text) < 2000


PARTS = ("steps", "wait", "last_activity", "ago", "stack", "reached")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(json_values | st.fixed_dictionaries(dict.fromkeys(PARTS, json_values)))
def test_what_is_no_state_and_no_fault_is_refused_and_changes_nothing(told):
    state = RankState(1, steps={"a": 3})
    try:
        state.update(told)
    except ConfigError:
        assert state == RankState(1, steps={"a": 3})
    with pytest.raises(ConfigError):
        Fault.from_message(told)


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


# -- the service --------------------------------------------------------------------------------------


def test_one_process_has_nobody_to_watch():
    assert watch.start(OneProcess(), lambda: None) is False
    assert watch.current() is None
    watch.check()
    error = ValueError("mine")
    assert watch.report_error(error) is None
    assert watch.root_cause(error) is error
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
    for address in ("127.0.0.1", "127.0.0.0/8"):
        monkeypatch.setenv("HVDLOSS_WATCH_ADDRESS", address)
        assert service.addresses() == ["127.0.0.1"]
    monkeypatch.setenv("HVDLOSS_WATCH_ADDRESS", "10.1.2.3")  # of another host: this one's is found as ever
    assert service.addresses() == ["127.0.0.1"]
    monkeypatch.setenv("HVDLOSS_WATCH_ADDRESS", "here")
    with pytest.raises(ConfigError, match="HVDLOSS_WATCH_ADDRESS='here'"):
        service.addresses()
    monkeypatch.delenv("HVDLOSS_WATCH_ADDRESS")
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "none-such")
    with pytest.raises(OSError, match="device"):
        service.addresses()


# -- activity -----------------------------------------------------------------------------------------


class Counted:
    def __init__(self) -> None:
        self.counts = (0, 0)

    def progress(self) -> tuple[int, int]:
        return self.counts


def test_steps_of_graphs_are_followed_and_counted_anew_after_a_reset():
    activity, graph = Activity(), Counted()
    activity.track("g", graph, (0, 1))
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
    activity.track("g", graph, inside="tests_of_no_such_package")
    graph.counts = (1, 0)
    assert activity.state(0).wait is None  # this code is not that package's
    assert activity.state(0).steps == {"g": 1}
    activity, graph = Activity(), Counted()
    activity.track("g", graph, inside="threading")
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


class Other:
    """The main thread's look at itself: what another thread sees while it is in a function."""

    def __init__(self, activity: Activity) -> None:
        self.activity = activity
        self.seen: list[Wait | None] = []
        self.over = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        time.sleep(0.1)
        self.seen = [self.activity.wait() for _ in range(5)]
        self.over.set()


@watch.blocking
def block(other: Other) -> None:
    while not other.over.is_set():
        time.sleep(0.001)


def not_blocking(other: Other) -> None:
    while not other.over.is_set():
        time.sleep(0.001)


class Finalized:
    def __init__(self, other: Other) -> None:
        self.me, self.other = self, other  # for the garbage collector

    def __del__(self) -> None:
        not_blocking(self.other)


@watch.blocking
def block_and_collect(other: Other) -> None:
    gc.collect()
    assert other.over.is_set()


def test_only_a_function_that_does_nothing_but_block_is_a_wait():
    activity = Activity()
    with activity.waiting_in_step("o"):
        block(other := Other(activity))
        assert [wait.place for wait in other.seen] == ["step 1 of o"] * 5
        assert len({wait.serial for wait in other.seen}) == 1
        with activity.waiting("inner", (2, 1)):
            block(other := Other(activity))
            assert {(wait.what, wait.members, wait.count) for wait in other.seen} == {("inner", (1, 2), 1)}
        not_blocking(other := Other(activity))  # hashing, a callback, anything of the user's
        assert other.seen == [None] * 5
        other = Other(activity)
        Finalized(other)
        block_and_collect(other)  # the collector ran a finalizer
        assert other.seen == [None] * 5
    block(other := Other(activity))  # nothing says what it blocks in
    assert other.seen == [None] * 5
    activity.on_step("o")
    with activity.waiting_in_step("o"):
        block(other := Other(activity))
        assert other.seen[0].step == 2
    state = activity.state(0)
    assert state.wait is None
    assert state.last_activity == "finished a step"
    assert any("test_watch.py" in frame for frame in state.stack)
    assert np.isfinite(state.ago)


def test_what_was_begun_is_counted_by_name_and_ranks_and_only_the_last_names_are_told():
    activity = Activity()
    assert [activity.enter_exchange("x") for _ in range(3)] == [1, 2, 3]
    assert activity.enter_exchange("x", (0, 1)) == 1
    with activity.waiting_for("x", (), 3):
        block(other := Other(activity))
    assert (other.seen[0].what, other.seen[0].count) == ("x", 3)
    assert activity.state(0, keys=["x", "none"]).reached == {"x": 3}
    with activity.waiting_in_step("o"), activity.waiting_for("x", (), 3):  # it belongs to the step
        block(other := Other(activity))
    assert other.seen[0].step == 1
    for number in range(5000):
        activity.enter_exchange(f"x{number}")
    assert list(activity.state(0).reached) == [f"x{number}" for number in range(5000 - REACHED, 5000)]


def test_an_agent_imports_nothing_heavy():
    """It is begun by every hvd.init(), and shares the machine with the ranks."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import hvdloss.watch.agent; print(*sys.modules)"
    root = str(Path(watch.__file__).parents[2])
    out = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, root], capture_output=True, text=True, check=True
    )
    assert not {"numpy", "torch", "tensorflow"} & set(out.stdout.split())
