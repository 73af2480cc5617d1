"""The report of a step: the numbers of the ledgers, plain enough for JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss.losses.ledger import Ledger
from hvdloss.losses.reduction import REDUCTIONS
from hvdloss.report import RankReport, StepReport

LEDGERS = [
    Ledger(numerator=6.0, denominator=4.0, weight=4.0, elements=5.0, micro_batches=2.0, communication=0.25),
    Ledger(),
    Ledger(numerator=3.0, denominator=0.5, weight=0.5, elements=1.0, micro_batches=1.0, communication=0.5),
]


def test_a_worked_example():
    report = StepReport.of(7, LEDGERS, "mean")
    assert (report.step, report.loss, report.objective_value) == (7, 2.0, 2.0)
    assert (report.weight, report.elements) == (4.5, 6)
    first, empty, last = report.ranks
    assert first == RankReport(0, 1.5, 4.0, 5, 2, 0.25)
    assert last == RankReport(2, 6.0, 0.5, 1, 1, 0.5)
    assert math.isnan(empty.loss)
    assert (empty.rank, empty.weight, empty.elements, empty.micro_batches) == (1, 0.0, 0, 0)
    assert [one.skew for one in report.ranks] == [None] * 3


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_sum_adds_and_the_others_divide(reduction):
    report = StepReport.of(1, LEDGERS, reduction)
    assert report.loss == (9.0 if reduction == "sum" else 2.0)
    assert report.ranks[0].loss == (6.0 if reduction == "sum" else 1.5)
    assert math.isnan(report.ranks[1].loss)


counts = st.integers(0, 1000).map(float)
ledgers = st.builds(
    Ledger,
    numerator=st.floats(-1e9, 1e9),
    denominator=st.one_of(st.just(0.0), st.floats(1e-3, 1e9)),
    weight=st.floats(0, 1e9),
    elements=counts,
    micro_batches=counts,
    communication=st.floats(0, 100),
)


@given(st.integers(1, 10**9), st.lists(ledgers, min_size=1, max_size=5), st.sampled_from(REDUCTIONS))
def test_a_report_goes_through_json(step, parts, reduction):
    report = StepReport.of(step, parts, reduction)
    record = json.loads(json.dumps(report.as_dict()))
    assert record.keys() == {
        "step",
        "loss",
        "weight",
        "elements",
        "objective_value",
        "averaged_loss",
        "averaging_error",
        "ranks",
        "choices",
        "terms",
        "skipped",
        "samples",
        "losses",
    }
    assert len(record["ranks"]) == len(parts)
    for rank, (one, ledger) in enumerate(zip(record["ranks"], parts, strict=True)):
        assert one["rank"] == rank
        assert math.isnan(one["loss"]) == (ledger.denominator == 0)
        assert one["elements"] == ledger.elements
        assert type(one["elements"]) is type(one["micro_batches"]) is int
    assert type(record["elements"]) is int
    assert record["elements"] == sum(ledger.elements for ledger in parts)
    assert record["weight"] == pytest.approx(math.fsum(ledger.weight for ledger in parts))


@given(st.lists(ledgers, min_size=1, max_size=5), st.sampled_from(REDUCTIONS))
def test_the_loss_is_that_of_the_merged_ledgers(parts, reduction):
    numerator = math.fsum(ledger.numerator for ledger in parts)
    denominator = math.fsum(ledger.denominator for ledger in parts)
    loss = StepReport.of(1, parts, reduction).loss
    if reduction != "sum" and not denominator:
        assert math.isnan(loss)
    else:
        divisor = 1.0 if reduction == "sum" else denominator
        scale = math.fsum(abs(ledger.numerator) for ledger in parts) / divisor
        assert abs(loss - numerator / divisor) <= 1e-12 * scale + 1e-300


def test_what_plain_averaging_would_have_reported():
    report = StepReport.of(1, LEDGERS, "mean")
    assert report.averaged_loss == (1.5 + 6.0) / 2  # the rank without samples has no mean
    assert report.averaging_error == (3.75 - 2.0) / 2.0
    assert StepReport.of(1, LEDGERS[:1] * 2, "mean").averaging_error == 0.0
    negative = [Ledger(-1.0, 1.0, 1.0, 1.0, 1.0), Ledger(-9.0, 3.0, 3.0, 3.0, 1.0)]
    assert StepReport.of(1, negative, "mean").averaging_error == 0.5 / 2.5  # above the loss
    zero = [Ledger(-3.0, 3.0, 3.0, 3.0, 1.0), Ledger(3.0, 1.0, 1.0, 1.0, 1.0)]
    assert (StepReport.of(1, zero, "mean").loss, StepReport.of(1, zero, "mean").averaging_error) == (
        0,
        math.inf,
    )
    assert math.isnan(StepReport.of(1, [Ledger(), Ledger()], "mean").averaged_loss)


def test_a_sum_is_averaged_by_nobody():
    report = StepReport.of(1, LEDGERS, "sum")
    assert (report.averaged_loss, report.averaging_error) == (None, None)


def test_averaging_leaves_out_who_was_dropped_and_knows_nothing_of_a_loss_that_was_lost():
    gone = Ledger(micro_batches=1.0, nonfinite_losses=1.0)
    assert StepReport.of(1, [*LEDGERS, gone], "mean", nonfinite="drop").averaged_loss == 3.75
    assert math.isnan(StepReport.of(1, [*LEDGERS, gone], "mean", nonfinite="skip").averaged_loss)


@given(st.lists(ledgers, min_size=1, max_size=5), st.sampled_from(["mean", "batch_mean", "sequence_mean"]))
def test_averaging_is_the_mean_of_the_ranks_losses(parts, reduction):
    report = StepReport.of(1, parts, reduction)
    own = [rank.loss for rank in report.ranks if not math.isnan(rank.loss)]
    if not own:
        assert math.isnan(report.averaged_loss)
    else:
        scale = math.fsum(map(abs, own)) / len(own)
        assert abs(report.averaged_loss - math.fsum(own) / len(own)) <= 1e-12 * scale
    if len(own) == len(parts) == 1:
        assert report.averaging_error == 0.0


def test_choices_are_shown_but_do_not_tell_reports_apart():
    some = LEDGERS[:1]  # a rank without samples has a loss of NaN, unlike itself
    plain, chosen = StepReport.of(1, some, "mean"), StepReport.of(1, some, "mean", {"messages": 3})
    assert plain == chosen
    assert chosen.as_dict()["choices"] == {"messages": 3}


def test_what_was_not_finite_is_told_by_rank():
    nan, inf = (
        Ledger(denominator=2.0, weight=2.0, elements=2.0, micro_batches=1.0, **{field: 1.0})
        for field in ("nonfinite_losses", "nonfinite_gradients")
    )
    report = StepReport.of(3, [LEDGERS[0], nan, inf], "mean", nonfinite="skip", skipped=2)
    assert [one.nonfinite for one in report.ranks] == ["", "loss", "gradient"]
    assert report.skipped == 2
    assert math.isnan(report.loss)  # what is left of the sums is not the loss of these elements
    assert [math.isnan(one.loss) for one in report.ranks] == [False, True, False]
    assert not math.isnan(StepReport.of(3, [LEDGERS[0], inf], "mean", nonfinite="skip").loss)


def test_a_dropped_rank_is_counted_and_leaves_the_loss_alone():
    gone = Ledger(micro_batches=1.0, nonfinite_losses=1.0)
    report = StepReport.of(3, [LEDGERS[0], gone], "mean", nonfinite="drop", dropped=[0, 5])
    assert (report.loss, report.weight, report.elements) == (1.5, 4.0, 5)
    assert [(one.nonfinite, one.dropped) for one in report.ranks] == [("", 0), ("loss", 5)]
    assert math.isnan(report.ranks[1].loss)
    assert [one.dropped for one in StepReport.of(1, LEDGERS, "mean").ranks] == [0, 0, 0]


@given(st.lists(ledgers, min_size=2, max_size=5), st.data(), st.sampled_from(REDUCTIONS))
def test_a_step_with_a_dropped_rank_is_that_of_the_others(parts, data, reduction):
    at = data.draw(st.integers(0, len(parts) - 1))
    others = parts[:at] + parts[at + 1 :]
    parts[at] = Ledger(micro_batches=2.0, nonfinite_losses=1.0, nonfinite_gradients=1.0)
    report = StepReport.of(1, parts, reduction, nonfinite="drop")
    alone = StepReport.of(1, others, reduction)
    assert repr((report.loss, report.weight, report.elements)) == repr(
        (alone.loss, alone.weight, alone.elements)
    )
