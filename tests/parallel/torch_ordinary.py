"""Code as users of PyTorch write it: the number of one process, or an error on every rank."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_support import (
    DEVICE,
    Batch,
    before_case,
    difference,
    flat,
    generator,
    gradients,
    here,
    network,
    raises_everywhere,
    regression,
    same_on_all_ranks,
    uneven,
    union,
)

import hvdloss.torch as hvd
from hvdloss.errors import AgreementError, ConfigError, RankError, ShapeError, UsageError
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 dist-2")

__all__ = ["before_case"]

D = torch.float64
_CLIP_NORM = torch.nn.utils.clip_grad_norm_  # as a script imports it, before any optimizer is made


def split(n: int, *, first: int | None = None) -> slice:
    """Return this rank's part of `n` rows: rank 0 has `first`, the others share what is left."""
    first = n - hvd.size() + 1 if first is None else first
    cuts = [0, *(first + i * (n - first) // max(1, hvd.size() - 1) for i in range(hvd.size()))]
    cuts[-1] = n
    a, b = list(itertools.pairwise(cuts))[hvd.rank()]
    return slice(a, b)


def classes(seed: int, n: int = 12) -> Batch:
    """Return features and labels, of which some are ignored, unevenly."""
    g = generator(seed)
    y = torch.randint(0, 4, (n,), generator=g)
    y[: n // 2 : 2] = -100
    return Batch(torch.randn(n, 5, generator=g, dtype=D), y)


def one_step(loss, batch: Batch, whole_loss, outputs: int = 4) -> float:
    """Return how far a step's gradient is from one process's, relative to it."""
    model, one = network(generator(5), outputs=outputs), network(generator(5), outputs=outputs)
    objective = loss if isinstance(loss, hvd.Objective) else hvd.Objective(loss)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), objective
    )
    rows = split(len(batch.x))
    objective(model(batch.x[rows]), batch.y[rows]).backward()
    optimizer.synchronize()
    whole_loss(one(batch.x), batch.y).backward()
    return difference(gradients(model), gradients(one))


def case_losses_of_torch_with_weights_and_ignored_labels():
    w = here(torch.tensor([0.5, 3.0, 1.0, 0.2], dtype=D))
    error = 0.0
    for options in (
        {},
        {"weight": w},
        {"ignore_index": 2},
        {"weight": w, "label_smoothing": 0.1},
    ):
        whole = functools.partial(F.cross_entropy, **options)
        batch = classes(3)
        if "ignore_index" in options:
            batch.y.clamp_(min=0)
        named = {("class_weight" if k == "weight" else k): v for k, v in options.items()}
        for loss in (
            nn.CrossEntropyLoss(**options),
            nn.CrossEntropyLoss(**options, reduction="none"),
            whole,
            lambda y, t, whole=whole: whole(y, t),
            hvd.Objective("cross_entropy", **named),
        ):
            error = max(error, one_step(loss, batch, whole))
    assert error < 1e-12
    return {"error, float64": error}


def case_the_first_row_of_a_linear_model_at_zero():
    """Two of four labels are ignored, ranks hold 3 and 1: by hand [-0.25, 0]."""
    x = here(torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1]], dtype=D))
    y = here(torch.tensor([-100, -100, 1, 0]))
    rows = split(4)
    model = nn.Linear(2, 2, bias=False).to(x)
    nn.init.zeros_(model.weight)
    objective = hvd.Objective(nn.CrossEntropyLoss(reduction="none"))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters(), objective
    )
    objective(model(x[rows]), y[rows]).backward()
    optimizer.step()
    torch.testing.assert_close(model.weight[0].cpu(), torch.tensor([0.25, 0.0], dtype=D))


def case_a_mean_of_ones_own_is_refused_on_every_rank():
    """The last rank has one element, of which a mean would be right by itself."""
    x = here(torch.arange(1.0, 5.0, dtype=D))
    v = nn.Parameter(here(torch.zeros((), dtype=D)))
    for loss in (
        lambda y, t: ((y - t) ** 2).mean(),
        lambda y, t: ((y - t) ** 2).sum() / len(y),
    ):
        objective = hvd.Objective(loss)
        with pytest.raises(ShapeError, match="one number"):
            objective(v * x[split(4)], x[split(4)])
    # A mean that torch takes is known by its elements: d/dv of (v x - t)^2 at 0, over t = 0, 0, 0, 8.
    t = here(torch.tensor([0.0, 0, 0, 8], dtype=D))
    objective = hvd.Objective(lambda y, t: F.mse_loss(y, t))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([v], lr=1.0), [("v", v)], objective)
    objective(v * x[split(4)], t[split(4)]).backward()
    optimizer.synchronize()
    assert abs(float(v.grad) + 16) < 1e-12, v.grad


def two_tasks():
    """Return features, two tasks' targets, and which rows have the second; and a parameter."""
    x = here(torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1]], dtype=D))
    a, b = (here(torch.tensor(t, dtype=D)) for t in ([1.0, 2, 3, 4], [5.0, 1, 0, 2]))
    has = here(torch.tensor([1.0, 1, 1, 0], dtype=D))
    return x, a, b, has, nn.Parameter(here(torch.zeros(2, dtype=D)))


def case_two_objectives_in_one_backward_pass_are_refused_by_name():
    x, a, b, has, v = two_tasks()
    task_a, task_b = hvd.Objective("mse"), hvd.Objective("huber")
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([v], lr=1.0), [("v", v)], task_a)
    rows = split(4)

    def step():
        optimizer.zero_grad()
        prediction = x[rows] @ v
        (task_a(prediction, a[rows]) + task_b(prediction, b[rows], has[rows])).backward()
        optimizer.step()

    raises_everywhere(RankError, step, "'huber'", "'mse'", "rank 0", "{'name': objective")

    def alone():  # an objective nobody listens to
        optimizer.zero_grad()
        task_b(x[rows] @ v, b[rows], has[rows]).backward()
        optimizer.step()

    raises_everywhere(RankError, alone, "'huber'", "'mse'")
    assert not v.any()

    # One objective, of both: the second task's weights as parts of the loss.
    optimizer.zero_grad()
    task_a(x[rows] @ v, a[rows]).backward()
    optimizer.step()
    torch.testing.assert_close(v.detach(), -2 * x.T @ (-a) / 4)


def case_objectives_of_other_parameters_may_share_a_backward_pass():
    x, a, b, _, v = two_tasks()
    w, own = nn.Parameter(torch.zeros_like(v)), nn.Parameter(torch.zeros_like(v))
    task_a, task_b, nobodys = hvd.Objective("mse"), hvd.Objective("mse"), hvd.Objective("mse")
    first = hvd.DistributedOptimizer(torch.optim.SGD([v], lr=1.0), [("v", v)], task_a)
    second = hvd.DistributedOptimizer(torch.optim.SGD([w], lr=1.0), [("w", w)], task_b)
    rows = split(4)
    for _ in range(2):
        first.zero_grad()
        second.zero_grad()
        losses = task_a(x[rows] @ v, a[rows]), task_b(x[rows] @ w, b[rows]), nobodys(x[rows] @ own, a[rows])
        sum(losses).backward()
        first.synchronize()
        second.synchronize()
        torch.testing.assert_close(v.grad, -2 * x.T @ a / 4)
        torch.testing.assert_close(w.grad, -2 * x.T @ b / 4)


def case_a_loss_divided_by_the_number_of_micro_batches():
    error = 0.0
    scaling = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    # Undivided, a scaler's scale is no division, whatever power of two it is.
    for count, scaler, divisor in ((4, None, 4), (3, None, 3), (4, scaling, 4), (4, scaling, 1)):
        g = generator(7)
        batch = classes(9, 48)
        model = network(g, outputs=4)
        one = network(generator(7), outputs=4)
        objective = hvd.Objective("cross_entropy")
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model.named_parameters(),
            objective,
            backward_passes_per_step=count,
        )
        penalty = lambda m: 0.1 * sum((p**2).sum() for p in m.parameters())  # noqa: E731
        rows = split(48)
        for _ in range(2):  # with the plan that the first makes
            optimizer.zero_grad()
            for x, y in zip(batch.x[rows].chunk(count), batch.y[rows].chunk(count), strict=True):
                loss = (objective(model(x), y) + penalty(model)) / divisor
                (loss if scaler is None else scaler.scale(loss)).backward()
            optimizer.synchronize()
            if scaler is not None:
                scaler.unscale_(optimizer)
            one.zero_grad()
            (F.cross_entropy(one(batch.x), batch.y) + penalty(one)).backward()
            error = max(error, difference(gradients(model), gradients(one)))
            if scaler is not None:  # which wants a step after it has unscaled
                with optimizer.skip_synchronize():
                    scaler.step(optimizer)
                scaler.update()
                one.load_state_dict(model.state_dict())
    assert error < 1e-12, error

    return {"error, float64": error}


def case_a_loss_divided_by_fewer_micro_batches_is_refused():
    x, a, _, _, v = two_tasks()
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([v], lr=1.0), [("v", v)], objective, backward_passes_per_step=4
    )
    rows = split(4)

    def step():
        for _ in range(2):
            (objective(x[rows] @ v, a[rows]) / 2).backward()
        optimizer.step()

    raises_everywhere(RankError, step, "divided by 2", "backward_passes_per_step=4")
    optimizer.zero_grad()
    for _ in range(2):  # another factor is the user's own
        (objective(x[rows] @ v, a[rows]) * 0.3).backward()
    optimizer.step()
    torch.testing.assert_close(v.detach(), 0.3 * 2 * x.T @ a / 4)
    optimizer.zero_grad()

    def heads():
        (objective(x[rows] @ v, a[rows]) / 4 + objective(x[rows] @ v, a[rows]) / 4).backward()
        optimizer.step()

    raises_everywhere(RankError, heads, "1/4")


def rows_and_model(objective, *, lr: float = 0.1, passes: int = 1):
    """Return features, targets, this rank's rows, a model, its optimizer, and the model of one process."""
    g = generator(11)
    x, y = here(torch.randn(12, 5, generator=g, dtype=D)), here(torch.randn(12, 1, generator=g, dtype=D))
    y[-3:] = 5 * y[-3:] + 3  # ranks' means are far apart
    model, one = network(generator(5)), network(generator(5))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr),
        model.named_parameters(),
        objective,
        backward_passes_per_step=passes,
    )
    return x, y, split(12), model, optimizer, one


@needs("gloo-2", more="gloo-3 dist-2 mpi-2")
def case_a_function_of_a_losss_value_is_refused_on_every_rank():
    """Its derivative at this rank's mean is another than at that of all elements: a root, a clamp, ..."""
    objective = hvd.Objective("mse")
    x, y, rows, model, optimizer, one = rows_and_model(objective)
    functions = {
        "root": torch.sqrt,
        "square": lambda loss: loss**2,
        "flooding": lambda loss: (loss - hvd.allreduce(loss.detach(), name="level")).abs(),
        "of each rank": lambda loss: loss * (1 + hvd.rank()),
        "left out by one": lambda loss: loss * (hvd.rank() != 1),
    }
    before = flat(model.parameters())
    for planned in (False, True):
        for function in functions.values():

            def step(function=function):
                optimizer.zero_grad()
                function(objective(model(x[rows]), y[rows])).backward()
                optimizer.step()

            words = "factors from", "different ranks", "global_losses", "Nothing was updated"
            raises_everywhere(UsageError, step, *words)
            assert torch.equal(flat(model.parameters()), before)
        for factor in (3.0, 0.5, 0.0, -1.0, -1.0) if not planned else ():  # one for all is the user's own
            optimizer.zero_grad()
            (factor * objective(model(x[rows]), y[rows])).backward()
            optimizer.synchronize()
            one.zero_grad()
            (factor * F.mse_loss(one(x), y)).backward()
            assert (gradients(model) - gradients(one)).norm() <= 1e-12 * max(1, gradients(one).norm())
            with optimizer.skip_synchronize():
                optimizer.step()
            one.load_state_dict(model.state_dict())
        before = flat(model.parameters())

    # A rank without elements has no factor, and the only one that has any tells that of all.
    optimizer.zero_grad()
    mine = slice(0, 12 if hvd.rank() == 0 else 0)
    objective(model(x[mine]), y[mine]).sqrt().backward()
    optimizer.synchronize()
    one.zero_grad()
    F.mse_loss(one(x), y).sqrt().backward()
    assert difference(gradients(model), gradients(one)) < 1e-12


def case_the_root_of_a_mean_of_all_ranks():
    objective = hvd.Objective("mse")
    x, y, rows, model, optimizer, one = rows_and_model({"squares": objective})
    (squares,) = hvd.global_losses(objective(model(x[rows]), y[rows]))
    squares.sqrt().backward()
    optimizer.synchronize()
    F.mse_loss(one(x), y).sqrt().backward()
    assert difference(gradients(model), gradients(one)) < 1e-12


def case_micro_batches_multiplied_with_their_part_of_the_rows_are_refused():
    objective = hvd.Objective("mse")
    x, y, rows, model, optimizer, _ = rows_and_model(objective, passes=4)
    parts = torch.arange(12)[rows].split(3)

    def step():
        optimizer.zero_grad()
        for i, part in enumerate(parts):
            (objective(model(x[part]), y[part]) * (1.0 if len(parts) == 1 else (i + 1) / 8)).backward()
        optimizer.step()

    raises_everywhere(UsageError, step, "different factors in the micro-batches of rank 0")


def case_gradients_are_those_of_all_ranks_when_backward_returns():
    """Clipping, noise, norms and a look at ``.grad`` between ``backward()`` and ``step()``."""
    objective = hvd.Objective("mse")
    x, y, rows, model, optimizer, one = rows_and_model(objective)
    plain = torch.optim.SGD(one.parameters(), lr=0.1)

    def halve(parameters):
        for p in parameters:
            p.grad.mul_(0.5)

    def replace(parameters):
        for p in parameters:
            p.grad = p.grad.sign()

    changes = [
        lambda parameters: torch.nn.utils.clip_grad_norm_((p for p in parameters), 0.1),
        lambda parameters: _CLIP_NORM(parameters, 0.1),
        lambda parameters: torch.nn.utils.clip_grad_value_(parameters, 0.1),
        halve,
        replace,
    ]
    for change in changes * 2:
        optimizer.zero_grad()
        objective(model(x[rows]), y[rows]).backward()
        plain.zero_grad()
        F.mse_loss(one(x), y).backward()
        assert difference(gradients(model), gradients(one)) < 1e-12
        for trained in (model, one):
            change(list(trained.parameters()))
        optimizer.step()
        plain.step()
        assert difference(flat(model.parameters()), flat(one.parameters())) < 1e-12
    same_on_all_ranks(flat(model.parameters()))


def case_sharpness_aware_steps():
    """Two backward passes a step, with the gradient of the first one used in between (Foret et al. 2021)."""
    objective = hvd.Objective("mse")
    x, y, rows, model, optimizer, one = rows_and_model(objective)
    plain = torch.optim.SGD(one.parameters(), lr=0.1)

    @torch.no_grad()
    def climb(parameters):
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        moves = [0.05 * p.grad / norm for p in parameters]
        for p, move in zip(parameters, moves, strict=True):
            p.add_(move)
        return moves

    @torch.no_grad()
    def descend(parameters, moves):
        for p, move in zip(parameters, moves, strict=True):
            p.sub_(move)

    for _ in range(3):
        for some, loss in (
            (optimizer, lambda: objective(model(x[rows]), y[rows])),
            (plain, lambda: F.mse_loss(one(x), y)),
        ):
            parameters = list((model if some is optimizer else one).parameters())
            some.zero_grad()
            loss().backward()
            moves = climb(parameters)
            some.zero_grad()
            loss().backward()
            descend(parameters, moves)
            some.step()
    assert difference(flat(model.parameters()), flat(one.parameters())) < 1e-12


def _accumulated(model, objective, x, y, passes):
    """Make a step's backward passes: rank 0 all of them, the others one, or in every third step none."""
    n = hvd.rank()
    for i in range(passes):
        objective(model(x[n + i : n + i + 2]), y[n + i : n + i + 2]).backward()


def case_clipping_with_fewer_micro_batches_or_none():
    """Ranks that have had all theirs, and those that wait in clip_grad_norm_, clip the same gradient."""
    objective = hvd.Objective("mse")
    x, y, _, model, optimizer, one = rows_and_model(objective, passes=3)
    plain = torch.optim.SGD(one.parameters(), lr=0.1)
    counts = [(3, 1), (3, 0), (2, 2), (1, 3)]
    for first, others in counts:
        optimizer.zero_grad()
        _accumulated(model, objective, x, y, first if hvd.rank() == 0 else others)
        clipped = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        plain.zero_grad()
        parts = [(k, first if k == 0 else others) for k in range(hvd.size())]
        rows = [j for k, n in parts for i in range(n) for j in range(k + i, k + i + 2)]
        F.mse_loss(one(x[rows]), y[rows]).backward()
        assert abs(clipped - torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1)) < 1e-12
        plain.step()
        assert difference(flat(model.parameters()), flat(one.parameters())) < 1e-12


def case_gradients_changed_where_not_all_ranks_have_them_are_refused():
    """A rank with fewer micro-batches has no gradient before ``step()``, and cannot do the same to it."""
    objective = hvd.Objective("mse")
    x, y, _, model, optimizer, _ = rows_and_model(objective, passes=2)
    fewer = hvd.rank() == hvd.size() - 1

    def step(change):
        optimizer.zero_grad()
        _accumulated(model, objective, x, y, 1 if fewer else 2)
        for p in model.parameters():
            if p.grad is not None and change:
                p.grad.mul_(0.5)
        optimizer.step()

    step(change=False)  # looked at, and not changed
    if fewer:
        step(change=True)
    else:
        with pytest.raises(UsageError, match=f"gradients were changed on rank {hvd.rank()}"):
            step(change=True)
    raises_everywhere(RankError, lambda: step(change=False), "gradients were changed on rank 0")


def case_a_scaler_unscales_gradients_of_all_ranks():
    objective = hvd.Objective("mse")
    x, y, rows, model, optimizer, one = rows_and_model(objective)
    plain = torch.optim.SGD(one.parameters(), lr=0.1)
    ours, theirs = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    for _ in range(3):
        optimizer.zero_grad()
        ours.scale(objective(model(x[rows]), y[rows])).backward()
        plain.zero_grad()
        theirs.scale(F.mse_loss(one(x), y)).backward()
        for scaler, some, trained in ((ours, optimizer, model), (theirs, plain, one)):
            scaler.unscale_(some)
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 0.1)
            scaler.step(some)
            scaler.update()
    assert difference(flat(model.parameters()), flat(one.parameters())) < 1e-12


def case_the_plain_optimizers_scheduler_goes_on_after_a_checkpoint():
    objective = hvd.Objective("mse")
    model = network(generator(5))
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(plain, 0.5)
    optimizer = hvd.DistributedOptimizer(plain, model.named_parameters(), objective)
    x, y = here(torch.ones(2, 5, dtype=D)), here(torch.ones(2, 1, dtype=D))
    for _ in range(2):
        optimizer.zero_grad()
        objective(model(x), y).backward()
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025]
    assert plain.state is optimizer.state
    p = next(model.parameters())
    assert torch.equal(plain.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])


def case_a_weight_that_carries_a_gradient_is_refused():
    objective = hvd.Objective("mse")
    x, y, rows, model, optimizer, _ = rows_and_model(objective)
    prediction = model(x[rows])
    raises_everywhere(
        ConfigError, lambda: objective(prediction, y[rows], torch.sigmoid(prediction)), "weight=", "detach()"
    )
    with torch.no_grad():
        objective(prediction, y[rows], torch.sigmoid(prediction))
    objective(prediction, y[rows], torch.sigmoid(prediction).detach()).backward()
    optimizer.step()


def case_a_pass_too_many_is_refused_in_the_first_step_too():
    objective = hvd.Objective("mse")
    x, y, rows, model, optimizer, _ = rows_and_model(objective)
    before = flat(model.parameters())

    def step():
        loss = objective(model(x[rows]), y[rows])
        loss.backward(retain_graph=True)
        loss.backward()

    raises_everywhere(UsageError, step, "backward_passes_per_step=1")
    optimizer.synchronize()
    optimizer.zero_grad()
    assert torch.equal(flat(model.parameters()), before)


def case_memory_that_the_user_changes():
    """Targets 0 and 4, so w -> w - (w - 2) / 2, whatever becomes of gradients and parameters in between."""

    def cast(model, optimizer):
        model.double().float()

    def stay_double(model, optimizer):
        model.double()

    def moved(model, optimizer):
        model.weight.data = model.weight.data.clone()
        if model.weight.grad is not None:
            model.weight.grad.data = torch.full_like(model.weight.grad, 7.0)

    def zeroed(model, optimizer):
        optimizer.zero_grad(set_to_none=False)

    def zeroed_and_cast(model, optimizer):
        optimizer.zero_grad(set_to_none=False)
        model.half().float()

    right = [2 - 2 * 0.5**n for n in range(1, 5)]
    for alone in ("4", "0.000001"):  # in a bucket, and by itself
        os.environ["HVDLOSS_UNBUCKETED_MB"] = alone
        for change in (cast, stay_double, moved, zeroed, zeroed_and_cast):
            model = nn.Linear(1, 1, bias=False).to(DEVICE)
            nn.init.zeros_(model.weight)
            objective = hvd.Objective("mse")
            optimizer = hvd.DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.25), model.named_parameters(), objective
            )
            seen = []
            for step in range(4):
                if change is not zeroed_and_cast:
                    optimizer.zero_grad(set_to_none=change is not zeroed)
                x = here(torch.ones(1, 1)).to(model.weight.dtype)
                last = hvd.rank() == hvd.size() - 1
                objective(model(x), x * (2.0 * hvd.size() if last else 0.0)).backward()
                optimizer.step()
                seen.append(model.weight.item())
                if step in (0, 2):
                    change(model, optimizer)
                elif change is zeroed_and_cast:
                    optimizer.zero_grad(set_to_none=False)
            assert seen == right, (change.__name__, seen)


def case_a_copied_optimizer_is_refused_by_name():
    model = network(generator(1))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), hvd.Objective("mse")
    )
    for attempt in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(UsageError, match="state_dict"):
            attempt(optimizer)
    copied = copy.deepcopy(model)
    again = hvd.DistributedOptimizer(
        torch.optim.SGD(copied.parameters(), lr=0.1), copied.named_parameters(), hvd.Objective("mse")
    )
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def case_hooks_on_parameters_act_as_in_one_process():
    """On the whole gradient, once a step, set before or after wrapping, in every step."""
    g = generator(11)
    error = 0.0
    for passes, before in ((1, True), (1, False), (2, True), (2, False)):
        model, one = network(generator(5)), network(generator(5))
        seen, alone = [], []

        def triple(p):
            p.grad.mul_(3.0)

        def hook(found, m):
            first, second = list(m.parameters())[:2]
            handle = first.register_hook(lambda grad: grad.clamp(-0.05, 0.05))
            second.register_hook(lambda grad: found.append(grad.norm().item()))
            second.register_post_accumulate_grad_hook(triple)
            return handle

        objective = hvd.Objective("mse")
        ours = hook(seen, model) if before else None
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            model.named_parameters(),
            objective,
            backward_passes_per_step=passes,
        )
        ours = hook(seen, model) if ours is None else ours
        theirs = hook(alone, one)
        single = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
        for number in range(4):
            if number == 3:
                ours.remove()
                theirs.remove()
            step = regression(g, uneven(micro=passes))
            optimizer.zero_grad()
            for b in step[hvd.rank()]:
                objective(model(b.x), b.y, b.weight).backward()
            optimizer.step()
            single.zero_grad()
            whole = union(step)
            (whole.weight * (one(whole.x) - whole.y) ** 2).sum().div(whole.weight.sum()).backward()
            single.step()
            error = max(error, difference(flat(model.parameters()), flat(one.parameters())))
        assert len(seen) == len(alone) == 4
        assert max(abs(a - b) for a, b in zip(seen, alone, strict=True)) < 1e-12
    assert error < 1e-12, error
    return {"error, float64": error}


def case_hooks_of_one_rank_may_look_but_not_change():
    x, a, _, _, v = two_tasks()
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([v], lr=0.1), [("v", v)], objective)
    rows, seen = split(4), []

    def step():
        optimizer.zero_grad()
        objective(x[rows] @ v, a[rows]).backward()
        optimizer.step()

    if hvd.rank() == 0:
        v.register_hook(lambda grad: seen.append(grad.clone()))
    step()
    torch.testing.assert_close(v.detach(), 0.1 * 2 * x.T @ a / 4)
    assert len(seen) == (hvd.rank() == 0)
    before = v.detach().clone()
    handle = v.register_hook(lambda grad: grad * 2) if hvd.rank() == 0 else None
    raises_everywhere(AgreementError, step, "hooks on parameters", "rank(s) 0")
    assert torch.equal(before, v.detach())
    if handle is not None:
        handle.remove()
    step()
    assert not torch.equal(before, v.detach())
    same_on_all_ranks(v.tolist())


def case_a_gan_whose_modules_are_cleared():
    """The generator's loss comes through the discriminator, whose gradients the module clears."""
    g = generator(13)
    pairs = []
    for _ in range(2):
        seeded = generator(13)
        pairs.append((network(seeded, outputs=5), network(seeded)))
    (make, tell), (make_one, tell_one) = pairs
    losses = hvd.Objective("mse"), hvd.Objective("mse")
    ours = [
        hvd.DistributedOptimizer(torch.optim.SGD(m.parameters(), lr=0.1), m.named_parameters(), objective)
        for m, objective in zip((make, tell), losses, strict=True)
    ]
    alone = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (make_one, tell_one)]
    for _ in range(3):
        x = here(torch.randn(9, 5, generator=g, dtype=D))
        y = here(torch.randn(9, 1, generator=g, dtype=D))
        for maker, teller, optimizers, objectives, rows in (
            (make, tell, ours, losses, split(9)),
            (make_one, tell_one, alone, (F.mse_loss, F.mse_loss), slice(None)),
        ):
            teller.zero_grad()
            objectives[1](teller(maker(x[rows]).detach()), y[rows]).backward()
            optimizers[1].step()
            maker.zero_grad()
            objectives[0](teller(maker(x[rows])), y[rows]).backward()
            optimizers[0].step()
    mine, theirs = ([*a.parameters(), *b.parameters()] for a, b in pairs)
    assert difference(flat(mine), flat(theirs)) < 1e-12


def case_a_new_optimizer_takes_the_old_ones_place():
    x, a, _, _, v = two_tasks()
    objective, rows = hvd.Objective("mse"), split(4)
    old = hvd.DistributedOptimizer(torch.optim.SGD([v], lr=1.0), [("v", v)], objective)
    objective(x[rows] @ v, a[rows]).backward()
    old.synchronize()
    new = hvd.DistributedOptimizer(torch.optim.SGD([v], lr=0.1), [("v", v)], objective)
    for _ in range(2):
        new.zero_grad()
        objective(x[rows] @ v, a[rows]).backward()
        new.synchronize()
        torch.testing.assert_close(v.grad, -2 * x.T @ a / 4)
    raises_everywhere(UsageError, old.step, "newer one")


def case_gradients_that_the_optimizer_does_not_see():
    x, a, _, _, v = two_tasks()
    objective, rows = hvd.Objective("mse"), split(4)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([v], lr=1.0), [("v", v)], objective)

    def step():
        (v.grad,) = torch.autograd.grad(objective(x[rows] @ v, a[rows]), [v])
        optimizer.step()

    raises_everywhere(UsageError, step, "torch.autograd.grad")

    def left_over():
        for _ in range(2):  # an epoch's last micro-batch, and the next epoch's first
            objective(x[rows] @ v, a[rows]).backward()

    for _ in range(2):
        optimizer.zero_grad()
        objective(x[rows] @ v, a[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    raises_everywhere(UsageError, left_over, "left over", "zero_grad()")
    optimizer.synchronize()


def case_loops_that_go_around_the_objective_are_warned_of_once():
    x, a, _, _, v = two_tasks()
    own, horovods = nn.Parameter(torch.zeros_like(v)), nn.Parameter(torch.zeros_like(v))
    rows, nobodys, objective = split(4), hvd.Objective("huber"), hvd.Objective("mse")
    plain = hvd.DistributedOptimizer(torch.optim.SGD([horovods], lr=0.0), [("horovods", horovods)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            nobodys(x[rows] @ horovods, a[rows]).backward()
            plain.step()
    assert [str(one.message) for one in told if "'huber' belongs to no optimizer" in str(one.message)]
    assert len(told) == (hvd.size() > 1)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([v], lr=0.0), [("v", v)], objective)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            objective(x[rows] @ (v + own), a[rows]).backward()
            optimizer.step()
    assert len(told) == (hvd.size() > 1)
    assert all("shape (2,)" in str(one.message) and "Wrap their" in str(one.message) for one in told)
