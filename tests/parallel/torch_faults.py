"""What goes wrong on one rank is the same error on every rank, and the next good step is exact."""

from __future__ import annotations

import copy

import torch
from torch_support import (
    Trial,
    before_case,
    difference,
    flat,
    generator,
    gradients,
    mse,
    network,
    raises_everywhere,
    regression,
    same_on_all_ranks,
    uneven,
)

import hvdloss.torch as hvd
from hvdloss.errors import (
    AgreementError,
    NonFiniteLossError,
    NoWeightError,
    UsageError,
    WeightError,
)
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 dist-2")

__all__ = ["before_case"]


def last():
    """The rank that misbehaves."""
    return hvd.size() - 1


def bad_step(trial, spoil, kind, *words):
    """Take a step that `spoil` has changed; it must raise `kind` everywhere and update nothing."""
    g = generator(999)
    step = regression(g, uneven(micro=trial.passes))
    spoil(step)
    before = flat(trial.model.parameters())
    trial.optimizer.zero_grad()
    trial.backward(step)
    text = raises_everywhere(kind, trial.optimizer.step, *words)
    assert torch.equal(before, flat(trial.model.parameters())), "the bad step changed parameters"
    return text


def around(seed, spoil, kind, *words, good_first=(True, False), passes=(1, 2)):
    """A bad step as the first one (nothing is planned yet) and as a later one; then good steps."""
    result = {}
    for first in good_first:
        for p in passes:
            g = generator(seed)
            trial = Trial(network(g), passes=p)
            if first:
                trial.step(regression(g, uneven(micro=p)))
            bad_step(trial, spoil, kind, *words)
            for _ in range(2):
                trial.step(regression(g, uneven(micro=p)))
            bad_step(trial, spoil, kind, *words)
            trial.step(regression(g, uneven(micro=p)))
            for key, value in trial.finish().items():
                result[key] = max(value, result.get(key, value))
    return result


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_negative_weight():
    def spoil(step):
        step[last()][0].weight[1] = -1.0

    return around(1, spoil, WeightError, f"rank {last()}", "below zero")


def case_nan_weight():
    def spoil(step):
        step[last()][0].weight[1] = float("nan")

    return around(2, spoil, WeightError, f"rank {last()}", "NaN")


def case_infinite_weight():
    def spoil(step):
        step[0][0].weight[0] = float("inf")

    return around(3, spoil, WeightError, "rank 0")


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_nan_loss():
    def spoil(step):
        step[last()][-1].y[0] = float("nan")

    return around(4, spoil, NonFiniteLossError, f"rank {last()}")


def case_infinite_loss():
    def spoil(step):
        step[0][0].x[0] = 1e300
        step[0][0].y[0] = float("inf")

    return around(5, spoil, NonFiniteLossError, "rank 0")


def case_no_weight_anywhere():
    def spoil(step):
        for row in step:
            for b in row:
                b.weight.zero_()

    return around(6, spoil, NoWeightError, f"{hvd.size()} rank(s)")


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_no_call_on_any_rank():
    def spoil(step):
        for row in step:
            row.clear()

    return around(7, spoil, NoWeightError)


def case_two_calls_of_unequal_weight_before_one_backward():
    g = generator(8)
    trial = Trial(network(g))
    for good in (False, True, False):
        if good:
            trial.step(regression(g, uneven()))
            continue
        (b,) = regression(g, uneven())[hvd.rank()]
        trial.optimizer.zero_grad()
        loss = trial.objective(trial.model(b.x), b.y, weight=b.weight)
        if hvd.rank() == last():
            loss = loss + trial.objective(trial.model(b.x), b.y)
        loss.backward()
        raises_everywhere(UsageError, trial.optimizer.step, f"rank {last()}", "once per backward")
    trial.step(regression(g, uneven()))
    return trial.finish()


def case_a_backward_pass_around_the_objective():
    g = generator(9)
    trial = Trial(network(g), passes=2)
    for good in (False, True, False):
        if good:
            trial.step(regression(g, uneven(micro=2)))
            continue
        trial.optimizer.zero_grad()
        step = regression(g, uneven())
        (b,) = step[hvd.rank()]
        if hvd.rank() == last():
            mse(trial.model(b.x), b.y).mean().backward()
        else:
            trial.backward(step)
        raises_everywhere(UsageError, trial.optimizer.step, f"rank {last()}")
    trial.step(regression(g, uneven(micro=2)))
    return trial.finish()


def case_more_backward_passes_than_declared():
    g = generator(10)
    trial = Trial(network(g))
    trial.step(regression(g, uneven()))
    step = regression(g, uneven(micro=2))
    trial.optimizer.zero_grad()
    raises_everywhere(UsageError, lambda: trial.backward(step), "backward_passes_per_step")
    # The step is taken with what it had before, or refused; on all ranks alike.
    try:
        trial.optimizer.step()
        told = ""
    except UsageError as error:
        told = str(error)
    same_on_all_ranks(told)
    trial.one.load_state_dict(trial.model.state_dict())
    trial.one_optimizer.load_state_dict(copy.deepcopy(trial.optimizer.state_dict()))
    trial.step(regression(g, uneven()))
    return trial.finish()


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_an_exception_inside_a_backward_pass():
    """User code that raises in one rank's backward pass, and a program that goes on."""
    g = generator(11)
    trial = Trial(network(g))
    trial.step(regression(g, uneven()))

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("user code")

    (b,) = regression(g, uneven())[hvd.rank()]
    trial.optimizer.zero_grad()
    hidden = trial.model[1](trial.model[0](b.x))
    if hvd.rank() == last():
        hidden = Fails.apply(hidden)
    loss = trial.objective(trial.model[2](hidden), b.y, weight=b.weight)
    try:
        loss.backward()
        assert hvd.rank() != last()
    except ValueError:
        assert hvd.rank() == last()
    raises_everywhere(UsageError, trial.optimizer.step, f"rank {last()}")
    trial.step(regression(g, uneven()))
    return trial.finish()


def case_step_inside_skip_synchronize_without_synchronize():
    g = generator(12)
    trial = Trial(network(g))
    trial.step(regression(g, uneven()))
    trial.optimizer.zero_grad()

    def take():
        with trial.optimizer.skip_synchronize():
            trial.optimizer.step()

    raises_everywhere(UsageError, take, "synchronize()")
    trial.step(regression(g, uneven()))
    return trial.finish()


def case_zero_grad_drops_a_step_on_all_ranks():
    g = generator(13)
    trial = Trial(network(g))
    trial.step(regression(g, uneven()))
    before = flat(trial.model.parameters())
    for forget in (trial.optimizer.zero_grad, trial.model.zero_grad):
        trial.optimizer.zero_grad()
        trial.backward(regression(g, uneven()))
        forget()
    assert torch.equal(flat(trial.model.parameters()), before)
    trial.step(regression(g, uneven()))
    return trial.finish()


def case_zero_grad_while_gradients_travel():
    """A pass that belongs to two optimizers ends without waiting: ranks may ask for them in another order."""
    g = generator(13)
    models = [network(g), network(g)]
    objectives = [hvd.Objective("mse"), hvd.Objective("mae")]
    optimizers = [
        hvd.DistributedOptimizer(torch.optim.SGD(m.parameters(), lr=0.1), m.named_parameters(), o)
        for m, o in zip(models, objectives, strict=True)
    ]

    def backward():
        (b,) = regression(generator(14), uneven())[hvd.rank()]
        losses = [o(m(b.x), b.y, weight=b.weight) for m, o in zip(models, objectives, strict=True)]
        sum(losses).backward()

    for order in (1, -1, 1):
        backward()
        for optimizer in optimizers[:: order if hvd.rank() else 1]:
            optimizer.step()
            optimizer.zero_grad()
    backward()
    raises_everywhere(UsageError, optimizers[0].zero_grad, "under way")
    for optimizer in optimizers:
        optimizer.step()
    same_on_all_ranks(torch.cat([flat(m.parameters()) for m in models]))


def _trained(g, model, **options):
    objective = hvd.Objective(options.pop("loss", "mse"), reduction=options.pop("reduction", "mean"))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), list(model.named_parameters()), objective, **options
    )
    (b,) = regression(g, uneven())[hvd.rank()]
    objective(model(b.x), b.y, weight=b.weight).backward()
    return optimizer


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_parameters_that_differ():
    g = generator(14)
    model = network(g)
    if hvd.rank() == last():
        with torch.no_grad():
            model[2].bias += 1e-9
    optimizer = _trained(g, model)
    raises_everywhere(AgreementError, optimizer.step, "2.bias", f"rank(s) {last()}", "broadcast_parameters")
    # The advice in the message works.
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer.zero_grad()
    (b,) = regression(g, uneven())[hvd.rank()]
    optimizer.objective(model(b.x), b.y, weight=b.weight).backward()
    optimizer.step()
    same_on_all_ranks(flat(model.parameters()).tolist())


def case_a_parameter_frozen_or_with_another_gradient_on_one_rank():
    for change, words in (
        (lambda p: p.requires_grad_(False), "requires_grad"),
        (lambda p: setattr(p, "grad_dtype", torch.float32), "gradient"),
    ):
        model = network(generator(3))
        if hvd.rank() == last():
            change(model[0].weight)
        objective = hvd.Objective("mse")
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), objective
        )
        (b,) = regression(generator(4), uneven())[hvd.rank()]
        before = flat(model.parameters())
        objective(model(b.x), b.y, weight=b.weight).backward()
        raises_everywhere(AgreementError, optimizer.step, "0.weight", words, f"rank {last()}")
        assert torch.equal(flat(model.parameters()), before)


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_models_that_differ():
    g = generator(15)
    odd = hvd.rank() == last()
    raises_everywhere(
        AgreementError, _trained(g, network(g, outputs=2 if odd else 1)).step, "shape", "2.weight"
    )
    narrow = network(g)
    if odd:
        narrow = torch.nn.Sequential(*narrow, torch.nn.Linear(1, 1, dtype=torch.float64))
    raises_everywhere(AgreementError, _trained(g, narrow).step, "number of parameters")
    half = network(g).float() if odd else network(g)
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(half.parameters(), lr=0.1), half.named_parameters(), objective
    )
    (b,) = regression(g, uneven())[hvd.rank()]
    dtype = next(half.parameters()).dtype
    objective(half(b.x.to(dtype)), b.y.to(dtype)).backward()
    raises_everywhere(AgreementError, optimizer.step, "kind", "float32")


def case_settings_that_differ():
    g = generator(16)
    odd = hvd.rank() == last()
    model = network(g)
    for name, common, other in (
        ("reduction", "mean", "batch_mean"),
        ("loss", "mse", "mae"),
        ("backward_passes_per_step", 2, 3),
        ("compression", hvd.Compression.none, hvd.Compression.fp16),
        ("sparse_as_dense", False, True),
        ("groups", 1, 2),
        ("gradient_predivide_factor", 1.0, 2.0),
    ):
        optimizer = _trained(g, model, **{name: other if odd else common})
        word = "objective" if name == "loss" else name
        raises_everywhere(AgreementError, optimizer.step, word, f"rank {last()}")
        model.zero_grad()
    optimizer = _trained(g, model)
    optimizer.step()
    assert gradients(model).norm() > 0


def case_a_bad_step_leaves_clipping_and_closures_usable():
    g = generator(17)
    trial = Trial(network(g))
    trial.step(regression(g, uneven()))
    step = regression(g, uneven())
    step[last()][0].weight[0] = -1
    trial.optimizer.zero_grad()
    trial.backward(step)
    raises_everywhere(WeightError, trial.optimizer.synchronize, f"rank {last()}")

    def closure():
        trial.optimizer.zero_grad()
        (b,) = step[hvd.rank()]
        loss = trial.objective(trial.model(b.x), b.y, weight=b.weight)
        loss.backward()
        return loss

    raises_everywhere(WeightError, lambda: trial.optimizer.step(closure), f"rank {last()}")
    step[last()][0].weight[0] = 1
    trial.optimizer.step(closure)
    trial.compare(step)
    return trial.finish()


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_errors_inside_a_process_set_name_its_ranks():
    group = hvd.add_process_set(range(1, hvd.size()))
    try:
        if group.included():
            g = generator(18)
            model = network(g)
            objective = hvd.Objective("mse", process_set=group)
            optimizer = hvd.DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), objective
            )
            for good in (True, False, True):
                (b,) = regression(g, uneven())[hvd.rank()]
                if not good and hvd.rank() == last():
                    b.weight[0] = -1
                optimizer.zero_grad()
                before = flat(model.parameters())
                objective(model(b.x), b.y, weight=b.weight).backward()
                told = ""
                try:
                    optimizer.step()
                except WeightError as error:
                    told = str(error)
                assert (not told) == good
                assert good or f"rank {group.size() - 1}" in told
                same_on_all_ranks(told, group)
                changed = difference(flat(model.parameters()), before)
                assert (changed > 0) == good
            same_on_all_ranks(flat(model.parameters()).tolist(), group)
    finally:
        hvd.remove_process_set(group)


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2 dist-2")
def case_the_guard_names_the_parameter_and_the_ranks_that_drifted():
    g = generator(19)
    model = network(g)
    hvd.check_synchronized(model)
    with torch.no_grad():
        if hvd.rank() == last():
            parameter = list(model.parameters())[2]
            parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(9.0).to(parameter))
    name = list(dict(model.named_parameters()))[2]
    raises_everywhere(AgreementError, lambda: hvd.check_synchronized(model), name, f"rank(s) {last()}")
    half = [(n, p.detach().to(torch.bfloat16)) for n, p in model.named_parameters()]
    hvd.check_synchronized(half)  # the last bit of a float64 is not there


def case_the_guard_notices_that_nothing_is_reduced():
    g = generator(20)
    model = network(g)
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), objective, check_every=2
    )

    def step():
        (b,) = regression(g, uneven())[hvd.rank()]
        optimizer.zero_grad()
        objective(model(b.x), b.y, weight=b.weight).backward()
        optimizer.step()

    for _ in range(4):
        step()
    for bucket in optimizer._hvdloss.reducer.buckets:
        bucket.launch = lambda leftover, wire, bucket=bucket: setattr(bucket, "launched", True)
    step()
    raises_everywhere(AgreementError, step, "after step 6", "rank(s) " + ", ".join(map(str, others())))


def others():
    return range(1, hvd.size())
