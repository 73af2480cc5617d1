"""Ordinary training code around the exact optimizer: clipping, AMP, groups, checkpoints, schedules."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch_support import (
    DEVICE,
    EXACT,
    Batch,
    Trial,
    before_case,
    difference,
    flat,
    generator,
    gradients,
    mse,
    network,
    regression,
    same_on_all_ranks,
    uneven,
    union,
)

import hvdloss.torch as hvd
from hvdloss.errors import UsageError
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 dist-2")

__all__ = ["before_case"]

FLOAT64 = "error, float64"


def merged(*results):
    """Return the largest of each number."""
    out = {}
    for result in results:
        for key, value in result.items():
            out[key] = max(value, out.get(key, value))
    return out


class Parts(torch.nn.Module):
    """A model whose parts can be left out, shared, frozen or made sparse."""

    def __init__(self, **parts):
        super().__init__()
        self.parts = torch.nn.ModuleDict(parts)
        self.use = None  # names of the parts that this forward pass uses; None for all

    def forward(self, x):
        names = list(self.parts) if self.use is None else self.use
        return sum(self.parts[name](x) for name in names)


def parts(g, *names):
    return Parts(**{name: network(g) for name in names})


# -- clipping and AMP ----------------------------------------------------------------------------------


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_clipping_by_norm_through_synchronize():
    g = generator(1)
    trial = Trial(network(g), passes=2)
    for _ in range(3):
        step = regression(g, uneven(micro=2))
        trial.optimizer.zero_grad()
        trial.backward(step)
        trial.optimizer.synchronize()
        norm = torch.nn.utils.clip_grad_norm_(trial.model.parameters(), 0.1)
        same_on_all_ranks(norm.item())
        with trial.optimizer.skip_synchronize():
            trial.optimizer.step()
        mine = gradients(trial.model)
        trial.reference(step)
        trial.averaged(step)
        trial.plain_errors.append(difference(gradients(trial.plain), gradients(trial.one)))
        with trial.plain_optimizer.skip_synchronize():
            trial.plain_optimizer.step()
        own = torch.nn.utils.clip_grad_norm_(trial.one.parameters(), 0.1)
        trial.near(abs(own.item() - norm.item()) / own.item(), "norm")
        trial.near(difference(mine, gradients(trial.one)), "clipped gradient")
        trial.one_optimizer.step()
        trial.near(difference(flat(trial.model.parameters()), flat(trial.one.parameters())), "parameters")
    return trial.finish()


def _scaled_step(trial, scaler, step, unscale, spoiled=False):
    trial.optimizer.zero_grad()
    for b in step[hvd.rank()]:
        prediction = trial.model(b.x)
        if spoiled:
            prediction.register_hook(lambda grad: grad * math.inf)
        scaler.scale(trial.objective(prediction, b.y, weight=b.weight)).backward()
    if unscale:
        trial.optimizer.synchronize()
        scaler.unscale_(trial.optimizer)
        torch.nn.utils.clip_grad_norm_(trial.model.parameters(), 1e6)
        with trial.optimizer.skip_synchronize():
            scaler.step(trial.optimizer)
    else:
        scaler.step(trial.optimizer)
    scaler.update()


def case_grad_scaler():
    """A plain loop, and one with unscale_ after synchronize()."""
    g = generator(2)
    results = []
    for unscale in (False, True):
        trial = Trial(network(g), passes=2)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
        for _ in range(4):
            step = regression(g, uneven(micro=2))
            _scaled_step(trial, scaler, step, unscale)
            trial.reference(step)
            trial.one_optimizer.step()
            error = difference(flat(trial.model.parameters()), flat(trial.one.parameters()))
            trial.near(error, "parameters")
        assert trial.optimizer.last_step.step == 4
        results.append(trial.finish())
    return merged(*results)


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_grad_scaler_skips_on_all_ranks_together():
    """An overflow on one rank only: all ranks skip the step and shrink the scale alike."""
    g = generator(3)
    results = []
    for unscale in (False, True):
        trial = Trial(network(g))
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
        _scaled_step(trial, scaler, regression(g, uneven()), unscale)
        before = flat(trial.model.parameters())
        step = regression(g, uneven())
        _scaled_step(trial, scaler, step, unscale, spoiled=hvd.rank() == hvd.size() - 1)
        assert torch.equal(before, flat(trial.model.parameters())), "the step was not skipped"
        assert scaler.get_scale() == 2.0**9
        trial.one.load_state_dict(trial.model.state_dict())
        # torch shares what it loads
        trial.one_optimizer.load_state_dict(copy.deepcopy(trial.optimizer.state_dict()))
        step = regression(g, uneven())
        _scaled_step(trial, scaler, step, unscale)
        trial.reference(step)
        trial.one_optimizer.step()
        error = difference(flat(trial.model.parameters()), flat(trial.one.parameters()))
        trial.near(error, "parameters")
        results.append(trial.finish())
    return merged(*results)


def case_autocast_bfloat16():
    """bfloat16 rounds each rank's products by itself; what is left is far below plain averaging's error."""
    g = generator(4)
    model = network(g, torch.float32)
    trial = Trial(model, tolerance=3e-2)
    plain = []
    for _ in range(3):
        step = regression(g, uneven(8, more=8), dtype=torch.float32)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            trial.optimizer.zero_grad()
            for b in step[hvd.rank()]:
                loss = trial.objective(trial.model(b.x), b.y, weight=b.weight)
                assert loss.dtype == torch.float32
        loss.backward()
        trial.optimizer.step()
        mine = gradients(trial.model)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            trial.reference(step)
        trial.near(difference(mine, gradients(trial.one)), "gradient")
        trial.averaged(step)
        plain.append(difference(gradients(trial.plain), gradients(trial.one)))
        with trial.plain_optimizer.skip_synchronize():
            trial.plain_optimizer.step()
        trial.one.load_state_dict(trial.model.state_dict())
    assert max(plain) > 10 * trial.error, (plain, trial.error)
    return {"error, autocast bfloat16": trial.error, "plain averaging's error": max(plain)}


# -- parameters and groups -----------------------------------------------------------------------------


def case_several_parameter_groups():
    g = generator(5)

    def make(params):
        first, *rest = params
        return torch.optim.AdamW(
            [{"params": [first], "lr": 0.05, "weight_decay": 0.3}, {"params": rest}], lr=0.01
        )

    trial = Trial(network(g), make)
    for _ in range(3):
        trial.step(regression(g, uneven()))
    assert [group["lr"] for group in trial.optimizer.param_groups] == [0.05, 0.01]
    return trial.finish()


def case_a_group_added_later():
    g = generator(6)
    model = parts(g, "a", "b")
    trial = Trial(copy.deepcopy(model), lambda ps: torch.optim.SGD(ps, lr=0.05))
    # The wrapped optimizer holds part a only; b joins after two steps.
    for which, mine in ((trial.model, True), (trial.one, False)):
        optimizer = torch.optim.SGD(which.parts["a"].parameters(), lr=0.05, momentum=0.5)
        if mine:
            optimizer = hvd.DistributedOptimizer(
                optimizer, list(which.named_parameters()), trial.objective, backward_passes_per_step=2
            )
            trial.optimizer = optimizer
        else:
            trial.one_optimizer = optimizer
    trial.plain = copy.deepcopy(model)
    trial.plain_optimizer = hvd.DistributedOptimizer(torch.optim.SGD(trial.plain.parameters(), lr=0.0))
    for k in range(5):
        if k == 2:
            for which, optimizer in ((trial.model, trial.optimizer), (trial.one, trial.one_optimizer)):
                optimizer.add_param_group({"params": list(which.parts["b"].parameters()), "lr": 0.02})
        for which in (trial.model, trial.one):
            which.zero_grad()
        step = regression(g, uneven())
        trial.optimizer.zero_grad()
        trial.backward(step)
        trial.optimizer.step()
        trial.reference(step)
        trial.one_optimizer.step()
        trial.near(
            difference(
                flat(p.grad for p in trial.model.parts["a"].parameters()),
                flat(p.grad for p in trial.one.parts["a"].parameters()),
            ),
            "gradient",
        )
        trial.near(difference(flat(trial.model.parameters()), flat(trial.one.parameters())), "parameters")
    return trial.finish()


def case_frozen_and_unfrozen_later():
    g = generator(7)
    model = parts(g, "a", "b")
    for p in model.parts["b"].parameters():
        p.requires_grad_(False)
    trial = Trial(model, lambda ps: torch.optim.AdamW(ps, lr=0.01))
    start = flat(model.parts["b"].parameters())
    for k in range(6):
        if k == 2:
            assert torch.equal(start, flat(model.parts["b"].parameters()))
        if k in (2, 4):  # thawed, then frozen again: the optimizer no longer touches it
            for which in (trial.model, trial.one, trial.plain):
                for p in which.parts["b"].parameters():
                    p.requires_grad_(k == 2)
                    p.grad = None
        trial.step(regression(g, uneven()), plain=False)
    return trial.finish()


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_parameters_unused_on_some_ranks():
    g = generator(8)
    trial = Trial(parts(g, "a", "b", "c"), lambda ps: torch.optim.AdamW(ps, lr=0.01))
    for k in range(4):
        step = regression(g, uneven())
        used = [["a", "b"] if (rank + k) % 2 else ["a"] for rank in range(hvd.size())]
        trial.optimizer.zero_grad()
        trial.model.use = used[hvd.rank()]
        trial.backward(step)
        trial.optimizer.step()
        # One process: every rank's samples through the parts that rank used.
        trial.one_optimizer.zero_grad()
        total = union(step).weight.sum()
        for rank, row in enumerate(step):
            trial.one.use = used[rank]
            for b in row:
                ((mse(trial.one(b.x), b.y) * b.weight).sum() / total).backward()
        # No rank used c: no gradient, so no decay, no state, as in one process.
        assert all(p.grad is None for p in trial.model.parts["c"].parameters())
        trial.near(difference(gradients(trial.model), gradients(trial.one)), "gradient")
        trial.one_optimizer.step()
        trial.near(difference(flat(trial.model.parameters()), flat(trial.one.parameters())), "parameters")
    assert len(trial.optimizer.state) == 8
    return trial.finish()


def case_tied_parameters():
    g = generator(9)

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down = torch.nn.Linear(5, 5, dtype=torch.float64)
            self.up = torch.nn.Linear(5, 5, dtype=torch.float64)
            self.up.weight = self.down.weight
            self.out = torch.nn.Linear(5, 1, dtype=torch.float64)

        def forward(self, x):
            return self.out(self.up(torch.tanh(self.down(x))))

    torch.manual_seed(1)
    trial = Trial(Tied(), passes=2)
    for _ in range(3):
        trial.step(regression(g, uneven(micro=2)))
    return trial.finish()


class Bag(torch.nn.Module):
    """An embedding and a dense layer; `sparse` says whether the embedding's gradient is."""

    def __init__(self, g, sparse):
        super().__init__()
        self.table = torch.nn.Embedding(50, 4, sparse=sparse, dtype=torch.float64)
        self.out = torch.nn.Linear(4, 1, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))

    def forward(self, x):
        return self.out(torch.tanh(self.table(x)).sum(1))


def _rows(g, counts):
    return [
        [
            Batch(
                torch.randint(12 * rank % 30, 12 * rank % 30 + 20, (n, 3), generator=g),
                torch.randn(n, 1, generator=g, dtype=torch.float64) + rank,
                torch.rand(n, 1, generator=g, dtype=torch.float64),
            )
            for n in row
        ]
        for rank, row in enumerate(counts)
    ]


def _plain_error(trial, step):
    """Average the ranks' mean gradients directly (Horovod's optimizer hangs on mixed sparsity)."""
    local = copy.deepcopy(trial.one)
    local.zero_grad()
    for b in step[hvd.rank()]:
        (mse(local(b.x), b.y).mul(b.weight).sum() / b.weight.sum() / len(step[hvd.rank()])).backward()
    return hvd.allreduce(gradients(local), name="plain", op=hvd.Average)


def _sparse_trial(seed, sparse_here, *, passes=2, make=None, **options):
    g = generator(seed)
    model = Bag(g, sparse=True)
    make = make or (lambda ps: torch.optim.SGD(ps, lr=0.1))
    trial = Trial(model, make, passes=passes, **options)
    trial.model.table.sparse = sparse_here
    plain = []
    for k in range(4):
        counts = uneven(micro=passes)
        if k in (0, 2):
            counts[k // 2] = []  # a rank that saw nothing, also in the first step
        step = _rows(g, counts)
        averaged = _plain_error(trial, step)
        trial.step(step, plain=False)
        plain.append(difference(averaged, gradients(trial.one)))
        layout = trial.model.table.weight.grad.layout
        assert (layout is not torch.strided) is True, layout
    result = trial.finish()
    assert max(plain) > 1e-3
    return {**result, "plain averaging's error": max(plain)}


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_sparse_gradients():
    return _sparse_trial(10, True)


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_sparse_gradients_on_one_rank_only():
    return _sparse_trial(11, hvd.rank() == hvd.size() - 1)


def case_sparse_gradients_as_dense():
    return _sparse_trial(12, True, sparse_as_dense=True)


def case_sparse_adam():
    """An optimizer that takes nothing but sparse gradients, beside a dense one."""
    g = generator(13)
    model = Bag(g, sparse=True).to(DEVICE)
    one = copy.deepcopy(model)
    objective = hvd.Objective("mse")

    def make(which):
        return (
            torch.optim.SparseAdam(list(which.table.parameters()), lr=0.05),
            torch.optim.SGD(which.out.parameters(), lr=0.05),
        )

    mine = [hvd.DistributedOptimizer(o, None, objective) for o in make(model)]
    ones = make(one)
    worst = 0.0
    for _ in range(3):
        step = _rows(g, uneven())
        for optimizer in (*mine, *ones):
            optimizer.zero_grad()
        (b,) = step[hvd.rank()]
        objective(model(b.x), b.y, weight=b.weight).backward()
        whole = union(step)
        (mse(one(whole.x), whole.y).mul(whole.weight).sum() / whole.weight.sum()).backward()
        for optimizer in (*mine, *ones):
            optimizer.step()
        worst = max(worst, difference(flat(model.parameters()), flat(one.parameters())))
    assert worst <= EXACT[torch.float64], worst
    return {FLOAT64: worst}


class Mixed(torch.nn.Module):
    """One parameter of each dtype, used elementwise, so that only sums over samples round."""

    def __init__(self, g):
        super().__init__()
        for name, dtype in (("d", torch.float64), ("f", torch.float32), ("b", torch.bfloat16)):
            value = torch.randn(5, generator=g, dtype=torch.float64).to(dtype)
            self.register_parameter(name, torch.nn.Parameter(value))

    def forward(self, x):
        terms = [x * self.d, (x.float() * self.f).double(), (x.bfloat16() * self.b).double()]
        return sum(terms).sum(1, keepdim=True)


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_mixed_dtypes():
    g = generator(14)
    trial = Trial(Mixed(g), lambda ps: torch.optim.SGD(ps, lr=0.0), passes=2)
    errors = {"d": 0.0, "f": 0.0, "b": 0.0}
    for _ in range(3):
        step = regression(g, uneven(micro=2))
        trial.optimizer.zero_grad()
        trial.backward(step)
        trial.optimizer.step()
        trial.reference(step)
        for name in errors:
            mine, own = getattr(trial.model, name).grad, getattr(trial.one, name).grad
            assert mine.dtype == own.dtype
            errors[name] = max(errors[name], difference(flat([mine]), flat([own])))
    assert errors["d"] <= 1e-12, errors
    assert errors["f"] <= 1e-5, errors
    assert errors["b"] <= 2e-2, errors
    return {FLOAT64: errors["d"], "error, float32": errors["f"], "error, bfloat16": errors["b"]}


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_complex_parameters():
    g = generator(15)

    class Waves(torch.nn.Module):
        def __init__(self):
            super().__init__()
            value = torch.randn(5, 2, generator=g, dtype=torch.complex128)
            self.a = torch.nn.Parameter(value)

        def forward(self, x):
            return (x.to(self.a.dtype) @ self.a).abs().sum(1, keepdim=True)

    trial = Trial(Waves(), lambda ps: torch.optim.SGD(ps, lr=0.05), tolerance=1e-12)
    worst = 0.0
    for _ in range(3):
        step = regression(g, uneven())
        trial.optimizer.zero_grad()
        trial.backward(step)
        trial.optimizer.step()
        trial.reference(step)
        mine, own = torch.view_as_real(trial.model.a.grad), torch.view_as_real(trial.one.a.grad)
        worst = max(worst, difference(flat([mine]), flat([own])))
        trial.one_optimizer.step()
    assert worst <= 1e-12
    return {FLOAT64: worst}


def case_channels_last_and_other_layouts():
    """Parameters that are not contiguous keep their layout and get the right gradient."""
    g = generator(16)

    class Images(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 6, 3, dtype=torch.float64)
            self.out = torch.nn.Linear(6, 1, dtype=torch.float64)

        def forward(self, x):
            return self.out(self.conv(x.reshape(-1, 1, 5, 1).expand(-1, 1, 5, 5)).amax((2, 3)))

    torch.manual_seed(2)
    model = Images().to(memory_format=torch.channels_last)
    model.out.weight = torch.nn.Parameter(torch.randn(6, 1, generator=g, dtype=torch.float64).t())
    trial = Trial(model, passes=2)
    for _ in range(3):
        trial.step(regression(g, uneven(micro=2)))
    return trial.finish()


# -- what travels --------------------------------------------------------------------------------------


def _compressed(compression, tolerance, key, size=1.0):
    g = generator(17)
    trial = Trial(network(g, torch.float32), passes=2, compression=compression, tolerance=tolerance)
    plain = []
    for k in range(4):
        counts = uneven(micro=2)
        counts[k % hvd.size()] = []
        step = regression(g, counts, dtype=torch.float32)
        for row in step:
            for b in row:
                b.weight *= size
        trial.optimizer.zero_grad()
        trial.backward(step)
        trial.optimizer.step()
        mine = gradients(trial.model)
        trial.reference(step)
        trial.near(difference(mine, gradients(trial.one)), "gradient")
        trial.averaged(step)
        plain.append(difference(gradients(trial.plain), gradients(trial.one)))
        with trial.plain_optimizer.skip_synchronize():
            trial.plain_optimizer.step()
        trial.one.load_state_dict(trial.model.state_dict())
    same_on_all_ranks(flat(trial.model.parameters()).tolist())
    return {f"error, {key}": trial.error, "plain averaging's error": max(plain)}


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_compression_fp16():
    """float16 keeps 11 bits: 2e-3. Weights in millions must not overflow what travels."""
    return merged(*(_compressed(hvd.Compression.fp16, 2e-3, "fp16", size) for size in (1.0, 1e6, 1e-6)))


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_compression_bf16():
    """bfloat16 keeps 8 bits: 1.5e-2."""
    return merged(*(_compressed(hvd.Compression.bf16, 1.5e-2, "bf16", size) for size in (1.0, 1e6)))


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_buckets_in_groups_and_predivide():
    g = generator(18)
    results = []
    for options in (
        {"groups": 3},
        {"num_groups": 2},
        {"groups": "lists"},
        {"gradient_predivide_factor": 4.0},
    ):
        model = network(g)
        if options.get("groups") == "lists":
            first, second, *_ = model.parameters()
            options = {"groups": [[first, second]]}
        trial = Trial(model, passes=2, **options)
        for _ in range(3):
            trial.step(regression(g, uneven(micro=2)))
        results.append(trial.finish())
    return merged(*results)


@contextmanager
def counted():
    """Count the calls of the engine's collectives; each is still made."""
    from hvdloss.torch._backend import hvd as horovod

    calls = Counter()
    names = [
        name
        for name in vars(horovod)
        if name.startswith(("allreduce", "grouped_", "allgather", "broadcast", "alltoall", "reducescatter"))
        or name in ("sparse_allreduce_async", "barrier", "join")
    ]
    real = {name: getattr(horovod, name) for name in names}

    def counting(name):
        def call(*args, **kwargs):
            calls[name] += 1
            return real[name](*args, **kwargs)

        return call

    for name in names:
        setattr(horovod, name, counting(name))
    try:
        yield calls
    finally:
        for name in names:
            setattr(horovod, name, real[name])


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_collectives_of_a_steady_step():
    """One asynchronous all-reduce per bucket, the ledgers in one of them; nothing that blocks."""
    g = generator(19)
    for expected, passes, half in ((1, 1, False), (3, 2, False), (1, 1, True)):
        model = network(g)
        first, second, *rest = model.parameters()
        groups = [[first, second], rest[:1], rest[1:]] if expected == 3 else [[first, second, *rest]]
        options = {"compression": hvd.Compression.fp16} if half else {}
        trial = Trial(model, groups=groups, passes=passes, tolerance=1e-2 if half else None, **options)
        trial.step(regression(g, uneven(micro=passes)))
        buckets = len(trial.optimizer._hvdloss.buckets)
        assert buckets == expected, buckets
        for k in range(3):
            counts = uneven(micro=passes)
            if k == 1:
                counts[0] = []
            step = regression(g, counts)
            with counted() as calls:
                trial.optimizer.zero_grad()
                trial.backward(step)
                trial.optimizer.step()
            # Rounded to 16 bits the ledgers would not be exact: they go by themselves.
            assert dict(calls) == {"allreduce_async_": buckets + half}, calls
            travel = trial.optimizer.last_step.choices["comm_plan"]
            assert travel == {"messages": buckets + half, "buckets": buckets, "unbucketed": 0, "sparse": 0}
            trial.compare(step, plain=False)
    return {"collectives of a step, one bucket": 1}


# -- process sets --------------------------------------------------------------------------------------


def _in_sets(sets, seed):
    """Train one model per set on that set's ranks; return this rank's error, or what it kept."""
    g = generator(seed)
    mine = next((s for s in sets if s.included()), None)
    # A rank outside of every set still makes the same calls, with the first one.
    group = mine or sets[0]
    model = network(g)
    one = copy.deepcopy(model)
    objective = hvd.Objective("mse", process_set=group)
    make = lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)  # noqa: E731
    optimizer = hvd.DistributedOptimizer(make(model), model.named_parameters(), objective, process_set=group)
    ones = make(one)
    worst = plain = 0.0
    for _ in range(3):
        step = regression(g, uneven())
        optimizer.zero_grad()
        ones.zero_grad()
        (b,) = step[hvd.rank()]
        objective(model(b.x), b.y, weight=b.weight).backward()
        optimizer.step()
        members = group.ranks if mine else [hvd.rank()]
        whole = union([step[r] for r in members])
        (mse(one(whole.x), whole.y).mul(whole.weight).sum() / whole.weight.sum()).backward()
        worst = max(worst, difference(gradients(model), gradients(one)))
        local = copy.deepcopy(one)
        local.zero_grad()
        (mse(local(b.x), b.y).mul(b.weight).sum() / b.weight.sum()).backward()
        if mine:
            averaged = hvd.allreduce(gradients(local), name="plain", op=hvd.Average, process_set=group)
            plain = max(plain, difference(averaged, gradients(one)))
        ones.step()
        worst = max(worst, difference(flat(model.parameters()), flat(one.parameters())))
    assert worst <= 1e-12, worst
    if mine:
        report = optimizer.last_step
        assert len(report.ranks) == group.size()
        same_on_all_ranks(report, group)
        assert plain > 1e-3 or group.size() == 1, plain
    return {FLOAT64: worst, **({"plain averaging's error": plain} if plain else {})}


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_two_disjoint_process_sets():
    half = hvd.size() // 2
    sets = [hvd.add_process_set(range(half)), hvd.add_process_set(range(half, hvd.size()))]
    try:
        return _in_sets(sets, 20)
    finally:
        for one in sets:
            hvd.remove_process_set(one)


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_a_process_set_that_leaves_a_rank_out():
    left = hvd.add_process_set(range(1, hvd.size()))
    try:
        return _in_sets([left], 21)
    finally:
        hvd.remove_process_set(left)


# -- closures and several optimizers -------------------------------------------------------------------


def case_lbfgs():
    """Closures are called a number of times that depends on the loss, so it must be the global one."""
    g = generator(22)
    worst = 0.0
    for line_search in (None, "strong_wolfe"):
        step = regression(g, uneven(6))
        (b,) = step[hvd.rank()]
        whole = union(step)
        model = network(g)
        one = copy.deepcopy(model)
        objective = hvd.Objective("mse")

        def make(m, line_search=line_search):
            return torch.optim.LBFGS(m.parameters(), lr=0.5, max_iter=5, line_search_fn=line_search)

        optimizer = hvd.DistributedOptimizer(make(model), model.named_parameters(), objective)
        ones = make(one)
        calls = Counter()

        def closure(model=model, optimizer=optimizer, objective=objective, calls=calls, b=b):
            calls["mine"] += 1
            optimizer.zero_grad()
            loss = objective(model(b.x), b.y, weight=b.weight)
            loss.backward()
            return loss

        def own_closure(one=one, ones=ones, calls=calls, whole=whole):
            calls["one"] += 1
            ones.zero_grad()
            loss = mse(one(whole.x), whole.y).mul(whole.weight).sum() / whole.weight.sum()
            loss.backward()
            return loss

        for _ in range(3):
            mine = optimizer.step(closure)
            own = ones.step(own_closure)
            worst = max(worst, abs(float(mine) - float(own)) / abs(float(own)))
            worst = max(worst, difference(flat(model.parameters()), flat(one.parameters())))
        assert calls["mine"] == calls["one"], calls
        same_on_all_ranks(flat(model.parameters()).tolist())
    # Each iteration divides by differences of gradients, which magnifies rounding.
    assert worst <= 1e-9, worst
    return {"error, LBFGS": worst}


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_a_closure_with_a_rank_without_samples():
    g = generator(23)
    step = regression(g, [[0] if r == 0 else [5] for r in range(hvd.size())])
    (b,) = step[hvd.rank()]
    trial = Trial(network(g), lambda ps: torch.optim.SGD(ps, lr=0.05))

    def closure():
        trial.optimizer.zero_grad()
        loss = trial.objective(trial.model(b.x), b.y, weight=b.weight)
        loss.backward()
        return loss

    value = trial.optimizer.step(closure)
    own = trial.reference(step)
    trial.near(abs(value.item() - own.item()) / own.item(), "closure's loss")
    trial.near(difference(gradients(trial.model), gradients(trial.one)), "gradient")
    return trial.finish()


def case_two_optimizers_of_their_own_objectives():
    """As two networks that train each other do; steps interleave."""
    g = generator(24)
    a, b = Trial(network(g)), Trial(network(g), passes=2)
    for _ in range(3):
        first, second = regression(g, uneven()), regression(g, uneven(micro=2))
        a.optimizer.zero_grad()
        b.optimizer.zero_grad()
        b.backward(second)
        a.backward(first)
        b.optimizer.step()
        a.optimizer.step()
        a.compare(first)
        b.compare(second)
    return merged(a.finish(), b.finish())


def case_two_optimizers_sharing_an_objective():
    g = generator(25)
    model = parts(g, "a", "b")
    one = copy.deepcopy(model)
    objective = hvd.Objective("mse")

    def make(m):
        return (
            torch.optim.SGD(m.parts["a"].parameters(), lr=0.05),
            torch.optim.AdamW(m.parts["b"].parameters(), lr=0.01),
        )

    mine = [
        hvd.DistributedOptimizer(o, m.named_parameters(), objective, backward_passes_per_step=2)
        for o, m in zip(make(model), model.parts.values(), strict=True)
    ]
    ones = make(one)
    worst = 0.0
    for k in range(3):
        counts = uneven(micro=2)
        counts[k % hvd.size()] = []
        step = regression(g, counts)
        for optimizer in (*mine, *ones):
            optimizer.zero_grad()
        for b in step[hvd.rank()]:
            objective(model(b.x), b.y, weight=b.weight).backward()
        whole = union(step)
        (mse(one(whole.x), whole.y).mul(whole.weight).sum() / whole.weight.sum()).backward()
        for optimizer in (*mine, *ones):
            optimizer.step()
        worst = max(worst, difference(gradients(model), gradients(one)))
        worst = max(worst, difference(flat(model.parameters()), flat(one.parameters())))
    assert worst <= 1e-12, worst
    return {FLOAT64: worst}


def case_two_heads_with_equal_weights():
    """Two calls before one backward, with the same weights: the loss is the sum of their means."""
    g = generator(26)
    trial = Trial(parts(g, "a", "b"))
    for _ in range(3):
        step = regression(g, uneven())
        trial.optimizer.zero_grad()
        (b,) = step[hvd.rank()]
        one, two = trial.model.parts.values()
        loss = trial.objective(one(b.x), b.y, weight=b.weight) + trial.objective(
            two(b.x), 2 * b.y, weight=b.weight
        )
        loss.backward()
        trial.optimizer.step()
        mine = gradients(trial.model)
        trial.one_optimizer.zero_grad()
        whole = union(step)
        one, two = trial.one.parts.values()
        losses = mse(one(whole.x), whole.y) + mse(two(whole.x), 2 * whole.y)
        own = (losses * whole.weight).sum() / whole.weight.sum()
        own.backward()
        trial.near(difference(mine, gradients(trial.one)), "gradient")
        report = trial.optimizer.last_step
        trial.near(abs(report.loss - own.item()) / own.item(), "loss")
        trial.one_optimizer.step()
    return trial.finish()


# -- schedules and checkpoints -------------------------------------------------------------------------


def case_schedulers_made_before_and_after_wrapping():
    g = generator(27)
    results = []
    for before in (True, False):
        model = network(g)
        one = copy.deepcopy(model)
        objective = hvd.Objective("mse")

        def make(m):
            return torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)

        def schedules(optimizer):
            return [
                torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
                torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 / (1 + k)),
            ]

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain = make(model)
            mine = schedules(plain) if before else []
            optimizer = hvd.DistributedOptimizer(plain, model.named_parameters(), objective)
            mine = mine or schedules(optimizer)
            ones = make(one)
            own = schedules(ones)
            worst = 0.0
            for _ in range(5):
                step = regression(g, uneven())
                (b,) = step[hvd.rank()]
                whole = union(step)
                optimizer.zero_grad()
                ones.zero_grad()
                objective(model(b.x), b.y, weight=b.weight).backward()
                (mse(one(whole.x), whole.y).mul(whole.weight).sum() / whole.weight.sum()).backward()
                optimizer.step()
                ones.step()
                # A scheduler made before wrapping watches the plain optimizer's step(), which nobody
                # calls; it may warn about that, but must act.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore" if before else "error")
                    for schedule in (*mine, *own):
                        schedule.step()
                assert optimizer.param_groups[0]["lr"] == ones.param_groups[0]["lr"]
                worst = max(worst, difference(flat(model.parameters()), flat(one.parameters())))
        assert worst <= 1e-12, worst
        results.append({FLOAT64: worst})
    return merged(*results)


def _wrappers(objective):
    """Return the three ways to have an optimizer: plain torch's, Horovod's, ours."""
    return {
        "torch": lambda o, m: o,
        "horovod": lambda o, m: hvd.DistributedOptimizer(o, m.named_parameters()),
        "hvdloss": lambda o, m: hvd.DistributedOptimizer(o, m.named_parameters(), objective),
    }


def case_checkpoints_between_torch_horovod_and_hvdloss():
    """Two steps, a checkpoint, another wrapper that loads it, two more steps: as one process does four.

    Every rank sees the same samples, for which all three wrappers do the same.
    """
    g = generator(28)
    steps = [regression(g, [[6]])[0][0] for _ in range(4)]
    start = network(g)
    found = {}
    objective = hvd.Objective("mse")
    wrappers = _wrappers(objective)

    def train(model, optimizer, batches, ours):
        for b in batches:
            optimizer.zero_grad()
            loss = (
                objective(model(b.x), b.y, weight=b.weight)
                if ours
                else mse(model(b.x), b.y).mul(b.weight).sum() / b.weight.sum()
            )
            loss.backward()
            optimizer.step()

    def make(model):
        return torch.optim.Adam(
            [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}]
        )

    for writer, reader in itertools.product(wrappers, wrappers):
        model = copy.deepcopy(start)
        optimizer = wrappers[writer](make(model), model)
        train(model, optimizer, steps[:2], writer == "hvdloss")
        saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        assert set(saved["optimizer"]) == {"state", "param_groups"}
        again = network(g)
        again_optimizer = wrappers[reader](make(again), again)
        again.load_state_dict(saved["model"])
        again_optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        train(again, again_optimizer, steps[2:], reader == "hvdloss")
        found[writer, reader] = flat(again.parameters())
        # A new reader takes the plans of its first step; loading into one that has trained works too.
        if reader == "hvdloss":
            again.load_state_dict(saved["model"])
            again_optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
            train(again, again_optimizer, steps[2:], True)
            assert difference(flat(again.parameters()), found[writer, reader]) <= 1e-12
    errors = {pair: difference(value, found["torch", "torch"]) for pair, value in found.items()}
    assert max(errors.values()) <= 1e-12, errors
    return {FLOAT64: max(errors.values())}


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_broadcast_of_parameters_and_optimizer_state():
    g = generator(29 + hvd.rank())  # different on every rank, until broadcast
    model = network(g)
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.01 * (1 + hvd.rank())), model.named_parameters(), objective
    )
    for root in (0, hvd.size() - 1):
        hvd.broadcast_parameters(model.state_dict(), root_rank=root)
        hvd.broadcast_optimizer_state(optimizer, root_rank=root)
        assert math.isclose(optimizer.param_groups[0]["lr"], 0.01) or root
        common = generator(30)
        for _ in range(2):
            (b,) = regression(common, uneven())[hvd.rank()]
            optimizer.zero_grad()
            objective(model(b.x), b.y, weight=b.weight).backward()
            optimizer.step()
        same_on_all_ranks(flat(model.parameters()).tolist())
        same_on_all_ranks([flat(s["exp_avg"] for s in optimizer.state.values()).tolist()])
    # A checkpoint on the root alone, as after a restart.
    if hvd.rank() == 0:
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    same_on_all_ranks([flat(s["exp_avg_sq"] for s in optimizer.state.values()).tolist()])


# -- what else people do with autograd -----------------------------------------------------------------


def case_autograd_grad_and_double_backward_before_the_backward_pass():
    g = generator(31)
    trial = Trial(network(g))
    for _ in range(3):
        step = regression(g, uneven())
        trial.optimizer.zero_grad()
        (b,) = step[hvd.rank()]
        loss = trial.objective(trial.model(b.x), b.y, weight=b.weight)
        params = list(trial.model.parameters())
        first = torch.autograd.grad(loss, params, create_graph=True)
        torch.autograd.grad(sum((x**2).sum() for x in first), params, retain_graph=True)
        loss.backward()
        trial.optimizer.step()
        trial.compare(step)
    return trial.finish()


def case_a_penalty_on_the_gradient():
    """A penalty that needs a second derivative, the same on every rank, counts once."""
    g = generator(32)
    probe = torch.randn(4, 5, generator=g, dtype=torch.float64).to(DEVICE)

    def penalty(model):
        x = probe.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).pow(2).mean()

    trial = Trial(network(g), penalty=penalty, passes=2)
    for _ in range(3):
        trial.step(regression(g, uneven(micro=2)))
    return trial.finish()


def case_retain_graph_and_backward_twice():
    """Two backward passes of one loss are two micro-batches: the mean stays what it is."""
    g = generator(33)
    trial = Trial(network(g), passes=2)
    for _ in range(3):
        step = regression(g, uneven())
        trial.optimizer.zero_grad()
        (b,) = step[hvd.rank()]
        loss = trial.objective(trial.model(b.x), b.y, weight=b.weight)
        loss.backward(retain_graph=True)
        loss.backward()
        trial.optimizer.step()
        assert trial.optimizer.last_step.elements == 2 * union(step).weight.numel()
        mine = gradients(trial.model)
        trial.reference(step)
        trial.near(difference(mine, gradients(trial.one)), "gradient")
        trial.one_optimizer.step()
    return trial.finish()


def case_gradient_checkpointing():
    """Recomputing activations changes nothing, in both of torch's forms."""
    g = generator(34)

    class Checkpointed(torch.nn.Module):
        def __init__(self, inner, reentrant):
            super().__init__()
            self.inner, self.reentrant = inner, reentrant

        def forward(self, x):
            x = x.clone().requires_grad_()  # the reentrant form needs an input that takes gradients
            return self.inner[2](checkpoint(self.inner[:2], x, use_reentrant=self.reentrant))

    results = []
    for reentrant, passes in itertools.product((False, True), (1, 2)):
        trial = Trial(Checkpointed(network(g), reentrant), passes=passes)
        for _ in range(3):
            trial.step(regression(g, uneven(micro=passes)))
        results.append(trial.finish())
    return merged(*results)


def case_reentrant_checkpointing_of_a_shared_layer():
    """A layer in two reentrant checkpoints gets its gradient twice: right, or the documented error."""
    g = generator(35)

    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(5, 5, dtype=torch.float64)
            self.out = torch.nn.Linear(5, 1, dtype=torch.float64)

        def forward(self, x):
            x = x.clone().requires_grad_()
            for _ in range(2):
                x = checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=True)
            return self.out(x)

    torch.manual_seed(3)
    trial = Trial(Shared())
    raised = ""
    for _ in range(3):
        try:
            trial.step(regression(g, uneven()), plain=False)
        except UsageError as error:
            raised = str(error)
            break
    same_on_all_ranks(raised)
    assert not raised or "use_reentrant=False" in raised, raised
    return {"shared layer reentrant: error raised": float(bool(raised))}


def case_zero_grad_to_zero():
    """set_to_none=False keeps the gradients' storage, which is the bucket itself."""
    g = generator(36)
    results = []
    for passes in (1, 2):
        trial = Trial(network(g), passes=passes)
        for k in range(4):
            counts = uneven(micro=passes)
            counts[k % hvd.size()] = counts[k % hvd.size()][: passes - 1]
            step = regression(g, counts)
            trial.optimizer.zero_grad(set_to_none=False)
            trial.backward(step)
            trial.optimizer.step()
            trial.compare(step)
        results.append(trial.finish())
    return merged(*results)


def _without_zero_grad(passes):
    """Gradients add up over steps, as they do in one process."""
    g = generator(37)
    trial = Trial(network(g), lambda ps: torch.optim.SGD(ps, lr=0.01), passes=passes)
    for _ in range(4):
        step = regression(g, uneven(micro=passes))
        trial.backward(step)
        trial.optimizer.step()
        whole = union(step)
        own = mse(trial.one(whole.x), whole.y).mul(whole.weight).sum() / whole.weight.sum()
        own.backward()
        trial.near(difference(gradients(trial.model), gradients(trial.one)), "gradient")
        trial.one_optimizer.step()
        trial.near(difference(flat(trial.model.parameters()), flat(trial.one.parameters())), "parameters")
    return trial.finish()


def case_without_zero_grad_between_steps():
    return _without_zero_grad(1)


def case_without_zero_grad_and_with_accumulation():
    return _without_zero_grad(2)


def case_model_zero_grad_instead_of_the_optimizers():
    """Also with a rank that makes no pass: gradients of the step before must be gone everywhere."""
    g = generator(38)
    trial = Trial(network(g), passes=2)
    for k in range(4):
        counts = uneven(micro=2)
        counts[k % hvd.size()] = []
        step = regression(g, counts)
        trial.model.zero_grad()
        trial.backward(step)
        trial.optimizer.step()
        trial.compare(step)
    return trial.finish()


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_many_parameters_and_buckets():
    """More than a megabyte, so that buckets fill in the order of the backward pass, and two passes."""
    g = generator(39)
    torch.manual_seed(4)
    layers = [
        torch.nn.Linear(5, 300),
        *(torch.nn.Linear(300, 300) for _ in range(4)),
        torch.nn.Linear(300, 1),
    ]
    model = torch.nn.Sequential(*(m for layer in layers for m in (layer, torch.nn.Tanh()))).double()
    trial = Trial(model, passes=2)
    for _ in range(3):
        trial.step(regression(g, uneven(micro=2)))
    assert len(trial.optimizer._hvdloss.buckets) > 1
    return trial.finish()


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_a_plain_horovod_optimizer_beside():
    """Without an objective the wrapper is of Horovod's own class and gives Horovod's own gradient."""
    import horovod.torch as horovod

    g = generator(40)
    start = network(g)
    batches = [regression(g, uneven())[hvd.rank()][0] for _ in range(3)]
    found = []
    for wrap in (horovod.DistributedOptimizer, hvd.DistributedOptimizer):
        model = copy.deepcopy(start)
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), op=hvd.Sum)
        for b in batches:
            optimizer.zero_grad()
            mse(model(b.x), b.y).mean().backward()
            optimizer.step()
        found.append((type(optimizer).__mro__[1:], gradients(model), flat(model.parameters())))
    assert found[0][0] == found[1][0]
    # Not bit for bit beyond two ranks: which tensors Horovod fuses, and so adds in which order, is chance.
    assert difference(found[0][1], found[1][1]) <= 1e-14
    assert difference(found[0][2], found[1][2]) <= 1e-14


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_an_elastic_state_saves_and_restores():
    g = generator(41)
    trial = Trial(network(g))
    trial.step(regression(g, uneven()))
    state = hvd.elastic.TorchState(model=trial.model, optimizer=trial.optimizer, batch=3)
    state.save()
    kept = flat(trial.model.parameters())
    step = regression(g, uneven())
    trial.optimizer.zero_grad()
    trial.backward(step)
    trial.optimizer.step()
    assert not torch.equal(kept, flat(trial.model.parameters()))
    state.restore()
    assert torch.equal(kept, flat(trial.model.parameters()))
    state.sync()
    trial.step(step)
    return trial.finish()


def case_dropout_of_samples_by_weight_equals_leaving_them_out():
    g = generator(42)
    found = []
    start = network(g)
    step = regression(g, uneven(6))
    (b,) = step[hvd.rank()]
    keep = (torch.rand(b.weight.shape[0], generator=g) < 0.6).to(DEVICE)
    for how in ("weight", "slice"):
        model = copy.deepcopy(start)
        objective = hvd.Objective("mse", reduction="batch_mean")
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), objective
        )
        if how == "weight":
            objective(model(b.x), b.y, weight=b.weight * keep[:, None]).backward()
        else:
            objective(model(b.x[keep]), b.y[keep], weight=b.weight[keep]).backward()
        optimizer.step()
        found.append(gradients(model))
    error = difference(found[0], found[1])
    assert error <= 1e-12, error
    return {FLOAT64: error}


def case_compiled_by_aot_eager():
    """torch.compile's graph capture without code generation; the objective outside of it, and inside."""
    g = generator(43)
    results = []
    for inside in (False, True):
        torch._dynamo.reset()
        trial = Trial(network(g), passes=2)
        if inside:

            @torch.compile(backend="aot_eager")
            def loss_of(x, y, w, trial=trial):
                return trial.objective(trial.model(x), y, weight=w)

        else:
            compiled = torch.compile(trial.model, backend="aot_eager")

            def loss_of(x, y, w, trial=trial, compiled=compiled):
                return trial.objective(compiled(x), y, weight=w)

        for _ in range(2):
            step = regression(g, [[4 + rank] * 2 for rank in range(hvd.size())])
            trial.optimizer.zero_grad()
            for b in step[hvd.rank()]:
                loss_of(b.x, b.y, b.weight).backward()
            trial.optimizer.step()
            trial.compare(step)
        results.append(trial.finish())
    return merged(*results)


def case_classification_with_batch_norm_and_dropout_off():
    """Layers with buffers: running statistics stay each rank's own, gradients are exact in eval mode."""
    g = generator(44)
    torch.manual_seed(5)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    ).double()
    model.eval()

    def losses(prediction, target):
        return F.cross_entropy(prediction, target, reduction="none")

    trial = Trial(model, loss="cross_entropy", losses=losses)
    for _ in range(3):
        step = []
        for rank in range(hvd.size()):
            n = 3 + 4 * rank
            y = torch.randint(0, 3, (n,), generator=g)
            w = torch.rand(n, generator=g, dtype=torch.float64)
            step.append([Batch(torch.randn(n, 5, generator=g, dtype=torch.float64) + rank, y, w)])
        trial.step(step)
    return trial.finish()
