"""Attribution, permutation importance, SHAP and LIME of PyTorch models, under real ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from tests.ranks import Case, parallel_cases


@parallel_cases("torch_explain", group="torch")
def test_explain(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
