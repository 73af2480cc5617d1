"""The TensorFlow cases of tests/parallel, under real ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from tests.ranks import Case, parallel_cases


@parallel_cases("tf_tape", group="tensorflow")
def test_tape(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_beside_torch", group="torch_beside_tensorflow")
def test_beside_torch(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_functions", group="tf_functions")
def test_functions(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_sums", group="tensorflow")
def test_sums(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_terms", group="tensorflow")
def test_terms(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_ordinary", group="tensorflow")
def test_ordinary_code(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_stream", group="tensorflow")
def test_streams(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_scale", group="tensorflow")
def test_scale(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_nonfinite", group="tensorflow")
def test_nonfinite(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_several", group="tensorflow")
def test_several_losses(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
