"""Classes that lie on several ranks: who holds which, and the formulas on NumPy, rank by rank."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdloss.errors import AgreementError, ConfigError, ShapeError
from hvdloss.losses.shards import (
    ArcFace,
    ClassShards,
    CosFace,
    NumpyRowOps,
    ShardedSoftmax,
    check_headers,
    headers_of,
    sample_columns,
)

OPS = NumpyRowOps()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_every_class_has_one_owner(sizes):
    shards = ClassShards(sum(sizes), len(sizes), sizes)
    owners = [shards.owner(label) for label in range(shards.classes)]
    assert owners == sorted(owners)
    for rank in range(shards.ranks):
        assert owners.count(rank) == shards.size(rank) == len(shards.range(rank))
        assert all(owners[label] == rank for label in shards.range(rank))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3, 4), "fewer than the 4 ranks"),
        ((0, 1), "classes=0"),
        ((3, 0), "ranks=0"),
        ((5, 2, [5]), "has 1 numbers"),
        ((5, 2, [5, 0]), "at least 1 each"),
        ((5, 2, [1, 3]), "together they are 4"),
    ],
)
def test_shards_that_cannot_be(arguments, words):
    with pytest.raises(ConfigError, match=words):
        ClassShards(*arguments)


def test_ranks_and_classes_that_are_not_there():
    with pytest.raises(ConfigError, match="rank=2"):
        ClassShards(5, 2).offset(2)
    with pytest.raises(ConfigError, match="class 5"):
        ClassShards(5, 2).owner(5)


def softmax_loss(z, y, smoothing):
    """Return the loss of one element, from the definition."""
    log_sum = z.max() + math.log(np.exp(z - z.max()).sum())
    goal = np.full(len(z), smoothing / len(z))
    goal[y] += 1 - smoothing
    return float(goal @ (log_sum - z)), np.exp(z - log_sum) - goal


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([1.0, 300.0]),
    st.integers(0, 10**6),
)
def test_ranks_together_are_one_process(sizes, elements, smoothing, spread, seed):
    rng = np.random.default_rng(seed)
    shards = ClassShards(sum(sizes), len(sizes), sizes)
    rule = ShardedSoftmax(shards, smoothing)
    z = rng.normal(size=(elements, shards.classes)) * spread
    y = rng.integers(0, shards.classes, elements)
    upstream = rng.normal(size=elements)
    parts = [rule.part(OPS, z[:, shards.range(r)], y, r) for r in range(shards.ranks)]
    messages = np.stack([part.message for part in parts])
    check_headers(headers_of(messages.reshape(-1), shards.ranks), rule, "test", range(shards.ranks))
    found = [rule.losses(OPS, part, messages) for part in parts]
    for losses, _ in found:
        assert np.array_equal(losses, found[0][0])
    columns = rule.columns(messages)
    gradient = np.concatenate(
        [
            rule.gradient(OPS, part, factor, columns, upstream)
            for part, (_, factor) in zip(parts, found, strict=True)
        ],
        axis=1,
    )
    for i in range(elements):
        loss, by_logits = softmax_loss(z[i], y[i], smoothing)
        assert found[0][0][i] == pytest.approx(loss, rel=1e-12, abs=1e-13)
        np.testing.assert_allclose(gradient[i], by_logits * upstream[i], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("margin", [CosFace(0.3), ArcFace(0.0), ArcFace(0.5), ArcFace(2.0)])
def test_margins_and_their_derivatives(margin):
    cosine = np.linspace(-0.99, 0.99, 67)
    value, slope = margin.apply(OPS, cosine)
    theta = np.arccos(cosine)
    if isinstance(margin, CosFace):
        expected = cosine - 0.3
    else:
        m = margin.margin
        expected = np.where(theta + m < math.pi, np.cos(theta + m), cosine - m * math.sin(m))
        assert (np.diff(value) > 0).all() or m == 2.0
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-14)
    h = 1e-6
    numeric = (margin.apply(OPS, cosine + h)[0] - margin.apply(OPS, cosine - h)[0]) / (2 * h)
    np.testing.assert_allclose(slope, numeric, rtol=1e-6)


def test_a_margin_at_the_ends_is_finite():
    value, slope = ArcFace(0.5).apply(OPS, np.array([1.0, 1.0 + 1e-16, -1.0, 1.0 + 1e-7]))
    assert np.isfinite(value).all()
    assert np.isfinite(slope).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": math.nan}, "label_smoothing"),
        ({"scale": 0}, "scale"),
        ({"scale": math.inf}, "scale"),
        ({"margin": 0.5}, "margin=0.5"),
    ],
)
def test_settings_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        ShardedSoftmax(ClassShards(3), **options)
    with pytest.raises(ConfigError, match="angle"):
        ArcFace(4.0)
    with pytest.raises(ConfigError, match="finite"):
        CosFace(math.nan)


def messages(rule, targets, columns=None, settings=None):
    """Return the headers of ranks with these targets."""
    flat = []
    for rank, y in enumerate(targets):
        own = (settings or [rule] * len(targets))[rank]
        some = None if columns is None else columns[rank]
        width = rule.shards.size(rank) if some is None else len(some)
        flat.append(own.part(OPS, np.zeros((len(y), width)), np.asarray(y), rank, some).message)
    return headers_of(np.concatenate(flat), len(targets))


def test_what_ranks_disagree_about_is_named():
    rule = ShardedSoftmax(ClassShards(6, 3))
    other = ShardedSoftmax(ClassShards(6, 3), 0.1)

    def check(*arguments, **options):
        check_headers(messages(rule, *arguments, **options), rule, "loss", [4, 5, 6])

    check([[0, 5], [0, 5], [0, 5]])
    with pytest.raises(ShapeError, match="rank 4: 2, rank 5: 3, rank 6: 1"):
        check([[0, 5], [0, 5, 1], [0]])
    with pytest.raises(AgreementError, match="different targets"):
        check([[0, 5], [5, 0], [0, 5]])
    with pytest.raises(AgreementError, match="different arguments"):
        check([[0, 5]] * 3, settings=[rule, other, rule])
    with pytest.raises(ConfigError, match=r"1 target\(s\) on rank 5 .*first is 6"):
        check([[0, 5], [0, 6], [0, 5]])
    with pytest.raises(ConfigError, match=r"first is -3"):
        check([[-100, -3]] * 3)
    with pytest.raises(ShapeError, match="of rank 6 lack the class of 1"):
        check([[0, 5]] * 3, columns=[np.array([0]), np.array([0, 1]), np.array([0])])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 50), st.floats(0.01, 1.0), st.lists(st.integers(-5, 60), max_size=20), st.integers(0, 99)
)
def test_samples_hold_all_positives_and_no_more_than_asked(size, rate, target, seed):
    shards = ClassShards(size + 3, 2, [3, size])
    found = sample_columns(np.array(target, dtype=np.int64), shards, 1, rate, np.random.default_rng(seed))
    positive = {y - 3 for y in target if 3 <= y < size + 3}
    assert positive <= set(found.tolist())
    assert len(found) == max(len(positive), 1, math.ceil(rate * size - 1e-9))
    assert (np.diff(found) > 0).all()
    assert found.min() >= 0
    assert found.max() < size
