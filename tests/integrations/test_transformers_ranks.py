"""Hugging Face's Trainer under real ranks; the cases are in tests/parallel/transformers_fit.py."""

from __future__ import annotations

import importlib.util

import pytest

from tests.ranks import Case, parallel_cases

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None,
    reason="SKIPPED, transformers or accelerate not installed: pip install 'hvdloss[transformers]'",
)


@parallel_cases("transformers_fit")
def test_transformers(case: Case, request):
    case.check(request)
