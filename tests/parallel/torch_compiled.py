"""Models compiled to machine code; takes seconds of every rank, so it runs under few launches."""

from __future__ import annotations

import shutil
import unittest

import torch
from torch_support import Trial, before_case, generator, network, regression

import hvdloss.torch as hvd
from tests.ranks import needs

NEEDS = needs(more="gloo-2")

__all__ = ["before_case"]


def case_compiled_by_inductor():
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise unittest.SkipTest("no C++ compiler for torch.compile")
    g = generator(1)
    trial = Trial(network(g), passes=2)
    compiled = torch.compile(trial.model)
    for _ in range(3):
        step = regression(g, [[4 + rank] * (1 + rank) for rank in range(2)])
        trial.optimizer.zero_grad()
        for b in step[hvd.rank()]:
            trial.objective(compiled(b.x), b.y, weight=b.weight).backward()
        trial.optimizer.step()
        trial.compare(step)
    return trial.finish()
