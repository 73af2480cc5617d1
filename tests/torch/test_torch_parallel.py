"""PyTorch under real ranks: all of it on 2 over Gloo, and on 3, 4 and over MPI what these make another."""

from __future__ import annotations

from tests.ranks import Case, parallel_cases


@parallel_cases("torch_exact", group="torch")
def test_exact(case: Case, request):
    case.check(request)


@parallel_cases("torch_training", group="torch")
def test_training(case: Case, request):
    case.check(request)


@parallel_cases("torch_functions", group="torch")
def test_functions(case: Case, request):
    case.check(request)


@parallel_cases("torch_faults", group="torch")
def test_faults(case: Case, request):
    case.check(request)


@parallel_cases("torch_ordinary", group="torch")
def test_ordinary_code(case: Case, request):
    case.check(request)


@parallel_cases("torch_terms", group="torch")
def test_terms(case: Case, request):
    case.check(request)


@parallel_cases("torch_sums", group="torch")
def test_sums(case: Case, request):
    case.check(request)


@parallel_cases("torch_metrics", group="torch")
def test_metrics(case: Case, request):
    case.check(request)


@parallel_cases("torch_every_metric", group="torch")
def test_every_metric(case: Case, request):
    case.check(request)


@parallel_cases("torch_stream", group="torch")
def test_streams(case: Case, request):
    case.check(request)


@parallel_cases("torch_data", group="torch")
def test_data(case: Case, request):
    case.check(request)


@parallel_cases("torch_scale", group="torch")
def test_scale(case: Case, request):
    case.check(request)


@parallel_cases("torch_compiled", group="torch")
def test_compiled(case: Case, request):
    case.check(request)


@parallel_cases("torch_beside_tensorflow")
def test_beside_tensorflow(case: Case, request):
    case.check(request)


@parallel_cases("torch_nonfinite", group="torch")
def test_nonfinite(case: Case, request):
    case.check(request)


@parallel_cases("torch_distributed", group="torch")
def test_horovods_names_over_torch_distributed(case: Case, request):
    case.check(request)


@parallel_cases("torch_packed", group="torch")
def test_packed_sequences(case: Case, request):
    case.check(request)


@parallel_cases("torch_several", group="torch")
def test_several_losses(case: Case, request):
    case.check(request)
