"""Records of TensorFlow's and Keras's ranks: the cases of tests/parallel/tf_record.py."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from ranks import Case, more, parallel_cases


@parallel_cases("tf_record", [("gloo", 2), *more(("gloo", 1))], group="tensorflow")
def test_record(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
