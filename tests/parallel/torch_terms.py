"""Terms in PyTorch: what is measured on all ranks, what it does to weights, how often ranks exchange."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch_support import (
    DEVICE,
    before_case,
    difference,
    flat,
    generator,
    gradients,
    here,
    network,
    raises_everywhere,
    same_on_all_ranks,
)

import hvdloss
import hvdloss.torch as hvd
from hvdloss.terms.distributions import divergences
from hvdloss.terms.link import LinkModel
from hvdloss.terms.policies import (
    AdaptiveCompression,
    BatchShares,
    ClassBalance,
    ImportanceWeights,
    OuterStep,
    Proximal,
    RankWeights,
    SharedBatches,
    SyncPeriod,
)
from hvdloss.terms.policies.log import record, replay, use_logged_times
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 dist-2")

__all__ = ["before_case"]

CLASSES = 4


def labels_of(rank: int, step: int) -> torch.Tensor:
    """Return a rank's labels, skewed; rank 1 is empty in step 2, the last class is seen by nobody."""
    g = generator(1000 * step + rank)
    n = 0 if (rank, step) == (1, 2) else 6 + 3 * rank
    return torch.randint(0, CLASSES - 1, (n,), generator=g) if rank else torch.zeros(n, dtype=torch.long)


def batch_of(rank: int, step: int, weighted: bool = True) -> tuple[torch.Tensor, ...]:
    """Return a rank's inputs, labels and weights, known to every rank."""
    y = labels_of(rank, step)
    g = generator(77 * step + rank)
    x = torch.randn(len(y), 5, generator=g, dtype=torch.float64) + rank
    w = torch.rand(len(y), generator=g, dtype=torch.float64) + 0.5
    return here(x), here(y), here(w if weighted else torch.ones_like(w))


def histogram(step: int, rank: int) -> np.ndarray:
    _, y, w = batch_of(rank, step)
    return np.bincount(y.cpu().numpy(), weights=w.cpu().numpy(), minlength=CLASSES)


def train(objective, model, steps, optimizer=None, **options):
    """Take some steps on :func:`batch_of`; give the optimizer after each."""
    plain = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    opt = hvd.DistributedOptimizer(plain, model.named_parameters(), objective, **options)
    for step in range(1, steps + 1):
        x, y, w = batch_of(hvd.rank(), step)
        opt.zero_grad()
        objective(model(x), y, w).backward()
        opt.step()
        yield opt


def case_skew_is_that_of_all_labels():
    term = hvdloss.DataSkew(price=0.5, classes=CLASSES, window=2)
    cost = hvdloss.CommunicationCost(price=2.0)
    objective = hvd.Objective("cross_entropy", terms=(term, cost))
    before = np.zeros((hvd.size(), CLASSES))
    worst = 0.0
    for step, opt in enumerate(train(objective, network(generator(1), outputs=CLASSES), 4), start=1):
        now = np.stack([histogram(step, rank) for rank in range(hvd.size())])
        expected, overall = divergences(before + now)
        before = now
        report = opt.last_step
        worst = max(worst, float(np.abs(np.array(report.terms["skew"].values) - expected).max()))
        assert abs(term.overall - overall) < 1e-12
        assert [one.skew for one in report.ranks] == report.terms["skew"].values
        priced = 0.5 * expected.sum() + 2.0 * sum(one.communication for one in report.ranks)
        assert abs(report.objective_value - report.loss - priced) < 1e-12
        same_on_all_ranks((report.terms, term.state.tolist()))
    assert worst < 1e-12, worst
    assert hvd.size() == 1 or term.skew.max() > 0.05
    assert (term.counts[:, -1] == 0).all()
    return {"error": worst}


def case_real_targets_are_binned_alike():
    term = hvdloss.DataSkew(bins=8, measure="w1", warmup=2)
    objective = hvd.Objective("mse", terms=(term,))
    model = network(generator(3))
    opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), objective=objective)
    for step in range(6):
        g = generator(10 * step + hvd.rank())
        # Ranks are one apart; every other step rank 0 has nothing, every step comes in two parts.
        opt.zero_grad()
        n = 0 if hvd.rank() == 0 and step % 2 else 40
        x = torch.randn(n, 5, generator=g, dtype=torch.float64)
        y = torch.randn(n, 1, generator=g, dtype=torch.float64) + hvd.rank()
        objective(model(here(x)), here(y)).backward()
        opt.step()
        if step < 1:
            assert term.edges is None
            assert not term.skew.any()
    same_on_all_ranks((term.edges.tolist(), term.skew.tolist()))
    assert (np.diff(term.edges) > 0).all()
    if hvd.size() == 2:
        # Normals one apart; a third of the data is rank 0's, so it is two thirds from the mixture.
        assert np.abs(term.skew - [2 / 3, 1 / 3]).max() < 0.1, term.skew
    assert term.counts.sum() == 40 * (4 * hvd.size() - 2)
    return {"w1": float(term.skew[0])}


def case_keys_soft_and_several_labels():
    by_key = hvdloss.DataSkew(classes=3, of="keys", measure="tv")
    by_key.name = "hospital"
    soft = hvdloss.DataSkew(classes=CLASSES)
    objective = hvd.Objective("cross_entropy", terms=(by_key, soft))
    model = network(generator(4), outputs=CLASSES)
    opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), objective=objective)
    x = here(torch.randn(5, 5, generator=generator(5), dtype=torch.float64))
    y = here(torch.randn(5, CLASSES, generator=generator(6 + hvd.rank()), dtype=torch.float64)).softmax(1)
    keys = torch.full((5,), hvd.rank() % 3)
    objective(model(x), y, keys=keys).backward()
    opt.step()
    expected = np.zeros((hvd.size(), 3))
    expected[range(hvd.size()), [r % 3 for r in range(hvd.size())]] = 5
    assert (by_key.counts == expected).all()
    mine = y.sum(0).cpu().numpy()
    assert np.abs(soft.counts[hvd.rank()] - mine).max() < 1e-12
    tags = hvdloss.DataSkew(classes=3, multilabel=True)
    objective = hvd.Objective("binary_cross_entropy_with_logits", terms=(tags,))
    model = network(generator(7), outputs=3)
    opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), objective=objective)
    y = here(torch.rand(5, 3, generator=generator(8 + hvd.rank())) < 0.5).double()
    w = here(torch.rand(5, 1, generator=generator(9), dtype=torch.float64))
    objective(model(x), y, w).backward()
    opt.step()
    assert np.abs(tags.counts[hvd.rank()] - (y * w).sum(0).cpu().numpy()).max() < 1e-12
    raises_everywhere(
        hvdloss.UsageError,
        lambda: hvd.Objective("mse", terms=(hvdloss.DataSkew(classes=2, of="keys"),))(x, x),
        "keys=",
    )


class Tempered(hvdloss.Term):
    """A user's own: weighs the elements by a power of their weight, and pulls predictions to zero."""

    name, unit, width, has_weights, has_penalty = "tempered", "mean target", 2, True, True

    def observe(self, batch):
        return [batch.ops.sum64(batch.weight * batch.target), batch.ops.sum64(batch.weight)]

    def weights(self, batch):
        return batch.weight

    def penalty(self, batch):
        # What is equal on all ranks counts once; here on one batch it differs, and is averaged like it.
        return 0.1 * self.model[0].weight.square().sum()

    def on_step_end(self, step):
        return step.sums[:, 0] / np.maximum(step.sums[:, 1], 1e-300)


def case_a_term_of_the_users_own():
    g = generator(11)
    model = network(g)
    reference = copy.deepcopy(model)
    term = Tempered()
    term.model = model
    term.price = 3.0
    objective = hvd.Objective("mse", terms=(term,))
    opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)
    data = []
    for rank in range(hvd.size()):
        x = torch.randn(3 + rank, 5, generator=g, dtype=torch.float64)
        y, w = (torch.rand(3 + rank, 1, generator=g, dtype=torch.float64) for _ in range(2))
        data.append((here(x), here(y), here(w)))
    x, y, w = data[hvd.rank()]
    objective(model(x), y, w).backward()
    opt.synchronize()
    xs, ys, ws = (torch.cat(part) for part in zip(*data, strict=True))
    loss = (ws**2 * (reference(xs) - ys) ** 2).sum() / (ws**2).sum()
    (loss + 0.1 * reference[0].weight.square().sum()).backward()
    error = difference(gradients(model), gradients(reference))
    assert error < 1e-12, error
    means = [float((w * y).sum() / w.sum()) for _, y, w in data]
    report = opt.last_step
    assert np.abs(np.array(report.terms["tempered"].values) - means).max() < 1e-12
    assert abs(report.loss - loss.item()) < 1e-12
    assert abs(report.objective_value - report.loss - 3 * sum(means)) < 1e-11
    return {"error": error}


def case_a_term_that_tells_nonsense_is_refused_everywhere():
    class Wrong(hvdloss.Term):
        name, width = "wrong", 1

        def observe(self, batch):
            return [batch.ops.count(batch.weight > 0)]

        def on_step_end(self, step):
            return [float("nan")] * step.size

    objective = hvd.Objective("cross_entropy", terms=(Wrong(),))
    model = network(generator(12), outputs=CLASSES)
    before = flat(model.parameters())
    steps = train(objective, model, 1)
    raises_everywhere(
        hvdloss.ConfigError, lambda: next(steps), "Wrong.on_step_end()", "one finite value per rank"
    )
    assert torch.equal(flat(model.parameters()), before)


def weighted_reference(model, step, factor):
    """Return the gradient of one process whose samples weigh ``factor(rank, labels)`` times their weight."""
    parts = []
    for rank in range(hvd.size()):
        x, y, w = batch_of(rank, step)
        parts.append((x, y, w * factor(rank, y)))
    xs, ys, ws = (torch.cat(part) for part in zip(*parts, strict=True))
    model.zero_grad()
    losses = F.cross_entropy(model(xs), ys, reduction="none")
    ((ws * losses).sum() / ws.sum()).backward()
    return gradients(model)


def case_importance_and_balance_weights():
    policies = (ImportanceWeights("uniform", clip=3.0), ClassBalance("effective", beta=0.9))
    term = hvdloss.DataSkew(classes=CLASSES, policies=policies)
    objective = hvd.Objective("cross_entropy", terms=(term,))
    model = network(generator(13), outputs=CLASSES)
    worst, tables, reference = 0.0, None, copy.deepcopy(model)
    for step, opt in enumerate(train(objective, model, 5), start=1):
        if tables is not None:
            expected = weighted_reference(
                reference, step, lambda rank, y, tables=tables: here(tables[rank])[y]
            )
            worst = max(worst, difference(gradients(model), expected))
        counts = term.counts
        tables = [policies[0].table(counts, r) * policies[1].table(counts, r) for r in range(hvd.size())]
        reference.load_state_dict(model.state_dict())
        ess = opt.last_step.terms["skew"].details["effective_sample_size"]
        assert len(ess) == hvd.size()
        assert all(0 < one <= 1 + 1e-12 for one in ess)
    assert worst < 1e-12, worst
    assert any(np.ptp(table) > 0.1 for table in tables)
    return {"error": worst}


def case_robust_rank_weights():
    numbers = {}
    for kind in ("dro", "agnostic", "q_fair"):
        policy = RankWeights(kind, step=0.5, q=2.0)
        term = hvdloss.DataSkew(classes=CLASSES, policies=(policy,))
        objective = hvd.Objective("cross_entropy", terms=(term,))
        model = network(generator(14), outputs=CLASSES)
        worst, factors, reference = 0.0, None, copy.deepcopy(model)
        for step, _ in enumerate(train(objective, model, 4), start=1):
            if factors is not None:
                expected = weighted_reference(
                    reference, step, lambda rank, y, factors=factors: float(factors[rank])
                )
                worst = max(worst, difference(gradients(model), expected))
            factors = policy.factors
            same_on_all_ranks(factors.tolist())
            reference.load_state_dict(model.state_dict())
        assert worst < 1e-12, (kind, worst)
        assert hvd.size() == 1 or np.ptp(factors) > 1e-3, (kind, factors)
        numbers[kind] = worst
    return numbers


def case_terms_without_a_price_or_act_change_nothing():
    # Horovod fuses what comes together, and three ranks' sums round by their place in the message: one
    # bucket makes training the same from run to run.
    os.environ["HVDLOSS_UNBUCKETED_MB"] = "inf"
    for period in ((), (SyncPeriod(1),)):
        found = []
        for terms in ((), (hvdloss.CommunicationCost(policies=period), hvdloss.DataSkew(classes=CLASSES))):
            objective = hvd.Objective("cross_entropy", terms=terms)
            model = network(generator(15), torch.float64, CLASSES).float()
            opt = hvd.DistributedOptimizer(
                torch.optim.Adam(model.parameters(), lr=0.01), objective=objective, backward_passes_per_step=2
            )
            for step in range(1, 6):
                opt.zero_grad()
                for part in range(2):
                    x, y, w = batch_of(hvd.rank(), 10 * step + part)
                    objective(model(x.float()), y, w.float()).backward()
                opt.step()
            found.append((flat(model.parameters()), opt.last_step.loss))
            blocking = opt.last_step.choices["comm_plan"]["messages"]
            found[-1] += (blocking,)
        assert torch.equal(found[0][0], found[1][0])
        assert found[0][1] == found[1][1]
        assert found[1][2] == found[0][2] + 1  # under way with the others, as the histograms


def case_a_label_that_is_no_class():
    term = hvdloss.DataSkew(
        classes=CLASSES, label=lambda y: y + (CLASSES if hvd.rank() == hvd.size() - 1 else 0)
    )
    objective = hvd.Objective("cross_entropy", terms=(term,))
    model = network(generator(16), outputs=CLASSES)
    before = flat(model.parameters())
    opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)

    def step():
        x, y, w = batch_of(hvd.rank(), 1)
        opt.zero_grad()
        objective(model(x), y, w).backward()
        opt.step()

    raises_everywhere(hvdloss.ConfigError, step, f"outside 0..{CLASSES - 1} on rank(s) {hvd.size() - 1}")
    assert torch.equal(flat(model.parameters()), before)
    term.label = None
    step()
    assert not torch.equal(flat(model.parameters()), before)


def case_the_slow_rank_waits_for_nobody():
    if hvd.size() == 1:
        return
    cost = hvdloss.CommunicationCost(price=1.0)
    objective = hvd.Objective("cross_entropy", terms=(cost,))
    model = network(generator(17), outputs=CLASSES)
    opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)
    slow, found = hvd.size() - 1, []

    def told_apart(pause: float) -> bool:
        """Take steps with a pause on the slow rank; return whether the times of all ranks show it."""
        computing, waiting = [], []
        for step in range(1, 9):
            x, y, w = batch_of(hvd.rank(), step)
            opt.zero_grad()
            if hvd.rank() == slow:
                time.sleep(pause)
            objective(model(x), y, w).backward()
            opt.step()
            if step > 2:
                computing.append([one.computation for one in opt.last_step.ranks])
                waiting.append(opt.last_step.terms["communication"].details["waiting"])
        computing, waiting = np.median(computing, 0), np.median(waiting, 0)
        found.append((pause, computing, waiting))
        assert computing[slow] > pause
        return (
            (np.delete(computing, slow) < 0.9 * pause).all()
            and waiting[slow] < 0.2 * pause
            and (np.delete(waiting, slow) > 0.5 * pause).all()
        )

    # A machine with other work adds to any time; some pause is longer than what it adds.
    assert any(told_apart(0.05 * 2**i) for i in range(7)), found
    assert cost.details()["bytes"] > 0


# -- local steps --------------------------------------------------------------------------------------


def local_reference(model, steps, period, *, outer=None, mu=None, momentum=0.0, empty=None):
    """Return the parameters after local steps of all ranks, done one after another in this process.

    Step 1 is done together. `empty` names a (rank, step) without weight.
    """
    anchor = flat(model.parameters())
    shapes = [p.shape for p in model.parameters()]
    velocity = torch.zeros_like(anchor)
    momenta = [torch.zeros_like(anchor) for _ in range(hvd.size())]

    def load(vector):
        pieces = vector.split([s.numel() for s in shapes])
        with torch.no_grad():
            for p, piece in zip(model.parameters(), pieces, strict=True):
                p.copy_(piece.view(p.shape))

    def local(vector, rank, step):
        x, y, w = batch_of(rank, step)
        if (rank, step) == empty:
            w = torch.zeros_like(w)
        load(vector)
        model.zero_grad()
        if not w.sum() > 0:
            return None, 0.0
        ((w * F.cross_entropy(model(x), y, reduction="none")).sum() / w.sum()).backward()
        return gradients(model), w.sum().item()

    def update(rank, vector, gradient):
        momenta[rank] = momentum * momenta[rank] + gradient
        return vector - 0.1 * momenta[rank]

    parts = [local(anchor, rank, 1) for rank in range(hvd.size())]
    total = sum(w for _, w in parts)
    gradient = sum(g * w for g, w in parts if g is not None) / total
    for rank in range(hvd.size()):
        after = update(rank, anchor, gradient)
    anchor = after
    thetas, weights, done = [anchor] * hvd.size(), np.zeros(hvd.size()), 0
    for step in range(2, steps + 1):
        for rank in range(hvd.size()):
            gradient, w = local(thetas[rank], rank, step)
            if gradient is not None:
                if mu is not None:
                    gradient = gradient + mu[rank] * (thetas[rank] - anchor)
                thetas[rank] = update(rank, thetas[rank], gradient)
            weights[rank] += w
        done += 1
        if done == period:
            mean = sum(w * (t - anchor) for w, t in zip(weights, thetas, strict=True)) / weights.sum()
            if outer is not None:
                velocity = outer.momentum * velocity + mean
                mean = outer.lr * (mean + outer.momentum * velocity)
            anchor = anchor + mean
            thetas, weights, done = [anchor] * hvd.size(), np.zeros(hvd.size()), 0
    return anchor if not done else thetas[hvd.rank()]


def local_run(policy, steps, *, empty=None, momentum=0.0, seed=18, more=(), **options):
    cost = hvdloss.CommunicationCost(policies=(policy,))
    objective = hvd.Objective("cross_entropy", terms=(cost, *more))
    model = network(generator(seed), outputs=CLASSES)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    opt = hvd.DistributedOptimizer(sgd, model.named_parameters(), objective, **options)
    for step in range(1, steps + 1):
        x, y, w = batch_of(hvd.rank(), step)
        if (hvd.rank(), step) == empty:
            w = w * 0
        opt.zero_grad()
        objective(model(x), y, w).backward()
        opt.step()
    return model, opt, cost


def case_local_steps_are_averaged_by_weight():
    numbers = {}
    for name, options in {
        "plain": {},
        "momentum": {"momentum": 0.9},
        "empty": {"empty": (0, 3)},
    }.items():
        model, opt, _ = local_run(SyncPeriod(3), 7, **options)
        expected = local_reference(network(generator(18), outputs=CLASSES), 7, 3, **options)
        numbers[name] = difference(flat(model.parameters()), expected)
        same_on_all_ranks(flat(model.parameters()).tolist())
        report = opt.last_step
        assert report.step == 7
        weights = [
            sum(
                batch_of(rank, step)[2].sum().item()
                for step in (5, 6, 7)
                if (rank, step) != options.get("empty")
            )
            for rank in range(hvd.size())
        ]
        assert np.allclose([one.weight for one in report.ranks], weights, rtol=1e-12)
    assert max(numbers.values()) < 1e-12, numbers
    return numbers


def case_an_outer_nesterov_step():
    outer = OuterStep(lr=0.7, momentum=0.8)
    model, _, cost = local_run(SyncPeriod(2, outer=outer), 9)
    expected = local_reference(network(generator(18), outputs=CLASSES), 9, 2, outer=outer)
    error = difference(flat(model.parameters()), expected)
    assert error < 1e-12, error
    assert hvd.size() == 1 or cost.drift > 0
    return {"error": error}


def case_a_proximal_pull_follows_the_skew():
    policy = Proximal(2.0)
    skew = hvdloss.DataSkew(classes=CLASSES, window=1, policies=(policy,))
    # The skew of step 1, which is done together, is what the stretch after it is pulled by.
    counts = np.stack([histogram(1, rank) for rank in range(hvd.size())])
    mu = 2.0 * divergences(counts)[0] / math.log(2)
    model, _, _ = local_run(SyncPeriod(3), 3, more=(skew,))  # in the middle of a stretch
    expected = local_reference(network(generator(18), outputs=CLASSES), 3, 3, mu=mu)
    error = difference(flat(model.parameters()), expected)
    assert error < 1e-12, error
    assert policy.mu == float(mu[hvd.rank()])
    assert hvd.size() == 1 or mu.max() > 0.1
    return {"error": error}


def case_local_steps_with_accumulation_and_sum():
    """Two backward passes per step weigh by what they hold; "sum" weighs ranks alike."""
    for reduction in ("mean", "sum"):
        objective = hvd.Objective(
            "cross_entropy",
            reduction=reduction,
            terms=(hvdloss.CommunicationCost(policies=(SyncPeriod(2),)),),
        )
        model = network(generator(19), outputs=CLASSES)
        lr = 0.1 if reduction == "mean" else 0.001
        opt = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=lr), objective=objective, backward_passes_per_step=2
        )
        thetas, weights = None, np.zeros(hvd.size())
        for step in range(1, 4):
            opt.zero_grad()
            if step == 2:
                anchor = flat(model.parameters())
                thetas = [anchor.clone() for _ in range(hvd.size())]
            if thetas is not None:
                alone = copy.deepcopy(model)
                for rank in range(hvd.size()):
                    with torch.no_grad():
                        torch.nn.utils.vector_to_parameters(thetas[rank], alone.parameters())
                    parts = [batch_of(rank, 2 * step + part) for part in range(2)]
                    xs, ys, ws = (torch.cat(part) for part in zip(*parts, strict=True))
                    alone.zero_grad()
                    loss = (ws * F.cross_entropy(alone(xs), ys, reduction="none")).sum()
                    (loss / ws.sum() if reduction == "mean" else loss * hvd.size()).backward()
                    thetas[rank] = thetas[rank] - lr * gradients(alone)
                    weights[rank] += ws.sum().item() if reduction == "mean" else 1.0
            for part in range(2):
                x, y, w = batch_of(hvd.rank(), 2 * step + part)
                objective(model(x), y, w).backward()
            opt.step()
        expected = sum(w * t for w, t in zip(weights, thetas, strict=True)) / weights.sum()
        error = difference(flat(model.parameters()), expected)
        assert error < 1e-12, (reduction, error)


def case_a_fault_in_a_stretch_returns_to_its_beginning():
    if hvd.size() == 1:
        return
    objective = hvd.Objective("cross_entropy", terms=(hvdloss.CommunicationCost(policies=(SyncPeriod(3),)),))
    model = network(generator(20), outputs=CLASSES)
    opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)

    def step(number, spoil=lambda x, y, w: (x, y, w), after=lambda: None):
        x, y, w = spoil(*batch_of(hvd.rank(), number))
        opt.zero_grad()
        objective(model(x), y, w).backward()
        after()
        opt.step()

    step(1)
    anchor = flat(model.parameters())
    first = hvd.rank() == 0

    def negative(x, y, w):
        return x, y, (-w if first else w)

    def overflow():
        if first:
            next(model.parameters()).grad = None  # it lies in the bucket by now
            with torch.no_grad():
                next(model.parameters()).fill_(math.inf)

    for kind, spoil, words in (
        (hvdloss.WeightError, negative, ("below zero", "rank 0")),
        (hvdloss.NonFiniteLossError, lambda x, y, w: (x * (math.nan if first else 1), y, w), ("rank 0",)),
    ):
        step(2, spoil)
        step(3)
        raises_everywhere(kind, lambda: step(4), *words)
        assert torch.equal(flat(model.parameters()), anchor)
    step(2)
    step(3)
    raises_everywhere(hvdloss.NonFiniteGradientError, lambda: step(4, after=overflow), "rank 0")
    assert torch.equal(flat(model.parameters()), anchor)
    for number in (2, 3, 4):
        step(number)
    assert not torch.equal(flat(model.parameters()), anchor)
    same_on_all_ranks(flat(model.parameters()).tolist())


def case_a_skipped_update_keeps_nobody_waiting():
    """A GradScaler skips the update of a rank whose gradients overflow; the others exchange all the same."""
    objective = hvd.Objective("cross_entropy", terms=(hvdloss.CommunicationCost(policies=(SyncPeriod(2),)),))
    model = network(generator(21), outputs=CLASSES).float()
    opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    for step in range(1, 8):
        x, y, _ = batch_of(hvd.rank(), step)
        opt.zero_grad()
        loss = scaler.scale(objective(model(x.float()), y))
        if hvd.rank() == 0 and step in (3, 4):
            loss = loss * 1e38 * 1e38
        loss.backward()
        with contextlib.suppress(hvdloss.NonFiniteLossError):
            scaler.step(opt)
        scaler.update()
    opt.exchange()
    same_on_all_ranks(flat(model.parameters()).tolist())
    assert torch.isfinite(flat(model.parameters())).all()


def case_exchange_at_any_time_and_post_local():
    model, opt, _ = local_run(SyncPeriod(4, start=3), 6, check_every=1)
    assert opt.last_step.step == 3  # three exact steps, then three of one's own
    if hvd.size() > 1:
        texts = np.array([float(x) for x in flat(model.parameters())])
        total = hvd.allreduce(torch.from_numpy(texts), op=hvd.Sum, name="own parameters") / hvd.size()
        assert (total - torch.from_numpy(texts)).norm() > 1e-6
    opt.exchange()
    same_on_all_ranks(flat(model.parameters()).tolist())
    assert opt.last_step.step == 6
    opt.exchange()  # nothing to do
    assert [d.what for d in opt.objective.controller.decisions] == (["period"] if hvd.size() > 1 else [])


def case_the_optimizers_memory_is_shared_when_local_steps_end():
    """AdaComm ends at a period of 1: from there on equal gradients must make equal updates."""
    for make in (
        lambda ps: torch.optim.AdamW(ps, lr=0.02),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    ):
        period = SyncPeriod("adacomm", initial_period=4, interval=1e-9)
        objective = hvd.Objective("cross_entropy", terms=(hvdloss.CommunicationCost(policies=(period,)),))
        model = network(generator(31), outputs=CLASSES)
        opt = hvd.DistributedOptimizer(make(model.parameters()), model.named_parameters(), objective)
        periods = set()
        for step in range(1, 40):
            x, y, w = batch_of(hvd.rank(), step)
            if hvd.rank() == 0 and step == 3:
                w = w * 0  # makes no update, so that numbers of steps differ
            opt.zero_grad()
            objective(model(x), y, w).backward()
            opt.step()
            periods.add(period.period)
            if hvd.size() > 1 and period.period == 1 and len(periods) > 1:
                hvd.check_synchronized(model)
        assert hvd.size() == 1 or (1 in periods and max(periods) > 1), periods
        same_on_all_ranks(flat(model.parameters()).tolist())


def case_sparse_gradients_and_frozen_layers_in_local_steps():
    class Bag(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(10, 4, sparse=True)
            self.head = torch.nn.Linear(4, CLASSES)
            self.frozen = torch.nn.Linear(4, 4)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.head(self.frozen(self.table(x).mean(1)))

    torch.manual_seed(3)
    model = Bag().to(DEVICE)
    objective = hvd.Objective("cross_entropy", terms=(hvdloss.CommunicationCost(policies=(SyncPeriod(2),)),))
    opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)
    before = flat(model.parameters())
    for step in range(1, 8):
        if step == 5:
            model.frozen.requires_grad_(True)
        g = generator(step * 10 + hvd.rank())
        opt.zero_grad()
        objective(
            model(here(torch.randint(0, 10, (6, 3), generator=g))),
            here(torch.randint(0, CLASSES, (6,), generator=g)),
        ).backward()
        opt.step()
    opt.exchange()
    same_on_all_ranks(flat(model.parameters()).tolist())
    assert (flat(model.parameters()) != before).double().mean() > 0.9


# -- decisions ----------------------------------------------------------------------------------------


def slow_link(cost: hvdloss.CommunicationCost, seconds_per_mb: float) -> None:
    """Have a term believe in a link on which bytes take long; the same on all ranks."""
    cost.link = LinkModel(hvd.size())
    for megabytes in (1, 2, 4, 8):
        for _ in range(3):
            cost.link.add(1e-5 + megabytes * seconds_per_mb, megabytes * 2**20)


def case_compression_where_bytes_dominate():
    if hvd.size() == 1:
        return
    for period in (1, 2):
        policy = AdaptiveCompression(gain=0.05, every=1)
        cost = hvdloss.CommunicationCost(policies=(policy, SyncPeriod(period)), calibrate=False)
        objective = hvd.Objective("cross_entropy", terms=(cost,))
        model = network(generator(22), outputs=CLASSES)
        exact = copy.deepcopy(model)
        opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)
        plain = hvd.Objective(
            "cross_entropy", terms=(hvdloss.CommunicationCost(policies=(SyncPeriod(period),)),)
        )
        reference = hvd.DistributedOptimizer(torch.optim.SGD(exact.parameters(), lr=0.1), objective=plain)
        seen = set()
        for step in range(1, 13):
            slow_link(cost, 5000.0 if step < 9 else 1e-6)
            x, y, w = batch_of(hvd.rank(), step)
            for m, o, how in ((model, opt, objective), (exact, reference, plain)):
                o.zero_grad()
                how(m(x), y, w).backward()
                if o is opt:
                    time.sleep(0.005)
                o.step()
            seen.add(policy.on)
        opt.exchange()
        reference.exchange()
        assert seen == {True, False}, objective.controller.decisions
        assert [d.after for d in objective.controller.decisions] == ["fp16", "none"]
        error = difference(flat(model.parameters()), flat(exact.parameters()))
        assert 1e-9 < error < 2e-3, error
        same_on_all_ranks(flat(model.parameters()).tolist())
    raises_everywhere(
        hvdloss.ConfigError,
        lambda: hvd.DistributedOptimizer(
            torch.optim.SGD(exact.parameters(), lr=0.1), objective=objective, compression=hvd.Compression.fp16
        ),
        "AdaptiveCompression",
    )


def case_batch_shares_follow_speed():
    """The slow rank gets less, every sample is seen once, and the loss is that of equal shares."""
    if hvd.size() == 1:
        return
    data = here(torch.randn(30 * 12 * hvd.size(), 5, generator=generator(23), dtype=torch.float64))
    target = data.sum(1, keepdim=True)
    losses = []
    for gain in (0.1, 0.999):  # the second never finds it worth the while
        # A machine with other work adds to any time; some pause is longer than what it adds.
        for pause in (0.001 * 2**i for i in range(7)):
            shares = BatchShares(12 * hvd.size(), every=4, gain=gain)
            objective = hvd.Objective("mse", terms=(hvdloss.CommunicationCost(policies=(shares,)),))
            model = network(generator(24))
            opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.02), objective=objective)
            curve, seen = [], []
            for indices in SharedBatches(len(data), shares, seed=5):
                seen += indices
                opt.zero_grad()
                time.sleep(pause * len(indices) * (4 if hvd.rank() == 0 else 1))
                objective(model(data[indices]), target[indices]).backward()
                opt.step()
                curve.append(opt.last_step.loss)
            if gain > 0.5 or shares.sizes[0] < 0.6 * shares.sizes[1]:
                break
        else:
            raise AssertionError(shares.sizes)
        losses.append(curve)
        counts = np.bincount(seen, minlength=len(data))
        total = hvd.allreduce(torch.from_numpy(counts), op=hvd.Sum, name="counts")
        assert (total == 1).all()
        same_on_all_ranks(shares.sizes.tolist())
        if gain < 0.5:
            assert objective.controller.decisions
        else:
            assert shares.sizes[0] == 12
            assert not objective.controller.decisions
    apart = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
    assert apart < 1e-11, apart
    return {"apart": apart}


def case_decisions_can_be_made_again_from_the_log():
    """A run that follows the log of another takes its decisions, and ends at its very parameters."""

    os.environ["HVDLOSS_UNBUCKETED_MB"] = "inf"  # else Horovod's fusion, and so rounding, depends on timing

    def run(path, following, pause=0.0):
        shares = BatchShares(8 * hvd.size(), every=3, gain=0.05)
        period = SyncPeriod("adacomm", initial_period=4, interval=0.02)
        terms = (hvdloss.CommunicationCost(policies=(shares, period), calibrate=True),)
        objective = hvd.Objective("mse", terms=terms)
        model = network(generator(25))
        opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.02), objective=objective)
        if following:
            use_logged_times(objective.controller, path)
        elif hvd.rank() == 0:
            record(objective.controller, path)
        g = generator(26)
        for indices in SharedBatches(8 * hvd.size() * 40, shares, seed=3):
            x = here(torch.randn(len(indices), 5, generator=g, dtype=torch.float64))
            opt.zero_grad()
            if not following and hvd.rank() == hvd.size() - 1:
                time.sleep(pause * len(indices))
            objective(model(x), x.sum(1, keepdim=True)).backward()
            opt.step()
        opt.exchange()
        return flat(model.parameters()), objective.controller

    with tempfile.TemporaryDirectory() as folder:
        for pause in (0.002 * 2**i for i in range(6)):
            path = Path(hvd.broadcast_object(folder, 0, name="folder")) / f"{pause}.jsonl"
            first, controller = run(path, False, pause)
            hvd.barrier()
            # Of three, two get the same share, and noise may keep them from more.
            if hvd.size() != 2 or {d.what for d in controller.decisions} == {"batch sizes", "period"}:
                break
        else:
            raise AssertionError(controller.decisions)
        second, again = run(path, True)
        assert torch.equal(first, second)
        assert again.decisions == controller.decisions
        same_on_all_ranks([repr(d) for d in controller.decisions])
        terms = (
            hvdloss.CommunicationCost(
                policies=(
                    BatchShares(8 * hvd.size(), every=3, gain=0.05),
                    SyncPeriod("adacomm", initial_period=4, interval=0.02),
                ),
                calibrate=True,
            ),
        )
        assert replay(hvd.Objective("mse", terms=terms).controller, path) == controller.decisions
        hvd.barrier()
