"""Contrastive losses under real ranks."""

from __future__ import annotations

import pytest
from ranks import Case, more, parallel_cases

EVERYWHERE = [
    "value_and_gradients_over_random_splits",
    "absent_rows_may_be_anything",
    "no_weight_at_all",
    "an_objective_of_them",
]


@parallel_cases("torch_contrastive", [("gloo", 3)], group="torch")
def test_contrastive(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases(
    "torch_contrastive",
    more(("gloo", 1), ("gloo", 2), ("gloo", 4), ("mpi", 2)),
    cases=EVERYWHERE,
    group="torch",
)
def test_contrastive_everywhere(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
