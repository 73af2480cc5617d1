"""What a PyTorch model relies on and who drives its loss, over real ranks: as one process finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.inspection import permutation_importance as scikit_learns
from torch_support import before_case, same_on_all_ranks

import hvdloss
import hvdloss.explain as one_process
import hvdloss.torch as hvd
from hvdloss.torch.integrations.explain import _elements, _of_module
from tests.ranks import needs

NEEDS = needs("gloo-3", more="gloo-2")

__all__ = ["before_case"]

DATA = load_breast_cancer()
X = ((DATA.data - DATA.data.mean(0)) / DATA.data.std(0))[:240, :10]
Y = DATA.target[:240]
WEIGHT = np.random.default_rng(0).choice([0.0, 0.5, 1.0, 2.0], len(X))


def network(dtype=torch.float64):
    """Return the same network on every rank; eval mode must be asked for, or dropout blurs everything."""
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(10, 8), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)
    ).to(dtype)


def mine(seed=0):
    """Return which rows this rank has: uneven, in no order, and none on the last rank of three."""
    owner = np.random.default_rng(seed).choice(hvd.size(), len(X), p=[0.7, 0.3, 0.0][: hvd.size()])
    return np.flatnonzero(owner == hvd.rank())


def error(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def case_attribution_is_that_of_one_process():
    model, rows = network().eval(), mine()
    objective = hvd.Objective("cross_entropy")
    target, weight = Y.copy(), WEIGHT.copy()
    target[5] = -100  # absent
    x = torch.from_numpy(X.copy())
    x[weight == 0] = torch.nan  # of no concern

    def feed(attribution, some):
        for part in np.array_split(some, 4):
            y = model(x[part])  # with its graph, as in training
            attribution.update(
                y, torch.from_numpy(target[part]), torch.from_numpy(weight[part]),
                ids=part, groups={"size": (X[part, 0] > 0).astype(int)},
            )  # fmt: skip
        return attribution.compute()

    options = {"classes": list(DATA.target_names), "k": 7}
    report = feed(hvd.LossAttribution(objective, **options), rows)
    same_on_all_ranks(report.as_dict())
    one = feed(one_process.LossAttribution(_elements(objective), **options), np.arange(len(X)))
    assert [s.id for s in report.hardest] == [s.id for s in one.hardest]
    assert 5 not in [s.id for s in report.hardest]
    assert all(s.rank in range(hvd.size()) for s in report.hardest)
    pairs = list(zip(report.classes + report.groups["size"], one.classes + one.groups["size"], strict=True))
    assert [a.label for a, _ in pairs] == [b.label for _, b in pairs]
    errors = [error(a.weighted, b.weighted) for a, b in pairs] + [error(report.loss, one.loss)]
    assert max(errors) < 1e-12, errors
    own = report.ranks[hvd.rank()]
    kept = rows[(weight[rows] > 0) & (target[rows] >= 0)]
    assert own.elements == len(kept)
    if len(kept):
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                model(x[kept]), torch.from_numpy(target[kept]), reduction="none"
            )
        assert error(own.weighted, (losses.numpy() * weight[kept]).sum()) < 1e-12
    assert abs(sum(part.share for part in report.ranks) - 1) < 1e-12
    return {"error": max(errors)}


def case_permutation_importance_is_scikit_learns():
    model, rows = network().train(), mine(1)

    class Estimator:
        def fit(self):
            """scikit-learn asks for it."""

    def score(estimator, x, y, sample_weight=None):
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                model.eval()(torch.from_numpy(x)), torch.from_numpy(y), reduction="none"
            ).numpy()
        return -(losses * sample_weight).sum() / sample_weight.sum()

    options = {"n_repeats": 4, "random_state": 11, "sample_weight": WEIGHT}
    theirs = scikit_learns(Estimator(), X, Y, scoring=score, **options)
    model.train()
    ours = hvd.permutation_importance(
        model,
        X[rows],
        Y[rows],
        loss=hvd.Objective("cross_entropy"),
        weight=WEIGHT[rows],
        ids=rows,
        n_repeats=4,
        seed=11,
    )
    assert model.training
    same_on_all_ranks(ours.as_dict())
    errors = [
        error(ours.importances, theirs.importances),
        error(ours.importances_mean, theirs.importances_mean),
        error(ours.importances_std, theirs.importances_std),
    ]
    assert max(errors) < 1e-12, errors
    if len(rows):  # what a rank finds of its own rows is another
        loss = one_process.MeanLoss(_elements(hvd.Objective("cross_entropy")))
        options = {"loss": loss, "n_repeats": 4, "seed": 11}
        own = one_process.permutation_importance(hvd.predict_function(model), X[rows], Y[rows], **options)
        assert error(own.importances, theirs.importances) > 1e-2
    accuracy = hvd.permutation_importance(
        model, X[rows], Y[rows], loss="accuracy", ids=rows, features=[[0, 1]]
    )
    same_on_all_ranks(accuracy.as_dict())
    return {"error against scikit-learn": max(errors)}


def case_shap_values_are_those_of_one_process():
    model, rows = network().eval(), mine(2)
    function = hvd.predict_function(model, output=lambda y: y.softmax(-1))
    errors = {}
    for explainer, asked in (("kernel", 100), ("sampling", 100)):
        options = {"explainer": explainer, "evaluations": asked, "background": 12, "seed": 4, "rows": 9}
        ours = hvd.shap_values(
            model, X[rows], ids=rows, weight=WEIGHT[rows], output=lambda y: y.softmax(-1), **options
        )
        one = one_process.shap_values(function, X, weight=WEIGHT, **options)
        assert ours.ids.tolist() == one.ids.tolist()
        assert np.array_equal(ours.data, one.data)
        same_on_all_ranks(ours.values.tolist())
        errors[explainer] = max(error(ours.values, one.values), error(ours.base_values, one.base_values))
        assert errors[explainer] < 1e-12, errors
        changed = options | {"seed": 5, "rows": None, "data": X}
        other = one_process.shap_values(function, one.data, ids=one.ids, weight=WEIGHT, **changed)
        assert error(other.values, one.values) > 1e-4  # other draws show
    return errors


def case_shap_looks_into_modules():
    model, rows = network(torch.float32), mine(3)[:8]
    errors = {}
    for explainer in ("gradient", "deep"):
        options = {"explainer": explainer, "background": X[:20], "evaluations": 20, "seed": 1}
        ours = hvd.shap_values(model, X[rows], ids=rows, results="own", **options)
        assert np.array_equal(ours.data, X[rows])
        if len(rows):
            maker = _of_module(explainer, model, None)
            one = one_process.shap_values(print, X[rows], ids=rows, **options | {"explainer": maker})
            errors[explainer] = error(ours.values, one.values)
            assert errors[explainer] < 1e-5, errors
        if explainer == "deep" and len(rows):
            with torch.no_grad():
                y = model.eval()(torch.from_numpy(X[rows]).float()).numpy()
            model.train()
            assert np.abs(ours.values.sum(1) + ours.base_values - y).max() < 1e-4
    return errors


def case_lime_is_that_of_one_process():
    model, rows = network(), mine(4)
    options = {"rows": 5, "background": 80, "num_samples": 200, "seed": 2}
    ours = hvd.lime_weights(model, X[rows], ids=rows, output=lambda y: y.softmax(-1), **options)
    one = one_process.lime_weights(hvd.predict_function(model, output=lambda y: y.softmax(-1)), X, **options)
    assert ours.ids.tolist() == one.ids.tolist()
    found = error(ours.values, one.values)
    assert found < 1e-12
    return {"error": found}


def case_what_fails_on_one_rank_is_raised_on_all():
    model, rows = network(), np.arange(30)
    texts = []

    def broken(x):
        if hvd.rank() == 1:
            raise OSError("the disk is full")
        return np.zeros((len(x), 2))

    attempts = [
        (hvdloss.RankError, "rank 1.*OSError: the disk is full", lambda: hvd.permutation_importance(
            broken, X[rows], Y[rows], loss="cross_entropy")),
        (hvdloss.RankError, "rank 1.*OSError: the disk is full", lambda: hvd.shap_values(
            broken, X[rows], rows=4, background=4, explainer="kernel")),
        (hvdloss.AgreementError, r"shape of a row.*rank 1 has \[9\]", lambda: hvd.shap_values(
            model, X[rows, : 9 if hvd.rank() == 1 else 10], explainer="kernel")),
        (hvdloss.NonFiniteLossError, "rank 1.*nan", lambda: hvd.permutation_importance(
            lambda x: np.full((len(x), 2), np.nan if hvd.rank() == 1 else 0.0), X[rows], Y[rows],
            loss="cross_entropy")),
    ]  # fmt: skip
    for kind, words, attempt in attempts:
        with pytest.raises(kind, match=words) as raised:
            attempt()
        texts.append(str(raised.value))
    attribution = hvd.LossAttribution("mse")
    attribution.update(torch.ones(3), torch.full((3,), torch.nan if hvd.rank() == 1 else 0.0))
    with pytest.raises(hvdloss.NonFiniteLossError, match=r"rank 1.*batch 1.*element \(0,\) is nan") as raised:
        attribution.compute()
    texts.append(str(raised.value))
    same_on_all_ranks(texts)
    with pytest.raises(hvdloss.ConfigError, match="SoftDice is a loss of all elements together"):
        hvd.LossAttribution("soft_dice")


def case_a_process_set_explains_for_itself():
    group = hvd.global_process_set if hvd.size() < 3 else hvd.add_process_set([0, 1])
    if hvd.rank() < 2:
        rows = np.arange(60)[hvd.rank() :: 2]
        ours = hvd.permutation_importance(
            network(), X[rows], Y[rows], loss="cross_entropy", ids=rows, features=[0, 3], process_set=group
        )
        assert ours.rows == 60
    else:
        with pytest.raises(hvdloss.UsageError, match="rank 2 is not in the process set"):
            hvd.LossAttribution("mse", process_set=group)
    if group is not hvd.global_process_set:
        hvd.remove_process_set(group)
