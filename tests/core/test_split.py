"""Models split over ranks: who holds which part, groups of a grid, and the order of a pipeline's passes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss.errors import AgreementError, ConfigError, ShapeError
from hvdloss.split.grid import grid_ranks
from hvdloss.split.messages import HEADER_BYTES, TensorKind, read_header, write_header
from hvdloss.split.parts import Cut, Parts, row_chunks
from hvdloss.split.schedule import (
    SCHEDULES,
    Pass,
    bubble_fraction,
    most_held,
    schedule_named,
    timeline,
)

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5)


@given(SIZES, st.integers(0, 1), st.integers(1, 3), st.integers(1, 3))
def test_the_parts_of_a_parameter_are_the_whole(sizes, axis, unit, blocks):
    cut = Cut(Parts(sum(sizes), len(sizes), sizes), axis=axis, unit=unit, blocks=blocks)
    held = [i for rank in range(len(sizes)) for r in cut.ranges(rank) for i in r]
    assert sorted(held) == list(range(cut.length))
    for rank in range(len(sizes)):
        own = (cut.size(rank), 2) if axis == 0 else (2, cut.size(rank))
        assert cut.whole_shape(own) == ((cut.length, 2) if axis == 0 else (2, cut.length))


@given(SIZES, st.integers(1, 3), st.integers(1, 3), st.integers(1, 7))
def test_overlaps_fill_a_part_from_pieces_of_the_whole(sizes, unit, blocks, step):
    cut = Cut(Parts(sum(sizes), len(sizes), sizes), unit=unit, blocks=blocks)
    whole = np.arange(cut.length)
    for rank in range(len(sizes)):
        own = np.full(cut.size(rank), -1)
        for first in range(0, cut.length, step):
            for source, target in cut.overlaps(rank, range(first, min(first + step, cut.length))):
                own[target] = whole[source]
        assert own.tolist() == [i for r in cut.ranges(rank) for i in r]


@given(st.integers(0, 200), st.integers(0, 2**17))
def test_chunks_are_drawn_as_one(rows, width):
    chunks = list(row_chunks(rows, width))
    assert [i for chunk in chunks for i in chunk] == list(range(rows))
    assert all(len(chunk) * width % 16 == 0 for chunk in chunks[:-1])
    assert all(len(chunk) * width >= 16 for chunk in chunks[1:])


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_a_grid_has_each_rank_once_on_every_side(model, replicas, stages):
    size = model * replicas * stages
    groups = grid_ranks(size, model, stages)
    for family, length in zip(groups, (model, replicas, stages), strict=True):
        assert sorted(rank for ranks in family for rank in ranks) == list(range(size))
        assert {len(ranks) for ranks in family} == {length}
        assert all(ranks == sorted(ranks) for ranks in family)
    # Two groups of different families share one rank at most: every rank is one place of the grid.
    for one, other in itertools.combinations(groups, 2):
        assert all(len(set(a) & set(b)) <= 1 for a in one for b in other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, 3), "model=3: 4 ranks cannot .* divisor of 4"),
        ((4, 0), "model=0"),
        ((4, 2, 4), "stages=4: 4 ranks with model=2 .* divisor of 2"),
        ((4, 1, 0), "stages=0"),
    ],
)
def test_grids_that_do_not_fit(arguments, words):
    with pytest.raises(ConfigError, match=words):
        grid_ranks(*arguments)


# -- schedules ----------------------------------------------------------------------------------------

STAGES, COUNT = st.integers(1, 5), st.integers(0, 12)


@pytest.mark.parametrize("name", SCHEDULES)
@given(stages=STAGES, count=COUNT)
def test_every_pass_is_done_once_and_gradients_follow(name, stages, count):
    for stage in range(stages):
        passes = SCHEDULES[name](stages, stage, count)
        for forward in (True, False):  # what travels in one direction has one order on all stages
            assert [p.micro_batch for p in passes if p.forward == forward] == list(range(count))
        assert all(passes.index(Pass(True, i)) < passes.index(Pass(False, i)) for i in range(count))


@pytest.mark.parametrize("name", SCHEDULES)
@given(stages=STAGES, count=st.integers(1, 12), forward=st.integers(1, 3), backward=st.integers(1, 3))
def test_no_stage_waits_for_ever_and_the_bubble_is_the_formulas(name, stages, count, forward, backward):
    spans = timeline(SCHEDULES[name], stages, count, forward, backward)
    whole = max(stage[-1].end for stage in spans) - min(stage[0].begin for stage in spans)
    assert whole == (count + stages - 1) * (forward + backward)
    idle = 1 - count * (forward + backward) / whole
    assert idle == pytest.approx(bubble_fraction(stages, count))


@given(stages=STAGES, count=st.integers(1, 12))
def test_one_forward_one_backward_holds_few_activations(stages, count):
    for stage in range(stages):
        assert most_held(SCHEDULES["1f1b"](stages, stage, count)) == min(stages - stage, count)
        assert most_held(SCHEDULES["gpipe"](stages, stage, count)) == count


def test_a_schedule_that_cannot_be():
    def backward_first(stages, stage, count):
        return [Pass(False, 0), Pass(True, 0)]

    with pytest.raises(ValueError, match="wait for each other"):
        timeline(backward_first, 2, 1)
    with pytest.raises(ConfigError, match="'gpipe', '1f1b'"):
        schedule_named("zero")


# -- what goes ahead of activations -------------------------------------------------------------------

KINDS = st.lists(
    st.builds(
        TensorKind,
        st.sampled_from(["float32", "bfloat16", "bool"]),
        st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
        st.booleans(),
    ),
    max_size=6,
)


@given(KINDS)
def test_a_header_says_what_follows(kinds):
    data = write_header(kinds, 0)
    assert len(data) == HEADER_BYTES
    assert read_header(data, 0) == kinds


def test_headers_that_cannot_be():
    with pytest.raises(ShapeError, match="40 tensors"):
        write_header([TensorKind("float32", (10**6,) * 3, True)] * 40, 1)
    for data in (b"[", b"7", b'[["float32", [-1], 1]]', b"[[3, [], 1]]", b'[["float32", [1.5], 1]]'):
        with pytest.raises(AgreementError, match="rank 1"):
            read_header(data, 1)
