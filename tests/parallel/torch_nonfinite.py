"""What happens where a loss or a gradient of one rank is NaN or infinite: raise, skip, or drop."""

from __future__ import annotations

import copy
import math
import os
import re
import unittest
from contextlib import contextmanager

import pytest
import torch
from torch_support import (
    DEVICE,
    Trial,
    before_case,
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
)

import hvdloss
import hvdloss.torch as hvd
from hvdloss.errors import (
    ConfigError,
    NonFiniteGradientError,
    NonFiniteLossError,
    NoWeightError,
    ShapeError,
    UsageError,
    WeightError,
)
from hvdloss.terms.policies.period import SyncPeriod
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-1 gloo-3 mpi-2 dist-2")

__all__ = ["before_case"]

nan, inf = math.nan, math.inf
# By name: what the last rank's target becomes, or what its gradient becomes on the way back.
FAULTS = {
    "loss NaN": ("loss", nan),
    "loss infinite": ("loss", inf),
    "gradient NaN": ("gradient", nan),
    "gradient infinite": ("gradient", inf),
    "gradient -infinite": ("gradient", -inf),
}


def last():
    """The rank that misbehaves."""
    return hvd.size() - 1


class Poison(torch.autograd.Function):
    """Identity whose gradient has a bad entry: the loss is finite all the same."""

    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad.view(-1)[0] = ctx.bad
        return grad, None


@contextmanager
def poisoned(module, bad):
    """Have the gradient that comes back through `module` be bad inside the block, on the last rank."""
    hook = module.register_forward_hook(
        lambda _, __, out: Poison.apply(out, bad) if hvd.rank() == last() else out
    )
    try:
        yield
    finally:
        hook.remove()


def spoiled_backward(trial, step, fault):
    """Make this rank's backward passes of a step with such a fault on the last rank."""
    what, bad = FAULTS[fault]
    trial.optimizer.zero_grad()
    if what == "loss":
        step = copy.deepcopy(step)
        step[last()][-1].y[0] = bad
        trial.backward(step)
        return
    with poisoned(trial.model[1], bad):
        trial.backward(step)


def state_of(trial):
    """Everything that an update changes."""
    memory = [v for s in trial.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return flat([*trial.model.parameters(), *memory])


def kind_of(fault):
    return NonFiniteLossError if FAULTS[fault][0] == "loss" else NonFiniteGradientError


def trials(policy, seed, passes=(1, 2)):
    """Trials of several kinds, each with the function that makes its steps."""
    for p in passes:
        for alone in ("4", "0.0001"):  # in a bucket, and each gradient by itself
            os.environ["HVDLOSS_UNBUCKETED_MB"] = alone
            for first in (False, True):  # nothing is planned yet, or it is
                g = generator(seed)
                trial = Trial(network(g), passes=p, nonfinite=policy)

                def step(g=g, p=p):
                    return regression(g, uneven(micro=p))

                if first:
                    trial.step(step())
                yield trial, step


def worst(results):
    out = {}
    for one in results:
        for key, value in one.items():
            out[key] = max(value, out.get(key, -inf))
    return out


def case_raise_names_the_rank_and_changes_nothing():
    results = []
    for trial, step in trials("raise", 1):
        for fault in FAULTS:
            before = state_of(trial)
            done = trial.optimizer.last_step
            number = 1 if done is None else done.step + 1
            spoiled_backward(trial, step(), fault)
            raises_everywhere(kind_of(fault), trial.optimizer.step, f"on rank {last()}", f"step {number}:")
            assert torch.equal(state_of(trial), before)
            trial.step(step())
        results.append(trial.finish())
    return worst(results)


def case_skip_is_the_sequence_without_the_step():
    results = []
    for trial, step in trials("skip", 2):
        for count, fault in enumerate(FAULTS, 1):
            before = state_of(trial)
            spoiled_backward(trial, step(), fault)
            trial.optimizer.step()
            assert torch.equal(state_of(trial), before), fault
            assert not gradients(trial.model).any()
            report = trial.optimizer.last_step
            assert report.skipped == count
            assert [one.nonfinite for one in report.ranks] == [""] * last() + [FAULTS[fault][0]]
            assert math.isnan(report.loss) == (FAULTS[fault][0] == "loss")
            same_on_all_ranks(repr(report))
            trial.step(step())
            report = trial.optimizer.last_step
            assert report.skipped == count
            assert not any(one.nonfinite for one in report.ranks)
        results.append(trial.finish())
    return worst(results)


def dropped(step):
    """A step without the elements of the last rank."""
    return [*step[: last()], []]


@needs("gloo-2", more="gloo-3 mpi-2 dist-2")
def case_drop_is_the_step_of_the_other_ranks():
    if hvd.size() == 1:
        raise unittest.SkipTest("one rank has no others")
    results = []
    for trial, step in trials("drop", 3):
        for count, fault in enumerate(FAULTS, 1):
            whole = step()
            spoiled_backward(trial, whole, fault)
            trial.optimizer.step()
            trial.compare(dropped(whole), plain=False)
            report = trial.optimizer.last_step
            assert [one.dropped for one in report.ranks] == [0] * last() + [count]
            assert [one.nonfinite for one in report.ranks] == [""] * last() + [FAULTS[fault][0]]
            assert (report.ranks[-1].weight, report.ranks[-1].elements) == (0.0, 0)
            assert report.skipped == 0
            trial.step(step())
        results.append(trial.finish())
    return worst(results)


def case_drop_of_all_ranks_is_no_step():
    for trial, step in trials("drop", 4, passes=(1,)):
        before = state_of(trial)
        for what in ("loss", "gradient"):
            b = step()[hvd.rank()][0]
            trial.optimizer.zero_grad()
            if what == "loss":
                b.y[0] = nan
            prediction = trial.model(b.x)
            if what == "gradient":
                prediction = Poison.apply(prediction, inf)
            trial.objective(prediction, b.y, weight=b.weight).backward()
            ranks = ", ".join(map(str, range(hvd.size())))
            raises_everywhere(NoWeightError, trial.optimizer.step, ranks, "NaN or infinite")
            assert torch.equal(state_of(trial), before)
        trial.step(step())
        trial.finish()


def case_a_bad_weight_is_an_error_under_every_policy():
    for policy in ("skip", "drop"):
        for bad in (-1.0, nan, inf):
            g = generator(5)
            trial = Trial(network(g), nonfinite=policy)
            step = regression(g, uneven())
            step[last()][0].weight[0] = bad
            before = state_of(trial)
            spoiled_backward(trial, step, "gradient NaN")
            raises_everywhere(WeightError, trial.optimizer.step, f"rank {last()}")
            assert torch.equal(state_of(trial), before)
            trial.step(regression(g, uneven()))
            trial.finish()


@needs("gloo-2", more="gloo-3 mpi-2 dist-2")
def case_too_large_for_a_sum_is_infinite():
    """Entries whose sum over ranks overflows, though each of them is finite."""
    if hvd.size() == 1:
        raise unittest.SkipTest("one rank has no others")
    g = generator(6)
    largest = torch.finfo(torch.float64).max
    for policy in ("raise", "skip"):
        trial = Trial(network(g), nonfinite=policy)
        trial.step(regression(g, [[4]] * hvd.size(), weighted=False))
        for size, overflows in ((0.9 * largest, True), (1e200, False)):
            before = state_of(trial)
            trial.optimizer.zero_grad()
            # More weight than in the step before, whose total is what weights are measured in: 1 for each.
            b = regression(g, [[4 * hvd.size()]] * hvd.size(), weighted=False)[hvd.rank()][0]
            loss = trial.objective(trial.model(b.x), b.y)
            (loss + size * (trial.model[2].bias - trial.model[2].bias.detach()).sum()).backward()
            if overflows and policy == "raise":
                raises_everywhere(NonFiniteGradientError, trial.optimizer.step)
            else:
                trial.optimizer.step()
            changed = not torch.equal(state_of(trial), before)
            assert changed == (not overflows)
        assert trial.optimizer.last_step.skipped == (policy == "skip")


def case_a_grad_scaler_skips_as_ever():
    """Infinite gradients are a scaler's business: they raise nothing, count as nothing, lower the scale."""
    for policy in ("raise", "skip"):
        for make in (
            lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
            lambda ps: torch.optim.Adam(ps, lr=0.05, fused=True),
        ):
            for clip in (False, True):
                g = generator(7)
                trial = Trial(network(g, torch.float32), make, nonfinite=policy)
                scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0)
                for number in range(5):
                    step = regression(g, uneven(), dtype=torch.float32)
                    before, scale = state_of(trial), scaler.get_scale()
                    trial.optimizer.zero_grad()
                    (b,) = step[hvd.rank()]
                    bad = number in (0, 3)
                    prediction = trial.model(b.x)
                    if bad and hvd.rank() == last():
                        prediction = Poison.apply(prediction, inf)
                    scaler.scale(trial.objective(prediction, b.y, weight=b.weight)).backward()
                    if clip:
                        trial.optimizer.synchronize()
                        scaler.unscale_(trial.optimizer)
                        torch.nn.utils.clip_grad_norm_(trial.model.parameters(), 1e9)
                        with trial.optimizer.skip_synchronize():
                            scaler.step(trial.optimizer)
                    else:
                        scaler.step(trial.optimizer)
                    scaler.update()
                    assert (scaler.get_scale() < scale) == bad
                    if bad:
                        assert number == 0 or torch.equal(state_of(trial), before)
                        assert trial.optimizer.last_step.ranks[-1].nonfinite == "gradient"
                    else:
                        mine = flat(trial.model.parameters())
                        trial.reference(step)
                        trial.one_optimizer.step()
                        one = flat(trial.one.parameters())
                        trial.near(((mine - one).norm() / one.norm()).item(), "parameters")
                    assert trial.optimizer.last_step.skipped == 0
                same_on_all_ranks(flat(trial.model.parameters()).tolist())


def case_drop_is_refused_with_a_grad_scaler():
    g = generator(8)
    trial = Trial(network(g), nonfinite="drop")
    scaler = torch.amp.GradScaler(DEVICE.type)
    (b,) = regression(g, uneven())[hvd.rank()]
    scaler.scale(trial.objective(trial.model(b.x), b.y)).backward()
    raises_everywhere(ConfigError, lambda: scaler.step(trial.optimizer), "GradScaler", "skip")


def case_clipping_by_hand():
    """Between synchronize() and step() gradients can be looked at, and clipped, whatever they are."""
    for policy in ("raise", "skip"):
        g = generator(9)
        trial = Trial(network(g), nonfinite=policy)
        for fault in ("gradient NaN", None, "gradient infinite", None):
            step = regression(g, uneven())
            before = state_of(trial)
            if fault:
                spoiled_backward(trial, step, fault)
            else:
                trial.optimizer.zero_grad()
                trial.backward(step)
            trial.optimizer.synchronize()
            norm = torch.nn.utils.clip_grad_norm_(trial.model.parameters(), 1e9)
            assert bool(torch.isfinite(norm)) == (fault is None)

            def take(trial=trial):
                with trial.optimizer.skip_synchronize():
                    trial.optimizer.step()

            if fault and policy == "raise":
                raises_everywhere(NonFiniteGradientError, take, f"rank {last()}")
            else:
                take()
            if fault:
                assert torch.equal(state_of(trial), before)
            else:
                trial.compare(step)
        trial.finish()


def case_closures():
    """The first evaluation may be skipped; within a line search it is too late for that."""
    for policy in ("raise", "skip", "drop"):
        if policy == "drop" and hvd.size() == 1:
            continue
        for make in (
            lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
            lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=3, history_size=3),
        ):
            g = generator(10)
            trial = Trial(network(g), make, nonfinite=policy)
            step = regression(g, uneven())
            calls = []
            for bad_at in (1, None, 2):
                calls.clear()

                def closure(trial=trial, step=step, bad_at=bad_at, calls=calls):
                    calls.append(1)
                    if len(calls) == bad_at:
                        spoiled_backward(trial, step, "gradient infinite")
                    else:
                        trial.optimizer.zero_grad()
                        trial.backward(step)
                    (b,) = step[hvd.rank()]
                    return trial.objective(trial.model(b.x), b.y, weight=b.weight).detach()

                before = state_of(trial)
                reached = bad_at == 1 or (bad_at == 2 and isinstance(trial.one_optimizer, torch.optim.LBFGS))
                if reached and (policy == "raise" or (policy == "skip" and bad_at == 2)):
                    raises_everywhere(
                        NonFiniteGradientError,
                        lambda trial=trial, closure=closure: trial.optimizer.step(closure),
                        f"rank {last()}",
                    )
                else:
                    trial.optimizer.step(closure)
                if bad_at == 1 and policy != "drop":
                    assert torch.equal(
                        flat(trial.model.parameters()), before[: len(flat(trial.model.parameters()))]
                    )
                    assert len(calls) == 1
            assert torch.isfinite(flat(trial.model.parameters())).all()
            same_on_all_ranks(flat(trial.model.parameters()).tolist())


def case_sparse_gradients():
    for policy in ("raise", "skip", "drop"):
        if policy == "drop" and hvd.size() == 1:
            continue
        for as_dense in (False, True):
            g = generator(11)
            table = torch.nn.Embedding(9, 3, sparse=True, dtype=torch.float64, device=DEVICE)
            with torch.no_grad():
                table.weight.copy_(torch.randn(9, 3, generator=g, dtype=torch.float64))
            one = copy.deepcopy(table)
            objective = hvd.Objective("mse", nonfinite=policy)
            opt = hvd.DistributedOptimizer(
                torch.optim.SGD(table.parameters(), lr=0.1), objective=objective, sparse_as_dense=as_dense
            )
            plain = torch.optim.SGD(one.parameters(), lr=0.1)
            for bad in (None, nan, inf, None):
                rows = [here(torch.randint(0, 9, (3 + r,), generator=g)) for r in range(hvd.size())]
                ys = [here(torch.randn(len(i), 3, generator=g, dtype=torch.float64)) for i in rows]
                opt.zero_grad()
                before = table.weight.detach().clone()
                prediction = table(rows[hvd.rank()])
                if bad is not None and hvd.rank() == last():
                    prediction = Poison.apply(prediction, bad)
                objective(prediction, ys[hvd.rank()]).backward()
                if bad is not None and policy == "raise":
                    raises_everywhere(NonFiniteGradientError, opt.step, f"rank {last()}")
                else:
                    opt.step()
                if bad is not None and policy != "drop":
                    assert torch.equal(table.weight, before)
                    continue
                kept = slice(None, last() if bad is not None else None)
                plain.zero_grad()
                mse(one(torch.cat(rows[kept])), torch.cat(ys[kept])).mean().backward()
                plain.step()
                assert torch.allclose(table.weight, one.weight, rtol=1e-12, atol=1e-14)
            same_on_all_ranks(opt.last_step)


@needs("gloo-2", more="gloo-3 mpi-2 dist-2")
def case_other_reductions_and_penalties():
    """A penalty counts once, whoever was dropped; with "sum" for the calls that are left."""
    if hvd.size() == 1:
        raise unittest.SkipTest("one rank has no others")
    weight_decay = 0.3

    def penalty(model):
        return weight_decay * sum((p**2).sum() for p in model.parameters())

    results = []
    for reduction in ("mean", "batch_mean", "sum"):
        share = [1.0]

        def shared(model, share=share):
            return penalty(model) * share[0]

        for policy in ("skip", "drop"):
            g = generator(12)
            trial = Trial(network(g), reduction=reduction, nonfinite=policy, penalty=shared)
            for fault in (None, "loss NaN", "gradient infinite", None):
                step = regression(g, uneven())
                if fault is None:
                    trial.step(step)
                    continue
                before = state_of(trial)
                spoiled_backward(trial, step, fault)
                trial.optimizer.step()
                if policy == "skip":
                    assert torch.equal(state_of(trial), before)
                    continue
                share[0] = last() / hvd.size() if reduction == "sum" else 1.0
                trial.compare(dropped(step), plain=False)
                share[0] = 1.0
            results.append(trial.finish(wrong=False))
    return worst(results)


def case_compressed_gradients():
    """What overflows on the wire is infinite as well."""
    g = generator(13)
    for policy in ("raise", "skip"):
        model = network(g, torch.float32)
        objective = hvd.Objective("mse", nonfinite=policy)
        opt = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), objective=objective, compression=hvd.Compression.fp16
        )
        for bad in (None, nan, 1e6, 1e3, None):
            opt.zero_grad()
            (b,) = regression(g, uneven(), dtype=torch.float32)[hvd.rank()]
            before = flat(model.parameters())
            prediction = model(b.x)
            if bad is not None and hvd.rank() == last():
                prediction = Poison.apply(prediction, bad)
            objective(prediction, b.y).backward()
            wrong = bad is not None and not (bad < 1e4 or (hvd.size() == 1 and bad == 1e6))
            if wrong and policy == "raise":
                raises_everywhere(NonFiniteGradientError, opt.step, f"rank {last()}")
            else:
                opt.step()
            assert torch.equal(flat(model.parameters()), before) == wrong, bad
        same_on_all_ranks(flat(model.parameters()).tolist())


def case_process_sets():
    group = hvd.add_process_set(range(1, hvd.size())) if hvd.size() > 1 else None
    if group is None:
        return
    try:
        if group.included():
            for policy in ("raise", "skip", "drop"):
                g = generator(14)
                model = network(g)
                objective = hvd.Objective("mse", process_set=group, nonfinite=policy)
                opt = hvd.DistributedOptimizer(
                    torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), objective
                )
                for bad in (None, nan, None):
                    (b,) = regression(g, uneven())[hvd.rank()]
                    opt.zero_grad()
                    before = flat(model.parameters())
                    prediction = model(b.x)
                    if bad is not None and hvd.rank() == last():
                        prediction = Poison.apply(prediction, bad)
                    objective(prediction, b.y).backward()
                    told = ""
                    try:
                        opt.step()
                    except (NonFiniteGradientError, NoWeightError) as error:
                        told = str(error)
                    none_left = policy == "drop" and group.size() == 1
                    assert bool(told) == (bad is not None and (policy == "raise" or none_left))
                    assert not told or f"rank {group.size() - 1}" in told
                    same_on_all_ranks(told, group)
                    changed = not torch.equal(flat(model.parameters()), before)
                    assert changed == (bad is None or (policy == "drop" and not none_left))
                same_on_all_ranks(flat(model.parameters()).tolist(), group)
    finally:
        hvd.remove_process_set(group)


@needs("gloo-2", more="gloo-3 mpi-2 dist-2")
def case_local_steps():
    """A rank's own step that is not finite moves nothing: an error at the exchange, or left out."""
    if hvd.size() == 1:
        raise unittest.SkipTest("one rank exchanges at every step")
    terms = lambda: (hvdloss.CommunicationCost(policies=(SyncPeriod(3),)),)  # noqa: E731
    with pytest.raises(ConfigError, match=r"SyncPeriod.*drop"):
        hvd.Objective("mse", terms=terms(), nonfinite="skip")
    for policy in ("raise", "drop"):
        for bad in (nan, inf):
            g = generator(15)
            model = network(g)
            objective = hvd.Objective("mse", terms=terms(), nonfinite=policy)
            opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)

            def step(spoil, g=g, model=model, objective=objective, opt=opt, bad=bad):
                (b,) = regression(g, uneven())[hvd.rank()]
                opt.zero_grad()
                prediction = model(b.x)
                if spoil and hvd.rank() == last():
                    prediction = Poison.apply(prediction, bad)
                objective(prediction, b.y).backward()
                opt.step()
                return len(b.y)

            step(False)  # together: it makes the plan
            anchor = flat(model.parameters())
            step(False)
            before = flat(model.parameters())
            step(True)
            moved = not torch.equal(flat(model.parameters()), before)
            assert moved == (hvd.rank() != last())
            if policy == "raise":
                raises_everywhere(NonFiniteGradientError, lambda step=step: step(False), f"rank {last()}")
                assert torch.equal(flat(model.parameters()), anchor)
            else:
                step(False)
                report = opt.last_step
                n = [3 + 4 * rank for rank in range(hvd.size())]
                assert [one.elements for one in report.ranks] == [3 * k for k in n[:-1]] + [2 * n[-1]]
                assert [one.dropped for one in report.ranks] == [0] * last() + [1]
                assert not torch.equal(flat(model.parameters()), anchor)
                for _ in range(3):
                    step(True)  # the whole stretch
                if hvd.size() > 1:
                    assert opt.last_step.ranks[-1].elements == 0
            assert torch.isfinite(flat(model.parameters())).all()
            same_on_all_ranks(flat(model.parameters()).tolist())


def case_losses_of_all_ranks():
    """There a NaN reaches all ranks: it is named and skipped, but no rank can be taken out."""
    with pytest.raises(ConfigError, match=r"SoftDice.*skip"):
        hvd.Objective("soft_dice", nonfinite="drop")
    for policy in ("raise", "skip"):
        g = generator(16)
        model = torch.nn.Sequential(network(g), torch.nn.Sigmoid())
        objective = hvd.Objective("soft_dice", nonfinite=policy)
        opt = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), objective=objective
        )
        skipped = 0
        for what in (None, "loss", "gradient", None):
            (b,) = regression(g, uneven())[hvd.rank()]
            y = (b.y > 0).double()
            opt.zero_grad()
            if what == "loss" and hvd.rank() == last():
                b.x[0] = nan
            prediction = model(b.x)
            if what == "gradient" and hvd.rank() == last():
                prediction = Poison.apply(prediction, inf)
            before = flat(model.parameters())
            objective(prediction, y).backward()
            if what and policy == "raise":
                kind = NonFiniteLossError if what == "loss" else NonFiniteGradientError
                raises_everywhere(kind, opt.step, f"rank {last()}")
            else:
                opt.step()
            assert torch.equal(flat(model.parameters()), before) == bool(what)
            if what and policy == "skip":
                skipped += 1
                assert opt.last_step.ranks[-1].nonfinite == what
                assert opt.last_step.skipped == skipped
        same_on_all_ranks(flat(model.parameters()).tolist())


def case_terms_do_not_see_a_skipped_step():
    closed = []
    skew = hvdloss.DataSkew(classes=2)
    skew.on_step_end, plain = lambda step: (closed.append(step.step), plain(step))[1], skew.on_step_end
    g = generator(17)
    model = network(g, outputs=2)
    objective = hvd.Objective("cross_entropy", terms=(skew,), nonfinite="skip")
    opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)
    for bad in (False, True, False):
        (b,) = regression(g, uneven())[hvd.rank()]
        opt.zero_grad()
        prediction = model(b.x)
        if bad and hvd.rank() == last():
            prediction = Poison.apply(prediction, nan)
        objective(prediction, (b.y[:, 0] > 0).long()).backward()
        opt.step()
    assert closed == [1, 3]
    assert opt.last_step.skipped == 1


def case_policies_that_differ():
    g = generator(18)
    trial = Trial(network(g), nonfinite="skip" if hvd.rank() == last() else "raise")
    if hvd.size() == 1:
        return
    trial.optimizer.zero_grad()
    trial.backward(regression(g, uneven()))
    raises_everywhere(hvdloss.AgreementError, trial.optimizer.step, "nonfinite", f"rank {last()}")


def case_shapes_that_do_not_broadcast():
    """They raise on the rank where they occur, before anything is changed; the next step is exact."""
    g = generator(19)
    trial = Trial(network(g))
    for _ in range(2):
        before = state_of(trial)
        (b,) = regression(g, uneven())[hvd.rank()]
        trial.optimizer.zero_grad()
        prediction = trial.model(b.x)
        for weight in (torch.ones(len(b.y) + 1, 1), torch.ones(2, len(b.y), 1), torch.ones(len(b.y))):
            words = re.escape(str(tuple(weight.shape))) + f".*rank {hvd.rank()}"
            with pytest.raises(ShapeError, match=words):
                trial.objective(prediction, b.y, weight=weight)
        assert torch.equal(state_of(trial), before)
        trial.step(regression(g, uneven()))
    trial.finish()


def case_stray_passes_stay_errors():
    g = generator(20)
    for policy in ("skip", "drop"):
        trial = Trial(network(g), nonfinite=policy)
        (b,) = regression(g, uneven())[hvd.rank()]
        (mse(trial.model(b.x), b.y).mean() * nan).backward()
        raises_everywhere(UsageError, trial.optimizer.step)
        trial.step(regression(g, uneven()))
        trial.finish()


@needs("gloo-2", more="gloo-3 mpi-2 dist-2")
def case_without_weight_a_gradient_may_be_anything():
    """A rank whose weights are all zero adds nothing: its gradient is not looked at."""
    if hvd.size() == 1:
        raise unittest.SkipTest("one rank has no others")
    results = []
    for trial, step in trials("raise", 21):
        for fault in ("gradient NaN", "gradient infinite"):
            whole = step()
            for b in whole[last()]:
                b.weight.zero_()
            spoiled_backward(trial, whole, fault)
            trial.optimizer.step()
            trial.compare(whole, plain=False)
            assert not any(one.nonfinite for one in trial.optimizer.last_step.ranks)
        trial.step(step())
        results.append(trial.finish())
    return worst(results)
