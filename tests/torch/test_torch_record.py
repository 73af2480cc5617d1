"""Records of PyTorch's ranks: the cases of tests/parallel/torch_record.py, and one process."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from ranks import Case, more, parallel_cases


@parallel_cases("torch_record", [("gloo", 2), *more(("gloo", 1), ("gloo", 3))], group="torch")
def test_record(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
