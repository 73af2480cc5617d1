"""Sharded loaders: every sample once, uneven ends without bias, and going on in the middle."""

from __future__ import annotations

import collections
import json

import numpy as np
import torch
from torch_support import before_case, difference, flat, generator, network, same_on_all_ranks

import hvdloss.torch as hvd
from hvdloss.data import Dirichlet, Grouped, Shuffled, Stratified
from hvdloss.torch.ops import communicator_of
from tests.ranks import needs

NEEDS = needs("gloo-2 gloo-3", more="dist-2")

__all__ = ["before_case"]

SAMPLES = 47


class Numbers(torch.utils.data.Dataset):
    """Samples with their own number, to be told apart."""

    def __init__(self):
        g = generator(7)
        self.x = torch.randn(SAMPLES, 5, generator=g, dtype=torch.float64)
        self.y = torch.randn(SAMPLES, 1, generator=g, dtype=torch.float64) + self.x[:, :1] * 2

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.y[i], "number": i, "word": f"s{i}"}


def shardings():
    labels = np.random.default_rng(1).integers(0, 4, SAMPLES)
    yield Shuffled(SAMPLES, seed=3)
    yield Shuffled(SAMPLES, seed=3, shares=[1 + 2 * r for r in range(hvd.size())])
    yield Stratified(labels, seed=3)
    yield Grouped(labels, seed=3)  # some rank may have none of four groups
    yield Dirichlet(labels, 0.1, seed=3)


def seen_by_all(numbers):
    """Return how often each sample was seen, over all ranks."""
    ranks = communicator_of(hvd.global_process_set)
    parts = [json.loads(text) for text in ranks.all_gather_bytes(json.dumps(numbers).encode(), "seen")]
    return collections.Counter(i for part in parts for i in part)


def case_every_sample_once_per_epoch():
    for sharding in shardings():
        loader = hvd.ShardedLoader(Numbers(), sharding, 4)
        for epoch in range(2):
            assert loader.epoch.number == epoch or loader.epoch.exhausted
            steps, numbers = len(loader), []
            same_on_all_ranks(steps)
            for count, batch in enumerate(loader):
                assert batch["x"].shape[1:] == (5,)
                assert len(batch["x"]) == len(batch["word"]) == len(batch["number"])
                assert len(loader) == steps - count - 1 or loader.epoch.exhausted
                numbers += batch["number"].tolist()
            assert count + 1 == steps
            assert seen_by_all(numbers) == collections.Counter(range(SAMPLES)), sharding


def case_workers_see_the_same():
    for options in ({"num_workers": 2}, {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 4}):
        alone = hvd.ShardedLoader(Numbers(), Shuffled(SAMPLES, seed=3), 4)
        workers = hvd.ShardedLoader(Numbers(), Shuffled(SAMPLES, seed=3), 4, **options)
        for _ in range(2):
            pairs = list(zip(alone, workers, strict=True))
            assert pairs
            assert all(torch.equal(a["x"], b["x"]) for a, b in pairs)


def trained(model, sharding, batch_size, epochs=2):
    optimizer_of = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(optimizer_of, model.named_parameters(), objective)
    loader = hvd.ShardedLoader(Numbers(), sharding, batch_size)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            objective(model(batch["x"]), batch["y"]).backward()
            optimizer.step()
    return optimizer.last_step.step


def case_uneven_ends_are_one_process_with_the_same_global_batches():
    errors = []
    data = Numbers()
    for sharding in shardings():
        model, one = network(generator(2)), network(generator(2))
        steps = trained(model, sharding, 4)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
        done = 0
        for number in range(2):
            shards = sharding.shards(hvd.size(), number)
            for step in range(max(-(-len(shard) // 4) for shard in shards)):
                both = np.concatenate([shard[4 * step : 4 * step + 4] for shard in shards])
                optimizer.zero_grad()
                ((one(data.x[both]) - data.y[both]) ** 2).mean().backward()
                optimizer.step()
                done += 1
        assert done == steps
        errors.append(difference(flat(model.parameters()), flat(one.parameters())))
        assert errors[-1] < 1e-12, (sharding, errors)
    return {"error, float64": max(errors)}


def case_an_interrupted_epoch_goes_on_on_other_ranks():
    """Some steps on all ranks, then the rest on the first two ranks (or one)."""
    for number, sharding in enumerate(shardings()):
        if sharding.shares is not None:
            continue
        loader = hvd.ShardedLoader(Numbers(), sharding, 3, num_workers=number % 2)
        numbers, state = [], None
        for step, batch in enumerate(loader):
            numbers += batch["number"].tolist()
            state = json.loads(json.dumps(loader.state_dict()))
            if step == 1:
                break
        same_on_all_ranks(state)
        few = min(2, hvd.size() - 1) or 1
        members = hvd.global_process_set if few == hvd.size() else hvd.add_process_set(range(few))
        if few == hvd.size() or members.included():
            again = hvd.ShardedLoader(Numbers(), sharding, 3, process_set=members)
            again.load_state_dict(state)
            for batch in again:
                numbers += batch["number"].tolist()
        assert seen_by_all(numbers) == collections.Counter(range(SAMPLES)), sharding
        if few != hvd.size():
            hvd.remove_process_set(members)
