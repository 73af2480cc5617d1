"""Records of PyTorch's ranks: the cases of tests/parallel/torch_record.py, and one process."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from tests.ranks import Case, parallel_cases


@parallel_cases("torch_record", group="torch")
def test_record(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
