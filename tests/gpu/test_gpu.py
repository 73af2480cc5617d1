"""PyTorch's cases on a GPU, over NCCL: one rank and two; ranks that share a GPU take turns on it.

What the cases are told by ``HVDLOSS_TEST_DEVICE`` stands in `tests/parallel/torch_support.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.ranks import Case, parallel_cases

pytestmark = pytest.mark.gpu

EVERYWHERE = [("gloo", 1), ("gloo", 2)]
TWO = [("gloo", 2)]
THREE = [("gloo", 3)]

# Of the modules whose other cases make tensors on the CPU, or say nothing about where tensors lie.
SHARDED = [
    "random_shards_equal_one_process",
    "extreme_logits",
    "half_precision_is_computed_in_float32",
    "absent_elements_leave_no_trace",
    "weights_and_absent_elements_through_an_objective",
    "a_second_backward_pass",
    "sampled_columns",
    "a_grid_trains_like_one_process",
]
FAULTS = [
    "negative_weight",
    "nan_loss",
    "no_call_on_any_rank",
    "an_exception_inside_a_backward_pass",
    "parameters_that_differ",
    "models_that_differ",
    "the_guard_names_the_parameter_and_the_ranks_that_drifted",
]
TERMS = [
    "skew_is_that_of_all_labels",
    "real_targets_are_binned_alike",
    "keys_soft_and_several_labels",
    "a_term_of_the_users_own",
    "importance_and_balance_weights",
    "robust_rank_weights",
    "a_label_that_is_no_class",
    "local_steps_are_averaged_by_weight",
    "an_outer_nesterov_step",
    "a_proximal_pull_follows_the_skew",
    "local_steps_with_accumulation_and_sum",
    "a_fault_in_a_stretch_returns_to_its_beginning",
    "a_skipped_update_keeps_nobody_waiting",
    "exchange_at_any_time_and_post_local",
    "the_optimizers_memory_is_shared_when_local_steps_end",
    "sparse_gradients_and_frozen_layers_in_local_steps",
    "compression_where_bytes_dominate",
]
# What a third rank makes another: sums of more than two, and gradients that travel one by one.
ON_THREE = [
    "uneven_batches",
    "a_rank_without_a_call",
    "accumulation_with_different_numbers_and_a_ragged_last",
    "every_split_of_the_same_samples_gives_the_same_gradient",
]

_ASK = """
import json, torch
answer = {"gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0, "nccl": False}
try:
    import horovod.torch as hvd
    answer["nccl"] = bool(hvd.nccl_built())
except ImportError as error:
    answer["horovod"] = str(error)
print(json.dumps(answer))
"""


@functools.cache
def missing() -> str:
    """Return why nothing can run here, or an empty string; asked in a process of its own."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed, so the GPU tests are SKIPPED"
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"torch does not load ({done.stderr.strip()[-200:]}), so the GPU tests are SKIPPED"
    answer = json.loads(done.stdout.splitlines()[-1])
    if not answer["gpus"]:
        return "torch sees no CUDA GPU here, so the GPU tests are SKIPPED"
    if not answer["nccl"]:
        return (
            "Horovod is not built with NCCL (hvdloss install --nccl), so the GPU tests are SKIPPED "
            + answer.get("horovod", "")
        )
    return ""


@pytest.fixture(autouse=True, scope="module")
def _on_the_gpu() -> Iterator[None]:
    if reason := missing():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVDLOSS_TEST_DEVICE", "cuda")
        yield


@parallel_cases("torch_cuda", EVERYWHERE, group="gpu")
def test_cuda(case: Case, request):
    case.check(request)


@parallel_cases("torch_exact", TWO, group="gpu")
def test_exact(case: Case, request):
    case.check(request)


@parallel_cases("torch_exact", THREE, cases=ON_THREE, group="gpu")
def test_exact_on_three(case: Case, request):
    case.check(request)


@parallel_cases("torch_training", TWO, group="gpu")
def test_training(case: Case, request):
    case.check(request)


@parallel_cases("torch_nonfinite", EVERYWHERE, group="gpu")
def test_nonfinite(case: Case, request):
    case.check(request)


@parallel_cases("torch_sums", TWO, group="gpu")
def test_sums(case: Case, request):
    case.check(request)


@parallel_cases("torch_contrastive", TWO, group="gpu")
def test_contrastive(case: Case, request):
    case.check(request)


@parallel_cases("torch_sharded", TWO, cases=SHARDED, group="gpu")
def test_sharded(case: Case, request):
    case.check(request)


@parallel_cases("torch_terms", TWO, cases=TERMS, group="gpu")
def test_terms(case: Case, request):
    case.check(request)


@parallel_cases("torch_faults", TWO, cases=FAULTS, group="gpu")
def test_faults(case: Case, request):
    case.check(request)


@parallel_cases("torch_metrics", TWO, group="gpu")
def test_metrics(case: Case, request):
    case.check(request)


@parallel_cases("torch_checkpoint", TWO, group="gpu")
def test_checkpoint(case: Case, request):
    case.check(request)


@parallel_cases("torch_compiled", TWO, group="gpu")
def test_compiled(case: Case, request):
    case.check(request)
