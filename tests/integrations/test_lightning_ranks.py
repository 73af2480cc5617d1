"""Lightning's Trainer under real ranks; the cases are in tests/parallel/lightning_fit.py."""

from __future__ import annotations

import importlib.util

import pytest

from tests.ranks import Case, parallel_cases

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None,
    reason="SKIPPED, lightning not installed: pip install 'hvdloss[lightning]', or make test-integrations",
)


@parallel_cases("lightning_fit")
def test_lightning(case: Case, request):
    case.check(request)
