"""Checkpoints of training runs on several ranks."""

from __future__ import annotations

from tests.ranks import Case, parallel_cases


@parallel_cases("torch_checkpoint", group="torch")
def test_checkpoints(case: Case, request):
    case.check(request)
