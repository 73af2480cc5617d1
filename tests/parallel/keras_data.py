"""Sharded data in ``fit``: every sample once, uneven ends without bias, going on in the middle."""

from __future__ import annotations

import collections
import json

import keras
import numpy as np
import pytest
from keras_support import before_case, difference, network, same_on_all_ranks, sgd

import hvdloss
import hvdloss.keras as hvd
from hvdloss.data import Contiguous, Dirichlet, Grouped, Shuffled
from hvdloss.tensorflow.ops import communicator_of
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")

__all__ = ["before_case"]

SAMPLES = 31


def arrays():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(SAMPLES, 5))
    return x, 2 * x[:, :1] + rng.normal(size=(SAMPLES, 1)), rng.uniform(0.5, 2.0, SAMPLES)


def shardings():
    labels = np.random.default_rng(1).integers(0, 3, SAMPLES)
    yield Shuffled(SAMPLES, seed=3, shares=[1 + 2 * r for r in range(hvd.size())])
    yield Grouped(labels * 0, seed=3)  # all samples are one group's: all other ranks have none
    yield Dirichlet(labels, 0.2, seed=3)


def batches_of(sharding, epoch, size):
    """Return the global batches of an epoch."""
    shards = sharding.shards(hvd.size(), epoch)
    for step in range(max(-(-len(shard) // size) for shard in shards)):
        yield np.concatenate([shard[step * size : (step + 1) * size] for shard in shards])


def case_fit_on_uneven_shards_is_one_process():
    errors = []
    x, y, w = arrays()
    for sharding in shardings():
        model, one = network(), network()
        model.compile(hvd.DistributedOptimizer(sgd()), hvd.Objective("mse"))
        data = hvd.ShardedDataset((x, y, w), sharding, 4)
        model.fit(data, epochs=2, verbose=0)
        one.compile(sgd(), keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"))
        for epoch in range(2):
            for rows in batches_of(sharding, epoch, 4):
                one.train_on_batch(x[rows], y[rows], sample_weight=w[rows])
        errors.append(difference(model.get_weights(), one.get_weights()))
        assert errors[-1] < 1e-10, (sharding, errors)
        same_on_all_ranks(model.get_weights())
        assert data.epoch.number == 1
        model.fit(data, verbose=0)
        assert data.epoch.number == 2
        for rows in batches_of(sharding, 2, 4):
            one.train_on_batch(x[rows], y[rows], sample_weight=w[rows])
        assert difference(model.get_weights(), one.get_weights()) < 1e-10
    return {"error, float64": max(errors)}


def seen_by_all(rows):
    ranks = communicator_of(hvd.global_process_set)
    parts = [json.loads(text) for text in ranks.all_gather_bytes(json.dumps(rows).encode(), "seen")]
    return collections.Counter(i for part in parts for i in part)


def case_every_sample_once_and_on_from_the_middle():
    for sharding in shardings():
        seen = []

        def load(rows, seen=seen):
            seen.extend(rows.tolist())
            return tuple(a[rows] for a in arrays())

        data = hvd.ShardedDataset(load, sharding, 4)
        for number in range(len(data)):
            data[number]
        assert seen_by_all(seen) == collections.Counter(range(SAMPLES))
        del seen[:]
        steps = min(2, len(data))
        for number in range(steps):
            data[number]
        state = json.loads(json.dumps(data.state_dict(steps)))
        same_on_all_ranks([np.frombuffer(json.dumps(state, sort_keys=True).encode(), np.uint8)])
        again = hvd.ShardedDataset(load, sharding, 3)
        again.load_state_dict(state)
        for number in range(len(again)):
            again[number]
        assert seen_by_all(seen) == collections.Counter(range(SAMPLES))
        assert json.loads(json.dumps(again.state_dict())) == state or len(again) == 0
        again.next_epoch()
        assert again.epoch.number == 1


def case_fit_goes_on_in_the_middle_of_an_epoch():
    x, y, w = arrays()
    sharding = Shuffled(SAMPLES, seed=4)
    model, one = network(), network()
    model.compile(hvd.DistributedOptimizer(sgd()), hvd.Objective("mse"))
    one.compile(sgd(), keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"))
    data = hvd.ShardedDataset((x, y, w), sharding, 3)

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                self.state, self.weights = data.state_dict(batch + 1), self.model.get_weights()

    keep = Keep()
    model.fit(data, verbose=0, callbacks=[keep])
    model.set_weights(keep.weights)  # as after a crash
    for momentum in model.optimizer.momentums:
        momentum.assign(momentum * 0)
    again = hvd.ShardedDataset((x, y, w), sharding, 3)
    again.load_state_dict(json.loads(json.dumps(keep.state)))
    with pytest.raises(hvdloss.ConfigError, match="inside epoch 0"):
        model.fit(again, epochs=2, verbose=0)
    model.fit(again, verbose=0)
    model.fit(again, verbose=0)
    assert again.epoch.number == 1
    one.set_weights(keep.weights)
    for rows in [*list(batches_of(sharding, 0, 3))[2:], *batches_of(sharding, 1, 3)]:
        one.train_on_batch(x[rows], y[rows], sample_weight=w[rows])
    error = difference(model.get_weights(), one.get_weights())
    assert error < 1e-10, error
    return {"error, float64": error}


def case_rows_come_in_the_order_of_the_shard():
    x, y, w = arrays()
    sharding = Shuffled(SAMPLES, seed=1)
    data = hvd.ShardedDataset((x, y, w), sharding, 5)
    mine = sharding.shards(hvd.size())[hvd.rank()]
    assert np.array_equal(np.concatenate([data[i][0] for i in range(len(data))]), x[mine])


def case_what_cannot_be_is_refused():
    x, y, _ = arrays()
    for make, words in (
        (lambda: hvd.ShardedDataset((x, y[:-1]), Contiguous(SAMPLES), 4), "rows, but the sharding 31"),
        (lambda: hvd.ShardedDataset([x, y], Contiguous(SAMPLES), 4), "arrays= is a list"),
        (lambda: hvd.ShardedDataset((x, y), Contiguous(SAMPLES), 0), "batch_size=0"),
    ):
        with pytest.raises(hvdloss.ConfigError, match=words):
            make()
