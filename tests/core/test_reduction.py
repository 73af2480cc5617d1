"""The contract in NumPy: no partition of the elements changes what a reduction finishes to."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hvdloss.errors import ConfigError, NonFiniteLossError, ShapeError, WeightError
from hvdloss.losses.ledger import Ledger, check_step, pack, unpack
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.losses.reduction import REDUCTIONS, TENSOR_FIELDS, check_reduction, finish, reduce_losses

OPS = NumpyOps()
DTYPES = {np.float64: 1e-12, np.float32: 1e-5}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
by_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def direct(losses, weights, reduction):
    """Return the loss of all elements by its formula, element by element; independent of the core."""
    rows = [
        [(float(loss), float(w)) for loss, w in zip(one, ws, strict=True) if w != 0]
        for one, ws in zip(
            losses.reshape(len(losses), math.prod(losses.shape[1:])),
            weights.reshape(len(losses), math.prod(losses.shape[1:])),
            strict=True,
        )
    ]
    elements = [pair for row in rows for pair in row]
    weighted = math.fsum(loss * w for loss, w in elements)
    if reduction == "sum":
        return weighted
    if not elements:
        return math.nan
    if reduction == "mean":
        return weighted / math.fsum(w for _, w in elements)
    if reduction == "batch_mean":
        return weighted / len(elements)
    means = [math.fsum(x * w for x, w in row) / math.fsum(w for _, w in row) for row in rows if row]
    return math.fsum(means) / len(means)


def assert_close(value, losses, weights, reduction, tolerance):
    """Compare with the formula, relative to the size of what was summed (losses may cancel)."""
    expected = direct(losses, weights, reduction)
    if math.isnan(expected):
        assert math.isnan(value)
        return
    scale = direct(np.abs(losses), weights, reduction)
    assert abs(value - expected) <= tolerance * scale


def ledger_of(losses, weights, reduction, share=1.0):
    return Ledger.of_row(reduce_losses(OPS, losses, weights, reduction, share=share).row(OPS))


@st.composite
def elements(draw, dtype=np.float64, dims=None):
    """Per-element losses and weights, some weights zero; where they are, the loss may be anything."""
    width = 8 * np.dtype(dtype).itemsize
    dims = draw(st.sampled_from([1, 2, 3])) if dims is None else dims
    shape = (draw(st.integers(0, 12)), *(draw(st.integers(1, 4)) for _ in range(dims - 1)))
    # No subnormal numbers: they have no relative precision.
    size = st.floats(2.0**-20, 1000, width=width)
    loss = st.one_of(st.just(0.0), size, size.map(lambda x: -x))
    losses = draw(hnp.arrays(dtype, shape, elements=loss))
    some = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0009765625, 1000, width=width))
    weights = draw(hnp.arrays(dtype, shape, elements=some))
    absent = draw(st.sampled_from([0.0, math.nan, math.inf, -math.inf]))
    return np.where(weights == 0, dtype(absent), losses), weights


@st.composite
def partitions(draw, count):
    """Indices of `count` elements, dealt to ranks and to micro-batches of each; any may be empty."""
    micro_batches = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    places = [(rank, m) for rank, many in enumerate(micro_batches) for m in range(many)]
    dealt = draw(st.lists(st.sampled_from(places), min_size=count, max_size=count))
    return [
        [[i for i, place in enumerate(dealt) if place == (rank, m)] for m in range(many)]
        for rank, many in enumerate(micro_batches)
    ]


def step_of(losses, weights, reduction, ranks):
    """Return the ledgers of the ranks as every rank sees them."""
    calls = sum(map(len, ranks))
    table = 0
    for rank, parts in enumerate(ranks):
        ledger = Ledger.zero()
        for part in parts:
            ledger = ledger.merge(ledger_of(losses[part], weights[part], reduction, 1 / calls))
        table = table + pack(ledger, rank, len(ranks))
    return unpack(table)


def merged(ledgers):
    whole = Ledger.zero()
    for ledger in ledgers:
        whole = whole.merge(ledger)
    return whole


# Any partition


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinity times zero
@by_dtype
@by_reduction
@given(data=st.data())
def test_any_partition_finishes_to_the_value_of_one_process(dtype, reduction, data):
    dims = data.draw(st.sampled_from([2, 3])) if reduction == "sequence_mean" else None
    losses, weights = data.draw(elements(dtype, dims))
    ranks = data.draw(partitions(len(losses)))
    whole = merged(step_of(losses, weights, reduction, ranks))
    assert_close(whole.finish(reduction), losses, weights, reduction, DTYPES[dtype])
    one = ledger_of(losses, weights, reduction)
    assert_close(one.finish(reduction), losses, weights, reduction, DTYPES[dtype])
    assert whole.elements == one.elements == np.count_nonzero(weights)
    assert whole.weight == pytest.approx(math.fsum(weights.ravel().tolist()), rel=1e-12)
    assert whole.nonfinite_losses == one.nonfinite_losses == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@by_dtype
@by_reduction
@given(data=st.data())
def test_local_means_weighted_by_their_denominators_average_to_it(dtype, reduction, data):
    """How a step is really taken: each local mean, times its denominator, over the summed ones."""
    dims = data.draw(st.sampled_from([2, 3])) if reduction == "sequence_mean" else None
    losses, weights = data.draw(elements(dtype, dims))
    parts = [part for rank in data.draw(partitions(len(losses))) for part in rank]
    numerator = denominator = 0.0
    for part in parts:
        one = reduce_losses(OPS, losses[part], weights[part], reduction, share=1 / len(parts))
        mean = one.mean(OPS)
        assert np.asarray(mean).dtype == dtype
        assert np.isfinite(mean)
        numerator += float(mean) * float(one.denominator)
        denominator += float(one.denominator)
    value = numerator / denominator if denominator else math.nan
    assert_close(value, losses, weights, reduction, DTYPES[dtype])


@by_reduction
@pytest.mark.parametrize("where", ["rank", "micro-batch"])
def test_a_part_without_elements_or_without_weight_changes_nothing(reduction, where):
    rng = np.random.default_rng(3)
    losses, weights = rng.normal(size=(6, 4)), rng.uniform(0.5, 2, size=(6, 4))
    weights[4:] = 0.0
    losses[4:] = np.nan
    full, none, zero = [0, 1, 2, 3], [], [4, 5]
    ranks = [[full], [none], [zero]] if where == "rank" else [[none, full, zero]]
    whole = merged(step_of(losses, weights, reduction, ranks))
    expected = direct(losses[:4], weights[:4], reduction)
    assert whole.finish(reduction) == pytest.approx(expected, rel=1e-12)
    assert whole.elements == 16
    assert whole.micro_batches == 3


def test_a_plain_mean_of_rank_means_would_be_another_number():
    """The error that this library is there to avoid: the examples can tell the two apart."""
    losses, weights = np.array([1.0, 2.0, 9.0]), np.array([1.0, 1.0, 4.0])
    ledgers = step_of(losses, weights, "mean", [[[0, 1]], [[2]]])
    assert merged(ledgers).finish("mean") == pytest.approx(39 / 6)
    assert np.mean([one.finish("mean") for one in ledgers]) == pytest.approx(5.25)


@by_reduction
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (0, 0), (3, 0)])
def test_a_call_without_elements_adds_nothing(reduction, shape):
    for weight in (None, 1.0, np.ones(shape)):
        assert ledger_of(np.zeros(shape), weight, reduction, share=0.0) == Ledger(micro_batches=1.0)


# Elements of weight zero


@by_dtype
@by_reduction
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_element_of_weight_zero_is_absent(dtype, reduction, bad):
    losses = np.array([[1.0, bad, 3.0], [bad, bad, bad], [2.0, 5.0, bad]], dtype=dtype)
    weights = np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [1.0, 0.5, 0.0]], dtype=dtype)
    ledger = ledger_of(losses, weights, reduction)
    assert ledger == ledger_of(np.nan_to_num(losses, nan=0, posinf=0, neginf=0), weights, reduction)
    assert ledger.elements == 4
    assert check_step([ledger], 1) is None
    assert_close(ledger.finish(reduction), losses, weights, reduction, DTYPES[dtype])


@by_reduction
def test_the_mean_of_no_weight_is_zero(reduction):
    one = reduce_losses(OPS, np.full((2, 3), np.nan), np.zeros((2, 3)), reduction)
    assert one.mean(OPS) == 0.0
    assert one.elements == 0


# What each reduction means, by hand

LOSSES = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
WEIGHTS = np.array([[1.0, 2.0, 0.0], [0.5, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("reduction", "numerator", "denominator", "loss"),
    [
        ("mean", 10.0, 3.5, 10.0 / 3.5),
        ("sum", 10.0, 0.25, 10.0),
        ("batch_mean", 10.0, 3.0, 10.0 / 3.0),
        ("sequence_mean", 5.0 / 3.0 + 10.0, 2.0, (5.0 / 3.0 + 10.0) / 2.0),
    ],
)
def test_a_worked_example(reduction, numerator, denominator, loss):
    ledger = ledger_of(LOSSES, WEIGHTS, reduction, share=0.25)
    assert ledger.numerator == pytest.approx(numerator, rel=1e-15)
    assert ledger.denominator == denominator
    assert ledger.finish(reduction) == pytest.approx(loss, rel=1e-15)
    assert (ledger.weight, ledger.elements, ledger.micro_batches) == (3.5, 3.0, 1.0)
    one = reduce_losses(OPS, LOSSES, WEIGHTS, reduction, share=0.25)
    assert one.mean(OPS) == pytest.approx(numerator / denominator, rel=1e-15)


def test_sum_and_batch_mean_scale_with_the_weights_and_mean_does_not():
    def loss(reduction, factor):
        return ledger_of(LOSSES, factor * WEIGHTS, reduction).finish(reduction)

    for reduction, power in (("mean", 0), ("sequence_mean", 0), ("sum", 1), ("batch_mean", 1)):
        assert loss(reduction, 4.0) == pytest.approx(4.0**power * loss(reduction, 1.0), rel=1e-15)


def test_the_sum_of_no_weight_is_zero_and_sound():
    ledger = ledger_of(LOSSES, 0.0, "sum")
    assert ledger.finish("sum") == 0.0
    assert check_step([ledger], 1) is None


def test_sequences_count_alike_whatever_their_length_and_weight():
    losses = np.array([[4.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    weights = np.array([[1e-3, 0.0, 0.0], [7.0, 7.0, 7.0]])
    assert ledger_of(losses, weights, "sequence_mean").finish("sequence_mean") == pytest.approx(3.0)


def test_finish():
    assert finish("mean", 6.0, 4.0) == 1.5
    assert finish("sum", 6.0, 4.0) == 6.0
    assert math.isnan(finish("mean", 0.0, 0.0))
    assert finish("sum", 0.0, 0.0) == 0.0


def test_an_unknown_reduction_is_refused_with_the_choices():
    assert [check_reduction(one) for one in REDUCTIONS] == list(REDUCTIONS)
    with pytest.raises(ConfigError, match=r"'average'.*'mean'.*'sequence_mean'"):
        check_reduction("average")


# Broadcasting weights


@by_reduction
@pytest.mark.parametrize(
    "weight",
    [
        2,
        0.5,
        True,
        np.float32(0.25),
        np.array(3.0),
        np.array([[1.0], [0.0], [2.0]]),
        np.array([0.0, 1.0, 2.0, 0.5]),
        np.array([[0, 1, 2, 3]]),
        np.array([[2.0]]),
        np.array([[True], [False], [True]]),
        [1.0, 0.0, 1.0, 1.0],
    ],
    ids=repr,
)
def test_a_weight_that_broadcasts_is_the_full_one(reduction, weight):
    losses = np.random.default_rng(0).normal(size=(3, 4))
    full = np.broadcast_to(np.asarray(weight, dtype=float), (3, 4)).copy()
    assert ledger_of(losses, weight, reduction) == ledger_of(losses, full, reduction)


@by_reduction
@by_dtype
def test_no_weight_is_weight_one(reduction, dtype):
    losses = np.random.default_rng(1).normal(size=(3, 4)).astype(dtype)
    assert ledger_of(losses, None, reduction) == ledger_of(losses, 1.0, reduction)


shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)


@given(shapes, shapes)
@example((3,), (3, 2))
@example((1,), ())
@example((2, 2), (2, 2, 3))
@example((3,), (3, 3))
@example((1, 2), (1, 2, 2))
def test_a_weight_fits_exactly_if_numpy_broadcasts_it_to_the_losses_in_one_way(weight_shape, loss_shape):
    try:
        np.broadcast_to(np.ones(weight_shape), loss_shape)
        fits = True
    except ValueError:
        fits = False
    given = len(weight_shape)
    fits &= given == len(loss_shape) or loss_shape[:given] != weight_shape or set(weight_shape) <= {1}
    if fits:
        reduce_losses(OPS, np.zeros(loss_shape), np.ones(weight_shape), "mean")
        return
    with pytest.raises(ShapeError) as caught:
        reduce_losses(OPS, np.zeros(loss_shape), np.ones(weight_shape), "mean")
    assert str(weight_shape) in str(caught.value)
    assert str(loss_shape) in str(caught.value)


@given(
    hnp.array_shapes(min_dims=1, max_dims=2, min_side=2, max_side=4),
    hnp.array_shapes(min_dims=2, max_dims=4, min_side=2, max_side=4),
)
@example((4,), (4, 3))
@example((4,), (4, 3, 2))
@example((4, 2), (4, 2, 3))
def test_the_hint_for_a_weight_that_does_not_fit_works_when_followed(weight_shape, loss_shape):
    losses, weight = np.zeros(loss_shape), np.ones(weight_shape)
    try:
        reduce_losses(OPS, losses, weight, "mean")
    except ShapeError as error:
        hint = re.search(r"pass weight\[([:None, .]+)\]", str(error))
        if weight_shape == loss_shape[:1]:
            assert hint, "one weight per sample is the common mistake"
        assume(hint is not None)
        index = tuple({":": slice(None), "None": None, "...": ...}[part] for part in hint[1].split(", "))
        reduce_losses(OPS, losses, weight[index], "mean")


def test_the_error_of_a_weight_per_sample_names_shapes_rank_and_way_out():
    with pytest.raises(ShapeError) as caught:
        reduce_losses(OPS, np.zeros((5, 3)), np.ones(5), "mean", rank=2)
    for words in ("(5,)", "(5, 3)", "rank 2", "weight[:, None]"):
        assert words in str(caught.value)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_sequence_mean_needs_a_token_axis(shape):
    with pytest.raises(ShapeError, match=r"sequence_mean.*rank 3"):
        reduce_losses(OPS, np.zeros(shape), None, "sequence_mean", rank=3)


# Faults are counted

weird = st.sampled_from([0.0, 1.0, 2.5, -1.0, -0.5, math.nan, math.inf, -math.inf])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@by_dtype
@by_reduction
@given(data=st.data())
def test_bad_weights_and_losses_are_counted_and_the_row_stays_finite(dtype, reduction, data):
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)))
    losses = data.draw(hnp.arrays(dtype, shape, elements=weird))
    weights = data.draw(hnp.arrays(dtype, shape, elements=weird))
    row = reduce_losses(OPS, losses, weights, reduction).row(OPS)
    assert row.dtype == np.float64
    assert row.shape == (TENSOR_FIELDS,)
    assert np.isfinite(row).all()
    ledger = Ledger.of_row(row)
    flat = weights.ravel().tolist()
    assert ledger.negative_weights == sum(w < 0 for w in flat)
    assert ledger.nonfinite_weights == sum(not math.isfinite(w) for w in flat)
    verdict = check_step([Ledger(denominator=1.0), ledger], 1)
    if ledger.negative_weights or ledger.nonfinite_weights:
        assert type(verdict) is WeightError
    elif not all(
        math.isfinite(loss) for loss, w in zip(losses.ravel().tolist(), flat, strict=True) if w != 0
    ):
        assert type(verdict) is NonFiniteLossError
        assert ledger.numerator == 0
    else:
        assert verdict is None


@by_reduction
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_counted_once_per_micro_batch(reduction, bad):
    losses = np.array([[bad, bad], [1.0, bad]])
    for weight in (None, 1.0):
        ledger = ledger_of(losses, weight, reduction)
        assert ledger.nonfinite_losses == 1
        assert ledger.numerator == 0
        assert ledger.merge(ledger).nonfinite_losses == 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
def test_weights_whose_sum_overflows_do_not_pass_as_sound(reduction):
    """Each weight is finite; their sum is not, so the loss of the step cannot be told."""
    huge = ledger_of(np.full((1, 2), 0.5), np.full((1, 2), 1e308), reduction)
    other = ledger_of(np.ones((1, 2)), None, reduction)
    error = check_step([other, huge], 1)
    if error is None:
        assert merged([other, huge]).finish(reduction) == pytest.approx(0.5 if reduction == "mean" else 0.75)
    else:
        assert "rank 1" in str(error)


# Dtypes


@pytest.mark.parametrize(
    ("given_dtype", "sum_dtype"),
    [("float16", "float32"), ("int64", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_half_and_whole_numbers_are_summed_in_float32(given_dtype, sum_dtype):
    one = reduce_losses(OPS, np.array([1, 2, 3], dtype=given_dtype), np.array([1, 0, 2]), "mean")
    assert one.numerator.dtype == sum_dtype
    assert one.mean(OPS).dtype == sum_dtype
    assert one.mean(OPS) == pytest.approx(7 / 3, rel=1e-6)


def test_float16_losses_sum_beyond_the_range_of_float16():
    assert reduce_losses(OPS, np.full(100, 60000, dtype="float16"), None, "sum").numerator == 6e6


@by_reduction
def test_weights_and_counts_are_exact_in_float32(reduction):
    losses = np.zeros((1, 2), dtype=np.float32)
    one = reduce_losses(OPS, losses, np.array([[2.0**24, 1.0]]), reduction)
    assert one.weight == 2**24 + 1
    for value in (one.denominator, one.weight, one.elements, one.negative, one.nonfinite):
        assert np.asarray(value).dtype == np.float64
    if reduction == "mean":
        assert one.denominator == 2**24 + 1


def test_a_row_has_the_order_of_the_ledger_fields():
    one = reduce_losses(OPS, LOSSES, WEIGHTS, "mean")
    marked = replace(one, numerator=np.float64(1), denominator=np.float64(2), weight=np.float64(3))
    marked = replace(marked, elements=np.float64(4), negative=np.float64(6), nonfinite=np.float64(7))
    assert Ledger.of_row(marked.row(OPS)) == Ledger(
        numerator=1.0,
        denominator=2.0,
        weight=3.0,
        elements=4.0,
        micro_batches=1.0,
        negative_weights=6.0,
        nonfinite_weights=7.0,
        nonfinite_losses=0.0,
    )
