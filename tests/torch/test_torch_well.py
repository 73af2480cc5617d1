"""Metrics and training well under real ranks."""

from __future__ import annotations

from ranks import Case, more, parallel_cases


@parallel_cases("torch_well", [("gloo", 2), *more(("gloo", 3))], group="torch")
def test_well(case: Case, request):
    case.check(request)
