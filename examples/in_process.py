"""Ranks started from within a Python program: ``horovod.run()``, or Ray's actors.

A function is sent to the ranks, trains there on scikit-learn's digits, and what it returns comes back: here
the parameters, which are compared with those of one process.

    python examples/in_process.py --ranks 2
    python examples/in_process.py --ranks 2 --launcher ray      # pip install ray
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

EPOCHS, BATCH, RATE = 3, 32, 0.2


def train(together: int | None) -> dict[str, Any]:
    """Train on one of the ranks; or, for comparison, in this process on the batches of so many ranks."""
    # A function that travels brings its own imports.
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    import hvdloss.torch as hvd
    from hvdloss.data import Epoch, Shuffled

    hvd.init()
    torch.set_num_threads(1)
    x, y = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(torch.tensor(x[:500] / 16), torch.tensor(y[:500]))
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 10).double()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    objective = hvd.Objective("cross_entropy")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=RATE), model.named_parameters(), objective
    )
    ranks = together or hvd.size()
    sharding = Shuffled(len(data), seed=1, shares=1.0 / (1.0 + np.arange(ranks)))  # uneven
    loader = hvd.ShardedLoader(data, sharding, BATCH) if together is None else None
    for number in range(EPOCHS):
        if loader is None:
            epoch = Epoch(sharding, ranks, number)
            parts = zip(*(epoch.batches(rank, BATCH) for rank in range(ranks)), strict=True)
            batches: Any = (data[np.concatenate(part).astype(int)] for part in parts)
        else:
            batches = loader
        for inputs, labels in batches:
            optimizer.zero_grad()
            objective(model(inputs), labels).backward()
            optimizer.step()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return {
        "rank": hvd.rank(),
        "ranks": hvd.size(),
        "weights": weights.tolist(),
        "loss": optimizer.last_step.loss,
    }


def by_horovod(function: Callable[..., Any], ranks: int) -> list[Any]:
    """Run a function on new ranks of this machine; ``hosts="a:4,b:4"`` takes others."""
    import horovod

    return horovod.run(function, args=(None,), np=ranks, use_gloo=True)


def by_ray(function: Callable[..., Any], ranks: int) -> list[Any]:
    """Run a function on ranks that are Ray's actors, wherever its cluster has room."""
    import ray
    from horovod.ray import RayExecutor

    ray.init(num_cpus=ranks, include_dashboard=False, logging_level="warning", log_to_driver=False)
    try:
        executor = RayExecutor(
            RayExecutor.create_settings(timeout_s=120), num_workers=ranks, cpus_per_worker=1
        )
        executor.start()
        try:
            return executor.run(function, args=[None])
        finally:
            executor.shutdown()
    finally:
        ray.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="how many (%(default)s)")
    parser.add_argument("--launcher", choices=["horovod", "ray"], default="horovod")
    args = parser.parse_args()
    results = {"horovod": by_horovod, "ray": by_ray}[args.launcher](train, args.ranks)

    import numpy as np

    alone = np.array(train(args.ranks)["weights"])
    errors = [
        float(np.linalg.norm(np.array(one["weights"]) - alone) / np.linalg.norm(alone)) for one in results
    ]
    good = max(errors) <= 1e-12 and [one["rank"] for one in results] == list(range(args.ranks))
    told = {"ranks": results[0]["ranks"], "errors": errors, "loss": results[0]["loss"], "exact": good}
    print(json.dumps(told))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
