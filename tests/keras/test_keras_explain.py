"""Attribution, permutation importance, SHAP and LIME of Keras models, under real ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from ranks import Case, more, parallel_cases


@parallel_cases("keras_explain", [("gloo", 2), *more(("gloo", 3))], group="tensorflow")
def test_explain(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
