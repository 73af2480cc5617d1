"""Attribution, permutation importance, SHAP and LIME of Keras models, under real ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from tests.ranks import Case, parallel_cases


@parallel_cases("keras_explain", group="tensorflow")
def test_explain(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
