"""The Keras cases of tests/parallel, under real ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from ranks import Case, more, parallel_cases

# What must hold for every number of ranks and both controllers; the rest runs on two ranks.
EVERYWHERE = [
    "a_string_loss_and_a_regularizer",
    "float32",
    "several_outputs_with_their_own_losses_and_weights",
    "a_rank_that_has_fewer_batches_of_unknown_number",
    "without_our_reduction_the_guard_raises",
]

TERMS_EVERYWHERE = [
    "skew_in_fit_is_that_of_all_labels",
    "terms_without_a_price_or_act_change_nothing",
    "fit_with_local_steps",
]


SLOW = [
    "fit_with_local_steps",
    "fit_with_local_steps_and_more",
    "several_losses_with_local_steps",
    "fit_with_weights_from_terms",
    "fit_with_a_proximal_pull_and_switching_compression",
    "a_period_that_goes_back_to_one",
    "batch_shares_batch_by_batch",
]


SLOW_FITS = [
    "generators_and_steps_per_execution",
    "options_of_optimizers",
    "fewer_batches_with_several_losses",
    "several_outputs_with_their_own_losses_and_weights",
    "other_losses_of_keras",
    "embeddings_and_fewer_batches",
]


@parallel_cases("keras_fit", [("gloo", 2)], slow=SLOW_FITS, group="tensorflow")
def test_fit(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases(
    "keras_callbacks",
    [("gloo", 2)],
    slow=["saved_models_load_without_the_library_and_train_on"],
    group="tensorflow",
)
def test_callbacks(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("keras_fit", more(("gloo", 3), ("gloo", 4), ("mpi", 2)), cases=EVERYWHERE, group="tensorflow")
def test_fit_everywhere(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases(
    "keras_callbacks", more(("gloo", 3)), cases=["metrics_are_those_of_one_process"], group="tensorflow"
)
def test_metrics(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("keras_stream", [("gloo", 2), *more(("gloo", 3), ("mpi", 2))], group="tensorflow")
def test_streams(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("keras_data", [("gloo", 2), *more(("gloo", 3))], group="tensorflow")
def test_data(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("keras_terms", [("gloo", 2)], slow=SLOW, group="tensorflow")
def test_terms(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases("keras_terms", more(("gloo", 1), ("gloo", 3)), cases=TERMS_EVERYWHERE, group="tensorflow")
def test_terms_everywhere(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@parallel_cases(
    "keras_nonfinite",
    [("gloo", 2), *more(("gloo", 3), ("mpi", 2))],
    slow=["local_steps"],
    group="keras",
)
def test_nonfinite(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)
