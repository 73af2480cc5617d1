"""Pages that are about ranks, under two real ones."""

from __future__ import annotations

from ranks import Case, more, parallel_cases


@parallel_cases("torch_pages", [("gloo", 2)], group="torch")
def test_pages_under_ranks(case: Case, request):
    case.check(request)


@parallel_cases("keras_pages", more(("gloo", 2)), group="tensorflow")
def test_pages_under_ranks_in_keras(case: Case, request):
    case.check(request)
