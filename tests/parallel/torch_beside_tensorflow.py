"""Both adapters imported, PyTorch's initialised: ranks know that they belong together all the same."""

from __future__ import annotations

import torch
from torch_support import Trial, before_case, generator, network, regression, same_on_all_ranks, uneven

import hvdloss
import hvdloss.tensorflow
import hvdloss.torch as hvd
from tests.ranks import needs

NEEDS = needs("gloo-2")

__all__ = ["before_case"]


def case_gradients_are_still_reduced():
    g = generator(1)
    trial = Trial(network(g))
    for _ in range(2):
        trial.step(regression(g, uneven(), weighted=False))
    return trial.finish()


def case_the_guard_still_compares():
    hvd.check_synchronized(network(generator(2)))
    model = network(generator(3 + hvd.rank()))
    try:
        hvd.check_synchronized(model)
    except hvdloss.AgreementError as error:
        same_on_all_ranks(str(error))
    else:
        raise AssertionError("ranks with other parameters were not told apart")
    assert torch.is_tensor(next(model.parameters()))
