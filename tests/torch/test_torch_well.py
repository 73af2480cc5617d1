"""Metrics and training well under real ranks."""

from __future__ import annotations

from tests.ranks import Case, parallel_cases


@parallel_cases("torch_well", group="torch")
def test_well(case: Case, request):
    case.check(request)
