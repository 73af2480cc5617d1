"""Sharding: the union is the data set, shards are disjoint, and an epoch goes on where it stopped."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdloss.data import (
    Contiguous,
    Dirichlet,
    Epoch,
    Grouped,
    Sharding,
    Shuffled,
    Stratified,
    Strided,
    Weighted,
)
from hvdloss.errors import ConfigError


def labels(n, kinds=4, seed=3):
    return np.random.default_rng(seed).integers(0, kinds, n)


KINDS = {
    "contiguous": lambda n, seed: Contiguous(n, seed=seed),
    "strided": lambda n, seed: Strided(n, seed=seed),
    "shuffled": lambda n, seed: Shuffled(n, seed=seed),
    "weighted": lambda n, seed: Weighted(np.arange(1.0, n + 1), seed=seed),
    "weighted with zeros": lambda n, seed: Weighted(labels(n), seed=seed),
    "with replacement": lambda n, seed: Weighted(np.ones(n), replacement=True, draws=2 * n, seed=seed),
    "stratified": lambda n, seed: Stratified(labels(n), seed=seed),
    "grouped": lambda n, seed: Grouped(labels(n, 7), seed=seed),
    "dirichlet": lambda n, seed: Dirichlet(labels(n), 0.3, seed=seed),
}
MANY = settings(max_examples=60, deadline=None)
kinds = st.sampled_from(sorted(KINDS))


def counted(arrays):
    return collections.Counter(int(i) for a in arrays for i in a)


@MANY
@given(
    kind=kinds,
    n=st.integers(1, 60),
    ranks=st.integers(1, 9),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_shards_are_the_epoch_and_nothing_else(kind, n, ranks, epoch, seed):
    sharding = KINDS[kind](n, seed)
    shards = sharding.shards(ranks, epoch)
    assert len(shards) == ranks
    assert counted(shards) == counted([sharding.order(epoch)])
    if kind not in ("weighted with zeros", "with replacement"):
        assert counted(shards) == collections.Counter(range(n))
    again = KINDS[kind](n, seed).shards(ranks, epoch)
    assert all((a == b).all() for a, b in zip(shards, again, strict=True))
    assert all(shard.dtype == np.int64 for shard in shards)


@MANY
@given(
    kind=kinds,
    n=st.integers(1, 60),
    seed=st.integers(0, 99),
    stages=st.lists(
        st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(1, 6)), min_size=1, max_size=5
    ),
)
def test_an_interrupted_epoch_uses_every_sample_exactly_once(kind, n, seed, stages):
    sharding, used = KINDS[kind](n, seed), collections.Counter()
    state = None
    for ranks, steps, batch_size in [*stages, (3, 10**6, 7)]:
        epoch = (
            Epoch(sharding, ranks, 2)
            if state is None
            else Epoch.from_state_dict(KINDS[kind](n, seed), state, ranks)
        )
        steps = min(steps, epoch.steps(batch_size))
        for rank in range(ranks):
            for batch in list(epoch.batches(rank, batch_size))[:steps]:
                used.update(batch.tolist())
        epoch.advance_steps(steps, batch_size)
        state = json.loads(json.dumps(epoch.state_dict()))
    assert epoch.exhausted
    assert used == counted([sharding.order(2)])


def test_without_a_change_of_ranks_each_goes_on_where_it_was():
    epoch = Epoch(Shuffled(40, seed=1), 3, 4)
    epoch.advance_steps(2, 5)
    again = Epoch.from_state_dict(Shuffled(40, seed=1), epoch.state_dict(), 3)
    assert all((a == b).all() for a, b in zip(epoch.remaining, again.remaining, strict=True))
    assert again.state_dict() == epoch.state_dict()


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_global_batches_do_not_depend_on_the_number_of_ranks(ranks):
    """Twelve samples a step are the same twelve, for equal batches on any number of ranks."""
    order = Shuffled(60, seed=9).order(1)
    epoch = Epoch(Shuffled(60, seed=9), ranks, 1)
    steps = zip(*(epoch.batches(rank, 12 // ranks) for rank in range(ranks)), strict=True)
    for number, batches in enumerate(steps):
        assert set(np.concatenate(batches).tolist()) == set(order[12 * number : 12 * number + 12].tolist())


def test_epochs_differ_and_seeds_differ():
    shuffled = Shuffled(100, seed=1)
    assert (shuffled.order(0) != shuffled.order(1)).any()
    assert (shuffled.order(0) != Shuffled(100, seed=2).order(0)).any()


@MANY
@given(n=st.integers(0, 60), shares=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum))
def test_shares_are_kept(n, shares):
    for sharding in (
        Contiguous(n, shares=shares),
        Shuffled(n, shares=shares),
        Stratified(labels(n), shares=shares),
    ):
        sizes = [len(shard) for shard in sharding.shards(len(shares))]
        assert sum(sizes) == n
        assert all(abs(size - n * share / sum(shares)) < 1 for size, share in zip(sizes, shares, strict=True))


@MANY
@given(n=st.integers(1, 200), ranks=st.integers(1, 6), seed=st.integers(0, 99))
def test_strata_are_the_same_on_all_ranks_to_a_sample(n, ranks, seed):
    of = labels(n, 5, seed)
    shards = Stratified(of, seed=seed).shards(ranks)
    counts = np.array([np.bincount(of[shard], minlength=5) for shard in shards])
    assert (counts.max(0) - counts.min(0) <= 1).all()
    sizes = counts.sum(1)
    assert sizes.max() - sizes.min() <= 1


def test_batches_of_strata_have_the_mixture_too():
    of = np.repeat([0, 1, 2], [60, 30, 10])
    for shard in Stratified(of, seed=3).shards(2):
        for batch in np.split(shard, 5):
            assert np.bincount(of[batch], minlength=3) == pytest.approx([6, 3, 1], abs=1)


@MANY
@given(n=st.integers(1, 200), ranks=st.integers(1, 6), seed=st.integers(0, 99), taken=st.integers(0, 30))
def test_no_group_is_split_and_shards_differ_by_a_group_at_most(n, ranks, seed, taken):
    of = labels(n, 12, seed)
    epoch = Epoch(Grouped(of, seed=seed), ranks)
    sizes = [len(shard) for shard in epoch.shards]
    assert max(sizes) - min(sizes) <= np.bincount(of).max()
    epoch.advance([min(taken, size) for size in sizes])
    for shards in (
        epoch.shards,
        Epoch.from_state_dict(Grouped(of, seed=seed), epoch.state_dict(), ranks + 1).shards,
    ):
        found = [set(of[shard].tolist()) for shard in shards]
        assert all(not a & b for i, a in enumerate(found) for b in found[:i])


def test_draws_follow_the_weights():
    weights = np.array([0.0, 1.0, 3.0])
    drawn = Weighted(weights, replacement=True, draws=40_000, seed=1).order(0)
    assert np.bincount(drawn, minlength=3) / 40_000 == pytest.approx([0, 0.25, 0.75], abs=0.01)
    first = [int(Weighted(weights, draws=1, seed=seed).order(0)[0]) for seed in range(2000)]
    assert np.mean(np.array(first) == 2) == pytest.approx(0.75, abs=0.04)


def test_a_small_alpha_skews_and_a_large_one_does_not():
    of = labels(2000)
    spread = []
    for alpha in (0.05, 1000.0):
        shards = Dirichlet(of, alpha, seed=2).shards(4)
        shares = np.array([np.bincount(of[shard], minlength=4) for shard in shards]) / np.bincount(of)
        spread.append(shares.max(0).mean())
        epochs = [set(s.tolist()) for s in Dirichlet(of, alpha, seed=2).shards(4, epoch=3)]
        assert epochs == [set(s.tolist()) for s in shards]  # who has what stays
    assert spread[0] > 0.7
    assert spread[1] < 0.3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Contiguous(-1), ["samples=-1"]),
        (lambda: Contiguous(True), ["samples=True"]),
        (lambda: Shuffled(3, seed=-1), ["seed=-1"]),
        (lambda: Contiguous(3, shares=[0, 0]), ["shares=[0, 0]"]),
        (lambda: Contiguous(3, shares=[1, 2]).shards(3), ["are 2", "3 ranks"]),
        (lambda: Contiguous(3).shards(0), ["ranks=0"]),
        (lambda: Contiguous(3).shards(1, -1), ["epoch=-1"]),
        (lambda: Weighted([[1.0]]), ["weights of shape (1, 1)"]),
        (lambda: Weighted([1.0, -1.0]), ["weights"]),
        (lambda: Weighted([1.0, 0.0], draws=2), ["draws=2", "1 samples", "replacement=True"]),
        (lambda: Weighted([0.0], draws=1, replacement=True), ["all 0"]),
        (lambda: Stratified([[1], [2]]), ["labels of shape (2, 1)"]),
        (lambda: Dirichlet([1, 2], 0.0), ["alpha=0.0"]),
        (lambda: Epoch(Contiguous(4), 2).advance([1]), ["one per rank"]),
        (lambda: Epoch(Contiguous(4), 2).advance([1, 3]), ["rank 1 has 2 samples left"]),
        (lambda: Epoch(Contiguous(4), 2).steps(0), ["batch_size=0"]),
        (
            lambda: Epoch.from_state_dict(Contiguous(5), Epoch(Contiguous(4), 2).state_dict(), 2),
            ["samples: 4 then, 5 now"],
        ),
        (
            lambda: Epoch.from_state_dict(Stratified([1, 2]), Epoch(Stratified([1, 1]), 2).state_dict(), 2),
            ["labels", "differ"],
        ),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@MANY
@given(
    json_like
    | st.fixed_dictionaries(
        {
            "version": st.just(1),
            "epoch": st.just(0) | json_like,
            "parts": json_like | st.lists(st.lists(st.integers(-1, 3), max_size=3), max_size=3),
            "sharding": st.just(Contiguous(4).settings()) | json_like,
        }
    )
)
def test_any_state_is_an_epoch_or_a_config_error(state):
    try:
        epoch = Epoch.from_state_dict(Contiguous(4), state, 2)
    except ConfigError:
        return
    assert epoch.ranks == 2


def test_the_base_class_takes_samples_as_they_lie():
    assert [shard.tolist() for shard in Sharding(4).shards(2)] == [[0, 1], [2, 3]]
