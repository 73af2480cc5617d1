"""Sharded loaders in one process: what is refused, and batches of other kinds."""

from __future__ import annotations

import collections

import pytest
import torch

import hvdloss
import hvdloss.torch as hvd
from hvdloss.data import Contiguous, Shuffled

Pair = collections.namedtuple("Pair", "x y")


@pytest.fixture(autouse=True)
def _initialised():
    hvd.init()


def test_what_cannot_be_is_refused():
    data = torch.utils.data.TensorDataset(torch.arange(5))
    with pytest.raises(hvdloss.ConfigError, match="shuffle= is decided by the sharding"):
        hvd.ShardedLoader(data, Contiguous(5), 2, shuffle=True)
    with pytest.raises(hvdloss.ConfigError, match="has 5 samples, but the sharding 6"):
        hvd.ShardedLoader(data, Contiguous(6), 2)
    with pytest.raises(hvdloss.ConfigError, match="batch_size=0"):
        hvd.ShardedLoader(data, Contiguous(5), 0)
    loader = hvd.ShardedLoader(data, Shuffled(5, seed=1), 2)
    with pytest.raises(hvdloss.ConfigError, match="seed: 2 then, 1 now"):
        loader.load_state_dict(hvd.ShardedLoader(data, Shuffled(5, seed=2), 2).state_dict())
    for _ in loader:
        with pytest.raises(hvdloss.UsageError, match="being iterated over"):
            next(iter(loader))


def test_the_position_counts_what_was_given():
    data = torch.utils.data.TensorDataset(torch.arange(7))
    loader = hvd.ShardedLoader(data, Contiguous(7), 2, num_workers=1, prefetch_factor=3)
    seen = []
    for (x,) in loader:
        seen += x.tolist()
        if len(seen) == 4:
            break
    assert loader.state_dict()["parts"] == [[4]]  # not what was read ahead
    assert len(loader) == 2
    again = hvd.ShardedLoader(data, Contiguous(7), 2)
    again.load_state_dict(loader.state_dict())
    assert [x.tolist() for (x,) in again] == [[4, 5], [6]]
    assert [x.tolist() for (x,) in again] == [[0, 1], [2, 3], [4, 5], [6]]
    assert again.state_dict()["epoch"] == 1


@pytest.mark.parametrize(
    ("sample", "empty"),
    [
        (torch.ones(3), torch.ones(0, 3)),
        ((1, 2.0), [torch.ones(0), torch.ones(0)]),
        ({"a": torch.ones(2), "b": "word"}, {"a": torch.ones(0, 2), "b": []}),
        (Pair(torch.ones(2), [1, 2]), Pair(torch.ones(0, 2), [torch.ones(0), torch.ones(0)])),
    ],
)
def test_a_batch_without_samples_has_no_rows(sample, empty):
    class One(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            return sample

    loader = hvd.ShardedLoader(One(), Contiguous(1), 1)
    (full,) = list(loader)
    nothing = loader._loader.collate_fn([])

    def like(a, b):
        if isinstance(a, torch.Tensor):
            return a.shape == b.shape
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(like(a[k], b[k]) for k in a)
        return len(a) == len(b) and all(like(x, y) for x, y in zip(a, b, strict=True))

    assert type(nothing) is type(full)
    assert like(nothing, empty), nothing


def test_an_empty_data_set_has_no_steps():
    data = torch.utils.data.TensorDataset(torch.zeros(0))
    loader = hvd.ShardedLoader(data, Contiguous(0), 2)
    assert len(loader) == 0
    assert list(loader) == []


def test_a_rank_without_samples_may_bring_something_else():
    """For models that cannot bear a batch without rows."""
    data = torch.utils.data.TensorDataset(torch.arange(1.0, 4.0))
    loader = hvd.ShardedLoader(data, Contiguous(3), 2, empty=lambda batch: [batch[0] * 0])
    collate = loader._loader.collate_fn
    assert collate([])[0].tolist() == [0.0]
    assert collate([data[1]])[0].tolist() == [2.0]
