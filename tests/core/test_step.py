"""One optimizer step without a framework: phases, sums, scale, outcome, and what ranks tell."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss.errors import (
    ConfigError,
    NonFiniteGradientError,
    NoWeightError,
    RankError,
    UsageError,
    WeightError,
)
from hvdloss.losses.ledger import Ledger, Ledgers
from hvdloss.step.local import LocalSums, local_outcome
from hvdloss.step.log import StepLog
from hvdloss.step.outcome import Action, Outcome, outcome_of
from hvdloss.step.phase import TRANSITIONS, Event, Phase, StepPhase
from hvdloss.step.scale import WeightScale
from hvdloss.step.state import StepState
from hvdloss.step.status import RankStatus
from hvdloss.step.sums import PassSums
from hvdloss.step.timer import CommTimer
from hvdloss.terms.controller import Controller


def at(phase: Phase) -> StepPhase:
    """Return a step in this phase."""
    step = StepPhase(2)
    step.now = phase
    return step


# -- phases -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, Event)))
def test_every_transition_is_made_or_refused(phase, event):
    step = at(phase)
    if (phase, event) in TRANSITIONS:
        step.to(event)
        assert step.now is TRANSITIONS[phase, event]
        return
    with pytest.raises(UsageError):
        step.to(event)
    assert step.now is phase


def reachable(first: Phase) -> set[Phase]:
    found, waiting = {first}, [first]
    while waiting:
        here = waiting.pop()
        for (phase, _), following in TRANSITIONS.items():
            if phase is here and following not in found:
                found.add(following)
                waiting.append(following)
    return found


def test_every_phase_is_reached_and_left():
    assert reachable(Phase.GATHERING) == set(Phase)
    for phase in set(Phase) - {Phase.RETIRED}:
        assert Phase.GATHERING in reachable(phase) - ({phase} - {Phase.GATHERING})
    assert reachable(Phase.RETIRED) == {Phase.RETIRED}


def test_gradients_are_updated_with_only_when_they_are_of_all_ranks():
    before = {phase for phase, event in TRANSITIONS if event is Event.UPDATE}
    assert before == {Phase.SYNCHRONIZED}


def test_gradients_under_way_are_neither_dropped_nor_added_to():
    for phase in (Phase.REDUCING, Phase.OVERLAPPING):
        for event in (Event.CLEAR, Event.BEGIN_PASS, Event.UPDATE):
            assert (phase, event) not in TRANSITIONS


@pytest.mark.parametrize(
    ("phase", "event", "words"),
    [
        (Phase.RETIRED, Event.FINISH, "a newer one was made"),
        (Phase.GATHERING, Event.UPDATE, "without optimizer.synchronize()"),
        (Phase.REDUCING, Event.CLEAR, "the gradients are under way"),
    ],
)
def test_what_is_refused_says_the_way_out(phase, event, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(").replace(")", r"\)")):
        at(phase).to(event)


@given(st.integers(1, 5), st.data())
def test_passes_are_counted_and_only_those_that_reach_parameters(passes, data):
    step = StepPhase(passes)
    counted = 0
    for _ in range(passes):
        reaches = data.draw(st.booleans())
        step.check_pass(uncleared=False, counted=counted > 0)
        assert step.is_last == (counted + 1 == passes)
        step.to(Event.BEGIN_PASS)
        assert step.now is Phase.BACKWARD
        step.to(Event.END_PASS if reaches else Event.MISS_PASS)
        counted += reaches
        assert step.done == counted
        assert step.complete == (counted == passes)
    step.to(Event.LAUNCH)
    assert step.launched
    step.to(Event.FINISH)
    assert step.synchronized
    assert step.done == 0


@pytest.mark.parametrize(
    ("phase", "done", "uncleared", "counted", "allowed"),
    [
        (Phase.GATHERING, 0, False, False, True),
        (Phase.GATHERING, 1, False, True, True),
        (Phase.GATHERING, 2, False, True, False),
        (Phase.GATHERING, 2, False, False, True),  # passes of another loss: nothing of the objective's
        (Phase.REDUCING, 1, False, True, False),
        (Phase.SYNCHRONIZED, 0, True, False, False),
        (Phase.SYNCHRONIZED, 0, False, False, True),
    ],
)
def test_a_pass_too_many_is_refused(phase, done, uncleared, counted, allowed):
    step = at(phase)
    step.done = done
    if allowed:
        step.check_pass(uncleared, counted)
        return
    with pytest.raises(UsageError, match="backward_passes_per_step=2"):
        step.check_pass(uncleared, counted)


@pytest.mark.parametrize("phase", Phase)
def test_an_aborted_step_begins_anew_unless_it_is_out_of_use(phase):
    step = at(phase)
    step.done = 1
    step.abort()
    assert step.now is (Phase.RETIRED if phase is Phase.RETIRED else Phase.GATHERING)
    assert step.done == 0


@pytest.mark.parametrize("passes", [0, -1, 1.0, "2", None])
def test_a_number_of_passes_that_cannot_be(passes):
    with pytest.raises(ConfigError, match="backward_passes_per_step"):
        StepPhase(passes)


# -- sums, scale --------------------------------------------------------------------------------------

weights = st.floats(1e-6, 1e6)


@given(st.lists(weights, min_size=1, max_size=6), st.lists(weights, min_size=1, max_size=6))
def test_the_scale_changes_nothing_but_rounding(first, second):
    """Gradients scaled in any unit, summed and divided in that unit: the weighted mean."""
    scale = WeightScale()
    for parts in (first, second):
        gradients = np.arange(1.0, len(parts) + 1)
        total = math.fsum(parts)
        summed = sum(scale.relative(w) * g for w, g in zip(parts, gradients, strict=True))
        assert summed / scale.denominator(total) == pytest.approx(np.average(gradients, weights=parts))
        before = scale.relative(1.0)
        factor = scale.update(total)
        assert before * factor == pytest.approx(scale.relative(1.0))
        assert scale.denominator(total) == 1.0
    assert scale.update(10.0, ranks=4, predivide=2.0) == pytest.approx(math.fsum(second) / 5.0)
    scale.reset()
    assert scale.relative(3.0) == 3.0


def test_sums_are_not_measured_in_weights():
    scale = WeightScale(fixed=True)
    assert scale.update(8.0) == 1.0
    assert (scale.relative(3.0), scale.denominator(8.0)) == (3.0, 1.0)


@given(st.lists(st.tuples(weights, weights), max_size=5))
def test_passes_add_up_and_a_dropped_rank_adds_nothing(passes):
    sums = PassSums()
    for weight, loss in passes:
        sums.add(np.array([weight * loss, weight]), weight, (weight, 1.0), None)
    if passes:
        assert sums.row == pytest.approx(np.array([math.fsum(w * v for w, v in passes), sums.scale]))
        assert sums.scale == pytest.approx(math.fsum(w for w, _ in passes))
    else:
        assert sums.row is None
    assert len(sums.factors) == len(passes)
    assert sums.divisions == []
    sums.drop(np.zeros(2), 1.0)
    assert (sums.scale, sums.dropped) == (0.0, 1.0)
    sums.clear()
    assert (sums.row, sums.scale, sums.dropped, sums.untracked) == (None, 0.0, None, 0)


# -- outcome ------------------------------------------------------------------------------------------

SOUND = Ledger(numerator=1.0, denominator=1.0, weight=1.0, elements=1.0, micro_batches=1.0)


@pytest.mark.parametrize("policy", ["raise", "skip", "drop"])
@pytest.mark.parametrize("losses", [0.0, 1.0])
@pytest.mark.parametrize("gradients", [0.0, 1.0])
@pytest.mark.parametrize("exceeds", [False, True])
def test_what_becomes_of_an_update(policy, losses, gradients, exceeds):
    one = Ledger(**{**vars(SOUND), "nonfinite_losses": losses, "nonfinite_gradients": gradients})
    asked = []
    outcome = outcome_of(Ledgers.of([SOUND, one]), 3, policy, lambda: bool(asked.append(1)) or exceeds)
    wrong = policy != "drop" and (losses or (gradients and exceeds))
    expected = Action.UPDATE if not wrong else Action.SKIP if policy == "skip" else Action.RAISE
    assert outcome.action is expected
    assert bool(asked) == (policy != "drop" and not losses and bool(gradients))
    assert (outcome.error is not None) == (expected is Action.RAISE)


@pytest.mark.parametrize("action", Action)
def test_a_scaler_sees_for_itself_what_is_not_finite(action):
    outcome = Outcome(action)
    assert outcome.updates() == (action is Action.UPDATE)
    assert outcome.updates(scaler=True) == (action is not Action.EMPTY)


# -- what ranks tell ----------------------------------------------------------------------------------


class Together:
    """A communicator of one rank among `size` that all say the same."""

    def __init__(self, rank: int = 0, size: int = 2) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, array: np.ndarray, name: str) -> np.ndarray:
        return array * self.size

    def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        return [data] * self.size


def state(**given) -> StepState:
    choices = {"reduction": "mean", "nonfinite": "raise", "passes": 4, **given}
    return StepState("hvdloss.0", Controller(), choices=dict, **choices)


def test_a_rank_tells_what_it_knows():
    step = state()
    assert step.ledger() == Ledger()
    step.status.has_next = True
    step.status.preemption_requested = lambda: True
    step.timer.comm_s, step.timer.compute_s = 0.5, 2.0
    step.refusal = UsageError("x")
    step.log.add_listener(print)
    assert step.ledger(untracked_backwards=2.0) == Ledger(
        failed=1.0,
        has_next=1.0,
        preemption_requested=1.0,
        rows_requested=1.0,
        communication=0.5,
        computation=2.0,
        untracked_backwards=2.0,
    )


def test_a_rank_hears_what_all_tell():
    status = RankStatus()
    status.update(Ledgers.of([SOUND, Ledger(has_next=1.0, preemption_requested=1.0)]))
    assert (status.sync_status, status.preempted_ranks) == ((1, True), (1,))
    status.update(Ledgers.of([SOUND, SOUND]))
    assert (status.sync_status, status.preempted_ranks) == ((2, False), ())
    status.reset()
    assert status.sync_status == (0, False)


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ({"negative_weights": 1.0}, WeightError),
        ({"nonfinite_gradients": 1.0}, NonFiniteGradientError),
        ({"untracked_backwards": 1.0}, UsageError),
        ({"denominator": 0.0}, NoWeightError),
    ],
)
def test_faults_are_raised_from_all_ranks_ledgers_alone(told, kind):
    one = Ledger(**{**vars(Ledger() if "denominator" in told else SOUND), **told})
    with pytest.raises(kind):
        state().check(Ledgers.of([one, one]), 1, Together(), gradients=True)


def test_a_sound_step_passes_and_gradients_may_be_judged_later():
    one = Ledger(**{**vars(SOUND), "nonfinite_gradients": 1.0})
    step = state()
    step.check(Ledgers.of([SOUND, one]), 1, Together(), gradients=False)
    assert not step.conclude(Ledgers.of([SOUND, one]), lambda: True)
    assert step.outcome.action is Action.RAISE


def test_a_rank_that_cannot_go_on_says_why_on_all():
    step = state()
    step.status.error = OSError("the disk is gone")
    with pytest.raises(RankError, match="the disk is gone"):
        step.check(Ledgers.of([Ledger(failed=1.0)] * 2), 1, Together(), gradients=False)


def test_a_division_by_another_number_of_passes_is_named():
    step = state()
    step.phase.done = 2
    with pytest.raises(RankError, match="divided by 2"):
        step.check(Ledgers.of([Ledger(failed=1.0)] * 2), 1, Together(), gradients=False)


def test_a_pass_that_came_to_no_parameter_is_named():
    step = state()
    step.sums.bypassed = True
    with pytest.raises(UsageError, match=r"torch\.autograd\.grad"):
        step.check(Ledgers.of([Ledger(), Ledger()]), 1, Together(), gradients=False)


def test_dropped_ranks_are_counted():
    step = state(nonfinite="drop")
    dropped = Ledger(nonfinite_losses=1.0, micro_batches=1.0)
    for _ in range(2):
        ledgers = Ledgers.of([SOUND, dropped])
        step.check(ledgers, 1, Together(), gradients=False)
        step.log.keep(ledgers, 1)
    report = step.log.report()
    assert report is not None
    assert [rank.dropped for rank in report.ranks] == [0, 2]


def test_an_outcome_is_taken_once_and_gradients_of_this_rank_alone_end_the_step():
    step = state()
    step.outcome = Outcome(Action.SKIP)
    assert step.take_outcome(lambda: None).action is Action.SKIP
    assert step.take_outcome(lambda: None).action is Action.UPDATE
    error = UsageError("changed here")
    with pytest.raises(UsageError, match="changed here"):
        step.take_outcome(lambda: error)
    assert step.ledger().failed == 1.0


def test_a_second_evaluation_cannot_be_skipped():
    step = state(nonfinite="skip")
    ledgers = Ledgers.of([Ledger(**{**vars(SOUND), "nonfinite_losses": 1.0})] * 2)
    step.log.keep(ledgers, 1)
    step.conclude(ledgers, lambda: True)
    step.refuse_skip()
    assert step.outcome.action is Action.RAISE
    assert step.outcome.error is not None


def test_other_ranks_make_everything_new_but_what_was_counted():
    step = state()
    step.scale.update(5.0)
    step.factor, step.status.has_next, step.timer.comm_s = 3.0, True, 1.0
    step.sums.untracked, step.refusal = 1, UsageError("x")
    step.phase.to(Event.BEGIN_PASS)
    step.log.steps = 7
    step.reset()
    fresh = state()
    assert step.ledger() == fresh.ledger() == Ledger()
    assert (step.factor, step.scale.relative(1.0), step.phase.now) == (1.0, 1.0, Phase.GATHERING)
    assert step.log.steps == 7


# -- time, counts, listeners --------------------------------------------------------------------------


def test_time_between_exchanges_is_computation_and_an_exchange_that_fails_is_none():
    now = iter([10.0, 12.0, 15.0, 15.5, 20.0, 21.0, 22.0])
    timer = CommTimer(lambda: next(now))
    with timer.exchange():
        pass
    assert (timer.comm_s, timer.compute_s) == (2.0, 0.0)
    with timer.exchange():
        pass
    assert (timer.comm_s, timer.compute_s) == (0.5, 3.0)
    with pytest.raises(ValueError, match="x"), timer.exchange():
        raise ValueError("x")
    assert (timer.comm_s, timer.compute_s) == (0.5, 3.0)
    timer.reset()
    with timer.exchange():
        pass
    assert (timer.comm_s, timer.compute_s) == (1.0, 0.0)


def log() -> StepLog:
    return StepLog(Controller(), "mean", "raise", dict)


def test_listeners_hear_of_each_step_once_from_the_next_on():
    steps, heard = log(), []
    ledgers = Ledgers.of([SOUND])
    steps.keep(ledgers, 1)
    steps.add_listener(lambda report: heard.append(report.step))
    steps.notify()
    steps.keep(ledgers, 2)
    steps.notify()
    steps.notify()
    assert heard == [2]
    steps.keep(ledgers, 3)
    steps.undo()  # its update raised
    steps.notify()
    assert heard == [2]


def test_counts_go_on_from_a_state_and_nothing_else_is_taken_for_one():
    steps = log()
    assert steps.report() is None
    for number in (1, 2):
        steps.steps = number
        steps.keep(Ledgers.of([SOUND, SOUND]), number)
    again = log()
    again.load_state_dict(steps.state_dict(), same_ranks=True)
    assert (again.steps, again.samples) == (2, 4)
    steps.undo()
    assert (steps.steps, steps.samples) == (1, 2)
    with pytest.raises(ConfigError, match="not of a DistributedOptimizer"):
        again.load_state_dict({"steps": "2"}, same_ranks=True)


# -- local steps --------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.none(), weights), max_size=5), st.floats(0, 1e6), st.booleans())
def test_local_steps_weigh_what_they_saw(seen, length, is_sum):
    sums = LocalSums()
    for weight in seen:
        sums.add(None if weight is None else np.array([1.0, weight]), 0, False)
    total = math.fsum(w for w in seen if w is not None)
    expected = float(total > 0) if is_sum else total
    weight, weighted = sums.weigh(length, is_sum, lambda row: row * 0)
    assert weight == pytest.approx(expected)
    assert weighted == pytest.approx(expected * length)
    assert (sums.steps, sums.nonfinite) == (len(seen), 0)


@pytest.mark.parametrize("length", [math.inf, math.nan])
@pytest.mark.parametrize("is_sum", [False, True])
def test_a_move_that_went_too_far_adds_nothing_and_is_told(length, is_sum):
    sums = LocalSums()
    sums.add(np.array([1.0, 2.0]), 1, True)
    assert sums.weigh(length, is_sum, lambda row: row * 0) == (0.0, 0.0)
    assert (sums.nonfinite, sums.untracked, sums.row.tolist()) == (2, 1, [0.0, 0.0])
    sums.clear()
    assert (sums.steps, sums.nonfinite, sums.row) == (0, 0, None)


ROW = [1.0, 2.0, 2.0, 3.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("row", [[], ROW, [1.0, 0.0, *ROW[2:]], [*ROW[:5], 1.0, 0.0, 0.0], [*ROW[:7], 1.0]])
@pytest.mark.parametrize("untracked", [0, 1])
@pytest.mark.parametrize("nonfinite", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_a_local_step_updates_with_what_is_sound(row, untracked, nonfinite, drops):
    action = local_outcome(row, untracked, nonfinite, drops).action
    if row != ROW or untracked:
        assert action is Action.EMPTY
    elif nonfinite:
        assert action is (Action.EMPTY if drops else Action.SKIP_LOCAL)
    else:
        assert action is Action.UPDATE
