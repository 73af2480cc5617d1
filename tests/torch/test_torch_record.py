"""Records of PyTorch's ranks: the cases of tests/parallel/torch_record.py, and one process."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from ranks import Case, more, parallel_cases


@parallel_cases("torch_record", [("gloo", 2), *more(("gloo", 3))], group="torch")
def test_record(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


# The others need ranks that meet, or a process set of some of them.
ALONE = ["a_record_is_what_all_ranks_reported", "a_step_that_a_scaler_skips_is_told_as_well"]


@parallel_cases("torch_record", more(("gloo", 1)), cases=ALONE, group="torch")
def test_record_of_one_rank(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
