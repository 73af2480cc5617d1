"""PyTorch under real ranks: 2, 3 and 4 over Gloo, 2 over MPI; with less time not all of it everywhere."""

from __future__ import annotations

from ranks import Case, more, parallel_cases

LAUNCHES = [("gloo", 2), *more(("gloo", 3), ("mpi", 2), ("gloo", 4))]


@parallel_cases("torch_exact", [("gloo", 2), ("gloo", 3), ("mpi", 2), *more(("gloo", 4))], group="torch")
def test_exact(case: Case, request):
    case.check(request)


@parallel_cases("torch_training", LAUNCHES, group="torch")
def test_training(case: Case, request):
    case.check(request)


@parallel_cases("torch_faults", [("gloo", 2), *more(("gloo", 3), ("mpi", 2), ("gloo", 4))], group="torch")
def test_faults(case: Case, request):
    case.check(request)


@parallel_cases("torch_terms", [("gloo", 2), *more(("gloo", 3))], group="torch")
def test_terms(case: Case, request):
    case.check(request)


@parallel_cases(
    "torch_sums", [("gloo", 2), *more(("gloo", 1), ("gloo", 3), ("gloo", 4), ("mpi", 2))], group="torch"
)
def test_sums(case: Case, request):
    case.check(request)


@parallel_cases("torch_metrics", [("gloo", 2), *more(("gloo", 3), ("mpi", 2))], group="torch")
def test_metrics(case: Case, request):
    case.check(request)


@parallel_cases("torch_stream", [("gloo", 2), *more(("gloo", 3), ("mpi", 2))], group="torch")
def test_streams(case: Case, request):
    case.check(request)


@parallel_cases("torch_data", [("gloo", 2), ("gloo", 3)], group="torch")
def test_data(case: Case, request):
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
