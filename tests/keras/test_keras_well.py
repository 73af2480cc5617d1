"""Metrics by themselves and training well with Keras, under real ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from ranks import Case, more, parallel_cases

SLOW = [
    "every_metric_of_keras_merges_by_summing",
    "dropout_differs_between_ranks_and_not_between_runs",
    "l1_l2_and_weight_decay_count_once_with_accumulation",
]


@parallel_cases("keras_well", [("gloo", 2), *more(("gloo", 3))], slow=SLOW, group="tensorflow")
def test_well(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
