"""Checkpoints of training runs on several ranks."""

from __future__ import annotations

from tests.ranks import Case, parallel_cases


@parallel_cases("keras_checkpoint", group="tensorflow")
def test_checkpoints(case: Case, request):
    case.check(request)
