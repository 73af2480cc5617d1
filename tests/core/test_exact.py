"""Exact sums over ranks: of any order, of any number of ranks, and what they tell of a step."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss.comm.exact import Digits, digits_for
from hvdloss.errors import ConfigError, UsageError
from hvdloss.losses.ledger import (
    COLUMN,
    FAULT_COLUMNS,
    LEDGER_WIDTH,
    Ledger,
    Ledgers,
    Sums,
    check_step,
    exact_sum,
    nonfinite_ranks,
)
from hvdloss.losses.reduction import REDUCTIONS
from hvdloss.report import StepReport
from hvdloss.step.report import Interest

DTYPES = {24: np.float32, 53: np.float64}
any_finite = st.floats(allow_nan=False, allow_infinity=False)
precisions = st.sampled_from(sorted(DTYPES))
sizes = st.sampled_from([1, 2, 3, 64, 65, 1000, 10_000, 2**20])


def written(digits, numbers, dtype):
    column = np.array(numbers, dtype=np.float64).view(np.int64)[:, None]
    return digits.write(column, digits.positions).astype(dtype)


# -- numbers ------------------------------------------------------------------------------------------------


@given(any_finite, sizes, precisions)
def test_a_number_is_read_as_it_was_written(number, size, precision):
    digits = digits_for(size, precision)
    assert digits.read(written(digits, [number], DTYPES[precision]))[0] == number


@given(st.lists(any_finite, min_size=1, max_size=12), precisions, st.randoms())
def test_a_sum_is_rounded_once_and_has_no_order(numbers, precision, random):
    digits = digits_for(len(numbers), precision)
    parts = list(written(digits, numbers, DTYPES[precision]))
    random.shuffle(parts)
    while len(parts) > 1:  # in any grouping
        parts.append(parts.pop(random.randrange(len(parts))) + parts.pop(random.randrange(len(parts))))
    whole = sum(map(Fraction, numbers))
    try:
        expected = float(whole)
    except OverflowError:
        expected = math.inf if whole > 0 else -math.inf
    assert digits.read(parts[0][None])[0] == expected == exact_sum(numbers)


@pytest.mark.parametrize("size", [2, 65, 10_000, 2**20])
@pytest.mark.parametrize("precision", sorted(DTYPES))
def test_digits_of_all_ranks_at_their_largest_are_exact(size, precision):
    """The sum of the largest digits of `size` ranks fits the dtype that travels."""
    digits = digits_for(size, precision)
    largest = np.float64(math.nextafter(2.0, 0))  # every bit of the mantissa
    (row,) = written(digits, [largest], DTYPES[precision])
    most = int(row.max())
    assert most * size <= 2**precision
    total = row * DTYPES[precision](size)
    assert (total.astype(object).astype(float) == row.astype(float) * size).all()
    assert digits.read(total[None])[0] == float(Fraction(float(largest)) * size)


def test_more_ranks_than_a_dtype_can_count_are_refused():
    with pytest.raises(ConfigError, match="size="):
        Digits(2**24 + 1, 24)
    assert Digits(2**23, 24).bits == 1


# -- ledgers ------------------------------------------------------------------------------------------------

weights = st.one_of(st.just(0.0), st.floats(0, 1e300))
sound = st.builds(
    Ledger,
    numerator=st.floats(-1e300, 1e300),
    denominator=weights,
    weight=weights,
    elements=st.integers(0, 2**40).map(float),
    micro_batches=st.integers(0, 5).map(float),
    communication=st.floats(0, 10),
    computation=st.floats(0, 10),
)
FAULTY = [name for name, column in COLUMN.items() if column in range(*FAULT_COLUMNS.indices(LEDGER_WIDTH))]


def summed(ledgers, precision=24, order=None):
    """Return what ranks know of each other where only their sums travelled."""
    sums = Sums(len(ledgers), precision)
    message = np.zeros(sums.length, DTYPES[precision])
    for rank in order or range(len(ledgers)):
        message = message + sums.pack(ledgers[rank]).astype(DTYPES[precision])
    return sums.unpack(message)


@given(st.lists(sound, min_size=1, max_size=6), precisions, st.sampled_from(REDUCTIONS), st.booleans())
def test_a_report_from_sums_is_that_from_rows(ledgers, precision, reduction, read):
    alone = summed(ledgers, precision)
    rows = Ledgers.of(ledgers)
    assert (alone.totals == rows.totals).all()
    if read:
        alone = alone.with_rows(rows.rows)
    ours, theirs = (StepReport.of(3, some, reduction, samples=5) for some in (alone, rows))
    told, expected = ours.as_dict(), theirs.as_dict()
    if not read:
        assert [told[name] for name in ("ranks", "averaged_loss", "averaging_error")] == [None] * 3
        expected |= {"averaged_loss": None, "averaging_error": None}
    assert (told.pop("ranks") is None) != read
    assert len(ours.ranks) == len(ledgers)
    if read:
        assert repr(ours.ranks) == repr(theirs.ranks)
    expected.pop("ranks")
    assert repr(told) == repr(expected)


@given(st.lists(sound, min_size=2, max_size=6), st.permutations(range(6)), precisions)
def test_sums_do_not_depend_on_the_order_of_ranks(ledgers, order, precision):
    order = [rank for rank in order if rank < len(ledgers)]
    assert (summed(ledgers, precision, order).totals == summed(ledgers, precision).totals).all()
    shuffled = [ledgers[rank] for rank in order]
    assert (Ledgers.of(shuffled).totals == Ledgers.of(ledgers).totals).all()


@given(
    st.lists(sound, min_size=2, max_size=6),
    st.dictionaries(
        st.sampled_from(FAULTY),
        st.dictionaries(st.integers(0, 5), st.floats(1e-300, 1e300), min_size=1),
        min_size=1,
    ),
    st.sampled_from(["raise", "skip", "drop"]),
)
def test_any_fault_on_any_rank_is_seen_in_the_sums_and_named(ledgers, faults, policy):
    ledgers[0] = replace(ledgers[0], denominator=1.0)
    for field, ranks in faults.items():
        for rank, value in ranks.items():
            if rank < len(ledgers):
                ledgers[rank] = replace(ledgers[rank], **{field: value})
    there = any(getattr(one, field) for one in ledgers for field in FAULTY)
    alone = summed(ledgers)
    assert alone.needs_rows == there
    whole = Ledgers.of(ledgers)
    if there:  # then the rows are asked for
        alone = alone.with_rows(whole.rows)
        for field in FAULTY:
            assert alone.ranks_with(field) == [
                rank for rank, one in enumerate(ledgers) if getattr(one, field)
            ]
    assert nonfinite_ranks(alone) == nonfinite_ranks(whole)
    told, expected = check_step(alone, 4, policy), check_step(whole, 4, policy)
    assert (type(told), str(told)) == (type(expected), str(expected))


@pytest.mark.parametrize("field", ["preemption_requested", "hooks", "rows_requested", "rescaled"])
def test_who_leaves_and_that_somebody_reads_is_asked(field):
    ledgers = [Ledger(denominator=1.0), Ledger(denominator=1.0, **{field: 1.0})]
    assert summed(ledgers).needs_rows
    assert not summed([Ledger(denominator=1.0, has_next=1.0)] * 2).needs_rows


def test_times_and_moves_are_not_summed():
    totals = Ledgers.of([Ledger(1.0, 1.0, communication=3.0, drift_sqnorm=2.0)] * 2).totals
    assert totals[COLUMN["communication"]] == totals[COLUMN["drift_sqnorm"]] == 0
    assert len(totals) == LEDGER_WIDTH


def test_weights_too_large_to_be_added_up_are_refused():
    ledgers = [Ledger(1.0, 1e308, 1e308, 1.0, 1.0)] * 3
    for some in (summed(ledgers), Ledgers.of(ledgers)):
        assert "add up to more than float64 holds" in str(check_step(some, 2))


def test_of_very_many_ranks_the_first_are_named():
    error = check_step([Ledger(failed=1.0)] * 100, 1)
    assert "ranks 0, 1, 2" in str(error)
    assert "15 and 84 more cannot go on" in str(error)


@pytest.mark.parametrize("message", [np.zeros(3), np.full(Sums(2, 24).length, np.nan)])
def test_other_sums_are_refused(message):
    with pytest.raises(ConfigError, match="sums of ledgers"):
        Sums(2, 24).unpack(message)


def test_a_step_sends_little_at_ten_thousand_ranks():
    assert Sums(10_000, 24).length * 4 <= 4096
    assert Sums(10_000, 53).length * 8 <= 4096


# -- what was not gathered ----------------------------------------------------------------------------------


def test_what_was_not_gathered_is_told_when_somebody_looks_and_gathered_from_then_on():
    interest = Interest()
    report = StepReport.of(3, summed([Ledger(2.0, 1.0)] * 3), "mean", interest=interest)
    assert (report.loss, len(report.ranks), report.ranks.gathered) == (2.0, 3, False)
    assert "<3 ranks, not gathered>" in repr(report)
    assert json.loads(json.dumps(report.as_dict()))["ranks"] is None
    assert not interest.on
    assert report.averaged_loss is None
    assert interest.on
    interest.on = False
    assert report.ranks.read() is None
    assert interest.on
    for look in (lambda: report.ranks[0], lambda: list(report.ranks), lambda: report.ranks[:1]):
        with pytest.raises(UsageError, match=r"as many as 3 ranks.*HVDLOSS_TABLE_RANKS=3"):
            look()


def test_a_report_can_be_copied():
    told = []
    report = StepReport.of(
        3, summed([Ledger(2.0, 1.0)] * 3), "mean", interest=Interest(lambda: told.append(1))
    )
    for other in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert other == report
        assert other.ranks.read() is None
    assert not told


def test_reports_of_ranks_are_a_sequence_like_any():
    ledgers = [Ledger(float(n), 1.0, micro_batches=1.0) for n in range(5)]
    ranks = StepReport.of(1, ledgers, "mean").ranks
    assert [one.loss for one in ranks] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert ranks[1:3] == [ranks[1], ranks[2]] == list(ranks)[1:3]
    assert ranks[-1].rank == 4
    assert ranks == list(ranks)
    assert ranks != list(ranks)[1:]
    with pytest.raises(IndexError):
        ranks[5]
