"""PyTorch under real ranks: all of it on 2 over Gloo, and on 3, 4 and over MPI what these make another."""

from __future__ import annotations

from ranks import Case, more, parallel_cases

# Which cases run where: CONTRIBUTING, "Which launches". All run on two ranks; on three, which also send large
# gradients by themselves (see torch_support), all whose sums, splits or groups three ranks make others. On
# four, and over MPI, those that send something in a way of its own.
EXACT_ON_FOUR = [
    "uneven_batches",
    "a_rank_without_a_call",
    "only_one_rank_has_samples",
    "accumulation_with_different_numbers_and_a_ragged_last",
    "the_report_is_global",
    "random_splits",
    "every_split_of_the_same_samples_gives_the_same_gradient",
]

TRAINING_EVERYWHERE = [
    "clipping_by_norm_through_synchronize",
    "grad_scaler_skips_on_all_ranks_together",
    "parameters_unused_on_some_ranks",
    "sparse_gradients",
    "sparse_gradients_on_one_rank_only",
    "mixed_dtypes",
    "complex_parameters",
    "compression_fp16",
    "compression_bf16",
    "buckets_in_groups_and_predivide",
    "collectives_of_a_steady_step",
    "two_disjoint_process_sets",
    "a_process_set_that_leaves_a_rank_out",
    "a_closure_with_a_rank_without_samples",
    "broadcast_of_parameters_and_optimizer_state",
    "many_parameters_and_buckets",
    "a_plain_horovod_optimizer_beside",
    "an_elastic_state_saves_and_restores",
]

FAULTS_EVERYWHERE = [
    "negative_weight",
    "nan_loss",
    "no_call_on_any_rank",
    "an_exception_inside_a_backward_pass",
    "parameters_that_differ",
    "models_that_differ",
    "errors_inside_a_process_set_name_its_ranks",
    "the_guard_names_the_parameter_and_the_ranks_that_drifted",
]

SUMS_EVERYWHERE = [
    "value_and_gradient_over_random_splits",
    "sums_over_micro_batches_however_many_each_rank_has",
    "one_rank_is_to_blame_for_what_is_not_finite",
]

STREAMS_EVERYWHERE = [
    "ends_that_nobody_knows_are_one_process_with_the_same_global_batches",
    "the_flag_costs_no_message",
    "what_one_rank_cannot_read_is_raised_on_all",
]


@parallel_cases("torch_exact", [("gloo", 2), ("gloo", 3), ("mpi", 2)], group="torch")
def test_exact(case: Case, request):
    case.check(request)


@parallel_cases("torch_exact", more(("gloo", 4)), cases=EXACT_ON_FOUR, group="torch")
def test_exact_on_four(case: Case, request):
    case.check(request)


@parallel_cases("torch_training", [("gloo", 2), *more(("gloo", 3))], group="torch")
def test_training(case: Case, request):
    case.check(request)


@parallel_cases("torch_training", more(("mpi", 2), ("gloo", 4)), cases=TRAINING_EVERYWHERE, group="torch")
def test_training_everywhere(case: Case, request):
    case.check(request)


@parallel_cases("torch_functions", [("gloo", 2), *more(("gloo", 3), ("mpi", 2))], group="torch")
def test_functions(case: Case, request):
    case.check(request)


@parallel_cases("torch_faults", [("gloo", 2), *more(("gloo", 3))], group="torch")
def test_faults(case: Case, request):
    case.check(request)


@parallel_cases("torch_faults", more(("mpi", 2), ("gloo", 4)), cases=FAULTS_EVERYWHERE, group="torch")
def test_faults_everywhere(case: Case, request):
    case.check(request)


@parallel_cases("torch_ordinary", [("gloo", 2), *more(("gloo", 3))], group="torch")
def test_ordinary_code(case: Case, request):
    case.check(request)


@parallel_cases("torch_terms", [("gloo", 2), *more(("gloo", 3))], group="torch")
def test_terms(case: Case, request):
    case.check(request)


@parallel_cases("torch_sums", [("gloo", 2), *more(("gloo", 3))], group="torch")
def test_sums(case: Case, request):
    case.check(request)


@parallel_cases(
    "torch_sums", more(("gloo", 1), ("gloo", 4), ("mpi", 2)), cases=SUMS_EVERYWHERE, group="torch"
)
def test_sums_everywhere(case: Case, request):
    case.check(request)


@parallel_cases("torch_metrics", [("gloo", 2), *more(("gloo", 3))], group="torch")
def test_metrics(case: Case, request):
    case.check(request)


@parallel_cases("torch_every_metric", [("gloo", 2), *more(("gloo", 3))], group="torch")
def test_every_metric(case: Case, request):
    case.check(request)


@parallel_cases("torch_stream", [("gloo", 2), *more(("gloo", 3))], group="torch")
def test_streams(case: Case, request):
    case.check(request)


@parallel_cases("torch_stream", more(("mpi", 2)), cases=STREAMS_EVERYWHERE, group="torch")
def test_streams_everywhere(case: Case, request):
    case.check(request)


@parallel_cases("torch_data", [("gloo", 2), ("gloo", 3)], group="torch")
def test_data(case: Case, request):
    case.check(request)


@parallel_cases("torch_scale", [("gloo", 2), ("gloo", 3), *more(("mpi", 2))], group="torch")
def test_scale(case: Case, request):
    case.check(request)


@parallel_cases("torch_compiled", more(("gloo", 2)), group="torch")
def test_compiled(case: Case, request):
    case.check(request)


@parallel_cases("torch_beside_tensorflow", [("gloo", 2)])
def test_beside_tensorflow(case: Case, request):
    case.check(request)


@parallel_cases("torch_nonfinite", [("gloo", 2), *more(("gloo", 3), ("mpi", 2), ("gloo", 1))], group="torch")
def test_nonfinite(case: Case, request):
    case.check(request)
