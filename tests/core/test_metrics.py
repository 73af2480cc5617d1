"""Metrics of all ranks: merged statistics give scikit-learn's values of all samples, for any split."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

import hvdloss
from hvdloss.comm.communicator import simulate
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.metrics import (
    AUC,
    F1,
    MAE,
    MSE,
    R2,
    RMSE,
    Accuracy,
    AveragePrecision,
    BrierScore,
    CalibrationError,
    ConfusionMatrix,
    FBeta,
    LogLoss,
    Mean,
    Metrics,
    Precision,
    Recall,
)
from hvdloss.metrics.collection import decode_states, encode_states

K = 4


def calibration(p, hit, w, bins, norm="l1"):
    """Return the calibration error, one sample at a time."""
    sums = {}
    for confidence, right, weight in zip(p, hit, w, strict=True):
        place = sum(confidence >= i / bins for i in range(1, bins))
        old = sums.get(place, (0.0, 0.0))
        sums[place] = (old[0] + weight, old[1] + weight * (confidence - right))
    gaps = [(weight, abs(gap) / weight) for weight, gap in sums.values() if weight > 0]
    if norm == "max":
        return max(gap for _, gap in gaps)
    power = {"l1": 1, "l2": 2}[norm]
    return (sum(weight * gap**power for weight, gap in gaps) / sum(weight for weight, _ in gaps)) ** (
        1 / power
    )


def one_hot(t):
    return t[:, None] == np.arange(K)


# Each: a metric, and what it is of samples that all have a weight above 0.
BINARY = {
    "accuracy": (Accuracy(), lambda p, t, w: sk.accuracy_score(t, p > 0.5, sample_weight=w)),
    "precision": (
        Precision(),
        lambda p, t, w: sk.precision_score(t, p > 0.5, sample_weight=w, zero_division=0),
    ),
    "recall": (Recall(), lambda p, t, w: sk.recall_score(t, p > 0.5, sample_weight=w, zero_division=0)),
    "f1": (F1(), lambda p, t, w: sk.f1_score(t, p > 0.5, sample_weight=w, zero_division=0)),
    "macro f1": (
        F1(average="macro"),
        lambda p, t, w: sk.f1_score(t, p > 0.5, sample_weight=w, average="macro", zero_division=0),
    ),
    "f2": (
        FBeta(beta=2.0, zero_division=1.0),
        lambda p, t, w: sk.fbeta_score(t, p > 0.5, beta=2, sample_weight=w, zero_division=1),
    ),
    "confusion": (
        ConfusionMatrix(),
        lambda p, t, w: sk.confusion_matrix(t, p > 0.5, labels=[0, 1], sample_weight=w),
    ),
    "log loss": (LogLoss(), lambda p, t, w: sk.log_loss(t, p, sample_weight=w, labels=[0, 1])),
    "brier": (BrierScore(), lambda p, t, w: sk.brier_score_loss(t, p, sample_weight=w, labels=[0, 1])),
    "calibration": (CalibrationError(bins=7), lambda p, t, w: calibration(p, t, w, 7)),
    "calibration, l2": (CalibrationError(bins=7, norm="l2"), lambda p, t, w: calibration(p, t, w, 7, "l2")),
    "calibration, max": (
        CalibrationError(bins=7, norm="max"),
        lambda p, t, w: calibration(p, t, w, 7, "max"),
    ),
    "auc": (AUC(), lambda p, t, w: sk.roc_auc_score(t, p, sample_weight=w) if 0 < t.mean() < 1 else np.nan),
    "ap": (
        AveragePrecision(),
        lambda p, t, w: sk.average_precision_score(t, p, sample_weight=w) if t.any() else np.nan,
    ),
}


def classes_of(function, **options):
    return lambda p, t, w: function(t, p.argmax(1), sample_weight=w, zero_division=0, **options)


def per_class(function):
    """Return scikit-learn's one-against-the-rest value of each class; NaN where it is not defined."""

    def values(p, t, w):
        out = []
        for k in range(K):
            own = t == k
            defined = own.any() and (function is sk.average_precision_score or not own.all())
            out.append(function(own, p[:, k], sample_weight=w) if defined else np.nan)
        return np.array(out)

    return values


def mean_of(function, weighted):
    def value(p, t, w):
        values = per_class(function)(p, t, w)
        there = ~np.isnan(values)
        weight = np.array([w[t == k].sum() for k in range(K)]) if weighted else np.ones(K)
        return np.average(values[there], weights=weight[there]) if there.any() else np.nan

    return value


MULTICLASS = {
    "accuracy": (Accuracy(K), lambda p, t, w: sk.accuracy_score(t, p.argmax(1), sample_weight=w)),
    "top 2": (
        Accuracy(K, top_k=2),
        lambda p, t, w: sk.top_k_accuracy_score(t, p, k=2, labels=range(K), sample_weight=w),
    ),
    "confusion": (
        ConfusionMatrix(K, normalize="true"),
        lambda p, t, w: sk.confusion_matrix(
            t, p.argmax(1), labels=range(K), sample_weight=w, normalize="true"
        ),
    ),
    "confusion, pred": (
        ConfusionMatrix(K, normalize="pred"),
        lambda p, t, w: sk.confusion_matrix(
            t, p.argmax(1), labels=range(K), sample_weight=w, normalize="pred"
        ),
    ),
    "micro f1": (F1(K, average="micro"), classes_of(sk.f1_score, average="micro")),
    "macro f1": (F1(K), classes_of(sk.f1_score, average="macro")),
    "weighted f1": (F1(K, average="weighted"), classes_of(sk.f1_score, average="weighted")),
    "f1 per class": (F1(K, average=None), classes_of(sk.f1_score, average=None, labels=range(K))),
    "macro precision": (Precision(K), classes_of(sk.precision_score, average="macro")),
    "weighted recall": (Recall(K, average="weighted"), classes_of(sk.recall_score, average="weighted")),
    "f half": (FBeta(K, beta=0.5), classes_of(sk.fbeta_score, average="macro", beta=0.5)),
    "log loss": (LogLoss(K), lambda p, t, w: sk.log_loss(t, p, sample_weight=w, labels=range(K))),
    "brier": (BrierScore(K), lambda p, t, w: sk.brier_score_loss(t, p, sample_weight=w, labels=range(K))),
    "calibration": (CalibrationError(K), lambda p, t, w: calibration(p.max(1), p.argmax(1) == t, w, 15)),
    "auc per class": (AUC(K, average=None), per_class(sk.roc_auc_score)),
    "macro auc": (AUC(K), mean_of(sk.roc_auc_score, False)),
    "weighted auc": (AUC(K, average="weighted"), mean_of(sk.roc_auc_score, True)),
    "micro auc": (
        AUC(K, average="micro"),
        lambda p, t, w: sk.roc_auc_score(one_hot(t), p, average="micro", sample_weight=w),
    ),
    "macro ap": (AveragePrecision(K), mean_of(sk.average_precision_score, False)),
    "micro ap": (
        AveragePrecision(K, average="micro"),
        lambda p, t, w: sk.average_precision_score(one_hot(t), p, average="micro", sample_weight=w),
    ),
}
REAL = {
    "mae": (MAE(), lambda p, t, w: sk.mean_absolute_error(t, p, sample_weight=w)),
    "mse": (MSE(), lambda p, t, w: sk.mean_squared_error(t, p, sample_weight=w)),
    "rmse": (RMSE(), lambda p, t, w: sk.root_mean_squared_error(t, p, sample_weight=w)),
    "r2": (R2(), lambda p, t, w: sk.r2_score(t, p, sample_weight=w) if np.ptp(t) > 0 else np.nan),
    "mean": (Mean(), lambda p, t, w: np.average(p, weights=w)),
}


@st.composite
def splits(draw):
    """Return random samples of uneven ranks (some have none) and batches (some are empty)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ranks = draw(st.integers(1, 4))
    n = draw(st.integers(1, 40))
    weights = draw(st.sampled_from(["none", "fractional", "zeros"]))
    cut = np.sort(rng.integers(0, n + 1, 2 * ranks - 1))
    parts = list(itertools.pairwise([0, *cut.tolist(), n]))  # two batches of each rank
    w = None if weights == "none" else rng.uniform(0.1, 3, n)
    if weights == "zeros":
        w *= rng.random(n) < 0.6
        w[rng.integers(n)] = 1.0
    return rng, n, ranks, parts, w


def of_ranks(metrics, ranks, parts, *arrays):
    """Return what every rank computes, having checked that all got the same to the last bit."""

    def work(communicator):
        mine = Metrics(metrics, communicator=lambda: communicator)
        for a, b in parts[2 * communicator.rank : 2 * communicator.rank + 2]:
            mine.update(*(None if x is None else x[a:b] for x in arrays))
        return mine.compute()

    values = simulate(ranks, work)
    assert all(repr(value) == repr(values[0]) for value in values)
    return values[0]


def check(table, split, p, t):
    _, n, ranks, parts, w = split
    found = of_ranks({name: metric for name, (metric, _) in table.items()}, ranks, parts, p, t, w)
    v = np.ones(n) if w is None else w
    here = v > 0
    for name, (_, expected) in table.items():
        np.testing.assert_allclose(
            found[name], expected(p[here], t[here], v[here]), rtol=1e-9, atol=1e-12, err_msg=name
        )


@settings(max_examples=25, deadline=None)
@given(splits(), st.sampled_from([np.float32, np.float64]), st.booleans())
def test_binary_is_that_of_all_samples(split, dtype, ties):
    rng, n, *_ = split
    p = rng.random(n)
    p = (np.round(p, 1) if ties else p).astype(dtype)
    if dtype == np.float32:  # what is made of the same rounded numbers
        table = {name: BINARY[name] for name in ("accuracy", "f1", "confusion", "auc", "ap")}
    else:
        table = BINARY
    check(table, split, p, (rng.random(n) < 0.4).astype(int))


@settings(max_examples=20, deadline=None)
@given(splits(), st.booleans())
@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_multiclass_is_that_of_all_samples(split, rare):
    rng, n, *_ = split
    p = NumpyOps().softmax(rng.standard_normal((n, K)))
    t = rng.integers(0, 2 if rare else K, n)
    check(MULTICLASS, split, p, t)


@settings(max_examples=25, deadline=None)
@given(splits(), st.sampled_from([0.0, 1e6]))
def test_real_values_are_those_of_all_samples(split, offset):
    rng, n, *_ = split
    t = rng.standard_normal(n) + offset
    p = t + rng.standard_normal(n)
    if offset:  # where sums of squares would have lost nine digits
        _, _, ranks, parts, w = split
        here = slice(None) if w is None else w > 0
        v = None if w is None else w[here]
        if np.ptp(t[here]) > 0:
            expected = sk.r2_score(t[here], p[here], sample_weight=v)
            assert of_ranks(R2(), ranks, parts, p, t, w) == pytest.approx(expected, rel=1e-8)
    else:
        check(REAL, split, p, t)


@settings(max_examples=60, deadline=None)
@given(splits(), st.integers(2, 40), st.booleans())
def test_from_bins_the_error_is_within_its_bound(split, bins, sharp):
    rng, n, ranks, parts, w = split
    t = rng.random(n) < 0.4
    p = rng.beta(2 + 3 * t, 3) if sharp else rng.random(n)
    for kind in (AUC, AveragePrecision):
        exact = of_ranks(kind(), ranks, parts, p, t, w)
        value, error = of_ranks(kind(bins=bins), ranks, parts, p, t, w)
        assert np.isnan(exact) == np.isnan(value)
        assert np.isnan(exact) or abs(value - exact) <= error + 1e-12
        # Scores that lie apart in bins: no error, and none is stated.
        apart = np.argsort(np.argsort(p)) / n
        value, error = of_ranks(kind(bins=n + 1), ranks, parts, apart, t, w)
        exact = of_ranks(kind(), ranks, parts, apart, t, w)
        assert np.isnan(exact) or value == pytest.approx(exact, abs=1e-12)
        assert np.isnan(exact) or kind is AveragePrecision or error < 1e-12


def test_bounds_of_classes_are_averaged_as_their_values():
    rng = np.random.default_rng(1)
    t = rng.integers(0, K, 500)
    p = NumpyOps().softmax(rng.standard_normal((500, K)) + 2 * one_hot(t))
    for average in ("macro", "weighted", "micro", None):
        for kind in (AUC, AveragePrecision):
            exact, found = kind(K, average=average)(p, t), kind(K, average=average, bins=30)(p, t)
            assert (np.abs(found.value - exact) <= found.error).all()
            assert np.max(found.error) < 0.1


@settings(max_examples=20, deadline=None)
@given(splits(), st.randoms())
def test_merging_is_associative_commutative_and_has_a_neutral_element(split, random):
    rng, n, _, parts, w = split
    p, t = rng.random(n), rng.integers(0, 2, n)
    everything = [metric for metric, _ in (*BINARY.values(), *REAL.values())] + [AUC(bins=9)]
    for metric in everything:
        states = [metric.of(p[a:b], t[a:b], None if w is None else w[a:b]) for a, b in parts]
        expected = metric(p, t, w)
        random.shuffle(states)
        while len(states) > 1:  # in any order and grouping
            i = random.randrange(len(states) - 1)
            states[i : i + 2] = [metric.merge(metric.merge(states[i], metric.zero()), states[i + 1])]
        np.testing.assert_allclose(metric.finish(states[0]), expected, rtol=1e-9, atol=1e-12)


def test_logits_give_what_their_probabilities_give():
    rng = np.random.default_rng(2)
    y, t = rng.standard_normal((50, K)) * 3, rng.integers(0, K, 50)
    ops = NumpyOps()
    for kind in (LogLoss, BrierScore, CalibrationError, AUC, AveragePrecision, F1, Accuracy):
        for metric, plain, scores, target in (
            (kind(K, from_logits=True), kind(K), ops.softmax(y), t),
            (kind(from_logits=True), kind(), ops.sigmoid(y[:, 0]), t > 1),
        ):
            given_ = y if scores.ndim == 2 else y[:, 0]
            assert metric(given_, target) == pytest.approx(plain(scores, target), rel=1e-9), metric
    assert LogLoss(from_logits=True)([1000.0], [0]) == 1000.0


def test_forms_of_input():
    p = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.9, 0.0, 0.1]])
    t = np.array([1, 2, 2, 0])
    assert Accuracy(3)(p, t) == 0.75
    assert Accuracy(3)(p, np.eye(3)[t]) == 0.75  # one-hot
    assert Accuracy(3)(p.argmax(1), t) == 0.75  # predicted labels
    assert Accuracy(3)(p.reshape(2, 2, 3), t.reshape(2, 2)) == 0.75
    assert Accuracy(3)(p, [1, -100, 2, 0]) == 1.0  # an absent target
    assert Accuracy(3)([[np.nan] * 3, *p[1:].tolist()], t, [0, 1, 1, 1]) == pytest.approx(2 / 3)
    assert Accuracy()(np.array([[0.9], [0.2]]), [1, 1]) == 0.5  # one output per sample
    assert Accuracy()([0.9, 0.2], np.array([[1], [1]])) == 0.5
    assert MAE()(np.array([[1, 2], [3, 4]]), np.zeros((2, 2)), [[1], [0]]) == 1.5  # weights broadcast
    assert MAE()(np.float16([1, 2]), np.zeros(2)) == 1.5
    assert np.isnan(AUC()([0.1, 0.2], [1, 1]))
    assert AUC(3)([0, 1, 2], [0, 1, 2]) == 1.0  # labels are scores of 0 and 1
    assert AUC()([0.3, -np.inf, np.inf], [1, 0, 1]) == 1.0


@pytest.mark.parametrize(
    ("metric", "prediction", "target", "weight", "kind", "text"),
    [
        (F1(3), np.ones((2, 4)), [0, 1], None, "ShapeError", r"shape \(2, 4\).*classes=3"),
        (AUC(), [0.1, np.nan], [0, 1], None, "ConfigError", r"1 prediction\(s\) are NaN"),
        (MAE(), [1.0], [1.0], [-1.0], "WeightError", "negative"),
        (MAE(), [1.0], [1.0], [np.inf], "WeightError", "infinite"),
        (MAE(), [1.0, 2.0], [1.0, 2.0], [1.0, 2.0, 3.0], "ShapeError", "does not broadcast"),
        (MAE(), [1.0], [1.0, 2.0], None, "ShapeError", "one prediction per target"),
        (MAE(), [np.inf], [1.0], None, "ConfigError", "infinite"),
        (MAE(), ["a"], [1.0], None, "ConfigError", "no array of numbers"),
        (F1(), [0.1], [2], None, "ConfigError", "target 2 is no class"),
        (F1(3), [3], [2], None, "ConfigError", "prediction 3 is no class"),
        (F1(3), [[0.2, 0.3, 0.5]], [0.5], None, "ConfigError", "target 0.5 is no class"),
        (F1(3), np.ones((2, 3)), np.ones((2, 3)), None, "ConfigError", "not one-hot"),
        (LogLoss(), [1.5], [1], None, "ConfigError", "no probability; pass from_logits"),
        (LogLoss(3), [1], [1], None, "ConfigError", "needs probabilities"),
        (AUC(bins=5), [-1.0], [1], None, "ConfigError", "no probability"),
        (Accuracy(3, top_k=2), [1], [1], None, "ConfigError", "needs scores"),
    ],
)
def test_samples_that_cannot_be_used_are_the_same_error_on_every_rank(
    metric, prediction, target, weight, kind, text
):
    raised = []

    def work(communicator):
        metrics = Metrics({"it": metric, "n": Mean()}, communicator=lambda: communicator)
        if communicator.rank == 1:
            metrics.update(prediction, target, weight)
        try:
            metrics.compute()
        except hvdloss.HvdlossError as error:
            raised.append(error)

    simulate(3, work)
    assert len(raised) == 3
    assert len({str(error) for error in raised}) == 1
    for error in raised:
        assert type(error).__name__ == kind
        assert error.args[0].startswith("metrics: rank 1, update 1: ")
        with pytest.raises(type(error), match=text):
            raise error


def test_a_batch_that_one_metric_cannot_use_is_in_none_and_reset_forgets_it():
    metrics = Metrics({"mean": MAE(), "f1": F1()})
    metrics.update([0.0], [1.0])
    metrics.update([0.5], [7.0])
    metrics.update([0.5], [1.0])
    with pytest.raises(hvdloss.ConfigError, match=r"rank 0, update 2: target 7\.0 is no class"):
        metrics.compute()
    metrics.reset()
    metrics.update([0.75], [1.0])
    assert metrics.compute() == {"mean": 0.25, "f1": 1.0}
    metrics.update([0.25], [1.0])  # what was seen stays
    assert metrics.compute() == {"mean": 0.5, "f1": 2 / 3}


def test_other_metrics_or_no_samples_at_all_are_errors_on_every_rank():
    errors = []

    def work(communicator):
        for metric in (F1(3 + communicator.rank), F1(3)):
            try:
                Metrics(metric, communicator=lambda: communicator).compute()
            except hvdloss.HvdlossError as error:
                errors.append((type(error), str(error)))

    simulate(2, work)
    assert {kind for kind, _ in errors} == {hvdloss.AgreementError, hvdloss.NoWeightError}
    assert len(set(errors)) == 2
    assert any("rank 1 has" in text and "classes=4" in text for _, text in errors)


def test_one_gather_and_few_bytes():
    sent = []

    class Alone(hvdloss.OneProcess):
        def all_gather_bytes(self, data, name):
            sent.append(len(data))
            return super().all_gather_bytes(data, name)

    n = 10_000
    rng = np.random.default_rng(3)
    metrics = Metrics(
        {"auc": AUC(), "ap": AveragePrecision(), "f1": F1(), "brier": BrierScore()}, communicator=Alone
    )
    p, t = rng.random(n, dtype=np.float32), rng.integers(0, 2, n)
    for a in range(0, n, 100):
        metrics.update(p[a : a + 100], t[a : a + 100])
    found = metrics.compute()
    assert found["auc"] == pytest.approx(sk.roc_auc_score(t, p), rel=1e-12)
    assert len(sent) == 1  # one gather of all metrics
    assert sent[0] < 6 * n + 2000  # a score is told once, for both that need it
    sent.clear()
    metrics = Metrics({"auc": AUC(bins=1000)}, communicator=Alone)
    metrics.update(p, t)
    metrics.compute()
    assert sent[0] < 16 * 1000 + 1000


def test_the_wire_gives_back_what_was_written():
    states = [(np.arange(3), np.ones((2, 2), np.float32).T), (), (np.array(1.5),)]
    head, again = decode_states(encode_states({"a": "b"}, ["ConfigError", "t"], states))
    assert head["fault"] == ["ConfigError", "t"]
    assert head["settings"] == [["a", "b"]]
    for state, other in zip(states, again, strict=True):
        assert [(x.dtype, x.shape) for x in state] == [(x.dtype, x.shape) for x in other]
        assert all((x == y).all() for x, y in zip(state, other, strict=True))
    assert json.dumps(head)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Accuracy(1), "classes=1"),
        (lambda: Accuracy(top_k=2), "top_k=2"),
        (lambda: Accuracy(3, top_k=0), "top_k=0"),
        (lambda: F1(average="mean"), "average='mean'"),
        (lambda: F1(3, average="binary"), "two classes"),
        (lambda: FBeta(beta=0), "beta=0"),
        (lambda: CalibrationError(bins=0), "bins=0"),
        (lambda: CalibrationError(norm="l3"), "norm='l3'"),
        (lambda: ConfusionMatrix(normalize="rows"), "normalize='rows'"),
        (lambda: AUC(bins=1), "bins=1"),
        (lambda: AUC(average="binary"), "average='binary'"),
        (lambda: Metrics({}), "metrics={}"),
        (lambda: Metrics({"a": max}), "hvd.synchronized"),
    ],
)
def test_arguments_that_cannot_be_used(make, text):
    with pytest.raises(hvdloss.ConfigError, match=text):
        make()
