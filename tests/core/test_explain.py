"""Attribution, permutation importance, SHAP and LIME: sharded as in one process, whatever the split."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.inspection import permutation_importance as scikit_learns
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

import hvdloss
from hvdloss.comm.communicator import simulate
from hvdloss.explain import (
    Attribution,
    LossAttribution,
    lime_weights,
    permutation_importance,
    shap_values,
)
from hvdloss.explain.exchange import RankMessage, exchange_messages
from hvdloss.explain.sample import moves, random_keys, smallest
from hvdloss.losses import Correlation
from hvdloss.metrics import ConfusionMatrix

MODES = ("mean", "sum", "batch_mean")


def squares(prediction, target, weight):
    losses = (np.asarray(prediction) - target) ** 2
    return losses, np.ones(losses.shape) if weight is None else np.asarray(weight)


def everywhere(size, work):
    """Return what `work` gives or raises on each of several ranks."""

    def guarded(ranks):
        try:
            return work(ranks)
        except hvdloss.HvdlossError as error:
            return error

    return simulate(size, guarded)


def same_error(size, work, kind, *words):
    errors = everywhere(size, work)
    assert all(type(error) is kind for error in errors), errors
    assert len({str(error) for error in errors}) == 1, errors
    for word in words:
        assert word in str(errors[0]), errors[0]


@st.composite
def splits(draw, most=4):
    """A small data set, and where each of some ranks has its part of it: whole, disjoint, maybe empty."""
    n = draw(st.integers(1, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.integers(1, most))
    owner = random.integers(0, size, n) if draw(st.booleans()) else np.full(n, size - 1)
    return n, random, [np.flatnonzero(owner == rank) for rank in range(size)]


# -- attribution --------------------------------------------------------------------------------------


@given(splits(), st.sampled_from(MODES), st.booleans(), st.integers(0, 6))
def test_attribution_of_ranks_is_that_of_one_process(split, mode, named, k):
    n, random, parts = split
    y, t = random.normal(size=n).round(1), random.integers(0, 3, n)
    weight = random.choice([0.0, 0.5, 1.0, 2.25], n)
    ids = np.array([f"s{i:03}" for i in random.permutation(n)]) if named else random.permutation(n)
    site = random.choice(["a", "b"], n)

    def feed(attribution, mine):
        for some in np.array_split(mine, 3):  # micro-batches, of which some are empty
            attribution.update(y[some], t[some], weight[some], ids=ids[some], groups={"site": site[some]})
        return attribution.compute()

    one = feed(LossAttribution(squares, k=k, reduction=mode), np.arange(n))
    ours = simulate(
        len(parts),
        lambda c: feed(LossAttribution(squares, k=k, reduction=mode, communicator=c), parts[c.rank]),
    )
    assert all(repr(report) == repr(ours[0]) for report in ours)
    report = ours[0]
    losses = (y - t) ** 2 * weight

    def near(a, b):
        assert math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))

    divisor = {"mean": weight.sum(), "sum": 1.0, "batch_mean": (weight > 0).sum()}[mode]
    near(report.loss, losses.sum() / divisor if weight.any() else float("nan"))
    assert report.elements == (weight > 0).sum() == sum(part.elements for part in report.ranks)
    for rank, part in enumerate(report.ranks):
        near(part.weighted, losses[parts[rank]].sum())
        near(part.share, losses[parts[rank]].sum() / losses.sum() if losses.any() else float("nan"))
    for found, theirs in ((report.classes, one.classes), (report.groups["site"], one.groups["site"])):
        assert {part.label for part in found} == {part.label for part in theirs}
        by_label = {part.label: part for part in theirs}
        for part in found:
            near(part.weighted, by_label[part.label].weighted)
            near(part.loss, by_label[part.label].loss)
    for label in (0, 1, 2):
        for part in report.classes:
            if part.label == label:
                near(part.weighted, losses[t == label].sum())
    present = np.flatnonzero(weight > 0)
    right = sorted(present.tolist(), key=lambda i: (-losses[i], ids[i].item()))[:k]
    assert [sample.id for sample in report.hardest] == [ids[i].item() for i in right]
    for sample, i in zip(report.hardest, right, strict=True):
        assert i in parts[sample.rank]
        assert (sample.label, sample.groups["site"]) == (t[i], site[i])
        near(sample.weighted, losses[i])
    json.dumps(report.as_dict(), allow_nan=False)
    assert str(report).startswith("Loss")


@given(splits(most=3))
def test_parts_merge_in_any_order(split):
    n, random, parts = split
    values, ids = random.normal(size=n).round(1), np.arange(n)
    labels = {"class": random.integers(0, 2, n)}
    each = [
        Attribution.of(4, values[p], np.ones(len(p)), ids[p], {"class": labels["class"][p]}) for p in parts
    ]

    def told(states):
        out = Attribution(4)
        for state in states:
            out = out.merge(state)
        sums = {label: round(part.weighted, 9) for label, part in sorted(out.sums.get("class", {}).items())}
        return [one["id"] for one in out.samples], sums, out.count

    whole = told([Attribution.of(4, values, np.ones(n), ids, labels)])
    assert told(each) == told(each[::-1]) == whole
    again = [Attribution.from_note(json.loads(json.dumps(state.note()))) for state in each]
    assert told(again) == whole


def test_samples_without_ids_are_counted_through_the_ranks():
    def work(c):
        attribution = LossAttribution(squares, communicator=c, k=2)
        for value in ([1.0, 2.0], [3.0]) if c.rank else ([5.0], []):
            attribution.update(np.array(value), np.zeros(len(value)))
        return [(one.id, one.rank) for one in attribution.compute().hardest]

    assert simulate(3, work)[0] == [(0, 0), (3, 1)]  # 5^2 on rank 0; 3^2 on ranks 1 and 2: the smaller id


def test_tokens_count_for_their_sample_and_their_own_class():
    attribution = LossAttribution(squares, k=1, classes=["pad", "word", "never"], reduction="sequence_mean")
    y, t = np.array([[2.0, 1.0], [4.0, 9.0]]), np.array([[1, 1], [1, 0]])
    attribution.update(y, t, np.array([[1.0, 1.0], [1.0, 0.0]]), ids=["first", "second"])
    report = attribution.compute()
    assert report.loss == (0.5 * 1 + 9) / 2
    assert [(part.label, part.elements) for part in report.classes] == [("pad", 0), ("word", 3), ("never", 0)]
    assert (report.hardest[0].id, report.hardest[0].loss) == ("second", 9.0)


@pytest.mark.parametrize(
    ("arguments", "kind", "word"),
    [
        (([np.nan], [0.0]), hvdloss.NonFiniteLossError, "the loss of element (0,) is nan"),
        (([1.0], [0.0], [-1.0]), hvdloss.WeightError, "-1.0"),
        (([1.0, 2.0], [0.0, 0.0, 0.0]), hvdloss.RankError, "ValueError"),
        (([1.0], [0.0], [1.0], [0.5]), hvdloss.ConfigError, "ids"),
        (([1.0], [0.0], [1.0], [1, 2]), hvdloss.ShapeError, "ids"),
    ],
)
def test_a_bad_batch_of_one_rank_is_told_to_all(arguments, kind, word):
    def work(c):
        attribution = LossAttribution(squares, communicator=c)
        attribution.update(np.ones(2), np.ones(2))
        if c.rank == 1:
            names = ("prediction", "target", "weight", "ids")
            attribution.update(
                **{name: np.array(value) for name, value in zip(names, arguments, strict=False)}
            )
        return attribution.compute()

    same_error(3, work, kind, "rank 1", "batch 2", word)


def test_ranks_must_want_the_same():
    same_error(
        2, lambda c: LossAttribution(squares, k=c.rank, communicator=c).compute(), hvdloss.AgreementError, "k"
    )

    def mixed(c):
        attribution = LossAttribution(squares, communicator=c)
        attribution.update(np.ones(1), np.zeros(1), ids=["a"] if c.rank else [1])
        return attribution.compute()

    same_error(2, mixed, hvdloss.AgreementError, "integers", "strings")


# -- permutation --------------------------------------------------------------------------------------

X, Y = load_diabetes(return_X_y=True)
X, Y = X[:120], Y[:120]
RIDGE = Ridge(0.1).fit(X, Y)


def error_of(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(0, 1000), st.booleans())
def test_permutation_importance_of_ranks_is_scikit_learns(size, seed, consecutive):
    random = np.random.default_rng(seed)
    weight = random.choice([0.0, 0.5, 2.0], len(X))
    theirs = scikit_learns(
        RIDGE,
        X,
        Y,
        scoring="neg_mean_squared_error",
        random_state=seed,
        n_repeats=3,
        sample_weight=weight,
    )
    owner = random.integers(0, size, len(X))
    owner = np.sort(owner) if consecutive else owner

    def work(c):
        mine = np.flatnonzero(owner == c.rank)
        return permutation_importance(
            RIDGE.predict,
            X[mine],
            Y[mine],
            loss=lambda y, t: (y - t) ** 2,
            weight=weight[mine],
            ids=None if consecutive else mine,
            n_repeats=3,
            seed=seed,
            batch_size=50,
            communicator=c,
        )

    for ours in simulate(size, work):
        assert error_of(ours.importances, theirs.importances) < 1e-12
        assert error_of(ours.importances_mean, theirs.importances_mean) < 1e-12
        assert error_of(ours.importances_std, theirs.importances_std) < 1e-12


def test_shuffling_within_ranks_would_be_something_else():
    """The comparison above can fail: what is shuffled rank by rank has another importance."""
    order = np.argsort(X[:, 2])  # ranks that differ in the feature
    whole = permutation_importance(RIDGE.predict, X[order], Y[order], loss=lambda y, t: (y - t) ** 2)
    halves = [
        permutation_importance(RIDGE.predict, X[part], Y[part], loss=lambda y, t: (y - t) ** 2)
        for part in np.array_split(order, 2)
    ]
    apart = np.mean([half.importances_mean[2] for half in halves])
    assert apart < 0.6 * whole.importances_mean[2]


@pytest.mark.parametrize("loss", [Correlation(), "accuracy"])
def test_functions_of_sums_and_groups_of_columns(loss):
    target = (Y.mean() < Y).astype(int) if loss == "accuracy" else Y

    def predict(x):
        return (RIDGE.predict(x) > Y.mean()).astype(float) if loss == "accuracy" else RIDGE.predict(x)

    options = {
        "loss": loss,
        "features": {"body": ["bmi", "bp"], "age": "age", "rest": [4, 5, 6]},
        "feature_names": ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"],
        "seed": 3,
    }
    one = permutation_importance(predict, X, target, **options)
    assert one.features == ["body", "age", "rest"]
    assert one.importances_mean[0] > 0.01
    cut = [0, 0, 70, 120]

    def work(c):
        mine = slice(cut[c.rank], cut[c.rank + 1])
        return permutation_importance(predict, X[mine], target[mine], communicator=c, **options)

    for ours in simulate(3, work):
        assert math.isclose(ours.baseline, one.baseline, rel_tol=1e-12)
        assert np.abs(ours.importances - one.importances).max() < 1e-12
    assert "body" in str(one)
    assert one.as_dict()["features"] == one.features


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"x": X[:40, :9]}, hvdloss.AgreementError, ["number of features", "rank 1 has 9, rank 0 has 10"]),
        ({"y": Y[:3]}, hvdloss.ShapeError, ["rank 1", "y of shape (3,)"]),
        ({"weight": np.ones(3)}, hvdloss.ShapeError, ["rank 1", "weight"]),
        ({"predict": lambda x: 1 / 0}, hvdloss.RankError, ["rank 1", "predict raised ZeroDivisionError"]),
        ({"predict": lambda x: np.full(len(x), np.nan)}, hvdloss.NonFiniteLossError, ["rank 1", "nan"]),
        ({"predict": lambda x: x[:3, 0]}, hvdloss.ShapeError, ["rank 1", "(3,) for 40 rows"]),
        ({"n_repeats": 0}, hvdloss.ConfigError, ["rank 1", "n_repeats=0"]),
        ({"seed": 7}, hvdloss.AgreementError, ["seed"]),
        ({"features": [11]}, hvdloss.ConfigError, ["rank 1", "column 11"]),
        ({"features": ["no"]}, hvdloss.ConfigError, ["rank 1", "'no'"]),
        ({"ids": np.zeros(40, int)}, hvdloss.AgreementError, ["ids"]),
        ({"x": X[0]}, hvdloss.ShapeError, ["rank 1", "rows and features"]),
        ({"x": X[:40].astype(str)}, hvdloss.ConfigError, ["rank 1", "numbers"]),
    ],
)
def test_what_is_wrong_on_one_rank_is_told_to_all(change, kind, words):
    def work(c):
        given = {"predict": RIDGE.predict, "x": X[:40], "y": Y[:40], "loss": lambda y, t: (y - t) ** 2}
        return permutation_importance(**given | (change if c.rank == 1 else {}), communicator=c)

    same_error(3, work, kind, *words)


def test_failing_late_is_told_to_all():
    calls = {}

    def work(c):
        def predict(x):
            calls[c.rank] = calls.get(c.rank, 0) + 1
            if c.rank == 2 and calls[2] > 8:
                raise KeyError("gone")
            return RIDGE.predict(x)

        return permutation_importance(predict, X[:30], Y[:30], loss=lambda y, t: (y - t) ** 2, communicator=c)

    same_error(3, work, hvdloss.RankError, "rank 2", "permuting 'x1'", "KeyError")


def test_ids_must_tell_rows_apart():
    def work(c):
        ids = np.arange(20) + 19 * c.rank
        return permutation_importance(
            RIDGE.predict, X[:20], Y[:20], ids=ids, loss=lambda y, t: (y - t) ** 2, communicator=c
        )

    same_error(2, work, hvdloss.ConfigError, "19 comes twice")


def test_a_metric_of_several_numbers_is_refused():
    def work(c):
        return permutation_importance(
            lambda x: (x[:, 2] > 0).astype(int),
            X,
            (Y > 100).astype(int),
            loss=ConfusionMatrix(),
            communicator=c,
        )

    same_error(2, work, hvdloss.ConfigError, "ConfusionMatrix", "no single number")


def test_nothing_to_permute():
    same_error(
        2,
        lambda c: permutation_importance(RIDGE.predict, X[:0], Y[:0], loss="accuracy", communicator=c),
        hvdloss.ConfigError,
        "no rows on any rank",
    )


# -- the fair sample ----------------------------------------------------------------------------------


@given(splits(), st.integers(1, 10))
def test_the_sample_is_the_same_for_every_split(split, k):
    n, _, parts = split
    ids = np.arange(n) * 7
    keys = random_keys(ids, 5, 1)
    whole = ids[smallest(keys, ids, k)]
    drawn = [ids[p][smallest(random_keys(ids[p], 5, 1), ids[p], k)] for p in parts]
    union = np.concatenate(drawn)
    assert union[smallest(random_keys(union, 5, 1), union, k)].tolist() == whole.tolist()


def test_the_sample_is_fair():
    counts, heavy, draws = np.zeros(20), 0, 4000
    weight = np.r_[3.0, np.ones(19)]
    for seed in range(draws):
        counts[smallest(random_keys(np.arange(20), seed, 1), np.arange(20), 5)] += 1
        heavy += int(np.argmin(random_keys(np.arange(20), seed, 1, weight)) == 0)
    expected, deviation = draws / 4, math.sqrt(draws / 4 * 3 / 4)
    assert np.abs(counts - expected).max() < 4.5 * deviation
    assert abs(heavy / draws - 3 / 22) < 0.025
    assert np.isinf(random_keys(np.arange(2), 0, 1, np.array([0.0, 1.0]))).tolist() == [True, False]
    texts = np.array(["a", "b", "c"])
    assert len(set(random_keys(texts, 0, 1))) == 3


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_work_is_shared_evenly_and_little_moves(counts):
    works = moves(counts)
    each = np.bincount(works, minlength=len(counts))
    assert len(works) == sum(counts)
    assert each.max() - each.min() <= 1
    owner = np.repeat(np.arange(len(counts)), counts)
    over = sum(max(0, has - share) for has, share in zip(counts, each, strict=True))
    assert (works != owner).sum() == over


# -- SHAP and LIME ------------------------------------------------------------------------------------

PLAIN = load_breast_cancer()
ROWS, LABELS = StandardScaler().fit_transform(PLAIN.data)[:150, :6], PLAIN.target[:150]
LOGISTIC = LogisticRegression().fit(ROWS, LABELS)


@pytest.mark.parametrize(
    # What the last two need of shap is compiled anew in every process, for ten seconds.
    "explainer",
    [
        "kernel",
        "sampling",
        *(pytest.param(name, marks=pytest.mark.more) for name in ("exact", "permutation")),
    ],
)
@pytest.mark.parametrize("cut", [[0, 0, 13, 20], [0, 20, 20, 20]])
def test_shap_values_of_ranks_are_those_of_one_process(explainer, cut):
    options = {"background": 8, "explainer": explainer, "seed": 5}
    if explainer != "exact":
        options["evaluations"] = 60
    before = np.random.get_state()[1].tolist()
    one = shap_values(LOGISTIC.predict_proba, ROWS[:20], data=ROWS, **options)
    assert np.random.get_state()[1].tolist() == before
    additive = one.values.sum(axis=1) + one.base_values
    assert np.abs(additive - LOGISTIC.predict_proba(ROWS[:20])).max() < 1e-6
    asked = {}

    def work(c, results):
        def predict(x):
            asked[c.rank] = asked.get(c.rank, 0) + 1
            return LOGISTIC.predict_proba(x)

        mine, data = slice(cut[c.rank], cut[c.rank + 1]), ROWS[100 * c.rank : 100 * (c.rank + 1)]
        return shap_values(predict, ROWS[mine], data=data, results=results, communicator=c, **options)

    for ours in simulate(3, lambda c: work(c, "all")):
        assert np.array_equal(ours.values, one.values)
        assert np.array_equal(ours.base_values, one.base_values)
        assert np.array_equal(ours.data, ROWS[:20])
        assert ours.ids.tolist() == list(range(20))
    assert set(asked) == {0, 1, 2}  # the rank without rows works too
    for rank, ours in enumerate(simulate(3, lambda c: work(c, "own"))):
        mine = slice(cut[rank], cut[rank + 1])
        assert np.array_equal(ours.data, ROWS[mine])
        assert ours.ids.tolist() == list(range(20))[mine]
        assert len(ours.ids) == 0 or np.array_equal(ours.values, one.values[mine])


def test_rows_to_explain_are_drawn_alike_wherever_they_lie():
    options = {"rows": 5, "background": 6, "explainer": "kernel", "evaluations": 60}
    one = shap_values(LOGISTIC.predict_proba, ROWS, **options)
    random = np.random.default_rng(0)
    owner = random.integers(0, 2, len(ROWS))

    def work(c):
        mine = np.flatnonzero(owner == c.rank)
        return shap_values(LOGISTIC.predict_proba, ROWS[mine], ids=mine, communicator=c, **options)

    for ours in simulate(2, work):
        assert ours.ids.tolist() == one.ids.tolist()
        assert np.array_equal(ours.values, one.values)
        assert np.array_equal(ours.data, ROWS[one.ids])


@pytest.mark.parametrize("mode", ["classification", "regression"])
def test_lime_of_ranks_is_that_of_one_process(mode):
    predict = LOGISTIC.predict_proba if mode == "classification" else LOGISTIC.decision_function
    options = {"mode": mode, "rows": 4, "background": 150, "num_samples": 200, "discretize": False}
    one = lime_weights(predict, ROWS, **options)
    assert one.values.shape == (4, 6, 2 if mode == "classification" else 1)
    if mode == "regression":  # a linear model around a linear model
        assert one.scores.min() > 0.99
        right = LOGISTIC.coef_[0] * ROWS.std(axis=0)
        assert np.corrcoef(one.values[:, :, 0].mean(axis=0), right)[0, 1] > 0.99

    def work(c):
        ids = np.arange(len(ROWS))[c.rank :: 3]
        return lime_weights(predict, ROWS[ids], ids=ids, communicator=c, **options)

    for ours in simulate(3, work):
        assert np.array_equal(ours.values, one.values)
        assert np.array_equal(ours.scores, one.scores)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"x": ROWS[:9, :5]}, hvdloss.AgreementError, ["shape of a row", "rank 1 has [5], rank 0 has [6]"]),
        ({"predict": lambda x: 1 / 0}, hvdloss.RankError, ["rank 1", "ZeroDivisionError"]),
        ({"predict": lambda x: np.full(len(x), np.nan)}, hvdloss.NonFiniteLossError, ["rank 1", "nan"]),
        ({"seed": 2}, hvdloss.AgreementError, ["seed"]),
        ({"background": ROWS[:3]}, hvdloss.AgreementError, ["background"]),
        ({"background": 0}, hvdloss.ConfigError, ["rank 1", "background=0"]),
        ({"weight": -np.ones(9)}, hvdloss.WeightError, ["rank 1", "-1.0"]),
        ({"ids": [1, 2]}, hvdloss.ShapeError, ["rank 1", "ids"]),
        ({"results": "some"}, hvdloss.ConfigError, ["rank 1", "some"]),
    ],
)
def test_what_shap_cannot_do_on_one_rank_is_told_to_all(change, kind, words):
    def work(c):
        given = {"predict": LOGISTIC.predict_proba, "x": ROWS[:9], "explainer": "kernel", "background": 5}
        return shap_values(**given | (change if c.rank == 1 else {}), communicator=c)

    same_error(3, work, kind, *words)


@pytest.mark.parametrize(
    ("library", "function"), [("shap", shap_values), ("lime.lime_tabular", lime_weights)]
)
def test_a_missing_library_is_told_with_its_extra(monkeypatch, library, function):
    monkeypatch.setitem(sys.modules, library, None)
    same_error(
        2,
        lambda c: function(LOGISTIC.predict_proba, ROWS[:4], communicator=c),
        hvdloss.ConfigError,
        library.partition(".")[0],
        "hvdloss[explain]",
    )


def test_an_unknown_explainer():
    with pytest.raises(hvdloss.ConfigError, match="explainer='tree' is not known"):
        shap_values(LOGISTIC.predict_proba, ROWS[:4], explainer="tree")


def test_what_ranks_tell_each_other_arrives():
    def work(c):
        told = exchange_messages(
            c, "n", "testing", lambda: RankMessage({"rank": c.rank}, a=np.full(c.rank, "x"), b=np.eye(2))
        )
        return [(one.note, one["a"].tolist(), one["b"].shape) for one in told]

    assert simulate(2, work)[0] == [({"rank": 0}, [], (2, 2)), ({"rank": 1}, ["x"], (2, 2))]
