"""The agreement of the first step: all ranks go on alike, or all raise the same error."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdloss.comm.agreement import Consistent, check_consistency, check_items_consistent
from hvdloss.comm.communicator import OneProcess, simulate
from hvdloss.comm.plan import ParameterInfo
from hvdloss.errors import AgreementError, ConfigError, HvdlossError

MODEL = [
    ParameterInfo("embedding.weight", (10, 4), "float32 cpu", 4),
    ParameterInfo("linear.weight", (4, 1), "float32 cpu", 4),
    ParameterInfo("linear.bias", (1,), "float64 cpu", 8),
    ParameterInfo("scale", (), "float32 cpu", 4),
]
SETTINGS = {"objective": "mse", "reduction": "mean", "passes": 1, "groups": None}


def outcomes(size, *, parameters=None, checksums=None, order=None, settings=None):
    """Return what each rank gets: :class:`Consistent`, or the message of its AgreementError.

    Each argument maps a rank to what it holds; left out, all hold the same.
    """

    def work(c):
        mine = parameters(c.rank) if parameters else MODEL
        sums = checksums(c.rank) if checksums else [11, 22, 33, 44][: len(mine)]
        try:
            return check_consistency(
                c,
                mine,
                lambda: sums,
                order(c.rank) if order else [],
                settings(c.rank) if settings else SETTINGS,
                name="agreement",
            )
        except AgreementError as error:
            return str(error)

    return simulate(size, work)


def the_message(results):
    """Return the one message that all ranks raised."""
    assert all(isinstance(result, str) for result in results), results
    assert len(set(results)) == 1
    return results[0]


def on(ranks, value, other):
    return lambda rank: value if rank in ranks else other


# Agreeing


@pytest.mark.parametrize("size", [1, 2, 4])
def test_equal_ranks_agree(size):
    assert outcomes(size, order=lambda rank: [3, 2, 1, 0]) == [Consistent(MODEL, [3, 2, 1, 0])] * size


def test_one_process_agrees_with_itself():
    agreed = check_consistency(OneProcess(), MODEL, lambda: [1, 2, 3, 4], [1, 0], SETTINGS, name="agreement")
    assert agreed == Consistent(MODEL, [1, 0])


def test_nothing_to_agree_on():
    assert outcomes(2, parameters=lambda rank: [], settings=lambda rank: {}) == [Consistent([], [])] * 2


@settings(max_examples=30)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4))
def test_a_gradient_that_is_sparse_anywhere_is_sparse_everywhere(seen):
    def parameters(rank):
        return [replace(p, sparse=s) for p, s in zip(MODEL, seen[rank], strict=True)]

    union = [replace(p, sparse=any(rank[i] for rank in seen)) for i, p in enumerate(MODEL)]
    assert outcomes(len(seen), parameters=parameters) == [Consistent(union, [])] * len(seen)


@settings(max_examples=30)
@given(st.lists(st.permutations(range(4)), min_size=1, max_size=4), st.data())
def test_orders_that_differ_are_merged_by_mean_places(orders, data):
    orders = [order[: data.draw(st.integers(0, 4))] for order in orders]
    places = {i: [order.index(i) for order in orders if i in order] for i in range(4)}
    merged = sorted((i for i in places if places[i]), key=lambda i: (sum(places[i]) / len(places[i]), i))
    for agreed in outcomes(len(orders), order=lambda rank: orders[rank]):
        assert agreed.order == (orders[0] if len(set(map(tuple, orders))) == 1 else merged)


def test_a_rank_without_gradients_leaves_the_order_alone():
    for agreed in outcomes(3, order=on({1}, [], [3, 1, 0])):
        assert agreed.order == [3, 1, 0]


def test_checksums_are_whole_numbers_of_any_size():
    big = [2**64 - 1, 2**63, -(2**63), 0]
    assert outcomes(2, checksums=lambda rank: big) == [Consistent(MODEL, [])] * 2
    apart = outcomes(2, checksums=on({1}, [2**64 - 2, *big[1:]], big))
    assert "embedding.weight" in the_message(apart)


def test_it_costs_one_small_sum():
    calls = []

    class Counting(OneProcess):
        def all_gather_bytes(self, data, name):
            calls.append(("gather", name, len(data)))
            return super().all_gather_bytes(data, name)

        def all_reduce(self, array, name):
            calls.append(("sum", name, len(array)))
            return super().all_reduce(array, name)

    check_consistency(Counting(), MODEL, lambda: [1, 2, 3, 4], [], SETTINGS, name="first step")
    assert calls == [("sum", "first step", 32)]


# Differing

rank_sets = st.sets(st.integers(1, 3), min_size=1)
changes = {
    "name": {"name": "other"},
    "shape": {"shape": (7, 7)},
    "kind": {"kind": "float16 cpu", "itemsize": 2},
}


@pytest.mark.parametrize("field", changes)
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("ranks", [{1}, {2, 3}])
def test_a_parameter_that_differs_is_named_on_every_rank(field, index, ranks):
    changed = [replace(p, **changes[field]) if i == index else p for i, p in enumerate(MODEL)]
    message = the_message(outcomes(4, parameters=on(ranks, changed, MODEL)))
    assert f"parameter {index} ({MODEL[index].name})" in message
    assert field in message
    assert f"rank {min(ranks)} has" in message
    assert "rank 0 has" in message
    assert ("1 more rank" in message) == (len(ranks) == 2)


def test_the_difference_is_shown_from_both_sides():
    changed = [replace(MODEL[0], shape=(10, 5)), *MODEL[1:]]
    message = the_message(outcomes(2, parameters=on({1}, changed, MODEL)))
    assert "10, 5" in message
    assert "10, 4" in message


@settings(max_examples=30)
@given(rank_sets, st.integers(0, 3))
def test_other_values_are_named_with_their_ranks(ranks, index):
    sums = [11, 22, 33, 44]
    other = [*sums[:index], 99, *sums[index + 1 :]]
    message = the_message(outcomes(4, checksums=on(ranks, other, sums)))
    assert f"parameter {index} ({MODEL[index].name})" in message
    named = re.search(r"on rank\(s\) ([\d, ]+) than", message)
    assert named
    assert [int(rank) for rank in named[1].split(", ")] == sorted(ranks)
    assert "Give all ranks rank 0's" in message  # how is the framework's to say


def test_when_rank_0_is_the_odd_one_all_others_are_named():
    message = the_message(outcomes(3, checksums=on({0}, [0, 22, 33, 44], [11, 22, 33, 44])))
    assert "rank(s) 1, 2 " in message


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_another_number_of_parameters_is_named(count):
    others = [*MODEL, ParameterInfo("extra", (1,), "float32 cpu", 4)][:count]

    def checksums(rank):
        return [1] * (count if rank == 2 else 4)

    message = the_message(outcomes(3, parameters=on({2}, others, MODEL), checksums=checksums))
    assert "number of parameters" in message
    assert f"rank 2 has {count}, rank 0 has 4" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("objective", "mae"), ("reduction", "sum"), ("passes", 2), ("groups", [[0, 1]]), ("groups", 0)],
)
def test_a_setting_that_differs_is_named_on_every_rank(key, value):
    message = the_message(outcomes(3, settings=on({1}, {**SETTINGS, key: value}, SETTINGS)))
    assert message.startswith(f"{key} differs")
    assert f"rank 1 has {value!r}, rank 0 has {SETTINGS[key]!r}" in message


@pytest.mark.parametrize(("ranks", "named"), [({0, 1}, "rank 2"), ({1, 2}, "rank 1"), ({2}, "rank 2")])
def test_a_setting_that_only_some_ranks_have_is_named(ranks, named):
    message = the_message(outcomes(3, settings=on(ranks, {**SETTINGS, "compression": "fp16"}, SETTINGS)))
    assert message.startswith("compression differs")
    assert named in message


def test_settings_are_compared_before_parameters_and_parameters_before_values():
    def parameters(rank):
        return [replace(MODEL[0], name="x"), *MODEL[1:]] if rank else MODEL

    def checksums(rank):
        return [rank] * 4

    everything = outcomes(
        2,
        parameters=parameters,
        checksums=checksums,
        settings=on({1}, {**SETTINGS, "reduction": "sum"}, SETTINGS),
    )
    assert "reduction differs" in the_message(everything)
    assert "its name differs" in the_message(outcomes(2, parameters=parameters, checksums=checksums))


def test_a_parameter_frozen_on_one_rank_or_with_other_gradients_is_named():
    for change, words in (
        ({"trained": False}, ("linear.weight", "requires_grad", "rank 1 has False")),
        ({"gradient": "float32"}, ("linear.weight", "gradient", "rank 1 has 'float32'")),
    ):
        other = [MODEL[0], replace(MODEL[1], **change), *MODEL[2:]]
        message = the_message(outcomes(3, parameters=on([1], other, MODEL)))
        assert all(word in message for word in words), message


def test_the_first_parameter_that_a_rank_does_not_have_is_named():
    message = the_message(outcomes(3, parameters=on([1, 2], MODEL[:1] + MODEL[2:], MODEL)))
    assert "rank 1 has 3, rank 0 has 4" in message
    assert "rank(s) 1, 2 lack 'linear.weight'" in message


def items_of(size, work):
    """Return what each rank of :func:`check_items_consistent` gets: None, or its error as text."""

    def outcome(c):
        try:
            return check_items_consistent(c, lambda: work(c.rank), name="n", what="tensor", remedy="Mend it.")
        except (HvdlossError, KeyError) as error:
            return f"{type(error).__name__}: {error}"

    return simulate(size, outcome)


def test_items_that_are_equal_pass_and_others_are_named_on_every_rank():
    assert items_of(3, lambda rank: [("a", [1, 2]), ("b", "x")]) == [None] * 3
    one = items_of(3, lambda rank: [("a", [1, 2]), ("b", "y" if rank == 2 else "x")])
    assert (
        one
        == ["AgreementError: tensor 1 (b) differs between ranks: rank 2 has b: y, rank 0 has b: x. Mend it."]
        * 3
    )
    fewer = items_of(2, lambda rank: [("a", 1), ("b", 1)][: 2 - rank])
    assert len(set(fewer)) == 1
    assert "tensor 1 (b)" in fewer[0]
    assert "rank 1 has (none): nothing" in fewer[0]


def test_what_fails_on_all_ranks_is_raised_as_it_is_and_on_one_as_that_ranks():
    def failing(ranks):
        def work(rank):
            if rank in ranks:
                raise ConfigError("params['a'] is no tensor")
            return []

        return work

    assert set(items_of(3, failing([0, 1, 2]))) == {"ConfigError: params['a'] is no tensor"}
    (text,) = set(items_of(3, failing([1])))
    assert text.startswith("RankError: tensor: rank 1: ConfigError: params['a'] is no tensor")
