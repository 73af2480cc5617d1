"""The formulas of data skew: their laws, and SciPy or plain arithmetic as a second opinion."""

from __future__ import annotations

import doctest
import itertools
import json
import math
import re
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

from hvdloss.errors import ConfigError, ShapeError
from hvdloss.terms import distributions
from hvdloss.terms.distributions import (
    BALANCES,
    MEASURES,
    Window,
    agnostic_ascent,
    balance_table,
    bin_positions,
    divergences,
    effective_sample_size,
    exponentiated_gradient,
    importance_table,
    pooled_edges,
    project_simplex,
    q_fair,
)

# Nothing here may leak a NumPy warning to whoever trains with it.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

by_measure = pytest.mark.parametrize("measure", MEASURES)
by_balance = pytest.mark.parametrize("kind", BALANCES)
BOUNDS = {"js": math.log(2), "tv": 1.0}

size = st.floats(2.0**-20, 2.0**20)
count = st.one_of(st.just(0.0), st.integers(1, 50).map(float), size)
extreme = st.sampled_from([0.0, 5e-324, 1e-310, 1e-200, 1e-30, 1.0, 1e30, 1e200, 1.7e308])
loss = st.floats(-100, 100)
seeds = st.integers(0, 2**32 - 1)


def histograms(elements=count, ranks=(1, 6), bins=(1, 7)):
    return st.tuples(st.integers(*ranks), st.integers(*bins)).flatmap(
        lambda shape: hnp.arrays(np.float64, shape, elements=elements)
    )


def rows(elements=count, bins=(1, 7)):
    return histograms(elements, (1, 1), bins).map(lambda table: table[0])


def shares_of(draw, ranks):
    """Draw a distribution; some shares are 0."""
    raw = draw(hnp.arrays(np.float64, ranks, elements=st.one_of(st.just(0.0), st.floats(0.01, 1))))
    assume(raw.any())
    return raw / raw.sum()


def positions_of(draw, bins):
    gaps = draw(hnp.arrays(np.float64, bins, elements=st.one_of(st.just(0.0), st.floats(0.01, 100))))
    return np.cumsum(gaps) - draw(st.floats(-100, 100))


# Divergences


@by_measure
@given(counts=histograms(), data=st.data())
def test_each_rank_is_measured_as_scipy_does(measure, counts, data):
    positions = positions_of(data.draw, counts.shape[1])
    values, overall = divergences(counts, measure, positions)
    total = counts.sum(axis=0)
    expected = np.zeros(len(counts))
    for k, row in enumerate(counts):
        if not row.any():
            continue
        p, g = row / row.sum(), total / total.sum()
        expected[k] = {
            "js": lambda p=p, g=g: jensenshannon(p, g) ** 2,
            "tv": lambda p=p, g=g: np.maximum(p - g, 0).sum(),
            "w1": lambda p=p, g=g: wasserstein_distance(positions, positions, p, g),
        }[measure]()
    assert values.shape == (len(counts),)
    # SciPy's square root of a rounded sum is off by 1e-8 near 0; squared, that is 1e-16.
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12 * max(1.0, np.ptp(positions)))
    sums = counts.sum(axis=1)
    mean = float((sums * values).sum() / sums.sum()) if sums.any() else 0.0
    assert isinstance(overall, float)
    assert overall == pytest.approx(mean, rel=1e-12)


@by_measure
@given(counts=st.one_of(histograms(), histograms(extreme)))
def test_divergences_keep_within_their_bounds_at_any_scale(measure, counts):
    values, overall = divergences(counts, measure)
    bound = BOUNDS.get(measure, counts.shape[1] - 1)
    assert ((values >= 0) & (values <= bound)).all()
    assert values.min() * (1 - 1e-12) <= overall <= values.max()
    assert not values[~counts.any(axis=1)].any()


@by_measure
@pytest.mark.parametrize("seed", range(13))
def test_not_even_rounding_leads_beyond_the_bounds(measure, seed):
    rng = np.random.default_rng(seed)
    counts = np.zeros((50, 40))
    counts[0, :20] = rng.random(20)
    counts[1:, 20:] = 1e-20 * rng.random((49, 20))  # disjoint from nearly all of the weight
    positions = np.repeat([0.0, 1.0], 20)
    values, _ = divergences(counts, measure, positions)
    assert values.max() <= BOUNDS.get(measure, 1.0)
    assert values.max() == pytest.approx(BOUNDS.get(measure, 1.0), rel=1e-12)
    values, overall = divergences(np.eye(seed + 3), measure)
    assert overall <= values.max()


@by_measure
@given(counts=histograms(), data=st.data())
def test_the_order_of_the_ranks_does_not_matter(measure, counts, data):
    order = data.draw(st.permutations(range(len(counts))))
    values, overall = divergences(counts, measure)
    others, again = divergences(counts[order], measure)
    np.testing.assert_allclose(others, values[order], rtol=1e-9, atol=1e-14)
    assert again == pytest.approx(overall, rel=1e-9, abs=1e-14)


@by_measure
@given(row=rows(), data=st.data())
def test_proportional_rows_are_exactly_zero(measure, row, data):
    scales = data.draw(hnp.arrays(np.float64, st.integers(1, 8), elements=st.one_of(st.just(0.0), size)))
    values, overall = divergences(scales[:, None] * row, measure)
    assert not values.any()
    assert overall == 0.0


@by_measure
def test_ten_thousand_proportional_rows_are_exactly_zero(measure):
    rng = np.random.default_rng(5)
    counts = rng.lognormal(sigma=5, size=(10_000, 1)) * rng.dirichlet(np.full(100, 0.1))
    values, overall = divergences(counts, measure)
    assert values.shape == (10_000,)
    assert not values.any()
    assert overall == 0.0


@by_measure
@given(counts=histograms(ranks=(2, 6), bins=(2, 7)))
def test_what_is_not_proportional_is_above_zero(measure, counts):
    total = counts.sum(axis=0)
    assume(counts.any(axis=1).all())
    apart = np.abs(counts / counts.sum(axis=1, keepdims=True) - total / total.sum()).max(axis=1)
    values, overall = divergences(counts, measure)
    # Jensen-Shannon falls with the square of the difference: at least apart^2 / 4 by Pinsker's inequality.
    assert (values >= 0.2 * apart**2)[apart > 1e-12].all()
    assert overall > 0 or apart.max() <= 1e-12


@pytest.mark.parametrize("shift", [1e-3, 1e-6, 1e-9])
def test_small_divergences_keep_their_digits(shift):
    values, _ = divergences([[0.5 + shift, 0.5 - shift], [0.5 - shift, 0.5 + shift]], "js")
    np.testing.assert_allclose(values, shift**2 / 2, rtol=max(1e-6, shift))  # the second-order term


@by_measure
@given(counts=histograms(ranks=(2, 6)), data=st.data())
def test_splitting_a_rank_in_two_of_the_same_distribution_changes_nothing(measure, counts, data):
    first = data.draw(st.floats(0.01, 0.99))
    split = np.concatenate([counts[:1] * first, counts[:1] * (1 - first), counts[1:]])
    values, overall = divergences(counts, measure)
    others, again = divergences(split, measure)
    np.testing.assert_allclose(others, np.concatenate([values[:1], values]), rtol=1e-9, atol=1e-14)
    assert again == pytest.approx(overall, rel=1e-9, abs=1e-14)


@by_measure
@given(counts=histograms(), data=st.data())
def test_empty_ranks_and_unseen_bins_change_nothing(measure, counts, data):
    positions = positions_of(data.draw, counts.shape[1])
    values, overall = divergences(counts, measure, positions)
    at = data.draw(st.integers(0, len(counts)))
    more, again = divergences(np.insert(counts, at, 0.0, axis=0), measure, positions)
    assert more[at] == 0
    np.testing.assert_allclose(np.delete(more, at), values, rtol=1e-12, atol=1e-15)
    assert again == pytest.approx(overall, rel=1e-12, abs=1e-15)
    at = data.draw(st.integers(0, counts.shape[1] - 1))
    wider = np.insert(counts, at, 0.0, axis=1)
    more, again = divergences(wider, measure, np.insert(positions, at, positions[at]))
    np.testing.assert_allclose(more, values, rtol=1e-9, atol=1e-12)
    assert again == pytest.approx(overall, rel=1e-9, abs=1e-12)


@given(counts=histograms(), factor=st.floats(0.01, 100), shift=st.floats(-100, 100))
def test_wasserstein_has_the_unit_of_its_positions(counts, factor, shift):
    plain, _ = divergences(counts, "w1")
    moved, _ = divergences(counts, "w1", np.arange(counts.shape[1]) * factor + shift)
    np.testing.assert_allclose(moved, plain * factor, rtol=1e-9, atol=1e-10)


def test_two_ranks_with_a_class_each():
    counts = [[10, 0], [0, 10]]
    js = 0.5 * math.log(1 / 0.75) + 0.25 * math.log(0.5 / 0.75) + 0.25 * math.log(0.5 / 0.25)
    for measure, expected in {"js": js, "tv": 0.5, "w1": 0.5}.items():
        values, overall = divergences(counts, measure)
        np.testing.assert_allclose(values, expected, rtol=1e-14)
        assert overall == pytest.approx(expected, rel=1e-14)
    assert divergences(counts)[1] == pytest.approx(js)  # the default


def test_the_average_is_weighted_with_the_data():
    values, overall = divergences([[3, 0], [0, 1], [0, 0]], "tv")
    np.testing.assert_allclose(values, [0.25, 0.75, 0.0], rtol=1e-15)
    assert overall == pytest.approx(0.375)
    assert overall != pytest.approx(np.mean(values))


@by_measure
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 3)])
def test_without_data_there_is_no_divergence(measure, shape):
    values, overall = divergences(np.zeros(shape), measure)
    np.testing.assert_array_equal(values, np.zeros(shape[0]))
    assert overall == 0.0


def test_counts_are_left_as_they_were():
    counts = np.array([[1.0, 2.0], [4.0, 0.0]])
    for measure in MEASURES:
        divergences(counts, measure)
    importance_table(counts[0], counts[1], clip=1.5)
    balance_table(counts[0], "effective")
    np.testing.assert_array_equal(counts, [[1, 2], [4, 0]])


# Importance weights


def normalised(row):
    return row / row.sum()


@given(data=st.data(), row=rows(bins=(1, 7)))
def test_importance_weights_lead_to_the_target_where_the_rank_has_data(data, row):
    assume(row.any())
    target = data.draw(hnp.arrays(np.float64, row.shape, elements=count))
    table = importance_table(row, target)
    have = row > 0
    assert (table[~have] == 1).all()
    if not (target * have).any():
        assert (table == 1).all()
        return
    np.testing.assert_allclose(normalised(row * table), normalised(target * have), rtol=1e-12, atol=0)
    assert (normalised(row) * table).sum() == pytest.approx(1, rel=1e-12)


@given(data=st.data(), row=rows(bins=(1, 7)), clip=st.floats(1, 10))
def test_a_clip_bounds_the_ratio_and_keeps_the_mean(data, row, clip):
    assume(row.any())
    target = data.draw(hnp.arrays(np.float64, row.shape, elements=count))
    both = (row > 0) & (target > 0)
    assume(both.any())
    table = importance_table(row, target, clip)
    p, q = normalised(row), normalised(target)
    ratio = np.minimum(np.divide(q, p, out=np.zeros_like(p), where=p > 0), clip)
    expected = np.where(p > 0, ratio / (p * ratio).sum(), 1.0)
    np.testing.assert_allclose(table, expected, rtol=1e-12)
    assert (p * table).sum() == pytest.approx(1, rel=1e-12)
    np.testing.assert_array_equal(
        importance_table(row, target, 1e200), importance_table(row, target, None), strict=True
    )


@given(data=st.data(), row=rows(extreme), clip=st.sampled_from([None, 1.0, 5.0, 1e300]))
def test_importance_weights_are_finite_at_any_scale(data, row, clip):
    target = data.draw(hnp.arrays(np.float64, row.shape, elements=extreme))
    table = importance_table(row, target, clip)
    assert (np.isfinite(table) & (table >= 0)).all()
    if row.any():
        p = row / row.max()
        assert (p * table).sum() == pytest.approx(p.sum(), rel=1e-9)


def test_importance_weights_by_hand():
    np.testing.assert_allclose(importance_table([30, 10], [0.5, 0.5]), [2 / 3, 2])
    # Clipped at 1.5, the ratios are 2/3 and 3/2, with mean 7/8.
    np.testing.assert_allclose(importance_table([30, 10], [5, 5], clip=1.5), [16 / 21, 12 / 7])
    # A subnormal share has no digits left to divide; it counts as none.
    assert importance_table([7, 3, 0], [5e-324, 0, 1]).tolist() == [1, 1, 1]
    # The third bin has a third of the target and nothing to carry it; the fourth is not wanted.
    np.testing.assert_allclose(importance_table([1, 2, 0, 1], [1, 1, 1, 0]), [2, 1, 1, 0])


@pytest.mark.parametrize(
    ("row", "target"),
    [([0, 0], [1, 1]), ([1, 1], [0, 0]), ([1, 0], [0, 1]), ([], []), ([1, 0, 2], [0, 3, 0])],
)
def test_where_no_weights_lead_to_the_target_they_are_one(row, target):
    assert importance_table(row, target).tolist() == [1.0] * len(row)


# Effective sample size


@given(data=st.data(), row=rows())
def test_the_effective_sample_size_is_a_fraction(data, row):
    table = data.draw(hnp.arrays(np.float64, row.shape, elements=size))
    fraction = effective_sample_size(row, table)
    assert 0 < fraction <= 1
    if row.any():
        p = normalised(row)
        assert fraction == pytest.approx((p * table).sum() ** 2 / (p * table**2).sum(), rel=1e-12)
        assert fraction >= p[p > 0].min() * (1 - 1e-12)
    for scale in (1e-300, 1e300):  # also where the square of a weight is no number any more
        assert effective_sample_size(row, table / table.max() * scale) == pytest.approx(fraction, rel=1e-12)


@given(row=rows(), weight=size)
def test_equal_weights_lose_nothing(row, weight):
    assert effective_sample_size(row, np.full(row.shape, weight)) == pytest.approx(1, rel=1e-12)


@given(data=st.data(), row=rows(bins=(2, 7)))
def test_a_clip_of_one_never_leaves_fewer_than_no_clip(data, row):
    target = data.draw(hnp.arrays(np.float64, row.shape, elements=size))
    free, clipped = importance_table(row, target), importance_table(row, target, 1.0)
    # Clipped weights differ from their mean by less; Kish's fraction is 1 / (1 + their variance).
    assert effective_sample_size(row, clipped) >= effective_sample_size(row, free) * (1 - 1e-12)


def test_effective_sample_sizes_by_hand():
    assert effective_sample_size([3, 1], [1, 1]) == 1.0
    assert effective_sample_size([1, 1], [1, 0]) == pytest.approx(0.5)
    assert effective_sample_size([3, 1], [1, 3]) == pytest.approx(1.5**2 / 3)
    assert effective_sample_size([0, 0], [5, 1]) == 1.0
    assert effective_sample_size([0, 2], [5, 0]) == 0.0
    assert effective_sample_size([], []) == 1.0


# Class balance


@by_balance
@given(n=st.one_of(rows(), rows(extreme)), beta=st.sampled_from([0.0, 1e-300, 0.5, 0.999, 1 - 2.0**-53]))
@example(n=np.array([1e-310, 3e-310, 0.0]), beta=1 - 2.0**-53)
@example(n=np.array([1.7e308, 1.0]), beta=1e-300)
def test_class_weights_have_mean_one_and_favour_the_rare(kind, n, beta):
    table = balance_table(n, kind, beta)
    assert (np.isfinite(table) & (table > 0)).all()
    if not n.any():
        assert (table == 1).all()
        return
    p = n / n.max()
    assert (p * table).sum() == pytest.approx(p.sum(), rel=1e-9)
    order = np.argsort(n)
    assert (np.diff(table[order]) <= 1e-12 * table[order][1:]).all()
    seen = p > 0
    assert (table[~seen] == table[seen].max()).all()


@given(n=rows())
def test_the_inverse_frequency_gives_every_class_seen_the_same_weight(n):
    assume(n.any())
    carried = (n * balance_table(n, "inverse"))[n > 0]
    np.testing.assert_allclose(carried, n.sum() / np.count_nonzero(n), rtol=1e-12)


@pytest.mark.parametrize("beta", [1e-300, 0.3, 0.999, 0.9999999, 1 - 1e-12, 1 - 2.0**-53])
@pytest.mark.parametrize("n", [[1, 10, 100], [0.001, 0.5, 7], [1e3, 1e7, 1e12], [5e15, 1e16, 1]])
def test_effective_numbers_against_sixty_digits(n, beta):
    with localcontext() as context:
        context.prec = 60
        raw = [(1 - Decimal(beta)) / (1 - Decimal(beta) ** Decimal(x)) for x in n]
        mean = sum(Decimal(x) * w for x, w in zip(n, raw, strict=True)) / sum(map(Decimal, n))
        expected = [float(w / mean) for w in raw]
    np.testing.assert_allclose(balance_table(n, "effective", beta), expected, rtol=1e-13)


@given(n=rows())
def test_beta_leads_from_equal_weights_to_the_inverse_frequency(n):
    np.testing.assert_allclose(balance_table(n, "effective", 0.0), np.ones(len(n)), rtol=1e-14)
    near = balance_table(n, "effective", 1 - 1e-13)
    np.testing.assert_allclose(near, balance_table(n, "inverse"), rtol=1e-5)


def test_class_weights_by_hand():
    assert balance_table([8, 2, 0], "inverse").tolist() == [0.625, 2.5, 2.5]
    # At beta = 1/2 one element is one effective sample, two are 3/2: weights 3 : 2, mean (3 + 2 * 2) / 3.
    np.testing.assert_allclose(balance_table([1, 2], "effective", 0.5), [9 / 7, 6 / 7], rtol=1e-15)
    assert balance_table([0, 0], "effective").tolist() == [1, 1]
    assert balance_table([], "inverse").tolist() == []


def test_the_default_beta_is_that_of_the_paper():
    n = [10, 1000]
    np.testing.assert_array_equal(balance_table(n, "effective"), balance_table(n, "effective", 0.999))
    assert balance_table(n, "effective")[0] < balance_table(n, "inverse")[0]


# Weights for ranks

UPDATES = (exponentiated_gradient, agnostic_ascent)
by_update = pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)
step_sizes = st.one_of(st.just(0.0), st.floats(1e-3, 10))


@by_update
@given(data=st.data(), ranks=st.integers(1, 6), step=step_sizes)
def test_an_update_is_a_distribution_that_looks_at_larger_losses(update, data, ranks, step):
    q = shares_of(data.draw, ranks)
    losses = data.draw(hnp.arrays(np.float64, ranks, elements=loss))
    new = update(q, losses, step)
    assert (new >= 0).all()
    assert new.sum() == pytest.approx(1, rel=1e-12)
    # The average loss under the new shares is not smaller: it is what both ascend.
    assert (new * losses).sum() >= (q * losses).sum() - 1e-11
    shifted = update(3 * q, losses + 7, step)  # neither the sum of q nor a shift of all losses matters
    np.testing.assert_allclose(shifted, new, rtol=1e-9, atol=1e-12)
    if step == 0:
        np.testing.assert_allclose(new, q, rtol=1e-13, atol=1e-15)


@given(data=st.data(), ranks=st.integers(1, 6), step=st.floats(0, 1))
def test_the_exponentiated_gradient_by_its_formula(data, ranks, step):
    q = shares_of(data.draw, ranks)
    losses = data.draw(hnp.arrays(np.float64, ranks, elements=st.floats(-50, 50)))
    expected = q * np.exp(step * losses)
    new = exponentiated_gradient(q, losses, step)
    np.testing.assert_allclose(new, expected / expected.sum(), rtol=1e-11)


@by_update
def test_the_rank_with_the_larger_loss_gains(update):
    new = update([0.5, 0.3, 0.2], [1.0, 2.0, 1.0], 0.1)
    assert new[1] > 0.3
    assert new[0] < 0.5
    assert new[2] < 0.2


@by_update
@given(data=st.data(), ranks=st.integers(2, 6), step=step_sizes)
def test_a_rank_without_data_moves_as_the_mean_of_the_others(update, data, ranks, step):
    q = shares_of(data.draw, ranks)
    losses = data.draw(hnp.arrays(np.float64, ranks, elements=loss))
    absent = np.array(data.draw(st.lists(st.booleans(), min_size=ranks, max_size=ranks)))
    assume(absent.any())
    holes = np.where(absent, math.nan, losses)
    fill = losses[~absent].mean() if not absent.all() else 0.0
    expected = update(q, np.where(absent, fill, losses), step)
    np.testing.assert_allclose(update(q, holes, step), expected, rtol=1e-9, atol=1e-11)
    if absent.all():
        np.testing.assert_allclose(update(q, holes, step), q, rtol=1e-12, atol=1e-15)


@by_update
@pytest.mark.parametrize("step", [0.0, 1e-300, 1.0, 1e300])
@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([1.7e308, -1.7e308, 0.0], [1, 0, 0]),
        ([1e308, 1e308, -1e308], [0.5, 0.5, 0]),
        ([math.nan, 1.7e308, 1.7e308], [1 / 3, 1 / 3, 1 / 3]),
        ([-1e-300, -1e-300, -1e-300], [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_no_loss_and_no_step_is_too_large(update, losses, best, step):
    new = update(np.full(3, 1 / 3), losses, step)
    assert (new >= 0).all()
    assert new.sum() == pytest.approx(1, rel=1e-12)
    if step >= 1:
        np.testing.assert_allclose(new, best, atol=1e-12)
    if step == 0:
        np.testing.assert_allclose(new, 1 / 3, rtol=1e-12)


def test_a_tiny_share_with_the_top_loss_outgrows_the_others():
    new = exponentiated_gradient([1.0, 1e-300], [0.0, 1.0], 750.0)
    rest = math.exp(300 * math.log(10) - 750)  # where exp(-750) itself is 0
    np.testing.assert_allclose(new, [rest, 1], rtol=1e-9)


def test_a_share_of_zero_stays_in_one_update_and_returns_in_the_other():
    losses = [0.0, 1e308]
    assert exponentiated_gradient([1.0, 0.0], losses, 1e10).tolist() == [1, 0]
    np.testing.assert_allclose(agnostic_ascent([1.0, 0.0], losses, 1e10), [0, 1])
    np.testing.assert_allclose(agnostic_ascent([1.0, 0.0], [0.0, 1.0], 0.5), [0.75, 0.25])


def test_the_ascent_by_hand():
    # (0.5, 0.5) + 0.1 * (1, 2) = (0.6, 0.7); 0.15 too much each.
    np.testing.assert_allclose(agnostic_ascent([0.5, 0.5], [1, 2], 0.1), [0.45, 0.55], rtol=1e-14)


# The projection


@given(v=hnp.arrays(np.float64, st.integers(1, 8), elements=st.floats(-10, 10)))
@example(v=np.array([0.0, -1.0, -2.0]))
def test_the_projection_is_the_nearest_distribution(v):
    x = project_simplex(v)
    assert (x >= 0).all()
    assert x.sum() == pytest.approx(1, rel=1e-12)
    # A point of a convex set is the nearest to v if and only if no direction within the set leads closer:
    # (v - x) . (y - x) <= 0 for all y, and that is linear in y, so for the corners.
    assert ((v - x) - ((v - x) * x).sum()).max() <= 1e-12
    np.testing.assert_allclose(project_simplex(x), x, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("v", [[0.3, 0.9, -0.4], [2.0, 1.9, 0.0], [0.1, 0.1, 0.1], [-3.0, -2.0, -2.5]])
def test_the_projection_against_a_fine_grid(v):
    x, n = project_simplex(v), 100
    grid = [
        (i / n, j / n, (n - i - j) / n) for i, j in itertools.product(range(n + 1), repeat=2) if i + j <= n
    ]
    distances = ((np.array(grid) - v) ** 2).sum(axis=1)
    ours = ((x - v) ** 2).sum()
    assert ours <= distances.min() + 1e-12
    assert np.abs(np.array(grid[int(distances.argmin())]) - x).max() <= 1 / n


def test_projections_by_hand():
    assert project_simplex([5.0]).tolist() == [1]
    assert project_simplex([0.25, 0.75]).tolist() == [0.25, 0.75]
    np.testing.assert_allclose(project_simplex([1e300, 1e300, -1e308]), [0.5, 0.5, 0])
    np.testing.assert_allclose(project_simplex([1.7e308, -1.7e308]), [1, 0])


# q-FFL


@given(
    losses=hnp.arrays(np.float64, st.integers(1, 8), elements=st.one_of(st.just(0.0), st.floats(1e-9, 1000))),
    q=st.floats(0, 5),
)
def test_fair_factors_have_mean_one_and_grow_with_the_loss(losses, q):
    factors = q_fair(losses, q)
    assert (factors >= 0).all()
    assert factors.mean() == pytest.approx(1, rel=1e-12)
    assert (np.diff(factors[np.argsort(losses)]) >= -1e-12).all()
    if q >= 1 and losses.max() > 0:
        # Strictly so where the losses differ visibly.
        low, high = losses.argmin(), losses.argmax()
        assert factors[high] > factors[low] or losses[low] >= 0.999 * losses[high]
    if losses.max() > 1e-3 and losses.min() > 1e-3:
        raw = losses**q
        np.testing.assert_allclose(factors, raw / raw.mean(), rtol=1e-10)


def test_fair_factors_by_hand():
    assert q_fair([1, 3], 1).tolist() == [0.5, 1.5]
    assert q_fair([1, 3], 0).tolist() == [1, 1]
    assert q_fair([0, 3], 0).tolist() == [1, 1]
    assert q_fair([0, 0], 2).tolist() == [1, 1]
    assert q_fair([-2, 0, 3], 1).tolist() == [0, 0, 3]  # negative counts as 0
    assert q_fair([-2, -1], 1).tolist() == [1, 1]
    assert q_fair([], 1).tolist() == []
    np.testing.assert_allclose(q_fair([1e308, 1e-308, 1e308], 50), [1.5, 0, 1.5])
    np.testing.assert_allclose(q_fair([1, 2, 4], 1e300), [0, 0, 3])


def test_a_rank_without_data_has_no_say_in_the_others_factors():
    assert q_fair([1, math.nan, 3], 1).tolist() == [0.5, 1, 1.5]
    assert q_fair([math.nan, math.nan], 1).tolist() == [1, 1]


# Edges


def sketch_of(data, points):
    return np.quantile(data, np.linspace(0, 1, points))


def samples_of(rng, kind, n):
    return {
        "normal": lambda: rng.normal(rng.normal(), rng.uniform(0.1, 3), n),
        "skewed": lambda: rng.lognormal(rng.normal(), 1.5, n),
        "few": lambda: rng.integers(0, 5, n).astype(float),
        "many zeros": lambda: np.where(rng.random(n) < 0.6, 0.0, rng.normal(size=n)),
        "constant": lambda: np.full(n, rng.normal()),
    }[kind]()


KINDS = ("normal", "skewed", "few", "many zeros", "constant")


@given(
    seed=seeds,
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    points=st.integers(5, 60),
    bins=st.integers(1, 20),
)
def test_edges_are_near_the_quantiles_of_the_pooled_data(seed, kinds, points, bins):
    rng = np.random.default_rng(seed)
    ranks = [samples_of(rng, kind, int(rng.integers(500, 3000))) for kind in kinds]
    edges = pooled_edges([sketch_of(one, points) for one in ranks], [len(one) for one in ranks], bins)
    assert edges.shape == (bins - 1,)
    assert (np.diff(edges) > 0).all()
    pooled = np.sort(np.concatenate(ranks))
    # In probability, as a quantile in a gap of the data may be anywhere within the gap. A rank's distribution
    # between its quantiles is known to one step; adding up costs half another.
    slack = 1.5 / (points - 1) + 2 * len(ranks) / len(pooled)
    wanted = np.arange(1, bins) / bins
    # Ties are moved by some units in the last place: not more than a relative 1e-13, nor than 1e-300.
    reach = np.abs(edges) * 1e-13 + 1e-300
    below = np.searchsorted(pooled, edges - reach, side="left") / len(pooled)
    upto = np.searchsorted(pooled, edges + reach, side="right") / len(pooled)
    assert (below <= wanted + slack).all()
    assert (upto >= wanted - slack).all()


@given(seed=seeds, bins=st.sampled_from([2, 4, 5, 10, 20]), copies=st.integers(1, 5))
def test_ranks_with_one_distribution_have_its_quantiles(seed, bins, copies):
    data = np.random.default_rng(seed).normal(size=1000)
    inner = np.quantile(data, np.arange(1, bins) / bins)
    sizes = np.arange(1.0, copies + 1)
    edges = pooled_edges(np.tile(sketch_of(data, 101), (copies, 1)), sizes, bins)
    np.testing.assert_allclose(edges, inner, rtol=1e-9, atol=1e-12)


@given(seed=seeds, points=st.integers(2, 40), bins=st.integers(2, 60))
def test_one_rank_s_edges_interpolate_its_sketch(seed, points, bins):
    sketch = np.sort(np.random.default_rng(seed).normal(size=points))
    expected = np.interp(np.arange(1, bins) / bins, np.linspace(0, 1, points), sketch)
    np.testing.assert_allclose(pooled_edges([sketch], [3], bins), expected, rtol=1e-9, atol=1e-9)


@given(seed=seeds, ranks=st.integers(1, 6), bins=st.integers(2, 12))
def test_edges_know_no_order_no_scale_and_no_empty_ranks(seed, ranks, bins):
    rng = np.random.default_rng(seed)
    sketches, sizes = rng.normal(size=(ranks, 9)), rng.uniform(0.1, 5, ranks)  # not even sorted
    edges = pooled_edges(np.sort(sketches, axis=1), sizes, bins)
    order = rng.permutation(ranks)
    mixed = np.vstack([sketches[order], np.full(9, math.nan), np.full(9, 1e308)])
    again = pooled_edges(mixed, np.concatenate([sizes[order] * 1e300, [0, 0]]), bins)
    np.testing.assert_allclose(again, edges, rtol=1e-9, atol=1e-9)


@given(seed=seeds, bins=st.integers(2, 12), low=st.floats(-1000, 1000), factor=st.floats(0.01, 100))
def test_edges_have_the_unit_of_the_targets(seed, bins, low, factor):
    rng = np.random.default_rng(seed)
    sketches, sizes = np.sort(rng.normal(size=(3, 9)), axis=1), rng.uniform(0.1, 5, 3)
    moved = pooled_edges(sketches * factor + low, sizes, bins)
    np.testing.assert_allclose(
        moved, pooled_edges(sketches, sizes, bins) * factor + low, rtol=1e-9, atol=1e-9
    )


def test_a_rank_counts_with_its_size():
    zeros, ones = np.zeros(11), np.ones(11)
    nine = pooled_edges([zeros, ones], [9, 1], 5)
    np.testing.assert_allclose(nine, 0, atol=1e-300)
    one = pooled_edges([zeros, ones], [1, 9], 5)
    np.testing.assert_allclose(one, 1, rtol=1e-14)
    both = pooled_edges([zeros, ones], [0.35, 0.65], 10)  # 0.1, 0.2, 0.3; 0.4, 0.5, ...
    assert both[[1, 4]].tolist() == [math.ulp(0.0), 1 + math.ulp(1.0)]


def test_a_value_that_many_have_gets_a_bin_of_its_own():
    data = np.concatenate([np.zeros(600), np.linspace(1, 2, 400)])
    edges = pooled_edges([sketch_of(data, 101)], [1000], 10)
    bins = np.searchsorted(edges, data, side="right")
    assert len(set(bins[:600])) == 1
    assert not set(bins[:600]) & set(bins[600:])
    np.testing.assert_allclose(np.bincount(bins)[-3:], 100, atol=10)


def test_ties_are_the_next_larger_numbers():
    edges = pooled_edges(np.full((2, 5), 3.0), [1, 1], 5)
    assert edges.tolist() == [3.0 + i * math.ulp(3.0) for i in range(4)]


@pytest.mark.parametrize("sizes", [[0, 0], []])
def test_without_data_edges_are_placeholders(sizes):
    edges = pooled_edges(np.full((len(sizes), 5), math.nan), sizes, 4)
    assert edges.tolist() == [-0.5, 0, 0.5]


def test_edges_of_ten_thousand_ranks():
    rng = np.random.default_rng(2)
    data = rng.normal(rng.normal(size=(10_000, 1)), 1.0, size=(10_000, 64))
    edges = pooled_edges(np.quantile(data, np.linspace(0, 1, 33), axis=1).T, np.full(10_000, 64), 50)
    shares = np.bincount(np.searchsorted(edges, data.ravel(), side="right")) / data.size
    # 33 quantiles of 64 numbers put their tails a little too far in.
    np.testing.assert_allclose(shares, 0.02, atol=2e-3)
    np.testing.assert_allclose(shares[2:-2], 0.02, atol=1e-3)


def test_one_bin_has_no_inner_edge():
    assert pooled_edges([[0.0, 1.0]], [1], 1).shape == (0,)
    assert pooled_edges([[0.0, 1.0]], [0], 1).shape == (0,)


# Positions


@given(edges=hnp.arrays(np.float64, st.integers(0, 9), elements=st.floats(-1e6, 1e6)), data=st.data())
def test_positions_lie_in_their_bins(edges, data):
    edges = np.sort(edges)
    low, high = sorted(data.draw(st.tuples(st.floats(-2e6, 2e6), st.floats(-2e6, 2e6))))
    positions = bin_positions(edges, low, high)
    assert positions.shape == (len(edges) + 1,)
    bounds = [min([low, *edges]), *edges, max([high, *edges])]
    for at, left, right in zip(positions, bounds[:-1], bounds[1:], strict=True):
        assert left <= at <= right
        assert at - left == pytest.approx(right - at, abs=1e-9)
    # They serve as what they are for.
    divergences(np.eye(len(positions)), "w1", positions)


def test_positions_by_hand():
    assert bin_positions([0.0, 2.0], -1, 6).tolist() == [-0.5, 1, 4]
    assert bin_positions([], 1, 2).tolist() == [1.5]
    assert bin_positions([3.0, 4.0], 3.5, 3.5).tolist() == [3, 3.5, 4]  # edges beyond the extremes
    assert bin_positions([1.6e308], -1.7e308, 1.7e308).tolist() == pytest.approx([-5e306, 1.65e308])


def test_placeholder_edges_have_positions():
    positions = bin_positions(pooled_edges(np.zeros((1, 2)), [0], 4), -1, 1)
    assert positions.tolist() == [-0.75, -0.25, 0.25, 0.75]


# The window

arrays = hnp.arrays(
    np.float64, (3,), elements=st.one_of(st.just(0.0), st.sampled_from([1e-12, 1.0, 1e20]), size)
)


@given(steps=st.integers(1, 6), many=st.lists(arrays, max_size=25))
def test_a_sliding_window_is_the_sum_of_the_last_arrays(steps, many):
    window = Window(steps=steps)
    assert window.total is None
    assert window.count == 0
    for i in range(len(many)):
        window.add(many[i])
        held = many[max(0, i + 1 - steps) : i + 1]
        expected = [math.fsum(one[j] for one in held) for j in range(3)]
        # Relative, entry by entry: also where 1e20 has just left and 1e-12 is what remains.
        np.testing.assert_allclose(window.total, expected, rtol=1e-12, atol=0)
        assert window.count == len(held)


def test_a_long_run_gathers_no_rounding():
    rng = np.random.default_rng(4)
    many = 10.0 ** rng.uniform(-12, 12, size=(5000, 4)) * (rng.random((5000, 4)) < 0.3)
    window = Window(steps=37)
    for i, array in enumerate(many):
        window.add(array)
        assert (window.total >= 0).all()
        if i % 61 == 0:
            np.testing.assert_allclose(window.total, many[max(0, i - 36) : i + 1].sum(axis=0), rtol=1e-12)
    for _ in range(37):
        window.add(np.zeros(4))
    assert window.total.tolist() == [0, 0, 0, 0]


@given(half_life=st.floats(0.1, 100), many=st.lists(arrays, min_size=1, max_size=25))
def test_a_decaying_window_halves_with_its_half_life(half_life, many):
    window = Window(half_life=half_life)
    for array in many:
        window.add(array)
    n = len(many)
    expected = [math.fsum(many[i][j] * 0.5 ** ((n - 1 - i) / half_life) for i in range(n)) for j in range(3)]
    np.testing.assert_allclose(window.total, expected, rtol=1e-12, atol=1e-300)
    assert window.count == n


def test_an_array_counts_half_after_the_half_life():
    window = Window(half_life=5)
    window.add([8.0])
    for expected in (4.0, 2.0):
        for _ in range(5):
            window.add([0.0])
        assert window.total[0] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("kind", [{"steps": 4}, {"half_life": 3.5}], ids=str)
@given(many=st.lists(arrays, max_size=12), at=st.integers(0, 12))
def test_a_window_goes_on_from_its_state_to_the_last_bit(kind, many, at):
    one = Window(**kind)
    for array in many[:at]:
        one.add(array)
    other = Window(**kind)
    other.add(np.ones(3))  # forgotten by restoring
    other.load_state_dict(json.loads(json.dumps(one.state_dict(), allow_nan=False)))
    assert other.count == one.count
    for array in [*many[at:], np.arange(3.0)]:
        one.add(array)
        other.add(array)
        assert other.total.tolist() == one.total.tolist()
        assert other.count == one.count
        assert other.state_dict() == one.state_dict()


@pytest.mark.parametrize("kind", [{"steps": 3}, {"half_life": 3}], ids=str)
def test_the_state_of_a_new_window_is_empty(kind):
    used = Window(**kind)
    used.add([1.0])
    used.load_state_dict(json.loads(json.dumps(Window(**kind).state_dict())))
    assert used.total is None
    assert used.count == 0
    used.add(np.ones((2, 2)))  # any shape again
    assert used.total.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("kind", [{"steps": 2}, {"half_life": 2}], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_a_window_holds_any_shape(kind, shape):
    window = Window(**kind)
    for _ in range(5):
        window.add(np.ones(shape))
        other = Window(**kind)
        other.load_state_dict(json.loads(json.dumps(window.state_dict())))
        assert window.total.shape == other.total.shape == shape
        np.testing.assert_array_equal(window.total, other.total)


@pytest.mark.parametrize("kind", [{"steps": 2}, {"half_life": 1e300}], ids=str)
def test_a_window_keeps_to_itself(kind):
    window = Window(**kind)
    for _ in range(4):
        mine = np.ones(2)
        window.add(mine)
        before = window.total.tolist()
        mine[:] = 99
        window.total[:] = 99
        assert window.total.tolist() == before
    state = window.state_dict()
    window.add(np.zeros(2))
    assert state != window.state_dict()


# Bad arguments

NAN, INF = math.nan, math.inf
WRONG = {
    "measure": (
        lambda: divergences([[1.0]], "kl"),
        "measure='kl' is not known; choose one of 'js', 'tv', 'w1'",
    ),
    "negative count": (
        lambda: divergences([[1.0, 2.0], [3.0, -4.0]]),
        "counts at rank 1, bin 1 is -4.0 but must be finite and >= 0; leave elements",
    ),
    "NaN count": (lambda: divergences([[NAN, 2.0]]), "counts at rank 0, bin 0 is nan but must be finite"),
    "infinite count": (lambda: balance_table([1, INF], "inverse"), "counts at bin 1 is inf"),
    "text": (lambda: divergences([["many"]]), "counts=[['many']] is not an array of numbers"),
    "falling positions": (
        lambda: divergences([[1, 1, 1]], "w1", [0, 2, 1]),
        "positions falls from 2.0 (bin 1) to 1.0; give one finite position per bin, in ascending order",
    ),
    "NaN position": (lambda: divergences([[1, 1]], "w1", [0, NAN]), "positions at bin 1 is nan"),
    "far positions": (
        lambda: divergences([[1, 1]], "w1", [-1.7e308, 1.7e308]),
        "positions reaches from -1.7e+308 to 1.7e+308, too far",
    ),
    "clip": (lambda: importance_table([1], [1], 0.5), "clip=0.5 must be >= 1; pass clip=None"),
    "NaN clip": (lambda: importance_table([1], [1], NAN), "clip=nan must be >= 1"),
    "clip of text": (lambda: importance_table([1], [1], "no"), "clip='no' must be >= 1"),
    "target": (lambda: importance_table([1], [-1]), "target at bin 0 is -1.0 but must be finite and >= 0"),
    "row": (lambda: importance_table([-1], [1]), "counts_row at bin 0 is -1.0"),
    "negative weight": (lambda: effective_sample_size([1], [-1]), "table at bin 0 is -1.0"),
    "kind": (
        lambda: balance_table([1], "even"),
        "kind='even' is not known; choose one of 'inverse', 'effective'",
    ),
    "beta": (
        lambda: balance_table([1], "effective", 1.0),
        'beta=1.0 must be at least 0 and below 1; kind="inverse"',
    ),
    "negative beta": (lambda: balance_table([1], "effective", -0.1), "beta=-0.1 must be at least 0"),
    "negative share": (
        lambda: exponentiated_gradient([0.5, -0.5], [1, 1], 1),
        "q at rank 1 is -0.5 but must be finite and >= 0; start from equal shares",
    ),
    "no share": (lambda: agnostic_ascent([0, 0], [1, 1], 1), "q=[0.0, 0.0] has no share above 0"),
    "no rank": (lambda: exponentiated_gradient([], [], 1), "q=[] has no share above 0"),
    "infinite loss": (
        lambda: exponentiated_gradient([1, 1], [NAN, INF], 1),
        "losses at rank 1 is inf but must be finite; pass NaN for a rank without data",
    ),
    "step": (lambda: agnostic_ascent([1], [1], -1), "step=-1 must be finite and >= 0; 0 leaves"),
    "infinite step": (lambda: exponentiated_gradient([1], [1], INF), "step=inf must be finite and >= 0"),
    "NaN entry": (lambda: project_simplex([0, NAN]), "v at entry 1 is nan but must be finite;"),
    "no entry": (lambda: project_simplex([]), "v=[] has no entries"),
    "exponent": (lambda: q_fair([1], -1), "q=-1 must be finite and >= 0; 0 is the ordinary mean"),
    "fair loss": (lambda: q_fair([-INF], 1), "losses at rank 0 is -inf but must be finite;"),
    "bins": (lambda: pooled_edges([[0, 1]], [1], 0), "bins=0 must be a whole number >= 1; 1 puts"),
    "half a bin": (lambda: pooled_edges([[0, 1]], [1], 2.5), "bins=2.5 must be a whole number"),
    "true bins": (lambda: pooled_edges([[0, 1]], [1], True), "bins=True must be a whole number"),
    "sizes": (lambda: pooled_edges([[0, 1]], [-1], 2), "sizes at rank 0 is -1.0"),
    "NaN sketch": (
        lambda: pooled_edges([[NAN, 1], [0, NAN]], [0, 1], 2),
        "sketches at rank 1, point 1 is nan but must be finite; set the size of a rank without data to 0",
    ),
    "far sketch": (
        lambda: pooled_edges([[0, 1], [0, 1e301]], [1, 1], 2),
        "sketches at rank 1 reaches beyond 1e+300",
    ),
    "sketch of text": (lambda: pooled_edges("ab", [1], 2), "sketches='ab' is not an array of numbers"),
    "falling edges": (
        lambda: bin_positions([0, 2, 1], 0, 3),
        "edges falls from 2.0 (edge 1) to 1.0; give it in ascending order",
    ),
    "infinite low": (lambda: bin_positions([0], -INF, 3), "low=-inf must be finite; without data pass -1"),
    "NaN high": (lambda: bin_positions([0], 0, NAN), "high=nan must be finite"),
    "low above high": (lambda: bin_positions([0], 2, 1), "low=2.0 is above high=1.0"),
    "no window": (Window, "steps=None and half_life=None: a window needs exactly one of them"),
    "two windows": (lambda: Window(3, 4), "steps=3 and half_life=4: a window needs exactly one of them"),
    "no steps": (lambda: Window(steps=0), "steps=0 must be a whole number >= 1; 100 is a usual window"),
    "half life": (lambda: Window(half_life=0), "half_life=0 must be finite and > 0; 50 is"),
    "endless": (lambda: Window(half_life=INF), "half_life=inf must be finite and > 0"),
    "negative array": (
        lambda: Window(steps=1).add([[1, -1]]),
        "array at axis 0, axis 1 is -1.0 but must be finite and >= 0",
    ),
}
MISSHAPEN = {
    "one row": (lambda: divergences([1.0, 2.0]), "counts has shape (2,) but must have shape (ranks, bins)"),
    "two rows": (
        lambda: balance_table([[1.0]], "inverse"),
        "counts has shape (1, 1) but must have shape (bins,)",
    ),
    "positions": (lambda: divergences([[1, 1]], "w1", [0]), "positions has 1 entries but counts has 2 bins"),
    "target": (lambda: importance_table([1, 2], [1]), "target has 1 entries but counts_row has 2"),
    "table": (lambda: effective_sample_size([1], [1, 2]), "table has 2 entries but counts_row has 1"),
    "losses": (lambda: agnostic_ascent([1], [1, 2], 1), "losses has 2 entries but q has 1"),
    "number": (lambda: q_fair(1.0, 1), "losses has shape () but must have shape (ranks,)"),
    "sizes": (lambda: pooled_edges([[0, 1]], [1, 1], 2), "sizes has 2 entries but sketches has 1"),
    "one point": (
        lambda: pooled_edges([[0]], [1], 2),
        "sketches has shape (1, 1) but must have shape (ranks, points) with at least 2 points",
    ),
    "flat sketch": (lambda: pooled_edges([0, 1], [1, 1], 2), "sketches has shape (2,)"),
    "edges": (lambda: bin_positions([[0.0]], 0, 1), "edges has shape (1, 1) but must have shape (edges,)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_argument_is_named_with_its_value_and_the_way_out(name):
    call, message = WRONG[name]
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        call()
    assert not isinstance(caught.value, ShapeError)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("name", MISSHAPEN)
def test_arrays_that_do_not_fit_are_a_shape_error(name):
    call, message = MISSHAPEN[name]
    with pytest.raises(ShapeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("kind", [{"steps": 2}, {"half_life": 2}], ids=str)
def test_a_window_refuses_another_shape_and_goes_on(kind):
    window = Window(**kind)
    window.add([1.0, 2.0])
    for bad, error in (([1.0], ShapeError), ([1.0, NAN], ConfigError)):
        with pytest.raises(error):
            window.add(bad)
        assert window.total.tolist() == [1, 2]
        assert window.count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 5}, "state is of a window with steps=5 and half_life=None, but this one has steps=2"),
        ({"steps": None, "half_life": 1.0}, "state is of a window with steps=None and half_life=1.0"),
        ({"shape": [3]}, "state is not what Window.state_dict() returns (ValueError"),
        ({"count": None}, "state is not what Window.state_dict() returns (TypeError"),
    ],
    ids=str,
)
def test_a_window_refuses_another_window_s_state_and_goes_on(change, message):
    window = Window(steps=2)
    for array in ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0]):
        window.add(array)
    before = window.state_dict()
    with pytest.raises(ConfigError, match=re.escape(message)):
        window.load_state_dict({**before, **change})
    with pytest.raises(ConfigError, match=re.escape("(KeyError: 'fresh')")):
        window.load_state_dict({name: value for name, value in before.items() if name != "fresh"})
    assert window.state_dict() == before


# The house


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(distributions)
    assert result.failed == 0
    assert result.attempted >= 5


def test_what_the_module_declares_it_has():
    assert all(hasattr(distributions, name) for name in distributions.__all__)
