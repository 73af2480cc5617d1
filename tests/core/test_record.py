"""The record of a run: what is written can be read, whatever happens to the file, and stays small."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss.comm import world
from hvdloss.errors import ConfigError, LostRankError, UsageError
from hvdloss.losses.ledger import Ledger
from hvdloss.report import LossReport, Recorder, StepReport, Subscription, TermReport, read
from hvdloss.report.reading import Tail
from hvdloss.report.schema import FORMAT, KINDS, checked, encoded, plain, scrubbed
from hvdloss.report.summary import class_table, hardest, summarize
from hvdloss.terms.controller import Controller
from hvdloss.terms.term import Decision

ABOUT = {"ranks": 2, "framework": "none", "terms": {}, "objective": {}, "environment": {"hosts": 1}}


def ledger(loss=1.0, weight=2.0, **more):
    return Ledger(
        numerator=loss * weight, denominator=weight, weight=weight, elements=3.0, micro_batches=1.0, **more
    )


def report(step, ledgers=None, **options):
    return StepReport.of(step, ledgers or [ledger(1.0 / step), ledger(2.0 / step, 1.0)], "mean", **options)


def recorded(path, steps, **options):
    recorder = Recorder(path, **options)
    recorder.begin(ABOUT)
    for step in steps:
        recorder.step(report(step))
    return recorder


# -- what is written is what is read --------------------------------------------------------------------


def test_a_record_gives_back_what_the_reports_said(tmp_path):
    path = tmp_path / "runs" / "a.jsonl"
    with Recorder(
        path, name="a run", settings={"lr": 0.1, "api_key": "x1", "data": "/home/ann/x.csv"}
    ) as recorder:
        recorder.begin(ABOUT)
        reports = [
            report(1),
            report(2, [ledger(3.0, communication=0.25, computation=0.5), Ledger(communication=0.5)]),
            report(3, losses={"a": LossReport(2.0, 3.0, 4, 0.5), "b": LossReport(math.nan, 0.0, 0, 0.0)}),
        ]
        for one in reports:
            recorder.step(one)
        recorder.decision(Decision(2, "period", 1, 4, "it pays"))
        recorder.epoch(loss=0.5, recall=np.array([0.5, 0.25, 1.0]))
    found = read(path)
    assert (found.name, found.size, found.status) == ("a run", 2, "finished")
    assert found.runs[0]["settings"] == {"lr": 0.1, "api_key": "(hidden)", "data": "…/x.csv"}
    assert found.column("loss").tolist() == [one.loss for one in reports]
    assert found.column("samples").tolist() == [6.0, 9.0, 15.0]
    assert found.by_rank("communication").tolist() == [[0.0, 0.0], [0.25, 0.5], [0.0, 0.0]]
    assert "losses" not in found.steps[0]
    assert found.steps[2]["losses"] == {
        "a": {"value": 2.0, "weight": 3.0, "elements": 4, "factor": 0.5},
        "b": {"value": None, "weight": 0.0, "elements": 0, "factor": 0.0},
    }
    losses = found.by_rank("loss")
    assert losses[1, 0] == 3.0
    assert math.isnan(losses[1, 1])
    assert found.steps[1]["ranks"]["loss"][1] is None  # strict JSON knows no NaN
    (decision,) = found.decisions
    assert {k: decision[k] for k in ("step", "what", "before", "after", "reason")} == {
        "step": 2, "what": "period", "before": 1, "after": 4, "reason": "it pays",
    }  # fmt: skip
    assert found.epochs[0]["metrics"] == {"loss": 0.5, "recall": [0.5, 0.25, 1.0]}
    (hard,) = hardest(found)
    assert hard.items == [("1", 0.25), ("0", 0.5), ("2", 1.0)]


def test_a_metric_is_no_secret_whatever_its_name(tmp_path):
    with Recorder(tmp_path / "a.jsonl", settings={"token": 12}) as recorder:
        recorder.begin(ABOUT)
        recorder.epoch(1, {"token_accuracy": 0.5, "loss": float("nan")})
    found = read(tmp_path / "a.jsonl")
    assert found.epochs[0]["metrics"] == {"token_accuracy": 0.5, "loss": None}
    assert found.runs[0]["settings"] == {"token": "(hidden)"}


def test_what_summarize_says_is_what_the_steps_say(tmp_path):
    path = tmp_path / "a.jsonl"
    cost = {"communication": 0.25, "computation": 0.75}
    with Recorder(path) as recorder:
        recorder.begin(ABOUT)
        for step, loss in enumerate((4.0, 1.0, 2.0), start=1):
            ledgers = [ledger(loss, 3.0, **cost), ledger(loss, 1.0, communication=0.5, computation=0.5)]
            recorder.step(report(step, ledgers))
    found = summarize(read(path))
    assert (found.first_loss, found.loss, found.best_loss, found.best_step) == (4.0, 2.0, 1.0, 2)
    assert (found.steps, found.recorded, found.samples) == (3, 3, 18.0)
    assert [row.weight_share for row in found.rows] == [0.75, 0.25]
    assert [(row.computing, row.waiting, row.moving) for row in found.rows] == [
        (0.75, 0, 0.25),
        (0.5, 0.25, 0.25),
    ]
    assert found.held_up == pytest.approx(0.75 / 2.0)
    assert (found.averaging_error, found.worst_averaging_error) == (0.0, 0.0)


def test_a_record_says_what_plain_averaging_would_have_reported(tmp_path):
    path = tmp_path / "a.jsonl"
    uneven = [
        [ledger(1.0, 3.0), ledger(5.0, 1.0)],
        [ledger(1.0, 3.0), ledger(1.0, 1.0)],
        [ledger(2.0), Ledger()],
    ]
    with Recorder(path) as recorder:
        recorder.begin(ABOUT)
        for step, ledgers in enumerate(uneven, start=1):
            recorder.step(report(step, ledgers))
        recorder.step(StepReport.of(4, uneven[0], "sum"))
    found = read(path)
    assert found.column("loss").tolist() == [2.0, 1.0, 2.0, 8.0]
    assert found.column("averaged_loss")[:3].tolist() == [3.0, 1.0, 2.0]
    assert "averaged_loss" not in found.steps[3]
    assert (summarize(found).averaging_error, summarize(found).worst_averaging_error) == (0.0, 0.5)


def test_counts_of_classes_come_at_powers_of_two_and_at_the_end(tmp_path):
    path = tmp_path / "a.jsonl"
    recorder = Recorder(path, classes=["cat", "dog"])
    recorder.begin(ABOUT)
    for step in range(1, 12):
        counts = [[float(step), 1.0], [0.0, 2.0]]
        term = TermReport("nats", 0.0, [0.1, 0.2], 0.3, 0.0, {"counts": counts, "overall": math.nan})
        recorder.step(report(step, terms={"skew": term}))
    recorder.close()
    found = read(path)
    assert [line["step"] for line in found.classes] == [1, 2, 4, 8, 11]
    counts, names, _ = class_table(found)
    assert (counts.tolist(), names) == ([[11.0, 1.0], [0.0, 2.0]], ["cat", "dog"])
    assert found.steps[-1]["terms"]["skew"] == {
        "values": [0.1, 0.2],
        "total": 0.3,
        "priced": 0.0,
        "overall": None,
    }


def test_a_step_that_was_not_finite_is_a_fault_and_names_the_rank(tmp_path):
    path = tmp_path / "a.jsonl"
    with Recorder(path) as recorder:
        recorder.begin(ABOUT)
        recorder.step(report(7, [ledger(), ledger(nonfinite_losses=1.0)], nonfinite="skip", skipped=1))
    found = read(path)
    (fault,) = found.faults
    assert (fault["step"], fault["error"], fault["ranks"]) == (7, "NonFiniteLossError", [1])
    assert found.steps[0]["loss"] is None
    assert found.steps[0]["ranks"]["nonfinite"] == ["", "loss"]
    assert summarize(found).rows[1].nonfinite == 1


def test_pandas_reads_it_in_one_line(tmp_path):
    pandas = pytest.importorskip("pandas")
    recorded(tmp_path / "a.jsonl", range(1, 6)).close()
    table = pandas.read_json(tmp_path / "a.jsonl", lines=True)
    steps = table[table.kind == "step"]
    assert steps.step.tolist() == [1, 2, 3, 4, 5]
    assert steps.loss.tolist() == pytest.approx(read(tmp_path / "a.jsonl").column("loss"))


def test_only_its_owner_can_read_it(tmp_path):
    former = os.umask(0)
    try:
        recorder = recorded(tmp_path / "new" / "a.jsonl", range(1, 30), max_steps=8, recent=2)
        recorder.close()
    finally:
        os.umask(former)
    assert stat.S_IMODE(os.stat(tmp_path / "new" / "a.jsonl").st_mode) == 0o600
    assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == 0o700
    assert os.listdir(tmp_path / "new") == ["a.jsonl"]


# -- thinning -------------------------------------------------------------------------------------------


def wait_until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_thinning_keeps_every_so_many_the_last_ones_and_all_events(tmp_path):
    path = tmp_path / "a.jsonl"
    recorder = Recorder(path, max_steps=100, recent=20)
    recorder.begin(ABOUT)
    for step in range(1, 2001):
        recorder.step(report(step))
        if step % 100 == 0:
            recorder.decision(Decision(step, "what", step, step + 1, "because"))
            wait_until(lambda: recorder._queue.qsize() < 50)  # several batches, so several thinnings
    recorder.close()
    found = read(path)
    steps = [line["step"] for line in found.steps]
    assert steps == sorted(set(steps))
    assert steps[0] == 1
    assert steps[-20:] == list(range(1981, 2001))
    assert len(steps) <= 100 + 50  # a batch may come before the next thinning
    gaps = {b - a for a, b in itertools.pairwise(steps[:30])}
    assert len(gaps) == 1  # evenly
    (gap,) = gaps
    assert gap & (gap - 1) == 0
    assert [line["step"] for line in found.decisions] == list(range(100, 2001, 100))
    assert found.steps[-1]["samples"] == 6 * 2000  # counted, not summed over what is left
    assert found.status == "finished"


def test_the_size_is_bounded_where_lines_are_long(tmp_path):
    path = tmp_path / "a.jsonl"
    recorder = Recorder(path, max_steps=100_000, recent=4, max_bytes=50_000)
    recorder.begin({**ABOUT, "ranks": 20})
    for step in range(1, 401):
        recorder.step(report(step, [ledger(1.0 / step)] * 20))
        if step % 20 == 0:
            wait_until(lambda: recorder._queue.qsize() == 0)
    recorder.close()
    assert path.stat().st_size < 2 * 50_000
    assert [line["step"] for line in read(path).steps][-4:] == [397, 398, 399, 400]


# -- growing, crashes, damage ------------------------------------------------------------------------------


def test_a_reader_follows_a_growing_record_and_its_thinning(tmp_path):
    path = tmp_path / "a.jsonl"
    recorder = recorded(path, [1], max_steps=20, recent=5)
    wait_until(lambda: path.stat().st_size > 0)
    tail = Tail(path)
    for step in range(2, 200):
        recorder.step(report(step))
        if step % 10 == 0:
            wait_until(lambda: recorder._queue.qsize() == 0)
            tail.more()
            steps = [line["step"] for line in tail.record.steps]
            assert steps == sorted(set(steps))
    assert tail.record.status == "running"
    recorder.close()
    assert tail.more()
    assert tail.record.status == "finished"
    assert tail.record == read(path)
    assert not tail.more()


def test_a_reader_sees_that_a_file_of_the_same_inode_is_another(tmp_path):
    """Of two replacements in a row the second may get the inode of the file before the first."""
    path = tmp_path / "a.jsonl"
    recorded(path, range(1, 7)).close()
    head, *steps = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(head + b"".join(steps[:3]))
    tail = Tail(path)
    inode = path.stat().st_ino
    path.write_bytes(head + b"".join(steps[1:]))  # one line less, and some more
    assert path.stat().st_ino == inode
    assert tail.more()
    assert tail.record == read(path)
    assert not tail.more()


def test_every_cut_of_a_record_can_be_read(tmp_path):
    recorded(tmp_path / "a.jsonl", range(1, 4)).close()
    whole = (tmp_path / "a.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    cut = tmp_path / "cut.jsonl"
    for length in range(ends[0], len(whole) + 1):
        cut.write_bytes(whole[:length])
        found = read(cut)
        assert found.half == (length not in ends)
        assert len(found.steps) == sum(end <= length for end in ends[1:4])


def test_a_run_that_is_killed_leaves_a_record_and_can_be_taken_up(tmp_path):
    path = tmp_path / "a.jsonl"
    program = f"""
import time
from hvdloss.losses.ledger import Ledger
from hvdloss.report import Recorder, StepReport
recorder = Recorder({str(path)!r})
recorder.begin({{"ranks": 1}})
step = 0
while True:
    step += 1
    recorder.step(StepReport.of(step, [Ledger(1.0, 1.0, 1.0, 1.0, 1.0)], "mean"))
    time.sleep(0.002)
"""
    child = subprocess.Popen([sys.executable, "-c", program])
    wait_until(lambda: path.exists() and path.stat().st_size > 20_000)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = read(path)
    assert before.status == "running"
    assert len(before.steps) > 5
    with open(path, "ab") as file:  # as if it was killed in the middle of a line
        file.write(b'{"kind":"step","ti')
    assert read(path).half
    with pytest.raises(ConfigError, match="there is a record already"):
        Recorder(path).open()
    with Recorder(path, exists="append") as again:
        again.begin({"ranks": 1})
        again.step(report(1000, [ledger()]))
    after = read(path)
    assert not after.half
    assert after.status == "finished"
    assert len(after.runs) == 2
    assert after.steps[:-1] == before.steps
    assert after.steps[-1]["samples"] == before.steps[-1]["samples"] + 3
    with Recorder(path, exists="replace") as anew:
        anew.begin({"ranks": 1})
    assert read(path).steps == []


def test_a_process_that_ends_with_an_exception_says_so_in_its_record(tmp_path):
    path = tmp_path / "a.jsonl"
    program = f"""
from hvdloss.losses.ledger import Ledger
from hvdloss.report import Recorder, StepReport
recorder = Recorder({str(path)!r})
recorder.begin({{"ranks": 1}})
recorder.step(StepReport.of(1, [Ledger(1.0, 1.0, 1.0, 1.0, 1.0)], "mean"))
raise ValueError("cannot read /home/ann/secret/x.csv")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    found = read(path)
    assert found.status == "failed"
    assert len(found.steps) == 1
    assert (found.faults[0]["error"], found.faults[0]["text"]) == ("ValueError", "cannot read …/x.csv")


GOOD = encoded({"kind": "run", "time": 1.0, "format": FORMAT, "ranks": 1})
STEP = {
    "kind": "step", "time": 2.0, "step": 1, "samples": 3, "loss": 1.0, "weight": 1.0, "elements": 3,
    "objective_value": 1.0,
    "ranks": {
        name: [1.0]
        for name in ("loss", "weight", "elements", "micro_batches", "communication", "computation")
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"\n", "line 1 is no JSON"),
        (b"nonsense\n", "line 1 is no JSON"),
        (b'{"kind": "step"}\n', "line 1 is not the head of a record"),
        (b'{"kind":"run","time":1,"format":"hvdloss record 9","ranks":1}\n', "newer"),
        (GOOD + b"[1]\n", "line 2 is no JSON object"),
        (GOOD + b"[" * 5000 + b"]" * 5000 + b"\n", "line 2 is no JSON"),
        (GOOD + b'{"kind":"run","time":1,"format":"hvdloss record 1","ranks":0}\n', "no number of ranks"),
        (GOOD + encoded({**STEP, "loss": "1"}), r"line 2 \(step\): loss='1' is of another form"),
        (GOOD + encoded({**STEP, "step": -1}), "step=-1 is of another form"),
        (GOOD + encoded({**STEP, "ranks": {}}), "'loss' is missing"),
        (GOOD + encoded({**STEP, "ranks": {**STEP["ranks"], "weight": [1, 2]}}), "ranks.weight has 2 values"),
        (GOOD + encoded({**STEP, "terms": {"skew": {"values": [1.0, 2.0]}}}), "has 2 values of 1 ranks"),
        (GOOD + encoded({**STEP, "losses": {"a": {"value": "x"}}}), "losses.a is of another form"),
        (GOOD + b'{"kind":"step","time":NaN}\n', "time=nan is of another form"),
        (GOOD + b'{"kind":"end","time":1e999,"step":1,"status":"x"}\n', "time=None is of another form"),
    ],
)
def test_what_is_no_record_is_told_by_line_and_field(tmp_path, data, says):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=says) as caught:
        read(path)
    assert "a.jsonl" in str(caught.value)


def test_a_good_step_is_none_of_these(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + encoded(STEP) + encoded({"kind": "of tomorrow", "time": 1}))
    found = read(path)
    assert (len(found.steps), found.unknown) == (1, 1)
    with pytest.raises(ConfigError, match="cannot read the record"):
        read(tmp_path / "none.jsonl")


def test_every_kind_that_is_checked_is_kept():
    record = read.__globals__["Record"]("x")
    for kind in KINDS:
        record.add({"kind": kind, "step": 0})
    assert record.unknown == 0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_whatever_is_written_is_strict_json_in_one_line(value):
    line = encoded({"kind": "epoch", "value": plain(value)})
    assert line.count(b"\n") == 1
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@given(st.dictionaries(st.sampled_from([*STEP, "terms", "time", "kind", "x"]), values))
def test_whatever_a_line_holds_is_checked_or_refused(line):
    try:
        found = checked(encoded(plain({**STEP, **line})), "here")
    except ConfigError:
        return
    assert found is None or found["kind"] in KINDS


def test_texts_lose_their_folders_and_what_commands_a_terminal(tmp_path):
    assert (
        scrubbed("~/x/y.py and /a/b/c.txt, not https://host/a/b")
        == "…/y.py and …/c.txt, not https://host/a/b"
    )
    path = tmp_path / "a.jsonl"
    with Recorder(path) as recorder:
        recorder.begin({"ranks": 1})
        recorder.fault(ValueError("\x1b]0;owned\x07 \u202e"))
    assert read(path).faults[0]["text"] == "\ufffd]0;owned\ufffd \ufffd"


# -- following ---------------------------------------------------------------------------------------------


class Steps:
    """What an adapter's engine is to those who follow."""

    def __init__(self):
        self.listeners = []

    def add_listener(self, listener):
        self.listeners.append(listener)

    def remove_listener(self, listener):
        if listener in self.listeners:
            self.listeners.remove(listener)

    def go(self, step):
        for listener in list(self.listeners):
            listener(report(step))


class Notes:
    def __init__(self, fails=False):
        self.seen, self.closed, self.fails = [], 0, fails

    def step(self, report):
        if self.fails:
            raise OSError("the disk is full")
        self.seen.append(report.step)

    def close(self):
        self.closed += 1


def following(source, *sinks, is_reporting_rank=True, **options):
    return Subscription(
        source,
        Controller(),
        sinks,
        metadata=lambda: ABOUT,
        is_reporting_rank=lambda: is_reporting_rank,
        **options,
    )


def test_sinks_are_told_on_one_rank_until_the_end():
    source, notes, other = Steps(), Notes(), Notes()
    with following(source, notes), following(source, other, is_reporting_rank=False):
        source.go(1)
        source.go(2)
    source.go(3)
    assert (notes.seen, notes.closed) == ([1, 2], 1)
    assert (other.seen, other.closed) == ([], 0)
    assert source.listeners == []


def test_a_sink_that_fails_is_told_no_more_and_training_goes_on():
    source, bad, good = Steps(), Notes(fails=True), Notes()
    follows = following(source, bad, good)
    with pytest.warns(RuntimeWarning, match=r"Notes\.step\(\) raised OSError: the disk is full"):
        source.go(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.go(2)
    follows.close()
    follows.close()
    assert good.seen == [1, 2]
    assert (bad.closed, good.closed) == (1, 1)


def test_following_lives_and_ends_with_what_it_follows():
    source, notes = Steps(), Notes()
    following(source, notes)  # nobody keeps it
    waits = weakref.ref(following(source, Notes(), is_reporting_rank=False))
    gc.collect()
    source.go(1)
    assert notes.seen == [1]
    assert waits() is not None
    del source
    gc.collect()
    assert waits() is None


def test_what_is_no_sink_is_refused():
    with pytest.raises(ConfigError, match="must be an object with step"):
        following(Steps(), object())
    with pytest.raises(ConfigError, match="must be an object with step"):
        following(Steps(), Notes)


def test_when_the_ranks_change_another_one_is_told(tmp_path):
    source, first = Steps(), [False]
    recorder = Recorder(tmp_path / "a.jsonl")
    follows = Subscription(
        source, None, (recorder,), metadata=lambda: ABOUT, is_reporting_rank=lambda: first[0], size=lambda: 3
    )
    source.go(1)
    first[0] = True
    follows.reset()
    source.go(2)
    follows.reset()
    source.go(3)
    first[0] = False
    follows.reset()
    source.go(4)
    follows.close()
    found = read(tmp_path / "a.jsonl")
    assert [line["step"] for line in found.steps] == [2, 3]
    assert [line["ranks"] for line in found.ranks] == [3]


def test_a_recorder_follows_once(tmp_path):
    with Recorder(tmp_path / "a.jsonl") as recorder:
        recorder._subscribe(lambda: False, lambda: following(Steps(), recorder, closes=False))
        with pytest.raises(UsageError, match="follows an optimizer already"):
            recorder._subscribe(lambda: False, lambda: None)


def test_the_error_that_ends_training_is_in_the_record(tmp_path):
    error = LostRankError("rank 3 is gone\n its stack: /home/ann/x.py")
    error.ranks = (3,)
    source = Steps()
    recorder = Recorder(tmp_path / "a.jsonl")
    recorder._subscribe(lambda: False, lambda: following(source, recorder, closes=False))
    source.go(1)
    with pytest.raises(LostRankError), recorder:
        raise error
    found = read(tmp_path / "a.jsonl")
    assert found.status == "failed"
    assert [(one["error"], one["ranks"], one["text"]) for one in found.faults] == [
        ("LostRankError", [3], "rank 3 is gone")
    ]


def test_a_disk_that_fails_is_a_warning_once(tmp_path, caplog):
    recorder = recorded(tmp_path / "a.jsonl", [1])
    wait_until(lambda: (tmp_path / "a.jsonl").stat().st_size > 0)
    recorder._file.close()
    recorder.step(report(2))
    wait_until(lambda: recorder._broken)
    recorder.step(report(3))
    recorder.close()
    assert [one.message for one in caplog.records if "is not written any more" in one.message] != []


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 7},
        {"recent": 0},
        {"recent": 3000},
        {"exists": "x"},
        {"max_bytes": True},
        {"settings": 1},
    ],
)
def test_arguments_that_cannot_be_used(tmp_path, options):
    with pytest.raises(ConfigError):
        Recorder(tmp_path / "a.jsonl", **options)


def test_a_folder_in_the_place_of_the_file(tmp_path):
    with pytest.raises(ConfigError, match="record"):
        Recorder(tmp_path).open()


def test_importing_hvdloss_report_loads_no_recorder():
    program = "import sys, hvdloss.report; print('hvdloss.report.record' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def ranks_of_a_job(path, teller, **options):
    """Return the runs and recorders of three processes of an elastic job; `teller` says which one tells."""
    runs, recorders = [Steps() for _ in range(3)], [Recorder(path, **options) for _ in range(3)]
    for number, (run, recorder) in enumerate(zip(runs, recorders, strict=True)):
        Subscription(
            run,
            None,
            (recorder,),
            metadata=lambda: ABOUT,
            is_reporting_rank=lambda number=number: teller[0] == number,
        )
    return runs, recorders


def go(runs, step):
    for run in runs:
        for listener in list(run.listeners):
            listener(report(step, samples=6 * step))


def change(error=None):
    """Have the ranks of an elastic job change."""
    world.before_reset()
    world.reset(because=error)


@pytest.mark.parametrize("exists", ["raise", "replace", "append"])
def test_a_file_has_one_writer_when_another_rank_takes_over(tmp_path, exists):
    path, teller = tmp_path / "a.jsonl", [0]
    runs, recorders = ranks_of_a_job(path, teller, exists=exists)
    go(runs, 1)
    teller[0] = 1
    change()
    go(runs, 2)
    recorders[0].epoch(loss=9.0)  # all ranks make the same calls
    recorders[1].epoch(loss=0.5)
    recorders[0].fault(ValueError("of a rank that writes no more"))
    recorders[0].close()
    go(runs, 3)
    change()
    teller[0] = 2
    change()
    teller[0] = 1  # which has written before
    change()
    go(runs, 4)
    recorders[1].epoch(loss=0.25)
    for recorder in recorders:
        recorder.close()
    found = read(path)
    assert [(line["step"], line["samples"]) for line in found.steps] == [(n, 6.0 * n) for n in (1, 2, 3, 4)]
    assert [(line["epoch"], line["metrics"]) for line in found.epochs] == [
        (1, {"loss": 0.5}), (2, {"loss": 0.25}),
    ]  # fmt: skip
    assert (len(found.runs), len(found.ends), found.faults, found.undone) == (3, 1, [], [])
    assert found.status == "finished"


def test_a_rank_that_is_lost_is_a_fault_and_undone_steps_do_not_count(tmp_path):
    path, teller = tmp_path / "a.jsonl", [0]
    runs, recorders = ranks_of_a_job(path, teller)
    error = LostRankError("rank 2 is gone")
    error.ranks = (2,)
    for step in range(1, 8):
        go(runs, step)
    recorders[0].decision(Decision(7, "period", 1, 4, "it pays"))
    recorders[0].epoch(loss=9.0)
    change(error)  # the one that writes is still there
    assert read(path).status == "running"
    for step in range(5, 8):
        go(runs, step)
    recorders[0].epoch(loss=0.5)
    teller[0] = 1
    change(error)  # it is not
    for step in range(1, 4):  # back to the beginning: nothing was committed
        go(runs, step)
    recorders[1].epoch(loss=0.25)
    for recorder in recorders:
        recorder.close()
    found = read(path)
    assert found.column("step").tolist() == [1, 2, 3]
    assert found.column("samples").tolist() == [6, 12, 18]
    assert [(line["step"], line["until"]) for line in found.undone] == [(4, 7), (0, 7)]
    assert [line["epoch"] for line in found.epochs] == [1]
    assert found.decisions == []
    assert [(line["error"], line["ranks"]) for line in found.faults] == [("LostRankError", [2])] * 2
    assert [line["step"] for line in found.ranks] == [7]
    assert found.status == "finished"
    assert world.reset_cause() is None


def test_samples_are_counted_once_though_the_last_steps_of_a_killed_writer_are_missing(tmp_path):
    path = tmp_path / "a.jsonl"
    with recorded(path, []) as former:  # an earlier run, without a count
        former.step(report(1))
    with Recorder(path, exists="append") as recorder:
        recorder.begin(ABOUT)
        for step in (1, 2, 3):
            recorder.step(report(step, samples=6 * step))
    with Recorder(path, exists="append") as after:  # from a commit after step 5, which was not written
        after.begin(ABOUT)
        after.step(report(6, samples=36))
        after.step(report(3, samples=18))  # from a checkpoint
    found = read(path)
    assert found.column("step").tolist() == [1, 1, 2, 3]
    assert found.column("samples").tolist() == [6, 12, 18, 24]


def test_a_file_that_was_taken_away_is_begun_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    runs, recorders = ranks_of_a_job(path, [0])
    go(runs, 1)
    world.before_reset()
    path.unlink()
    world.reset()
    go(runs, 2)
    recorders[0].close()
    assert read(path).column("step").tolist() == [2]
