"""Metrics of all samples, and training well: decisions, penalties, seeds, mixup and learning rates."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from torch_support import (
    Trial,
    before_case,
    difference,
    flat,
    gathered,
    generator,
    mse,
    network,
    raises_everywhere,
    regression,
    same_on_all_ranks,
    uneven,
)

import hvdloss
import hvdloss.torch as hvd
from hvdloss.data import Shuffled
from hvdloss.metrics import (
    AUC,
    F1,
    MAE,
    R2,
    RMSE,
    Accuracy,
    AveragePrecision,
    BrierScore,
    CalibrationError,
    ConfusionMatrix,
    LogLoss,
    Mean,
)
from hvdloss.train import Warmup, scale_factor
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")

__all__ = ["before_case"]

CLASSES = 3
METRICS = {
    "accuracy": Accuracy(CLASSES, top_k=2),
    "f1": F1(CLASSES),
    "confusion": ConfusionMatrix(CLASSES),
    "auc": AUC(CLASSES, from_logits=True),
    "ap": AveragePrecision(CLASSES, from_logits=True),
    "binned auc": AUC(CLASSES, bins=64, from_logits=True),
    "log loss": LogLoss(CLASSES, from_logits=True),
    "brier": BrierScore(CLASSES, from_logits=True),
    "calibration": CalibrationError(CLASSES, from_logits=True),
}


def parts(n):
    """Return where this rank's samples lie; rank 0 has none, the others uneven numbers."""
    last = max(hvd.size() - 1, 1)
    cut = [0, *(int(n * (r / last) ** 2) for r in range(hvd.size()))]
    return slice(cut[hvd.rank()], cut[hvd.rank() + 1]) if hvd.size() > 1 else slice(0, n)


def shared_folder():
    return Path(hvd.broadcast_object(tempfile.mkdtemp(prefix="hvdloss-torch-"), root_rank=0))


# -- metrics ------------------------------------------------------------------------------------------


def case_metrics_of_all_ranks_are_those_of_one_process():
    g = generator(1)
    n = 60
    y = torch.randn(n, CLASSES, 2, generator=g, dtype=torch.float64)  # the classes' axis is the second
    t = torch.randint(0, CLASSES, (n, 2), generator=g)
    w = torch.rand(n, 2, generator=g, dtype=torch.float64) * (torch.rand(n, 2, generator=g) < 0.8)
    y[w[:, 0] == 0, :, 0] = math.nan  # absent
    mine = parts(n)
    metrics = hvd.Metrics(METRICS)
    for rows in torch.arange(n)[mine].split(7):
        metrics.update(y[rows].requires_grad_(), t[rows], w[rows])
    found = metrics.compute()
    same_on_all_ranks({name: repr(value) for name, value in found.items()})
    scores, target, weight = (
        y.movedim(1, -1).reshape(-1, CLASSES).numpy(),
        t.reshape(-1).numpy(),
        w.reshape(-1),
    )
    error = 0.0
    for name, metric in METRICS.items():
        one = metric(scores, target, weight)
        error = max(error, float(np.max(np.abs(np.asarray(found[name]) - np.asarray(one)))))
    assert error < 1e-12, error
    here = weight > 0
    s, t, w = scores[here], target[here], weight[here]
    p = torch.from_numpy(s).softmax(1).numpy()
    expected = {
        "f1": sk.f1_score(t, s.argmax(1), sample_weight=w, average="macro"),
        "auc": np.mean([sk.roc_auc_score(t == k, p[:, k], sample_weight=w) for k in range(CLASSES)]),
        "log loss": sk.log_loss(t, p, sample_weight=w),
        "brier": sk.brier_score_loss(t, p, sample_weight=w),
    }
    error = max(error, *(abs(found[name] - value) for name, value in expected.items()))
    assert error < 1e-12, error
    return {"error, float64": error}


def case_binary_and_real_metrics_from_tensors_of_any_kind():
    g = generator(2)
    n = 40
    p, t = torch.rand(n, 1, generator=g), (torch.rand(n, generator=g) < 0.4).long()
    mine = parts(n)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        scores = p.to(dtype)
        binary = hvd.Metrics({"auc": AUC(), "ap": AveragePrecision(), "f1": F1()})
        binary.update(scores[mine], t[mine])
        found = binary.compute()
        plain = scores[:, 0].float().numpy()
        assert abs(found["auc"] - sk.roc_auc_score(t, plain)) < 1e-12
        assert abs(found["ap"] - sk.average_precision_score(t, plain)) < 1e-12
        assert abs(found["f1"] - sk.f1_score(t, plain > 0.5)) < 1e-12
    a, b = torch.randn(n, generator=g) + 5, torch.randn(n, generator=g) + 5
    real = hvd.Metrics({"mae": MAE(), "rmse": RMSE(), "r2": R2()})
    real.update(a[mine], b[mine])
    found = real.compute()
    assert abs(found["r2"] - sk.r2_score(b.double(), a.double())) < 1e-12
    assert abs(found["rmse"] - sk.root_mean_squared_error(b.double(), a.double())) < 1e-12
    real.reset()
    if hvd.rank() == hvd.size() - 1:
        real.update(a.numpy(), b.tolist())
    assert abs(real.compute()["mae"] - sk.mean_absolute_error(b.double(), a.double())) < 1e-12


def case_samples_that_cannot_be_used_raise_on_every_rank():
    last = hvd.size() - 1
    for scores, words in (
        (torch.full((4, CLASSES), math.nan), ("NaN",)),
        (torch.ones(4, CLASSES + 1), (f"(4, {CLASSES + 1})",)),
    ):
        metrics = hvd.Metrics({"auc": AUC(CLASSES), "f1": F1(CLASSES)})
        metrics.update(torch.rand(4, CLASSES), torch.zeros(4).long())
        metrics.update(scores if hvd.rank() == last else torch.rand(4, CLASSES), torch.zeros(4).long())
        raises_everywhere(hvdloss.ConfigError, metrics.compute, f"rank {last}, update 2", *words)
    metrics = hvd.Metrics(MAE())
    metrics.update([1.0], [1.0], [-1.0 if hvd.rank() == last else 1.0])
    raises_everywhere(hvdloss.WeightError, metrics.compute, f"rank {last}")
    raises_everywhere(
        hvdloss.AgreementError, hvd.Metrics(F1(3 if hvd.rank() == last else 4)).compute, f"rank {last} has"
    )
    raises_everywhere(hvdloss.NoWeightError, hvd.Metrics(MAE()).compute)


def case_metrics_of_a_process_set():
    if hvd.size() < 3:
        group = hvd.add_process_set([0])
        alone = hvd.Metrics(Mean(), process_set=group)
        alone.update([float(hvd.rank())])
        if hvd.rank() == 0:
            assert alone.compute() == 0.0
        else:
            with pytest.raises(hvdloss.ConfigError, match="does not have this process"):
                alone.compute()
    else:
        group = hvd.add_process_set([0, 2])
        if group.included():
            both = hvd.Metrics(Mean(), process_set=group)
            both.update([float(hvd.rank())], None, [1.0 + hvd.rank()])
            assert both.compute() == 1.5
    hvd.remove_process_set(group)


# -- decisions ----------------------------------------------------------------------------------------


class Plan:
    """One process's training, decided from its own validation; and ours, whose ranks see parts of it."""

    def __init__(self):
        g = generator(3)
        self.step = regression(g, uneven(more=9), weighted=False)
        # Rank 0 has few samples, which the model fits best before it is trained.
        x = torch.randn(3, 5, generator=g, dtype=torch.float64)
        rest = [(row[0].x, row[0].y) for row in self.step[1:]]
        self.validation = [(x, network(generator(4))(x).detach()), *rest]

    def run(self, ours, folder=None, epochs=40):
        model, log = network(generator(4)), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        objective = hvd.Objective("mse")
        if ours:
            optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), objective)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        if ours:
            stopping = hvd.EarlyStopping(patience=3)
            best = hvd.BestCheckpoint(folder / f"best-{hvd.rank()}.pt")
        held, waited = math.inf, 0
        for _ in range(epochs):
            optimizer.zero_grad()
            rows = self.step[hvd.rank()] if ours else [b for row in self.step for b in row]
            x, y = torch.cat([b.x for b in rows]), torch.cat([b.y for b in rows])
            (objective(model(x), y) if ours else mse(model(x), y).mean()).backward()
            optimizer.step()
            parts = [self.validation[hvd.rank()]] if ours else self.validation
            losses = torch.cat([mse(model(x), y) for x, y in parts]).detach()
            value, weight = losses.mean().item(), len(losses)
            rate = optimizer.param_groups[0]["lr"]
            if ours:
                plateau.step(hvd.merged_value(value, weight))
                log.append((rate, best.step(value, model.state_dict, weight), value))
                if stopping.step(value, weight):
                    break
            else:
                plateau.step(value)
                better = value < held
                held, waited = min(held, value), 0 if better else waited + 1
                log.append((rate, better, value))
                if waited >= 3:
                    break
        return model, log, best if ours else None


def case_stopping_plateaus_and_the_best_state_are_one_process_s():
    plan, folder = Plan(), shared_folder()
    model, log, best = plan.run(True, folder)
    one, expected, _ = plan.run(False)
    assert [entry[:2] for entry in log] == [entry[:2] for entry in expected], (log, expected)
    assert 3 < len(log) < 40  # it stopped
    assert len({rate for rate, _, _ in log}) > 2
    error = difference(flat(model.parameters()), flat(one.parameters()))
    assert error < 1e-12, error
    # By its own validation some rank would have decided otherwise.
    mine, better = math.inf, []
    for _, _, value in log:
        better.append(value < mine)
        mine = min(mine, value)
    assert any(text != str([entry[1] for entry in log]) for text in gathered(str(better)))
    assert [path.name for path in folder.iterdir()] == ["best-0.pt"]
    state = best.load()
    assert best.best_step == max(i for i, entry in enumerate(log) if entry[1])
    same_on_all_ranks({name: value.tolist() for name, value in state.items()})
    model.load_state_dict(state)
    losses = torch.cat([mse(model(x), y) for x, y in plan.validation])
    assert abs(losses.mean().item() - best.best) < 1e-12
    return {"error, float64": error}


def case_what_would_decide_apart_is_an_error_everywhere():
    raises_everywhere(
        hvdloss.AgreementError, lambda: hvd.EarlyStopping().step(float(hvd.rank())), "rank 1 has 1.0"
    )
    nan = math.nan if hvd.rank() == hvd.size() - 1 else 1.0
    raises_everywhere(hvdloss.NonFiniteLossError, lambda: hvd.EarlyStopping(nan="raise").step(nan, 1))
    folder = shared_folder()
    best = hvd.BestCheckpoint(folder / "best.pt")
    assert best.step(2.0, {"a": torch.ones(1)})

    def failing():
        if hvd.rank() == hvd.size() - 1:
            raise RuntimeError("no state here")
        return {}

    raises_everywhere(hvdloss.ConfigError, lambda: best.step(1.0, failing), "no state here")
    assert best.best == 2.0
    assert best.load() == {"a": torch.ones(1)}
    missing = hvd.BestCheckpoint(folder / "none.pt")
    raises_everywhere(hvdloss.ConfigError, missing.load, "rank 0 could not read")


# -- regularisation and seeds -------------------------------------------------------------------------


def case_l1_l2_and_weight_decay_count_once_with_accumulation():
    g = generator(5)

    def penalty(model):
        return sum(0.02 * p.abs().sum() + 0.1 * (p**2).sum() for p in model.parameters())

    trial = Trial(
        network(g),
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.2),
        passes=3,
        penalty=penalty,
    )
    for k in range(3):
        counts = [[2 + 3 * rank] * (1 + (rank + k) % 3) for rank in range(hvd.size())]
        counts[k % hvd.size()] = [0]
        trial.step(regression(g, counts))
    return trial.finish()


def _dropout_run(seed, epochs, start=0):
    """Return the initial parameters, and the masks of every epoch."""
    hvd.seed_everything(seed, alike=True)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 1)
    ).double()
    first = flat(model.parameters()).tolist()
    masks = []
    for epoch in range(start, epochs):
        hvd.seed_everything(seed, epoch=epoch)
        masks.append((model[1](torch.ones(64)) == 0).tolist())
    return first, masks


def case_dropout_differs_between_ranks_and_not_between_runs():
    first, masks = _dropout_run(7, 3)
    again = _dropout_run(7, 3)
    assert (first, masks) == again
    same_on_all_ranks(first)
    assert _dropout_run(7, 3, start=2)[1] == masks[2:]  # gone on with after an interruption
    texts = [json.dumps(mask) for mask in masks]
    every = [text for rank in gathered("\n".join(texts)) for text in rank.split("\n")]
    assert len(set(every)) == 3 * hvd.size()
    assert _dropout_run(8, 3)[0] != first


# -- mixup --------------------------------------------------------------------------------------------


class Samples(torch.utils.data.Dataset):
    def __init__(self):
        g = generator(8)
        self.x = torch.randn(47, 5, generator=g, dtype=torch.float64)
        self.y = self.x[:, :1] * 2 + torch.randn(47, 1, generator=g, dtype=torch.float64)

    def __len__(self):
        return 47

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def mixed_loader(seed=7, **options):
    loader = hvd.ShardedLoader(Samples(), Shuffled(47, seed=1), 5, **options)
    return hvd.TransformedLoader(loader, lambda batch, rng: hvd.mixup(*batch, alpha=1.0, rng=rng), seed=seed)


def case_mixup_is_exact_and_goes_on_where_it_stopped():
    model, one = network(generator(9)), network(generator(9))
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model.named_parameters(), objective
    )
    alone = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
    loader, seen, state = mixed_loader(), [], None
    for epoch in range(2):
        for step, mixed in enumerate(loader):
            optimizer.zero_grad()
            objective(*mixed.pairs(model(mixed.x))).backward()
            optimizer.step()
            told = [t.tolist() for t in (mixed.x, *mixed.targets, *mixed.weights)]
            seen.append(told)
            ranks = [json.loads(text) for text in gathered(json.dumps(told))]
            alone.zero_grad()
            above = below = 0.0
            for rank in ranks:  # from the definition: each mixed sample, and its two targets
                if rank[0]:
                    x, y, other, a, b = (torch.tensor(t, dtype=torch.float64) for t in rank)
                    above = above + (a * mse(one(x), y) + b * mse(one(x), other)).sum()
                    below = below + a.sum() + b.sum()
            (above / below).backward()
            alone.step()
            if (epoch, step) == (1, 1):
                state = json.loads(json.dumps(loader.state_dict()))
    error = difference(flat(model.parameters()), flat(one.parameters()))
    assert error < 1e-12, error
    assert any(len({json.dumps(t[0]) for t in rank}) > 1 for rank in [seen])
    steps = len(seen) // 2
    assert all(a != b or not a[0] for a, b in zip(seen[:steps], seen[steps:], strict=True))
    rerun = mixed_loader(num_workers=1)
    again = [[t.tolist() for t in (m.x, *m.targets, *m.weights)] for _ in range(2) for m in rerun]
    assert again == seen
    resumed = mixed_loader()
    resumed.load_state_dict(state)
    rest = [[t.tolist() for t in (m.x, *m.targets, *m.weights)] for m in resumed]
    assert rest == seen[steps + 2 :]
    assert resumed.epoch == 2
    return {"error, float64": error}


def case_random_numbers_of_batches_differ_between_ranks_and_loops():
    plain = hvd.TransformedLoader(range(4), lambda batch, rng: (batch, float(rng.random())), seed=3)
    first, second = list(plain), list(plain)
    assert [batch for batch, _ in first] == [0, 1, 2, 3]
    numbers = [number for _, number in (*first, *second)]
    every = [float(n) for text in gathered(json.dumps(numbers)) for n in json.loads(text)]
    assert len(set(every)) == 8 * hvd.size()
    again = hvd.TransformedLoader(range(4), lambda batch, rng: (batch, float(rng.random())), seed=3)
    assert [*again, *again] == [*first, *second]
    left = hvd.TransformedLoader(range(4), lambda batch, rng: (batch, float(rng.random())), seed=3)
    assert next(iter(left)) == first[0]
    assert list(left) == second  # a plain loader begins anew, and so does the epoch
    again.load_state_dict({"version": 1, "epoch": 1, "step": 2, "loader": None})
    assert next(iter(again)) == (0, second[2][1])


# -- learning rates -----------------------------------------------------------------------------------


def case_warmup_to_a_scaled_rate_is_one_process_s():
    factor = scale_factor(8 * hvd.size(), 8)
    assert factor == hvd.size()
    trial = Trial(network(generator(10)), lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9))
    warmup = Warmup(factor, 4, then=lambda step: 0.5 if step >= 5 else 1.0)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, warmup)
        for o in (trial.optimizer, trial.one_optimizer, trial.plain_optimizer)
    ]
    g, rates = generator(11), []
    for _ in range(7):
        rates.append(trial.optimizer.param_groups[0]["lr"])
        trial.step(regression(g, uneven()))
        for scheduler in schedulers:
            scheduler.step()
    expected = [0.02 * (1 + (factor - 1) * min(s / 4, 1)) * (0.5 if s >= 5 else 1) for s in range(7)]
    assert np.allclose(rates, expected, rtol=1e-12), rates
    return trial.finish()
