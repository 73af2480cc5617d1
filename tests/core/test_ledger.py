"""The laws of ledgers: merging is a commutative monoid, packing loses nothing, judging is a function."""

from __future__ import annotations

import math
import re
from dataclasses import astuple, fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hvdloss.errors import (
    ConfigError,
    HvdlossError,
    NonFiniteGradientError,
    NonFiniteLossError,
    NoWeightError,
    UsageError,
    WeightError,
)
from hvdloss.losses import ledger as ledger_module
from hvdloss.losses.ledger import (
    COLUMN,
    LEDGER_WIDTH,
    NONFINITE_COLUMNS,
    NONFINITE_MODES,
    Ledger,
    check_nonfinite_mode,
    check_step,
    nonfinite_ranks,
    pack,
    unpack,
)
from hvdloss.losses.reduction import TENSOR_FIELDS

NAMES = [field.name for field in fields(Ledger)]
whole_numbers = st.integers(-(2**40), 2**40).map(float)
finite = st.floats(-1e100, 1e100)


def ledgers_of(numbers):
    return st.lists(numbers, min_size=LEDGER_WIDTH, max_size=LEDGER_WIDTH).map(lambda row: Ledger(*row))


counts = st.integers(0, 5).map(float)
sound_ledgers = st.builds(
    Ledger,
    numerator=st.floats(-1e6, 1e6),
    denominator=st.floats(0, 1e6),
    weight=st.floats(0, 1e6),
    elements=counts,
    micro_batches=counts,
    communication=st.floats(0, 10),
)


# Merging


@given(ledgers_of(whole_numbers), ledgers_of(whole_numbers), ledgers_of(whole_numbers))
def test_merging_is_associative(a, b, c):
    assert a.merge(b).merge(c) == a.merge(b.merge(c))


@given(ledgers_of(finite), ledgers_of(finite), ledgers_of(finite))
def test_merging_is_associative_to_rounding(a, b, c):
    left, right = astuple(a.merge(b).merge(c)), astuple(a.merge(b.merge(c)))
    scale = [sum(map(abs, three)) for three in zip(astuple(a), astuple(b), astuple(c), strict=True)]
    for x, y, s in zip(left, right, scale, strict=True):
        assert abs(x - y) <= 1e-15 * s


@given(ledgers_of(finite), ledgers_of(finite))
def test_merging_is_commutative(a, b):
    assert a.merge(b) == b.merge(a)


@given(ledgers_of(finite))
def test_zero_is_neutral(a):
    assert a.merge(Ledger.zero()) == a == Ledger.zero().merge(a)


@given(ledgers_of(whole_numbers), ledgers_of(whole_numbers))
def test_merging_adds_each_field(a, b):
    merged = a.merge(b)
    for name in NAMES:
        assert getattr(merged, name) == getattr(a, name) + getattr(b, name)


def test_a_ledger_cannot_be_changed():
    with pytest.raises(AttributeError):
        Ledger().weight = 1.0  # type: ignore[misc]


@given(st.lists(finite, min_size=TENSOR_FIELDS, max_size=TENSOR_FIELDS), st.floats(0, 5), st.floats(0, 5))
def test_a_row_becomes_the_first_fields(row, strays, communication):
    ledger = Ledger.of_row(np.array(row), untracked_backwards=strays, communication=communication)
    assert astuple(ledger) == (*row, 0.0, strays, 0.0, communication, *[0.0] * 10)
    assert all(type(value) is float for value in astuple(ledger))


# Packing


@given(st.lists(ledgers_of(finite), min_size=1, max_size=6))
def test_unpack_inverts_the_sum_of_packs(ledgers):
    table = sum(pack(ledger, rank, len(ledgers)) for rank, ledger in enumerate(ledgers))
    assert unpack(table) == ledgers


@given(ledgers_of(finite), st.integers(1, 6), st.data())
def test_pack_fills_its_own_row_only(ledger, size, data):
    rank = data.draw(st.integers(0, size - 1))
    table = pack(ledger, rank, size)
    assert table.shape == (size, LEDGER_WIDTH)
    assert table.dtype == np.float64
    assert tuple(table[rank]) == astuple(ledger)
    assert not np.delete(table, rank, axis=0).any()


@pytest.mark.parametrize(("rank", "size"), [(-1, 2), (2, 2), (0, 0)])
def test_pack_refuses_a_rank_out_of_range(rank, size):
    with pytest.raises(ConfigError, match=f"rank={rank}"):
        pack(Ledger(), rank, size)


def accepted_or_refused(table):
    """Return the ledgers, or None if `table` was refused in the one way that is allowed."""
    try:
        return unpack(table)
    except ConfigError:
        return None


numeric = st.one_of(hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.floating_dtypes(sizes=(16, 32, 64)))


@given(hnp.arrays(numeric, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=LEDGER_WIDTH + 1)))
def test_unpack_of_any_numbers_is_ledgers_or_a_config_error(table):
    ledgers = accepted_or_refused(table)
    number = table.dtype.kind != "b"  # truth values are no sums
    good = number and table.ndim == 2 and table.shape[1] == LEDGER_WIDTH and bool(np.isfinite(table).all())
    assert (ledgers is not None) == good
    if ledgers is not None:
        assert [astuple(one) for one in ledgers] == [tuple(row) for row in table.astype(float).tolist()]


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.just(LEDGER_WIDTH)), elements=finite),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.data(),
)
def test_unpack_refuses_one_bad_entry(table, bad, data):
    table[data.draw(st.integers(0, len(table) - 1)), data.draw(st.integers(0, LEDGER_WIDTH - 1))] = bad
    with pytest.raises(ConfigError, match="NaN or infinity"):
        unpack(table)


JUNK = {
    "None": None,
    "text": "ledger",
    "bytes": b"ledger",
    "number": 3.0,
    "dict": {},
    "object": object(),
    "empty list": [],
    "list of an empty list": [[]],
    "ragged rows": [[1.0] * LEDGER_WIDTH, [1.0]],
    "row of text": [["x"] * LEDGER_WIDTH],
    "row of None": [[None] * LEDGER_WIDTH],
    "row of dicts": [[{}] * LEDGER_WIDTH],
    "integers beyond float64": [[10**400] * LEDGER_WIDTH],
    "too wide": np.ones((2, LEDGER_WIDTH + 1)),
    "too narrow": np.ones((2, LEDGER_WIDTH - 1)),
    "one dimension": np.ones(LEDGER_WIDTH),
    "three dimensions": np.ones((1, 1, LEDGER_WIDTH)),
    "array of text": np.full((1, LEDGER_WIDTH), "1.0 kg"),
    "array of objects": np.full((1, LEDGER_WIDTH), object()),
    "complex numbers": np.full((1, LEDGER_WIDTH), 1j),
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
@pytest.mark.filterwarnings("error")
def test_unpack_refuses_junk(junk):
    with pytest.raises(ConfigError, match="ledger table"):
        unpack(junk)


scalars = st.one_of(
    st.none(), st.text(max_size=4), st.binary(max_size=4), st.floats(), st.integers(), st.booleans()
)
junk_tables = st.one_of(
    scalars,
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=LEDGER_WIDTH), max_leaves=3 * LEDGER_WIDTH),
    st.lists(st.lists(scalars, min_size=LEDGER_WIDTH, max_size=LEDGER_WIDTH), max_size=3),
    st.dictionaries(st.text(max_size=2), st.floats(), max_size=3),
)


@given(junk_tables)
def test_unpack_of_anything_is_ledgers_or_a_config_error(junk):
    ledgers = accepted_or_refused(junk)
    if ledgers is not None:
        assert all(math.isfinite(value) for one in ledgers for value in astuple(one))


# Judging

FAULT_COLUMNS = [  # in order of precedence
    ("negative_weights", WeightError, "below zero"),
    ("nonfinite_weights", WeightError, "NaN or infinite"),
    ("nonfinite_losses", NonFiniteLossError, "loss is NaN or infinite"),
    ("untracked_backwards", UsageError, "without passing through"),
    ("nonfinite_gradients", NonFiniteGradientError, "the loss is finite, but a gradient is NaN or infinite"),
]


def ranks_named(message):
    """Return the ranks after "on rank" or "on ranks"."""
    found = re.search(r"on ranks? (\d+(?:, \d+)*)", message)
    assert found, message
    return [int(rank) for rank in found[1].split(", ")]


@given(st.lists(sound_ledgers, min_size=1, max_size=5), st.integers(1, 10**6))
def test_a_step_with_weight_and_without_faults_is_sound(ledgers, step):
    ledgers[-1] = replace(ledgers[-1], denominator=ledgers[-1].denominator + 1.0)
    assert check_step(ledgers, step) is None


@pytest.mark.parametrize(("field", "kind", "words"), FAULT_COLUMNS)
@pytest.mark.parametrize("ranks", [[0], [2], [0, 2], [0, 1, 2]])
def test_each_fault_is_named_with_its_step_and_ranks(field, kind, words, ranks):
    sound = Ledger(numerator=1.0, denominator=2.0, weight=2.0, elements=2.0, micro_batches=1.0)
    ledgers = [replace(sound, **{field: 1.0}) if rank in ranks else sound for rank in range(3)]
    error = check_step(ledgers, 17)
    assert type(error) is kind
    assert "step 17" in str(error)
    assert words in str(error)
    assert ranks_named(str(error)) == ranks
    assert error.ranks == tuple(ranks)  # for a record


@given(
    st.lists(sound_ledgers, min_size=1, max_size=4),
    st.dictionaries(
        st.sampled_from([field for field, _, _ in FAULT_COLUMNS]),
        st.sets(st.integers(0, 3), min_size=1),
        min_size=1,
    ),
)
def test_of_several_faults_the_first_cause_is_told(ledgers, faults):
    expected = None
    for field, kind, _ in FAULT_COLUMNS:
        ranks = sorted(rank for rank in faults.get(field, ()) if rank < len(ledgers))
        for rank in ranks:
            ledgers[rank] = replace(ledgers[rank], **{field: 2.0})
        if ranks and expected is None:
            expected = (kind, ranks)
    error = check_step(ledgers, 1)
    if expected is None:
        assert error is None or type(error) is NoWeightError
    else:
        assert (type(error), ranks_named(str(error))) == expected


@pytest.mark.parametrize("size", [1, 2, 5])
def test_no_weight_anywhere_is_an_error(size):
    error = check_step([Ledger(micro_batches=1.0)] * size, 3)
    assert type(error) is NoWeightError
    assert "step 3" in str(error)
    assert f"{size} rank(s)" in str(error)


def test_one_rank_with_weight_is_enough():
    assert check_step([Ledger(), Ledger(denominator=0.25), Ledger()], 1) is None


# Policies for what is not finite

TOLERATED = ("nonfinite_losses", "nonfinite_gradients")
some_faults = st.dictionaries(
    st.sampled_from([field for field, _, _ in FAULT_COLUMNS]), st.sets(st.integers(0, 3), min_size=1)
)


def spoiled(ledgers, faults):
    """Return the ledgers with these faults, by field the ranks that have it."""
    return [
        replace(one, **{field: 1.0 for field, ranks in faults.items() if rank in ranks})
        for rank, one in enumerate(ledgers)
    ]


def test_the_columns_of_the_tolerated_faults():
    assert NAMES[NONFINITE_COLUMNS] == list(TOLERATED) == [name for name in NAMES if COLUMN[name] in (7, 8)]


@given(st.lists(sound_ledgers, min_size=4, max_size=4), some_faults, st.sampled_from(["skip", "drop"]))
def test_a_policy_forgives_what_is_not_finite_and_nothing_else(ledgers, faults, policy):
    ledgers[0] = replace(ledgers[0], denominator=1.0)
    others = {field: ranks for field, ranks in faults.items() if field not in TOLERATED}
    told = check_step(spoiled(ledgers, faults), 9, policy)
    alone = check_step(spoiled(ledgers, others), 9, policy)
    strict = check_step(spoiled(ledgers, others), 9)
    assert (type(told), str(told)) == (type(alone), str(alone)) == (type(strict), str(strict))


@given(st.lists(sound_ledgers, min_size=4, max_size=4), some_faults)
def test_offenders_are_those_that_are_not_finite(ledgers, faults):
    ledgers = spoiled(ledgers, faults)
    losses, gradients = (faults.get(field, set()) for field in TOLERATED)
    assert nonfinite_ranks(ledgers) == sorted(losses | gradients)
    assert nonfinite_ranks(ledgers, gradients=False) == sorted(losses)


@given(st.lists(sound_ledgers, min_size=4, max_size=4), some_faults)
def test_gradients_can_be_judged_later(ledgers, faults):
    """Judging without gradients, and then gradients alone, tells what judging once tells."""
    ledgers[0] = replace(ledgers[0], denominator=1.0)
    ledgers = spoiled(ledgers, faults)
    first = check_step(ledgers, 9, gradients=False)
    assert not isinstance(first, NonFiniteGradientError)
    whole = check_step(ledgers, 9)
    if first is None:
        assert (whole is None) == (not faults.get("nonfinite_gradients"))
    else:
        assert (type(first), str(first)) == (type(whole), str(whole))


def test_dropping_every_rank_leaves_no_step():
    gone = Ledger(micro_batches=1.0, nonfinite_losses=1.0)
    error = check_step(
        [gone, replace(gone, nonfinite_losses=0.0, nonfinite_gradients=1.0), Ledger()], 4, "drop"
    )
    assert type(error) is NoWeightError
    assert "any of 3 rank(s) that is left after dropping ranks 0, 1, whose" in str(error)
    assert check_step([gone, Ledger(denominator=1.0)], 4, "drop") is None


@pytest.mark.parametrize("policy", ["ignore", "", None, 1])
def test_an_unknown_policy_is_refused(policy):
    with pytest.raises(ConfigError, match=r"nonfinite=.*'raise', 'skip', 'drop'"):
        check_nonfinite_mode(policy)
    assert [check_nonfinite_mode(known) for known in NONFINITE_MODES] == list(NONFINITE_MODES)


@given(st.lists(ledgers_of(st.sampled_from([0.0, 0.0, 1.0, 2.0])), min_size=1, max_size=4))
def test_judging_depends_on_its_arguments_only(ledgers):
    """What makes the ranks agree: every rank judges its own copy of the same table."""
    size = len(ledgers)
    verdicts = []
    for _ in range(size):
        table = sum(pack(ledger, rank, size) for rank, ledger in enumerate(ledgers))
        verdicts.append(check_step(unpack(table), 5))
        check_step([Ledger(untracked_backwards=1.0)], 6)  # what was judged in between leaves no trace
    assert len({(type(verdict), str(verdict)) for verdict in verdicts}) == 1
    assert verdicts[0] is None or isinstance(verdicts[0], HvdlossError)


def test_the_columns_of_faults_are_all_that_make_a_step_unsound():
    names = list(ledger_module.COLUMN)
    assert names[ledger_module.FAULT_COLUMNS] == [
        "negative_weights",
        "nonfinite_weights",
        "nonfinite_losses",
        "nonfinite_gradients",
        "untracked_backwards",
        "failed",
    ]
    assert names[ledger_module.NONFINITE_COLUMNS] == ["nonfinite_losses", "nonfinite_gradients"]
    sound = Ledger(numerator=1.0, denominator=1.0, weight=1.0, elements=1.0)
    for name in names[4:]:
        error = check_step([sound, Ledger(**{**vars(sound), name: 1.0})], 3)
        assert (error is not None) == (name in names[ledger_module.FAULT_COLUMNS]), name
        assert error is None or "rank 1" in str(error) or "rank(s) 1" in str(error), name
