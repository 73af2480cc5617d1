"""Pages that are about ranks, under two real ones."""

from __future__ import annotations

from tests.ranks import Case, parallel_cases


@parallel_cases("torch_pages", group="torch")
def test_pages_under_ranks(case: Case, request):
    case.check(request)


@parallel_cases("keras_pages", group="tensorflow")
def test_pages_under_ranks_in_keras(case: Case, request):
    case.check(request)
