"""Contrastive losses under real ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from ranks import Case, more, parallel_cases

EVERYWHERE = [
    "random_splits_eager",
    "random_splits_in_a_function",
    "absent_rows_may_be_anything",
    "an_objective_of_them",
]


@parallel_cases("tf_contrastive", [("gloo", 2)], group="tensorflow")
def test_contrastive(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases(
    "tf_contrastive", more(("gloo", 3), ("gloo", 4), ("mpi", 2)), cases=EVERYWHERE, group="tensorflow"
)
def test_contrastive_everywhere(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases(
    "tf_contrastive",
    more(("gloo", 1)),
    cases=["random_splits_in_a_function", "parity_with_numpy"],
    group="tensorflow",
)
def test_contrastive_alone(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
