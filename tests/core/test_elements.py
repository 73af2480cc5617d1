"""What a loss must be to have elements: shapes, options of classes, reductions, order of arguments."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdloss.errors import ConfigError, ShapeError
from hvdloss.losses.elements import (
    ClassOptions,
    check_object,
    per_element_error,
    prediction_first,
    reduction_of,
)

GOOD = {  # losses, prediction, target
    "one number per sample": ((8,), [(8, 3)], [(8, 3)]),
    "one per entry": ((8, 3), [(8, 3)], [(8, 3)]),
    "a kept axis": ((8, 1), [(8, 3)], [(8, 3)]),
    "classes last": ((8, 5), [(8, 5, 10)], [(8, 5)]),
    "classes second": ((8, 5), [(8, 10, 5)], [(8, 5)]),
    "probabilities": ((8, 5, 6), [(8, 10, 5, 6)], [(8, 10, 5, 6)]),
    "flat tokens": ((40,), [(8, 5, 10)], [(8, 5)]),
    "the next token": ((8, 4), [(8, 5, 10)], [(8, 5)]),
    "the next token, flat": ((32,), [(8, 5, 10)], [(8, 5)]),
    "some columns": ((8, 2), [(8, 10)], [(8, 5)]),
    "one element": ((), [()], [()]),
    "one element of classes": ((), [(10,)], [()]),
    "a prediction of several": ((8,), [(8, 2), (8, 3)], []),
    "time first": ((8,), [(20, 8, 5)], [(8, 4)]),
    "nothing known": ((7,), [], []),
    "no sample": ((0,), [(0, 3)], [(0,)]),
    "axes known later": ((None,), [(None, 3)], [(None, 3)]),
}
BAD = {
    "a mean": ((), [(8, 3)], [(8, 3)]),
    "a mean of one": ((), [(1,)], [(1,)]),
    "a mean of none": ((), [(0,)], [(0,)]),
    "a mean of what is unknown": ((), [], []),
    "a mean that keeps its axis": ((1,), [(8, 3)], [(8,)]),
    "a mean over samples": ((3,), [(8, 3)], [(8, 3)]),
    "pairs": ((8, 8), [(8, 1)], [(8,)]),
    "selected": ((5,), [(8,)], [(8,)]),
    "twice": ((16,), [(8,)], [(8,)]),
}


@pytest.mark.parametrize("name", GOOD)
def test_shapes_that_may_be_of_elements(name):
    assert per_element_error(*GOOD[name], "f", 0) is None


@pytest.mark.parametrize("name", BAD)
def test_shapes_that_cannot_be_of_elements(name):
    error = per_element_error(*BAD[name], "mine", 3)
    assert isinstance(error, ShapeError)
    assert "loss=mine" in str(error)
    assert "rank 3" in str(error)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_whatever_begins_as_the_batch_does_is_taken(shape, data):
    kept = data.draw(st.integers(1, len(shape)))
    assert per_element_error(tuple(shape[:kept]), [tuple(shape)], [], "f", 0) is None


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_no_batch_makes_one_number_its_elements(shape):
    """Whatever its size: or the error would be some ranks' only."""
    assert per_element_error((), [tuple(shape)], [tuple(shape)], "f", 0) is not None


def test_a_reduction_is_said_once():
    assert reduction_of(None, None, "f") == reduction_of(None, "none", "f") == "mean"
    assert reduction_of("sum", "none", "f") == reduction_of(None, "sum", "f") == "sum"
    assert reduction_of("mean", "mean", "f") == "mean"
    with pytest.raises(ConfigError, match=r"reduction='sum'.*loss=f.*reduction='mean'"):
        reduction_of("sum", "mean", "f")


class Loss:
    """As users write them."""

    def __init__(self, **said):
        vars(self).update(said)

    def __call__(self, a, b):
        return a - b


@pytest.mark.parametrize(
    "said", [{}, {"weight": 0.5}, {"ignore_index": None}, {"reduction": "none"}, {"gamma": 2}]
)
def test_objects_that_say_nothing_of_elements_are_believed(said):
    check_object(Loss(**said), "Loss")


@pytest.mark.parametrize(
    "said",
    [
        {"reduction": "mean"},
        {"ignore_index": 255},
        {"ignore_class": 0},
        {"weight": [1, 2]},
        {"class_weights": np.ones(2)},
    ],
)
def test_objects_with_a_mean_of_their_own_are_refused(said):
    (option,) = said
    for loss in (Loss(**said), functools.partial(lambda a, b, **_: a, **said)):
        with pytest.raises(ConfigError, match=option):
            check_object(loss, "Loss")


@pytest.mark.parametrize(
    ("function", "first"),
    [
        (lambda y_true, y_pred: 0, False),
        (lambda labels, logits, axis=-1: 0, False),
        (lambda input, target: 0, True),
        (lambda a, b: 0, None),
        (lambda target: 0, None),
        (functools.partial(lambda labels, logits, x: 0, x=1), False),
        (np.add, None),
    ],
)
def test_names_tell_the_order(function, first):
    assert prediction_first(function) is first


def test_options_of_classes():
    given = {"ignore_index": 3, "label_smoothing": 0.5, "class_weight": np.array([1.0, 2.0])}
    options = ClassOptions.make("cross_entropy", **given)
    assert options.settings() == {"ignore_index": 3, "label_smoothing": 0.5, "class_weight": [1.0, 2.0]}
    assert ClassOptions().settings() == {}
    options.check_classes(2)
    options.check_classes(None)
    with pytest.raises(ShapeError, match="2 entries"):
        options.check_classes(3)
