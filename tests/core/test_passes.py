"""What the gradient that arrives at a loss says: a division by the passes, or a factor of the user's own."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvdloss.losses.passes import (
    another_error,
    divided_by,
    division_error,
    uneven_division_error,
    unheard_error,
)

passes = st.integers(2, 64)
scales = st.floats(1e-3, 1e6)


@given(passes, st.none() | scales)
def test_a_division_by_the_passes_is_seen_whatever_the_scale(n, scale):
    by = [] if scale is None else [scale]
    assert divided_by((scale or 1.0) / n, n, by)
    assert divided_by(float(np.float32(scale or 1.0) / np.float32(n)), n, by)
    assert not divided_by(scale or 1.0, n, by)
    assert not divided_by(1.0, n, by)


@given(passes, passes)
def test_another_division_is_none(n, other):
    assert divided_by(1 / other, n) == (n == other)


def test_a_scale_that_is_one_over_the_passes_is_a_scale():
    assert not divided_by(0.25, 4, [0.25])
    assert divided_by(0.0625, 4, [0.25])


@given(st.floats(0, 10))
def test_one_pass_has_nothing_to_divide_by(gradient):
    assert not divided_by(gradient, 1)


def test_errors_name_what_to_write_instead():
    assert "'a'" in str(another_error("'a'", "b"))
    assert "'b'" in str(another_error("'a'", "b"))
    assert "objective=" in str(unheard_error("'a'"))
    assert "divided by 3" in str(division_error(3, 4))
    assert "1/4" in str(uneven_division_error(4))
