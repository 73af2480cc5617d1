"""Records of TensorFlow's and Keras's ranks: the cases of tests/parallel/tf_record.py."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from tests.ranks import Case, parallel_cases


@parallel_cases("tf_record", group="tensorflow")
def test_record(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
