"""Several losses with a denominator each: their parts of a step, its report, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss.errors import ConfigError, NoWeightError, UsageError
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.report import StepReport
from hvdloss.step.objective import ObjectiveBase
from hvdloss.step.several import (
    COLUMNS,
    Objectives,
    check_expected,
    check_outside,
    check_weights,
    gradient_factor,
    loss_reports,
)
from hvdloss.terms import CommunicationCost

OPS = NumpyOps()


class Objective(ObjectiveBase[np.ndarray]):
    def _named_losses(self):
        return dict.fromkeys(("mse", "mae", "cross_entropy"), lambda y, t: (y - t) ** 2)


def row(numerator=0.0, weight=0.0, elements=0.0, factors=(), nonfinite=0.0):
    """Return a loss's sums over ranks, whose calls were multiplied with `factors`."""
    return [numerator, weight, elements, len(factors), sum(factors), sum(c * c for c in factors), nonfinite]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 4))
def test_any_split_of_any_tasks_gives_the_gradient_of_one_process(seed, passes, tasks):
    """By linear losses w * (x theta): gradients that can be written down; a pass may lack any task."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=tasks)
    calls = []  # (pass, task, x, w)
    for one in range(passes):
        for task in range(tasks):
            if rng.random() < 0.7:
                n = int(rng.integers(0, 4))
                calls.append(
                    (one, task, rng.normal(size=(n, 3)), rng.uniform(size=n) * (rng.random(n) < 0.7))
                )
    weights = [sum(w.sum() for _, t, _, w in calls if t == task) for task in range(tasks)]
    right = sum((factors[t] * (w @ x) / weights[t] for _, t, x, w in calls if weights[t]), start=np.zeros(3))
    penalty = rng.normal(size=3)
    found = np.zeros(3)
    for one in range(passes):
        gradient = penalty.copy()
        for at, task, x, w in calls:
            own = w.sum()
            if at != one or not own:
                continue
            factor = gradient_factor(OPS, OPS.scalar64(own, w), np.float64(weights[task]), np.float64(passes))
            gradient += factors[task] * factor * (w @ x) / own
        found += gradient / passes  # as the optimizer averages passes
    np.testing.assert_allclose(found, right + penalty, rtol=1e-12, atol=1e-12)


def test_a_task_without_any_weight_has_no_part():
    assert gradient_factor(OPS, np.float64(0.0), np.float64(0.0), np.float64(3.0)) == 0


def test_names_of_objectives():
    a, b, c = Objective("mse"), Objective("mse"), Objective("mae")
    assert list(Objectives([a, b, c])) == ["mse", "mse.1", "mae"]
    named = Objectives({"a": a, "c": c})
    assert named["c"] is c
    assert named.name == "a + c"
    assert named.settings()["objectives"] == ["a", "c"]
    assert named.settings()["c.objective"] == "mae"
    assert named.settings() != Objectives({"c": c, "a": a}).settings()
    named.passes = 3
    assert (a.passes, c.passes, named.passes) == (3, 3, 3)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: [], "Objective of its own"),
        (lambda: [Objective("mse")] * 2, "Objective of its own"),
        (lambda: {"a": "mse"}, "'mse'"),
        (lambda: {1: Objective("mse")}, "names"),
        (lambda: [Objective("mse", nonfinite="skip"), Objective("mae")], "'raise' and 'skip'"),
        (lambda: [Objective("mse", nonfinite="drop")], '"drop"'),
        (lambda: [Objective("mse", terms=(CommunicationCost(),))], "terms="),
        (
            lambda: [Objective("mse", process_set=object()), Objective("mae", process_set=object())],
            "process_set",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(make, word):
    with pytest.raises(ConfigError, match=word):
        Objectives(make())


def two(**reductions):
    return Objectives({"a": Objective("mse", reduction=reductions.get("a")), "b": Objective("mae")})


def test_the_report_has_a_line_for_each_loss():
    table = np.array([row(6.0, 4.0, 5.0, [2.0, 2.0]), row()])
    losses = loss_reports(two(), np.array([4.0, 0.0]), table, 1, 2)
    assert (losses["a"].value, losses["a"].weight, losses["a"].elements, losses["a"].factor) == (
        1.5,
        4.0,
        5,
        2.0,
    )
    assert losses["a"].part == 3.0
    assert math.isnan(losses["b"].value)
    assert (losses["b"].part, losses["b"].factor, losses["b"].weight) == (0.0, 0.0, 0.0)
    report = StepReport.of(1, [], "mean", losses=losses)
    assert report.loss == report.objective_value == 3.0
    assert report.as_dict()["losses"]["a"] == {"value": 1.5, "weight": 4.0, "elements": 5, "factor": 2.0}
    assert len(COLUMNS) == table.shape[1]


def test_a_sum_is_divided_by_nothing():
    table = np.array([row(6.0, 4.0, 5.0, [1.0]), row(6.0, 4.0, 5.0, [1.0])])
    losses = loss_reports(two(a="sum"), np.array([0.5, 4.0]), table, 1, 2)
    assert (losses["a"].value, losses["b"].value) == (6.0, 1.5)


def test_a_loss_that_is_not_finite_has_no_value():
    table = np.array([row(6.0, 4.0, 5.0, [1.0], nonfinite=1.0), row(6.0, 4.0, 5.0, [1.0])])
    losses = loss_reports(two(), np.array([4.0, 4.0]), table, 1, 2)
    assert math.isnan(losses["a"].value)
    assert math.isnan(losses["a"].part)
    assert losses["b"].value == 1.5


@given(st.floats(-1e6, 1e6), st.integers(1, 2000))
def test_the_same_factor_on_any_number_of_ranks_is_the_same(factor, ranks):
    table = np.array([row(1.0, 1.0, 1.0, [factor] * ranks), row()])
    losses = loss_reports(two(), np.array([1.0, 0.0]), table, 1, 2)
    assert losses["a"].factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("other", [1.0001, 0.0, -1.0, 2.0])
def test_other_factors_on_some_ranks_are_refused(other):
    table = np.array([row(), row(1.0, 1.0, 1.0, [1.0] * 3 + [other])])
    with pytest.raises(UsageError, match="step 7: the loss 'b' was multiplied with different numbers"):
        loss_reports(two(), np.array([0.0, 1.0]), table, 7, 2)


def test_a_loss_of_all_ranks_is_called_by_all_of_them():
    objectives = Objectives({"dice": Objective("soft_dice"), "b": Objective("mae")})
    objectives.passes = 2
    table = np.array([row(0.5, 4.0, 5.0, [1.0] * 6), row(6.0, 4.0, 5.0, [1.0])])
    assert loss_reports(objectives, np.array([1.0, 4.0]), table, 1, 3)["dice"].value == 0.5
    with pytest.raises(UsageError, match=r"'dice' of all ranks' elements was called 6 times, and not 8"):
        loss_reports(objectives, np.array([1.0, 4.0]), table, 1, 4)


def test_no_weight_in_any_loss_is_an_error():
    with pytest.raises(NoWeightError, match=r"step 2: no element.*a, b"):
        loss_reports(two(), np.zeros(2), np.array([row(factors=[1.0]), row()]), 2, 2)


def test_what_was_said_ahead():
    objectives = two(a="sum")
    objectives.passes = 4
    assert check_weights(objectives, {"b": 3}, 2) == [0.0, 3.0]
    for weights, passes, word in (
        ({"c": 1.0}, 1, "'c'"),
        ({"b": -1.0}, 1, "-1.0"),
        ({"b": math.nan}, 1, "nan"),
        ({"b": 1.0}, 5, "passes=5"),
        ({"b": 1.0}, True, "passes=True"),
    ):
        with pytest.raises(ConfigError, match=word):
            check_weights(objectives, weights, passes)

    def error(said, found, passes=(2, 2), factors=(1.0, 1.0)):
        return str(check_expected(objectives, said, found, passes, factors) or "")

    assert not error({"a": 0.0, "b": 3.0}, [0.5, 3.0 + 1e-7])  # of a sum nothing has to be known
    assert "weighed 3.1" in error({"b": 3.0}, [0.5, 3.1])
    assert "passes=2" in error({"b": 3.0}, [0.5, 3.0], (2, 1))
    assert "1/4" in error({"b": 3.0}, [0.5, 3.0], factors=(0.25, 0.25))
    assert "1/2" in error({"b": 3.0}, [0.5, 3.0], factors=(0.5, 0.5))
    assert not error({"b": 3.0}, [0.5, 3.0], factors=(1.0, 0.5))


def test_gradients_beside_the_losses_are_the_same_everywhere():
    check_outside(["p", "q"], np.array([[3.0, 3 * 0.1, 3 * 0.1**2], [0.0, 0.0, 0.0]]))
    check_outside(["p"], np.array([[2.0, math.nan, math.nan]]))  # which the step is judged for
    with pytest.raises(UsageError, match="gradient of q did not come"):
        check_outside(["p", "q"], np.array([[0.0, 0.0, 0.0], [2.0, 3.0, 5.0]]))
