"""The neutral half of an objective: its arguments are checked, its listeners held weakly."""

from __future__ import annotations

import gc
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hvdloss.errors import ConfigError
from hvdloss.losses.ledger import NONFINITE_MODES
from hvdloss.losses.reduction import REDUCTIONS
from hvdloss.step.objective import _ALIASES, LOSSES, ObjectiveBase, expand_mask_axes, loss_named
from hvdloss.terms import CommunicationCost
from hvdloss.terms.policies.period import SyncPeriod


class Objective(ObjectiveBase):
    """An objective over no framework: each named loss is its own name."""

    def _named_losses(self):
        return {name: (lambda *_, name=name: name) for name in LOSSES}


class Optimizer:
    """Remembers what it was told."""

    def __init__(self):
        self.told = []

    def on_backward_begin(self, row, gradient, graph):
        self.told.append(row)

    def on_foreign_backward(self, name, graph):
        self.others = [*getattr(self, "others", []), name]


# Names


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_own_canonical_name(name):
    assert loss_named(name) == name
    assert Objective(name).name == name
    assert Objective(name)._function() == name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("l2", "mse"),
        ("mean_squared_error", "mse"),
        ("l1", "mae"),
        ("mean_absolute_error", "mae"),
        ("bce", "binary_cross_entropy"),
        ("bce_with_logits", "binary_cross_entropy_with_logits"),
    ],
)
def test_aliases(alias, name):
    assert loss_named(alias) == name
    assert Objective(alias).name == name
    assert Objective(alias).settings() == Objective(name).settings()


def test_every_alias_leads_to_a_loss_and_hides_none():
    assert set(_ALIASES.values()) <= set(LOSSES)
    assert not set(_ALIASES) & set(LOSSES)


@pytest.mark.parametrize("name", ["", "MSE", "mse ", "softmax"])
def test_an_unknown_loss_is_refused_with_the_choices(name):
    for make in (loss_named, Objective):
        with pytest.raises(ConfigError, match=re.escape(f"loss={name!r}")) as caught:
            make(name)
        assert all(known in str(caught.value) for known in LOSSES)


# Arguments


def absolute(prediction, target):
    return abs(prediction - target)


class LossObject:
    """Like a framework's loss: callable, with a reduction of its own."""

    def __init__(self, reduction):
        self.reduction = reduction

    def __call__(self, prediction, target):
        return (prediction - target) ** 2


def test_a_function_is_taken_as_it_is():
    objective = Objective(absolute)
    assert objective.name == "absolute"
    assert objective._function is absolute


@pytest.mark.parametrize("reduction", ["none", None])
def test_a_loss_object_that_does_not_reduce_is_taken(reduction):
    loss = LossObject(reduction)
    objective = Objective(loss)
    assert objective.name == "LossObject"
    assert objective._function is loss


@pytest.mark.parametrize("reduction", ["mean", "sum", "sum_over_batch_size"])
def test_a_loss_object_that_reduces_by_itself_is_refused(reduction):
    with pytest.raises(ConfigError, match=f"LossObject.*reduction='{reduction}'.*reduction=\"none\""):
        Objective(LossObject(reduction))


@pytest.mark.parametrize("loss", [None, 3, 1.5, ["mse"], b"mse"])
def test_what_is_no_loss_is_refused(loss):
    with pytest.raises(ConfigError, match="neither the name of a loss nor a function"):
        Objective(loss)


@pytest.mark.parametrize("reduction", ["average", "", "MEAN", "none"])
def test_an_unknown_reduction_is_refused(reduction):
    with pytest.raises(ConfigError, match=f"reduction={reduction!r}"):
        Objective("mse", reduction=reduction)


def test_terms_are_refused_while_there_are_none():
    with pytest.raises(ConfigError, match="terms="):
        Objective("mse", terms=("communication",))
    assert Objective("mse", terms=()).terms == ()
    assert Objective("mse", terms=[]).terms == ()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_settings_tell_what_must_agree(reduction):
    objective = Objective("l1", reduction=reduction, process_set="evens")
    assert objective.settings() == {"objective": "mae", "reduction": reduction, "nonfinite": "raise"}
    assert json.loads(json.dumps(objective.settings())) == objective.settings()
    assert repr(objective) == f"Objective('mae', reduction={reduction!r})"
    assert objective.process_set == "evens"


def test_the_base_knows_no_framework():
    with pytest.raises(NotImplementedError):
        ObjectiveBase("mse")


# Listeners


def test_all_listeners_are_told_of_each_pass_in_order():
    objective, first, second = Objective("mse"), Optimizer(), Optimizer()
    objective.notify_backward("unheard")
    objective.attach(first)
    objective.notify_backward("a")
    objective.attach(second)
    objective.notify_backward("b")
    assert (first.told, second.told) == (["a", "b"], ["b"])


def test_listeners_are_held_weakly():
    objective, stays, goes = Objective("mse"), Optimizer(), Optimizer()
    objective.attach(goes)
    objective.attach(stays)
    told = goes.told
    del goes
    gc.collect()
    objective.notify_backward("a")
    assert (stays.told, told) == (["a"], [])


def test_dead_listeners_do_not_pile_up():
    objective = Objective("mse")
    for _ in range(50):
        objective.attach(Optimizer())
    assert len(objective._listeners) <= 2


def test_attaching_declares_the_passes_per_step():
    objective, optimizer = Objective("mse"), Optimizer()
    assert objective.passes == 1
    objective.attach(optimizer, passes=4)
    assert objective.passes == 4


def test_objectives_do_not_share_listeners():
    one, other, optimizer = Objective("mse"), Objective("mse"), Optimizer()
    one.attach(optimizer)
    other.notify_backward("a")
    assert optimizer.told == []


# Mask axes


@pytest.mark.parametrize(
    ("element", "prediction", "axes"),
    [
        ((8,), (8,), ()),
        ((), (), ()),
        ((8,), (8, 10), (1,)),
        ((8,), (8, 10, 3), (1, 2)),
        ((8, 5), (8, 5, 10), (2,)),
        ((8, 5), (8, 10, 5), (1,)),
        ((8, 5, 6), (8, 10, 5, 6), (1,)),
        ((), (10,), (0,)),
        ((None,), (None, 10), (1,)),
        ((None, 5), (None, 10, 5), (1,)),
        ((8,), (9,), None),
        ((8,), (9, 10), None),
        ((8, 5), (8,), None),
        ((8, 5), (8, 10, 6), None),
        ((8, 5), (8, 10, 3, 5), None),
    ],
)
def test_where_a_mask_gains_axes(element, prediction, axes):
    assert expand_mask_axes(element, prediction) == axes


@given(
    hnp.array_shapes(min_dims=0, max_dims=3, max_side=4), hnp.array_shapes(min_dims=0, max_dims=4, max_side=4)
)
def test_a_mask_with_these_axes_broadcasts_to_the_prediction(element, prediction):
    axes = expand_mask_axes(element, prediction)
    if axes is not None:
        assert list(axes) == sorted(set(axes))
        mask = np.expand_dims(np.ones(element), axes)
        assert mask.ndim == len(prediction)
        np.broadcast_to(mask, prediction)


def places_of_a_class_axis(element, prediction):
    """Return where one further axis of `prediction` can be: after the elements, or the second."""
    return [
        axis
        for axis in {len(element), 1}
        if len(prediction) == len(element) + 1 and prediction[:axis] + prediction[axis + 1 :] == element
    ]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_a_class_axis_that_could_be_in_two_places_is_not_guessed(n, c, t):
    """A mask on the wrong axis silences elements that count: (N, T) losses of (N, C, T) logits, C = T."""
    places = places_of_a_class_axis((n, t), (n, c, t))
    assert expand_mask_axes((n, t), (n, c, t)) == ((1,) if places == [1] else None)


@given(st.integers(1, 5))
def test_two_places_that_are_the_same_are_no_question(n):
    assert expand_mask_axes((n,), (n, n)) == (1,)


def test_the_places_of_the_helper():
    for n, c, t in itertools.product(range(1, 3), repeat=3):
        assert 1 in places_of_a_class_axis((n, t), (n, c, t))
        assert (2 in places_of_a_class_axis((n, t), (n, c, t))) == (c == t)


# What is not finite


@pytest.mark.parametrize("policy", NONFINITE_MODES)
def test_the_policy_must_agree_between_ranks(policy):
    objective = Objective("mse", nonfinite=policy)
    assert objective.nonfinite == objective.settings()["nonfinite"] == policy


def test_policies_that_cannot_be_followed_are_refused():
    with pytest.raises(ConfigError, match="nonfinite='never'"):
        Objective("mse", nonfinite="never")
    with pytest.raises(ConfigError, match='nonfinite="drop": SoftDice'):
        Objective("soft_dice", nonfinite="drop")
    policies = (SyncPeriod(2),)
    with pytest.raises(ConfigError, match='nonfinite="skip" with SyncPeriod'):
        Objective("mse", nonfinite="skip", terms=(CommunicationCost(policies=policies),))
    Objective("mse", nonfinite="drop", terms=(CommunicationCost(policies=policies),))
    Objective("soft_dice", nonfinite="skip")
