"""Contrastive losses on NumPy arrays: their laws, and what they refuse."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss.errors import ConfigError, ShapeError
from hvdloss.losses import InfoNCE, SigLIP, SupervisedContrastive, contrastive

seeds = st.integers(0, 2**32 - 1)


def batch(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 12))
    x, y = rng.normal(size=(2, n, 4))
    labels = rng.integers(0, 2, size=n)
    labels[:2] = 0
    w = rng.uniform(0.5, 2.0, size=n)
    return rng, x, y, labels, w


def calls(x, y, labels, w):
    return [
        InfoNCE().of((x, y), None, w),
        InfoNCE(0.5, symmetric=False).of((x, y, 0.3), None, w),
        SupervisedContrastive().of(x, labels, w),
        SigLIP().of((x, y, 1.0, -2.0), None, w),
    ]


@given(seeds)
def test_the_order_of_rows_does_not_matter(seed):
    rng, *rows = batch(seed)
    order = rng.permutation(len(rows[0]))
    np.testing.assert_allclose(calls(*(r[order] for r in rows)), calls(*rows), rtol=1e-12)


@given(seeds)
def test_rows_of_weight_zero_are_absent(seed):
    rng, x, y, labels, w = batch(seed)
    keep = np.ones(len(w), bool)
    keep[2:] = rng.uniform(size=len(w) - 2) > 0.5
    expected = calls(x[keep], y[keep], labels[keep], w[keep])
    x[~keep], y[~keep], w[~keep] = np.nan, np.inf, 0.0
    np.testing.assert_allclose(calls(x, y, labels, w), expected, rtol=1e-12)


@given(seeds, st.floats(0.1, 10.0))
def test_what_does_not_change_a_loss(seed, factor):
    _, x, y, labels, w = batch(seed)
    expected = calls(x, y, labels, w)
    np.testing.assert_allclose(calls(factor * x, y, labels, w), expected, rtol=1e-9)  # rows have length 1
    np.testing.assert_allclose(calls(x, y, labels, factor * w)[:3], expected[:3], rtol=1e-9)
    np.testing.assert_allclose(
        calls(x, y, labels, factor * w)[3], factor * expected[3], rtol=1e-9
    )  # a pair weighs the product
    assert InfoNCE().of((x, y), None, w) == pytest.approx(InfoNCE().of((y, x), None, w), rel=1e-12)


def test_of_one_pair_and_of_none():
    x = np.ones((1, 2))
    assert InfoNCE().of((x, x)) == pytest.approx(0.0, abs=1e-12)
    assert SigLIP().of((x, x, 0.0, -1.0)) == pytest.approx(math.log(2.0))
    none = np.ones((0, 2))
    assert math.isnan(SigLIP().of((none, none, 0.0, 0.0)))
    assert math.isnan(SupervisedContrastive().of(np.eye(2), np.arange(2)))


def test_what_is_refused():
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="temperature="):
            InfoNCE(temperature)
        with pytest.raises(ConfigError, match="temperature="):
            SupervisedContrastive(temperature)
    with pytest.raises(ShapeError, match="not ndarray"):
        InfoNCE().of(np.ones((2, 2)))
    with pytest.raises(ShapeError, match="equal for both sides"):
        InfoNCE().of((np.ones((2, 2)), np.ones((3, 2))))
    with pytest.raises(ShapeError, match="one label for each"):
        SupervisedContrastive().of(np.ones((2, 2)), np.ones((2, 1)))


def test_settings_and_words():
    assert SigLIP().settings() == {"name": "SigLIP", "normalize": True}
    assert repr(InfoNCE(0.1)) == "InfoNCE(temperature=0.1, symmetric=True, normalize=True)"
    assert doctest.testmod(contrastive).failed == 0
