"""The Keras cases of tests/parallel, under real ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from tests.ranks import Case, parallel_cases


@parallel_cases("keras_fit", group="tensorflow")
def test_fit(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("keras_callbacks", group="tensorflow")
def test_callbacks(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("keras_stream", group="tensorflow")
def test_streams(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("keras_data", group="tensorflow")
def test_data(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("keras_terms", group="tensorflow")
def test_terms(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("keras_nonfinite", group="tensorflow")
def test_nonfinite(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
