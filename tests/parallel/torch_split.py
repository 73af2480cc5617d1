"""Layers split over ranks: values, gradients, checkpoints, memory; against ordinary layers in one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch_sharded import near, random_sizes, refused
from torch_support import DEVICE, here, same_on_all_ranks

import hvdloss.split.parts
import hvdloss.torch as hvd
from hvdloss.errors import ConfigError, ShapeError
from hvdloss.torch.collectives import copy_to_ranks
from hvdloss.torch.split.base import SplitModule
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-4 dist-2")


def parts(split: torch.nn.Module, key: str, whole: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of what the ordinary model has under `key`, by index arithmetic of its own."""
    layer = split.get_submodule(key.rpartition(".")[0])
    cut = layer.cuts.get(key.rpartition(".")[2]) if isinstance(layer, SplitModule) else None
    if cut is None:
        return whole
    block = whole.shape[cut.axis] // cut.blocks
    first, count = cut.parts.offset(layer.rank) * cut.unit, cut.parts.size(layer.rank) * cut.unit
    rows = [n * block + first + i for n in range(cut.blocks) for i in range(count)]
    return whole.index_select(cut.axis, here(rows))


def compare(split: torch.nn.Module, one: torch.nn.Module, what: str) -> float:
    """Hold every gradient of this rank's parts against one process's."""
    right = dict(one.named_parameters())
    assert [key for key, _ in split.named_parameters()] == list(right)
    return max(
        near(p.grad, parts(split, key, right[key].grad), f"{what}, {key}")
        for key, p in split.named_parameters()
    )


def made_alike(make_split: Any, make_one: Any, seed: int) -> tuple[Any, Any]:
    """Make both after the same seed; their parameters and the generator must be the same afterwards."""
    torch.manual_seed(seed)
    one = make_one()
    after = torch.rand(3)
    torch.manual_seed(seed)
    split = make_split()
    assert torch.equal(torch.rand(3), after)
    whole = one.to(DEVICE).state_dict()
    assert list(split.state_dict()) == list(whole)
    for key, value in split.state_dict().items():
        assert torch.equal(value, parts(split, key, whole[key])), key
    return split, one


def transformer(rng: np.random.Generator, first: bool, activation: str) -> tuple[Any, Any, int]:
    """Return an embedding and a block, split by random sizes and whole, and how many words there are."""
    size = hvd.size()
    heads, features, words = (int(rng.integers(size, size + 6)) for _ in range(3))
    width = heads * int(rng.integers(1, 4))
    sizes = [random_sizes(rng, n, size) if rng.integers(2) else None for n in (heads, features, words)]
    kind = {"norm_first": first, "activation": activation, "dtype": torch.float64}
    place = {"device": DEVICE, "dtype": torch.float64}

    def split() -> torch.nn.Module:
        return torch.nn.Sequential(
            hvd.VocabParallelEmbedding(words, width, padding_idx=0, sizes=sizes[2], **place),
            hvd.ParallelTransformerLayer(
                width, heads, features, head_sizes=sizes[0], feature_sizes=sizes[1], device=DEVICE, **kind
            ),
        )

    def one() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Embedding(words, width, padding_idx=0, dtype=torch.float64),
            torch.nn.TransformerEncoderLayer(width, heads, features, dropout=0.0, batch_first=True, **kind),
        )

    return *made_alike(split, one, int(rng.integers(1000))), words


@needs("gloo-2", more="gloo-4 dist-2 dist-4")
def case_random_blocks_equal_one_process():
    """A transformer over random uneven heads and features, with its embedding as its head."""
    rng = np.random.default_rng(7)
    worst = 0.0
    for number in range(8):
        split, one, words = transformer(rng, bool(rng.integers(2)), ("relu", "gelu")[number % 2])
        n, length = int(rng.integers(1, 4)), int(rng.integers(1, 5))
        tokens, target = (here(rng.integers(0, words, (n, length))) for _ in range(2))
        upstream = here(rng.normal(size=(n, length)))
        padding = here(np.arange(length) >= rng.integers(1, length + 1, (n, 1)))
        causal = here(np.triu(np.ones((length, length), dtype=bool), 1))
        masks = [{}, {"src_mask": causal}, {"src_key_padding_mask": padding}][number % 3]
        x = split[1](split[0](tokens), **masks)
        logits = F.linear(copy_to_ranks(x), split[0].weight)
        losses = hvd.sharded_cross_entropy(logits, target, split[0].shards)
        (losses * upstream).sum().backward()
        right = one[1](one[0](tokens), **masks)
        whole = F.cross_entropy(F.linear(right, one[0].weight).transpose(1, 2), target, reduction="none")
        (whole * upstream).sum().backward()
        worst = max(
            worst,
            near(x.detach(), right.detach(), f"trial {number}, outputs"),
            near(losses.detach(), whole.detach(), f"trial {number}, losses"),
            compare(split, one, f"trial {number}"),
        )
        same_on_all_ranks(x.tolist())
    return {"error": worst}


def case_a_column_and_a_row_layer_for_any_dtype():
    rng = np.random.default_rng(2)

    def layers(column: Any, row: Any, **options: Any) -> Any:
        return lambda: torch.nn.Sequential(column(29, 37, **options), torch.nn.Tanh(), row(37, 5, **options))

    for dtype, bias in ((torch.float32, True), (torch.bfloat16, False), (torch.float64, True)):
        kind = {"bias": bias, "dtype": dtype}
        among = {"sizes": random_sizes(rng, 37, hvd.size()), "device": DEVICE}
        split, one = made_alike(
            layers(hvd.ColumnParallelLinear, hvd.RowParallelLinear, **kind, **among),
            layers(torch.nn.Linear, torch.nn.Linear, **kind),
            5,
        )
        x = here(torch.randn(6, 29, generator=torch.Generator().manual_seed(1))).to(dtype)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        split(mine).square().sum().backward()
        one(theirs).square().sum().backward()
        if dtype == torch.float64:
            near(mine.grad, theirs.grad, "input")
            compare(split, one, "layers")
        else:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.03, atol=0.03)


def case_initial_weights_in_pieces():
    module = hvdloss.split.parts
    was, module._CHUNK = module._CHUNK, 64

    def layer(kind: Any, *sizes: int, **options: Any) -> Any:
        return lambda: kind(*sizes, **options)

    try:
        for dtype in (torch.float64, torch.float32):
            for split, ordinary, sizes in (
                (hvd.VocabParallelEmbedding, torch.nn.Embedding, (133, 7)),
                (hvd.RowParallelLinear, torch.nn.Linear, (41, 35)),
            ):
                mine, one = made_alike(
                    layer(split, *sizes, device=DEVICE, dtype=dtype), layer(ordinary, *sizes, dtype=dtype), 3
                )
                back = hvd.full_state_dict(mine, everywhere=True)
                assert all(
                    torch.equal(back[key].to(DEVICE), value) for key, value in one.state_dict().items()
                )
    finally:
        module._CHUNK = was


def case_checkpoints_of_blocks_for_any_split():
    rng = np.random.default_rng(4)
    heads, features = hvd.size() + 2, 3 * hvd.size() + 1
    one = torch.nn.TransformerEncoderLayer(2 * heads, heads, features, dropout=0.0, batch_first=True)
    saved = one.state_dict()

    def split() -> torch.nn.Module:
        return hvd.ParallelTransformerLayer(
            2 * heads,
            heads,
            features,
            head_sizes=random_sizes(rng, heads, hvd.size()),
            feature_sizes=random_sizes(rng, features, hvd.size()),
        )

    model = split()
    model.load_state_dict(saved)
    back = hvd.full_state_dict(model, everywhere=True)
    assert list(back) == list(saved)
    other = split()  # another split of the same
    other.load_state_dict(back, assign=True)
    again = hvd.full_state_dict(other)
    if hvd.rank() == 0:
        assert all(torch.equal(again[key], saved[key]) for key in saved)
        torch.nn.TransformerEncoderLayer(2 * heads, heads, features, batch_first=True).load_state_dict(again)
    elif hvd.size() > 1:
        assert "linear1.weight" not in again
        assert "norm1.weight" in again
    other.load_state_dict(other.state_dict())  # its own parts
    wrong = {**saved, "linear2.weight": torch.zeros(2 * heads, features + 1)}
    refused(ShapeError, lambda: model.load_state_dict(wrong), "linear2.weight", "axis 1")


def held(model: torch.nn.Module) -> int:
    """Return the bytes of parameters, gradients, and Adam's moments, after a step."""
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values()]
    return sum(t.numel() * t.element_size() for p in model.parameters() for t in (p, p.grad)) + sum(
        t.numel() * t.element_size() for t in kept
    )


def case_a_part_of_a_transformer_takes_a_part_of_the_memory():
    def model(embedding: Any, block: Any, **options: Any) -> torch.nn.Module:
        return torch.nn.Sequential(embedding(512, 64), *(block(64, 8, 256, **options) for _ in range(2)))

    whole = model(torch.nn.Embedding, torch.nn.TransformerEncoderLayer, batch_first=True, dropout=0.0)
    split = model(hvd.VocabParallelEmbedding, hvd.ParallelTransformerLayer)
    tokens = torch.arange(12).view(3, 4)
    for one in (whole, split):
        one(tokens).square().sum().backward()
    share = held(split) / held(whole)
    assert share <= 0.6, share
    return {"share of the memory": share}


def case_a_block_sends_four_times():
    """Two all-reduces forward and two backward, as docs/howto/split-models.md says."""
    from hvdloss.torch import collectives

    sent: list[int] = []
    plain = collectives._summed

    def counted(x: torch.Tensor, at: Any) -> torch.Tensor:
        sent.append(x.numel())
        return plain(x, at)

    heads = 4 * hvd.size()
    block = hvd.ParallelTransformerLayer(2 * heads, heads, dim_feedforward=16)
    x = torch.ones(3, 5, 2 * heads, requires_grad=True)
    collectives._summed = counted
    try:
        out = block(x)
        assert sent == [x.numel()] * 2
        out.sum().backward()
        assert sent == [x.numel()] * 4
    finally:
        collectives._summed = plain


def case_mistakes_in_split_layers():
    size = hvd.size()
    for kind, call, word in (
        (ShapeError, lambda: hvd.ColumnParallelLinear(3, size)(torch.zeros(2, 4)), "in_features=3"),
        (ShapeError, lambda: hvd.RowParallelLinear(3 * size, 2)(torch.zeros(2, 3 * size + 1)), "=3"),
        (ShapeError, lambda: hvd.VocabParallelEmbedding(9, 2)(torch.tensor([3, 9])), "index 9"),
        (ShapeError, lambda: hvd.ParallelSelfAttention(2 * size, size)(torch.zeros(2, 2 * size)), "(N, T"),
        (
            ShapeError,
            lambda: hvd.ParallelSelfAttention(size, size)(torch.zeros(2, 3, size), torch.zeros(2, 2)),
            "attn_mask of shape (2, 2)",
        ),
        (ConfigError, lambda: hvd.ColumnParallelLinear(3, size, sizes=[size + 1]), "sizes=["),
        (ConfigError, lambda: hvd.ParallelSelfAttention(2 * size + 1, 2 * size), "does not divide"),
        (ConfigError, lambda: hvd.VocabParallelEmbedding(9, 2, padding_idx=9), "padding_idx=9"),
        (ConfigError, lambda: hvd.ParallelTransformerLayer(size, size, activation="tanh"), "'gelu'"),
    ):
        refused(kind, call, word)
