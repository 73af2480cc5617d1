"""On a GPU: that nobody waits for it, and what no other module does there.

Cases that need no GPU run anywhere (`torch_support` says where tensors lie): they are how the others are kept
honest on machines without one.
"""

from __future__ import annotations

import copy
import os
import tempfile
import unittest
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
    here,
    mse,
    network,
    raises_everywhere,
    regression,
    same_on_all_ranks,
    uneven,
    union,
)

import hvdloss
import hvdloss.torch as hvd
from hvdloss.terms.policies.period import SyncPeriod
from hvdloss.torch import collectives

__all__ = ["before_case"]

SYNCHRONIZES = "called a synchronizing CUDA operation"


def on_a_gpu() -> None:
    """Skip where there is none."""
    if DEVICE.type != "cuda":
        raise unittest.SkipTest("HVDLOSS_TEST_DEVICE is not cuda")


def case_horovod_sums_on_the_gpu():
    """What the ranks are, and that Horovod takes tensors of theirs."""
    on_a_gpu()
    assert hvd.nccl_built()
    for dtype in (torch.float16, torch.float32, torch.float64, torch.int64):
        mine = torch.full((5,), hvd.rank() + 1, dtype=dtype, device=DEVICE)
        total = hvd.allreduce(mine, op=hvd.Sum)
        assert total.device == DEVICE
        assert total.tolist() == [hvd.size() * (hvd.size() + 1) / 2] * 5
    return {"GPUs": torch.cuda.device_count()}


# -- nobody waits -------------------------------------------------------------------------------------


@contextmanager
def waits(mode: str) -> Iterator[list[str]]:
    """Collect the operations that wait for the device in the block; with "error" they raise."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(mode)
        found: list[str] = []
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [f"{w.filename}:{w.lineno}" for w in caught if SYNCHRONIZES in str(w.message)]


def wide(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model of 3.2 MB: gradients of 1 MiB fill buckets, or travel by themselves."""
    torch.manual_seed(3)
    layers = [
        torch.nn.Linear(5, 512),
        *(torch.nn.Linear(512, 512) for _ in range(3)),
        torch.nn.Linear(512, 1),
    ]
    return torch.nn.Sequential(*(m for layer in layers for m in (layer, torch.nn.ReLU()))).to(DEVICE, dtype)


WEIGHTS = {
    "none": lambda b: None,
    "a number": lambda b: 2.5,
    "a tensor": lambda b: b.weight,
}


def case_nobody_waits_for_the_device():
    """From the forward pass to the end of the last backward pass, torch finds no operation that waits.

    And behind work that keeps the device busy, the host is through before the device: the driver does not
    wait either. In ``step()`` one transfer is waited for: that of the ledgers.
    """
    on_a_gpu()
    most = 0
    for alone in ("4", "0.5"):
        os.environ["HVDLOSS_UNBUCKETED_MB"] = alone
        for kind, weight_of in WEIGHTS.items():
            for passes, terms in ((1, ()), (2, ()), (1, (hvdloss.CommunicationCost(),))):
                model = wide()
                objective = hvd.Objective("mse", terms=terms)
                opt = hvd.DistributedOptimizer(
                    torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9),
                    model.named_parameters(),
                    objective,
                    backward_passes_per_step=passes,
                )
                step = regression(generator(1), [[16] * passes] * hvd.size(), dtype=torch.float32)
                batches = [(b.x, b.y, weight_of(b)) for b in step[hvd.rank()]]
                for number in range(5):
                    opt.zero_grad()
                    steady = number > 2
                    torch.cuda.synchronize()
                    busy = torch.cuda.Event()
                    if steady:
                        torch.cuda._sleep(400_000_000)  # cycles: some 0.2 s
                        busy.record()
                    with waits("error") if steady else nullcontext():
                        for x, y, w in batches:
                            objective(model(x), y, weight=w).backward()
                    assert not steady or not busy.query(), f"{kind}: the device was waited for"
                    with waits("warn") if steady else nullcontext([]) as found:
                        opt.step()
                    allowed = 1 + bool(terms)
                    assert len(found) <= allowed, (kind, alone, passes, found)
                    most = max(most, len(found)) if not terms else most
                assert opt.last_step.step == 5
    return {"waits in step()": most}


def case_beside_horovods_own_optimizer():
    """The transfers that each optimizer's step waits for, as torch sees them."""
    on_a_gpu()
    counts = {}
    for name in ("horovod", "hvdloss"):
        model = wide()
        objective = hvd.Objective("mse") if name == "hvdloss" else None
        opt = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1e-4), model.named_parameters(), objective
        )
        (b,) = regression(generator(1), [[16]] * hvd.size(), dtype=torch.float32)[hvd.rank()]
        for number in range(4):
            with waits("warn") if number == 3 else nullcontext([]) as found:
                opt.zero_grad()
                (objective(model(b.x), b.y) if objective else F.mse_loss(model(b.x), b.y)).backward()
                opt.step()
        counts[f"waits of a step, {name}"] = len(found)
    assert counts["waits of a step, hvdloss"] <= 1, counts
    return counts


def case_a_stream_of_the_users_own():
    """Forward, backward and update on a side stream."""
    on_a_gpu()
    g = generator(2)
    trial = Trial(network(g), passes=2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            trial.step(regression(g, uneven(micro=2)))
    torch.cuda.current_stream().wait_stream(side)
    return trial.finish()


# -- dtypes -------------------------------------------------------------------------------------------

SHORT = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def case_parameters_of_16_bits():
    """Ranks weigh what they hold to more than 16 bits; gradients are rounded to 16."""
    errors = {}
    for dtype, tolerance in SHORT.items():
        g = generator(3)
        model = network(g, dtype)
        objective = hvd.Objective("mse")
        opt = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters(), objective
        )
        worst = 0.0
        for _ in range(5):
            step = regression(g, uneven(8), dtype=torch.float32)
            one = copy.deepcopy(model).float()
            (b,) = step[hvd.rank()]
            opt.zero_grad()
            objective(model(b.x.to(dtype)), b.y.to(dtype), weight=b.weight).backward()
            opt.step()
            whole = union(step)
            loss = (mse(one(whole.x.to(dtype).float()), whole.y.to(dtype).float()) * whole.weight).sum()
            (loss / whole.weight.sum()).backward()
            assert all(p.grad.dtype == dtype for p in model.parameters())
            worst = max(worst, difference(gradients(model), gradients(one)))
        assert worst <= tolerance, (dtype, worst)
        same_on_all_ranks(flat(model.parameters()).tolist())
        errors[f"error, {str(dtype).removeprefix('torch.')}"] = worst
    return errors


def case_gradients_of_16_bits_are_those_of_the_cpu():
    """Bit for bit: on a device, too, a rank's weight is not rounded to 16 bits."""
    for dtype in SHORT:
        found = []
        for device in (torch.device("cpu"), DEVICE):
            x = torch.randn(1000, generator=generator(3)).to(device, dtype)
            p = torch.nn.Parameter(torch.zeros(1000, dtype=dtype, device=device))
            objective = hvd.Objective(lambda prediction, _: prediction.float())
            opt = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=0.0), None, objective)
            one = torch.ones(1, device=device)
            grads = []
            for number in range(4):
                opt.zero_grad()
                weight = (1.0 + 0.0017 * number) * (1 + hvd.rank()) * one
                objective((p * x).sum().reshape(1), one, weight=weight).backward()
                opt.step()
                grads.append(p.grad.clone())
            found.append(flat(grads))
        assert torch.equal(*found), (dtype, (found[0] - found[1]).abs().max())


def case_autocast_float16_with_a_grad_scaler():
    """As on a GPU mixed precision is mostly done; the overflow of one rank skips the step on all."""
    g = generator(4)
    model = network(g, torch.float32)
    trial = Trial(model, lambda ps: torch.optim.AdamW(ps, lr=0.01), tolerance=5e-3)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**14)
    skipped = 0
    for number in range(6):
        step = regression(g, uneven(8, more=8), dtype=torch.float32)
        (b,) = step[hvd.rank()]
        bad = number == 2 and hvd.rank() == hvd.size() - 1
        trial.optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.float16):
            prediction = trial.model(b.x)
            if bad:
                prediction.register_hook(lambda gradient: gradient * 1e30)
            loss = trial.objective(prediction, b.y, weight=b.weight)
        before, scale = flat(trial.model.parameters()), scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(trial.optimizer)
        scaler.update()
        same_on_all_ranks(scaler.get_scale())
        if scaler.get_scale() < scale:
            assert torch.equal(before, flat(trial.model.parameters()))
            skipped += 1
            continue
        mine = gradients(trial.model)
        with torch.autocast(DEVICE.type, torch.float16):
            trial.reference(step)
        trial.near(difference(mine, gradients(trial.one)), "gradient")
        trial.one.load_state_dict(trial.model.state_dict())
    assert skipped >= 1
    same_on_all_ranks(flat(trial.model.parameters()).tolist())
    return {"error, autocast float16": trial.error}


# -- devices ------------------------------------------------------------------------------------------


class Apart(torch.nn.Module):
    """Its first layer stays on the CPU, as a large embedding may."""

    def __init__(self, g: torch.Generator) -> None:
        super().__init__()
        self.first = network(g, outputs=5).cpu()
        self.second = network(g)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x.cpu())).to(DEVICE))


def case_parameters_on_the_cpu_and_on_the_gpu():
    worst = 0.0
    for passes in (1, 2):
        g = generator(5)
        model = Apart(g)
        one = copy.deepcopy(model)
        objective = hvd.Objective("mse")
        opt = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            model.named_parameters(),
            objective,
            backward_passes_per_step=passes,
        )
        plain = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
        for number in range(4):
            counts = uneven(micro=passes)
            counts[number % hvd.size()] = counts[number % hvd.size()][: passes - 1] if hvd.size() > 1 else [4]
            step = regression(g, counts)
            opt.zero_grad()
            for b in step[hvd.rank()]:
                objective(model(b.x), b.y, weight=b.weight).backward()
            opt.step()
            plain.zero_grad()
            whole = union(step)
            (mse(one(whole.x), whole.y).mul(whole.weight).sum() / whole.weight.sum()).backward()
            plain.step()
            worst = max(worst, difference(gradients(model), gradients(one)))
            worst = max(worst, difference(flat(model.parameters()), flat(one.parameters())))
        assert {p.grad.device.type for p in model.parameters()} == {"cpu", DEVICE.type}
        same_on_all_ranks(opt.last_step)
    assert worst <= 1e-12, worst
    return {"error, float64": worst}


def case_local_steps_on_the_cpu_and_on_the_gpu():
    """Moves of parameters are averaged device by device."""
    g = generator(6)
    model = Apart(g)
    objective = hvd.Objective("mse", terms=(hvdloss.CommunicationCost(policies=(SyncPeriod(2),)),))
    opt = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05), model.named_parameters(), objective
    )

    def step() -> None:
        (b,) = regression(g, uneven())[hvd.rank()]
        opt.zero_grad()
        objective(model(b.x), b.y, weight=b.weight).backward()
        opt.step()

    step()
    anchor = flat(model.parameters())
    for _ in range(2):
        step()
    same_on_all_ranks(flat(model.parameters()).tolist())
    assert (flat(model.parameters()) != anchor).double().mean() > 0.9
    step()
    opt.exchange()
    same_on_all_ranks(flat(model.parameters()).tolist())


def case_a_rank_without_a_batch_in_the_first_step():
    """Nothing is planned yet, and that rank has no tensor on the device to tell the others with."""
    if hvd.size() == 1:
        raise unittest.SkipTest("somebody must have one")
    errors = []
    for terms, compression, tolerance in (
        ((), hvd.Compression.none, 1e-12),
        ((hvdloss.DataSkew(bins=4, warmup=1),), hvd.Compression.none, 1e-12),
        ((), hvd.Compression.fp16, 2e-3),  # ledgers travel by themselves
    ):
        for absent in (0, hvd.size() - 1):
            g = generator(7)
            model = network(g)
            one = copy.deepcopy(model)
            objective = hvd.Objective("mse", terms=terms)
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            opt = hvd.DistributedOptimizer(sgd, objective=objective, compression=compression)
            for number in range(3):
                counts = uneven()
                counts[(absent + number) % hvd.size()] = []
                step = regression(g, counts)
                one.load_state_dict(model.state_dict())
                opt.zero_grad()
                for b in step[hvd.rank()]:
                    objective(model(b.x), b.y, weight=b.weight).backward()
                opt.step()
                one.zero_grad()
                whole = union(step)
                (mse(one(whole.x), whole.y).mul(whole.weight).sum() / whole.weight.sum()).backward()
                error = difference(gradients(model), gradients(one))
                assert error <= tolerance, (compression, number, error)
                errors += [error] if tolerance < 1e-3 else []
            same_on_all_ranks(opt.last_step)
            same_on_all_ranks(flat(model.parameters()).tolist())
    return {"error, float64": max(errors)}


# -- what is around training --------------------------------------------------------------------------


def case_collectives_give_what_they_give_on_the_cpu():
    """Forward and gradient, parts of uneven sizes."""
    rank, size = hvd.rank(), hvd.size()
    g = generator(8 + rank)
    functions = {
        "all_reduce": lambda x: collectives.all_reduce(x[:4]),
        "all_reduce, replicated": lambda x: collectives.all_reduce(x[:4], replicated=True),
        "all_gather": collectives.all_gather,
        "all_gather, replicated": lambda x: collectives.all_gather(x, replicated=True),
        "reduce_scatter": lambda x: collectives.reduce_scatter(x[:4]),
        "broadcast": lambda x: collectives.broadcast(x[:4], size - 1),
        "shift": collectives.shift,
        "copy_to_ranks": lambda x: collectives.copy_to_ranks(x[:4]),
    }
    worst = 0.0
    for name, function in functions.items():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            x = torch.randn(4 + 2 * rank, 3, generator=g, dtype=torch.float64).to(dtype)
            found = []
            for device in (torch.device("cpu"), DEVICE):
                own = x.to(device).requires_grad_()
                out = function(own)
                assert out.device == device, name
                assert out.dtype == dtype, name
                (out.float() * torch.arange(1.0, 4.0, device=device)).sum().backward()
                found.append((out, own.grad))
            for a, b in zip(*found, strict=True):
                error = difference(flat([b]), flat([a])) if a.numel() else 0.0
                assert error <= EXACT.get(dtype, 1e-2), (name, dtype, error)
                worst = max(worst, error) if dtype == torch.float64 else worst
    return {"error, float64": worst}


def case_metrics_from_tensors_on_the_gpu():
    g = generator(9 + hvd.rank())
    scores, target = torch.randn(20, 3, generator=g), torch.randint(0, 3, (20,), generator=g)
    weight = torch.rand(20, generator=g)
    found = []
    for device in (torch.device("cpu"), DEVICE):
        metrics = hvd.Metrics(
            {
                "f1": hvdloss.metrics.F1(classes=3, from_logits=True),
                "auc": hvdloss.metrics.AUC(classes=3, from_logits=True),
            }
        )
        metrics.update(scores.to(device), target.to(device), weight.to(device))
        found.append(metrics.compute())
    same_on_all_ranks(repr(found[1]))
    assert repr(found[0]) == repr(found[1]), found
    value = torch.tensor(1.0 + hvd.rank(), device=DEVICE)
    merged = hvd.merged_value(value, torch.tensor(2.0, device=DEVICE))
    assert merged == (1 + hvd.size()) / 2


def case_checkpoints_of_parameters_on_the_gpu():
    """Saved, changed, loaded: the values, and the device, are those that were."""
    folder = Path(tempfile.mkdtemp(prefix="hvdloss-cuda-")) if hvd.rank() == 0 else Path("/nowhere")
    g = generator(10)
    trial = Trial(network(g), lambda ps: torch.optim.AdamW(ps, lr=0.01))
    trial.step(regression(g, uneven()))
    checkpoint = hvd.Checkpoint(folder, model=trial.model, optimizer=trial.optimizer)
    checkpoint.save(1)
    kept = flat(trial.model.parameters())
    memory = flat(s["exp_avg"] for s in trial.optimizer.state.values())
    step = regression(g, uneven())
    trial.optimizer.zero_grad()
    trial.backward(step)
    trial.optimizer.step()
    assert not torch.equal(kept, flat(trial.model.parameters()))
    assert checkpoint.load().step == 1
    assert torch.equal(kept, flat(trial.model.parameters()))
    assert torch.equal(memory, flat(s["exp_avg"] for s in trial.optimizer.state.values()))
    assert {p.device for p in trial.model.parameters()} == {DEVICE}
    assert {s["exp_avg"].device for s in trial.optimizer.state.values()} == {DEVICE}
    best = hvd.BestCheckpoint(folder / "best.pt")
    best.step(1.0, trial.model.state_dict)
    again = best.load()
    assert all(torch.equal(again[k].cpu(), v.cpu()) for k, v in trial.model.state_dict().items())
    return trial.finish()


def case_mixup_on_the_gpu():
    x, y = torch.randn(9, 4, generator=generator(11)), torch.arange(9)
    weight = torch.ones(9)
    weight[2] = 0
    found = []
    for device in (torch.device("cpu"), DEVICE):
        mixed = hvd.mixup(x.to(device), y.to(device), weight.to(device), rng=np.random.default_rng(1))
        pairs = mixed.pairs(mixed.x)
        assert all(t.device == device for t in pairs)
        found.append(flat(pairs))
    assert difference(found[1], found[0]) <= 1e-6


def case_the_guard_sees_a_bit_on_the_gpu():
    g = generator(12)
    trial = Trial(network(g), check_every=1)
    trial.step(regression(g, uneven()))
    if hvd.rank() == hvd.size() - 1:
        with torch.no_grad():
            p = next(trial.model.parameters())
            p.view(-1)[0] = torch.nextafter(p.view(-1)[0], here(9.0).to(p))
    if hvd.size() > 1:
        raises_everywhere(
            hvdloss.AgreementError,
            lambda: hvd.check_synchronized(trial.model),
            "0.weight",
            f"{hvd.size() - 1}",
        )


def case_objectives_that_differ_between_ranks():
    if hvd.size() == 1:
        return
    g = generator(13)
    trial = Trial(network(g), loss="mse" if hvd.rank() == 0 else "mae")
    trial.optimizer.zero_grad()
    trial.backward(regression(g, uneven()))
    raises_everywhere(hvdloss.AgreementError, trial.optimizer.step, "objective")


def case_what_a_user_passes_from_the_cpu():
    """Weights, keys and shares of classes may lie there."""
    objective = hvd.Objective("cross_entropy", terms=(hvdloss.DataSkew(classes=3, of="keys"),))
    model = network(generator(14), outputs=3)
    opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)
    b = Batch(torch.randn(6, 5, generator=generator(15), dtype=torch.float64), torch.arange(6) % 3)
    for keys in (torch.arange(6) % 3, np.arange(6) % 3, here(torch.arange(6) % 3)):
        for weight in (torch.ones(6), np.ones(6), [1.0] * 6, 1.0, None):
            opt.zero_grad()
            objective(model(b.x), b.y, weight=weight, keys=keys).backward()
            opt.step()
    assert opt.last_step.elements == 6 * hvd.size()
