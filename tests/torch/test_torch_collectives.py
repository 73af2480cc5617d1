"""Collectives with gradients, under real ranks and on one."""

from __future__ import annotations

import doctest

import pytest
import torch

import hvdloss.torch as hvd
from hvdloss.comm import collectives as common
from hvdloss.torch import collectives as c
from tests.ranks import Case, parallel_cases


@parallel_cases("torch_collectives", group="torch")
def test_collectives(case: Case, request: pytest.FixtureRequest) -> None:
    case.check(request)


@pytest.mark.parametrize(
    "function",
    [
        c.all_reduce,
        c.all_gather,
        c.reduce_scatter,
        lambda x: c.broadcast(x, 0),
        c.shift,
        c.copy_to_ranks,
        lambda x: c.all_reduce(x, replicated=True),
        lambda x: c.all_gather(x, replicated=True),
    ],
)
@pytest.mark.parametrize("initialized", [False, True])
def test_one_rank(function, initialized):
    if initialized:
        hvd.init()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    out = function(x)
    assert torch.equal(out, x)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_the_result_is_no_alias():
    x = torch.ones(2)
    for out in (c.all_reduce(x), c.all_gather(x), c.reduce_scatter(x), c.broadcast(x, 0), c.shift(x)):
        out += 1
    assert x.tolist() == [1.0, 1.0]


def test_examples():
    assert doctest.testmod(common).failed == doctest.testmod(c).failed == 0
    assert common.even_sizes(3, 4) == [1, 1, 1, 0]
