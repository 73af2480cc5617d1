"""The exact optimizer in one process, and what the module offers."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import textwrap

import pytest
import torch

import hvdloss.torch as hvd
from hvdloss.errors import ConfigError, HvdlossError, NoWeightError, UsageError, WeightError

# "compression", "functions" and "optimizer" are modules here as there: ours.
OVERRIDDEN = {"DistributedOptimizer", "Compression", "compression", "functions", "optimizer"}
OVERRIDDEN |= {"allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"}
OVERRIDDEN |= {"SyncBatchNorm", "elastic", "init", "shutdown"}


@pytest.fixture(autouse=True, scope="module")
def _initialised():
    hvd.init()
    assert hvd.size() == 1


def _model(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).to(dtype)


def _data(n=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(n, k, generator=g, dtype=torch.float64).to(dtype) for k in (3, 1))


def _wrapped(model, optimizer=None, **options):
    objective = hvd.Objective("mse")
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return objective, hvd.DistributedOptimizer(optimizer, model.named_parameters(), objective, **options)


@pytest.mark.parametrize("passes", [1, 3])
def test_size_one_without_horovodrun(passes):
    model = _model()
    one = copy.deepcopy(model)
    objective, optimizer = _wrapped(model, backward_passes_per_step=passes)
    own = torch.optim.SGD(one.parameters(), lr=0.1)
    x, y = _data()
    w = torch.rand(8, 1, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        for part in torch.arange(8).tensor_split(passes):
            objective(model(x[part]), y[part], weight=w[part]).backward()
        optimizer.step()
        own.zero_grad()
        loss = ((one(x) - y).pow(2) * w).sum() / w.sum()
        loss.backward()
        own.step()
        assert optimizer.last_step.loss == pytest.approx(loss.item(), rel=1e-12)
    for p, q in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters(dtype):
    """Weights in thousands do not overflow the held gradients."""
    model = _model(dtype)
    x, y = _data(dtype=dtype)
    objective, optimizer = _wrapped(model, backward_passes_per_step=2)
    for _ in range(3):
        optimizer.zero_grad()
        for part in (slice(0, 6), slice(6, 8)):
            objective(model(x[part]), y[part], weight=5e4).backward()
        optimizer.step()
        mine = [p.grad for p in model.parameters()]
        assert all(torch.isfinite(m).all() for m in mine)
    with torch.no_grad():  # the gradient of the last step, at the parameters before it
        for p in model.parameters():
            p += 0.1 * p.grad
    optimizer.zero_grad()
    (model(x) - y).pow(2).mean().backward()
    for m, p in zip(mine, model.parameters(), strict=True):
        torch.testing.assert_close(m, p.grad, rtol=5e-2, atol=2e-2)


def test_a_backward_pass_of_something_else_leaves_its_gradients():
    model = _model()
    objective, optimizer = _wrapped(model)
    x, y = _data()
    for _ in range(2):  # before and after there is a plan
        optimizer.zero_grad()
        expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
        model(x).sum().backward()
        for p, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, e)
        with pytest.raises(UsageError, match="without passing through"):
            optimizer.step()
        optimizer.zero_grad()
        objective(model(x), y).backward()
        optimizer.step()


def test_errors_at_size_one_and_a_good_step_after():
    model = _model()
    objective, optimizer = _wrapped(model)
    x, y = _data()
    for weight, kind in ((-1.0, WeightError), (0.0, NoWeightError), (float("nan"), WeightError)):
        objective(model(x), y, weight=weight).backward()
        with pytest.raises(kind, match="Nothing was updated"):
            optimizer.step()
        optimizer.zero_grad()
    objective(model(x), y).backward()
    optimizer.step()
    assert optimizer.last_step.step == 1


def test_instance_is_of_the_wrapped_class_and_shares_its_groups():
    model = _model()
    plain = torch.optim.AdamW(model.parameters(), lr=0.3)
    _, optimizer = _wrapped(model, plain)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert type(optimizer).__name__ == "AdamW"
    assert optimizer.param_groups is plain.param_groups
    assert optimizer.objective.name == "mse"
    assert "AdamW" in repr(optimizer)


def test_without_an_objective_it_is_horovods():
    import horovod.torch as horovod

    model = _model()
    mine = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    theirs = horovod.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters()
    )
    assert type(mine).__module__ == type(theirs).__module__ == "horovod.torch.optimizer"
    assert set(dir(type(mine))) == set(dir(type(theirs)))
    assert type(mine).step.__code__ is type(theirs).step.__code__
    assert not hasattr(mine, "last_step")


def test_every_argument_reaches_horovod(monkeypatch):
    import horovod.torch as horovod

    signature = inspect.signature(horovod.DistributedOptimizer)
    seen = {}
    monkeypatch.setattr(
        horovod, "DistributedOptimizer", lambda *a, **k: seen.update(signature.bind(*a, **k).arguments)
    )
    optimizer = torch.optim.SGD(_model().parameters(), lr=0.1)
    values = {
        "named_parameters": [("a", None)],
        "compression": hvd.Compression.fp16,
        "backward_passes_per_step": 3,
        "op": hvd.Sum,
        "gradient_predivide_factor": 2.0,
        "groups": 4,
        "sparse_as_dense": True,
        "process_set": object(),
    }
    assert set(values) | {"optimizer", "num_groups"} == set(signature.parameters)
    hvd.DistributedOptimizer(optimizer, **values)
    assert seen == {"optimizer": optimizer, **values}
    seen.clear()
    hvd.DistributedOptimizer(optimizer, num_groups=5)
    assert seen["groups"] == 5
    seen.clear()
    hvd.DistributedOptimizer(optimizer, None, hvd.Compression.fp16)  # Horovod's third position
    assert seen["compression"] is hvd.Compression.fp16


def test_every_public_name_of_horovod_is_here_and_the_same():
    import horovod.torch as horovod

    names = [name for name in vars(horovod) if not name.startswith("_")]
    assert len(names) > 50
    for name in names:
        assert hasattr(hvd, name), name
        if name not in OVERRIDDEN:
            assert getattr(hvd, name) is getattr(horovod, name), name
    assert hvd.Compression.none is horovod.Compression.none
    assert hvd.Compression.fp16 is horovod.Compression.fp16
    assert {"Objective", "StepReport", "DistributedOptimizer"} <= set(hvd.__all__)
    # What Horovod's wrapper takes by keyword, ours takes as well.
    theirs = inspect.signature(horovod.DistributedOptimizer).parameters
    assert set(theirs) <= set(inspect.signature(hvd.DistributedOptimizer).parameters)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"op": hvd.Sum}, ["op"]),
        ({"backward_passes_per_step": 0}, ["backward_passes_per_step=0"]),
        ({"gradient_predivide_factor": 0.0}, ["gradient_predivide_factor"]),
        ({"groups": -1}, ["groups=-1"]),
        ({"named_parameters": [("a", None), ("a", None)]}, ["twice", "a"]),
        ({"named_parameters": []}, ["leaves out"]),
        ({"named_parameters": ["a"]}, ["pairs"]),
        ({"objective": "mse"}, ["objective='mse'"]),
    ],
)
def test_wrong_arguments_are_named(options, words):
    model = _model()
    arguments = {"named_parameters": model.named_parameters(), "objective": hvd.Objective("mse"), **options}
    with pytest.raises(ConfigError) as caught:
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **arguments)
    for word in words:
        assert word in str(caught.value)


def test_wrapping_twice_is_refused():
    model = _model()
    objective, optimizer = _wrapped(model)
    with pytest.raises(ConfigError, match="already wrapped"):
        hvd.DistributedOptimizer(optimizer, model.named_parameters(), objective)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(ConfigError, match="not a torch"):
        hvd.DistributedOptimizer("SGD", None, hvd.Objective("mse"))


SINGLE = """
import importlib.abc, importlib.util, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "horovod":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "horovod" else real(name, *a)
sys.meta_path.insert(0, Hide())
import torch
import hvdloss.torch as hvd
assert "horovod" not in sys.modules
"""


def _without_horovod(program):
    text = SINGLE + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_horovod_every_public_name_exists():
    import horovod.torch as horovod

    wanted = {
        name
        for name in vars(horovod)
        if not name.startswith("_") and not inspect.ismodule(getattr(horovod, name))
    } | {"elastic"}
    shown = set(_without_horovod("print(*(n for n in dir(hvd) if not n.startswith('_')))").split())
    # Horovod's module also shows what it imports for itself; a program has no use for that.
    private = {
        name
        for name in wanted
        if not getattr(getattr(horovod, name), "__module__", "horovod").startswith("horovod")
    }
    helpers = {
        "check_extension",
        "check_installed_version",
        "split_list",
        "num_rank_is_power_2",
        "gpu_available",
    }
    helpers |= {
        "get_average_backwards_compatibility_fun",
        "is_version_greater_equal_than",
        "check_num_rank_power_of_2",
    }
    assert wanted - private - helpers <= shown, sorted(wanted - private - helpers - shown)


def test_without_horovod_training_gives_the_same_numbers():
    program = """
    hvd.init()
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1).double()
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), objective,
        backward_passes_per_step=2)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    x, y = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    start = [p.detach().clone() for p in model.parameters()]
    for part in (slice(0, 4), slice(4, 6)):
        objective(model(x[part]), y[part]).backward()
    optimizer.step()
    with torch.no_grad():
        mine = [p.clone() for p in model.parameters()]
        for p, s in zip(model.parameters(), start):
            p.copy_(s)
    optimizer.zero_grad()
    (model(x) - y).pow(2).mean().backward()
    for p, m in zip(model.parameters(), mine):
        torch.testing.assert_close(m, p - 0.1 * p.grad, rtol=1e-12, atol=1e-14)
    assert hvd.rank() == 0 and hvd.size() == 1
    assert torch.equal(hvd.allreduce(torch.ones(2)), torch.ones(2))
    assert hvd.allgather_object(3) == [3]
    plain = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    plain.synchronize()
    with plain.skip_synchronize():
        plain.step()
    print(optimizer.last_step.elements)
    """
    assert _without_horovod(program).split() == ["6"]


def test_every_error_of_the_adapter_is_an_hvdloss_error():
    assert issubclass(ConfigError, HvdlossError)
