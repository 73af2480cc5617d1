"""Several losses in one backward pass, each with its denominator over all ranks, against one process."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_support import (
    before_case,
    difference,
    flat,
    generator,
    gradients,
    here,
    raises_everywhere,
    same_on_all_ranks,
)

import hvdloss.torch as hvd
from hvdloss.errors import (
    AgreementError,
    ConfigError,
    NonFiniteLossError,
    NoWeightError,
    UsageError,
    WeightError,
)
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")

__all__ = ["before_case"]

D = torch.float64
FACTORS = {"class": 1.0, "box": 0.7, "tokens": 2.5, "count": 0.01}


class Heads(nn.Module):
    """A trunk and a head for each task."""

    def __init__(self, g, dtype=D):
        super().__init__()
        self.trunk = nn.Linear(5, 6)
        self.heads = nn.ModuleDict(
            {
                "class": nn.Linear(6, 4),
                "box": nn.Linear(6, 3),
                "tokens": nn.Linear(6, 2),
                "count": nn.Linear(6, 1),
            }
        )
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=D).to(dtype) / 2
        self.to(here(0.0).device)

    def forward(self, x, task):
        return self.heads[task](torch.tanh(self.trunk(x)))


def squares(prediction, target):
    return ((prediction - target) ** 2).sum(-1)


def token_losses(prediction, target):
    return F.cross_entropy(prediction.transpose(1, 2), target, reduction="none")


def objectives(**options):
    return {
        "class": hvd.Objective("cross_entropy", **options),
        "box": hvd.Objective(squares, **options),
        "tokens": hvd.Objective(token_losses, reduction="sequence_mean", **options),
        "count": hvd.Objective("mse", reduction="sum", **options),
    }


def elements(g, chooser, task, n, dtype=D):
    """Return inputs, targets and weights (or None) of n elements of a task."""
    shape = (n, 3) if task == "tokens" else (n,)
    x = torch.randn(*shape, 5, generator=g, dtype=D) + chooser.uniform(-1, 1)
    w = torch.rand(shape, generator=g, dtype=D) * (torch.rand(shape, generator=g) < 0.7)
    y = {
        "class": torch.randint(0, 4, (n,), generator=g),
        "box": torch.randn(n, 3, generator=g, dtype=D).to(dtype),
        "tokens": torch.randint(0, 2, (n, 3), generator=g),
        "count": torch.randn(n, 1, generator=g, dtype=D).to(dtype),
    }[task]
    if task == "class":
        y[torch.rand(n, generator=g) < 0.3] = -100
    w = w.to(dtype)[:, None] if task == "count" else w.to(dtype)
    return here(x.to(dtype)), here(y), None if chooser.random() < 0.2 else here(w)


def union_loss(model, task, parts):
    """Return a task's loss in one process, by its definition (None without any), its weight and elements."""
    total, weight, count, over = 0.0, 0.0, 0, 0.0
    for x, y, w in parts:
        if not len(x):
            continue
        p = model(x, task)
        w = torch.ones(y.shape[:1] if task in ("class", "box") else y.shape) if w is None else w
        w = w.to(p)
        if task == "class":
            w = w * (y != -100)
            losses = -p.log_softmax(-1).gather(1, y.clamp(min=0)[:, None])[:, 0]
        elif task == "box":
            losses = ((p - y) ** 2).sum(-1)
        elif task == "tokens":
            losses = -p.log_softmax(-1).gather(2, y[..., None])[..., 0]
        else:
            losses = (p - y) ** 2
        weight, count = weight + w.sum().item(), count + int((w != 0).sum())
        if task == "tokens":
            there = w.sum(1) > 0
            total = total + ((w * losses).sum(1)[there] / w.sum(1)[there]).sum()
            over += there.sum().item()
        else:
            total = total + (w * losses).sum()
            over += w.sum().item()
    if not weight:
        return None, 0.0, 0
    return (total if task == "count" else total / over), weight, count


def draw(g, chooser, passes, dtype=D, absent=0.3):
    """Return a step: by rank and micro-batch, the elements of the tasks that are there."""
    everywhere = chooser.choice([*FACTORS, None, None])  # a task that nobody has in this step
    while True:
        step = [
            [
                {
                    task: elements(g, chooser, task, chooser.choice([0, 1, 2, 5]), dtype)
                    for task in FACTORS
                    if task != everywhere and chooser.random() > absent
                }
                for _ in range(chooser.randint(0, passes))
            ]
            for _ in range(hvd.size())
        ]
        step = [[micro for micro in row if micro] for row in step]
        mine = [w for row in step for m in row for _, y, w in m.values() for w in [y if w is None else w]]
        if any(len(w) and bool(w.any()) for w in mine):
            return step


def weighed(task, parts):
    """Return what a rank says ahead of a task."""
    out = 0.0
    for _, y, w in parts:
        w = torch.ones_like(y[..., 0] if task == "box" else y, dtype=D) if w is None else w.to(D)
        w = w * (y != -100) if task == "class" else w
        out += float((w.sum(1) > 0).sum() if task == "tokens" else w.sum())
    return out


class Trial:
    """Trains under hvdloss beside one process."""

    def __init__(self, seed, passes=1, dtype=D, penalty=0.0, combine=None, rate=0.05, **options):
        self.model, self.one = Heads(generator(seed), dtype), Heads(generator(seed), dtype)
        self.objectives = objectives(**options)
        self.passes, self.penalty = passes, penalty
        self.combine = combine or (lambda losses: sum(FACTORS[task] * loss for task, loss in losses.items()))
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=rate),
            self.model.named_parameters(),
            self.objectives,
            backward_passes_per_step=passes,
        )
        self.one_optimizer = torch.optim.SGD(self.one.parameters(), lr=rate)
        self.tolerance = {D: 1e-12, torch.float32: 1e-5}[dtype]
        self.error = self.plain = 0.0

    def losses(self, micro):
        return {task: self.objectives[task](self.model(x, task), y, w) for task, (x, y, w) in micro.items()}

    def decay(self, model):
        return self.penalty * sum((p**2).sum() for p in model.parameters())

    def step(self, step, scaler=None):
        mine = step[hvd.rank()]
        self.optimizer.zero_grad()
        if self.passes > 1:
            said = {task: weighed(task, [m[task] for m in mine if task in m]) for task in FACTORS}
            self.optimizer.expect(said, passes=len(mine))
        for micro in mine:
            loss = self.combine(self.losses(micro)) + self.decay(self.model)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.compare(step)

    def compare(self, step):
        self.one_optimizer.zero_grad()
        found = {
            task: union_loss(self.one, task, [m[task] for row in step for m in row if task in m])
            for task in FACTORS
        }
        there = {task: loss for task, (loss, _, _) in found.items() if loss is not None}
        total = sum(FACTORS[task] * loss for task, loss in there.items())
        (total + self.decay(self.one)).backward()
        self.near(difference(gradients(self.model), gradients(self.one)), "gradient")
        self.one_optimizer.step()
        self.near(difference(flat(self.model.parameters()), flat(self.one.parameters())), "parameters")
        report = self.optimizer.last_step
        self.near(abs(report.loss / total.item() - 1), "loss")
        assert list(report.losses) == list(FACTORS)
        for task, (loss, weight, count) in found.items():
            told = report.losses[task]
            assert told.elements == count, (task, told, count)
            assert abs(told.weight - weight) <= 1e-5 * weight, (task, told, weight)
            if loss is None:
                assert math.isnan(told.value), told
                assert told.part == 0
                continue
            self.near(abs(told.value - loss.item()) / abs(loss.item()), task)
            assert abs(told.factor - FACTORS[task]) < 1e-6, (task, told)
        same_on_all_ranks(report)

    def near(self, error, what):
        assert error <= self.tolerance, f"{what}: relative difference {error:.3g} > {self.tolerance:.3g}"
        self.error = max(self.error, error)


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_random_steps_of_four_losses():
    """Tasks absent on ranks, or on all; no elements, no weight; ranks without a batch."""
    chooser, g = random.Random(1), generator(1)
    trial = Trial(1)
    for _ in range(25):
        trial.step(draw(g, chooser, 1))
    return {"error, float64": trial.error}


@needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
def case_micro_batches_whose_weights_are_said_ahead():
    chooser, g = random.Random(2), generator(2)
    trial = Trial(2, passes=3, penalty=0.1)
    for _ in range(12):
        trial.step(draw(g, chooser, 3))
    # One pass of those that may be; said ahead it costs no waiting.
    exact = trial.optimizer._hvdloss
    assert exact.message_counts()["messages"] <= 2 + len(exact.reducer.buckets) + 1
    return {"error, float64": trial.error}


def case_a_penalty_beside_several_losses_counts_once():
    chooser, g = random.Random(3), generator(3)
    trial = Trial(3, penalty=0.3)
    for _ in range(6):
        trial.step(draw(g, chooser, 1))
    return {"error, float64": trial.error}


def case_several_losses_in_float32():
    chooser, g = random.Random(4), generator(4)
    trial = Trial(4, dtype=torch.float32)
    for _ in range(6):
        trial.step(draw(g, chooser, 1, torch.float32))
    return {"error, float32": trial.error}


def case_nested_sums():
    """Whatever is linear: sums in sums, a stack, a product with a matrix."""
    chooser, g = random.Random(5), generator(5)

    def nested(losses):
        names = list(losses)
        found = torch.stack([losses[name] for name in names])
        mixed = here(torch.tensor([[FACTORS[name] * 3 for name in names]], dtype=D)) @ found
        return (mixed.sum() - found.sum() / 2 + found.sum() / 2) / 3

    trial = Trial(5, combine=nested)
    for _ in range(5):
        trial.step(draw(g, chooser, 1))
    return {"error, float64": trial.error}


def case_a_scaler_over_several_losses():
    chooser, g = random.Random(6), generator(6)
    trial = Trial(6, passes=2)
    scaler = torch.amp.GradScaler(here(0.0).device.type, init_scale=2.0**10)
    for _ in range(5):
        step = draw(g, chooser, 2)
        while not all(step):  # a scaler has to have scaled something on every rank
            step = draw(g, chooser, 2)
        trial.step(step, scaler)
    assert scaler.get_scale() == 2.0**10
    return {"error, float64": trial.error}


def case_weights_said_ahead_of_one_pass():
    """Their sums then travel during the forward pass; and before ``zero_grad``."""
    chooser, g = random.Random(7), generator(7)
    trial = Trial(7)
    for _ in range(4):
        step = draw(g, chooser, 1)
        mine = step[hvd.rank()]
        said = {task: weighed(task, [m[task] for m in mine if task in m]) for task in FACTORS}
        trial.optimizer.expect(said, passes=len(mine))
        trial.step(step)
    return {"error, float64": trial.error}


def two_tasks():
    """Return the inputs, two targets and a mask of four samples, and a parameter."""
    x = here(torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1]], dtype=D))
    a, b, has = (here(torch.tensor(t, dtype=D)) for t in ([1.0, 2, 3, 4], [5.0, 1, 0, 2], [1.0, 1, 1, 0]))
    return x, a, b, has, nn.Parameter(here(torch.zeros(2, dtype=D)))


def rows():
    """Return this rank's part of four samples; with three ranks the last has none."""
    return [slice(0, 1), slice(1, 4), slice(4, 4), slice(4, 4)][hvd.rank()] if hvd.size() > 1 else slice(0, 4)


def pair(v, passes=1, rate=0.0, **options):
    """Return two objectives and an optimizer that has both."""
    task_a, task_b = hvd.Objective("mse", **options), hvd.Objective("mse", **options)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([v], lr=rate), [("v", v)], [task_a, task_b], backward_passes_per_step=passes
    )
    return task_a, task_b, optimizer


def case_two_objectives_given_to_the_optimizer():
    x, a, b, has, v = two_tasks()
    mine = rows()
    right = 2 * x.T @ (-a) / 4 + 2 * (x * has[:, None]).T @ (-b) / has.sum()
    task_a, task_b, optimizer = pair(v)
    assert list(optimizer.objective) == ["mse", "mse.1"]
    kept = task_b(x[mine] @ v, b[mine])  # thrown away, though its graph lives
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(2):  # a validation that forgot torch.no_grad()
            task_a(x[mine] @ v, b[mine])
        p = x[mine] @ v
        (task_a(p, a[mine]) + task_b(p, b[mine], has[mine])).backward()
        optimizer.step()
        torch.testing.assert_close(v.grad, right, rtol=1e-13, atol=0)
    assert kept.requires_grad
    # The same objective alone again, with an optimizer that has no other.
    alone = hvd.DistributedOptimizer(torch.optim.SGD([v], lr=0.0), [("v", v)], task_a)
    alone.zero_grad()
    task_a(x[mine] @ v, a[mine]).backward()
    alone.step()
    torch.testing.assert_close(v.grad, 2 * x.T @ (-a) / 4, rtol=1e-13, atol=0)
    assert not alone.last_step.losses
    w = nn.Parameter(torch.zeros_like(v))
    ahead = [hvd.Objective("mse"), hvd.Objective("mse", ahead=True)]
    with pytest.raises(ConfigError, match="ahead=True"):
        hvd.DistributedOptimizer(torch.optim.SGD([w], lr=0.0), [("w", w)], ahead)
    with pytest.raises(
        ConfigError, match="belongs to one optimizer"
    ):  # its calls would count for one of them
        hvd.DistributedOptimizer(torch.optim.SGD([w], lr=0.0), [("w", w)], [task_a, task_b])


def case_what_has_no_exact_step_is_refused_on_every_rank():
    x, a, b, has, v = two_tasks()
    mine, rank = rows(), hvd.rank()
    task_a, task_b, optimizer = pair(v)
    p = lambda: x[mine] @ v  # noqa: E731

    def good():
        optimizer.zero_grad()
        (task_a(p(), a[mine]) + task_b(p(), b[mine], has[mine])).backward()
        optimizer.step()
        assert optimizer.last_step.losses["mse"].elements == 4

    def twice():
        optimizer.zero_grad()
        (task_a(p(), a[mine]) + (task_a if rank == 1 else task_b)(p(), b[mine])).backward()
        optimizer.step()

    def different_factors():
        optimizer.zero_grad()
        (task_a(p(), a[mine]) + (1 + rank) * task_b(p(), b[mine])).backward()
        optimizer.step()

    def a_ratio_of_losses():
        optimizer.zero_grad()
        (task_a(p(), a[mine]) * task_b(p(), b[mine])).backward()
        optimizer.step()

    def left_out():
        optimizer.zero_grad()
        first, second = task_a(p(), a[mine]), task_b(p(), b[mine])
        if rank == 0:
            torch.autograd.grad(first, v, retain_graph=True)
        (first + second).backward()
        optimizer.step()

    good()
    raises_everywhere(Exception, twice, "'mse'", "more than once", "rank 1")
    good()
    raises_everywhere(UsageError, different_factors, "'mse.1'", "different numbers")
    good()
    raises_everywhere(UsageError, a_ratio_of_losses, "different numbers", "global_losses")
    raises_everywhere(Exception, left_out, "'mse.1'", "rank 0")
    good()
    nobody = here(torch.zeros(4, dtype=D))

    def no_weight():
        optimizer.zero_grad()
        (task_a(p(), a[mine], nobody[mine]) + task_b(p(), b[mine], nobody[mine])).backward()
        optimizer.step()

    raises_everywhere(NoWeightError, no_weight, "mse, mse.1")
    good()


def case_what_was_said_ahead_and_is_not_so_is_refused_on_every_rank():
    x, a, b, _, v = two_tasks()
    mine, last = rows(), hvd.rank() == hvd.size() - 1
    count = mine.stop - mine.start
    task_a, task_b, optimizer = pair(v, passes=2)

    def step(said=0.0, passes=1, made=1, divided=1, expect=True):
        optimizer.zero_grad()
        if expect:
            optimizer.expect({"mse": made * count + said, "mse.1": made * count}, passes=passes)
        for _ in range(made):
            p = x[mine] @ v
            ((task_a(p, a[mine]) + task_b(p, b[mine])) / divided).backward()
        optimizer.step()

    step()
    raises_everywhere(Exception, lambda: step(expect=False), "expect", "backward_passes_per_step=2")
    raises_everywhere(Exception, lambda: step(said=float(last)), "'mse'", "weighed", f"rank {hvd.size() - 1}")
    raises_everywhere(Exception, lambda: step(passes=1 + last), "passes=2", f"rank {hvd.size() - 1}")
    raises_everywhere(Exception, lambda: step(passes=2, made=2, divided=2), "1/2")
    raises_everywhere(ConfigError, lambda: optimizer.expect({"nms": 1.0}), "'nms'", "'mse'")
    raises_everywhere(ConfigError, lambda: optimizer.expect({"mse": -1.0}), "-1.0")
    raises_everywhere(ConfigError, lambda: optimizer.expect({}, passes=3), "passes=3")
    step(passes=2, made=2)
    torch.testing.assert_close(v.grad, 2 * x.T @ (-a - b) / 4, rtol=1e-13, atol=0)
    optimizer.expect({})
    raises_everywhere(UsageError, lambda: optimizer.expect({}), "once a step")
    optimizer.zero_grad()

    one = hvd.DistributedOptimizer(torch.optim.SGD([v], lr=0.0), [("v", v)], hvd.Objective("mse"))
    raises_everywhere(UsageError, lambda: one.expect({}), "several objectives")


def case_ranks_with_other_objectives_are_refused():
    x, a, b, _, v = two_tasks()
    mine = rows()
    tasks = [hvd.Objective("mse"), hvd.Objective("mse" if hvd.rank() else "mae")]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([v], lr=0.0), [("v", v)], tasks)

    def step():
        p = x[mine] @ v
        sum(task(p, y[mine]) for task, y in zip(tasks, (a, b), strict=True)).backward()
        optimizer.step()

    raises_everywhere(AgreementError, step, "objective", "mae")


def case_trained_weights_of_losses():
    """Homoscedastic uncertainty: exp(-s) L + s; exact with the values of all ranks, and refused without."""
    x, a, b, has, v = two_tasks()
    s = nn.Parameter(here(torch.tensor([0.3, -0.2], dtype=D)))
    u, t = v.detach().clone().requires_grad_(), s.detach().clone().requires_grad_()
    mine = rows()
    task_a, task_b = hvd.Objective("mse"), hvd.Objective("mse")

    def optimizer_of():
        named = [("v", v), ("s", s)]
        return hvd.DistributedOptimizer(torch.optim.SGD([v, s], lr=0.1), named, {"a": task_a, "b": task_b})

    optimizer = optimizer_of()

    def weighed_by(losses, s):
        return sum(torch.exp(-one) * loss + one for one, loss in zip(s, losses, strict=True))

    def step(known):
        optimizer.zero_grad()
        p = x[mine] @ v
        losses = task_a(p, a[mine]), task_b(p, b[mine], has[mine])
        weighed_by(hvd.global_losses(*losses) if known else losses, s).backward()
        optimizer.step()

    if hvd.size() > 1:
        raises_everywhere(UsageError, lambda: step(False), "gradient of s", "global_losses")
        optimizer = optimizer_of()
    error = 0.0
    for _ in range(5):
        step(True)
        q = x @ u
        losses = ((q - a) ** 2).mean(), ((q - b) ** 2 * has).sum() / has.sum()
        grads = torch.autograd.grad(weighed_by(losses, t), [u, t])
        error = max(error, difference(v.grad, grads[0]), difference(s.grad, grads[1]))
        with torch.no_grad():
            u -= 0.1 * grads[0]
            t -= 0.1 * grads[1]
    assert error < 1e-12, error
    # Any function of them, as a product.
    optimizer.zero_grad()
    p = x[mine] @ v
    one, other = hvd.global_losses(task_a(p, a[mine]), task_b(p, b[mine], has[mine]))
    (one * other.sqrt()).backward()
    optimizer.synchronize()
    q = x @ u
    (right,) = torch.autograd.grad(((q - a) ** 2).mean() * (((q - b) ** 2 * has).sum() / has.sum()).sqrt(), u)
    error = max(error, difference(v.grad, right))
    assert error < 1e-12, error
    with pytest.raises(ConfigError, match="as they returned it"):
        hvd.global_losses(one)
    return {"error, float64": error}


def case_a_loss_that_is_nan_among_several():
    x, a, b, has, v = two_tasks()
    mine, first = rows(), hvd.rank() == 0
    wrong = float("nan") if first else 1.0

    def steps(policy):
        v.data.zero_()
        task_a, task_b, optimizer = pair(v, rate=0.1, nonfinite=policy)

        def step(fault=1.0, weight=1.0):
            optimizer.zero_grad()
            p = x[mine] @ v
            (task_a(p, a[mine]) + task_b(fault * p, b[mine], weight * has[mine])).backward()
            optimizer.step()

        return step, optimizer

    step, _ = steps("raise")
    step()
    before = v.detach().clone()
    raises_everywhere(NonFiniteLossError, lambda: step(wrong), "rank 0")
    raises_everywhere(WeightError, lambda: step(weight=-1.0 if first else 1.0), "below zero", "rank 0")
    assert torch.equal(v, before)
    step()
    assert not torch.equal(v, before)

    step, optimizer = steps("skip")
    step()
    assert torch.equal(v, before)
    step(wrong)
    assert torch.equal(v, before)
    report = optimizer.last_step
    assert report.skipped == 1
    assert math.isnan(report.loss)
    assert math.isnan(report.losses["mse.1"].value)
    assert report.losses["mse"].value > 0
    step()
    assert not torch.equal(v, before)


class Segments:
    """A segmentation, and its one process: Dice, and a mean of pixels of which some are ignored."""

    def __init__(self, passes):
        g = generator(11)
        self.x = here(torch.randn(7, 3, 4, 4, generator=g, dtype=D))
        self.y = here((torch.rand(7, 4, 4, generator=g) < 0.3).long())
        self.there = here(torch.rand(7, 4, 4, generator=g) < 0.8)
        self.model = nn.Conv2d(3, 2, 3, padding=1).to(here(0.0).device, D)
        for p in self.model.parameters():
            p.data = here(torch.randn(p.shape, generator=g, dtype=D) / 3)
        self.dice, self.pixels = hvd.Objective("soft_dice"), hvd.Objective("cross_entropy")
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.0),
            self.model.named_parameters(),
            {"dice": self.dice, "pixels": self.pixels},
            backward_passes_per_step=passes,
        )
        cuts = [0, 5, 7, 7, 7]
        self.mine = range(*cuts[hvd.rank() : hvd.rank() + 2]) if hvd.size() > 1 else range(7)

    def arguments(self, rows):
        """Return what Dice takes, and what the mean takes."""
        out = self.model(self.x[rows])
        dice = out[:, 1] - out[:, 0], self.y[rows].to(D), self.there[rows].to(D)
        return dice, (out, self.y[rows].masked_fill(~self.there[rows], -100))

    def compare(self):
        """Compare the last step with one process; return the error."""
        found = gradients(self.model)
        self.model.zero_grad()
        out = self.model(self.x)
        p, t = torch.sigmoid(out[:, 1] - out[:, 0])[self.there], self.y[self.there].to(D)
        dice = 1 - 2 * (p * t).sum() / (p.sum() + t.sum())
        pixels = F.cross_entropy(out.permute(0, 2, 3, 1)[self.there], self.y[self.there])
        (0.5 * dice + pixels).backward()
        report = self.optimizer.last_step
        errors = [
            difference(found, gradients(self.model)),
            abs(report.losses["dice"].value - dice.item()),
            abs(report.losses["pixels"].value - pixels.item()),
            abs(report.loss - (dice / 2 + pixels).item()),
        ]
        assert max(errors) < 1e-12, errors
        return max(errors)


def case_dice_and_cross_entropy():
    one = Segments(1)
    for _ in range(2):
        one.optimizer.zero_grad()
        dice, pixels = one.arguments(list(one.mine))
        (0.5 * one.dice(*dice) + one.pixels(*pixels)).backward()
        one.optimizer.step()
    return {"error, float64": one.compare()}


def case_dice_and_cross_entropy_over_micro_batches():
    one = Segments(2)
    rows = [list(one.mine[:2]), list(one.mine[2:])]
    for _ in range(2):
        with torch.no_grad():
            total = one.dice.total(sum(one.dice.sums(*one.arguments(part)[0]) for part in rows))
        one.optimizer.zero_grad()
        one.optimizer.expect({"pixels": float(one.there[list(one.mine)].sum())}, passes=2)
        for part in rows:
            dice, pixels = one.arguments(part)
            (0.5 * one.dice(*dice, total=total) + one.pixels(*pixels)).backward()
        one.optimizer.step()
    error = one.compare()

    def once():
        one.optimizer.zero_grad()
        one.optimizer.expect({"pixels": float(one.there[list(one.mine)].sum())}, passes=1)
        dice, pixels = one.arguments(list(one.mine))
        (one.dice(*dice, total=total) + one.pixels(*pixels)).backward()
        one.optimizer.step()

    raises_everywhere(UsageError, once, "'dice'", "every pass")
    return {"error, float64": error}


def case_several_losses_through_a_synchronized_batch_norm():
    """Whose gradients of ranks meet within the backward pass: in which every pass weighs the same."""
    g = generator(12)
    x, a, b = (here(torch.randn(9, n, generator=g, dtype=D)) for n in (5, 1, 1))
    has = here((torch.rand(9, 1, generator=g) < 0.4).to(D))
    has[0] = 1
    cuts = [0, 6, 9, 9, 9]
    mine = slice(*cuts[hvd.rank() : hvd.rank() + 2]) if hvd.size() > 1 else slice(0, 9)
    start = [torch.randn(shape, generator=g, dtype=D) for shape in ((4, 5), (4,), (2, 4), (2,))]

    def network(norm):
        model = nn.Sequential(nn.Linear(5, 4), norm, nn.Tanh(), nn.Linear(4, 2)).to(here(0.0).device, D)
        for p, value in zip([*model[0].parameters(), *model[3].parameters()], start, strict=True):
            p.data = here(value)
        return model

    model, one = network(hvd.SyncBatchNorm(4)), network(nn.BatchNorm1d(4))
    task_a, task_b = hvd.Objective("mse"), hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model.named_parameters(), [task_a, task_b]
    )
    out = model(x[mine])
    (task_a(out[:, :1], a[mine]) + 0.5 * task_b(out[:, 1:], b[mine], has[mine])).backward()
    optimizer.step()
    out = one(x)
    (((out[:, :1] - a) ** 2).mean() + 0.5 * ((out[:, 1:] - b) ** 2 * has).sum() / has.sum()).backward()
    error = difference(gradients(model), gradients(one))
    assert error < 1e-12, error
    return {"error, float64": error}


def case_a_closure_over_several_losses():
    x, a, b, has, v = two_tasks()
    u = v.detach().clone().requires_grad_()
    mine = rows()
    task_a, task_b = hvd.Objective("mse"), hvd.Objective("mse")
    exact = hvd.DistributedOptimizer(
        torch.optim.LBFGS([v], line_search_fn="strong_wolfe"), [("v", v)], [task_a, task_b]
    )
    one = torch.optim.LBFGS([u], line_search_fn="strong_wolfe")

    def closure():
        exact.zero_grad()
        p = x[mine] @ v
        loss = task_a(p, a[mine]) + 0.5 * task_b(p, b[mine], has[mine]) + 0.1 * (v**2).sum()
        loss.backward()
        return loss

    def alone():
        one.zero_grad()
        q = x @ u
        loss = ((q - a) ** 2).mean() + 0.5 * ((q - b) ** 2 * has).sum() / has.sum() + 0.1 * (u**2).sum()
        loss.backward()
        return loss

    value, right = exact.step(closure), one.step(alone)
    assert abs(value.item() - right.item()) < 1e-12
    error = difference(v.detach(), u.detach())
    assert error < 1e-9, error  # many evaluations, whose rounding adds up
    return {"error, tolerated more": error}


def case_factors_that_change_from_step_to_step():
    """A loss that is switched off for a while has the factor 0, whether it is called or not."""
    x, a, b, has, v = two_tasks()
    mine = rows()
    task_a, task_b, optimizer = pair(v)
    for c, called in itertools.product((0.0, 0.5), (True, False)):
        optimizer.zero_grad()
        p = x[mine] @ v
        loss, other = task_a(p, a[mine]), task_b(p, b[mine], has[mine]) if called else 0.0
        (loss + c * other).backward()
        optimizer.step()
        part = 2 * (x * has[:, None]).T @ (-b) / has.sum() if called else 0.0
        torch.testing.assert_close(v.grad, 2 * x.T @ (-a) / 4 + c * part, rtol=1e-13, atol=1e-13)
        assert optimizer.last_step.losses["mse.1"].factor == (c if called else 0.0)
