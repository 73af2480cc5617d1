"""Metrics by themselves and training well with Keras, under real ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from ranks import Case, more, parallel_cases


@parallel_cases("keras_well", [("gloo", 2), *more(("gloo", 3))], group="keras")
def test_well(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
