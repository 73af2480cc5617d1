"""The bucketing plan: every dense parameter once, kinds apart, in the order of readiness."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss.comm.plan import BUCKET_BYTES, FIRST_BUCKET_BYTES, Bucket, Member, ParameterInfo, plan_buckets
from hvdloss.errors import ConfigError

KINDS = {"float32 cpu": 4, "float64 cpu": 8, "float16 cpu": 2, "float32 cuda": 4}


@st.composite
def models(draw, max_kinds=4, zero_sized=True, sparse=True):
    """Parameters, and an order of readiness of some of them."""
    kinds = draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=max_kinds, unique=True))
    sides = st.integers(0 if zero_sized else 1, 5)
    parameters = [
        ParameterInfo(f"p{i}", tuple(shape), kind, KINDS[kind], is_sparse and sparse)
        for i, (shape, kind, is_sparse) in enumerate(
            draw(
                st.lists(
                    st.tuples(
                        st.lists(sides, max_size=3),
                        st.sampled_from(kinds),
                        st.sampled_from([False, False, False, True]),
                    ),
                    max_size=20,
                )
            )
        )
    ]
    order = draw(st.permutations(range(len(parameters))))
    return parameters, order[: draw(st.integers(0, len(order)))]


@st.composite
def groupings(draw, count):
    """Disjoint groups of some of `count` indices."""
    labels = draw(st.lists(st.integers(-1, 3), min_size=count, max_size=count))
    groups = [[i for i, label in enumerate(labels) if label == g] for g in range(4)]
    return [draw(st.permutations(group)) for group in groups if group]


sizes = st.integers(1, 400)


def dense(parameters):
    return [i for i, p in enumerate(parameters) if not p.sparse]


def full_order(parameters, order):
    return [*order, *(i for i in range(len(parameters)) if i not in set(order))]


def bytes_of(parameters, indices):
    return sum(math.prod(parameters[i].shape) * parameters[i].itemsize for i in indices)


def indices_of(bucket):
    return [member.index for member in bucket.members]


def check_layout(parameters, order, buckets):
    """What holds for every plan, however it was asked for."""
    placed = [i for bucket in buckets for i in indices_of(bucket)]
    assert sorted(placed) == dense(parameters)  # each exactly once, no sparse one
    position = {i: n for n, i in enumerate(full_order(parameters, order))}
    for bucket in buckets:
        assert bucket.members
        assert {parameters[i].kind for i in indices_of(bucket)} == {bucket.kind}
        start = 0
        for member in bucket.members:
            assert member.start == start
            assert member.stop - member.start == math.prod(parameters[member.index].shape)
            start = member.stop
        assert bucket.numel == start
        assert bucket.length == start + len(bucket.members)  # one flag per member
        ready = [position[i] for i in indices_of(bucket)]
        assert ready == sorted(ready)


@given(models(), sizes, sizes)
def test_every_dense_parameter_has_one_place(model, bucket_bytes, first_bytes):
    parameters, order = model
    buckets = plan_buckets(parameters, order, bucket_bytes=bucket_bytes, first_bytes=first_bytes)
    check_layout(parameters, order, buckets)


@given(models(), sizes, sizes)
def test_a_bucket_closes_as_soon_as_it_holds_enough(model, bucket_bytes, first_bytes):
    parameters, order = model
    buckets = plan_buckets(parameters, order, bucket_bytes=bucket_bytes, first_bytes=first_bytes)
    for kind in KINDS:
        own = [indices_of(bucket) for bucket in buckets if bucket.kind == kind]
        for number, indices in enumerate(own):
            limit = bucket_bytes if number else first_bytes
            assert bytes_of(parameters, indices[:-1]) < limit
            if number < len(own) - 1:
                assert bytes_of(parameters, indices) >= limit
        joined = [i for indices in own for i in indices]
        assert joined == [
            i
            for i in full_order(parameters, order)
            if parameters[i].kind == kind and not parameters[i].sparse
        ]


@given(models(), sizes, sizes)
def test_buckets_come_in_the_order_in_which_they_fill(model, bucket_bytes, first_bytes):
    parameters, order = model
    buckets = plan_buckets(parameters, order, bucket_bytes=bucket_bytes, first_bytes=first_bytes)
    position = {i: n for n, i in enumerate(full_order(parameters, order))}
    filled = [position[bucket.members[-1].index] for bucket in buckets]
    assert filled == sorted(filled)


@given(models(), sizes, sizes, st.one_of(st.none(), st.integers(0, 5)))
def test_a_plan_depends_on_its_arguments_only(model, bucket_bytes, first_bytes, groups):
    parameters, order = model

    def plan():
        return plan_buckets(
            parameters, order, bucket_bytes=bucket_bytes, first_bytes=first_bytes, groups=groups
        )

    assert plan() == plan()


def test_a_worked_example():
    f32, f64 = "float32 cpu", "float64 cpu"
    parameters = [
        ParameterInfo("a", (2, 3), f32, 4),
        ParameterInfo("b", (), f32, 4),
        ParameterInfo("table", (100, 8), f32, 4, sparse=True),
        ParameterInfo("c", (5,), f64, 8),
        ParameterInfo("none", (0, 7), f32, 4),
        ParameterInfo("d", (3,), f32, 4),
    ]
    assert plan_buckets(parameters, [5, 3, 2, 0], bucket_bytes=28, first_bytes=12) == [
        Bucket(f32, (Member(5, 0, 3),)),
        Bucket(f64, (Member(3, 0, 5),)),
        Bucket(f32, (Member(0, 0, 6), Member(1, 6, 7))),
        Bucket(f32, (Member(4, 0, 0),)),
    ]


def test_the_first_bucket_is_small_by_default():
    megabyte = 2**18  # float32 entries
    parameters = [ParameterInfo(f"p{i}", (megabyte,), "float32 cpu", 4) for i in range(60)]
    buckets = plan_buckets(parameters, range(59, -1, -1))
    assert [len(bucket.members) for bucket in buckets] == [1, 25, 25, 9]
    assert indices_of(buckets[0]) == [59]
    assert FIRST_BUCKET_BYTES < BUCKET_BYTES


def test_each_kind_has_its_own_small_first_bucket():
    parameters = [
        ParameterInfo(f"p{i}", (10,), kind, KINDS[kind])
        for i, kind in enumerate(["float32 cpu", "float64 cpu"] * 4)
    ]
    buckets = plan_buckets(parameters, [], bucket_bytes=10**6, first_bytes=1)
    assert [(bucket.kind, indices_of(bucket)) for bucket in buckets] == [
        ("float32 cpu", [0]),
        ("float64 cpu", [1]),
        ("float32 cpu", [2, 4, 6]),
        ("float64 cpu", [3, 5, 7]),
    ]


@pytest.mark.parametrize("groups", [None, 0, 1, 3, [], [[0, 1]]])
def test_nothing_to_plan(groups):
    assert plan_buckets([], [], groups=groups if isinstance(groups, int) else None) == []
    sparse = [ParameterInfo(f"s{i}", (2,), "float32 cpu", 4, sparse=True) for i in range(2)]
    assert plan_buckets(sparse, [1], groups=groups) == []


# Groups


@given(models(), st.integers(1, 8), sizes)
def test_a_number_of_groups_keeps_the_layout(model, groups, first_bytes):
    parameters, order = model
    buckets = plan_buckets(parameters, order, groups=groups, first_bytes=first_bytes)
    check_layout(parameters, order, buckets)
    kinds = {parameters[i].kind for i in dense(parameters)}
    assert len(buckets) <= groups + len(kinds)


@given(models(max_kinds=1, zero_sized=False), st.integers(1, 8))
def test_a_number_of_groups_is_aimed_at(model, groups):
    parameters, order = model
    buckets = plan_buckets(parameters, order, groups=groups)
    assert len(buckets) <= groups
    if groups == 1 and dense(parameters):
        assert len(buckets) == 1


@pytest.mark.parametrize(("groups", "lengths"), [(1, [12]), (2, [6, 6]), (3, [4, 4, 4]), (12, [1] * 12)])
def test_equal_parameters_fall_into_equal_groups(groups, lengths):
    parameters = [ParameterInfo(f"p{i}", (4,), "float32 cpu", 4) for i in range(12)]
    assert [len(b.members) for b in plan_buckets(parameters, [], groups=groups)] == lengths


def test_groups_that_do_not_divide_evenly_are_fewer_rather_than_more():
    parameters = [ParameterInfo(f"p{i}", (1,), "float32 cpu", 4) for i in range(6)]
    assert [len(b.members) for b in plan_buckets(parameters, [], groups=5)] == [2, 2, 2]


@given(models(), sizes, sizes, st.data())
def test_listed_groups_share_a_bucket_of_their_kind_with_nobody_else(model, bucket_bytes, first_bytes, data):
    parameters, order = model
    groups = data.draw(groupings(len(parameters)))
    buckets = plan_buckets(
        parameters, order, bucket_bytes=bucket_bytes, first_bytes=first_bytes, groups=groups
    )
    check_layout(parameters, order, buckets)
    held = [set(indices_of(bucket)) for bucket in buckets]
    for group in groups:
        for kind in KINDS:
            together = {i for i in group if parameters[i].kind == kind and not parameters[i].sparse}
            assert not together or together in held


# Errors


@pytest.mark.parametrize("sizes", [{"bucket_bytes": 0}, {"first_bytes": 0}, {"bucket_bytes": -4}])
def test_sizes_below_one_are_refused(sizes):
    ((name, value),) = sizes.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        plan_buckets([], [], **sizes)


TWO = [ParameterInfo(f"p{i}", (2,), "float32 cpu", 4) for i in range(2)]


@pytest.mark.parametrize("order", [[0, 0], [2], [-1], [0, 1, 0], [1, 5]])
def test_an_order_with_an_index_twice_or_out_of_range_is_refused(order):
    with pytest.raises(ConfigError, match="order="):
        plan_buckets(TWO, order)


@pytest.mark.parametrize("groups", [[[0], [0, 1]], [[0, 0]], [[2]], [[0], [-1]]])
def test_groups_with_an_index_twice_or_out_of_range_are_refused(groups):
    with pytest.raises(ConfigError, match="groups="):
        plan_buckets(TWO, [], groups=groups)


@given(st.lists(st.integers(0, 6), max_size=4))
def test_the_number_of_entries_is_the_product_of_the_shape(shape):
    assert ParameterInfo("p", tuple(shape), "float32 cpu", 4).numel == math.prod(shape)
