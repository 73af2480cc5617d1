"""Functions of sums on NumPy arrays: their laws, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdloss.comm.communicator import simulate
from hvdloss.errors import ConfigError, ShapeError
from hvdloss.losses import (
    NAMED,
    R2,
    CalibrationError,
    CalibrationRatio,
    Concordance,
    Correlation,
    DonskerVaradhan,
    FBeta,
    Jaccard,
    SoftDice,
    SumsLoss,
    Tilted,
    Tversky,
)
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.step.objective import ObjectiveBase
from hvdloss.terms import CommunicationCost
from hvdloss.terms.policies import SyncPeriod

OPS = NumpyOps()


def mse(y, t):
    return (y - t) ** 2


BINARY = [SoftDice(), Jaccard(smooth=1.0), Tversky(), FBeta(2.0), CalibrationError(4), CalibrationRatio()]
REAL = [Correlation(), Concordance(), R2(), Tilted(mse, 0.5), Tilted(mse, -2.0)]


class Rank:
    """A group of simulated ranks."""

    def __init__(self, communicator):
        self.rank, self.size, self._sum = communicator.rank, communicator.size, communicator.all_reduce

    def all_reduce(self, x, name, *, replicated=False):
        assert replicated  # nothing is sent in the backward pass
        return self._sum(x, name)


def some(seed, n, binary):
    rng = np.random.default_rng(seed)
    t = (rng.random(n) < 0.5).astype(float) if binary else rng.normal(size=n)
    t[:2] = 0.0, 1.0
    w = rng.uniform(0.1, 2.0, n) * (rng.random(n) < 0.8)
    w[:3] = 1.0
    return rng.normal(size=n), t, w


@settings(max_examples=40, deadline=None)
@given(
    loss=st.sampled_from([*BINARY, *REAL]),
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(0, 20), min_size=0, max_size=4),
)
def test_any_split_over_ranks_gives_the_loss_of_the_union(loss, seed, cuts):
    y, t, w = some(seed, 20, loss in BINARY)
    where = [0, *sorted(cuts), 20]

    def one(communicator):
        mine = slice(where[communicator.rank], where[communicator.rank + 1])
        return float(loss.value(OPS, Rank(communicator), y[mine], t[mine], w[mine]))

    values = simulate(len(where) - 1, one)
    assert len(set(values)) == 1
    assert values[0] == pytest.approx(loss.of(y, t, w), rel=1e-10, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(loss=st.sampled_from([*BINARY, *REAL]), seed=st.integers(0, 10**6), cut=st.integers(0, 20))
def test_sums_add_up(loss, seed, cut):
    y, t, w = some(seed, 20, loss in BINARY)
    parts = [loss.sums(OPS, y[s], t[s], w[s]) for s in (slice(0, cut), slice(cut, 20))]
    assert parts[0] + parts[1] == pytest.approx(loss.sums(OPS, y, t, w), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("loss", [*BINARY, *REAL], ids=repr)
def test_an_element_without_weight_is_absent(loss):
    y, t, w = some(3, 20, loss in BINARY)
    spoilt = np.where(w == 0, np.nan, y)
    assert (w == 0).any()
    assert loss.of(spoilt, t, w) == pytest.approx(loss.of(y[w != 0], t[w != 0], w[w != 0]), rel=1e-12)


def test_a_weight_of_two_is_an_element_twice():
    y, t, _ = some(4, 12, True)
    w = np.ones(12)
    w[5] = 2.0
    for loss in BINARY:
        twice = loss.of(np.append(y, y[5]), np.append(t, t[5]))
        assert loss.of(y, t, w) == pytest.approx(twice, rel=1e-12)


def test_known_values():
    y, t = np.array([1.0, 0.0, 1.0, 1.0]), np.array([1.0, 0.0, 0.0, 1.0])
    assert SoftDice(from_logits=False).of(y, t) == pytest.approx(1 - 4 / 5)
    assert Jaccard(from_logits=False).of(y, t) == pytest.approx(1 - 2 / 3)
    assert Tversky(0.5, 0.5, from_logits=False).of(y, t) == pytest.approx(1 - 4 / 5)
    assert FBeta(2.0, from_logits=False).of(y, t) == pytest.approx(1 - 10 / 11)
    assert Correlation().of(np.array([1.0, 2, 3]), np.array([3.0, 5, 7])) == pytest.approx(0)
    assert Concordance().of(np.array([1.0, 2, 3]), np.array([1.0, 2, 3])) == pytest.approx(0)
    assert R2().of(np.array([1.0, 2, 3]), np.array([1.0, 2, 3])) == 0
    assert Correlation().of(np.ones(4), np.arange(4.0)) == 1  # with a constant there is none
    assert Tilted(mse, 1e-6).of(y, t) == pytest.approx(mse(y, t).mean(), rel=1e-5)
    assert CalibrationRatio(from_logits=False).of(np.full(4, 0.5), t) == pytest.approx(0)
    assert CalibrationError(10, from_logits=False).of(np.full(4, 0.55), t) == pytest.approx(0.05)
    scores, pairs = np.array([2.0, 3.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.0, 0.0])
    assert DonskerVaradhan().of(scores, pairs) == pytest.approx(np.log((1 + np.e) / 2) - 2.5)


def test_a_class_that_nobody_has_does_not_count():
    p = np.array([[0.8, 0.2, 0.0], [0.3, 0.7, 0.0]])
    loss = SoftDice("multiclass", from_logits=False)
    two = SoftDice("multiclass", from_logits=False).of(p[:, :2], np.array([0, 1]))
    assert loss.of(p, np.array([0, 1])) == pytest.approx(two)
    assert SoftDice("multilabel", from_logits=False).of(p, np.eye(3)[[0, 1]]) == pytest.approx(two)


def test_cancellation_does_not_hurt_moments():
    rng = np.random.default_rng(0)
    y, t = rng.normal(size=500), rng.normal(size=500)
    assert Correlation().of((y + 1e4).astype(np.float32), t) == pytest.approx(
        1 - np.corrcoef((y + 1e4).astype(np.float32), t)[0, 1], rel=1e-6
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SoftDice("words"), ["task='words'", "multilabel"]),
        (lambda: SoftDice(average="none"), ["average='none'", "micro"]),
        (lambda: SoftDice(smooth=-1.0), ["smooth=-1.0"]),
        (lambda: Tversky(alpha=float("nan")), ["alpha=nan"]),
        (lambda: FBeta(-1.0), ["beta=-1.0"]),
        (lambda: Tilted("mse", 0.0), ["tilt=0.0"]),
        (lambda: CalibrationError(0), ["bins=0"]),
        (lambda: SumsLoss(3, lambda s: s), ["statistics=3"]),
        (lambda: SumsLoss(mse, mse, columns=2), ["columns=2"]),
        (lambda: Base("correlation", reduction="sum"), ["reduction='sum'", "Correlation"]),
        (
            lambda: Base(R2(), terms=(CommunicationCost(policies=(SyncPeriod(4),)),)),
            ["SyncPeriod", "R2", "every forward pass"],
        ),
        (lambda: Base("dice"), ["loss='dice'", "soft_dice", "cross_entropy"]),
        (lambda: Base("mse").local_statistics(OPS, 0, 0, None, 0), ["mse is no function of sums"]),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


class Base(ObjectiveBase):
    def _named_losses(self):
        return {"mse": mse}


def test_statistics_must_fit_the_elements():
    loss = SumsLoss(lambda y, t: (y[:2],), lambda s: s, name="mine")
    with pytest.raises(ShapeError, match=r"statistic 1 of mine has shape \(2,\).*\(5,\).*rank 3"):
        loss.sums(OPS, np.ones(5), np.ones(5), rank=3)
    with pytest.raises(ShapeError, match="weight of shape"):
        SoftDice().of(np.ones(5), np.ones(5), np.ones(4))
    with pytest.raises(ShapeError, match="no statistics"):
        SumsLoss(lambda y, t: (), lambda: 0.0).of(np.ones(2), np.ones(2))
    with pytest.raises(ShapeError, match="target per label"):
        SoftDice("multilabel").of(np.ones((2, 3)), np.ones(2))


def test_statistics_with_columns_and_without():
    loss = SumsLoss(
        lambda y, t: (np.abs(y - t), 1.0), lambda s, n: (s / n).max(), columns=1, name="worst column"
    )
    y = np.array([[0.0, 3.0], [1.0, 1.0]])
    assert loss.of(y, np.zeros((2, 2)), np.array([3.0, 1.0])) == pytest.approx(10 / 4)


def test_names_settings_and_what_is_printed():
    for name, kind in NAMED.items():
        objective = Base(name)
        assert isinstance(objective.global_loss, kind)
        json.dumps(objective.settings())
    assert Base(Tversky(0.2, 0.8)).settings() != Base(Tversky(0.2, 0.7)).settings()
    assert "alpha=0.2" in repr(Tversky(0.2, 0.8))
