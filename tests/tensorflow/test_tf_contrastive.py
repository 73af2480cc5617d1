"""Contrastive losses under real ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from tests.ranks import Case, parallel_cases


@parallel_cases("tf_contrastive", group="tensorflow")
def test_contrastive(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
