"""The exact global gradient, whatever way samples fall on ranks and micro-batches."""

from __future__ import annotations

import itertools
import random

import torch
import torch.nn.functional as F
from torch_support import (
    DEVICE,
    Batch,
    Trial,
    before_case,
    difference,
    flat,
    generator,
    gradients,
    mse,
    network,
    reduced,
    regression,
    same_on_all_ranks,
    uneven,
)

import hvdloss.torch as hvd
from tests.ranks import needs

NEEDS = needs("gloo-2 gloo-3 mpi-2 dist-2")

__all__ = ["before_case"]


@needs("gloo-2 gloo-3 mpi-2", more="gloo-4 dist-2")
def case_uneven_batches():
    g = generator(1)
    trial = Trial(network(g))
    for _ in range(4):
        trial.step(regression(g, uneven(), weighted=False))
    return trial.finish()


def case_uneven_batches_float32():
    g = generator(2)
    trial = Trial(network(g, torch.float32))
    for _ in range(4):
        trial.step(regression(g, uneven(), dtype=torch.float32))
    return trial.finish()


def case_adam():
    g = generator(3)
    trial = Trial(network(g), lambda ps: torch.optim.AdamW(ps, lr=0.01))
    for _ in range(4):
        trial.step(regression(g, uneven()))
    return trial.finish()


def case_a_rank_with_an_empty_batch():
    g = generator(4)
    trial = Trial(network(g))
    for empty in (0, hvd.size() - 1, 0):
        counts = uneven()
        counts[empty] = [0]
        trial.step(regression(g, counts))
    return trial.finish()


@needs("gloo-2 gloo-3 mpi-2", more="gloo-4 dist-2")
def case_a_rank_without_a_call():
    g = generator(5)
    trial = Trial(network(g))
    for absent in (0, hvd.size() - 1, 0):  # from the first step on, before anything is planned
        counts = uneven()
        counts[absent] = []
        trial.step(regression(g, counts))
    return trial.finish()


@needs("gloo-2 gloo-3 mpi-2", more="gloo-4 dist-2")
def case_only_one_rank_has_samples():
    g = generator(6)
    trial = Trial(network(g))
    for rank in range(hvd.size()):
        trial.step(regression(g, [[6] if r == rank else [] for r in range(hvd.size())]))
    return trial.finish()


def case_zero_and_fractional_weights():
    g = generator(7)
    trial = Trial(network(g))
    for _ in range(3):
        step = regression(g, uneven(5))
        for row in step:
            for b in row:
                b.weight[torch.rand(b.weight.shape, generator=g) < 0.4] = 0
                b.weight[0] = 1e-3
        trial.step(step)
    return trial.finish()


def case_all_weights_of_a_rank_are_zero():
    g = generator(8)
    trial = Trial(network(g))
    for rank in (0, hvd.size() - 1, 0):
        step = regression(g, uneven())
        step[rank][0].weight.zero_()
        trial.step(step)
    return trial.finish()


def case_weights_of_every_form():
    """A number, None, one weight that broadcasts, integers, booleans."""
    g = generator(9)
    trial = Trial(network(g))
    forms = [2.5, None, torch.tensor([[0.5]]), 3, torch.ones(1, dtype=torch.int64), torch.tensor(True)]
    for shift in range(3):
        step = regression(g, uneven())
        for rank, row in enumerate(step):
            row[0].weight = forms[(rank + 2 * shift) % len(forms)]
        trial.step(step)
    return trial.finish()


def _tokens(g, rows, time=6, classes=4):
    """Return inputs (N, T, 5), class targets (N, T) and weights of masked tails."""
    x = torch.randn(rows, time, 5, generator=g, dtype=torch.float64)
    y = torch.randint(0, classes, (rows, time), generator=g)
    lengths = torch.randint(1, time + 1, (rows, 1), generator=g)
    mask = (torch.arange(time)[None] < lengths).double()
    return Batch(x, y, mask * (0.25 + torch.rand(rows, time, generator=g, dtype=torch.float64)))


def _token_losses(prediction, target):
    return F.cross_entropy(prediction.transpose(1, 2), target, reduction="none")


def _token_trial(g, reduction, passes=1):
    return Trial(
        network(g, outputs=4), loss=_token_losses, losses=_token_losses, reduction=reduction, passes=passes
    )


def case_per_token_losses_with_masks():
    g = generator(10)
    trial = _token_trial(g, "mean")
    for _ in range(3):
        trial.step([[_tokens(g, 2 + 3 * rank)] for rank in range(hvd.size())])
    return trial.finish()


def case_sequence_mean():
    g = generator(11)
    trial = _token_trial(g, "sequence_mean", passes=2)
    for k in range(3):
        step = [[_tokens(g, 1 + 3 * rank), _tokens(g, 2)][: 1 + (rank + k) % 2] for rank in range(hvd.size())]
        step[-1][0].weight[0] = 0  # a sequence without any token
        trial.step(step)
    return trial.finish()


def case_batch_mean():
    g = generator(12)
    trial = Trial(network(g), reduction="batch_mean", passes=2)
    for _ in range(3):
        step = regression(g, uneven(micro=2))
        step[0][1].weight[0] = 0
        trial.step(step)
    return trial.finish()


def case_sum():
    """Plain Horovod would average what should be a sum; it takes op=Sum there, and the user's care."""
    g = generator(13)
    trial = Trial(network(g), lambda ps: torch.optim.SGD(ps, lr=1e-3), reduction="sum", passes=2)
    for k in range(3):
        counts = uneven(micro=2)
        counts[k % hvd.size()] = counts[k % hvd.size()][:1]
        trial.step(regression(g, counts))
    return trial.finish()


def case_the_loss_shown_is_a_mean():
    g = generator(14)
    for reduction in ("mean", "batch_mean"):
        model = network(g)
        objective = hvd.Objective("mse", reduction=reduction)
        (b,) = regression(g, uneven())[hvd.rank()]
        shown = objective(model(b.x), b.y, weight=b.weight)
        torch.testing.assert_close(shown, reduced(mse(model(b.x), b.y), b.weight, reduction))


def case_nan_in_absent_elements():
    """Named losses and callables: neither the value nor the gradient of others is harmed."""
    g = generator(15)

    def root(prediction, target):  # NaN, with a NaN gradient, below zero
        return (prediction - target).sqrt()

    results = {}
    for loss, losses in (("mse", mse), (root, root)):
        trial = Trial(network(g), loss=loss, losses=losses)
        for _ in range(3):
            step = regression(g, uneven(4))
            for row in step:
                for b in row:
                    if loss == "mse":
                        b.y[1] = float("nan")
                        b.y[2] = float("inf")
                        b.weight[1:3] = 0
                    else:
                        b.y.fill_(-9.0)
                        b.y[1] = 99.0  # the root of something negative
                        b.weight[1] = 0
            trial.step(step)
        for key, value in trial.finish().items():
            results[key] = max(value, results.get(key, 0.0))
    return results


def case_ignored_targets():
    """Targets of -100 are absent, as in torch, and counted so across ranks."""
    g = generator(16)

    def losses(prediction, target):
        return F.cross_entropy(prediction, target.clamp(min=0), reduction="none")

    trial = Trial(network(g, outputs=4), loss="cross_entropy", losses=losses)
    for k in range(3):
        mine, whole = [], []
        for rank in range(hvd.size()):
            n = 4 + 3 * rank
            x = torch.randn(n, 5, generator=g, dtype=torch.float64)
            y = torch.randint(0, 4, (n,), generator=g)
            y[: 1 + rank] = -100
            weight = torch.rand(n, generator=g, dtype=torch.float64) if k else None
            mine.append([Batch(x, y, weight)])
            present = (y != -100).double()
            whole.append([Batch(x, y, present if weight is None else present * weight)])
        trial.optimizer.zero_grad()
        trial.backward(mine)
        trial.optimizer.step()
        trial.compare(whole)
    return trial.finish()


def case_class_weights():
    g = generator(17)
    balance = torch.tensor([5.0, 1.0, 0.2, 2.0], dtype=torch.float64, device=DEVICE)

    def losses(prediction, target):
        return F.cross_entropy(prediction, target, reduction="none")

    trial = Trial(network(g, outputs=4), loss="cross_entropy", losses=losses, passes=2)
    for _ in range(3):
        step = []
        for rank in range(hvd.size()):
            row = []
            for n in (3 + 2 * rank, 2)[: 1 + rank % 2]:
                # Ranks hold different classes: what plain averaging gets most wrong.
                y = torch.randint(rank % 3, 4, (n,), generator=g)
                row.append(Batch(torch.randn(n, 5, generator=g, dtype=torch.float64), y, balance[y]))
            step.append(row)
        trial.step(step)
    # torch's own weighted mean, which divides by the sum of the weights, is the same number.
    whole = torch.cat([b.x for row in step for b in row])
    y = torch.cat([b.y for row in step for b in row])
    trial.one.load_state_dict(trial.model.state_dict())
    own = F.cross_entropy(trial.one(whole), y, weight=balance)
    again = reduced(losses(trial.one(whole), y), balance[y], "mean")
    torch.testing.assert_close(own, again)
    return trial.finish()


@needs("gloo-2 gloo-3 mpi-2", more="gloo-4 dist-2")
def case_accumulation_with_different_numbers_and_a_ragged_last():
    g = generator(18)
    passes = hvd.size() + 1
    trial = Trial(network(g), passes=passes)
    for k in range(4):
        counts = []
        for rank in range(hvd.size()):
            micro = 1 + (rank + k) % passes
            counts.append([4] * (micro - 1) + [1 + rank])  # the last micro-batch is smaller
        trial.step(regression(g, counts))
    return trial.finish()


def case_more_passes_declared_than_made():
    g = generator(19)
    trial = Trial(network(g), passes=5)
    for _ in range(3):
        trial.step(regression(g, uneven(micro=2)))
    return trial.finish()


def _decay(model):
    return 0.3 * sum((p**2).sum() for p in model.parameters())


def case_a_penalty_counts_once():
    """Added to every micro-batch's loss; also where a rank has no samples or no weight."""
    g = generator(20)
    results = {}
    for reduction in ("mean", "batch_mean"):
        trial = Trial(network(g), reduction=reduction, passes=3, penalty=_decay)
        for k in range(3):
            counts = [[2 + rank] * (1 + (rank + k) % 3) for rank in range(hvd.size())]
            counts[k % hvd.size()] = [0]
            step = regression(g, counts)
            step[-1][0].weight.mul_(4)
            trial.step(step)
        for key, value in trial.finish().items():
            results[key] = max(value, results.get(key, 0.0))
    return results


def case_a_penalty_counts_once_beside_a_sum():
    """With reduction "sum" every rank makes as many passes as declared, as the documentation asks."""
    g = generator(21)
    trial = Trial(
        network(g), lambda ps: torch.optim.SGD(ps, lr=1e-3), reduction="sum", passes=2, penalty=_decay
    )
    for _ in range(3):
        trial.step(regression(g, uneven(micro=2)))
    return trial.finish()


def case_a_penalty_counts_once_beside_sequence_means():
    g = generator(22)
    trial = Trial(
        network(g, outputs=4),
        loss=_token_losses,
        losses=_token_losses,
        reduction="sequence_mean",
        penalty=_decay,
    )
    for _ in range(3):
        trial.step([[_tokens(g, 1 + 2 * rank)] for rank in range(hvd.size())])
    return trial.finish()


def case_weights_of_very_different_size_between_steps():
    """Scaled gradients are measured in the last step's weight; a jump must cost no accuracy."""
    g = generator(23)
    trial = Trial(network(g))
    for size in (1.0, 1e-9, 1e9, 1.0, 1e-12):
        step = regression(g, uneven())
        for row in step:
            row[0].weight *= size
        trial.step(step)
    return trial.finish()


@needs("gloo-2 gloo-3 mpi-2", more="gloo-4 dist-2")
def case_the_report_is_global():
    g = generator(24)
    trial = Trial(network(g), passes=2)
    counts = uneven(micro=2)
    counts[0] = []
    step = regression(g, counts)
    step[1][0].weight[0] = 0
    before = [[reduced(mse(trial.model(b.x), b.y), b.weight, "mean").item() for b in row] for row in step]
    assert trial.optimizer.last_step is None
    trial.step(step)
    report = trial.optimizer.last_step
    assert report.step == 1
    assert [r.micro_batches for r in report.ranks] == [len(row) for row in counts]
    assert [r.rank for r in report.ranks] == list(range(hvd.size()))
    for rank, row in enumerate(step):
        one = report.ranks[rank]
        if not row:
            assert one.loss != one.loss
            assert one.weight == 0
            continue
        weights = [b.weight.sum().item() for b in row]
        mean = sum(w * loss for w, loss in zip(weights, before[rank], strict=True)) / sum(weights)
        assert abs(one.loss - mean) < 1e-12
        assert abs(one.weight - sum(weights)) < 1e-12
    assert abs(report.objective_value - report.loss) < 1e-12
    same_on_all_ranks(report.as_dict())
    return trial.finish()


def _random_step(chooser, g, model_kind, passes, reduction):
    """Return a step with random counts, weights and empty ranks; some element has weight."""
    size = hvd.size()
    while True:
        step = []
        for _ in range(size):
            row = []
            for _ in range(chooser.choice([0, 1, 1, passes, chooser.randint(0, passes)])):
                n = chooser.choice([0, 1, 1, 2, 3, 5, 9])
                if model_kind == "tokens":
                    b = _tokens(g, n)
                else:
                    x = torch.randn(n, 5, generator=g, dtype=torch.float64) + chooser.uniform(-1, 1)
                    y = torch.randn(n, 1, generator=g, dtype=torch.float64) * chooser.uniform(0.5, 3)
                    b = Batch(x, y, torch.rand(n, 1, generator=g, dtype=torch.float64))
                how = chooser.choice(["as is", "some zero", "all zero", "none", "tiny", "huge"])
                if how == "some zero":
                    b.weight[torch.rand(b.weight.shape, generator=g) < 0.5] = 0
                elif how == "all zero":
                    b.weight.zero_()
                elif how == "none":
                    b.weight = None
                elif how == "tiny":
                    b.weight *= 1e-4
                elif how == "huge":
                    b.weight *= 1e3
                row.append(b)
            step.append(row)
        weight = sum(
            (b.y.numel() if b.weight is None else b.weight.sum().item()) for row in step for b in row
        )
        if weight > 0:
            return step


@needs("gloo-2 gloo-3 mpi-2", more="gloo-4 dist-2")
def case_random_splits():
    """Hundreds of steps, split in every way at once; plain averaging's error beside."""
    chooser = random.Random(7 + hvd.size())
    g = generator(25)
    worst = {"error, float64": 0.0}
    plain: list[float] = []
    steps = 0
    many = hvd.size() == 2 and not hvd.mpi_enabled()  # elsewhere ranks share a core, or spin on it
    for trial_number in range(24):
        reduction = ("mean", "batch_mean", "mean", "sequence_mean", "sum", "mean")[trial_number % 6]
        passes = chooser.choice([1, 1, 2, 3])
        kind = "tokens" if reduction == "sequence_mean" or chooser.random() < 0.3 else "samples"
        options = {"passes": passes, "reduction": reduction}
        if reduction != "sum" and chooser.random() < 0.4:
            options["penalty"] = _decay
        rate = 1e-6 if reduction == "sum" else 0.02

        def make(ps, rate=rate):
            return torch.optim.SGD(ps, lr=rate)

        if kind == "tokens":
            trial = Trial(network(g, outputs=4), make, loss=_token_losses, losses=_token_losses, **options)
        else:
            trial = Trial(network(g), make, **options)
        for _ in range(10 if many else 4):
            trial.step(_random_step(chooser, g, kind, passes, reduction))
            steps += 1
        worst["error, float64"] = max(worst["error, float64"], trial.error)
        plain += trial.plain_errors
        same_on_all_ranks(flat(trial.model.parameters()).tolist())
    plain.sort()
    wrong = sum(error > 1e-3 for error in plain)
    assert steps >= (200 if many else 90)
    assert wrong >= 0.8 * len(plain), f"plain averaging is wrong in only {wrong} of {len(plain)} splits"
    return {
        **worst,
        "random splits": steps,
        "plain averaging's error, median": plain[len(plain) // 2],
        "plain averaging's error": plain[-1],
    }


@needs("gloo-2 gloo-3 mpi-2", more="gloo-4 dist-2")
def case_every_split_of_the_same_samples_gives_the_same_gradient():
    """Invariance said directly: not against a formula, but split against split."""
    g = generator(26)
    model = network(g)
    samples = regression(g, [[24]])[0][0]
    found = []
    for trial_number in range(6):
        cuts = sorted(random.Random(trial_number).choices(range(25), k=2 * hvd.size() - 1))
        edges = [0, *cuts, 24]
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        mine = parts[2 * hvd.rank() : 2 * hvd.rank() + 2]
        objective = hvd.Objective("mse")
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0),
            model.named_parameters(),
            objective,
            backward_passes_per_step=2,
        )
        optimizer.zero_grad()
        for part in mine:
            objective(model(samples.x[part]), samples.y[part], weight=samples.weight[part]).backward()
        optimizer.step()
        found.append(gradients(model))
    errors = [difference(one, found[0]) for one in found]
    assert max(errors) <= 1e-12, errors
    return {"error, float64": max(errors)}
