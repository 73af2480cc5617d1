"""Checkpoints of training runs on several ranks."""

from __future__ import annotations

from ranks import Case, more, parallel_cases


@parallel_cases("keras_checkpoint", [("gloo", 2), *more(("gloo", 3))], group="keras")
def test_checkpoints(case: Case, request):
    case.check(request)
