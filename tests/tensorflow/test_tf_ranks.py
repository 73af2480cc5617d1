"""The TensorFlow cases of tests/parallel, under real ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from ranks import Case, more, parallel_cases

# What must hold for every number of ranks and both controllers; the rest runs on two ranks.
EVERYWHERE = [
    "random_splits_eager",
    "random_splits_in_a_function",
    "random_splits_float32",
    "a_rank_whose_weights_are_all_zero",
    "a_penalty_counts_once",
    "embeddings_sparse_and_dense",
    "process_sets",
    "errors_are_the_same_on_every_rank",
    "without_our_reduction_the_guard_raises",
    "parity_with_torch",
]

SUMS_EVERYWHERE = [
    "value_and_gradient_over_random_splits_in_a_function",
    "sums_over_micro_batches",
    "one_rank_is_to_blame_for_what_is_not_finite",
]

SLOW_TERMS = [
    "local_steps_with_other_optimizers_and_wires",
    "local_steps_with_accumulation_and_sum",
    "an_outer_nesterov_step",
]

TERMS_EVERYWHERE = [
    "skew_is_that_of_all_labels",
    "importance_and_balance_weights",
    "terms_without_a_price_or_act_change_nothing",
    "local_steps_are_averaged_by_weight",
]


@parallel_cases("tf_tape", [("gloo", 2)], group="tensorflow")
def test_tape(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_tape", more(("gloo", 3), ("mpi", 2), ("gloo", 4)), cases=EVERYWHERE, group="tensorflow")
def test_tape_everywhere(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_tape", more(("gloo", 1)), cases=["parity_with_torch"], group="tensorflow")
def test_parity_of_one_rank(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases(
    "tf_functions", [("gloo", 2), *more(("gloo", 3), ("mpi", 2), ("gloo", 1))], group="tf_functions"
)
def test_functions(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases(
    "tf_sums",
    [("gloo", 2), *more(("gloo", 3))],
    slow=["value_and_gradient_over_random_splits"],
    group="tensorflow",
)
def test_sums(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases(
    "tf_sums", more(("gloo", 1), ("gloo", 4), ("mpi", 2)), cases=SUMS_EVERYWHERE, group="tensorflow"
)
def test_sums_everywhere(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_terms", [("gloo", 2)], slow=SLOW_TERMS, group="tensorflow")
def test_terms(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_terms", more(("gloo", 1), ("gloo", 3)), cases=TERMS_EVERYWHERE, group="tensorflow")
def test_terms_everywhere(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_ordinary", [("gloo", 2), *more(("gloo", 3))], group="tensorflow")
def test_ordinary_code(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_stream", [("gloo", 2), *more(("gloo", 3), ("mpi", 2))], group="tensorflow")
def test_streams(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_scale", [("gloo", 2), *more(("gloo", 3), ("mpi", 2))], group="tensorflow")
def test_scale(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("tf_nonfinite", [("gloo", 2), *more(("gloo", 1), ("gloo", 3), ("mpi", 2))], group="tf_tape")
def test_nonfinite(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
