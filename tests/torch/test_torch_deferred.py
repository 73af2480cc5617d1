"""What is done for tensors whose values lie on a GPU, where there is none.

Under ranks on the CPU's tensors, which the library then treats as a GPU's: the numbers must be the same. And
in one process on the meta device, whose tensors have no values: what would wait for a device raises there.
`tests/gpu` runs the cases on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch

import hvdloss
import hvdloss.torch as hvd
from hvdloss.losses.ledger import Ledger, Ledgers
from hvdloss.step.phase import Event
from hvdloss.torch import step as module
from tests.ranks import Case, case_names, more, parallel_cases

NEED_A_GPU = {
    "horovod_sums_on_the_gpu",
    "nobody_waits_for_the_device",
    "beside_horovods_own_optimizer",
    "a_stream_of_the_users_own",
}
AS_ON_A_GPU = [name for name in case_names("torch_cuda") if name not in NEED_A_GPU]
# One for each place that looks at values where it can.
NONFINITE_COLUMNS = [
    "drop_is_the_step_of_the_other_ranks",
    "local_steps",
    "sparse_gradients",
    "without_weight_a_gradient_may_be_anything",
]
EXACT = [
    "a_rank_without_a_call",
    "all_weights_of_a_rank_are_zero",
    "nan_in_absent_elements",
    "ignored_targets",
    "accumulation_with_different_numbers_and_a_ragged_last",
]
SEVERAL = [
    "micro_batches_whose_weights_are_said_ahead",
    "a_scaler_over_several_losses",
]
TRAINING = [
    "grad_scaler_skips_on_all_ranks_together",
    "parameters_unused_on_some_ranks",
    "sparse_gradients_on_one_rank_only",
    "mixed_dtypes",
    "complex_parameters",
    "compression_fp16",
    "many_parameters_and_buckets",
]


def rest(name: str, chosen: list[str]) -> list[str]:
    """Return a module's other cases: for the slow suite."""
    return [one for one in case_names(name) if one not in chosen]


@pytest.fixture(autouse=True)
def _deferred() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVDLOSS_TEST_DEVICE", "deferred")
        yield


@parallel_cases("torch_cuda", [("gloo", 2), *more(("gloo", 3))], cases=AS_ON_A_GPU, group="deferred")
def test_as_on_a_gpu(case: Case, request):
    case.check(request)


@parallel_cases(
    "torch_nonfinite", [("gloo", 2)], slow=rest("torch_nonfinite", NONFINITE_COLUMNS), group="deferred"
)
def test_nonfinite(case: Case, request):
    case.check(request)


@parallel_cases("torch_exact", [("gloo", 2)], slow=rest("torch_exact", EXACT), group="deferred")
def test_exact(case: Case, request):
    case.check(request)


@parallel_cases("torch_several", [("gloo", 2)], slow=rest("torch_several", SEVERAL), group="deferred")
def test_several_losses(case: Case, request):
    case.check(request)


@parallel_cases("torch_training", [("gloo", 2)], slow=rest("torch_training", TRAINING), group="deferred")
def test_training(case: Case, request):
    case.check(request)


@parallel_cases("torch_sharded", more(("gloo", 2)), group="deferred")
def test_sharded(case: Case, request):
    case.check(request)


# -- without values -----------------------------------------------------------------------------------

META = torch.device("meta")


def step(model, objective, optimizer, passes, **call):
    """Make a step's backward passes, and all of ``step()`` but what reads the ledgers."""
    exact = optimizer._hvdloss
    x, y = torch.empty(8, 5, device=META), torch.empty(8, 1, device=META)
    dtype = next(model.parameters()).dtype
    optimizer.zero_grad()
    with mock.patch.object(exact, "synchronize"):  # which the last backward pass ends with
        for _ in range(passes):
            objective(model(x.to(dtype)), y.to(dtype), **call).backward()
    if not exact.reducer.planned:
        ledgers = Ledgers.of(
            [Ledger(numerator=8.0, weight=8.0, denominator=8.0, elements=8.0, micro_batches=1.0)]
        )
        exact._judged = ledgers, np.zeros((1, 0))
        exact._make_plan(late=False)
    exact._launch()
    exact.reducer.finish(8.0)
    exact._publish()
    exact.state.phase.to(Event.UPDATE)


@pytest.fixture
def unread(monkeypatch):
    """Parameters without values have no checksums."""
    hvd.init()
    assert hvd.size() == 1
    monkeypatch.setattr(module, "checksums", lambda parameters: [0] * len(parameters))


WEIGHTS = {
    "none": None,
    "number": 2.5,
    "array": np.ones((8, 1), dtype="float32"),
    "tensor": torch.empty(8, 1, device=META),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("unbucketed", ["4", "0.5"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_before_the_ledgers(unread, monkeypatch, weight, unbucketed, passes, dtype):
    monkeypatch.setenv("HVDLOSS_UNBUCKETED_MB", unbucketed)
    for terms in ((), (hvdloss.CommunicationCost(), hvdloss.DataSkew(bins=4))):
        sizes = [5, 512, 512, 1]
        layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        model = torch.nn.Sequential(*layers).to(META, dtype)
        objective = hvd.Objective("mse", terms=terms)
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = hvd.DistributedOptimizer(
            plain, model.named_parameters(), objective, backward_passes_per_step=passes
        )
        for _ in range(3):
            step(model, objective, optimizer, passes, weight=WEIGHTS[weight])
        assert all(p.grad.device == META for p in model.parameters())
        counts = optimizer._hvdloss.message_counts()
        assert counts["unbucketed"] == (unbucketed == "0.5")
        assert counts["buckets"] >= 1


def test_a_rank_without_a_batch_tells_from_the_device_of_the_others(unread):
    """Horovod refuses what lies on a CPU on one rank and on a GPU on another."""
    model = torch.nn.Linear(5, 1).to(META)
    objective = hvd.Objective("mse", terms=(hvdloss.DataSkew(bins=4),))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)
    exact = optimizer._hvdloss
    own = exact._own_ledger(None, 0, 0.0)
    assert own.device == META
    assert exact.ledgers.message().write(own).device == META
    told = exact.ledgers._rows()  # by the term
    assert told.device == META
    assert told.numel()


def test_the_meta_device_tells_a_wait(unread):
    """That the test above can fail: what looks at a value raises."""
    model = torch.nn.Linear(5, 1).to(META)
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)
    loss = objective(model(torch.empty(8, 5, device=META)), torch.empty(8, 1, device=META))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        loss.backward()
    assert optimizer.last_step is None
