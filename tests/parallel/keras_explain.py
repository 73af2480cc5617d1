"""What a Keras model relies on and who drives its loss, over real ranks: as one process finds."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras_support import before_case
from sklearn.datasets import load_breast_cancer
from tf_support import same_on_all_ranks

import hvdloss
import hvdloss.explain as one_process
import hvdloss.keras as hvd
from hvdloss.tensorflow.integrations.explain import _elements
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")

__all__ = ["before_case"]

DATA = load_breast_cancer()
X = ((DATA.data - DATA.data.mean(0)) / DATA.data.std(0))[:200, :8]
Y = DATA.target[:200]
WEIGHT = np.random.default_rng(0).choice([0.0, 0.5, 2.0], len(X))


def network(outputs=1, **options):
    keras.utils.set_random_seed(5)
    i = keras.Input((8,))
    h = keras.layers.Dropout(0.5)(keras.layers.Dense(6, activation="tanh")(i))
    return keras.Model(i, keras.layers.Dense(outputs, **options)(h))


def mine(seed=0):
    """Return which rows this rank has: uneven, in no order."""
    owner = np.random.default_rng(seed).integers(-2, hvd.size(), len(X)).clip(0)
    return np.flatnonzero(owner == hvd.rank())


def error(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def case_attribution_is_that_of_one_process():
    model, rows = network(), mine()
    errors = []
    for loss in (
        "binary_cross_entropy_with_logits",
        keras.losses.BinaryCrossentropy(from_logits=True, reduction=None),
        lambda y_true, y_pred: (keras.ops.cast(y_true, "float64") - 2 * y_pred) ** 2,
    ):
        objective = hvd.Objective(loss)

        def feed(attribution, some):
            for part in np.array_split(some, 3):
                attribution.update(model(X[part]), Y[part][:, None], WEIGHT[part], ids=part, labels=Y[part])
            return attribution.compute()

        report = feed(hvd.LossAttribution(loss, k=5), rows)
        same_on_all_ranks(report.as_dict())
        one = feed(one_process.LossAttribution(_elements(objective), k=5), np.arange(len(X)))
        assert [s.id for s in report.hardest] == [s.id for s in one.hardest]
        pairs = list(zip(report.classes, one.classes, strict=True))
        errors += [error(a.weighted, b.weighted) for a, b in pairs] + [error(report.loss, one.loss)]
        mean = objective(Y[:, None], model(X), WEIGHT).numpy()
        assert error(report.loss, mean) < 1e-12
    assert max(errors) < 1e-12, errors
    return {"error": max(errors)}


def case_permutation_importance_is_that_of_one_process():
    model, rows = network(2), mine(1)
    options = {"n_repeats": 3, "seed": 6}
    ours = hvd.permutation_importance(
        model, X[rows], Y[rows], loss=hvd.Objective("cross_entropy"), weight=WEIGHT[rows], ids=rows, **options
    )
    same_on_all_ranks(ours.as_dict())

    def losses(y, t):
        return np.log(np.exp(y).sum(1)) - y[np.arange(len(t)), t]

    one = one_process.permutation_importance(
        lambda x: model(x, training=False).numpy(), X, Y, loss=losses, weight=WEIGHT, **options
    )
    found = error(ours.importances, one.importances)
    assert found < 1e-12
    return {"error": found}


def case_shap_and_lime_are_those_of_one_process():
    model, rows = network(2, activation="softmax"), mine(2)
    function = hvd.predict_function(model)
    options = {"explainer": "kernel", "evaluations": 80, "background": 10, "rows": 6}
    ours = hvd.shap_values(model, X[rows], ids=rows, **options)
    one = one_process.shap_values(function, X, **options)
    assert ours.ids.tolist() == one.ids.tolist()
    numbers = {"shap": error(ours.values, one.values)}
    options = {"background": 60, "rows": 4, "num_samples": 150}
    ours = hvd.lime_weights(model, X[rows], ids=rows, **options)
    one = one_process.lime_weights(function, X, **options)
    numbers["lime"] = error(ours.values, one.values)
    assert max(numbers.values()) < 1e-12, numbers
    return numbers


def case_shap_looks_into_models():
    keras.config.set_floatx("float32")
    try:
        model, rows = network(2), mine(3)[:5]
        for explainer in ("gradient", "deep"):
            options = {"explainer": explainer, "background": X[:15], "evaluations": 20, "seed": 1}
            ours = hvd.shap_values(model, X[rows], ids=rows, results="own", **options)
            assert np.array_equal(ours.data, X[rows])
            if explainer == "deep":
                y = model(X[rows].astype(np.float32), training=False).numpy()
                assert np.abs(ours.values.sum(1) + ours.base_values - y).max() < 1e-4
    finally:
        keras.config.set_floatx("float64")


def case_what_fails_on_one_rank_is_raised_on_all():
    def broken(x):
        if hvd.rank() == 1:
            raise OSError("the disk is full")
        return np.zeros((len(x), 2))

    for attempt in (
        lambda: hvd.permutation_importance(broken, X, Y, loss="cross_entropy"),
        lambda: hvd.shap_values(broken, X, rows=4, background=4, explainer="kernel"),
    ):
        with pytest.raises(hvdloss.RankError, match=r"rank 1.*OSError: the disk is full") as raised:
            attempt()
        same_on_all_ranks(str(raised.value))
    with pytest.raises(hvdloss.ConfigError, match="SoftDice is a loss of all elements together"):
        hvd.LossAttribution("soft_dice")
