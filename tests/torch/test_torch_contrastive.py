"""Contrastive losses under real ranks."""

from __future__ import annotations

import pytest

from tests.ranks import Case, parallel_cases


@parallel_cases("torch_contrastive", group="torch")
def test_contrastive(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
