"""Packed sequences: however they are packed, cut and spread, the loss is that of the unpacked ones."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss.errors import ConfigError, ShapeError, WeightError
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.losses.reduction import reduce_losses
from hvdloss.losses.segments import Link, LinkedSegments, Segments, check_micro_batches

OPS = NumpyOps()
TIGHT = 1e-11


class OnDevice(NumpyOps):
    """NumPy, but nobody may look at a value: as on a GPU, or in a graph."""

    def host_array(self, x):
        return None


def direct(sequences, groups):
    """Return the loss of unpacked sequences (token losses, token weights, weight, group), by its formula."""
    means = {}
    for losses, weights, u, group in sequences:
        there = [(x, w) for x, w in zip(losses, weights, strict=True) if w]
        if u and there:
            mean = math.fsum(x * w for x, w in there) / math.fsum(w for _, w in there)
            means.setdefault(group if groups else 0, []).append((mean, u))
    if not groups:
        return math.fsum(m * u for m, u in means[0]) / math.fsum(u for _, u in means[0])
    return math.fsum(
        math.fsum(m * u for m, u in one) / math.fsum(u for _, u in one) for one in means.values()
    ) / len(means)


weights = st.one_of(st.just(0.0), st.just(1.0), st.floats(2.0**-10, 1000))


@st.composite
def unpacked(draw):
    """Sequences of 0 to 5 tokens, at least one of which counts."""
    found = [([draw(st.floats(-100, 100))], [1.0], 1.0, 0)]
    for _ in range(draw(st.integers(0, 6))):
        n = draw(st.integers(0, 5))
        losses = draw(st.lists(st.floats(-100, 100), min_size=n, max_size=n))
        w = draw(st.lists(weights, min_size=n, max_size=n))
        losses = [math.nan if not one else x for x, one in zip(losses, w, strict=True)]
        found.append((losses, w, draw(weights), draw(st.integers(0, 2))))
    return found


def stream(sequences, names):
    """Return losses, weights, ids, weights of sequences, and groups of all tokens, one after another."""
    rows = [
        (x, w, name, u, group)
        for name, (losses, ws, u, group) in zip(names, sequences, strict=True)
        for x, w in zip(losses, ws, strict=True)
    ]
    return [
        np.array([row[i] for row in rows], dtype) for i, dtype in enumerate((float, float, int, float, int))
    ]


def part(segments, losses, weight, ops=OPS, reduction="sequence_mean"):
    layout = segments.lay_out(ops, losses)
    w = layout.masked(ops, losses, weight, per_token=reduction != "sequence_mean", rank=0)
    return reduce_losses(ops, losses, w, reduction, layout=layout)


def finished(parts):
    return sum(float(one.numerator) for one in parts) / sum(float(one.denominator) for one in parts)


def linked(ranks, cut="any", groups=False, weighted=True):
    """Return the contributions of ranks' micro-batches, whose sequences are linked over all of them."""
    links = []
    for rank, batches in enumerate(ranks):
        segments = [
            Segments(b[2], groups=b[4] if groups else None, weight=b[3] if weighted else None)
            for b in batches
        ]
        links.append((segments, Link(segments, [b[1] for b in batches], ranks=True, cut=cut, rank=rank)))
    table = np.concatenate([link.table for _, link in links])
    parts = []
    for batches, (segments, link) in zip(ranks, links, strict=True):
        for b, one, c, w in zip(batches, segments, link.coefficients(table), link.weights, strict=True):
            parts.append(part(LinkedSegments(one, lambda c=c, w=w: (c, w)), b[0], b[1]))
    return parts, table


def close(value, expected, sequences):
    scale = max(abs(x) for one in sequences for x, w in zip(one[0], one[1], strict=True) if w) or 1.0
    return abs(value - expected) <= TIGHT * scale


@given(unpacked(), st.booleans(), st.randoms(use_true_random=False), st.integers(1, 3))
def test_tokens_dealt_anywhere_give_the_loss_of_the_unpacked_sequences(sequences, groups, random, size):
    names = random.sample(range(10**9), len(sequences))
    columns = stream(sequences, names)
    padding = random.randint(0, 3)
    columns = [
        np.concatenate([c, np.full(padding, fill)])
        for c, fill in zip(columns, (np.nan, 1.0, -1, 1.0, 0), strict=True)
    ]
    places = [(k, m) for k in range(size) for m in range(random.randint(0, 2))] or [(0, 0)]
    dealt = [random.choice(places) for _ in columns[0]]
    ranks = [
        [[c[[place == (k, m) for place in dealt]] for c in columns] for kk, m in places if kk == k]
        for k in range(size)
    ]
    parts, _ = linked(ranks, groups=groups)
    assert close(finished(parts), direct(sequences, groups), sequences)
    assert sum(int(one.elements) for one in parts) == sum(1 for s in sequences for w in s[1] if w and s[2])
    # All in one call needs no link.
    x, w, ids, u, group = columns
    whole = part(Segments(ids, groups=group if groups else None, weight=u), x, w)
    assert close(float(whole.mean(OPS)), direct(sequences, groups), sequences)


@given(unpacked(), st.randoms(use_true_random=False), st.integers(1, 3))
def test_a_stream_that_is_cut_sends_only_what_lies_at_ends(sequences, random, size):
    columns = stream(sequences, range(len(sequences)))
    cuts = sorted(random.randint(0, len(columns[0])) for _ in range(size - 1))
    pieces = [[c[i:j] for c in columns] for i, j in itertools.pairwise([0, *cuts, len(columns[0])])]
    parts, table = linked([[piece] for piece in pieces], cut="ends")
    assert close(finished(parts), direct(sequences, False), sequences)
    assert len(table) <= 2 * size


@given(unpacked(), st.booleans())
def test_cumulative_lengths_and_rows_are_ids(sequences, groups):
    x, w, *_ = stream(sequences, range(len(sequences)))
    edges = np.cumsum([0, *(len(s[0]) for s in sequences)])
    table = np.array([s[2] for s in sequences]), np.array([s[3] for s in sequences])
    given = Segments(cu_seqlens=edges.astype(np.int32), weight=table[0], groups=table[1] if groups else None)
    right = direct(sequences, groups)
    assert close(float(part(given, x, w).mean(OPS)), right, sequences)
    assert close(
        float(part(given, x[None], w[None]).mean(OPS)), right, sequences
    )  # one row, as for attention
    assert close(float(part(given, x, w, OnDevice()).mean(OPS)), right, sequences)
    longest = max(len(s[0]) for s in sequences)
    rows = np.zeros((2, len(sequences), longest))
    for i, s in enumerate(sequences):
        rows[:, i, : len(s[0])] = s[:2]
    given = Segments(weight=table[0], groups=table[1] if groups else None)
    assert close(float(part(given, *rows).mean(OPS)), right, sequences)


def test_groups_of_whole_rows_may_be_spread_over_ranks():
    """One row in the exchange for each group, however many answers a prompt has."""
    losses = np.arange(12.0).reshape(6, 2)
    prompts = np.array([0, 0, 1, 0, 1, 1])
    cuts = [slice(0, 3), slice(3, 6)]
    links = [Link([Segments(groups=prompts[c])], [np.ones((3, 2))], ranks=True) for c in cuts]
    table = np.concatenate([link.table for link in links])
    assert len(table) == 4
    parts = []
    for c, link in zip(cuts, links, strict=True):
        (found,) = link.coefficients(table)
        one = LinkedSegments(
            Segments(groups=prompts[c]), lambda found=found, link=link: (found, link.weights[0])
        )
        parts.append(part(one, losses[c], None))
    means = losses.mean(1)
    assert finished(parts) == pytest.approx(np.mean([means[prompts == g].mean() for g in (0, 1)]), rel=1e-14)


def test_micro_batches_of_one_rank_send_nothing():
    link = Link([Segments(np.array([4, 4, 5])), Segments(np.array([5, 6]))], [None, np.array([3.0, 1.0])])
    assert not len(link.table)
    first, second = link.coefficients(link.table)
    np.testing.assert_allclose(first, [0.5, 0.5, 0.25])
    np.testing.assert_allclose(second, [0.75, 1.0])
    assert LinkedSegments(Segments(np.array([4, 4, 5])), lambda: (first, link.weights[0])).sequences() == 1.25


def test_reductions_of_tokens_take_padding_and_weights_of_sequences():
    x, w = np.array([1.0, 2.0, 5.0, np.nan]), np.array([1.0, 2.0, 1.0, 1.0])
    segments = Segments(np.array([0, 0, 1, -1]), weight=np.array([1.0, 1.0, 3.0, 1.0]))
    assert float(part(segments, x, w, reduction="mean").mean(OPS)) == pytest.approx((1 + 4 + 15) / 6)
    assert float(part(segments, x, w, reduction="batch_mean").denominator) == 3
    assert float(part(segments, x, w, reduction="sum").numerator) == 20


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinity by infinity
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("of", ["sequence", "token"])
def test_bad_weights_are_counted(bad, of):
    ids, w, u = np.array([0, 0, 1]), np.ones(3), np.ones(3)
    (u if of == "sequence" else w)[2] = bad
    one = part(Segments(ids, weight=u), np.ones(3), w)
    assert (float(one.negative), float(one.nonfinite)) == ((1, 0) if bad == -1 else (0, 1))


IDS = np.array([0, 0, 1])


@pytest.mark.parametrize(
    ("make", "shape", "words"),
    [
        (lambda: Segments(IDS), (4,), r"ids of shape \(3,\) must have shape \(4,\).*rank 0"),
        (lambda: Segments(IDS), (1, 3), r"ids of shape \(3,\) must have shape \(1, 3\)"),
        (lambda: Segments(IDS, groups=IDS[:2]), (3,), r"groups of shape \(2,\) must have shape \(3,\)"),
        (lambda: Segments(IDS, weight=np.ones(2)), (3,), r"weight of shape \(2,\)"),
        (lambda: Segments(), (3,), "without ids"),
        (lambda: Segments(groups=IDS), (2, 4), r"groups of shape \(3,\) must have shape \(2,\)"),
        (lambda: Segments(cu_seqlens=np.array([0, 2])), (3,), r"cu_seqlens=\[0, 2\] must rise from 0 .*, 3 "),
        (lambda: Segments(cu_seqlens=np.array([1, 3])), (3,), r"cu_seqlens=\[1, 3\]"),
        (lambda: Segments(cu_seqlens=np.array([0, 2, 1, 3])), (3,), r"cu_seqlens=\[0, 2, 1, 3\]"),
        (lambda: Segments(cu_seqlens=np.array([[0, 3]])), (3,), r"must have shape \(sequences \+ 1,\)"),
        (lambda: Segments(cu_seqlens=np.array([], int)), (0,), r"must have shape \(sequences \+ 1,\)"),
        (
            lambda: Segments(cu_seqlens=np.array([0, 3]), weight=np.ones(3)),
            (3,),
            r"weight of shape \(3,\) .* \(1,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, shape, words):
    with pytest.raises(ShapeError, match=words):
        make().lay_out(OPS, np.zeros(shape))


@pytest.mark.parametrize("name", ["ids", "cu_seqlens", "groups"])
@pytest.mark.parametrize("dtype", ["float64", "bool"])
def test_what_are_no_integers_is_refused(name, dtype):
    with pytest.raises(ConfigError, match=rf"{name} of dtype {dtype}"):
        Segments(**{name: np.zeros(3, dtype)})


def test_ids_and_lengths_exclude_each_other():
    with pytest.raises(ConfigError, match="leave one"):
        Segments(IDS, IDS)


@pytest.mark.parametrize("edges", [[0, 2], [1, 3], [0, 2, 1, 3]])
def test_lengths_that_nobody_can_look_at_make_the_step_fail(edges):
    one = part(Segments(cu_seqlens=np.array(edges)), np.ones(3), None, OnDevice())
    assert float(one.nonfinite) == 3


def test_weights_other_than_those_linked_are_refused():
    """As where targets are ignored that the mask does not know of."""
    link = Link([Segments(IDS)], [None])
    (c,) = link.coefficients(link.table)
    segments = LinkedSegments(Segments(IDS), lambda: (c, link.weights[0]))
    assert float(part(segments, np.ones(3), np.ones(3, "float32")).denominator) == 2
    with pytest.raises(WeightError, match=r"weights of 1 elements .*link_segments\(\).*rank 0"):
        part(segments, np.ones(3), np.array([1.0, 0.0, 1.0]))
    assert float(part(segments, np.ones(3), np.array([1.0, 0.0, 1.0]), OnDevice()).nonfinite) == 3
    with pytest.raises(ShapeError, match=r"linked for 3 elements, but losses of shape \(2, 2\)"):
        LinkedSegments(Segments(), segments.numbers).lay_out(OPS, np.ones((2, 2)))


def test_a_piece_inside_a_row_is_found_out():
    links = [Link([Segments(np.array(ids))], [None], ranks=True, cut="ends") for ids in ([0, 7, 1], [7, 2])]
    table = np.concatenate([link.table for link in links])
    with pytest.raises(ConfigError, match=r'cut="ends"\): the sequence 7 is inside a row of rank 0'):
        links[0].coefficients(table)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((IDS, None, "any"), "segments must be a list"),
        (([IDS], np.ones(3), "any"), "weights must be a list"),
        (([IDS], [], "any"), "1 segments, but 0 weights"),
        (([IDS], None, "some"), "cut='some'.*'any', 'ends'"),
        (([LinkedSegments(Segments(IDS), tuple)], None, "any"), "linked already"),
    ],
)
def test_what_cannot_be_linked_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        check_micro_batches(*given)


def test_groups_are_given_everywhere_or_nowhere():
    with pytest.raises(ConfigError, match="groups of all micro-batches"):
        Link([Segments(IDS), Segments(IDS, groups=IDS)], [None, None])
    links = [
        Link([Segments(IDS, groups=one)], [None], ranks=True, rank=k) for k, one in enumerate((IDS, None))
    ]
    table = np.concatenate([link.table for link in links])
    for link, words in zip(links, ("rank 0 has groups", "rank 1 has no groups"), strict=True):
        with pytest.raises(ConfigError, match=words):
            link.coefficients(table)
    assert Link([], [], ranks=True).coefficients(table) == []
    with pytest.raises(ShapeError, match=r"rows of their weights, which have shape \(\)"):
        Link([Segments(groups=IDS)], [None])
