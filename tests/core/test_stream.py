"""Streams: pieces of files, lanes that take turns, items of iterables, and ends that nobody knows."""

from __future__ import annotations

import collections
import functools
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdloss import ConfigError, RankError, UsageError, simulate
from hvdloss.comm.agreement import raise_on_all_ranks, run_on_all_ranks
from hvdloss.data import Epoch, Pieces, RowGroups
from hvdloss.data.stream import LaneSchedule, SharedIterable, read_batches
from hvdloss.data.uneven import Uneven, describe_batch, empty_batch, empty_like
from hvdloss.errors import AgreementError, DataError
from hvdloss.train import TransformedBatches

MANY = settings(max_examples=60, deadline=None)
groups = st.lists(st.integers(0, 9), min_size=1, max_size=12)


class Rows:
    """A source in memory: every row is its own number."""

    def __init__(self, rows):
        self.starts = np.concatenate([[0], np.cumsum(rows)])

    def read(self, part):
        return {"row": np.arange(self.starts[part], self.starts[part + 1])}


@MANY
@given(rows=groups, data=st.data())
def test_pieces_are_cut_like_lists(rows, data):
    pieces = Pieces([[part, 0, count] for part, count in enumerate(rows)])
    whole = [(part, place) for part, count in enumerate(rows) for place in range(count)]

    def listed(pieces):
        return [(part, place) for part, start, end in pieces for place in range(start, end)]

    a, b = (data.draw(st.integers(-3, len(whole) + 3)) for _ in range(2))
    assert len(pieces) == len(whole)
    assert listed(pieces[a:b]) == whole[a:b]
    assert listed(pieces[a:b][1:3]) == whole[a:b][1:3]
    assert listed(Pieces.joined([pieces[a:], pieces[:a]])) == whole[a:] + whole[:a]
    with pytest.raises(ConfigError, match="runs of rows"):
        pieces[::2]


@MANY
@given(
    rows=groups,
    lanes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    shuffle=st.booleans(),
    whole=st.booleans(),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_every_row_is_read_once_however_often_ranks_change(rows, lanes, shuffle, whole, seed, data):
    rule = RowGroups(rows, shuffle=shuffle, whole=whole, seed=seed)
    epoch, seen = Epoch(rule, lanes[0], 2), []
    for number, count in enumerate(lanes):
        if number:
            epoch = Epoch.from_state_dict(rule, json.loads(json.dumps(epoch.state_dict())), count)
        left = epoch.remaining
        taken = [data.draw(st.integers(0, len(pieces))) for pieces in left]
        if number == len(lanes) - 1:
            taken = [len(pieces) for pieces in left]
        for pieces, count in zip(left, taken, strict=True):
            got = [b["row"] for b in read_batches(Rows(rows), rule, 2, pieces[:count], 4)]
            assert [len(b) for b in got[:-1]] == [4] * (len(got) - 1)
            flat = np.concatenate(got) if got else np.zeros(0, int)
            np.testing.assert_array_equal(flat, rule.row_numbers(pieces[:count], 2))
            seen += flat.tolist()
        epoch.advance(taken)
    assert epoch.exhausted
    assert sorted(seen) == list(range(sum(rows)))
    if not whole:
        sizes = [len(pieces) for pieces in rule.shards(lanes[0])]
        assert max(sizes) - min(sizes) <= 1
    if not shuffle and not whole:
        assert np.concatenate([rule.row_numbers(p, 0) for p in rule.shards(3)]).tolist() == sorted(seen)


def test_shares_of_ranks_and_their_lanes():
    rule = RowGroups([10] * 9, shares=[1, 2])
    assert [len(p) for p in rule.shards(2)] == [30, 60]
    assert [len(p) for p in rule.shards(4)] == [15, 15, 30, 30]
    with pytest.raises(ConfigError, match="3 ranks"):
        rule.shards(3)
    whole = RowGroups([8, 1, 7, 2, 6, 3], whole=True).shards(3)
    assert sorted(len(p) for p in whole) == [9, 9, 9]
    assert RowGroups([5, 5], seed=1).shards(1, 0)[0].table.tolist() != [[0, 0, 5]]
    with pytest.raises(ConfigError, match="rows="):
        RowGroups([3, -1])


@MANY
@given(
    left=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    lanes=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    steps=st.integers(0, 40),
)
def test_turns_are_those_of_workers(left, lanes, batch_size, steps):
    rule = RowGroups([1] * 200, shares=None, shuffle=False)
    counts = [*left, *left[::-1], *left][: len(left) - len(left) % lanes] or [left[0]] * lanes
    epoch = Epoch(rule, len(counts))
    epoch.shards = [Pieces([[0, 0, count]]) for count in counts]
    turns = LaneSchedule(epoch, lanes, batch_size)
    expected = []
    for rank in range(len(counts) // lanes):
        own = counts[rank * lanes : (rank + 1) * lanes]
        given = [0] * lanes
        done = 0
        for lane in itertools.cycle(range(lanes)):
            if done == steps or given == own:
                break
            if given[lane] < own[lane]:
                given[lane] = min(given[lane] + batch_size, own[lane])
                done += 1
        expected += given
    assert turns.consumed(steps) == expected
    most = [sum(-(-c // batch_size) for c in counts[i : i + lanes]) for i in range(0, len(counts), lanes)]
    assert turns.steps == max(most)


@MANY
@given(
    n=st.integers(0, 40),
    parts=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), max_size=3),
    lanes=st.integers(1, 5),
    data=st.data(),
)
def test_items_are_used_once_however_often_lanes_change(n, parts, lanes, data):
    position, seen = SharedIterable(), []
    for count, _ in parts:
        own = [list(position.items_for(range(n), count, lane)) for lane in range(count)]
        taken = [data.draw(st.integers(0, len(items))) for items in own]
        seen += [i for items, k in zip(own, taken, strict=True) for i in items[:k]]
        position = SharedIterable.from_state_dict(json.loads(json.dumps(position.state_dict(taken))))
    seen += [i for lane in range(lanes) for i in position.items_for(range(n), lanes, lane)]
    assert sorted(seen) == list(range(n))


@pytest.mark.parametrize("state", [None, {}, {"version": 1, "epoch": 0, "parts": [[-1]], "sharding": {}}])
def test_what_is_no_position_is_refused(state):
    with pytest.raises(ConfigError, match="no position in an iterable"):
        SharedIterable.from_state_dict(state)


# -- ends that nobody knows -----------------------------------------------------------------------


class Ledger:
    """An optimizer's ledger among simulated ranks."""

    def __init__(self, ranks, patience=1):
        self.ranks, self.patience, self.sync_status, self.told = ranks, patience, (0, False), (False, None)

    def send_status(self, more, error=None):
        self.told = (more, error)

    def step(self):
        more, error = self.told
        table = self.ranks.all_reduce(np.array([float(more), float(error is not None)]), "ledger")
        self.sync_status = (self.sync_status[0] + 1, bool(table[0]))
        if table[1]:
            raise_on_all_ranks(self.ranks, error, "failed")


def array(value):
    return (str(value.dtype), value.shape) if isinstance(value, np.ndarray) else None


def make(kind, shape):
    return np.zeros(shape, kind)


def zero(value):
    return value[:0] if isinstance(value, np.ndarray) else None


HELD = {"array": array, "zero": zero, "make": make}


def loop(ranks, batches, passes=1):
    """Return the sizes of the batches this rank was given, and what ended it."""
    ledger = Ledger(ranks, passes)
    uneven = Uneven(batches, ledger, lambda: ranks, **HELD)
    sizes, error = [], ""
    try:
        for number, batch in enumerate(uneven):
            assert batch["x"].shape[1:] == (2,)
            assert batch["x"].dtype == np.float32
            sizes.append(len(batch["x"]))
            assert len(batch["t"][1]) == sizes[-1]
            if (number + 1) % passes == 0:
                ledger.step()
    except RankError as found:
        error = str(found)
    return sizes, error


def batch(rows):
    return {"x": np.ones((rows, 2), np.float32), "t": (np.float64(1), ["w"] * rows)}


@MANY
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=5), passes=st.integers(1, 3))
def test_ranks_end_together_and_give_what_they_have(counts, passes):
    def work(ranks):
        return loop(ranks, (batch(1 + i % 3) for i in range(counts[ranks.rank])), passes)

    steps = -(-max(counts) // passes) * passes
    for rank, (sizes, error) in enumerate(simulate(len(counts), work)):
        own = [1 + i % 3 for i in range(counts[rank])]
        assert sizes == own + [0] * (steps - len(own))
        assert not error


@MANY
@given(
    counts=st.lists(st.integers(0, 5), min_size=2, max_size=4),
    bad=st.integers(0, 3),
    passes=st.integers(1, 2),
)
def test_a_failure_is_raised_on_all_ranks_after_what_was_read(counts, bad, passes):
    bad %= len(counts)

    def own(rank):
        for _ in range(counts[rank]):
            yield batch(2)
        if rank == bad:
            raise DataError("file f, row group 3: torn")

    found = simulate(len(counts), lambda ranks: loop(ranks, own(ranks.rank), passes))
    when = "" if counts[bad] else "before the first step: "
    assert {error for _, error in found} == {f"{when}rank {bad}: file f, row group 3: torn"}
    if counts[bad]:
        assert found[bad][0][: counts[bad]] == [2] * counts[bad]


def test_a_loop_without_steps_is_refused():
    def work(ranks):
        ledger = Ledger(ranks)
        uneven = Uneven([batch(1)] * (1 + ranks.rank), ledger, lambda: ranks, **HELD)
        with pytest.raises(UsageError, match="the optimizer made no step"):
            list(Uneven([np.ones(1)], ledger, lambda: ranks, **HELD))
        with pytest.raises(UsageError, match="no state_dict"):
            uneven.state_dict()
        with pytest.raises(UsageError, match="no load_state_dict"):
            uneven.load_state_dict({})

    simulate(2, work)
    with pytest.raises(ConfigError, match="batches=int cannot be iterated"):
        Uneven(3, None, None, **HELD)


def test_what_fails_on_one_rank_fails_together():
    def work(ranks):
        def opened():
            if ranks.rank == 1:
                raise OSError("disk on fire")
            return 1

        with pytest.raises(RankError, match="rank 1: OSError: disk on fire"):
            run_on_all_ranks(ranks, opened, "open", "files")
        with pytest.raises(AgreementError, match="files differ between ranks: rank 1 has 1, rank 0 has 0"):
            run_on_all_ranks(ranks, lambda: ranks.rank, "open", "files")
        assert run_on_all_ranks(ranks, lambda: {"a": [1]}, "open", "files") == {"a": [1]}

    simulate(3, work)


Pair = collections.namedtuple("Pair", "x y")


class Named(dict):
    """A batch as some libraries have them."""


def test_a_batch_without_rows_is_held_as_others_are():
    x = np.ones((3, 2))
    batch = Named({0: Pair(x, [x, x]), "words": ["a", "b", "c"], "rows": [{"a": x}, 2], "one": np.float64(1)})
    empty = empty_like(batch, zero)
    assert type(empty) is Named
    assert type(empty[0]) is Pair
    assert empty[0].x.shape == empty[0].y[1].shape == empty["rows"][0]["a"].shape == (0, 2)
    assert empty["words"] == []
    told = json.loads(json.dumps(describe_batch(batch, array)))
    other = empty_batch(told, lambda kind, shape: np.zeros(shape, kind))
    assert set(other) == {0, "words", "rows", "one"}
    assert other[0][0].shape == (0, 2)
    with pytest.raises(ConfigError, match="hold a set, which cannot be made without rows"):
        describe_batch((x, {1}), array)


class Loader:
    """Batches with a position, as the adapters' loaders have one."""

    def __init__(self, n):
        self.n, self.given = n, 0

    def __iter__(self):
        for number in range(self.given, self.n):
            self.given = number + 1
            yield np.full(1, number)
        self.given = 0

    def get_position(self):
        return self.given

    def set_position(self, position):
        self.given = position

    def state_dict(self, position=None):
        return self.given if position is None else position


class Foreign:
    """Batches of another library, with a position."""

    def __init__(self):
        self.inner = Loader(6)

    def __iter__(self):
        return iter(self.inner)

    def state_dict(self):
        return {"at": self.inner.given}

    def load_state_dict(self, state):
        self.inner.given = state["at"]


def test_a_loop_that_was_left_goes_on_with_the_batch_that_was_read_ahead():
    def work(ranks):
        changed = functools.partial(TransformedBatches, transform=lambda batch, rng: batch)
        sources = (
            lambda: Loader(6),
            lambda: iter([np.full(1, i) for i in range(6)]),
            lambda: changed(Loader(6)),
            Foreign,
        )
        for data in sources:
            ledger = Ledger(ranks)
            batches = data()
            uneven = Uneven(
                batches,
                ledger,
                lambda: ranks,
                array=array,
                zero=zero,
                make=lambda kind, shape: np.zeros(shape),
            )
            seen = []
            for stop in (0, 2, 9):
                for number, one in enumerate(uneven):
                    ledger.step()
                    seen += one.tolist()
                    if number == stop:
                        break
                if isinstance(batches, Loader) and stop < 9:
                    assert uneven.state_dict() == batches.state_dict() == len(seen)
            assert seen == [0, 1, 2, 3, 4, 5]
            if isinstance(batches, Loader):
                assert uneven.state_dict() == 0  # the end of an epoch is the beginning of the next

    simulate(2, work)
