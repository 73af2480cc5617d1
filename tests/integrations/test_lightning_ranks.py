"""Lightning's Trainer under real ranks; the cases are in tests/parallel/lightning_fit.py."""

from __future__ import annotations

import importlib.util

import pytest
from ranks import Case, more, parallel_cases

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None,
    reason="SKIPPED, lightning not installed: pip install 'hvdloss[lightning]', or make test-more",
)


@parallel_cases("lightning_fit", more(("gloo", 2)))
def test_lightning(case: Case, request):
    case.check(request)
