"""The laws of tests/laws under real ranks: TensorFlow's tape, eagerly and in a graph, and Keras's fit."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from tests.ranks import Case, parallel_cases


@parallel_cases("laws_tape", group="tensorflow")
def test_laws_of_a_tape(case: Case, request):
    case.check(request)


@parallel_cases("laws_function", group="tensorflow")
def test_laws_in_a_function(case: Case, request):
    case.check(request)


@parallel_cases("laws_fit", group="tensorflow")
def test_laws_in_fit(case: Case, request):
    case.check(request)
