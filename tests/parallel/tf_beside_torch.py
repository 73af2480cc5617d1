"""TensorFlow's adapter in processes where PyTorch's is at work as well."""

from __future__ import annotations

import numpy as np
import torch
from tf_support import Network, cuts, data, difference, part, raised
from tf_tape import exact

import hvdloss.tensorflow as hvd
import hvdloss.torch as hvt
from hvdloss.errors import AgreementError
from tests.ranks import needs

NEEDS = needs("gloo-2")


def before_case(number: int) -> None:
    hvt.init()


def case_the_guard_for_torch():
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2)
    hvt.check_synchronized(model)
    if hvd.rank() == 0:
        with torch.no_grad():
            model.bias[1] += 1e-7
    error = raised(lambda: hvt.check_synchronized(model))
    assert type(error) is AgreementError
    assert "parameter 1 (bias)" in str(error)


@needs("gloo-2", more="gloo-1 gloo-3 gloo-4 mpi-2")
def case_parity_with_torch():
    rng = np.random.default_rng(26)
    worst = 0.0
    for trial in range(5):
        net = Network(rng, out=3)
        n = int(rng.integers(4, 30))
        x, _, w = data(rng, n)
        t, w = rng.integers(0, 3, size=n), w[:, 0]
        xs, ts, ws = part((x, t, w), cuts(rng, n, hvd.size()))
        objective = hvd.Objective("cross_entropy")
        _, g = exact(net, objective, xs, ts, ws, penalty=0.1)

        twins = [torch.nn.Parameter(torch.tensor(p.numpy())) for p in net.parameters]
        theirs = hvt.Objective("cross_entropy")
        optimizer = hvt.DistributedOptimizer(torch.optim.SGD(twins, lr=0.0), objective=theirs)
        prediction = torch.tanh(torch.tensor(xs) @ twins[0] + twins[1]) @ twins[2]
        loss = theirs(prediction, torch.tensor(ts), torch.tensor(ws))
        (loss + 0.1 * sum((p**2).sum() for p in twins)).backward()
        optimizer.step()
        worst = max(worst, difference(g, [p.grad.numpy() for p in twins]))
        assert worst < 1e-10, trial
        assert abs(objective.last_step.loss / optimizer.last_step.loss - 1) < 1e-10
    return {"from torch": worst}
