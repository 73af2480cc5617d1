"""The laws of tests/laws in PyTorch, under real ranks."""

from __future__ import annotations

from tests.ranks import Case, parallel_cases


@parallel_cases("laws_torch", group="torch")
def test_laws(case: Case, request):
    case.check(request)
