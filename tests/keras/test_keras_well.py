"""Metrics by themselves and training well with Keras, under real ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from tests.ranks import Case, parallel_cases


@parallel_cases("keras_well", group="tensorflow")
def test_well(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
